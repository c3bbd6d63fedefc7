"""Pose reports: which frames have a pose by now, emitted as the maps come to know them."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from engine.events import FramePosed
from engine.geometry import camera_center, quat_xyzw_from_rotation
from engine.mapping.frame_posing import MAX_POSED_CAMERAS, NUM_LATEST_KEYFRAMES
from engine.mapping.model.sparse_map import SparseMap
from engine.ports import EventSink
from engine.types import FrameId, FramePose, Keyframe, TrackedFrame

_NUM_RECENT = 500  # frames of videos: a camera that gave one of these may give the next


class PoseReports:
    """Emits the pose of each frame once, and of a keyframe again when it is registered.

    Args:
        emit: takes the events.
    """

    def __init__(self, *, emit: EventSink) -> None:
        self._emit = emit
        self._camera_keys: dict[FrameId, str] = {}  # of all keyframes
        self._latest: dict[str, deque[FrameId]] = {}  # keyframes of each camera
        self._recent: deque[str] = deque(maxlen=_NUM_RECENT)  # cameras of the frames that came last
        self._has_pose: set[FrameId] = set()
        self._map_numbers: dict[FrameId, int] = {}  # of keyframes, as reported last
        self._new: list[FramePose] = []

    def facts(self) -> list[FrameId]:
        """The keyframes of which no pose was reported."""
        return [i for i in self._camera_keys if i not in self._has_pose]

    def restore(
        self,
        facts: Collection[FrameId],
        tracked_ids: Iterable[FrameId],
        places: Mapping[FrameId, int],
    ) -> None:
        """Goes on where the poses of all other frames were reported, and nothing since.

        Args:
            facts: as `facts` gave them.
            tracked_ids: frames between keyframes that have a pose.
            places: the number of the map that each keyframe is registered in.
        """
        self._new.clear()
        self._has_pose = set(self._camera_keys).difference(facts).union(tracked_ids)
        self._map_numbers = {i: number for i, number in places.items() if i in self._has_pose}

    @property
    def num_keyframes(self) -> int:
        """Keyframes that came, registered or not."""
        return len(self._camera_keys)

    def add_keyframe(self, keyframe: Keyframe) -> None:
        """Adds a keyframe, from which frames may be tracked."""
        self._camera_keys[keyframe.frame_id] = keyframe.camera_key
        if keyframe.is_photo:
            return
        latest = self._latest.setdefault(keyframe.camera_key, deque(maxlen=NUM_LATEST_KEYFRAMES))
        latest.append(keyframe.frame_id)
        self._recent.append(keyframe.camera_key)

    def add_frame(self, tracked: TrackedFrame) -> None:
        """Adds a frame between keyframes, with a pose or without: its camera is in use."""
        self._recent.append(self._camera_keys[tracked.keyframe_id])

    def has_keyframe(self, frame_id: FrameId) -> bool:
        """Whether a keyframe came; what could not be described is left out."""
        return frame_id in self._camera_keys

    def report_keyframes(
        self, sparse_map: SparseMap, *, map_number: int, world_number: int
    ) -> None:
        """Reports keyframes that are new in a map."""
        for frame_id in sparse_map.registered_ids:
            if self._map_numbers.get(frame_id) == map_number:
                continue
            self._map_numbers[frame_id] = map_number
            keyframe = sparse_map.keyframe(frame_id)
            self._report(
                FramePose(
                    frame_id=frame_id,
                    index=keyframe.index,
                    captured_at_s=keyframe.captured_at_s,
                    cam_from_world=sparse_map.cam_from_world(frame_id),
                    is_keyframe=True,
                    map_number=map_number,
                    world_number=world_number,
                ),
                camera_key=keyframe.camera_key,
                received_at_s=keyframe.received_at_s,
            )

    def report_tracked(
        self,
        posed: Iterable[tuple[TrackedFrame, FramePose]],
        *,
        map_number: int,
        world_number: int,
    ) -> None:
        """Reports frames between keyframes that a map poses; those with a pose stay as they are."""
        for tracked, pose in posed:
            self._report(
                replace(pose, map_number=map_number, world_number=world_number),
                camera_key=self._camera_keys[tracked.keyframe_id],
                received_at_s=tracked.received_at_s,
            )

    def add_reported(self, pose: FramePose) -> None:
        """Adds the first pose of a frame, which was reported when it was known."""
        self._has_pose.add(pose.frame_id)
        self._new.append(pose)

    @property
    def latest_keyframes(self) -> list[tuple[str, FrameId]]:
        """The newest keyframes, with its key, of each camera of which frames came lately.

        Frames may be tracked from them. Photos are none of them.
        """
        in_use = itertools.islice(dict.fromkeys(reversed(self._recent)), MAX_POSED_CAMERAS)
        return [(key, frame_id) for key in in_use for frame_id in self._latest.get(key, ())]

    def take_new(self) -> tuple[FramePose, ...]:
        """Hands over the first poses of frames since the last call."""
        new, self._new = tuple(self._new), []
        return new

    def _report(self, pose: FramePose, *, camera_key: str, received_at_s: float) -> None:
        is_first = pose.frame_id not in self._has_pose
        if not (is_first or pose.is_keyframe):
            return  # the map has it already, and better
        self._has_pose.add(pose.frame_id)
        if is_first:
            self._new.append(pose)
        self._emit(
            posed_event(pose, camera_key=camera_key, received_at_s=received_at_s, is_first=is_first)
        )


def posed_event(
    pose: FramePose, *, camera_key: str, received_at_s: float, is_first: bool
) -> FramePosed:
    """The event that a frame has a pose; its latency ends now."""
    x, y, z = camera_center(pose.cam_from_world).tolist()
    qx, qy, qz, qw = quat_xyzw_from_rotation(pose.cam_from_world[:, :3].T).tolist()
    return FramePosed(
        frame_id=pose.frame_id,
        camera_key=camera_key,
        captured_at_s=pose.captured_at_s,
        cam_center_in_world=(x, y, z),
        world_from_cam_quat_xyzw=(qx, qy, qz, qw),
        is_keyframe=pose.is_keyframe,
        is_first=is_first,
        latency_s=time.monotonic() - received_at_s,
        map_number=pose.map_number,
    )
