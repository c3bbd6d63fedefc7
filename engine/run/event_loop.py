"""Where a run's event loop meets the rest: blocking calls on threads, signals, its own lag."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from engine.types import RunCommand

logger = logging.getLogger(__name__)

_LAG_PERIOD_S = 0.05
_MAX_WAITING_WRITES = 256
_MAX_WAITING_REQUESTS = 32

Params = ParamSpec("Params")
Result = TypeVar("Result")


async def run_in(
    executor: Executor, call: Callable[Params, Result], *args: Params.args, **kwargs: Params.kwargs
) -> Result:
    """Awaits a blocking call on a thread.

    Cancelling gives up the waiting only; the thread finishes what it started.
    """
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(executor, lambda: call(*args, **kwargs))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Write:
    call: Callable[[], None]
    then: Callable[[], Awaitable[None]] | None


class Writer:
    """Does blocking writes in order on one thread; who schedules one waits when too many wait."""

    def __init__(self, thread: Executor, *, failed: Callable[[Exception], None]) -> None:
        """Makes a writer that starts in the context of `running`.

        Args:
            thread: runs one call at a time.
            failed: told of a write that broke; later writes still get their turn.
        """
        self._thread = thread
        self._failed = failed
        self._writes: asyncio.Queue[_Write | None] = asyncio.Queue(_MAX_WAITING_WRITES)

    async def schedule(
        self, call: Callable[[], None], *, then: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Queues a write; ``then`` is awaited on the event loop once it is done."""
        await self._writes.put(_Write(call=call, then=then))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Writes what is scheduled; on leaving the context all of it is done."""
        working = asyncio.create_task(self._work(), name="writing")
        try:
            yield
        finally:
            await self._writes.put(None)
            await working

    async def _work(self) -> None:
        while (write := await self._writes.get()) is not None:
            try:
                await run_in(self._thread, write.call)
            except Exception as error:  # a task boundary: who made the writer decides
                self._failed(error)
            if write.then is not None:
                await write.then()


@asynccontextmanager
async def stop_signals(
    stop: Callable[[], None], *, leave: Callable[[], None]
) -> AsyncIterator[None]:
    """Calls ``stop`` at the first SIGINT or SIGTERM and ``leave`` at every later one.

    Signals belong to the main thread: on any other this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reactions = [stop]

    def react() -> None:
        reaction = reactions.pop() if reactions else leave
        reaction()

    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, react)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


class RunRequests:
    """A ``RunControl`` that keeps what is asked until a run's event loop takes it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[RunCommand] = deque(maxlen=_MAX_WAITING_REQUESTS)
        self._wake: Callable[[], object] | None = None

    def __call__(self, command: RunCommand) -> None:
        """Takes a request, from any thread; when too many wait, the oldest is forgotten."""
        with self._lock:
            self._waiting.append(command)
            if self._wake is not None:
                self._wake()

    @asynccontextmanager
    async def answered(self, take: Callable[[RunCommand], Awaitable[None]]) -> AsyncIterator[None]:
        """Has ``take`` answer requests, one after the other, while the context is open."""
        loop, something = asyncio.get_running_loop(), asyncio.Event()

        async def answer() -> None:
            while True:
                await something.wait()
                something.clear()
                while self._waiting:
                    command = self._waiting.popleft()
                    try:
                        await take(command)
                    except Exception:  # a task boundary: later requests still get their answer
                        logger.exception("could not do what was asked: %s", command)

        with self._lock:
            self._wake = functools.partial(loop.call_soon_threadsafe, something.set)
            something.set()
        answering = asyncio.create_task(answer(), name="requests")
        try:
            yield
        finally:
            with self._lock:
                self._wake = None
            answering.cancel()
            await asyncio.wait((answering,))


@asynccontextmanager
async def lag_measured(report: Callable[[float], None]) -> AsyncIterator[None]:
    """Reports, several times a second, how many seconds late the event loop woke up."""

    async def measure() -> None:
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(_LAG_PERIOD_S)
            report(max(0.0, time.monotonic() - before_s - _LAG_PERIOD_S))

    measuring = asyncio.create_task(measure(), name="loop lag")
    try:
        yield
    finally:
        measuring.cancel()
