"""Faults without an engine, and calls that hang without a clock."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait

from engine.config import FaultsConfig
from engine.events import Event, FaultOccurred, RunPart
from engine.run.faults import Faults, Guard
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
        self._lock = threading.Lock()
        self._num_hanging = 0
        self._num_given_up = 0
        self._released = threading.Event()

    def hang(self) -> None:
        """Does not return before `release`."""
        with self._lock:
            self._num_hanging += 1
        assert self._released.wait(HANG_S)

    def release(self) -> None:
        """Lets all go that hang."""
        self._released.set()

    def wait(self, result: Future[object], limit_s: float) -> bool:
        """Waits for a call as the engine does, and gives up one for each that hangs."""
        while not wait([result], timeout=0.005).done:
            with self._lock:
                if self._num_hanging > self._num_given_up:
                    self._num_given_up += 1
                    return False
        return True


def guard_of(part: RunPart = RunPart.ADJUSTMENT, *, hanging: Hanging | None = None) -> Guard:
    """A guard whose calls hang only where a test lets them."""
    return Guard(part, limit_s=60.0, max_hangs=2, wait=(hanging or Hanging()).wait)
