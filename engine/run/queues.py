"""Every queue of a run: who waits, and what is dropped. This is the one place.

Arrivals from the sources to decoding (`ArrivalQueue`). What arrives waits undecoded until tracking
is ready for it. A lane is a source, or one camera of a live source.

- A source that can wait (a file) waits: ``put`` returns when its lane has a place and there is
  memory. Nothing of it is lost, and its items keep their order.
- A live source never waits: its sink returns at once, on any thread. An arrival takes the place of
  the oldest of its lane where the lane or the memory is full, so the newest wins and no lane takes
  another's place. Without an older one to replace, for memory or because too many lanes of its
  source wait already, it is dropped itself. While the run is paused every arrival is.
- What is taken is the oldest of all lanes. It is decoded after that, so what is dropped costs no
  decoding, and its pixels count until they are given back. Waiting arrivals and pixels share one
  limit of memory; a lone frame always passes, and one frame may exceed it, because its size in
  pixels is known only once it is decoded. A replay exceeds it where the recorded run had a frame
  that mapping waits for.
- Every drop is reported as a rejected frame, with its reason, and counted. Of a live source,
  notices, positions and rejected frames do not wait behind arrivals; so many of each are kept. When
  frames are rejected faster than anybody could read, one that is reported stands for those that are
  not listed (``num_frames``). Notices and positions beyond that number are forgotten, oldest first.

Nothing else stands between a thread that receives and the event loop: such a thread takes a lock,
adds, and wakes the loop unless it is about to wake already. So memory is bounded however late the
loop is.

Items from tracking to mapping (`MappingQueue`): tracking waits. Events (`EventQueue`): nothing
waits, nothing is dropped. Writes (`Writer`): whoever schedules one waits.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from engine.events import Event, FrameDropped, Warned
from engine.ports import ArrivalSink
from engine.run.event_loop import CallWatch, run_in
from engine.tracking.frame_tracker import NewKeyframe
from engine.types import (
    Arrival,
    DropReason,
    Frame,
    FrameId,
    GpsReading,
    Received,
    RejectedFrame,
    SourceNotice,
    TrackedFrame,
)

_MAX_WAITING_WRITES = 256
_MAX_WRITES_AT_A_TIME = 16  # that are handed to their thread together
_MAX_LISTED_HZ = 200.0  # rejected frames of a live source reported one by one; the rest in sums
_MAX_REJECTED = 1_000
_MAX_READINGS = 1_000
_MAX_NOTICES = 100

Result = TypeVar("Result")
Report = RejectedFrame | SourceNotice | GpsReading


def ignore_wait(wait_s: float) -> None:
    """Takes how long something waited, where nobody measures it."""
    del wait_s


# -- sources to decoding ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Queued:
    """An item that waits, and the source it came from."""

    item: Received
    source_idx: int
    is_live: bool
    since_s: float

    @property
    def lane(self) -> tuple[int, str]:
        """Items of one lane have their places together."""
        if self.is_live and isinstance(self.item, Arrival):
            return self.source_idx, self.item.lane
        return self.source_idx, ""

    @property
    def num_bytes(self) -> int:
        """The memory that it holds."""
        return self.item.num_bytes if isinstance(self.item, Arrival) else 0


class ArrivalQueue:
    """Items that wait, oldest first, and the memory of all frames on their way through the engine.

    For the event loop only, except for sinks.
    """

    def __init__(
        self,
        *,
        max_waiting: int,
        max_bytes: int,
        max_lanes: int,
        waited: Callable[[float], None] = ignore_wait,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes an empty queue.

        Args:
            max_waiting: items of one lane that may wait.
            max_bytes: of waiting arrivals, and of pixels until they are given back.
            max_lanes: of one live source whose arrivals may wait at the same time.
            waited: takes the seconds that each item waited, from when it was put.
            clock: seconds that never go back; limits how many rejected frames are listed.
        """
        self._max_waiting = max_waiting
        self._max_bytes = max_bytes
        self._max_lanes = max_lanes
        self._waited = waited
        self._clock = clock
        self._waiting: deque[Queued] = deque()
        self._reports: dict[int, _Reports] = {}  # of live sources
        self._closed: set[int] = set()  # sources
        self._frames: dict[FrameId, Frame] = {}
        self._arrival_bytes = 0  # of those that wait or are being decoded
        self._pixel_bytes = 0
        self._is_paused = False
        self._is_limited = True  # by the memory that is used
        self._has_ended = False
        self._is_broken_off = False
        self._have_reports_ended = False
        self._lock = threading.Lock()
        self._waiters: list[asyncio.Future[None]] = []
        self._is_waking = False

    @property
    def frames_in_engine(self) -> list[Frame]:
        """Frames that were decoded and not given back, in order of decoding."""
        return list(self._frames.values())

    @property
    def num_arrivals(self) -> int:
        """Arrivals that wait to be decoded."""
        return sum(isinstance(queued.item, Arrival) for queued in list(self._waiting))

    @property
    def used_bytes(self) -> int:
        """Memory of arrivals that wait or are decoded, and pixels that were not given back."""
        return self._arrival_bytes + self._pixel_bytes

    # -- what arrives -----------------------------------------------------------------------------

    async def put(self, source_idx: int, item: Received) -> bool:
        """Adds an item of a source that can wait, when there is room for it, or nothing is taken.

        Returns:
            Whether it was added; what a closed source puts in is forgotten.
        """
        queued = Queued(item=item, source_idx=source_idx, is_live=False, since_s=self._clock())

        def add() -> bool | None:
            if source_idx in self._closed:
                return False
            if not (self._is_broken_off or self._has_room(queued)):
                return None
            self._add(queued)
            return True

        return await self._until(add)

    def sink(self, source_idx: int) -> ArrivalSink:
        """Where a live source puts what it receives; for the running event loop."""
        self._reports[source_idx] = _Reports(clock=self._clock)
        loop = asyncio.get_running_loop()

        def offer(item: Received) -> None:
            with self._lock:
                is_late = source_idx in self._closed
                if is_late and not isinstance(item, GpsReading):  # of frames decoded later
                    return
                self._offer(source_idx, item)
                if self._is_waking:
                    return
                self._is_waking = True
            with suppress(RuntimeError):  # the loop has ended: nobody waits
                loop.call_soon_threadsafe(self._wake)

        return offer

    def pause(self) -> None:
        """Drops arrivals of live sources from here on."""
        self._is_paused = True

    def resume(self) -> None:
        """Takes arrivals of live sources again."""
        self._is_paused = False

    def close(self, source_idx: int) -> None:
        """Takes nothing more from a source; what waits is still taken."""
        with self._lock:
            self._closed.add(source_idx)
        self._wake()

    def discard(self, source_idx: int) -> list[Queued]:
        """Takes out what waits of a source that is closed, as if it had never come."""
        with self._lock:
            discarded = [one for one in self._waiting if one.source_idx == source_idx]
            for queued in discarded:
                self._remove(queued)
        self._wake()
        return discarded

    def end(self) -> None:
        """Says that nothing more will come; what waits is still taken."""
        self._has_ended = True
        self._wake()

    def break_off(self) -> None:
        """Says that nothing more will be taken, and lets go who waits for room."""
        self._has_ended = self._is_broken_off = True
        self._wake()

    @contextmanager
    def without_limit(self) -> Iterator[None]:
        """Takes and decodes what comes, however much memory is used, while the context is open.

        For one who waits for a frame, and whose frames are given back only when it has come.
        """
        self._is_limited = False
        self._wake()
        try:
            yield
        finally:
            self._is_limited = True

    # -- what is taken ----------------------------------------------------------------------------

    async def get(self) -> Queued | None:
        """Takes the oldest item as soon as there is one, and memory to decode it.

        None after the last. One of `add_frame`, `reject`, `forget` and `put_back` has to follow.
        """

        def take() -> tuple[Queued | None] | None:
            if self._is_broken_off or (self._has_ended and not self._waiting):
                return (None,)
            if self._waiting and self._may_decode(self._waiting[0]):
                return (self._waiting.popleft(),)
            return None

        (queued,) = await self._until(take)
        if queued is not None:
            self._waited(self._clock() - queued.since_s)
        return queued

    def get_ahead(self) -> Queued | None:
        """Takes the oldest item if it can wait and be decoded at once, such as that of a file.

        Live arrivals stay: who takes one before there is use for it takes one that grows old.
        """
        with self._lock:
            if self._is_broken_off or not self._waiting or self._waiting[0].is_live:
                return None
            if not self._may_decode(self._waiting[0]):
                return None
            queued = self._waiting.popleft()
        self._waited(self._clock() - queued.since_s)
        self._wake()
        return queued

    def add_frame(self, queued: Queued, frame: Frame) -> None:
        """Counts the pixels of a decoded arrival from here on, in the place of its own memory."""
        with self._lock:
            self._arrival_bytes -= queued.num_bytes
            self._pixel_bytes += frame.pixels.nbytes
            self._frames[frame.frame_id] = frame
        self._wake()

    def reject(self, queued: Queued, rejected: RejectedFrame) -> bool:
        """Frees the memory of an arrival that gave no frame, and reports that of a live source.

        False where it is not reported: it could wait, or no reports are taken any more.
        """
        self.forget(queued)
        if not queued.is_live or self._have_reports_ended:
            return False
        with self._lock:
            self._reports[queued.source_idx].reject(rejected)
        self._wake()
        return True

    def forget(self, queued: Queued) -> None:
        """Frees the memory of an item that is of no use any more."""
        with self._lock:
            self._arrival_bytes -= queued.num_bytes
        self._wake()

    def put_back(self, queued: Queued) -> None:
        """Returns an item that was taken and not used; it is the first again."""
        with self._lock:
            self._waiting.appendleft(queued)
        self._wake()

    async def give_back(self, frame: Frame) -> None:
        """Frees the pixels of a frame that left the engine."""
        with self._lock:
            del self._frames[frame.frame_id]
            self._pixel_bytes -= frame.pixels.nbytes
        self._wake()

    def take_waiting(self) -> list[Queued]:
        """Everything that still waits, when nothing is taken in its turn any more."""
        with self._lock:
            waiting = list(self._waiting)
            for queued in waiting:
                self._remove(queued)
        return waiting

    # -- what is reported of live sources ---------------------------------------------------------

    async def next_report(self) -> tuple[int, Report] | None:
        """The next notice, position or rejected frame, with its source; None after the last."""

        def take() -> tuple[tuple[int, Report] | None] | None:
            for source_idx, reports in self._reports.items():
                report = reports.take(is_last=self._have_reports_ended)
                if report is not None:
                    return ((source_idx, report),)
            return (None,) if self._have_reports_ended else None

        (report,) = await self._until(take)
        return report

    def take_readings(self) -> list[tuple[int, GpsReading]]:
        """Positions that were not reported yet, with their sources, before a frame needs them."""
        with self._lock:
            return [
                (source_idx, reports.readings.popleft())
                for source_idx, reports in self._reports.items()
                for _ in range(len(reports.readings))
            ]

    def end_reports(self) -> None:
        """Says that no source reports anything any more."""
        self._have_reports_ended = True
        self._wake()

    # -- helpers; they are called with the lock held ----------------------------------------------

    def _offer(self, source_idx: int, item: Received) -> None:
        reports = self._reports[source_idx]
        match item:
            case SourceNotice():
                reports.notices.append(item)
            case GpsReading():
                reports.readings.append(item)
            case RejectedFrame():
                reports.reject(item)
            case Arrival():
                queued = Queued(
                    item=item, source_idx=source_idx, is_live=True, since_s=self._clock()
                )
                self._offer_arrival(queued, item, reports)

    def _offer_arrival(self, queued: Queued, arrival: Arrival, reports: _Reports) -> None:
        if self._is_broken_off:
            detail = "the run broke off before its turn"
            reports.reject(arrival.rejected(DropReason.STOPPED, detail))
            return
        if self._is_paused:
            reports.reject(arrival.rejected(DropReason.PAUSED, "the run is paused"))
            return
        others = [other for other in self._waiting if other.lane == queued.lane]
        if not others and self._num_lanes(queued.source_idx) >= self._max_lanes:
            detail = "too many cameras at once"
            reports.reject(arrival.rejected(DropReason.OVERLOAD, detail))
            return
        while not self._has_room(queued):
            dropped = others.pop(0) if others else queued
            if dropped is not queued:
                self._remove(dropped)
            if isinstance(dropped.item, Arrival):
                reports.reject(dropped.item.rejected(DropReason.OVERLOAD, "the engine is behind"))
            if dropped is queued:
                return
        self._add(queued)

    def _num_lanes(self, source_idx: int) -> int:
        return len({other.lane for other in self._waiting if other.source_idx == source_idx})

    def _has_room(self, queued: Queued) -> bool:
        num_waiting = sum(other.lane == queued.lane for other in self._waiting)
        fits = self.used_bytes + queued.num_bytes <= self._max_bytes or self.used_bytes == 0
        return num_waiting < self._max_waiting and (fits or not self._is_limited)

    def _may_decode(self, queued: Queued) -> bool:
        """Whether there is memory for pixels; a lone frame always has it."""
        is_first = not queued.num_bytes or not self._pixel_bytes
        return is_first or self.used_bytes < self._max_bytes or not self._is_limited

    def _add(self, queued: Queued) -> None:
        self._waiting.append(queued)
        self._arrival_bytes += queued.num_bytes

    def _remove(self, queued: Queued) -> None:
        self._waiting.remove(queued)
        self._arrival_bytes -= queued.num_bytes

    # -- waiting for a change ---------------------------------------------------------------------

    async def _until(self, attempt: Callable[[], Result | None]) -> Result:
        """Tries again at every change, with the lock held, until it gives something."""
        loop = asyncio.get_running_loop()
        while True:
            with self._lock:
                result = attempt()
                if result is None:
                    waiter = loop.create_future()
                    self._waiters.append(waiter)
            if result is not None:
                self._wake()
                return result
            await waiter

    def _wake(self) -> None:
        with self._lock:
            self._is_waking = False
            waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class _Reports:
    """What is to be said of one live source beside its arrivals; bounded whatever comes."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self.notices: deque[SourceNotice] = deque(maxlen=_MAX_NOTICES)
        self.readings: deque[GpsReading] = deque(maxlen=_MAX_READINGS)
        self._rejected: deque[RejectedFrame] = deque()
        self._num_unlisted: dict[DropReason, int] = {}
        self._last_unlisted: dict[DropReason, RejectedFrame] = {}
        self._allowance = _Allowance(rate_hz=_MAX_LISTED_HZ, burst=_MAX_REJECTED, clock=clock)

    def reject(self, rejected: RejectedFrame) -> None:
        """Lists a rejected frame, or counts it into the sum of the next one that is listed."""
        reason = rejected.reason
        if len(self._rejected) < _MAX_REJECTED and self._allowance.take():
            num = self._num_unlisted.pop(reason, 0)
            self._last_unlisted.pop(reason, None)
            self._rejected.append(_summed(rejected, num))
        else:
            self._num_unlisted[reason] = self._num_unlisted.get(reason, 0) + 1
            self._last_unlisted[reason] = rejected

    def take(self, *, is_last: bool) -> Report | None:
        """The next thing to report; what is not listed comes in sums when there is time."""
        if self.notices:
            return self.notices.popleft()
        if self.readings:
            return self.readings.popleft()
        if self._rejected:
            return self._rejected.popleft()
        if self._num_unlisted and (is_last or self._allowance.take()):
            reason, rejected = next(iter(self._last_unlisted.items()))
            del self._last_unlisted[reason]
            return _summed(rejected, self._num_unlisted.pop(reason) - 1)
        return None


class _Allowance:
    """So many a second, and a burst of more after a quiet time."""

    def __init__(self, *, rate_hz: float, burst: int, clock: Callable[[], float]) -> None:
        self._rate_hz = rate_hz
        self._burst = burst
        self._clock = clock
        self._left = float(burst)
        self._at_s = clock()

    def take(self) -> bool:
        now_s = self._clock()
        self._left = min(self._burst, self._left + self._rate_hz * (now_s - self._at_s))
        self._at_s = now_s
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


def _summed(rejected: RejectedFrame, num: int) -> RejectedFrame:
    if not num:
        return rejected
    detail = f"{rejected.detail}; and {num:,} before it that are not listed"
    return replace(rejected, detail=detail, num_frames=1 + num)


# -- tracking to mapping --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MappingItem:
    """What tracking made of a frame."""

    frame: Frame
    tracked: TrackedFrame | None
    fallback: TrackedFrame | None  # the same, tracked from the keyframe before
    keyframe: NewKeyframe | None
    is_settled: bool  # False: the frame may still become a keyframe, in a later item
    is_live: bool  # False: a file waits, so that the map does not depend on timing


class _Nothing:
    """No item came."""


class MappingQueue:
    """Items from tracking to mapping, in order; tracking waits while too many of them wait.

    For the event loop only.
    """

    def __init__(self, *, max_waiting: int, waited: Callable[[float], None] = ignore_wait) -> None:
        """Makes an empty queue.

        Args:
            max_waiting: items that may wait.
            waited: takes the seconds that each item waited, from when it was put.
        """
        self._waited = waited
        self._max_waiting = max_waiting
        self._waiting: asyncio.Queue[tuple[float, MappingItem | None]] = asyncio.Queue(max_waiting)
        self._put_back: deque[MappingItem | None] = deque()  # taken too early; come first
        self._num_keyframes_waiting = 0
        self._is_mapping_keyframe = False
        self._keyframe_taken = asyncio.Condition()

    @property
    def max_waiting(self) -> int:
        """Items that may wait, and that may be looked at ahead of their turn."""
        return self._max_waiting

    @property
    def is_behind(self) -> bool:
        """Whether a keyframe waits for mapping or is being mapped."""
        return self._is_mapping_keyframe or self._num_keyframes_waiting > 0

    @property
    def has_waiting_keyframe(self) -> bool:
        """Whether a keyframe waits for mapping."""
        return self._num_keyframes_waiting > 0

    async def put(self, item: MappingItem) -> None:
        """Adds an item when there is room for it."""
        self._num_keyframes_waiting += item.keyframe is not None
        await self._waiting.put((time.monotonic(), item))

    async def end(self) -> None:
        """Ends the queue: no more items are put."""
        await self._waiting.put((time.monotonic(), None))

    async def get(self) -> MappingItem | None:
        """Takes the next item; None after the last."""
        item = await self._next()
        if item is not None and item.keyframe is not None:
            async with self._keyframe_taken:
                self._num_keyframes_waiting -= 1
                self._keyframe_taken.notify_all()
        return item

    async def get_tracked_until(self, done: asyncio.Task[Any]) -> MappingItem | None:
        """Takes the next item without a keyframe.

        None when ``done`` is done first, or when a keyframe or the end comes next; that stays.
        """
        return None if done.done() else self._if_tracked(await self._next_until(done))

    async def get_tracked(self) -> MappingItem | None:
        """Takes the next item without a keyframe; None when one with a keyframe, or the end, comes.

        That stays.
        """
        return self._if_tracked(await self._next())

    async def look_ahead_until(self, done: asyncio.Task[Any]) -> MappingItem | None:
        """Takes the next item, which has to be put back; None at the end, or when that is done."""
        return self._unless_end(await self._next_until(done))

    async def look_ahead(self) -> MappingItem | None:
        """Takes the next item, which has to be put back; None at the end."""
        return self._unless_end(await self._next())

    def put_back(self, items: Sequence[MappingItem]) -> None:
        """Returns items that were looked at; they come first, in their order."""
        self._put_back.extendleft(reversed(items))

    async def _next(self) -> MappingItem | None:
        return self._put_back.popleft() if self._put_back else await self._take()

    async def _next_until(self, done: asyncio.Task[Any]) -> MappingItem | _Nothing | None:
        if self._put_back:
            return self._put_back.popleft()
        getting = asyncio.create_task(self._take(), name="next item")
        await asyncio.wait((done, getting), return_when=asyncio.FIRST_COMPLETED)
        if not getting.done():
            getting.cancel()  # an item is either taken by then or stays in the queue
            await asyncio.wait((getting,))
        return _Nothing() if getting.cancelled() else getting.result()

    def _if_tracked(self, item: MappingItem | _Nothing | None) -> MappingItem | None:
        if isinstance(item, _Nothing):
            return None
        if item is None or item.keyframe is not None:
            self._put_back.appendleft(item)
            return None
        return item

    def _unless_end(self, item: MappingItem | _Nothing | None) -> MappingItem | None:
        if item is None:
            self._put_back.appendleft(None)
        return None if isinstance(item, _Nothing) else item

    async def _take(self) -> MappingItem | None:
        since_s, item = await self._waiting.get()
        if item is not None:
            self._waited(time.monotonic() - since_s)
        return item

    async def wait_until_few_keyframes_wait(self, num: int) -> None:
        """Returns when at most so many keyframes wait for mapping."""
        async with self._keyframe_taken:
            await self._keyframe_taken.wait_for(lambda: self._num_keyframes_waiting <= num)

    @contextmanager
    def mapping_keyframe(self) -> Iterator[None]:
        """Counts as behind while the context is open: a keyframe is being mapped."""
        self._is_mapping_keyframe = True
        try:
            yield
        finally:
            self._is_mapping_keyframe = False


# -- events ---------------------------------------------------------------------------------------


class EventQueue:
    """An ``EventSink`` that stamps events and keeps them, in order, until the loop takes them.

    Any thread may emit: appending to a deque is atomic. Nothing is dropped: the loop takes all
    events after every frame, so it grows as far as one step of the mapper emits.
    """

    def __init__(
        self, *, former_s: float = 0.0, waited: Callable[[float], None] = ignore_wait
    ) -> None:
        """Starts the clock.

        Args:
            former_s: how long former parts of the run took.
            waited: takes the seconds that the oldest event waited, of those taken together.
        """
        self._waited = waited
        self._started_s = time.monotonic() - former_s
        self._events: deque[Event] = deque()

    def clock(self) -> float:
        """Seconds since the start of the run, monotonic."""
        return time.monotonic() - self._started_s

    def __call__(self, event: Event) -> None:
        """Takes one event and stamps it."""
        self._events.append(replace(event, at_s=self.clock()))

    def warn(self, message: str) -> None:
        """Emits that something is degraded."""
        self(Warned(message=message))

    def frame_dropped(self, frame: Frame, *, reason: DropReason, detail: str) -> None:
        """Emits that a decoded frame was not used."""
        self(
            FrameDropped(
                frame_id=frame.frame_id,
                source=frame.source,
                index=frame.index,
                name=frame.name,
                captured_at_s=frame.captured_at_s,
                reason=reason,
                detail=detail,
            )
        )

    def frame_rejected(self, rejected: RejectedFrame) -> None:
        """Emits that a frame, and those that it stands for, were never decoded or unreadable."""
        self(
            FrameDropped(
                frame_id=None,
                source=rejected.source,
                index=rejected.index,
                name=rejected.name,
                captured_at_s=rejected.captured_at_s,
                reason=rejected.reason,
                detail=rejected.detail,
                num_frames=rejected.num_frames,
            )
        )

    def take(self) -> list[Event]:
        """All events since the last call, in order."""
        events = [self._events.popleft() for _ in range(len(self._events))]
        if events:
            self._waited(self.clock() - events[0].at_s)
        return events


# -- writes ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Write:
    call: Callable[[], None]
    then: Callable[[], Awaitable[None]] | None
    done: asyncio.Future[None]
    since_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Done:
    """When the turn of a write came, and what it raised."""

    began_s: float
    error: Exception | None


class Writer:
    """Does blocking writes in order on one thread; whoever schedules one waits when many wait.

    Args:
        thread: runs one call at a time.
        failed: is called with what a write, or what follows it, raised; later writes still get
            their turn.
        waited: takes the seconds that each write waited for its turn, from when it was scheduled;
            once it is done.
        watch: notices writes that last long.
    """

    def __init__(
        self,
        thread: Executor,
        *,
        failed: Callable[[Exception], None],
        waited: Callable[[float], None] = ignore_wait,
        watch: CallWatch | None = None,
    ) -> None:
        self._waited = waited
        self._watch = watch or CallWatch(0.0)
        self._thread = thread
        self._failed = failed
        self._writes: asyncio.Queue[_Write | None] = asyncio.Queue(_MAX_WAITING_WRITES)
        self._has_ended = False

    @property
    def has_room(self) -> bool:
        """Whether who schedules one write now does not wait, and so cannot be cancelled there."""
        return not self._writes.full()

    async def schedule(
        self, call: Callable[[], None], *, then: Callable[[], Awaitable[None]] | None = None
    ) -> asyncio.Future[None]:
        """Queues a write; ``then`` is awaited on the event loop once it is done, or has failed.

        Returns:
            A future that is done when the write is, also when it failed, and those that went to
            the thread with it.
        """
        done = asyncio.get_running_loop().create_future()
        write = _Write(call=call, then=then, done=done, since_s=time.monotonic())
        await self._writes.put(write)
        return done

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Writes what is scheduled; on leaving the context all of it is done."""
        working = asyncio.create_task(self._work(), name="writing")
        try:
            yield
        finally:
            await self._writes.put(None)
            await working

    async def _work(self) -> None:
        while writes := await self._next_writes():
            await self._finish(writes)
            del writes  # hold what they write

    async def _finish(self, writes: list[_Write]) -> None:
        """Has writes done, and what follows the last of them."""
        done = await run_in(self._thread, self._do, writes)
        for write, one in zip(writes, done, strict=True):
            self._waited(one.began_s - write.since_s)
            if one.error is not None:
                self._failed(one.error)
            if not write.done.cancelled():
                write.done.set_result(None)
        if (then := writes[-1].then) is not None:
            try:
                await then()
            except Exception as error:  # a task boundary: later writes get their turn
                self._failed(error)

    async def _next_writes(self) -> list[_Write]:
        """Those that wait by now, at least one, up to one that something follows; none: the end.

        A thread costs more to wake than most writes.
        """
        writes: list[_Write] = []
        while not (self._has_ended or len(writes) == _MAX_WRITES_AT_A_TIME):
            if writes and (writes[-1].then is not None or self._writes.empty()):
                break
            if (write := await self._writes.get()) is None:
                self._has_ended = True
            else:
                writes.append(write)
        return writes

    def _do(self, writes: list[_Write]) -> list[_Done]:
        """Does writes, in order; on their thread."""
        return [self._do_one(write) for write in writes]

    def _do_one(self, write: _Write) -> _Done:
        began_s, error = time.monotonic(), None
        try:
            with self._watch.watching():
                write.call()
        except Exception as raised:  # a task boundary: who made the writer decides
            error = raised
        return _Done(began_s=began_s, error=error)
