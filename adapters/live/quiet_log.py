"""Log lines that outsiders can cause, a few at most: the rest is counted."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

_GAP_S = 10.0  # between two lines of one kind


class QuietLog:
    """Warnings of one kind: the first at once, then one every ten seconds with how many it is for.

    Its methods may be called from any thread.
    """

    def __init__(
        self, logger: logging.Logger, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Takes where to log.

        Args:
            logger: gets the lines.
            clock: seconds that never go back.
        """
        self._logger = logger
        self._clock = clock
        self._lock = threading.Lock()
        self._next_at_s = -float("inf")
        self._num_left_out = 0

    def warn(self, words: str) -> None:
        """Logs a line, or counts it when one was logged a moment ago."""
        with self._lock:
            now_s = self._clock()
            if now_s < self._next_at_s:
                self._num_left_out += 1
                return
            self._next_at_s = now_s + _GAP_S
            num_left_out, self._num_left_out = self._num_left_out, 0
        more = f" (and {num_left_out} more since the last such line)" if num_left_out else ""
        self._logger.warning("%s%s", words, more)
