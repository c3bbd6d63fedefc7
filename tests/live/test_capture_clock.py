"""Capture times of live cameras: clocks that are wrong must not be believed."""

from __future__ import annotations

import math

import pytest

from adapters.live.capture_clock import CaptureClock

NOW_S = 1.8e9


def test_unix_times_of_a_camera_are_taken_as_they_are() -> None:
    clock = CaptureClock()
    camera_time_s = [NOW_S + 0.1 * i for i in range(5)]
    assert [clock.tick(told, arrived_at_s=told + 0.3) for told in camera_time_s] == camera_time_s


def test_a_clock_of_another_origin_keeps_its_steps() -> None:
    clock = CaptureClock()
    times_s = [clock.tick(12.07 + 0.1 * i, arrived_at_s=NOW_S + 0.1 * i + 0.02) for i in range(5)]
    assert times_s[0] == NOW_S + 0.02
    assert all(
        later - earlier == pytest.approx(0.1, abs=1e-6)
        for earlier, later in zip(times_s, times_s[1:], strict=False)
    )


@pytest.mark.parametrize("camera_time_s", [None, math.nan, math.inf])
def test_a_camera_that_tells_no_time_gets_that_of_the_arrival(camera_time_s: float | None) -> None:
    assert CaptureClock().tick(camera_time_s, arrived_at_s=NOW_S) == NOW_S


@pytest.mark.parametrize("jump_s", [-3600.0, 10 * 365 * 86400.0, -1e12])
def test_a_clock_that_jumps_is_shifted_to_the_arrival_once_and_times_still_increase(
    jump_s: float,
) -> None:
    clock = CaptureClock()
    before_s = clock.tick(NOW_S, arrived_at_s=NOW_S)
    after_s = clock.tick(NOW_S + 0.1 + jump_s, arrived_at_s=NOW_S + 0.1)
    later_s = clock.tick(NOW_S + 0.2 + jump_s, arrived_at_s=NOW_S + 0.7)
    assert before_s < after_s == NOW_S + 0.1
    assert later_s == pytest.approx(NOW_S + 0.2, abs=1e-3)


def test_times_that_stand_still_increase_all_the_same() -> None:
    clock = CaptureClock()
    times_s = [clock.tick(NOW_S, arrived_at_s=NOW_S + 0.1 * i) for i in range(4)]
    assert times_s == sorted(set(times_s))
    assert times_s[-1] - NOW_S < 0.01


def test_positions_beside_the_frames_are_told_on_the_camera_s_clock() -> None:
    clock = CaptureClock()
    clock.tick(5.0, arrived_at_s=NOW_S)
    assert clock.on_this_clock(4.5, arrived_at_s=NOW_S + 0.1) == NOW_S - 0.5
    assert clock.on_this_clock(None, arrived_at_s=NOW_S) == NOW_S
    assert clock.on_this_clock(1e12, arrived_at_s=NOW_S) == NOW_S
