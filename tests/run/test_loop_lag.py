"""How late the event loop wakes up, and who is named for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from engine.cpu_time import Stage, charged_to, cpu_by_stage
from engine.output.load import Lateness
from engine.run.event_loop import new_thread, run_in
from engine.run.loop_lag import lag_measured

MAX_TRIES = 30


def measured(work: Callable[[list[Lateness]], Awaitable[None]]) -> list[Lateness]:
    found: list[Lateness] = []

    async def test() -> None:
        async with lag_measured(found.append, clock=lambda: 7.0):
            await asyncio.sleep(0)
            await work(found)

    asyncio.run(test())
    return found


async def block(found: list[Lateness]) -> None:
    time.sleep(0.3)  # noqa: ASYNC251 - what is to be measured
    await asyncio.sleep(0.15)


def test_a_blocked_loop_is_measured() -> None:
    found = measured(block)
    assert max(one.late_s for one in found) > 0.1
    for one in found:
        assert one.late_s >= 0.0
        assert one.at_s == 7.0
        assert one.own_s + one.core_s + one.lock_s == pytest.approx(one.late_s)


def test_a_loop_that_computes_itself_is_late_by_its_own_work() -> None:
    async def compute(found: list[Lateness]) -> None:
        until_s = time.thread_time() + 0.3
        while time.thread_time() < until_s:
            sum(range(1000))
        await asyncio.sleep(0.15)

    before_s = cpu_by_stage()[Stage.EVENT_LOOP]
    worst = max(measured(compute))
    assert worst.own_s > max(worst.lock_s, 0.01)
    assert cpu_by_stage()[Stage.EVENT_LOOP] - before_s > worst.own_s


def test_who_holds_the_interpreter_lock_is_named_with_its_stage() -> None:
    def names(one: Lateness) -> tuple[str, str]:
        return one.thread, one.stage

    @charged_to(Stage.LOCAL_ADJUSTMENT)
    def hold_the_lock() -> None:
        sum(range(16_000_000))  # one call into C, which never gives the lock away

    async def hold(found: list[Lateness]) -> None:
        thread = new_thread("holder", stage=Stage.MAPPING)
        for _ in range(MAX_TRIES):
            await run_in(thread, hold_the_lock)
            if any(names(one) == ("holder_0", "local_ba") for one in found):
                break
        thread.shutdown()

    found = measured(hold)
    assert any(names(one) == ("holder_0", "local_ba") for one in found)


def test_measuring_ends_with_its_context() -> None:
    found: list[Lateness] = []

    async def test() -> int:
        async with lag_measured(found.append, clock=time.monotonic):
            await asyncio.sleep(0)
        num = len(found)
        await asyncio.sleep(0.15)
        return num

    assert asyncio.run(test()) == len(found)
