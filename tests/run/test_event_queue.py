from __future__ import annotations

import threading

from engine.run.event_queue import EventQueue

from engine.events import FrameDropped, Warned
from engine.types import DropReason
from tests.support.fake_runs import rejected


def test_facts_come_out_once_and_in_order() -> None:
    events = EventQueue()
    events.warn("one")
    events(Warned(at_s=events.clock(), message="two"))
    first, second = events.take()
    assert isinstance(first, Warned)
    assert isinstance(second, Warned)
    assert (first.message, second.message) == ("one", "two")
    assert 0.0 <= first.at_s <= second.at_s <= events.clock()
    assert events.take() == []


def test_a_dropped_frame_is_told_with_all_that_is_known_of_it() -> None:
    events = EventQueue()
    frame = rejected(7)
    events.frame_dropped(frame, reason=DropReason.TOO_LARGE, detail="9 x 9 px")
    (event,) = events.take()
    assert isinstance(event, FrameDropped)
    assert (event.source, event.index, event.name) == (frame.source, 7, frame.name)
    assert event.captured_at_s == frame.captured_at_s
    assert (event.reason, event.detail) == (DropReason.TOO_LARGE, "9 x 9 px")


def test_facts_of_several_threads_are_all_taken() -> None:
    events = EventQueue()
    taken = []

    def tell() -> None:
        for number in range(1000):
            events.warn(str(number))

    threads = [threading.Thread(target=tell) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        taken += events.take()
    taken += events.take()
    assert len(taken) == 4000
