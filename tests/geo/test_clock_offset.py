"""The clock offset between a camera and a track, by the shape of the path."""

from __future__ import annotations

import numpy as np
import pytest

from engine.geo.clock_offset import ClockOffset, estimate_clock_offset
from engine.geometry import rotation_from_vector
from engine.types import Float64Array

TURN = rotation_from_vector(np.array([0.3, -0.8, 1.1]))


def flight_m(times_s: Float64Array) -> Float64Array:
    """Where a drone is that takes off, flies strips with turns, and comes back."""
    t = np.asarray(times_s, np.float64)
    return np.column_stack(
        [
            80.0 * np.sin(0.11 * t) + 0.2 * t,
            50.0 * np.sin(0.043 * t + 1.0),
            40.0 - 40.0 * np.exp(-0.05 * t) + 3.0 * np.sin(0.2 * t),
        ]
    )


def in_map(positions_m: Float64Array) -> Float64Array:
    return np.asarray(positions_m @ TURN.T / 7.0 + (1.0, -2.0, 3.0))


TRACK_S = np.arange(0.0, 300.0)


@pytest.mark.parametrize("offset_s", [0.0, 37.4, 150.13])
@pytest.mark.parametrize("noise_m", [0.0, 1.0])
def test_the_offset_is_found_by_the_shape_of_the_path(offset_s: float, noise_m: float) -> None:
    times_s = np.arange(0.0, 120.0, 1.5)
    track_m = flight_m(TRACK_S)
    track_m += np.random.default_rng(1).normal(0.0, 1.0, track_m.shape) * noise_m
    centers = in_map(flight_m(times_s + offset_s))
    found = estimate_clock_offset(times_s, centers, 1.7e9 + TRACK_S, track_m)
    assert isinstance(found, ClockOffset), found
    assert found.offset_s - 1.7e9 == pytest.approx(offset_s, abs=0.1 if not noise_m else 0.3)
    assert found.unexplained_ratio < 0.05
    if noise_m:
        assert found.unexplained_ratio > 0.005


def test_a_track_of_another_flight_fits_nowhere() -> None:
    times_s = np.arange(0.0, 120.0, 1.5)
    other = in_map(np.random.default_rng(2).normal(0.0, 1.0, (len(times_s), 3)).cumsum(axis=0))
    found = estimate_clock_offset(times_s, other, TRACK_S, flight_m(TRACK_S))
    assert isinstance(found, str)
    assert "at no clock offset" in found or "alike" in found


def test_an_even_straight_flight_fits_everywhere_and_that_is_said() -> None:
    times_s = np.arange(0.0, 60.0)
    line_m = np.outer(TRACK_S, [3.0, 4.0, 0.0])
    centers = in_map(np.outer(times_s, [3.0, 4.0, 0.0]))
    found = estimate_clock_offset(times_s, centers, TRACK_S, line_m)
    assert isinstance(found, str)
    assert "alike" in found


@pytest.mark.parametrize(("num_poses", "num_track"), [(3, 100), (100, 3)])
def test_too_little_is_said(num_poses: int, num_track: int) -> None:
    times_s, track_s = np.arange(float(num_poses)), np.arange(float(num_track))
    found = estimate_clock_offset(times_s, flight_m(times_s), track_s, flight_m(track_s))
    assert isinstance(found, str)
    assert "too few" in found


def test_a_track_that_is_shorter_than_the_frames_is_said() -> None:
    times_s, track_s = np.arange(0.0, 100.0), np.arange(0.0, 20.0)
    found = estimate_clock_offset(times_s, flight_m(times_s), track_s, flight_m(track_s))
    assert isinstance(found, str)
    assert "less time" in found
