"""What runs beside mapping: jobs, snapshots, and memory that goes back to the system."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pycolmap
import pytest

from engine.config import load_config
from engine.events import FaultKind, RunPart, SnapshotWritten
from engine.mapping.jobs import JobKind, JobResult, MapJob
from engine.mapping.mapper import Mapper
from engine.mapping.model.bundle_adjustment import GlobalAdjustment
from engine.mapping.model.calibration_control import CalibrationControl
from engine.matching.pair_matching import PairMatching
from engine.matching.place_recognition import PlaceRecognizer
from engine.matching.scene_graph import SceneGraph
from engine.output.recorder import Recorder
from engine.output.run_folder import RunFolder
from engine.run import background
from engine.run.background import BackgroundJob, MapJobs, Snapshots, return_free_memory
from engine.run.event_loop import ThreadOwned, run_in
from engine.run.faults import Guard
from engine.run.queues import EventQueue, Writer
from engine.types import MapCounts
from tests.support.fake_runs import world_of
from tests.support.faults import FaultsSeen, Hanging, guard_of
from tests.support.synthetic import FakeMatcher

HANG_S = 300.0  # a guard, no measure
NUM_FRAMES = 16
WORLD = world_of(NUM_FRAMES)


def run(test: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(test, HANG_S), debug=True)


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1, thread_name_prefix="jobs") as executor:
        yield executor


# -- one job --------------------------------------------------------------------------------------


def test_a_job_is_done_when_its_result_is_there() -> None:
    async def test() -> None:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        job = BackgroundJob(future)
        assert not job.is_done
        future.set_result(7)
        assert job.is_done
        assert await job.result() == 7

    run(test())


def test_an_abandoned_job_is_not_waited_for(thread: ThreadPoolExecutor) -> None:
    started, open_up, ended = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        assert open_up.wait(HANG_S)
        ended.set()

    async def test() -> None:
        job = BackgroundJob(asyncio.create_task(run_in(thread, hold)))
        assert await asyncio.to_thread(started.wait, HANG_S)
        await job.abandon()
        assert job.is_done
        assert not ended.is_set()
        open_up.set()  # the thread ends what it began
        assert await asyncio.to_thread(ended.wait, HANG_S)

    run(test())


# -- the mapper's jobs ----------------------------------------------------------------------------


def result_of(number: int) -> GlobalAdjustment:
    return GlobalAdjustment(
        reconstruction=pycolmap.Reconstruction(),
        keyframe_ids=(),
        keypoints_xy={},
        calibration=CalibrationControl(),
        error_before_px=float(number),
        started_s=0.0,
    )


def job_of(
    run_job: Callable[[], JobResult], *, kind: JobKind = JobKind.GLOBAL_ADJUSTMENT
) -> MapJob:
    return MapJob(kind=kind, run=run_job)


def guards(hanging: Hanging | None = None) -> dict[JobKind, Guard]:
    kinds = (JobKind.GLOBAL_ADJUSTMENT, JobKind.LENS_SEARCH)
    return {kind: guard_of(hanging=hanging) for kind in kinds}


def test_a_result_is_taken_when_it_is_due_and_once(thread: ThreadPoolExecutor) -> None:
    names = []
    result = result_of(1)

    def work() -> GlobalAdjustment:
        names.append(threading.current_thread().name)
        return result

    async def test() -> None:
        jobs, job = (
            MapJobs(thread, matching_thread=thread, guards=guards(), faults=FaultsSeen()),
            job_of(work),
        )
        await jobs.start([job])
        assert await jobs.finished([], wait=True) == []
        (finished,) = await jobs.finished([job], wait=True)
        assert finished.job is job
        assert finished.result is result
        assert await jobs.finished([job], wait=True) == []
        assert await jobs.all_finished() == []

    run(test())
    assert names == ["global bundle adjustment"]


def test_a_live_run_does_not_wait_for_a_job_that_takes_longer(thread: ThreadPoolExecutor) -> None:
    may_end = threading.Event()

    def slow() -> GlobalAdjustment:
        assert may_end.wait(HANG_S)
        return result_of(1)

    async def test() -> None:
        jobs, job = (
            MapJobs(thread, matching_thread=thread, guards=guards(), faults=FaultsSeen()),
            job_of(slow),
        )
        await jobs.start([job])
        assert await jobs.finished([job], wait=False) == []
        may_end.set()
        (finished,) = await jobs.finished([job], wait=True)
        assert finished.job is job

    run(test())


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (JobKind.GLOBAL_ADJUSTMENT, RunPart.ADJUSTMENT),
        (JobKind.LENS_SEARCH, RunPart.LENS_SEARCH),
    ],
)
@pytest.mark.parametrize("error", [RuntimeError, KeyError, MemoryError])
def test_a_job_that_fails_is_finished_without_a_result(
    thread: ThreadPoolExecutor, error: type[Exception], kind: JobKind, part: RunPart
) -> None:
    def fail() -> GlobalAdjustment:
        raise error("no solution")

    async def test() -> None:
        faults = FaultsSeen()
        jobs = MapJobs(thread, matching_thread=thread, guards=guards(), faults=faults)
        failing, sound = job_of(fail, kind=kind), job_of(lambda: result_of(2))
        await jobs.start([failing])
        (finished,) = await jobs.finished([failing], wait=True)
        assert (finished.job, finished.result) == (failing, None)
        (fault,) = faults.seen
        assert (fault.part, fault.kind) == (part, FaultKind.RAISED)
        assert "no solution" in fault.detail
        await jobs.start([sound])
        (finished,) = await jobs.finished([sound], wait=True)
        assert finished.result is not None

    run(test())


@pytest.mark.parametrize("kind", [JobKind.GLOBAL_ADJUSTMENT, JobKind.LENS_SEARCH])
def test_a_job_that_hangs_is_given_up_and_after_some_there_are_no_more(
    thread: ThreadPoolExecutor, kind: JobKind
) -> None:
    hanging, faults = Hanging(), FaultsSeen()

    def hang() -> GlobalAdjustment:
        hanging.hang()
        return result_of(1)

    async def test() -> None:
        jobs = MapJobs(
            thread,
            matching_thread=thread,
            guards=guards(hanging),
            faults=faults,
        )
        for run_job in (hang, hang, lambda: result_of(1)):  # two may hang
            job = job_of(run_job, kind=kind)
            await jobs.start([job])
            (finished,) = await jobs.finished([job], wait=True)
            assert (finished.job, finished.result) == (job, None)

    run(test())
    hanging.release()
    assert [fault.kind for fault in faults.seen] == [FaultKind.HUNG] * 2
    assert "is off from now on" in faults.seen[1].detail
    assert faults.num_hangs == 2


def test_a_job_takes_the_place_of_one_of_its_kind_that_the_mapper_abandoned(
    thread: ThreadPoolExecutor,
) -> None:
    async def test() -> None:
        jobs = MapJobs(thread, matching_thread=thread, guards=guards(), faults=FaultsSeen())
        stale, fresh = job_of(lambda: result_of(1)), job_of(lambda: result_of(2))
        await jobs.start([stale])
        await jobs.start([fresh])
        assert await jobs.finished([stale], wait=True) == []
        (finished,) = await jobs.finished([stale, fresh], wait=True)
        assert finished.job is fresh

    run(test())


def test_all_jobs_are_finished_at_the_end_in_the_order_of_their_kinds(
    thread: ThreadPoolExecutor,
) -> None:
    async def test() -> None:
        jobs = MapJobs(thread, matching_thread=thread, guards=guards(), faults=FaultsSeen())
        window = job_of(lambda: result_of(1), kind=JobKind.WINDOW)
        adjustment = job_of(lambda: result_of(2))
        await jobs.start([window, adjustment])
        finished = await jobs.all_finished()
        assert [one.job for one in finished] == [adjustment, window]
        assert await jobs.all_finished() == []

    run(test())


def test_abandoned_jobs_are_not_waited_for(thread: ThreadPoolExecutor) -> None:
    may_end = threading.Event()

    def slow() -> GlobalAdjustment:
        assert may_end.wait(HANG_S)
        return result_of(1)

    async def test() -> None:
        jobs = MapJobs(thread, matching_thread=thread, guards=guards(), faults=FaultsSeen())
        await jobs.abandon_all()  # there is none yet
        await jobs.start([job_of(slow), job_of(slow, kind=JobKind.WINDOW)])
        await jobs.abandon_all()
        assert not may_end.is_set()
        assert await jobs.all_finished() == []
        may_end.set()

    run(test())


@pytest.mark.parametrize(("many", "num_returned"), [(-1, 1), (100_000, 0)])
def test_what_a_large_adjustment_took_is_returned_to_the_system(
    thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, many: int, num_returned: int
) -> None:
    returned: list[str] = []
    monkeypatch.setattr(background, "_MANY_OBSERVATIONS", many)
    monkeypatch.setattr(background, "return_free_memory", lambda: returned.append("all"))

    async def test() -> None:
        jobs = MapJobs(thread, matching_thread=thread, guards=guards(), faults=FaultsSeen())
        await jobs.start([job_of(lambda: result_of(1))])
        await jobs.all_finished()

    run(test())
    assert len(returned) == num_returned


# -- snapshots ------------------------------------------------------------------------------------


class SavedRun:
    """A growing map with its snapshots; the keyframes are added by hand, and so is the time."""

    def __init__(self, path: Path, *settings: str, stack: ExitStack) -> None:
        config = load_config((), settings)
        self.now_s = 0.0
        self.events = EventQueue()
        graph = SceneGraph(config.scene_graph, recognizer=PlaceRecognizer(config.retrieval, seed=0))
        self._matching = PairMatching(
            graph,
            FakeMatcher(world=WORLD),
            two_view=config.two_view,
            dense=config.dense_matching,
            coarse_to_fine=config.coarse_to_fine,
        )
        self.mapper = ThreadOwned(
            lambda: Mapper(config, graph=graph, matching=self._matching, emit=self.events),
            name="mapping",
        )
        stack.callback(self.mapper.shutdown)
        recorder = Recorder(
            RunFolder.create(path, config_text="{}"),
            snapshots=config.snapshots,
            runtime=config.runtime,
            emit=self.events,
        )
        stack.callback(recorder.close)
        matching, writing = (stack.enter_context(ThreadPoolExecutor(1)) for _ in range(2))
        self._matching_thread = matching
        self.failures: list[Exception] = []
        self.writer = Writer(writing, failed=self.failures.append)
        self.snapshots = Snapshots(
            config.snapshots,
            mapper=self.mapper,
            recorder=recorder,
            writer=self.writer,
            clock=lambda: self.now_s,
        )

    async def add(self, first: int, last: int) -> MapCounts:
        """Adds keyframes to the map."""
        counts = MapCounts()
        for frame_id in range(first, last + 1):
            begun = await self.mapper.call(Mapper.begin_keyframe, WORLD.keyframe(frame_id))
            matched = await run_in(
                self._matching_thread, self._matching.match_keyframe, begun.frame_id
            )
            counts = (await self.mapper.call(Mapper.add_keyframe, matched)).counts
        return counts

    async def all_written(self) -> None:
        """Waits for all writes."""
        await (await self.writer.schedule(lambda: None))

    def sizes(self) -> list[int]:
        """Keyframes of the snapshots written since the last call."""
        written = [event for event in self.events.take() if isinstance(event, SnapshotWritten)]
        return [event.num_keyframes for event in written]


@pytest.fixture
def run_saved(tmp_path: Path) -> Callable[..., None]:
    """Runs a test of a saved run with settings, everything written at its end."""

    def run_test(test: Callable[[SavedRun], Awaitable[None]], *settings: str) -> None:
        async def with_writer() -> None:
            with ExitStack() as stack:
                saved = SavedRun(tmp_path / "run", *settings, stack=stack)
                async with saved.writer.running():
                    await test(saved)
                assert saved.failures == []

        run(with_writer())

    return run_test


def latest(path: Path) -> pycolmap.Reconstruction:
    return pycolmap.Reconstruction(path / "run" / "latest" / "sparse" / "0")


def test_a_snapshot_is_due_after_so_many_new_keyframes(run_saved: Callable[..., None]) -> None:
    async def test(saved: SavedRun) -> None:
        for frame_id in range(1, NUM_FRAMES + 1):
            await saved.snapshots.write_if_due(await saved.add(frame_id, frame_id))
            await saved.all_written()
        assert saved.sizes() == [5, 10, 15]

    run_saved(test, "snapshots.every_keyframes=5", "snapshots.every_s=0")


def test_a_snapshot_is_due_after_so_long_when_something_is_new(
    run_saved: Callable[..., None],
) -> None:
    async def test(saved: SavedRun) -> None:
        counts = await saved.add(1, 6)
        await saved.snapshots.write_if_due(counts)
        assert saved.sizes() == []
        saved.now_s = 10.0
        for _ in range(3):
            await saved.snapshots.write_if_due(counts)
            await saved.all_written()
        assert saved.sizes() == [6]
        saved.now_s = 100.0
        await saved.snapshots.write_if_due(counts)
        await saved.all_written()
        assert saved.sizes() == []  # nothing is new
        await saved.snapshots.write_if_due(await saved.add(7, 7))
        await saved.all_written()
        assert saved.sizes() == [7]
        saved.now_s = 109.0
        await saved.snapshots.write_if_due(await saved.add(8, 8))
        await saved.all_written()
        assert saved.sizes() == []

    run_saved(test, "snapshots.every_keyframes=0", "snapshots.every_s=10")


def test_snapshots_of_a_large_map_wait_until_it_has_grown_by_a_share(
    run_saved: Callable[..., None],
) -> None:
    async def test(saved: SavedRun) -> None:
        for frame_id in range(1, NUM_FRAMES + 1):
            await saved.snapshots.write_if_due(await saved.add(frame_id, frame_id))
            await saved.all_written()
        assert saved.sizes() == [4, 6, 9, 14]

    settings = ["snapshots.every_keyframes=2", "snapshots.growth_ratio=0.5"]
    run_saved(test, *settings, "snapshots.every_s=0")


def test_snapshots_by_time_take_a_small_share_of_it(
    run_saved: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Recorder.snapshot

    async def test(saved: SavedRun) -> None:
        def write_in_two_seconds(self: Recorder, *args: Any, **kwargs: Any) -> None:
            write(self, *args, **kwargs)
            saved.now_s += 2.0

        monkeypatch.setattr(Recorder, "snapshot", write_in_two_seconds)
        saved.now_s = 10.0
        await saved.snapshots.write_if_due(await saved.add(1, 6))
        await saved.all_written()
        assert saved.sizes() == [6]
        counts = await saved.add(7, 8)
        for now_s, written in ((20.0, []), (29.0, []), (31.0, [8])):
            saved.now_s = now_s
            await saved.snapshots.write_if_due(counts)
            await saved.all_written()
            assert saved.sizes() == written

    settings = ["snapshots.every_keyframes=0", "snapshots.every_s=10"]
    run_saved(test, *settings, "snapshots.max_time_ratio=0.1")


def test_keyframes_taken_out_of_the_map_do_not_count_against_those_that_come_in(
    run_saved: Callable[..., None],
) -> None:
    async def test(saved: SavedRun) -> None:
        counts = await saved.add(1, 10)
        await saved.snapshots.write_if_due(counts)
        await saved.all_written()
        assert saved.sizes() == [10]
        for num_registered, is_written in ((6, False), (10, False), (11, True)):
            await saved.snapshots.write_if_due(
                MapCounts(num_keyframes=16, num_registered=num_registered)
            )
            await saved.all_written()
            assert bool(saved.sizes()) is is_written

    run_saved(test, "snapshots.every_keyframes=5", "snapshots.every_s=0")


def test_a_small_map_is_not_written_yet(run_saved: Callable[..., None], tmp_path: Path) -> None:
    async def test(saved: SavedRun) -> None:
        await saved.snapshots.write_if_due(await saved.add(1, 6))

    run_saved(test, "snapshots.every_keyframes=1", "snapshots.min_registered=7")
    assert not (tmp_path / "run" / "latest").exists()


def test_a_slow_disk_gets_no_second_snapshot_before_the_first_is_written(
    run_saved: Callable[..., None], tmp_path: Path
) -> None:
    disk_is_slow = threading.Event()

    def hold() -> None:
        assert disk_is_slow.wait(HANG_S)

    async def test(saved: SavedRun) -> None:
        await saved.writer.schedule(hold)
        for frame_id in range(1, 13):
            await saved.snapshots.write_if_due(await saved.add(frame_id, frame_id))
        await saved.snapshots.write_now()
        disk_is_slow.set()

    run_saved(test, "snapshots.every_keyframes=1", "snapshots.every_s=0")
    (snapshot,) = (tmp_path / "run" / "snapshots").iterdir()
    assert latest(tmp_path).num_reg_images() == 4
    assert snapshot.name == "000001"


def test_a_snapshot_is_of_the_map_as_it_was_when_it_was_taken(
    run_saved: Callable[..., None], tmp_path: Path
) -> None:
    async def test(saved: SavedRun) -> None:
        await saved.add(1, 8)
        await saved.snapshots.write_final()
        await saved.add(9, 12)

    run_saved(test)
    assert latest(tmp_path).num_reg_images() == 8


def test_a_snapshot_on_request_needs_a_map_and_none_follows_the_final_one(
    run_saved: Callable[..., None],
) -> None:
    async def test(saved: SavedRun) -> None:
        await saved.snapshots.write_if_due(await saved.add(1, 3))
        await saved.snapshots.write_now()
        await saved.all_written()
        assert saved.sizes() == []
        await saved.snapshots.write_if_due(await saved.add(4, 5))
        for _ in range(2):
            await saved.snapshots.write_now()
            await saved.all_written()
        assert saved.sizes() == [5, 5]
        await saved.snapshots.write_final()
        await saved.all_written()
        await saved.snapshots.write_now()
        await saved.all_written()
        assert saved.sizes() == [5]

    run_saved(test, "snapshots.every_keyframes=0", "snapshots.every_s=0")


def test_without_a_map_there_is_no_final_snapshot(
    run_saved: Callable[..., None], tmp_path: Path
) -> None:
    async def test(saved: SavedRun) -> None:
        await saved.add(1, 1)
        await saved.snapshots.write_final()

    run_saved(test)
    assert not (tmp_path / "run" / "latest").exists()


def test_a_copy_that_fails_does_not_stand_in_the_way_of_the_next_one(
    run_saved: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Mapper) -> None:
        raise RuntimeError("no memory")

    async def test(saved: SavedRun) -> None:
        counts = await saved.add(1, 6)
        with monkeypatch.context() as patch:
            patch.setattr(Mapper, "snapshot", fail)
            with pytest.raises(RuntimeError, match="no memory"):
                await saved.snapshots.write_if_due(counts)
        await saved.snapshots.write_if_due(counts)
        await saved.all_written()
        assert saved.sizes() == [6]

    run_saved(test, "snapshots.every_keyframes=5", "snapshots.every_s=0")


# -- memory ---------------------------------------------------------------------------------------


def test_memory_that_was_freed_is_the_system_s_again() -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("this C library has no malloc_trim")
    process = psutil.Process()
    kept = []
    # Pieces below the size that is mapped by itself, with some between them that stay.
    pieces = [bytearray(60_000) for _ in range(2000)]
    kept = pieces[::50]
    held = process.memory_info().rss
    del pieces
    return_free_memory()
    assert process.memory_info().rss < held - 60_000_000
    assert len(kept) == 40


def test_without_such_a_call_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    background._trim.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    return_free_memory()
    assert background._trim() is background._nothing
    background._trim.cache_clear()
