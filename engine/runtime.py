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
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.errors import InferenceError
from engine.event_loop import RunRequests, Writer, lag_measured, run_in, stop_signals
from engine.event_queue import EventQueue
from engine.events import CommandTaken, Event, RunFinished, RunStarted
from engine.frame_tracking import FrameTracker, NewKeyframe
from engine.ingestion import Arrival, FrameQueue, Ingestion
from engine.map_upkeep import MapUpkeep
from engine.pipeline import MappingPipeline
from engine.ports import FrameSource, PairMatcher, PlaceIndex, View, WindowSolver
from engine.recorder import Recorder
from engine.retrieval import PlaceRecognizer
from engine.run_folder import RunFolder
from engine.run_statistics import RunStatistics
from engine.run_summary import summary_figures
from engine.scene_graph import SceneGraph
from engine.types import (
    DropReason,
    Float64Array,
    Frame,
    FrameId,
    GpsFix,
    Keyframe,
    RunCommand,
    TrackedFrame,
)
from engine.view_dispatch import ViewDispatcher

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _MappingItem:
    """What tracking made of a frame."""

    frame: Frame
    tracked: TrackedFrame | None
    fallback: TrackedFrame | None
    keyframe: NewKeyframe | None
    is_settled: bool  # False: the frame may still become a keyframe, in a later item
    is_live: bool  # False: a file waits, so that the map does not depend on timing


