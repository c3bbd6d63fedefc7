from __future__ import annotations

import asyncio
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.run import event_loop
from engine.run.event_loop import Writer, lag_measured, run_in, stop_signals

WAIT_S = 5.0


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1, thread_name_prefix="test") as executor:
        yield executor


def unexpected(error: Exception) -> None:
    raise error


# -- writing --------------------------------------------------------------------------------------


def test_writes_are_done_in_order_on_the_thread_before_the_context_ends(
    thread: ThreadPoolExecutor,
) -> None:
    done: list[int] = []
    threads: set[str] = set()

    def write(number: int) -> Callable[[], None]:
        def call() -> None:
            threads.add(threading.current_thread().name)
            done.append(number)

        return call

    async def test() -> None:
        writer = Writer(thread, failed=unexpected)
        await writer.schedule(write(0))  # before it runs is early enough
        async with writer.running():
            for number in range(1, 50):
                await writer.schedule(write(number))

    asyncio.run(test(), debug=True)
    assert done == list(range(50))
    assert threads == {"test_0"}


def test_a_write_that_breaks_is_told_and_the_others_get_their_turn(
    thread: ThreadPoolExecutor,
) -> None:
    errors: list[Exception] = []
    done: list[str] = []

    async def then() -> None:
        done.append("then")

    def fail() -> None:
        raise ZeroDivisionError("zero")

    async def test() -> None:
        async with (writer := Writer(thread, failed=errors.append)).running():
            await writer.schedule(fail, then=then)
            await writer.schedule(lambda: done.append("next"))

    asyncio.run(test(), debug=True)
    assert [str(error) for error in errors] == ["zero"]
    assert done == ["then", "next"]


def test_who_schedules_waits_while_too_much_waits(
    thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_loop, "_MAX_WAITING_WRITES", 2)
    open_up = threading.Event()

    def hold() -> None:
        assert open_up.wait(WAIT_S)

    async def test() -> None:
        async with (writer := Writer(thread, failed=unexpected)).running():
            await writer.schedule(hold)
            await asyncio.sleep(0)  # it starts
            for _ in range(2):
                await writer.schedule(hold)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(writer.schedule(hold), 0.05)
            open_up.set()
            await writer.schedule(hold)

    asyncio.run(test(), debug=True)


def test_a_call_on_a_thread_gets_its_arguments_and_its_error_comes_back(
    thread: ThreadPoolExecutor,
) -> None:
    def divide(number: int, *, by: int) -> float:
        return number / by

    async def test() -> None:
        assert await run_in(thread, divide, 3, by=2) == 1.5
        with pytest.raises(ZeroDivisionError):
            await run_in(thread, divide, 3, by=0)

    asyncio.run(test(), debug=True)


# -- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_and_every_later_one_leaves(first: signal.Signals) -> None:
    async def test() -> None:
        told: asyncio.Queue[str] = asyncio.Queue()
        stop, leave = (functools.partial(told.put_nowait, word) for word in ("stop", "leave"))
        async with stop_signals(stop, leave=leave):
            for number, word in ((first, "stop"), (signal.SIGINT, "leave"), (first, "leave")):
                os.kill(os.getpid(), number)
                assert await told.get() == word

    former = signal.getsignal(signal.SIGTERM)
    asyncio.run(asyncio.wait_for(test(), WAIT_S), debug=True)
    assert signal.getsignal(signal.SIGTERM) is former


def test_off_the_main_thread_signals_are_left_to_others() -> None:
    async def test() -> str:
        async with stop_signals(pytest.fail, leave=pytest.fail):
            return "ran"

    with ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: asyncio.run(test(), debug=True)).result(WAIT_S) == "ran"


# -- lag ------------------------------------------------------------------------------------------


def test_a_blocked_loop_is_measured() -> None:
    lags_s: list[float] = []

    async def test() -> None:
        async with lag_measured(lags_s.append):
            await asyncio.sleep(0)
            time.sleep(0.2)  # noqa: ASYNC251 - what is to be measured
            await asyncio.sleep(0.06)

    asyncio.run(test())
    assert 0.1 < max(lags_s) < WAIT_S
    assert min(lags_s) >= 0.0
