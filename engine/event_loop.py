"""What a run asks of its event loop besides its stages: signals, lag, and work on threads."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import ParamSpec, TypeVar

_LAG_PERIOD_S = 0.05

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
