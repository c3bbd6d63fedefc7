"""Estimators on viewing rays: points all around two wide cameras, with the truth."""

from __future__ import annotations

import numpy as np
import pycolmap
import pytest

from engine.config import RegistrationConfig, TwoViewConfig
from engine.estimators.absolute_pose import (
    AbsolutePose,
    estimate_absolute_pose,
    refine_absolute_pose,
    refine_absolute_pose_on_rays,
)
from engine.estimators.lenses import camera_focal_px, unit_rays
from engine.estimators.two_view_geometry import (
    VerifiedMatches,
    estimate_focal_length,
    ray_homography_inlier_ratio,
    verify_matches,
    verify_matches_on_rays,
)
from engine.geometry import camera_center, compose_poses, transform_points
from engine.types import Float64Array, PairReason, VerifiedPair
from tests.support.two_view_scenes import (
    HEIGHT,
    IDENTITY_POSE,
    WIDTH,
    angle_between_rad,
    pose_at,
    rotation_error_rad,
    tentative_matches,
)

CONFIG = TwoViewConfig(max_error_px=3.0, min_inliers=18, min_inlier_ratio=0.25)
SECOND_POSE = pose_at((0.8, 0.1, 0.2), rotation_vector=(0.1, -0.5, 0.05))
WIDE = ["SIMPLE_FISHEYE", "EQUIRECTANGULAR"]


def wide_camera(model: str, *, focal_px: float = 380.0) -> pycolmap.Camera:
    """A fisheye of 150 degrees across, or a spherical image."""
    height = WIDTH // 2 if model == "EQUIRECTANGULAR" else HEIGHT
    return pycolmap.Camera.create_from_model_name(1, model, focal_px, WIDTH, height)


