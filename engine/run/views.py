"""Views on a thread of their own: throttled, latest wins, and never in the engine's way."""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.config import ViewsConfig
from engine.cpu_time import Stage, charge_thread_to
from engine.dense_types import DenseCloud, GroundPicture
from engine.errors import HangError
from engine.events import Event, MainMapChanged, RunPart
from engine.ports import ShowsCounts, ShowsDense, ShowsGround, ShowsMap, View
from engine.run.faults import Faults
from engine.run.queues import ignore_wait
from engine.types import Frame, FramePose, MapCounts, MapView

_MAX_WAITING_EVENTS = 20_000  # a viewer slower than that loses the oldest; they are counted
_CLOSE_TIMEOUT_S = 30.0


class ViewDispatcher:
    """Hands frames, maps and events to views.

    A newer frame or map replaces one that still waits. Events keep their order; when too many wait,
    the oldest go and are counted. A view that raises is reported, closed and left out from then on.
    So is one that hangs, but it cannot be closed: its thread is left behind, and another one serves
    the other views.

    Args:
        views: in the order in which they are shown something.
        config: how often.
        faults: takes what views raise.
        max_call_s: a view that takes longer hangs; 0: none does.
        waited: takes the seconds that the oldest waited, of what is shown together.
    """

    def __init__(
        self,
        views: Sequence[View],
        config: ViewsConfig,
        *,
        faults: Faults,
        max_call_s: float,
        waited: Callable[[float], None] = ignore_wait,
    ) -> None:
        self._views = list(views)
        self._faults = faults
        self._max_call_s = max_call_s
        self._waited = waited
        self._waiting_since_s: float | None = None  # the oldest of what waits
        self._min_map_gap_s = 1.0 / config.max_map_hz
        self._max_map_time_ratio = config.max_map_time_ratio
        self._map_cost = _MapCost()  # of the last one
        self._min_image_gap_s = 1.0 / config.max_image_hz
        self._changed = threading.Condition()
        self._frame: tuple[Frame, FramePose | None] | None = None
        self._map: tuple[MapView, _MapCost] | None = None
        self._dense: tuple[DenseCloud, _MapCost] | None = None
        self._ground: GroundPicture | None = None
        self._dense_cost = _MapCost()  # of the last one
        self._last_dense_s = -float("inf")
        self._counts: MapCounts | None = None  # that wait
        self._last_counts = MapCounts()
        self._events: deque[Event] = deque()
        self._num_events_lost = 0
        self._last_map_s = -float("inf")
        self._last_frame_s = -float("inf")
        self._closing = False
        self._actions: deque[tuple[View, Callable[[], None]]] = deque()  # still to be done
        self._is_closed = False  # or closing the views is among them
        self._busy: tuple[View, float] | None = None  # what is shown something, and since when
        self._last_check_s = time.monotonic()
        self._thread = self._new_thread()
        if self._views:
            self._thread.start()

    @property
    def shows_map(self) -> bool:
        """Whether one of the views shows the map."""
        return any(isinstance(view, ShowsMap) for view in self._views)

    @property
    def num_events_lost(self) -> int:
        """Events that no view saw because too many waited."""
        return self._num_events_lost

    def wants_map(self) -> bool:
        """Whether a map offered now would be shown: a view shows maps, and the last one is old.

        How old depends on how long it took.
        """
        gap_s = max(self._min_map_gap_s, self._map_cost.cpu_s / self._max_map_time_ratio)
        return time.monotonic() - self._last_map_s >= gap_s and self.shows_map

    def wants_dense(self) -> bool:
        """Whether a dense map offered now would be shown; as for maps."""
        gap_s = max(self._min_map_gap_s, self._dense_cost.cpu_s / self._max_map_time_ratio)
        is_old = time.monotonic() - self._last_dense_s >= gap_s
        return is_old and any(isinstance(view, ShowsDense) for view in self._views)

    def offer_dense(self, cloud: DenseCloud, *, cpu_s: float) -> None:
        """Takes the dense map, and what it took to make it; replaces one that waits."""
        if not self._views:
            return
        with self._changed:
            self._dense_cost = _MapCost(cpu_s=cpu_s)
            self._dense = cloud, self._dense_cost
            self._last_dense_s = time.monotonic()
            self._notify()

    def offer_ground(self, ground: GroundPicture) -> None:
        """Takes the ground from above; replaces one that waits."""
        if not self._views:
            return
        with self._changed:
            self._ground = ground
            self._notify()

    def offer_map(self, view: MapView) -> None:
        """Takes a map; replaces one that waits."""
        if not self._views:
            return
        with self._changed:
            self._map_cost = _MapCost(cpu_s=view.elapsed_s)
            self._map = view, self._map_cost
            self._last_map_s = time.monotonic()
            self._notify()

    def offer_counts(self, counts: MapCounts) -> None:
        """Takes the size of the map; replaces one that waits."""
        if not self._views or counts == self._last_counts:
            return
        with self._changed:
            self._counts = self._last_counts = counts
            self._notify()

    def offer_frame(self, frame: Frame, pose: FramePose | None) -> None:
        """Takes the current image, unless one was taken a moment ago."""
        now_s = time.monotonic()
        if not self._views or now_s - self._last_frame_s < self._min_image_gap_s:
            return
        with self._changed:
            self._frame = frame, pose
            self._last_frame_s = now_s
            self._notify()

    def offer_event(self, event: Event) -> None:
        """Takes one event; what waits of the dense map goes with its world."""
        if not self._views:
            return
        self._leave_out_if_hanging()
        with self._changed:
            if len(self._events) >= _MAX_WAITING_EVENTS:
                self._events.popleft()
                self._num_events_lost += 1
            self._events.append(event)
            if isinstance(event, MainMapChanged):
                self._dense = self._ground = None
            self._notify()

    def _notify(self) -> None:
        if self._waiting_since_s is None:
            self._waiting_since_s = time.monotonic()
        self._changed.notify()

    def close(self) -> None:
        """Shows what waits and closes the views; gives up on those that hang. Blocks."""
        if not self._thread.is_alive():
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        while self._thread.is_alive():
            self._thread.join(timeout=_CLOSE_TIMEOUT_S)
            self._leave_out_hanging(_CLOSE_TIMEOUT_S)

    def _leave_out_if_hanging(self) -> None:
        """Leaves out the view that has been busy for too long, if one has."""
        if not self._max_call_s:
            return
        with self._changed:
            now_s = time.monotonic()
            if now_s - self._last_check_s > self._max_call_s / 2 and self._busy is not None:
                self._busy = self._busy[0], now_s  # the process stood still, or nothing happened
            self._last_check_s = now_s
        self._leave_out_hanging(self._max_call_s)

    def _leave_out_hanging(self, limit_s: float) -> None:
        with self._changed:
            busy = self._busy
            if busy is None or time.monotonic() - busy[1] < limit_s:
                return
            view, _ = busy
            self._busy = None
            self._leave_out(view)
            self._thread = self._new_thread()  # the former one ends when the view returns
            self._thread.start()
        name = type(view).__name__
        self._report(view, HangError(f"{name} has not returned after {limit_s:g} s"))

    def _leave_out(self, view: View) -> None:
        """Does nothing more with a view, also not what is planned."""
        if view in self._views:
            self._views.remove(view)
        self._actions = deque(one for one in self._actions if one[0] is not view)

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._serve, name="views", daemon=True)

    def _serve(self) -> None:
        charge_thread_to(Stage.VIEWS)
        while (action := self._next_action()) is not None:
            shown, use = action
            if self._is_done(shown, use):
                continue
            with self._changed:
                if shown in self._views:
                    self._leave_out(shown)
                    if use != shown.close:
                        self._actions.appendleft((shown, shown.close))

    def _next_action(self) -> tuple[View, Callable[[], None]] | None:
        """Waits for what is to be done next; None: nothing more, on this thread."""
        with self._changed:
            self._changed.wait_for(self._has_work)
            if threading.current_thread() is not self._thread:
                return None
            if not self._actions:
                self._plan()
            if not self._actions:
                return None
            action = self._actions.popleft()
            self._busy = action[0], time.monotonic()
            return action

    def _plan(self) -> None:
        """Plans to show what waits to each view, and to close them at the end."""
        news = _News(
            frame=self._frame,
            view=self._map,
            counts=self._counts,
            events=tuple(self._events),
            dense=self._dense,
            ground=self._ground,
        )
        self._frame, self._map, self._counts = None, None, None
        self._dense, self._ground = None, None
        self._events.clear()
        if self._waiting_since_s is not None:
            self._waited(time.monotonic() - self._waiting_since_s)
            self._waiting_since_s = None
        if news != _News():
            self._actions.extend(
                (shown, functools.partial(self._show, shown, news)) for shown in self._views
            )
        if self._closing and not self._is_closed:
            self._is_closed = True
            self._actions.extend((shown, shown.close) for shown in self._views)

    def _show(self, shown: View, news: _News) -> None:
        for event in news.events:
            shown.show_event(event)
        if news.frame is not None:
            shown.show_frame(*news.frame)
        if news.counts is not None and isinstance(shown, ShowsCounts):
            shown.show_counts(news.counts)
        if news.view is not None and isinstance(shown, ShowsMap):
            view, cost = news.view
            self._charge(cost, functools.partial(shown.show_map, view))
        if news.dense is not None and isinstance(shown, ShowsDense):
            cloud, cost = news.dense
            self._charge(cost, functools.partial(shown.show_dense, cloud))
        if news.ground is not None and isinstance(shown, ShowsGround):
            shown.show_ground(news.ground)

    def _charge(self, cost: _MapCost, show: Callable[[], None]) -> None:
        began_s = time.thread_time()
        show()
        with self._changed:
            cost.cpu_s += time.thread_time() - began_s

    def _has_work(self) -> bool:
        is_left_behind = threading.current_thread() is not self._thread
        waits = self._actions or self._frame or self._map or self._dense or self._counts
        return bool(waits or self._events or self._ground or self._closing or is_left_behind)

    def _is_done(self, shown: View, action: Callable[[], None]) -> bool:
        """Whether an action of a view went well; a broken view must not end the run."""
        try:
            action()
        except Exception as error:  # a task boundary
            if threading.current_thread() is self._thread:
                self._report(shown, error)
            return False
        finally:
            with self._changed:
                if threading.current_thread() is self._thread:
                    self._busy = None
        return True

    def _report(self, shown: View, error: Exception) -> None:
        consequence = f"{type(shown).__name__} is left out from now on"
        self._faults.report(RunPart.VIEW, error, consequence=consequence)


@dataclass(slots=True, kw_only=True, eq=False)
class _MapCost:
    """What one map took so far; changed with the lock held."""

    cpu_s: float = 0.0  # to make it and to show it


@dataclass(frozen=True, slots=True, kw_only=True)
class _News:
    """What views have not been shown yet."""

    frame: tuple[Frame, FramePose | None] | None = None
    view: tuple[MapView, _MapCost] | None = None
    counts: MapCounts | None = None
    events: tuple[Event, ...] = ()
    dense: tuple[DenseCloud, _MapCost] | None = None
    ground: GroundPicture | None = None
