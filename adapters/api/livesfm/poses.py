"""Poses of frames as the run reports them first, and the view that collects what a run emits."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.events import Event, FramePosed, VerdictChanged
from engine.geometry import rotation_from_quat_xyzw
from engine.types import (
    Float64Array,
    Frame,
    FrameId,
    FramePose,
    MapCounts,
    MapView,
    Verdict,
    freeze_field,
)

logger = logging.getLogger(__name__)

_MAX_WAITING = 100_000  # poses and events that nobody takes; then the oldest are forgotten


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pose:
    """Where a frame was taken, as first reported; the final poses are in the reconstruction."""

    frame_id: FrameId
    camera: str  # as given with the frame
    index: int  # of the frame, as `Run.add_frame` returned it
    captured_at_s: float
    cam_from_world: Float64Array  # (3, 4); camera axes x right, y down, z forward; map units
    is_keyframe: bool
    is_first: bool  # of the frame: a keyframe that was tracked before gets another in the map
    map_number: int  # of the map whose world it is: 0 is the main one
    latency_s: float  # from `Run.add_frame` on

    def __post_init__(self) -> None:
        freeze_field(self, "cam_from_world", (3, 4), np.float64)


class CollectingView:
    """Keeps events and poses until they are taken, and how the map is; hands events to a listener.

    Args:
        origin_of: camera and index of a frame.
        listen: is called with every event, on the thread of the views; None: nobody is.
    """

    def __init__(
        self,
        *,
        origin_of: Callable[[FrameId], tuple[str, int]],
        listen: Callable[[Event], None] | None,
    ) -> None:
        self._origin_of = origin_of
        self._listen = listen
        self._lock = threading.Lock()
        self._poses: deque[Pose] = deque(maxlen=_MAX_WAITING)
        self._events: deque[Event] = deque(maxlen=_MAX_WAITING)
        self._counts = MapCounts()
        self._verdict: Verdict | None = None

    @property
    def counts(self) -> MapCounts:
        """How large the map is."""
        return self._counts

    @property
    def verdict(self) -> Verdict | None:
        """The verdict on the growing map as it was when it changed last; None: it did not yet."""
        return self._verdict

    def take_poses(self, *, repeated: bool) -> list[Pose]:
        """The poses since the last call, in order; the first of each frame unless `repeated`."""
        with self._lock:
            poses = [pose for pose in self._poses if repeated or pose.is_first]
            self._poses.clear()
        return poses

    def take_events(self) -> list[Event]:
        """The events since the last call, in order."""
        with self._lock:
            events = list(self._events)
            self._events.clear()
        return events

    def show_event(self, event: Event) -> None:
        """Keeps an event, and the pose or the verdict that it may be of."""
        with self._lock:
            self._events.append(event)
            if isinstance(event, FramePosed):
                self._poses.append(self._pose(event))
            elif isinstance(event, VerdictChanged):
                self._verdict = event.verdict
        if self._listen is None:
            return
        try:
            self._listen(event)
        except Exception:  # a task boundary: the listener is not of the run, which goes on
            logger.exception("on_event failed with %s", type(event).__name__)

    def show_frame(self, frame: Frame, pose: FramePose | None) -> None:
        """Shows nothing: whoever added the frame has it."""

    def show_counts(self, counts: MapCounts) -> None:
        """Keeps how large the map is."""
        self._counts = counts

    def close(self) -> None:
        """Keeps what was not taken."""

    def _pose(self, event: FramePosed) -> Pose:
        camera, index = self._origin_of(event.frame_id)
        rotation = rotation_from_quat_xyzw(np.array(event.world_from_cam_quat_xyzw)).T
        translation = -rotation @ np.array(event.cam_center_in_world)
        return Pose(
            frame_id=event.frame_id,
            camera=camera,
            index=index,
            captured_at_s=event.captured_at_s,
            cam_from_world=np.column_stack([rotation, translation]),
            is_keyframe=event.is_keyframe,
            is_first=event.is_first,
            map_number=event.map_number,
            latency_s=event.latency_s,
        )


class MapKeepingView(CollectingView):
    """Also keeps the newest map; the run copies its map for it now and then."""

    _map: MapView | None = None

    @property
    def map(self) -> MapView | None:
        """The newest map, None before there is one."""
        return self._map

    def show_map(self, view: MapView) -> None:
        """Keeps a map."""
        self._map = view
