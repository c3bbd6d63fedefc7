"""What runs beside mapping: the mapper's jobs, and snapshots of the map."""

from __future__ import annotations

import asyncio
import ctypes
import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

from engine.config import SnapshotsConfig
from engine.errors import MapError
from engine.events import RunPart
from engine.mapping.jobs import FinishedJob, JobKind, JobResult, MapJob
from engine.mapping.mapper import Mapper
from engine.mapping.model.bundle_adjustment import GlobalAdjustment
from engine.mapping.steps import MapCopy, MapSnapshot
from engine.output.dense_products import DenseWorld
from engine.output.recorder import Recorder
from engine.output.snapshots import JsonValue
from engine.run.event_loop import ThreadOwned, run_in
from engine.run.faults import Faults, Guard
from engine.run.queues import Writer
from engine.types import MapCounts

_PART_OF_JOB = {
    JobKind.GLOBAL_ADJUSTMENT: RunPart.ADJUSTMENT,
    JobKind.WINDOW: RunPart.WINDOW,
    JobKind.SECOND_MATCHING: RunPart.SECOND_MATCHING,
    JobKind.LENS_SEARCH: RunPart.LENS_SEARCH,
}
_MANY_OBSERVATIONS = 100_000  # Ceres takes 0.9 kB for each
_MIN_REGISTERED = 2  # keyframes of a map that is worth a snapshot

Result = TypeVar("Result")


class BackgroundJob(Generic[Result]):
    """One job on another thread, and its result.

    Args:
        result: of the job.
    """

    def __init__(self, result: asyncio.Future[Result]) -> None:
        self._result = result

    @property
    def is_done(self) -> bool:
        """Whether the result is there."""
        return self._result.done()

    async def result(self) -> Result:
        """Waits for the result."""
        return await self._result

    async def abandon(self) -> None:
        """Stops waiting for the result; the thread ends the job by itself."""
        self._result.cancel()
        await asyncio.wait((self._result,))


class MapJobs:
    """Runs the mapper's jobs, at most one of each kind, until their results are due.

    A job that raises or hangs has no result, and its copy of the map is dropped.

    Args:
        thread: runs one job on a copy of a map at a time.
        matching_thread: runs those of a second matcher, which may take long.
        guards: of bundle adjustments and searches of lenses; solvers of windows, and second
            matchers, have their own.
        faults: takes what jobs raise.
    """

    def __init__(
        self,
        thread: Executor,
        *,
        matching_thread: Executor,
        guards: Mapping[JobKind, Guard],
        faults: Faults,
    ) -> None:
        self._thread = thread
        self._matching_thread = matching_thread
        self._guards = guards
        self._faults = faults
        self._running: dict[JobKind, tuple[MapJob, BackgroundJob[JobResult]]] = {}

    async def start(self, jobs: Sequence[MapJob]) -> None:
        """Starts jobs; one of the same kind that still runs was abandoned by the mapper."""
        for job in jobs:
            await self._abandon(job.kind)
            run = job.run
            if job.kind in self._guards:
                run = functools.partial(_guarded, job.run, guard=self._guards[job.kind])
            is_matching = job.kind is JobKind.SECOND_MATCHING
            thread = self._matching_thread if is_matching else self._thread
            task = asyncio.create_task(run_in(thread, run), name=job.kind.value)
            self._running[job.kind] = job, BackgroundJob(task)

    async def finished(self, due: Sequence[MapJob], *, wait: bool) -> list[FinishedJob]:
        """Takes results that are due.

        Args:
            due: the jobs that the mapper wants merged.
            wait: for their ends; otherwise only those that are done are taken.
        """
        return [
            await self._finish(job.kind)
            for job in due
            if job.kind in self._running
            and self._running[job.kind][0] is job
            and (wait or self._running[job.kind][1].is_done)
        ]

    async def all_finished(self) -> list[FinishedJob]:
        """Waits for all jobs, in the order of their kinds."""
        return [await self._finish(kind) for kind in JobKind if kind in self._running]

    async def abandon_all(self) -> None:
        """Stops waiting for all jobs; their thread ends when they are done."""
        for kind in JobKind:
            await self._abandon(kind)

    async def _finish(self, kind: JobKind) -> FinishedJob:
        job, running = self._running.pop(kind)
        try:
            return FinishedJob(job=job, result=await running.result())
        except Exception as error:  # a task boundary: the map goes on as it is
            self._faults.report(
                _PART_OF_JOB[kind], error, consequence="the map goes on without its result"
            )
            return FinishedJob(job=job, result=None)

    async def _abandon(self, kind: JobKind) -> None:
        if kind in self._running:
            _, running = self._running.pop(kind)
            await running.abandon()


