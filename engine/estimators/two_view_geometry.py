"""Two-view geometry: verified matches, a focal length from them, the relative pose of a pair.

Stateless and deterministic: OpenCV's USAC samplers start from a fixed state and COLMAP's get a
seed. Pixels follow COLMAP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import pycolmap

from engine.config import TwoViewConfig
from engine.estimators.lenses import camera_focal_px, unit_rays, viewing_rays
from engine.geometry import image_scale, skew
from engine.types import BoolArray, EpipolarGuide, Float64Array, PairMatches, VerifiedPair

_USAC_CONFIDENCE = 0.9999
_USAC_MAX_ITERATIONS = 5000
_FUNDAMENTAL_SAMPLE = 7  # matches that determine a fundamental matrix
_MIN_MATCHES_FOR_FUNDAMENTAL = 8
_MIN_MATCHES_FOR_POSE = 6
_MAX_POSE_TRIALS = 2000
_MIN_RAY_TRIALS, _MAX_RAY_TRIALS = 100, 1000
_HOMOGRAPHY_SAMPLES = 128
_HOMOGRAPHY_REFITS = 2
_MAX_RAYS_JUDGED = 400  # by every sample

# Focal lengths searched, as ratios of the longer image edge: 125 to 23 degrees of view.
_FOCAL_RATIOS = np.geomspace(0.26, 2.5, 96)
_MAX_GAP = 0.15  # what a pair that fits no focal length costs
_MIN_FOCAL_CONTRAST = 0.01  # between the best focal length's gap and the typical one


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VerifiedMatches:
    """Matches that agree on one two-view geometry, and that geometry."""

    inliers: PairMatches
    fundamental: Float64Array  # (3, 3), x2^T F x1 = 0 in px, COLMAP convention; 0: on rays
    homography_inlier_ratio: float  # inliers that one plane or a pure rotation explains, 0..1
    cam2_from_cam1: Float64Array | None = None  # (3, 4), unit translation, when verified on rays


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
    found = _find_fundamental(
        matches.points1_xy,
        matches.points2_xy,
        max_error_px=max_error_px,
        min_inlier_ratio=max(config.min_inlier_ratio, config.min_inliers / len(matches)),
    )
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


def verify_matches_on_rays(
    matches: PairMatches,
    *,
    camera1: pycolmap.Camera,
    camera2: pycolmap.Camera,
    config: TwoViewConfig,
    seed: int = 0,
) -> VerifiedMatches | None:
    """Keeps the matches that one relative pose of two calibrated cameras of any model explains.

    The pose is found by LO-RANSAC on the viewing rays with the tangent Sampson error, which is in
    px of the images (Terekhov and Larsson, ICCV 2023). A homography of the rays detects planes and
    pure rotations.

    Args:
        matches: tentative matches.
        camera1: calibrated; the errors of a wrong focal length cost inliers.
        camera2: likewise.
        config: thresholds.
        seed: of the sampling.

    Returns:
        None when too few agree.
    """
    if len(matches) < max(config.min_inliers, _MIN_MATCHES_FOR_FUNDAMENTAL):
        return None
    max_error_px = config.max_error_px * max(
        image_scale(camera.width, camera.height) for camera in (camera1, camera2)
    )
    rays1, rays2 = unit_rays(camera1, matches.points1_xy), unit_rays(camera2, matches.points2_xy)
    usable = np.flatnonzero(np.isfinite(rays1).all(axis=1) & np.isfinite(rays2).all(axis=1))
    if len(usable) < config.min_inliers:
        return None
    found = _find_relative_pose(
        matches.points1_xy[usable],
        matches.points2_xy[usable],
        camera1=camera1,
        camera2=camera2,
        options=pycolmap.RANSACOptions(
            max_error=max_error_px,
            random_seed=seed,
            confidence=_USAC_CONFIDENCE,
            min_num_trials=_MIN_RAY_TRIALS,
            max_num_trials=_MAX_RAY_TRIALS,
            min_inlier_ratio=config.min_inlier_ratio,
        ),
    )
    if found is None:
        return None
    cam2_from_cam1, is_inlier = found
    inlying = usable[is_inlier]
    if len(inlying) < max(config.min_inliers, config.min_inlier_ratio * len(matches)):
        return None
    return VerifiedMatches(
        inliers=matches.take(inlying),
        fundamental=np.zeros((3, 3)),
        homography_inlier_ratio=ray_homography_inlier_ratio(
            rays1[inlying],
            rays2[inlying],
            max_error_rad=max_error_px / camera_focal_px(camera2),
            seed=seed,
        ),
        cam2_from_cam1=cam2_from_cam1,
    )


def ray_homography_inlier_ratio(
    rays1: Float64Array, rays2: Float64Array, *, max_error_rad: float, seed: int = 0
) -> float:
    """Share of matched unit rays (N, 3), (N, 3) that one homography explains, 0..1.

    A plane maps rays to rays by a matrix, and so does a rotation. It is sampled from four matches
    (Hartley and Zisserman, 2004, section 4.1) and judged by the angle to the mapped rays.
    """
    num = len(rays1)
    if num < 4:
        return 1.0
    rng = np.random.default_rng(seed)
    samples = rng.integers(0, num, (_HOMOGRAPHY_SAMPLES, 4))
    min_cosine = math.cos(min(max_error_rad, math.pi / 2))
    judged = np.linspace(0, num - 1, min(num, _MAX_RAYS_JUDGED)).astype(int)
    sampled = _ray_homographies(rays1[samples], rays2[samples])
    agreeing = _agreeing(sampled, rays1[judged], rays2[judged], min_cosine=min_cosine)
    best = sampled[agreeing.sum(axis=1).argmax()]
    is_inlier = _agreeing(best[None], rays1, rays2, min_cosine=min_cosine)[0]
    for _ in range(_HOMOGRAPHY_REFITS):
        if is_inlier.sum() < 4:
            break
        refitted = _ray_homographies(rays1[is_inlier][None], rays2[is_inlier][None])
        now = _agreeing(refitted, rays1, rays2, min_cosine=min_cosine)[0]
        if now.sum() <= is_inlier.sum():
            break
        is_inlier = now
    return float(is_inlier.mean())


def _ray_homographies(rays1: Float64Array, rays2: Float64Array) -> Float64Array:
    """The homographies (S, 3, 3) that map rays (S, M, 3) best to (S, M, 3), M at least 4."""
    zero = np.zeros_like(rays1)
    x, y, z = (rays2[..., i, None] for i in range(3))
    # The three rows of the cross product of a ray with its mapped match; two are independent.
    rows = np.concatenate(
        [
            np.concatenate([zero, -z * rays1, y * rays1], axis=-1),
            np.concatenate([z * rays1, zero, -x * rays1], axis=-1),
            np.concatenate([-y * rays1, x * rays1, zero], axis=-1),
        ],
        axis=1,
    )
    _, vectors = np.linalg.eigh(np.swapaxes(rows, 1, 2) @ rows)
    return np.asarray(vectors[..., 0].reshape(-1, 3, 3))


def _agreeing(
    homographies: Float64Array, rays1: Float64Array, rays2: Float64Array, *, min_cosine: float
) -> BoolArray:
    """(S, N) which unit rays (N, 3) each of the homographies (S, 3, 3) maps to their matches.

    The sign of a homography is that of most of its rays.
    """
    mapped = rays1 @ np.swapaxes(homographies, 1, 2)
    lengths = np.maximum(np.linalg.norm(mapped, axis=2), 1e-12)
    cosines = (mapped * rays2).sum(axis=2) / lengths
    positive, negative = cosines >= min_cosine, cosines <= -min_cosine
    is_positive = positive.sum(axis=1) >= negative.sum(axis=1)
    return np.asarray(np.where(is_positive[:, None], positive, negative))


def _find_relative_pose(
    points1_xy: Float64Array,
    points2_xy: Float64Array,
    *,
    camera1: pycolmap.Camera,
    camera2: pycolmap.Camera,
    options: pycolmap.RANSACOptions,
) -> tuple[Float64Array, BoolArray] | None:
    """The relative pose (3, 4) and which of the N correspondences agree with it."""
    estimate = pycolmap.estimate_relative_pose(camera1, points1_xy, camera2, points2_xy, options)
    if estimate is None:
        return None
    cam2_from_cam1 = np.asarray(estimate["cam2_from_cam1"].matrix())
    if not np.isfinite(cam2_from_cam1).all():
        return None
    return cam2_from_cam1, np.asarray(estimate["inlier_mask"], dtype=bool)


def _find_fundamental(
    points1_xy: Float64Array,
    points2_xy: Float64Array,
    *,
    max_error_px: float,
    min_inlier_ratio: float,
) -> tuple[Float64Array, BoolArray] | None:
    """The fundamental matrix (3, 3) and which of the N correspondences agree with it.

    One that fewer than ``min_inlier_ratio`` of them agree with need not be found.
    """
    try:
        fundamental, mask = cv2.findFundamentalMat(
            points1_xy,
            points2_xy,
            cv2.USAC_MAGSAC,
            ransacReprojThreshold=max_error_px,
            confidence=_USAC_CONFIDENCE,
            maxIters=_num_samples(min_inlier_ratio),
        )
    except cv2.error:
        # OpenCV 5 asserts where all samples are degenerate: points on a line, few places.
        return None
    if fundamental is None or fundamental.shape != (3, 3) or not np.isfinite(fundamental).all():
        return None
    return np.asarray(fundamental, np.float64), mask.ravel().astype(bool)


def _num_samples(inlier_ratio: float) -> int:
    """Samples until one is free of outliers (Fischler and Bolles, 1981), up to a limit."""
    is_clean = min(inlier_ratio, 0.99) ** _FUNDAMENTAL_SAMPLE
    if is_clean == 0.0:
        return _USAC_MAX_ITERATIONS
    num = math.log1p(-_USAC_CONFIDENCE) / math.log1p(-is_clean)
    return math.ceil(min(num, _USAC_MAX_ITERATIONS))


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
    found = _find_homography(points1_xy, points2_xy, max_error_px=max_error_px)
    return 1.0 if found is None else float(found[1].mean())


def homography_distances_px(
    inliers: PairMatches, matches: PairMatches, *, max_error_px: float
) -> Float64Array | None:
    """How far matches (M,) are from where the homography of others puts them, (M,).

    None when the others determine none.
    """
    found = _find_homography(inliers.points1_xy, inliers.points2_xy, max_error_px=max_error_px)
    if found is None:
        return None
    ones = np.ones((len(matches), 1))
    mapped = np.hstack([matches.points1_xy, ones]) @ found[0].T
    with np.errstate(divide="ignore", invalid="ignore"):
        offsets = mapped[:, :2] / mapped[:, 2:] - matches.points2_xy
    return np.asarray(np.nan_to_num(np.linalg.norm(offsets, axis=1), nan=0.0))


def _find_homography(
    points1_xy: Float64Array, points2_xy: Float64Array, *, max_error_px: float
) -> tuple[Float64Array, BoolArray] | None:
    """The homography (3, 3) and which of the N correspondences agree with it."""
    if len(points1_xy) < 4:
        return None
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
        return None
    if homography is None:
        return None
    return np.asarray(homography, np.float64), mask.ravel().astype(bool)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairVerifier:
    """Verifies matches of one pair of images, and measures how far others are from a geometry."""

    image_size: tuple[int, int]  # width and height that pixel thresholds scale with
    config: TwoViewConfig
    cameras: tuple[pycolmap.Camera, pycolmap.Camera] | None = None  # None: by a fundamental matrix

    @property
    def max_error_px(self) -> float:
        """How far a match may be from the geometry."""
        return self.config.max_error_px * image_scale(*self.image_size)

    def verify(self, matches: PairMatches) -> VerifiedMatches | None:
        """The matches that agree on one geometry; None when there are too few."""
        if self.cameras is None:
            return verify_matches(matches, image_size=self.image_size, config=self.config)
        camera1, camera2 = self.cameras
        return verify_matches_on_rays(matches, camera1=camera1, camera2=camera2, config=self.config)

    def distances_px(self, verified: VerifiedMatches, matches: PairMatches) -> Float64Array:
        """How far matches (M,) are from the epipolar lines of a geometry found by ``verify``.

        0 for those that have no viewing ray.
        """
        if self.cameras is None or verified.cam2_from_cam1 is None:
            return epipolar_distances_px(
                verified.fundamental, matches.points1_xy, matches.points2_xy
            )
        camera1, camera2 = self.cameras
        angles_rad = epipolar_angles_rad(
            unit_rays(camera1, matches.points1_xy),
            unit_rays(camera2, matches.points2_xy),
            cam2_from_cam1=verified.cam2_from_cam1,
        )
        return angles_rad * camera_focal_px(camera2)

    def guide(
        self,
        verified: VerifiedMatches,
        points1_xy: Float64Array,
        points2_xy: Float64Array,
        *,
        max_error_px: float,
    ) -> EpipolarGuide:
        """Where further matches of points (N, 2) and (M, 2) agree with a geometry.

        Args:
            verified: found by ``verify``.
            points1_xy: keypoints of the first image.
            points2_xy: of the second.
            max_error_px: how far matches may be from it, about.
        """
        if self.cameras is None or verified.cam2_from_cam1 is None:
            # Any calibration will do. With this one an angle is a px, within a third.
            width, height = self.image_size
            edge = float(max(self.image_size))
            calibration = np.array([[edge, 0, width / 2], [0, edge, height / 2], [0, 0, 1]])
            essential = calibration.T @ verified.fundamental @ calibration
            return EpipolarGuide(
                rays1=_pinhole_rays(calibration, points1_xy),
                rays2=_pinhole_rays(calibration, points2_xy),
                essential=essential / np.linalg.norm(essential),
                max_angle_rad=max_error_px / edge,
            )
        camera1, camera2 = self.cameras
        rotation, translation = np.split(verified.cam2_from_cam1, [3], axis=1)
        return EpipolarGuide(
            rays1=unit_rays(camera1, points1_xy),
            rays2=unit_rays(camera2, points2_xy),
            essential=skew(translation[:, 0]) @ rotation,
            max_angle_rad=max_error_px / camera_focal_px(camera2),
        )


def _pinhole_rays(calibration: Float64Array, points_xy: Float64Array) -> Float64Array:
    """Unit rays (N, 3) of points (N, 2) by a calibration matrix (3, 3)."""
    rays = np.column_stack([points_xy, np.ones(len(points_xy))]) @ np.linalg.inv(calibration).T
    return np.asarray(rays / np.linalg.norm(rays, axis=1, keepdims=True))


def epipolar_angles_rad(
    rays1: Float64Array, rays2: Float64Array, *, cam2_from_cam1: Float64Array
) -> Float64Array:
    """Angles (N,) of the second unit rays to the epipolar planes of the first; 0 without a ray."""
    translation = cam2_from_cam1[:, 3]
    baseline = translation / max(float(np.linalg.norm(translation)), 1e-12)
    normals = np.cross(baseline, rays1 @ cam2_from_cam1[:, :3].T)
    lengths = np.maximum(np.linalg.norm(normals, axis=1), 1e-12)
    sines = np.abs((normals * rays2).sum(axis=1)) / lengths
    return np.asarray(np.nan_to_num(np.arcsin(np.minimum(sines, 1.0)), nan=0.0))


def estimate_focal_length(
    pairs: Sequence[VerifiedPair], *, width: int, height: int
) -> float | None:
    """One focal length in px for a camera, from its fundamental matrices alone.

    With square pixels and a centred principal point, K^T F K is an essential matrix only for the
    right focal length: its two singular values are equal (Mendonca and Cipolla, CVPR 1999). Each
    pair votes with its relative singular value gap over a range of focal lengths, weighted by its
    inliers. Pairs that one plane explains have no vote, nor have those verified on rays. After a
    pure translation the gap is small for every focal length: such pairs vote for none.

    Returns:
        The focal length, or None when the pairs do not determine it.
    """
    usable = [
        pair for pair in pairs if pair.homography_inlier_ratio < 0.8 and pair.cam2_from_cam1 is None
    ]
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
    if not (np.isfinite(essentials).all() and essentials.any(axis=(1, 2)).all()):
        return np.full(len(_FOCAL_RATIOS), _MAX_GAP)  # such a matrix votes for no focal length
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
    max_num_trials: int = _MAX_POSE_TRIALS,
) -> RelativePose | None:
    """The relative pose of two calibrated views from matches (N, 2), (N, 2); None if none fits.

    Matches without viewing rays have no part in the triangulation angle.
    """
    if len(points1_xy) < _MIN_MATCHES_FOR_POSE:
        return None
    options = pycolmap.RANSACOptions(
        max_error=max_error_px,
        random_seed=seed,
        min_num_trials=100,
        max_num_trials=max_num_trials,
        min_inlier_ratio=0.2,
    )
    found = _find_relative_pose(
        points1_xy, points2_xy, camera1=camera1, camera2=camera2, options=options
    )
    if found is None or not found[1].any():
        return None
    cam2_from_cam1, inliers = found
    angles = _ray_angles_rad(
        viewing_rays(camera1, points1_xy[inliers]),
        viewing_rays(camera2, points2_xy[inliers]),
        cam2_from_cam1,
    )
    angles = angles[np.isfinite(angles)]
    if not len(angles):
        return None
    return RelativePose(
        cam2_from_cam1=cam2_from_cam1,
        num_inliers=int(inliers.sum()),
        median_triangulation_angle_rad=float(np.median(angles)),
    )


def _ray_angles_rad(
    rays1: Float64Array, rays2: Float64Array, cam2_from_cam1: Float64Array
) -> Float64Array:
    """Angles (N,) between the viewing rays (N, 3), (N, 3) of matches, each in its own camera."""
    turned = rays1 @ cam2_from_cam1[:, :3].T
    cosine = (turned * rays2).sum(axis=1)
    sine = np.linalg.norm(np.cross(turned, rays2), axis=1)
    return np.asarray(np.arctan2(sine, cosine))
