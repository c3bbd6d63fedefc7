"""Robust estimation on scenes whose truth is known: exact, noisy, wrong and degenerate input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pycolmap
import pytest

from engine.config import RegistrationConfig, TwoViewConfig
from engine.estimators.estimators import (
    AbsolutePose,
    RelativePose,
    VerifiedMatches,
    estimate_absolute_pose,
    estimate_focal_length,
    estimate_relative_pose,
    homography_inlier_ratio,
    refine_absolute_pose,
    verify_matches,
)
from engine.geometry import camera_center, compose_poses, rotation_from_vector, transform_points
from engine.types import Float64Array, FrameId, ImagePair, PairReason, VerifiedPair
from tests.support.two_view_scenes import (
    FOCAL_PX,
    HEIGHT,
    IDENTITY_POSE,
    WIDTH,
    TwoViews,
    angle_between_rad,
    box_of_points,
    pinhole,
    pose_at,
    project,
    rotation_error_rad,
    slanted_plane,
    tentative_matches,
    two_views,
)

CONFIG = TwoViewConfig(max_error_px=3.0, min_inliers=18, min_inlier_ratio=0.25)
REGISTRATION = RegistrationConfig(max_error_px=8.0)
SECOND_POSE = pose_at((0.8, 0.1, 0.2), rotation_vector=(0.03, -0.1, 0.02))
MAX_ERROR = 4.0 / FOCAL_PX  # on the image plane


def verify(
    points1_xy: Float64Array, points2_xy: Float64Array, *, config: TwoViewConfig = CONFIG
) -> VerifiedMatches | None:
    return verify_matches(
        tentative_matches(points1_xy, points2_xy), image_size=(WIDTH, HEIGHT), config=config
    )


def is_inlier(verified: VerifiedMatches, *, num: int) -> Any:
    """(num,) whether each tentative match was kept."""
    inlier = np.zeros(num, bool)
    inlier[verified.inliers.matches_idx[:, 0]] = True
    return inlier


def as_pair(verified: VerifiedMatches) -> VerifiedPair:
    return VerifiedPair(
        pair=ImagePair(FrameId(1), FrameId(2)),
        reason=PairReason.TEMPORAL,
        inlier_matches_idx=verified.inliers.matches_idx.astype(np.uint32),
        num_matches=len(verified.inliers),
        fundamental=verified.fundamental,
        homography_inlier_ratio=verified.homography_inlier_ratio,
    )


def epipolar_distances_px(verified: VerifiedMatches, views: TwoViews) -> Float64Array:
    """Distances (N,) of points in the second image to the epipolar lines of the first."""
    one = np.ones((len(views.points1_xy), 1))
    lines = np.hstack([views.points1_xy, one]) @ verified.fundamental.T
    products = (lines * np.hstack([views.points2_xy, one])).sum(axis=1)
    return np.asarray(np.abs(products) / np.linalg.norm(lines[:, :2], axis=1))


# -- verifying a pair -----------------------------------------------------------------------------


def test_exact_matches_are_all_kept() -> None:
    views = two_views(box_of_points(200), cam2_from_world=SECOND_POSE)
    verified = verify(views.points1_xy, views.points2_xy)

    assert verified is not None
    assert len(verified.inliers) == 200
    assert verified.inliers.pair == ImagePair(FrameId(1), FrameId(2))
    assert epipolar_distances_px(verified, views).max() < 0.01
    assert verified.homography_inlier_ratio < 0.3


@pytest.mark.parametrize("wrong_ratio", [0.3, 0.6])
def test_true_matches_are_kept_and_wrong_ones_thrown_out(wrong_ratio: float) -> None:
    views = two_views(
        box_of_points(400), cam2_from_world=SECOND_POSE, noise_px=0.5, wrong_ratio=wrong_ratio
    )
    verified = verify(views.points1_xy, views.points2_xy)
    assert verified is not None
    kept = is_inlier(verified, num=400)

    assert len(verified.inliers) == kept.sum()
    assert 0.95 < kept[views.is_true].mean() <= 1.0
    # Some wrong ones lie near their epipolar line by chance, which no geometry can tell.
    assert 0.0 < kept[~views.is_true].mean() < 0.1
    distances_px = epipolar_distances_px(verified, views)[views.is_true]
    assert 0.1 < np.median(distances_px) < 1.0


def test_noise_beyond_the_threshold_costs_matches() -> None:
    views = two_views(box_of_points(400), cam2_from_world=SECOND_POSE, noise_px=6.0)
    verified = verify(views.points1_xy, views.points2_xy)
    assert verified is not None
    assert 100 < len(verified.inliers) < 300


def test_the_threshold_grows_with_the_image() -> None:
    views = two_views(box_of_points(400), cam2_from_world=SECOND_POSE, noise_px=2.0)
    kept = [
        len(verified.inliers)
        for image_size in ((WIDTH // 2, HEIGHT // 2), (WIDTH, HEIGHT), (HEIGHT, 4 * WIDTH))
        if (
            verified := verify_matches(
                tentative_matches(views.points1_xy, views.points2_xy),
                image_size=image_size,
                config=CONFIG,
            )
        )
    ]
    assert kept[0] < 0.75 * kept[1]
    assert kept[1] < kept[2] == 400


def test_kept_matches_keep_their_rows_points_and_depths() -> None:
    views = two_views(box_of_points(100), cam2_from_world=SECOND_POSE, wrong_ratio=0.2)
    shuffled = np.random.default_rng(0).permutation(100)
    matches = tentative_matches(
        views.points1_xy[shuffled],
        views.points2_xy[shuffled],
        rows=np.column_stack([shuffled + 7, shuffled + 1000]),
    )
    depths_m = np.column_stack([shuffled + 1.0, shuffled + 2.0]).astype(np.float32)
    verified = verify_matches(
        dataclasses.replace(matches, depths_m=depths_m),
        image_size=(WIDTH, HEIGHT),
        config=CONFIG,
    )
    assert verified is not None
    rows1, rows2 = verified.inliers.matches_idx.T
    assert np.array_equal(rows1 - 7, rows2 - 1000)
    assert views.is_true[rows1 - 7].mean() > 0.95
    assert np.array_equal(verified.inliers.points1_xy, views.points1_xy[rows1 - 7])
    assert np.array_equal(verified.inliers.points2_xy, views.points2_xy[rows1 - 7])
    assert np.array_equal(verified.inliers.depths_m[:, 0], rows1 - 6)


@pytest.mark.parametrize("num", [0, 1, 7, 17])
def test_too_few_matches_are_no_pair(num: int) -> None:
    views = two_views(box_of_points(num), cam2_from_world=SECOND_POSE)
    assert verify(views.points1_xy, views.points2_xy) is None


def test_a_fundamental_matrix_needs_eight_matches_whatever_is_configured() -> None:
    config = TwoViewConfig(min_inliers=1, min_inlier_ratio=0.0)
    views = two_views(box_of_points(8), cam2_from_world=SECOND_POSE)
    assert verify(views.points1_xy[:7], views.points2_xy[:7], config=config) is None
    assert verify(views.points1_xy, views.points2_xy, config=config) is not None


def test_matches_that_agree_on_nothing_are_no_pair() -> None:
    views = two_views(box_of_points(100), cam2_from_world=SECOND_POSE, wrong_ratio=1.0)
    assert verify(views.points1_xy, views.points2_xy) is None


def test_a_low_share_of_inliers_is_no_pair() -> None:
    views = two_views(box_of_points(400), cam2_from_world=SECOND_POSE, wrong_ratio=0.6)
    strict = TwoViewConfig(min_inlier_ratio=0.5)
    assert verify(views.points1_xy, views.points2_xy, config=strict) is None
    assert verify(views.points1_xy, views.points2_xy) is not None


def test_a_plane_and_a_pure_rotation_are_told_by_their_homography() -> None:
    rotation = pose_at((0.0, 0.0, 0.0), rotation_vector=(0.02, 0.1, 0.05))
    plane = two_views(slanted_plane(200), cam2_from_world=SECOND_POSE, noise_px=0.3)
    turned = two_views(box_of_points(200), cam2_from_world=rotation, noise_px=0.3)
    for views in (plane, turned):
        verified = verify(views.points1_xy, views.points2_xy)
        assert verified is not None
        assert verified.homography_inlier_ratio > 0.95


def test_half_a_plane_is_told_as_half() -> None:
    points = np.concatenate([slanted_plane(300), box_of_points(300, seed=1)])
    views = two_views(points, cam2_from_world=SECOND_POSE)
    ratio = homography_inlier_ratio(views.points1_xy, views.points2_xy, max_error_px=1.0)
    assert 0.5 <= ratio < 0.65


def test_the_same_matches_give_the_same_bits() -> None:
    views = two_views(
        box_of_points(300), cam2_from_world=SECOND_POSE, noise_px=0.5, wrong_ratio=0.4
    )
    one, other = (verify(views.points1_xy, views.points2_xy) for _ in range(2))
    assert one is not None and other is not None
    assert np.array_equal(one.inliers.matches_idx, other.inliers.matches_idx)
    assert np.array_equal(one.fundamental, other.fundamental)
    assert one.homography_inlier_ratio == other.homography_inlier_ratio


# -- degenerate matches ---------------------------------------------------------------------------


def span_px(rng: np.random.Generator) -> float:
    """How far the points spread: within the threshold, where OpenCV 5 is at a loss, or not."""
    return float(rng.choice([1.0, 10.0, 500.0]))


def all_in_one_place(rng: np.random.Generator) -> tuple[Float64Array, Float64Array]:
    return np.full((40, 2), 100.0), np.full((40, 2), 120.0)


def at_few_places(rng: np.random.Generator) -> tuple[Float64Array, Float64Array]:
    places1, places2 = rng.uniform(0.0, span_px(rng), (2, int(rng.integers(1, 9)), 2))
    rows1, rows2 = rng.integers(0, len(places1), (2, 40))
    return places1[rows1], places2[rows2]


def on_lines(rng: np.random.Generator) -> tuple[Float64Array, Float64Array]:
    along = rng.uniform(0.0, span_px(rng), (40, 1))
    return along * (1.0, 0.6), along * (0.8, 0.4) + 3.0


def on_a_line_in_one_image(rng: np.random.Generator) -> tuple[Float64Array, Float64Array]:
    span = span_px(rng)
    along = rng.uniform(0.0, span, (40, 1))
    return along * rng.random(2) + rng.random(2), rng.uniform(0.0, span, (40, 2))


def on_a_coarse_grid(rng: np.random.Generator) -> tuple[Float64Array, Float64Array]:
    cells1, cells2 = rng.integers(0, 4, (2, 40, 2)) / 3.0 * span_px(rng)
    return cells1, cells2


def where_they_were(rng: np.random.Generator) -> tuple[Float64Array, Float64Array]:
    points_xy = rng.uniform(0.0, 500.0, (40, 2))
    return points_xy, points_xy.copy()


Degenerate = Callable[[np.random.Generator], tuple[Float64Array, Float64Array]]
DEGENERATE: list[Degenerate] = [
    all_in_one_place,
    at_few_places,
    on_lines,
    on_a_line_in_one_image,
    on_a_coarse_grid,
    where_they_were,
]


@pytest.mark.parametrize("points", DEGENERATE)
def test_degenerate_matches_give_a_value(points: Degenerate) -> None:
    for seed in range(60):
        points1_xy, points2_xy = points(np.random.default_rng(seed))
        verified = verify(points1_xy, points2_xy)
        assert verified is None or np.isfinite(verified.fundamental).all()
        ratio = homography_inlier_ratio(points1_xy, points2_xy, max_error_px=3.0)
        assert 0.0 <= ratio <= 1.0


@pytest.mark.parametrize("points", [all_in_one_place, on_lines, where_they_were])
def test_matches_that_tell_of_no_depth_are_explained_by_a_homography(points: Degenerate) -> None:
    points1_xy, points2_xy = points(np.random.default_rng(0))
    assert homography_inlier_ratio(points1_xy, points2_xy, max_error_px=3.0) == 1.0
    assert homography_inlier_ratio(points1_xy[:3], points2_xy[:3], max_error_px=3.0) == 1.0
    assert homography_inlier_ratio(points1_xy[:0], points2_xy[:0], max_error_px=3.0) == 1.0


def test_what_opencv_raises_becomes_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any, **__: Any) -> None:
        raise cv2.error("(-215:Assertion failed) !model.empty()")

    views = two_views(box_of_points(50), cam2_from_world=SECOND_POSE)
    monkeypatch.setattr(cv2, "findHomography", raises)
    verified = verify(views.points1_xy, views.points2_xy)
    assert verified is not None
    assert verified.homography_inlier_ratio == 1.0
    monkeypatch.setattr(cv2, "findFundamentalMat", raises)
    assert verify(views.points1_xy, views.points2_xy) is None


@pytest.mark.parametrize("found", [None, np.full((3, 3), np.nan), np.zeros((9, 3))])
def test_a_fundamental_matrix_that_is_none_is_no_pair(
    monkeypatch: pytest.MonkeyPatch, found: Float64Array | None
) -> None:
    mask = np.ones((50, 1), np.uint8)
    monkeypatch.setattr(cv2, "findFundamentalMat", lambda *_, **__: (found, mask))
    views = two_views(box_of_points(50), cam2_from_world=SECOND_POSE)
    assert verify(views.points1_xy, views.points2_xy) is None


# -- focal length ---------------------------------------------------------------------------------


def walking_pose(rng: np.random.Generator) -> Float64Array:
    return pose_at(
        rng.normal(scale=0.6, size=3).tolist(),
        rotation_vector=rng.normal(scale=0.15, size=3).tolist(),
    )


def pairs_of(
    second_pose: Callable[[np.random.Generator], Float64Array],
    *,
    num: int = 6,
    focal_px: float = FOCAL_PX,
    noise_px: float = 0.3,
    scene: Callable[..., Float64Array] = box_of_points,
) -> list[VerifiedPair]:
    """Verified pairs of the origin with other poses."""
    rng = np.random.default_rng(5)
    pairs = []
    for seed in range(num):
        views = two_views(
            scene(200, seed=seed),
            cam2_from_world=second_pose(rng),
            focal_px=focal_px,
            noise_px=noise_px,
            seed=seed,
        )
        verified = verify(views.points1_xy, views.points2_xy)
        assert verified is not None
        pairs.append(as_pair(verified))
    return pairs


@pytest.mark.parametrize("focal_px", [400.0, 850.0, 1900.0])
def test_the_focal_length_comes_out_of_general_motion(focal_px: float) -> None:
    pairs = pairs_of(walking_pose, focal_px=focal_px)
    estimated_px = estimate_focal_length(pairs, width=WIDTH, height=HEIGHT)
    assert estimated_px == pytest.approx(focal_px, rel=0.03)


def test_a_portrait_image_has_its_own_centre() -> None:
    views = two_views(box_of_points(300), cam2_from_world=SECOND_POSE)
    flipped = verify(views.points1_xy[:, ::-1], views.points2_xy[:, ::-1])
    assert flipped is not None
    estimated_px = estimate_focal_length([as_pair(flipped)], width=HEIGHT, height=WIDTH)
    assert estimated_px == pytest.approx(FOCAL_PX, rel=0.03)


@pytest.mark.parametrize("seed", range(8))
def test_as_many_wrong_pairs_as_right_ones_do_not_matter(seed: int) -> None:
    right = pairs_of(walking_pose)
    rng = np.random.default_rng(seed)
    units = np.array([1e-3, 1e-3, 1.0])  # of the image's size
    wrong = [
        dataclasses.replace(pair, fundamental=rng.normal(size=(3, 3)) * np.outer(units, units))
        for pair in right
    ]
    estimated_px = estimate_focal_length(right + wrong, width=WIDTH, height=HEIGHT)
    assert estimated_px == pytest.approx(FOCAL_PX, rel=0.03)


@pytest.mark.parametrize("noise_px", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("direction", [(0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.6, 0.2, 0.5)], ids=str)
def test_a_camera_that_never_turns_does_not_tell_its_focal_length(
    direction: tuple[float, float, float], noise_px: float
) -> None:
    pairs = pairs_of(lambda _: pose_at(direction), noise_px=noise_px)
    assert estimate_focal_length(pairs, width=WIDTH, height=HEIGHT) is None


def test_planes_rotations_and_standing_still_do_not_tell_the_focal_length() -> None:
    turned = pose_at((0.0, 0.0, 0.0), rotation_vector=(0.05, 0.1, 0.02))
    planes = pairs_of(walking_pose, scene=slanted_plane)
    for pairs in (planes, pairs_of(lambda _: turned), pairs_of(lambda _: IDENTITY_POSE)):
        assert estimate_focal_length(pairs, width=WIDTH, height=HEIGHT) is None


def test_no_pairs_do_not_tell_the_focal_length() -> None:
    assert estimate_focal_length([], width=WIDTH, height=HEIGHT) is None


def test_a_focal_length_beyond_the_searched_range_is_not_told() -> None:
    pairs = pairs_of(walking_pose, focal_px=4000.0)
    assert estimate_focal_length(pairs, width=WIDTH, height=HEIGHT) is None


# -- relative pose --------------------------------------------------------------------------------


def relative_pose(views: TwoViews, *, seed: int = 0) -> RelativePose | None:
    return estimate_relative_pose(
        views.points1_xy,
        views.points2_xy,
        camera1=pinhole(),
        camera2=pinhole(),
        max_error_px=3.0,
        seed=seed,
    )


@pytest.mark.parametrize(
    ("noise_px", "least_rad", "most_rad"), [(0.0, 0.0, 1e-6), (0.5, 1e-5, 0.02)]
)
def test_the_relative_pose_is_as_exact_as_the_matches(
    noise_px: float, least_rad: float, most_rad: float
) -> None:
    views = two_views(box_of_points(300), cam2_from_world=SECOND_POSE, noise_px=noise_px)
    relative = relative_pose(views)
    assert relative is not None
    pose = relative.cam2_from_cam1

    assert least_rad <= rotation_error_rad(pose, SECOND_POSE) < most_rad
    assert least_rad <= angle_between_rad(pose[:, 3], SECOND_POSE[:, 3]) < most_rad
    assert np.linalg.norm(pose[:, 3]) == pytest.approx(1.0)
    assert 270 <= relative.num_inliers <= 300


def test_wrong_matches_do_not_move_the_relative_pose() -> None:
    views = two_views(
        box_of_points(300), cam2_from_world=SECOND_POSE, noise_px=0.3, wrong_ratio=0.3
    )
    relative = relative_pose(views)
    assert relative is not None
    assert 1e-5 < rotation_error_rad(relative.cam2_from_cam1, SECOND_POSE) < 0.03
    assert 200 <= relative.num_inliers <= 225  # 210 are true


def test_the_triangulation_angle_is_that_between_the_rays_at_the_points() -> None:
    views = two_views(box_of_points(300), cam2_from_world=SECOND_POSE)
    relative = relative_pose(views)
    assert relative is not None
    to_second = views.points3D_in_world - camera_center(SECOND_POSE)
    true_rad = [
        angle_between_rad(one, other)
        for one, other in zip(views.points3D_in_world, to_second, strict=True)
    ]
    assert relative.median_triangulation_angle_rad == pytest.approx(np.median(true_rad), rel=1e-4)


def test_a_pure_rotation_has_no_triangulation_angle() -> None:
    turned = pose_at((0.0, 0.0, 0.0), rotation_vector=(0.02, 0.1, 0.0))
    relative = relative_pose(two_views(box_of_points(300), cam2_from_world=turned, noise_px=0.3))
    assert relative is not None
    assert rotation_error_rad(relative.cam2_from_cam1, turned) < 0.02
    assert relative.median_triangulation_angle_rad < np.radians(0.5)


def test_too_few_or_useless_matches_have_no_relative_pose() -> None:
    few = two_views(box_of_points(5), cam2_from_world=SECOND_POSE)
    assert relative_pose(few) is None
    places1_xy, places2_xy = all_in_one_place(np.random.default_rng(0))
    assert (
        estimate_relative_pose(
            places1_xy,
            places2_xy,
            camera1=pinhole(),
            camera2=pinhole(),
            max_error_px=3.0,
            seed=0,
        )
        is None
    )


def test_the_same_matches_and_seed_give_the_same_relative_pose() -> None:
    views = two_views(
        box_of_points(200), cam2_from_world=SECOND_POSE, noise_px=0.5, wrong_ratio=0.3
    )
    one, other = relative_pose(views, seed=3), relative_pose(views, seed=3)
    assert one is not None and other is not None
    assert np.array_equal(one.cam2_from_cam1, other.cam2_from_cam1)
    assert one.num_inliers == other.num_inliers


# -- absolute pose --------------------------------------------------------------------------------


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
    image_plane_xy = np.asarray(camera.cam_from_img(camera.img_from_cam(points)))
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


def test_a_start_that_looks_away_has_no_solution() -> None:
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
