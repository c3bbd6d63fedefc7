"""A run: frames in, a growing map out.

The way of a frame::

    sources -> ArrivalQueue -> Ingestion -> TrackingStage -> MappingQueue -> MappingStage -> Mapper
               (undecoded)     (decodes)                                       |    |
                                run folder <- Writer <- Publisher, Snapshots <-+    +-> MapJobs
                                views      <-----------+

Every box to the left of the mapper waits on the event loop and works on a thread of its own. The
mapper owns the map on its thread and returns frozen steps; background jobs get private copies.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.cpu_time import Stage
from engine.errors import SnapshotError
from engine.events import (
    ALSO_AN_EVENT,
    CommandTaken,
    FrameDropped,
    RunFinished,
    RunPart,
    RunResumed,
    RunStarted,
    SourceOpened,
)
from engine.mapping.ahead_posing import AheadPoser
from engine.mapping.jobs import FinishedJob, JobKind
from engine.mapping.mapper import Mapper
from engine.mapping.model.bundle_adjustment import GlobalAdjuster
from engine.mapping.steps import MapFigures, MappingStep
from engine.mapping.stored_state import StoredFrame, StoredModel
from engine.matching.descriptor_store import DescriptorStore
from engine.matching.pair_matching import PairMatching
from engine.matching.pairs_ahead import PairsAhead
from engine.matching.place_recognition import PlaceRecognizer
from engine.matching.scene_graph import SceneGraph
from engine.matching.second_matching import DescriberForBoth, SecondMatching
from engine.output.load import LoadStatistics, QueueName
from engine.output.recorder import Recorder
from engine.output.recovery import FormerRun
from engine.output.run_folder import RunFolder
from engine.output.snapshots import read_models
from engine.output.statistics import RunStatistics, summary_figures
from engine.output.stored_descriptors import StoredDescriptors
from engine.ports import (
    CameraCalibrations,
    CameraMasks,
    InputRecording,
    PairMatcher,
    PlaceIndex,
    ResumableSource,
    SecondMatcher,
    SeesDepth,
    Source,
    View,
    WindowSolver,
    WorksAhead,
)
from engine.run.background import MapJobs, Snapshots
from engine.run.dense import MAX_CALL_S, DenseMaking
from engine.run.event_loop import (
    CallWatch,
    RunRequests,
    ThreadOwned,
    called_regularly,
    new_thread,
    run_in,
    stop_signals,
)
from engine.run.faults import Faults, Guard, Wait, cause_of, wait_for_call
from engine.run.guarded import GuardedMatcher, GuardedPlaces, GuardedSecond, GuardedSolver
from engine.run.ingestion import Ingestion, SourceRole
from engine.run.input_log import InputLog
from engine.run.loop_lag import lag_measured
from engine.run.positions import Positions
from engine.run.publishing import Publisher
from engine.run.queues import ArrivalQueue, EventQueue, MappingQueue, Writer
from engine.run.stages import MappingStage, TrackingStage
from engine.run.training import TrainingFolderMaking
from engine.run.views import ViewDispatcher
from engine.types import DropReason, Float64Array, Frame, RunCommand, Verdict
from engine.windows.model import WindowSolverConfig
from engine.windows.solver import solve_window as solve

logger = logging.getLogger(__name__)

_HARD_EXIT_CODE = 130  # as shells report an interrupted program
_LOOK_PERIOD_S = 2.0  # between looks at the run folder and its disk
_LOAD_PERIOD_S = 2.0  # between samples of the load
_DROPPED = "a second signal came before its turn"
_BROKEN_OFF = "the run broke off before its turn"
_NO_POSITIONS = (
    "no frame came with a position (what sends or edits photos often strips them), so that the"
    " orthophoto is in {unit} and without north; livesfm georeference lays the map onto"
    " positions or ground control that come later"
)


class StoppedBy(StrEnum):
    """What ended a run."""

    END_OF_SOURCES = "end_of_sources"
    SIGNAL = "signal"
    COMMAND = "command"
    FULL_DISK = "full_disk"  # too little was free to go on; what was mapped until then is saved
    FAILURE = "failure"  # something broke; what was mapped until then is saved


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """How a run ended."""

    path: Path
    stopped_by: StoppedBy
    num_keyframes: int
    num_registered: int  # in the map
    summary: dict[str, Any]
    verdict: Verdict = field(default_factory=Verdict)
    num_in_other_maps: tuple[int, ...] = ()  # keyframes of each, in the order of a snapshot's maps
    num_hangs: int = 0  # calls that were given up; their threads may still be in them
    not_saved: tuple[str, ...] = ()  # what the disk does not have, in words
    asked_path: Path | None = None  # of the folder, where it was renamed or lost during the run
    unopened: tuple[str, ...] = ()  # labels of the sources that could not be opened


def leave_at_once() -> None:
    """Ends the process without finishing anything, as a third signal asks for."""
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
        groundtruth: capture times and true cam_from_world (3, 4), where a source has them.
        leave: called at the third signal; must not return.
        places: recognizes places; by default learned from the matcher's descriptors.
        requests: what people who watch ask of the run.
        solve_window: solves windows of keyframes; by default the engine's own solver.
        masks: of whole cameras; None: there are none.
        calibrations: those that the user gave for cameras of the sources.
        roles: what each source is called in the run; by default as in a new one.
        former: what the run goes on from, which lies in the folder; None: it is a new one.
        onto: where that came from, when it is of another run; "": of this one.
        wait_for_call: waits for calls that may hang.
        recording: keeps what the run receives, to be repeated; None: it is not kept.
        second: matches pairs of keyframes that the matcher hardly matches; None: nothing does.
        adjust: adjusts copies of the map beside it; None: the engine does.

    Raises:
        JournalError: the run's database cannot be made.
    """

    def __init__(
        self,
        config: Config,
        *,
        folder: RunFolder,
        sources: Sequence[Source],
        matcher: PairMatcher,
        views: Sequence[View] = (),
        groundtruth: Sequence[tuple[float, Float64Array]] = (),
        leave: Callable[[], None] = leave_at_once,
        places: PlaceIndex | None = None,
        requests: RunRequests | None = None,
        solve_window: WindowSolver | None = None,
        masks: CameraMasks | None = None,
        calibrations: CameraCalibrations | None = None,
        roles: Sequence[SourceRole] | None = None,
        former: FormerRun | None = None,
        onto: str = "",
        wait_for_call: Wait = wait_for_call,
        recording: InputRecording | None = None,
        second: SecondMatcher | None = None,
        adjust: GlobalAdjuster | None = None,
    ) -> None:
        self._config = config
        self._adjust = adjust
        self._wait_for_call = wait_for_call
        self._loop: asyncio.AbstractEventLoop | None = None  # while it runs
        self._is_dropping = False  # what waits is not mapped any more
        self._sources = tuple(sources)
        self._roles = roles or SourceRole.of_all(sources)
        self._former = former
        self._lay_again = "" if former is None else former.lay_again
        self._onto = onto
        self._groundtruth = groundtruth
        self._masks = masks
        self._leave = leave
        self._requests = requests or RunRequests()
        self._asked_path = folder.path
        self._is_reading = True  # until the sources end
        self._stopped_by = StoppedBy.END_OF_SOURCES
        self._ahead = matcher if isinstance(matcher, WorksAhead) else None
        self._make_outputs(folder, views)
        if self._ahead is not None:
            self._ahead.report_to(self._warn)
        self._make_guards(matcher, second)
        self._make_stages(places, solve_window, calibrations, recording)

    # -- the run --------------------------------------------------------------------------------

    async def run(self) -> RunOutcome:
        """Runs until the sources end or a signal stops it; always leaves a valid run folder.

        Raises:
            EngineError: the map that the run goes on from cannot be restored. The run
                in the folder can go on all the same.
        """
        self._loop = asyncio.get_running_loop()
        async with stop_signals(self.interrupt, self._drop_what_waits, self._leave):
            restored = await self._begin()
            async with (
                lag_measured(self._load.add_lateness, clock=self._events.clock),
                self._writer.running(),
                called_regularly(self._look, period_s=_LOOK_PERIOD_S),
                called_regularly(self._sample_load, period_s=_LOAD_PERIOD_S),
                self._requests.answered(self._take_command),
            ):
                await self._publisher.publish_events()
                if restored is not None:
                    await self._mapping.go_on(restored)
                self._dense.start()
                self._training.start()
                is_sound = await self._run_stages() and await self._attempt(
                    self._finish_map(), what="finishing the map"
                )
                await self._attempt(self._save_poses(), what="saving the trajectory")
                save_map = self._save_map(must_be_checked=not is_sound)
                await self._attempt(save_map, what="saving the map")
                await self._attempt(self._finish_dense(), what="finishing the dense map")
                await self._attempt(self._training.finish(), what="finishing the training folder")
                await self._attempt(self._show_map(), what="showing the map")
                await self._log.close()
            return await self._close()

    def stop(self) -> None:
        """Takes no new frames from now on; those that arrived are mapped and saved."""
        self._ingestion.stop()

    async def _begin(self) -> MappingStep | None:
        """Emits what the run begins with, and restores the map that it goes on from."""
        labels, matcher = tuple(role.label for role in self._roles), self._matcher.name
        restored = None
        if self._former is None:
            self._events(RunStarted(sources=labels, matcher=matcher))
        else:
            restored = await self._restore(self._former)
            self._events(
                RunResumed(
                    sources=labels,
                    matcher=matcher,
                    num_keyframes=restored.counts.num_keyframes,
                    num_registered=restored.counts.num_registered,
                    num_frames_again=self._former.num_again,
                    onto=self._onto,
                )
            )
            if self._former.without_image:
                self._warn(_without_image(self._former.without_image))
            if self._lay_again:
                self._warn(_not_laid(self._lay_again))
            for lost in self._former.lost:
                self._events(_dropped(lost))
            self._former = None  # its keyframes are large, and the map has what it needs of them
        for source, role in zip(self._sources, self._roles, strict=True):
            self._events(_opened(source, role))
        return restored

    async def _restore(self, former: FormerRun) -> MappingStep:
        try:
            models = await self._former_models(former)
            restored = await self._mapper.call(Mapper.restore, former.stored, models)
            await run_in(self._io_thread, self._recorder.go_on)
            await self._dense.go_on(before=former.stored.next_frame_id)
            return restored
        except BaseException:
            await self._abandon_all()
            raise

    async def _former_models(self, former: FormerRun) -> tuple[StoredModel, ...]:
        """The maps of the newest snapshot that can be read.

        None where all are broken: keyframes and pairs suffice.
        """
        for number, snapshot in enumerate(former.stored.snapshots, start=1):
            try:
                return await run_in(self._io_thread, read_models, snapshot)
            except SnapshotError as error:
                is_last = number == len(former.stored.snapshots)
                self._warn(
                    f"{error}; the map is built anew from the keyframes and pairs in database.db"
                    if is_last
                    else f"{error}; the snapshot before it is taken"
                )
        return ()

    def _warn(self, words: str) -> None:
        logger.warning("%s", words, extra=ALSO_AN_EVENT)
        self._events.warn(words)

    async def _run_stages(self) -> bool:
        """Whether the map is sound: nothing broke while it grew."""
        if self._groundtruth:
            await self._writer.schedule(lambda: self._recorder.groundtruth(self._groundtruth))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._ingest(), name="ingestion")
            group.create_task(self._track(), name="tracking")
            mapping = group.create_task(self._map(), name="mapping")
        detail = _DROPPED if self._is_dropping else _BROKEN_OFF
        dropping = self._ingestion.drop_waiting(detail=detail)
        await self._attempt(dropping, what="dropping what waits")
        return mapping.result()

    async def _ingest(self) -> None:
        """Sources to frames."""
        await self._attempt(self._ingestion.run(), what="reading the sources")
        self._is_reading = False
        self._arrivals.end()

    async def _track(self) -> None:
        """Frames to tracked frames and keyframes."""
        if not await self._attempt(self._tracking.run(), what="tracking"):
            self._arrivals.break_off()
        await self._items.end()

    async def _map(self) -> bool:
        """Tracked frames and keyframes to the map."""
        is_sound = await self._attempt(self._mapping.run(), what="mapping")
        if not is_sound:
            # Releases who waits for the memory of frames that will never be mapped.
            self._arrivals.break_off()
        while not is_sound and await self._items.get() is not None:
            continue  # never mapped: these frames are reported as stopped at the end
        return is_sound

    # -- the end --------------------------------------------------------------------------------

    async def _finish_map(self) -> None:
        """Last adjustments, and a last try for keyframes without a place in the map."""
        finished = await self._jobs.all_finished()
        if self._second is not None:
            finished = await self._match_last(finished)
        self._positions.give_to_map()
        overload_at_s = self._statistics.overload_at_s()
        step = await self._mapper.call(Mapper.finish, finished, overload_at_s=overload_at_s)
        await self._publisher.publish_step(step)

    async def _match_last(self, finished: list[FinishedJob]) -> list[FinishedJob]:
        """Lets the second matcher try what is still weak, within its bounds.

        Returns:
            What is left to be merged.
        """
        while not self._is_dropping:
            step = await self._mapper.call(Mapper.match_last, finished)
            await self._publisher.publish_step(step)
            finished = []
            if not step.jobs:
                break
            await self._jobs.start(step.jobs)
            finished = await self._jobs.all_finished()
        return finished

    async def _save_poses(self) -> None:
        await self._publisher.publish_step(await self._mapper.call(Mapper.report))
        poses = await self._mapper.call(Mapper.trajectories)
        await self._writer.schedule(functools.partial(self._recorder.trajectories, poses))

    async def _save_map(self, *, must_be_checked: bool) -> None:
        cameras = await self._mapper.call(Mapper.cameras)
        await self._writer.schedule(functools.partial(self._recorder.cameras_calibrated, cameras))
        masks = await self._mapper.call(Mapper.overlay_masks)
        await self._writer.schedule(functools.partial(self._recorder.overlays_masked, masks))
        await self._snapshots.write_final(must_be_checked=must_be_checked)

    async def _finish_dense(self) -> None:
        await self._dense.finish()
        await self._publisher.publish_events()

    async def _show_map(self) -> None:
        if self._views.shows_map:
            step = await self._mapper.call(Mapper.report, wants_view=True)
            await self._publisher.publish_step(step)

    async def _close(self) -> RunOutcome:
        """Reports the run and closes everything, whatever fails in the report."""
        not_saved: tuple[str, ...] = ()
        try:
            outcome = await self._report()
        finally:
            not_saved = await self._close_all()
        path = self._recorder.path
        asked_path = self._asked_path if path != self._asked_path else None
        return replace(
            outcome,
            path=path,
            not_saved=not_saved,
            asked_path=asked_path,
            num_hangs=self._faults.num_hangs,
        )

    async def _close_all(self) -> tuple[str, ...]:
        """Closes the folder and the views; returns what is not saved."""
        await self._dense.close()
        await self._training.close()
        await run_in(self._io_thread, self._recorder.finish)
        await self._write_events()
        await asyncio.to_thread(self._views.close)
        # First, for who closes the database last merges its log.
        self._stored_descriptors.close()
        not_saved = await run_in(self._io_thread, self._recorder.close)
        if self._ahead is not None:
            await asyncio.to_thread(self._ahead.close)
        self._end_threads()
        return not_saved

    async def _abandon_all(self) -> None:
        """Closes the folder, whose run stays what it was before, and the views."""
        await self._dense.close()
        await self._training.close()
        await asyncio.to_thread(self._views.close)
        self._stored_descriptors.close()
        await run_in(self._io_thread, self._recorder.abandon)
        if self._ahead is not None:
            await asyncio.to_thread(self._ahead.close)
        self._end_threads()

    def _end_threads(self) -> None:
        self._mapper.shutdown()
        for thread in self._threads:
            thread.shutdown(wait=False)
        for guard in self._guards.values():
            guard.close()

    async def _report(self) -> RunOutcome:
        """Settles what is left and writes the summary."""
        await self._jobs.abandon_all()
        detail = _DROPPED if self._is_dropping else _BROKEN_OFF
        for frame in self._arrivals.frames_in_engine:
            self._events.frame_dropped(frame, reason=DropReason.STOPPED, detail=detail)
        await self._write_events()
        outcome = self._outcome(await self._mapper.call(Mapper.figures))
        self._events(
            RunFinished(
                stopped_by=outcome.stopped_by,
                num_keyframes=outcome.num_keyframes,
                num_registered=outcome.num_registered,
                num_in_other_maps=outcome.num_in_other_maps,
            )
        )
        await run_in(self._io_thread, self._recorder.summary, outcome.summary)
        await self._write_events()
        return outcome

    async def _write_events(self) -> None:
        await run_in(self._io_thread, self._recorder.events, self._publisher.take_events())

    def _outcome(self, figures: MapFigures) -> RunOutcome:
        summary = summary_figures(
            self._statistics,
            figures,
            self._load,
            wall_s=self._events.clock(),
            stopped_by=self._stopped_by,
            is_metric=self._config.matching.metric_scale == "apply",
        )
        if figures.placement is None:
            laid_before = _not_laid(self._lay_again) if self._lay_again else ""
            why = (self._why_no_place(figures, unit=str(summary["unit"])), laid_before)
            summary["not_georeferenced"] = "; ".join(one for one in why if one)
        summary.update(
            failed_writes=self._recorder.num_failed_writes,
            view_events_lost=self._views.num_events_lost,
            dense=self._dense.figures(),
            train=self._training.figures(),
            peak_gpu_mb=max(
                one.peak_gpu_mb for one in (self._matcher, self._second) if one is not None
            ),
        )
        if self._ahead is not None:
            summary["remote"] = self._ahead.figures()
        return RunOutcome(
            path=self._recorder.path,
            stopped_by=self._stopped_by,
            num_keyframes=figures.counts.num_keyframes,
            num_registered=figures.counts.num_registered,
            summary=summary,
            verdict=figures.verdict,
            num_in_other_maps=tuple(one.num_registered for one in figures.maps[1:]),
            num_hangs=self._faults.num_hangs,
            unopened=self._ingestion.unopened,
        )

    def _why_no_place(self, figures: MapFigures, *, unit: str) -> str:
        """Why a map is not on the globe that is meant to be there; "": it is not meant to be."""
        dense = self._config.dense
        is_survey = dense.enabled and dense.orthophoto and self._config.georeference.enabled
        is_meant = is_survey and figures.counts.num_registered > 0
        if figures.not_georeferenced or self._lay_again or not is_meant:
            return figures.not_georeferenced
        return _NO_POSITIONS.format(unit=unit)

    # -- failures, signals and requests ---------------------------------------------------------

    async def _attempt(self, step: Awaitable[None], *, what: str) -> bool:
        """Awaits a step of the run; when it breaks, that is reported and the next ones go on."""
        try:
            await step
        except Exception as error:  # the task boundary: what was mapped until then is saved
            self._fail(what, error)
            return False
        return True

    def _fail(self, what: str, error: Exception) -> None:
        logger.error("%s failed", what, exc_info=error)
        self._end_as_failed(f"{what} failed: {cause_of(error)}")

    def _end_as_failed(self, message: str) -> None:
        """Ends the run; what arrived is mapped, as far as that works, and saved."""
        if self._stopped_by is not StoppedBy.FAILURE:
            self._stopped_by = StoppedBy.FAILURE
            self._events.warn(message)
        self.stop()

    def _end_from_any_thread(self, message: str) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the run is over
                self._loop.call_soon_threadsafe(self._end_as_failed, message)

    def interrupt(self) -> None:
        """Stops as a first signal does: what has arrived is mapped, and the map is finished."""
        num = self._num_waiting()
        waiting = f"{num} frame{'s' * (num != 1)} that came before are still mapped, then " * (
            num > 0
        )
        logger.warning(
            "stopping: %sthe map is finished and saved; press Ctrl-C again to drop what waits, a"
            " third time to leave at once",
            waiting,
        )
        self._stop_because(StoppedBy.SIGNAL)

    def _drop_what_waits(self) -> None:
        """Maps nothing more; what waits is dropped and counted, and the map is saved."""
        logger.warning(
            "dropping the %d frames that wait; the map is finished and saved; press Ctrl-C again to"
            " leave at once",
            self._num_waiting(),
        )
        self._is_dropping = True
        self._stop_because(StoppedBy.SIGNAL)
        self._arrivals.break_off()
        self._mapping.drop_what_waits()
        self._dense.drop_what_waits()
        self._training.drop_what_waits()

    def _num_waiting(self) -> int:
        """Frames that have arrived and are not yet tracked or in the map."""
        return self._arrivals.num_arrivals + len(self._arrivals.frames_in_engine)

    async def _take_command(self, command: RunCommand) -> None:
        self._events(CommandTaken(command=command))
        match command:
            case RunCommand.SNAPSHOT:
                await self._snapshot_now()
            case RunCommand.PAUSE:
                self._ingestion.pause()
            case RunCommand.RESUME:
                self._ingestion.resume()
            case RunCommand.STOP:
                self._stop_because(StoppedBy.COMMAND)
        await self._publisher.publish_events()

    async def _snapshot_now(self) -> None:
        try:
            await self._snapshots.write_now()
        except Exception as error:  # a task boundary: the run goes on without that snapshot
            logger.exception("the snapshot asked for failed")
            self._events.warn(f"the snapshot asked for failed: {cause_of(error)}")

    async def _look(self) -> None:
        """Looks after the run folder; a disk that is nearly full stops the run."""
        await (await self._writer.schedule(self._recorder.look))
        if self._recorder.is_space_low and self._is_reading:
            self._stop_because(StoppedBy.FULL_DISK)

    async def _sample_load(self) -> None:
        """Publishes the load, and what else was emitted, also while nothing is mapped."""
        for part, watch in self._watches.items():
            if (late_s := watch.newly_late_s()) is not None:
                self._warn(
                    f"{part} has been busy with one call for {late_s:.0f} s; frames wait for it, "
                    "and the newest snapshot stands"
                )
        self._events(self._load.sample())
        if self._writer.has_room:  # else whoever waits for it publishes, and this may be cancelled
            await self._publisher.publish_events()

    def _stop_because(self, reason: StoppedBy) -> None:
        if self._stopped_by is StoppedBy.END_OF_SOURCES:
            self._stopped_by = reason
        self.stop()

    # -- the parts ------------------------------------------------------------------------------

    def _make_outputs(self, folder: RunFolder, views: Sequence[View]) -> None:
        config = self._config
        self._threads = tuple(
            new_thread(name, stage=stage)
            for name, stage in (
                ("decoding", Stage.DECODE),
                ("tracking", Stage.TRACK),
                ("describing", Stage.DESCRIBE),
                ("matching", Stage.VERIFY),
                ("adjusting", Stage.GLOBAL_ADJUSTMENT),
                ("second", Stage.MATCH),
                ("places", Stage.PLACES),
                ("dense", Stage.DENSE_DEPTH),
                ("training", Stage.TRAINING_FOLDER),
                ("io", Stage.TABLES),
            )
        )
        (
            self._decoding_thread,
            self._tracking_thread,
            self._describing_thread,
            self._matching_thread,
            self._job_thread,
            self._second_thread,
            self._places_thread,
            self._dense_thread,
            self._training_thread,
            self._io_thread,
        ) = self._threads
        self._watches = {
            part: CallWatch(config.faults.report_after_s) for part in ("mapping", "writing")
        }
        former = self._former
        self._load = LoadStatistics()
        self._events = EventQueue(
            former_s=0.0 if former is None else former.ended_at_s,
            waited=self._waited_in(QueueName.EVENTS),
        )
        self._statistics = RunStatistics() if former is None else former.statistics
        self._recorder = Recorder(
            folder, snapshots=config.snapshots, runtime=config.runtime, emit=self._events
        )
        self._faults = Faults(config.faults, emit=self._events, end=self._end_from_any_thread)
        self._stored_descriptors = StoredDescriptors(lambda: self._recorder.path)
        self._views = ViewDispatcher(
            views,
            config.views,
            faults=self._faults,
            max_call_s=config.faults.max_call_s,
            waited=self._waited_in(QueueName.VIEWS),
        )
        self._writer = Writer(
            self._io_thread,
            failed=self._write_failed,
            waited=self._waited_in(QueueName.WRITES),
            watch=self._watches["writing"],
        )
        self._publisher = Publisher(
            events=self._events,
            statistics=self._statistics,
            views=self._views,
            recorder=self._recorder,
            writer=self._writer,
        )

    def _make_guards(self, matcher: PairMatcher, second: SecondMatcher | None) -> None:
        """Makes what calls go through that may hang."""
        config = self._config.faults
        guard = functools.partial(
            Guard, limit_s=config.max_call_s, max_hangs=config.max_hangs, wait=self._wait_for_call
        )

        def end_without(part: RunPart) -> Callable[[], None]:
            message = (
                f"{part.value} hung {config.max_hangs} times: the run ends without its matcher"
            )
            return functools.partial(self._end_from_any_thread, message)

        self._guards = {
            RunPart.DECODING: guard(RunPart.DECODING),
            RunPart.PLACES: guard(RunPart.PLACES),
            RunPart.SECOND_MATCHING: guard(RunPart.SECOND_MATCHING),
            RunPart.DENSE: guard(RunPart.DENSE, limit_s=min(config.max_call_s, MAX_CALL_S)),
            **{
                part: guard(part, on_off=end_without(part))
                for part in (RunPart.DESCRIBING, RunPart.MATCHING)
            },
            **{
                part: guard(part, limit_s=config.max_solve_s)
                for part in (RunPart.ADJUSTMENT, RunPart.WINDOW, RunPart.LENS_SEARCH)
            },
        }
        self._matcher = GuardedMatcher(
            matcher,
            describing=self._guards[RunPart.DESCRIBING],
            matching=self._guards[RunPart.MATCHING],
            faults=self._faults,
        )
        self._see_depth = matcher.seen_depth if isinstance(matcher, SeesDepth) else None
        self._second = (
            None
            if second is None
            else GuardedSecond(
                second, guard=self._guards[RunPart.SECOND_MATCHING], faults=self._faults
            )
        )

    def _make_stages(
        self,
        places: PlaceIndex | None,
        solve_window: WindowSolver | None,
        calibrations: CameraCalibrations | None,
        recording: InputRecording | None,
    ) -> None:
        self._make_queues(recording)
        self._make_ingestion(calibrations)
        self._make_pairs_ahead()
        self._make_tracking()
        graph, matching = self._make_matching(places)
        self._make_mapper(graph, matching, solve_window)
        self._make_background()
        self._make_mapping(matching)

    def _make_queues(self, recording: InputRecording | None) -> None:
        """Makes what lies between the stages."""
        config = self._config
        self._arrivals = ArrivalQueue(
            max_waiting=config.sources.frame_queue_size,
            max_bytes=config.sources.max_buffered_mb * 1_000_000,
            max_lanes=config.live_sources.max_cameras,
            waited=self._waited_in(QueueName.ARRIVALS),
        )
        self._items = MappingQueue(
            max_waiting=config.sources.mapping_queue_size,
            waited=self._waited_in(QueueName.MAPPING),
        )
        self._log = InputLog(
            self._sources, recording=recording, writer=self._writer, warn=self._events.warn
        )
        self._positions = Positions(self._sources, max_gap_s=config.georeference.max_gap_s)

    def _make_ingestion(self, calibrations: CameraCalibrations | None) -> None:
        config = self._config
        self._ingestion = Ingestion(
            self._sources,
            roles=self._roles,
            queue=self._arrivals,
            decoding_thread=self._decoding_thread,
            recorder=self._recorder,
            writer=self._writer,
            events=self._events,
            publish=self._publisher.publish_events,
            faults=self._faults,
            decoding=self._guards[RunPart.DECODING],
            retry=config.live_sources,
            log=self._log,
            positions=self._positions,
            max_frames=config.sources.max_frames,
            masks=self._masks,
            calibrations=calibrations,
        )
        if self._former is not None:
            self._ingestion.take_former(self._former.stored)

    def _make_pairs_ahead(self) -> None:
        config, former = self._config, self._former
        self._pairs_ahead: PairsAhead | None = None
        if self._ahead is not None:
            self._pairs_ahead = PairsAhead(
                config.scene_graph,
                coarse_to_fine=config.coarse_to_fine,
                matcher=self._ahead,
                num_before=0 if former is None else len(former.stored.keyframes),
            )

    def _make_tracking(self) -> None:
        config = self._config
        self._tracking = TrackingStage(
            config.frame_tracking,
            two_view=config.two_view,
            sources=self._sources,
            describe=(
                self._matcher.describe
                if self._second is None
                else DescriberForBoth(self._matcher, self._second, config.second).describe
            ),
            thread=self._tracking_thread,
            describing_thread=self._describing_thread,
            frames=self._arrivals,
            items=self._items,
            has_map=lambda: self._mapping.has_map,
            ingestion=self._ingestion,
            warn=self._events.warn,
            faults=self._faults,
            log=self._log,
            ahead=self._ahead,
            pairs_ahead=self._pairs_ahead,
        )

    def _make_matching(self, places: PlaceIndex | None) -> tuple[SceneGraph, PairMatching]:
        """Makes what decides which pairs are matched, and what matches them."""
        config = self._config
        if places is None:  # an index may have a length, and be empty
            places = PlaceRecognizer(
                config.retrieval, seed=config.runtime.seed, thread=self._places_thread
            )
        else:
            places = GuardedPlaces(places, guard=self._guards[RunPart.PLACES], faults=self._faults)
        graph = SceneGraph(config.scene_graph, recognizer=places)
        matching = PairMatching(
            graph,
            self._matcher,
            two_view=config.two_view,
            dense=config.dense_matching,
            coarse_to_fine=config.coarse_to_fine,
            descriptors=DescriptorStore(
                max_bytes=config.matching.max_descriptors_mb * 1_000_000,
                read=self._stored_descriptors.read,
            ),
            second=config.second,
        )
        return graph, matching

    def _make_mapper(
        self, graph: SceneGraph, matching: PairMatching, solve_window: WindowSolver | None
    ) -> None:
        config = self._config
        solver = GuardedSolver(
            solve_window or functools.partial(solve, config=WindowSolverConfig()),
            guard=self._guards[RunPart.WINDOW],
            faults=self._faults,
        )
        second = None
        if self._second is not None:
            second = SecondMatching(config.second, graph=graph, matcher=self._second)
        self._mapper = ThreadOwned(
            lambda: Mapper(
                config,
                graph=graph,
                matching=matching,
                emit=self._events,
                solve_window=solver,
                fix_at=self._positions.for_map,
                second=second,
                adjust=self._adjust,
            ),
            name="mapping",
            stage=Stage.MAPPING,
            watch=self._watches["mapping"],
        )

    def _make_background(self) -> None:
        """Makes what adjusts and saves the map beside mapping."""
        self._jobs = MapJobs(
            self._job_thread,
            matching_thread=self._second_thread,
            guards={
                JobKind.GLOBAL_ADJUSTMENT: self._guards[RunPart.ADJUSTMENT],
                JobKind.LENS_SEARCH: self._guards[RunPart.LENS_SEARCH],
            },
            faults=self._faults,
        )
        self._dense = DenseMaking(
            self._config.dense,
            mapper=self._mapper,
            thread=self._dense_thread,
            guard=self._guards[RunPart.DENSE],
            faults=self._faults,
            recorder=self._recorder,
            writer=self._writer,
            views=self._views,
            emit=self._events,
            see_depth=self._see_depth,
            max_call_s=min(self._config.faults.max_call_s, MAX_CALL_S),
            wait=self._wait_for_call,
        )
        self._training = TrainingFolderMaking(
            config=self._config.snapshots,
            jpeg_quality=self._config.runtime.keyframe_jpeg_quality,
            thread=self._training_thread,
            faults=self._faults,
            recorder=self._recorder,
            writer=self._writer,
            max_call_s=min(self._config.faults.max_call_s, MAX_CALL_S),
            wait=self._wait_for_call,
        )
        self._snapshots = Snapshots(
            self._config.snapshots,
            mapper=self._mapper,
            recorder=self._recorder,
            writer=self._writer,
            clock=self._events.clock,
            taken=self._dense.take_world,
            written=self._training.snapshot_written,
        )

    def _make_mapping(self, matching: PairMatching) -> None:
        config = self._config
        self._mapping = MappingStage(
            self._mapper,
            matching=matching,
            matching_thread=self._matching_thread,
            items=self._items,
            frames=self._arrivals,
            jobs=self._jobs,
            snapshots=self._snapshots,
            publisher=self._publisher,
            recorder=self._recorder,
            writer=self._writer,
            faults=self._faults,
            drop=self._drop_keyframe,
            log=self._log,
            positions=self._positions,
            ahead=AheadPoser(config.registration, seed=config.runtime.seed),
            max_rebuilds=config.faults.max_map_rebuilds,
            dense=self._dense,
            pairs_ahead=self._pairs_ahead,
        )

    def _waited_in(self, name: QueueName) -> Callable[[float], None]:
        """Takes how long things wait in a queue."""
        return functools.partial(self._load.add_wait, name)

    async def _drop_keyframe(self, frame: Frame, reason: DropReason, detail: str) -> None:
        await self._arrivals.give_back(frame)
        await self._ingestion.drop(frame, reason=reason, detail=detail)

    def _write_failed(self, error: Exception) -> None:
        self._recorder.count_failed_write()
        self._faults.report(RunPart.WRITING, error, consequence="what was to be written is missing")


def _dropped(lost: StoredFrame) -> FrameDropped:
    return FrameDropped(
        frame_id=lost.frame_id,
        source=lost.source,
        index=lost.index,
        name=lost.name,
        captured_at_s=lost.captured_at_s,
        reason=DropReason.STOPPED,
        detail="the run was cut off before its turn",
    )


def _opened(source: Source, role: SourceRole) -> SourceOpened:
    return SourceOpened(
        source=role.label,
        address=role.address,
        prefix=role.prefix,
        is_live=source.info.is_live,
        fingerprint=source.fingerprint if isinstance(source, ResumableSource) else "",
        recording=role.recording,
    )


def _not_laid(command: str) -> str:
    """Words for what a map is laid onto after an end of its run."""
    return (
        "what the map is laid onto after an end of the run is no part of it while it goes on; at"
        f" its end livesfm resume lays the map onto it: {command}"
    )


def _without_image(names: Sequence[str]) -> str:
    """Words for keyframes whose images are gone."""
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"the images of {len(names)} keyframes are missing or empty: {some}; the map goes on"
        " without them, and what is made of its snapshots lacks them"
    )
