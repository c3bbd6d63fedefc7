"""The tilt, turn and scale of a map against a place that it had before."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.geo.map_change import Anchors, MapChange, map_change
from engine.geo.similarity_fit import fit_similarity
from engine.geometry import rotation_from_vector
from engine.types import Float64Array

CENTERS_M = np.array([[x, y, 40.0] for x in (-40.0, 0.0, 40.0) for y in (-30.0, 0.0, 30.0)])
BEFORE = 7.0 * np.column_stack([rotation_from_vector(np.array([0.3, -1.0, 2.0])), (3.0, -5.0, 2.0)])
CONTROL = Anchors(places_m=CENTERS_M[[0, 2, 7]], error_m=0.05, num_independent=3)


def positions(*, error_m: float = 0.5, level_std_rad: float = 0.0) -> Anchors:
    return Anchors(
        places_m=CENTERS_M, error_m=error_m, num_independent=4, level_std_rad=level_std_rad
    )


def moved(
    *, turned_deg: tuple[float, float, float] = (0.0, 0.0, 0.0), scale: float = 1.0
) -> Float64Array:
    """The place before, about another point, with metres of shift."""
    turned = scale * rotation_from_vector(np.radians(turned_deg)) @ BEFORE
    turned[:, 3] += (4.0, -9.0, -43.0)
    return np.asarray(turned)


def change(now: Float64Array, held: Anchors | None = None) -> MapChange:
    return map_change(BEFORE, now, before=held or positions(), now=CONTROL)


def test_a_shift_is_no_change() -> None:
    found = change(moved())
    assert found.tilt_rad.value == pytest.approx(0.0, abs=1e-6)
    assert found.scale_ratio.value == pytest.approx(0.0, abs=1e-9)
    assert not found.is_clear


def test_tilt_turn_and_scale_are_clear_beyond_what_the_scatter_of_positions_leaves_open() -> None:
    found = change(moved(turned_deg=(3.0, 4.0, 0.0), scale=1.05))
    assert math.degrees(found.tilt_rad.value) == pytest.approx(5.0, abs=0.01)
    assert found.scale_ratio.value == pytest.approx(0.05)
    assert found.tilt_rad.is_clear
    assert found.scale_ratio.is_clear
    assert not found.turn_rad.is_clear
    assert change(moved(turned_deg=(0.0, 0.0, -4.0))).turn_rad.is_clear
    assert not change(moved(turned_deg=(0.5, 0.0, 0.5), scale=1.009)).is_clear


def test_positions_of_metres_contradict_no_small_tilt_and_exact_ones_do() -> None:
    tilted = moved(turned_deg=(2.0, 0.0, 0.0))
    assert not change(tilted, positions(error_m=3.0)).is_clear
    assert change(tilted, positions(error_m=0.05)).is_clear
    assert not change(moved(turned_deg=(0.4, 0.0, 0.0)), positions(error_m=0.01)).is_clear


@pytest.mark.parametrize(("noise_m", "drift_m"), [((1.0, 1.0, 2.0), 0.0), ((0.5, 0.5, 0.3), 2.0)])
def test_right_control_is_not_contradicted_by_positions_that_scatter_and_drift(
    noise_m: tuple[float, float, float], drift_m: float
) -> None:
    rng = np.random.default_rng(0)
    num = len(CENTERS_M)
    for _ in range(20):
        drift = drift_m * np.cumsum(rng.normal(size=(num, 3)), axis=0) / math.sqrt(num)
        positions_m = CENTERS_M + rng.normal(size=(num, 3)) * noise_m + drift
        stds_m = np.tile((2.0, 2.0, 4.0), (num, 1))
        fit = fit_similarity(CENTERS_M, positions_m, stds_m=stds_m, max_error_m=10.0)
        assert fit is not None
        rmse_m = float(np.sqrt(np.mean(fit.residuals_m**2)))
        held = positions(error_m=rmse_m)
        found = map_change(fit.onto_from_map, np.eye(3, 4), before=held, now=CONTROL)
        assert not found.is_clear


def test_where_heights_were_not_measured_or_the_path_is_a_line_a_tilt_stays_open() -> None:
    tilted = moved(turned_deg=(0.0, 5.0, 0.0))
    assert change(tilted).is_clear
    assert not change(tilted, positions(level_std_rad=math.radians(3.5))).is_clear
    line = Anchors(
        places_m=CENTERS_M * np.array([0.0, 1.0, 0.0]), error_m=0.1, num_independent=4
    )  # northwards, and the tilt is about it
    assert not change(tilted, line).is_clear
    assert change(moved(turned_deg=(5.0, 0.0, 0.0)), line).is_clear
