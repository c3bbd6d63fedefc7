"""Faults without an engine, and calls that hang without a clock."""

from __future__ import annotations

import inspect
import threading
from concurrent.futures import Future, wait

from engine.config import FaultsConfig
from engine.events import Event, FaultOccurred, RunPart
from engine.run.faults import Faults, Guard
from engine.run.faults import _run as run_call
from tests.support.waiting import HANG_S


class FaultsSeen(Faults):
    """Keeps what is reported."""

    def __init__(self, *, is_strict: bool = False) -> None:
        self.events: list[Event] = []
        self.ends: list[str] = []
        super().__init__(FaultsConfig(strict=is_strict), emit=self._keep, end=self.ends.append)

    def _keep(self, event: Event) -> None:
        self.events.append(event)

    @property
    def seen(self) -> list[FaultOccurred]:
        """What was reported, in order."""
        return [event for event in self.events if isinstance(event, FaultOccurred)]


class Hanging:
    """Calls that hang until the test ends, and a wait that knows which ones do."""

    def __init__(self) -> None:
        self._hanging: set[Future[object]] = set()
        self._released = threading.Event()

    def hang(self) -> None:
        """Does not return before `release`; to be called in a guarded call."""
        self._hanging.add(_future_of_call())
        assert self._released.wait(HANG_S)

    def release(self) -> None:
        """Lets all go that hang."""
        self._released.set()

    def wait(self, result: Future[object], limit_s: float) -> bool:
        """Waits for a call as the engine does, and gives it up if it hangs."""
        while not wait([result], timeout=0.005).done:
            if result in self._hanging:
                return False
        return True


def _future_of_call() -> Future[object]:
    """The future of the guarded call that this thread is in; others may be waited for, too."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is run_call.__code__:
            future = frame.f_locals["result"]
            assert isinstance(future, Future)
            return future
        frame = frame.f_back
    raise AssertionError("no guarded call")


def guard_of(part: RunPart = RunPart.ADJUSTMENT, *, hanging: Hanging | None = None) -> Guard:
    """A guard whose calls hang only where a test lets them."""
    return Guard(part, limit_s=60.0, max_hangs=2, wait=(hanging or Hanging()).wait)
