"""The mapping state machine: keyframes and tracked frames in; a map, poses and facts out.

No I/O and no asyncio: one thread calls it. Global bundle adjustment is handed out as a private copy
for another thread and merged a fixed number of keyframes later, so that the same input gives the
same map however fast the other thread was.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pycolmap

from engine.config import Config
from engine.errors import InferenceError
from engine.geo.georeference import Georeference, gps_rmse_m
from engine.geometry import camera_center
from engine.mapping.bundle_adjustment import (
    GlobalAdjustment,
    GlobalAdjustmentSchedule,
    merge_global_adjustment,
    start_global_adjustment,
)
from engine.mapping.cameras import CameraCalibration
from engine.mapping.current_map import CurrentMap
from engine.mapping.facts import MappingFacts
from engine.mapping.finishing import MapEnd
from engine.mapping.frame_posing import FramePoser
from engine.mapping.georeferencing import Georeferencing, Placement
from engine.mapping.growth import BuiltMap
from engine.mapping.metric_scale import MetricScale
from engine.mapping.restarts import MapStarts
from engine.mapping.sparse_map import MapCopy, SparseMap
from engine.mapping.window_schedule import WindowWork
from engine.mapping.window_selection import SolvedWindow, WindowJob
from engine.matching.pair_matching import PairMatching
from engine.matching.scene_graph import SceneGraph
from engine.ports import EventSink, PairMatcher, WindowSolver
from engine.types import (
    Features,
    FrameId,
    FramePose,
    GpsFix,
    Keyframe,
    MapView,
    TrackedFrame,
    VerifiedPair,
)
from engine.windows.model import WindowSolverConfig
from engine.windows.solver import solve_window as solve


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeyframeRecord:
    """What the journal keeps of a keyframe."""

    keyframe: Keyframe
    camera: pycolmap.Camera  # a copy
    pairs: tuple[VerifiedPair, ...]
    moved: tuple[Features, ...]  # keypoint tables of other keyframes that changed meanwhile


class MappingPipeline:
    """Turns keyframes into a growing map, and tracked frames into poses.

    Args:
        config: the whole configuration; each part is handed its own section.
        matcher: matches pairs of keyframes.
        graph: chooses pairs and keeps them.
        emit: takes facts.
        clock: seconds since the start of the run.
        solve_window: solves stretches of keyframes; by default the engine's own solver.
        fix_at: where a camera (by its key) was at a capture time, by what came beside its frames.
    """

    def __init__(
        self,
        config: Config,
        *,
        matcher: PairMatcher,
        graph: SceneGraph,
        emit: EventSink,
        clock: Callable[[], float],
        solve_window: WindowSolver | None = None,
        fix_at: Callable[[str, float], GpsFix | None] = lambda camera_key, captured_at_s: None,
    ) -> None:
        self._config = config
        self._graph = graph
        self._matching = PairMatching(
            graph, matcher, two_view=config.two_view, dense=config.dense_matching
        )
        self._facts = MappingFacts(emit=emit, clock=clock)
        self._cameras = CameraCalibration(config.cameras, emit=emit, clock=clock)
        self._current = CurrentMap(
            config,
            graph=graph,
            cameras=self._cameras,
            facts=self._facts,
            depths_m=self._matching.depths_m,
        )
        self._poser = FramePoser(
            registration=config.registration,
            seed=config.runtime.seed,
        )
        self._schedule = GlobalAdjustmentSchedule(config.global_bundle_adjustment)
        self._fix_at = fix_at
        self._make_work(solve_window or functools.partial(solve, config=WindowSolverConfig()))
        self._separate_maps: tuple[SparseMap, ...] = ()
        self._in_flight: GlobalAdjustment | None = None
        self._keyframes_since_start = 0
        self._loop_waits_for_adjustment = False
        self._reported: set[FrameId] = set()  # frames with a pose
        self._placed: set[FrameId] = set()  # keyframes told as registered
        self._moved: dict[FrameId, Features] = {}  # since the last record
        self._new_poses: list[FramePose] = []
        self._version = 0

    def _make_work(self, solve_window: WindowSolver) -> None:
        """Makes what works on the map: starts, windows, its place on the globe, its end."""
        config, graph = self._config, self._graph
        self._starts = MapStarts(
            initialization=config.initialization,
            rescue=config.rescue,
            window=config.window,
            graph=graph,
            cameras=self._cameras,
            new_map=self._current.new_map,
            solve_window=solve_window,
        )
        self._windows = WindowWork(
            config.window,
            graph=graph,
            solve=solve_window,
            merge_config=self._current.window_merge_config,
            facts=self._facts,
        )
        self._georeferencing = Georeferencing(
            config, position_of=self._position_of, facts=self._facts
        )
        self._end = MapEnd(
            config,
            current=self._current,
            starts=self._starts,
            windows=self._windows,
            georeferencing=self._georeferencing,
            cameras=self._cameras,
            graph=graph,
        )

    # -- state ----------------------------------------------------------------------------------

    @property
    def sparse_map(self) -> SparseMap:
        """The map; for the mapping thread only."""
        return self._current.sparse_map

    @property
    def separate_maps(self) -> tuple[SparseMap, ...]:
        """Maps of keyframes that could not be joined to the map; known when it is finished."""
        return self._separate_maps

    @property
    def is_initialized(self) -> bool:
        """Whether there is a map."""
        return self._current.is_initialized

    @property
    def num_keyframes(self) -> int:
        """Keyframes seen, registered or not."""
        return len(self._graph.keyframe_ids)

    @property
    def merge_is_due(self) -> bool:
        """Whether the adjustment in flight must be merged before the next keyframe."""
        return (
            self._in_flight is not None
            and self._keyframes_since_start
            >= self._config.global_bundle_adjustment.merge_after_keyframes
        )

    def trajectory(self) -> list[FramePose]:
        """Today's pose of every frame, in order of arrival; empty without a map.

        In metres east, north, up once the map is laid onto GPS.
        """
        return self._georeferencing.poses_in_metres(self._poser.trajectory(self._map))

    def keyframe_record(self, frame_id: FrameId) -> KeyframeRecord:
        """What is worth keeping of the newest keyframe, and of what it changed."""
        keyframe = self._graph.keyframe(frame_id)
        self._moved.pop(frame_id, None)
        moved, self._moved = tuple(self._moved.values()), {}
        return KeyframeRecord(
            keyframe=keyframe,
            camera=copy.deepcopy(self._map.camera(keyframe.camera_key)),
            pairs=tuple(self._graph.verified_pairs(frame_id)),
            moved=moved,
        )

    def cameras(self) -> list[pycolmap.Camera]:
        """Copies of all cameras as calibrated now."""
        return self._cameras.copies(self._map)

    @property
    def placement(self) -> Placement | None:
        """Where the map was last found to lie on the globe."""
        return self._georeferencing.placement

    def gps_rmse_m(self) -> float | None:
        """How far registered keyframes are from their GPS positions, wrong ones left out.

        None without enough of them.
        """
        if self.placement is not None:
            return self.placement.georeference.rmse_m
        known = {
            i: fix
            for i in self._map.registered_ids
            if (fix := self._position_of(self._map.keyframe(i))) is not None
        }
        poses = np.array([self._map.cam_from_world(i) for i in known]).reshape(-1, 3, 4)
        return gps_rmse_m(camera_center(poses), list(known.values()))

    def copies_in_metres(self) -> tuple[list[MapCopy], Placement | None]:
        """Private copies of the map and of those apart from it, each in metres if it was placed.

        Also where the map lies on the globe. Maps apart are placed by the same origin, if at all.
        """
        placement = self._georeferencing.update(self._map)
        copies = [self._copy(self._map, None if placement is None else placement.georeference)]
        for separate in self._separate_maps:
            found = self._georeferencing.place_apart(separate) if placement else None
            copies.append(self._copy(separate, found))
        return copies, placement

    def _copy(self, sparse_map: SparseMap, found: Georeference | None) -> MapCopy:
        reconstruction = sparse_map.copy_reconstruction()
        is_in_metres = found is not None and self._georeferencing.to_metres(reconstruction, found)
        return MapCopy(reconstruction=reconstruction, is_in_metres=is_in_metres)

    def metric_scale(self) -> MetricScale | None:
        """How long the map's unit is, as the matcher's depths have it; None when nothing tells."""
        return self._current.metric_scale()

    def take_new_poses(self) -> list[FramePose]:
        """Poses that became known since the last call, each frame once, as first reported."""
        taken, self._new_poses = self._new_poses, []
        return taken

    def num_interpolated_frames(self) -> int:
        """Frames of the trajectory without a pose of their own."""
        return self._poser.num_interpolated(self._map)

    # -- input ----------------------------------------------------------------------------------

    def add_keyframe(self, keyframe: Keyframe) -> None:
        """Takes a keyframe into the scene graph and, when it fits, into the map.

        Raises:
            InferenceError: the matcher failed. The keyframe is there with the pairs that held
                before, and is registered when others bring it in.
        """
        started_s = time.monotonic()
        self.meet_keyframe(keyframe)
        try:
            verified = self.match_keyframe(keyframe.frame_id)
        except InferenceError:
            self.map_unmatched(keyframe.frame_id)
            raise
        self.map_keyframe(keyframe.frame_id, verified, started_s=started_s)

    def meet_keyframe(self, keyframe: Keyframe) -> None:
        """Makes a keyframe known; frames that are tracked from it may come from now on.

        ``match_keyframe`` and ``map_keyframe`` follow, before the next one is met.
        """
        self._cameras.meet(keyframe, self._map)
        self._graph.add_keyframe(keyframe)
        self._matching.add_keyframe(keyframe)
        self._poser.add_keyframe(keyframe)
        self._facts.keyframe_added(keyframe)

    def match_keyframe(self, frame_id: FrameId) -> list[VerifiedPair]:
        """Matches the keyframe met last against those the scene graph chooses.

        The only part of mapping that another thread may do while this one poses tracked frames.

        Raises:
            InferenceError: the matcher failed; ``map_unmatched`` is to follow.
        """
        settings = self._config.matching
        camera_key = self._graph.keyframe(frame_id).camera_key
        wants_focal_length = settings.use_focal_lengths and self._cameras.is_unknown(
            camera_key, self._map
        )
        wants_depths = settings.metric_scale != "off" and not self.is_initialized
        return self._matching.match_keyframe(
            frame_id, wants_pointmaps=wants_focal_length or wants_depths
        )

    def map_keyframe(
        self, frame_id: FrameId, verified: Sequence[VerifiedPair], *, started_s: float
    ) -> None:
        """Registers the keyframe that was matched, or tries to begin a map."""
        self._note_focal_lengths()
        self._add_to_map(frame_id, verified)
        growth = self._current.growth_config()
        if self.is_initialized:
            self._cameras.calibrate_from_pairs(self._map, self._graph)
            self._register(frame_id, started_s=started_s)
            growth = self._current.growth_config()
            self._adopt_if_fuller(self._starts.instead_of_poor(self._map, config=growth))
        else:
            self._adopt_if_fuller(self._starts.first(self._map, verified, config=growth))
        self._after_change()

    def map_unmatched(self, frame_id: FrameId) -> None:
        """Keeps a keyframe whose matching failed, with the pairs that held before."""
        # Graph and map must know the same pairs.
        self._add_to_map(frame_id, self._graph.verified_pairs(frame_id))

    def add_tracked(self, tracked: TrackedFrame, fallback: TrackedFrame | None = None) -> None:
        """Poses a frame between keyframes, now or when its keyframe is registered.

        Args:
            tracked: the frame as followed from its keyframe.
            fallback: the same as followed from the keyframe before, for a first pose while the map
                has not got the newer one.
        """
        pose = self._poser.add_tracked(
            tracked, self._map if self.is_initialized else None, fallback=fallback
        )
        if pose is not None:
            self._report_pose(
                pose,
                camera_key=self._graph.keyframe(tracked.keyframe_id).camera_key,
                received_at_s=tracked.received_at_s,
            )

    def start_global_adjustment(self) -> GlobalAdjustment | None:
        """A copy of the map to adjust elsewhere, when one is due; None otherwise.

        Small maps are adjusted at once instead, since nothing waits long for them.
        """
        if self._in_flight is not None or not self.is_initialized:
            return None
        num_registered = self._map.num_registered
        if not (self._schedule.should(num_registered) or self._loop_waits_for_adjustment):
            return None
        self._schedule.done(num_registered)
        self._loop_waits_for_adjustment = False
        if num_registered <= self._config.global_bundle_adjustment.synchronous_until:
            self._current.adjust(self._current.growth_config())
            self._after_change()
            return None
        self._in_flight = start_global_adjustment(
            self._map, constant_camera_ids=self._cameras.constant_ids(self._map)
        )
        self._keyframes_since_start = 0
        return self._in_flight

    def merge(self, adjusted: GlobalAdjustment) -> None:
        """Brings an adjusted copy back under the map; dropped when the map was replaced."""
        if adjusted is not self._in_flight:
            return
        self._in_flight = None
        merged = merge_global_adjustment(self._map, adjusted)
        self._facts.adjusted(merged, sparse_map=self._map)
        self._after_change()

    @property
    def window_merge_is_due(self) -> bool:
        """Whether the window in flight must be merged before the next keyframe."""
        return self._windows.merge_is_due

    def start_window(self) -> WindowJob | None:
        """A window of the newest keyframes to solve elsewhere, when one is due; else None."""
        return self._windows.start(self._map) if self.is_initialized else None

    def solve_window(self, job: WindowJob) -> SolvedWindow:
        """Solves a window; another thread than the mapping one may call it."""
        return self._windows.solved(job)

    def merge_window(self, solved: SolvedWindow) -> None:
        """Changes the map by a window where that makes it better; the event tells."""
        merge = self._windows.merge(self._map, solved)
        if merge is not None and merge.better_map is not None:
            self._current.take_over(merge)
            self._current.retry_waiting()
            self._after_change()

    def abandon_window(self) -> None:
        """Forgets the window in flight."""
        self._windows.abandon()

    def abandon_adjustment(self) -> None:
        """Forgets the adjustment in flight; the next one is due by growth."""
        self._in_flight = None

    def finish(self) -> None:
        """After the last frame: registers what is left, rescues what is missing, adjusts all."""
        self.abandon_adjustment()  # merged after the last one it would undo it
        self.abandon_window()
        self._separate_maps = tuple(self._end.finish())
        self._after_change()

    # -- the steps of mapping a keyframe --------------------------------------------------------

    def _note_focal_lengths(self) -> None:
        """Passes on the focal lengths that the matcher saw."""
        for frame_id, focal_px in self._matching.take_seen_focal_lengths():
            if self._config.matching.use_focal_lengths:
                self._cameras.note_seen(self._graph.keyframe(frame_id).camera_key, focal_px)

    def _add_to_map(self, frame_id: FrameId, verified: Sequence[VerifiedPair]) -> None:
        for features in self._matching.take_changed():
            self._moved[features.frame_id] = features
            if features.frame_id != frame_id:
                self._map.replace_features(features)
        for pair in verified:
            self._facts.pair_verified(pair)
        loops = [pair for pair in verified if self._graph.is_loop(pair.pair)]
        if loops:
            self._loop_waits_for_adjustment = True
            self._facts.loop_closed(loops[0])
        self._map.add_keyframe(self._graph.keyframe(frame_id), verified)
        self._keyframes_since_start += 1
        self._windows.keyframe_added()

    def _register(self, frame_id: FrameId, *, started_s: float) -> None:
        if not self._current.register(frame_id, started_s=started_s):
            return
        misplacement = self._current.repair(frame_id)
        if misplacement is not None:
            self._starts.distrust(misplacement.misleading)
            self.abandon_adjustment()  # it knows them in the wrong place
            self.abandon_window()
            self._current.grow(self._current.growth_config())
        self._current.retry_waiting()

    def _adopt_if_fuller(self, built: BuiltMap | None) -> None:
        """Makes a built map the map when it holds more keyframes."""
        if self._current.adopt_if_fuller(built):
            self.abandon_adjustment()
            self.abandon_window()
            self._schedule.done(self._map.num_registered)

    def _position_of(self, keyframe: Keyframe) -> GpsFix | None:
        """Positions beside the frames are known better later, when those after them came, too."""
        if keyframe.gps is not None and not keyframe.gps.is_provisional:
            return keyframe.gps
        return self._fix_at(keyframe.camera_key, keyframe.captured_at_s) or keyframe.gps

    @property
    def _map(self) -> SparseMap:
        return self._current.sparse_map

    # -- output ---------------------------------------------------------------------------------

    def _after_change(self) -> None:
        """Forgets where points were, and reports poses that became known."""
        self._version += 1
        self._poser.forget_points()
        if not self.is_initialized:
            return
        for frame_id in self._map.registered_ids:
            if frame_id not in self._placed:
                keyframe = self._map.keyframe(frame_id)
                pose = FramePose(
                    frame_id=frame_id,
                    index=keyframe.index,
                    captured_at_s=keyframe.captured_at_s,
                    cam_from_world=self._map.cam_from_world(frame_id),
                    is_keyframe=True,
                )
                self._placed.add(frame_id)
                self._report_pose(
                    pose, camera_key=keyframe.camera_key, received_at_s=keyframe.received_at_s
                )
        for tracked, pose in self._poser.pose_pending(self._map):
            self._report_pose(
                pose,
                camera_key=self._graph.keyframe(tracked.keyframe_id).camera_key,
                received_at_s=tracked.received_at_s,
            )

    def _report_pose(self, pose: FramePose, *, camera_key: str, received_at_s: float) -> None:
        """Tells the pose of a frame: once, or for a keyframe again when the map has it."""
        is_first = pose.frame_id not in self._reported
        if not (is_first or pose.is_keyframe):
            return  # the map has it already, and better
        self._reported.add(pose.frame_id)
        if is_first:
            self._new_poses.append(pose)
        self._facts.posed(
            pose, camera_key=camera_key, received_at_s=received_at_s, is_first=is_first
        )

    def view(self) -> MapView:
        """An immutable picture of the map."""
        ids = self._map.registered_ids
        cameras = [self._map.camera(self._map.keyframe(i).camera_key) for i in ids]
        cloud = self._map.point_cloud()
        edges = self._graph.edges()
        poses = [self._map.cam_from_world(i) for i in ids]
        return MapView(
            version=self._version,
            keyframe_ids=np.array(ids, np.int64),
            cam_from_world=np.array(poses).reshape(-1, 3, 4),
            focal_px=np.array([camera.mean_focal_length() for camera in cameras]),
            image_sizes=np.array([(c.width, c.height) for c in cameras], np.int64).reshape(-1, 2),
            points3D_in_world=cloud.points3D_in_world,
            colors=cloud.colors,
            chunk_ids=cloud.first_keyframe_ids,
            edges=np.array([(e.pair.first, e.pair.second) for e in edges], np.int64).reshape(-1, 2),
            edge_reasons=tuple(edge.reason for edge in edges),
        )
