"""How keyframes and times are named to people."""

from __future__ import annotations

import pytest

from engine.frame_names import clock


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0:00"),
        (59.6, "1:00"),
        (3725.0, "62:05"),
        (1_795_739_780.0, "00:36:20 UTC"),
        (-0.2, "0:00"),
    ],
)
def test_times_are_those_of_a_video_or_of_the_day(seconds: float, words: str) -> None:
    assert clock(seconds) == words


@pytest.mark.parametrize("seconds", [1.7e12, 1.7e15, 1.7e18, 1e300])
def test_clocks_that_count_otherwise_than_in_seconds_are_told_without_a_date(
    seconds: float,
) -> None:
    assert clock(seconds) == f"{round(seconds) // 60}:{round(seconds) % 60:02d}"
