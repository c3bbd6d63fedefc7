"""Growing a map: one keyframe at a time, or a whole map from a pair of keyframes.

The same steps serve the live map, a restart from a better pair, and the rescue of missing keyframes
at the end of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engine.config import (
    GlobalBundleAdjustmentConfig,
    InitializationConfig,
    LocalBundleAdjustmentConfig,
)
from engine.estimators.two_view_geometry import RelativePose, estimate_relative_pose
from engine.geometry import image_scale
from engine.mapping.bundle_adjustment import (
    GlobalAdjustmentSchedule,
    adjust_locally,
    solve_globally,
)
from engine.mapping.sparse_map import Registration, SparseMap
from engine.types import (
    Float64Array,
    FrameId,
    ImagePair,
    Keyframe,
    RegistrationStatus,
    VerifiedPair,
)

_INITIAL_PASSES = 2  # adjustment and filtering of a map of two keyframes
_SATURATION_ANGLE_RAD = float(np.radians(16.0))  # wider is no better for a first pair
_GOOD_START_RATIO = 0.8  # of the keyframes that match any: no other first pair is tried
_RELATIVE_POSE_ERROR_PX = 3.0  # at an image edge of 1000 px
_PAIRS_EXAMINED_PER_PAIR_TRIED = 4
_PLANAR_RATIO = 0.7  # of a pair's inliers on one homography: a plane, or no motion at all
_FOCAL_DOUBTS = np.geomspace(0.6, 1.0 / 0.6, 13)  # factors by which a focal length may be wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthConfig:
    """The settings growing a map needs."""

    initialization: InitializationConfig
    min_inlier_ratio: float  # of a registration
    local_bundle_adjustment: LocalBundleAdjustmentConfig
    global_bundle_adjustment: GlobalBundleAdjustmentConfig
    constant_camera_ids: frozenset[int]
    num_threads: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InitialPair:
    """Two keyframes a map may start from."""

    pair: ImagePair
    relative_pose: RelativePose
    score: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BuiltMap:
    """A map and what it was built from."""

    sparse_map: SparseMap
    pair: ImagePair  # what it started from, or the strongest pair of the window
    initial: InitialPair | None  # None: it started from a window


def register_and_refine(
    sparse_map: SparseMap, frame_id: FrameId, *, config: GrowthConfig
) -> Registration:
    """Registers a keyframe, triangulates its matches and refines its surroundings."""
    registration = sparse_map.register(frame_id, min_inlier_ratio=config.min_inlier_ratio)
    if registration.status is RegistrationStatus.REGISTERED:
        sparse_map.triangulate(frame_id)
        adjust_locally(
            sparse_map,
            frame_id,
            config=config.local_bundle_adjustment,
            constant_camera_ids=config.constant_camera_ids,
        )
    return registration


def adjust_in_place(sparse_map: SparseMap, *, config: GrowthConfig) -> None:
    """Adjusts the whole map on the calling thread and filters it."""
    solve_globally(
        sparse_map.reconstruction,
        constant_camera_ids=config.constant_camera_ids,
        max_iterations=config.global_bundle_adjustment.max_iterations,
        num_threads=config.num_threads,
    )
    sparse_map.filter_all()


def grow_fully(sparse_map: SparseMap, *, config: GrowthConfig) -> dict[FrameId, Registration]:
    """Registers everything that can be, the keyframe seeing the most points next.

    The whole map is adjusted each time it grew by the configured ratio.

    Returns:
        The keyframes registered, in order.
    """
    schedule = GlobalAdjustmentSchedule(config.global_bundle_adjustment)
    schedule.done(sparse_map.num_registered)
    visible = {
        i: sparse_map.num_visible_points(i)
        for i in sparse_map.keyframe_ids
        if not sparse_map.is_registered(i)
    }
    registered: dict[FrameId, Registration] = {}
    while visible:
        frame_id = max(visible, key=lambda i: (visible[i], -i))
        if visible.pop(frame_id) == 0:
            break
        registration = register_and_refine(sparse_map, frame_id, config=config)
        if registration.status is not RegistrationStatus.REGISTERED:
            continue
        registered[frame_id] = registration
        for other in sparse_map.neighbors(frame_id):
            # A neighbour that failed before gets another chance: it sees more points now.
            if not sparse_map.is_registered(other):
                visible[other] = sparse_map.num_visible_points(other)
        if schedule.should(sparse_map.num_registered):
            schedule.done(sparse_map.num_registered)
            adjust_in_place(sparse_map, config=config)
    return registered


def rank_initial_pairs(
    sparse_map: SparseMap,
    pairs: Sequence[VerifiedPair],
    *,
    config: GrowthConfig,
    excluded: Collection[ImagePair] = (),
) -> list[InitialPair]:
    """Pairs a map can start from, best first: many matches, a good angle, not only a turn.

    Args:
        sparse_map: knows the keyframes and their cameras; need not be initialised.
        pairs: verified pairs to choose from.
        config: thresholds.
        excluded: pairs that failed before.
    """
    settings = config.initialization
    usable = [
        pair
        for pair in pairs
        if pair.num_inliers >= settings.min_inliers and pair.pair not in excluded
    ]
    usable.sort(key=lambda pair: (-pair.initial_pair_score, pair.pair))
    ranked = []
    for verified in usable[: _PAIRS_EXAMINED_PER_PAIR_TRIED * settings.max_pairs_tried]:
        relative = _relative_pose(sparse_map, verified, seed=config.seed)
        if relative is None or relative.num_inliers < settings.min_inliers:
            continue
        angle = relative.median_triangulation_angle_rad
        if angle < np.radians(settings.min_triangulation_angle_deg):
            continue
        if _may_only_turn(sparse_map, verified):
            continue
        score = relative.num_inliers * min(angle, _SATURATION_ANGLE_RAD)
        ranked.append(InitialPair(pair=verified.pair, relative_pose=relative, score=score))
    ranked.sort(key=lambda initial: (-initial.score, initial.pair))
    return ranked[: settings.max_pairs_tried]


def build_best_map(
    new_map: Callable[[], SparseMap],
    initial_pairs: Sequence[InitialPair],
    *,
    config: GrowthConfig,
) -> BuiltMap | None:
    """Builds maps from the given pairs until one holds most keyframes; returns the fullest.

    Args:
        new_map: makes a map with all keyframes and pairs, none registered.
        initial_pairs: pairs to start from, best first.
        config: thresholds.

    Returns:
        None when no pair makes a sound map.
    """
    best: BuiltMap | None = None
    for built in _built_maps(new_map, initial_pairs, config=config):
        if best is None or _fullness(built) > _fullness(best):
            best = built
        num_matched = sum(1 for i in built.sparse_map.keyframe_ids if built.sparse_map.neighbors(i))
        if built.sparse_map.num_registered >= _GOOD_START_RATIO * num_matched:
            break
    return best


def _built_maps(
    new_map: Callable[[], SparseMap], initial_pairs: Sequence[InitialPair], *, config: GrowthConfig
) -> Iterator[BuiltMap]:
    for initial in initial_pairs:
        sparse_map = new_map()
        if not _initialize(sparse_map, initial, config=config):
            continue
        grow_fully(sparse_map, config=config)
        enough = min(3, len(sparse_map.keyframe_ids))
        if sparse_map.num_registered < enough:
            continue
        adjust_in_place(sparse_map, config=config)
        if _has_enough_points(sparse_map, config.initialization):
            yield BuiltMap(sparse_map=sparse_map, pair=initial.pair, initial=initial)


def _initialize(sparse_map: SparseMap, initial: InitialPair, *, config: GrowthConfig) -> bool:
    """Starts a map from a pair; False when the result is not sound."""
    settings = config.initialization
    sparse_map.initialize(
        initial.pair.first,
        initial.pair.second,
        second_from_first=initial.relative_pose.cam2_from_cam1,
    )
    everything_constant = frozenset(int(i) for i in sparse_map.reconstruction.cameras)
    for _ in range(_INITIAL_PASSES):
        if not _has_enough_points(sparse_map, settings):
            return False
        solve_globally(
            sparse_map.reconstruction,
            # Two views alone bend the calibration to fit anything.
            constant_camera_ids=everything_constant,
            max_iterations=config.global_bundle_adjustment.max_iterations,
            num_threads=1,
        )
        sparse_map.filter_all()
    keyframe = sparse_map.keyframe(initial.pair.first)
    max_error_px = settings.max_reprojection_error_px * image_scale(keyframe.width, keyframe.height)
    return (
        _has_enough_points(sparse_map, settings)
        and sparse_map.mean_reprojection_error_px() <= max_error_px
    )


def _has_enough_points(sparse_map: SparseMap, settings: InitializationConfig) -> bool:
    return sparse_map.num_points3D >= settings.min_inliers // 2


def _fullness(built: BuiltMap) -> tuple[int, int]:
    return built.sparse_map.num_registered, built.sparse_map.num_points3D


def _relative_pose(
    sparse_map: SparseMap, verified: VerifiedPair, *, seed: int
) -> RelativePose | None:
    first = sparse_map.keyframe(verified.pair.first)
    second = sparse_map.keyframe(verified.pair.second)
    points1_xy, points2_xy = _matched_points(sparse_map, verified)
    return estimate_relative_pose(
        points1_xy,
        points2_xy,
        camera1=sparse_map.camera(first.camera_key),
        camera2=sparse_map.camera(second.camera_key),
        max_error_px=_max_error_px(first),
        seed=seed,
    )


def _may_only_turn(sparse_map: SparseMap, verified: VerifiedPair) -> bool:
    """Whether a camera turning on the spot explains a pair, for a focal length not far off.

    With a wrong focal length a turn looks like a motion before a plane, and at a good angle.
    """
    if verified.homography_inlier_ratio < _PLANAR_RATIO:
        return False
    first = sparse_map.keyframe(verified.pair.first)
    second = sparse_map.keyframe(verified.pair.second)
    camera1, camera2 = (sparse_map.camera(k.camera_key) for k in (first, second))
    points1_xy, points2_xy = _matched_points(sparse_map, verified)
    plane1_xy = np.asarray(camera1.cam_from_img(points1_xy))
    plane2_xy = np.asarray(camera2.cam_from_img(points2_xy))
    max_error = _max_error_px(second) / camera2.mean_focal_length()
    return any(
        doubt * _turn_error(plane1_xy / doubt, plane2_xy / doubt) < max_error
        for doubt in _FOCAL_DOUBTS
    )


def _turn_error(points1_xy: Float64Array, points2_xy: Float64Array) -> float:
    """Median distance of points (N, 2) on z = 1 to where the best rotation puts their matches.

    The rotation is found in closed form (Kabsch, 1976).
    """
    ones = np.ones((len(points1_xy), 1))
    rays1, rays2 = np.hstack([points1_xy, ones]), np.hstack([points2_xy, ones])
    rays1 /= np.linalg.norm(rays1, axis=1, keepdims=True)
    rays2 /= np.linalg.norm(rays2, axis=1, keepdims=True)
    left, _, right = np.linalg.svd(rays2.T @ rays1)
    rotation = left @ np.diag([1.0, 1.0, np.linalg.det(left @ right)]) @ right
    turned = rays1 @ rotation.T
    return float(np.median(np.linalg.norm(turned[:, :2] / turned[:, 2:] - points2_xy, axis=1)))


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
