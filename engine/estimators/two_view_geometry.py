"""Two-view geometry: verified matches, a focal length from them, the relative pose of a pair.

Stateless and deterministic: OpenCV's USAC samplers start from a fixed state and COLMAP's get a
seed. Pixels follow COLMAP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import pycolmap
from numpy.typing import NDArray

from engine.config import TwoViewConfig
from engine.geometry import image_scale
from engine.types import Float64Array, PairMatches, VerifiedPair

_USAC_CONFIDENCE = 0.9999
_USAC_MAX_ITERATIONS = 5000
_MIN_MATCHES_FOR_FUNDAMENTAL = 8
_MIN_MATCHES_FOR_POSE = 6

# Focal lengths searched, as ratios of the longer image edge: 125 to 23 degrees of view.
_FOCAL_RATIOS = np.geomspace(0.26, 2.5, 96)
_MAX_GAP = 0.15  # what a pair that fits no focal length costs
_MIN_FOCAL_CONTRAST = 0.01  # between the best focal length's gap and the typical one


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VerifiedMatches:
    """Matches that agree on one two-view geometry, and that geometry."""

    inliers: PairMatches
    fundamental: Float64Array  # (3, 3), x2^T F x1 = 0 in px, COLMAP convention
    homography_inlier_ratio: float  # inliers that one plane or a pure rotation explains, 0..1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RelativePose:
    """The relative pose of two views and the matches that agree with it."""

    cam2_from_cam1: Float64Array  # (3, 4), translation of unit length
    num_inliers: int
    median_triangulation_angle_rad: float


def verify_matches(
    matches: PairMatches, *, image_size: tuple[int, int], config: TwoViewConfig
) -> VerifiedMatches | None:
    """Keeps the matches that one epipolar geometry explains; None when there are too few.

    The fundamental matrix is found with MAGSAC++ (Barath et al., 2020), which needs no sharp inlier
    threshold; a homography fitted to its inliers detects planes and pure rotations.

    Args:
        matches: tentative matches.
        image_size: width and height that pixel thresholds scale with.
        config: thresholds.
    """
    if len(matches) < max(config.min_inliers, _MIN_MATCHES_FOR_FUNDAMENTAL):
        return None
    max_error_px = config.max_error_px * image_scale(*image_size)
    found = _find_fundamental(matches.points1_xy, matches.points2_xy, max_error_px=max_error_px)
    if found is None:
        return None
    fundamental, is_inlier = found
    num_inliers = int(is_inlier.sum())
    if num_inliers < config.min_inliers or num_inliers < config.min_inlier_ratio * len(matches):
        return None
    inliers = matches.take(is_inlier)
    return VerifiedMatches(
        inliers=inliers,
        fundamental=fundamental,
        homography_inlier_ratio=homography_inlier_ratio(
            inliers.points1_xy, inliers.points2_xy, max_error_px=max_error_px
        ),
    )


def _find_fundamental(
    points1_xy: Float64Array, points2_xy: Float64Array, *, max_error_px: float
) -> tuple[Float64Array, NDArray[np.bool_]] | None:
    """The fundamental matrix (3, 3) and which of the N correspondences agree with it."""
    try:
        fundamental, mask = cv2.findFundamentalMat(
            points1_xy,
            points2_xy,
            cv2.USAC_MAGSAC,
            ransacReprojThreshold=max_error_px,
            confidence=_USAC_CONFIDENCE,
            maxIters=_USAC_MAX_ITERATIONS,
        )
    except cv2.error:
        # OpenCV 5 asserts where all samples are degenerate: points on a line, few places.
        return None
    if fundamental is None or fundamental.shape != (3, 3) or not np.isfinite(fundamental).all():
        return None
    return np.asarray(fundamental, np.float64), mask.ravel().astype(bool)


def epipolar_distances_px(
    fundamental: Float64Array, points1_xy: Float64Array, points2_xy: Float64Array
) -> Float64Array:
    """How far matches (N, 2), (N, 2) are from their epipolar lines, (N,): the larger of the two."""
    ones = np.ones((len(points1_xy), 1))
    points1, points2 = np.hstack([points1_xy, ones]), np.hstack([points2_xy, ones])
    lines2, lines1 = points1 @ fundamental.T, points2 @ fundamental
    offsets = np.abs((lines2 * points2).sum(axis=1))
    norms = [np.linalg.norm(lines[:, :2], axis=1) for lines in (lines1, lines2)]
    return np.asarray(offsets / np.maximum(np.minimum(*norms), 1e-12))


def homography_inlier_ratio(
    points1_xy: Float64Array, points2_xy: Float64Array, *, max_error_px: float
) -> float:
    """Share of correspondences (N, 2), (N, 2) that one homography explains, 0..1.

    Points that determine no homography, being few or on a line, show no depth: 1.
    """
    if len(points1_xy) < 4:
        return 1.0
    try:
        homography, mask = cv2.findHomography(
            points1_xy,
            points2_xy,
            cv2.USAC_MAGSAC,
            ransacReprojThreshold=max_error_px,
            confidence=_USAC_CONFIDENCE,
            maxIters=_USAC_MAX_ITERATIONS,
        )
    except cv2.error:  # as for the fundamental matrix
        return 1.0
    return 1.0 if homography is None else float(mask.mean())


def estimate_focal_length(
    pairs: Sequence[VerifiedPair], *, width: int, height: int
) -> float | None:
    """One focal length in px for a camera, from its fundamental matrices alone.

    With square pixels and a centred principal point, K^T F K is an essential matrix only for the
    right focal length: its two singular values are equal (Mendonca and Cipolla, CVPR 1999). Each
    pair votes with its relative singular value gap over a range of focal lengths, weighted by its
    inliers. Pairs that one plane explains have no vote. After a pure translation the gap is small
    for every focal length: such pairs vote for none.

    Returns:
        The focal length, or None when the pairs do not determine it.
    """
    usable = [pair for pair in pairs if pair.homography_inlier_ratio < 0.8]
    if not usable:
        return None
    edge = max(width, height)
    gaps = np.stack([_singular_value_gaps(pair.fundamental, width, height) for pair in usable])
    weights = np.sqrt([pair.num_inliers for pair in usable])
    # A bounded loss lets a wrong pair cost no more than a constant anywhere on the curve.
    costs = (weights[:, None] * np.minimum(gaps, _MAX_GAP)).sum(axis=0) / weights.sum()
    best = int(costs.argmin())
    typical = float(np.median(costs))
    stands_out = costs[best] < min(0.8 * typical, typical - _MIN_FOCAL_CONTRAST)
    is_determined = stands_out and 0 < best < len(costs) - 1
    return float(_FOCAL_RATIOS[best] * edge) if is_determined else None


def _singular_value_gaps(fundamental: Float64Array, width: int, height: int) -> Float64Array:
    """(F,) relative gap of the two largest singular values of K^T F K per searched focal."""
    edge = max(width, height)
    calibrations = np.zeros((len(_FOCAL_RATIOS), 3, 3))
    calibrations[:, 0, 0] = calibrations[:, 1, 1] = _FOCAL_RATIOS * edge
    calibrations[:, :, 2] = (width / 2.0, height / 2.0, 1.0)
    essentials = np.swapaxes(calibrations, 1, 2) @ fundamental @ calibrations
    singular = np.linalg.svd(essentials, compute_uv=False)
    return np.asarray((singular[:, 0] - singular[:, 1]) / singular[:, 0])


def estimate_relative_pose(
    points1_xy: Float64Array,
    points2_xy: Float64Array,
    *,
    camera1: pycolmap.Camera,
    camera2: pycolmap.Camera,
    max_error_px: float,
    seed: int,
) -> RelativePose | None:
    """The relative pose of two calibrated views from matches (N, 2), (N, 2); None if none fits."""
    if len(points1_xy) < _MIN_MATCHES_FOR_POSE:
        return None
    options = pycolmap.RANSACOptions(
        max_error=max_error_px,
        random_seed=seed,
        min_num_trials=100,
        max_num_trials=2000,
        min_inlier_ratio=0.2,
    )
    estimate = pycolmap.estimate_relative_pose(camera1, points1_xy, camera2, points2_xy, options)
    if estimate is None:
        return None
    cam2_from_cam1 = np.asarray(estimate["cam2_from_cam1"].matrix())
    inliers = np.asarray(estimate["inlier_mask"], dtype=bool)
    if not inliers.any():
        return None
    angles = _ray_angles_rad(
        camera1.cam_from_img(points1_xy[inliers]),
        camera2.cam_from_img(points2_xy[inliers]),
        cam2_from_cam1,
    )
    return RelativePose(
        cam2_from_cam1=cam2_from_cam1,
        num_inliers=int(inliers.sum()),
        median_triangulation_angle_rad=float(np.median(angles)),
    )


def _ray_angles_rad(
    rays1_xy: Float64Array, rays2_xy: Float64Array, cam2_from_cam1: Float64Array
) -> Float64Array:
    """Angles (N,) between the viewing rays of matches, given on the two image planes z = 1."""
    one = np.ones((len(rays1_xy), 1))
    rays1 = np.hstack([rays1_xy, one]) @ cam2_from_cam1[:, :3].T
    rays2 = np.hstack([rays2_xy, one])
    cosine = (rays1 * rays2).sum(axis=1)
    sine = np.linalg.norm(np.cross(rays1, rays2), axis=1)
    return np.asarray(np.arctan2(sine, cosine))
