"""Laws of poses and rotations, extreme ones too."""

from __future__ import annotations

import numpy as np
import pycolmap
import pytest

from engine.geometry import (
    camera_center,
    compose_poses,
    image_scale,
    interpolate_poses,
    invert_pose,
    pose_in_other_world,
    quat_xyzw_from_rotation,
    rotation_angle_rad,
    rotation_between,
    rotation_from_quat_xyzw,
    rotation_from_vector,
    rotation_vector_from,
    similarity_between_poses,
    skew,
    spread_over_image,
    transform_points,
    usable_at,
)
from engine.types import Float64Array

EXACT = 1e-12
ANGLES_RAD = (0.0, 1e-12, 1e-9, 1e-7, 1e-3, 1.0, 3.0, np.pi - 1e-7, np.pi - 1e-12, np.pi)


def random_axes(num: int, *, seed: int) -> Float64Array:
    """Unit vectors (num, 3), the coordinate axes and one diagonal first."""
    axes = np.random.default_rng(seed).normal(size=(num, 3))
    axes[:4] = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, -1.0, 0.0]]
    return np.asarray(axes / np.linalg.norm(axes, axis=1, keepdims=True))


def extreme_rotation_vectors() -> Float64Array:
    """Rotation vectors (N, 3) of no turn, half a turn and everything between."""
    axes = random_axes(20, seed=1)
    return np.concatenate([angle * axes for angle in ANGLES_RAD])


def random_poses(num: int, *, seed: int = 0) -> Float64Array:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(scale=2.0, size=(num, 3))
    rotations = np.array([rotation_from_vector(vector) for vector in vectors])
    return np.concatenate([rotations, rng.normal(scale=5.0, size=(num, 3, 1))], axis=2)


# -- poses ----------------------------------------------------------------------------------------


def test_the_inverse_of_the_inverse_is_the_pose() -> None:
    poses = random_poses(50)
    assert np.abs(invert_pose(invert_pose(poses)) - poses).max() < EXACT


def test_a_pose_and_its_inverse_make_the_identity_in_both_orders() -> None:
    poses = random_poses(50)
    identity = np.eye(4)[:3]
    assert np.abs(compose_poses(poses, invert_pose(poses)) - identity).max() < EXACT
    assert np.abs(compose_poses(invert_pose(poses), poses) - identity).max() < EXACT


def test_many_poses_at_once_are_as_one_by_one() -> None:
    first, second = random_poses(7, seed=1), random_poses(7, seed=2)
    composed = compose_poses(first, second)

    assert np.allclose(composed, [compose_poses(a, b) for a, b in zip(first, second, strict=True)])
    assert np.allclose(invert_pose(first), [invert_pose(pose) for pose in first])
    assert np.allclose(camera_center(first), [camera_center(pose) for pose in first])


def test_composing_is_transforming_in_turn() -> None:
    c_from_b, b_from_a = random_poses(2)
    points_in_a = np.random.default_rng(3).normal(size=(10, 3))
    in_turn = transform_points(c_from_b, transform_points(b_from_a, points_in_a))
    assert np.allclose(transform_points(compose_poses(c_from_b, b_from_a), points_in_a), in_turn)


def test_poses_agree_with_colmaps() -> None:
    first, second = random_poses(2)
    composed = pycolmap.Rigid3d(first) * pycolmap.Rigid3d(second)
    assert np.allclose(compose_poses(first, second), composed.matrix())
    assert np.allclose(invert_pose(first), pycolmap.Rigid3d(first).inverse().matrix())


def test_the_camera_centre_is_the_origin_of_the_camera() -> None:
    (pose,) = random_poses(1)
    in_cam = transform_points(pose, camera_center(pose)[None])
    assert np.abs(in_cam).max() < EXACT


# -- rotations ------------------------------------------------------------------------------------


def test_a_quaternion_gives_the_rotation_colmap_gives() -> None:
    for quat_xyzw in np.random.default_rng(4).normal(size=(50, 4)):
        expected = pycolmap.Rotation3d(quat_xyzw / np.linalg.norm(quat_xyzw)).matrix()
        # The length of the quaternion does not matter.
        assert np.abs(rotation_from_quat_xyzw(quat_xyzw) - expected).max() < EXACT


def test_every_rotation_survives_being_a_quaternion() -> None:
    for vector in extreme_rotation_vectors():
        rotation = rotation_from_vector(vector)
        quat_xyzw = quat_xyzw_from_rotation(rotation)

        assert quat_xyzw[3] >= 0.0
        assert np.linalg.norm(quat_xyzw) == pytest.approx(1.0, abs=EXACT)
        assert np.abs(rotation_from_quat_xyzw(quat_xyzw) - rotation).max() < EXACT


def test_every_quaternion_survives_being_a_rotation() -> None:
    for quat_xyzw in random_axes(30, seed=5):
        with_real_part = np.append(quat_xyzw, 0.3)
        unit = with_real_part / np.linalg.norm(with_real_part)
        assert np.abs(quat_xyzw_from_rotation(rotation_from_quat_xyzw(unit)) - unit).max() < EXACT


