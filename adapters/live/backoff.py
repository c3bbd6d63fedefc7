"""How long to wait before a broken connection is tried again."""

from __future__ import annotations

import random
from collections.abc import Callable

_SMALLEST_JITTER = 0.5  # of a wait
_MAX_DOUBLINGS = 30  # beyond, every wait is the longest; keeps 2**n small


class Backoff:
    """Waits that double from the first to the longest, each shortened by chance.

    Chance keeps sources that lost the same server from coming back all at once.
    """

    def __init__(
        self, *, first_s: float, max_s: float, chance: Callable[[], float] = random.random
    ) -> None:
        """Begins with the first wait.

        Args:
            first_s: the first wait, before chance.
            max_s: the longest.
            chance: numbers in [0, 1).
        """
        self._first_s = first_s
        self._max_s = max_s
        self._chance = chance
        self._num_waits = 0

    def next_wait_s(self) -> float:
        """The next wait: half to all of its full length."""
        wait_s = min(self._first_s * 2.0 ** min(self._num_waits, _MAX_DOUBLINGS), self._max_s)
        self._num_waits += 1
        return wait_s * (_SMALLEST_JITTER + (1.0 - _SMALLEST_JITTER) * self._chance())

    def reset(self) -> None:
        """What was tried has worked: the next wait is the first again."""
        self._num_waits = 0
