"""The figures of a run, counted from its events."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.events import (
    BundleAdjusted,
    Event,
    FrameDropped,
    FramePosed,
    FrameReceived,
    KeyframeAdded,
    LoopClosed,
    MapInitialized,
    SnapshotWritten,
    WindowSolved,
    WindowVerdict,
)
from engine.types import DropReason


class RunStatistics:
    """Counts facts; an ``EventSink`` for one thread at a time.

    Memory: 16 bytes a frame, and 8 for each measurement of the event loop's lag.
    """

    def __init__(self) -> None:
        self._counts: Counter[type[Event]] = Counter()
        self._dropped: Counter[DropReason] = Counter()
        self._num_never_frames = 0  # dropped before they had been received
        self._keyframe_latency_s = array("d")
        self._frame_latency_s = array("d")
        self._loop_lag_s = array("d")
        self._first_map_s: float | None = None
        self._num_windows_merged = 0
        self._window_cpu_s = 0.0

    def __call__(self, event: Event) -> None:
        """Takes one fact."""
        self._counts[type(event)] += 1
        match event:
            case FrameDropped():
                self._dropped[event.reason] += 1
                self._num_never_frames += event.frame_id is None
            case FramePosed():
                if event.is_first:
                    self._frame_latency_s.append(event.latency_s)
                if event.is_keyframe:
                    self._keyframe_latency_s.append(event.latency_s)
            case WindowSolved():
                self._num_windows_merged += event.verdict is WindowVerdict.MERGED
                self._window_cpu_s += event.cpu_s
            case MapInitialized() if self._first_map_s is None:
                self._first_map_s = event.at_s
            case _:
                pass

    def add_loop_lag(self, lag_s: float) -> None:
        """Takes one measurement of how late the event loop woke up."""
        self._loop_lag_s.append(lag_s)

    def figures(self) -> dict[str, Any]:
        """What the events tell of ``summary.json``."""
        return {
            "frames_received": self._counts[FrameReceived] + self._num_never_frames,
            "frames_dropped": {
                reason.value: count for reason, count in sorted(self._dropped.items())
            },
            "keyframes": self._counts[KeyframeAdded],
            "time_to_first_map_s": self._first_map_s,
            "latency_ms": {
                "keyframes": _latency_ms(self._keyframe_latency_s),
                "frames": _latency_ms(self._frame_latency_s),
            },
            "window_solves": self._counts[WindowSolved],
            "windows_merged": self._num_windows_merged,
            "window_cpu_s": round(self._window_cpu_s, 3),
            "global_ba_runs": self._counts[BundleAdjusted],
            "loops_closed": self._counts[LoopClosed],
            "snapshots_written": self._counts[SnapshotWritten],
            "loop_lag_ms": _loop_lag_ms(self._loop_lag_s),
        }


def _latency_ms(latencies_s: array[float]) -> Mapping[str, float | None]:
    if not latencies_s:
        return {"p50": None, "p95": None, "max": None}
    p50, p95, largest = np.percentile(latencies_s, [50, 95, 100]) * 1000.0
    return {"p50": round(p50, 1), "p95": round(p95, 1), "max": round(largest, 1)}


def _loop_lag_ms(lags_s: array[float]) -> Mapping[str, float | None]:
    if not lags_s:
        return {"p99": None, "max": None}
    p99, largest = np.percentile(lags_s, [99, 100]) * 1000.0
    return {"p99": round(p99, 1), "max": round(largest, 1)}
