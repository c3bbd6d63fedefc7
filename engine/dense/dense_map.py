"""The dense map: what the depth maps of a run's keyframes give, wherever the keyframes are now.

Each keyframe keeps its depth map and its points in its own camera's frame, so both move with it.
Depth maps and points lie in a storage; in memory are a small copy of each depth map, a sample of
its points for views, and the few whole ones that were used last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from engine.cpu_time import Stage, charged_to
from engine.dense.consistency import OtherDepth, compare_depths, with_agreement
from engine.dense.following import depth_change, scaled_depth_map
from engine.dense.keyframe_points import keyframe_points
from engine.dense_types import (
    DenseChunk,
    DenseCloud,
    DensePoints,
    DepthMap,
    DepthProblem,
    KeyframePoses,
    first_param,
)
from engine.geometry import compose_poses, invert_pose
from engine.types import Float32Array, Float64Array, FrameId, Uint8Array

_SMALL_STEP_PX = 16  # of a depth map's small copy
_MAX_WHOLE = 10  # depth maps in memory
_MAX_OTHERS = 4  # depth maps that a new one is compared with
_MAX_CHUNK_POINTS = 24_000  # of a keyframe that views show
_MAX_SHOWN_POINTS = 1_500_000  # of all of them; the oldest chunks are thinned first
_MIN_CHUNK_POINTS = 16  # that are thinned further
_OUTDATED_ERROR_RATIO = 1.5  # of a depth's standard deviations that changed poses put it off
_WRONG_ERROR_RATIO = 6.0  # likewise: its points are not shown where they would be now
_OUTDATED_FOCAL_RATIO = 0.005  # that a focal length has changed by
_WRONG_FOCAL_RATIO = 0.02
_UNCHANGED = 1e-5  # of a relative pose, in units of its distance


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SmallDepth:
    """What of a keyframe's depth stays in memory."""

    depth_map: DepthMap  # every so many pixels
    sample_xyz: Float32Array  # (S, 3) of its points, in random order
    sample_colors: Uint8Array  # (S, 3)
    num_points: int  # of all
    focal_px: float  # `first_param` of its camera, when its depth was made


