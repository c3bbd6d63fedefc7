"""The dense map: what the depth maps of a run's keyframes give, wherever the keyframes are now.

Each keyframe keeps its depth map and its points in its own camera's frame, so both move with it.
Depth maps and points lie in a storage; in memory are a small copy of each depth map, a sample of
its points for views, and the few whole ones that were used last.

What two keyframes show, one of them leaves to the other, as long as that one has it: when its depth
is made again, is wrong or gone, or the two move apart, the points are there again. Depth is only
left to older depth, so some keyframe always shows what any has seen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from engine.cpu_time import Stage, charged_to
from engine.dense.consistency import OtherDepth, compare_depths, with_agreement
from engine.dense.following import depth_change, scaled_depth_map
from engine.dense.keyframe_points import keyframe_points, shown_by
from engine.dense.pinholes import plane_xy
from engine.dense_types import (
    DenseChunk,
    DenseCloud,
    DensePoints,
    DepthMap,
    DepthProblem,
    KeyframePoses,
)
from engine.estimators.lenses import border_rays, camera_of
from engine.geometry import compose_poses, invert_pose
from engine.types import (
    BoolArray,
    Float32Array,
    Float64Array,
    FrameId,
    Int64Array,
    Uint8Array,
    freeze_field,
)

_SMALL_STEP_PX = 16  # of a depth map's small copy
_MAX_WHOLE = 10  # depth maps in memory
_MAX_OTHERS = 4  # depth maps that a new one is compared with
_MAX_CHUNK_POINTS = 24_000  # of a keyframe that views show
_SPARE_RATIO = 0.5  # of them: so many at most of those that are left to others
_MAX_SHOWN_POINTS = 1_500_000  # of all of them; the oldest chunks are thinned first
_MAX_HELD_RATIO = 1.5  # of them: points in memory, with those that are left to others
_MIN_CHUNK_POINTS = 16  # that are thinned further
_OUTDATED_ERROR_RATIO = 1.5  # of a depth's standard deviations that changed poses put it off
_WRONG_ERROR_RATIO = 4.0  # likewise: its points are not shown where they would be now
_OUTDATED_LENS_RATIO = 0.005  # of the image's extent that rays at its border have moved by
_WRONG_LENS_RATIO = 0.02
_UNCHANGED = 1e-5  # of a relative pose, in units of its distance
_APART_RATIO = 0.02  # of depth: so far apart two keyframes' points are on one surface no more


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shares:
    """To whom the points of a keyframe are left.

    Points come group by group: those that it shows itself, then those left to each of the others.
    A group is left to another keyframe as long as that one has the depth of then.
    """

    other_ids: Int64Array  # (N,) keyframes whose depth is older
    other_versions: Int64Array  # (N,) of their depth
    others_from_own: Float64Array  # (N, 3, 4) similarities between the two as they are stored
    num_points: Int64Array  # (1 + N,)
    num_sampled: Int64Array  # (1 + N,) points of the sample that stays in memory

    def __post_init__(self) -> None:
        freeze_field(self, "other_ids", (None,), np.int64)
        num = len(self.other_ids)
        freeze_field(self, "other_versions", (num,), np.int64)
        freeze_field(self, "others_from_own", (num, 3, 4), np.float64)
        freeze_field(self, "num_points", (1 + num,), np.int64)
        freeze_field(self, "num_sampled", (1 + num,), np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SmallDepth:
    """What of a keyframe's depth stays in memory."""

    depth_map: DepthMap  # every so many pixels
    version: int  # larger than that of any depth that was made before
    shares: Shares
    sample_xyz: Float32Array  # (S, 3) of its points by shares, each share in random order
    sample_colors: Uint8Array  # (S, 3)
    border_rays: Float64Array  # (8, 3) of its camera when its depth was made, see `KeyframePoses`


