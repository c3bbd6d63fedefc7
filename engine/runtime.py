"""The engine's only asyncio: one task per stage, bounded queues between them.

    sources -> frames -> [tracking thread] -> items -> [mapping thread] -> writes -> [I/O thread]

Files wait for room in a queue; a live source drops its oldest waiting frame, counted. Writes wait
for room. Views have a thread of their own where the latest wins. Global bundle adjustment runs on
a copy in one more thread. Threads cannot be cancelled: stopping means no new frames, then draining
what waits, a last adjustment and a last snapshot; a second signal leaves at once.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from engine.bundle_adjustment import GlobalAdjustment, solve_globally
from engine.config import Config
from engine.errors import InferenceError, SourceError
from engine.events import (
    Event,
    FrameDropped,
    FrameReceived,
    RunFinished,
    RunStarted,
    Warned,
)
from engine.frame_tracking import FrameTracker, NewKeyframe
from engine.pipeline import MappingPipeline
from engine.ports import FrameSource, PairMatcher, View
from engine.recorder import Recorder
from engine.retrieval import PlaceRecognizer
from engine.run_folder import RunFolder
from engine.run_statistics import RunStatistics
from engine.scene_graph import SceneGraph
from engine.types import DropReason, Float64Array, Frame, RejectedFrame, TrackedFrame
from engine.view_dispatch import ViewDispatcher

logger = logging.getLogger(__name__)

_LAG_PERIOD_S = 0.05
_WRITE_QUEUE_SIZE = 256
_HARD_EXIT_CODE = 130

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """How a run ended."""

    path: Path
    stopped_by: str  # end_of_sources, signal or failure
    num_keyframes: int
    num_registered: int
    summary: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _MappingItem:
    """What tracking made of a frame."""

    frame: Frame
    tracked: NewKeyframe | TrackedFrame
    wait_for_adjustment: bool  # a file waits, so that the map does not depend on timing


class _FrameBudget:
    """Bounds the memory of frames on their way through the engine; a lone frame always passes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._used_bytes = 0
        self._released = asyncio.Event()

    async def take(self, frame: Frame) -> None:
        while self._used_bytes and self._used_bytes + frame.pixels.nbytes > self._max_bytes:
            self._released.clear()
            await self._released.wait()
        self._used_bytes += frame.pixels.nbytes

    def give_back(self, frame: Frame) -> None:
        self._used_bytes -= frame.pixels.nbytes
        self._released.set()