def test_a_rotation_vector_turns_about_its_axis_by_its_length() -> None:
    rng = np.random.default_rng(6)
    for axis in random_axes(10, seed=7):
        across = np.cross(axis, rng.normal(size=3))
        for angle in ANGLES_RAD:
            rotation = rotation_from_vector(angle * axis)
            turned = np.cos(angle) * across + np.sin(angle) * np.cross(axis, across)

            assert np.abs(rotation @ axis - axis).max() < EXACT
            assert np.abs(rotation @ across - turned).max() < 1e-11
            assert np.abs(rotation @ rotation.T - np.eye(3)).max() < EXACT


def test_every_rotation_survives_being_a_vector() -> None:
    for vector in extreme_rotation_vectors():
        rotation = rotation_from_vector(vector)
        assert np.linalg.norm(rotation_vector_from(rotation)) <= np.pi + EXACT
        again = rotation_from_vector(rotation_vector_from(rotation))
        assert np.abs(again - rotation).max() < 1e-11


def test_the_angle_between_rotations_is_that_of_the_turn_between_them() -> None:
    start = rotation_from_vector(np.array([0.3, -1.1, 0.4]))
    for angle_rad in (0.0, 1e-3, 1.0, np.pi):
        turned = rotation_from_vector(np.array([0.0, angle_rad, 0.0])) @ start
        assert abs(rotation_angle_rad(start, turned) - angle_rad) < 1e-6
        assert rotation_angle_rad(turned, start) == rotation_angle_rad(start, turned)


def test_more_than_half_a_turn_is_the_shorter_turn_the_other_way() -> None:
    vector = rotation_vector_from(rotation_from_vector(np.array([0.0, 0.0, 1.5 * np.pi])))
    assert np.allclose(vector, [0.0, 0.0, -0.5 * np.pi])


def test_the_skew_matrix_is_the_cross_product() -> None:
    one, other = np.random.default_rng(8).normal(size=(2, 3))
    assert np.allclose(skew(one) @ other, np.cross(one, other))


# -- between two poses ----------------------------------------------------------------------------


def test_interpolation_starts_at_the_first_pose_and_ends_at_the_second() -> None:
    first, second = random_poses(2)
    assert np.allclose(interpolate_poses(first, second, fraction=0.0), first)
    assert np.allclose(interpolate_poses(first, second, fraction=1.0), second)


def test_the_middle_is_as_far_from_both_ends() -> None:
    first, second = random_poses(2, seed=9)
    middle = interpolate_poses(first, second, fraction=0.5)
    from_first = rotation_vector_from(middle[:, :3] @ first[:, :3].T)
    to_second = rotation_vector_from(second[:, :3] @ middle[:, :3].T)

    assert np.allclose(camera_center(middle), (camera_center(first) + camera_center(second)) / 2.0)
    assert np.allclose(from_first, to_second)
    assert np.linalg.norm(from_first) <= np.pi / 2.0


@pytest.mark.parametrize("angle", [0.0, 1e-9, np.pi - 1e-9, np.pi])
def test_interpolation_between_no_turn_and_half_a_turn_stays_a_rotation(angle: float) -> None:
    (first,) = random_poses(1)
    turn = rotation_from_vector(angle * random_axes(9, seed=10)[8])
    second = np.column_stack([turn @ first[:, :3], first[:, 3]])
    rotation = interpolate_poses(first, second, fraction=0.25)[:, :3]
    turned = np.linalg.norm(rotation_vector_from(rotation @ first[:, :3].T))

    assert np.allclose(rotation @ rotation.T, np.eye(3))
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    assert turned == pytest.approx(0.25 * angle, abs=1e-11)


def test_fractions_beyond_the_ends_extrapolate() -> None:
    first, second = random_poses(2, seed=11)
    beyond = interpolate_poses(first, second, fraction=2.0)
    centers = camera_center(np.array([first, second, beyond]))
    assert np.allclose(centers[2] - centers[1], centers[1] - centers[0])


# -- images ---------------------------------------------------------------------------------------


def test_pixel_thresholds_scale_with_the_longer_edge() -> None:
    assert image_scale(1000, 600) == 1.0
    assert image_scale(480, 640) == 0.64


def test_few_points_need_no_spreading() -> None:
    points_xy = np.random.default_rng(0).uniform(0.0, 100.0, (7, 2))
    for limit in (7, 8, 1000):
        rows = spread_over_image(points_xy, size=(100, 100), limit=limit)
        assert rows.tolist() == list(range(7))
    assert spread_over_image(points_xy[:0], size=(100, 100), limit=5).tolist() == []


