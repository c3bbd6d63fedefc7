"""How much larger a scene is in one image than in another, by matched points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.types import Float64Array

_NUM_DISTANCES = 400
_MIN_DISTANCE_RATIO = 0.1  # of the typical distance: shorter ones are mostly noise
_MIN_DISTANCES = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleChange:
    """The change of size from a first image to a second, over distances between matched points."""

    log_ratio: float  # median of log(distance in the second / distance in the first)
    spread: float  # interquartile range of it


def measure_scale_change(points1_xy: Float64Array, points2_xy: Float64Array) -> ScaleChange | None:
    """Compares distances between matched points (N, 2), (N, 2); None when they are too few.

    A zoom changes all distances by one factor; a motion changes those between near points more than
    those between far ones, so that the spread grows with the change.
    """
    num = len(points1_xy)
    if num < 2:
        return None
    one, other = np.random.default_rng(num).integers(0, num, (2, _NUM_DISTANCES))
    distances1 = np.linalg.norm(points1_xy[one] - points1_xy[other], axis=1)
    distances2 = np.linalg.norm(points2_xy[one] - points2_xy[other], axis=1)
    usable = np.minimum(distances1, distances2) > _MIN_DISTANCE_RATIO * np.median(distances1)
    if usable.sum() < _MIN_DISTANCES:
        return None
    log_ratios = np.log(distances2[usable] / distances1[usable])
    low, median, high = np.percentile(log_ratios, (25.0, 50.0, 75.0)).tolist()
    return ScaleChange(log_ratio=median, spread=high - low)
