"""From a reading thread to the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from adapters.live.newest_slot import NewestSlot, Picture
from engine.types import DropReason, RejectedFrame, SourceNotice, SourceState
from tests.support.waiting import HANG_S

NOTICE = SourceNotice(source="fake", state=SourceState.LOST, detail="gone")


def picture(index: int) -> Picture:
    return Picture(index=index, captured_at_s=index, received_at_s=index, content=b"")


def overtaken(one: Picture) -> RejectedFrame:
    return RejectedFrame(
        source="fake",
        index=one.index,
        name=f"{one.index}.jpg",
        captured_at_s=one.captured_at_s,
        reason=DropReason.OVERLOAD,
        detail="",
    )


def run(test: Callable[[NewestSlot], Awaitable[None]], *, max_waiting: int = 100) -> None:
    async def with_slot() -> None:
        async with asyncio.timeout(HANG_S):
            await test(NewestSlot(replaced=overtaken, max_waiting=max_waiting))

    asyncio.run(with_slot(), debug=True)


async def taken(slot: NewestSlot, num: int) -> list[tuple[str, int]]:
    """Kind and index of the next things."""
    items = [await slot.next() for _ in range(num)]
    return [(type(item).__name__, getattr(item, "index", -1)) for item in items]


def test_of_several_pictures_the_newest_stays_and_the_others_are_told_as_dropped() -> None:
    async def test(slot: NewestSlot) -> None:
        for index in range(3):
            slot.put(picture(index))
        assert await taken(slot, 3) == [("RejectedFrame", 0), ("RejectedFrame", 1), ("Picture", 2)]

    run(test)


def test_what_is_told_keeps_its_place_and_is_never_replaced() -> None:
    async def test(slot: NewestSlot) -> None:
        slot.put(picture(0))
        slot.put(NOTICE)
        slot.put(NOTICE)
        slot.put(picture(1))
        slot.put(overtaken(picture(2)))
        assert await taken(slot, 5) == [
            ("RejectedFrame", 0),
            ("SourceNotice", -1),
            ("SourceNotice", -1),
            ("Picture", 1),
            ("RejectedFrame", 2),
        ]

    run(test)


def test_a_picture_that_was_taken_is_not_replaced() -> None:
    async def test(slot: NewestSlot) -> None:
        slot.put(picture(0))
        assert await taken(slot, 1) == [("Picture", 0)]
        slot.put(picture(1))
        assert await taken(slot, 1) == [("Picture", 1)]

    run(test)


def test_who_takes_waits_for_the_thread_that_puts() -> None:
    async def test(slot: NewestSlot) -> None:
        waiting = asyncio.create_task(taken(slot, 1))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        await asyncio.to_thread(slot.put, picture(7))
        assert await waiting == [("Picture", 7)]

    run(test)


def test_a_thread_that_is_far_ahead_waits_and_nothing_is_lost() -> None:
    async def test(slot: NewestSlot) -> None:
        def put_all() -> None:
            for index in range(20):
                slot.put(picture(index))

        thread = threading.Thread(target=put_all)
        thread.start()
        await asyncio.sleep(0.05)
        assert thread.is_alive()
        items = await taken(slot, 20)
        assert [index for _, index in items] == list(range(20))
        assert items[-1] == ("Picture", 19)
        await asyncio.to_thread(thread.join)

    run(test, max_waiting=5)


def test_the_end_comes_after_what_was_there_and_frees_a_thread_that_waits() -> None:
    async def test(slot: NewestSlot) -> None:
        slot.put(NOTICE)
        thread = threading.Thread(target=slot.put, args=(NOTICE,))
        thread.start()
        await asyncio.sleep(0.02)
        assert thread.is_alive()
        slot.end()
        await asyncio.to_thread(thread.join)
        assert await slot.next() is NOTICE
        assert await slot.next() is None
        assert await slot.next() is None
        slot.put(NOTICE)
        assert await slot.next() is None

    run(test, max_waiting=1)


def test_what_broke_the_reader_is_raised_after_what_came_before() -> None:
    async def test(slot: NewestSlot) -> None:
        slot.put(picture(0))
        slot.end(ZeroDivisionError("the reader is broken"))
        assert await taken(slot, 1) == [("Picture", 0)]
        with pytest.raises(ZeroDivisionError, match="broken"):
            await slot.next()

    run(test)


def test_a_reader_that_outlives_the_event_loop_does_no_harm() -> None:
    slots: list[NewestSlot] = []

    async def leave(slot: NewestSlot) -> None:
        slots.append(slot)

    run(leave)
    slots[0].put(picture(0))
    slots[0].end()