class Engine:
    """One run: frames of the sources in, a run folder out.

    Args:
        config: the resolved configuration.
        folder: the run's folder, made for it.
        sources: where frames come from; each is a camera of its own.
        matcher: describes keyframes and matches pairs.
        views: shown on a thread of their own; closed at the end.
        groundtruth: capture times and true cam_from_world (3, 4), where a source knows them.
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
    ) -> None:
        self._config = config
        self._sources = list(sources)
        self._matcher = matcher
        self._groundtruth = groundtruth
        self._started_s = time.monotonic()
        self._statistics = RunStatistics()
        self._views = ViewDispatcher(views, config.views)
        self._new_events: deque[Event] = deque()
        self._recorder = Recorder(
            folder,
            snapshots=config.snapshots,
            runtime=config.runtime,
            emit=self._emit,
            clock=self._clock,
        )
        self._pipeline = MappingPipeline(
            config,
            matcher=matcher,
            graph=SceneGraph(
                config.scene_graph,
                recognizer=PlaceRecognizer(config.retrieval, seed=config.runtime.seed),
            ),
            emit=self._emit,
            clock=self._clock,
        )
        self._mapping_thread = ThreadPoolExecutor(1, thread_name_prefix="mapping")
        self._tracking_thread = ThreadPoolExecutor(1, thread_name_prefix="tracking")
        self._adjusting_thread = ThreadPoolExecutor(1, thread_name_prefix="adjusting")
        self._io_thread = ThreadPoolExecutor(1, thread_name_prefix="io")
        self._budget = _FrameBudget(config.sources.max_buffered_mb * 1_000_000)
        self._frames: asyncio.Queue[tuple[int, Frame] | None] = asyncio.Queue(
            config.sources.frame_queue_size
        )
        self._items: asyncio.Queue[_MappingItem | None] = asyncio.Queue(
            config.sources.mapping_queue_size
        )
        self._writes: asyncio.Queue[Callable[[], None] | None] = asyncio.Queue(_WRITE_QUEUE_SIZE)
        self._stop = asyncio.Event()
        self._stopped_by = "end_of_sources"
        self._adjustment: asyncio.Future[GlobalAdjustment] | None = None
        self._registered_at_snapshot = 0
        self._snapshot_at_s = 0.0
        self._snapshot_waits = False

    async def run(self) -> RunOutcome:
        """Runs until the sources end or a signal stops it; always leaves a valid run folder.

        Raises:
            SourceError: no source could be read at all.
        """
        self._emit(
            RunStarted(
                at_s=self._clock(),
                sources=tuple(source.label for source in self._sources),
                matcher=self._matcher.name,
            )
        )
        async with self._signals(), self._lag_monitor():
            await self._run_stages()
            if self._stopped_by != "failure":
                await self._finish()
            else:
                await self._save_what_there_is()
        return await self._close()

    # -- stages ---------------------------------------------------------------------------------

    async def _run_stages(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._write(), name="writing")
                mapping = group.create_task(self._map(), name="mapping")
                tracking = group.create_task(self._track(), name="tracking")
                if self._groundtruth:
                    await self._schedule(lambda: self._recorder.groundtruth(self._groundtruth))
                await self._ingest_all()
                await self._frames.put(None)
                await tracking
                await mapping
                await self._writes.put(None)
        except* SourceError as errors:
            raise errors.exceptions[0] from None
        except* Exception as errors:  # the task boundary: what was mapped is still saved
            for error in errors.exceptions:
                logger.exception("the run failed", exc_info=error)
            self._stopped_by = "failure"

    async def _ingest_all(self) -> None:
        """Reads all sources; one that breaks does not stop the others."""
        if not self._sources:
            return
        readers = [
            asyncio.create_task(self._ingest(number, source), name=f"source {source.label}")
            for number, source in enumerate(self._sources)
        ]
        reading = asyncio.create_task(asyncio.wait(readers), name="reading")
        stopping = asyncio.create_task(self._stop.wait(), name="stopping")
        try:
            await asyncio.wait((reading, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*readers, reading, stopping):
                task.cancel()
            results = await asyncio.gather(*readers, return_exceptions=True)
        failures = [result for result in results if isinstance(result, SourceError)]
        for failure in failures:
            self._emit(Warned(at_s=self._clock(), message=str(failure)))
        unexpected = [
            result
            for result in results
            if isinstance(result, Exception) and not isinstance(result, SourceError)
        ]
        if unexpected:
            raise unexpected[0]
        if failures and len(failures) == len(readers) and not self._pipeline.num_keyframes:
            raise failures[0]

    async def _ingest(self, number: int, source: FrameSource) -> None:
        async with aclosing(source.frames()) as frames:
            async for received in frames:
                frame = received if len(self._sources) == 1 else _of_source(received, number)
                await self._schedule(functools.partial(self._recorder.frame_arrived, frame))
                if isinstance(frame, RejectedFrame):
                    self._emit_dropped(frame, reason=frame.reason, detail=frame.detail)
                    await self._flush_events()
                    continue
                self._emit(
                    FrameReceived(
                        at_s=self._clock(),
                        frame_id=frame.frame_id,
                        index=frame.index,
                        captured_at_s=frame.captured_at_s,
                    )
                )
                await self._hand_over(number, frame, is_live=source.is_live)

    async def _hand_over(self, number: int, frame: Frame, *, is_live: bool) -> None:
        """Queues a frame for tracking: a file's frame waits for room, a live one makes some."""
        try:
            if is_live:
                await self._make_room()
            await self._budget.take(frame)
            await self._frames.put((number, frame))
        except asyncio.CancelledError:
            self._emit_dropped(frame, reason=DropReason.STOPPED, detail="the run was stopped")
            raise

    async def _make_room(self) -> None:
        """Drops the oldest waiting frame when the queue is full."""
        while self._frames.full():
            waiting = self._frames.get_nowait()
            if waiting is not None:
                await self._drop(waiting[1], DropReason.OVERLOAD, detail="the engine is behind")

    async def _track(self) -> None:
        trackers = [
            FrameTracker(
                self._config.frame_tracking,
                describe=self._matcher.describe,
                is_sequence=source.is_sequence,
            )
            for source in self._sources
        ]
        while (waiting := await self._frames.get()) is not None:
            number, frame = waiting
            try:
                tracked = await self._in(self._tracking_thread, trackers[number].process, frame)
            except InferenceError as error:
                await self._drop(frame, DropReason.UNREADABLE, detail=str(error))
                continue
            is_live = self._sources[number].is_live
            await self._items.put(
                _MappingItem(frame=frame, tracked=tracked, wait_for_adjustment=not is_live)
            )
        await self._items.put(None)

    async def _map(self) -> None:
        while (item := await self._items.get()) is not None:
            if isinstance(item.tracked, NewKeyframe):
                await self._merge_adjustment(wait=item.wait_for_adjustment)
                await self._map_keyframe(item, item.tracked)
            else:
                await self._map_tracked(item, item.tracked)
            self._budget.give_back(item.frame)
            await self._flush_events()

    async def _map_keyframe(self, item: _MappingItem, tracked: NewKeyframe) -> None:
        keyframe = tracked.keyframe
        try:
            await self._in(self._mapping_thread, self._pipeline.add_keyframe, keyframe)
        except InferenceError as error:
            self._emit(Warned(at_s=self._clock(), message=f"{keyframe.name}: {error}"))
        camera, pairs = await self._in(
            self._mapping_thread, self._pipeline.keyframe_record, keyframe.frame_id
        )
        await self._schedule(
            functools.partial(
                self._recorder.keyframe_added, item.frame, keyframe, camera=camera, pairs=pairs
            )
        )
        await self._start_adjustment()
        await self._snapshot_if_due()
        await self._show(item.frame)

    async def _map_tracked(self, item: _MappingItem, tracked: TrackedFrame) -> None:
        await self._in(self._mapping_thread, self._pipeline.add_tracked, tracked)
        await self._schedule(functools.partial(self._recorder.frame_tracked, tracked.frame_id))
        await self._show(item.frame)

    async def _show(self, frame: Frame) -> None:
        poses = self._pipeline.take_new_poses()
        if poses:
            await self._schedule(functools.partial(self._recorder.live_poses, poses))
        own = next((pose for pose in poses if pose.frame_id == frame.frame_id), None)
        self._views.offer_frame(frame, own)
        if self._pipeline.is_initialized and self._views.wants_map():
            self._views.offer_map(await self._in(self._mapping_thread, self._pipeline.view))

    # -- global adjustment and snapshots --------------------------------------------------------

    async def _start_adjustment(self) -> None:
        job = await self._in(self._mapping_thread, self._pipeline.start_global_adjustment)
        if job is not None:
            self._adjustment = asyncio.ensure_future(
                self._in(self._adjusting_thread, self._adjust, job)
            )

    def _adjust(self, job: GlobalAdjustment) -> GlobalAdjustment:
        solve_globally(
            job.reconstruction,
            constant_camera_ids=job.constant_camera_ids,
            max_iterations=self._config.global_bundle_adjustment.max_iterations,
            num_threads=self._config.runtime.num_threads or os.cpu_count() or 1,
        )
        return job

    async def _merge_adjustment(self, *, wait: bool, even_early: bool = False) -> None:
        """Merges the adjustment in flight when its time has come."""
        if self._adjustment is None or not (even_early or self._pipeline.merge_is_due):
            return
        if not wait and not self._adjustment.done():
            return
        adjustment, self._adjustment = self._adjustment, None
        try:
            adjusted = await adjustment
        except (RuntimeError, ValueError) as error:  # what COLMAP raises; the map is untouched
            self._emit(
                Warned(at_s=self._clock(), message=f"global bundle adjustment failed: {error}")
            )
            await self._in(self._mapping_thread, self._pipeline.abandon_adjustment)
            return
        await self._in(self._mapping_thread, self._pipeline.merge, adjusted)

    async def _snapshot_if_due(self) -> None:
        settings = self._config.snapshots
        num_registered = self._pipeline.sparse_map.num_registered
        if num_registered < settings.min_registered or self._snapshot_waits:
            return
        new_keyframes = num_registered - self._registered_at_snapshot
        by_keyframes = 0 < settings.every_keyframes <= new_keyframes
        by_time = 0 < settings.every_s <= self._clock() - self._snapshot_at_s
        if new_keyframes > 0 and (by_keyframes or by_time):
            await self._snapshot(is_final=False)

    async def _snapshot(self, *, is_final: bool) -> None:
        sparse_map = self._pipeline.sparse_map
        reconstruction = await self._in(self._mapping_thread, sparse_map.copy_reconstruction)
        self._registered_at_snapshot = sparse_map.num_registered
        self._snapshot_at_s = self._clock()
        self._snapshot_waits = True
        facts = {
            "at_s": round(self._snapshot_at_s, 3),
            "num_keyframes": self._pipeline.num_keyframes,
            "is_final": is_final,
        }

        def write() -> None:
            self._recorder.snapshot(reconstruction, facts=facts)
            self._snapshot_waits = False

        await self._schedule(write)

    # -- the end --------------------------------------------------------------------------------

    async def _finish(self) -> None:
        """Last adjustment, last snapshot, final trajectory."""
        await self._merge_adjustment(wait=True, even_early=True)
        try:
            await self._in(self._mapping_thread, self._pipeline.finish)
        except Exception:  # the task boundary: the map as it was is still saved
            logger.exception("finishing the map failed")
            self._stopped_by = "failure"
        await self._save_what_there_is()

    async def _save_what_there_is(self) -> None:
        writer = asyncio.create_task(self._write(), name="last writes")
        pipeline = self._pipeline
        poses = pipeline.take_new_poses()
        await self._schedule(functools.partial(self._recorder.live_poses, poses))
        if pipeline.is_initialized:
            if pipeline.sparse_map.num_registered >= 2:
                await self._snapshot(is_final=True)
            trajectory = await self._in(self._mapping_thread, pipeline.trajectory)
            await self._schedule(functools.partial(self._recorder.trajectory, trajectory))
            cameras = await self._in(self._mapping_thread, pipeline.cameras)
            await self._schedule(functools.partial(self._recorder.cameras_calibrated, cameras))
            if self._views.has_views:
                self._views.offer_map(await self._in(self._mapping_thread, pipeline.view))
        else:
            await self._schedule(functools.partial(self._recorder.trajectory, []))
        await self._writes.put(None)
        await writer

    async def _close(self) -> RunOutcome:
        await self._in(self._io_thread, self._recorder.events, self._take_events())
        summary = await self._in(self._mapping_thread, self._summary)
        outcome = RunOutcome(
            path=self._recorder.path,
            stopped_by=self._stopped_by,
            num_keyframes=self._pipeline.num_keyframes,
            num_registered=self._pipeline.sparse_map.num_registered,
            summary=summary,
        )
        self._emit(
            RunFinished(
                at_s=self._clock(),
                stopped_by=outcome.stopped_by,
                num_keyframes=outcome.num_keyframes,
                num_registered=outcome.num_registered,
            )
        )
        await self._in(self._io_thread, self._recorder.summary, summary)
        await self._in(self._io_thread, self._recorder.events, self._take_events())
        await self._in(self._io_thread, self._recorder.close)
        await asyncio.to_thread(self._views.close)
        for executor in (
            self._mapping_thread,
            self._tracking_thread,
            self._adjusting_thread,
            self._io_thread,
        ):
            executor.shutdown(wait=False)
        return outcome

    def _summary(self) -> dict[str, Any]:
        sparse_map = self._pipeline.sparse_map
        reconstruction = sparse_map.reconstruction
        figures = self._statistics.figures()
        figures.update(
            registered_keyframes=sparse_map.num_registered,
            num_points3D=sparse_map.num_points3D,
            num_observations=reconstruction.compute_num_observations(),
            mean_track_length=reconstruction.compute_mean_track_length(),
            mean_reprojection_error_px=sparse_map.mean_reprojection_error_px(),
            frames_interpolated=self._pipeline.num_interpolated_frames(),
            failed_writes=self._recorder.num_failed_writes,
            view_events_lost=self._views.num_events_lost,
            peak_rss_mb=_peak_rss_mb(),
            peak_gpu_mb=0,
            wall_s=self._clock(),
            cpu_s=_cpu_s(),
            components=int(self._pipeline.is_initialized),
            stopped_by=self._stopped_by,
            georeferenced=False,
            gps_rmse_m=self._pipeline.gps_rmse_m(),
        )
        return figures

    # -- helpers --------------------------------------------------------------------------------

    def _clock(self) -> float:
        return time.monotonic() - self._started_s

    def _emit(self, event: Event) -> None:
        """Takes a fact from any thread; appending to a deque is atomic."""
        self._new_events.append(event)

    def _emit_dropped(
        self, frame: Frame | RejectedFrame, *, reason: DropReason, detail: str
    ) -> None:
        self._emit(
            FrameDropped(
                at_s=self._clock(),
                source=frame.source,
                index=frame.index,
                name=frame.name,
                captured_at_s=frame.captured_at_s,
                reason=reason,
                detail=detail,
            )
        )

    async def _drop(self, frame: Frame, reason: DropReason, *, detail: str) -> None:
        self._emit_dropped(frame, reason=reason, detail=detail)
        self._budget.give_back(frame)
        await self._schedule(
            functools.partial(self._recorder.frame_dropped, frame.frame_id, reason)
        )

    def _take_events(self) -> list[Event]:
        events = []
        while self._new_events:
            event = self._new_events.popleft()
            self._statistics(event)
            self._views.offer_event(event)
            events.append(event)
        return events

    async def _flush_events(self) -> None:
        events = self._take_events()
        if events:
            await self._schedule(functools.partial(self._recorder.events, events))

    async def _schedule(self, write: Callable[[], None]) -> None:
        await self._writes.put(write)

    async def _write(self) -> None:
        """Runs writes in order on the I/O thread until told to end."""
        while (write := await self._writes.get()) is not None:
            await self._in(self._io_thread, write)

    async def _in(
        self, executor: ThreadPoolExecutor, call: Callable[..., Result], *args: Any
    ) -> Result:
        return await asyncio.get_running_loop().run_in_executor(executor, call, *args)

    @asynccontextmanager
    async def _signals(self) -> AsyncIterator[None]:
        """Turns the first SIGINT or SIGTERM into a clean stop and a second into leaving at once."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            logger.error("stopped at once; the last snapshot stands")
            logging.shutdown()
            os._exit(_HARD_EXIT_CODE)
        self._stopped_by = "signal"
        logger.warning("stopping: finishing the map; press Ctrl-C again to leave at once")
        self._stop.set()

    @asynccontextmanager
    async def _lag_monitor(self) -> AsyncIterator[None]:
        async def measure() -> None:
            while True:
                before_s = time.monotonic()
                await asyncio.sleep(_LAG_PERIOD_S)
                self._statistics.add_loop_lag(max(0.0, time.monotonic() - before_s - _LAG_PERIOD_S))

        task = asyncio.create_task(measure(), name="loop lag")
        try:
            yield
        finally:
            task.cancel()


def _of_source(frame: Frame | RejectedFrame, number: int) -> Frame | RejectedFrame:
    """A frame under names that are unique among several sources."""
    name = f"source{number + 1}/{frame.name}"
    if isinstance(frame, RejectedFrame):
        return replace(frame, name=name)
    return replace(frame, name=name, camera_key=f"source{number + 1}|{frame.camera_key}")


def _cpu_s() -> float:
    """CPU seconds of this process and its finished children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in usage)


def _peak_rss_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024.0 * 1024.0 if sys.platform == "darwin" else 1024.0)