class Snapshots:
    """Writes snapshots of the map: when enough is new, when asked for, and the final one.

    Copies of the map are made on its thread and written in the order of all writes.

    Args:
        config: how often.
        mapper: makes the copies.
        recorder: writes them; called through the writer.
        writer: runs writes in order.
        clock: seconds since the start of the run.
        taken: gets the world of each snapshot, once its copies are made.
        written: is awaited once each is written, or has failed.
    """

    def __init__(
        self,
        config: SnapshotsConfig,
        *,
        mapper: ThreadOwned[Mapper],
        recorder: Recorder,
        writer: Writer,
        clock: Callable[[], float],
        taken: Callable[[DenseWorld], None] = lambda world: None,
        written: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._config = config
        self._written = written
        self._taken = taken
        self._mapper = mapper
        self._recorder = recorder
        self._writer = writer
        self._clock = clock
        self._counts = MapCounts()  # the latest
        self._registered_at_last = 0
        self._last_at_s = 0.0
        self._took_s = 0.0  # writing the last one
        self._is_copying = False
        self._writing: BackgroundJob[None] | None = None
        self._has_final = False

    async def write_if_due(self, counts: MapCounts) -> None:
        """Writes a snapshot when enough is new, unless the one before is still to be written."""
        self._counts = counts
        num_registered = counts.num_registered
        if num_registered < self._config.min_registered or self._is_busy():
            return
        # Keyframes taken out of the map must not count against those that come in.
        self._registered_at_last = min(self._registered_at_last, num_registered)
        new_keyframes = num_registered - self._registered_at_last
        if new_keyframes > 0 and (
            self._is_due_by_keyframes(new_keyframes) or self._is_due_by_time()
        ):
            await self._write(is_final=False)

    async def write_now(self) -> None:
        """Writes a snapshot on request, if there is a map and none is still to be written.

        None follows the final one.
        """
        if self._counts.num_registered >= _MIN_REGISTERED and not (
            self._has_final or self._is_busy()
        ):
            await self._write(is_final=False)

    async def write_final(self, *, must_be_checked: bool = False) -> None:
        """Writes the last snapshot of the run, if there is a map.

        Args:
            must_be_checked: mapping broke, and may have left the map half changed.

        Raises:
            MapError: it did; the snapshot before stands.
        """
        self._has_final = True
        await self._write(is_final=True, must_be_checked=must_be_checked)

    def _is_due_by_keyframes(self, new_keyframes: int) -> bool:
        every = self._config.every_keyframes
        growth = self._config.growth_ratio * self._registered_at_last
        return every > 0 and max(every, growth) <= new_keyframes

    def _is_due_by_time(self) -> bool:
        every_s, ratio = self._config.every_s, self._config.max_time_ratio
        waited_s = self._clock() - self._last_at_s
        return 0 < every_s <= waited_s and self._took_s <= ratio * waited_s

    def _is_busy(self) -> bool:
        return self._is_copying or (self._writing is not None and not self._writing.is_done)

    async def _write(self, *, is_final: bool, must_be_checked: bool = False) -> None:
        self._is_copying = True
        try:
            snapshot = await self._mapper.call(
                _checked_copies if must_be_checked else Mapper.snapshot
            )
            if snapshot.counts.num_registered < _MIN_REGISTERED:
                return
            self._registered_at_last = snapshot.counts.num_registered
            self._last_at_s = self._clock()
            figures: dict[str, JsonValue] = {
                "at_s": round(self._last_at_s, 3),
                "num_keyframes": snapshot.counts.num_keyframes,
                "is_final": is_final,
                "georeference": snapshot.placement and snapshot.placement.as_record(),
            }
            self._taken(
                DenseWorld(
                    poses=snapshot.poses,
                    origin=snapshot.placement.georeference.origin
                    if snapshot.placement is not None and snapshot.copies[0].is_in_metres
                    else None,
                    verdict=snapshot.verdict,
                )
            )
            write = functools.partial(self._write_copies, snapshot.copies, entries=figures)
            self._writing = BackgroundJob(await self._writer.schedule(write, then=self._written))
            del snapshot, write
            await self._writer.schedule(return_free_memory)  # of the copies
        finally:
            self._is_copying = False

    def _write_copies(self, copies: Sequence[MapCopy], *, entries: Mapping[str, JsonValue]) -> None:
        """Writes copies of the maps, on the thread of all writes."""
        started_at_s = self._clock()
        self._recorder.snapshot(copies, entries=entries)
        self._took_s = self._clock() - started_at_s


def _guarded(run: Callable[[], JobResult], *, guard: Guard) -> JobResult:
    """Runs a job; much memory of an adjustment's solver goes back to the system at once."""
    result = guard.call(run)
    if isinstance(result, GlobalAdjustment):
        num_observations = result.reconstruction.compute_num_observations()
        if result.share is not None or num_observations > _MANY_OBSERVATIONS:
            return_free_memory()
    return result


def _checked_copies(mapper: Mapper) -> MapSnapshot:
    """Copies of the maps that are whole.

    Raises:
        MapError: one of them is not.
    """
    snapshot = mapper.snapshot()
    if not all(copy.reconstruction.is_valid() for copy in snapshot.copies):
        raise MapError("the map was left half changed; the snapshot before it stands")
    return snapshot


def return_free_memory() -> None:
    """Has the C library give back what it keeps of freed memory; blocks for some milliseconds.

    Copies of the map and the solvers' matrices come and go with every adjustment. Between them
    glibc keeps what they took, scattered over the arenas of several threads: hundreds of megabytes
    in a run of minutes. Does nothing where the C library has no such call.
    """
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], object]:
    try:
        call: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return _nothing
    return call


def _nothing(num_bytes_kept: int) -> None:
    del num_bytes_kept
