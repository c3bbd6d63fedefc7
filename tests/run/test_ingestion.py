from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

import numpy as np
import pytest

from engine.run.ingestion import Arrival, FrameQueue, until_stopped
from engine.types import Frame
from tests.support.fake_runs import frame_of

WAIT_S = 5.0
FRAME_BYTES = 8 * 8 * 3

Result = TypeVar("Result")


def arrival(frame_id: int, *, source_idx: int = 0, edge_px: int = 8) -> Arrival:
    pixels = np.zeros((edge_px, edge_px, 3), np.uint8)
    return Arrival(frame=frame_of(frame_id, pixels=pixels), source_idx=source_idx)


def queue(*, max_waiting: int = 2, max_frames: int = 100) -> FrameQueue:
    return FrameQueue(max_waiting=max_waiting, max_bytes=max_frames * FRAME_BYTES)


def run(test: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(test, WAIT_S), debug=True)


async def put_later(frames: FrameQueue, item: Arrival) -> asyncio.Task[None]:
    """A task that puts, after it had every chance to."""
    task = asyncio.create_task(frames.put(item))
    for _ in range(5):
        await asyncio.sleep(0)
    return task


async def ids_left(frames: FrameQueue) -> list[int]:
    await frames.end()
    ids = []
    while (item := await frames.get()) is not None:
        ids.append(int(item.frame.frame_id))
    return ids


def ids(frames: list[Frame]) -> list[int]:
    return [int(frame.frame_id) for frame in frames]


# -- places ---------------------------------------------------------------------------------------


def test_frames_come_out_in_order_of_arrival_whatever_their_source() -> None:
    async def test() -> None:
        frames = queue()
        for frame_id, source_idx in ((1, 0), (2, 1), (3, 1), (4, 0)):
            await frames.put(arrival(frame_id, source_idx=source_idx))
        assert await ids_left(frames) == [1, 2, 3, 4]

    run(test())


def test_putting_waits_until_the_source_has_a_place() -> None:
    async def test() -> None:
        frames = queue()
        await frames.put(arrival(1))
        await frames.put(arrival(2))
        third = await put_later(frames, arrival(3))
        assert not third.done()
        assert (await put_later(frames, arrival(4, source_idx=1))).done()
        taken = await frames.get()
        assert taken is not None
        assert taken.frame.frame_id == 1
        await third
        assert await ids_left(frames) == [2, 4, 3]

    run(test())


def test_the_newest_takes_the_place_of_the_oldest_of_its_source_only() -> None:
    async def test() -> None:
        frames = queue()
        for frame_id, source_idx in ((1, 0), (2, 1), (3, 0), (4, 1)):
            assert await frames.put_newest(arrival(frame_id, source_idx=source_idx)) == []
        assert ids(await frames.put_newest(arrival(5, source_idx=1))) == [2]
        assert ids(await frames.put_newest(arrival(6, source_idx=1))) == [4]
        assert await ids_left(frames) == [1, 3, 5, 6]

    run(test())


def test_getting_waits_for_a_frame() -> None:
    async def test() -> None:
        frames = queue()
        getting = asyncio.create_task(frames.get())
        await put_later(frames, arrival(1))
        taken = await getting
        assert taken is not None
        assert taken.frame.frame_id == 1

    run(test())


def test_the_end_wakes_who_waits_for_a_frame_and_who_waits_for_room() -> None:
    async def test() -> None:
        frames = queue(max_waiting=1)
        getting = asyncio.create_task(frames.get())
        await asyncio.sleep(0)
        await frames.end()
        assert await getting is None

        frames = queue(max_waiting=1)
        await frames.put(arrival(1))
        late = await put_later(frames, arrival(2))
        assert not late.done()
        await frames.end()
        await late
        assert await ids_left(frames) == [1]
        # It never had its turn, so it can still be told.
        assert ids(frames.frames_in_engine) == [1, 2]

    run(test())


# -- memory ---------------------------------------------------------------------------------------


