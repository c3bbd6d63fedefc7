"""A map against GPS: exact, noisy, and where it cannot be told."""

from __future__ import annotations

import numpy as np
import pycolmap
import pytest

from engine.geometry import rotation_from_vector
from engine.georeference import gps_rmse_m
from engine.types import Float64Array, GpsFix

ORIGIN = (47.0, 8.0, 500.0)


def flight_m(num: int) -> Float64Array:
    """Positions (num, 3) east, north, up of a bending, climbing flight."""
    t = np.linspace(0.0, 1.0, num)
    return np.column_stack([200.0 * t, 60.0 * np.sin(4.0 * t), 20.0 + 15.0 * t**2])


def fixes_at(positions_m: Float64Array) -> list[GpsFix]:
    geodetic = pycolmap.GPSTransform().enu_to_ellipsoid(positions_m, *ORIGIN)
    return [
        GpsFix(latitude_deg=latitude, longitude_deg=longitude, altitude_m=altitude)
        for latitude, longitude, altitude in geodetic.tolist()
    ]


def in_map(positions_m: Float64Array) -> Float64Array:
    """The same places in a map of another scale, turned and moved."""
    rotation = rotation_from_vector(np.array([0.4, -1.2, 2.0]))
    placed: Float64Array = 0.03 * positions_m @ rotation.T + (1.0, -4.0, 2.0)
    return placed


def test_an_exact_map_agrees_wherever_it_lies_and_however_large_it_is() -> None:
    positions_m = flight_m(20)
    rmse_m = gps_rmse_m(in_map(positions_m), fixes_at(positions_m))
    assert rmse_m == pytest.approx(0.0, abs=1e-4)


def test_noise_in_the_fixes_shows_at_its_size() -> None:
    positions_m = flight_m(200)
    noise_m = np.random.default_rng(0).normal(scale=2.0, size=positions_m.shape)
    rmse_m = gps_rmse_m(in_map(positions_m), fixes_at(positions_m + noise_m))
    assert rmse_m is not None
    assert rmse_m == pytest.approx(2.0 * np.sqrt(3.0), rel=0.1)


def test_a_bent_map_does_not_agree() -> None:
    positions_m = flight_m(20)
    bent_m = positions_m + np.outer(np.linspace(-1.0, 1.0, 20) ** 2, [0.0, 0.0, 30.0])
    rmse_m = gps_rmse_m(in_map(bent_m), fixes_at(positions_m))
    assert rmse_m is not None
    assert 1.0 < rmse_m < 30.0


@pytest.mark.parametrize("num", [0, 1, 3])
def test_few_fixes_do_not_tell(num: int) -> None:
    positions_m = flight_m(20)[:num]
    assert gps_rmse_m(in_map(positions_m), fixes_at(positions_m)) is None


def test_four_fixes_tell() -> None:
    positions_m = flight_m(4)
    assert gps_rmse_m(in_map(positions_m), fixes_at(positions_m)) is not None


def test_a_camera_that_stood_still_does_not_tell() -> None:
    assert gps_rmse_m(np.ones((6, 3)), fixes_at(flight_m(6))) is None
    assert gps_rmse_m(in_map(flight_m(6)), fixes_at(np.ones((6, 3)))) is None


def test_a_perfectly_straight_flight_does_not_tell() -> None:
    line_m = np.outer(np.arange(6.0), [10.0, 5.0, 1.0])
    assert gps_rmse_m(in_map(line_m), fixes_at(line_m)) is None
