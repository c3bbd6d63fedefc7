"""Windows of a run: when the newest keyframes are solved again, and what its end tries."""

from __future__ import annotations

import time

from engine.config import WindowConfig
from engine.cpu_time import Stage, charged_to
from engine.events import WindowSolved
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.windows.window_merging import WindowMerge, WindowMergeConfig, try_window
from engine.mapping.windows.window_selection import (
    SolvedWindow,
    Window,
    WindowJob,
    WindowSchedule,
    is_needed,
    make_job,
    missing_windows,
    newest_window,
    worst_window,
)
from engine.matching.scene_graph import SceneGraph
from engine.ports import EventSink, WindowSolver
from engine.types import FrameId


def solve_job(job: WindowJob, *, solve: WindowSolver) -> SolvedWindow:
    """Solves a window on the calling thread, which may be any."""
    return SolvedWindow(job=job, estimate=solve(job.problem))


class WindowRefinement:
    """Chooses windows of the map and tries their results on it.

    While frames arrive a window is solved on another thread; at the end of a run on this one.

    Args:
        config: how many windows, and of what size.
        merging: thresholds of merging.
        graph: holds keyframes and pairs.
        solve: solves windows.
        emit: takes the events.
    """

    def __init__(
        self,
        config: WindowConfig,
        *,
        merging: WindowMergeConfig,
        graph: SceneGraph,
        solve: WindowSolver,
        emit: EventSink,
    ) -> None:
        self._config = config
        self._merging = merging
        self._graph = graph
        self._solve = solve
        self._emit = emit
        self._schedule = WindowSchedule(config)

    def restore(self, num_keyframes: int) -> None:
        """Goes on with so many keyframes of a run before, as if a window had just been solved."""
        self._schedule.done(num_keyframes)

    @charged_to(Stage.WINDOWS)
    def start_if_due(self, sparse_map: SparseMap) -> WindowJob | None:
        """Returns a window of the newest keyframes when one is due and needed.

        It is due when enough keyframes came since the last time, and needed where they fit the map
        badly, or it misses some of them.
        """
        num_keyframes = len(self._graph.keyframe_ids)
        if not self._schedule.should(num_keyframes):
            return None
        self._schedule.done(num_keyframes)
        window = newest_window(self._graph, sparse_map, config=self._config)
        if not is_needed(sparse_map, window, config=self._config):
            self._schedule.adapt(made_better=False)
            return None
        return make_job(self._graph, sparse_map, window)

    @charged_to(Stage.WINDOWS)
    def merge(self, sparse_map: SparseMap, solved: SolvedWindow) -> WindowMerge:
        """Tries a window of the newest keyframes on the map."""
        merge = self._try(sparse_map, solved)
        self._schedule.adapt(made_better=merge.better_map is not None)
        return merge

    @charged_to(Stage.WINDOWS)
    def rescue(self, sparse_map: SparseMap) -> WindowMerge | None:
        """Tries windows of missing keyframes until one of them registers some."""
        if not self._config.enabled:
            return None
        windows = missing_windows(self._graph, sparse_map, config=self._config)
        for window in windows[: self._config.max_rescues]:
            merge = self._solve_and_try(sparse_map, window)
            if merge is not None and merge.registered:
                return merge
        return None

    @charged_to(Stage.WINDOWS)
    def improve(self, sparse_map: SparseMap, *, tried: set[FrameId]) -> WindowMerge | None:
        """Tries a window around the keyframe that fits worst; None when there is nothing to try.

        Args:
            sparse_map: the map.
            tried: keyframes that stood in such a window before; grows by those of this one.
        """
        if not self._config.enabled:
            return None
        window = worst_window(self._graph, sparse_map, config=self._config, tried=tried)
        if window is None:
            return None
        tried.update(window.free_ids)
        return self._solve_and_try(sparse_map, window)

    def _solve_and_try(self, sparse_map: SparseMap, window: Window) -> WindowMerge | None:
        job = make_job(self._graph, sparse_map, window)
        return None if job is None else self._try(sparse_map, solve_job(job, solve=self._solve))

    def _try(self, sparse_map: SparseMap, solved: SolvedWindow) -> WindowMerge:
        merge = try_window(sparse_map, solved.job, solved.estimate, config=self._merging)
        self._emit(
            WindowSolved(
                purpose=solved.job.window.purpose,
                verdict=merge.verdict,
                reason=merge.reason,
                keyframe_ids=solved.job.window.frame_ids,
                num_registered=len(merge.registered),
                num_observations_before=merge.before.num_observations,
                num_observations_after=merge.after.num_observations,
                error_before_px=merge.before.mean_error_px,
                error_after_px=merge.after.mean_error_px,
                moved_map=merge.moved_map,
                elapsed_s=time.monotonic() - solved.job.started_s,
                cpu_s=solved.estimate.cpu_s,
            )
        )
        return merge
