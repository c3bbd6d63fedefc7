"""What outsiders cause is logged a few times, and the rest counted."""

from __future__ import annotations

import logging

import pytest

from adapters.live.quiet_log import QuietLog


def test_the_first_line_comes_at_once_and_a_later_one_counts_what_was_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now_s = [100.0]
    quiet = QuietLog(logging.getLogger("test"), clock=lambda: now_s[0])
    for number in range(1000):
        quiet.warn(f"turned away {number}")
    assert caplog.messages == ["turned away 0"]
    now_s[0] += 10.0
    quiet.warn("again")
    quiet.warn("not now")
    now_s[0] += 100.0
    quiet.warn("last")
    assert caplog.messages[1:] == [
        "again (and 999 more since the last such line)",
        "last (and 1 more since the last such line)",
    ]
