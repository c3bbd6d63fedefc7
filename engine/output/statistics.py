"""Run statistics: the figures of ``summary.json``, from the events, the map and the process."""

from __future__ import annotations

import itertools
import resource
import sys
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from engine.events import (
    BundleAdjusted,
    EarlyMapMade,
    Event,
    FaultKind,
    FaultOccurred,
    FrameDropped,
    FramePosed,
    FrameReceived,
    KeyframeAdded,
    LoopClosed,
    MapInitialized,
    OverlayFound,
    PairsRejected,
    PairVerified,
    RunPart,
    SnapshotWritten,
    SourceChanged,
    SourceOpened,
    WeakPairsMatched,
    WindowSolved,
    WindowVerdict,
)
from engine.mapping.steps import MapFigures
from engine.output.load import LoadStatistics
from engine.types import MAP_UNITS, METRES, DropReason, Float64Array, LeftOut, PairReason


class RunStatistics:
    """Counts events; an ``EventSink`` for one thread at a time.

    Memory: 16 bytes a frame, 8 of one that is dropped.
    """

    def __init__(self) -> None:
        self._counts: Counter[type[Event]] = Counter()
        self._dropped: Counter[DropReason] = Counter()
        self._overload_at_s: dict[str, array[float]] = {}  # capture times, by source
        self._prefixes: dict[str, str] = {}  # of cameras' keys, by source
        self._left_out: dict[str, tuple[LeftOut, ...]] = {}  # by source, as reported last
        self._num_never_frames = 0  # dropped before they had been received
        self._keyframe_latency_s = array("d")
        self._frame_latency_s = array("d")
        self._has_live_source = False
        self._first_map_s: float | None = None
        self._overlays: dict[str, dict[str, Any]] = {}  # by camera, as found last
        self._faults: Counter[tuple[RunPart, FaultKind]] = Counter()
        self._second = {"pairs": 0, "pairs_verified": 0, "pairs_left_out": 0}
        self._num_windows_merged = 0
        self._window_cpu_s = 0.0
        self._num_rejected = 0  # pairs
        self._num_given_up_early = 0

    def __call__(self, event: Event) -> None:
        """Counts one event."""
        self._counts[type(event)] += 1
        match event:
            case FrameDropped():
                self._count_dropped(event)
            case SourceOpened() | SourceChanged():
                self._count_source(event)
            case FramePosed() if self._has_live_source:  # else frames wait, as files do
                if event.is_first:
                    self._frame_latency_s.append(event.latency_s)
                if event.is_keyframe:
                    self._keyframe_latency_s.append(event.latency_s)
            case WeakPairsMatched():
                self._second["pairs"] += event.num_pairs
                self._second["pairs_left_out"] += event.num_left_out
            case PairVerified() if event.reason is PairReason.SECOND:
                self._second["pairs_verified"] += 1
            case WindowSolved():
                self._num_windows_merged += event.verdict is WindowVerdict.MERGED
                self._window_cpu_s += event.cpu_s
            case OverlayFound():
                self._overlays[event.camera_key] = {
                    "share": round(event.share, 4),
                    "boxes_px": [list(box) for box in event.boxes],
                }
            case PairsRejected():
                self._num_rejected += event.num_pairs
                self._num_given_up_early += event.num_given_up_early
            case FaultOccurred():
                self._faults[event.part, event.kind] += 1
            case EarlyMapMade() | MapInitialized() if self._first_map_s is None:
                self._first_map_s = event.at_s

    def _count_dropped(self, event: FrameDropped) -> None:
        self._dropped[event.reason] += event.num_frames
        self._num_never_frames += event.num_frames if event.frame_id is None else 0
        if event.reason is DropReason.OVERLOAD:
            times_s = self._overload_at_s.setdefault(event.source, array("d"))
            times_s.extend(itertools.repeat(event.captured_at_s, event.num_frames))

    def overload_at_s(self) -> dict[str, Float64Array]:
        """Capture times of frames dropped because the engine was behind.

        By the prefix of the source's cameras' keys; "" where there is one source.
        """
        return {
            self._prefixes.get(source, ""): np.array(times_s)
            for source, times_s in self._overload_at_s.items()
        }

    def _count_source(self, event: SourceOpened | SourceChanged) -> None:
        if isinstance(event, SourceOpened):
            self._has_live_source |= event.is_live
            self._prefixes[event.source] = event.prefix
        elif event.left_out:
            self._left_out[event.source] = event.left_out

    def add_without_events(self, *, num_received: int, num_keyframes: int) -> None:
        """Counts what is in the journal of a run and not in its events, which are written later.

        Args:
            num_received: frames of the run so far, but for rejected ones.
            num_keyframes: keyframes of the run so far.
        """
        for kind, number in ((FrameReceived, num_received), (KeyframeAdded, num_keyframes)):
            self._counts[kind] = max(self._counts[kind], number)

    def figures(self) -> dict[str, Any]:
        """The figures of ``summary.json`` that come from events."""
        return {
            "frames_received": self._counts[FrameReceived] + self._num_never_frames,
            "frames_dropped": {
                reason.value: count for reason, count in sorted(self._dropped.items())
            },
            "left_out": [
                {"source": source, **asdict(one)}
                for source, left_out in sorted(self._left_out.items())
                for one in left_out
            ],
            "keyframes": self._counts[KeyframeAdded],
            "time_to_first_map_s": self._first_map_s,
            "latency_ms": {
                "keyframes": _latency_ms(self._keyframe_latency_s),
                "frames": _latency_ms(self._frame_latency_s),
            },
            "pairs": {
                "verified": self._counts[PairVerified],
                "rejected": self._num_rejected,
                "of_these_given_up_early": self._num_given_up_early,
            },
            "window_solves": self._counts[WindowSolved],
            "windows_merged": self._num_windows_merged,
            "window_cpu_s": round(self._window_cpu_s, 3),
            "global_ba_runs": self._counts[BundleAdjusted],
            "overlays": dict(sorted(self._overlays.items())),
            "loops_closed": self._counts[LoopClosed],
            "second_matcher": dict(self._second),
            "snapshots_written": self._counts[SnapshotWritten],
            "faults": {
                f"{part.value}: {kind.value}": count
                for (part, kind), count in sorted(self._faults.items())
            },
        }


