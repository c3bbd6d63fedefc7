from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np

from engine.ports import ArrivalSink
from engine.run.queues import ArrivalQueue, Queued
from engine.types import (
    Arrival,
    DropReason,
    Frame,
    GpsFix,
    GpsReading,
    Received,
    RejectedFrame,
    SourceNotice,
    SourceState,
)
from tests.support.fake_runs import frame_of
from tests.support.waiting import HANG_S

FRAME_BYTES = 8 * 8 * 3
NOTICE = SourceNotice(source="fake", state=SourceState.LOST, detail="gone")

Result = TypeVar("Result")


def never() -> Frame:
    raise AssertionError("what is only queued is not decoded")


def arrival(index: int, *, lane: str = "", num_bytes: int = FRAME_BYTES) -> Arrival:
    return Arrival(
        source="fake",
        index=index,
        name=f"{index}.jpg",
        captured_at_s=float(index),
        num_bytes=num_bytes,
        decode=never,
        lane=lane,
    )


def rejected(index: int, reason: DropReason = DropReason.UNREADABLE) -> RejectedFrame:
    return arrival(index).rejected(reason, "x")


def reading(time_s: float) -> GpsReading:
    fix = GpsFix(latitude_deg=1.0, longitude_deg=2.0, altitude_m=3.0)
    return GpsReading(source="fake", camera_key=None, captured_at_s=time_s, fix=fix)


def frame(frame_id: int, *, edge_px: int = 8) -> Frame:
    return frame_of(frame_id, pixels=np.zeros((edge_px, edge_px, 3), np.uint8))


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def queue_of(
    *,
    max_waiting: int = 2,
    max_frames: int = 100,
    max_lanes: int = 8,
    clock: Callable[[], float] | None = None,
    waited: Callable[[float], None] = lambda _: None,
) -> ArrivalQueue:
    return ArrivalQueue(
        max_waiting=max_waiting,
        max_bytes=max_frames * FRAME_BYTES,
        max_lanes=max_lanes,
        clock=clock or Clock(),
        waited=waited,
    )


def run(test: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(test, HANG_S), debug=True)


async def settled(awaitable: Awaitable[Result]) -> asyncio.Task[Result]:
    """A task that had every chance to finish."""
    task = asyncio.ensure_future(awaitable)
    for _ in range(5):
        await asyncio.sleep(0)
    assert isinstance(task, asyncio.Task)
    return task


async def taken(queue: ArrivalQueue) -> Queued:
    queued = await queue.get()
    assert queued is not None
    return queued


def index_of(item: Received) -> int:
    return item.index if isinstance(item, Arrival | RejectedFrame) else -1


async def left(queue: ArrivalQueue) -> list[int]:
    """Indices of what still comes out; what is not a frame counts as -1."""
    queue.end()
    indices = []
    while (queued := await queue.get()) is not None:
        indices.append(index_of(queued.item))
        queue.forget(queued)
    return indices


async def reports(queue: ArrivalQueue) -> list[Received]:
    queue.end_reports()
    items: list[Received] = []
    while (report := await queue.next_report()) is not None:
        items.append(report[1])
    return items


async def dropped(queue: ArrivalQueue) -> list[tuple[int, DropReason]]:
    items = await reports(queue)
    return [(item.index, item.reason) for item in items if isinstance(item, RejectedFrame)]


# -- what can wait --------------------------------------------------------------------------------


def test_items_come_out_in_order_of_arrival_whatever_their_source() -> None:
    async def test() -> None:
        queue = queue_of(max_waiting=3)
        for index, source_idx in ((1, 0), (2, 1), (3, 1), (4, 0)):
            await queue.put(source_idx, arrival(index))
        await queue.put(0, NOTICE)
        assert await left(queue) == [1, 2, 3, 4, -1]

    run(test())


def test_how_long_items_waited_is_reported_when_they_are_taken() -> None:
    async def test() -> None:
        clock = Clock()
        waits_s: list[float] = []
        queue = queue_of(clock=clock, waited=waits_s.append)
        await queue.put(0, arrival(0))
        clock.now_s = 2.0
        await queue.put(0, arrival(1))
        late = await settled(queue.put(0, arrival(2)))  # there is no room for it yet
        clock.now_s = 5.0
        assert waits_s == []
        queue.forget(await taken(queue))
        ahead = queue.get_ahead()
        assert ahead is not None
        queue.forget(ahead)
        await late
        clock.now_s = 6.0
        await taken(queue)
        assert waits_s == [5.0, 3.0, 4.0]

    run(test())


