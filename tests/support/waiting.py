"""Waiting for what happens elsewhere; how long it takes decides nothing.

What never happens fails a test after ``HANG_S``, which is far longer than the slowest machine
takes and shorter than pytest's own timeout, so that the test says what it waited for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

HANG_S = 180.0


class LeapingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock leaps when a test says so."""

    ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self.ahead_s


def leap(duration_s: float) -> None:
    """Makes what waits on the running `LeapingLoop` so much older."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, LeapingLoop)
    loop.ahead_s += duration_s


async def until(condition: Callable[[], object]) -> None:
    """Waits on the event loop until something is so that has no event of its own."""
    async with asyncio.timeout(HANG_S):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.005)


def block_until(condition: Callable[[], object], *, what: str) -> None:
    """Waits, on a thread without an event loop, until something is so."""
    give_up_at_s = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < give_up_at_s, f"waited for {what}"
        time.sleep(0.01)
