"""The queues of a run: order, what may be taken before its turn, stamps, and who waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from engine.events import FrameDropped, KeyframeAdded, Warned
from engine.run import queues
from engine.run.queues import EventQueue, MappingItem, MappingQueue, Writer
from engine.tracking.frame_tracker import KeyframeReason, NewKeyframe
from engine.types import DropReason, FrameId
from tests.support.fake_runs import frame_of, rejected
from tests.support.synthetic import SyntheticWorld, straight_path

WORLD = SyntheticWorld(straight_path(6))
HANG_S = 300.0  # a guard, no measure


def run(story: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(story, HANG_S), debug=True)


async def as_far_as_it_goes(task: asyncio.Task[object]) -> None:
    """Gives a task every chance to end."""
    for _ in range(20):
        if task.done():
            return
        await asyncio.sleep(0)


# -- tracking to mapping --------------------------------------------------------------------------


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


async def ids_left(items: MappingQueue) -> list[int]:
    await items.end()
    ids = []
    while (taken := await items.get()) is not None:
        ids.append(int(taken.frame.frame_id))
    return ids


def test_tracked_frames_are_taken_early_and_a_keyframe_keeps_its_turn() -> None:
    async def story() -> None:
        items, busy = MappingQueue(max_waiting=8), asyncio.create_task(asyncio.sleep(HANG_S))
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
        items = MappingQueue(max_waiting=8)
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
        items, busy = MappingQueue(max_waiting=8), asyncio.create_task(asyncio.sleep(HANG_S))
        await items.end()
        assert await items.get_tracked_until(busy) is None
        assert await items.get() is None
        busy.cancel()

    run(story())


def test_who_puts_waits_while_the_queue_is_full() -> None:
    async def story() -> None:
        items = MappingQueue(max_waiting=2)
        for frame_id in (1, 2):
            await items.put(item(frame_id))
        putting = asyncio.create_task(items.put(item(3)))
        await as_far_as_it_goes(putting)
        assert not putting.done()
        assert await items.get() is not None
        await putting
        await items.get()
        assert await ids_left(items) == [3]

    run(story())


def test_each_item_that_is_taken_tells_how_long_it_waited() -> None:
    async def story() -> None:
        waits_s: list[float] = []
        items = MappingQueue(max_waiting=8, waited=waits_s.append)
        busy = asyncio.create_task(asyncio.sleep(HANG_S))
        for frame_id in (1, 2):
            await items.put(item(frame_id))
        await items.end()
        assert waits_s == []
        assert await items.get() is not None
        assert await items.get_tracked_until(busy) is not None
        assert await items.get() is None  # the end is no item
        busy.cancel()
        assert len(waits_s) == 2
        assert min(waits_s) >= 0.0

    run(story())


def test_items_that_were_looked_at_come_first_again_in_their_order() -> None:
    async def story() -> None:
        items = MappingQueue(max_waiting=8)
        for frame_id in (1, 2, 3, 4):
            await items.put(item(frame_id, is_keyframe=frame_id == 2))
        never = asyncio.create_task(asyncio.Event().wait())
        looked_at = [await items.look_ahead_until(never) for _ in range(3)]
        assert [one.frame.frame_id for one in looked_at if one is not None] == [1, 2, 3]
        assert items.has_waiting_keyframe  # nobody took it
        items.put_back([one for one in looked_at if one is not None])
        assert (tracked := await items.get_tracked_until(never)) is not None
        assert tracked.frame.frame_id == 1
        assert await items.get_tracked_until(never) is None  # a keyframe comes next
        await items.end()
        assert await ids_left(items) == [2, 3, 4]
        never.cancel()

    run(story())


def test_who_looks_ahead_is_let_go_at_the_end_and_when_the_work_is_done() -> None:
    async def story() -> None:
        items = MappingQueue(max_waiting=8)
        work = asyncio.create_task(asyncio.sleep(0))
        assert await items.look_ahead_until(work) is None
        await items.end()
        assert await items.look_ahead() is None
        assert await items.get() is None  # the end stays

    run(story())


def test_who_waits_for_a_keyframe_goes_on_when_mapping_takes_it() -> None:
    async def story() -> None:
        items = MappingQueue(max_waiting=8)
        await items.wait_until_few_keyframes_wait(1)
        assert not (items.is_behind or items.has_waiting_keyframe)
        await items.put(item(1, is_keyframe=True))
        await items.wait_until_few_keyframes_wait(1)
        assert items.has_waiting_keyframe
        await items.put(item(2, is_keyframe=True))
        waiting = asyncio.create_task(items.wait_until_few_keyframes_wait(1))
        await as_far_as_it_goes(waiting)
        assert not waiting.done()
        assert items.is_behind
        await items.get()
        await waiting
        await items.get()
        assert not items.has_waiting_keyframe
        with items.mapping_keyframe():
            assert items.is_behind
        assert not items.is_behind

    run(story())


# -- events ---------------------------------------------------------------------------------------


def test_events_are_stamped_when_they_are_emitted_and_taken_once_in_order() -> None:
    events = EventQueue()
    added = KeyframeAdded(
        frame_id=FrameId(3),
        camera_key="one",
        index=0,
        is_photo=False,
        name="3.jpg",
        captured_at_s=0.3,
        num_keypoints=7,
    )
    before_s = events.clock()
    events(added)
    events.warn("two")
    events(Warned(at_s=-5.0, message="three"))  # whoever emits has no say in the time
    after_s = events.clock()
    taken = events.take()
    assert [type(event) for event in taken] == [KeyframeAdded, Warned, Warned]
    times_s = [event.at_s for event in taken]
    assert times_s == sorted(times_s)
    assert before_s <= times_s[0] <= times_s[-1] <= after_s
    assert isinstance(taken[0], KeyframeAdded)
    assert (taken[0].frame_id, taken[0].num_keypoints) == (3, 7)
    assert events.take() == []


def test_a_dropped_frame_is_reported_with_all_that_is_known_of_it() -> None:
    events = EventQueue()
    frame = replace(rejected(7), reason=DropReason.TOO_LARGE, detail="9 x 9 px", num_frames=3)
    events.frame_rejected(frame)
    events.frame_dropped(frame_of(4), reason=DropReason.OVERLOAD, detail="too many")
    unread, late = events.take()
    assert isinstance(unread, FrameDropped)
    assert (unread.source, unread.index, unread.name) == (frame.source, 7, frame.name)
    assert unread.captured_at_s == frame.captured_at_s
    assert (unread.reason, unread.detail) == (DropReason.TOO_LARGE, "9 x 9 px")
    assert (unread.frame_id, unread.num_frames) == (None, 3)
    assert isinstance(late, FrameDropped)
    assert (late.frame_id, late.num_frames) == (4, 1)


def test_events_of_several_threads_are_all_taken_and_each_thread_s_in_order() -> None:
    events = EventQueue()
    taken = []

    def emit(name: str) -> None:
        for number in range(1000):
            events.warn(f"{name} {number}")

    threads = [threading.Thread(target=emit, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        taken += events.take()
    taken += events.take()
    warned = [event for event in taken if isinstance(event, Warned)]
    assert len(warned) == 4000
    for name in "abcd":
        own = [event for event in warned if event.message.startswith(name)]
        assert [event.message for event in own] == [f"{name} {number}" for number in range(1000)]
        times_s = [event.at_s for event in own]
        assert times_s == sorted(times_s)


# -- writes ---------------------------------------------------------------------------------------


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1, thread_name_prefix="test") as executor:
        yield executor


def unexpected(error: Exception) -> None:
    raise error


def test_writes_are_done_in_order_on_the_thread_before_the_context_ends(
    thread: ThreadPoolExecutor,
) -> None:
    done: list[int] = []
    threads: set[str] = set()

    def write(number: int) -> Callable[[], None]:
        def call() -> None:
            threads.add(threading.current_thread().name)
            done.append(number)

        return call

    async def story() -> None:
        writer = Writer(thread, failed=unexpected)
        await writer.schedule(write(0))  # before it runs is early enough
        async with writer.running():
            for number in range(1, 50):
                await writer.schedule(write(number))

    run(story())
    assert done == list(range(50))
    assert threads == {"test_0"}


def test_what_follows_a_write_comes_before_the_next_one_however_many_wait(
    thread: ThreadPoolExecutor,
) -> None:
    done: list[str] = []

    async def then() -> None:
        done.append("follows the first")

    async def story() -> None:
        async with (writer := Writer(thread, failed=unexpected)).running():
            await writer.schedule(lambda: done.append("first"), then=then)
            await writer.schedule(lambda: done.append("second"))

    run(story())
    assert done == ["first", "follows the first", "second"]


def test_each_write_tells_how_long_it_waited_for_its_turn(thread: ThreadPoolExecutor) -> None:
    waits_s: list[float] = []
    started, open_up = threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        assert open_up.wait(HANG_S)

    async def story() -> None:
        async with (writer := Writer(thread, failed=unexpected, waited=waits_s.append)).running():
            await writer.schedule(hold)
            assert await asyncio.to_thread(started.wait, HANG_S)
            await writer.schedule(lambda: None)
            await asyncio.sleep(0.02)
            open_up.set()

    run(story())
    assert len(waits_s) == 2
    assert waits_s[1] >= 0.02


def test_a_write_that_breaks_is_reported_and_the_others_get_their_turn(
    thread: ThreadPoolExecutor,
) -> None:
    errors: list[Exception] = []
    done: list[str] = []

    async def then() -> None:
        done.append("then")

    def fail() -> None:
        raise ZeroDivisionError("zero")

    async def story() -> None:
        async with (writer := Writer(thread, failed=errors.append)).running():
            await writer.schedule(fail, then=then)
            await writer.schedule(lambda: done.append("next"))

    run(story())
    assert [str(error) for error in errors] == ["zero"]
    assert done == ["then", "next"]


def test_what_follows_a_write_may_break_and_the_others_get_their_turn(
    thread: ThreadPoolExecutor,
) -> None:
    errors: list[Exception] = []
    done: list[str] = []

    async def then() -> None:
        raise ZeroDivisionError("zero")

    async def story() -> None:
        async with (writer := Writer(thread, failed=errors.append)).running():
            await writer.schedule(lambda: done.append("first"), then=then)
            await writer.schedule(lambda: done.append("next"))

    run(story())
    assert [str(error) for error in errors] == ["zero"]
    assert done == ["first", "next"]


def test_whoever_schedules_a_write_may_wait_until_it_is_done_or_has_failed(
    thread: ThreadPoolExecutor,
) -> None:
    open_up = threading.Event()

    def hold() -> None:
        assert open_up.wait(HANG_S)

    def fail() -> None:
        raise ZeroDivisionError("zero")

    async def story() -> None:
        async with (writer := Writer(thread, failed=lambda error: None)).running():
            held, failed = await writer.schedule(hold), await writer.schedule(fail)
            given_up = await writer.schedule(lambda: None)
            given_up.cancel()
            await asyncio.sleep(0)
            assert not held.done()
            open_up.set()
            await held
            await failed

    run(story())


def test_who_schedules_waits_while_too_much_waits(
    thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queues, "_MAX_WAITING_WRITES", 2)
    started, open_up = threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        assert open_up.wait(HANG_S)

    async def story() -> None:
        async with (writer := Writer(thread, failed=unexpected)).running():
            await writer.schedule(hold)
            assert await asyncio.to_thread(started.wait, HANG_S)
            for _ in range(2):
                await writer.schedule(hold)
            scheduling = asyncio.create_task(writer.schedule(hold))
            await as_far_as_it_goes(scheduling)
            assert not scheduling.done()
            open_up.set()
            await scheduling

    run(story())
