"""The event loop of a run: threads and signals."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import signal
import threading
import weakref
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AbstractContextManager, suppress

import pytest

from engine.run.event_loop import CallWatch, ThreadOwned, run_in, stop_signals

HANG_S = 300.0  # a guard, no measure


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1, thread_name_prefix="test") as executor:
        yield executor


def run(test: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(test, HANG_S), debug=True)


# -- threads --------------------------------------------------------------------------------------


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


def test_a_call_that_fails_keeps_none_of_its_arguments(thread: ThreadPoolExecutor) -> None:
    class Argument:
        pass

    def fail(argument: Argument) -> None:
        raise ZeroDivisionError

    async def call() -> weakref.ref[Argument]:
        argument = Argument()
        with suppress(ZeroDivisionError):
            await run_in(thread, fail, argument)
        return weakref.ref(argument)

    async def test() -> None:
        kept = await call()
        await run_in(thread, gc.isenabled)  # the thread has let go of the call before
        assert kept() is None

    gc.disable()
    try:
        asyncio.run(test())
    finally:
        gc.enable()


def test_a_call_that_is_given_up_before_its_turn_is_not_made(thread: ThreadPoolExecutor) -> None:
    open_up, made = threading.Event(), list[str]()

    def hold() -> None:
        made.append("held")
        assert open_up.wait(HANG_S)

    async def test() -> None:
        held = asyncio.create_task(run_in(thread, hold))
        given_up = asyncio.create_task(run_in(thread, made.append, "given up"))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait((given_up,))
        open_up.set()
        await held
        await run_in(thread, made.append, "later")

    run(test())
    assert made == ["held", "later"]


def test_a_call_whose_awaiting_is_cancelled_is_made_to_its_end(thread: ThreadPoolExecutor) -> None:
    started, open_up, made = threading.Event(), threading.Event(), list[str]()

    def hold() -> None:
        started.set()
        assert open_up.wait(HANG_S)
        made.append("held")

    async def test() -> None:
        held = asyncio.create_task(run_in(thread, hold))
        assert await asyncio.to_thread(started.wait, HANG_S)
        held.cancel()
        await asyncio.wait((held,))
        open_up.set()
        await run_in(thread, made.append, "later")

    run(test())
    assert made == ["held", "later"]


def test_a_call_that_lasts_long_is_reported_once_while_it_lasts() -> None:
    now_s = 0.0
    watch = CallWatch(10.0, clock=lambda: now_s)
    assert watch.newly_late_s() is None
    with watch.watching():
        now_s = 9.0
        assert watch.newly_late_s() is None
        now_s = 12.0
        assert watch.newly_late_s() == 12.0
        now_s = 99.0
        assert watch.newly_late_s() is None
    now_s = 200.0
    assert watch.newly_late_s() is None
    with watch.watching():
        now_s = 211.0
        assert watch.newly_late_s() == 11.0


def test_a_late_look_at_one_call_does_not_silence_the_next_one() -> None:
    """The next call begins while the clock is read for the one before."""
    now_s = 0.0
    calls: list[AbstractContextManager[None]] = []

    def clock() -> float:
        if calls:
            calls.pop().__exit__(None, None, None)
            following.__enter__()
        return now_s

    watch = CallWatch(10.0, clock=clock)
    first, following = watch.watching(), watch.watching()
    first.__enter__()
    now_s = 12.0
    calls.append(first)
    assert watch.newly_late_s() == 12.0
    now_s = 23.0
    assert watch.newly_late_s() == 11.0
    assert watch.newly_late_s() is None
    following.__exit__(None, None, None)


class Owned:
    """Records on which threads it is made and used."""

    def __init__(self) -> None:
        self.threads = [threading.current_thread().name]
        self.numbers: list[int] = []

    def add(self, number: int, *, times: int = 1) -> int:
        """Adds a number; returns how many there are."""
        self.threads.append(threading.current_thread().name)
        self.numbers += [number] * times
        return len(self.numbers)

    def fail(self) -> None:
        """Raises."""
        raise ZeroDivisionError("zero")


def test_an_owned_object_is_made_and_used_on_its_thread_only() -> None:
    async def test() -> None:
        owned = ThreadOwned(Owned, name="owner")
        assert await owned.call(Owned.add, 3, times=2) == 2
        assert await owned.call(lambda one: one.threads) == ["owner_0", "owner_0"]
        assert await owned.call(lambda one: threading.current_thread().name) == "owner_0"
        owned.shutdown()

    run(test())


def test_calls_of_an_owned_object_are_done_one_at_a_time_in_order() -> None:
    async def test() -> None:
        owned = ThreadOwned(Owned, name="owner")
        lengths = await asyncio.gather(*(owned.call(Owned.add, number) for number in range(50)))
        assert lengths == list(range(1, 51))
        assert await owned.call(lambda one: one.numbers) == list(range(50))
        owned.shutdown()

    run(test())


def test_an_error_of_a_call_reaches_its_caller_and_later_calls_are_done() -> None:
    async def test() -> None:
        owned = ThreadOwned(Owned, name="owner")
        failing, adding = owned.call(Owned.fail), owned.call(Owned.add, 1)
        failed, length = await asyncio.gather(failing, adding, return_exceptions=True)
        assert isinstance(failed, ZeroDivisionError)
        assert length == 1
        owned.shutdown()

    run(test())


def test_an_object_that_cannot_be_made_is_refused_at_once() -> None:
    def make() -> Owned:
        raise ZeroDivisionError("cannot be made")

    with pytest.raises(ZeroDivisionError, match="cannot be made"):
        ThreadOwned(make, name="never")
    for thread in threading.enumerate():
        if thread.name == "never_0":
            thread.join(HANG_S)  # it ends
            assert not thread.is_alive()


def test_a_thread_that_is_to_end_does_the_calls_that_wait_and_no_others() -> None:
    started, open_up = threading.Event(), threading.Event()

    def hold(owned: Owned) -> int:
        started.set()
        assert open_up.wait(HANG_S)
        return owned.add(1)

    async def test() -> None:
        owned = ThreadOwned(Owned, name="owner")
        calls = [asyncio.create_task(owned.call(use)) for use in (hold, hold)]
        assert await asyncio.to_thread(started.wait, HANG_S)
        owned.shutdown()  # does not wait for them
        assert not any(call.done() for call in calls)
        with pytest.raises(RuntimeError):
            await owned.call(Owned.add, 2)
        open_up.set()
        assert await asyncio.gather(*calls) == [1, 2]

    run(test())


# -- signals --------------------------------------------------------------------------------------


class Reactions:
    """Takes signals as a run does; a clock says how long after each other they came."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.called: list[str] = []
        self._arrived = asyncio.Event()

    def signals(self) -> AbstractAsyncContextManager[None]:
        """Reacts while the context is open."""
        reactions = [functools.partial(self.called.append, word) for word in ("stop", "drop")]
        leave = functools.partial(self.called.append, "leave")
        return stop_signals(*reactions, leave, clock=self._clock)

    async def send(self, number: signal.Signals, *, after_s: float) -> list[str]:
        """Sends a signal; returns what was called until it was taken."""
        self.now_s += after_s
        self._arrived.clear()
        os.kill(os.getpid(), number)
        await self._arrived.wait()
        return self.called

    def _clock(self) -> float:
        self._arrived.set()  # the signal is being looked at
        return self.now_s


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_request_goes_further_than_the_one_before(first: signal.Signals) -> None:
    async def test() -> None:
        reactions = Reactions()
        async with reactions.signals():
            assert await reactions.send(first, after_s=0.0) == ["stop"]
            assert await reactions.send(signal.SIGTERM, after_s=1.5) == ["stop", "drop"]
            assert await reactions.send(signal.SIGINT, after_s=1.5) == ["stop", "drop", "leave"]
            assert (await reactions.send(signal.SIGINT, after_s=9.0))[3:] == ["leave"]

    former = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    run(test())
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == former


