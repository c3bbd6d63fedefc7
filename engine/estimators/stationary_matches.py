"""Matches that stay where they are in the image while the camera moves.

What is fixed to the camera and not to the world (a logo, a clock, dirt on the lens) matches itself
at the same place of every image. Points of the world may stay, too: at infinity while the camera
does not turn, and where it turns around them. Those agree with the motion that the moving matches
show; what is fixed to the camera contradicts it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from engine.estimators.two_view_geometry import (
    PairVerifier,
    VerifiedMatches,
    homography_distances_px,
)
from engine.geometry import image_scale, rotation_vector_from
from engine.types import BoolArray, Float64Array, PairMatches

# px at an image edge of 1000 px, scaling with the image.
_STAYED_PX = 1.5  # matches that moved less stay
_MOVED_PX = 3.0  # those that moved more show the motion; between the two a match may be either
_MIN_MOTION_PX = 5.0  # median of the others: the camera, or what it sees, moves
_CONTRADICTION_RATIO = 2.0  # of the verification's error bound

_FLAT = 0.8  # homography inlier ratio from which the epipolar geometry is not determined
_PLANE = 0.9  # from which points off the plane are so few that none stays where the plane moves
_TRANSLATION_PX = 2.0  # median distance from lines through one point: the camera only shifted
_TRANSLATION_RAD = 0.005  # a smaller turn of the camera, likewise
_TRANSLATION_STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MotionEvidence:
    """What the motion of most matches says of all of them."""

    is_fixed: BoolArray  # (M,) stays, which the motion does not explain
    is_moving: BoolArray  # (M,) moved as the motion says


def moved_px(matches: PairMatches, *, image_size: tuple[int, int]) -> Float64Array:
    """How far each match moved in the image, (M,), at an image edge of 1000 px."""
    offsets = matches.points2_xy - matches.points1_xy
    return np.asarray(np.hypot(offsets[:, 0], offsets[:, 1]) / image_scale(*image_size))


def stayed(matches: PairMatches, *, image_size: tuple[int, int]) -> BoolArray:
    """Which matches (M,) stay where they are."""
    return np.asarray(moved_px(matches, image_size=image_size) < _STAYED_PX)


def others_move(matches: PairMatches, *, image_size: tuple[int, int]) -> bool:
    """Whether the matches that do not stay moved clearly."""
    return _others_move(moved_px(matches, image_size=image_size))


def _others_move(motion_px: Float64Array) -> bool:
    others_px = motion_px[motion_px >= _STAYED_PX]
    return len(others_px) > 0 and bool(np.median(others_px) >= _MIN_MOTION_PX)


def verify_by_motion(
    matches: PairMatches, *, verifier: PairVerifier
) -> tuple[VerifiedMatches, MotionEvidence] | None:
    """Verifies matches, of which some stay, by those that move; finds what is fixed to the camera.

    The geometry is fitted to moving matches alone: fixed ones may be in the majority, or bend it.
    What stays belongs to it only where it agrees. A plane leaves the epipolar geometry open, so
    there the plane's homography counts. If the camera only shifted along a plane, what stays may be
    far behind it, and is not taken for fixed.

    Args:
        matches: tentative matches of two images of one camera.
        verifier: of the pair.

    Returns:
        The matches that agree, and what the motion says of all. None when nothing stays, too little
        moves, or what moves does not agree.
    """
    size = verifier.image_size
    motion_px = moved_px(matches, image_size=size)
    if not (motion_px < _STAYED_PX).any() or not _others_move(motion_px):
        return None
    moving = verifier.verify(matches.take(motion_px >= _MOVED_PX))
    if moving is None:
        return None
    evidence = judge_by_motion(matches, moving, verifier=verifier)
    if evidence is None:
        return None
    if _may_be_far(moving, image_size=size):
        evidence = replace(evidence, is_fixed=np.zeros(len(matches), np.bool_))
    agrees = verifier.distances_px(moving, matches) <= verifier.max_error_px
    inliers = matches.take(agrees & ~evidence.is_fixed)
    if len(inliers) < verifier.config.min_inliers:
        return None
    return replace(moving, inliers=inliers), evidence


def judge_by_motion(
    matches: PairMatches, verified: VerifiedMatches, *, verifier: PairVerifier
) -> MotionEvidence | None:
    """Which matches stay against the motion that verified ones show, and which move with it.

    None when those did not move.
    """
    size = verifier.image_size
    if np.median(moved_px(verified.inliers, image_size=size)) < _MIN_MOTION_PX:
        return None
    motion_px = moved_px(matches, image_size=size)
    distances_px = verifier.distances_px(verified, matches)
    agrees = distances_px <= verifier.max_error_px
    is_staying = motion_px < _STAYED_PX
    if verified.homography_inlier_ratio >= _PLANE and is_staying.any():
        on_plane_px = homography_distances_px(
            verified.inliers, matches, max_error_px=verifier.max_error_px
        )
        distances_px = distances_px if on_plane_px is None else on_plane_px
    contradicts = distances_px > _CONTRADICTION_RATIO * verifier.max_error_px
    return MotionEvidence(
        is_fixed=np.asarray(is_staying & contradicts),
        is_moving=np.asarray((motion_px >= _MOVED_PX) & agrees),
    )


def _may_be_far(moving: VerifiedMatches, *, image_size: tuple[int, int]) -> bool:
    """Whether points far behind a plane could stay: the camera shifted along it without turning."""
    if moving.homography_inlier_ratio < _FLAT:
        return False
    if moving.cam2_from_cam1 is not None:
        turn_rad = np.linalg.norm(rotation_vector_from(moving.cam2_from_cam1[:, :3]))
        return bool(turn_rad < _TRANSLATION_RAD)
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
    lengths = np.maximum(np.linalg.norm(points2[:, :2] - points1[:, :2], axis=1), 1e-9)
    weights = 1.0 / lengths
    distances = np.zeros(len(lines))
    for _ in range(_TRANSLATION_STEPS):
        weighted = lines * weights[:, None]
        common = np.linalg.eigh(weighted.T @ weighted)[1][:, 0]
        joining = np.cross(points1, common)
        norms = np.maximum(np.linalg.norm(joining[:, :2], axis=1), 1e-12)
        distances = np.abs((joining * points2).sum(axis=1)) / norms
        weights = 1.0 / (lengths * np.hypot(1.0, distances / loss_scale))
    return distances
