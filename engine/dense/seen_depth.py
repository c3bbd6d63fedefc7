"""Depth as a matcher sees it, such as MASt3R's pointmaps, in the map's unit and camera.

It is scaled by the sparse points of the map and laid onto them; what it is off there is its error.
"""

from __future__ import annotations

import cv2
import numpy as np

from engine.dense.alignment import laid_onto_points
from engine.dense.rectification import Pinhole, WorkingImage
from engine.dense_types import SeenDepth
from engine.types import Float32Array, Float64Array

MAX_RELATIVE_ERROR = 0.03  # of depth, one standard deviation; matched images are more exact
_MIN_POINTS = 15  # of the map on pixels that have a depth
_LEAST_ERROR = 0.002
_STD_OF_MEDIAN = 1.4826  # of a normal distribution's absolute values


def inverse_depth_as_seen(
    seen: SeenDepth, own: WorkingImage, pinhole: Pinhole, points_in_keyframe: Float64Array
) -> tuple[Float32Array, float] | None:
    """Inverse depth (H, W; 0: unknown) on the pixels of a depth map, and its relative error.

    Args:
        seen: of the keyframe.
        own: the keyframe's image with its lens and mask.
        pinhole: the camera of the depth map.
        points_in_keyframe: (P, 3) sparse points before the camera.

    Returns:
        None where too few sparse points say in which unit it is, or where it is off too far.
    """
    inverse = _resampled(seen, own, pinhole)
    columns, lines = np.floor(pinhole.pixels_of(points_in_keyframe)).astype(np.int64).T
    inside = (columns >= 0) & (columns < pinhole.width) & (lines >= 0) & (lines < pinhole.height)
    at = lines[inside], columns[inside]
    depth = points_in_keyframe[inside, 2]
    known = inverse[at] > 0
    if known.sum() < _MIN_POINTS:
        return None
    inverse *= np.float32(1.0 / np.median(inverse[at][known] * depth[known]))
    laid = laid_onto_points(inverse, pinhole, points_in_keyframe)
    off = np.abs(laid[at][known] * depth[known] - 1.0)
    error = max(_STD_OF_MEDIAN * float(np.median(off)), _LEAST_ERROR)
    return (laid, error) if error < MAX_RELATIVE_ERROR else None


def _resampled(seen: SeenDepth, own: WorkingImage, pinhole: Pinhole) -> Float32Array:
    """Inverse depth of the nearest pixels, as between near and far there is no surface."""
    columns, lines = pinhole.pixels_in(own)
    usable = cv2.remap(own.usable, columns, lines, cv2.INTER_NEAREST)
    size = np.array([own.intrinsics.width, own.intrinsics.height])
    scale = size / own.pixels.shape[1::-1] / seen.scale_xy
    shift = seen.offset_xy / seen.scale_xy
    x, y = (
        ((place + np.float32(0.5)) * scale[k] - shift[k] - 0.5).astype(np.float32)
        for k, place in enumerate((columns, lines))
    )
    depth = cv2.remap(seen.depth, x, y, cv2.INTER_NEAREST, borderValue=0.0)
    inverse = np.zeros(depth.shape, np.float32)
    np.divide(1.0, depth, out=inverse, where=(depth > 0) & (usable > 0))
    return inverse
