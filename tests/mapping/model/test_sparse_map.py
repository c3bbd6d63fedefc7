"""The sparse map on a synthetic world: what it makes of exact, noisy and wrong matches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pycolmap
import pytest

from engine.config import RegistrationConfig, TriangulationConfig
from engine.errors import MapError
from engine.geometry import camera_center, compose_poses, invert_pose
from engine.mapping.model.sparse_map import SparseMap
from engine.types import (
    Features,
    Float64Array,
    FrameId,
    ImagePair,
    RegistrationStatus,
    VerifiedPair,
)
from tests.support.synthetic import (
    Photos,
    PoseErrors,
    SyntheticCamera,
    SyntheticWorld,
    View,
    ground,
    grow,
    grown_map,
    map_of_keyframes,
    pose_errors,
    poses_of,
    repeated_place,
    straight_path,
)

NUM_FRAMES = 10
ONE, TWO, THREE, FOUR, FIVE = (FrameId(i) for i in range(1, 6))


@pytest.fixture(scope="module")
def exact_world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(NUM_FRAMES), density=1.0)


@pytest.fixture(scope="module")
def noisy_world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(NUM_FRAMES), density=1.0, noise_px=0.5)


@pytest.fixture
def exact_map(exact_world: SyntheticWorld) -> SparseMap:
    return grown_map(exact_world)


def errors_of(sparse_map: SparseMap, world: SyntheticWorld) -> PoseErrors:
    return pose_errors(poses_of(sparse_map), world)


def num_true_observations(sparse_map: SparseMap, world: SyntheticWorld) -> tuple[int, int]:
    """Observations of the one world point that most of a track sees, and all observations."""
    num_true = num = 0
    for point in sparse_map.reconstruction.points3D.values():
        seen = [
            int(world.view(element.image_id).point_ids[element.point2D_idx])
            for element in point.track.elements
        ]
        num_true += max(map(seen.count, seen))
        num += len(seen)
    return num_true, num


def rows_of(pair: VerifiedPair, frame_id: FrameId) -> list[int]:
    """Rows of a keyframe that a pair matches."""
    rows: list[int] = pair.inlier_matches_idx[:, int(frame_id == pair.pair.second)].tolist()
    return rows


def refine(sparse_map: SparseMap, frame_id: FrameId) -> None:
    sparse_map.complete_and_merge(frame_id)
    sparse_map.filter_touched([frame_id])


# -- growing --------------------------------------------------------------------------------------


def test_exact_matches_give_the_exact_poses(
    exact_map: SparseMap, exact_world: SyntheticWorld
) -> None:
    assert exact_map.registered_ids == exact_world.frame_ids == exact_map.keyframe_ids
    errors = errors_of(exact_map, exact_world)
    assert errors.max_ratio < 1e-6
    assert errors.max_rotation_rad < 1e-6
    assert exact_map.mean_reprojection_error_px() < 1e-6


def test_exact_matches_give_every_point_that_three_keyframes_see(
    exact_map: SparseMap, exact_world: SyntheticWorld
) -> None:
    seen = np.concatenate([exact_world.view(i).point_ids for i in exact_world.frame_ids])
    num_views = np.bincount(seen)
    assert exact_map.num_points3D >= 0.95 * int((num_views >= 3).sum())
    assert exact_map.num_points3D <= int((num_views >= 2).sum())
    num_true, num = num_true_observations(exact_map, exact_world)
    assert num_true == num >= 0.95 * int(num_views[num_views >= 3].sum())


def test_noise_shows_in_the_poses_and_stays_bounded(noisy_world: SyntheticWorld) -> None:
    noisy_map = grown_map(noisy_world)
    assert noisy_map.num_registered == NUM_FRAMES
    errors = errors_of(noisy_map, noisy_world)
    assert 1e-5 < errors.rmse_ratio < 5e-3
    assert 0.3 < noisy_map.mean_reprojection_error_px() < 3.0


def test_a_fifth_of_wrong_matches_is_left_out(exact_world: SyntheticWorld) -> None:
    spoiled_map = grown_map(exact_world, wrong_ratio=0.2)
    assert spoiled_map.num_registered == NUM_FRAMES
    assert errors_of(spoiled_map, exact_world).max_ratio < 1e-3
    num_true, num = num_true_observations(spoiled_map, exact_world)
    assert num_true >= 0.97 * num  # some wrong matches lie on the right epipolar lines
    assert num >= 0.9 * num_true_observations(grown_map(exact_world), exact_world)[1]


def test_the_order_of_keyframes_and_pairs_does_not_matter(noisy_world: SyntheticWorld) -> None:
    maps = []
    for seed in range(3):
        shuffled = map_with_shuffled_pairs(noisy_world, seed=seed)
        grow(shuffled, noisy_world, noisy_world.frame_ids)
        maps.append(shuffled)
    for other in maps[1:]:
        assert abs(other.num_points3D - maps[0].num_points3D) <= 0.02 * maps[0].num_points3D
        for frame_id in noisy_world.frame_ids:
            np.testing.assert_allclose(
                other.cam_from_world(frame_id), maps[0].cam_from_world(frame_id), atol=1e-3
            )


def map_with_shuffled_pairs(world: SyntheticWorld, *, seed: int) -> SparseMap:
    rng = np.random.default_rng(seed)
    pairs = [
        world.verified_pair(first, second, wrong_ratio=0.1)
        for second in world.frame_ids
        for first in range(max(1, second - 4), second)
    ]
    return map_of_keyframes(
        world,
        frame_ids=rng.permutation(world.frame_ids).tolist(),
        skips=lambda pair: True,
        given_pairs=[pairs[idx] for idx in rng.permutation(len(pairs))],
    )


def test_the_same_input_gives_the_same_map_to_the_last_bit(noisy_world: SyntheticWorld) -> None:
    one, other = grown_map(noisy_world), grown_map(noisy_world)
    for frame_id in noisy_world.frame_ids:
        assert np.array_equal(one.cam_from_world(frame_id), other.cam_from_world(frame_id))
    assert np.array_equal(
        one.point_cloud().points3D_in_world, other.point_cloud().points3D_in_world
    )


def test_a_keyframe_that_sees_nothing_of_the_map_waits(exact_world: SyntheticWorld) -> None:
    sparse_map = map_of_keyframes(exact_world)
    grow(sparse_map, exact_world, [1, 2])
    registration = sparse_map.register(FrameId(9), min_inlier_ratio=0.25)
    assert registration.status is RegistrationStatus.TOO_FEW_CORRESPONDENCES
    assert registration.num_correspondences < 20
    assert not sparse_map.is_registered(FrameId(9))


def test_a_low_share_of_inliers_is_refused_until_it_is_accepted(
    exact_world: SyntheticWorld,
) -> None:
    sparse_map = map_of_keyframes(exact_world, wrong_ratio=0.5)
    grow(sparse_map, exact_world, [1, 2])
    refused = sparse_map.register(THREE, min_inlier_ratio=0.65)
    assert refused.status is RegistrationStatus.TOO_FEW_INLIERS
    assert not sparse_map.is_registered(THREE)
    assert (sparse_map.point3D_ids(THREE) == -1).all()
    accepted = sparse_map.register(THREE, min_inlier_ratio=0.25)
    assert accepted.status is RegistrationStatus.REGISTERED
    assert accepted.num_inliers == refused.num_inliers >= 20


def test_the_first_camera_is_the_world_and_the_baseline_as_given(
    exact_world: SyntheticWorld,
) -> None:
    sparse_map = map_of_keyframes(exact_world)
    second_from_first = compose_poses(exact_world.pose(2), invert_pose(exact_world.pose(1)))
    second_from_first[:, 3] *= 7.0
    num_points = sparse_map.initialize(ONE, TWO, second_from_first=second_from_first)
    assert num_points == sparse_map.num_points3D > 100
    np.testing.assert_array_equal(sparse_map.cam_from_world(ONE), np.eye(4)[:3])
    np.testing.assert_allclose(sparse_map.cam_from_world(TWO), second_from_first, atol=1e-12)


# -- taking out -----------------------------------------------------------------------------------


def test_a_keyframe_taken_out_comes_back_to_the_same_place(
    exact_map: SparseMap, exact_world: SyntheticWorld
) -> None:
    before = exact_map.cam_from_world(FIVE)
    num_observed = int((exact_map.point3D_ids(FIVE) >= 0).sum())
    exact_map.deregister([FIVE])
    assert not exact_map.is_registered(FIVE)
    assert FIVE not in exact_map.registered_ids
    assert FIVE not in exact_map.covisibility(FOUR)
    assert (exact_map.point3D_ids(FIVE) == -1).all()
    registration = exact_map.register(FIVE, min_inlier_ratio=0.65)
    assert registration.status is RegistrationStatus.REGISTERED
    exact_map.triangulate(FIVE)
    refine(exact_map, FIVE)
    np.testing.assert_allclose(exact_map.cam_from_world(FIVE), before, atol=1e-6)
    assert int((exact_map.point3D_ids(FIVE) >= 0).sum()) >= 0.95 * num_observed
    assert exact_map.reconstruction.is_valid()
    assert errors_of(exact_map, exact_world).max_ratio < 1e-6


def test_most_of_a_map_can_be_taken_out_and_grow_again(
    exact_map: SparseMap, exact_world: SyntheticWorld
) -> None:
    exact_map.deregister([FrameId(i) for i in range(3, NUM_FRAMES + 1)])
    assert exact_map.registered_ids == [ONE, TWO]
    for frame_id in exact_world.frame_ids[2:]:
        assert (
            exact_map.register(frame_id, min_inlier_ratio=0.65).status
            is RegistrationStatus.REGISTERED
        )
        exact_map.triangulate(frame_id)
    assert exact_map.retriangulate() >= 0
    assert errors_of(exact_map, exact_world).max_ratio < 1e-6
    assert exact_map.reconstruction.is_valid()


def test_a_distrusted_pair_poses_nothing(exact_world: SyntheticWorld) -> None:
    sparse_map = map_of_keyframes(exact_world, frame_ids=[1, 2, 3])
    grow(sparse_map, exact_world, [1, 2])
    assert sparse_map.num_visible_points(THREE) > 50
    sparse_map.distrust_pair(ImagePair(ONE, THREE))
    sparse_map.distrust_pair(ImagePair(TWO, THREE))
    assert sparse_map.num_visible_points(THREE) == 0
    registration = sparse_map.register(THREE, min_inlier_ratio=0.25)
    assert registration.status is RegistrationStatus.TOO_FEW_CORRESPONDENCES
    assert sparse_map.neighbors(THREE) == {}


# -- filtering ------------------------------------------------------------------------------------


def test_filtering_removes_the_points_that_do_not_fit(
    exact_map: SparseMap, exact_world: SyntheticWorld
) -> None:
    num_points = exact_map.num_points3D
    ids = exact_map.point3D_ids(FIVE)
    moved = [int(i) for i in ids[ids >= 0][:7]]
    for point3D_id in moved:
        exact_map.reconstruction.point3D(point3D_id).xyz += (3.0, 0.0, 0.0)
    assert exact_map.filter_all() > 0
    assert not any(exact_map.reconstruction.exists_point3D(i) for i in moved)
    assert exact_map.num_points3D == num_points - len(moved)
    assert exact_map.reconstruction.is_valid()
    exact_map.triangulate(FIVE)
    refine(exact_map, FIVE)
    assert exact_map.num_points3D == num_points
    assert errors_of(exact_map, exact_world).max_ratio < 1e-6


def test_filtering_what_was_touched_leaves_far_points_alone(exact_map: SparseMap) -> None:
    exact_map.filter_touched([])
    near, far = (exact_map.point3D_ids(FrameId(i)) for i in (1, NUM_FRAMES))
    spoiled_near, spoiled_far = int(near[near >= 0][0]), int(far[far >= 0][0])
    for point3D_id in (spoiled_near, spoiled_far):
        exact_map.reconstruction.point3D(point3D_id).xyz += (3.0, 0.0, 0.0)
    assert exact_map.filter_touched([ONE]) > 0
    assert not exact_map.reconstruction.exists_point3D(spoiled_near)
    assert exact_map.reconstruction.exists_point3D(spoiled_far)


def test_retriangulation_fills_an_emptied_map(exact_map: SparseMap) -> None:
    num_points = exact_map.num_points3D
    for point3D_id in list(exact_map.reconstruction.point3D_ids()):
        exact_map.reconstruction.point3D(point3D_id).xyz += (50.0, 0.0, 0.0)
    exact_map.filter_all()
    assert exact_map.num_points3D == 0
    assert exact_map.mean_reprojection_error_px() == 0.0
    assert exact_map.retriangulate() > 0
    assert exact_map.num_points3D >= 0.8 * num_points
    assert len(exact_map.point_cloud().colors) == exact_map.num_points3D


def test_a_large_map_is_filtered_and_completed_in_slices_with_the_same_outcome(
    exact_map: SparseMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = sorted(exact_map.reconstruction.point3D_ids())
    split = exact_map.reconstruction.point3D(ids[5]).track.elements[0]
    exact_map.reconstruction.point3D(ids[0]).xyz += (3.0, 0.0, 0.0)
    exact_map.reconstruction.point3D(ids[-1]).xyz += (3.0, 0.0, 0.0)
    exact_map.reconstruction.delete_observation(split.image_id, split.point2D_idx)
    outcomes = []
    for at_once in (10**6, 7):
        one = exact_map.copy()
        monkeypatch.setattr("engine.mapping.model.sparse_map._POINTS_AT_ONCE", at_once)
        num_filtered, num_changed = one.filter_all(), one.retriangulate()
        assert num_filtered > 0
        assert num_changed > 0
        assert one.reconstruction.is_valid()
        model = one.reconstruction
        tracks = {
            tuple(sorted((e.image_id, e.point2D_idx) for e in point.track.elements))
            for point in model.points3D.values()
        }
        outcomes.append((num_filtered, tracks))
    assert outcomes[0] == outcomes[1]


# -- reading --------------------------------------------------------------------------------------


def test_the_cloud_tells_positions_colours_and_makers(
    exact_map: SparseMap, exact_world: SyntheticWorld
) -> None:
    refine(exact_map, FrameId(NUM_FRAMES))
    cloud = exact_map.point_cloud()
    points = exact_map.reconstruction.points3D
    assert len(cloud.points3D_in_world) == len(points) == exact_map.num_points3D
    makers = set(cloud.first_keyframe_ids.tolist())
    assert makers <= set(exact_world.frame_ids)
    assert len(makers) >= NUM_FRAMES - 3
    for row, point in enumerate(points.values()):
        np.testing.assert_allclose(cloud.points3D_in_world[row], point.xyz, rtol=1e-5, atol=1e-5)
        element = point.track.element(0)
        point_id = int(exact_world.view(element.image_id).point_ids[element.point2D_idx])
        assert tuple(cloud.colors[row].tolist()) == exact_world.color(point_id)


def test_each_keypoint_tells_its_point(exact_map: SparseMap, exact_world: SyntheticWorld) -> None:
    ids = exact_map.point3D_ids(FOUR)
    assert len(ids) == len(exact_world.view(FOUR).point_ids)
    points2D = exact_map.reconstruction.image(FOUR).points2D
    for row, point3D_id in enumerate(ids.tolist()):
        assert points2D[row].has_point3D() == (point3D_id >= 0)
        if point3D_id >= 0:
            elements = exact_map.reconstruction.point3D(point3D_id).track.elements
            assert (FOUR, row) in {(e.image_id, e.point2D_idx) for e in elements}
    seen = ids[ids >= 0].tolist()
    positions = exact_map.points3D_in_world(seen)
    assert positions.shape == (len(seen), 3)
    np.testing.assert_array_equal(positions[0], exact_map.reconstruction.point3D(seen[0]).xyz)
    assert exact_map.points3D_in_world([]).shape == (0, 3)


def test_covisibility_counts_shared_points_most_first(exact_map: SparseMap) -> None:
    def points_of(frame_id: int) -> set[int]:
        return set(exact_map.point3D_ids(FrameId(frame_id)).tolist()) - {-1}

    shared = exact_map.covisibility(FIVE)
    assert FIVE not in shared
    assert dict(shared) == {
        other: len(points_of(5) & points_of(other))
        for other in exact_map.registered_ids
        if other != 5 and points_of(5) & points_of(other)
    }
    assert list(shared.values()) == sorted(shared.values(), reverse=True)


def test_the_covisibility_of_all_keyframes_at_once_is_that_of_each(exact_map: SparseMap) -> None:
    at_once = exact_map.copy()
    at_once.count_covisibility()
    for frame_id in exact_map.registered_ids:
        one_by_one = exact_map.covisibility(frame_id)
        assert list(at_once.covisibility(frame_id).items()) == list(one_by_one.items())
        assert one_by_one
    at_once.deregister([FOUR])
    at_once.count_covisibility()
    assert FOUR not in at_once.covisibility(FIVE)


def test_covisibility_follows_every_change(exact_world: SyntheticWorld) -> None:
    sparse_map = map_of_keyframes(exact_world)
    assert sparse_map.covisibility(ONE) == {}
    grow(sparse_map, exact_world, [1, 2])
    assert list(sparse_map.covisibility(ONE)) == [TWO]
    sparse_map.register(THREE, min_inlier_ratio=0.25)
    assert set(sparse_map.covisibility(ONE)) == {TWO, THREE}
    sparse_map.deregister([TWO])
    assert TWO not in sparse_map.covisibility(ONE)


def test_a_copy_stays_as_it_was(exact_map: SparseMap) -> None:
    copy = exact_map.copy_reconstruction()
    num_points, pose = copy.num_points3D(), copy.image(FIVE).cam_from_world().matrix()
    exact_map.set_pose(FIVE, np.eye(4)[:3])
    exact_map.deregister([FOUR])
    assert copy.num_points3D() == num_points
    assert copy.image(FOUR).has_pose
    np.testing.assert_array_equal(copy.image(FIVE).cam_from_world().matrix(), pose)


def test_the_reconstruction_survives_writing_and_reading(
    exact_map: SparseMap, tmp_path: Path
) -> None:
    exact_map.reconstruction.write_binary(str(tmp_path))
    read = pycolmap.Reconstruction(str(tmp_path))
    assert read.is_valid()
    assert read.num_points3D() == exact_map.num_points3D
    assert sorted(read.reg_image_ids()) == exact_map.registered_ids


# -- what changes later ---------------------------------------------------------------------------


def moved_keypoints(sparse_map: SparseMap, frame_id: FrameId, rows: list[int]) -> Features:
    """A keyframe's table in which some rows are elsewhere."""
    features = sparse_map.keyframe(frame_id).features
    keypoints_xy = features.keypoints_xy.copy()
    keypoints_xy[rows] += (3.0, -2.0)
    return dataclasses.replace(features, keypoints_xy=keypoints_xy)


