"""A flight over the town with an SRT file in every form that drones write, laid onto it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from adapters.sources.files.telemetry_text import blocks_of_srt, read_telemetry
from engine.config import GeoreferenceConfig
from engine.geo.georeference import (
    Georeference,
    better_order,
    estimate_georeference,
    positions_in_enu,
    swapped,
)
from engine.geometry import camera_center, transform_points
from engine.types import GpsFix
from tests.support.town_survey import ORIGIN, UNIT_M, Survey, town_survey

Form = Callable[[float, float, float, float], str]  # of latitude, longitude, altitude, height

HAS_HEIGHTS: dict[str, Form] = {
    "Mavic 3": lambda n, e, alt, up: (
        f"[iso: 100] [latitude: {n:.6f}] [longitude: {e:.6f}]"
        f" [rel_alt: {up:.3f} abs_alt: {alt:.3f}]"
    ),
    "Mavic 2 Zoom": lambda n, e, alt, _: (
        f"[latitude : {n:.6f}] [longtitude : {e:.6f}] [altitude: {alt:.6f}]"
    ),
    "Mavic Air 2, radians": lambda n, e, alt, _: (
        f"[latitude: {math.radians(n):.8f}] [longtitude: {math.radians(e):.8f}]"
        f" [altitude: {alt:.6f}]"
    ),
    "Phantom 4 Pro": lambda n, e, _, up: f"GPS({e:.6f},{n:.6f},16) BAROMETER:{up:.1f}",
    "Mavic Pro": lambda n, e, _, up: f"GPS({e:.6f},{n:.6f},16) Hb: {up:.1f} Hs: 0.0",
    "Mini": lambda n, e, _, up: (
        f"F/2.8, SS 206.14, ISO 100, EV 0, GPS ({e:.6f}, {n:.6f}, 15), D 2.09m, H {up:.2f}m"
    ),
    "Phantom 4 RTK": lambda n, e, alt, _: f"GPS({e:.7f},{n:.7f},{alt:.1f}M) BAROMETER:0.0M",
    "Matrice 300": lambda n, e, _, up: f"GPS({n:.7f},{e:.7f},0.0M) BAROMETER:{up:.1f}M",
    "Autel": lambda n, e, alt, _: (
        f"HOME(W: {-e:.6f}, N: {n:.6f}) 2024-05-01 10:00:00\n"
        f"GPS(W: {-e:.6f}, N: {n:.6f}, {alt:.2f}m)\nISO:100 SHUTTER:500"
    ),
    "Autel RTK": lambda n, e, alt, _: f"RTK(W: {-e:.7f}, N: {n:.7f}, {alt:.2f}m)",
}
NO_HEIGHTS: dict[str, Form] = {
    "Mavic 2 Pro": lambda n, e, _, __: f"[latitude : {n:.6f}] [longtitude : {e:.6f}]",
    "Matrice 300, no barometer": lambda n, e, _, __: f"GPS({n:.7f},{e:.7f},0.0M)",
}


@pytest.fixture(scope="module")
def survey() -> Survey:
    return town_survey()


def srt_of(survey: Survey, form: Form) -> str:
    def block(number: int, fix: GpsFix) -> str:
        altitude_m = fix.altitude_m or 0.0
        text = form(
            fix.latitude_deg, fix.longitude_deg, altitude_m, altitude_m - (ORIGIN.altitude_m or 0.0)
        )
        times = f"00:00:{number:02d},000 --> 00:00:{number + 1:02d},000"
        return f"{number + 1}\n{times}\n{text}\n"

    return "\n".join(block(number, fix) for number, fix in enumerate(survey.fixes))


def placed(survey: Survey, form: Form) -> Georeference:
    telemetry = read_telemetry(blocks_of_srt(srt_of(survey, form)))
    assert telemetry.num_unusable == 0
    rows = [round(timed.time_s) for timed in telemetry.fixes]
    assert len(rows) > 20
    fixes = [timed.fix for timed in telemetry.fixes]
    one, other = (
        estimate_georeference(survey.cam_from_map[rows], each, config=GeoreferenceConfig())
        for each in (fixes, [swapped(fix) for fix in fixes])
    )
    found = better_order(one, other) if fixes[0].is_order_unsure else one
    assert isinstance(found, Georeference), found
    return found


def check(survey: Survey, found: Georeference) -> None:
    assert found.metres_per_map_unit == pytest.approx(UNIT_M, rel=0.01)
    # East, north of the origin of the truth.
    (shift_m,) = positions_in_enu([found.origin], origin=ORIGIN)
    centers_m = transform_points(found.enu_from_map, camera_center(survey.cam_from_map)) + shift_m
    apart_m = centers_m[:, :2] - survey.positions_m[:, :2]
    assert float(np.linalg.norm(apart_m.mean(axis=0))) < 1.0
    forward = survey.cam_from_map[:, 2, :3] @ found.enu_from_map[:, :3].T / UNIT_M
    assert forward[:, 2].max() < -0.8


@pytest.mark.parametrize("name", HAS_HEIGHTS)
def test_a_flight_lies_where_it_was_flown_by_every_form(name: str, survey: Survey) -> None:
    found = placed(survey, HAS_HEIGHTS[name])
    check(survey, found)
    assert found.has_heights


@pytest.mark.parametrize("name", NO_HEIGHTS)
def test_a_flight_without_altitudes_is_laid_out_horizontally(name: str, survey: Survey) -> None:
    check(survey, placed(survey, NO_HEIGHTS[name]))


@pytest.mark.parametrize("is_latitude_first", [True, False])
def test_four_digits_of_either_order_lie_as_near_as_digits_allow(
    is_latitude_first: bool, survey: Survey
) -> None:
    """Four digits are 11 m, and repeated positions count once."""

    def form(n: float, e: float, _: float, up: float) -> str:
        first, second = (n, e) if is_latitude_first else (e, n)
        return f"GPS({first:.4f},{second:.4f},0.0M) BAROMETER:{up:.1f}M"

    telemetry = read_telemetry(blocks_of_srt(srt_of(survey, form)))
    rows = [round(timed.time_s) for timed in telemetry.fixes]
    fixes = [timed.fix for timed in telemetry.fixes]
    found = better_order(
        *(
            estimate_georeference(survey.cam_from_map[rows], each, config=GeoreferenceConfig())
            for each in (fixes, [swapped(fix) for fix in fixes])
        )
    )
    assert isinstance(found, Georeference), found
    assert found.origin.latitude_deg == pytest.approx(ORIGIN.latitude_deg, abs=0.002)
    assert found.metres_per_map_unit == pytest.approx(UNIT_M, rel=0.08)
