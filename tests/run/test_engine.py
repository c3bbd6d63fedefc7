from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest
from blockbuster import BlockBuster

from engine.errors import JournalError, SnapshotError, SourceError
from engine.events import Event, Warned
from engine.geometry import camera_center
from engine.mapping import background_jobs
from engine.mapping.mapper import Mapper
from engine.output import recorder
from engine.output.journal import Journal, NewKeyframe
from engine.output.run_folder import RunFolder
from engine.output.stored_run import read_stored_run
from engine.run import engine as engine_module
from engine.run.engine import Engine, RunOutcome, StoppedBy
from engine.types import Arrival, Features, Frame, FramePose, MapView
from engine.window_types import WindowEstimate, WindowProblem
from tests.support.dense_world import DenseFakeMatcher, NoPlaces
from tests.support.fake_runs import (
    FakeLiveSource,
    FakeSource,
    Happening,
    WorldMatcher,
    Written,
    engine_of,
    frame_of,
    frames_of,
    rejected,
    trajectory_lines,
    world_of,
)

NUM_FRAMES = 16
HANG_S = 300.0  # a guard, no measure
ENOSPC = OSError(28, "No space left on device")

# What summary.json promises its readers.
SUMMARY_KEYS = {
    *("frames_received", "frames_dropped", "keyframes", "registered_keyframes"),
    *("num_points3D", "num_observations", "mean_track_length", "mean_reprojection_error_px"),
    *("time_to_first_map_s", "latency_ms", "window_solves", "global_ba_runs", "loops_closed"),
    *("snapshots_written", "loop_lag_ms", "peak_rss_mb", "peak_gpu_mb", "wall_s", "cpu_s"),
    *("components", "georeferenced", "gps_rmse_m", "metres_per_map_unit"),
    *("stopped_by", "failed_writes"),
    *("cpu_by_stage_s", "loop_lag_but_for_cores_ms", "loop_stalls", "queue_wait_ms"),
}


@pytest.fixture(autouse=True)
def _loop_never_blocked(blockbuster: BlockBuster) -> None:
    """Our code must not block the event loop: each blocking call in it raises."""


@pytest.fixture
def blockbuster() -> Iterator[BlockBuster]:
    detector = BlockBuster(scanned_modules=["engine"])
    detector.activate()
    yield detector
    detector.deactivate()


def matcher(**options: Any) -> WorldMatcher:
    return WorldMatcher(world=world_of(NUM_FRAMES), **options)


def source(happenings: Sequence[Happening] | None = None, **options: Any) -> FakeSource:
    if happenings is None:
        happenings = frames_of(world_of(NUM_FRAMES))
    return FakeSource(happenings=happenings, **options)


def frames(first: int, last: int, **options: Any) -> list[Frame]:
    world = world_of(NUM_FRAMES)
    return [frame_of(i, world=world, **options) for i in range(first, last + 1)]


def run(engine: Engine) -> RunOutcome:
    return asyncio.run(asyncio.wait_for(engine.run(), HANG_S), debug=True)


def run_world(path: Path, **options: Any) -> tuple[RunOutcome, Written]:
    options = {"matcher": matcher(), "sources": [source()], **options}
    outcome = run(engine_of(path, **options))
    return outcome, Written.by(outcome)


def latest_model(path: Path) -> pycolmap.Reconstruction:
    return pycolmap.Reconstruction(path / "latest" / "sparse" / "0")


def held_until(event: threading.Event) -> Callable[[], Awaitable[None]]:
    async def hold() -> None:
        assert await asyncio.to_thread(event.wait, HANG_S)

    return hold


# -- the run folder -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_registers_its_keyframes_and_leaves_every_file_of_the_folder(tmp_path: Path) -> None:
    world = world_of(NUM_FRAMES)
    truth = [(0.1 * index, pose) for index, pose in enumerate(world.poses)]
    outcome, written = run_world(tmp_path / "run", groundtruth=truth)
    assert (outcome.stopped_by, outcome.num_keyframes) == (StoppedBy.END_OF_SOURCES, NUM_FRAMES)
    assert outcome.num_registered == NUM_FRAMES
    assert {path.name for path in outcome.path.iterdir()} == {
        *("config.yaml", "database.db", "events.jsonl", "frames.csv", "groundtruth.txt"),
        *("images", "latest", "snapshots", "summary.json", "trajectory.txt"),
        "trajectory_live.txt",
    }
    assert written.statuses == ["keyframe"] * NUM_FRAMES
    assert [int(row["frame_id"]) for row in written.rows] == world.frame_ids
    for name in ("trajectory.txt", "trajectory_live.txt", "groundtruth.txt"):
        assert len(trajectory_lines(outcome.path / name)) == NUM_FRAMES, name
    assert len(list((outcome.path / "images").iterdir())) == NUM_FRAMES
    model = latest_model(outcome.path)
    assert model.num_reg_images() == NUM_FRAMES
    assert model.is_valid()


