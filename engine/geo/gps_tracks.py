"""GPS tracks: positions with times of their own, interpolated at capture times of frames."""

from __future__ import annotations

import bisect
import math
import threading
from dataclasses import dataclass, field

from engine.geo.usable_fixes import usable_fix
from engine.types import GpsFix, GpsReading

MAX_READINGS = 100_000  # of one track, about 20 MB: a day at 1 Hz, three hours at 10 Hz


@dataclass(slots=True, kw_only=True)
class _Track:
    """Readings in order of time; equal times keep the later one."""

    times_s: list[float] = field(default_factory=list)
    fixes: list[GpsFix] = field(default_factory=list)

    def add(self, time_s: float, fix: GpsFix) -> None:
        place = bisect.bisect_left(self.times_s, time_s)
        if place < len(self.times_s) and self.times_s[place] == time_s:
            self.fixes[place] = fix
            return
        self.times_s.insert(place, time_s)
        self.fixes.insert(place, fix)
        if len(self.times_s) > MAX_READINGS:
            del self.times_s[0], self.fixes[0]

    def fix_at(self, time_s: float, *, max_gap_s: float) -> GpsFix | None:
        after = bisect.bisect_left(self.times_s, time_s)
        around = [place for place in (after - 1, after) if 0 <= place < len(self.times_s)]
        if len(around) == 2:
            start_s, end_s = (self.times_s[place] for place in around)
            if end_s - start_s <= max_gap_s:
                fraction = (time_s - start_s) / (end_s - start_s)
                return _between(self.fixes[after - 1], self.fixes[after], fraction=fraction)
        near = [place for place in around if abs(self.times_s[place] - time_s) <= max_gap_s]
        nearest = min(near, key=lambda place: abs(self.times_s[place] - time_s), default=None)
        return None if nearest is None else self.fixes[nearest]


class GpsTracks:
    """The positions of one source's cameras by time. Called from any thread.

    Args:
        max_gap_s: readings farther apart are not interpolated, nor is one used from farther away.
    """

    def __init__(self, *, max_gap_s: float) -> None:
        self._max_gap_s = max_gap_s
        self._tracks: dict[str | None, _Track] = {}
        self._lock = threading.Lock()

    def add(self, reading: GpsReading) -> None:
        """Adds a position in order of time, late ones too.

        Ignores times that are not finite, and what `usable_fix` does of positions.
        """
        fix = usable_fix(reading.fix)
        if fix is None or not math.isfinite(reading.captured_at_s):
            return
        with self._lock:
            track = self._tracks.setdefault(reading.camera_key, _Track())
            track.add(reading.captured_at_s, fix)

    def fix_at(self, camera_key: str, captured_at_s: float) -> GpsFix | None:
        """The position of a camera, by its own track or else by that of all cameras of the source.

        Interpolated in time between two readings; the nearest one before the first, after the last
        and where they are too far apart. None where none is near enough.
        """
        with self._lock:
            for key in (camera_key, None):
                if key not in self._tracks:
                    continue
                fix = self._tracks[key].fix_at(captured_at_s, max_gap_s=self._max_gap_s)
                if fix is not None:
                    return fix
        return None


def _between(one: GpsFix, other: GpsFix, *, fraction: float) -> GpsFix:
    """A fix interpolated linearly between two, the short way around the globe."""

    def mix(start: float, end: float) -> float:
        return start + fraction * (end - start)

    turn_deg = (other.longitude_deg - one.longitude_deg + 180.0) % 360.0 - 180.0
    longitude_deg = (one.longitude_deg + fraction * turn_deg + 180.0) % 360.0 - 180.0
    altitude_m = None
    if one.altitude_m is not None and other.altitude_m is not None:
        altitude_m = mix(one.altitude_m, other.altitude_m)
    return GpsFix(
        latitude_deg=mix(one.latitude_deg, other.latitude_deg),
        longitude_deg=longitude_deg,
        altitude_m=altitude_m,
        accuracy_m=_larger(one.accuracy_m, other.accuracy_m),
        vertical_accuracy_m=_larger(one.vertical_accuracy_m, other.vertical_accuracy_m),
        is_order_unsure=one.is_order_unsure or other.is_order_unsure,
    )


def _larger(one: float | None, other: float | None) -> float | None:
    return max((value for value in (one, other) if value is not None), default=None)
