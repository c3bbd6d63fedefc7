"""Views beside the engine: latest wins, facts in order, and a bad view harms nobody."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from engine.config import ViewsConfig
from engine.dense_types import DenseChunk, DenseCloud
from engine.events import Event, MainMapChanged, Warned
from engine.run import views as view_dispatch
from engine.run.views import ViewDispatcher
from engine.types import Frame, FrameId, FramePose, MapCounts, MapView
from tests.support.faults import FaultsSeen
from tests.support.waiting import HANG_S

CONFIG = ViewsConfig(max_map_hz=2.0, max_image_hz=10.0)


class FakeClock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class ViewWithoutMap:
    """Notes what it is shown; waits at its gate before the first thing, raises when told to."""

    def __init__(self, *, raises_on: Sequence[str] = ()) -> None:
        self.shown: list[str] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.busy = threading.Event()
        self.hanging = threading.Event()
        self._changed = threading.Condition()
        self._raises_on = raises_on

    def show_frame(self, frame: Frame, pose: FramePose | None) -> None:
        self._note(f"frame {frame.frame_id}{'' if pose is None else ' posed'}")

    def show_event(self, event: Event) -> None:
        if isinstance(event, MainMapChanged):
            self._note("another map")
            return
        assert isinstance(event, Warned)
        self._note(event.message)

    def close(self) -> None:
        self._note("close")

    def hang(self) -> None:
        """Stands still until the test is over."""
        self.gate.clear()
        self.hanging.set()
        assert self.gate.wait(HANG_S)

    def wait_for(self, num_shown: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.shown) >= num_shown, HANG_S)

    def _note(self, what: str) -> None:
        self.threads.add(threading.current_thread().name)
        self.busy.set()
        assert self.gate.wait(HANG_S)
        with self._changed:
            self.shown.append(what)
            self._changed.notify_all()
        if what in self._raises_on:
            raise RuntimeError(f"cannot show {what}")


class FakeView(ViewWithoutMap):
    """Shows the map, too."""

    def show_map(self, view: MapView) -> None:
        self._note(f"map {view.version}")


class FiguresView(ViewWithoutMap):
    """Shows how large the map is."""

    def show_counts(self, counts: MapCounts) -> None:
        self._note(f"{counts.num_registered} keyframes, {counts.num_points3D} points")


class DenseOnly(ViewWithoutMap):
    """Shows the dense map."""

    def show_dense(self, cloud: DenseCloud) -> None:
        self._note(f"dense {len(cloud.chunks)}")


def dense_cloud(num_chunks: int) -> DenseCloud:
    nothing = np.zeros((0, 3))
    chunks = [
        DenseChunk(
            frame_id=FrameId(number),
            version=number,
            xyz_in_cam=nothing.astype(np.float32),
            colors=nothing.astype(np.uint8),
        )
        for number in range(num_chunks)
    ]
    return DenseCloud(chunks=tuple(chunks), world_from_chunk=np.zeros((num_chunks, 3, 4)))


def fact(number: int) -> Warned:
    return Warned(at_s=0.0, message=f"fact {number}")


def frame(number: int) -> Frame:
    return Frame(
        frame_id=FrameId(number),
        camera_key="camera",
        source="synthetic",
        index=number - 1,
        name=f"{number}.jpg",
        captured_at_s=0.0,
        received_at_s=0.0,
        pixels=np.zeros((2, 2, 3), np.uint8),
    )


def pose(number: int) -> FramePose:
    return FramePose(
        frame_id=FrameId(number),
        index=number - 1,
        captured_at_s=0.0,
        cam_from_world=np.eye(4)[:3],
        is_keyframe=True,
    )


def map_view(version: int) -> MapView:
    return MapView(
        version=version,
        keyframe_ids=np.empty(0, np.int64),
        cam_from_world=np.empty((0, 3, 4)),
        focal_px=np.empty(0),
        image_sizes=np.empty((0, 2), np.int64),
        points3D_in_world=np.empty((0, 3), np.float32),
        colors=np.empty((0, 3), np.uint8),
        chunk_ids=np.empty(0, np.int64),
        edges=np.empty((0, 2), np.int64),
        edge_reasons=(),
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(view_dispatch, "time", SimpleNamespace(monotonic=fake, thread_time=fake))
    return fake


Dispatch = Callable[..., ViewDispatcher]


@pytest.fixture
def dispatch() -> Iterator[Dispatch]:
    """Makes dispatchers and sees to it that their threads end."""
    made: list[tuple[ViewDispatcher, tuple[ViewWithoutMap, ...]]] = []
    threads_before = set(threading.enumerate())

    def make(*views: ViewWithoutMap) -> ViewDispatcher:
        made.append((ViewDispatcher(views, CONFIG, faults=FaultsSeen(), max_call_s=60.0), views))
        return made[-1][0]

    yield make
    for dispatcher, views in made:
        for view in views:
            view.gate.set()
        dispatcher.close()
    wait_for_threads_since(threads_before)


def wait_for_threads_since(before: Collection[threading.Thread]) -> None:
    """Returns when all threads started since have ended, in views that hung, too."""
    for thread in threading.enumerate():
        if thread not in before:
            thread.join(HANG_S)
            assert not thread.is_alive()


def stuck(view: FakeView, dispatcher: ViewDispatcher) -> None:
    """Makes a view stand still in the middle of showing fact 0."""
    view.gate.clear()
    dispatcher.offer_event(fact(0))
    assert view.busy.wait(HANG_S)


# -- what views get to see ------------------------------------------------------------------------


def test_every_view_is_shown_everything_on_one_thread_of_its_own(dispatch: Dispatch) -> None:
    views = FakeView(), FakeView()
    dispatcher = dispatch(*views)
    dispatcher.offer_event(fact(1))
    dispatcher.offer_frame(frame(1), pose(1))
    dispatcher.offer_map(map_view(1))
    dispatcher.close()

    for view in views:
        assert sorted(view.shown) == ["close", "fact 1", "frame 1 posed", "map 1"]
        assert view.shown[-1] == "close"
        assert view.threads == {"views"}


def test_a_slow_view_gets_the_latest_map_and_frame_and_every_fact_in_order(
    dispatch: Dispatch, clock: FakeClock
) -> None:
    view = FakeView()
    dispatcher = dispatch(view)
    stuck(view, dispatcher)
    for number in (1, 2, 3):
        clock.now_s += 1.0
        dispatcher.offer_event(fact(number))
        dispatcher.offer_frame(frame(number), None)
        dispatcher.offer_map(map_view(number))
    view.gate.set()
    view.wait_for(6)

    assert view.shown == ["fact 0", "fact 1", "fact 2", "fact 3", "frame 3", "map 3"]


def test_the_engine_is_not_held_up_by_a_view_that_hangs(dispatch: Dispatch) -> None:
    view = FakeView()
    dispatcher = dispatch(view)
    stuck(view, dispatcher)

    def offer() -> None:
        for number in range(1, 100):
            dispatcher.offer_event(fact(number))
            dispatcher.offer_frame(frame(number), None)
            dispatcher.offer_map(map_view(number))
            dispatcher.wants_map()

    offering = threading.Thread(target=offer)
    offering.start()
    offering.join(HANG_S)
    assert not offering.is_alive()
    assert view.shown == []


def test_facts_that_nobody_takes_are_bounded_and_the_lost_are_counted(
    dispatch: Dispatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_dispatch, "_MAX_WAITING_EVENTS", 5)
    view = FakeView()
    dispatcher = dispatch(view)
    stuck(view, dispatcher)
    for number in range(1, 9):
        dispatcher.offer_event(fact(number))
    assert dispatcher.num_events_lost == 3
    view.gate.set()
    dispatcher.close()

    assert view.shown == ["fact 0", *(f"fact {number}" for number in range(4, 9)), "close"]


# -- views that show no map ------------------------------------------------------------------------


def test_no_map_is_wanted_for_views_that_show_counts_only(dispatch: Dispatch) -> None:
    view = FiguresView()
    dispatcher = dispatch(view)
    assert not dispatcher.shows_map
    assert not dispatcher.wants_map()
    dispatcher.offer_counts(MapCounts(num_keyframes=3, num_registered=2, num_points3D=90))
    dispatcher.offer_map(map_view(1))  # no reason to leave it out
    dispatcher.close()
    assert view.shown == ["2 keyframes, 90 points", "close"]


def test_counts_go_to_views_that_show_them_once_and_the_latest_win(dispatch: Dispatch) -> None:
    busy, view = FakeView(), FiguresView()
    dispatcher = dispatch(busy, view)
    stuck(busy, dispatcher)
    for num_registered in (2, 3, 4, 4):
        dispatcher.offer_counts(MapCounts(num_registered=num_registered))
    busy.gate.set()
    busy.wait_for(1)
    dispatcher.offer_counts(MapCounts(num_registered=4))
    dispatcher.close()
    assert view.shown == ["fact 0", "4 keyframes, 0 points", "close"]
    assert busy.shown == ["fact 0", "close"]


def test_the_dense_map_goes_to_views_that_show_it_and_the_latest_wins(dispatch: Dispatch) -> None:
    busy, view = FakeView(), DenseOnly()
    dispatcher = dispatch(busy, view)
    stuck(busy, dispatcher)
    for num_chunks in (1, 2, 3):
        dispatcher.offer_dense(dense_cloud(num_chunks), cpu_s=0.0)
    busy.gate.set()
    busy.wait_for(1)
    dispatcher.close()
    assert view.shown == ["fact 0", "dense 3", "close"]
    assert busy.shown == ["fact 0", "close"]


def test_a_dense_map_that_waits_is_not_shown_in_another_world(dispatch: Dispatch) -> None:
    busy, view = FakeView(), DenseOnly()
    dispatcher = dispatch(busy, view)
    stuck(busy, dispatcher)
    dispatcher.offer_dense(dense_cloud(1), cpu_s=0.0)
    changed = MainMapChanged(
        at_s=1.0, former_map_number=1, num_registered=9, num_registered_in_former=3
    )
    dispatcher.offer_event(changed)
    busy.gate.set()
    busy.wait_for(2)
    dispatcher.offer_dense(dense_cloud(2), cpu_s=0.0)
    dispatcher.close()
    assert view.shown == ["fact 0", "another map", "dense 2", "close"]


def test_the_dense_map_is_wanted_as_often_as_it_is_cheap(
    dispatch: Dispatch, clock: FakeClock
) -> None:
    dispatcher = dispatch(DenseOnly())
    assert dispatcher.wants_dense()
    assert not dispatch(FakeView()).wants_dense()
    dispatcher.offer_dense(dense_cloud(1), cpu_s=0.2)
    offered_at_s = clock.now_s
    for elapsed_s, is_wanted in ((3.9, False), (4.1, True)):  # 5 % of 4 s
        clock.now_s = offered_at_s + elapsed_s
        assert dispatcher.wants_dense() is is_wanted


# -- throttling -----------------------------------------------------------------------------------


def test_a_map_is_wanted_when_the_last_one_is_old_enough(
    dispatch: Dispatch, clock: FakeClock
) -> None:
    dispatcher = dispatch(FakeView())
    assert dispatcher.wants_map()
    dispatcher.offer_map(map_view(1))
    assert not dispatcher.wants_map()
    clock.now_s += 0.49
    assert not dispatcher.wants_map()
    clock.now_s += 0.02
    assert dispatcher.wants_map()


def test_a_map_that_takes_long_is_shown_less_often(dispatch: Dispatch, clock: FakeClock) -> None:
    class SlowView(FakeView):
        def show_map(self, view: MapView) -> None:
            clock.now_s += 0.1
            super().show_map(view)

    dispatcher = dispatch(SlowView())
    shown_at_s = clock.now_s
    dispatcher.offer_map(replace(map_view(1), elapsed_s=0.2))
    dispatcher.close()
    for elapsed_s, is_wanted in ((5.9, False), (6.1, True)):  # 5 % of 6 s
        clock.now_s = shown_at_s + elapsed_s
        assert dispatcher.wants_map() is is_wanted


def test_what_showing_a_former_map_took_is_not_added_to_a_newer_one(
    dispatch: Dispatch, clock: FakeClock
) -> None:
    class SlowView(FakeView):
        def show_map(self, view: MapView) -> None:
            super().show_map(view)
            if view.version == 1:
                clock.now_s += 0.1

    view = SlowView()
    dispatcher = dispatch(view)
    view.gate.clear()
    dispatcher.offer_map(map_view(1))
    assert view.busy.wait(HANG_S)
    dispatcher.offer_map(map_view(2))
    offered_at_s = clock.now_s
    view.gate.set()
    dispatcher.close()
    assert view.shown == ["map 1", "map 2", "close"]
    clock.now_s = offered_at_s + 0.51
    assert dispatcher.wants_map()


@pytest.mark.parametrize(("gap_s", "is_shown"), [(0.0, False), (0.09, False), (0.11, True)])
def test_a_frame_that_follows_too_soon_is_not_shown(
    dispatch: Dispatch, clock: FakeClock, gap_s: float, is_shown: bool
) -> None:
    view = FakeView()
    dispatcher = dispatch(view)
    dispatcher.offer_frame(frame(1), None)
    view.wait_for(1)
    clock.now_s += gap_s
    dispatcher.offer_frame(frame(2), None)
    dispatcher.close()

    assert ("frame 2" in view.shown) is is_shown


def test_the_last_map_is_shown_however_soon_it_follows(
    dispatch: Dispatch, clock: FakeClock
) -> None:
    view = FakeView()
    dispatcher = dispatch(view)
    dispatcher.offer_map(map_view(1))
    view.wait_for(1)
    dispatcher.offer_map(map_view(2))
    dispatcher.close()

    assert clock.now_s == 100.0
    assert view.shown == ["map 1", "map 2", "close"]


# -- views that fail ------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["fact 1", "frame 1", "map 1"])
def test_a_view_that_raises_is_closed_and_left_out_and_the_others_go_on(
    dispatch: Dispatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    broken, sound = FakeView(raises_on=[what]), FakeView()
    dispatcher = dispatch(broken, sound)
    dispatcher.offer_event(fact(1))
    dispatcher.offer_frame(frame(1), None)
    dispatcher.offer_map(map_view(1))
    sound.wait_for(3)
    dispatcher.offer_event(fact(2))
    dispatcher.close()

    assert broken.shown[-2:] == [what, "close"]
    assert sorted(sound.shown) == ["close", "fact 1", "fact 2", "frame 1", "map 1"]
    assert dispatcher.shows_map
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None


def test_a_view_that_fails_to_close_does_not_keep_the_next_from_closing(
    dispatch: Dispatch, caplog: pytest.LogCaptureFixture
) -> None:
    views = FakeView(raises_on=["close"]), FakeView(raises_on=["close"]), FakeView()
    dispatch(*views).close()
    assert [view.shown for view in views] == [["close"]] * 3
    assert len(caplog.records) == 2


def test_without_any_view_left_nothing_is_wanted_and_the_thread_still_ends(
    dispatch: Dispatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = FakeView(raises_on=["fact 1", "close"])
    dispatcher = dispatch(broken)
    dispatcher.offer_event(fact(1))
    broken.wait_for(2)
    dispatcher.close()

    assert broken.shown == ["fact 1", "close"]  # closed once
    assert not dispatcher.shows_map
    assert not dispatcher.wants_map()
    dispatcher.offer_map(map_view(1))
    assert len(caplog.records) == 2


def test_a_view_that_hangs_is_given_up_when_closing(
    dispatch: Dispatch, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_dispatch, "_CLOSE_TIMEOUT_S", 0.01)
    view = FakeView()
    dispatcher = dispatch(view)
    stuck(view, dispatcher)
    dispatcher.close()

    assert view.shown == []
    assert "FakeView has not returned" in caplog.text
    monkeypatch.undo()


def test_without_a_limit_of_calls_a_view_that_hangs_is_given_up_at_the_end_as_soon(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_dispatch, "_CLOSE_TIMEOUT_S", 0.05)
    view = FakeView()
    dispatcher = ViewDispatcher([view], CONFIG, faults=FaultsSeen(), max_call_s=0.0)
    stuck(view, dispatcher)
    clock.now_s += 0.04
    dispatcher.offer_event(fact(1))  # says nothing about the view
    clock.now_s += 0.04
    closing = threading.Thread(target=dispatcher.close)
    closing.start()
    closing.join(HANG_S)
    is_given_up = not closing.is_alive()
    view.gate.set()
    assert is_given_up


def test_a_view_that_hangs_is_not_closed_and_the_others_are(
    dispatch: Dispatch, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_dispatch, "_CLOSE_TIMEOUT_S", 0.2)
    hanging, busy, sound = FakeView(), FakeView(), FakeView()
    dispatcher = dispatch(hanging, busy, sound)
    stuck(busy, dispatcher)
    dispatcher.offer_event(fact(1))  # waits, and is planned together with the end
    hanging.gate.clear()
    dispatcher.close()

    assert sound.shown == ["fact 0", "fact 1", "close"]
    assert hanging.shown == ["fact 0"]
    assert caplog.text.count("FakeView has not returned") == 2
    monkeypatch.undo()


def test_a_view_that_raises_and_then_hangs_when_closed_is_left_behind(
    dispatch: Dispatch, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_dispatch, "_CLOSE_TIMEOUT_S", 0.2)
    view, sound = FakeView(raises_on=["fact 0"]), FakeView()
    monkeypatch.setattr(view, "close", view.hang)
    dispatcher = dispatch(view, sound)
    dispatcher.offer_event(fact(0))
    assert view.hanging.wait(HANG_S)
    dispatcher.close()

    assert sound.shown == ["fact 0", "close"]
    assert "FakeView has not returned" in caplog.text
    monkeypatch.undo()


def test_a_view_that_hangs_is_left_out_and_the_others_see_everything(
    dispatch: Dispatch, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    threads_before = threading.enumerate()
    hanging, sound = FakeView(), FakeView()
    dispatcher = dispatch(hanging, sound)
    stuck(hanging, dispatcher)
    for number in (1, 2, 3):
        clock.now_s += 25.0  # of 60 s that a call has
        dispatcher.offer_event(fact(number))
    sound.wait_for(4)

    assert sound.shown == [f"fact {number}" for number in range(4)]
    assert hanging.shown == []
    assert "FakeView has not returned after 60 s" in caplog.text
    hanging.gate.set()
    dispatcher.offer_event(fact(4))
    sound.wait_for(5)
    dispatcher.close()
    assert sound.shown[-2:] == ["fact 4", "close"]
    wait_for_threads_since(threads_before)
    assert hanging.shown == ["fact 0"]  # it does not come back


def test_a_process_that_stood_still_leaves_no_view_out(
    dispatch: Dispatch, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    view = FakeView()
    dispatcher = dispatch(view)
    stuck(view, dispatcher)
    clock.now_s += 3600.0
    dispatcher.offer_event(fact(1))
    view.gate.set()
    view.wait_for(2)

    assert view.shown == ["fact 0", "fact 1"]
    assert caplog.text == ""


# -- the ends -------------------------------------------------------------------------------------


def test_without_views_there_is_no_thread_and_nothing_to_do() -> None:
    threads_before = threading.enumerate()
    dispatcher = ViewDispatcher([], CONFIG, faults=FaultsSeen(), max_call_s=60.0)
    dispatcher.offer_event(fact(1))
    dispatcher.offer_frame(frame(1), None)
    dispatcher.offer_map(map_view(1))
    dispatcher.close()

    assert not dispatcher.shows_map
    assert not dispatcher.wants_map()
    assert dispatcher.num_events_lost == 0
    assert set(threading.enumerate()) <= set(threads_before)


def test_closing_twice_closes_the_views_once(dispatch: Dispatch) -> None:
    view = FakeView()
    dispatcher = dispatch(view)
    dispatcher.close()
    dispatcher.close()
    assert view.shown == ["close"]
