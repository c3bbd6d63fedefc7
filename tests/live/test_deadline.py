"""When a source gives up."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

import pytest

from adapters.live import deadline as deadline_module
from adapters.live.deadline import GiveUpDeadline
from tests.support.waiting import HANG_S, LeapingLoop, leap

PATIENCE_S = 1e3


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def story() -> None:
        await test()

    with asyncio.Runner(loop_factory=LeapingLoop) as runner:
        runner.run(story())


async def forever() -> None:
    await asyncio.Event().wait()


def test_time_runs_from_the_last_restart() -> None:
    async def test() -> None:
        deadline = GiveUpDeadline(PATIENCE_S)
        leap(0.9 * PATIENCE_S)
        assert deadline.left_s < 0.1 * PATIENCE_S
        deadline.restart()
        leap(0.9 * PATIENCE_S)
        assert 0.0 < deadline.left_s < 0.1 * PATIENCE_S
        leap(0.2 * PATIENCE_S)
        assert deadline.left_s == 0.0

    run(test)


def test_without_a_limit_it_never_passes() -> None:
    async def test() -> None:
        deadline = GiveUpDeadline(0.0)
        leap(1e9)
        assert deadline.left_s == math.inf

    run(test)


@pytest.mark.parametrize("give_up_after_s", [PATIENCE_S, 0.0])
def test_work_that_ends_in_time_is_outlasted(give_up_after_s: float) -> None:
    async def work() -> None:
        await asyncio.sleep(0)

    async def test() -> None:
        assert await GiveUpDeadline(give_up_after_s).outlasts(work())

    run(test)


def test_work_that_goes_on_is_cancelled_when_it_has_passed() -> None:
    was_cancelled: list[bool] = []

    async def work() -> None:
        try:
            leap(PATIENCE_S)
            await forever()
        finally:
            was_cancelled.append(True)

    async def test() -> None:
        assert not await GiveUpDeadline(PATIENCE_S).outlasts(work())

    run(test)
    assert was_cancelled


def test_a_restart_while_work_goes_on_gives_it_more_time() -> None:
    num_restarts = 0

    async def test() -> None:
        deadline = GiveUpDeadline(PATIENCE_S)

        async def work() -> None:
            nonlocal num_restarts
            for _ in range(3):
                leap(0.9 * PATIENCE_S)
                await asyncio.sleep(0)
                deadline.restart()
                num_restarts += 1
            leap(PATIENCE_S)
            await forever()

        assert not await deadline.outlasts(work())

    run(test)
    assert num_restarts == 3


def test_what_work_raises_comes_through() -> None:
    async def work() -> None:
        raise ZeroDivisionError("of the test")

    async def test() -> None:
        with pytest.raises(ZeroDivisionError):
            await GiveUpDeadline(0.0).outlasts(work())

    run(test)


def test_cancelling_cancels_the_work_and_does_not_wait_for_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deadline_module, "_CANCELLING_S", 2 * HANG_S)
    was_cancelled: list[bool] = []

    async def work() -> None:
        try:
            await forever()
        finally:
            was_cancelled.append(True)

    async def test() -> None:
        waiting = asyncio.create_task(GiveUpDeadline(PATIENCE_S).outlasts(work()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait((waiting,), timeout=HANG_S)
        assert waiting.cancelled()

    run(test)
    assert was_cancelled
