"""Turns at one thing that several runs share: round robin among runs, what is needed now first."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager


class FairTurns:
    """Lets one thread at a time pass; of those that wait, that of the run that waited longest.

    A run that has many threads waiting gets no more turns than one that has a single one.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, tuple[deque[object], deque[object]]] = OrderedDict()
        self._is_taken = False

    @contextmanager
    def turn(self, run: str, *, is_ahead: bool = False) -> Iterator[None]:
        """Waits for a turn, which lasts as long as the context.

        Args:
            run: whose turn.
            is_ahead: it can wait: it comes after those of its run that cannot.
        """
        ticket = object()
        with self._changed:
            queues = self._waiting.setdefault(run, (deque(), deque()))
            queues[is_ahead].append(ticket)
            self._changed.wait_for(lambda: not self._is_taken and self._next() is ticket)
            self._is_taken = True
            urgent, ahead = self._waiting.pop(run)
            (ahead if is_ahead else urgent).popleft()
            if urgent or ahead:
                self._waiting[run] = urgent, ahead  # behind all other runs
        try:
            yield
        finally:
            with self._changed:
                self._is_taken = False
                self._changed.notify_all()

    def _next(self) -> object:
        urgent, ahead = next(iter(self._waiting.values()))
        return urgent[0] if urgent else ahead[0]
