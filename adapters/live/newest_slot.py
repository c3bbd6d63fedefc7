"""From the thread that reads a live stream to the event loop: the newest picture, all else kept."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.types import RejectedFrame, SourceNotice

if TYPE_CHECKING:
    from av import VideoFrame

_MAX_WAITING = 1000  # half a minute of a fast camera


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Picture:
    """A received picture before it becomes pixels."""

    index: int  # of all that the source received
    captured_at_s: float
    received_at_s: float  # monotonic
    content: VideoFrame | bytes  # bytes: a JPEG file


Arrival = Picture | RejectedFrame | SourceNotice


class NewestSlot:
    """Keeps what came until the event loop takes it, in order, and of pictures the newest alone.

    A picture that is replaced leaves a rejected frame in its place, so that it is counted. When too
    much waits for a consumer that hangs, the reader waits, too: what it does not read cannot get
    lost untold. One thread puts, one event loop takes.
    """

    def __init__(
        self, *, replaced: Callable[[Picture], RejectedFrame], max_waiting: int = _MAX_WAITING
    ) -> None:
        """Makes an empty slot for the running event loop.

        Args:
            replaced: what is told of a picture that nobody took; called on the reader's thread.
            max_waiting: things that may wait.
        """
        self._replaced = replaced
        self._max_waiting = max_waiting
        self._waiting: deque[Arrival] = deque()
        self._has_ended = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()

    def put(self, arrival: Arrival) -> None:
        """Adds something; a picture takes the turn of one that waits."""
        with self._changed:
            if isinstance(arrival, Picture):
                self._replace_waiting()
            self._changed.wait_for(lambda: self._has_ended or self._has_room())
            if not self._has_ended:
                self._waiting.append(arrival)
                self._wake()

    def end(self, error: BaseException | None = None) -> None:
        """Says that nothing more will come, or is wanted; frees a reader that waits.

        Args:
            error: what broke the reader; raised to whoever takes, after what came before it.
        """
        with self._changed:
            self._has_ended = True
            self._error = error
            self._changed.notify()
            self._wake()

    async def next(self) -> Arrival | None:
        """Takes the oldest; None after the last."""
        while True:
            with self._changed:
                if self._waiting:
                    self._changed.notify()
                    return self._waiting.popleft()
                if self._error is not None:
                    raise self._error
                if self._has_ended:
                    return None
                self._arrived.clear()
            await self._arrived.wait()

    def _replace_waiting(self) -> None:
        for place in reversed(range(len(self._waiting))):
            waiting = self._waiting[place]
            if isinstance(waiting, Picture):
                self._waiting[place] = self._replaced(waiting)
                return

    def _has_room(self) -> bool:
        return len(self._waiting) < self._max_waiting

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop has ended: nobody waits
            self._loop.call_soon_threadsafe(self._arrived.set)
