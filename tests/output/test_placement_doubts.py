"""Doubts about a place or unit that a map was given after its end."""

from __future__ import annotations

import pytest

from engine.output.placement_doubts import wrong_bars
from engine.types import VerdictLevel


@pytest.mark.parametrize(
    ("in_map_m", "std_m", "is_wrong"),
    [
        (61.1, 0.1, False),  # less than 2 %, as tapes and marks account for
        (61.3, 0.1, True),
        (58.7, 0.1, True),
        (61.3, 0.5, False),  # marks or positions that know it no better
        (79.1, 4.0, True),
        (79.1, 5.0, False),
    ],
)
def test_a_scale_bar_contradicts_a_map_by_more_than_all_errors_together(
    in_map_m: float, std_m: float, is_wrong: bool
) -> None:
    bar = {
        "ends": ["A", "B"],
        "length_m": 60.0,
        "in_map_m": in_map_m,
        "error_m": in_map_m - 60.0,
        "std_m": std_m,
    }
    assert [one.level for one in wrong_bars([bar])] == [VerdictLevel.DOUBTFUL] * is_wrong
