"""Ends FFmpeg's blocking calls when they are no longer wanted.

PyAV has FFmpeg ask it, ten times a second while a call waits for the network, whether the call has
lasted too long, and offers no other way to interrupt one. A thread left behind in such a call would
go on asking while the interpreter ends, and bring the process down. So where PyAV looks at the
clock, it is given one that leaps ahead, on threads that are to stop.
"""

from __future__ import annotations

import importlib
import threading
import time
from typing import Any

_LEAP_S = 1e9  # beyond every time-out

_thread = threading.local()


class _Clock:
    """Stands in for the module ``time`` in PyAV."""

    def monotonic(self) -> float:
        """The time, or on a thread that is to stop a later one at each call.

        At each, because PyAV may take one for the beginning of a call.
        """
        stop: threading.Event | None = getattr(_thread, "stop", None)
        if stop is None or not stop.is_set():
            return time.monotonic()
        num_leaps: int = _thread.num_leaps + 1
        _thread.num_leaps = num_leaps
        return time.monotonic() + num_leaps * _LEAP_S

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


_CLOCK = _Clock()


def interrupt_when(stop: threading.Event) -> None:
    """Lets FFmpeg's calls on this thread fail as if timed out, soon after ``stop`` was set.

    Only calls with a time-out, and only while they wait for the network: neither the look-up of a
    name nor a camera's driver asks whether it may go on.
    """
    core: Any = importlib.import_module("av.container.core")  # no stub lists its imports
    _thread.stop = stop
    _thread.num_leaps = 0
    core.time = _CLOCK
