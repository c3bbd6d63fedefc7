"""What remote matchers share: work that is begun ahead on its own thread, and what is counted."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from adapters.remote.cluster import Call, Cluster
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
        self._newest = FrameId(0)  # whose turn has come
        self._calls: Counter[FrameId] = Counter()  # that have no result yet, by their keyframe
        self._prepared: set[FrameId] = set()  # keyframes whose pairs the cluster prepares
        self._max_in_flight = 0
        self._counted: Counter[str] = Counter()

    def begin(self, frame_id: FrameId, work: Callable[[], None]) -> None:
        """Does work for a keyframe on another thread, while the cluster is there."""
        if self._cluster.is_usable() and not self.has_turn(frame_id):
            self.submit(work)

    def has_turn(self, frame_id: FrameId) -> bool:
        """Whether a keyframe's turn has come, so that nothing is begun for it any more."""
        return frame_id <= self._newest

    def turn_came(self, frame_id: FrameId) -> None:
        """Says that a keyframe is matched now: nothing is begun ahead for it any more."""
        with self.lock:
            self._newest = max(self._newest, frame_id)

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

    def track(self, frame_id: FrameId, call: Call) -> Call:
        """Counts a keyframe as in flight until a call for it has ended; returns the call."""
        with self.lock:
            self._calls[frame_id] += 1
            self._count_in_flight()
        call.result.add_done_callback(lambda _: self._call_ended(frame_id))
        return call

    def _call_ended(self, frame_id: FrameId) -> None:
        with self.lock:
            self._calls[frame_id] -= 1
            if not self._calls[frame_id]:
                del self._calls[frame_id]

    def prepares(self, frame_id: FrameId) -> None:
        """Counts a keyframe as in flight until `ends`; the caller has the lock."""
        self._prepared.add(frame_id)
        self._count_in_flight()

    def ends(self, frame_id: FrameId) -> None:
        """Counts the pairs that are prepared of a keyframe no more; the caller has the lock."""
        self._prepared.discard(frame_id)

    def _count_in_flight(self) -> None:
        num = len(self._calls.keys() | self._prepared)
        self._max_in_flight = max(self._max_in_flight, num)

    def count(self, name: str, num: int = 1) -> None:
        """Counts something."""
        with self.lock:
            self._counted[name] += num

    def count_locked(self, name: str, num: int = 1) -> None:
        """Counts something; the caller has the lock."""
        self._counted[name] += num

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
