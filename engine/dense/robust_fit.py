"""Linear growth of a value over an image, fitted to points of which some are wrong."""

from __future__ import annotations

import numpy as np

from engine.types import Float64Array

_NUM_FITS = 6


def robust_fit(
    growth: Float64Array, values: Float64Array, *, noise: float, slope_weight: float
) -> Float64Array:
    """The coefficients (3,) that make about the least sum of absolute errors, by reweighting.

    Args:
        growth: (P, 3) 1 and the place in the image, of each point.
        values: (P,).
        noise: points off by less count fully.
        slope_weight: how many points, one unit from the middle, say that nothing grows.
    """
    prior = np.diag([1e-9, slope_weight + 1e-9, slope_weight + 1e-9])
    weight = np.ones(len(values))
    fit: Float64Array = np.zeros(3)
    for _ in range(_NUM_FITS):
        weighted = growth * weight[:, None]
        normal, right = growth.T @ weighted + prior, weighted.T @ values
        fit = np.asarray(np.linalg.solve(normal, right), np.float64)
        weight = noise / np.maximum(np.abs(values - growth @ fit), noise)
    return fit
