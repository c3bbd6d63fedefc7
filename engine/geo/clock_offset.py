"""By how much the clock of a track of positions is ahead of that of a camera's frames."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.types import Float64Array

_STEP_S = 0.25  # of the first search
_MAX_CANDIDATES = 4000
_FINE_STEP_S = 0.02
_MAX_POSES = 200
_MIN_COVERED_RATIO = 0.8  # of the frames, by the track
_MAX_UNEXPLAINED = 0.2  # of the positions' spread
_MIN_GAIN = 1.5  # of the best offset over those elsewhere
_SURE_SHARE = 0.005  # a smaller share decides nothing
_ELSEWHERE_S = 2.0
_ELSEWHERE_RATIO = 0.05  # of the time that the frames take


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockOffset:
    """What to add to the times of frames."""

    offset_s: float
    unexplained_ratio: float  # of the positions' spread, by the best similarity


def estimate_clock_offset(
    times_s: Float64Array,
    centers: Float64Array,
    track_times_s: Float64Array,
    track_m: Float64Array,
) -> ClockOffset | str:
    """Finds the offset at which a track has the shape of a camera's path.

    For each candidate the positions at the frames' times are compared with the centres by the best
    similarity (Umeyama, 1991); what it leaves unexplained of their spread is least where the clocks
    agree.

    Args:
        times_s: (N,) of the frames, increasing.
        centers: (N, 3) of the cameras in the map.
        track_times_s: (M,) increasing.
        track_m: (M, 3) east, north, up.

    Returns:
        The offset, or why it cannot be found.
    """
    if len(times_s) < 4 or len(track_times_s) < 4:
        return "there are too few positions or poses"
    chosen = np.unique(np.linspace(0, len(times_s) - 1, _MAX_POSES).astype(np.int64))
    times_s, centers = times_s[chosen], centers[chosen]
    lasts_s = float(times_s[-1] - times_s[0])
    slack_s = (1.0 - _MIN_COVERED_RATIO) * lasts_s
    first_s = float(track_times_s[0] - times_s[0]) - slack_s
    last_s = float(track_times_s[-1] - times_s[-1]) + slack_s
    if last_s < first_s:
        return "the positions take less time than the frames"
    step_s = max(_STEP_S, (last_s - first_s) / _MAX_CANDIDATES)
    candidates = np.arange(first_s, last_s + step_s, step_s)
    left = _unexplained(candidates, times_s, centers, track_times_s, track_m)
    best = int(np.argmin(left))
    fine = candidates[best] + np.arange(-step_s, step_s + _FINE_STEP_S, _FINE_STEP_S)
    fine_left = _unexplained(fine, times_s, centers, track_times_s, track_m)
    offset_s, unexplained = float(fine[np.argmin(fine_left)]), float(fine_left.min())
    if unexplained > _MAX_UNEXPLAINED:
        return f"at no clock offset do they fit the map: {unexplained:.0%} of their spread is left"
    apart_s = max(_ELSEWHERE_S, _ELSEWHERE_RATIO * lasts_s)
    elsewhere = left[np.abs(candidates - offset_s) > apart_s]
    if elsewhere.size and float(elsewhere.min()) < _MIN_GAIN * max(unexplained, _SURE_SHARE):
        other_s = candidates[np.abs(candidates - offset_s) > apart_s][np.argmin(elsewhere)]
        return f"clock offsets of {offset_s:.1f} and {other_s:.1f} s fit the map alike"
    return ClockOffset(offset_s=offset_s, unexplained_ratio=unexplained)


def _unexplained(
    candidates: Float64Array,
    times_s: Float64Array,
    centers: Float64Array,
    track_times_s: Float64Array,
    track_m: Float64Array,
) -> Float64Array:
    """Root of the share (K,) of the positions' variance that the best similarity leaves."""
    at_s = candidates[:, None] + times_s
    positions = np.stack([np.interp(at_s, track_times_s, column) for column in track_m.T], axis=2)
    positions -= positions.mean(axis=1, keepdims=True)
    around = centers - centers.mean(axis=0)
    moments = np.swapaxes(positions, 1, 2) @ around
    left, values, right = np.linalg.svd(moments)
    values[:, 2] *= np.sign(np.linalg.det(left) * np.linalg.det(right))
    spread = np.maximum((positions**2).sum(axis=(1, 2)), 1e-12)
    explained = values.sum(axis=1) ** 2 / max(float((around**2).sum()), 1e-12) / spread
    return np.asarray(np.sqrt(np.maximum(1.0 - explained, 0.0)))