class DepthStorage(Protocol):
    """Keeps depth maps and points of keyframes; one thread at a time."""

    def frame_ids(self) -> list[FrameId]:
        """Keyframes that it has, in order."""

    def write(self, depth_map: DepthMap, points: DensePoints, small: SmallDepth) -> None:
        """Keeps what belongs to a keyframe, in place of what it had.

        Raises:
            JournalError: it cannot be written; nothing of the keyframe may be there any more.
        """

    def depth_map(self, frame_id: FrameId) -> DepthMap | None:
        """The whole depth map of a keyframe; None where it cannot be read any more."""

    def points(self, frame_id: FrameId) -> DensePoints | None:
        """All points of a keyframe; None where they cannot be read any more."""

    def small(self, frame_id: FrameId) -> SmallDepth | None:
        """What of a keyframe stays in memory; None where it cannot be read any more."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Keyframe:
    """What the dense map has of a keyframe in memory."""

    small: SmallDepth
    version: int
    depth_version: int  # of what is stored
    num_shown: int  # points of the sample


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacedKeyframe:
    """Where the depth of a keyframe lies by given poses."""

    frame_id: FrameId
    world_from_chunk: Float64Array  # (3, 4) similarity [s R | t] from its camera
    is_wrong: bool  # by much more: its points would lie beside the surface
    is_outdated: bool  # its neighbours, or its focal length, have changed by more than its error


class DenseMap:
    """The depth maps of a run and what they give. One thread at a time.

    Args:
        storage: keeps what does not fit into memory.
    """

    def __init__(self, storage: DepthStorage) -> None:
        self._storage = storage
        self._keyframes: dict[FrameId, _Keyframe] = {}
        self._whole: dict[FrameId, DepthMap] = {}  # used last, the newest at the end
        self._num_shown = 0  # points of all samples
        self._num_versions = 0

    @property
    def frame_ids(self) -> list[FrameId]:
        """Keyframes that have depth, in the order in which they got it."""
        return list(self._keyframes)

    @property
    def num_points(self) -> int:
        """Points of all keyframes."""
        return sum(one.small.num_points for one in self._keyframes.values())

    def restore(self, *, before: FrameId) -> None:
        """Takes over what the storage has of a run that goes on.

        Args:
            before: the first frame that is not of that run yet.
        """
        for frame_id in self._storage.frame_ids():
            small = self._storage.small(frame_id) if frame_id < before else None
            if small is not None:
                self._take(frame_id, small)

    def add(self, depth_map: DepthMap, problem: DepthProblem) -> int:
        """Adds the depth map of a keyframe, checked by those of its neighbours.

        Only points are added that no neighbour shows as finely.

        Args:
            depth_map: of the problem's keyframe; takes the place of an earlier one.
            problem: that it was made for, with the poses of then.

        Returns:
            The number of points.

        Raises:
            JournalError: it cannot be stored; the keyframe has no depth then.
        """
        frame_id = depth_map.frame_id
        self._drop(frame_id)
        others = self._others(problem)
        depth_map = _checked(depth_map, others)
        points = _points_of(depth_map, others)
        focal_px = first_param(problem.view.intrinsics.params)
        small = small_depth(depth_map, points, focal_px=focal_px)
        self._storage.write(depth_map, points, small)
        self._keep_whole(depth_map)
        self._take(frame_id, small)
        return small.num_points

    def placed(self, poses: KeyframePoses) -> list[PlacedKeyframe]:
        """Where the depth of keyframes lies by their present poses, in any world and unit.

        Keyframes without a pose, or whose neighbours have none, are left out.
        """
        by_id = poses.by_id()
        focal_px = dict(zip(poses.frame_ids.tolist(), poses.focal_px.tolist(), strict=True))
        placed = (
            _placed(frame_id, one.small, by_id, focal_px=focal_px[frame_id])
            for frame_id, one in self._keyframes.items()
            if frame_id in by_id
        )
        return [one for one in placed if one is not None]

    def cloud(self, placed: Sequence[PlacedKeyframe]) -> DenseCloud:
        """The dense map for views; arrays are shared with it and read-only."""
        ordered = _right_ones(placed)
        return DenseCloud(
            chunks=tuple(self._chunk(one.frame_id) for one in ordered),
            world_from_chunk=np.array([one.world_from_chunk for one in ordered]).reshape(-1, 3, 4),
        )

    def points(self, placed: Sequence[PlacedKeyframe]) -> Iterator[DensePoints]:
        """All points in the world, keyframe by keyframe, each read when it is asked for."""
        for one in _right_ones(placed):
            points = self._storage.points(one.frame_id)
            if points is not None:
                yield points_in_world(points, one.world_from_chunk)

    def depth_versions(self) -> dict[FrameId, int]:
        """A number for each keyframe that changes when its depth map is made again."""
        return {frame_id: one.depth_version for frame_id, one in self._keyframes.items()}

    def depth_map(self, frame_id: FrameId) -> DepthMap | None:
        """The depth map of a keyframe in the unit of when it was made; None without one."""
        if frame_id not in self._keyframes:
            return None
        return self._whole.get(frame_id) or self._storage.depth_map(frame_id)

    # -- inside ---------------------------------------------------------------------------------

    def _others(self, problem: DepthProblem) -> list[OtherDepth]:
        """Depth maps of the most covisible neighbours that have one, in the problem's unit."""
        poses: dict[int, Float64Array] = {
            one.frame_id: one.cam_from_world for one in (problem.view, *problem.neighbours)
        }
        own_from_world = poses[problem.view.frame_id]
        others: list[OtherDepth] = []
        for neighbour in problem.neighbours:
            if len(others) == _MAX_OTHERS:
                break
            depth_map = self._present_depth(neighbour.frame_id, poses)
            if depth_map is not None:
                other_from_own = compose_poses(
                    neighbour.cam_from_world, invert_pose(own_from_world)
                )
                others.append(OtherDepth(depth_map=depth_map, other_from_keyframe=other_from_own))
        return others

    def _present_depth(
        self, frame_id: FrameId, poses: Mapping[int, Float64Array]
    ) -> DepthMap | None:
        """A keyframe's whole depth map in the present unit; None without one that holds still."""
        known = self._keyframes.get(frame_id)
        if known is None:
            return None
        factor, error_ratio = _change(known.small.depth_map, frame_id, poses)
        if factor is None or error_ratio > _OUTDATED_ERROR_RATIO:
            return None
        depth_map = self._whole.pop(frame_id, None) or self._storage.depth_map(frame_id)
        if depth_map is None:
            self._drop(frame_id)
            return None
        self._keep_whole(depth_map)
        return depth_map if factor == 1.0 else scaled_depth_map(depth_map, factor)

    def _keep_whole(self, depth_map: DepthMap) -> None:
        self._whole[depth_map.frame_id] = depth_map
        while len(self._whole) > _MAX_WHOLE:
            del self._whole[next(iter(self._whole))]

    def _take(self, frame_id: FrameId, small: SmallDepth) -> None:
        self._num_versions += 1
        num_shown = len(small.sample_xyz)
        self._keyframes[frame_id] = _Keyframe(
            small=small,
            version=self._num_versions,
            depth_version=self._num_versions,
            num_shown=num_shown,
        )
        self._num_shown += num_shown
        self._thin()

    def _thin(self) -> None:
        """Halves samples until views have no more points than they may, the oldest first."""
        while self._num_shown > _MAX_SHOWN_POINTS:
            fullest = max(one.num_shown for one in self._keyframes.values())
            if fullest < _MIN_CHUNK_POINTS:
                return
            for one in list(self._keyframes.values()):
                if self._num_shown <= _MAX_SHOWN_POINTS:
                    return
                if one.num_shown > fullest // 2:
                    self._halve(one)

    def _halve(self, one: _Keyframe) -> None:
        num_kept = one.num_shown // 2
        self._num_shown -= one.num_shown - num_kept
        self._num_versions += 1
        one.num_shown, one.version = num_kept, self._num_versions
        one.small = replace(
            one.small,
            sample_xyz=one.small.sample_xyz[:num_kept].copy(),
            sample_colors=one.small.sample_colors[:num_kept].copy(),
        )

    def _drop(self, frame_id: FrameId) -> None:
        self._whole.pop(frame_id, None)
        former = self._keyframes.pop(frame_id, None)
        if former is not None:
            self._num_shown -= former.num_shown

    def _chunk(self, frame_id: FrameId) -> DenseChunk:
        one = self._keyframes[frame_id]
        return DenseChunk(
            frame_id=frame_id,
            version=one.version,
            xyz_in_cam=one.small.sample_xyz,
            colors=one.small.sample_colors,
        )