@pytest.mark.slow
def test_the_summary_holds_every_promised_figure(tmp_path: Path) -> None:
    outcome, written = run_world(tmp_path / "run")
    summary = written.summary
    assert set(summary) >= SUMMARY_KEYS
    assert summary["frames_received"] == summary["keyframes"] == NUM_FRAMES
    assert summary["registered_keyframes"] == NUM_FRAMES
    assert summary["stopped_by"] == "end_of_sources"
    assert summary["failed_writes"] == 0
    assert summary["components"] == 1
    assert summary["snapshots_written"] == len(written.of_kind("SnapshotWritten")) > 0
    assert 0.0 <= summary["loop_lag_ms"]["p99"] <= summary["loop_lag_ms"]["max"] < 1e3 * HANG_S
    for kind in ("keyframes", "frames"):
        assert set(summary["latency_ms"][kind].values()) == {None}, "frames of files wait by design"
    assert 0.0 < summary["time_to_first_map_s"] < summary["wall_s"]


@pytest.mark.slow
def test_a_dense_matcher_is_run_with_the_places_it_brings(tmp_path: Path) -> None:
    class Places(NoPlaces):
        """Knows nothing, like an index that has a length and is still empty."""

        def __init__(self) -> None:
            self.added: list[int] = []

        def __len__(self) -> int:
            return 0

        def add(self, features: Features) -> None:
            self.added.append(features.frame_id)

    world, places = world_of(NUM_FRAMES), Places()
    dense = DenseFakeMatcher(world=world, metres_per_unit=2.0)
    outcome, written = run_world(tmp_path / "run", matcher=dense, places=places)
    assert outcome.num_registered == NUM_FRAMES
    assert places.added == world.frame_ids
    assert written.events[0]["matcher"] == dense.name
    assert written.summary["peak_gpu_mb"] == dense.peak_gpu_mb
    (told,) = written.of_kind("MetricScaleEstimated")
    assert abs(written.summary["metres_per_map_unit"] / told["metres_per_map_unit"] - 1) < 0.1
    assert written.summary["failed_writes"] == 0
    database = pycolmap.Database.open(outcome.path / "database.db")
    for image in latest_model(outcome.path).images.values():
        keypoints_xy = np.array([point.xy for point in image.points2D], np.float32)
        assert np.array_equal(database.read_keypoints(image.image_id)[:, :2], keypoints_xy)
    database.close()


@pytest.mark.slow
def test_events_of_a_run_are_written_in_order(tmp_path: Path) -> None:
    _, written = run_world(tmp_path / "run")
    assert written.events[0]["event"] == "RunStarted"
    assert written.events[0]["sources"] == ["fake"]
    assert written.events[-1]["event"] == "RunFinished"
    assert [record["frame_id"] for record in written.of_kind("FrameReceived")] == list(
        range(1, NUM_FRAMES + 1)
    )
    # Threads take the time before they append, so that of two threads' events may be swapped.
    for kinds in (("KeyframeAdded", "PairVerified", "FrameRegistered"), ("FrameReceived",)):
        times_s = [record["at_s"] for record in written.events if record["event"] in kinds]
        assert len(times_s) >= NUM_FRAMES
        assert times_s == sorted(times_s)


def test_the_load_of_a_live_run_without_frames_is_written_while_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_LOAD_PERIOD_S", 0.02)
    written: list[int] = []

    async def until_written() -> None:
        while not written or written[-1] < 3:
            await asyncio.sleep(0.02)
            text = await asyncio.to_thread((tmp_path / "run" / "events.jsonl").read_text)
            written.append(text.count("LoadMeasured"))

    live = FakeLiveSource(happenings=[until_written])
    outcome, _ = run_world(tmp_path / "run", sources=[live])
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert written[-1] >= 3


