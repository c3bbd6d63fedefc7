"""A blocking generator, run on a thread of its own, as an asynchronous iterator."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future
from enum import Enum, auto
from typing import Generic, Literal, TypeVar

from engine.cpu_time import Stage, charge_thread_to

Item = TypeVar("Item")

ReadBlocking = Callable[[threading.Event], Generator[Item, None, None]]


class _Signal(Enum):
    END = auto()


_End = Literal[_Signal.END]


async def iterate_in_thread(read: ReadBlocking[Item], *, name: str) -> AsyncGenerator[Item, None]:
    """Yields what ``read`` yields while the event loop stays free.

    The generator is advanced only when an item is asked for, so at most one item is in hand and a
    slow consumer holds a fast producer back. It is started, advanced and closed on one thread,
    which owns whatever the generator opens, and whose CPU time is charged to decoding.

    Closing this iterator (``aclose``), or cancelling the task that waits for it, sets the event
    that ``read`` was given, waits for the step in progress (a thread cannot be interrupted) and
    closes the generator. A second cancellation stops the waiting; the thread then cleans up alone
    and, being a daemon, never keeps the process alive.

    Args:
        read: called once with the event that says to stop; a generator whose steps may take long
            looks at it between their parts.
        name: the thread's name.

    Raises:
        Whatever the generator raises, at the step or the closing where it did.
    """
    worker = _Worker(read, name=name)
    try:
        while (item := await worker.next_item()) is not _Signal.END:
            yield item
    finally:
        await worker.close()


class _Worker(Generic[Item]):
    """The thread that owns a generator. Its methods belong to the event loop."""

    def __init__(self, read: ReadBlocking[Item], *, name: str) -> None:
        self._stop = threading.Event()
        self._items = read(self._stop)
        self._requests: queue.SimpleQueue[Future[Item | _End] | None] = queue.SimpleQueue()
        self._closed: Future[None] = Future()
        # A running future refuses to be cancelled: whoever stops waiting does not stop the closing.
        self._closed.set_running_or_notify_cancel()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    async def next_item(self) -> Item | _End:
        answer: Future[Item | _End] = Future()
        self._requests.put(answer)
        return await asyncio.wrap_future(answer)

    async def close(self) -> None:
        self._stop.set()
        self._requests.put(None)
        await asyncio.wrap_future(self._closed)

    def _run(self) -> None:
        charge_thread_to(Stage.DECODE)
        while self._answer_one():
            pass
        try:
            self._items.close()
        except BaseException as error:  # handed over, not handled: it belongs to who closes
            self._closed.set_exception(error)
        else:
            self._closed.set_result(None)

    def _answer_one(self) -> bool:
        """Advances the generator for one request; False when there will be no more."""
        answer = self._requests.get()
        if answer is None:
            return False
        if answer.set_running_or_notify_cancel():  # else: whoever asked has gone
            try:
                item = next(self._items, _Signal.END)
            except BaseException as error:  # handed over, not handled: it belongs to who asked
                answer.set_exception(error)
            else:
                answer.set_result(item)
        return True
