"""What tracking hands to mapping, and how far tracking may run ahead. For the event loop only."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from engine.tracking.frame_tracker import NewKeyframe
from engine.types import Frame, TrackedFrame


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MappingItem:
    """What tracking made of a frame."""

    frame: Frame
    tracked: TrackedFrame | None
    fallback: TrackedFrame | None  # the same, followed from the keyframe before
    keyframe: NewKeyframe | None
    is_settled: bool  # False: the frame may still become a keyframe, in a later item
    is_live: bool  # False: a file waits, so that the map does not depend on timing


class MappingItems:
    """Items in order; who puts one waits when too many wait."""

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
        """Says that there will be no more."""
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
        """Notes that a keyframe is being mapped."""
        self._is_mapping_keyframe = True
        try:
            yield
        finally:
            self._is_mapping_keyframe = False