@pytest.mark.slow
def test_the_same_frames_give_the_same_map_to_the_last_bit(tmp_path: Path) -> None:
    models = []
    for name in ("one", "two"):
        outcome, _ = run_world(tmp_path / name)
        folder = outcome.path / "latest" / "sparse" / "0"
        models.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert models[0] == models[1]


@pytest.mark.slow
def test_rows_stay_in_order_when_frames_are_rejected_and_undescribed(tmp_path: Path) -> None:
    mixed: list[Happening] = [
        *frames(1, 4),
        rejected(4),
        *frames(5, 10),
        rejected(11),
        *frames(11, NUM_FRAMES),
    ]
    outcome, written = run_world(
        tmp_path / "run", matcher=matcher(undescribed=[7, 8]), sources=[source(mixed)]
    )
    rejected_row, failed_row = "dropped:unreadable", "dropped:failed"
    assert written.statuses == [
        *(["keyframe"] * 4 + [rejected_row] + ["keyframe"] * 2 + [failed_row] * 2),
        *(["keyframe"] * 2 + [rejected_row] + ["keyframe"] * 6),
    ]
    dropped = written.of_kind("FrameDropped")
    assert sorted(record["detail"] for record in dropped) == [
        *("000006.jpg: too dark", "000007.jpg: too dark", "damaged", "damaged"),
    ]
    assert written.summary["frames_dropped"] == {"failed": 2, "unreadable": 2}
    assert written.summary["frames_received"] == NUM_FRAMES + 2
    assert outcome.num_registered == outcome.num_keyframes == NUM_FRAMES - 2


# -- waiting and dropping -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_file_waits_for_the_engine_and_loses_nothing(tmp_path: Path) -> None:
    queue_size = 3
    second_waits, filled_up = threading.Event(), threading.Event()
    waiting: list[int] = []
    world_matcher = matcher()

    def counted(all_frames: list[Frame]) -> Iterator[Happening]:
        for number, frame in enumerate(all_frames, start=1):
            waiting.append(number - len(world_matcher.described))
            if number == 3:
                second_waits.set()
            if number == queue_size + 3:
                filled_up.set()
            yield frame if number > 1 else replace(Arrival.of(frame), decode=decode_late(frame))

    def decode_late(frame: Frame) -> Callable[[], Frame]:
        def decode() -> Frame:
            assert_set(second_waits)  # for only what waits by then is decoded ahead
            return frame

        return decode

    world_matcher.before_describing = lambda frame: assert_set(filled_up)
    _, written = run_world(
        tmp_path / "run",
        matcher=world_matcher,
        sources=[FakeSource(happenings=counted(frames_of(world_of(NUM_FRAMES))))],
        settings=[f"sources.frame_queue_size={queue_size}"],
    )
    # One is being described, one is decoded ahead, so many wait, and the source holds one more.
    assert max(waiting) == queue_size + 3
    assert written.statuses == ["keyframe"] * NUM_FRAMES


def assert_set(event: threading.Event) -> None:
    assert event.wait(HANG_S)


def test_a_live_source_drops_its_oldest_frames_and_all_of_them_are_counted(tmp_path: Path) -> None:
    describing, all_given = threading.Event(), threading.Event()

    def hold_up(frame: Frame) -> None:
        describing.set()
        assert_set(all_given)

    async def end() -> None:
        all_given.set()

    live = FakeLiveSource(
        happenings=[*frames(1, 1), held_until(describing), *frames(2, NUM_FRAMES), end]
    )
    world_matcher = matcher(before_describing=hold_up)
    outcome, written = run_world(
        tmp_path / "run",
        matcher=world_matcher,
        sources=[live],
        settings=["sources.frame_queue_size=4"],
    )
    kept = [1, *range(NUM_FRAMES - 3, NUM_FRAMES + 1)]
    assert world_matcher.described == kept
    assert written.statuses == [
        "keyframe" if i in kept else "dropped:overload" for i in range(1, NUM_FRAMES + 1)
    ]
    assert [record["index"] for record in written.of_kind("FrameDropped")] == list(
        range(1, NUM_FRAMES - 4)
    )
    assert written.summary["frames_dropped"] == {"overload": NUM_FRAMES - 5}
    assert written.summary["frames_received"] == NUM_FRAMES
    assert outcome.num_keyframes == 5


