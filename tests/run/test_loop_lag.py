"""How late the event loop wakes up, and who is named for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from engine.cpu_time import Stage, cpu_by_stage
from engine.output.load import Lateness
from engine.run import loop_lag
from engine.run.loop_lag import lag_measured

HANG_S = 300.0  # a guard, no measure


@dataclass(eq=False)
class FakeThread:
    """The account of a thread that computes what the test says."""

    thread_name: str
    stage: Stage
    clocks: Clocks
    computes_on: bool
    cpu_s: float = 0.0
    thread_ident: int = 0

    def used_s(self) -> float:
        return self.cpu_s + self.clocks.trial_s * self.computes_on


class Clocks:
    """Clocks that stand still but for what a test says, and while it is tried who computes."""

    def __init__(self) -> None:
        self.now_s = self.own_s = self.waited_s = self.trial_s = 0.0
        self.threads: list[FakeThread] = []

    def add_thread(self, name: str, stage: Stage, *, computes_on: bool = False) -> FakeThread:
        self.threads.append(FakeThread(name, stage, clocks=self, computes_on=computes_on))
        return self.threads[-1]

    def passes(self, time_s: float) -> None:
        self.now_s += time_s

    def tried(self) -> float:
        self.trial_s += 1e-4
        return self.trial_s

    def measured(self, work: Callable[[], None]) -> list[Lateness]:
        """The first measurement, when work was done between its begin and its end."""
        found: list[Lateness] = []

        async def test() -> None:
            has_measured = asyncio.Event()

            def report(lateness: Lateness) -> None:
                if not found:
                    found.append(lateness)
                has_measured.set()

            async with lag_measured(report, clock=lambda: 7.0):
                await asyncio.sleep(0)  # the measurement begins
                work()
                await asyncio.wait_for(has_measured.wait(), HANG_S)

        asyncio.run(test())
        return found


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    fake = Clocks()
    fake_time = SimpleNamespace(
        monotonic=lambda: fake.now_s, thread_time=lambda: fake.own_s, perf_counter=fake.tried
    )
    monkeypatch.setattr(loop_lag, "time", fake_time)
    monkeypatch.setattr(loop_lag, "accounts", lambda: fake.threads)
    monkeypatch.setattr(loop_lag._SchedulerFigures, "waited_s", lambda _: fake.waited_s)
    return fake


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


def test_a_loop_that_computes_itself_is_late_by_its_own_work(clocks: Clocks) -> None:
    def compute() -> None:
        clocks.passes(0.4)
        clocks.own_s += 0.25
        clocks.waited_s += 0.03

    (worst,) = clocks.measured(compute)
    assert worst.late_s == pytest.approx(0.3)  # the rest was to be slept
    assert worst.own_s == pytest.approx(0.25)
    assert worst.core_s == pytest.approx(0.03)
    assert worst.lock_s == pytest.approx(0.02)
    assert worst.thread == worst.stage == ""


def test_what_the_loop_computes_is_charged_to_its_stage() -> None:
    async def compute(found: list[Lateness]) -> None:
        until_s = time.thread_time() + 0.02
        while time.thread_time() < until_s:
            sum(range(1000))

    before_s = cpu_by_stage()[Stage.EVENT_LOOP]
    measured(compute)
    assert cpu_by_stage()[Stage.EVENT_LOOP] - before_s >= 0.02


def test_who_holds_the_interpreter_lock_is_named_with_its_stage(clocks: Clocks) -> None:
    holder = clocks.add_thread("holder", Stage.LOCAL_ADJUSTMENT)
    clocks.add_thread("idle", Stage.TRACK)
    computing = clocks.add_thread("computing", Stage.MATCH, computes_on=True)

    def hold() -> None:
        clocks.passes(0.4)
        holder.cpu_s += 0.25
        computing.cpu_s += 0.4  # more, but without the lock

    (worst,) = clocks.measured(hold)
    assert worst.late_s == pytest.approx(0.3)
    assert worst.lock_s == pytest.approx(0.3)
    assert (worst.thread, worst.stage) == ("holder", "local_ba")


@pytest.mark.parametrize(
    ("cpu_s", "waited_s"),
    [
        pytest.param(0.05, 0.0, id="it computed a small part of the time"),
        pytest.param(0.25, 0.3, id="the loop waited for a core"),
    ],
)
def test_nobody_is_named_who_did_not_hold_the_lock(
    clocks: Clocks, cpu_s: float, waited_s: float
) -> None:
    other = clocks.add_thread("other", Stage.TRACK)

    def wait() -> None:
        clocks.passes(0.4)
        other.cpu_s += cpu_s
        clocks.waited_s += waited_s

    (worst,) = clocks.measured(wait)
    assert worst.late_s == pytest.approx(0.3)
    assert worst.thread == worst.stage == ""


def test_measuring_ends_with_its_context() -> None:
    found: list[Lateness] = []

    async def test() -> int:
        async with lag_measured(found.append, clock=time.monotonic):
            await asyncio.sleep(0)
        num = len(found)
        await asyncio.sleep(0.15)
        return num

    assert asyncio.run(test()) == len(found)