def points2D_xy(reconstruction: pycolmap.Reconstruction, frame_id: FrameId) -> Float64Array:
    return np.array([point.xy for point in reconstruction.image(frame_id).points2D])


def test_rows_without_a_match_may_move_and_nothing_else_does(exact_world: SyntheticWorld) -> None:
    sparse_map = grown_map(exact_world, max_gap=1)
    matched = {row for pair in sparse_map.neighbors(THREE).values() for row in rows_of(pair, THREE)}
    rows = sorted(set(range(len(sparse_map.keyframe(THREE).features))) - matched)[:3]
    assert len(rows) == 3
    assert len(matched) > 100
    point3D_ids, pose = sparse_map.point3D_ids(THREE), sparse_map.cam_from_world(THREE)
    former_xy = sparse_map.keyframe(THREE).features.keypoints_xy
    copy = sparse_map.copy_reconstruction()
    features = moved_keypoints(sparse_map, THREE, rows)
    sparse_map.replace_features(features)
    now_xy = sparse_map.keyframe(THREE).features.keypoints_xy
    assert np.array_equal(now_xy, features.keypoints_xy)
    assert np.array_equal(points2D_xy(sparse_map.reconstruction, THREE), features.keypoints_xy)
    assert np.array_equal(points2D_xy(copy, THREE), former_xy)
    assert np.array_equal(sparse_map.point3D_ids(THREE), point3D_ids)
    assert np.array_equal(sparse_map.cam_from_world(THREE), pose)
    assert sparse_map.reconstruction.is_valid()