def test_putting_waits_until_the_source_has_a_place() -> None:
    async def test() -> None:
        queue = queue_of()
        await queue.put(0, arrival(1))
        await queue.put(0, arrival(2))
        third = await settled(queue.put(0, arrival(3)))
        assert not third.done()
        assert (await settled(queue.put(1, arrival(4)))).done()
        assert index_of((await taken(queue)).item) == 1
        await third
        assert await left(queue) == [2, 4, 3]

    run(test())


def test_getting_waits_for_an_item() -> None:
    async def test() -> None:
        queue = queue_of()
        getting = await settled(queue.get())
        assert not getting.done()
        await queue.put(0, arrival(1))
        queued = await getting
        assert queued is not None
        assert index_of(queued.item) == 1

    run(test())


def test_the_end_wakes_who_waits_for_an_item() -> None:
    async def test() -> None:
        queue = queue_of()
        getting = await settled(queue.get())
        queue.end()
        assert await getting is None

    run(test())


def test_breaking_off_wakes_who_waits_for_room_and_nothing_is_taken_any_more() -> None:
    async def test() -> None:
        queue = queue_of(max_waiting=1)
        await queue.put(0, arrival(1))
        late = await settled(queue.put(0, arrival(2)))
        assert not late.done()
        queue.break_off()
        await late
        assert await queue.get() is None
        assert queue.get_ahead() is None
        # They never had their turn, so they can still be counted.
        assert [index_of(queued.item) for queued in queue.take_waiting()] == [1, 2]
        assert queue.used_bytes == 0

    run(test())


def test_what_a_live_source_still_sends_after_a_run_broke_off_is_reported() -> None:
    async def test() -> None:
        queue = queue_of()
        sink = queue.sink(0)
        queue.break_off()
        sink(arrival(1))
        sink(NOTICE)
        assert await queue.get() is None
        stopped, notice = sorted(await reports(queue), key=lambda one: one is NOTICE)
        assert isinstance(stopped, RejectedFrame)
        assert (stopped.index, stopped.reason) == (1, DropReason.STOPPED)
        assert notice is NOTICE

    run(test())


def test_a_dropped_arrival_says_which_camera_sent_it() -> None:
    rejected_frame = replace(arrival(1), origin="site/a").rejected(DropReason.OVERLOAD, "behind")
    assert rejected_frame.detail == "site/a: behind"


def test_what_was_taken_and_not_used_is_the_first_again() -> None:
    async def test() -> None:
        queue = queue_of()
        await queue.put(0, arrival(1))
        await queue.put(0, arrival(2))
        queue.put_back(await taken(queue))
        assert queue.used_bytes == 2 * FRAME_BYTES
        assert await left(queue) == [1, 2]

    run(test())


def test_a_closed_source_gives_what_waits_unless_it_is_discarded() -> None:
    async def test() -> None:
        queue = queue_of(max_waiting=1)
        sink = queue.sink(1)
        await queue.put(0, arrival(1))
        sink(arrival(2))
        late = await settled(queue.put(0, arrival(3)))
        queue.close(0)
        queue.close(1)
        await late
        sink(arrival(4))
        sink(rejected(5))
        sink(reading(1.0))  # may still concern a frame that is decoded later
        queue.discard(1)
        assert await left(queue) == [1]
        assert await reports(queue) == [reading(1.0)]

    run(test())


def test_only_what_can_wait_is_taken_ahead_and_only_if_it_is_there() -> None:
    async def test() -> None:
        queue = queue_of()
        assert queue.get_ahead() is None
        await queue.put(0, arrival(1))
        queue.sink(1)(arrival(2))
        ahead = queue.get_ahead()
        assert ahead is not None
        assert index_of(ahead.item) == 1
        assert queue.get_ahead() is None
        assert await left(queue) == [2]

    run(test())


# -- what cannot ----------------------------------------------------------------------------------


def test_the_newest_takes_the_place_of_the_oldest_of_its_source_only() -> None:
    async def test() -> None:
        queue = queue_of()
        sinks = [queue.sink(source_idx) for source_idx in (0, 1)]
        for index, source_idx in ((1, 0), (2, 1), (3, 0), (4, 1), (5, 1), (6, 1)):
            sinks[source_idx](arrival(index))
        assert await left(queue) == [1, 3, 5, 6]
        assert await dropped(queue) == [(2, DropReason.OVERLOAD), (4, DropReason.OVERLOAD)]

    run(test())


def test_lanes_of_one_source_have_places_of_their_own() -> None:
    async def test() -> None:
        queue = queue_of(max_waiting=1)
        sink = queue.sink(0)
        for index, lane in enumerate("abbab"):
            sink(arrival(index, lane=lane))
        assert await left(queue) == [3, 4]
        assert [index for index, _ in await dropped(queue)] == [1, 0, 2]

    run(test())


