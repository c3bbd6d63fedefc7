"""Pointmaps: the focal length that they imply, and the depth of pixels."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from adapters.matchers.mast3r.pointmaps import depths_at, focal_from_pointmap
from engine.types import Float64Array

WIDTH, HEIGHT = 256, 192
USUAL_PX = WIDTH / (2 * math.tan(math.radians(30)))


def hills(*, seed: int = 0) -> Float64Array:
    """Depths (H, W) of a scene with slopes, steps and a far half."""
    x, y = np.meshgrid(np.linspace(0, 1, WIDTH), np.linspace(0, 1, HEIGHT))
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    depth = 4 + np.sin(7 * x + phase[0]) + np.cos(5 * y + phase[1]) + (x > 0.6) * 6
    return np.asarray(depth)


def pointmap(
    depth: Float64Array, *, focal_px: float, center_xy: tuple[float, float] | None = None
) -> Float64Array:
    """The points (H, W, 3) that a pinhole camera sees at ``depth``."""
    height, width = depth.shape
    center_x, center_y = (width / 2, height / 2) if center_xy is None else center_xy
    x, y = np.arange(width) + 0.5 - center_x, np.arange(height)[:, None] + 0.5 - center_y
    planes = np.broadcast_arrays(x / focal_px, y / focal_px, 1.0)
    return np.stack(planes, axis=2) * depth[:, :, None]


def certain(depth: Float64Array) -> Float64Array:
    return np.full(depth.shape, 3.0)


# -- focal length ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.6, 1.0, 2.0, 3.3])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_a_clean_pointmap_gives_its_focal_length_at_any_scale(ratio: float, scale: float) -> None:
    focal_px = ratio * USUAL_PX
    points = pointmap(hills(), focal_px=focal_px) * scale
    assert focal_from_pointmap(points, certain(hills())) == pytest.approx(focal_px, rel=1e-6)


@pytest.mark.parametrize("wrong_by", [0.5, 1.6])
@pytest.mark.parametrize("ratio", [0.7, 1.1, 2.5])
def test_noise_outliers_and_a_wrong_region_move_it_by_less_than_a_percent(
    ratio: float, wrong_by: float
) -> None:
    rng = np.random.default_rng(1)
    focal_px = ratio * USUAL_PX
    points = pointmap(hills(), focal_px=focal_px)
    points += 0.02 * rng.standard_normal(points.shape) * points[:, :, 2:]
    points[:60, :90, :2] *= wrong_by  # 11 % of the pixels agree on another focal length
    outliers = rng.random(points.shape[:2]) < 0.1
    points[outliers] = rng.uniform(-10, 10, (int(outliers.sum()), 3))
    found_px = focal_from_pointmap(points, certain(hills()))
    assert found_px is not None
    assert 1e-5 < abs(found_px / focal_px - 1) < 0.01


def test_half_the_pixels_may_be_wrong_when_the_network_knows_it() -> None:
    points = pointmap(hills(), focal_px=USUAL_PX)
    confidence = np.full((HEIGHT, WIDTH), 5.0)
    points[:, ::2, :2] *= 1.4
    confidence[:, ::2] = 1.1
    assert focal_from_pointmap(points, confidence) == pytest.approx(USUAL_PX, rel=1e-6)


def test_the_principal_point_need_not_be_the_middle() -> None:
    center_xy = (WIDTH / 2 + 7.0, HEIGHT / 2 - 4.5)
    points = pointmap(hills(), focal_px=USUAL_PX, center_xy=center_xy)
    found_px = focal_from_pointmap(points, certain(hills()), principal_point_xy=center_xy)
    assert found_px == pytest.approx(USUAL_PX, rel=1e-6)


def test_it_is_kept_within_the_views_that_cameras_have() -> None:
    wide = pointmap(hills(), focal_px=0.1 * USUAL_PX)
    narrow = pointmap(hills(), focal_px=9.0 * USUAL_PX)
    assert focal_from_pointmap(wide, certain(hills())) == pytest.approx(0.5 * USUAL_PX)
    assert focal_from_pointmap(narrow, certain(hills())) == pytest.approx(3.5 * USUAL_PX)


def test_a_portrait_image_is_measured_along_its_longer_side() -> None:
    depth = hills().T
    focal_px = 3.4 * USUAL_PX
    found_px = focal_from_pointmap(pointmap(depth, focal_px=focal_px), certain(depth))
    assert found_px == pytest.approx(focal_px, rel=1e-6)


def test_a_full_size_float32_tensor_is_as_good() -> None:
    depth = hills().repeat(2, axis=0).repeat(2, axis=1)
    points = torch.from_numpy(pointmap(depth, focal_px=600.0)).float()
    assert focal_from_pointmap(points, torch.ones(depth.shape)) == pytest.approx(600.0, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_a_pointmap_without_points_gives_nothing(value: float) -> None:
    points = np.full((HEIGHT, WIDTH, 3), value)
    assert focal_from_pointmap(points, certain(hills())) is None


def test_points_behind_the_camera_give_nothing() -> None:
    points = -pointmap(hills(), focal_px=USUAL_PX)
    assert focal_from_pointmap(points, certain(hills())) is None


def test_points_on_the_axis_alone_give_nothing() -> None:
    points = np.zeros((HEIGHT, WIDTH, 3))
    points[:, :, 2] = 1.0
    assert focal_from_pointmap(points, certain(hills())) is None


def test_a_mirrored_pointmap_gives_nothing() -> None:
    points = pointmap(hills(), focal_px=USUAL_PX) * [-1.0, -1.0, 1.0]
    assert focal_from_pointmap(points, certain(hills())) is None


def test_too_few_points_give_nothing_and_a_few_more_are_enough() -> None:
    full = pointmap(hills()[::12, ::12], focal_px=USUAL_PX / 12)
    few = np.full(full.shape, np.nan)
    few[:3, :16] = full[:3, :16]
    assert focal_from_pointmap(few, np.ones(few.shape[:2])) is None
    few[:, :16] = full[:, :16]
    found_px = focal_from_pointmap(few, np.ones(few.shape[:2]))
    assert found_px == pytest.approx(USUAL_PX / 12, rel=1e-6)


def test_points_without_any_order_give_nothing() -> None:
    points = np.random.default_rng(2).standard_normal((HEIGHT, WIDTH, 3))
    points[:, :, 2] = np.abs(points[:, :, 2]) + 1.0
    assert focal_from_pointmap(points, certain(hills())) is None


# -- depths ---------------------------------------------------------------------------------------


def test_depths_are_those_of_the_pixels_and_are_not_mixed_across_an_edge() -> None:
    depth = np.array([[1.0, 9.0, 2.0], [3.0, 4.0, 5.0]])
    points = pointmap(depth, focal_px=2.0)
    points_xy = [[0.5, 0.5], [0.99, 0.5], [1.01, 0.5], [2.5, 1.5], [0.0, 0.0], [3.0, 2.0]]
    np.testing.assert_array_equal(depths_at(points, points_xy), [1.0, 1.0, 9.0, 5.0, 1.0, 5.0])


def test_points_beyond_the_image_have_no_depth() -> None:
    points = pointmap(np.ones((2, 3)), focal_px=2.0)
    beyond_xy = [[-0.1, 0.5], [3.1, 0.5], [0.5, -2.0], [0.5, 2.1], [np.nan, 0.5]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(depths_at(points, beyond_xy)).all()
    assert depths_at(points, np.empty((0, 2))).shape == (0,)
