"""Choosing where a map starts and growing it, on a synthetic world."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from engine.config import (
    GlobalBundleAdjustmentConfig,
    InitializationConfig,
    LocalBundleAdjustmentConfig,
)
from engine.estimators.two_view_geometry import estimate_relative_pose
from engine.geometry import compose_poses, invert_pose, rotation_vector_from
from engine.mapping.growth import (
    GrowthConfig,
    InitialPair,
    adjust_in_place,
    build_best_map,
    grow_fully,
    rank_initial_pairs,
    register_and_refine,
)
from engine.mapping.sparse_map import SparseMap
from engine.types import FrameId, ImagePair, RegistrationStatus, VerifiedPair
from tests.support.synthetic import (
    EXACT_CAMERA,
    FOCAL_PX,
    SyntheticWorld,
    ground,
    grow,
    grown_map,
    map_of_keyframes,
    pose_errors,
    poses_of,
    straight_path,
    turning_path,
)

CONFIG = GrowthConfig(
    initialization=InitializationConfig(min_inliers=60, min_triangulation_angle_deg=6.0),
    min_inlier_ratio=0.65,
    local_bundle_adjustment=LocalBundleAdjustmentConfig(),
    global_bundle_adjustment=GlobalBundleAdjustmentConfig(),
    constant_camera_ids=frozenset({1}),
    num_threads=1,
    seed=0,
)
NUM_FRAMES = 11


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(NUM_FRAMES), noise_px=0.3)


def pairs_of(sparse_map: SparseMap) -> list[VerifiedPair]:
    return [
        pair
        for frame_id in sparse_map.keyframe_ids
        for other, pair in sparse_map.neighbors(frame_id).items()
        if other < frame_id
    ]


def ranked_in(
    world: SyntheticWorld, *, focal_factor: float = 1.0, **settings: float
) -> list[InitialPair]:
    sparse_map = map_of_keyframes(world)
    sparse_map.set_camera_params("camera", (focal_factor * FOCAL_PX, *EXACT_CAMERA[1:]))
    initialization = CONFIG.initialization.model_copy(update=settings)
    config = dataclasses.replace(CONFIG, initialization=initialization)
    return rank_initial_pairs(sparse_map, pairs_of(sparse_map), config=config)


def initial_pair(world: SyntheticWorld, first: int, second: int) -> InitialPair:
    """A pair as ranked in a world where it is the only one."""
    sparse_map = map_of_keyframes(world, frame_ids=[first, second])
    (initial,) = rank_initial_pairs(sparse_map, pairs_of(sparse_map), config=CONFIG)
    return initial


# -- where to start -------------------------------------------------------------------------------


def test_the_best_pair_has_many_matches_and_a_good_angle(world: SyntheticWorld) -> None:
    ranked = ranked_in(world)
    scores = [initial.score for initial in ranked]
    assert scores == sorted(scores, reverse=True)
    angles = [np.degrees(i.relative_pose.median_triangulation_angle_rad) for i in ranked]
    assert min(angles) >= 6.0
    assert angles[0] >= 12.0
    assert ranked[0].relative_pose.num_inliers >= 60
    gaps = {initial.pair.second - initial.pair.first for initial in ranked[:3]}
    assert gaps <= {2, 3}  # 1: hardly any parallax; 4: hardly any matches


def test_relative_poses_of_ranked_pairs_are_the_true_ones(world: SyntheticWorld) -> None:
    for initial in ranked_in(world):
        first, second = initial.pair.first, initial.pair.second
        true = compose_poses(world.pose(second), invert_pose(world.pose(first)))
        found = initial.relative_pose.cam2_from_cam1
        assert 1e-6 < np.linalg.norm(rotation_vector_from(found[:, :3] @ true[:, :3].T)) < 0.01
        cosine = found[:, 3] @ true[:, 3] / np.linalg.norm(true[:, 3])
        assert cosine == pytest.approx(1.0, abs=1e-3)


def test_pairs_that_failed_before_are_left_out(world: SyntheticWorld) -> None:
    sparse_map = map_of_keyframes(world)
    best, second_best, *_ = rank_initial_pairs(sparse_map, pairs_of(sparse_map), config=CONFIG)
    others = rank_initial_pairs(
        sparse_map, pairs_of(sparse_map), config=CONFIG, excluded=[best.pair]
    )
    assert others[0].pair == second_best.pair
    assert best.pair not in {initial.pair for initial in others}


def test_the_order_of_pairs_does_not_change_the_ranking(world: SyntheticWorld) -> None:
    sparse_map = map_of_keyframes(world)
    pairs = pairs_of(sparse_map)
    forwards = rank_initial_pairs(sparse_map, pairs, config=CONFIG)
    backwards = rank_initial_pairs(sparse_map, pairs[::-1], config=CONFIG)
    assert [initial.pair for initial in forwards] == [initial.pair for initial in backwards]


def test_thresholds_say_what_a_start_needs(world: SyntheticWorld) -> None:
    assert len(ranked_in(world, max_pairs_tried=4)) == 4
    assert ranked_in(world, min_inliers=1000) == []
    assert ranked_in(world, min_triangulation_angle_deg=60.0) == []


@pytest.mark.parametrize("focal_factor", [0.65, 0.8, 1.0, 1.25, 1.5])
@pytest.mark.parametrize("noise_px", [0.0, 0.5])
def test_no_map_starts_from_a_camera_that_only_turns(noise_px: float, focal_factor: float) -> None:
    """With a wrong focal length its pairs look like good ones that see a plane."""
    world = SyntheticWorld(turning_path(6), noise_px=noise_px)
    assert ranked_in(world, focal_factor=focal_factor) == []


@pytest.mark.parametrize("focal_factor", [0.8, 1.0, 1.25])
@pytest.mark.parametrize("looks_down", [1.0, 10.0])
def test_a_map_may_start_from_a_plane_with_enough_parallax(
    looks_down: float, focal_factor: float
) -> None:
    poses = straight_path(6, looks_down=looks_down)
    points = ground(poses, relief=0.0, density=2.0)
    world = SyntheticWorld(poses, points=points, noise_px=0.3)
    assert len(ranked_in(world, focal_factor=focal_factor)) >= 3


def test_no_map_starts_from_a_plane_with_too_little_parallax() -> None:
    poses = straight_path(5, step=0.1)
    world = SyntheticWorld(poses, points=ground(poses, relief=0.0), noise_px=0.3)
    assert ranked_in(world) == []


# -- building -------------------------------------------------------------------------------------


def built_from(
    world: SyntheticWorld, initial_pairs: Sequence[InitialPair], **settings: Any
) -> tuple[SparseMap | None, InitialPair | None, int]:
    """The best map, what it started from, and how many maps were made on the way."""
    made: list[SparseMap] = []

    def new_map() -> SparseMap:
        made.append(map_of_keyframes(world, **settings))
        return made[-1]

    built = build_best_map(new_map, initial_pairs, config=CONFIG)
    if built is None:
        return None, None, len(made)
    return built.sparse_map, built.initial, len(made)


def test_a_good_start_gives_the_whole_map_at_once(world: SyntheticWorld) -> None:
    sparse_map, initial, num_made = built_from(world, ranked_in(world))
    assert sparse_map is not None
    assert num_made == 1
    assert initial is not None
    assert sparse_map.registered_ids == world.frame_ids
    errors = pose_errors(poses_of(sparse_map), world)
    assert 1e-5 < errors.rmse_ratio < 1e-3
    assert sparse_map.mean_reprojection_error_px() < 0.5


def test_the_next_pair_is_tried_when_the_first_leads_nowhere(world: SyntheticWorld) -> None:
    """Keyframes 1 and 3 have a pair with each other only."""

    def cut(pair: ImagePair) -> bool:
        return pair.first <= 3 < pair.second

    frame_ids = [1, *world.frame_ids[2:]]
    poor, good = initial_pair(world, 1, 3), initial_pair(world, 5, 7)
    sparse_map, initial, num_made = built_from(
        world, [poor, good, good], frame_ids=frame_ids, skips=cut
    )
    assert sparse_map is not None
    assert initial is good
    assert sparse_map.registered_ids == frame_ids[2:]
    assert num_made == 2  # eight of ten are enough, the third pair is not tried


def test_the_fullest_of_several_poor_maps_is_kept(world: SyntheticWorld) -> None:
    def cut(pair: ImagePair) -> bool:
        return pair.first <= 4 < pair.second

    few, more = initial_pair(world, 1, 3), initial_pair(world, 6, 8)
    for order in ([few, more], [more, few]):
        sparse_map, initial, num_made = built_from(world, order, skips=cut)
        assert sparse_map is not None
        assert initial is more
        assert sparse_map.registered_ids == world.frame_ids[4:]
        assert num_made == 2


def test_a_start_with_a_wrong_relative_pose_makes_no_map(world: SyntheticWorld) -> None:
    right = initial_pair(world, 5, 7)
    wrong_pose = right.relative_pose.cam2_from_cam1.copy()
    wrong_pose[:, 3] = np.roll(wrong_pose[:, 3], 1)
    relative_pose = type(right.relative_pose)(
        cam2_from_cam1=wrong_pose,
        num_inliers=right.relative_pose.num_inliers,
        median_triangulation_angle_rad=right.relative_pose.median_triangulation_angle_rad,
    )
    wrong = InitialPair(pair=right.pair, relative_pose=relative_pose, score=right.score)
    assert built_from(world, [wrong])[0] is None
    assert built_from(world, [])[0] is None
    sparse_map, initial, _ = built_from(world, [wrong, right])
    assert sparse_map is not None
    assert initial is right


def test_a_map_that_loses_its_points_when_adjusted_is_none() -> None:
    """A turn taken for a motion before a plane: the right focal length leaves it no depth."""
    world = SyntheticWorld(turning_path(8), noise_px=0.5)
    wrong_params = (0.8 * FOCAL_PX, *EXACT_CAMERA[1:])

    def new_map() -> SparseMap:
        sparse_map = map_of_keyframes(world)
        sparse_map.set_camera_params("camera", wrong_params)
        return sparse_map

    sparse_map = new_map()
    first, second = sparse_map.keyframe(FrameId(1)), sparse_map.keyframe(FrameId(5))
    rows1, rows2 = sparse_map.neighbors(FrameId(1))[FrameId(5)].inlier_matches_idx.T
    relative_pose = estimate_relative_pose(
        first.features.keypoints_xy[rows1],
        second.features.keypoints_xy[rows2],
        camera1=sparse_map.camera("camera"),
        camera2=sparse_map.camera("camera"),
        max_error_px=3.0,
        seed=0,
    )
    assert relative_pose is not None
    pair = ImagePair(FrameId(1), FrameId(5))
    initial = InitialPair(pair=pair, relative_pose=relative_pose, score=1.0)
    config = dataclasses.replace(CONFIG, constant_camera_ids=frozenset())
    assert build_best_map(new_map, [initial], config=config) is None


def test_two_keyframes_are_a_map_when_there_are_no_others(world: SyntheticWorld) -> None:
    pair = initial_pair(world, 5, 7)
    sparse_map, _, _ = built_from(world, [pair], frame_ids=[5, 7])
    assert sparse_map is not None
    assert sparse_map.registered_ids == [5, 7]
    assert sparse_map.num_points3D >= 60


def test_two_of_three_keyframes_are_no_map(world: SyntheticWorld) -> None:
    pair = initial_pair(world, 5, 7)
    sparse_map, _, _ = built_from(world, [pair], frame_ids=[1, 5, 7], max_gap=2)
    assert sparse_map is None


# -- growing --------------------------------------------------------------------------------------


def started_map(world: SyntheticWorld, first: int, second: int, **settings: Any) -> SparseMap:
    sparse_map = map_of_keyframes(world, **settings)
    grow(sparse_map, world, [first, second])
    return sparse_map


def test_growing_takes_everything_best_seen_first(world: SyntheticWorld) -> None:
    sparse_map = started_map(world, 5, 7)
    visible = {
        i: sparse_map.num_visible_points(i)
        for i in world.frame_ids
        if not sparse_map.is_registered(i)
    }
    registered = grow_fully(sparse_map, config=CONFIG)
    assert sparse_map.registered_ids == world.frame_ids
    assert set(registered) == set(world.frame_ids) - {5, 7}
    assert all(r.status is RegistrationStatus.REGISTERED for r in registered.values())
    order = list(registered)
    assert order[0] == max(visible, key=lambda i: visible[i]) == 6
    assert order.index(FrameId(8)) < order.index(FrameId(9)) < order.index(FrameId(11))
    assert order.index(FrameId(4)) < order.index(FrameId(3)) < order.index(FrameId(1))
    assert 1e-5 < pose_errors(poses_of(sparse_map), world).rmse_ratio < 2e-3


def test_growing_stops_where_nothing_is_seen(world: SyntheticWorld) -> None:
    sparse_map = started_map(world, 2, 3, skips=lambda pair: pair.first <= 6 < pair.second)
    registered = grow_fully(sparse_map, config=CONFIG)
    assert sorted(registered) == [1, 4, 5, 6]
    assert sparse_map.registered_ids == [1, 2, 3, 4, 5, 6]
    assert grow_fully(sparse_map, config=CONFIG) == {}


def test_a_keyframe_that_failed_is_tried_again_when_a_neighbour_came(world: SyntheticWorld) -> None:
    """Keyframe 4 has bad pairs with the first ones and good pairs with those behind it."""
    bad = [world.verified_pair(i, 4, wrong_ratio=0.6) for i in (1, 2, 3)]
    sparse_map = map_of_keyframes(
        world,
        frame_ids=[1, 2, 3, 4, 5],
        skips=lambda pair: 4 in (pair.first, pair.second),
        given_pairs=[*bad, world.verified_pair(4, 5)],
    )
    grow(sparse_map, world, [1, 2, 3])
    assert sparse_map.num_visible_points(FrameId(4)) > sparse_map.num_visible_points(FrameId(5))
    refused = sparse_map.register(FrameId(4), min_inlier_ratio=CONFIG.min_inlier_ratio)
    assert refused.status is RegistrationStatus.TOO_FEW_INLIERS
    assert list(grow_fully(sparse_map, config=CONFIG)) == [5, 4]


def test_a_registration_that_fails_leaves_the_map_alone(world: SyntheticWorld) -> None:
    sparse_map = started_map(world, 1, 2, wrong_ratio=0.6)
    points = sparse_map.point_cloud().points3D_in_world
    registration = register_and_refine(sparse_map, FrameId(3), config=CONFIG)
    assert registration.status is RegistrationStatus.TOO_FEW_INLIERS
    assert sparse_map.registered_ids == [1, 2]
    assert np.array_equal(sparse_map.point_cloud().points3D_in_world, points)


def test_a_registered_keyframe_brings_points_and_is_refined(world: SyntheticWorld) -> None:
    sparse_map = started_map(world, 1, 2)
    num_points = sparse_map.num_points3D
    plain = started_map(world, 1, 2)
    plain.register(FrameId(3), min_inlier_ratio=0.65)
    plain.triangulate(FrameId(3))
    registration = register_and_refine(sparse_map, FrameId(3), config=CONFIG)
    assert registration.status is RegistrationStatus.REGISTERED
    assert sparse_map.num_points3D > num_points
    assert sparse_map.mean_reprojection_error_px() < plain.mean_reprojection_error_px()


def test_adjusting_in_place_refines_what_may_change(world: SyntheticWorld) -> None:
    sparse_map = grown_map(world)
    before_px = sparse_map.mean_reprojection_error_px()
    adjust_in_place(sparse_map, config=CONFIG)
    assert 0.2 < sparse_map.mean_reprojection_error_px() < before_px
    assert sparse_map.camera("camera").mean_focal_length() == FOCAL_PX