def test_a_live_source_never_pushes_out_the_frames_of_a_file(tmp_path: Path) -> None:
    describing, all_given = threading.Event(), threading.Event()

    def hold_up(frame: Frame) -> None:
        describing.set()
        assert_set(all_given)

    async def end() -> None:
        all_given.set()

    file = source(frames(1, 4))
    live = FakeLiveSource(
        happenings=[held_until(describing), *frames(5, NUM_FRAMES), end], label="live"
    )
    _, written = run_world(
        tmp_path / "run",
        matcher=matcher(before_describing=hold_up),
        sources=[file, live],
        settings=["sources.frame_queue_size=2"],
    )
    status_of = {int(row["index"]) + 1: row["status"] for row in written.rows}
    used = [i for i, status in sorted(status_of.items()) if status == "keyframe"]
    assert used == [1, 2, 3, 4, NUM_FRAMES - 1, NUM_FRAMES]
    assert written.summary["frames_dropped"] == {"overload": NUM_FRAMES - 6}


@pytest.mark.slow
def test_frames_larger_than_the_memory_for_them_pass_one_at_a_time(tmp_path: Path) -> None:
    num_bytes = frame_of(1).pixels.nbytes
    assert num_bytes > 1_000_000
    in_engine: list[int] = []
    world_matcher = matcher()
    engine = engine_of(
        tmp_path / "run",
        matcher=world_matcher,
        sources=[source()],
        settings=["sources.max_buffered_mb=1"],
    )
    world_matcher.before_describing = lambda frame: in_engine.append(engine._arrivals.used_bytes)
    assert run(engine).num_registered == NUM_FRAMES
    assert in_engine == [num_bytes] * NUM_FRAMES


# -- several sources ------------------------------------------------------------------------------


@pytest.mark.slow
def test_names_and_cameras_of_several_sources_do_not_collide(tmp_path: Path) -> None:
    world = world_of(NUM_FRAMES)
    halves = [
        source([frame_of(i, index=n, world=world) for n, i in enumerate(range(start, 17, 2))])
        for start in (1, 2)
    ]
    halves[1].happenings = [*halves[1].happenings, rejected(8)]
    outcome, written = run_world(tmp_path / "run", sources=halves)
    assert outcome.num_registered == NUM_FRAMES
    names = [row["name"] for row in written.rows]
    assert len(set(names)) == NUM_FRAMES + 1
    assert {name.partition("/")[0] for name in names} == {"source1", "source2"}
    model = latest_model(outcome.path)
    assert {image.name for image in model.images.values()} == set(names) - {"source2/000008.jpg"}
    assert model.num_cameras() == 2
    for image in model.images.values():
        assert image.camera_id == (1 if image.name.startswith("source1/") else 2)
        assert (outcome.path / "images" / image.name).is_file()


@pytest.mark.slow
def test_a_source_that_breaks_is_reported_and_does_not_stop_the_other(tmp_path: Path) -> None:
    broken = source([SourceError("rtsp: the camera does not answer")], label="camera")
    outcome, written = run_world(tmp_path / "run", sources=[broken, source()])
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert outcome.num_registered == NUM_FRAMES
    assert outcome.unopened == ("camera",)
    assert written.warnings() == ["rtsp: the camera does not answer"]


def test_a_broken_source_is_reported_while_the_other_goes_on(tmp_path: Path) -> None:
    told = threading.Event()

    class Watching(CountingView):
        def show_event(self, event: Event) -> None:
            if isinstance(event, Warned):
                told.set()

    broken, other = source([SourceError("gone")]), source([held_until(told)])
    outcome, _ = run_world(tmp_path / "run", sources=[broken, other], views=[Watching()])
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES


def test_a_run_whose_only_source_cannot_be_read_leaves_a_valid_folder(tmp_path: Path) -> None:
    outcome, written = run_world(tmp_path / "run", sources=[source([SourceError("no video")])])
    assert (outcome.num_keyframes, outcome.num_registered) == (0, 0)
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert written.warnings() == ["no video"]
    assert written.rows == []
    assert written.summary["components"] == 0
    assert trajectory_lines(outcome.path / "trajectory.txt") == []
    assert not (outcome.path / "latest").exists()


