"""Two-view geometry of scenes whose truth is known: exact, noisy, wrong and degenerate matches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest

from engine.config import TwoViewConfig
from engine.estimators.two_view_geometry import (
    RelativePose,
    VerifiedMatches,
    estimate_focal_length,
    estimate_relative_pose,
    homography_inlier_ratio,
    verify_matches,
)
from engine.geometry import camera_center
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
    rotation_error_rad,
    slanted_plane,
    tentative_matches,
    two_views,
)

CONFIG = TwoViewConfig(max_error_px=3.0, min_inliers=18, min_inlier_ratio=0.25)
SECOND_POSE = pose_at((0.8, 0.1, 0.2), rotation_vector=(0.03, -0.1, 0.02))


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
    # Some wrong ones lie near their epipolar line by chance, which no geometry can detect.
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


def test_any_share_of_inliers_may_be_asked_for() -> None:
    rng = np.random.default_rng(0)
    points1_xy, points2_xy = rng.uniform(0.0, 600.0, (2, 600, 2))
    config = TwoViewConfig(min_inliers=1, min_inlier_ratio=0.0)
    verified = verify(points1_xy, points2_xy, config=config)
    assert verified is None or len(verified.inliers) < 600


def test_a_plane_and_a_pure_rotation_are_detected_by_their_homography() -> None:
    rotation = pose_at((0.0, 0.0, 0.0), rotation_vector=(0.02, 0.1, 0.05))
    plane = two_views(slanted_plane(200), cam2_from_world=SECOND_POSE, noise_px=0.3)
    turned = two_views(box_of_points(200), cam2_from_world=rotation, noise_px=0.3)
    for views in (plane, turned):
        verified = verify(views.points1_xy, views.points2_xy)
        assert verified is not None
        assert verified.homography_inlier_ratio > 0.95


def test_half_a_plane_is_half_explained_by_a_homography() -> None:
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
def test_matches_that_show_no_depth_are_explained_by_a_homography(points: Degenerate) -> None:
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
def test_a_camera_that_never_turns_does_not_determine_its_focal_length(
    direction: tuple[float, float, float], noise_px: float
) -> None:
    pairs = pairs_of(lambda _: pose_at(direction), noise_px=noise_px)
    assert estimate_focal_length(pairs, width=WIDTH, height=HEIGHT) is None


def test_planes_rotations_and_standing_still_do_not_determine_the_focal_length() -> None:
    turned = pose_at((0.0, 0.0, 0.0), rotation_vector=(0.05, 0.1, 0.02))
    planes = pairs_of(walking_pose, scene=slanted_plane)
    for pairs in (planes, pairs_of(lambda _: turned), pairs_of(lambda _: IDENTITY_POSE)):
        assert estimate_focal_length(pairs, width=WIDTH, height=HEIGHT) is None


def test_no_pairs_do_not_determine_the_focal_length() -> None:
    assert estimate_focal_length([], width=WIDTH, height=HEIGHT) is None


def test_a_focal_length_beyond_the_searched_range_is_not_returned() -> None:
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
