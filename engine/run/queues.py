"""Every queue of a run: who waits, and what is dropped."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from engine.events import Event, FrameDropped, Warned
from engine.run.event_loop import run_in
from engine.tracking.frame_tracker import NewKeyframe
from engine.types import DropReason, Frame, RejectedFrame, TrackedFrame

_MAX_WAITING_WRITES = 256

# -- tracking to mapping --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MappingItem:
    """What tracking made of a frame."""

    frame: Frame
    tracked: TrackedFrame | None
    fallback: TrackedFrame | None  # the same, tracked from the keyframe before
    keyframe: NewKeyframe | None
    is_settled: bool  # False: the frame may still become a keyframe, in a later item
    is_live: bool  # False: a file waits, so that the map does not depend on timing


class MappingQueue:
    """Items from tracking to mapping, in order; tracking waits while too many of them wait.

    For the event loop only.
    """

    def __init__(self, *, max_waiting: int) -> None:
        self._waiting: asyncio.Queue[MappingItem | None] = asyncio.Queue(max_waiting)
        self._put_back: deque[MappingItem | None] = deque()  # taken too early; come first
        self._num_keyframes_waiting = 0
        self._is_mapping_keyframe = False
        self._keyframe_taken = asyncio.Condition()

    @property
    def is_behind(self) -> bool:
        """Whether a keyframe waits for mapping or is being mapped."""
        return self._is_mapping_keyframe or self._num_keyframes_waiting > 0

    async def put(self, item: MappingItem) -> None:
        """Adds an item when there is room for it."""
        self._num_keyframes_waiting += item.keyframe is not None
        await self._waiting.put(item)

    async def end(self) -> None:
        """Ends the queue: no more items are put."""
        await self._waiting.put(None)

    async def get(self) -> MappingItem | None:
        """Takes the next item; None after the last."""
        item = self._put_back.popleft() if self._put_back else await self._waiting.get()
        if item is not None and item.keyframe is not None:
            async with self._keyframe_taken:
                self._num_keyframes_waiting -= 1
                self._keyframe_taken.notify_all()
        return item

    async def get_tracked_until(self, done: asyncio.Task[Any]) -> MappingItem | None:
        """Takes the next item without a keyframe.

        None when ``done`` is done first, or when a keyframe or the end comes next; that stays.
        """
        if done.done() or self._put_back:
            return None
        getting = asyncio.create_task(self._waiting.get(), name="next item")
        await asyncio.wait((done, getting), return_when=asyncio.FIRST_COMPLETED)
        if not getting.done():
            getting.cancel()  # an item is either taken by then or stays in the queue
            await asyncio.wait((getting,))
        if getting.cancelled():
            return None
        item = getting.result()
        if item is None or item.keyframe is not None:
            self._put_back.append(item)
            return None
        return item

    async def wait_until_keyframe_taken(self) -> None:
        """Returns when no keyframe waits for mapping."""
        async with self._keyframe_taken:
            await self._keyframe_taken.wait_for(lambda: not self._num_keyframes_waiting)

    @contextmanager
    def mapping_keyframe(self) -> Iterator[None]:
        """Counts as behind while the context is open: a keyframe is being mapped."""
        self._is_mapping_keyframe = True
        try:
            yield
        finally:
            self._is_mapping_keyframe = False


# -- events ---------------------------------------------------------------------------------------


class EventQueue:
    """An ``EventSink`` that stamps events and keeps them, in order, until the loop takes them.

    Any thread may emit: appending to a deque is atomic. Nothing is dropped; the loop takes all
    events after every frame.
    """

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._events: deque[Event] = deque()

    def clock(self) -> float:
        """Seconds since the start of the run, monotonic."""
        return time.monotonic() - self._started_s

    def __call__(self, event: Event) -> None:
        """Takes one event and stamps it."""
        self._events.append(replace(event, at_s=self.clock()))

    def warn(self, message: str) -> None:
        """Emits that something is degraded."""
        self(Warned(message=message))

    def frame_dropped(
        self, frame: Frame | RejectedFrame, *, reason: DropReason, detail: str
    ) -> None:
        """Emits that a frame was not used."""
        self(
            FrameDropped(
                frame_id=frame.frame_id if isinstance(frame, Frame) else None,
                source=frame.source,
                index=frame.index,
                name=frame.name,
                captured_at_s=frame.captured_at_s,
                reason=reason,
                detail=detail,
            )
        )

    def take(self) -> list[Event]:
        """All events since the last call, in order."""
        return [self._events.popleft() for _ in range(len(self._events))]


# -- writes ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Write:
    call: Callable[[], None]
    then: Callable[[], Awaitable[None]] | None
    done: asyncio.Future[None]


class Writer:
    """Does blocking writes in order on one thread; whoever schedules one waits when many wait.

    Args:
        thread: runs one call at a time.
        failed: is called with what a write raised; later writes still get their turn.
    """

    def __init__(self, thread: Executor, *, failed: Callable[[Exception], None]) -> None:
        self._thread = thread
        self._failed = failed
        self._writes: asyncio.Queue[_Write | None] = asyncio.Queue(_MAX_WAITING_WRITES)

    async def schedule(
        self, call: Callable[[], None], *, then: Callable[[], Awaitable[None]] | None = None
    ) -> asyncio.Future[None]:
        """Queues a write; ``then`` is awaited on the event loop once it is done, or has failed.

        Returns:
            A future that is done when the write is, also when it failed.
        """
        done = asyncio.get_running_loop().create_future()
        await self._writes.put(_Write(call=call, then=then, done=done))
        return done

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
            if not write.done.cancelled():
                write.done.set_result(None)
            if write.then is not None:
                await write.then()
