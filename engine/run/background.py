"""What a growing map needs now and then: global adjustment, windows, and snapshots."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import Executor
from typing import Any

from engine.config import Config
from engine.mapping.bundle_adjustment import GlobalAdjustment, solve_globally
from engine.mapping.mapper import MappingPipeline
from engine.mapping.window_selection import SolvedWindow
from engine.output.recorder import Recorder
from engine.output.snapshots import JsonValue
from engine.run.event_loop import Writer, run_in
from engine.run.event_queue import EventQueue
from engine.run.memory import return_free_memory


class MapUpkeep:
    """Adjusts the map as a whole, solves windows of it and writes snapshots, beside its growing.

    Args:
        config: the resolved configuration.
        pipeline: owns the map; called on the mapping thread.
        mapping_thread: runs one call at a time.
        adjusting_thread: runs global adjustments and solves windows.
        recorder: writes snapshots; called through the writer.
        writer: runs writes in order.
        events: takes facts.
    """

    def __init__(
        self,
        config: Config,
        *,
        pipeline: MappingPipeline,
        mapping_thread: Executor,
        adjusting_thread: Executor,
        recorder: Recorder,
        writer: Writer,
        events: EventQueue,
    ) -> None:
        self._config = config
        self._pipeline = pipeline
        self._mapping_thread = mapping_thread
        self._adjusting_thread = adjusting_thread
        self._recorder = recorder
        self._writer = writer
        self._events = events
        self._adjustment: asyncio.Task[GlobalAdjustment] | None = None
        self._window: asyncio.Task[SolvedWindow] | None = None
        self._registered_at_snapshot = 0
        self._snapshot_at_s = 0.0
        self._snapshot_waits = False
        self._final_was_begun = False

    async def start_adjustment_if_due(self) -> None:
        """Starts a global adjustment on a copy when the map has grown enough."""
        job = await run_in(self._mapping_thread, self._pipeline.start_global_adjustment)
        if job is not None:
            # One that is still there was given up by the pipeline, because the map was replaced.
            await self.abandon_adjustment()
            self._adjustment = asyncio.create_task(
                run_in(self._adjusting_thread, self._adjust, job), name="global adjustment"
            )

    async def merge_adjustment_if_due(self, *, wait: bool) -> None:
        """Merges the adjustment in flight when its time has come.

        Args:
            wait: for its end; otherwise one that is not ready is merged before a later keyframe.
        """
        if self._adjustment is None or not self._pipeline.merge_is_due:
            return
        if wait or self._adjustment.done():
            await self.merge_adjustment()

    async def merge_adjustment(self) -> None:
        """Waits for the adjustment in flight, if any, and merges it."""
        if self._adjustment is None:
            return
        adjustment, self._adjustment = self._adjustment, None
        try:
            adjusted = await adjustment
        except (RuntimeError, ValueError) as error:  # what COLMAP raises; the map is untouched
            self._events.warn(f"global bundle adjustment failed: {error}")
            await run_in(self._mapping_thread, self._pipeline.abandon_adjustment)
            return
        await run_in(self._mapping_thread, self._pipeline.merge, adjusted)
        await self._writer.schedule(return_free_memory)

    async def abandon_adjustment(self) -> None:
        """Stops waiting for the adjustment in flight; its thread ends when it is done."""
        await self._stop_waiting(self._adjustment)

    async def abandon_all(self) -> None:
        """Stops waiting for adjustment and window; their thread ends when it is done."""
        await self._stop_waiting(self._adjustment)
        await self._stop_waiting(self._window)

    @staticmethod
    async def _stop_waiting(task: asyncio.Task[Any] | None) -> None:
        if task is not None:
            task.cancel()
            await asyncio.wait((task,))

    async def start_window_if_due(self) -> None:
        """Starts solving a window of the newest keyframes when it is time."""
        job = await run_in(self._mapping_thread, self._pipeline.start_window)
        if job is not None:
            await self._stop_waiting(self._window)  # given up by the pipeline before
            self._window = asyncio.create_task(
                run_in(self._adjusting_thread, self._pipeline.solve_window, job), name="window"
            )

    async def merge_window_if_due(self, *, wait: bool) -> None:
        """Merges the window in flight when its time has come.

        Args:
            wait: for its end; otherwise one that is not ready is merged before a later keyframe.
        """
        if self._window is None or not self._pipeline.window_merge_is_due:
            return
        if wait or self._window.done():
            await self.merge_window()

    async def merge_window(self) -> None:
        """Waits for the window in flight, if any, and merges it."""
        if self._window is None:
            return
        window, self._window = self._window, None
        try:
            solved = await window
        except (RuntimeError, ValueError) as error:  # what COLMAP and PyTorch raise
            self._events.warn(f"a window could not be solved: {error}")
            await run_in(self._mapping_thread, self._pipeline.abandon_window)
            return
        await run_in(self._mapping_thread, self._pipeline.merge_window, solved)
        await self._writer.schedule(return_free_memory)

    async def snapshot_if_due(self) -> None:
        """Writes a snapshot when enough is new, unless the one before still waits."""
        settings = self._config.snapshots
        num_registered = self._pipeline.sparse_map.num_registered
        if num_registered < settings.min_registered or self._snapshot_waits:
            return
        # Keyframes taken out of the map must not count against those that come in.
        self._registered_at_snapshot = min(self._registered_at_snapshot, num_registered)
        new_keyframes = num_registered - self._registered_at_snapshot
        by_keyframes = 0 < settings.every_keyframes <= new_keyframes
        by_time = 0 < settings.every_s <= self._events.clock() - self._snapshot_at_s
        if new_keyframes > 0 and (by_keyframes or by_time):
            await self.snapshot(is_final=False)

    async def snapshot_now(self) -> None:
        """Writes a snapshot because somebody asked, if there is a map and none waits already.

        Once the final one was begun, none follows it.
        """
        if self._final_was_begun:
            return
        if self._pipeline.sparse_map.num_registered >= 2 and not self._snapshot_waits:
            await self.snapshot(is_final=False)

    async def snapshot(self, *, is_final: bool) -> None:
        """Copies the map and schedules writing the copy."""
        self._final_was_begun |= is_final
        sparse_map = self._pipeline.sparse_map
        self._snapshot_waits = True
        try:
            copies, placement = await run_in(self._mapping_thread, self._pipeline.copies_in_metres)
        except BaseException:
            self._snapshot_waits = False
            raise
        self._registered_at_snapshot = sparse_map.num_registered
        self._snapshot_at_s = self._events.clock()
        facts: dict[str, JsonValue] = {
            "at_s": round(self._snapshot_at_s, 3),
            "num_keyframes": self._pipeline.num_keyframes,
            "is_final": is_final,
            "georeference": None if placement is None else placement.as_record(),
        }

        def write() -> None:
            try:
                self._recorder.snapshot(copies, facts=facts)
            finally:
                self._snapshot_waits = False

        await self._writer.schedule(write)

    def _adjust(self, job: GlobalAdjustment) -> GlobalAdjustment:
        solve_globally(
            job.reconstruction,
            constant_camera_ids=job.constant_camera_ids,
            max_iterations=self._config.global_bundle_adjustment.max_iterations,
            num_threads=self._config.runtime.num_threads or os.cpu_count() or 1,
        )
        return job
