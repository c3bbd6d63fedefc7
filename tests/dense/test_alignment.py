"""Depth laid onto the sparse points of the map."""

from __future__ import annotations

import numpy as np

from engine.dense.alignment import error_factor, is_beyond_points, laid_onto_points
from engine.dense.rectification import Pinhole
from engine.types import Float64Array
from tests.support.depth_scenes import BOX, HEIGHT, PINHOLE, WALL, WIDTH, pose_at, render

CAMERA = Pinhole(
    focal_px=PINHOLE.params[0], center_x_px=80.0, center_y_px=60.0, width=WIDTH, height=HEIGHT
)
DEPTH = render([WALL, BOX], pose_at((0.0, 0.0, 0.0)), PINHOLE).depth
COLUMNS = np.arange(WIDTH) / WIDTH - 0.5
TILT = 0.01 + 0.01 * COLUMNS  # of the wall's depth


def points(num: int, *, noise: float = 0.0) -> Float64Array:
    rng = np.random.default_rng(0)
    columns, lines = rng.integers(0, WIDTH, num), rng.integers(0, HEIGHT, num)
    rays = CAMERA.rays_of(np.arange(WIDTH, dtype=np.float64), np.arange(HEIGHT, dtype=np.float64))[
        lines, columns
    ]
    depth = DEPTH[lines, columns] * (1.0 + noise * rng.normal(size=num))
    return np.asarray(rays * depth[:, None])


def test_a_tilt_of_inverse_depth_is_taken_out_up_to_the_noise_of_the_points() -> None:
    tilted = (1.0 / DEPTH + TILT / 6.0).astype(np.float32)
    before = np.median(np.abs(tilted * DEPTH - 1.0))
    exact = laid_onto_points(tilted, CAMERA, points(150))
    noisy = laid_onto_points(tilted, CAMERA, points(150, noise=0.01))
    assert before > 0.008
    assert np.median(np.abs(exact * DEPTH - 1.0)) < 0.001
    assert 0.0 < np.median(np.abs(noisy * DEPTH - 1.0)) < 0.003


def test_a_third_of_wrong_points_changes_little() -> None:
    rng = np.random.default_rng(1)
    sparse = points(150)
    sparse[:50] *= 1.0 + rng.uniform(0.01, 0.04, (50, 1))
    laid = laid_onto_points((1.0 / DEPTH).astype(np.float32), CAMERA, sparse)
    assert np.median(np.abs(laid * DEPTH - 1.0)) < 0.004


def test_few_points_and_unknown_depth_change_nothing() -> None:
    tilted = (1.0 / DEPTH + TILT / 6.0).astype(np.float32)
    assert np.array_equal(laid_onto_points(tilted, CAMERA, points(30)), tilted)
    tilted[:60] = 0.0
    laid = laid_onto_points(tilted, CAMERA, points(150))
    assert not laid[:60].any()
    assert (laid[60:] > 0).all()


def test_errors_are_claimed_as_large_as_they_are_at_the_points() -> None:
    rng = np.random.default_rng(3)
    right = (1.0 / DEPTH).astype(np.float32)
    off = (right * (1.0 + 0.012 * rng.normal(size=right.shape))).astype(np.float32)
    claimed = np.full(right.shape, 0.004, np.float32)
    assert 2.3 < error_factor(off, claimed, CAMERA, points(400)) < 3.5
    assert error_factor(right, claimed, CAMERA, points(400)) == 1.0
    assert error_factor(off, claimed, CAMERA, points(30)) == 1.0
    assert error_factor(off, np.full_like(off, np.inf), CAMERA, points(400)) == 1.0


def test_areas_that_lie_far_from_all_points_around_are_found_and_what_has_points_is_kept() -> None:
    right = (1.0 / DEPTH).astype(np.float32)
    is_beyond = is_beyond_points(right, CAMERA, points(400))
    assert is_beyond.mean() < 0.01  # the box has points of its own; a corner of it has none
    area = np.s_[0:30, 0:40]
    for factor in (0.7, 1.5):
        wrong = right.copy()
        wrong[area] *= factor
        is_beyond = is_beyond_points(wrong, CAMERA, points(400))
        assert is_beyond[area].mean() > 0.9
        is_beyond[area] = False
        assert is_beyond.mean() < 0.01
        assert not is_beyond_points(wrong, CAMERA, points(30)).any()
    unknown = np.zeros_like(right)
    assert not is_beyond_points(unknown, CAMERA, points(400)).any()


def test_away_from_the_points_a_hole_is_doubtful_and_a_thing_in_front_is_not() -> None:
    right = (1.0 / DEPTH).astype(np.float32)
    sparse = points(1200)
    sparse = sparse[CAMERA.pixels_of(sparse)[:, 0] > WIDTH - 40]
    area = np.s_[:, :40]
    for factor, is_doubtful in ((0.7, True), (1.5, False)):
        wrong = right.copy()
        wrong[area] *= factor
        assert is_beyond_points(wrong, CAMERA, sparse)[area].all() == is_doubtful
        assert is_beyond_points(wrong, CAMERA, sparse)[area].any() == is_doubtful
