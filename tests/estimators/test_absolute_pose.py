"""Absolute poses in scenes whose truth is known: exact, noisy, wrong and degenerate points."""

from __future__ import annotations

import numpy as np
import pycolmap
import pytest

from engine.config import RegistrationConfig
from engine.estimators.absolute_pose import (
    AbsolutePose,
    estimate_absolute_pose,
    refine_absolute_pose,
)
from engine.geometry import camera_center, compose_poses, rotation_from_vector, transform_points
from engine.types import Float64Array
from tests.support.two_view_scenes import (
    FOCAL_PX,
    HEIGHT,
    IDENTITY_POSE,
    WIDTH,
    TwoViews,
    box_of_points,
    pinhole,
    pose_at,
    project,
    rotation_error_rad,
    two_views,
)

REGISTRATION = RegistrationConfig(max_error_px=8.0)
SECOND_POSE = pose_at((0.8, 0.1, 0.2), rotation_vector=(0.03, -0.1, 0.02))
MAX_ERROR = 4.0 / FOCAL_PX  # on the image plane


# -- by sampling --------------------------------------------------------------------------------


def absolute_pose(views: TwoViews, *, seed: int = 0) -> AbsolutePose | None:
    return estimate_absolute_pose(
        views.points2_xy,
        views.points3D_in_world,
        camera=pinhole(),
        config=REGISTRATION,
        seed=seed,
    )


def center_error(pose: Float64Array, truth: Float64Array = SECOND_POSE) -> float:
    return float(np.linalg.norm(camera_center(pose) - camera_center(truth)))


def test_an_absolute_pose_is_exact_on_exact_points() -> None:
    posed = absolute_pose(two_views(box_of_points(100), cam2_from_world=SECOND_POSE))
    assert posed is not None
    assert np.abs(posed.cam_from_world - SECOND_POSE).max() < 1e-6
    assert posed.num_inliers == 100


def test_an_absolute_pose_is_as_good_as_its_points() -> None:
    views = two_views(
        box_of_points(300), cam2_from_world=SECOND_POSE, noise_px=1.0, wrong_ratio=0.2
    )
    posed = absolute_pose(views)
    assert posed is not None
    # A pixel at a depth of 6.5 is 0.008 wide; 240 points make the mean far better than one.
    assert 1e-5 < center_error(posed.cam_from_world) < 0.01
    assert 1e-6 < rotation_error_rad(posed.cam_from_world, SECOND_POSE) < 0.002
    assert posed.inlier_mask[views.is_true].all()
    assert posed.inlier_mask[~views.is_true].mean() < 0.05


def test_points_behind_the_camera_are_outliers() -> None:
    points = box_of_points(200)
    points[0] = camera_center(SECOND_POSE) + 5.0 * SECOND_POSE[2, :3]  # in the image's middle
    behind = np.arange(200) < 40
    views = two_views(points, cam2_from_world=SECOND_POSE)
    # On the same rays, on the other side of the camera: they project to the same pixels.
    points[behind] = 2.0 * camera_center(SECOND_POSE) - points[behind]
    posed = absolute_pose(views)
    refined = refine(SECOND_POSE, views)

    assert np.allclose(project(SECOND_POSE, points), views.points2_xy)
    for pose in (posed, refined):
        assert pose is not None
        assert np.array_equal(pose.inlier_mask, ~behind)
        assert center_error(pose.cam_from_world) < 1e-6


def test_the_bound_on_errors_is_the_configured_one_at_the_size_of_the_image() -> None:
    views = two_views(box_of_points(300), cam2_from_world=SECOND_POSE, noise_px=3.0)
    large = pycolmap.Camera.create_from_model_name(
        1, "SIMPLE_PINHOLE", 4 * FOCAL_PX, 4 * WIDTH, 4 * HEIGHT
    )
    num_inliers = []
    for camera, zoom, max_error_px in ((pinhole(), 1, 3.0), (large, 4, 3.0), (pinhole(), 1, 15.0)):
        posed = estimate_absolute_pose(
            zoom * views.points2_xy,
            views.points3D_in_world,
            camera=camera,
            config=RegistrationConfig(max_error_px=max_error_px),
            seed=0,
        )
        assert posed is not None
        num_inliers.append(posed.num_inliers)
    # Within one standard deviation on a plane lie 39 %.
    assert num_inliers[0] == pytest.approx(0.39 * 300, abs=25)
    assert num_inliers[1] == pytest.approx(num_inliers[0], abs=6)
    assert num_inliers[2] >= 299


