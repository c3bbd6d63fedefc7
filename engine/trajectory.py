"""A pose for every frame: keyframes from the map, the rest relative to their keyframe.

A frame between keyframes is stored as its motion since its keyframe, the translation in the scale
that the map had around the keyframe when it was first asked. When bundle adjustment or a closed
loop moves or rescales the keyframe's surroundings, its frames follow.
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
    """Where a keyframe is now and how much its surroundings have grown since it was mapped."""

    cam_from_world: Float64Array  # (3, 4)
    scale: float  # map lengths now per map length then


@dataclass(frozen=True, slots=True, kw_only=True)
class _FrameTime:
    frame_id: FrameId
    index: int
    captured_at_s: float
    source_order: int  # frames of one camera are interpolated among themselves
    is_keyframe: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _RelativePose:
    keyframe_id: FrameId
    cam_from_keyframe: Float64Array  # (3, 4), translation at scale 1 of the keyframe


class Trajectory:
    """All frames of a run in order of arrival. Memory: about 300 bytes a frame."""

    def __init__(self) -> None:
        self._times: dict[FrameId, _FrameTime] = {}
        self._relative: dict[FrameId, _RelativePose] = {}
        self._cameras: dict[str, int] = {}
        self._camera_of: dict[FrameId, str] = {}

    def __len__(self) -> int:
        return len(self._times)

    def add_keyframe(self, keyframe: Keyframe) -> None:
        """Notes a keyframe."""
        self._camera_of[keyframe.frame_id] = keyframe.camera_key
        self._add(
            keyframe.frame_id,
            index=keyframe.index,
            captured_at_s=keyframe.captured_at_s,
            camera_key=keyframe.camera_key,
            is_keyframe=True,
        )

    def add_tracked(self, tracked: TrackedFrame) -> None:
        """Notes a frame between keyframes."""
        self._add(
            tracked.frame_id,
            index=tracked.index,
            captured_at_s=tracked.captured_at_s,
            camera_key=self._camera_of[tracked.keyframe_id],
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
        """Poses of every frame by the keyframes' present states, in order of arrival.

        Frames without a pose of their own are interpolated in capture time between the frames
        around them of the same camera, or take the nearest pose beyond the ends. Empty while no
        keyframe is registered.
        """
        known = {
            frame_id: pose
            for frame_id in self._times
            if (pose := self._pose(frame_id, keyframes)) is not None
        }
        by_camera: dict[int, list[_FrameTime]] = {}
        for time in self._times.values():
            if time.frame_id in known:
                by_camera.setdefault(time.source_order, []).append(time)
        poses = []
        for time in self._times.values():
            pose = known.get(time.frame_id)
            if pose is None and by_camera:
                around = by_camera.get(time.source_order) or next(iter(by_camera.values()))
                pose = _interpolated(time, around, known)
            if pose is not None:
                poses.append(_frame_pose(time, pose))
        return poses

    def num_without_own_pose(self, keyframes: Mapping[FrameId, KeyframeState]) -> int:
        """How many frames ``poses`` has to interpolate."""
        return sum(self._pose(frame_id, keyframes) is None for frame_id in self._times)

    def _add(
        self,
        frame_id: FrameId,
        *,
        index: int,
        captured_at_s: float,
        camera_key: str,
        is_keyframe: bool,
    ) -> None:
        self._times[frame_id] = _FrameTime(
            frame_id=frame_id,
            index=index,
            captured_at_s=captured_at_s,
            source_order=self._cameras.setdefault(camera_key, len(self._cameras)),
            is_keyframe=is_keyframe,
        )

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
    after = bisect.bisect(around, time.captured_at_s, key=lambda other: other.captured_at_s)
    if after == 0:
        return known[around[0].frame_id]
    if after == len(around):
        return known[around[-1].frame_id]
    before, behind = around[after - 1], around[after]
    span_s = behind.captured_at_s - before.captured_at_s
    fraction = (time.captured_at_s - before.captured_at_s) / span_s if span_s > 0 else 0.0
    return interpolate_poses(known[before.frame_id], known[behind.frame_id], fraction=fraction)


def _frame_pose(time: _FrameTime, cam_from_world: Float64Array) -> FramePose:
    return FramePose(
        frame_id=time.frame_id,
        index=time.index,
        captured_at_s=time.captured_at_s,
        cam_from_world=np.ascontiguousarray(cam_from_world),
        is_keyframe=time.is_keyframe,
    )
