"""Maps laid onto surveyed points: accuracy, wrong points by name, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from engine.config import load_config
from engine.geo.control_points import ControlFit, PlacedPoint, lay_onto_control_points
from engine.geo.georeference import places_on_globe
from engine.geometry import rotation_from_vector, transform_points
from engine.types import ControlPoint, Float64Array, GpsFix

ORIGIN = GpsFix(latitude_deg=47.0, longitude_deg=8.0, altitude_m=400.0)
METRES_PER_UNIT = 7.0
ENU_FROM_MAP = METRES_PER_UNIT * np.column_stack(
    [rotation_from_vector(np.array([0.3, -1.0, 2.0])), (3.0, -5.0, 2.0)]
)
SURVEY_STD_M = 0.02
MAP_STD_M = np.array([0.03, 0.03, 0.06])


def ground(num: int, *, seed: int = 0) -> Float64Array:
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.uniform(-60.0, 60.0, (num, 2)), rng.uniform(0.0, 4.0, num)])


def points_of(
    true_m: Float64Array,
    *,
    noise: float = 1.0,
    seed: int = 0,
    wrong_m: Mapping[int, Sequence[float] | Float64Array] | None = None,
    checks: Sequence[int] = (),
    flat: Sequence[int] = (),
    origin: GpsFix = ORIGIN,
) -> list[PlacedPoint]:
    """Points that were surveyed and marked with noise; those in ``flat`` without height."""
    rng = np.random.default_rng(seed)
    inverse = np.linalg.inv(np.vstack([ENU_FROM_MAP, (0, 0, 0, 1)]))[:3]
    in_map = transform_points(inverse, true_m + noise * rng.normal(size=true_m.shape) * MAP_STD_M)
    surveyed = true_m + noise * rng.normal(scale=SURVEY_STD_M, size=true_m.shape)
    for row, offset_m in (wrong_m or {}).items():
        surveyed[row] += offset_m
    covariance = inverse[:, :3] @ np.diag(MAP_STD_M**2) @ inverse[:, :3].T
    return [
        PlacedPoint(
            point=ControlPoint(
                name=f"P{row}",
                fix=GpsFix(
                    latitude_deg=latitude,
                    longitude_deg=(longitude + 180.0) % 360.0 - 180.0,
                    altitude_m=None if row in flat else altitude,
                ),
                marks=(),
                is_check=row in checks,
            ),
            place=in_map[row],
            covariance=covariance,
        )
        for row, (latitude, longitude, altitude) in enumerate(
            places_on_globe(surveyed, origin=origin).tolist()
        )
    ]


def laid_or_why(points: Sequence[PlacedPoint], *settings: str, up: float = 1.0) -> ControlFit | str:
    downwards = -up * ENU_FROM_MAP[None, 2, :3] / METRES_PER_UNIT
    config = load_config(settings=settings).georeference
    return lay_onto_control_points(points, downwards=downwards, config=config)


def laid(points: Sequence[PlacedPoint], *settings: str) -> ControlFit:
    found = laid_or_why(points, *settings)
    assert isinstance(found, ControlFit), found
    return found


def wrong_ones(fit: ControlFit) -> list[int]:
    return [row for row, is_used in enumerate(fit.is_used.tolist()) if not is_used]


def test_points_without_noise_give_the_similarity() -> None:
    fit = laid(points_of(ground(5), noise=0.0))
    assert fit.georeference.metres_per_map_unit == pytest.approx(METRES_PER_UNIT, rel=1e-9)
    assert np.abs(fit.errors_m).max() < 1e-6
    assert fit.is_used.all()


@pytest.mark.slow
def test_errors_of_check_points_are_as_large_as_what_went_in() -> None:
    errors_m = np.concatenate(
        [
            laid(points_of(ground(14, seed=seed), seed=seed, checks=range(8, 14))).errors_m[8:]
            for seed in range(15)
        ]
    )
    expected_m = np.hypot(MAP_STD_M, SURVEY_STD_M)
    spread_m = np.sqrt((errors_m**2).mean(axis=0))
    assert (spread_m < 1.6 * expected_m).all()  # the fit has errors of its own
    assert (spread_m > 0.9 * expected_m).all()


def test_check_points_bend_nothing() -> None:
    true_m = ground(8)
    right = laid(points_of(true_m, checks=[6, 7]))
    wrong = laid(points_of(true_m, checks=[6, 7], wrong_m={6: (50.0, 0.0, 0.0)}))
    np.testing.assert_array_equal(wrong.georeference.enu_from_map, right.georeference.enu_from_map)
    assert wrong.errors_m[6, 0] == pytest.approx(-50.0, abs=0.3)
    assert wrong.georeference.num_inliers == 6


@pytest.mark.slow
@pytest.mark.parametrize(("num", "wrong"), [(5, [4]), (6, [0]), (8, [1, 5]), (20, [3, 9, 12, 17])])
def test_wrong_points_are_found_among_the_others(num: int, wrong: list[int]) -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        offsets_m = {row: 1.5 * _unit(rng.normal(size=3)) for row in wrong}
        fit = laid(points_of(ground(num, seed=seed), seed=seed, wrong_m=offsets_m))
        assert wrong_ones(fit) == wrong
        off_m = np.linalg.norm(fit.errors_m[wrong], axis=1)
        assert (np.abs(off_m - 1.5) < 0.6).all()
        assert fit.georeference.rmse_m < 0.15


def _unit(vector: Float64Array) -> Float64Array:
    return np.asarray(vector / np.linalg.norm(vector))


@pytest.mark.slow
def test_right_points_are_hardly_ever_called_wrong() -> None:
    fits = [
        laid(points_of(ground(num, seed=seed), seed=seed))
        for num in (5, 6, 9, 15)
        for seed in range(6)
    ]
    assert sum(bool(wrong_ones(fit)) for fit in fits) <= 1
    ratios = [fit.georeference.rmse_m / fit.expected_m for fit in fits]
    assert 0.4 < float(np.median(ratios)) < 1.1


def test_of_four_points_none_can_be_called_wrong_and_their_errors_show_it() -> None:
    fit = laid(points_of(ground(4), wrong_m={2: (3.0, 0.0, 0.0)}))
    assert fit.is_used.all()
    assert fit.georeference.rmse_m > 3.0 * fit.expected_m


def test_points_without_height_count_horizontally() -> None:
    fit = laid(points_of(ground(8), flat=[1, 2]))
    assert np.isnan(fit.errors_m[[1, 2], 2]).all()
    assert np.isfinite(np.delete(fit.errors_m, [1, 2], axis=0)).all()
    assert np.abs(fit.errors_m[:, :2]).max() < 0.2


def test_as_many_points_without_height_as_with_one_are_no_line() -> None:
    for seed in range(6):
        fit = laid(points_of(ground(6, seed=seed), seed=seed, flat=range(3)))
        assert fit.is_used.all()
        assert fit.georeference.rmse_m < 0.15


def test_a_wrong_point_is_found_among_points_of_which_half_lack_heights() -> None:
    fit = laid(points_of(ground(10), flat=range(5), wrong_m={7: (2.0, 2.0, 0.0)}))
    assert wrong_ones(fit) == [7]


def test_points_on_both_sides_of_the_date_line_lie_together() -> None:
    origin = GpsFix(latitude_deg=-17.0, longitude_deg=180.0, altitude_m=10.0)
    fit = laid(points_of(ground(6), origin=origin))
    assert abs(abs(fit.georeference.origin.longitude_deg) - 180.0) < 0.01
    assert fit.georeference.rmse_m < 0.15


def test_accurate_surveys_pull_harder_than_inaccurate_ones() -> None:
    points = points_of(ground(6))
    assert laid(points, "georeference.control_accuracy_m=0.5").expected_m > 0.5
    assert laid(points).expected_m < 0.2


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (points_of(ground(2)), "2 control points with a height .* 3 are needed"),
        (points_of(ground(5), checks=[0, 1, 2]), "2 control points"),
        (points_of(ground(4), flat=[0, 1]), "2 control points with a height"),
        (points_of(np.outer(np.arange(6.0), [9.0, 5.0, 0.0])), "lie on a line"),
        (points_of(ground(6), flat=range(6)), "0 control points"),
        ([], "0 control points"),
    ],
)
def test_what_determines_no_similarity_is_refused_in_words(
    points: list[PlacedPoint], words: str
) -> None:
    found = laid_or_why(points)
    assert isinstance(found, str)
    assert re.search(words, found), found


def test_a_map_of_another_place_contradicts_its_points() -> None:
    points = points_of(ground(6))
    elsewhere = points_of(ground(6, seed=3) * 4.0)
    mixed = [
        PlacedPoint(point=one.point, place=other.place, covariance=other.covariance)
        for one, other in zip(points, elsewhere, strict=True)
    ]
    found = laid_or_why(mixed)
    assert isinstance(found, str)
    assert "contradict the map" in found


def test_a_point_far_off_among_four_is_a_contradiction_and_no_line() -> None:
    found = laid_or_why(points_of(ground(4), wrong_m={0: (9.0, 0.0, 0.0)}))
    assert isinstance(found, str)
    assert "contradict the map" in found


def test_points_at_one_place_are_refused_as_such() -> None:
    found = laid_or_why(points_of(np.zeros((4, 3)), noise=0.0))
    assert isinstance(found, str)
    assert "all one" in found


def test_a_map_that_would_lie_upside_down_is_refused() -> None:
    found = laid_or_why(points_of(ground(6)), up=-1.0)
    assert isinstance(found, str)
    assert "look at the sky" in found