def test_a_live_arrival_never_pushes_out_what_can_wait() -> None:
    async def test() -> None:
        queue = queue_of(max_waiting=1)
        await queue.put(0, arrival(1))
        sink = queue.sink(1)
        sink(arrival(2))
        sink(arrival(3))
        assert await left(queue) == [1, 3]

    run(test())


def test_more_lanes_than_allowed_do_not_wait_at_the_same_time() -> None:
    async def test() -> None:
        queue = queue_of(max_lanes=2)
        sink = queue.sink(0)
        for index, lane in enumerate("abc"):
            sink(arrival(index, lane=lane))
        (report,) = await reports(queue)
        assert isinstance(report, RejectedFrame)
        assert (report.index, report.reason) == (2, DropReason.OVERLOAD)
        assert report.detail == "too many cameras at once"
        await taken(queue)
        sink(arrival(3, lane="c"))
        assert await left(queue) == [1, 3]

    run(test())


def test_arrivals_while_the_run_is_paused_are_dropped_and_those_before_are_not() -> None:
    async def test() -> None:
        queue = queue_of()
        sink = queue.sink(0)
        sink(arrival(1))
        queue.pause()
        sink(arrival(2))
        sink(NOTICE)
        queue.resume()
        sink(arrival(3))
        assert await left(queue) == [1, 3]
        assert await dropped(queue) == [(2, DropReason.PAUSED)]

    run(test())


def test_a_dropped_arrival_keeps_its_name_and_time_and_gets_a_reason() -> None:
    async def test() -> None:
        queue = queue_of(max_waiting=1)
        sink = queue.sink(0)
        for index in (1, 2):
            sink(arrival(index))
        assert await reports(queue) == [
            RejectedFrame(
                source="fake",
                index=1,
                name="1.jpg",
                captured_at_s=1.0,
                reason=DropReason.OVERLOAD,
                detail="the engine is behind",
            )
        ]

    run(test())


# -- memory ---------------------------------------------------------------------------------------


def test_pixels_take_the_place_of_the_arrival_and_count_until_they_are_given_back() -> None:
    async def test() -> None:
        queue = queue_of(max_waiting=10, max_frames=3)
        await queue.put(0, arrival(1, num_bytes=10))
        queued = await taken(queue)
        assert queue.used_bytes == 10
        first = frame(1)
        queue.add_frame(queued, first)
        assert queue.used_bytes == FRAME_BYTES
        await queue.put(0, arrival(2))
        await queue.put(0, arrival(3))
        fourth = await settled(queue.put(0, arrival(4)))
        assert not fourth.done()
        await queue.give_back(first)
        await fourth
        assert queue.frames_in_engine == []
        assert queue.used_bytes == 3 * FRAME_BYTES

    run(test())


def test_nothing_is_decoded_while_pixels_and_arrivals_fill_the_memory() -> None:
    async def test() -> None:
        queue = queue_of(max_frames=2)
        await queue.put(0, arrival(1, num_bytes=10))
        await queue.put(0, arrival(2, num_bytes=10))
        large = frame(1, edge_px=12)
        queue.add_frame(await taken(queue), large)
        getting = await settled(queue.get())
        assert not getting.done()
        assert queue.get_ahead() is None
        await queue.give_back(large)
        queued = await getting
        assert queued is not None
        assert index_of(queued.item) == 2

    run(test())


def test_without_limit_arrivals_come_and_are_decoded_though_the_memory_is_full() -> None:
    async def test() -> None:
        queue = queue_of(max_frames=1)
        await queue.put(0, arrival(1))
        queue.add_frame(await taken(queue), frame(1))
        putting = await settled(queue.put(0, arrival(2)))
        getting = await settled(queue.get())
        assert not putting.done()
        with queue.without_limit():
            await putting
            queued = await getting
            assert queued is not None
        assert index_of(queued.item) == 2
        assert not (await settled(queue.put(0, arrival(3)))).done()

    run(test())


def test_a_frame_larger_than_all_memory_passes_when_it_is_alone() -> None:
    async def test() -> None:
        queue = queue_of(max_frames=1)
        await queue.put(0, arrival(1))
        waiting = await settled(queue.put(0, arrival(2, num_bytes=100 * FRAME_BYTES)))
        assert not waiting.done()
        queue.forget(await taken(queue))
        await waiting
        assert index_of((await taken(queue)).item) == 2

    run(test())


