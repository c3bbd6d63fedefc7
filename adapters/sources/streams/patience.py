"""How long a thread waits for what may never come, and why it stops waiting."""

from __future__ import annotations

import math
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Waiting = TypeVar("Waiting", bound=socket.socket | int)

_LOOK_AGAIN_S = 0.1
# It needs no file of its own; select takes none beyond the first 1024 of a process.
_Selector: type[selectors.BaseSelector] = getattr(
    selectors, "PollSelector", selectors.SelectSelector
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Why a connection is no more, or never was; without credentials."""

    detail: str
    is_refused: bool = False  # trying again is useless
    is_nobody: bool = False  # whom we listened for did not come yet
    is_end: bool = False  # all there is has come


class StreamError(Exception):
    """Nothing more comes of a connection; holds the loss in words."""

    def __init__(self, detail: str, *, is_refused: bool = False, is_nobody: bool = False) -> None:
        super().__init__(detail)
        self.loss = Loss(detail=detail, is_refused=is_refused, is_nobody=is_nobody)


class OutOfPatienceError(StreamError):
    """What was waited for did not come in time, or is no longer wanted."""


class Patience:
    """Waits of one connection: until someone says stop, silence is too long, or time is up."""

    def __init__(self, stop: threading.Event, *, silence_s: float) -> None:
        """Begins without a time limit.

        Args:
            stop: nobody wants what comes any more.
            silence_s: how long nothing may come.
        """
        self._stop = stop
        self.silence_s = silence_s
        self._until_s = math.inf
        self._too_late = ""

    def limit(self, duration_s: float, *, too_late: str) -> None:
        """All that is waited for from here on has to be over in time.

        Args:
            duration_s: the time allowed.
            too_late: what is said when it has passed.
        """
        self._until_s = time.monotonic() + duration_s
        self._too_late = too_late

    def unlimit(self) -> None:
        """What was to be in time has come."""
        self._until_s = math.inf

    @property
    def left_s(self) -> float:
        """How long what begins now may be waited for."""
        is_limited = self._until_s < math.inf
        return self._until_s - time.monotonic() if is_limited else self.silence_s

    def check(self, waiting_since_s: float) -> None:
        """Whether waiting may go on.

        Raises:
            OutOfPatienceError: it may not.
        """
        now_s = time.monotonic()
        if self._stop.is_set():
            raise OutOfPatienceError("stopped")
        if now_s > self._until_s:
            raise OutOfPatienceError(self._too_late)
        if now_s - waiting_since_s > self.silence_s and self._until_s == math.inf:
            raise OutOfPatienceError(f"nothing came for {self.silence_s:g} s")

    def wait_for(
        self,
        connection: socket.socket | int,
        *,
        to_write: bool = False,
        at_most_s: float = math.inf,
    ) -> bool:
        """Waits until a socket or pipe can be read from, or written to.

        Returns:
            Whether it can; False after ``at_most_s``.

        Raises:
            OutOfPatienceError: that took too long, or is no longer wanted.
        """
        since_s = time.monotonic()
        while True:
            self.check(since_s)
            left_s = since_s + at_most_s - time.monotonic()
            if ready([connection], min(left_s, _LOOK_AGAIN_S), to_write=to_write):
                return True
            if left_s <= 0.0:
                return False

    def sleep(self, duration_s: float) -> None:
        """Waits for a time; shorter when nobody wants what comes any more."""
        self._stop.wait(duration_s)


def ready(waiting: Sequence[Waiting], timeout_s: float, *, to_write: bool = False) -> list[Waiting]:
    """Those of some sockets or pipes that can be read from, or written to.

    Args:
        waiting: open, each once.
        timeout_s: how long the first is waited for.
        to_write: rather than to read.
    """
    event = selectors.EVENT_WRITE if to_write else selectors.EVENT_READ
    with _Selector() as selector:
        keys = {selector.register(one, event).fd: one for one in waiting}
        return [keys[key.fd] for key, _ in selector.select(max(timeout_s, 0.0))]
