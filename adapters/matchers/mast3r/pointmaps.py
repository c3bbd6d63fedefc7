"""Pointmaps: the focal length of a camera and the depth of pixels from a pointmap.

A pointmap gives every pixel the 3D point it shows. Pixels are the network's, in COLMAP's
convention; the points are in the frame of the camera that took the image.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.types import Float64Array

_NUM_ITERATIONS = 10
_NUM_SAMPLES = 16384  # pixels that take part, at most about; more change nothing
_MIN_SAMPLES = 64
_MIN_FOCAL, _MAX_FOCAL = 0.5, 3.5  # times that of a view 60 deg wide along the longer side
_MAX_RESIDUAL_RATIO = 0.25  # median error of the slopes over their median length
_MIN_SCALE = 1e-9  # of slopes: an exact pointmap has no noise


def focal_from_pointmap(
    points3D: ArrayLike, confidence: ArrayLike, *, principal_point_xy: ArrayLike | None = None
) -> float | None:
    """The focal length that projects a pointmap best onto its own pixels, in network px.

    Iteratively reweighted least squares as in DUSt3R (Wang et al., 2024, section 3.3), on the more
    confident half of the pixels; with Geman and McClure's weights a wrong region hardly counts. It
    begins at the median over single pixels. The result is kept between half and 3.5 times
    the focal length of a view 60 deg wide.

    Args:
        points3D: (H, W, 3) in the camera's own frame, any scale.
        confidence: (H, W), larger is better.
        principal_point_xy: (2,) network px; None: the middle of the network image. The middle of
            the original lies elsewhere by what the crop cuts unevenly.

    Returns:
        the focal length, or None when too few pixels have a point in front of the camera, when
        those points determine none, or when no focal length fits.
    """
    points = np.asarray(points3D)
    height, width = points.shape[:2]
    middle_xy = np.array([width, height]) / 2.0
    center_xy = middle_xy if principal_point_xy is None else np.asarray(principal_point_xy)
    offsets_px, slopes = _samples(points, np.asarray(confidence), center_xy=center_xy)
    if len(slopes) < _MIN_SAMPLES:
        return None
    inverse = _inverse_focal(offsets_px, slopes)
    residuals = np.linalg.norm(slopes - inverse * offsets_px, axis=1)
    expected = np.linalg.norm(inverse * offsets_px, axis=1)
    if inverse <= 0 or np.median(residuals) > _MAX_RESIDUAL_RATIO * np.median(expected):
        return None
    usual_px = max(height, width) / (2.0 * math.tan(math.radians(30.0)))
    return float(np.clip(1.0 / inverse, _MIN_FOCAL * usual_px, _MAX_FOCAL * usual_px))


def depths_at(points3D: ArrayLike, points_xy: ArrayLike) -> Float64Array:
    """Depths (M,) of the pixels that points lie in; NaN for points beyond the image.

    Not interpolated: between near and far there is no surface.

    Args:
        points3D: (H, W, 3) in the camera's own frame.
        points_xy: (M, 2) network px.
    """
    depth = np.asarray(points3D)[:, :, 2]
    height, width = depth.shape
    x, y = np.asarray(points_xy, np.float64).reshape(-1, 2).T
    depths = np.full(len(x), np.nan)
    inside = (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
    # A point on the right or lower edge belongs to the last pixel.
    columns = np.minimum(x[inside].astype(np.int64), width - 1)
    rows = np.minimum(y[inside].astype(np.int64), height - 1)
    depths[inside] = depth[rows, columns]
    return depths


def _samples(
    points: NDArray[Any], confidence: NDArray[Any], *, center_xy: NDArray[Any]
) -> tuple[Float64Array, Float64Array]:
    """Offsets from the principal point in px and x/z, y/z, (N, 2) each, of confident pixels."""
    height, width = confidence.shape
    stride = max(1, math.isqrt(height * width // _NUM_SAMPLES))
    points = points[::stride, ::stride].reshape(-1, 3).astype(np.float64)
    confidence = confidence[::stride, ::stride].ravel()
    rows, columns = np.mgrid[0:height:stride, 0:width:stride]
    offsets_px = np.column_stack([columns.ravel(), rows.ravel()]) + 0.5 - center_xy
    valid = np.isfinite(points).all(axis=1) & np.isfinite(confidence)
    valid &= (offsets_px != 0).any(axis=1)  # the principal point itself is of no use
    valid &= points[:, 2] > 1e-6 * np.abs(points).max(axis=1, initial=0.0)
    if not valid.any():
        return np.empty((0, 2)), np.empty((0, 2))
    valid &= confidence >= np.median(confidence[valid])
    return offsets_px[valid], points[valid, :2] / points[valid, 2:]


def _inverse_focal(offsets_px: Float64Array, slopes: Float64Array) -> float:
    """The factor that turns offsets into slopes, 1 / px, in the robust sense.

    Offsets are exact and bounded, slopes are noisy and boundless: taking them this way round, noise
    does not shorten the focal length, and a point in the camera's own plane outweighs nothing.
    """
    products, squares = (offsets_px * slopes).sum(axis=1), (offsets_px**2).sum(axis=1)
    inverse = float(np.median(products / squares))
    for _ in range(_NUM_ITERATIONS):
        distances = np.linalg.norm(slopes - inverse * offsets_px, axis=1)
        scale = max(float(np.median(distances)), _MIN_SCALE)
        weights = 1.0 / (1.0 + (distances / scale) ** 2) ** 2
        inverse = float((weights * products).sum() / (weights * squares).sum())
    return inverse