def summary_figures(
    statistics: RunStatistics,
    figures: MapFigures,
    load: LoadStatistics,
    *,
    wall_s: float,
    stopped_by: str,
    is_metric: bool,
) -> dict[str, Any]:
    """All figures of a run.

    Args:
        statistics: has counted every event.
        figures: of the map as it is saved.
        load: of this part of the run.
        wall_s: how long the run took.
        stopped_by: what ended it.
        is_metric: the unit of maps is made a metre where it is known.
    """
    placement, scale, cpu_s = figures.placement, figures.metres_per_map_unit, _cpu_s()
    return {
        "verdict": figures.verdict.as_record(),
        **statistics.figures(),
        "registered_keyframes": figures.counts.num_registered,
        "num_points3D": figures.num_points3D,
        "num_observations": figures.num_observations,
        "mean_track_length": figures.mean_track_length,
        "mean_reprojection_error_px": figures.mean_reprojection_error_px,
        "frames_interpolated": figures.num_interpolated_frames,
        "frames_without_pose": figures.num_frames_without_pose,
        "components": len(figures.maps),
        "maps": [one.as_record() for one in figures.maps],
        "georeferenced": placement is not None,
        "georeference": None if placement is None else placement.as_record(with_residuals=True),
        "not_georeferenced": figures.not_georeferenced,
        "gps_rmse_m": figures.gps_rmse_m,
        "unit": METRES if placement is not None or (is_metric and scale is not None) else MAP_UNITS,
        "metres_per_map_unit": 1.0 if placement is not None else scale,
        "cameras": [camera.as_record() for camera in figures.cameras],
        "turning": [stretch.as_record() for stretch in figures.turning],
        "lost": [stretch.as_record() for stretch in figures.lost],
        "peak_rss_mb": _peak_rss_mb(),
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        **load.figures(cpu_s=cpu_s),
        "stopped_by": stopped_by,
    }


def _latency_ms(latencies_s: array[float]) -> Mapping[str, float | None]:
    if not latencies_s:
        return {"p50": None, "p95": None, "max": None}
    p50, p95, largest = np.percentile(latencies_s, [50, 95, 100]) * 1000.0
    return {"p50": round(p50, 1), "p95": round(p95, 1), "max": round(largest, 1)}


def _cpu_s() -> float:
    """CPU seconds of this process and its finished children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in usage)


def _peak_rss_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024.0 * 1024.0 if sys.platform == "darwin" else 1024.0)
