"""Trajectory: poses that were measured, keyframes from the map, the rest relative to a keyframe.

A frame between keyframes is stored as its motion since its keyframe, the translation in the scale
that the map had around the keyframe at first. When bundle adjustment or a closed loop moves or
rescales the keyframe's surroundings, its frames follow. Only between two keyframes close in time a
frame gets a pose that was not estimated.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.geometry import compose_poses, interpolate_poses, rotation_angle_rad
from engine.types import Float64Array, FrameId, FramePose, Keyframe, PoseGap, PoseKind, TrackedFrame

_MIN_GAP_S = 2.0  # of a gap that anybody misses
_GAP_STEPS = 5  # times the usual step from one posed frame to the next
_MAX_TURN_RAD = 0.5  # between poses with another one between them; beyond it a video was cut


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeyframeState:
    """A keyframe's pose in a map and how much its surroundings grew since it was registered."""

    cam_from_world: Float64Array  # (3, 4)
    scale: float  # current map lengths per map length at registration


@dataclass(frozen=True, slots=True, kw_only=True)
class _FrameTime:
    frame_id: FrameId
    index: int  # gives the order of a camera's frames: some may be read again in a resumed run
    captured_at_s: float
    camera_key: str  # frames of one camera are interpolated among themselves
    is_keyframe: bool
    is_photo: bool  # never interpolated


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _RelativePose:
    keyframe_id: FrameId
    cam_from_keyframe: Float64Array  # (3, 4), translation at scale 1 of the keyframe


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _PlacedPose:
    """An estimated pose in one of the maps."""

    time: _FrameTime
    map_idx: int
    cam_from_world: Float64Array  # (3, 4)
    kind: PoseKind


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _CameraPoses:
    """The estimated poses of one camera's frames, in the order of their source."""

    all: list[_PlacedPose] = field(default_factory=list)
    keyframes: list[_PlacedPose] = field(default_factory=list)


