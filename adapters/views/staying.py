"""Live views that stay when their run has ended, for as long as somebody may look at them."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from typing import Protocol

_LOOK_PERIOD_S = 2.0


class LiveView(Protocol):
    """A view that viewers fetch a run from."""

    @property
    def url(self) -> str | None:
        """Where browsers see it."""

    @property
    def has_viewers(self) -> bool:
        """Whether a viewer is connected."""

    def end(self) -> None:
        """Ends it; what it showed is gone."""


class StayingViews:
    """The live views of a run, which end after it.

    Args:
        is_wanted: they stay until a signal; False: they end with the run; None: they stay until a
            signal on a terminal, elsewhere as long as a viewer is connected.
        is_on_terminal: whether a person reads what the run prints.
        sleep: waits for some seconds.
    """

    def __init__(
        self,
        is_wanted: bool | None,
        *,
        is_on_terminal: bool,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._is_wanted = is_wanted
        self._is_on_terminal = is_on_terminal
        self._sleep = sleep
        self._views: list[LiveView] = []

    def add(self, view: LiveView) -> None:
        """Takes a view, which is not to end before `stay` has returned."""
        self._views.append(view)

    def stay(self, *, was_stopped: bool) -> None:
        """Blocks as long as the views stay, then ends them.

        Args:
            was_stopped: a signal ended the run: whoever sent it has seen enough, unless the views
                are wanted explicitly.
        """
        try:
            if self._views and self._stays_first(was_stopped=was_stopped):
                self._wait()
        finally:
            for view in self._views:
                view.end()

    def _stays_first(self, *, was_stopped: bool) -> bool:
        if self._is_wanted is not None:
            return self._is_wanted
        return not was_stopped and (self._is_on_terminal or self._has_viewers())

    def _wait(self) -> None:
        """Waits for SIGINT, SIGTERM or SIGHUP, or for the last viewer to leave."""
        urls = ", ".join(view.url for view in self._views if view.url)
        sys.stderr.write(f"the run has ended; the view stays until Ctrl-C:\n{urls}\n")
        sys.stderr.flush()
        numbers = (signal.SIGTERM, signal.SIGHUP)
        former = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
        try:
            while self._is_wanted or self._is_on_terminal or self._has_viewers():
                self._sleep(_LOOK_PERIOD_S)
        except KeyboardInterrupt:
            pass
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _has_viewers(self) -> bool:
        return any(view.has_viewers for view in self._views)
