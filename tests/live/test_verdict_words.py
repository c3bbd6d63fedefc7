"""The verdict in words: no wall of text, and no sentence cut."""

from __future__ import annotations

import pytest

from adapters.live.verdict_words import MAX_REASONS, in_words, verdict_lines
from engine.types import Verdict, VerdictLevel
from tests.support.verdicts import verdict_of


def test_a_good_map_needs_no_words() -> None:
    assert verdict_lines(Verdict(), width=80) == ["verdict: good"]


@pytest.mark.parametrize(("num", "words"), [(1, "a remark"), (2, "remarks")])
def test_reasons_of_a_good_map_are_remarks(num: int, words: str) -> None:
    level, *lines = verdict_lines(verdict_of(*[VerdictLevel.GOOD] * num))
    assert level == f"verdict: good, with {words}"
    assert len(lines) == num


@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_sentences_go_on_in_the_next_line_and_lose_nothing(width: int) -> None:
    verdict = verdict_of(VerdictLevel.WRONG, VerdictLevel.DOUBTFUL)
    level, *lines = verdict_lines(verdict, width=width)
    assert level == "verdict: wrong"
    assert max(map(len, lines)) <= width
    words = " ".join(line.strip() for line in lines).split()
    expected = " ".join(f"- {reason.sentence}" for reason in verdict.reasons).split()
    assert words == expected


def test_without_a_width_every_reason_is_one_line() -> None:
    verdict = verdict_of(VerdictLevel.DOUBTFUL)
    assert verdict_lines(verdict)[1:] == [f"  - {verdict.reasons[0].sentence}"]


@pytest.mark.parametrize(
    ("numbers", "words"), [((8,), "8"), ((8, 6), "8 and 6"), ((8, 6, 5), "8, 6 and 5")]
)
def test_numbers_are_listed_as_a_person_does(numbers: tuple[int, ...], words: str) -> None:
    assert in_words(numbers) == words


@pytest.mark.parametrize("num_more", [0, 1, 7])
def test_the_gravest_reasons_are_listed_and_the_rest_is_counted(num_more: int) -> None:
    verdict = verdict_of(*[VerdictLevel.DOUBTFUL] * (MAX_REASONS + num_more))
    lines = verdict_lines(verdict, more_in="summary.json")
    assert len(lines) == 1 + MAX_REASONS + bool(num_more)
    assert (lines[-1] == f"  - {num_more} more in summary.json") == bool(num_more)