def test_a_match_with_a_row_that_moved_counts_at_its_new_place(exact_world: SyntheticWorld) -> None:
    """Keyframe 1 comes with rows out of place; they are put right before anything matches them."""
    keyframe = exact_world.keyframe(1)
    away_xy = keyframe.features.keypoints_xy + (40.0, 30.0)
    away = dataclasses.replace(keyframe.features, keypoints_xy=away_xy)
    sparse_map = SparseMap(
        triangulation=TriangulationConfig(), registration=RegistrationConfig(), seed=0
    )
    sparse_map.add_camera("camera", exact_world.camera(1).as_colmap())
    sparse_map.add_keyframe(dataclasses.replace(keyframe, features=away), [])
    sparse_map.replace_features(keyframe.features)
    for number in range(2, NUM_FRAMES + 1):
        pairs = [exact_world.verified_pair(other, number) for other in range(1, number)][-4:]
        sparse_map.add_keyframe(exact_world.keyframe(number), pairs)
    grow(sparse_map, exact_world, exact_world.frame_ids)
    assert errors_of(sparse_map, exact_world).max_ratio < 1e-6
    assert sparse_map.mean_reprojection_error_px() < 1e-6


def test_a_table_of_another_length_or_keyframe_is_refused(exact_map: SparseMap) -> None:
    features = exact_map.keyframe(THREE).features
    shorter = dataclasses.replace(
        features,
        **{
            name: getattr(features, name)[:-1]
            for name in ("keypoints_xy", "descriptors", "scales", "colors", "is_free")
        },
    )
    with pytest.raises(MapError, match=rf"keyframe 3 has no table of {len(shorter)} rows"):
        exact_map.replace_features(shorter)
    with pytest.raises(MapError, match="keyframe 99 has no table"):
        exact_map.replace_features(dataclasses.replace(features, frame_id=FrameId(99)))
    assert exact_map.keyframe(THREE).features is features


