"""What remote matchers share: work that is begun ahead on its own thread, and what is counted."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from adapters.remote.cluster import Cluster
from engine.config import RemoteConfig
from engine.types import FrameId

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class AheadWork:
    """Sends work before its turn, so that whoever asks for it does not wait for that.

    Args:
        config: how many keyframes may be ahead.
        cluster: gets the work.
    """

    def __init__(self, config: RemoteConfig, cluster: Cluster) -> None:
        self.num_keyframes = config.keyframes_ahead
        self.lock = threading.Lock()
        self._cluster = cluster
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._in_flight: set[FrameId] = set()
        self._max_in_flight = 0
        self._counted: Counter[str] = Counter()

    def begin(self, frame_id: FrameId, work: Callable[[], None]) -> None:
        """Does work for a keyframe on another thread, while the cluster is there."""
        if not self._cluster.is_usable():
            return
        self.send(frame_id)
        self.submit(work)

    def submit(self, work: Callable[[], Result]) -> Future[Result | None] | None:
        """Does work on another thread, after what was submitted before.

        Returns:
            Its result, None if it breaks; no future when the run has ended.
        """

        def attempt() -> Result | None:
            try:
                return work()
            except Exception:  # a task boundary: it is done in its turn
                logger.exception("nothing is done ahead")
                return None

        try:
            return self._thread.submit(attempt)
        except RuntimeError:  # the run has ended
            return None

    def send(self, frame_id: FrameId) -> None:
        """Counts a keyframe as one of those whose work the cluster has."""
        with self.lock:
            self._in_flight.add(frame_id)
            self._max_in_flight = max(self._max_in_flight, len(self._in_flight))

    def end(self, frame_id: FrameId) -> None:
        """Counts a keyframe no more."""
        with self.lock:
            self._in_flight.discard(frame_id)

    def count(self, name: str, num: int = 1) -> None:
        """Counts something."""
        with self.lock:
            self._counted[name] += num

    def count_locked(self, name: str) -> None:
        """Counts something once; the caller has the lock."""
        self._counted[name] += 1

    def figures(self) -> dict[str, Any]:
        """What was counted."""
        with self.lock:
            return {
                "keyframes_in_flight_max": self._max_in_flight,
                **{name: self._counted[name] for name in COUNTED},
            }

    def close(self) -> None:
        """Begins nothing any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)


COUNTED = (
    "described_there",
    "described_here",
    "matched_there",
    "matched_here",
    "places_there",
    "places_here",
    "places_failed",
    "pairs_ahead",
    "pairs_ahead_used",
    "pairs_ahead_unused",
)
