"""Capture times of a live camera, from clocks that jump, stop or were never set."""

from __future__ import annotations

import math

_MAX_AHEAD_S = 5.0  # of the arrival; clocks of cameras and computers differ by so much
_MAX_BEHIND_S = 60.0  # what a network may hold back
_MIN_STEP_S = 1e-4


class CaptureClock:
    """Turns the times on a camera's own clock into capture times in s that strictly increase.

    Capture times are Unix times. A camera's own clock counts as it runs, shifted once so that it
    agrees with the arrival of its first frame where its clock is not Unix time. When it jumps away
    from the arrivals (set anew, years ahead, or backwards), it is shifted again. One clock for
    each camera; not safe for several threads.
    """

    def __init__(self) -> None:
        self._offset_s = 0.0
        self._last_s = -math.inf

    def tick(self, camera_time_s: float | None, *, arrived_at_s: float) -> float:
        """The capture time of the next frame.

        Args:
            camera_time_s: on the camera's clock, of any origin; None or not finite: unknown.
            arrived_at_s: Unix time of the frame's arrival.
        """
        captured_at_s = arrived_at_s
        if camera_time_s is not None and math.isfinite(camera_time_s):
            captured_at_s = camera_time_s + self._offset_s
            if not self._is_plausible(captured_at_s, arrived_at_s):
                self._offset_s = arrived_at_s - camera_time_s
                captured_at_s = arrived_at_s
        self._last_s = max(captured_at_s, self._last_s + _MIN_STEP_S)
        return self._last_s

    def on_this_clock(self, camera_time_s: float | None, *, arrived_at_s: float) -> float:
        """The time of something that comes beside the frames, such as a position."""
        if camera_time_s is None or not math.isfinite(camera_time_s):
            return arrived_at_s
        time_s = camera_time_s + self._offset_s
        return time_s if -_MAX_BEHIND_S <= time_s - arrived_at_s <= _MAX_AHEAD_S else arrived_at_s

    def _is_plausible(self, captured_at_s: float, arrived_at_s: float) -> bool:
        is_near = -_MAX_BEHIND_S <= captured_at_s - arrived_at_s <= _MAX_AHEAD_S
        return is_near and captured_at_s > self._last_s - _MAX_AHEAD_S