# -- stopping -------------------------------------------------------------------------------------


def test_a_signal_ends_a_live_run_after_what_has_arrived_is_mapped(tmp_path: Path) -> None:
    async def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()  # a camera that sends nothing more

    live = source([*frames(1, 10), interrupt])
    outcome, written = run_world(tmp_path / "run", sources=[live])
    assert outcome.stopped_by is StoppedBy.SIGNAL
    assert written.summary["stopped_by"] == written.events[-1]["stopped_by"] == "signal"
    assert live.is_closed
    assert written.statuses == ["keyframe"] * 10
    assert latest_model(outcome.path).num_reg_images() == 10
    assert len(trajectory_lines(outcome.path / "trajectory.txt")) == 10


def test_stopping_takes_no_further_frames_from_a_file(tmp_path: Path) -> None:
    engines: list[Engine] = []

    async def stop() -> None:
        engines[0].stop()

    file = source([*frames(1, 8), stop, *frames(9, NUM_FRAMES)])
    engines.append(engine_of(tmp_path / "run", matcher=matcher(), sources=[file]))
    outcome = run(engines[0])
    # The frame that was on its way when the stop came is still taken.
    assert file.num_given in (8, 9)
    assert outcome.num_keyframes == outcome.num_registered == file.num_given
    assert file.is_closed


# -- what breaks ----------------------------------------------------------------------------------


def assert_saved(outcome: RunOutcome, written: Written, *, num_registered: int) -> None:
    """The run failed, and all that was mapped is on disk."""
    assert outcome.stopped_by is StoppedBy.FAILURE
    assert written.summary["stopped_by"] == written.events[-1]["stopped_by"] == "failure"
    assert written.events[-1]["event"] == "RunFinished"
    assert outcome.num_registered == num_registered
    assert latest_model(outcome.path).num_reg_images() == num_registered
    assert len(trajectory_lines(outcome.path / "trajectory.txt")) >= num_registered
    num_dropped = sum(written.summary["frames_dropped"].values())
    assert written.summary["keyframes"] + num_dropped == len(written.rows)
    assert len(written.of_kind("FrameDropped")) == num_dropped


def test_a_source_that_breaks_ends_and_what_it_gave_is_mapped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = source([*frames(1, 8), KeyError("fx")])
    outcome, written = run_world(tmp_path / "run", sources=[broken])
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert written.statuses == ["keyframe"] * 8
    assert outcome.num_registered == 8
    (fault,) = written.of_kind("FaultOccurred")
    assert (fault["part"], fault["kind"]) == ("reading a source", "raised")
    assert (fault["detail"], fault["consequence"]) == (
        "KeyError: 'fx'",
        "fake: it ends; others go on",
    )
    assert written.summary["faults"] == {"reading a source: raised": 1}
    assert any(record.exc_info for record in caplog.records)


def test_a_source_that_breaks_does_not_end_the_others(tmp_path: Path) -> None:
    broken, other = source([ValueError("nonsense")]), source(frames(1, 8))
    outcome, written = run_world(tmp_path / "run", sources=[broken, other])
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert written.statuses == ["keyframe"] * 8


def test_an_unexpected_error_at_the_end_saves_the_map_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Mapper, finished: Any, **_: Any) -> None:
        raise RuntimeError("CHECK failed")

    monkeypatch.setattr(Mapper, "finish", fail)
    outcome, written = run_world(tmp_path / "run")
    assert_saved(outcome, written, num_registered=NUM_FRAMES)
    assert written.warnings() == ["finishing the map failed: RuntimeError: CHECK failed"]


@pytest.mark.slow
def test_a_map_that_cannot_be_copied_does_not_cost_the_trajectory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Mapper) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Mapper, "snapshot", fail)
    outcome, written = run_world(tmp_path / "run", settings=["snapshots.every_keyframes=0"])
    assert outcome.stopped_by is StoppedBy.FAILURE
    assert written.warnings() == ["saving the map failed: RuntimeError: no memory"]
    assert len(trajectory_lines(outcome.path / "trajectory.txt")) == NUM_FRAMES


