"""Background jobs of a run: what other threads adjust, solve, match or search, one of each kind.

Results are merged by the mapper; those of jobs that were abandoned are dropped.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

from engine.config import GlobalBundleAdjustmentConfig, WindowConfig
from engine.mapping.cameras.lens_search import LensFits
from engine.mapping.jobs import FinishedJob, JobKind, JobResult, JobSlot, MapJob
from engine.mapping.model.bundle_adjustment import (
    GlobalAdjuster,
    GlobalAdjustmentSchedule,
    adjust_copy,
    start_global_adjustment,
)
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.windows.window_schedule import WindowRefinement, solve_job
from engine.ports import WindowSolver


class BackgroundJobs:
    """Decides when the main map is adjusted, starts jobs, and knows which are still of use.

    Args:
        adjustment: when the main map is adjusted, and how.
        window: when the result of a window is due.
        windows: chooses windows.
        solve_window: solves them.
        num_threads: of an adjustment; 0: as many as there are processors.
        adjust: adjusts maps; None: the engine does.
    """

    def __init__(
        self,
        adjustment: GlobalBundleAdjustmentConfig,
        window: WindowConfig,
        *,
        windows: WindowRefinement,
        solve_window: WindowSolver,
        num_threads: int,
        adjust: GlobalAdjuster | None = None,
    ) -> None:
        self._config = adjustment
        self._windows = windows
        self._solve_window = solve_window
        self._adjust = adjust
        self._num_threads = num_threads or os.cpu_count() or 1
        self._schedule = GlobalAdjustmentSchedule(adjustment)
        self._is_hastened = False
        self._adjustment = JobSlot(merge_after_keyframes=adjustment.merge_after_keyframes)
        self._window = JobSlot(merge_after_keyframes=window.merge_after_keyframes)
        self._matching = JobSlot(merge_after_keyframes=1)
        self._search = JobSlot(merge_after_keyframes=1)  # the sooner, the less is to be built anew
        self._slots = {
            JobKind.GLOBAL_ADJUSTMENT: self._adjustment,
            JobKind.WINDOW: self._window,
            JobKind.SECOND_MATCHING: self._matching,
            JobKind.LENS_SEARCH: self._search,
        }
        self._component: SparseMap | None = None  # that the job in flight adjusts; None: the main

    @property
    def due(self) -> tuple[MapJob, ...]:
        """Jobs whose results must be merged before the next keyframe."""
        due = (slot.due for slot in self._slots.values())
        return tuple(job for job in due if job is not None)

    @property
    def is_adjusting(self) -> bool:
        """Whether an adjustment is in flight."""
        return not self._adjustment.is_free

    @property
    def is_matching(self) -> bool:
        """Whether the second matcher is at work."""
        return not self._matching.is_free

    @property
    def is_searching(self) -> bool:
        """Whether a lens is searched."""
        return not self._search.is_free

    def is_in_flight(self, job: MapJob) -> bool:
        """Whether the result of a job is still to be merged."""
        return any(slot.holds(job) for slot in self._slots.values())

    def count_keyframe(self) -> None:
        """Counts a keyframe that came."""
        for slot in self._slots.values():
            slot.count_keyframe()

    def hasten_adjustment(self) -> None:
        """Makes an adjustment of the main map due, however little it grew."""
        self._is_hastened = True

    def set_adjusted(self, num_registered: int) -> None:
        """Takes the main map as adjusted at this size."""
        self._schedule.done(num_registered)

    def take_due_adjustment(self, main: SparseMap) -> bool:
        """Whether the main map is to be adjusted now; then it counts as adjusted."""
        if not (self._schedule.should(main.num_registered) or self._is_hastened):
            return False
        self._schedule.done(main.num_registered)
        self._is_hastened = False
        return True

    def is_small(self, main: SparseMap) -> bool:
        """Whether the main map is adjusted at once, since nothing waits long for it."""
        return main.num_registered <= self._config.synchronous_until

    def start_adjustment(self, sparse_map: SparseMap, *, is_component: bool = False) -> MapJob:
        """A job that adjusts a copy of one of the maps; none may be in flight."""
        self._component = sparse_map if is_component else None
        run = functools.partial(
            adjust_copy,
            start_global_adjustment(sparse_map),
            max_iterations=self._config.max_iterations,
            num_threads=self._num_threads,
            adjust=self._adjust,
        )
        return self._adjustment.start(MapJob(kind=JobKind.GLOBAL_ADJUSTMENT, run=run))

    def start_window(self, main: SparseMap) -> MapJob | None:
        """A job that solves a window of the newest keyframes, when one is due and none runs."""
        if not self._window.is_free:
            return None
        window = self._windows.start_if_due(main)
        if window is None:
            return None
        run = functools.partial(solve_job, window, solve=self._solve_window)
        return self._window.start(MapJob(kind=JobKind.WINDOW, run=run))

    def start_matching(self, run: Callable[[], JobResult]) -> MapJob:
        """A job of the second matcher; none may be in flight."""
        return self._matching.start(MapJob(kind=JobKind.SECOND_MATCHING, run=run))

    def abandon_matching(self) -> None:
        """Drops what the second matcher would find."""
        self._matching.abandon()

    def start_search(self, run: Callable[[], LensFits]) -> MapJob:
        """A job that searches a lens; none may be in flight."""
        return self._search.start(MapJob(kind=JobKind.LENS_SEARCH, run=run))

    def abandon_search(self) -> None:
        """Drops what the search of a lens would find, as its camera or its matches changed."""
        self._search.abandon()

    def adjusted_map(self, main: SparseMap) -> SparseMap:
        """The map that the adjustment started last is of: the main one as it is now, or another."""
        return main if self._component is None else self._component

    def take_result(self, finished: FinishedJob) -> JobResult | None:
        """Frees a job's slot; returns its result unless it was abandoned, or failed.

        The search of a lens that failed has found nothing, so that it counts as one.
        """
        kind = finished.job.kind
        if not self._slots[kind].release(finished.job):
            return None
        if finished.result is None and kind is JobKind.LENS_SEARCH:
            return LensFits()
        return finished.result

    def abandon(self) -> None:
        """Drops the results to come of jobs on copies of maps; others are of use to any map."""
        self._adjustment.abandon()
        self._window.abandon()
