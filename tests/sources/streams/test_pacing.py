"""Stored video at its own speed."""

from __future__ import annotations

from adapters.sources.streams.pacing import Pace


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_frames_are_waited_for_by_their_times_in_the_video() -> None:
    clock = Clock()
    pace = Pace(clock=clock)
    assert pace.left_s(5.0) == 0.0
    assert pace.left_s(5.5) == 0.5
    clock.now_s += 0.4
    assert abs(pace.left_s(6.0) - 0.6) < 1e-9


def test_what_is_late_is_not_waited_for_and_catches_up() -> None:
    clock = Clock()
    pace = Pace(clock=clock)
    pace.left_s(0.0)
    clock.now_s += 3.0
    assert pace.left_s(1.0) == 0.0
    assert pace.left_s(4.0) == 1.0


def test_times_that_leap_begin_anew() -> None:
    pace = Pace(clock=Clock())
    pace.left_s(0.0)
    assert pace.left_s(1000.0) == 0.0  # nobody waits for a quarter of an hour
    assert pace.left_s(1001.0) == 1.0
    assert pace.left_s(3.0) == 0.0
    assert pace.left_s(3.5) == 0.5
    assert pace.left_s(None) == 0.0
