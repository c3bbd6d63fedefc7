"""The stages of a run: frames to keyframes and tracked frames, and these to the map."""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from engine.config import FrameTrackingConfig, TwoViewConfig
from engine.errors import InferenceError, MapError
from engine.events import RunPart
from engine.mapping.ahead_posing import AheadPoser, PosingReference
from engine.mapping.jobs import FinishedJob, MapJob
from engine.mapping.mapper import Mapper
from engine.mapping.pose_reports import posed_event
from engine.mapping.steps import KeyframeToMatch, MappingStep
from engine.matching.pair_matching import MatchedKeyframe, PairMatching
from engine.matching.pairs_ahead import PairsAhead
from engine.output.recorder import Recorder
from engine.ports import Source, WorksAhead
from engine.run.background import MapJobs, Snapshots, return_free_memory
from engine.run.dense import DenseMaking
from engine.run.event_loop import ThreadOwned, run_in
from engine.run.faults import Faults, cause_of
from engine.run.ingestion import DecodedFrame, Ingestion
from engine.run.input_log import InputLog
from engine.run.positions import Positions
from engine.run.publishing import Publisher
from engine.run.queues import ArrivalQueue, MappingItem, MappingQueue, Writer
from engine.tracking.frame_tracker import BegunKeyframe, FrameTracker, KeyframeReason, NewKeyframe
from engine.types import (
    DropReason,
    Features,
    Frame,
    FrameId,
    FramePose,
    Keyframe,
    MappingDecision,
    TrackingDecision,
)

Result = TypeVar("Result")

# Of the motion, or time, between keyframes of a live run:
_STARTING_SHARE = 0.5  # until there is a map
_ONLY_LOST = 1e6  # while a keyframe waits for mapping: none, unless the view would be lost


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Described:
    """A frame that becomes a keyframe; of a live run, while others are tracked."""

    decoded: DecodedFrame
    item: MappingItem  # without its keyframe
    tracker: FrameTracker
    begun: BegunKeyframe