class DepthStorage(Protocol):
    """Keeps depth maps and points of keyframes; one thread at a time."""

    def frame_ids(self) -> list[FrameId]:
        """Keyframes that it has, in order."""

    def write(self, depth_map: DepthMap, points: DensePoints, small: SmallDepth) -> None:
        """Keeps what belongs to a keyframe, in place of what it had.

        Args:
            depth_map: the whole one.
            points: all of them, by the shares of what stays in memory.
            small: what stays in memory.

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
    version: int  # of its chunk
    is_left: BoolArray  # (N,) which shares are left to others in the chunk
    probes: Float64Array  # (3, 3) places at its depth: in the middle and in two corners
    is_unreadable: bool = False  # what is stored; views show what is in memory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacedKeyframe:
    """Where the depth of a keyframe lies by given poses."""

    frame_id: FrameId
    world_from_chunk: Float64Array  # (3, 4) similarity [s R | t] from its camera
    is_wrong: bool  # by much more: its points would lie beside the surface
    # Its neighbours, or its lens, have changed by more than its error, or it is lost.
    is_outdated: bool


class _NumPoints:
    """Counts points that are left to nobody, as keyframes come and go in any order."""

    def __init__(self) -> None:
        self.num = 0
        self._there: set[tuple[int, int]] = set()  # keyframes and versions of their depth
        self._left: Counter[tuple[int, int]] = Counter()  # points that others leave to each

    def add(self, frame_id: FrameId, small: SmallDepth) -> None:
        """A keyframe has come."""
        self._there.add((frame_id, small.version))
        self._count(frame_id, small, 1)

    def remove(self, frame_id: FrameId, small: SmallDepth) -> None:
        """A keyframe has gone that had come."""
        self._count(frame_id, small, -1)
        self._there.discard((frame_id, small.version))

    def _count(self, frame_id: FrameId, small: SmallDepth, sign: int) -> None:
        shares = small.shares
        num_own, *num_left = shares.num_points.tolist()
        others = zip(shares.other_ids.tolist(), shares.other_versions.tolist(), strict=True)
        self.num += sign * (num_own - self._left[frame_id, small.version])
        for other, num in zip(others, num_left, strict=True):
            self._left[other] += sign * num
            if other not in self._there:
                self.num += sign * num


class DenseMap:
    """The depth maps of a run and what they give. One thread at a time.

    Args:
        storage: keeps what does not fit into memory.
    """

    def __init__(self, storage: DepthStorage) -> None:
        self._storage = storage
        self._keyframes: dict[FrameId, _Keyframe] = {}
        self._whole: dict[FrameId, DepthMap] = {}  # used last, the newest at the end
        self._num_shown = 0  # points that keyframes show themselves, of all samples
        self._num_held = 0  # points of all samples
        self._num_versions = 0
        self._points = _NumPoints()

    @property
    def frame_ids(self) -> list[FrameId]:
        """Keyframes that have depth that can be read, in the order in which they got it."""
        return [i for i, one in self._keyframes.items() if not one.is_unreadable]

    @property
    def num_points(self) -> int:
        """Points of all keyframes that can be read, those left to others not counted."""
        return self._points.num

    def restore(self, *, before: FrameId) -> None:
        """Takes over what the storage has of a run that goes on.

        Args:
            before: the first frame that is not of that run yet.
        """
        for frame_id in self._storage.frame_ids():
            small = self._storage.small(frame_id) if frame_id < before else None
            if small is not None:
                self._num_versions = max(self._num_versions, small.version)
                self._take(frame_id, small)

    def add(self, depth_map: DepthMap, problem: DepthProblem) -> int:
        """Adds the depth map of a keyframe, checked by those of its neighbours.

        Points that a neighbour shows as finely are left to it, as long as it shows them.

        Args:
            depth_map: of the problem's keyframe; takes the place of an earlier one.
            problem: that it was made for, with the poses of then.

        Returns:
            The number of points that are left to nobody.

        Raises:
            JournalError: it cannot be stored; the keyframe has no depth then.
        """
        frame_id = depth_map.frame_id
        self._drop(frame_id)
        others = self._others(problem)
        depth_map = _checked(depth_map, others)
        # What was made last is the least likely to be made again soon, or to be outdated.
        others.sort(key=lambda one: -self._keyframes[one.depth_map.frame_id].small.version)
        points, num_points = _shared_points(depth_map, others)
        shares = self._shares(others, num_points, problem)
        self._num_versions += 1
        small = small_depth(
            depth_map,
            points,
            shares,
            version=self._num_versions,
            border_rays=border_rays(camera_of(problem.view.intrinsics)),
        )
        self._storage.write(depth_map, points, small)
        self._keep_whole(depth_map)
        self._take(frame_id, small)
        return int(num_points[0])

    def placed(self, poses: KeyframePoses) -> list[PlacedKeyframe]:
        """Where the depth of keyframes lies by their present poses, in any world and unit.

        Keyframes without a pose are left out. Those whose neighbours have none are wrong: nothing
        says in which unit their depth is; those whose depth cannot be read any more are outdated.
        """
        by_id = poses.by_id()
        rays = dict(zip(poses.frame_ids.tolist(), poses.border_rays, strict=True))
        return [
            _placed(frame_id, one, by_id, border_rays=rays[frame_id])
            for frame_id, one in self._keyframes.items()
            if frame_id in by_id
        ]

    def cloud(self, placed: Sequence[PlacedKeyframe]) -> DenseCloud:
        """The dense map for views; arrays are shared with it and read-only."""
        ordered = _right_ones(placed)
        left = self._left(ordered)
        return DenseCloud(
            chunks=tuple(self._chunk(one.frame_id, left[one.frame_id]) for one in ordered),
            world_from_chunk=np.array([one.world_from_chunk for one in ordered]).reshape(-1, 3, 4),
        )

    def points(self, placed: Sequence[PlacedKeyframe]) -> Iterator[DensePoints]:
        """All points in the world, keyframe by keyframe, each read when it is asked for."""
        ordered = [one for one in _right_ones(placed) if self._is_readable(one.frame_id)]
        left = self._left(ordered)
        yield from self._points_of(ordered, {i: _in_share(is_left) for i, is_left in left.items()})
        readable = [one for one in ordered if self._is_readable(one.frame_id)]
        if len(readable) == len(ordered):
            return
        still_left = self._left(readable)  # what was left to those that cannot be read follows
        missing = {i: _in_share(still_left[i]) & ~_in_share(left[i]) for i in still_left}
        yield from self._points_of(
            [one for one in readable if missing[one.frame_id].any()], missing
        )

    def depth_versions(self) -> dict[FrameId, int]:
        """A number for each keyframe that changes when its depth map is made again."""
        return {frame_id: one.small.version for frame_id, one in self._keyframes.items()}

    def depth_map(self, frame_id: FrameId) -> DepthMap | None:
        """The depth map of a keyframe in the unit of when it was made; None without one."""
        if frame_id not in self._keyframes:
            return None
        return self._whole.get(frame_id) or self._stored_depth(frame_id)

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
        if known is None or known.is_unreadable:
            return None
        factor, error_ratio = _change(known.small.depth_map, frame_id, poses)
        if factor is None or error_ratio > _OUTDATED_ERROR_RATIO:
            return None
        depth_map = self._whole.pop(frame_id, None) or self._stored_depth(frame_id)
        if depth_map is None:
            return None
        self._keep_whole(depth_map)
        return depth_map if factor == 1.0 else scaled_depth_map(depth_map, factor)

    def _stored_depth(self, frame_id: FrameId) -> DepthMap | None:
        depth_map = self._storage.depth_map(frame_id)
        if depth_map is None:
            self._lose(frame_id)
        return depth_map

    def _lose(self, frame_id: FrameId) -> None:
        """What is stored of a keyframe cannot be read any more."""
        one = self._keyframes[frame_id]
        if not one.is_unreadable:
            one.is_unreadable = True
            self._points.remove(frame_id, one.small)

    def _is_readable(self, frame_id: FrameId) -> bool:
        return not self._keyframes[frame_id].is_unreadable

    def _points_of(
        self, placed: Sequence[PlacedKeyframe], is_wanted: Mapping[FrameId, BoolArray]
    ) -> Iterator[DensePoints]:
        """Points in the world of the wanted shares (1 + N,) of each keyframe."""
        for one in placed:
            points = self._storage.points(one.frame_id)
            sizes = self._keyframes[one.frame_id].small.shares.num_points
            if points is None or len(points.xyz) != sizes.sum():
                self._lose(one.frame_id)
                continue
            rows = is_wanted[one.frame_id].repeat(sizes)
            yield points_in_world(_those_of(points, rows), one.world_from_chunk)

    def _keep_whole(self, depth_map: DepthMap) -> None:
        self._whole[depth_map.frame_id] = depth_map
        while len(self._whole) > _MAX_WHOLE:
            del self._whole[next(iter(self._whole))]

    def _shares(
        self, others: Sequence[OtherDepth], num_points: Int64Array, problem: DepthProblem
    ) -> Shares:
        """To whom groups of points are left, in whose depth as it is stored."""
        poses: dict[int, Float64Array] = {
            one.frame_id: one.cam_from_world for one in (problem.view, *problem.neighbours)
        }
        ids = [other.depth_map.frame_id for other in others]
        factors = [_change(self._keyframes[i].small.depth_map, i, poses)[0] or 1.0 for i in ids]
        others_from_own = [
            other.other_from_keyframe / factor
            for other, factor in zip(others, factors, strict=True)
        ]
        return Shares(
            other_ids=np.array(ids, np.int64),
            other_versions=np.array([self._keyframes[i].small.version for i in ids], np.int64),
            others_from_own=np.array(others_from_own, np.float64).reshape(-1, 3, 4),
            num_points=num_points,
            num_sampled=np.zeros_like(num_points),
        )

    def _left(self, placed: Sequence[PlacedKeyframe]) -> dict[FrameId, BoolArray]:
        """Which shares (N,) of each keyframe are left to others that show them in its place."""
        worlds = {one.frame_id: one.world_from_chunk for one in placed}
        versions = {frame_id: self._keyframes[frame_id].small.version for frame_id in worlds}
        left = {}
        for frame_id, own in worlds.items():
            one = self._keyframes[frame_id]
            shares = one.small.shares
            is_left = _is_there(shares, versions)
            if is_left.any():
                others = np.array([worlds[FrameId(i)] for i in shares.other_ids[is_left].tolist()])
                is_left[is_left] = ~_are_apart(
                    one.probes, shares.others_from_own[is_left], own, others
                )
            left[frame_id] = is_left
        return left

    def _take(self, frame_id: FrameId, small: SmallDepth) -> None:
        self._num_versions += 1
        self._keyframes[frame_id] = _Keyframe(
            small=small,
            version=self._num_versions,
            is_left=np.ones(len(small.shares.other_ids), np.bool_),
            probes=_probes(small.depth_map),
        )
        self._points.add(frame_id, small)
        self._count(small, 1)
        self._thin()

    def _count(self, small: SmallDepth, sign: int) -> None:
        self._num_shown += sign * int(small.shares.num_sampled[0])
        self._num_held += sign * len(small.sample_xyz)

    def _is_full(self) -> bool:
        return (
            self._num_shown > _MAX_SHOWN_POINTS
            or self._num_held > _MAX_HELD_RATIO * _MAX_SHOWN_POINTS
        )

    def _thin(self) -> None:
        """Halves samples until there are no more points than there may be, the oldest first."""
        while self._is_full():
            fullest = max(len(one.small.sample_xyz) for one in self._keyframes.values())
            if fullest < _MIN_CHUNK_POINTS:
                return
            for one in list(self._keyframes.values()):
                if not self._is_full():
                    return
                if len(one.small.sample_xyz) > fullest // 2:
                    self._halve(one)

    def _halve(self, one: _Keyframe) -> None:
        self._num_versions += 1
        one.version = self._num_versions
        self._count(one.small, -1)
        one.small = _sampled(
            one.small,
            one.small.sample_xyz,
            one.small.sample_colors,
            sizes=one.small.shares.num_sampled,
            num_sampled=one.small.shares.num_sampled // 2,
        )
        self._count(one.small, 1)

    def _drop(self, frame_id: FrameId) -> None:
        self._whole.pop(frame_id, None)
        former = self._keyframes.pop(frame_id, None)
        if former is not None:
            self._count(former.small, -1)
            if not former.is_unreadable:
                self._points.remove(frame_id, former.small)

    def _chunk(self, frame_id: FrameId, is_left: BoolArray) -> DenseChunk:
        one = self._keyframes[frame_id]
        num_sampled = one.small.shares.num_sampled
        is_other = (is_left != one.is_left) & (num_sampled[1:] > 0)
        if is_other.any():
            self._num_versions += 1
            one.version, one.is_left = self._num_versions, is_left
        xyz, colors = one.small.sample_xyz, one.small.sample_colors
        if one.is_left.all():
            xyz, colors = xyz[: num_sampled[0]], colors[: num_sampled[0]]
        else:
            is_own = _in_share(one.is_left).repeat(num_sampled)
            xyz, colors = xyz[is_own], colors[is_own]
        return DenseChunk(frame_id=frame_id, version=one.version, xyz_in_cam=xyz, colors=colors)


def small_depth(
    depth_map: DepthMap,
    points: DensePoints,
    shares: Shares,
    *,
    version: int,
    border_rays: Float64Array,
) -> SmallDepth:
    """What of a keyframe's depth stays in memory.

    Args:
        depth_map: the whole one.
        points: by shares.
        shares: of the points; how many of them are sampled is filled in.
        version: of the depth.
        border_rays: (8, 3) of the camera.
    """
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
    small = SmallDepth(
        depth_map=few,
        version=version,
        shares=shares,
        sample_xyz=points.xyz[:0],
        sample_colors=points.colors[:0],
        border_rays=border_rays,
    )
    return _sampled(
        small,
        points.xyz,
        points.colors,
        sizes=shares.num_points,
        num_sampled=_num_sampled(shares.num_points),
    )


def _num_sampled(num_points: Int64Array) -> Int64Array:
    """How many points of each share (1 + N,) are sampled; those left to others no more densely."""
    own, spare = int(num_points[0]), int(num_points[1:].sum())
    ratio = min(1.0, _MAX_CHUNK_POINTS / max(own, 1))
    spare_ratio = min(ratio, _SPARE_RATIO * _MAX_CHUNK_POINTS / max(spare, 1))
    sampled = (num_points * spare_ratio).astype(np.int64)
    sampled[0] = min(own, _MAX_CHUNK_POINTS)
    return sampled


def _sampled(
    small: SmallDepth,
    xyz: Float32Array,
    colors: Uint8Array,
    *,
    sizes: Int64Array,
    num_sampled: Int64Array,
) -> SmallDepth:
    """With so many points of each share (1 + N,), at random, of those given in ``sizes``."""
    rng = np.random.default_rng(int(small.depth_map.frame_id))
    starts = np.cumsum(sizes) - sizes
    rows = np.concatenate(
        [
            start + rng.permutation(size)[:num]
            for start, size, num in zip(starts, sizes, num_sampled, strict=True)
        ]
    )
    return replace(
        small,
        shares=replace(small.shares, num_sampled=num_sampled),
        sample_xyz=xyz[rows],
        sample_colors=colors[rows],
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
def _shared_points(
    depth_map: DepthMap, others: Sequence[OtherDepth]
) -> tuple[DensePoints, Int64Array]:
    """All points, and how many (1 + N,) are left to nobody and to each of the others."""
    points = keyframe_points(depth_map)
    groups = shown_by(points, depth_map, others)
    by_group = _those_of(points, np.argsort(groups, kind="stable"))
    return by_group, np.bincount(groups, minlength=1 + len(others)).astype(np.int64)


def _those_of(points: DensePoints, rows: BoolArray | Int64Array) -> DensePoints:
    return DensePoints(
        xyz=points.xyz[rows],
        colors=points.colors[rows],
        normals=points.normals[rows],
        sampling=points.sampling[rows],
        num_views=points.num_views[rows],
    )


def _is_there(shares: Shares, versions: Mapping[FrameId, int]) -> BoolArray:
    """Which of the others (N,) have the depth of then."""
    pairs = zip(shares.other_ids.tolist(), shares.other_versions.tolist(), strict=True)
    return np.array([versions.get(i) == version for i, version in pairs], np.bool_)


def _in_share(is_left: BoolArray) -> BoolArray:
    """Which shares (1 + N,) a keyframe shows itself, by those (N,) that are left to others."""
    return np.concatenate([[True], ~is_left])


def _probes(depth_map: DepthMap) -> Float64Array:
    """Places (3, 3) before the camera at its median depth: in the middle and in two corners."""
    height, width = depth_map.depth.shape
    columns, lines = (
        np.array([0.5, 0.0, 1.0]) * (width - 1),
        np.array([0.5, 0.0, 1.0]) * (height - 1),
    )
    rays = np.stack([*plane_xy(depth_map.pinhole, columns, lines), np.ones(3)])
    known = depth_map.depth[depth_map.depth > 0]
    return np.asarray(rays.T * (float(np.median(known)) if len(known) else 1.0))


def _are_apart(
    probes: Float64Array,
    others_from_own: Float64Array,
    world_from_own: Float64Array,
    world_from_others: Float64Array,
) -> BoolArray:
    """Whether others have moved away from a keyframe, so that what both saw is in two places, (N,).

    ``others_from_own`` (N, 3, 4) is how they lay to it; the similarities into the world, (3, 4) and
    (N, 3, 4), are how they all lie now.
    """
    homogeneous = np.column_stack([probes, np.ones(len(probes))]).T  # (4, 3)
    now = world_from_own @ homogeneous
    lay = others_from_own @ homogeneous
    then = world_from_others[:, :, :3] @ lay + world_from_others[:, :, 3:]
    depth = np.linalg.norm(world_from_own[:, :3] @ probes.T, axis=0)
    return np.asarray((np.linalg.norm(now - then, axis=1) > _APART_RATIO * depth).any(axis=1))


@charged_to(Stage.DENSE_FUSION)
def _checked(depth_map: DepthMap, others: Sequence[OtherDepth]) -> DepthMap:
    return with_agreement(depth_map, compare_depths(depth_map, others))


def _right_ones(placed: Sequence[PlacedKeyframe]) -> list[PlacedKeyframe]:
    """What may be shown, in order of arrival."""
    right = (one for one in placed if not one.is_wrong)
    return sorted(right, key=lambda one: one.frame_id)


def _placed(
    frame_id: FrameId,
    one: _Keyframe,
    poses: Mapping[int, Float64Array],
    *,
    border_rays: Float64Array,
) -> PlacedKeyframe:
    factor, error_ratio = _change(one.small.depth_map, frame_id, poses)
    scale = 1.0 if factor is None else factor  # it is not shown, then
    world_from_cam = invert_pose(poses[frame_id])
    lens_change = _lens_change(one.small.border_rays, border_rays)
    is_outdated = error_ratio > _OUTDATED_ERROR_RATIO or lens_change > _OUTDATED_LENS_RATIO
    return PlacedKeyframe(
        frame_id=frame_id,
        world_from_chunk=np.column_stack([scale * world_from_cam[:, :3], world_from_cam[:, 3]]),
        is_wrong=error_ratio > _WRONG_ERROR_RATIO or lens_change > _WRONG_LENS_RATIO,
        is_outdated=is_outdated or one.is_unreadable,
    )


def _lens_change(then: Float64Array, now: Float64Array) -> float:
    """How far rays (8, 3) at an image's border have moved, of how far they are from its axis.

    Those that are known then and now; without one it is infinite.
    """
    known = np.isfinite(then).all(axis=1) & np.isfinite(now).all(axis=1)
    if not known.any():
        return math.inf
    extent = np.linalg.norm(then[known] - [0.0, 0.0, 1.0], axis=1).max()
    return float(np.linalg.norm(now[known] - then[known], axis=1).max() / max(extent, 1e-9))


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
