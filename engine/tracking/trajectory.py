"""Trajectory: a pose for every frame, keyframes from the map, the rest relative to a keyframe.

A frame between keyframes is stored as its motion since its keyframe, the translation in the scale
that the map had around the keyframe at first. When bundle adjustment or a closed loop moves or
rescales the keyframe's surroundings, its frames follow.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.geometry import compose_poses, interpolate_poses
from engine.types import Float64Array, FrameId, FramePose, Keyframe, TrackedFrame


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeyframeState:
    """A keyframe's pose in the map and how much its surroundings grew since it was registered."""

    cam_from_world: Float64Array  # (3, 4)
    scale: float  # current map lengths per map length at registration


@dataclass(frozen=True, slots=True, kw_only=True)
class _FrameTime:
    frame_id: FrameId
    index: int
    captured_at_s: float
    camera_key: str  # frames of one camera are interpolated among themselves
    is_keyframe: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _RelativePose:
    keyframe_id: FrameId
    cam_from_keyframe: Float64Array  # (3, 4), translation at scale 1 of the keyframe


class Trajectory:
    """All frames of a run in order of arrival. Memory: about 500 bytes a frame."""

    def __init__(self) -> None:
        self._times: dict[FrameId, _FrameTime] = {}
        self._relative: dict[FrameId, _RelativePose] = {}

    def __len__(self) -> int:
        return len(self._times)

    def add_keyframe(self, keyframe: Keyframe) -> None:
        """Adds a keyframe."""
        self._times[keyframe.frame_id] = _FrameTime(
            frame_id=keyframe.frame_id,
            index=keyframe.index,
            captured_at_s=keyframe.captured_at_s,
            camera_key=keyframe.camera_key,
            is_keyframe=True,
        )

    def add_tracked(self, tracked: TrackedFrame) -> None:
        """Adds a frame between keyframes, of the camera of the keyframe it was tracked from."""
        self._times[tracked.frame_id] = _FrameTime(
            frame_id=tracked.frame_id,
            index=tracked.index,
            captured_at_s=tracked.captured_at_s,
            camera_key=self._times[tracked.keyframe_id].camera_key,
            is_keyframe=False,
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

    def poses(self, keyframes: Mapping[FrameId, KeyframeState]) -> list[FramePose]:
        """Poses of every frame by the keyframes' states, in order of arrival.

        Frames without a pose of their own are interpolated in capture time between the posed frames
        of their camera that came before and after them, or take the nearest one's pose beyond the
        ends. A camera without any pose borrows those of the others. Empty while no keyframe is
        registered.
        """
        known = {
            frame_id: pose
            for frame_id in self._times
            if (pose := self._pose(frame_id, keyframes)) is not None
        }
        if not known:
            return []
        posed = [self._times[frame_id] for frame_id in sorted(known)]
        by_camera: dict[str, list[_FrameTime]] = {}
        for time in posed:
            by_camera.setdefault(time.camera_key, []).append(time)
        poses = []
        for time in self._times.values():
            pose = known.get(time.frame_id)
            if pose is None:
                pose = _interpolated(time, by_camera.get(time.camera_key, posed), known)
            poses.append(_frame_pose(time, pose))
        return poses

    def num_without_own_pose(self, keyframes: Mapping[FrameId, KeyframeState]) -> int:
        """How many frames ``poses`` has to interpolate."""
        return sum(self._pose(frame_id, keyframes) is None for frame_id in self._times)

    def _pose(
        self, frame_id: FrameId, keyframes: Mapping[FrameId, KeyframeState]
    ) -> Float64Array | None:
        if frame_id in keyframes:
            return keyframes[frame_id].cam_from_world
        relative = self._relative.get(frame_id)
        if relative is None or relative.keyframe_id not in keyframes:
            return None
        state = keyframes[relative.keyframe_id]
        cam_from_keyframe = relative.cam_from_keyframe.copy()
        cam_from_keyframe[:, 3] *= state.scale
        return compose_poses(cam_from_keyframe, state.cam_from_world)


def _interpolated(
    time: _FrameTime, around: Sequence[_FrameTime], known: Mapping[FrameId, Float64Array]
) -> Float64Array:
    # Ids give the order of arrival on every clock; capture times only the fraction between.
    position = bisect.bisect(around, time.frame_id, key=lambda other: other.frame_id)
    before, after = around[max(0, position - 1)], around[min(position, len(around) - 1)]
    span_s = after.captured_at_s - before.captured_at_s
    fraction = (time.captured_at_s - before.captured_at_s) / span_s if span_s > 0 else 0.0
    return interpolate_poses(
        known[before.frame_id],
        known[after.frame_id],
        fraction=min(max(fraction, 0.0), 1.0),
    )


def _frame_pose(time: _FrameTime, cam_from_world: Float64Array) -> FramePose:
    return FramePose(
        frame_id=time.frame_id,
        index=time.index,
        captured_at_s=time.captured_at_s,
        cam_from_world=np.ascontiguousarray(cam_from_world),
        is_keyframe=time.is_keyframe,
    )
