"""How well the ground is covered while somebody flies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from engine.dense.coverage import Coverage, CoverageStatus, coverage_geojson, coverage_of
from engine.dense.orthophoto import OrthoView
from engine.dense.surface import GroundGrid, Surface
from engine.types import Float64Array, FrameId
from tests.support.boxed_ground import FOCAL, SIZE, pose_above

_HEIGHT = 30.0  # of cameras: an image shows 32 by 24
_LINES = [(x, y) for x in range(-40, 41, 8) for y in range(-40, 41, 8)]


def test_a_survey_is_good_inside_and_thin_at_its_border() -> None:
    coverage = _coverage(_LINES)
    assert _status_at(coverage, 0.0, 0.0) is CoverageStatus.GOOD
    assert _status_at(coverage, 38.0, -38.0) is CoverageStatus.GOOD
    assert _status_at(coverage, 55.0, 49.0) is CoverageStatus.THIN
    assert coverage.share_of(CoverageStatus.HOLE) == 0.0
    assert 0.6 < coverage.share_of(CoverageStatus.GOOD) < 0.97


def test_numbers_and_angles_are_those_of_the_cameras() -> None:
    coverage = _coverage([(0, 0), (10, 0), (0, 8)])
    line, column = _place(coverage, 4.0, 3.0)
    assert coverage.num_keyframes[line, column] == 3
    x, y = (axis[i] for axis, i in zip(coverage.grid.centers(), (column, line), strict=True))
    rays = np.array([[0 - x, 0 - y, _HEIGHT], [10 - x, 0 - y, _HEIGHT], [0 - x, 8 - y, _HEIGHT]])
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    largest = np.rad2deg(np.arccos((rays @ rays.T).min()))
    assert coverage.best_angle_deg[line, column] == pytest.approx(largest, rel=0.08)


def test_what_was_left_out_between_lines_is_a_hole() -> None:
    around = [(x, y) for x, y in _LINES if max(abs(x), abs(y)) > 30]
    coverage = _coverage(around)
    assert _status_at(coverage, 0.0, 0.0) is CoverageStatus.HOLE
    assert _status_at(coverage, 40.0, 0.0) is not CoverageStatus.HOLE
    hole = np.count_nonzero(coverage.status == CoverageStatus.HOLE) * coverage.grid.cell**2
    assert 24 * 40 * 0.7 < hole < 44 * 44
    open_to_one_side = [(x, y) for x, y in around if y > -20 or abs(x) > 20]
    assert _coverage(open_to_one_side).share_of(CoverageStatus.HOLE) == 0.0


def test_many_views_from_one_place_are_thin() -> None:
    coverage = _coverage([(0.1 * i, 0.0) for i in range(6)])
    assert _status_at(coverage, 0.0, 0.0) is CoverageStatus.THIN
    line, column = _place(coverage, 0.0, 0.0)
    assert coverage.num_keyframes[line, column] == 6
    assert coverage.best_angle_deg[line, column] < 2.0


def test_a_place_without_a_surface_is_thin_however_many_see_it() -> None:
    surface = _flat()
    is_measured = surface.is_measured.copy()
    is_measured[70:90, 70:90] = False
    coverage = coverage_of(replace(surface, is_measured=is_measured), _views(_LINES))
    assert coverage is not None
    assert _status_at(coverage, 0.0, 0.0) is CoverageStatus.THIN
    assert _status_at(coverage, 20.0, 20.0) is CoverageStatus.GOOD


def test_views_of_the_horizon_do_not_make_the_grid_endless() -> None:
    level = OrthoView(
        frame_id=FrameId(1),
        version=1,
        pinhole=np.array([FOCAL, FOCAL, SIZE[0] / 2, SIZE[1] / 2]),
        size=SIZE,
        cam_from_ground=pose_above(0.0, 0.0, _HEIGHT, tilt_deg=85.0),
    )
    coverage = coverage_of(_flat(), [level])
    assert coverage is not None
    left, lower, right, upper = coverage.grid.bounds
    assert max(right - left, upper - lower) < 4 * _HEIGHT
    skyward = replace(level, cam_from_ground=pose_above(0.0, 0.0, _HEIGHT, tilt_deg=150.0))
    assert coverage_of(_flat(), [skyward]) is None
    assert coverage_of(_flat(), []) is None


def test_geojson_covers_each_cell_once_and_names_what_it_is() -> None:
    around = [(x, y) for x, y in _LINES if max(abs(x), abs(y)) > 30]
    coverage = _coverage(around)
    record = coverage_geojson(coverage, lambda places: places / 1000.0)
    areas = {}
    for feature in record["features"]:
        rings = np.array([part[0] for part in feature["geometry"]["coordinates"]]) * 1000.0
        assert (rings[:, 0] == rings[:, 4]).all()
        x, y = rings[..., 0], rings[..., 1]
        twice = (x[:, :-1] * y[:, 1:] - x[:, 1:] * y[:, :-1]).sum(axis=1)
        assert (twice > 0).all()  # counterclockwise
        areas[feature["properties"]["status"]] = twice.sum() / 2
    for status in ("hole", "thin", "good"):
        num_cells = np.count_nonzero(coverage.status == CoverageStatus[status.upper()])
        assert areas[status] == pytest.approx(num_cells * coverage.grid.cell**2, rel=1e-4)
    shares = [feature["properties"]["share"] for feature in record["features"]]
    assert sum(shares) == pytest.approx(1.0, abs=0.001)
    num_rectangles = sum(len(one["geometry"]["coordinates"]) for one in record["features"])
    assert num_rectangles < coverage.status.size / 10


def test_areas_across_the_date_line_are_cut_there() -> None:
    coverage = _coverage([(x, y) for x, y in _LINES if max(abs(x), abs(y)) > 30])

    def across(places: Float64Array) -> Float64Array:
        """Longitudes around 180 degrees, of which those beyond count from -180 degrees."""
        turned = places / 1000.0 + (179.995, -17.0)
        turned[:, 0] = (turned[:, 0] + 180.0) % 360.0 - 180.0
        return np.asarray(turned)

    areas = {}
    for feature in coverage_geojson(coverage, across)["features"]:
        area = 0.0
        for (ring,) in feature["geometry"]["coordinates"]:
            assert ring[0] == ring[-1]
            x, y = np.array(ring).T
            assert np.ptp(x) < 1.0
            twice = float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())
            assert twice > 0.0
            area += 1e6 * twice / 2
        areas[feature["properties"]["status"]] = area
    for status, area in areas.items():
        num_cells = np.count_nonzero(coverage.status == CoverageStatus[status.upper()])
        assert area == pytest.approx(num_cells * coverage.grid.cell**2, rel=1e-3)


def _flat() -> Surface:
    grid = GroundGrid(cell=0.75, west=-80, north=80, num_columns=160, num_lines=160)
    return Surface(
        grid=grid,
        heights=np.zeros((160, 160), np.float32),
        is_measured=np.ones((160, 160), bool),
    )


def _views(centers: Sequence[tuple[float, float]]) -> list[OrthoView]:
    return [
        OrthoView(
            frame_id=FrameId(i + 1),
            version=1,
            pinhole=np.array([FOCAL, FOCAL, SIZE[0] / 2, SIZE[1] / 2]),
            size=SIZE,
            cam_from_ground=pose_above(x, y, _HEIGHT),
        )
        for i, (x, y) in enumerate(centers)
    ]


def _coverage(centers: Sequence[tuple[float, float]]) -> Coverage:
    coverage = coverage_of(_flat(), _views(centers))
    assert coverage is not None
    return coverage


def _place(coverage: Coverage, x: float, y: float) -> tuple[int, int]:
    grid = coverage.grid
    return int(grid.north - y // grid.cell - 1), int(x // grid.cell - grid.west)


def _status_at(coverage: Coverage, x: float, y: float) -> CoverageStatus:
    return CoverageStatus(int(coverage.status[_place(coverage, x, y)]))