class TrackingStage:
    """Tracks the frames of each camera, and makes keyframes of them.

    Live frames that come while a keyframe is described are tracked from the one before.

    Args:
        config: thresholds of tracking.
        two_view: thresholds of verification.
        sources: where frames come from.
        describe: makes the keypoint table of a keyframe.
        thread: runs one call at a time.
        describing_thread: runs one call at a time, beside the other.
        frames: gets the memory of frames back.
        items: where what was made of them goes.
        has_map: whether frames get poses by now; of a live run.
        ingestion: gives frames, and counts those that cannot be described.
        warn: emits that something is degraded.
        faults: takes what tracking raises.
        log: keeps what depends on timing, and repeats it.
        ahead: begins to describe photos before their turn; None: nothing does.
        pairs_ahead: begins with pairs of keyframes that wait; None: nothing does.
    """

    def __init__(
        self,
        config: FrameTrackingConfig,
        *,
        two_view: TwoViewConfig,
        sources: Sequence[Source],
        describe: Callable[[Frame], Features],
        thread: Executor,
        describing_thread: Executor,
        frames: ArrivalQueue,
        items: MappingQueue,
        has_map: Callable[[], bool],
        ingestion: Ingestion,
        warn: Callable[[str], None],
        faults: Faults,
        log: InputLog,
        ahead: WorksAhead | None = None,
        pairs_ahead: PairsAhead | None = None,
    ) -> None:
        self._ahead = ahead
        self._pairs_ahead = pairs_ahead
        self._config = config
        self._log = log
        self._faults = faults
        self._two_view = two_view
        self._sources = sources
        self._describe = describe
        self._thread = thread
        self._describing_thread = describing_thread
        self._frames = frames
        self._items = items
        self._has_map = has_map
        self._ingestion = ingestion
        self._warn = warn
        self._trackers: dict[tuple[int, str], FrameTracker] = {}
        self._turn = asyncio.Lock()  # of a frame that is tracked, or a keyframe that was described
        self._described: deque[_Described] = deque()  # in a replay: until the recorded moment
        self._describing: dict[tuple[int, str], asyncio.Task[None]] = {}  # by lane
        self._num_described = 0

    async def run(self) -> None:
        """Tracks all frames."""
        try:
            await self._run()
        finally:
            while self._describing:
                await asyncio.wait(list(self._describing.values()))

    async def _run(self) -> None:
        live = [source.info for source in self._sources if source.info.is_live]
        if self._ahead is not None and self._ahead.keyframes_ahead and not live:
            await self._run_ahead(self._ahead)
            return
        # What becomes a keyframe anyway is fresher the later it is taken.
        max_waiting = int(all(info.is_sequence for info in live))
        while True:
            if live:
                await self._items.wait_until_few_keyframes_wait(max_waiting)
            decoded = await self._ingestion.next_frame()
            if decoded is None:
                await self._describe_until(None)
                return
            await self._take(decoded)

    async def _run_ahead(self, ahead: WorksAhead) -> None:
        """Tracks frames that can wait, while photos after them are decoded and described."""
        frames: asyncio.Queue[DecodedFrame | None] = asyncio.Queue(ahead.keyframes_ahead)

        async def decode() -> None:
            is_needed = True
            try:
                while (decoded := await self._ingestion.next_frame()) is not None:
                    if self._are_photos(decoded.source_idx):
                        ahead.describe_ahead(decoded.frame)
                    await frames.put(decoded)
            except asyncio.CancelledError:
                is_needed = False
                raise
            finally:
                if is_needed:  # else nobody takes frames, and the queue may be full
                    await frames.put(None)

        decoding = asyncio.create_task(decode(), name="decoding ahead")
        try:
            while (decoded := await frames.get()) is not None:
                await self._take(decoded)
            await decoding
            await self._describe_until(None)
        finally:
            decoding.cancel()
            await asyncio.wait((decoding,))

    async def _take(self, decoded: DecodedFrame) -> None:
        try:
            async with self._turn:
                is_losing_view = await self._track(decoded)
            if is_losing_view and decoded.lane in self._describing:
                await asyncio.wait((self._describing[decoded.lane],))
        except InferenceError as error:
            await self._drop(decoded.frame, error)

    def _are_photos(self, source_idx: int) -> bool:
        """Whether every frame of a source becomes a keyframe."""
        mode, info = self._config.mode, self._sources[source_idx].info
        return mode == "photos" or (mode == "auto" and not info.is_sequence)

    async def _drop(self, frame: Frame, error: InferenceError) -> None:
        if self._ahead is not None:
            self._ahead.forget_ahead(frame.frame_id)
        await self._frames.give_back(frame)
        await self._ingestion.drop(frame, reason=DropReason.FAILED, detail=str(error))

    async def _track(self, decoded: DecodedFrame) -> bool:
        """Tracks a frame and passes it on at once; then makes it a keyframe if one is due.

        Returns:
            Whether the view of the last keyframe is nearly lost while the next one is described.

        Raises:
            InferenceError: it cannot be followed, or can only be a keyframe and cannot be
                described.
        """
        tracker = self._tracker(decoded)
        decision = await self._log.tracked(
            TrackingDecision(
                frame_id=decoded.frame.frame_id,
                is_behind=decoded.is_live and self._items.is_behind,
                motion_share=self._motion_share() if decoded.is_live else 1.0,
                num_described=self._num_described if decoded.is_live else None,
            )
        )
        await self._describe_until(decision.num_described)
        follow = functools.partial(
            tracker.follow,
            decoded.frame,
            wants_fallback=decision.is_behind,
            motion_share=_share_of(decision),
        )
        followed = await self._call(follow, decoded)
        due, is_losing_view = followed.due, False
        if followed.tracked is not None and self._is_describing(decoded):
            is_losing_view = due is KeyframeReason.OVERLAP
            due = None
        item = MappingItem(
            frame=decoded.frame,
            tracked=followed.tracked,
            fallback=followed.fallback,
            keyframe=None,
            is_settled=due is None,
            is_live=decoded.is_live,
        )
        if followed.tracked is not None:
            await self._items.put(item)
        if due is None:
            return is_losing_view
        can_wait = followed.tracked is not None and decision.num_described is not None
        begun = tracker.begin_keyframe(
            decoded.frame, due, keeps_fallback=can_wait and decision.is_behind
        )
        one = _Described(decoded=decoded, item=item, tracker=tracker, begun=begun)
        if can_wait:
            self._describe_beside(one)
        else:
            await self._make_keyframe(one, turn=nullcontext())
        return False

    def _motion_share(self) -> float:
        """Of the motion that makes a keyframe: less until there is a map, more while one waits."""
        if self._items.has_waiting_keyframe:
            return _ONLY_LOST
        return 1.0 if self._has_map() else _STARTING_SHARE

    def _is_describing(self, decoded: DecodedFrame) -> bool:
        return decoded.lane in self._describing or any(
            one.decoded.lane == decoded.lane for one in self._described
        )

    def _describe_beside(self, one: _Described) -> None:
        """Has a keyframe described; frames that come until then are tracked before it is there."""
        if not one.decoded.is_live:
            self._described.append(one)  # a replay: when the recorded run had it
            return
        lane = one.decoded.lane

        async def describe() -> None:
            try:
                await self._make_keyframe(one, turn=self._turn)
            except Exception as error:  # a task boundary: the frame has its pose already
                frame = one.decoded.frame
                self._faults.report(
                    RunPart.TRACKING,
                    error,
                    consequence=f"{frame.name} does not become a keyframe",
                    frame_id=frame.frame_id,
                )
                async with self._turn:
                    await self._put_keyframe(one.item, None)
            finally:
                del self._describing[lane]

        self._describing[lane] = asyncio.create_task(describe(), name="describing")

    async def _describe_until(self, num_described: int | None) -> None:
        """Describes what waits in a replay, until there are as many keyframes; None: all."""
        while self._described and (num_described is None or self._num_described < num_described):
            await self._make_keyframe(self._described.popleft(), turn=nullcontext())

    async def _make_keyframe(
        self, one: _Described, *, turn: AbstractAsyncContextManager[Any]
    ) -> None:
        """Describes a frame, and tracks from it as a keyframe once it has its turn.

        Raises:
            InferenceError: it does not become one, and has no pose either: it was not tracked.
        """
        frame = one.decoded.frame
        try:
            described = await self._describe_keyframe(one.tracker, one.decoded)
            async with turn:
                end = functools.partial(one.tracker.end_keyframe, one.begun, described)
                await self._put_keyframe(one.item, await self._call(end, one.decoded))
        except InferenceError as error:
            if one.item.tracked is None:
                raise
            self._warn(f"{frame.name} does not become a keyframe: {error}")
            async with turn:
                await self._put_keyframe(one.item, None)

    async def _put_keyframe(self, item: MappingItem, keyframe: NewKeyframe | None) -> None:
        """Passes on a keyframe, or that a tracked frame becomes none, which settles its frame."""
        if item.tracked is not None:
            self._num_described += 1
        if self._pairs_ahead is not None and keyframe is not None:
            self._pairs_ahead.keyframe_waits(keyframe.keyframe)
        await self._items.put(
            replace(item, tracked=None, fallback=None, keyframe=keyframe, is_settled=True)
        )

    async def _describe_keyframe(self, tracker: FrameTracker, decoded: DecodedFrame) -> Keyframe:
        """Describes a frame, after those of other cameras: one thread describes.

        Raises:
            InferenceError: it cannot be described.
        """
        describe = functools.partial(tracker.describe_keyframe, decoded.frame)
        return await self._call(describe, decoded, thread=self._describing_thread)

    async def _call(
        self, use: Callable[[], Result], decoded: DecodedFrame, *, thread: Executor | None = None
    ) -> Result:
        """Calls a tracker; one that breaks is replaced, and begins anew with the next frame.

        Raises:
            InferenceError: it broke, or could not describe the frame.
        """
        try:
            return await run_in(thread or self._thread, use)
        except InferenceError:
            raise
        except Exception as error:  # a task boundary: the frames of a lane are tracked anew
            self._trackers.pop(decoded.lane, None)
            self._faults.report(
                RunPart.TRACKING,
                error,
                consequence="the next frame of the camera is tracked anew",
                frame_id=decoded.frame.frame_id,
            )
            raise InferenceError(cause_of(error)) from error

    def _tracker(self, decoded: DecodedFrame) -> FrameTracker:
        if decoded.lane not in self._trackers:
            self._trackers[decoded.lane] = FrameTracker(
                self._config,
                describe=self._describe,
                is_sequence=self._sources[decoded.source_idx].info.is_sequence,
                two_view=self._two_view,
            )
        return self._trackers[decoded.lane]