def leave_at_once() -> None:
    """Ends the process without finishing anything, as a second signal asks for."""
    logger.error("stopped at once; the last snapshot stands")
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
        self._items: asyncio.Queue[_MappingItem | None] = asyncio.Queue(sources.mapping_queue_size)
        self._put_back: deque[_MappingItem | None] = deque()  # taken too early; come first
        self._num_keyframes_waiting = 0  # for mapping
        self._is_mapping_keyframe = False
        self._keyframe_taken = asyncio.Condition()
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

    async def run(self) -> RunOutcome:
        """Runs until the sources end or a signal stops it; always leaves a valid run folder."""
        self._events(
            RunStarted(
                at_s=self._events.clock(),
                sources=tuple(source.label for source in self._sources),
                matcher=self._matcher.name,
            )
        )
        async with stop_signals(self._on_signal, leave=self._leave):
            async with (
                lag_measured(self._statistics.add_loop_lag),
                self._writer.running(),
                self._requests.answered(self._take_command),
            ):
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
        if not await self._attempt(self._track_frames(), what="tracking"):
            await self._frames.end()
        await self._items.put(None)

    async def _track_frames(self) -> None:
        trackers: dict[tuple[int, str], FrameTracker] = {}
        while (arrival := await self._next_frame()) is not None:
            if arrival.lane not in trackers:
                trackers[arrival.lane] = self._new_tracker(arrival)
            try:
                await self._track_frame(arrival, trackers[arrival.lane])
            except InferenceError as error:
                await self._frames.give_back(arrival.frame)
                await self._ingestion.drop(
                    arrival.frame, reason=DropReason.FAILED, detail=str(error)
                )

    async def _track_frame(self, arrival: Arrival, tracker: FrameTracker) -> None:
        """Follows a frame and passes that on at once; then makes it a keyframe if one is due.

        Raises:
            InferenceError: it is due as a keyframe and cannot be described.
        """
        frame = arrival.frame
        is_ahead = arrival.is_live and (
            self._is_mapping_keyframe or self._num_keyframes_waiting > 0
        )
        followed = await run_in(
            self._tracking_thread, tracker.follow, frame, wants_fallback=is_ahead
        )
        due = None if is_ahead and followed.can_wait else followed.due
        item = _MappingItem(
            frame=frame,
            tracked=followed.tracked,
            fallback=followed.fallback,
            keyframe=None,
            is_settled=due is None,
            is_live=arrival.is_live,
        )
        if followed.tracked is not None:
            await self._items.put(item)
        if due is None:
            return
        keyframe = await run_in(self._tracking_thread, tracker.make_keyframe, frame, due)
        self._num_keyframes_waiting += keyframe is not None
        await self._items.put(
            replace(item, tracked=None, fallback=None, keyframe=keyframe, is_settled=True)
        )

    def _new_tracker(self, arrival: Arrival) -> FrameTracker:
        return FrameTracker(
            self._config.frame_tracking,
            describe=self._matcher.describe,
            is_sequence=self._sources[arrival.source_idx].is_sequence,
        )

    async def _next_frame(self) -> Arrival | None:
        """The next frame to track; None after the last."""
        if any(source.is_live for source in self._sources):
            async with self._keyframe_taken:
                await self._keyframe_taken.wait_for(lambda: not self._num_keyframes_waiting)
        return await self._frames.get()

    async def _next_item(self) -> _MappingItem | None:
        """What tracking made of the next frame; None after the last."""
        item = self._put_back.popleft() if self._put_back else await self._items.get()
        if item is not None and item.keyframe is not None:
            async with self._keyframe_taken:
                self._num_keyframes_waiting -= 1
                self._keyframe_taken.notify_all()
        return item

    async def _map(self) -> bool:
        is_sound = await self._attempt(self._map_items(), what="mapping")
        if not is_sound:
            # Lets go who waits for the memory of frames that will never be mapped.
            await self._frames.end()
        while not is_sound and await self._next_item() is not None:
            continue  # never mapped: these frames are told as stopped at the end
        return is_sound

    async def _map_items(self) -> None:
        while (item := await self._next_item()) is not None:
            if item.keyframe is None:
                await self._map_tracked(item)
            else:
                self._is_mapping_keyframe = True
                await self._upkeep.merge_adjustment_if_due(wait=not item.is_live)
                await self._upkeep.merge_window_if_due(wait=not item.is_live)
                await self._map_keyframe(item, item.keyframe.keyframe)
                self._is_mapping_keyframe = False
            await self._show(item.frame, with_map=True)
            await self._tell()

    async def _map_tracked(self, item: _MappingItem) -> None:
        """Poses a frame, and settles one that does not become a keyframe."""
        if item.tracked is not None:
            await run_in(
                self._mapping_thread, self._pipeline.add_tracked, item.tracked, item.fallback
            )
        if item.is_settled:
            await self._writer.schedule(
                functools.partial(self._recorder.frame_tracked, item.frame.frame_id),
                then=functools.partial(self._frames.give_back, item.frame),
            )

    async def _map_keyframe(self, item: _MappingItem, keyframe: Keyframe) -> None:
        started_s = time.monotonic()
        await run_in(self._mapping_thread, self._pipeline.meet_keyframe, keyframe)
        matching = asyncio.create_task(
            run_in(self._matching_thread, self._pipeline.match_keyframe, keyframe.frame_id),
            name="matching",
        )
        if item.is_live:
            await self._pose_until(matching)
        try:
            verified = await matching
        except InferenceError as error:
            self._events.warn(f"{keyframe.name}: {error}")
            await run_in(self._mapping_thread, self._pipeline.map_unmatched, keyframe.frame_id)
        else:
            await run_in(
                self._mapping_thread,
                self._pipeline.map_keyframe,
                keyframe.frame_id,
                verified,
                started_s=started_s,
            )
        await self._keep_keyframe(item.frame, keyframe.frame_id)

    async def _pose_until(self, done: asyncio.Task[Any]) -> None:
        """Poses tracked frames until a task is done or the next keyframe comes."""
        while not (done.done() or self._put_back):
            getting = asyncio.create_task(self._items.get(), name="next item")
            await asyncio.wait((done, getting), return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                getting.cancel()
                await asyncio.wait((getting,))
            if getting.cancelled():
                return
            item = getting.result()
            if item is None or item.keyframe is not None:
                self._put_back.append(item)
                return
            await self._map_tracked(item)
            # The scene graph changes while pairs are matched: no map is to be shown now.
            await self._show(item.frame, with_map=False)
            await self._tell()

    async def _keep_keyframe(self, frame: Frame, frame_id: FrameId) -> None:
        """Journals a keyframe, and does what is due after one."""
        record = await run_in(self._mapping_thread, self._pipeline.keyframe_record, frame_id)
        await self._writer.schedule(
            functools.partial(
                self._recorder.keyframe_added,
                frame,
                record.keyframe,
                camera=record.camera,
                pairs=record.pairs,
                moved=record.moved,
            ),
            then=functools.partial(self._frames.give_back, frame),
        )
        await self._upkeep.start_adjustment_if_due()
        await self._upkeep.start_window_if_due()
        await self._upkeep.snapshot_if_due()

    async def _show(self, frame: Frame, *, with_map: bool) -> None:
        poses = self._pipeline.take_new_poses()
        if poses:
            await self._writer.schedule(functools.partial(self._recorder.live_poses, poses))
        own = next((pose for pose in poses if pose.frame_id == frame.frame_id), None)
        self._views.offer_frame(frame, own)
        if with_map and self._pipeline.is_initialized and self._views.wants_map():
            self._views.offer_map(await run_in(self._mapping_thread, self._pipeline.view))

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
                await self._upkeep.snapshot_now()
            case RunCommand.PAUSE:
                self._ingestion.pause()
            case RunCommand.RESUME:
                self._ingestion.resume()
            case RunCommand.STOP:
                self._stopped_by_request()
        await self._tell()

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
