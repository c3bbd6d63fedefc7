"""The figures of one run of a pipeline, and of several: medians and how far they spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one run used and made; None: not known, or not of this pipeline.

    Frames are those that the pipeline got. Poses are compared with the reference.
    """

    cpu_s: float  # user and system, of the process and its children
    wall_s: float
    peak_rss_mb: float
    num_given: float | None = None  # images, or keyframes of LiveSfM
    num_registered: float | None = None  # of them, in the largest map
    num_maps: float | None = None
    num_points3D: float | None = None
    mean_track_length: float | None = None
    mean_reprojection_error_px: float | None = None
    num_referenced: float | None = None  # frames that have a reference
    num_right: float | None = None  # of them, within `RIGHT_RATIO` of the extent
    ate: float | None = None  # RMSE of centres after a similarity, in units of the reference
    ate_percent: float | None = None  # of the extent of the cameras that are compared
    ate_causal: float | None = None  # of poses as first reported
    ate_causal_percent: float | None = None
    auc_5_deg: float | None = None
    auc_10_deg: float | None = None
    auc_30_deg: float | None = None
    # From a frame's arrival to its first pose; of a file, frames wait for the engine.
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    latency_p99_ms: float | None = None
    latency_max_ms: float | None = None
    # The same for frames that arrived after the first map.
    mapped_latency_p50_ms: float | None = None
    mapped_latency_p95_ms: float | None = None
    mapped_latency_p99_ms: float | None = None
    mapped_latency_max_ms: float | None = None
    # From a keyframe's arrival to its place in the map.
    keyframe_latency_p50_ms: float | None = None
    keyframe_latency_p95_ms: float | None = None
    keyframe_latency_p99_ms: float | None = None
    keyframe_latency_max_ms: float | None = None
    first_map_s: float | None = None  # from the start of the run


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A figure over several runs."""

    median: float
    smallest: float
    largest: float


def spreads(runs: Sequence[Figures]) -> dict[str, Spread]:
    """The figures that some of the runs have, by name."""
    found = {}
    for field in fields(Figures):
        values = [value for run in runs if (value := getattr(run, field.name)) is not None]
        if values:
            found[field.name] = Spread(
                median=float(np.median(values)), smallest=min(values), largest=max(values)
            )
    return found