def small_depth(depth_map: DepthMap, points: DensePoints, *, focal_px: float) -> SmallDepth:
    """What of a keyframe's depth stays in memory."""
    offset = _SMALL_STEP_PX // 2
    rows = (slice(offset, None, _SMALL_STEP_PX), slice(offset, None, _SMALL_STEP_PX))
    focal_x, focal_y, center_x, center_y = depth_map.pinhole
    # Pixel centres are at (0.5, 0.5); the first one that is taken is `offset` pixels further.
    first = offset + 0.5 - 0.5 * _SMALL_STEP_PX
    few = replace(
        depth_map,
        pinhole=np.array([focal_x, focal_y, center_x - first, center_y - first]) / _SMALL_STEP_PX,
        depth=depth_map.depth[rows].copy(),
        relative_error=depth_map.relative_error[rows].copy(),
        num_agreeing=depth_map.num_agreeing[rows].copy(),
        colors=depth_map.colors[rows].copy(),
        agreeing_bits=None,
    )
    order = np.random.default_rng(int(depth_map.frame_id)).permutation(len(points.xyz))
    sample = order[:_MAX_CHUNK_POINTS]
    return SmallDepth(
        depth_map=few,
        sample_xyz=points.xyz[sample],
        sample_colors=points.colors[sample],
        num_points=len(points.xyz),
        focal_px=focal_px,
    )