@pytest.mark.parametrize("factor", [0.25, 7.0])
def test_scaling_makes_all_lengths_longer_and_changes_no_pixel(
    exact_map: SparseMap, factor: float
) -> None:
    before_px = exact_map.mean_reprojection_error_px()
    poses, ids = poses_of(exact_map), list(exact_map.reconstruction.point3D_ids())
    points = exact_map.points3D_in_world(ids)
    exact_map.scale(factor)
    assert np.allclose(exact_map.points3D_in_world(ids), factor * points)
    for frame_id, pose in poses_of(exact_map).items():
        assert np.allclose(pose[:, :3], poses[frame_id][:, :3])
        assert np.allclose(pose[:, 3], factor * poses[frame_id][:, 3])
    assert abs(exact_map.mean_reprojection_error_px() - before_px) < 1e-9


def test_a_scaled_map_grows_on(exact_world: SyntheticWorld) -> None:
    sparse_map = map_of_keyframes(exact_world)
    grow(sparse_map, exact_world, [1, 2, 3, 4])
    sparse_map.scale(5.0)
    for frame_id in map(FrameId, range(5, NUM_FRAMES + 1)):
        registration = sparse_map.register(frame_id, min_inlier_ratio=0.25)
        assert registration.status is RegistrationStatus.REGISTERED
        sparse_map.triangulate(frame_id)
    assert errors_of(sparse_map, exact_world).max_ratio < 1e-6
    centers = camera_center(np.array(list(poses_of(sparse_map).values())))
    true_centers = camera_center(exact_world.poses)
    length, true_length = (np.linalg.norm(c[-1] - c[0]) for c in (centers, true_centers))
    assert abs(length / true_length - 5.0) < 1e-6


