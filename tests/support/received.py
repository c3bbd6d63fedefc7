"""What sources give, decoded as the engine would, for tests without an engine."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing

from engine.ports import FrameSource, LiveSource, Source
from engine.types import Arrival, Frame, GpsReading, Received, RejectedFrame, SourceNotice

Decoded = Frame | RejectedFrame | GpsReading | SourceNotice


def decoded(item: Received) -> Decoded:
    """An item with its pixels, or why it has none."""
    return item.decode() if isinstance(item, Arrival) else item


async def items_of(source: Source) -> AsyncGenerator[Decoded, None]:
    """Everything of a source in order, until closed; nothing of a live one is dropped."""
    items = _of_live(source) if isinstance(source, LiveSource) else _of_file(source)
    async with aclosing(items):
        async for item in items:
            yield item


async def _of_file(source: FrameSource) -> AsyncGenerator[Decoded, None]:
    async with aclosing(source.frames()) as items:
        async for item in items:
            yield await asyncio.to_thread(decoded, item)


async def _of_live(source: LiveSource) -> AsyncGenerator[Decoded, None]:
    loop, changed = asyncio.get_running_loop(), asyncio.Event()
    waiting: deque[Received] = deque()

    def sink(item: Received) -> None:
        waiting.append(item)
        loop.call_soon_threadsafe(changed.set)

    receiving = asyncio.create_task(source.receive(sink))
    receiving.add_done_callback(lambda _: changed.set())
    try:
        while waiting or not receiving.done():
            if not waiting:
                await changed.wait()
                changed.clear()
                continue
            item = waiting.popleft()
            if not isinstance(item, Arrival):
                yield item
                continue
            frame = await asyncio.to_thread(item.decode)
            readings = [other for other in waiting if isinstance(other, GpsReading)]
            for reading in readings:  # those that came while it was decoded concern it
                waiting.remove(reading)
                yield reading
            yield frame
        receiving.result()
    finally:
        receiving.cancel()
        await asyncio.wait((receiving,))
