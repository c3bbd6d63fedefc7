"""Blocking generators as asynchronous iterators."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Generator

import pytest

from adapters.live.blocking import iterate_in_thread
from engine.cpu_time import Stage, cpu_by_stage
from tests.support.waiting import HANG_S, until

NAME = "reader under test"
BUSY_S = 0.02


class Recorder:
    """A blocking generator that tells what happened to it."""

    def __init__(self, num_items: int = 3, *, blocks_at: int = -1) -> None:
        self.num_items = num_items
        self.blocks_at = blocks_at
        self.num_made = 0
        self.threads: set[threading.Thread] = set()
        self.is_blocked = threading.Event()
        self.may_go_on = threading.Event()
        self.was_told_to_stop = False
        self.is_closed = threading.Event()

    def read(self, stop: threading.Event) -> Generator[int, None, None]:
        try:
            for item in range(self.num_items):
                self.threads.add(threading.current_thread())
                if item == self.blocks_at:
                    self.is_blocked.set()
                    self.was_told_to_stop = stop.wait(HANG_S)
                    assert self.may_go_on.wait(HANG_S)
                self.num_made += 1
                yield item
        finally:
            self.threads.add(threading.current_thread())
            self.is_closed.set()


async def reader_has_ended() -> bool:
    await until(lambda: all(thread.name != NAME for thread in threading.enumerate()))
    return True


async def is_set(event: threading.Event) -> bool:
    return await asyncio.to_thread(event.wait, HANG_S)


def test_items_come_in_order_and_the_thread_ends() -> None:
    recorder = Recorder(100)

    async def consume() -> list[int]:
        items = [item async for item in iterate_in_thread(recorder.read, name=NAME)]
        assert await reader_has_ended()
        return items

    assert asyncio.run(consume(), debug=True) == list(range(100))
    assert recorder.is_closed.is_set()


def test_what_the_thread_uses_is_charged_to_decoding() -> None:
    def busy(stop: threading.Event) -> Generator[float, None, None]:
        begin_s = time.thread_time()
        while time.thread_time() - begin_s < BUSY_S:
            pass
        yield BUSY_S

    async def consume() -> None:
        async for _ in iterate_in_thread(busy, name=NAME):
            pass
        assert await reader_has_ended()

    before_s = cpu_by_stage()[Stage.DECODE]
    asyncio.run(consume())
    assert cpu_by_stage()[Stage.DECODE] - before_s >= BUSY_S


def test_one_thread_of_its_own_starts_advances_and_closes_the_generator() -> None:
    recorder = Recorder()

    async def consume() -> None:
        async for _ in iterate_in_thread(recorder.read, name=NAME):
            pass

    asyncio.run(consume())
    (thread,) = recorder.threads
    assert thread is not threading.main_thread()
    assert thread.name == NAME
    assert thread.daemon


def test_nothing_is_made_before_it_is_asked_for() -> None:
    recorder = Recorder(10)

    async def consume() -> list[int]:
        num_made = []
        async for _ in iterate_in_thread(recorder.read, name=NAME):
            await asyncio.sleep(0.005)
            num_made.append(recorder.num_made)
        return num_made

    assert asyncio.run(consume()) == list(range(1, 11))


def test_nothing_runs_when_nobody_asks() -> None:
    recorder = Recorder()

    async def leave() -> None:
        await iterate_in_thread(recorder.read, name=NAME).aclose()

    asyncio.run(leave())
    assert not recorder.threads


def test_the_loop_stays_free_while_a_step_blocks() -> None:
    may_go_on = threading.Event()

    def slow(stop: threading.Event) -> Generator[int, None, None]:
        assert may_go_on.wait(HANG_S)
        yield 1

    async def consume() -> int:
        items = iterate_in_thread(slow, name=NAME)
        first = asyncio.ensure_future(anext(items))
        for _ in range(10):
            await asyncio.sleep(0.005)
            assert not first.done()
        may_go_on.set()
        item = await first
        await items.aclose()
        return item

    assert asyncio.run(consume()) == 1


def test_an_error_of_the_generator_reaches_the_consumer_after_the_items_before_it() -> None:
    def fails(stop: threading.Event) -> Generator[int, None, None]:
        yield 1
        raise OSError("the disk is gone")

    async def consume() -> list[int]:
        seen = []
        with pytest.raises(OSError, match="the disk is gone"):
            async for item in iterate_in_thread(fails, name=NAME):
                seen.append(item)
        assert await reader_has_ended()
        return seen

    assert asyncio.run(consume()) == [1]


def test_an_error_while_closing_reaches_whoever_closes() -> None:
    def fails(stop: threading.Event) -> Generator[int, None, None]:
        try:
            yield 1
        finally:
            raise OSError("cannot be closed")

    async def consume() -> None:
        items = iterate_in_thread(fails, name=NAME)
        assert await anext(items) == 1
        with pytest.raises(OSError, match="cannot be closed"):
            await items.aclose()
        assert await reader_has_ended()

    asyncio.run(consume())


def test_closing_early_closes_the_generator_before_it_returns() -> None:
    recorder = Recorder(1000)

    async def consume() -> None:
        items = iterate_in_thread(recorder.read, name=NAME)
        assert await anext(items) == 0
        await items.aclose()
        assert recorder.is_closed.is_set()
        assert await reader_has_ended()

    asyncio.run(consume())
    assert recorder.num_made == 1


def test_leaving_the_loop_of_the_consumer_closes_the_generator_by_the_end_of_the_run() -> None:
    recorder = Recorder(1000)

    async def consume() -> None:
        async for item in iterate_in_thread(recorder.read, name=NAME):
            if item == 2:
                break

    asyncio.run(consume())
    assert recorder.is_closed.wait(HANG_S)
    assert recorder.num_made == 3


def test_a_cancelled_consumer_tells_the_step_to_stop_and_waits_for_it() -> None:
    recorder = Recorder(blocks_at=1)

    async def consume() -> None:
        async for _ in iterate_in_thread(recorder.read, name=NAME):
            pass

    async def cancel() -> None:
        task = asyncio.create_task(consume())
        assert await is_set(recorder.is_blocked)
        task.cancel()
        await asyncio.sleep(0.02)
        assert not task.done()
        recorder.may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert recorder.is_closed.is_set()
        assert await reader_has_ended()

    asyncio.run(cancel(), debug=True)
    assert recorder.was_told_to_stop


def test_a_second_cancellation_waits_no_longer_and_the_thread_still_cleans_up() -> None:
    recorder = Recorder(blocks_at=0)

    async def consume() -> None:
        async for _ in iterate_in_thread(recorder.read, name=NAME):
            pass

    async def cancel_twice() -> None:
        task = asyncio.create_task(consume())
        assert await is_set(recorder.is_blocked)
        task.cancel()
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, HANG_S)
        assert not recorder.is_closed.is_set()
        recorder.may_go_on.set()
        assert await reader_has_ended()

    asyncio.run(cancel_twice())
    assert recorder.is_closed.is_set()


def test_two_iterators_run_side_by_side() -> None:
    together = threading.Barrier(2, timeout=HANG_S)

    def meets(stop: threading.Event) -> Generator[int, None, None]:
        yield together.wait()

    async def consume() -> list[int]:
        items = [iterate_in_thread(meets, name=NAME) for _ in range(2)]
        arrivals = await asyncio.gather(*(anext(each) for each in items))
        for each in items:
            await each.aclose()
        return sorted(arrivals)

    assert asyncio.run(consume()) == [0, 1]


def test_a_step_that_never_returns_does_not_keep_the_process_alive() -> None:
    program = textwrap.dedent("""
        import asyncio, threading
        from adapters.live.blocking import iterate_in_thread

        blocked = threading.Event()

        def read(stop):
            blocked.set()
            threading.Event().wait()
            yield 1

        async def consume():
            async for _ in iterate_in_thread(read, name="stuck"):
                pass

        async def main():
            task = asyncio.create_task(consume())
            await asyncio.to_thread(blocked.wait)
            for _ in range(2):
                task.cancel()
                await asyncio.sleep(0.01)

        asyncio.run(main())
        print("left")
    """)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "left", "")
