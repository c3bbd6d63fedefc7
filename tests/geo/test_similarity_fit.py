"""The robust similarity: sampling, refinement, and cameras that settle a turn."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from engine.geo.similarity_fit import SimilarityFit, fit_similarity, level_cameras
from engine.geometry import rotation_from_vector, transform_points
from engine.types import Float64Array

SIMILARITY = np.column_stack(
    [20.0 * rotation_from_vector(np.array([0.3, -0.7, 1.9])), (100.0, -30.0, 8.0)]
)
MAX_ERROR_M = 10.0


def cloud(num: int, *, seed: int = 0) -> Float64Array:
    return np.random.default_rng(seed).uniform(-5.0, 5.0, (num, 3))


def line(num: int) -> Float64Array:
    return np.outer(np.linspace(-5.0, 5.0, num), [1.0, 0.5, 0.2])


def fit(
    points: Float64Array, positions_m: Float64Array, *, std_m: float = 2.0
) -> SimilarityFit | None:
    stds_m = np.full((len(points), 3), std_m)
    return fit_similarity(points, positions_m, stds_m=stds_m, max_error_m=MAX_ERROR_M)


def found(result: SimilarityFit | None) -> SimilarityFit:
    assert result is not None
    return result


@pytest.mark.parametrize("num", [3, 4, 20, 500])
def test_an_exact_similarity_is_found_exactly(num: int) -> None:
    points = cloud(num)
    result = found(fit(points, transform_points(SIMILARITY, points)))
    np.testing.assert_allclose(result.onto_from_map, SIMILARITY, atol=1e-5)
    assert result.residuals_m.max() < 1e-5
    np.testing.assert_allclose(result.weights, 1.0, atol=1e-6)


def test_it_is_a_similarity_even_for_a_mirror_image() -> None:
    points = cloud(20)
    result = found(fit(points, transform_points(SIMILARITY, points) * (1.0, 1.0, -1.0)))
    scaled = result.onto_from_map[:, :3]
    scale = np.cbrt(np.linalg.det(scaled))
    assert scale > 0.0
    np.testing.assert_allclose(scaled @ scaled.T, scale**2 * np.eye(3), atol=1e-6 * scale**2)
    assert result.residuals_m.max() > 1.0


def test_noise_shows_in_the_residuals_and_in_what_is_uncertain() -> None:
    points = cloud(200)
    positions_m = transform_points(SIMILARITY, points)
    rng = np.random.default_rng(1)
    quiet, loud = (
        found(fit(points, positions_m + rng.normal(scale=noise_m, size=(200, 3))))
        for noise_m in (0.2, 2.0)
    )
    assert np.sqrt(np.mean(loud.residuals_m**2)) == pytest.approx(2.0 * math.sqrt(3.0), rel=0.1)
    assert loud.rotation_std_rad == pytest.approx(10.0 * quiet.rotation_std_rad, rel=0.3)
    assert loud.scale_std_ratio == pytest.approx(10.0 * quiet.scale_std_ratio, rel=0.3)
    assert np.abs(loud.onto_from_map - SIMILARITY).max() < 1.0


def test_outliers_have_no_weight_at_all() -> None:
    points = cloud(50)
    positions_m = transform_points(SIMILARITY, points)
    positions_m[:20] += np.random.default_rng(2).uniform(30.0, 100.0, (20, 3))
    result = found(fit(points, positions_m))
    assert result.weights[:20].max() == 0.0
    assert result.weights[20:].min() > 0.99
    np.testing.assert_allclose(result.onto_from_map, SIMILARITY, atol=1e-4)


def test_a_tight_group_wins_over_a_larger_loose_one() -> None:
    points = cloud(60)
    positions_m = transform_points(SIMILARITY, points)
    positions_m[28:] += np.random.default_rng(3).uniform(-9.0, 9.0, (32, 3)) + (3.0, 0.0, 0.0)
    result = found(fit(points, positions_m))
    assert result.residuals_m[:28].max() < 0.5


def test_points_on_a_line_leave_the_turn_about_it_open() -> None:
    points = line(12)
    result = found(fit(points, transform_points(SIMILARITY, points)))
    assert result.residuals_m.max() < 1e-3
    assert result.rotation_std_rad > 1.0
    assert result.scale_std_ratio < 0.01


def test_level_cameras_close_it() -> None:
    points = line(12)
    positions_m = transform_points(SIMILARITY, points)
    open_fit = found(fit(points, positions_m))
    # Cameras that face down in metres: their x axis lies level and across the path.
    along = positions_m[-1] - positions_m[0]
    across = np.cross(along, (0.0, 0.0, 1.0))
    across /= np.linalg.norm(across)
    down = np.cross(along / np.linalg.norm(along), across)
    down *= -np.sign(down[2])
    in_metres = np.stack([across, np.cross(down, across), down])
    rotations = np.tile(in_metres @ (SIMILARITY[:, :3] / 20.0), (12, 1, 1))
    settled, tilt_rad = level_cameras(
        open_fit,
        points,
        positions_m,
        rotations,
        stds_m=np.full((12, 3), 2.0),
        max_error_m=MAX_ERROR_M,
    )
    assert tilt_rad < 0.01
    assert math.degrees(settled.rotation_std_rad) < 4.0
    np.testing.assert_allclose(settled.onto_from_map, SIMILARITY, atol=0.3)


@pytest.mark.parametrize(
    ("points", "positions_m"),
    [
        (np.zeros((0, 3)), np.zeros((0, 3))),
        (cloud(2), cloud(2)),
        (np.ones((9, 3)), cloud(9)),
        (cloud(9), np.ones((9, 3))),
    ],
)
def test_without_triangles_there_is_no_fit(points: Float64Array, positions_m: Float64Array) -> None:
    assert fit(points, positions_m) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_has_no_fit(value: float) -> None:
    points = cloud(20)
    positions_m = transform_points(SIMILARITY, points)
    spoiled = points.copy()
    spoiled[7, 1] = value
    assert fit(points, positions_m) is not None
    assert fit(spoiled, positions_m) is None
    assert fit(points, spoiled) is None


def test_ten_thousand_cameras_take_seconds_at_most() -> None:
    points = cloud(10_000)
    positions_m = transform_points(SIMILARITY, points)
    positions_m[::3] += 50.0
    started_s = time.process_time()
    result = found(fit(points, positions_m))
    assert time.process_time() - started_s < 5.0
    np.testing.assert_allclose(result.onto_from_map, SIMILARITY, atol=1e-4)