def test_pixels_count_until_they_are_given_back() -> None:
    async def test() -> None:
        frames = queue(max_waiting=10, max_frames=2)
        first, second = arrival(1), arrival(2)
        await frames.put(first)
        await frames.put(second)
        assert frames.used_bytes == 2 * FRAME_BYTES
        third = await put_later(frames, arrival(3))
        await frames.get()
        await asyncio.sleep(0)
        assert not third.done()
        await frames.give_back(first.frame)
        await third
        assert frames.used_bytes == 2 * FRAME_BYTES
        assert ids(frames.frames_in_engine) == [2, 3]

    run(test())


def test_a_frame_larger_than_all_memory_passes_when_it_is_alone() -> None:
    async def test() -> None:
        frames = queue(max_frames=1)
        small, huge = arrival(1), arrival(2, edge_px=80)
        await frames.put(small)
        waiting = await put_later(frames, huge)
        assert not waiting.done()
        await frames.give_back(small.frame)
        await waiting
        assert frames.used_bytes == huge.frame.pixels.nbytes == 100 * FRAME_BYTES

    run(test())


def test_a_live_frame_without_memory_drops_older_ones_and_at_last_itself() -> None:
    async def test() -> None:
        frames = queue(max_waiting=10, max_frames=2)
        await frames.put(arrival(1))
        in_tracking = await frames.get()
        assert in_tracking is not None
        assert await frames.put_newest(arrival(2, source_idx=1)) == []
        assert ids(await frames.put_newest(arrival(3, source_idx=1))) == [2]
        await frames.get()
        assert ids(await frames.put_newest(arrival(4, source_idx=1))) == [4]
        assert ids(frames.frames_in_engine) == [1, 3]
        assert frames.used_bytes == 2 * FRAME_BYTES
        await frames.give_back(in_tracking.frame)
        assert await frames.put_newest(arrival(5, source_idx=1)) == []

    run(test())


# -- until stopped --------------------------------------------------------------------------------


class Numbers:
    """Counts up to a number, then ends or waits forever."""

    def __init__(self, *, last: int, waits: bool = False) -> None:
        self.last = last
        self.waits = waits
        self.is_closed = False

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            for number in range(1, self.last + 1):
                yield number
            if self.waits:
                await asyncio.Event().wait()
        finally:
            self.is_closed = True


def test_everything_is_passed_on_without_a_stop() -> None:
    async def test() -> None:
        numbers = Numbers(last=5)
        assert [n async for n in until_stopped(numbers.items(), asyncio.Event())] == [1, 2, 3, 4, 5]
        assert numbers.is_closed

    run(test())


def test_a_stop_interrupts_waiting_for_the_next_item() -> None:
    async def test() -> None:
        numbers, stop = Numbers(last=2, waits=True), asyncio.Event()
        asyncio.get_running_loop().call_later(0.01, stop.set)
        assert [n async for n in until_stopped(numbers.items(), stop)] == [1, 2]
        assert numbers.is_closed

    run(test())


def test_after_a_stop_nothing_more_is_asked_for() -> None:
    async def test() -> None:
        numbers, stop = Numbers(last=5), asyncio.Event()
        taken = []
        async for number in until_stopped(numbers.items(), stop):
            taken.append(number)
            if number == 3:
                stop.set()
        assert taken == [1, 2, 3]
        assert numbers.is_closed

    run(test())


def test_what_the_items_raise_comes_through() -> None:
    async def failing() -> AsyncGenerator[int, None]:
        yield 1
        raise KeyError("fx")

    async def test() -> None:
        taken = []
        with pytest.raises(KeyError, match="fx"):
            async for number in until_stopped(failing(), asyncio.Event()):
                taken.append(number)
        assert taken == [1]

    run(test())


def test_cancelling_closes_the_items() -> None:
    async def test() -> None:
        numbers = Numbers(last=1, waits=True)

        async def read() -> None:
            async for _ in until_stopped(numbers.items(), asyncio.Event()):
                pass

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        for _ in range(5):
            await asyncio.sleep(0)
        assert numbers.is_closed

    run(test())