def points_in_world(points: DensePoints, world_from_chunk: Float64Array) -> DensePoints:
    """Points of a keyframe moved by a similarity [s R | t] (3, 4)."""
    matrix, shift = world_from_chunk[:, :3], world_from_chunk[:, 3]
    scale = float(np.cbrt(np.linalg.det(matrix)))
    return replace(
        points,
        xyz=(points.xyz @ matrix.T + shift).astype(np.float32),
        normals=points.normals @ (matrix.T / scale).astype(np.float32),
        sampling=points.sampling * np.float32(scale),
    )


@charged_to(Stage.DENSE_FUSION)
def _points_of(depth_map: DepthMap, others: Sequence[OtherDepth]) -> DensePoints:
    return keyframe_points(depth_map, others)


@charged_to(Stage.DENSE_FUSION)
def _checked(depth_map: DepthMap, others: Sequence[OtherDepth]) -> DepthMap:
    return with_agreement(depth_map, compare_depths(depth_map, others))


def _right_ones(placed: Sequence[PlacedKeyframe]) -> list[PlacedKeyframe]:
    """What may be shown, in order of arrival."""
    right = (one for one in placed if not one.is_wrong)
    return sorted(right, key=lambda one: one.frame_id)


def _placed(
    frame_id: FrameId, small: SmallDepth, poses: Mapping[int, Float64Array], *, focal_px: float
) -> PlacedKeyframe | None:
    factor, error_ratio = _change(small.depth_map, frame_id, poses)
    if factor is None:
        return None
    world_from_cam = invert_pose(poses[frame_id])
    focal_change = abs(focal_px / small.focal_px - 1.0)
    return PlacedKeyframe(
        frame_id=frame_id,
        world_from_chunk=np.column_stack([factor * world_from_cam[:, :3], world_from_cam[:, 3]]),
        is_wrong=error_ratio > _WRONG_ERROR_RATIO or focal_change > _WRONG_FOCAL_RATIO,
        is_outdated=error_ratio > _OUTDATED_ERROR_RATIO or focal_change > _OUTDATED_FOCAL_RATIO,
    )


def _change(
    small: DepthMap, frame_id: FrameId, poses: Mapping[int, Float64Array]
) -> tuple[float | None, float]:
    """What a depth map's depths are to be multiplied by, and how far off that leaves them.

    The latter is the median, in standard deviations. None where no neighbour has a pose any more.
    """
    world_from_own = invert_pose(poses[frame_id])
    nowhere = np.full((3, 4), np.nan)
    now = np.array(
        [
            compose_poses(poses[i], world_from_own) if i in poses else nowhere
            for i in small.neighbour_ids.tolist()
        ]
    ).reshape(-1, 3, 4)
    then = small.neighbour_from_keyframe
    distances = np.linalg.norm(then[:, :, 3], axis=1)[:, None, None]
    moved = np.abs(now - then) / np.concatenate(
        [np.ones((len(then), 3, 3)), np.broadcast_to(distances, (len(then), 3, 1))], axis=2
    )
    if (moved < _UNCHANGED).all():
        return 1.0, 0.0
    change = depth_change(small, now)
    if change is None:
        return None, math.inf
    return change.depth_factor, change.error_ratio