# -- cameras --------------------------------------------------------------------------------------


def test_cameras_are_kept_under_their_keys() -> None:
    cameras = (SyntheticCamera.known("left"), SyntheticCamera.known("right", focal_px=600.0))
    world = SyntheticWorld(straight_path(6), cameras=cameras)
    sparse_map = grown_map(world)
    with pytest.raises(KeyError):
        sparse_map.camera("up")
    assert sparse_map.camera("left").camera_id != sparse_map.camera("right").camera_id
    assert sparse_map.camera("right").mean_focal_length() == 600.0
    assert sparse_map.camera("left").mean_focal_length() == 800.0
    assert errors_of(sparse_map, world).max_ratio < 1e-6
    sparse_map.set_camera_params("left", (700.0, 500.0, 375.0, 0.01))
    assert sparse_map.camera("left").params.tolist() == [700.0, 500.0, 375.0, 0.01]


def test_pixel_thresholds_grow_with_the_image(exact_world: SyntheticWorld) -> None:
    """A point 4 px off passes where 3 px at 1000 px edge are 12 px at 4000."""
    small = grown_map(exact_world)
    large_camera = SyntheticCamera(
        width=4000, height=3000, params=(3200.0, 2000.0, 1500.0, 0.0), prior=None
    )
    large = grown_map(SyntheticWorld(straight_path(NUM_FRAMES), cameras=[large_camera]))
    for sparse_map, survives in ((small, False), (large, True)):
        focal_px = sparse_map.camera("camera").mean_focal_length()
        ids = sparse_map.point3D_ids(ONE)
        point3D_id = int(ids[ids >= 0][0])
        image = sparse_map.reconstruction.image(ONE)
        row = int(np.flatnonzero(ids == point3D_id)[0])
        image.points2D[row].xy += (4.0, 0.0)
        assert focal_px in (800.0, 3200.0)
        sparse_map.filter_all()
        assert bool(sparse_map.point3D_ids(ONE)[row] >= 0) is survives


