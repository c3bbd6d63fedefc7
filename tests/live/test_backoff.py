"""Waits before trying again."""

from __future__ import annotations

import pytest

from adapters.live.backoff import Backoff


def test_waits_double_up_to_the_longest() -> None:
    backoff = Backoff(first_s=0.5, max_s=10.0, chance=lambda: 1.0)
    waits_s = [backoff.next_wait_s() for _ in range(7)]
    assert waits_s == pytest.approx([0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0])


def test_chance_takes_up_to_half_of_a_wait() -> None:
    assert Backoff(first_s=2.0, max_s=10.0, chance=lambda: 0.0).next_wait_s() == 1.0
    waits_s = {Backoff(first_s=2.0, max_s=10.0).next_wait_s() for _ in range(20)}
    assert len(waits_s) > 1
    assert all(1.0 <= wait_s <= 2.0 for wait_s in waits_s)


def test_after_success_the_first_wait_comes_again() -> None:
    backoff = Backoff(first_s=0.5, max_s=10.0, chance=lambda: 1.0)
    for _ in range(5):
        backoff.next_wait_s()
    backoff.reset()
    assert backoff.next_wait_s() == 0.5


def test_a_first_wait_beyond_the_longest_is_cut_and_a_thousand_tries_do_no_harm() -> None:
    backoff = Backoff(first_s=20.0, max_s=10.0, chance=lambda: 1.0)
    assert {backoff.next_wait_s() for _ in range(2000)} == {10.0}
