"""Depth by one neighbour laid onto the sparse points of the map.

All images that see a sparse point determine it, a pair of poses determines what is matched by it:
what the two poses are off, or a rolling shutter bends, is a smooth shift of disparity and so of
inverse depth.
"""

from __future__ import annotations

import numpy as np

from engine.dense.rectification import Pinhole
from engine.dense.robust_fit import robust_fit
from engine.types import Float32Array, Float64Array

_MIN_POINTS = 40
_MAX_CHANGE = 0.05  # of the depth at a point; what is further off was matched wrongly
_NOISE = 0.002  # of the depth: points off by less count fully
_SLOPE_WEIGHT = 1.0  # of no growth over the image


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
    change = (1.0 / depth - own) / unit
    shift = unit * robust_fit(growth, change, noise=_NOISE, slope_weight=_SLOPE_WEIGHT)
    moved = inverse_depth + (shift[0] + shift[1] * x + shift[2] * y).astype(np.float32)
    return np.where((inverse_depth > 0) & (moved > 0), moved, np.float32(0.0))