class Trajectory:
    """All frames of a run in order of arrival. Memory: about 500 bytes a frame.

    Args:
        max_interpolation_s: how far the keyframes around a frame may be apart for a pose between
            them; 0: no frame gets one.
    """

    def __init__(self, *, max_interpolation_s: float) -> None:
        self._max_interpolation_s = max_interpolation_s
        self._times: dict[FrameId, _FrameTime] = {}
        self._relative: dict[FrameId, _RelativePose] = {}

    def __len__(self) -> int:
        return len(self._times)

    def holds(self, frame_id: FrameId) -> bool:
        """Whether a frame was added."""
        return frame_id in self._times

    def add_keyframe(self, keyframe: Keyframe) -> None:
        """Adds a keyframe."""
        self._times[keyframe.frame_id] = _FrameTime(
            frame_id=keyframe.frame_id,
            index=keyframe.index,
            captured_at_s=keyframe.captured_at_s,
            camera_key=keyframe.camera_key,
            is_keyframe=True,
            is_photo=keyframe.is_photo,
        )

    def add_tracked(self, tracked: TrackedFrame) -> None:
        """Adds a frame between keyframes, of the camera of the keyframe it was tracked from."""
        self._times[tracked.frame_id] = _FrameTime(
            frame_id=tracked.frame_id,
            index=tracked.index,
            captured_at_s=tracked.captured_at_s,
            camera_key=self._times[tracked.keyframe_id].camera_key,
            is_keyframe=False,
            is_photo=False,
        )

    def set_relative_pose(
        self,
        tracked: TrackedFrame,
        *,
        cam_from_keyframe: Float64Array,
        scale: float,
    ) -> None:
        """Stores a frame's motion (3, 4) since its keyframe, found at the keyframe's scale."""
        scaled = cam_from_keyframe.copy()
        scaled[:, 3] /= scale
        self._relative[tracked.frame_id] = _RelativePose(
            keyframe_id=tracked.keyframe_id, cam_from_keyframe=scaled
        )

    def relative_pose(self, frame_id: FrameId) -> tuple[FrameId, Float64Array] | None:
        """A frame's keyframe and its motion (3, 4) since that, at its scale 1; None: not posed."""
        relative = self._relative.get(frame_id)
        return None if relative is None else (relative.keyframe_id, relative.cam_from_keyframe)

    def poses(self, maps: Sequence[Mapping[FrameId, KeyframeState]]) -> list[list[FramePose]]:
        """Poses of the frames that have one, by the keyframes' states in each map.

        A frame of a video without an estimated pose is interpolated in capture time, when the
        nearest keyframes of its camera before and after it are in one map and close in time. It
        then lies between the nearest poses before and after it, unless the camera turned far from
        one to the other. No other frame gets a pose.

        Args:
            maps: the states of registered keyframes; no keyframe is in two maps.

        Returns:
            The poses of each map, in order of arrival; their maps are numbered in this order.
        """
        known = self._estimated(maps)
        by_camera = _by_camera(known)
        poses: list[list[FramePose]] = [[] for _ in maps]
        for time in self._times.values():
            placed = known.get(time.frame_id)
            if placed is None and time.camera_key in by_camera:
                placed = self._interpolated(time, by_camera[time.camera_key])
            if placed is not None:
                poses[placed.map_idx].append(_frame_pose(placed))
        return poses

    def gaps(
        self,
        registered: Collection[FrameId],
        *,
        overload_at_s: Mapping[str, Float64Array] | None = None,
    ) -> list[PoseGap]:
        """Times of videos between two posed frames of which no frame has an estimated pose.

        They are at least two seconds, and much longer than from one posed frame to the next.

        Args:
            registered: keyframes that have a pose in some map.
            overload_at_s: capture times of frames that were dropped because the engine was behind,
                by the source's prefix of its cameras' keys; None: of none.
        """
        held = frozenset(registered)
        by_camera: dict[str, list[_FrameTime]] = {}
        for frame_id, time in self._times.items():
            relative = self._relative.get(frame_id)
            keyframe_id = frame_id if relative is None else relative.keyframe_id
            if not time.is_photo and (frame_id in held or keyframe_id in held):
                by_camera.setdefault(time.camera_key, []).append(time)
        gaps = []
        for camera_key, times in by_camera.items():
            times.sort(key=lambda time: time.index)
            steps_s = np.diff([time.captured_at_s for time in times])
            if not len(steps_s):
                continue
            least_s = max(_MIN_GAP_S, _GAP_STEPS * float(np.median(steps_s)))
            gaps += [
                PoseGap(
                    camera_key=camera_key,
                    before=times[idx].frame_id,
                    after=times[idx + 1].frame_id,
                    begins_at_s=times[idx].captured_at_s,
                    ends_at_s=times[idx + 1].captured_at_s,
                    is_overload=self._is_overload(times[idx], times[idx + 1], overload_at_s or {}),
                )
                for idx in np.flatnonzero(steps_s >= least_s).tolist()
            ]
        return gaps

    def _is_overload(
        self, before: _FrameTime, after: _FrameTime, overload_at_s: Mapping[str, Float64Array]
    ) -> bool:
        """Whether more frames of a source were dropped between two than came."""
        fitting = (p for p in overload_at_s if not p or before.camera_key.startswith(f"{p}|"))
        if (prefix := next(fitting, None)) is None:
            return False
        start = f"{prefix}|" if prefix else ""
        first_s, last_s = before.captured_at_s, after.captured_at_s
        dropped_at_s = overload_at_s[prefix]
        num_dropped = np.count_nonzero((dropped_at_s > first_s) & (dropped_at_s < last_s))
        num_came = sum(
            first_s < time.captured_at_s < last_s and time.camera_key.startswith(start)
            for time in self._times.values()
        )
        return bool(num_dropped > num_came)

    def _estimated(
        self, maps: Sequence[Mapping[FrameId, KeyframeState]]
    ) -> dict[FrameId, _PlacedPose]:
        map_of = {i: map_idx for map_idx, keyframes in enumerate(maps) for i in keyframes}
        known = {}
        for frame_id, time in self._times.items():
            relative = self._relative.get(frame_id)
            if frame_id in map_of:
                map_idx, kind = map_of[frame_id], PoseKind.KEYFRAME
                pose = maps[map_idx][frame_id].cam_from_world
            elif relative is not None and relative.keyframe_id in map_of:
                map_idx, kind = map_of[relative.keyframe_id], PoseKind.TRACKED
                pose = _moved(relative, maps[map_idx][relative.keyframe_id])
            else:
                continue
            known[frame_id] = _PlacedPose(
                time=time, map_idx=map_idx, cam_from_world=pose, kind=kind
            )
        return known

    def _interpolated(self, time: _FrameTime, camera: _CameraPoses) -> _PlacedPose | None:
        """The pose of a frame between its neighbours; None where that would be a guess."""
        keyframes = _around(time, camera.keyframes)
        nearest = _around(time, camera.all)
        if time.is_photo or keyframes is None or nearest is None:
            return None
        first_s, last_s = (keyframe.time.captured_at_s for keyframe in keyframes)
        before, after = nearest
        before_s, after_s = before.time.captured_at_s, after.time.captured_at_s
        map_idxs = {one.map_idx for one in (*keyframes, *nearest)}
        if len(map_idxs) > 1 or not 0.0 < last_s - first_s <= self._max_interpolation_s:
            return None
        # Clocks may jump: then a capture time need not be between those of the neighbours.
        if not (before_s <= time.captured_at_s <= after_s and before_s < after_s):
            return None
        turn_rad = rotation_angle_rad(before.cam_from_world[:, :3], after.cam_from_world[:, :3])
        if turn_rad > _MAX_TURN_RAD:
            return None
        return _PlacedPose(
            time=time,
            map_idx=before.map_idx,
            cam_from_world=interpolate_poses(
                before.cam_from_world,
                after.cam_from_world,
                fraction=(time.captured_at_s - before_s) / (after_s - before_s),
            ),
            kind=PoseKind.INTERPOLATED,
        )


def _moved(relative: _RelativePose, state: KeyframeState) -> Float64Array:
    cam_from_keyframe = relative.cam_from_keyframe.copy()
    cam_from_keyframe[:, 3] *= state.scale
    return compose_poses(cam_from_keyframe, state.cam_from_world)


def _by_camera(known: Mapping[FrameId, _PlacedPose]) -> dict[str, _CameraPoses]:
    by_camera: dict[str, _CameraPoses] = {}
    for placed in sorted(known.values(), key=lambda placed: placed.time.index):
        camera = by_camera.setdefault(placed.time.camera_key, _CameraPoses())
        camera.all.append(placed)
        if placed.kind is PoseKind.KEYFRAME:
            camera.keyframes.append(placed)
    return by_camera


def _around(
    time: _FrameTime, posed: Sequence[_PlacedPose]
) -> tuple[_PlacedPose, _PlacedPose] | None:
    """The nearest before and after a frame; indices give the order on every clock."""
    position = bisect.bisect(posed, time.index, key=lambda other: other.time.index)
    if position in (0, len(posed)):
        return None
    return posed[position - 1], posed[position]


def _frame_pose(placed: _PlacedPose) -> FramePose:
    return FramePose(
        frame_id=placed.time.frame_id,
        index=placed.time.index,
        captured_at_s=placed.time.captured_at_s,
        cam_from_world=np.ascontiguousarray(placed.cam_from_world),
        is_keyframe=placed.time.is_keyframe,
        kind=placed.kind,
        map_number=placed.map_idx,
    )