# -- constant cameras -----------------------------------------------------------------------------


def test_cameras_are_constant_where_they_were_added_so_and_in_copies_of_the_map(
    exact_world: SyntheticWorld,
) -> None:
    sparse_map = map_of_keyframes(exact_world, is_constant=True)
    sparse_map.add_camera("other", exact_world.camera(1).as_colmap())
    constant = {sparse_map.camera("camera").camera_id}
    assert sparse_map.constant_camera_ids == sparse_map.copy().constant_camera_ids == constant


# -- refusals -------------------------------------------------------------------------------------


def test_a_camera_is_added_once(exact_map: SparseMap, exact_world: SyntheticWorld) -> None:
    with pytest.raises(MapError, match="camera camera was added before"):
        exact_map.add_camera("camera", exact_world.camera(1).as_colmap())


Pairs = Callable[[SyntheticWorld], list[VerifiedPair]]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (lambda world: [world.verified_pair(1, 2)], "does not join the new keyframe 4"),
        (lambda world: [world.verified_pair(3, 4), world.verified_pair(4, 5)], "of this map"),
        (lambda world: [world.verified_pair(3, 4), world.verified_pair(4, 3)], "added before"),
    ],
    ids=["foreign", "unknown", "twice"],
)
def test_a_keyframe_with_a_pair_that_does_not_fit_changes_nothing(
    exact_world: SyntheticWorld, pairs: Pairs, message: str
) -> None:
    sparse_map = map_of_keyframes(exact_world, frame_ids=[1, 2, 3])
    with pytest.raises(MapError, match=message):
        sparse_map.add_keyframe(exact_world.keyframe(4), pairs(exact_world))
    assert sparse_map.keyframe_ids == [1, 2, 3]
    sparse_map.add_keyframe(exact_world.keyframe(4), [exact_world.verified_pair(3, 4)])
    grow(sparse_map, exact_world, [1, 2, 3, 4])
    assert errors_of(sparse_map, exact_world).max_ratio < 1e-6


def test_a_known_keyframe_or_an_unknown_camera_is_refused(exact_world: SyntheticWorld) -> None:
    sparse_map = map_of_keyframes(exact_world, frame_ids=[1, 2])
    with pytest.raises(MapError, match="keyframe 2 was added before"):
        sparse_map.add_keyframe(exact_world.keyframe(2), [])
    stranger = dataclasses.replace(exact_world.keyframe(3), calibration_key="stranger")
    with pytest.raises(MapError, match="camera stranger is unknown"):
        sparse_map.add_keyframe(stranger, [])


def test_registering_twice_is_refused(exact_map: SparseMap) -> None:
    with pytest.raises(MapError, match="keyframe 5 is registered already"):
        exact_map.register(FIVE, min_inlier_ratio=0.25)
    with pytest.raises(MapError, match="the map is initialised already"):
        exact_map.initialize(ONE, TWO, second_from_first=np.eye(4)[:3])


def test_only_what_is_registered_can_be_taken_out(exact_world: SyntheticWorld) -> None:
    sparse_map = map_of_keyframes(exact_world)
    grow(sparse_map, exact_world, [1, 2, 3])
    with pytest.raises(MapError, match="keyframe 5 is not registered"):
        sparse_map.deregister([THREE, FIVE])
    assert sparse_map.registered_ids == [1, 2, 3]


def test_a_keyframe_without_keypoints_is_harmless() -> None:
    world = SyntheticWorld(straight_path(4), points=np.empty((0, 3)))
    sparse_map = map_of_keyframes(world)
    assert sparse_map.keyframe_ids == [1, 2, 3, 4]
    assert sparse_map.point3D_ids(ONE).shape == (0,)
    registration = sparse_map.register(ONE, min_inlier_ratio=0.25)
    assert registration.status is RegistrationStatus.TOO_FEW_CORRESPONDENCES
    assert sparse_map.point_cloud().points3D_in_world.shape == (0, 3)
    assert sparse_map.num_points3D == sparse_map.num_registered == 0


