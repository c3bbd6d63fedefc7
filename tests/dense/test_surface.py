"""Heights of the ground from dense points."""

from __future__ import annotations

import numpy as np
import pytest

from engine.dense.surface import (
    Surface,
    SurfaceBuilder,
    completed,
    ground_from_world,
    round_cell,
    vertical_of,
)
from engine.geometry import transform_points
from engine.types import BoolArray, Float64Array

_CELL = 0.5


def test_heights_are_those_of_roofs_and_ground_and_steps_stay_sharp() -> None:
    surface = _surface(_town(noise=0.05))
    x, y = np.meshgrid(*surface.grid.centers())
    error = surface.heights - _true_heights(x, y)
    inside = (np.abs(x) < 24) & (np.abs(y) < 24)
    is_near_step = (np.abs(np.abs(x) - 8) < 0.6) | (np.abs(np.abs(y) - 8) < 0.6)
    assert np.abs(error[inside & ~is_near_step]).max() < 0.25
    assert np.abs(error[inside]).mean() > 0.005  # the noise is there
    between = (surface.heights > 1.0) & (surface.heights < 5.0)
    assert np.count_nonzero(between) == 0


def test_points_of_walls_and_below_roofs_do_not_lower_a_height() -> None:
    town = _town(noise=0.0)
    below = town[town[:, 2] > 5.0] - [0.0, 0.0, 3.0]
    surface = _surface(np.concatenate([town, below]))
    assert _height_at(surface, 0.0, 0.0) == pytest.approx(6.0, abs=0.01)


def test_unsure_points_count_only_where_no_sure_ones_are() -> None:
    town = _town(noise=0.02)
    ghosts = town[(np.abs(town[:, 0] + 16) < 3) & (np.abs(town[:, 1]) < 3)] + [0.0, 0.0, 4.0]
    alone = (town[:, 0] > 15) & (town[:, 1] > 15)
    points = np.concatenate([town, ghosts])
    is_sure = np.append(~alone, np.zeros(len(ghosts), bool))
    builder = SurfaceBuilder(_CELL)
    builder.add(points, is_sure=is_sure)
    surface = builder.surface()
    assert surface is not None
    assert _height_at(surface, -16.0, 0.0) == pytest.approx(0.0, abs=0.2)
    assert _height_at(surface, 20.0, 20.0) == pytest.approx(0.0, abs=0.2)
    assert _measured_at(surface, 20.0, 20.0)
    assert _height_at(_surface(points), -16.0, 0.0) > 3.5


def test_single_points_in_the_air_are_left_out() -> None:
    town = _town(noise=0.02)
    ghosts = np.array([[-15.2, 3.1, 12.0], [14.9, -12.8, 30.0]])
    surface = _surface(np.concatenate([town, ghosts]))
    for x, y, _ in ghosts:
        assert _height_at(surface, x, y) == pytest.approx(0.0, abs=0.2)
    assert np.nanmax(surface.heights) < 6.3


def test_small_gaps_are_filled_and_said_to_be_and_large_ones_stay() -> None:
    town = _town(noise=0.02)
    small = (np.abs(town[:, 0] + 18) < 1.5) & (np.abs(town[:, 1]) < 1.5)
    large = (np.abs(town[:, 0] - 17) < 6) & (np.abs(town[:, 1] - 17) < 6)
    builder = SurfaceBuilder(_CELL)
    builder.add(town[~small & ~large])
    surface = builder.surface(max_gap=10)
    assert surface is not None
    assert _height_at(surface, -18.0, 0.0) == pytest.approx(0.0, abs=0.1)
    assert not _measured_at(surface, -18.0, 0.0)
    assert _measured_at(surface, -18.0, 5.0)
    assert np.isnan(_height_at(surface, 17.0, 17.0))


def test_a_gap_beside_a_roof_is_filled_from_the_ground() -> None:
    town = _town(noise=0.02)
    hidden = (town[:, 0] > 8.0) & (town[:, 0] < 11.0) & (np.abs(town[:, 1]) < 8.0)
    surface = _surface(town[~hidden])
    assert _height_at(surface, 8.8, 0.0) == pytest.approx(0.0, abs=0.2)
    assert _height_at(surface, 7.2, 0.0) == pytest.approx(6.0, abs=0.2)


def test_the_order_of_points_and_parts_changes_nothing() -> None:
    town = _town(noise=0.05)
    order = np.random.default_rng(1).permutation(len(town))
    whole, shuffled = _surface(town), _surface(town[order])
    assert whole.grid == shuffled.grid
    assert whole.heights.tobytes() == shuffled.heights.tobytes()
    west = town[:, 0] < 0.0
    parts = SurfaceBuilder(_CELL)
    parts.add(town[west])
    parts.add(town[~west])
    halves = parts.surface()
    assert halves is not None
    assert whole.heights.tobytes() == halves.heights.tobytes()


