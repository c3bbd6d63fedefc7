"""From the sources to tracking: reads them, decodes what is taken, and records what is not."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from engine.config import LiveSourcesConfig
from engine.errors import HangError, SourceError
from engine.events import ALSO_AN_EVENT, FrameReceived, RunPart, SourceChanged
from engine.geo.usable_fixes import usable_fix
from engine.mapping.stored_state import StoredRun
from engine.output.recorder import Recorder
from engine.ports import (
    AcceptsFrames,
    ArrivalSink,
    CameraCalibrations,
    CameraMasks,
    FrameSource,
    LiveSource,
    Source,
)
from engine.run.event_loop import run_in
from engine.run.faults import Faults, Guard, cause_of
from engine.run.input_log import InputLog
from engine.run.masking import Masking
from engine.run.positions import Positions
from engine.run.queues import ArrivalQueue, EventQueue, Queued, Writer
from engine.types import (
    Arrival,
    DropReason,
    Frame,
    GpsFix,
    GpsReading,
    Received,
    RejectedFrame,
    SourceNotice,
    SourceState,
    TakenFrames,
)

logger = logging.getLogger(__name__)

_MAX_CLOSE_S = 10.0  # of a source that is to stop
_UNREAD = "the run took no more before its turn"
_MAX_TRIES = 5  # to receive a live source that breaks, without a frame between them

Item = TypeVar("Item")
Named = TypeVar("Named", Frame, RejectedFrame)


_NOTHING_TAKEN = TakenFrames(names={}, captured_at_s={})


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRole:
    """What a source is called in a run, and what of it the run has already."""

    label: str  # of its frames; another one than its own where it goes on under another path
    prefix: str = ""  # of its frames' names and its cameras' keys; "": none
    address: str = ""  # that opens it again; "": none that may be kept
    recording: str = ""  # folder where what it sends is kept; "": it is not kept
    taken: TakenFrames = _NOTHING_TAKEN
    part: int = 1  # of the run; frames of live sources have it in their names from 2 on

    def with_address(self, address: str) -> SourceRole:
        """The same with what opens the source again."""
        return replace(self, address=address)

    def with_recording(self, folder: str) -> SourceRole:
        """The same with where what the source sends is kept."""
        return replace(self, recording=folder)

    @classmethod
    def of_all(cls, sources: Sequence[Source]) -> list[SourceRole]:
        """The roles of the sources of a new run: several have prefixes."""
        prefixes = [f"source{number + 1}" for number in range(len(sources))]
        return [
            cls(label=source.info.label, prefix=prefix if len(sources) > 1 else "")
            for source, prefix in zip(sources, prefixes, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodedFrame:
    """A frame that is ready for tracking, and the source it came from."""

    frame: Frame
    source_idx: int
    is_live: bool = False
    has_many_cameras: bool = False  # of which each has its own lane

    @property
    def lane(self) -> tuple[int, str]:
        """Frames of one lane follow each other: those of a source, or of one of its cameras."""
        return self.source_idx, self.frame.camera_key if self.has_many_cameras else ""


class Ingestion:
    """Reads the sources of a run into its queue, and decodes what tracking takes from there.

    Args:
        sources: each is a camera of its own.
        roles: of each source.
        queue: where arrivals wait; it alone decides what is dropped.
        decoding_thread: runs one call at a time.
        recorder: writes a row of every frame; called through the writer.
        writer: runs writes in order.
        events: takes the events.
        publish: publishes them; called where no frame follows that would do it.
        faults: takes what sources and decoding raise.
        decoding: guards calls that decode.
        retry: waits between the tries to read a live source that broke.
        log: keeps what arrives.
        positions: get what comes beside the frames.
        max_frames: readable frames after which a source ends; 0: never.
        masks: of whole cameras; None: there are none.
        calibrations: those that the user gave.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        roles: Sequence[SourceRole],
        queue: ArrivalQueue,
        decoding_thread: Executor,
        recorder: Recorder,
        writer: Writer,
        events: EventQueue,
        publish: Callable[[], Awaitable[None]],
        faults: Faults,
        decoding: Guard,
        retry: LiveSourcesConfig,
        log: InputLog,
        positions: Positions,
        max_frames: int = 0,
        masks: CameraMasks | None = None,
        calibrations: CameraCalibrations | None = None,
    ) -> None:
        self._sources = sources
        self._roles = roles
        self._log = log
        self._positions = positions
        self._queue = queue
        self._decoding_thread = decoding_thread
        self._recorder = recorder
        self._writer = writer
        self._events = events
        self._publish = publish
        self._faults = faults
        self._decoding = decoding
        self._retry = retry
        self._max_frames = max_frames
        self._masking = Masking(masks, warn=events.warn)
        self._calibrations = calibrations
        self._num_frames = [len(role.taken.names) for role in roles]
        self._unopened: list[str] = []
        self._num_impossible = 0  # positions or altitudes, of frames and beside them
        # Cameras and times of readings that files give again from their start.
        self._former_readings: list[set[tuple[str | None, float]]] = [set() for _ in roles]
        self._stops = [asyncio.Event() for _ in sources]
        self._may_read = asyncio.Event()
        self._may_read.set()
        self._ahead: asyncio.Task[DecodedFrame | None] | None = None

    def take_former(self, stored: StoredRun) -> None:
        """Takes the cameras and positions of former parts of the run, of sources that go on."""
        for one in stored.keyframes:
            camera_key = one.keyframe.camera_key
            for source_idx, role in enumerate(self._roles):
                start = f"{role.prefix}|" if role.prefix else ""
                if one.source == role.label and camera_key.startswith(start):
                    own_key = camera_key.removeprefix(start)
                    self._positions.add_camera(camera_key, source_idx=source_idx, own_key=own_key)
        for reading in stored.gps_readings:
            for source_idx, role in enumerate(self._roles):
                if reading.source == role.label:
                    self._positions.add(source_idx, reading)
                    known = (reading.camera_key, reading.captured_at_s)
                    self._former_readings[source_idx].add(known)
        self._positions.give_to_map()

    # -- control ----------------------------------------------------------------------------------

    def stop(self) -> None:
        """Takes nothing new from now on; frames that arrived still go their way."""
        for stop in self._stops:
            stop.set()
        self._may_read.set()

    def pause(self) -> None:
        """Takes no frames for now: a file waits, frames of live sources are dropped and counted."""
        if not all(stop.is_set() for stop in self._stops):
            self._may_read.clear()
            self._queue.pause()

    def resume(self) -> None:
        """Takes frames again."""
        self._may_read.set()
        self._queue.resume()

    @property
    def unopened(self) -> tuple[str, ...]:
        """Labels of the sources that failed before their first frame."""
        return tuple(self._unopened)

    # -- reading ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Reads all sources to their ends, or until stopped."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._report(), name="reports of live sources")
                reading = [
                    group.create_task(self._read(source_idx), name=f"source {source.info.label}")
                    for source_idx, source in enumerate(self._sources)
                ]
                await asyncio.wait(reading)
                self._queue.end_reports()
        finally:
            self._queue.end_reports()
            await self._report()

    async def _read(self, source_idx: int) -> None:
        """Reads one source; when it cannot be read, that is reported and the others go on."""
        source = self._sources[source_idx]
        try:
            if 0 < self._max_frames <= self._num_frames[source_idx]:
                return  # a former part of the run took them
            if isinstance(source, LiveSource):
                await self._receive_until_it_ends(source, source_idx)
            else:
                await self._read_frames(source, source_idx)
        except SourceError as error:
            if self._num_frames[source_idx] == len(self._roles[source_idx].taken.names):
                self._unopened.append(source.info.label)
            self._refused(error)
            await self._publish()
        except Exception as error:  # a task boundary: what was read before is mapped
            await self._source_failed(error, source_idx, consequence="it ends; others go on")
        finally:
            self._queue.close(source_idx)

    async def _source_failed(self, error: Exception, source_idx: int, *, consequence: str) -> None:
        consequence = f"{self._sources[source_idx].info.label}: {consequence}"
        self._faults.report(RunPart.SOURCE, error, consequence=consequence)
        await self._publish()

    def _refused(self, error: SourceError) -> None:
        """Reports why a source ends: it broke nothing, and its error names it."""
        self._warn_all([str(error)])
        self._faults.end_if_strict(RunPart.SOURCE, error)

    async def _receive_until_it_ends(self, source: LiveSource, source_idx: int) -> None:
        """Receives a live source; after an unexpected error it is tried again, some times.

        Raises:
            Exception: the last of several errors in a row without a frame between them.
        """
        sink = self._queue.sink(source_idx)
        pause_s, num_tries, num_frames = self._retry.retry_first_s, 0, 0
        while True:
            try:
                return await self._receive(source, source_idx, sink=sink)
            except SourceError:
                raise
            except Exception as error:  # a task boundary
                if self._num_frames[source_idx] > num_frames:  # it had worked
                    pause_s, num_tries = self._retry.retry_first_s, 0
                    num_frames = self._num_frames[source_idx]
                num_tries += 1
                if num_tries >= _MAX_TRIES or self._stops[source_idx].is_set():
                    raise
                await self._source_failed(error, source_idx, consequence="it is tried again")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stops[source_idx].wait(), pause_s)
            pause_s = min(2 * pause_s, self._retry.retry_max_s)

    async def _receive(self, source: LiveSource, source_idx: int, *, sink: ArrivalSink) -> None:
        receiving = asyncio.create_task(source.receive(sink), name=f"receive {source.info.label}")
        stopping = asyncio.create_task(self._stops[source_idx].wait(), name="stopping")
        try:
            await asyncio.wait((receiving, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            receiving.cancel()
            await asyncio.wait((receiving,), timeout=_MAX_CLOSE_S)
        if not receiving.done():
            raise HangError(f"has not closed after {_MAX_CLOSE_S:g} s")
        if not receiving.cancelled():
            receiving.result()  # what broke it, if anything did

    async def _read_frames(self, source: FrameSource, source_idx: int) -> None:
        arriving = until_stopped(source.frames(), self._stops[source_idx])
        async with aclosing(arriving) as items:
            async for item in items:
                if self._was_taken(item, source_idx):
                    continue
                await self._may_read.wait()
                if not await self._queue.put(source_idx, item):
                    await self._count_unread(source_idx, [item])
        if isinstance(source, AcceptsFrames):
            await self._count_unread(source_idx, source.take_unread())

    async def _count_unread(self, source_idx: int, items: Sequence[Received]) -> None:
        """Counts frames that a source has accepted, and that the run does not take any more."""
        if not isinstance(self._sources[source_idx], AcceptsFrames):
            return  # files that are not read lose nothing
        for item in items:
            if isinstance(item, Arrival):
                item = item.rejected(DropReason.STOPPED, _UNREAD)  # noqa: PLW2901
            await self._take_in(item, source_idx)

    def _was_taken(self, item: Received, source_idx: int) -> bool:
        """Whether a former part of the run has the frame."""
        if not isinstance(item, Arrival | RejectedFrame):
            return False
        return item.index in self._roles[source_idx].taken.names

    async def _report(self) -> None:
        """Records what live sources report beside their frames, until they have ended."""
        while (report := await self._queue.next_report()) is not None:
            source_idx, item = report
            await self._take_in(item, source_idx)

    # -- decoding ---------------------------------------------------------------------------------

    async def next_frame(self) -> DecodedFrame | None:
        """Decodes the oldest arrival as soon as there is one; None after the last.

        A file's next frame is decoded meanwhile, until it is asked for.
        """
        taken = await self._take_ahead() or await self._take()
        if taken is None:
            self._masking.report()
            await self._report_unused_calibrations()
            await self._report_impossible()
        elif not taken.is_live:
            self._ahead = asyncio.create_task(self._take(is_ahead=True), name="decoding ahead")
        return taken

    async def _take_ahead(self) -> DecodedFrame | None:
        """The frame that was decoded ahead; None where there is none."""
        ahead, self._ahead = self._ahead, None
        return None if ahead is None else await ahead

    async def _take(self, *, is_ahead: bool = False) -> DecodedFrame | None:
        """The next readable frame; ahead only if it is one that can wait and is there."""
        while queued := self._queue.get_ahead() if is_ahead else await self._queue.get():
            if not isinstance(queued.item, Arrival):
                await self._take_in(queued.item, queued.source_idx)
            elif (frame := await self._decode(queued, queued.item)) is not None:
                info = self._sources[queued.source_idx].info
                return DecodedFrame(
                    frame=frame,
                    source_idx=queued.source_idx,
                    is_live=queued.is_live,
                    has_many_cameras=queued.is_live or info.has_many_cameras,
                )
        return None

    async def _decode(self, queued: Queued, arrival: Arrival) -> Frame | None:
        decoded: Frame | RejectedFrame
        try:
            decoded = await run_in(self._decoding_thread, self._decoding.call, arrival.decode)
        except asyncio.CancelledError:
            self._queue.put_back(queued)
            raise
        except Exception as error:  # a task boundary: one frame is lost
            consequence = f"{arrival.name} is dropped"
            self._faults.report(RunPart.DECODING, error, consequence=consequence)
            decoded = arrival.rejected(DropReason.FAILED, cause_of(error))
        if isinstance(decoded, RejectedFrame):
            await self._reject(queued, decoded)
            return None
        await self._take_readings()
        frame = self._named(self._with_fix(decoded, queued.source_idx), queued.source_idx)
        masked = await self._masked(frame, queued.source_idx)
        if isinstance(masked, SourceError):
            await self._reject(queued, arrival.rejected(DropReason.BAD_MASK, str(masked)))
            return None
        frame = self._calibrated(masked)
        self._positions.add_camera(
            frame.camera_key, source_idx=queued.source_idx, own_key=decoded.camera_key
        )
        if self._log.is_recording:
            await self._log.frame(
                self._as_given(frame, decoded, queued.source_idx), source_idx=queued.source_idx
            )
        self._queue.add_frame(queued, frame)
        await self._writer.schedule(functools.partial(self._recorder.frame_arrived, frame))
        self._events(
            FrameReceived(
                frame_id=frame.frame_id,
                index=frame.index,
                captured_at_s=frame.captured_at_s,
                name=frame.name,
            )
        )
        self._num_frames[queued.source_idx] += 1
        if self._num_frames[queued.source_idx] == self._max_frames:
            await self._end_source(queued.source_idx)
        return frame

    async def _reject(self, queued: Queued, rejected: RejectedFrame) -> None:
        if not self._queue.reject(queued, rejected):
            await self._take_in(rejected, queued.source_idx)

    async def _masked(self, frame: Frame, source_idx: int) -> Frame | SourceError:
        """The frame with its camera's mask, or why that does not fit.

        A source whose first frame it does not fit ends: none of its frames is what was asked for.
        """
        try:
            return self._masking.masked(frame)
        except SourceError as error:
            if not self._num_frames[source_idx]:
                self._refused(error)
                await self._count_unread(source_idx, self._discard_source(source_idx))
            return error

    def _discard_source(self, source_idx: int) -> list[Received]:
        """Takes nothing more of a source, nor what of it waits; returns that."""
        self._stops[source_idx].set()
        self._queue.close(source_idx)
        return [queued.item for queued in self._queue.discard(source_idx)]

    async def _end_source(self, source_idx: int) -> None:
        """Ends a source that has given as many frames as configured."""
        await self._count_unread(source_idx, self._discard_source(source_idx))
        info = self._sources[source_idx].info
        if info.num_frames is None:  # else its end was known
            detail = f"{self._max_frames} frames were taken, as configured"
            notice = SourceNotice(source=info.label, state=SourceState.ENDED, detail=detail)
            await self._take_in(notice, source_idx)

    # -- recording --------------------------------------------------------------------------------

    async def drop(self, frame: Frame, *, reason: DropReason, detail: str) -> None:
        """Counts and records a frame that was decoded and is not used."""
        self._events.frame_dropped(frame, reason=reason, detail=detail)
        await self._writer.schedule(
            functools.partial(self._recorder.frame_dropped, frame.frame_id, reason)
        )

    async def drop_waiting(self, *, detail: str) -> None:
        """Counts and records what waits and will not have its turn any more."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            await asyncio.wait((ahead,))
            if not ahead.cancelled() and isinstance(error := ahead.exception(), Exception):
                self._faults.report(RunPart.DECODING, error, consequence="a frame is dropped")
        for queued in self._queue.take_waiting():
            if isinstance(queued.item, Arrival):
                rejected = queued.item.rejected(DropReason.STOPPED, detail)
                await self._take_in(rejected, queued.source_idx)

    async def _take_in(
        self, item: GpsReading | RejectedFrame | SourceNotice, source_idx: int
    ) -> None:
        await self._log.report(item, source_idx=source_idx)
        match item:
            case SourceNotice():
                await self._take_in_notice(item)
            case GpsReading():
                await self._take_in_reading(item, source_idx)
            case RejectedFrame():
                rejected = self._named(item, source_idx)
                await self._writer.schedule(
                    functools.partial(self._recorder.frame_arrived, rejected)
                )
                self._events.frame_rejected(rejected)
                await self._publish()

    async def _take_in_reading(self, reading: GpsReading, source_idx: int) -> None:
        known = self._former_readings[source_idx]
        is_live = self._sources[source_idx].info.is_live  # its times may come twice
        if not is_live and (reading.camera_key, reading.captured_at_s) in known:
            return
        self._usable(reading.fix)  # the tracks take what can be
        self._positions.add(source_idx, reading)
        named = replace(reading, source=self._roles[source_idx].label)
        await self._writer.schedule(functools.partial(self._recorder.gps_reading, named))

    async def _take_in_notice(self, notice: SourceNotice) -> None:
        is_bad = notice.state in (SourceState.LOST, SourceState.REFUSED)
        is_bad |= any(one.is_missed for one in notice.left_out)
        level = logging.WARNING if is_bad else logging.INFO
        words = f"{notice.source}: {notice.state.value}: {notice.detail}"
        logger.log(level, "%s", words, extra=ALSO_AN_EVENT)
        self._events(
            SourceChanged(
                source=notice.source,
                state=notice.state,
                detail=notice.detail,
                left_out=notice.left_out,
            )
        )
        await self._publish()

    # -- positions --------------------------------------------------------------------------------

    async def _take_readings(self) -> None:
        for source_idx, reading in self._queue.take_readings():
            await self._take_in(reading, source_idx)

    def _with_fix(self, frame: Frame, source_idx: int) -> Frame:
        """The frame with the position that came beside it, unless it has one of its own."""
        if frame.gps is not None:
            usable = self._usable(frame.gps)
            if usable is not None:
                return frame if usable is frame.gps else replace(frame, gps=usable)
            frame = replace(frame, gps=None, gps_problem="a position that cannot be")
        fix = self._positions.of_frame(source_idx, frame.camera_key, frame.captured_at_s)
        return frame if fix is None else replace(frame, gps=replace(fix, is_provisional=True))

    def _usable(self, fix: GpsFix) -> GpsFix | None:
        """What can be of a fix, see `usable_fix`; counts those that are not used as they are."""
        usable = usable_fix(fix)
        self._num_impossible += usable is not fix
        return usable

    async def _report_impossible(self) -> None:
        if self._num_impossible:
            self._warn_all(
                [
                    f"{self._num_impossible} positions are not used, or without their altitudes,"
                    " as these are not on Earth"
                ]
            )
            self._num_impossible = 0
            await self._publish()

    # -- calibrations -----------------------------------------------------------------------------

    def _calibrated(self, frame: Frame) -> Frame:
        """The frame with the calibration that the user gave for its camera, if any."""
        if self._calibrations is None:
            return frame
        calibrated = self._calibrations.calibrated(frame)
        self._warn_all(self._calibrations.take_warnings())
        return calibrated

    async def _report_unused_calibrations(self) -> None:
        if self._calibrations is not None:
            self._warn_all(self._calibrations.unused())
            await self._publish()

    def _warn_all(self, messages: Sequence[str]) -> None:
        for message in messages:
            logger.warning("%s", message, extra=ALSO_AN_EVENT)
            self._events.warn(message)

    # -- names ------------------------------------------------------------------------------------

    def _as_given(self, frame: Frame, decoded: Frame, source_idx: int) -> Frame:
        """A frame under its source's names, with the mask and calibration that it got here."""
        prefix = self._roles[source_idx].prefix
        return replace(
            decoded,
            camera_key=frame.camera_key.removeprefix(f"{prefix}|") if prefix else frame.camera_key,
            mask=frame.mask,
            intrinsics_prior=frame.intrinsics_prior,
        )

    def _named(self, item: Named, source_idx: int) -> Named:
        """A frame under a name, an index and a camera's key that are unique in the run."""
        role = self._roles[source_idx]
        name, index = item.name, item.index
        if role.part > 1 and self._sources[source_idx].info.is_live:  # it counts from 0 again
            name, index = f"part{role.part}/{name}", index + role.taken.next_index
        if role.prefix:
            name = f"{role.prefix}/{name}"
        named = item
        if (name, index, role.label) != (item.name, item.index, item.source):
            named = replace(item, name=name, index=index, source=role.label)
        if isinstance(named, Frame) and role.prefix:
            return replace(named, camera_key=f"{role.prefix}|{named.camera_key}")
        return named


async def until_stopped(
    items: AsyncGenerator[Item, None], stop: asyncio.Event
) -> AsyncGenerator[Item, None]:
    """Yields ``items`` to their end or until ``stop`` is set, then closes them.

    Only waiting for the next item is interrupted, so an item that arrived is never lost.

    Raises:
        HangError: what gives the items does not stop, and is left behind.
    """
    stopping = asyncio.create_task(stop.wait(), name="stopping")
    does_stop = True
    try:
        while not stop.is_set():
            arriving = asyncio.create_task(_step(items), name="next frame")
            try:
                await asyncio.wait((arriving, stopping), return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not arriving.done():
                    arriving.cancel()
                    await asyncio.wait((arriving,), timeout=_MAX_CLOSE_S)
                does_stop = arriving.done()
            if not does_stop:
                raise HangError(f"has not closed after {_MAX_CLOSE_S:g} s")
            if arriving.cancelled() or not (arrived := arriving.result()):
                return
            yield arrived[0]
    finally:
        stopping.cancel()
        if does_stop:
            await items.aclose()


async def _step(items: AsyncGenerator[Item, None]) -> tuple[Item] | None:
    """The next item, or None after the last."""
    try:
        return (await anext(items),)
    except StopAsyncIteration:
        return None