def test_signals_within_a_second_are_one_request_however_many_come() -> None:
    async def test() -> None:
        reactions = Reactions()
        async with reactions.signals():
            await reactions.send(signal.SIGINT, after_s=0.0)
            assert await reactions.send(signal.SIGTERM, after_s=0.4) == ["stop"]
            assert await reactions.send(signal.SIGINT, after_s=0.4) == ["stop"]
            # Who goes on asking is heard once a second.
            assert await reactions.send(signal.SIGINT, after_s=0.4) == ["stop", "drop"]
            assert await reactions.send(signal.SIGINT, after_s=0.4) == ["stop", "drop"]

    run(test())


def test_a_terminal_that_closes_asks_for_no_more_than_the_end() -> None:
    async def test() -> None:
        reactions = Reactions()
        async with reactions.signals():
            await reactions.send(signal.SIGHUP, after_s=0.0)
            assert await reactions.send(signal.SIGHUP, after_s=9.0) == ["stop"]
            assert await reactions.send(signal.SIGTERM, after_s=9.0) == ["stop", "drop"]

    run(test())


def test_a_terminal_that_closes_is_nothing_to_a_run_that_ignores_it() -> None:
    async def test() -> None:
        async with Reactions().signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        run(test())
    finally:
        signal.signal(signal.SIGHUP, former)


def test_off_the_main_thread_signals_are_left_to_others() -> None:
    async def test() -> str:
        async with stop_signals(pytest.fail):
            return "ran"

    with ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: asyncio.run(test(), debug=True)).result(HANG_S) == "ran"