def test_large_gaps_are_completed_smoothly_and_nothing_known_changes() -> None:
    x, y = np.meshgrid(np.arange(-40, 40, 0.3), np.arange(-40, 40, 0.3))
    slope = np.stack([x, y, 0.1 * x + 5.0], axis=-1).reshape(-1, 3)
    gap = np.abs(slope[:, :2]).max(axis=1) < 15
    surface = _surface(slope[~gap])
    assert np.isnan(_height_at(surface, 0.0, 0.0))
    whole = completed(surface)
    known = ~np.isnan(surface.heights)
    assert np.array_equal(whole.heights[known], surface.heights[known])
    assert np.array_equal(whole.is_measured, surface.is_measured)
    for x_m in (-12.0, 0.0, 12.0):
        assert _height_at(whole, x_m, 0.0) == pytest.approx(0.1 * x_m + 5.0, abs=0.8)
    near = completed(surface, reach=4)
    assert np.isnan(_height_at(near, 0.0, 0.0))
    assert not np.isnan(_height_at(near, -14.0, 0.0))


def test_points_far_out_do_not_make_the_grid_large() -> None:
    far = _town(noise=0.0)[:400] + [40_000.0, 0.0, 0.0]
    builder = SurfaceBuilder(_CELL, max_cells=2_000_000)
    builder.add(np.concatenate([_town(noise=0.0), far, [[9e8, 9e8, 0.0]]]))
    surface = builder.surface()
    assert surface is not None
    assert surface.heights.size <= 2_000_000
    assert _height_at(surface, 0.0, 0.0) == pytest.approx(6.0, abs=0.01)


def test_cells_are_doubled_where_the_ground_is_too_large_for_them() -> None:
    strip = np.arange(-400.0, 400.0, 0.25)
    x, y = np.meshgrid(strip, np.arange(0.0, 30.0, 0.25))
    points = np.stack([x, y, 0.01 * x], axis=-1).reshape(-1, 3)
    builder = SurfaceBuilder(0.25, max_cells=4 * 256**2)
    for part in np.array_split(points[np.argsort(points[:, 0])], 20):
        builder.add(part)
    surface = builder.surface()
    assert surface is not None
    assert surface.grid.cell in (0.5, 1.0)
    assert surface.grid.num_columns * surface.grid.cell == pytest.approx(800.0, abs=2.0)
    assert _height_at(surface, 300.0, 15.0) == pytest.approx(3.0, abs=0.02)
    assert np.isnan(surface.heights).mean() < 0.01


def test_nothing_has_no_surface() -> None:
    builder = SurfaceBuilder(_CELL)
    assert builder.surface() is None
    builder.add(np.empty((0, 3)))
    assert builder.surface() is None
    builder.add(np.array([[0.0, 0.0, 0.0]]))
    assert builder.surface() is None


def test_the_vertical_is_what_most_surfaces_face_despite_walls_and_noise() -> None:
    rng = np.random.default_rng(0)
    true = np.array([0.2, -0.9, 0.3])
    true /= np.linalg.norm(true)
    walls = np.cross(true, rng.normal(size=(4000, 3)))
    level = true + 0.2 * rng.normal(size=(6000, 3))
    normals = np.concatenate([walls, level])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    towards = true + [0.3, 0.0, 0.2]  # cameras tilted the same way
    up = vertical_of(normals.astype(np.float32), towards=towards)
    assert np.rad2deg(np.arccos(up @ true)) < 0.7
    ground = ground_from_world(up)
    assert np.allclose(transform_points(ground, up[None]), [[0, 0, 1]])
    assert np.linalg.det(ground[:, :3]) == pytest.approx(1.0)


def test_cells_are_round_and_stay_while_they_fit() -> None:
    assert round_cell(0.047) == pytest.approx(0.05)
    assert round_cell(0.05) == pytest.approx(0.05)
    assert round_cell(123.0) == pytest.approx(150.0)
    assert round_cell(0.06, former=0.05) == 0.05
    assert round_cell(0.08, former=0.05) == pytest.approx(0.08)


def _town(*, noise: float) -> Float64Array:
    """Points on level ground, 50 m wide, and on a flat roof in its middle, 16 m wide and 6 m up."""
    x, y = np.meshgrid(np.arange(-25, 25, 0.3), np.arange(-25, 25, 0.3))
    z = _true_heights(x, y) + noise * np.random.default_rng(0).normal(size=x.shape)
    return np.stack([x, y, z], axis=-1).reshape(-1, 3)


def _true_heights(x: Float64Array, y: Float64Array) -> Float64Array:
    return np.where((np.abs(x) <= 8) & (np.abs(y) <= 8), 6.0, 0.0)


def _surface(points: Float64Array) -> Surface:
    builder = SurfaceBuilder(_CELL)
    builder.add(points)
    surface = builder.surface()
    assert surface is not None
    return surface


def _place(surface: Surface, x: float, y: float) -> tuple[int, int]:
    grid = surface.grid
    return int(grid.north - y // grid.cell - 1), int(x // grid.cell - grid.west)


def _height_at(surface: Surface, x: float, y: float) -> float:
    return float(surface.heights[_place(surface, x, y)])


def _measured_at(surface: Surface, x: float, y: float) -> bool:
    measured: BoolArray = surface.is_measured
    return bool(measured[_place(surface, x, y)])
