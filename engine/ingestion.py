"""Frames from the sources to tracking: who waits, what is dropped, and how much memory they take."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from engine.types import Frame, FrameId

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arrival:
    """A frame and the source it came from."""

    frame: Frame
    source_idx: int


class FrameQueue:
    """Frames that wait for tracking, oldest first, and the memory of all frames in the engine.

    Every source has places of its own, so that none takes another's. A frame's pixels count from
    its arrival until it is given back; a lone frame always passes. For the event loop only.
    """

    def __init__(self, *, max_waiting: int, max_bytes: int) -> None:
        """Makes an empty queue.

        Args:
            max_waiting: frames of one source that may wait.
            max_bytes: pixels of all frames between their arrival and their being given back.
        """
        self._max_waiting = max_waiting
        self._max_bytes = max_bytes
        self._waiting: deque[Arrival] = deque()
        self._in_engine: dict[FrameId, Frame] = {}
        self._used_bytes = 0
        self._has_ended = False
        self._changed = asyncio.Condition()

    @property
    def frames_in_engine(self) -> list[Frame]:
        """Frames that were put in and neither dropped nor given back, in order of arrival."""
        return list(self._in_engine.values())

    async def put(self, arrival: Arrival) -> None:
        """Adds a frame when there is room for it."""
        self._in_engine[arrival.frame.frame_id] = arrival.frame
        async with self._changed:
            await self._changed.wait_for(lambda: self._has_room(arrival))
            self._add(arrival)

    async def put_newest(self, arrival: Arrival) -> list[Frame]:
        """Adds a frame at once, in the place of older ones of its source if need be.

        Returns:
            The frames dropped for it, or the frame itself where older ones would not make room.
        """
        dropped: list[Frame] = []
        async with self._changed:
            while not self._has_room(arrival):
                oldest = self._oldest_of(arrival.source_idx)
                if oldest is None:
                    return [*dropped, arrival.frame]
                self._waiting.remove(oldest)
                self._leave(oldest.frame)
                dropped.append(oldest.frame)
            self._in_engine[arrival.frame.frame_id] = arrival.frame
            self._add(arrival)
        return dropped

    async def get(self) -> Arrival | None:
        """Takes the oldest frame as soon as there is one; None after the last."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._waiting or self._has_ended)
            if not self._waiting:
                return None
            self._changed.notify_all()
            return self._waiting.popleft()

    async def give_back(self, frame: Frame) -> None:
        """Frees the memory of a frame that left the engine."""
        async with self._changed:
            self._leave(frame)
            self._changed.notify_all()

    async def end(self) -> None:
        """Says that no frame will come any more."""
        async with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def _has_room(self, arrival: Arrival) -> bool:
        num_waiting = sum(other.source_idx == arrival.source_idx for other in self._waiting)
        wanted_bytes = self._used_bytes + arrival.frame.pixels.nbytes
        fits = wanted_bytes <= self._max_bytes or self._used_bytes == 0
        return fits and num_waiting < self._max_waiting

    def _oldest_of(self, source_idx: int) -> Arrival | None:
        return next((other for other in self._waiting if other.source_idx == source_idx), None)

    def _add(self, arrival: Arrival) -> None:
        self._waiting.append(arrival)
        self._used_bytes += arrival.frame.pixels.nbytes
        self._changed.notify_all()

    def _leave(self, frame: Frame) -> None:
        del self._in_engine[frame.frame_id]
        self._used_bytes -= frame.pixels.nbytes


async def until_stopped(
    items: AsyncGenerator[Item, None], stop: asyncio.Event
) -> AsyncGenerator[Item, None]:
    """Yields ``items`` to their end or until ``stop`` is set, then closes them.

    Only waiting for the next item is interrupted, so an item that arrived is never lost.
    """
    stopping = asyncio.create_task(stop.wait(), name="stopping")
    try:
        async with aclosing(items):
            while not stop.is_set():
                arriving = asyncio.create_task(_step(items), name="next frame")
                try:
                    await asyncio.wait((arriving, stopping), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not arriving.done():
                        arriving.cancel()
                        await asyncio.wait((arriving,))
                if arriving.cancelled() or not (arrived := arriving.result()):
                    return
                yield arrived[0]
    finally:
        stopping.cancel()


async def _step(items: AsyncGenerator[Item, None]) -> tuple[Item] | None:
    """The next item, or None after the last."""
    try:
        return (await anext(items),)
    except StopAsyncIteration:
        return None
