"""Windows of a run: when one is due, which is in flight, and which the end of the run tries."""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.config import WindowConfig
from engine.mapping.facts import MappingFacts
from engine.mapping.sparse_map import SparseMap
from engine.mapping.window_merging import WindowMerge, WindowMergeConfig, try_window
from engine.mapping.window_selection import (
    SolvedWindow,
    Window,
    WindowJob,
    WindowSchedule,
    make_job,
    missing_windows,
    newest_window,
    worst_window,
)
from engine.matching.scene_graph import SceneGraph
from engine.ports import WindowSolver
from engine.types import FrameId

MergeConfig = Callable[[], WindowMergeConfig]


class WindowWork:
    """Chooses windows and tries their results on the map.

    One window at a time is in flight elsewhere; it is merged a fixed number of keyframes later, so
    that the same input gives the same map. At the end of a run windows are solved here and now.

    Args:
        config: how many windows, and of what size.
        graph: knows keyframes and pairs.
        solve: solves windows.
        merge_config: thresholds of merging as they are when a result is tried.
        facts: is told what became of each window.
    """

    def __init__(
        self,
        config: WindowConfig,
        *,
        graph: SceneGraph,
        solve: WindowSolver,
        merge_config: MergeConfig,
        facts: MappingFacts,
    ) -> None:
        self._config = config
        self._graph = graph
        self._solve = solve
        self._merge_config = merge_config
        self._facts = facts
        self._schedule = WindowSchedule(config)
        self._in_flight: WindowJob | None = None
        self._keyframes_since_start = 0

    @property
    def merge_is_due(self) -> bool:
        """Whether the window in flight must be merged before the next keyframe."""
        return (
            self._in_flight is not None
            and self._keyframes_since_start >= self._config.merge_after_keyframes
        )

    def keyframe_added(self) -> None:
        """Counts a keyframe."""
        self._keyframes_since_start += 1

    def start(self, sparse_map: SparseMap) -> WindowJob | None:
        """A window of the newest keyframes to solve elsewhere, when one is due."""
        num_keyframes = len(self._graph.keyframe_ids)
        if self._in_flight is not None or not self._schedule.should(num_keyframes):
            return None
        self._schedule.done(num_keyframes)
        window = newest_window(self._graph, sparse_map, config=self._config)
        self._in_flight = make_job(self._graph, sparse_map, window)
        self._keyframes_since_start = 0
        return self._in_flight

    def solved(self, job: WindowJob) -> SolvedWindow:
        """Solves a window on the calling thread, which may be any."""
        return SolvedWindow(job=job, estimate=self._solve(job.problem))

    def abandon(self) -> None:
        """Forgets the window in flight."""
        self._in_flight = None

    def merge(self, sparse_map: SparseMap, solved: SolvedWindow) -> WindowMerge | None:
        """Tries a window that was in flight; None when it was forgotten meanwhile."""
        if solved.job is not self._in_flight:
            return None
        self._in_flight = None
        merge = self._try(sparse_map, solved)
        self._schedule.note(made_better=merge.better_map is not None)
        return merge

    def rescue(self, sparse_map: SparseMap) -> WindowMerge | None:
        """Tries windows of missing keyframes until one of them brings some in."""
        if not self._config.enabled:
            return None
        windows = missing_windows(self._graph, sparse_map, config=self._config)
        for window in windows[: self._config.max_rescues]:
            merge = self._solve_and_try(sparse_map, window)
            if merge is not None and merge.registered:
                return merge
        return None

    def improve(self, sparse_map: SparseMap, *, tried: set[FrameId]) -> WindowMerge | None:
        """Tries a window around the keyframe that fits worst; None when there is nothing to try.

        Args:
            sparse_map: the map.
            tried: keyframes that stood in such a window before; grows by those of this one.
        """
        window = worst_window(self._graph, sparse_map, config=self._config, tried=tried)
        if window is None or not self._config.enabled:
            return None
        tried.update(window.free_ids)
        return self._solve_and_try(sparse_map, window)

    def _solve_and_try(self, sparse_map: SparseMap, window: Window) -> WindowMerge | None:
        job = make_job(self._graph, sparse_map, window)
        return None if job is None else self._try(sparse_map, self.solved(job))

    def _try(self, sparse_map: SparseMap, solved: SolvedWindow) -> WindowMerge:
        merge = try_window(sparse_map, solved.job, solved.estimate, config=self._merge_config())
        self._facts.window_solved(solved, merge, elapsed_s=time.monotonic() - solved.job.started_s)
        return merge
