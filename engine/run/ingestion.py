"""Frames from the sources to tracking: who waits, what is dropped, how much memory they take."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypeVar

from engine.errors import SourceError
from engine.events import FrameReceived, SourceChanged
from engine.geo.gps_tracks import GpsTracks
from engine.output.recorder import Recorder
from engine.ports import FrameSource
from engine.run.queues import EventQueue, Writer
from engine.types import (
    DropReason,
    Frame,
    FrameId,
    GpsFix,
    GpsReading,
    Received,
    RejectedFrame,
    SourceNotice,
    SourceState,
)

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Named = TypeVar("Named", Frame, RejectedFrame)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arrival:
    """A frame and the source it came from."""

    frame: Frame
    source_idx: int
    is_live: bool = False

    @property
    def lane(self) -> tuple[int, str]:
        """Frames of one lane follow each other: those of a source, or of a live source's camera."""
        return self.source_idx, self.frame.camera_key if self.is_live else ""


class FrameQueue:
    """Frames that wait for tracking, oldest first, and the memory of all frames in the engine.

    Every source, and every camera of a live one, has places of its own, so that none takes
    another's. A frame's pixels count from its arrival until it is given back; a lone frame always
    passes. For the event loop only.
    """

    def __init__(self, *, max_waiting: int, max_bytes: int) -> None:
        """Makes an empty queue.

        Args:
            max_waiting: frames of one lane that may wait.
            max_bytes: pixels of all frames between their arrival and their being given back.
        """
        self._max_waiting = max_waiting
        self._max_bytes = max_bytes
        self._waiting: deque[Arrival] = deque()
        self._in_engine: dict[FrameId, Frame] = {}
        self._used_bytes = 0
        self._has_ended = False
        self._changed = asyncio.Condition()

    @property
    def frames_in_engine(self) -> list[Frame]:
        """Frames that were put in and neither dropped nor given back, in order of arrival."""
        return list(self._in_engine.values())

    @property
    def used_bytes(self) -> int:
        """Pixels of the frames that were put in and neither dropped nor given back."""
        return self._used_bytes

    async def put(self, arrival: Arrival) -> None:
        """Adds a frame when there is room for it."""
        self._in_engine[arrival.frame.frame_id] = arrival.frame
        async with self._changed:
            await self._changed.wait_for(lambda: self._has_room(arrival))
            self._add(arrival)

    async def put_newest(self, arrival: Arrival) -> list[Frame]:
        """Adds a frame at once, in the place of older ones of its lane if need be.

        Returns:
            The frames dropped for it, or the frame itself where older ones would not make room.
        """
        dropped: list[Frame] = []
        async with self._changed:
            while not self._has_room(arrival):
                oldest = self._oldest_of(arrival.lane)
                if oldest is None:
                    return [*dropped, arrival.frame]
                self._waiting.remove(oldest)
                self._leave(oldest.frame)
                dropped.append(oldest.frame)
            self._in_engine[arrival.frame.frame_id] = arrival.frame
            self._add(arrival)
        return dropped

    async def get(self) -> Arrival | None:
        """Takes the oldest frame as soon as there is one; None after the last."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._waiting or self._has_ended)
            if not self._waiting:
                return None
            self._changed.notify_all()
            return self._waiting.popleft()

    async def give_back(self, frame: Frame) -> None:
        """Frees the memory of a frame that left the engine."""
        async with self._changed:
            self._leave(frame)
            self._changed.notify_all()

    async def end(self) -> None:
        """Says that no frame will come, or be taken, any more; what is put in later stays out."""
        async with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def _has_room(self, arrival: Arrival) -> bool:
        num_waiting = sum(other.lane == arrival.lane for other in self._waiting)
        wanted_bytes = self._used_bytes + arrival.frame.pixels.nbytes
        fits = wanted_bytes <= self._max_bytes or self._used_bytes == 0
        return self._has_ended or (fits and num_waiting < self._max_waiting)

    def _oldest_of(self, lane: tuple[int, str]) -> Arrival | None:
        return next((other for other in self._waiting if other.lane == lane), None)

    def _add(self, arrival: Arrival) -> None:
        if self._has_ended:
            return
        self._waiting.append(arrival)
        self._used_bytes += arrival.frame.pixels.nbytes
        self._changed.notify_all()

    def _leave(self, frame: Frame) -> None:
        del self._in_engine[frame.frame_id]
        self._used_bytes -= frame.pixels.nbytes


class Ingestion:
    """Reads the sources of a run into its queue of frames.

    A file's frame waits for room; a live source's frame takes the place of an older one, which is
    dropped and counted.

    Args:
        sources: each is a camera of its own.
        queue: where frames go.
        recorder: told of every frame, through the writer.
        writer: runs writes in order.
        events: takes facts.
        tell: passes facts on; called where no frame follows that would bring it about.
        max_gps_gap_s: positions farther apart in time are not interpolated.
    """

    def __init__(
        self,
        sources: Sequence[FrameSource],
        *,
        queue: FrameQueue,
        recorder: Recorder,
        writer: Writer,
        events: EventQueue,
        tell: Callable[[], Awaitable[None]],
        max_gps_gap_s: float,
    ) -> None:
        self._sources = sources
        self._positions = [GpsTracks(max_gap_s=max_gps_gap_s) for _ in sources]
        self._source_of_camera: dict[str, tuple[int, str]] = {}  # and its key there
        self._queue = queue
        self._recorder = recorder
        self._writer = writer
        self._events = events
        self._tell = tell
        self._stop = asyncio.Event()
        self._may_read = asyncio.Event()
        self._may_read.set()

    def stop(self) -> None:
        """Takes nothing new from now on; frames that arrived still go their way."""
        self._stop.set()
        self._may_read.set()

    def pause(self) -> None:
        """Takes no frames for now: a file waits, frames of live sources are dropped and counted."""
        if not self._stop.is_set():
            self._may_read.clear()

    def resume(self) -> None:
        """Takes frames again."""
        self._may_read.set()

    def fix_at(self, camera_key: str, captured_at_s: float) -> GpsFix | None:
        """Where a camera was by what its source has told beside the frames until now."""
        if camera_key not in self._source_of_camera:
            return None
        source_idx, own_key = self._source_of_camera[camera_key]
        return self._positions[source_idx].fix_at(own_key, captured_at_s)

    async def run(self) -> None:
        """Reads all sources to their ends, or until stopped."""
        async with asyncio.TaskGroup() as group:
            for source_idx, source in enumerate(self._sources):
                group.create_task(self._read(source_idx), name=f"source {source.info.label}")

    async def drop(self, frame: Frame, *, reason: DropReason, detail: str) -> None:
        """Counts and records a frame that was taken in and is not used."""
        self._events.frame_dropped(frame, reason=reason, detail=detail)
        await self._writer.schedule(
            functools.partial(self._recorder.frame_dropped, frame.frame_id, reason)
        )

    async def _read(self, source_idx: int) -> None:
        """Reads one source; when it cannot be read, that is told and the others go on."""
        try:
            arriving = until_stopped(self._sources[source_idx].frames(), self._stop)
            async with aclosing(arriving) as frames:
                async for received in frames:
                    if not self._sources[source_idx].info.is_live:
                        await self._may_read.wait()
                    await self._take_in(received, source_idx=source_idx)
        except SourceError as error:
            logger.error("%s", error)
            self._events.warn(str(error))
            await self._tell()

    async def _take_in(self, received: Received, *, source_idx: int) -> None:
        match received:
            case SourceNotice():
                await self._tell_of_source(received)
            case GpsReading():
                self._positions[source_idx].add(received)
            case RejectedFrame():
                await self._take_in_rejected(self._named(received, source_idx))
            case Frame():
                await self._take_in_frame(received, source_idx=source_idx)

    async def _tell_of_source(self, notice: SourceNotice) -> None:
        is_bad = notice.state in (SourceState.LOST, SourceState.REFUSED)
        level = logging.WARNING if is_bad else logging.INFO
        logger.log(level, "%s: %s: %s", notice.source, notice.state.value, notice.detail)
        self._events(
            SourceChanged(
                source=notice.source,
                state=notice.state,
                detail=notice.detail,
            )
        )
        await self._tell()

    async def _take_in_rejected(self, rejected: RejectedFrame) -> None:
        await self._writer.schedule(functools.partial(self._recorder.frame_arrived, rejected))
        self._events.frame_dropped(rejected, reason=rejected.reason, detail=rejected.detail)
        await self._tell()

    async def _take_in_frame(self, received: Frame, *, source_idx: int) -> None:
        source = self._sources[source_idx]
        if received.gps is None:
            fix = self._positions[source_idx].fix_at(received.camera_key, received.captured_at_s)
            if fix is not None:
                received = replace(received, gps=replace(fix, is_provisional=True))
        frame = self._named(received, source_idx)
        self._source_of_camera[frame.camera_key] = source_idx, received.camera_key
        await self._writer.schedule(functools.partial(self._recorder.frame_arrived, frame))
        self._events(
            FrameReceived(
                frame_id=frame.frame_id,
                index=frame.index,
                captured_at_s=frame.captured_at_s,
            )
        )
        arrival = Arrival(frame=frame, source_idx=source_idx, is_live=source.info.is_live)
        if not source.info.is_live:
            await self._queue.put(arrival)
        elif not self._may_read.is_set():
            await self.drop(frame, reason=DropReason.PAUSED, detail="the run is paused")
            await self._tell()
        else:
            for dropped in await self._queue.put_newest(arrival):
                await self.drop(dropped, reason=DropReason.OVERLOAD, detail="the engine is behind")

    def _named(self, item: Named, source_idx: int) -> Named:
        return item if len(self._sources) == 1 else _of_source(item, source_idx)


def _of_source(frame: Named, source_idx: int) -> Named:
    """A frame under names that are unique among several sources."""
    source_name = f"source{source_idx + 1}"
    named = replace(frame, name=f"{source_name}/{frame.name}")
    if isinstance(named, Frame):
        return replace(named, camera_key=f"{source_name}|{named.camera_key}")
    return named


async def until_stopped(
    items: AsyncGenerator[Item, None], stop: asyncio.Event
) -> AsyncGenerator[Item, None]:
    """Yields ``items`` to their end or until ``stop`` is set, then closes them.

    Only waiting for the next item is interrupted, so an item that arrived is never lost.
    """
    stopping = asyncio.create_task(stop.wait(), name="stopping")
    try:
        async with aclosing(items):
            while not stop.is_set():
                arriving = asyncio.create_task(_step(items), name="next frame")
                try:
                    await asyncio.wait((arriving, stopping), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not arriving.done():
                        arriving.cancel()
                        await asyncio.wait((arriving,))
                if arriving.cancelled() or not (arrived := arriving.result()):
                    return
                yield arrived[0]
    finally:
        stopping.cancel()


async def _step(items: AsyncGenerator[Item, None]) -> tuple[Item] | None:
    """The next item, or None after the last."""
    try:
        return (await anext(items),)
    except StopAsyncIteration:
        return None
