"""The first two keyframes of a map, on a synthetic world."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engine.geometry import compose_poses, invert_pose, rotation_vector_from
from engine.mapping.model.initialization import (
    InitialPair,
    has_enough_points,
    initialize,
    rank_initial_pairs,
)
from tests.support.initial_pairs import INITIALIZATION, SEED, initial_pair, pairs_of
from tests.support.synthetic import (
    EXACT_CAMERA,
    FOCAL_PX,
    SyntheticWorld,
    ground,
    map_of_keyframes,
    straight_path,
    turning_path,
)

NUM_FRAMES = 11


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(NUM_FRAMES), noise_px=0.3)


def ranked_in(
    world: SyntheticWorld, *, focal_factor: float = 1.0, **settings: float
) -> list[InitialPair]:
    sparse_map = map_of_keyframes(world)
    sparse_map.set_camera_params("camera", (focal_factor * FOCAL_PX, *EXACT_CAMERA[1:]))
    config = INITIALIZATION.model_copy(update=settings)
    return list(rank_initial_pairs(sparse_map, pairs_of(sparse_map), config=config, seed=SEED))


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
    best, second_best, *_ = ranked_in(world)
    others = list(
        rank_initial_pairs(
            sparse_map, pairs_of(sparse_map), config=INITIALIZATION, seed=SEED, excluded=[best.pair]
        )
    )
    assert others[0].pair == second_best.pair
    assert best.pair not in {initial.pair for initial in others}


def test_the_order_of_pairs_does_not_change_the_ranking(world: SyntheticWorld) -> None:
    sparse_map = map_of_keyframes(world)
    pairs = pairs_of(sparse_map)
    forwards, backwards = (
        rank_initial_pairs(sparse_map, ordered, config=INITIALIZATION, seed=SEED)
        for ordered in (pairs, pairs[::-1])
    )
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


# -- the map of two keyframes ---------------------------------------------------------------------


@pytest.mark.parametrize("focal_factor", [1.0, 1.1])
def test_a_pair_makes_a_map_and_leaves_its_calibration(
    world: SyntheticWorld, focal_factor: float
) -> None:
    initial = initial_pair(world, 5, 7)
    sparse_map = map_of_keyframes(world, is_constant=False)
    params = (focal_factor * FOCAL_PX, *EXACT_CAMERA[1:])
    sparse_map.set_camera_params("camera", params)
    assert initialize(sparse_map, initial, config=INITIALIZATION, max_iterations=20)
    assert sparse_map.registered_ids == [5, 7]
    assert has_enough_points(sparse_map, INITIALIZATION)
    assert sparse_map.camera("camera").params.tolist() == list(params)
    assert sparse_map.mean_reprojection_error_px() < 1.0


def test_a_pair_with_a_wrong_relative_pose_makes_no_map(world: SyntheticWorld) -> None:
    initial = initial_pair(world, 5, 7)
    wrong_pose = initial.relative_pose.cam2_from_cam1.copy()
    wrong_pose[:, 3] = np.roll(wrong_pose[:, 3], 1)
    wrong = dataclasses.replace(
        initial, relative_pose=dataclasses.replace(initial.relative_pose, cam2_from_cam1=wrong_pose)
    )
    assert not initialize(map_of_keyframes(world), wrong, config=INITIALIZATION, max_iterations=20)


def test_a_map_of_few_points_or_large_errors_is_not_sound(world: SyntheticWorld) -> None:
    initial = initial_pair(world, 5, 7)
    for update in ({"min_inliers": 2000}, {"max_reprojection_error_px": 0.01}):
        config = INITIALIZATION.model_copy(update=update)
        assert not initialize(map_of_keyframes(world), initial, config=config, max_iterations=20)
