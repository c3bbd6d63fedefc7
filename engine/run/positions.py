"""Positions that come beside the frames, for frames as they arrive and for the map as it grows."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from engine.geo.gps_tracks import MAX_READINGS, GpsTracks
from engine.ports import RepeatsRun, Source
from engine.types import GpsFix, GpsReading


class Positions:
    """The GPS tracks of all sources.

    Frames get what is known when they are decoded. The map gets readings only when a keyframe
    begins, or the end: it does not depend on how fast readings come while a call of it runs.

    `for_map` may be called from any thread, all else on the event loop.

    Args:
        sources: of the run.
        max_gap_s: positions farther apart in time are not interpolated.
    """

    def __init__(self, sources: Sequence[Source], *, max_gap_s: float) -> None:
        self._of_frames = [GpsTracks(max_gap_s=max_gap_s) for _ in sources]
        self._of_map = [GpsTracks(max_gap_s=max_gap_s) for _ in sources]
        self._source_of_camera: dict[str, tuple[int, str]] = {}  # and its key there
        self._is_replay = any(isinstance(source, RepeatsRun) for source in sources)
        # Not yet known to the map; as many as a track holds, the oldest are forgotten beyond.
        self._waiting: deque[tuple[int, GpsReading]] = deque(
            maxlen=None if self._is_replay else MAX_READINGS
        )
        if self._is_replay:  # they come to the map as they did, even before their turn in the input
            repeated = [
                (order, source_idx, reading)
                for source_idx, source in enumerate(sources)
                if isinstance(source, RepeatsRun)
                for order, reading in source.readings()
            ]
            self._waiting.extend((idx, one) for _, idx, one in sorted(repeated, key=lambda r: r[0]))
        self._num_given = 0

    def add(self, source_idx: int, reading: GpsReading) -> None:
        """Adds a reading of a source."""
        self._of_frames[source_idx].add(reading)
        if not self._is_replay:
            self._waiting.append((source_idx, reading))

    def add_camera(self, camera_key: str, *, source_idx: int, own_key: str) -> None:
        """Says which of a source's cameras a camera of the run is."""
        self._source_of_camera[camera_key] = source_idx, own_key

    def of_frame(self, source_idx: int, own_key: str, captured_at_s: float) -> GpsFix | None:
        """Where a source's camera was, by all readings."""
        return self._of_frames[source_idx].fix_at(own_key, captured_at_s)

    def give_to_map(self, num: int | None = None) -> int:
        """Lets the map know of further readings.

        Args:
            num: so many in all; None: all there are.

        Returns:
            How many it knows.
        """
        while self._waiting and (num is None or self._num_given < num):
            source_idx, reading = self._waiting.popleft()
            self._of_map[source_idx].add(reading)
            self._num_given += 1
        return self._num_given

    def for_map(self, camera_key: str, captured_at_s: float) -> GpsFix | None:
        """Where a camera of the run was, by the readings that the map knows of."""
        if camera_key not in self._source_of_camera:
            return None
        source_idx, own_key = self._source_of_camera[camera_key]
        return self._of_map[source_idx].fix_at(own_key, captured_at_s)