def points_around(num: int, *, seed: int = 0) -> Float64Array:
    """Points (num, 3) on all sides of the cameras, 2 to 8 away."""
    rng = np.random.default_rng((seed, 20))
    directions = rng.normal(size=(num, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return np.asarray(directions * rng.uniform(2.0, 8.0, (num, 1)))


def seen_by_both(
    camera: pycolmap.Camera,
    points: Float64Array,
    *,
    second: Float64Array = SECOND_POSE,
    noise_px: float = 0.0,
    wrong_ratio: float = 0.0,
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Points (N, 3) that both images hold, and where: (N, 2), (N, 2) px."""
    rng = np.random.default_rng(21)
    size = (camera.width, camera.height)
    views_xy = [
        np.asarray(camera.img_from_cam(transform_points(pose, points)))
        for pose in (IDENTITY_POSE, second)
    ]
    inside = np.all([((xy > 0) & (xy < size)).all(axis=1) for xy in views_xy], axis=0)
    first_xy, second_xy = (
        xy[inside] + rng.normal(scale=noise_px, size=(int(inside.sum()), 2)) for xy in views_xy
    )
    wrong = rng.permutation(len(second_xy))[: round(wrong_ratio * len(second_xy))]
    second_xy[wrong] = rng.uniform((0, 0), size, (len(wrong), 2))
    return points[inside], first_xy, second_xy


def verify(
    camera: pycolmap.Camera, first_xy: Float64Array, second_xy: Float64Array
) -> VerifiedMatches | None:
    return verify_matches_on_rays(
        tentative_matches(first_xy, second_xy), camera1=camera, camera2=camera, config=CONFIG
    )


# -- pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", WIDE)
def test_matches_of_wide_lenses_are_verified_with_their_pose(model: str) -> None:
    camera = wide_camera(model)
    _, first_xy, second_xy = seen_by_both(camera, points_around(1500), noise_px=0.5)
    verified = verify(camera, first_xy, second_xy)
    assert verified is not None
    assert len(verified.inliers) > 0.97 * len(first_xy)
    assert verified.homography_inlier_ratio < 0.4
    pose = verified.cam2_from_cam1
    assert pose is not None
    assert 1e-5 < rotation_error_rad(pose, SECOND_POSE) < 0.01
    assert angle_between_rad(pose[:, 3], SECOND_POSE[:, 3]) < 0.02


@pytest.mark.parametrize("model", WIDE)
def test_wrong_matches_of_wide_lenses_are_left_out(model: str) -> None:
    camera = wide_camera(model)
    points = points_around(1500)
    _, first_xy, clean_xy = seen_by_both(camera, points)
    _, _, second_xy = seen_by_both(camera, points, wrong_ratio=0.4)
    verified = verify(camera, first_xy, second_xy)
    assert verified is not None
    is_wrong = np.linalg.norm(clean_xy - second_xy, axis=1) > 20.0
    kept = verified.inliers.matches_idx[:, 0]
    assert is_wrong[kept].mean() < 0.05  # those that lie on their epipolar curve
    assert len(kept) > 0.97 * (~is_wrong).sum()


def test_a_fundamental_matrix_loses_most_of_a_fisheyes_matches() -> None:
    camera = wide_camera("SIMPLE_FISHEYE")
    _, first_xy, second_xy = seen_by_both(camera, points_around(1500))
    matches = tentative_matches(first_xy, second_xy)
    by_matrix = verify_matches(matches, image_size=(WIDTH, HEIGHT), config=CONFIG)
    assert by_matrix is None or len(by_matrix.inliers) < 0.7 * len(matches)


def test_a_wrong_focal_length_costs_inliers() -> None:
    _, first_xy, second_xy = seen_by_both(wide_camera("SIMPLE_FISHEYE"), points_around(1500))
    verified = verify(wide_camera("SIMPLE_FISHEYE", focal_px=600.0), first_xy, second_xy)
    assert verified is None or len(verified.inliers) < 0.8 * len(first_xy)


@pytest.mark.parametrize("model", WIDE)
def test_random_matches_of_wide_lenses_are_no_pair(model: str) -> None:
    camera = wide_camera(model)
    _, first_xy, second_xy = seen_by_both(camera, points_around(400), wrong_ratio=1.0)
    assert verify(camera, first_xy, second_xy) is None


def test_matches_outside_the_image_circle_are_outliers() -> None:
    camera = wide_camera("SIMPLE_FISHEYE", focal_px=230.0)
    _, first_xy, second_xy = seen_by_both(camera, points_around(1000))
    corners_xy = np.tile([[4.0, 4.0], [WIDTH - 4.0, 4.0]], (10, 1))
    verified = verify(camera, np.vstack([corners_xy, first_xy]), np.vstack([corners_xy, second_xy]))
    assert verified is not None
    assert verified.inliers.matches_idx[:, 0].min() >= len(corners_xy)
    assert verify(camera, corners_xy, corners_xy) is None


@pytest.mark.parametrize("model", WIDE)
def test_planes_and_turns_of_wide_lenses_are_one_homography(model: str) -> None:
    camera = wide_camera(model)
    rng = np.random.default_rng(22)
    plane = np.column_stack([rng.uniform(-9, 9, (800, 2)), np.full(800, 3.0)])
    turn = pose_at((0.0, 0.0, 0.0), rotation_vector=(0.0, -0.6, 0.1))
    for points, second in ((plane, SECOND_POSE), (points_around(800), turn)):
        _, first_xy, second_xy = seen_by_both(camera, points, second=second, noise_px=0.3)
        rays1, rays2 = unit_rays(camera, first_xy), unit_rays(camera, second_xy)
        bound_rad = 3.0 / camera_focal_px(camera)
        assert ray_homography_inlier_ratio(rays1, rays2, max_error_rad=bound_rad) > 0.9
    few = np.eye(3)
    assert ray_homography_inlier_ratio(few, few, max_error_rad=0.01) == 1.0


def test_pairs_verified_on_rays_have_no_say_in_a_pinholes_focal_length() -> None:
    camera = wide_camera("SIMPLE_FISHEYE")
    _, first_xy, second_xy = seen_by_both(camera, points_around(1000))
    verified = verify(camera, first_xy, second_xy)
    assert verified is not None
    pair = VerifiedPair(
        pair=verified.inliers.pair,
        reason=PairReason.EXHAUSTIVE,
        inlier_matches_idx=verified.inliers.matches_idx.astype(np.uint32),
        num_matches=len(first_xy),
        fundamental=verified.fundamental,
        homography_inlier_ratio=verified.homography_inlier_ratio,
        cam2_from_cam1=verified.cam2_from_cam1,
    )
    assert estimate_focal_length([pair] * 20, width=WIDTH, height=HEIGHT) is None


# -- absolute poses -------------------------------------------------------------------------------


def near(pose: Float64Array) -> Float64Array:
    """A pose nearby: 5 degrees and 0.2 away."""
    return compose_poses(pose_at((0.2, 0.0, 0.05), rotation_vector=(0.05, 0.07, -0.02)), pose)


def refine(
    camera: pycolmap.Camera, points_xy: Float64Array, points: Float64Array
) -> AbsolutePose | None:
    return refine_absolute_pose_on_rays(
        near(SECOND_POSE),
        rays_in_cam=unit_rays(camera, points_xy),
        points3D_in_world=points,
        max_error_rad=4.0 / camera_focal_px(camera),
    )


@pytest.mark.parametrize("model", WIDE)
def test_a_nearby_pose_is_refined_to_the_truth_from_points_all_around(model: str) -> None:
    camera = wide_camera(model)
    points, _, second_xy = seen_by_both(camera, points_around(800))
    posed = refine(camera, second_xy, points)
    assert posed is not None
    assert posed.num_inliers == len(points)
    assert np.abs(posed.cam_from_world - SECOND_POSE).max() < 1e-6


@pytest.mark.parametrize("model", WIDE)
def test_noise_and_wrong_points_hardly_move_a_pose_refined_on_rays(model: str) -> None:
    camera = wide_camera(model)
    points, _, second_xy = seen_by_both(camera, points_around(800), noise_px=0.5, wrong_ratio=0.2)
    posed = refine(camera, second_xy, points)
    assert posed is not None
    error = np.linalg.norm(camera_center(posed.cam_from_world) - camera_center(SECOND_POSE))
    assert 1e-5 < error < 0.02
    assert 0.75 * len(points) < posed.num_inliers < 0.85 * len(points)


def test_refining_on_rays_agrees_with_refining_on_the_plane_where_both_can() -> None:
    camera = pycolmap.Camera.create_from_model_name(1, "SIMPLE_PINHOLE", 800.0, WIDTH, HEIGHT)
    points, _, second_xy = seen_by_both(camera, points_around(4000))
    on_plane = refine_absolute_pose(
        near(SECOND_POSE),
        image_plane_xy=np.asarray(camera.cam_from_img(second_xy)),
        points3D_in_world=points,
        max_error=4.0 / 800.0,
    )
    on_rays = refine(camera, second_xy, points)
    assert on_plane is not None
    assert on_rays is not None
    assert on_rays.cam_from_world == pytest.approx(on_plane.cam_from_world, abs=1e-6)


def test_points_without_a_ray_are_outliers_and_too_few_give_no_pose() -> None:
    camera = wide_camera("SIMPLE_FISHEYE")
    points, _, second_xy = seen_by_both(camera, points_around(300))
    rays = unit_rays(camera, second_xy)
    rays[:10] = np.nan
    posed = refine_absolute_pose_on_rays(
        near(SECOND_POSE), rays_in_cam=rays, points3D_in_world=points, max_error_rad=0.01
    )
    assert posed is not None
    assert posed.inlier_mask.tolist() == [False] * 10 + [True] * (len(points) - 10)
    assert refine(camera, second_xy[:5], points[:5]) is None
    same = np.tile(points[:1], (20, 1))
    assert refine(camera, np.tile(second_xy[:1], (20, 1)), same) is None


def test_poses_of_spherical_images_are_found_by_sampling() -> None:
    camera = wide_camera("EQUIRECTANGULAR")
    points, _, second_xy = seen_by_both(camera, points_around(300), wrong_ratio=0.3)
    posed = estimate_absolute_pose(
        second_xy, points, camera=camera, config=RegistrationConfig(), seed=0
    )
    assert posed is not None
    assert np.abs(posed.cam_from_world - SECOND_POSE).max() < 1e-5
    assert 0.65 * len(points) < posed.num_inliers < 0.8 * len(points)
