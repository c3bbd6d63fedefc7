"""The first two keyframes of a map: which pair to start from, and the map made of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engine.config import InitializationConfig
from engine.estimators.lenses import camera_focal_px, unit_rays, uses_rays
from engine.estimators.two_view_geometry import RelativePose, estimate_relative_pose
from engine.geometry import image_scale, rotation_between
from engine.mapping.model.bundle_adjustment import solve_globally
from engine.mapping.model.sparse_map import SparseMap
from engine.types import Float64Array, ImagePair, Keyframe, VerifiedPair

_INITIAL_PASSES = 2  # adjustment and filtering of a map of two keyframes
_SATURATION_ANGLE_RAD = float(np.radians(16.0))  # wider is no better for a first pair
_RELATIVE_POSE_ERROR_PX = 3.0  # at an image edge of 1000 px
_PAIRS_EXAMINED_PER_PAIR_TRIED = 4
_PLANAR_RATIO = 0.7  # of a pair's inliers on one homography: a plane, or no motion at all
_MIN_POINTS_OF_TURN = 8  # fewer do not tell a turn from a motion
_FOCAL_DOUBTS = np.geomspace(0.6, 1.0 / 0.6, 13)  # factors by which a focal length may be wrong


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InitialPair:
    """Two keyframes that a map may start from."""

    pair: ImagePair
    relative_pose: RelativePose
    score: float


def rank_initial_pairs(
    sparse_map: SparseMap,
    pairs: Sequence[VerifiedPair],
    *,
    config: InitializationConfig,
    seed: int,
    excluded: Collection[ImagePair] = (),
    only_turns: Callable[[VerifiedPair], bool] = lambda _: False,
) -> Iterator[InitialPair]:
    """Ranks the pairs a map can start from: many matches, a good angle, not only a turn.

    Args:
        sparse_map: holds the keyframes and their cameras; need not be initialised.
        pairs: verified pairs to choose from.
        config: thresholds.
        seed: of the estimation of relative poses.
        excluded: pairs that failed before.
        only_turns: whether a camera that turns without moving explains a pair, for any focal length
            and distortion; asked of those that are taken.

    Yields:
        The pairs, best first.
    """
    usable = [
        pair
        for pair in pairs
        if pair.num_inliers >= config.min_inliers and pair.pair not in excluded
    ]
    usable.sort(key=lambda pair: (-pair.initial_pair_score, pair.pair))
    ranked = []
    for verified in usable[: _PAIRS_EXAMINED_PER_PAIR_TRIED * config.max_pairs_tried]:
        relative = relative_pose_of(sparse_map, verified, seed=seed)
        if relative is None or relative.num_inliers < config.min_inliers:
            continue
        angle = relative.median_triangulation_angle_rad
        if angle < np.radians(config.min_triangulation_angle_deg):
            continue
        if _may_only_turn(sparse_map, verified):
            continue
        score = relative.num_inliers * min(angle, _SATURATION_ANGLE_RAD)
        initial = InitialPair(pair=verified.pair, relative_pose=relative, score=score)
        ranked.append((initial, verified))
    ranked.sort(key=lambda one: (-one[0].score, one[0].pair))
    startable = (initial for initial, verified in ranked if not only_turns(verified))
    yield from itertools.islice(startable, config.max_pairs_tried)


def initialize(
    sparse_map: SparseMap,
    initial: InitialPair,
    *,
    config: InitializationConfig,
    max_iterations: int,
) -> bool:
    """Starts a map from a pair; returns whether the result is sound.

    Args:
        sparse_map: a map without registered keyframes that holds both of the pair.
        initial: the pair.
        config: thresholds.
        max_iterations: of each bundle adjustment.
    """
    sparse_map.initialize(
        initial.pair.first,
        initial.pair.second,
        second_from_first=initial.relative_pose.cam2_from_cam1,
    )
    everything_constant = frozenset(int(i) for i in sparse_map.reconstruction.cameras)
    for _ in range(_INITIAL_PASSES):
        if not has_enough_points(sparse_map, config):
            return False
        solve_globally(
            sparse_map.reconstruction,
            # Two views alone bend the calibration to fit anything.
            constant_camera_ids=everything_constant,
            max_iterations=max_iterations,
            num_threads=1,
        )
        sparse_map.filter_all()
    keyframe = sparse_map.keyframe(initial.pair.first)
    max_error_px = config.max_reprojection_error_px * image_scale(keyframe.width, keyframe.height)
    return (
        has_enough_points(sparse_map, config)
        and sparse_map.mean_reprojection_error_px() <= max_error_px
    )


def has_enough_points(sparse_map: SparseMap, config: InitializationConfig) -> bool:
    """Whether a map holds the points that a first pair must give at least."""
    return sparse_map.num_points3D >= config.min_inliers // 2


def relative_pose_of(
    sparse_map: SparseMap, verified: VerifiedPair, *, seed: int
) -> RelativePose | None:
    """The relative pose of a pair by the cameras of a map; None when none fits.

    Args:
        sparse_map: holds both keyframes and their cameras.
        verified: the pair.
        seed: of the estimation.
    """
    first = sparse_map.keyframe(verified.pair.first)
    second = sparse_map.keyframe(verified.pair.second)
    points1_xy, points2_xy = _matched_points(sparse_map, verified)
    return estimate_relative_pose(
        points1_xy,
        points2_xy,
        camera1=sparse_map.camera(first.calibration_key),
        camera2=sparse_map.camera(second.calibration_key),
        max_error_px=_max_error_px(first),
        seed=seed,
    )


def _may_only_turn(sparse_map: SparseMap, verified: VerifiedPair) -> bool:
    """Whether a camera turning on the spot explains a pair, for a focal length not far off.

    With a wrong focal length a turn looks like a motion before a plane, and at a good angle. Points
    whose distortion cannot be undone are left out; a pair with too few others is taken for a turn.
    """
    if verified.homography_inlier_ratio < _PLANAR_RATIO:
        return False
    first = sparse_map.keyframe(verified.pair.first)
    second = sparse_map.keyframe(verified.pair.second)
    camera1, camera2 = (sparse_map.camera(k.calibration_key) for k in (first, second))
    points1_xy, points2_xy = _matched_points(sparse_map, verified)
    if uses_rays(camera1) or uses_rays(camera2):
        rays1, rays2 = _usable(unit_rays(camera1, points1_xy), unit_rays(camera2, points2_xy))
        max_error_rad = _max_error_px(second) / camera_focal_px(camera2)
        return len(rays1) < _MIN_POINTS_OF_TURN or _ray_turn_error_rad(rays1, rays2) < max_error_rad
    plane1_xy, plane2_xy = _usable(
        np.asarray(camera1.cam_from_img(points1_xy)), np.asarray(camera2.cam_from_img(points2_xy))
    )
    max_error = _max_error_px(second) / camera2.mean_focal_length()
    return len(plane1_xy) < _MIN_POINTS_OF_TURN or any(
        doubt * _turn_error(plane1_xy / doubt, plane2_xy / doubt) < max_error
        for doubt in _FOCAL_DOUBTS
    )


def _usable(first: Float64Array, second: Float64Array) -> tuple[Float64Array, Float64Array]:
    """The rows of two arrays (N, D) that are finite in both."""
    is_finite = np.isfinite(first).all(axis=1) & np.isfinite(second).all(axis=1)
    return first[is_finite], second[is_finite]


def _turn_error(points1_xy: Float64Array, points2_xy: Float64Array) -> float:
    """Median distance of points (N, 2) on z = 1 to where the best rotation puts their matches.

    Infinite for points that it turns behind the camera, and where there is no rotation.
    """
    ones = np.ones((len(points1_xy), 1))
    rays1, rays2 = np.hstack([points1_xy, ones]), np.hstack([points2_xy, ones])
    rays1 /= np.linalg.norm(rays1, axis=1, keepdims=True)
    rays2 /= np.linalg.norm(rays2, axis=1, keepdims=True)
    rotation = rotation_between(rays1, rays2)
    if rotation is None:
        return math.inf
    turned = rays1 @ rotation.T
    depth = np.where(turned[:, 2:] > 0.0, turned[:, 2:], np.nan)
    errors = np.linalg.norm(turned[:, :2] / depth - points2_xy, axis=1)
    return float(np.median(np.nan_to_num(errors, nan=np.inf)))


def _ray_turn_error_rad(rays1: Float64Array, rays2: Float64Array) -> float:
    """Median angle of unit rays (N, 3) to where the best rotation puts their matches."""
    rotation = rotation_between(rays1, rays2)
    if rotation is None:
        return math.inf
    turned = rays1 @ rotation.T
    sines = np.linalg.norm(np.cross(turned, rays2), axis=1)
    return float(np.median(np.arctan2(sines, (turned * rays2).sum(axis=1))))


def _matched_points(
    sparse_map: SparseMap, verified: VerifiedPair
) -> tuple[Float64Array, Float64Array]:
    """The matched keypoints (M, 2), (M, 2) of a pair in px."""
    rows1, rows2 = verified.inlier_matches_idx.T
    first = sparse_map.keyframe(verified.pair.first)
    second = sparse_map.keyframe(verified.pair.second)
    return first.features.keypoints_xy[rows1], second.features.keypoints_xy[rows2]


def _max_error_px(keyframe: Keyframe) -> float:
    return _RELATIVE_POSE_ERROR_PX * image_scale(keyframe.width, keyframe.height)