def test_points_of_a_crowd_give_way_to_lonely_ones() -> None:
    rng = np.random.default_rng(1)
    crowd_xy = rng.uniform((0.0, 0.0), (30.0, 20.0), (900, 2))  # one cell, the most wanted
    lonely_xy = rng.uniform((0.0, 0.0), (360.0, 240.0), (100, 2))
    rows = spread_over_image(np.concatenate([crowd_xy, lonely_xy]), size=(360, 240), limit=150)
    assert len(rows) == 150
    assert (np.diff(rows) > 0).all()
    is_beside_crowd = (lonely_xy >= (30.0, 20.0)).any(axis=1)
    assert set(900 + np.flatnonzero(is_beside_crowd)) <= set(rows.tolist())
    # Of a cell the most wanted come first.
    in_crowd = rows[rows < 900]
    assert in_crowd.tolist() == list(range(len(in_crowd)))


@pytest.mark.parametrize("limit", [1, 10, 144, 300])
def test_every_cell_gives_its_first_points_before_any_gives_its_second_ones(limit: int) -> None:
    points_xy = np.random.default_rng(2).uniform((0.0, 0.0), (640.0, 480.0), (2000, 2))
    rows = spread_over_image(points_xy, size=(640, 480), limit=limit)
    columns, lines = (points_xy * 12 / (640, 480)).astype(int).T
    counts = np.bincount((12 * lines + columns)[rows], minlength=144)
    assert counts.sum() == limit
    assert np.ptp(counts) <= 1


def test_points_beyond_the_image_count_for_the_cells_at_its_edge() -> None:
    points_xy = np.array([[-50.0, 10.0], [10.0, 10.0], [900.0, 700.0], [639.0, 479.0]])
    assert spread_over_image(points_xy, size=(640, 480), limit=2).tolist() == [0, 2]


# -- worlds that a similarity relates -------------------------------------------------------------


def a_similarity(seed: int) -> Float64Array:
    rng = np.random.default_rng(seed)
    rotation = rotation_from_vector(rng.normal(size=3))
    return np.column_stack([2.5 * rotation, rng.normal(size=3)])


def test_poses_after_a_similarity_see_moved_points_at_the_same_place() -> None:
    poses, onto_from_world = random_poses(4, seed=1), a_similarity(2)
    points = np.random.default_rng(3).normal(size=(5, 3))
    moved = pose_in_other_world(poses, onto_from_world)
    for before, after in zip(poses, moved, strict=True):
        in_cam = transform_points(before, points)
        in_cam_after = transform_points(after, transform_points(onto_from_world, points))
        np.testing.assert_allclose(in_cam_after, 2.5 * in_cam, atol=1e-12)


def test_the_similarity_between_poses_is_found_exactly() -> None:
    poses, onto_from_world = random_poses(5, seed=4), a_similarity(5)
    found = similarity_between_poses(poses, pose_in_other_world(poses, onto_from_world))
    assert found is not None
    np.testing.assert_allclose(found, onto_from_world, atol=1e-12)


def test_orientations_settle_the_turn_about_a_straight_line() -> None:
    poses, onto_from_world = random_poses(3, seed=6), a_similarity(7)
    centers = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    poses[:, :, 3] = -np.einsum("nij,nj->ni", poses[:, :, :3], centers)
    found = similarity_between_poses(poses, pose_in_other_world(poses, onto_from_world))
    assert found is not None
    np.testing.assert_allclose(found, onto_from_world, atol=1e-12)


def test_cameras_in_one_place_determine_no_similarity() -> None:
    poses = random_poses(3, seed=8)
    poses[:, :, 3] = 0.0
    assert similarity_between_poses(poses, random_poses(3, seed=9)) is None


def test_a_point_lies_on_the_pixel_that_holds_it() -> None:
    mask = np.array([[True, False], [False, True]])
    points_xy = np.array([(0.0, 0.0), (0.99, 0.99), (1.0, 0.5), (1.5, 1.5), (2.0, 2.0)])
    assert usable_at(mask, points_xy).tolist() == [True, True, False, True, True]
    assert usable_at(mask, np.empty((0, 2))).tolist() == []


def test_the_rotation_between_vectors_is_found_exactly_and_among_noise() -> None:
    rotation = rotation_from_vector(np.array([0.4, -0.2, 0.9]))
    vectors = np.random.default_rng(0).normal(size=(30, 3))
    found = rotation_between(vectors, vectors @ rotation.T)
    assert found is not None
    np.testing.assert_allclose(found, rotation, atol=1e-12)
    noisy = rotation_between(vectors, vectors @ rotation.T + 0.01)
    assert noisy is not None
    assert 1e-5 < np.linalg.norm(rotation_vector_from(noisy @ rotation.T)) < 0.02


def test_vectors_that_leave_the_rotation_open_have_one_and_those_not_finite_have_none() -> None:
    for some in (np.zeros((5, 3)), np.ones((5, 3)), np.empty((0, 3))):
        found = rotation_between(some, some)
        assert found is not None
        np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(found) > 0.0
    for value in (np.nan, np.inf):
        spoiled = np.ones((5, 3))
        spoiled[2, 1] = value
        assert rotation_between(spoiled, np.ones((5, 3))) is None


def test_poses_that_are_not_finite_determine_no_similarity() -> None:
    poses = random_poses(6)
    poses[3, 1, 3] = np.nan
    assert similarity_between_poses(poses, poses) is None