@pytest.mark.slow
def test_an_unexpected_error_of_a_write_is_reported_and_later_writes_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Journal.add_keyframe

    def break_at_five(self: Journal, new: NewKeyframe) -> None:
        if new.keyframe.frame_id == 5:
            raise RuntimeError("cannot encode")
        original(self, new)

    monkeypatch.setattr(Journal, "add_keyframe", break_at_five)
    outcome, written = run_world(tmp_path / "run")
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert "writing: raised" in written.summary["faults"]
    assert written.summary["failed_writes"] >= 1
    assert any("writes that broke" in words for words in outcome.not_saved)  # the run has failed
    assert latest_model(outcome.path).num_reg_images() == outcome.num_registered >= 5
    assert set(written.statuses) == {"keyframe"}
    stored = read_stored_run(outcome.path).keyframes
    assert {one.keyframe.frame_id for one in stored} == set(range(1, outcome.num_keyframes + 1)) - {
        5
    }


class BrokenView:
    def __init__(self) -> None:
        self.is_closed = False

    def show_frame(self, frame: Frame, pose: FramePose | None) -> None:
        raise RuntimeError("the window is gone")

    def show_map(self, view: MapView) -> None:
        raise RuntimeError("the window is gone")

    def show_event(self, event: Event) -> None:
        raise RuntimeError("the window is gone")

    def close(self) -> None:
        self.is_closed = True


class CountingView(BrokenView):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.maps: list[MapView] = []
        self.num_frames = 0

    def show_frame(self, frame: Frame, pose: FramePose | None) -> None:
        self.num_frames += 1

    def show_map(self, view: MapView) -> None:
        self.maps.append(view)

    def show_event(self, event: Event) -> None:
        self.events.append(event)


@pytest.mark.slow
def test_a_view_that_breaks_costs_neither_the_run_nor_the_other_views(tmp_path: Path) -> None:
    broken, sound = BrokenView(), CountingView()
    outcome, written = run_world(tmp_path / "run", views=[broken, sound])
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert outcome.num_registered == NUM_FRAMES
    assert [type(event).__name__ for event in sound.events] == [
        record["event"] for record in written.events
    ]
    assert len(sound.maps[-1].keyframe_ids) == NUM_FRAMES
    assert sound.num_frames > 0
    assert sound.is_closed
    assert written.summary["view_events_lost"] == 0


@pytest.mark.slow
def test_pairs_that_cannot_be_matched_together_are_matched_one_by_one(tmp_path: Path) -> None:
    outcome, written = run_world(tmp_path / "run", matcher=matcher(fails=[8]))
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    (fault,) = written.of_kind("FaultOccurred")
    assert (fault["part"], fault["detail"]) == ("matching", "out of memory")
    assert written.statuses == ["keyframe"] * NUM_FRAMES
    assert outcome.num_registered == NUM_FRAMES


@pytest.mark.slow
def test_a_global_adjustment_that_fails_is_reported_and_the_map_grows_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("solver: out of memory")

    monkeypatch.setattr(background_jobs, "adjust_copy", fail)
    outcome, written = run_world(
        tmp_path / "run",
        settings=[
            "global_bundle_adjustment.synchronous_until=0",
            "global_bundle_adjustment.merge_after_keyframes=1",
        ],
    )
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert outcome.num_registered == NUM_FRAMES
    details = {fault["detail"] for fault in written.of_kind("FaultOccurred")}
    assert details == {"RuntimeError: solver: out of memory"}
    assert written.summary["global_ba_runs"] >= 1  # the last one, by the map itself, works


@pytest.mark.slow
def test_a_window_that_fails_is_reported_and_the_map_grows_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(problem: WindowProblem) -> WindowEstimate:
        raise RuntimeError("CUDA out of memory")

    outcome, written = run_world(
        tmp_path / "run",
        solve_window=fail,
        settings=[
            "window.min_keyframes=6",
            "window.interval=3",
            "window.weak_fit_ratio=10",
            "window.bootstrap=false",
            "window.max_final=0",
            "window.weak_fit_ratio=10",  # as often as they are due
        ],
    )
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert outcome.num_registered == NUM_FRAMES
    details = {fault["detail"] for fault in written.of_kind("FaultOccurred")}
    assert details == {"RuntimeError: CUDA out of memory"}
    assert {event["verdict"] for event in written.of_kind("WindowSolved")} == {"not_solved"}


# -- a full disk ----------------------------------------------------------------------------------