def test_a_live_arrival_without_memory_drops_older_ones_and_at_last_itself() -> None:
    async def test() -> None:
        queue = queue_of(max_waiting=10, max_frames=2)
        in_tracking = frame(1)
        await queue.put(0, arrival(1))
        queue.add_frame(await taken(queue), in_tracking)
        sink = queue.sink(1)
        sink(arrival(2))
        sink(arrival(3))  # instead of 2
        being_decoded = await taken_beside(queue, in_tracking)
        sink(arrival(4))  # no room, and none to replace
        assert index_of(being_decoded.item) == 3
        assert [index for index, _ in await dropped(queue)] == [2, 4]

    async def taken_beside(queue: ArrivalQueue, other: Frame) -> Queued:
        """Takes an arrival; its own memory and that of a frame fill the queue again."""
        await queue.give_back(other)
        queued = await taken(queue)
        queue.add_frame(queued, frame(2, edge_px=12))
        return queued

    run(test())


# -- what is reported -----------------------------------------------------------------------------


def test_notices_positions_and_rejected_frames_do_not_wait_behind_arrivals() -> None:
    async def test() -> None:
        queue = queue_of()
        sink = queue.sink(0)
        for item in (arrival(1), rejected(2), reading(1.0), NOTICE, rejected(3)):
            sink(item)
        assert await reports(queue) == [NOTICE, reading(1.0), rejected(2), rejected(3)]
        assert await left(queue) == [1]

    run(test())


def test_positions_can_be_taken_before_their_report() -> None:
    async def test() -> None:
        queue = queue_of()
        queue.sink(0)(reading(1.0))
        queue.sink(1)(reading(2.0))
        assert queue.take_readings() == [(0, reading(1.0)), (1, reading(2.0))]
        assert queue.take_readings() == []
        assert await reports(queue) == []

    run(test())


def test_every_rejected_frame_is_reported_or_in_a_sum() -> None:
    async def test() -> None:
        queue = queue_of()
        sink = queue.sink(0)
        for index in range(5_000):
            sink(rejected(index))
        for index in range(3):
            sink(rejected(index, DropReason.TOO_LARGE))
        items = [item for item in await reports(queue) if isinstance(item, RejectedFrame)]
        assert len(items) <= 1_100
        unlisted = [item for item in items if "not listed" in item.detail]
        num_unlisted = sum(
            int(item.detail.split(" and ")[1].split(" ")[0].replace(",", "")) for item in unlisted
        )
        assert len(items) + num_unlisted == 5_003
        assert sum(item.num_frames for item in items) == 5_003
        assert {item.reason for item in items} == {DropReason.UNREADABLE, DropReason.TOO_LARGE}

    run(test())


def test_after_a_storm_frames_are_listed_one_by_one_again() -> None:
    async def test() -> None:
        clock = Clock()
        queue = queue_of(clock=clock)
        sink = queue.sink(0)
        for index in range(1_500):
            sink(rejected(index))
        for _ in range(1_000):
            await queue.next_report()
        clock.now_s = 1.0
        sink(rejected(1_500))
        listed = arrival(1_500).rejected(
            DropReason.UNREADABLE, "x; and 500 before it that are not listed"
        )
        assert await reports(queue) == [replace(listed, num_frames=501)]

    run(test())


# -- threads --------------------------------------------------------------------------------------


def test_a_thread_never_waits_and_all_that_it_offers_is_taken_or_reported() -> None:
    num = 900

    async def test() -> None:
        queue = queue_of(max_waiting=4)

        def offer_all(sink: ArrivalSink) -> None:
            for index in range(num):
                sink(arrival(index))

        thread = threading.Thread(target=offer_all, args=(queue.sink(0),))
        thread.start()
        thread.join()  # while nobody takes anything: the event loop stands still
        indices = await left(queue)
        assert indices == list(range(num - 4, num))
        assert [index for index, _ in await dropped(queue)] == list(range(num - 4))
        assert queue.used_bytes == 0

    run(test())


def test_who_takes_waits_for_the_thread_that_offers() -> None:
    async def test() -> None:
        queue = queue_of()
        sink = queue.sink(0)
        getting, reporting = await settled(queue.get()), await settled(queue.next_report())
        await asyncio.to_thread(sink, arrival(7))
        queued = await getting
        assert queued is not None
        assert index_of(queued.item) == 7
        await asyncio.to_thread(sink, NOTICE)
        assert await reporting == (0, NOTICE)

    run(test())


def test_a_thread_that_outlives_the_event_loop_does_no_harm() -> None:
    sinks: list[ArrivalSink] = []

    async def leave() -> None:
        sinks.append(queue_of().sink(0))

    run(leave())
    sinks[0](arrival(1))
    sinks[0](NOTICE)
