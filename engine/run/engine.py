"""The engine: one task per stage, bounded queues between them, threads for what blocks.

    sources -> frames -> [tracking thread] -> items -> [mapping thread] -> writes -> [I/O thread]
                                                       [matching thread]

Files wait for room in a queue; a live source drops its oldest waiting frame, counted. While a
keyframe of a live run waits for mapping no further frame is tracked: frames that are taken are
fresh, those that grow old were never looked at. While one is being matched, frames after it are
posed by the keyframe before, and become keyframes themselves only if the view would be lost. Writes
wait for room. Views have a thread of their own where the latest wins. Global bundle adjustment runs
on a copy in one more thread. Threads cannot be cancelled: stopping means no new frames, then
draining what waits, a last adjustment and a last snapshot; a second signal leaves at once. A stage
that breaks stops the sources, too, and the stages behind it finish what they have.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.events import CommandTaken, Event, RunFinished, RunStarted
from engine.mapping.mapper import MappingPipeline
from engine.matching.place_recognition import PlaceRecognizer
from engine.matching.scene_graph import SceneGraph
from engine.output.recorder import Recorder
from engine.output.run_folder import RunFolder
from engine.output.statistics import RunStatistics
from engine.output.summary import summary_figures
from engine.ports import FrameSource, PairMatcher, PlaceIndex, View, WindowSolver
from engine.run.background import MapUpkeep
from engine.run.event_loop import RunRequests, Writer, lag_measured, run_in, stop_signals
from engine.run.event_queue import EventQueue
from engine.run.ingestion import FrameQueue, Ingestion
from engine.run.mapping_items import MappingItems
from engine.run.mapping_stage import MappingStage
from engine.run.tracking_stage import TrackingStage
from engine.run.views import ViewDispatcher
from engine.types import (
    DropReason,
    Float64Array,
    GpsFix,
    RunCommand,
)

logger = logging.getLogger(__name__)

_HARD_EXIT_CODE = 130  # as shells report an interrupted program


class StoppedBy(StrEnum):
    """What ended a run."""

    END_OF_SOURCES = "end_of_sources"
    SIGNAL = "signal"
    COMMAND = "command"
    FAILURE = "failure"  # something broke; what was mapped until then is saved


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """How a run ended."""

    path: Path
    stopped_by: StoppedBy
    num_keyframes: int
    num_registered: int
    summary: dict[str, Any]


def leave_at_once() -> None:
    """Ends the process without finishing anything, as a second signal asks for."""
    logger.error("stopped at once; the last snapshot stands, if there was one")
    logging.shutdown()
    os._exit(_HARD_EXIT_CODE)


class Engine:
    """One run: frames of the sources in, a run folder out.

    Args:
        config: the resolved configuration.
        folder: the run's folder, made for it.
        sources: where frames come from; each is a camera of its own.
        matcher: describes keyframes and matches pairs.
        views: shown on a thread of their own; closed at the end.
        groundtruth: capture times and true cam_from_world (3, 4), where a source knows them.
        leave: called at the second signal; must not return.
        places: finds keyframes that look alike; by default learned from the matcher's descriptors.
        requests: what people who watch ask of the run.
        solve_window: solves stretches of keyframes; by default the engine's own solver.

    Raises:
        JournalError: the run's database cannot be made.
    """

    def __init__(
        self,
        config: Config,
        *,
        folder: RunFolder,
        sources: Sequence[FrameSource],
        matcher: PairMatcher,
        views: Sequence[View] = (),
        groundtruth: Sequence[tuple[float, Float64Array]] = (),
        leave: Callable[[], None] = leave_at_once,
        places: PlaceIndex | None = None,
        requests: RunRequests | None = None,
        solve_window: WindowSolver | None = None,
    ) -> None:
        self._config = config
        self._sources = tuple(sources)
        self._matcher = matcher
        self._groundtruth = groundtruth
        self._leave = leave
        self._requests = requests or RunRequests()
        self._events = EventQueue()
        self._statistics = RunStatistics()
        self._recorder = Recorder(
            folder,
            snapshots=config.snapshots,
            runtime=config.runtime,
            emit=self._events,
            clock=self._events.clock,
        )
        self._views = ViewDispatcher(views, config.views)
        self._pipeline = MappingPipeline(
            config,
            matcher=matcher,
            graph=SceneGraph(
                config.scene_graph,
                recognizer=(
                    PlaceRecognizer(config.retrieval, seed=config.runtime.seed)
                    if places is None
                    else places
                ),
            ),
            emit=self._events,
            clock=self._events.clock,
            solve_window=solve_window,
            fix_at=self._fix_at,
        )
        self._stopped_by = StoppedBy.END_OF_SOURCES
        self._make_stages()

    def _make_stages(self) -> None:
        sources = self._config.sources
        self._tracking_thread, self._matching_thread, self._mapping_thread = (
            ThreadPoolExecutor(1, thread_name_prefix=name)
            for name in ("tracking", "matching", "mapping")
        )
        self._adjusting_thread, self._io_thread = (
            ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("adjusting", "io")
        )
        self._writer = Writer(
            self._io_thread, failed=functools.partial(self._note_failure, "writing")
        )
        self._frames = FrameQueue(
            max_waiting=sources.frame_queue_size, max_bytes=sources.max_buffered_mb * 1_000_000
        )
        self._items = MappingItems(max_waiting=sources.mapping_queue_size)
        self._ingestion = Ingestion(
            self._sources,
            queue=self._frames,
            recorder=self._recorder,
            writer=self._writer,
            events=self._events,
            tell=self._tell,
            max_gps_gap_s=self._config.georeference.max_gap_s,
        )
        self._upkeep = MapUpkeep(
            self._config,
            pipeline=self._pipeline,
            mapping_thread=self._mapping_thread,
            adjusting_thread=self._adjusting_thread,
            recorder=self._recorder,
            writer=self._writer,
            events=self._events,
        )
        self._tracking = TrackingStage(
            self._config.frame_tracking,
            sources=self._sources,
            describe=self._matcher.describe,
            thread=self._tracking_thread,
            frames=self._frames,
            items=self._items,
            ingestion=self._ingestion,
            warn=self._events.warn,
        )
        self._mapping = MappingStage(
            self._pipeline,
            mapping_thread=self._mapping_thread,
            matching_thread=self._matching_thread,
            items=self._items,
            frames=self._frames,
            upkeep=self._upkeep,
            recorder=self._recorder,
            writer=self._writer,
            views=self._views,
            events=self._events,
            tell=self._tell,
        )

    async def run(self) -> RunOutcome:
        """Runs until the sources end or a signal stops it; always leaves a valid run folder."""
        self._events(
            RunStarted(
                at_s=self._events.clock(),
                sources=tuple(source.info.label for source in self._sources),
                matcher=self._matcher.name,
            )
        )
        async with stop_signals(self._on_signal, leave=self._leave):
            async with (
                lag_measured(self._statistics.add_loop_lag),
                self._writer.running(),
                self._requests.answered(self._take_command),
            ):
                await self._tell()
                if await self._run_stages():
                    await self._attempt(self._finish_map(), what="finishing the map")
                await self._attempt(self._save_poses(), what="saving the trajectory")
                await self._attempt(self._save_map(), what="saving the map")
            return await self._close()

    def stop(self) -> None:
        """Takes no new frames from now on; those that arrived are mapped and saved."""
        self._ingestion.stop()

    # -- stages ---------------------------------------------------------------------------------

    async def _run_stages(self) -> bool:
        """Whether the map is sound: nothing broke while it grew."""
        if self._groundtruth:
            await self._writer.schedule(lambda: self._recorder.groundtruth(self._groundtruth))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._ingest(), name="ingestion")
            group.create_task(self._track(), name="tracking")
            mapping = group.create_task(self._map(), name="mapping")
        return mapping.result()

    async def _ingest(self) -> None:
        await self._attempt(self._ingestion.run(), what="reading the sources")
        await self._frames.end()

    async def _track(self) -> None:
        if not await self._attempt(self._tracking.run(), what="tracking"):
            await self._frames.end()
        await self._items.end()

    async def _map(self) -> bool:
        is_sound = await self._attempt(self._mapping.run(), what="mapping")
        if not is_sound:
            # Lets go who waits for the memory of frames that will never be mapped.
            await self._frames.end()
        while not is_sound and await self._items.get() is not None:
            continue  # never mapped: these frames are told as stopped at the end
        return is_sound

    # -- the end --------------------------------------------------------------------------------

    async def _finish_map(self) -> None:
        """Last adjustments, and a last try for keyframes without a place in the map."""
        await self._upkeep.merge_adjustment()
        await self._upkeep.merge_window()
        await run_in(self._mapping_thread, self._pipeline.finish)

    async def _save_poses(self) -> None:
        poses = self._pipeline.take_new_poses()
        await self._writer.schedule(functools.partial(self._recorder.live_poses, poses))
        trajectory = await run_in(self._mapping_thread, self._pipeline.trajectory)
        await self._writer.schedule(functools.partial(self._recorder.trajectory, trajectory))

    async def _save_map(self) -> None:
        cameras = await run_in(self._mapping_thread, self._pipeline.cameras)
        await self._writer.schedule(functools.partial(self._recorder.cameras_calibrated, cameras))
        if self._pipeline.sparse_map.num_registered >= 2:
            await self._upkeep.snapshot(is_final=True)
        if self._pipeline.is_initialized and self._views.has_views:
            self._views.offer_map(await run_in(self._mapping_thread, self._pipeline.view))

    async def _close(self) -> RunOutcome:
        """Reports the run and lets everything go, whatever the report meets."""
        try:
            return await self._report()
        finally:
            await run_in(self._io_thread, self._recorder.close)
            await asyncio.to_thread(self._views.close)
            for thread in (
                self._tracking_thread,
                self._matching_thread,
                self._mapping_thread,
                self._adjusting_thread,
                self._io_thread,
            ):
                thread.shutdown(wait=False)

    async def _report(self) -> RunOutcome:
        """Settles what is left and writes the summary."""
        await self._upkeep.abandon_all()
        for frame in self._frames.frames_in_engine:
            self._events.frame_dropped(
                frame, reason=DropReason.STOPPED, detail="the run broke off before its turn"
            )
        await run_in(self._io_thread, self._recorder.events, self._take_events())
        outcome = await run_in(self._mapping_thread, self._outcome)
        self._events(
            RunFinished(
                at_s=self._events.clock(),
                stopped_by=outcome.stopped_by,
                num_keyframes=outcome.num_keyframes,
                num_registered=outcome.num_registered,
            )
        )
        await run_in(self._io_thread, self._recorder.summary, outcome.summary)
        await run_in(self._io_thread, self._recorder.events, self._take_events())
        return outcome

    def _outcome(self) -> RunOutcome:
        summary = summary_figures(
            self._statistics,
            self._pipeline,
            wall_s=self._events.clock(),
            stopped_by=self._stopped_by,
        )
        summary.update(
            failed_writes=self._recorder.num_failed_writes,
            view_events_lost=self._views.num_events_lost,
            peak_gpu_mb=self._matcher.peak_gpu_mb,
        )
        return RunOutcome(
            path=self._recorder.path,
            stopped_by=self._stopped_by,
            num_keyframes=self._pipeline.num_keyframes,
            num_registered=self._pipeline.sparse_map.num_registered,
            summary=summary,
        )

    # -- helpers --------------------------------------------------------------------------------

    async def _attempt(self, step: Awaitable[None], *, what: str) -> bool:
        """Awaits a step of the run; when it breaks, that is told and the next ones still come."""
        try:
            await step
        except Exception as error:  # the task boundary: what was mapped until then is saved
            self._note_failure(what, error)
            return False
        return True

    def _note_failure(self, what: str, error: Exception) -> None:
        logger.error("%s failed", what, exc_info=error)
        self._events.warn(f"{what} failed: {_cause_of(error)}")
        self._stopped_by = StoppedBy.FAILURE
        self.stop()

    def _fix_at(self, camera_key: str, captured_at_s: float) -> GpsFix | None:
        return self._ingestion.fix_at(camera_key, captured_at_s)

    async def _take_command(self, command: RunCommand) -> None:
        self._events(CommandTaken(at_s=self._events.clock(), command=command))
        match command:
            case RunCommand.SNAPSHOT:
                await self._snapshot_now()
            case RunCommand.PAUSE:
                self._ingestion.pause()
            case RunCommand.RESUME:
                self._ingestion.resume()
            case RunCommand.STOP:
                self._stopped_by_request()
        await self._tell()

    async def _snapshot_now(self) -> None:
        try:
            await self._upkeep.snapshot_now()
        except Exception as error:  # a task boundary: the run goes on without that snapshot
            logger.exception("the snapshot asked for failed")
            self._events.warn(f"the snapshot asked for failed: {_cause_of(error)}")

    def _stopped_by_request(self) -> None:
        if self._stopped_by is StoppedBy.END_OF_SOURCES:
            self._stopped_by = StoppedBy.COMMAND
        self.stop()

    def _on_signal(self) -> None:
        logger.warning("stopping: finishing the map; press Ctrl-C again to leave at once")
        if self._stopped_by is StoppedBy.END_OF_SOURCES:
            self._stopped_by = StoppedBy.SIGNAL
        self.stop()

    async def _tell(self) -> None:
        events = self._take_events()
        if events:
            await self._writer.schedule(functools.partial(self._recorder.events, events))

    def _take_events(self) -> list[Event]:
        events = self._events.take()
        for event in events:
            self._statistics(event)
            self._views.offer_event(event)
        return events


def _cause_of(error: Exception) -> str:
    """What broke first, in a line."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