def test_two_view_points_are_made_when_asked_for(exact_world: SyntheticWorld) -> None:
    config = TriangulationConfig(ignore_two_view_tracks=False)
    generous = grown_map(exact_world, triangulation=config)
    strict = grown_map(exact_world)
    assert generous.num_points3D > strict.num_points3D


# -- trying things on a copy ----------------------------------------------------------------------


def test_a_copy_and_the_map_change_apart_from_each_other(exact_world: SyntheticWorld) -> None:
    sparse_map = grown_map(exact_world)
    poses, num_points = poses_of(sparse_map), sparse_map.num_points3D
    twin = sparse_map.copy()
    assert np.array_equal(
        np.sort(twin.point_cloud().points3D_in_world, axis=0),
        np.sort(sparse_map.point_cloud().points3D_in_world, axis=0),
    )
    last = sparse_map.registered_ids[-1]
    twin.deregister([last])
    twin.scale(2.0)
    assert not twin.is_registered(last)
    assert twin.num_points3D <= num_points
    assert sparse_map.num_points3D == num_points
    for frame_id, pose in poses.items():
        assert np.array_equal(sparse_map.cam_from_world(frame_id), pose)
    assert sparse_map.reconstruction.is_valid()
    assert twin.reconstruction.is_valid()


def test_a_copy_goes_on_growing(exact_world: SyntheticWorld) -> None:
    sparse_map = map_of_keyframes(exact_world)
    grow(sparse_map, exact_world, exact_world.frame_ids[:-1])
    twin, last = sparse_map.copy(), exact_world.frame_ids[-1]
    first_from_true_world = exact_world.pose(exact_world.frame_ids[0])  # the map's world
    pose = compose_poses(exact_world.pose(last), invert_pose(first_from_true_world))
    twin.place({last: pose})
    assert twin.is_registered(last)
    assert twin.fit([last]).num_observations == 0
    twin.triangulate(last)
    assert twin.fit([last]).num_observations > 20
    assert len(twin.point_cloud().colors) == twin.num_points3D
    assert not sparse_map.is_registered(last)


def test_the_fit_falls_when_a_keyframe_is_moved(exact_world: SyntheticWorld) -> None:
    sparse_map = grown_map(exact_world)
    some = sparse_map.registered_ids[2:4]
    before = sparse_map.fit(some)
    assert before.num_observations > 50
    assert 0.0 <= before.mean_error_px < 0.5
    assert 0.9 * before.num_observations < before.gain <= before.num_observations
    pose = sparse_map.cam_from_world(some[0]).copy()
    pose[:, 3] += 0.02
    sparse_map.place({some[0]: pose})
    after = sparse_map.fit(some)
    assert after.num_observations == before.num_observations
    assert after.mean_error_px > before.mean_error_px + 0.1
    assert after.gain < before.gain


