"""What tracking hands to mapping: order, and what may be taken before its turn."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from engine.run.mapping_items import MappingItem, MappingItems

from engine.tracking.frame_tracker import KeyframeReason, NewKeyframe
from tests.support.fake_runs import frame_of
from tests.support.synthetic import SyntheticWorld, straight_path

WORLD = SyntheticWorld(straight_path(6))
WAIT_S = 5.0


def item(frame_id: int, *, is_keyframe: bool = False) -> MappingItem:
    keyframe = NewKeyframe(keyframe=WORLD.keyframe(frame_id), reason=KeyframeReason.PARALLAX)
    return MappingItem(
        frame=frame_of(frame_id),
        tracked=None,
        fallback=None,
        keyframe=keyframe if is_keyframe else None,
        is_settled=True,
        is_live=True,
    )


def run(story: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(story, WAIT_S))


async def ids_left(items: MappingItems) -> list[int]:
    await items.end()
    ids = []
    while (taken := await items.get()) is not None:
        ids.append(int(taken.frame.frame_id))
    return ids


def test_tracked_frames_are_taken_early_and_a_keyframe_keeps_its_turn() -> None:
    async def story() -> None:
        items, busy = MappingItems(max_waiting=8), asyncio.create_task(asyncio.sleep(WAIT_S))
        for frame_id in (1, 2, 3, 4):
            await items.put(item(frame_id, is_keyframe=frame_id == 3))
        early = [await items.get_tracked_until(busy) for _ in range(4)]
        assert [one.frame.frame_id for one in early if one is not None] == [1, 2]
        assert early[2:] == [None, None]
        assert await ids_left(items) == [3, 4]
        busy.cancel()

    run(story())


def test_nothing_is_lost_when_the_task_is_done_while_waiting() -> None:
    async def story() -> None:
        items = MappingItems(max_waiting=8)
        for frame_id in range(1, 6):
            done = asyncio.create_task(asyncio.sleep(0))
            putting = asyncio.create_task(items.put(item(frame_id)))
            taken = await items.get_tracked_until(done)
            await putting
            if taken is None:
                taken = await items.get()
            assert taken is not None
            assert taken.frame.frame_id == frame_id
        assert await ids_left(items) == []

    run(story())


def test_the_end_is_not_taken_early() -> None:
    async def story() -> None:
        items, busy = MappingItems(max_waiting=8), asyncio.create_task(asyncio.sleep(WAIT_S))
        await items.end()
        assert await items.get_tracked_until(busy) is None
        assert await items.get() is None
        busy.cancel()

    run(story())


def test_who_waits_for_a_keyframe_goes_on_when_mapping_takes_it() -> None:
    async def story() -> None:
        items = MappingItems(max_waiting=8)
        await items.wait_until_keyframe_taken()
        assert not items.is_behind
        await items.put(item(1, is_keyframe=True))
        waiting = asyncio.create_task(items.wait_until_keyframe_taken())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        assert items.is_behind
        await items.get()
        await waiting
        with items.mapping_keyframe():
            assert items.is_behind
        assert not items.is_behind

    run(story())
