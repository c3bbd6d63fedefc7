"""Depth by one neighbour laid onto the sparse points of the map.

All images that see a sparse point determine it, a pair of poses determines what is matched by it:
what the two poses are off, or a rolling shutter bends, is a smooth shift of disparity and so of
inverse depth. What lies far from all points around was matched wrongly.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from engine.dense.rectification import Pinhole
from engine.dense.robust_fit import robust_fit
from engine.types import BoolArray, Float32Array, Float64Array, Int64Array

_MIN_POINTS = 40
_MAX_CHANGE = 0.05  # of the depth at a point; what is further off was matched wrongly
_NOISE = 0.002  # of the depth: points off by less count fully
_SLOPE_WEIGHT = 1.0  # of no growth over the image
_SMOOTH_RATIO = 0.02  # of inverse depth between neighbouring pixels: more is a step
_CLEAR_FACTOR = 1.5  # of errors: less may come from the points
_MEDIAN_OF_NORMAL = 0.6745  # of absolute values, in standard deviations
_CELL_PX = 16  # of the image, whose pixels are compared with the same points
_NUM_NEAR, _LEAST_NEAR = 8, 4  # points of the map around a cell, and those that are close to it
_CLOSE_RATIO = 0.125  # of the longer edge
_BEYOND_RATIO = 0.15  # of inverse depth: what stands out more from all points around is doubtful


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
    columns, lines, depth, own = _at_points(inverse_depth, pinhole, points_in_keyframe)
    if len(depth) < _MIN_POINTS:
        return inverse_depth
    unit = float(np.median(1.0 / depth))
    x, y = pinhole.plane_xy(
        np.arange(pinhole.width, dtype=np.float64), np.arange(pinhole.height, dtype=np.float64)
    )
    growth = np.column_stack([np.ones(len(depth)), x[0, columns], y[lines, 0]])
    change = (1.0 / depth - own) / unit
    shift = unit * robust_fit(growth, change, noise=_NOISE, slope_weight=_SLOPE_WEIGHT)
    moved = inverse_depth + (shift[0] + shift[1] * x + shift[2] * y).astype(np.float32)
    return np.where((inverse_depth > 0) & (moved > 0), moved, np.float32(0.0))


def error_factor(
    inverse_depth: Float32Array,
    relative_error: Float32Array,
    pinhole: Pinhole,
    points_in_keyframe: Float64Array,
) -> float:
    """How many times more than claimed a depth map is off at sparse points; 1 unless clearly more.

    Blur and a rolling shutter put depths off that match well. With few points it is 1.

    Args:
        inverse_depth: (H, W; 0: unknown) of the pixels of ``pinhole``.
        relative_error: (H, W) that is claimed, one standard deviation.
        pinhole: the camera of the depth map.
        points_in_keyframe: (P, 3) before the camera.
    """
    columns, lines, depth, own = _at_points(inverse_depth, pinhole, points_in_keyframe)
    claimed = relative_error[lines, columns].astype(np.float64)
    known = np.isfinite(claimed) & (claimed > 0)
    if known.sum() < _MIN_POINTS:
        return 1.0
    off = np.abs(own * depth - 1.0)[known] / claimed[known]
    factor = float(np.median(off)) / _MEDIAN_OF_NORMAL
    return factor if factor > _CLEAR_FACTOR else 1.0


def is_beyond_points(
    inverse_depth: Float32Array, pinhole: Pinhole, points_in_keyframe: Float64Array
) -> BoolArray:
    """Where depth (H, W) is far nearer or farther than every sparse point around it in the image.

    Furrows, tiles and fences match at a wrong period, over whole areas and alike from both sides.
    Where few points are close, what is nearer than they may be a thing before them; holes in what
    they lie on are rare.

    Args:
        inverse_depth: (H, W; 0: unknown) of the pixels of ``pinhole``.
        pinhole: the camera of the depth map.
        points_in_keyframe: (P, 3) before the camera.
    """
    places = pinhole.pixels_of(points_in_keyframe)
    if len(places) < _MIN_POINTS:
        return np.zeros(inverse_depth.shape, np.bool_)
    num_lines, num_columns = (math.ceil(edge / _CELL_PX) for edge in inverse_depth.shape)
    centers = (np.indices((num_lines, num_columns)).reshape(2, -1).T[:, ::-1] + 0.5) * _CELL_PX
    off = centers[:, None] - places
    squared_px = np.einsum("ijk,ijk->ij", off, off)
    near = np.argpartition(squared_px, (_LEAST_NEAR - 1, _NUM_NEAR), axis=1)[:, :_NUM_NEAR]
    around = (1.0 / points_in_keyframe[:, 2])[near].astype(np.float32)
    radius_px = _CLOSE_RATIO * max(inverse_depth.shape)
    last = np.take_along_axis(squared_px, near[:, [_LEAST_NEAR - 1]], axis=1)[:, 0]
    is_close = last < radius_px**2
    least = around.min(axis=1) * (1.0 - _BEYOND_RATIO)
    most = np.where(is_close, around.max(axis=1) * (1.0 + _BEYOND_RATIO), np.inf)
    low, high = (
        _of_pixels(bound.reshape(num_lines, num_columns), inverse_depth.shape)
        for bound in (least, most)
    )
    is_within = (inverse_depth >= low) & (inverse_depth <= high)
    return np.asarray((inverse_depth > 0) & ~is_within)


def _of_pixels(of_cells: Float64Array, shape: tuple[int, ...]) -> Float64Array:
    """Each pixel's (H, W) of what cells have."""
    pixels = np.repeat(np.repeat(of_cells, _CELL_PX, axis=0), _CELL_PX, axis=1)
    return pixels[: shape[0], : shape[1]]


def _at_points(
    inverse_depth: Float32Array, pinhole: Pinhole, points_in_keyframe: Float64Array
) -> tuple[Int64Array, Int64Array, Float64Array, Float64Array]:
    """Columns, lines and depths (K,) of the points on depths that are about theirs, and these."""
    places = pinhole.pixels_of(points_in_keyframe)
    inside = ((places >= 0) & (places < (pinhole.width, pinhole.height))).all(axis=1)
    places, depth = places[inside], points_in_keyframe[inside, 2]
    columns, lines = np.floor(places).astype(np.int64).T
    # On a plane inverse depth is affine in the pixel; at its edges the nearest pixel's counts.
    x, y = (places - 0.5).astype(np.float32).T
    between = cv2.remap(
        inverse_depth, x[None], y[None], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )[0].astype(np.float64)
    nearest = inverse_depth[lines, columns].astype(np.float64)
    own = np.where(np.abs(between - nearest) < _SMOOTH_RATIO * nearest, between, nearest)
    usable = (own > 0) & (np.abs(own * depth - 1.0) < _MAX_CHANGE)
    return columns[usable], lines[usable], depth[usable], own[usable]