def _share_of(decision: TrackingDecision) -> float:
    if decision.motion_share is not None:
        return decision.motion_share
    return _ONLY_LOST if decision.is_behind else 1.0


class MappingStage:
    """Brings what tracking made of the frames into the map, in order.

    While a live keyframe is matched, frames after it get their poses from the keyframe before, and
    while the mapper is busy with it, from a copy of that.

    Args:
        mapper: owns the map.
        matching: matches keyframes; its own thread has the scene graph meanwhile.
        matching_thread: runs one call at a time, beside the mapper.
        items: where frames come from.
        frames: gets the memory of frames back.
        jobs: runs what the mapper hands out.
        snapshots: writes the map when enough is new.
        publisher: publishes what the mapper returns.
        recorder: writes; called through the writer.
        writer: runs writes in order.
        faults: takes what matching and mapping raise.
        drop: records a frame that does not get into the map.
        log: keeps what depends on timing, and repeats it.
        positions: are known to the map up to its newest keyframe.
        ahead: poses frames while the mapper is busy with a keyframe.
        max_rebuilds: times that the map is built anew after mapping broke.
        dense: makes depth of keyframes that have settled.
        pairs_ahead: begins with pairs of keyframes that wait; None: nothing does.
    """

    def __init__(
        self,
        mapper: ThreadOwned[Mapper],
        *,
        matching: PairMatching,
        matching_thread: Executor,
        items: MappingQueue,
        frames: ArrivalQueue,
        jobs: MapJobs,
        snapshots: Snapshots,
        publisher: Publisher,
        recorder: Recorder,
        writer: Writer,
        faults: Faults,
        drop: Callable[[Frame, DropReason, str], Awaitable[None]],
        log: InputLog,
        positions: Positions,
        ahead: AheadPoser,
        max_rebuilds: int,
        dense: DenseMaking,
        pairs_ahead: PairsAhead | None = None,
    ) -> None:
        self._pairs_ahead = pairs_ahead
        self._log = log
        self._dense = dense
        self._positions = positions
        self._decided: MappingDecision | None = None  # of the newest keyframe, in a replay
        self._merged: tuple[str, ...] = ()  # kinds of jobs, before the newest keyframe
        self._num_readings = 0  # that the map knew then
        self._mapper = mapper
        self._faults = faults
        self._drop = drop
        self._num_rebuilds_left = max_rebuilds
        self._matching = matching
        self._matching_thread = matching_thread
        self._items = items
        self._frames = frames
        self._jobs = jobs
        self._snapshots = snapshots
        self._publisher = publisher
        self._recorder = recorder
        self._writer = writer
        self._is_dropping = False
        self._has_map = False
        self._due: tuple[MapJob, ...] = ()  # to be merged before the next keyframe
        self._ahead = ahead
        self._reported: dict[FrameId, FramePose] = {}  # published, of frames that wait
        self._num_posed = 0  # frames, while the newest keyframe was matched

    @property
    def has_map(self) -> bool:
        """Whether frames get poses by now."""
        return self._has_map

    async def go_on(self, restored: MappingStep) -> None:
        """Goes on from a restored map, before any item."""
        self._due = restored.due
        self._has_map = restored.counts.has_map
        await self._jobs.start(restored.jobs)
        await self._snapshots.write_if_due(restored.counts)
        await self._publisher.publish_step(restored)

    async def run(self) -> None:
        """Maps all items; poses that were published of frames that it never gets to are kept."""
        try:
            while (item := await self._items.get()) is not None:
                if self._is_dropping:
                    continue  # settled at the end of the run, with all that it holds
                if item.keyframe is None:
                    await self._pose(item, wants_view=self._publisher.wants_view)
                else:
                    with self._items.mapping_keyframe():
                        await self._map(item, item.keyframe.keyframe)
        finally:
            if self._reported:
                poses, self._reported = tuple(self._reported.values()), {}
                await self._writer.schedule(functools.partial(self._recorder.live_poses, poses))

    def drop_what_waits(self) -> None:
        """Maps nothing more; what waits stays in the engine, and is dropped with its end."""
        self._is_dropping = True

    async def _pose(self, item: MappingItem, *, wants_view: bool) -> None:
        """Poses a frame, and settles one that does not become a keyframe."""
        reported = self._reported.pop(item.frame.frame_id, None)
        if item.tracked is not None:
            try:
                step = await self._mapper.call(
                    Mapper.add_frame,
                    item.tracked,
                    fallback=item.fallback,
                    wants_view=wants_view,
                    reported=reported,
                )
                frame = item.frame if reported is None else None
                await self._publisher.publish_step(step, frame)
            except Exception as error:  # a task boundary: the map is as it was
                self._report(error, item.frame, consequence=f"{item.frame.name} has no pose")
        else:
            await self._publisher.publish_events()
        if item.is_settled:
            await self._writer.schedule(
                functools.partial(self._recorder.frame_tracked, item.frame.frame_id),
                then=functools.partial(self._frames.give_back, item.frame),
            )

    async def _map(self, item: MappingItem, keyframe: Keyframe) -> None:
        """Matches a keyframe and adds it to the map."""
        decided = self._log.decided_posing(keyframe.frame_id)
        self._num_posed = adding = 0
        to_match, beginning = await self._posing_ahead(
            self._begin(item, keyframe),
            item,
            num_decided=None if decided is None else decided.num_posed_beginning,
        )
        if to_match is None:
            if self._pairs_ahead is not None:
                self._pairs_ahead.keyframe_dropped(keyframe.frame_id)
        else:
            matched = await self._match(item, to_match)
            self._end_ahead(matched)
            references, adding = await self._posing_ahead(
                self._add_and_publish(item, matched),
                item,
                num_decided=None if decided is None else decided.num_posed_adding,
            )
            # Not before: a replay, whose timing is another, poses the same frames by the same ones.
            self._ahead.take(references)
        await self._log.mapped(
            MappingDecision(
                frame_id=keyframe.frame_id,
                merged=self._merged,
                num_readings=self._num_readings,
                num_posed=self._num_posed,
                num_posed_beginning=beginning,
                num_posed_adding=adding,
            )
        )

    def _end_ahead(self, matched: MatchedKeyframe) -> None:
        """Ends what was begun for a keyframe before its turn."""
        if self._pairs_ahead is not None:
            pairs = [verified.pair for verified in matched.pairs]
            self._pairs_ahead.keyframe_matched(matched.frame_id, [*pairs, *matched.tried_pairs])

    async def _posing_ahead(
        self, work: Coroutine[Any, Any, Result], item: MappingItem, *, num_decided: int | None
    ) -> tuple[Result, int]:
        """Awaits what keeps the mapper busy, and poses live frames that come meanwhile.

        They stay in the queue, those behind a keyframe that waits, too: the mapper gets them later.
        As many are looked at as may wait there, so that frames do not pile up behind a busy mapper.

        Args:
            work: what is awaited.
            item: the keyframe.
            num_decided: items that the run to be repeated looked at; None: it is none.

        Returns:
            What the work returns, and how many items were looked at.
        """
        working = asyncio.create_task(work, name="mapping a keyframe")
        ahead: list[MappingItem] = []
        try:
            while later := await self._look_ahead(
                working, item, num_looked_at=len(ahead), num_decided=num_decided
            ):
                ahead.append(later)
                await self._pose_ahead(later)
        finally:
            await asyncio.wait((working,))
            self._items.put_back(ahead)
        return await working, len(ahead)

    async def _look_ahead(
        self,
        working: asyncio.Task[Any],
        item: MappingItem,
        *,
        num_looked_at: int,
        num_decided: int | None,
    ) -> MappingItem | None:
        """The next item to be looked at while a keyframe is worked on; None: no further one."""
        if num_decided is not None:
            if num_looked_at >= num_decided:
                return None
            with self._frames.without_limit():  # of which this one holds some
                return await self._items.look_ahead()
        if not item.is_live or working.done() or num_looked_at >= self._items.max_waiting:
            return None
        return await self._items.look_ahead_until(working)

    async def _pose_ahead(self, item: MappingItem) -> None:
        """Publishes the pose of a frame by the keyframes as they were last, if it has none."""
        if item.tracked is None or item.frame.frame_id in self._reported:
            return
        try:
            posed = await run_in(
                self._matching_thread, self._ahead.pose, item.tracked, fallback=item.fallback
            )
        except Exception as error:  # a task boundary: the mapper poses it soon
            self._report(error, item.frame, consequence=f"{item.frame.name} gets its pose later")
            return
        if posed is None:
            return
        pose, camera_key = posed
        received_at_s = item.tracked.received_at_s
        event = posed_event(pose, camera_key=camera_key, received_at_s=received_at_s, is_first=True)
        self._reported[pose.frame_id] = pose
        await self._publisher.publish_pose(pose, event, item.frame)

    async def _add_and_publish(
        self, item: MappingItem, matched: MatchedKeyframe
    ) -> tuple[PosingReference, ...]:
        """Adds a keyframe that was matched to the map, and what follows from it.

        Returns:
            What frames are posed by from then on.
        """
        step = await self._add(item, matched)
        if step.record is not None:
            await self._writer.schedule(
                functools.partial(self._recorder.step_taken, step, item.frame),
                then=functools.partial(self._frames.give_back, item.frame),
            )
        self._due = step.due
        self._has_map = step.counts.has_map
        await self._jobs.start(step.jobs)
        await self._snapshots.write_if_due(step.counts)
        await self._publisher.publish_step(step, item.frame)
        if step.counts.num_registered:
            self._dense.keyframe_mapped()
        return step.references

    async def _begin(self, item: MappingItem, keyframe: Keyframe) -> KeyframeToMatch | None:
        """Merges what is due and adds the keyframe to the graph; None: it cannot be added."""
        finished = await self._finished_jobs(item, keyframe.frame_id)
        try:
            to_match = await self._mapper.call(Mapper.begin_keyframe, keyframe, finished)
        except Exception as error:  # a task boundary: the map is built anew, if it may be broken
            if not (isinstance(error, MapError) and not finished):
                step = await self._rebuild(error, item.frame)
                await self._publisher.publish_step(step)
            return await self._begin_again(item, keyframe)
        if finished:
            await self._writer.schedule(return_free_memory)
        return to_match

    async def _begin_again(self, item: MappingItem, keyframe: Keyframe) -> KeyframeToMatch | None:
        try:
            return await self._mapper.call(Mapper.begin_keyframe, keyframe)
        except MapError as error:
            self._report(error, item.frame, consequence=f"{item.frame.name} is left out")
            await self._drop(item.frame, DropReason.FAILED, str(error))
            return None

    async def _match(self, item: MappingItem, to_match: KeyframeToMatch) -> MatchedKeyframe:
        matching = asyncio.create_task(
            run_in(
                self._matching_thread,
                self._matching.match_keyframe,
                to_match.frame_id,
                wants_pointmaps=to_match.wants_pointmaps,
                intrinsics=to_match.intrinsics,
                lost_ids=to_match.lost_ids,
            ),
            name="matching",
        )
        try:
            await self._pose_meanwhile(item, matching)
        finally:
            await asyncio.wait((matching,))  # what saves a map that broke off reads the graph
        try:
            return await matching
        except Exception as error:  # a task boundary: the keyframe has the pairs found until then
            self._report(
                error,
                item.frame,
                part=RunPart.MATCHING,
                consequence="some of its pairs are missing",
            )
            return await run_in(
                self._matching_thread,
                self._matching.give_up,
                to_match.frame_id,
                failure=cause_of(error),
            )

    async def _finished_jobs(self, item: MappingItem, keyframe_id: FrameId) -> list[FinishedJob]:
        """Results to be merged before a keyframe: all that are due, of live runs those there are.

        A run that repeats another one merges what that one did.
        """
        decided = self._log.decided(keyframe_id, due=[job.kind.value for job in self._due])
        if decided is None:
            finished = await self._jobs.finished(self._due, wait=not item.is_live)
        else:
            due = [job for job in self._due if job.kind.value in decided.merged]
            finished = await self._jobs.finished(due, wait=True)
        self._merged = tuple(one.job.kind.value for one in finished)
        self._decided = decided
        num_readings = None if decided is None else decided.num_readings
        self._num_readings = self._positions.give_to_map(num_readings)
        return finished

    async def _pose_meanwhile(
        self, item: MappingItem, matching: asyncio.Task[MatchedKeyframe]
    ) -> None:
        """Poses frames that come while a keyframe of a live run is matched."""
        decided = self._decided
        while later := (
            await self._items.get_tracked_until(matching)
            if decided is None and item.is_live
            else await self._next_tracked()
            if decided is not None and self._num_posed < decided.num_posed
            else None
        ):
            # The scene graph is with the thread that matches: a view would read it.
            await self._pose(later, wants_view=False)
            self._num_posed += 1

    async def _next_tracked(self) -> MappingItem | None:
        """The next frame of a replay, which the recorded run had by then."""
        with self._frames.without_limit():
            return await self._items.get_tracked()

    async def _add(self, item: MappingItem, matched: MatchedKeyframe) -> MappingStep:
        try:
            return await self._mapper.call(
                Mapper.add_keyframe,
                matched,
                wants_view=self._publisher.wants_view,
                wants_references=item.is_live or self._decided is not None,
            )
        except Exception as error:  # a task boundary: what it left half changed is built anew
            return await self._rebuild_with(item, matched.frame_id, error)

    async def _rebuild_with(
        self, item: MappingItem, frame_id: FrameId, error: Exception
    ) -> MappingStep:
        """Builds the map anew with a keyframe; where that breaks it is journaled all the same.

        Raises:
            Exception: the map cannot be built.
        """
        try:
            return await self._rebuild(error, item.frame, frame_id=frame_id)
        except Exception:
            step = await self._mapper.call(Mapper.last_step, frame_id)
            await self._writer.schedule(
                functools.partial(self._recorder.step_taken, step, item.frame),
                then=functools.partial(self._frames.give_back, item.frame),
            )
            raise

    async def _rebuild(
        self, error: Exception, frame: Frame, *, frame_id: FrameId | None = None
    ) -> MappingStep:
        """Builds the map anew after a call that may have left it half changed.

        Where that breaks too, it is built without the pairs of the newest keyframe.

        Args:
            error: what the call raised.
            frame: the newest one.
            frame_id: its keyframe, where it was added and matched.

        Raises:
            Exception: the map cannot be built, or was built anew often enough.
        """
        if not self._num_rebuilds_left:
            self._report(error, frame, consequence="the run ends and saves the map")
            raise error
        self._num_rebuilds_left -= 1
        self._due = ()
        await self._jobs.abandon_all()
        self._report(error, frame, consequence="the map is built anew from keyframes and pairs")
        try:
            return await self._mapper.call(Mapper.rebuild, frame_id)
        except Exception as second:  # a task boundary: the newest keyframe may be what breaks it
            consequence = f"the map is built anew without the pairs of {frame.name}"
            self._report(second, frame, consequence=consequence)
            return await self._mapper.call(Mapper.rebuild, frame_id, without_its_pairs=True)

    def _report(
        self, error: Exception, frame: Frame, *, consequence: str, part: RunPart = RunPart.MAPPING
    ) -> None:
        self._faults.report(part, error, consequence=consequence, frame_id=frame.frame_id)
