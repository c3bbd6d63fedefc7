"""Run counters: the figures that views show, counted from events."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

from engine.events import (
    BundleAdjusted,
    ComponentJoined,
    EarlyMapMade,
    Event,
    FrameDropped,
    FramePosed,
    FrameReceived,
    FrameRegistered,
    KeyframeAdded,
    LoopClosed,
    MainMapChanged,
    MapInitialized,
    RunFinished,
    RunResumed,
    SnapshotWritten,
    SourceOpened,
    VerdictChanged,
)
from engine.frame_names import frame_in_words
from engine.types import DropReason, FrameId, MapCounts, Verdict

LATENCY_WINDOW = 300  # frames: ten seconds of video


@dataclass(slots=True)
class RunCounters:
    """Counts of a run so far; ``update`` takes every event, in order."""

    frames_received: int = 0  # those that were dropped undecoded, too
    frames_posed: int = 0
    keyframes: int = 0
    registered: int = 0
    points3D: int = 0
    reprojection_error_px: float | None = None  # mean after the last global bundle adjustment
    dropped_by_reason: Counter[DropReason] = field(default_factory=Counter)
    loops: int = 0
    snapshots: int = 0
    has_live_source: bool = False  # frames of files wait, so that their latency says nothing
    latest_latency_s: float | None = None
    finished: RunFinished | None = None
    verdict: Verdict = field(default_factory=Verdict)  # on the map, as it was emitted last
    _latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCY_WINDOW))
    _added: dict[FrameId, KeyframeAdded] = field(default_factory=dict)
    _camera_keys: set[str] = field(default_factory=set)

    @property
    def dropped(self) -> int:
        """Frames dropped so far, for any reason."""
        return self.dropped_by_reason.total()

    def name_of(self, frame_id: FrameId) -> str:
        """How a keyframe is named to people."""
        added = self._added.get(frame_id)
        if added is None:
            return f"keyframe {frame_id}"
        name = frame_in_words(index=added.index, name=added.name, is_photo=added.is_photo)
        return f"{name} of {added.camera_key}" if len(self._camera_keys) > 1 else name

    def latency_percentiles_s(self) -> tuple[float, float] | None:
        """Median and 95th percentile of the latest latencies; None before the first pose.

        Nor are there any where all sources are files.
        """
        if not self._latencies_s:
            return None
        median_s, high_s = np.percentile(np.array(self._latencies_s), (50, 95))
        return float(median_s), float(high_s)

    def update(self, event: Event) -> None:
        """Counts one event."""
        match event:
            case FrameReceived():
                self.frames_received += 1
            case FrameDropped():
                self.dropped_by_reason[event.reason] += event.num_frames
                self.frames_received += event.num_frames if event.frame_id is None else 0
            case FramePosed() if event.is_first:
                self.frames_posed += 1
                self._add_latency(event.latency_s)
            case KeyframeAdded():
                self.keyframes += 1
                self._added[event.frame_id] = event
                self._camera_keys.add(event.camera_key)
            case RunResumed():
                self.keyframes, self.registered = event.num_keyframes, event.num_registered
            case LoopClosed():
                self.loops += 1
            case SnapshotWritten():
                self.snapshots += 1
            case SourceOpened():
                self.has_live_source |= event.is_live
            case _:
                self._update_map(event)

    def _add_latency(self, latency_s: float) -> None:
        if self.has_live_source:
            self.latest_latency_s = latency_s
            self._latencies_s.append(latency_s)

    def update_counts(self, counts: MapCounts) -> None:
        """Sets the counts of registered keyframes and points to those of the map.

        Those of an early map stay as its event said.
        """
        if counts.has_map and not counts.num_registered:
            return
        self.registered = counts.num_registered
        self.points3D = counts.num_points3D

    def _update_map(self, event: Event) -> None:
        match event:
            case EarlyMapMade():
                self.registered, self.points3D = event.num_registered, event.num_points3D
            case MapInitialized():
                self.registered = 2  # a new start holds its first pair and nothing else
                self.points3D = event.num_points3D
            case FrameRegistered(map_number=0):
                self.registered = event.num_registered
                self.points3D = event.num_points3D
            case ComponentJoined(into_map_number=0):
                self.registered = event.num_registered
            case BundleAdjusted():
                self.points3D = event.num_points3D
                self.reprojection_error_px = event.reprojection_error_after_px
            case MainMapChanged():
                self.registered = event.num_registered
            case VerdictChanged():
                self.verdict = event.verdict
            case RunFinished():
                self.keyframes = event.num_keyframes
                self.registered = event.num_registered
                self.finished = event
