"""Rerun: the dense map, an entity for each keyframe's points that moves with its keyframe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adapters.views.display_geometry import DisplayScale
from engine.dense_types import DenseChunk, DenseCloud
from engine.geometry import transform_points
from engine.types import BoolArray, Float32Array, Float64Array, FrameId

if TYPE_CHECKING:
    from rerun import RecordingStream

POINT_RADIUS = 1.1  # in ui points: nearer to each other than those of the sparse map
_NUM_WITNESSES = 32  # points of a chunk that tell how far it moved
_POINT_BYTES = 15
_TRANSFORM_BYTES = 100


@dataclass(slots=True, kw_only=True, eq=False)
class _Drawn:
    """A chunk as it was drawn last."""

    version: int
    world_from_chunk: Float64Array  # (3, 4)
    witnesses: Float32Array  # (W, 3) of its points, in its camera
    num_hidden: int  # points that lay far outside the map then
    scale: DisplayScale  # of the map then


class DenseDrawing:
    """Draws the dense map below ``world/dense`` in a recording.

    Points are logged once, in the camera of their keyframe. When that moves visibly, or the unit of
    the map changes, only its transform is logged: some hundred bytes. Points far outside the map
    are left out until it has grown around them.
    """

    def __init__(self, recording: RecordingStream) -> None:
        self._recording = recording
        self._drawn: dict[FrameId, _Drawn] = {}
        self._is_forgotten = False

    def draw_all_again(self) -> None:
        """Makes the next ``draw`` draw everything, also what did not change."""
        self._is_forgotten = True

    def clear(self) -> None:
        """Takes everything off the screen."""
        for frame_id in list(self._drawn):
            self._clear(frame_id)

    def draw(self, cloud: DenseCloud, *, scale: DisplayScale) -> int:
        """Draws what changed.

        Args:
            cloud: the dense map.
            scale: sizes of the map on the screen.

        Returns:
            About how many bytes that took.
        """
        wanted = {chunk.frame_id for chunk in cloud.chunks}
        for frame_id in self._drawn.keys() - wanted:
            self._clear(frame_id)
        drawn = {} if self._is_forgotten else self._drawn
        self._is_forgotten = False
        num_bytes = 0
        for chunk, world_from_chunk in zip(cloud.chunks, cloud.world_from_chunk, strict=True):
            former = drawn.get(chunk.frame_id)
            if former is None or _is_outdated(former, chunk, world_from_chunk, scale):
                num_bytes += self._draw_points(chunk, world_from_chunk, scale)
            elif _moved_map(former, world_from_chunk) > scale.tolerance_map:
                former.world_from_chunk = world_from_chunk
                num_bytes += self._draw_transform(chunk.frame_id, world_from_chunk)
        return num_bytes

    def _draw_points(
        self, chunk: DenseChunk, world_from_chunk: Float64Array, scale: DisplayScale
    ) -> int:
        import rerun as rr

        shown = _is_shown(chunk, world_from_chunk, scale)
        points = rr.Points3D(
            chunk.xyz_in_cam[shown],
            colors=chunk.colors[shown],
            radii=rr.Radius.ui_points(POINT_RADIUS),
        )
        self._recording.log(_entity(chunk.frame_id), points)
        self._drawn[chunk.frame_id] = _Drawn(
            version=chunk.version,
            world_from_chunk=world_from_chunk,
            witnesses=chunk.xyz_in_cam[:_NUM_WITNESSES],
            num_hidden=int(np.count_nonzero(~shown)),
            scale=scale,
        )
        num_bytes = _POINT_BYTES * int(shown.sum())
        return num_bytes + self._draw_transform(chunk.frame_id, world_from_chunk)

    def _draw_transform(self, frame_id: FrameId, world_from_chunk: Float64Array) -> int:
        import rerun as rr

        transform = rr.Transform3D(
            translation=world_from_chunk[:, 3], mat3x3=world_from_chunk[:, :3]
        )
        self._recording.log(_entity(frame_id), transform)
        return _TRANSFORM_BYTES

    def _clear(self, frame_id: FrameId) -> None:
        import rerun as rr

        del self._drawn[frame_id]
        self._recording.log(_entity(frame_id), rr.Clear(recursive=False))


def _entity(frame_id: FrameId) -> str:
    return f"world/dense/keyframe_{int(frame_id):06d}"


def _is_shown(chunk: DenseChunk, world_from_chunk: Float64Array, scale: DisplayScale) -> BoolArray:
    in_world = transform_points(world_from_chunk, chunk.xyz_in_cam.astype(np.float64))
    return scale.shows(in_world.astype(np.float32))


def _is_outdated(
    former: _Drawn, chunk: DenseChunk, world_from_chunk: Float64Array, scale: DisplayScale
) -> bool:
    """Whether other points of a chunk are to be drawn than before."""
    if former.version != chunk.version:
        return True
    if not former.num_hidden or scale is former.scale:
        return False
    former.scale = scale
    shown = _is_shown(chunk, world_from_chunk, scale)
    return bool(np.count_nonzero(~shown) < former.num_hidden)


def _moved_map(former: _Drawn, world_from_chunk: Float64Array) -> float:
    """How far some points of a chunk have moved since it was drawn, at most."""
    change = world_from_chunk - former.world_from_chunk
    moved = transform_points(change, former.witnesses.astype(np.float64))
    return float(np.linalg.norm(moved, axis=1).max(initial=0.0))