def test_a_map_without_the_keyframes_fits_nothing(exact_world: SyntheticWorld) -> None:
    nothing = map_of_keyframes(exact_world).fit(exact_world.frame_ids)
    assert (nothing.num_observations, nothing.mean_error_px, nothing.gain) == (0, 0.0, 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_pose_that_is_not_finite_is_refused(exact_world: SyntheticWorld, value: float) -> None:
    sparse_map = map_of_keyframes(exact_world)
    grow(sparse_map, exact_world, exact_world.frame_ids[:4])
    known, other = sparse_map.registered_ids[-1], exact_world.frame_ids[5]
    before = sparse_map.cam_from_world(known)
    spoiled = before.copy()
    spoiled[1, 3] = value
    for frame_id in (known, other):
        with pytest.raises(MapError, match=f"keyframe {frame_id} is not finite"):
            sparse_map.place({frame_id: spoiled})
    np.testing.assert_array_equal(sparse_map.cam_from_world(known), before)
    assert not sparse_map.is_registered(other)


def test_placing_a_keyframe_that_is_not_there_is_refused(exact_world: SyntheticWorld) -> None:
    sparse_map = grown_map(exact_world)
    with pytest.raises(MapError, match="keyframe 999 is not in the map"):
        sparse_map.place({FrameId(999): np.eye(4)[:3]})


def test_a_map_is_as_the_model_of_another_one(noisy_world: SyntheticWorld) -> None:
    former = grown_map(noisy_world)
    model = former.copy_reconstruction()
    sparse_map = map_of_keyframes(noisy_world)
    sparse_map.take_model(model)
    assert sparse_map.registered_ids == former.registered_ids
    assert sparse_map.num_points3D == former.num_points3D > 100
    for frame_id in former.registered_ids:
        pose, former_pose = (one.cam_from_world(frame_id) for one in (sparse_map, former))
        assert np.allclose(pose, former_pose, atol=1e-12)
        assert sparse_map.covisibility(frame_id) == former.covisibility(frame_id)
    colors, former_colors = (np.sort(o.point_cloud().colors, 0) for o in (sparse_map, former))
    assert np.array_equal(colors, former_colors)
    assert sparse_map.retriangulate() >= 0
    with pytest.raises(MapError, match="initialised already"):
        sparse_map.take_model(model)


def test_what_a_map_does_not_hold_is_not_taken_from_a_model(noisy_world: SyntheticWorld) -> None:
    model = grown_map(noisy_world).copy_reconstruction()
    sparse_map = map_of_keyframes(noisy_world, frame_ids=noisy_world.frame_ids[:-3])
    sparse_map.take_model(model)
    assert sparse_map.registered_ids == noisy_world.frame_ids[:-3]
    assert 0 < sparse_map.num_points3D < model.num_points3D()
    shortest = min(p.track.length() for p in sparse_map.reconstruction.points3D.values())
    assert shortest >= 2


def test_pairs_are_forgotten_with_the_observations_that_they_alone_lead_to() -> None:
    world = SyntheticWorld(straight_path(8))
    sparse_map = grown_map(world)
    left, kept = (ONE, TWO), range(3, 9)
    before = {i: sparse_map.point3D_ids(FrameId(i)) for i in kept}
    length = {
        point3D_id: sparse_map.reconstruction.point3D(point3D_id).track.length()
        for point3D_id in sparse_map.reconstruction.point3D_ids()
    }
    assert max(length.values()) >= 5
    sparse_map.forget_pairs(
        [verified.pair for frame_id in left for verified in sparse_map.neighbors(frame_id).values()]
    )
    assert [sparse_map.num_observations(i) for i in left] == [0, 0]
    remaining = sparse_map.reconstruction.point3D_ids()
    for i, ids in before.items():
        still = np.isin(ids, list(remaining))
        assert np.array_equal(sparse_map.point3D_ids(FrameId(i))[still], ids[still])
        assert np.count_nonzero(still) > 50


@pytest.mark.parametrize("kind", [SyntheticWorld, Photos])
def test_a_keyframe_waits_while_pairs_show_two_places_for_it(kind: type[SyntheticWorld]) -> None:
    """Two places look alike; what else the keyframe shows is not matched."""
    poses = straight_path(26)
    points, looks_like = repeated_place(
        ground(poses, density=1.0), x_range=(-9.0, 15.0), shift=40.0, ratio=0.5
    )
    world = kind(poses, points=points, looks_like=looks_like, noise_px=0.1)
    alike = looks_like != np.arange(len(points))
    among = {*np.flatnonzero(alike).tolist(), *looks_like[alike].tolist()}

    def registered(
        others: tuple[int, ...],
        *,
        wrong_ratio: float = 0.0,
        decides: bool = False,
        num_credible: int = 9,  # poses, of those that are asked for
    ) -> RegistrationStatus:
        sparse_map = map_of_keyframes(
            world,
            skips=lambda pair: THREE in (pair.first, pair.second),
            given_pairs=[
                world.verified_pair(
                    THREE, other, wrong_ratio=wrong_ratio if other > 9 else 0.0, among=among
                )
                for other in others
            ],
        )
        grow(sparse_map, world, [i for i in world.frame_ids if i != THREE])
        credible = iter([True] * num_credible)
        status = sparse_map.register(
            THREE,
            min_inlier_ratio=0.25,
            decides=decides,
            is_credible=lambda pose: next(credible, False),
        ).status
        if status is RegistrationStatus.REGISTERED and 5 in others and not decides:
            assert errors_of(sparse_map, world).rmse_ratio < 5e-3
        return status

    assert registered((5,)) is RegistrationStatus.REGISTERED
    assert registered((22, 23, 24)) is RegistrationStatus.REGISTERED
    assert registered((4, 5, 22), wrong_ratio=0.35) is RegistrationStatus.REGISTERED
    if kind is Photos:
        assert registered((5, 22)) is RegistrationStatus.AMBIGUOUS
        assert registered((4, 5, 22), decides=True) is RegistrationStatus.REGISTERED
    else:  # what it shows with those close to it is its place, and the rest may be a loop
        assert registered((5, 22)) is RegistrationStatus.REGISTERED
        assert registered((5, 21, 22, 23)) is RegistrationStatus.REGISTERED
        assert registered((5, 21, 22, 23), num_credible=1) is RegistrationStatus.AMBIGUOUS


class MovedThings(SyntheticWorld):
    """Three tenths of what is seen stand elsewhere in one frame, all by the same."""

    def view(self, frame_id: int) -> View:
        still = self.points
        if frame_id == FIVE:
            has_moved = np.arange(len(still)) % 10 < 3
            self.points = still + np.where(has_moved[:, None], (0.0, 2.0, 0.0), 0.0)
        view = super().view(frame_id)
        self.points = still
        return view


def test_what_moved_makes_no_second_place() -> None:
    world = MovedThings(straight_path(8), density=1.0, noise_px=0.2)
    sparse_map = map_of_keyframes(world)
    grow(sparse_map, world, [i for i in world.frame_ids if i != FIVE])
    registration = sparse_map.register(FIVE, min_inlier_ratio=0.25)
    ratio = registration.num_inliers / registration.num_correspondences
    assert registration.status is RegistrationStatus.REGISTERED, (registration, ratio)
    assert 0.65 < ratio < 0.79
    assert errors_of(sparse_map, world).rmse_ratio < 5e-3
