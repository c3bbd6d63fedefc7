"""Matches that stay where they are in the image while the camera moves.

What is fixed to the camera and not to the world (a logo, a clock, dirt on the lens) matches itself
at the same place of every image. Points of the world may stay, too: at infinity while the camera
does not turn, and where it turns around them. Those agree with the motion that the moving matches
show; what is fixed to the camera contradicts it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.config import TwoViewConfig
from engine.estimators.two_view_geometry import (
    VerifiedMatches,
    epipolar_distances_px,
    homography_inlier_ratio,
    verify_matches,
)
from engine.geometry import image_scale
from engine.types import BoolArray, Float64Array, PairMatches

# px at an image edge of 1000 px, scaling with the image.
_STAYED_PX = 1.5  # matches that moved less stay
_MOVED_PX = 3.0  # those that moved more show the motion; between the two a match may be either
_MIN_MOTION_PX = 5.0  # median of the others: the camera, or what it sees, moves
_CONTRADICTION_RATIO = 2.0  # of the verification's error bound

_FLAT = 0.8  # homography inlier ratio from which the epipolar geometry is not determined
_TRANSLATION_PX = 2.0  # median distance from lines through one point: the camera only shifted
_TRANSLATION_STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MotionEvidence:
    """What the moving matches of a pair say of those that stay."""

    verified: VerifiedMatches  # of the matches that the motion explains
    is_fixed: BoolArray  # (M,) of all matches: stays, which the motion does not explain
    is_moving: BoolArray  # (M,) of all matches: moved as the motion says


def moved_px(matches: PairMatches, *, image_size: tuple[int, int]) -> Float64Array:
    """How far each match moved in the image, (M,), at an image edge of 1000 px."""
    offsets = matches.points2_xy - matches.points1_xy
    return np.asarray(np.hypot(offsets[:, 0], offsets[:, 1]) / image_scale(*image_size))


def stayed(matches: PairMatches, *, image_size: tuple[int, int]) -> BoolArray:
    """Which matches (M,) stay where they are."""
    return np.asarray(moved_px(matches, image_size=image_size) < _STAYED_PX)


def shows_motion(matches: PairMatches, *, image_size: tuple[int, int]) -> BoolArray | None:
    """Which matches (M,) moved, when those that do not stay moved clearly; else None."""
    motion_px = moved_px(matches, image_size=image_size)
    others_px = motion_px[motion_px >= _STAYED_PX]
    if not len(others_px) or np.median(others_px) < _MIN_MOTION_PX:
        return None
    return np.asarray(motion_px >= _MOVED_PX)


def find_fixed_matches(
    matches: PairMatches, *, image_size: tuple[int, int], config: TwoViewConfig
) -> MotionEvidence | None:
    """Finds matches that stay although the motion of the others moves every point there.

    The epipolar geometry is fitted to moving matches alone: fixed ones may be in the majority. A
    scene without depth leaves it open, and any point that stays could be one off the plane; if the
    camera only shifted, a far one. Such a pair is no evidence.

    Args:
        matches: tentative matches of two images of one camera.
        image_size: width and height of both.
        config: thresholds of the verification.

    Returns:
        None when nothing is fixed, or the matches do not show it: too little moves, or what moves
        does not agree.
    """
    is_moving = shows_motion(matches, image_size=image_size)
    is_staying = stayed(matches, image_size=image_size)
    if is_moving is None or not is_staying.any():
        return None
    moving = verify_matches(matches.take(is_moving), image_size=image_size, config=config)
    if moving is None or not is_in_motion(moving.inliers, image_size=image_size):
        return None
    max_error_px = config.max_error_px * image_scale(*image_size)
    distances_px = epipolar_distances_px(moving.fundamental, matches.points1_xy, matches.points2_xy)
    is_fixed = is_staying & (distances_px > _CONTRADICTION_RATIO * max_error_px)
    if not is_fixed.any() or _may_be_far(moving, image_size=image_size):
        return None
    is_explained = distances_px <= max_error_px
    if is_explained.sum() < config.min_inliers:
        return None
    inliers = matches.take(is_explained)
    return MotionEvidence(
        verified=VerifiedMatches(
            inliers=inliers,
            fundamental=moving.fundamental,
            homography_inlier_ratio=homography_inlier_ratio(
                inliers.points1_xy, inliers.points2_xy, max_error_px=max_error_px
            ),
        ),
        is_fixed=is_fixed,
        is_moving=is_explained & is_moving,
    )


def is_in_motion(inliers: PairMatches, *, image_size: tuple[int, int]) -> bool:
    """Whether most of the matches that agree on a geometry moved clearly."""
    motion_px = moved_px(inliers, image_size=image_size)
    return len(motion_px) > 0 and float(np.median(motion_px)) >= _MIN_MOTION_PX


def judge_by_motion(
    matches: PairMatches,
    verified: VerifiedMatches,
    *,
    image_size: tuple[int, int],
    config: TwoViewConfig,
) -> tuple[BoolArray, BoolArray]:
    """Which further matches (M,) stay against the motion that others show, and which move with it.

    None does either when the others did not move.
    """
    if not is_in_motion(verified.inliers, image_size=image_size):
        none = np.zeros(len(matches), np.bool_)
        return none, none
    max_error_px = config.max_error_px * image_scale(*image_size)
    motion_px = moved_px(matches, image_size=image_size)
    distances_px = epipolar_distances_px(
        verified.fundamental, matches.points1_xy, matches.points2_xy
    )
    stays = (motion_px < _STAYED_PX) & (distances_px > _CONTRADICTION_RATIO * max_error_px)
    moves = (motion_px >= _MOVED_PX) & (distances_px <= max_error_px)
    return np.asarray(stays), np.asarray(moves)


def _may_be_far(moving: VerifiedMatches, *, image_size: tuple[int, int]) -> bool:
    """Whether points far behind a plane could stay: the camera shifted along it without turning."""
    if moving.homography_inlier_ratio < _FLAT:
        return False
    inliers = moving.inliers
    center, edge = np.asarray(image_size) / 2.0, float(max(image_size))
    ends = [
        np.column_stack([(points_xy - center) / edge, np.ones(len(points_xy))])
        for points_xy in (inliers.points1_xy, inliers.points2_xy)
    ]
    distances = _distances_from_common_point(*ends, loss_scale=_MOVED_PX / 1000.0)
    return bool(np.median(distances) < _TRANSLATION_PX / 1000.0)


def _distances_from_common_point(
    points1: Float64Array, points2: Float64Array, *, loss_scale: float
) -> Float64Array:
    """How far each second point (N, 3) is from the line that joins the first to a common point.

    The point, to which or from which all move, minimises robustly weighted distances.
    """
    lines = np.cross(points1, points2)
    lengths = np.linalg.norm(points2[:, :2] - points1[:, :2], axis=1)
    weights = 1.0 / np.maximum(lengths, 1e-9)
    distances = np.zeros(len(lines))
    for _ in range(_TRANSLATION_STEPS):
        weighted = lines * weights[:, None]
        common = np.linalg.eigh(weighted.T @ weighted)[1][:, 0]
        joining = np.cross(points1, common)
        norms = np.maximum(np.linalg.norm(joining[:, :2], axis=1), 1e-12)
        distances = np.abs((joining * points2).sum(axis=1)) / norms
        weights = 1.0 / (np.maximum(lengths, 1e-9) * np.hypot(1.0, distances / loss_scale))
    return distances
