"""Rerun scene: the map, the cameras and the scene graph in a Rerun recording."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from adapters.views.display_geometry import (
    DisplayScale,
    cam_centers,
    display_scale,
    frustum_strokes,
    plan_positions,
)
from adapters.views.display_parts import ChunkNumbers, Part, PartTracker, split_parts
from adapters.views.display_trajectory import FRAMES_PER_PART, DisplayTrajectory
from adapters.views.rerun_blueprint import Color
from adapters.views.viewpoint import Viewpoint, overview_viewpoint
from engine.types import Float32Array, Float64Array, MapView, PairReason

if TYPE_CHECKING:
    from rerun import AsComponents, LineStrips3D, RecordingStream

KEYFRAMES_PER_CHUNK = 8
MAX_EDGES = 300  # newest edges of the scene graph that are drawn
MAX_LABELLED_NODES = 60
NODE_SPACING = 30.0  # between neighbouring nodes of the graph, in ui points
POINT_RADIUS = 1.75  # in ui points
LIVE_IMAGE_RATIO = 4.0  # the live camera's pyramid, of a keyframe's

KEYFRAME_COLOR: Color = (98, 168, 240, 255)
TRAJECTORY_COLOR: Color = (255, 193, 84, 255)
LIVE_COLOR: Color = (255, 255, 255, 255)
REASON_COLORS: Mapping[PairReason, Color] = {
    PairReason.TEMPORAL: (52, 66, 88, 255),
    PairReason.COVISIBLE: (38, 84, 62, 255),
    PairReason.RETRIEVED: (150, 62, 110, 255),
    PairReason.GPS: (150, 138, 66, 255),
    PairReason.EXHAUSTIVE: (60, 60, 66, 255),
    PairReason.SECOND: (66, 134, 150, 255),
}


class SceneDrawing:
    """The part of a recording that shows a ``MapView``.

    Points and cameras are drawn in chunks of consecutive keyframes, and only chunks that changed
    visibly are drawn again, so the cost of an update follows what changed and not the map's size.
    Points far outside the map (``DisplayScale.shows``) are left out of the drawing, not of the map.
    """

    def __init__(self, recording: RecordingStream) -> None:
        self._recording = recording
        self._scale: DisplayScale | None = None
        self._chunks = ChunkNumbers(size=KEYFRAMES_PER_CHUNK)
        self._trackers: dict[str, PartTracker] = {}
        self._trajectory = DisplayTrajectory()
        self._plan: dict[int, Float64Array] = {}
        self._view: MapView | None = None
        self._num_bytes = 0  # drawn by the map at hand

    @property
    def scale(self) -> DisplayScale | None:
        """The sizes of the map on the screen; None before it was drawn."""
        return self._scale

    @property
    def live_image_distance_map(self) -> float:
        """The distance from the live camera at which its image is shown."""
        return LIVE_IMAGE_RATIO * self._scale.frustum_depth_map if self._scale else 1.0

    def overview(self) -> Viewpoint | None:
        """A viewpoint for the map as it was drawn last; None before the first camera."""
        if self._view is None or self._scale is None or not len(self._view.keyframe_ids):
            return None
        points = self._view.points3D_in_world
        return overview_viewpoint(self._view.cam_from_world, points[self._scale.shows(points)])

    def add_position(self, frame_id: int, center_in_world: tuple[float, float, float]) -> None:
        """Adds the first position of a frame; drawn with the next map or tail."""
        self._trajectory.add(frame_id, center_in_world)

    def forget_positions(self) -> None:
        """Forgets where frames are, since another map with a world of its own is shown from now."""
        self._trajectory.forget()

    def draw_all_again(self) -> None:
        """Makes the next ``draw_map`` draw everything, also what did not change."""
        for tracker in self._trackers.values():
            tracker.invalidate()

    def draw_map(self, view: MapView) -> int:
        """Draws what changed: cameras, points, paths and scene graph.

        Returns:
            About how many bytes that took.
        """
        self._num_bytes = 0
        centers = cam_centers(view.cam_from_world)
        scale = display_scale(view.points3D_in_world, centers, previous=self._scale) or self._scale
        if scale is None:
            return 0  # nothing yet; a map that became empty is drawn as such
        self._scale = scale
        self._view = view
        self._trajectory.move(view.keyframe_ids, centers)
        self._draw_cameras(view, scale)
        self._draw_points(view, scale)
        self._draw_trajectory(scale)
        path = [centers] if len(centers) else []
        self._log("world/keyframe_path", _lines(path, KEYFRAME_COLOR, width=1.5))
        self._draw_scene_graph(view, centers)
        return self._num_bytes

    def draw_tail(self) -> None:
        """Draws the newest part of the trajectory, up to the newest posed frame."""
        tail = self._trajectory.tail()
        if len(tail) > FRAMES_PER_PART and self._scale:
            self._draw_trajectory(self._scale)
        elif len(tail) > 1:
            self._log("world/trajectory/tail", _lines([tail], TRAJECTORY_COLOR, width=2.0))

    def _draw_cameras(self, view: MapView, scale: DisplayScale) -> None:
        strokes = frustum_strokes(
            view.cam_from_world,
            focal_px=view.focal_px,
            image_sizes=view.image_sizes,
            depth_map=scale.frustum_depth_map,
            corner_rays=view.corner_rays,
        )
        self._draw_parts(
            "world/keyframes/chunk",
            split_parts(self._chunks.of(view.keyframe_ids), strokes),
            tolerance_map=scale.tolerance_map,
            draw=lambda part: _lines(part.positions, KEYFRAME_COLOR, width=1.0),
        )

    def _draw_points(self, view: MapView, scale: DisplayScale) -> None:
        shown = scale.shows(view.points3D_in_world)
        chunks = self._chunks.of(view.chunk_ids[shown])
        self._draw_parts(
            "world/map/chunk",
            split_parts(chunks, view.points3D_in_world[shown], view.colors[shown]),
            tolerance_map=scale.tolerance_map,
            draw=_points,
        )

    def _draw_trajectory(self, scale: DisplayScale) -> None:
        self._draw_parts(
            "world/trajectory/part",
            self._trajectory.parts(),
            tolerance_map=scale.tolerance_map,
            draw=lambda part: _lines(part.positions, TRAJECTORY_COLOR, width=2.0),
        )
        self._trajectory.cut_tail()
        self._clear("world/trajectory/tail")

    def _draw_scene_graph(self, view: MapView, centers: Float64Array) -> None:
        center_of = dict(zip(view.keyframe_ids.tolist(), centers, strict=True))
        edges = _newest_edges(view)
        lines = [np.stack([center_of[first], center_of[second]]) for first, second, _ in edges]
        colors = [REASON_COLORS[reason] for _, _, reason in edges]
        self._log("world/scene_graph", _lines(lines, colors, width=1.0))
        self._plan = plan_positions(view.keyframe_ids, centers, previous=self._plan)
        self._draw_plan([(first, second) for first, second, _ in edges])

    def _draw_plan(self, edges: Sequence[tuple[int, int]]) -> None:
        import rerun as rr

        frame_ids = sorted({frame_id for edge in edges for frame_id in edge})
        names = [str(frame_id) for frame_id in frame_ids]
        nodes = rr.GraphNodes(
            names,
            positions=[self._plan[frame_id] * NODE_SPACING for frame_id in frame_ids],
            labels=names,
            show_labels=len(names) <= MAX_LABELLED_NODES,
            colors=[KEYFRAME_COLOR] * len(names),
        )
        links = rr.GraphEdges([(str(first), str(second)) for first, second in edges])
        self._log("graph", nodes, links)

    def _draw_parts(
        self,
        entity: str,
        wanted: Mapping[int, Part],
        *,
        tolerance_map: float,
        draw: Callable[[Part], AsComponents],
    ) -> None:
        tracker = self._trackers.setdefault(entity, PartTracker())
        changed, vanished = tracker.update(wanted, tolerance_map=tolerance_map)
        for number, part in changed.items():
            self._num_bytes += part.num_bytes
            self._log(f"{entity}_{number:05d}", draw(part))
        for number in vanished:
            self._clear(f"{entity}_{number:05d}")

    def _log(self, entity: str, *drawn: AsComponents) -> None:
        self._recording.log(entity, *drawn)

    def _clear(self, entity: str) -> None:
        import rerun as rr

        self._recording.log(entity, rr.Clear(recursive=False))


def _newest_edges(view: MapView) -> list[tuple[int, int, PairReason]]:
    """The newest ``MAX_EDGES`` edges between registered keyframes, oldest first."""
    registered = np.isin(view.edges, view.keyframe_ids).all(axis=1)
    rows = np.flatnonzero(registered)
    newest = rows[np.argsort(view.edges[rows].max(axis=1), kind="stable")][-MAX_EDGES:]
    return [(*map(int, view.edges[row]), view.edge_reasons[row]) for row in newest]


def _points(part: Part) -> AsComponents:
    import rerun as rr

    radius = rr.Radius.ui_points(POINT_RADIUS)
    return rr.Points3D(part.positions, colors=part.colors, radii=radius)


def _lines(
    strips: Float32Array | Sequence[Float32Array | Float64Array],
    colors: Color | Sequence[Color],
    *,
    width: float,
) -> LineStrips3D:
    import rerun as rr

    return rr.LineStrips3D(strips, colors=colors, radii=rr.Radius.ui_points(width / 2))
