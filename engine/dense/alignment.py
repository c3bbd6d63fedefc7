"""Depth by one neighbour laid onto the sparse points of the map.

All images that see a sparse point determine it, a pair of poses determines what is matched by it:
what the two poses are off, or a rolling shutter bends, is a smooth shift of disparity and so of
inverse depth.
"""

from __future__ import annotations

import numpy as np

from engine.dense.rectification import Pinhole
from engine.types import Float32Array, Float64Array

_MIN_POINTS = 40
_MAX_CHANGE = 0.05  # of the depth at a point; what is further off was matched wrongly
_NOISE = 0.002  # of the depth: points off by less count fully
_SLOPE_WEIGHT = 1.0  # of no growth over the image, in points at its border
_NUM_FITS = 6


def laid_onto_points(
    inverse_depth: Float32Array, pinhole: Pinhole, points_in_keyframe: Float64Array
) -> Float32Array:
    """Inverse depth (H, W; 0: unknown) with the shift that brings it nearest to sparse points.

    The shift is linear over the image and minimises about the sum of absolute errors. With few
    points nothing changes.

    Args:
        inverse_depth: of the pixels of ``pinhole``.
        pinhole: the camera of the depth map.
        points_in_keyframe: (P, 3) before the camera.
    """
    columns, lines = np.floor(pinhole.pixels_of(points_in_keyframe)).astype(np.int64).T
    inside = (columns >= 0) & (columns < pinhole.width) & (lines >= 0) & (lines < pinhole.height)
    columns, lines, depth = columns[inside], lines[inside], points_in_keyframe[inside, 2]
    own = inverse_depth[lines, columns].astype(np.float64)
    usable = (own > 0) & (np.abs(own * depth - 1.0) < _MAX_CHANGE)
    if usable.sum() < _MIN_POINTS:
        return inverse_depth
    columns, lines, depth, own = columns[usable], lines[usable], depth[usable], own[usable]
    unit = float(np.median(1.0 / depth))
    x, y = pinhole.plane_xy(
        np.arange(pinhole.width, dtype=np.float64), np.arange(pinhole.height, dtype=np.float64)
    )
    growth = np.column_stack([np.ones(len(depth)), x[0, columns], y[lines, 0]])
    shift = _robust_fit(growth, (1.0 / depth - own) / unit) * unit
    moved = inverse_depth + (shift[0] + shift[1] * x + shift[2] * y).astype(np.float32)
    return np.where((inverse_depth > 0) & (moved > 0), moved, np.float32(0.0))


def _robust_fit(growth: Float64Array, change: Float64Array) -> Float64Array:
    """The linear growth (3,) that explains changes (P,), in units of the middle inverse depth."""
    prior = np.diag([0.0, _SLOPE_WEIGHT, _SLOPE_WEIGHT])
    weight = np.ones(len(change))
    fit: Float64Array = np.zeros(3)
    for _ in range(_NUM_FITS):
        weighted = growth * weight[:, None]
        fit = np.asarray(
            np.linalg.solve(growth.T @ weighted + prior, weighted.T @ change), np.float64
        )
        weight = _NOISE / np.maximum(np.abs(change - growth @ fit), _NOISE)
    return fit
