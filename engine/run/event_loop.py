"""The event loop of a run: blocking calls on threads, signals, requests."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Concatenate, Generic, ParamSpec, TypeVar

from engine.cpu_time import Stage, charge_thread_to
from engine.types import RunCommand

logger = logging.getLogger(__name__)

_SAME_REQUEST_S = 1.0
_MAX_WAITING_REQUESTS = 32

Params = ParamSpec("Params")
Result = TypeVar("Result")
Owned = TypeVar("Owned")


async def run_in(
    executor: Executor, call: Callable[Params, Result], *args: Params.args, **kwargs: Params.kwargs
) -> Result:
    """Awaits a blocking call on a thread.

    Cancelling gives up the waiting only; the thread finishes what it started.
    """
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(executor, lambda: call(*args, **kwargs))


def new_thread(name: str, *, stage: Stage | None) -> ThreadPoolExecutor:
    """A thread that runs one call at a time, in order; its CPU time is charged to a stage."""
    return ThreadPoolExecutor(
        1, thread_name_prefix=name, initializer=charge_thread_to, initargs=(stage,)
    )


class CallWatch:
    """Notices calls on a thread that last long; they cannot be given up, only reported.

    Args:
        limit_s: a call that takes longer is reported; 0: none is.
        clock: seconds that never go back.
    """

    def __init__(self, limit_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._num_calls = 0
        # The number of the call that runs and when it began, as one: two threads look at it.
        self._call: tuple[int, float] | None = None
        self._reported = 0  # the number of the last call that was reported

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches a call; used by the thread that makes it."""
        self._num_calls += 1
        self._call = self._num_calls, self._clock()
        try:
            yield
        finally:
            self._call = None

    def newly_late_s(self) -> float | None:
        """How long the present call has lasted, once it is longer than the limit.

        Returns:
            Seconds, once for each such call; else None.
        """
        call = self._call
        if call is None or not self._limit_s:
            return None
        number, since_s = call
        lasted_s = self._clock() - since_s
        if number == self._reported or lasted_s <= self._limit_s:
            return None
        self._reported = number
        return lasted_s


class ThreadOwned(Generic[Owned]):
    """An object that is made on a thread of its own and can be used there alone.

    The thread runs one call at a time, in order. The object is reached through `call` alone.

    Args:
        make: makes the object.
        name: of the thread.
        stage: of the run, to which its CPU time is charged.
        watch: notices calls that last long.

    Raises:
        Whatever ``make`` raises.
    """

    def __init__(
        self,
        make: Callable[[], Owned],
        *,
        name: str,
        stage: Stage | None = None,
        watch: CallWatch | None = None,
    ) -> None:
        self._watch = watch or CallWatch(0.0)
        self._thread = new_thread(name, stage=stage)
        self._owned = self._thread.submit(make)
        try:
            self._owned.result()
        except BaseException:
            self._thread.shutdown(wait=False)
            raise

    async def call(
        self,
        use: Callable[Concatenate[Owned, Params], Result],
        *args: Params.args,
        **kwargs: Params.kwargs,
    ) -> Result:
        """Awaits a call with the object as the first argument, for example of its methods.

        What it returns leaves the thread, so it must be frozen or a private copy.
        """

        def watched() -> Result:
            with self._watch.watching():
                return use(self._owned.result(), *args, **kwargs)

        return await run_in(self._thread, watched)

    def shutdown(self) -> None:
        """Ends the thread after the calls that wait, without waiting for it."""
        self._thread.shutdown(wait=False)


@asynccontextmanager
async def stop_signals(
    *reactions: Callable[[], None], clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[None]:
    """Calls a further reaction at each SIGINT and SIGTERM, and the last one at every later one.

    Terminals and process groups send two signals for one request: one that comes within a second of
    a request asks for nothing more. SIGHUP, from a terminal that was closed, asks for the first
    reaction only, and for nothing where it is ignored (``nohup``).

    Signals belong to the main thread: on any other this does nothing.

    Args:
        reactions: to the first request, the second, and so on.
        clock: seconds that never go back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting, last_s = deque(reactions), -math.inf

    def react(number: signal.Signals) -> None:
        nonlocal last_s
        now_s, is_first = clock(), len(waiting) == len(reactions)
        if now_s - last_s < _SAME_REQUEST_S or (number is signal.SIGHUP and not is_first):
            return
        last_s = now_s
        reaction = waiting.popleft() if len(waiting) > 1 else waiting[0]
        reaction()

    loop = asyncio.get_running_loop()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, react, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


class RunRequests:
    """A ``RunControl`` that keeps requests until the event loop of the run takes them."""

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
async def called_regularly(
    call: Callable[[], Awaitable[None]], *, period_s: float
) -> AsyncIterator[None]:
    """Awaits a call again and again while the context is open, with a pause after each."""

    async def repeat() -> None:
        while True:
            await asyncio.sleep(period_s)
            await call()

    repeating = asyncio.create_task(repeat(), name="called regularly")
    try:
        yield
    finally:
        repeating.cancel()
        await asyncio.wait((repeating,))
