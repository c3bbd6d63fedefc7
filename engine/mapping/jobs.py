"""Work on private copies of the map, for other threads, and when its results are merged.

A result is merged a fixed number of keyframes after its job was handed out, so that the same input
gives the same map however fast the other thread was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from engine.mapping.cameras.lens_search import LensFits
from engine.mapping.model.bundle_adjustment import GlobalAdjustment
from engine.mapping.windows.window_selection import SolvedWindow
from engine.matching.second_matching import SecondMatches

logger = logging.getLogger(__name__)

JobResult = GlobalAdjustment | SolvedWindow | SecondMatches | LensFits


class JobKind(StrEnum):
    """What a job does; at most one of each kind is in flight."""

    GLOBAL_ADJUSTMENT = "global bundle adjustment"
    WINDOW = "solving a window"
    SECOND_MATCHING = "matching by the second matcher"
    LENS_SEARCH = "searching a lens"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MapJob:
    """Work that needs no live map, on copies if on maps; ``run`` blocks, on any one thread."""

    kind: JobKind
    run: Callable[[], JobResult]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FinishedJob:
    """A job that ended."""

    job: MapJob
    result: JobResult | None  # None: it failed


def run_here(job: MapJob) -> FinishedJob:
    """Runs a job on this thread; one that raises has failed, as on any other."""
    try:
        return FinishedJob(job=job, result=job.run())
    except Exception:  # a task boundary: the map goes on without its result
        logger.exception("%s failed; the map goes on without its result", job.kind.value)
        return FinishedJob(job=job, result=None)


class JobSlot:
    """Holds the job of one kind that is in flight.

    Args:
        merge_after_keyframes: keyframes after the start of a job at which its result is due.
    """

    def __init__(self, *, merge_after_keyframes: int) -> None:
        self._merge_after_keyframes = merge_after_keyframes
        self._job: MapJob | None = None
        self._keyframes_since_start = 0

    @property
    def is_free(self) -> bool:
        """Whether no job is in flight."""
        return self._job is None

    def holds(self, job: MapJob) -> bool:
        """Whether a job is the one in flight."""
        return self._job is job

    @property
    def due(self) -> MapJob | None:
        """The job whose result must be merged before the next keyframe, if any."""
        is_due = self._keyframes_since_start >= self._merge_after_keyframes
        return self._job if is_due else None

    def start(self, job: MapJob) -> MapJob:
        """Takes a job as the one in flight and returns it."""
        self._job = job
        self._keyframes_since_start = 0
        return job

    def count_keyframe(self) -> None:
        """Counts a keyframe that was added to the map."""
        self._keyframes_since_start += 1

    def release(self, job: MapJob) -> bool:
        """Frees the slot of a job that ended; returns False when it was abandoned before."""
        if job is not self._job:
            return False
        self._job = None
        return True

    def abandon(self) -> None:
        """Frees the slot; the result of the job, if any comes, is not to be merged."""
        self._job = None