def fill_tables(monkeypatch: pytest.MonkeyPatch, *, table: str) -> None:
    original = os.write

    def write(descriptor: int, data: bytes) -> int:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name == table:
            raise ENOSPC
        return original(descriptor, data)

    monkeypatch.setattr(os, "write", write)


def fail_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise JournalError("keyframe: cannot be written: No space left on device")

    monkeypatch.setattr(Journal, "add_keyframe", fail)


def fail_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise SnapshotError("snapshots/000001: cannot be written: No space left on device")

    monkeypatch.setattr(recorder, "write_snapshot", fail)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fill", "min_failed"),
    [
        pytest.param(fail_journal, NUM_FRAMES, id="journal"),
        pytest.param(fail_snapshots, 2, id="snapshots"),
        pytest.param(
            lambda patch: fill_tables(patch, table="trajectory_live.txt"),
            NUM_FRAMES,
            id="trajectory_live.txt",
        ),
        pytest.param(lambda patch: fill_tables(patch, table="frames.csv"), NUM_FRAMES, id="frames"),
    ],
)
def test_a_full_disk_is_reported_once_and_counted_and_the_run_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fill: Callable[[pytest.MonkeyPatch], None],
    min_failed: int,
) -> None:
    engine = engine_of(tmp_path / "run", matcher=matcher(), sources=[source()])
    fill(monkeypatch)
    outcome = run(engine)
    written = Written.by(outcome)
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert outcome.num_registered == NUM_FRAMES
    assert written.summary["failed_writes"] >= min_failed
    # Pairs and cameras fail with the keyframes they belong to, under the same name.
    (warning,) = [words for words in written.warnings() if "No space left on device" in words]
    logged = [record.message for record in caplog.records if "No space" in record.message]
    assert logged == [warning]
    assert outcome.not_saved


@pytest.mark.slow
def test_a_disk_with_room_again_takes_the_rows_that_waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RunFolder._write_settled_rows
    calls: list[int] = []

    def full_at_first(self: RunFolder) -> None:
        calls.append(1)
        if len(calls) < NUM_FRAMES // 2:
            raise JournalError("frames.csv: cannot be written: No space left on device")
        original(self)

    monkeypatch.setattr(RunFolder, "_write_settled_rows", full_at_first)
    _, written = run_world(tmp_path / "run")
    assert written.statuses == ["keyframe"] * NUM_FRAMES
    assert written.summary["failed_writes"] == NUM_FRAMES // 2 - 1


# -- frames between keyframes ---------------------------------------------------------------------


def test_frames_of_a_video_that_stands_still_are_tracked_not_mapped(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    texture = rng.integers(0, 256, (75, 100, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
    video = source(frames(1, 6, pixels=texture), is_sequence=True)
    outcome, written = run_world(tmp_path / "run", sources=[video])
    assert written.statuses == ["keyframe", *["tracked"] * 5]
    assert outcome.num_keyframes == 1
    assert os.listdir(outcome.path / "images") == ["000000.jpg"]


@pytest.mark.slow
def test_poses_agree_with_the_true_ones(tmp_path: Path) -> None:
    outcome, _ = run_world(tmp_path / "run")
    world = world_of(NUM_FRAMES)
    lines = trajectory_lines(outcome.path / "trajectory.txt")
    centers = np.array([line.split()[1:4] for line in lines], dtype=float)
    true_centers = camera_center(world.poses)
    true_from_map = pycolmap.estimate_sim3d(centers, true_centers)
    assert true_from_map is not None
    placed = np.array([true_from_map * center for center in centers])
    assert np.abs(placed - true_centers).max() < 1e-6 * world.extent


def test_mapping_that_breaks_while_frames_wait_for_memory_still_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_at_once(self: Mapper, keyframe: Any, *finished: Any) -> None:
        raise RuntimeError("CHECK failed")

    monkeypatch.setattr(Mapper, "begin_keyframe", break_at_once)
    megabyte = np.zeros((600, 600, 3), np.uint8)  # a lone frame fills the budget
    outcome, written = run_world(
        tmp_path / "run",
        sources=[source(frames(1, 8, pixels=megabyte))],
        settings=["sources.max_buffered_mb=1"],
    )
    assert outcome.stopped_by is StoppedBy.FAILURE
    assert set(written.statuses) == {"dropped:stopped"}
