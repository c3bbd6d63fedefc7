"""Signals while a run is opened, before its event loop takes them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StartSignals:
    """What a signal does until the event loop of the run takes them.

    At first it raises KeyboardInterrupt: nothing was written or replaced so far, and nothing will
    be. `hold` keeps signals while the run folder is made, and `hand_to` gives the run what came.
    """

    def __init__(self) -> None:
        self._is_held = False
        self._has_come = False
        self._interrupt: Callable[[], None] | None = None

    def hold(self) -> None:
        """Keeps signals from now on."""
        self._is_held = True

    def hand_to(self, interrupt: Callable[[], None]) -> None:
        """Has ``interrupt`` called for the signals that came, and for each that still comes."""
        self._interrupt = interrupt
        if self._has_come:
            interrupt()

    def take(self, number: int, frame: FrameType | None) -> None:
        """Takes a signal; for `signal.signal`."""
        del frame
        if not self._is_held:
            raise KeyboardInterrupt(signal.Signals(number).name)
        is_first, self._has_come = not self._has_come, True
        if self._interrupt is not None and is_first:
            self._interrupt()


@contextmanager
def start_signals() -> Iterator[StartSignals]:
    """Takes SIGINT, SIGTERM and SIGHUP while the context is open; what is ignored stays ignored.

    Signals belong to the main thread: on any other this does nothing.
    """
    signals = StartSignals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        former[signal.SIGHUP] = signal.getsignal(signal.SIGHUP)
    for number in former:
        signal.signal(number, signals.take)
    try:
        yield signals
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
