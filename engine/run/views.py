"""Views on a thread of their own: throttled, latest wins, and never in the engine's way."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from engine.config import ViewsConfig
from engine.events import Event
from engine.ports import View
from engine.types import Frame, FramePose, MapView

logger = logging.getLogger(__name__)

_MAX_WAITING_EVENTS = 20_000  # a viewer slower than that loses the oldest; they are counted
_CLOSE_TIMEOUT_S = 30.0


class ViewDispatcher:
    """Hands frames, maps and events to views.

    A newer frame or map replaces one that still waits. Events keep their order; when too many wait,
    the oldest go and are counted. A view that raises is logged, closed and left out from then on.
    """

    def __init__(self, views: Sequence[View], config: ViewsConfig) -> None:
        self._views = list(views)
        self._min_map_gap_s = 1.0 / config.max_map_hz
        self._min_image_gap_s = 1.0 / config.max_image_hz
        self._changed = threading.Condition()
        self._frame: tuple[Frame, FramePose | None] | None = None
        self._map: MapView | None = None
        self._events: deque[Event] = deque()
        self._num_events_lost = 0
        self._last_map_s = -float("inf")
        self._last_frame_s = -float("inf")
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="views", daemon=True)
        if self._views:
            self._thread.start()

    @property
    def has_views(self) -> bool:
        """Whether anything is shown."""
        return bool(self._views)

    @property
    def num_events_lost(self) -> int:
        """Events that no view saw because too many waited."""
        return self._num_events_lost

    def wants_map(self) -> bool:
        """Whether a map offered now would be shown: there are views, and the last one is old."""
        return bool(self._views) and time.monotonic() - self._last_map_s >= self._min_map_gap_s

    def offer_map(self, view: MapView) -> None:
        """Takes a map; replaces one that waits."""
        if not self._views:
            return
        with self._changed:
            self._map = view
            self._last_map_s = time.monotonic()
            self._changed.notify()

    def offer_frame(self, frame: Frame, pose: FramePose | None) -> None:
        """Takes the current image, unless one was taken a moment ago."""
        now_s = time.monotonic()
        if not self._views or now_s - self._last_frame_s < self._min_image_gap_s:
            return
        with self._changed:
            self._frame = frame, pose
            self._last_frame_s = now_s
            self._changed.notify()

    def offer_event(self, event: Event) -> None:
        """Takes one event."""
        if not self._views:
            return
        with self._changed:
            if len(self._events) >= _MAX_WAITING_EVENTS:
                self._events.popleft()
                self._num_events_lost += 1
            self._events.append(event)
            self._changed.notify()

    def close(self) -> None:
        """Shows what waits and closes the views; gives up on a stuck one. Blocks."""
        if not self._thread.is_alive():
            return
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout=_CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            logger.error("a view did not close within %.0f s", _CLOSE_TIMEOUT_S)

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                frame, view, events = self._frame, self._map, list(self._events)
                self._frame, self._map = None, None
                self._events.clear()
                closing = self._closing
            for shown in list(self._views):
                if not self._show(shown, frame=frame, view=view, events=events):
                    self._views.remove(shown)
                    _guarded(shown.close)
            if closing:
                for shown in self._views:
                    _guarded(shown.close)
                return

    def _has_work(self) -> bool:
        return bool(self._closing or self._frame or self._map or self._events)

    def _show(
        self,
        shown: View,
        *,
        frame: tuple[Frame, FramePose | None] | None,
        view: MapView | None,
        events: Sequence[Event],
    ) -> bool:
        """Whether the view took it all."""

        def show_all() -> None:
            for event in events:
                shown.show_event(event)
            if frame is not None:
                shown.show_frame(*frame)
            if view is not None:
                shown.show_map(view)

        return _guarded(show_all)


def _guarded(action: Callable[[], None]) -> bool:
    """Whether an action of a view went well; a broken view must not end the run."""
    try:
        action()
    except Exception:  # a task boundary
        logger.exception("a view failed and is left out from now on")
        return False
    return True
