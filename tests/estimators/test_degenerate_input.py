"""Estimators on numbers that nothing can be estimated from: the outcome is a value, and finite."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from engine.config import RegistrationConfig, TwoViewConfig
from engine.estimators.absolute_pose import (
    estimate_absolute_pose,
    refine_absolute_pose,
    refine_absolute_pose_on_rays,
)
from engine.estimators.lenses import is_far_from_pinhole, unit_rays, viewing_rays
from engine.estimators.two_view_geometry import (
    epipolar_angles_rad,
    estimate_focal_length,
    estimate_relative_pose,
    homography_inlier_ratio,
    ray_homography_inlier_ratio,
    verify_matches,
    verify_matches_on_rays,
)
from engine.types import FrameId, ImagePair, PairMatches, PairReason, VerifiedPair
from tests.support.degenerate import (
    HEIGHT,
    HOPELESS_PARAMS,
    NOT_FINITE,
    WIDTH,
    camera_of,
    degenerate,
    degenerate_pairs,
)

NUM = 24
IDENTITY = np.eye(3, 4)
EXACT = (800.0, 500.0, 375.0, 0.0)


@pytest.fixture(autouse=True)
def _numbers_may_overflow() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("params", [EXACT, HOPELESS_PARAMS[2], NOT_FINITE[0]], ids=str)
def test_absolute_poses_are_finite_or_none(params: tuple[float, ...]) -> None:
    camera, config = camera_of(params), RegistrationConfig()
    for points_xy, points in degenerate_pairs(NUM, 2, 3, scale=300.0):
        pose = estimate_absolute_pose(points_xy, points, camera=camera, config=config, seed=0)
        assert pose is None or np.isfinite(pose.cam_from_world).all()


def test_refined_poses_are_finite_or_none() -> None:
    for plane_xy, points in degenerate_pairs(NUM, 2, 3):
        pose = refine_absolute_pose(
            IDENTITY, image_plane_xy=plane_xy, points3D_in_world=points, max_error=0.01
        )
        assert pose is None or np.isfinite(pose.cam_from_world).all()
    for rays, points in degenerate_pairs(NUM, 3, 3):
        pose = refine_absolute_pose_on_rays(
            IDENTITY, rays_in_cam=rays, points3D_in_world=points, max_error_rad=0.01
        )
        assert pose is None or np.isfinite(pose.cam_from_world).all()


@pytest.mark.slow
@pytest.mark.parametrize("params", [EXACT, *HOPELESS_PARAMS[1:3], NOT_FINITE[0]], ids=str)
def test_relative_poses_are_finite_or_none(params: tuple[float, ...]) -> None:
    camera = camera_of(params)
    for points1_xy, points2_xy in degenerate_pairs(NUM, 2, 2, scale=300.0):
        pose = estimate_relative_pose(
            points1_xy, points2_xy, camera1=camera, camera2=camera, max_error_px=3.0, seed=0
        )
        assert pose is None or np.isfinite(pose.cam2_from_cam1).all()
        assert pose is None or np.isfinite(pose.median_triangulation_angle_rad)


def test_shares_on_a_homography_are_shares() -> None:
    for points1_xy, points2_xy in degenerate_pairs(NUM, 2, 2, scale=300.0):
        assert 0.0 <= homography_inlier_ratio(points1_xy, points2_xy, max_error_px=3.0) <= 1.0


def matches_of(num: int = NUM) -> Iterator[PairMatches]:
    """Degenerate ones that can be matches at all: they are finite."""
    pair = ImagePair.of(FrameId(1), FrameId(2))
    for points1_xy, points2_xy in degenerate_pairs(num, 2, 2, scale=300.0):
        if np.isfinite(points1_xy).all() and np.isfinite(points2_xy).all():
            rows = np.arange(len(points1_xy), dtype=np.uint32)
            yield PairMatches(
                pair=pair,
                matches_idx=np.column_stack([rows, rows]),
                points1_xy=points1_xy,
                points2_xy=points2_xy,
                confidence=np.ones(len(rows), np.float32),
            )


def test_verified_matches_have_finite_geometries_that_vote_for_finite_focal_lengths() -> None:
    config = TwoViewConfig(min_inliers=15)
    for matches in matches_of():
        verified = verify_matches(matches, image_size=(WIDTH, HEIGHT), config=config)
        if verified is None:
            continue
        assert np.isfinite(verified.fundamental).all()
        assert 0.0 <= verified.homography_inlier_ratio <= 1.0


@pytest.mark.parametrize(
    "fundamental",
    [np.zeros((3, 3)), np.full((3, 3), 1e304), np.diag([1.0, 0.0, 0.0]), 1e-300 * np.ones((3, 3))],
)
def test_fundamental_matrices_that_are_none_vote_for_no_focal_length(
    fundamental: np.ndarray,
) -> None:
    pair = VerifiedPair(
        pair=ImagePair.of(FrameId(1), FrameId(2)),
        reason=PairReason.EXHAUSTIVE,
        inlier_matches_idx=np.zeros((50, 2), np.uint32),
        num_matches=50,
        fundamental=fundamental,
        homography_inlier_ratio=0.2,
    )
    assert estimate_focal_length([pair], width=WIDTH, height=HEIGHT) is None


@pytest.mark.parametrize("params", HOPELESS_PARAMS, ids=str)
def test_hopeless_cameras_verify_pairs_on_rays_or_do_not(params: tuple[float, ...]) -> None:
    camera = camera_of(params)
    config = TwoViewConfig(min_inliers=15)
    assert isinstance(is_far_from_pinhole(camera), bool)
    for matches in matches_of():
        verified = verify_matches_on_rays(matches, camera1=camera, camera2=camera, config=config)
        if verified is None:
            continue
        assert verified.cam2_from_cam1 is not None
        assert np.isfinite(verified.cam2_from_cam1).all()
        assert 0.0 <= verified.homography_inlier_ratio <= 1.0


@pytest.mark.parametrize("params", [*HOPELESS_PARAMS, *NOT_FINITE], ids=str)
def test_every_point_has_a_row_of_rays_finite_or_not(params: tuple[float, ...]) -> None:
    camera = camera_of(params)
    for points_xy in degenerate(NUM, 2, scale=300.0):
        assert viewing_rays(camera, points_xy).shape == (len(points_xy), 3)
        assert unit_rays(camera, points_xy).shape == (len(points_xy), 3)


def test_epipolar_angles_and_homographies_of_rays_are_numbers() -> None:
    for vectors1, vectors2 in degenerate_pairs(NUM, 3, 3):
        rays1, rays2 = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (vectors1, vectors2))
        angles = epipolar_angles_rad(rays1, rays2, cam2_from_cam1=IDENTITY)
        assert np.isfinite(angles).all()
        if np.isfinite(rays1).all() and np.isfinite(rays2).all():
            ratio = ray_homography_inlier_ratio(rays1, rays2, max_error_rad=0.01)
            assert 0.0 <= ratio <= 1.0