def test_too_few_points_or_only_one_have_no_absolute_pose() -> None:
    assert absolute_pose(two_views(box_of_points(5), cam2_from_world=SECOND_POSE)) is None
    one_point = np.repeat(box_of_points(1), 30, axis=0)
    assert absolute_pose(two_views(one_point, cam2_from_world=SECOND_POSE)) is None


def test_points_that_agree_on_no_pose_leave_few_inliers() -> None:
    posed = absolute_pose(
        two_views(box_of_points(100), cam2_from_world=SECOND_POSE, wrong_ratio=1.0)
    )
    assert posed is None or posed.num_inliers < 15


def test_the_same_points_and_seed_give_the_same_absolute_pose() -> None:
    views = two_views(
        box_of_points(200), cam2_from_world=SECOND_POSE, noise_px=1.0, wrong_ratio=0.4
    )
    one, other = absolute_pose(views, seed=7), absolute_pose(views, seed=7)
    assert one is not None and other is not None
    assert np.array_equal(one.cam_from_world, other.cam_from_world)
    assert np.array_equal(one.inlier_mask, other.inlier_mask)


# -- refining a nearby pose -----------------------------------------------------------------------


def refine(start: Float64Array, views: TwoViews) -> AbsolutePose | None:
    return refine_absolute_pose(
        start,
        image_plane_xy=np.asarray(pinhole().cam_from_img(views.points2_xy)),
        points3D_in_world=views.points3D_in_world,
        max_error=MAX_ERROR,
    )


def moved_away(
    cam_from_world: Float64Array,
    *,
    angle_deg: float,
    distance: float,
    rng: np.random.Generator,
) -> Float64Array:
    """The pose turned about a random axis and moved in a random direction."""
    axis, direction = rng.normal(size=(2, 3))
    turn = rotation_from_vector(np.radians(angle_deg) * axis / np.linalg.norm(axis))
    rotation = turn @ cam_from_world[:, :3]
    center = camera_center(cam_from_world) + distance * direction / np.linalg.norm(direction)
    return np.column_stack([rotation, -rotation @ center])


def test_refining_finds_the_pose_from_five_degrees_and_a_tenth_of_the_depth_away() -> None:
    views = two_views(box_of_points(100), cam2_from_world=SECOND_POSE)
    rng = np.random.default_rng(1)
    for _ in range(30):
        start = moved_away(SECOND_POSE, angle_deg=5.0, distance=0.65, rng=rng)
        refined = refine(start, views)
        assert refined is not None
        assert np.abs(refined.cam_from_world - SECOND_POSE).max() < 1e-7
        assert refined.num_inliers == 100


def test_refining_does_not_stop_before_the_translation_is_right() -> None:
    # Symmetric points and a start straight behind: no step turns the camera.
    x, y = np.meshgrid(np.linspace(-2.0, 2.0, 8), np.linspace(-1.5, 1.5, 8))
    points = np.column_stack([x.ravel(), y.ravel(), np.full(x.size, 5.0)])
    views = two_views(points, cam2_from_world=IDENTITY_POSE)
    refined = refine(pose_at((0.0, 0.0, -0.5)), views)
    assert refined is not None
    assert np.abs(refined.cam_from_world - IDENTITY_POSE).max() < 1e-7


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_refining_does_not_depend_on_the_scale_of_the_map(scale: float) -> None:
    views = two_views(scale * box_of_points(100), cam2_from_world=pose_at((0.8 * scale, 0.0, 0.0)))
    start = pose_at((0.5 * scale, 0.1 * scale, 0.0), rotation_vector=(0.0, 0.05, 0.0))
    refined = refine(start, views)
    assert refined is not None
    assert center_error(refined.cam_from_world, views.cam2_from_world) < 1e-7 * scale


