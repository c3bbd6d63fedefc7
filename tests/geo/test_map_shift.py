"""How far a map moved between two places on the globe."""

from __future__ import annotations

import numpy as np
import pytest

from engine.geo.georeference import places_on_globe, positions_in_enu
from engine.geo.map_shift import MapShift, map_shift
from engine.types import GpsFix

ORIGIN = GpsFix(latitude_deg=47.0, longitude_deg=8.0, altitude_m=430.0)
CENTERS = np.array([[0.0, 0.0, 50.0], [80.0, 0.0, 50.0], [80.0, 60.0, 55.0]])


def shift_to(origin: GpsFix, *, moved_m: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> MapShift:
    return map_shift(
        CENTERS,
        CENTERS + np.array(moved_m),
        origin_before=ORIGIN,
        origin_after=origin,
        rmse_m=1.5,
    )


def test_cameras_on_the_same_places_about_another_origin_have_not_moved() -> None:
    (latitude, longitude, altitude) = places_on_globe(
        np.array([[900.0, -700.0, 12.0]]), origin=ORIGIN
    )[0].tolist()
    origin = GpsFix(latitude_deg=latitude, longitude_deg=longitude, altitude_m=altitude)
    fixes = [
        GpsFix(latitude_deg=a, longitude_deg=b, altitude_m=c)
        for a, b, c in places_on_globe(CENTERS, origin=ORIGIN).tolist()
    ]
    found = map_shift(
        CENTERS,
        positions_in_enu(fixes, origin=origin),
        origin_before=ORIGIN,
        origin_after=origin,
        rmse_m=1.5,
    )
    assert found.words == "0.0 m horizontally and 0.0 m up"
    assert not (found.is_far or found.is_far_up)


def test_metres_are_the_accuracy_of_positions_and_kilometres_are_far() -> None:
    near = shift_to(ORIGIN, moved_m=(3.0, 4.0, -2.0))
    assert near.horizontal_m == pytest.approx(5.0, rel=0.01)
    assert near.words.endswith("and 2.0 m down")
    assert not (near.is_far or near.is_far_up)
    next_zone = shift_to(GpsFix(latitude_deg=47.0, longitude_deg=14.0, altitude_m=430.0))
    assert next_zone.horizontal_m == pytest.approx(456_000.0, rel=0.01)
    assert next_zone.is_far
    assert next_zone.up_m == pytest.approx(0.0, abs=0.01)  # it follows the Earth's surface
    assert shift_to(ORIGIN, moved_m=(0.0, 0.0, 47.0)).is_far_up


def test_the_other_hemisphere_is_half_a_world_away_and_heights_may_be_unknown() -> None:
    found = shift_to(GpsFix(latitude_deg=-43.0, longitude_deg=8.0))
    assert found.horizontal_m == pytest.approx(10_000e3, rel=0.01)
    assert found.up_m is None
    assert found.words.endswith("km horizontally")
