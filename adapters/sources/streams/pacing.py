"""Plays stored video at its own speed: a live source drops what comes faster than it is used."""

from __future__ import annotations

import time
from collections.abc import Callable

_MAX_STEP_S = 10.0  # longer gaps in a video's times are not waited out


class Pace:
    """Waits until frames are due by their times in the video."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begins with the first frame.

        Args:
            clock: seconds that never go back.
        """
        self._clock = clock
        self._offset_s: float | None = None
        self._last_s = 0.0

    def left_s(self, video_s: float | None) -> float:
        """How long the frame of that time in the video is to be waited for.

        Times that leap, in either direction, begin anew.
        """
        if video_s is None:
            return 0.0
        now_s = self._clock()
        if self._offset_s is None or not 0.0 <= video_s - self._last_s <= _MAX_STEP_S:
            self._offset_s = now_s - video_s
        self._last_s = video_s
        return max(self._offset_s + video_s - now_s, 0.0)