def test_refining_with_noise_and_wrong_points_is_as_good_as_the_points() -> None:
    views = two_views(
        box_of_points(300), cam2_from_world=SECOND_POSE, noise_px=0.5, wrong_ratio=0.2
    )
    start = moved_away(SECOND_POSE, angle_deg=2.0, distance=0.2, rng=np.random.default_rng(2))
    refined = refine(start, views)
    assert refined is not None
    assert 1e-5 < center_error(refined.cam_from_world) < 0.01
    assert 1e-6 < rotation_error_rad(refined.cam_from_world, SECOND_POSE) < 0.002
    assert refined.inlier_mask[views.is_true].mean() > 0.98
    assert refined.inlier_mask[~views.is_true].mean() < 0.05


def test_points_that_cannot_be_undistorted_are_outliers() -> None:
    camera = pycolmap.Camera.create_from_model_name(1, "SIMPLE_RADIAL", FOCAL_PX, WIDTH, HEIGHT)
    camera.params = [FOCAL_PX, WIDTH / 2, HEIGHT / 2, -0.3]
    points = transform_points(SECOND_POSE, box_of_points(100))
    image_plane_xy = np.asarray(camera.cam_from_img(np.asarray(camera.img_from_cam(points))))
    image_plane_xy[:20] = camera.cam_from_img(np.zeros((20, 2)))  # a corner bent too far
    assert np.isnan(image_plane_xy[:20]).all()
    refined = refine_absolute_pose(
        pose_at((0.6, 0.1, 0.2)),
        image_plane_xy=image_plane_xy,
        points3D_in_world=box_of_points(100),
        max_error=MAX_ERROR,
    )

    assert refined is not None
    assert np.array_equal(refined.inlier_mask, np.arange(100) >= 20)
    assert np.abs(refined.cam_from_world - SECOND_POSE).max() < 1e-6


def test_a_hopeless_start_ends_with_few_inliers_or_none() -> None:
    views = two_views(box_of_points(100), cam2_from_world=SECOND_POSE)
    rng = np.random.default_rng(3)
    starts = (moved_away(SECOND_POSE, angle_deg=150.0, distance=20.0, rng=rng) for _ in range(30))
    ends = [end for start in starts if (end := refine(start, views)) is not None]
    lucky = [end for end in ends if end.num_inliers >= 40]

    assert len(lucky) < 10
    assert all(center_error(end.cam_from_world) < 0.3 for end in lucky)


def test_a_start_that_faces_away_has_no_solution() -> None:
    views = two_views(box_of_points(100), cam2_from_world=IDENTITY_POSE)
    about_face = pose_at((0.0, 0.0, 0.0), rotation_vector=(0.0, np.pi, 0.0))
    assert refine(about_face, views) is None


def test_points_that_do_not_determine_a_pose_have_no_solution() -> None:
    few = two_views(box_of_points(5), cam2_from_world=SECOND_POSE)
    nothing = two_views(box_of_points(0), cam2_from_world=SECOND_POSE)
    one_place = two_views(np.full((30, 3), (0.0, 0.0, 5.0)), cam2_from_world=IDENTITY_POSE)
    assert refine(SECOND_POSE, few) is None
    assert refine(SECOND_POSE, nothing) is None
    assert refine(IDENTITY_POSE, one_place) is None


def test_refining_leaves_its_start_alone_and_repeats_itself() -> None:
    views = two_views(box_of_points(100), cam2_from_world=SECOND_POSE, noise_px=0.5)
    start = compose_poses(pose_at((0.05, 0.0, 0.0)), SECOND_POSE)
    before = start.copy()
    one, other = refine(start, views), refine(start, views)
    assert one is not None and other is not None
    assert np.array_equal(start, before)
    assert np.array_equal(one.cam_from_world, other.cam_from_world)
