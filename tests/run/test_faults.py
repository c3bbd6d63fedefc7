"""Parts of a run that raise or hang: each costs itself, is counted, and the map goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pycolmap
import pytest

from engine.events import RunPart
from engine.mapping.mapper import Mapper
from engine.matching.pair_matching import PairMatching
from engine.ports import ArrivalSink
from engine.run import event_loop
from engine.run.engine import RunOutcome, StoppedBy
from engine.run.faults import Guard, wait_for_call
from engine.tracking.frame_tracker import FrameTracker
from engine.types import Frame, MatchRequest, PairMatches
from engine.window_types import WindowEstimate, WindowProblem
from tests.support.fake_runs import (
    FakeLiveSource,
    FakeSource,
    WorldMatcher,
    Written,
    engine_of,
    frame_of,
    world_of,
)
from tests.support.faults import FaultsSeen, Hanging, guard_of
from tests.support.waiting import HANG_S, until

NUM_FRAMES = 14
MANY_WINDOWS = ["window.min_keyframes=6", "window.interval=3", "window.weak_fit_ratio=10"]


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    """Calls that hang until the test ends."""
    calls = Hanging()
    yield calls
    calls.release()


def frames(first: int = 1, last: int = NUM_FRAMES) -> list[Frame]:
    world = world_of(NUM_FRAMES)
    return [frame_of(i, world=world) for i in range(first, last + 1)]


@dataclass(kw_only=True)
class BadMatcher(WorldMatcher):
    """Raises or hangs where a test says; matches by pair, so that a bad one can be told."""

    hanging: Hanging = field(default_factory=Hanging)
    raises_on: frozenset[int] = frozenset()  # newest keyframes whose pairs all raise, once
    hangs_on: frozenset[int] = frozenset()  # the same, that hang
    bad_pairs: frozenset[tuple[int, int]] = frozenset()  # that always raise
    raised: set[int] = field(default_factory=set)
    num_together: dict[int, int] = field(default_factory=dict)
    num_alone: dict[int, int] = field(default_factory=dict)

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        newest = max((request.pair.second for request in requests), default=0)
        if newest in self.hangs_on - self.raised:
            self.raised.add(newest)
            self.hanging.hang()
        for request in requests:
            if request.pair.second in self.raises_on - self.raised:
                self.num_alone[newest] = self.num_alone.get(newest, 0) + (len(requests) == 1)
                self.num_together.setdefault(newest, len(requests))
                if self.num_alone[newest] == self.num_together[newest]:
                    self.raised.add(newest)  # all were tried, the last one alone
                raise RuntimeError("device lost")
            if (request.pair.first, request.pair.second) in self.bad_pairs:
                raise RuntimeError("illegal access")
        return super().match(requests)


def bad_matcher(**options: Any) -> BadMatcher:
    return BadMatcher(world=world_of(NUM_FRAMES), **options)


def run_frames(
    path: Path, *, matcher: WorldMatcher | None = None, **options: Any
) -> tuple[RunOutcome, Written]:
    options.setdefault("sources", [FakeSource(happenings=frames())])
    engine = engine_of(path, matcher=matcher or bad_matcher(), **options)
    outcome = asyncio.run(asyncio.wait_for(engine.run(), HANG_S))
    written = Written.by(outcome)
    counted = written.summary["frames_dropped"]
    num = written.summary["keyframes"] + written.statuses.count("tracked") + sum(counted.values())
    assert num == len(written.rows) == written.summary["frames_received"]
    return outcome, written


def faults_of(written: Written) -> list[tuple[str, str]]:
    return [(event["part"], event["kind"]) for event in written.of_kind("FaultOccurred")]


def model_of(outcome: RunOutcome) -> pycolmap.Reconstruction:
    model = pycolmap.Reconstruction(outcome.path / "latest" / "sparse" / "0")
    assert model.is_valid()
    return model


# -- a guard --------------------------------------------------------------------------------------


def test_a_guarded_call_returns_and_raises_as_the_call_does() -> None:
    def fail() -> None:
        raise KeyError("why")

    guard = guard_of()
    assert guard.call(lambda: 3) == 3
    with pytest.raises(KeyError, match="why"):
        guard.call(fail)
    assert guard.call(lambda: threading.current_thread().daemon)  # does not keep a process alive
    guard.close()


def test_calls_of_a_guard_that_follow_each_other_share_a_thread_and_others_do_not() -> None:
    guard = guard_of()
    meeting = threading.Barrier(2)

    def meet() -> int:
        meeting.wait(HANG_S)
        return threading.get_ident()

    others: list[int] = []
    other = threading.Thread(target=lambda: others.append(guard.call(meet)))
    other.start()
    mine = guard.call(meet)
    other.join(HANG_S)
    assert others != [mine]
    assert {guard.call(threading.get_ident) for _ in range(5)} <= {mine, *others}
    guard.close()


def test_a_call_that_hangs_leaves_its_thread_behind_and_after_some_there_are_none(
    hanging: Hanging,
) -> None:
    off: list[str] = []
    guard = Guard(
        RunPart.MATCHING,
        limit_s=9.0,
        max_hangs=2,
        wait=hanging.wait,
        on_off=lambda: off.append("off"),
    )
    for _ in range(2):
        assert guard.call(lambda: 1) == 1
        with pytest.raises(Exception, match="matching has not ended after 27 s"):
            guard.call(hanging.hang, times=3)
    assert (off, guard.is_off) == (["off"], True)
    with pytest.raises(Exception, match="is off"):
        guard.call(pytest.fail)


def test_without_a_limit_a_call_is_waited_for() -> None:
    guard = Guard(RunPart.VIEW, limit_s=0.0, max_hangs=1, wait=wait_for_call)
    assert guard.call(lambda: 5) == 5
    guard.close()


def test_a_fault_is_told_at_first_and_when_their_number_has_doubled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    faults = FaultsSeen()
    for number in range(1, 10):
        faults.report(RunPart.MATCHING, RuntimeError(f"number {number}"), consequence="none")
    assert [fault.num_faults for fault in faults.seen] == list(range(1, 10))
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [message.partition("number ")[2][0] for message in told] == ["1", "2", "4", "8"]
    assert faults.ends == []


def test_the_first_fault_is_the_end_of_a_strict_run() -> None:
    faults = FaultsSeen(is_strict=True)
    faults.report(RunPart.VIEW, RuntimeError("gone"), consequence="it is left out")
    assert faults.ends == ["a view failed, and the run is strict: RuntimeError: gone"]


# -- matchers -------------------------------------------------------------------------------------


def test_a_keyframe_that_cannot_be_described_is_dropped_and_the_map_goes_on(tmp_path: Path) -> None:
    def fail(frame: Frame) -> None:
        if frame.frame_id in (6, 7):
            raise MemoryError

    outcome, written = run_frames(tmp_path / "run", matcher=bad_matcher(before_describing=fail))
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert [i for i, status in enumerate(written.statuses, 1) if status != "keyframe"] == [6, 7]
    assert written.summary["frames_dropped"] == {"failed": 2}
    assert written.summary["faults"] == {"describing: raised": 2}
    assert model_of(outcome).num_reg_images() == NUM_FRAMES - 2


def test_a_keyframe_whose_matching_failed_is_matched_again_with_the_next_one(
    tmp_path: Path,
) -> None:
    matcher = bad_matcher(raises_on=frozenset({9}))
    outcome, written = run_frames(tmp_path / "run", matcher=matcher)
    assert faults_of(written) == [("matching", "raised")]
    assert written.statuses == ["keyframe"] * NUM_FRAMES
    assert model_of(outcome).num_reg_images() == NUM_FRAMES
    pairs = {(event["first"], event["second"]) for event in written.of_kind("PairVerified")}
    assert (8, 9) in pairs


def test_a_pair_that_cannot_be_matched_costs_only_itself(tmp_path: Path) -> None:
    matcher = bad_matcher(bad_pairs=frozenset({(7, 9)}))
    outcome, written = run_frames(tmp_path / "run", matcher=matcher)
    (fault,) = written.of_kind("FaultOccurred")
    assert fault["frame_id"] == 9
    assert "matched one by one; 1 of" in fault["consequence"]
    pairs = {(event["first"], event["second"]) for event in written.of_kind("PairVerified")}
    assert (7, 9) not in pairs
    assert (8, 9) in pairs
    assert model_of(outcome).num_reg_images() == NUM_FRAMES


def test_a_matcher_that_hangs_is_left_behind_and_its_keyframe_matched_again(
    tmp_path: Path, hanging: Hanging
) -> None:
    matcher = bad_matcher(hanging=hanging, hangs_on=frozenset({8}))
    outcome, written = run_frames(tmp_path / "run", matcher=matcher, wait_for_call=hanging.wait)
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert faults_of(written) == [("matching", "hung")]
    assert outcome.num_hangs == 1
    assert model_of(outcome).num_reg_images() == NUM_FRAMES


def test_a_matcher_that_keeps_hanging_ends_the_run_and_the_map_is_saved(
    tmp_path: Path, hanging: Hanging
) -> None:
    matcher = bad_matcher(hanging=hanging, hangs_on=frozenset({9, 10}))
    outcome, written = run_frames(
        tmp_path / "run",
        matcher=matcher,
        wait_for_call=hanging.wait,
        settings=["faults.max_hangs=2"],
    )
    assert outcome.stopped_by is StoppedBy.FAILURE
    assert "matching hung 2 times: the run ends without its matcher" in written.warnings()
    assert model_of(outcome).num_reg_images() >= 8


@pytest.mark.parametrize("wrong", ["too few", "other rows"])
def test_results_that_are_not_of_the_pairs_asked_for_are_refused(
    tmp_path: Path, wrong: str
) -> None:
    class Wrong(WorldMatcher):
        def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
            matched = super().match(requests)
            if wrong == "too few":
                return matched[:-1]
            for one in matched:
                object.__setattr__(one, "matches_idx", one.matches_idx + 10**6)
            return matched

    outcome, written = run_frames(
        tmp_path / "run",
        matcher=Wrong(world=world_of(NUM_FRAMES)),
    )
    assert (outcome.num_keyframes, outcome.num_registered) == (NUM_FRAMES, 0)
    assert set(faults_of(written)) == {("matching", "raised")}


def test_matching_that_breaks_in_the_engine_costs_pairs_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PairMatching._match_in_two_rounds

    def break_at_nine(self: PairMatching, frame_id: int, **rest: Any) -> Any:
        if frame_id == 9 and not broken:
            broken.append(9)
            raise ZeroDivisionError
        return original(self, frame_id, **rest)  # type: ignore[arg-type]

    broken: list[int] = []
    monkeypatch.setattr(PairMatching, "_match_in_two_rounds", break_at_nine)
    outcome, written = run_frames(tmp_path / "run")
    assert faults_of(written) == [("matching", "raised")]
    assert model_of(outcome).num_reg_images() == NUM_FRAMES


# -- solvers --------------------------------------------------------------------------------------


def test_a_window_solver_that_hangs_is_not_called_any_more(
    tmp_path: Path, hanging: Hanging
) -> None:
    called: list[int] = []

    def hang(problem: WindowProblem) -> WindowEstimate:
        called.append(problem.num_frames)
        hanging.hang()
        raise AssertionError

    outcome, written = run_frames(
        tmp_path / "run",
        solve_window=hang,
        wait_for_call=hanging.wait,
        settings=[*MANY_WINDOWS, "faults.max_hangs=1"],
    )
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert len(called) == 1
    assert ("solving a window", "hung") in faults_of(written)
    assert model_of(outcome).num_reg_images() == NUM_FRAMES


# -- tracking and decoding ------------------------------------------------------------------------


def test_a_tracker_that_breaks_costs_a_frame_and_its_camera_is_tracked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FrameTracker.follow

    def break_at_six(self: FrameTracker, frame: Frame, **rest: Any) -> Any:
        if frame.frame_id == 6:
            raise ArithmeticError("no flow")
        return original(self, frame, **rest)

    monkeypatch.setattr(FrameTracker, "follow", break_at_six)
    outcome, written = run_frames(tmp_path / "run")
    assert faults_of(written) == [("tracking", "raised")]
    assert written.statuses[5] == "dropped:failed"
    assert model_of(outcome).num_reg_images() == NUM_FRAMES - 1


# -- sources --------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class ShakySource(FakeLiveSource):
    """A live source that breaks after each frame, as often as it is received."""

    frames_left: list[Frame] = field(default_factory=list)
    num_received: int = 0

    async def receive(self, sink: ArrivalSink) -> None:
        self.num_received += 1
        if self.frames_left:
            self.happenings = [self.frames_left.pop(0)]
            await super().receive(sink)
            await asyncio.sleep(0.0)
        raise KeyError("nonsense")


def test_a_live_source_that_breaks_is_received_again_some_times(tmp_path: Path) -> None:
    source = ShakySource(happenings=[], frames_left=frames())
    settings = ["live_sources.retry_first_s=0.001", "live_sources.retry_max_s=0.001"]
    outcome, written = run_frames(
        tmp_path / "run",
        sources=[source],
        settings=[*settings, "sources.frame_queue_size=100"],
    )
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert 5 <= source.num_received <= NUM_FRAMES + 5
    assert len(faults_of(written)) == source.num_received
    assert written.of_kind("FaultOccurred")[-1]["consequence"] == "fake: it ends; others go on"


def test_a_source_that_does_not_stop_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.run.ingestion._MAX_CLOSE_S", 0.01)

    class Stubborn(FakeLiveSource):
        async def receive(self, sink: ArrivalSink) -> None:
            await super().receive(sink)
            os.kill(os.getpid(), signal.SIGTERM)
            while not released.is_set():
                try:
                    await released.wait()
                except asyncio.CancelledError:
                    continue

    released = asyncio.Event()

    async def run_and_release() -> RunOutcome:
        engine = engine_of(
            tmp_path / "run", matcher=bad_matcher(), sources=[Stubborn(happenings=frames(1, 3))]
        )
        outcome = await asyncio.wait_for(engine.run(), HANG_S)
        released.set()
        return outcome

    outcome = asyncio.run(run_and_release())
    assert outcome.stopped_by is StoppedBy.SIGNAL
    assert faults_of(Written.by(outcome)) == [("reading a source", "hung")]
    assert outcome.num_keyframes >= 1


# -- mapping --------------------------------------------------------------------------------------


def break_mapper(
    monkeypatch: pytest.MonkeyPatch, method: str, *, at: frozenset[int], times: int = 1
) -> None:
    """Has a method of the mapper do its work and then raise, so that a step is half done."""
    original = getattr(Mapper, method)
    raised: dict[int, int] = {}

    def break_down(self: Mapper, given: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, given, *args, **kwargs)
        frame_id = given if isinstance(given, int) else given.frame_id
        if frame_id in at and raised.get(frame_id, 0) < times:
            raised[frame_id] = raised.get(frame_id, 0) + 1
            raise RuntimeError("CHECK failed")
        return result

    monkeypatch.setattr(Mapper, method, break_down)


@pytest.mark.parametrize("method", ["add_keyframe", "_settle"])
def test_a_map_that_was_left_half_changed_is_built_anew_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    break_mapper(monkeypatch, method, at=frozenset({9}))
    outcome, written = run_frames(tmp_path / "run")
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    (fault,) = written.of_kind("FaultOccurred")
    assert (fault["part"], fault["frame_id"]) == ("mapping", 9)
    assert "built anew" in fault["consequence"]
    assert written.statuses == ["keyframe"] * NUM_FRAMES
    model = model_of(outcome)
    assert model.num_reg_images() == NUM_FRAMES
    database = pycolmap.Database.open(outcome.path / "database.db")
    assert database.num_images() == NUM_FRAMES
    database.close()


def test_a_keyframe_that_breaks_the_map_each_time_is_built_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_mapper(monkeypatch, "add_keyframe", at=frozenset({9}))
    original = Mapper.rebuild

    def break_with_it(self: Mapper, *args: Any, without_its_pairs: bool = False) -> Any:
        if not without_its_pairs:
            raise RuntimeError("again")
        return original(self, *args, without_its_pairs=without_its_pairs)

    monkeypatch.setattr(Mapper, "rebuild", break_with_it)
    outcome, written = run_frames(tmp_path / "run")
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES
    assert len(faults_of(written)) == 2
    assert written.statuses == ["keyframe"] * NUM_FRAMES
    assert model_of(outcome).num_reg_images() >= NUM_FRAMES - 1


def test_mapping_that_keeps_breaking_ends_the_run_and_a_whole_map_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_mapper(monkeypatch, "add_keyframe", at=frozenset(range(8, NUM_FRAMES)))
    outcome, written = run_frames(tmp_path / "run", settings=["faults.max_map_rebuilds=2"])
    assert outcome.stopped_by is StoppedBy.FAILURE
    assert "mapping failed: RuntimeError: CHECK failed" in written.warnings()
    consequences = [event["consequence"] for event in written.of_kind("FaultOccurred")]
    assert consequences[-1] == "the run ends and saves the map"
    assert model_of(outcome).num_reg_images() >= 9
    assert set(written.statuses[10:]) == {"dropped:stopped"}


def test_a_background_result_that_breaks_the_map_does_not_cost_the_keyframe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Mapper._merge
    broken: list[bool] = []

    def break_once(self: Mapper, finished: Any) -> None:
        original(self, finished)
        if finished and not broken:
            broken.append(True)
            raise RuntimeError("CHECK failed")

    monkeypatch.setattr(Mapper, "_merge", break_once)
    settings = [
        "global_bundle_adjustment.synchronous_until=0",
        "global_bundle_adjustment.merge_after_keyframes=1",
    ]
    outcome, written = run_frames(tmp_path / "run", settings=settings)
    assert broken == [True]
    assert faults_of(written) == [("mapping", "raised")]
    assert written.statuses == ["keyframe"] * NUM_FRAMES
    assert model_of(outcome).num_reg_images() == NUM_FRAMES


def _never(_: pycolmap.Reconstruction) -> bool:
    return False


def test_the_last_snapshot_is_not_replaced_by_a_map_that_is_half_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_mapper(monkeypatch, "add_keyframe", at=frozenset({12}))
    original = pycolmap.Reconstruction.is_valid
    monkeypatch.setattr(pycolmap.Reconstruction, "is_valid", _never)
    settings = ["faults.max_map_rebuilds=0", "snapshots.every_keyframes=4"]
    outcome, written = run_frames(tmp_path / "run", settings=settings)
    monkeypatch.setattr(pycolmap.Reconstruction, "is_valid", original)
    assert outcome.stopped_by is StoppedBy.FAILURE
    sizes = [event["num_keyframes"] for event in written.of_kind("SnapshotWritten")]
    assert model_of(outcome).num_reg_images() == sizes[-1] < 12


# -- strict runs ----------------------------------------------------------------------------------


def test_a_strict_run_ends_at_its_first_fault_and_saves_its_map(tmp_path: Path) -> None:
    matcher = bad_matcher(bad_pairs=frozenset({(2, 4)}))
    source = FakeSource(happenings=frames())
    outcome, written = run_frames(
        tmp_path / "run",
        matcher=matcher,
        sources=[source],
        settings=[
            "faults.strict=true",
            "sources.frame_queue_size=1",
            "sources.mapping_queue_size=1",
        ],
    )
    assert outcome.stopped_by is StoppedBy.FAILURE
    assert "matching failed, and the run is strict: RuntimeError: illegal access" in (
        written.warnings()
    )
    assert source.num_given < NUM_FRAMES
    assert outcome.num_keyframes >= 4


# -- signals --------------------------------------------------------------------------------------


def test_a_second_signal_drops_what_waits_counted_and_saves_and_a_third_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(event_loop, "_SAME_REQUEST_S", 0.0)
    held, released, left = threading.Event(), threading.Event(), asyncio.Event()

    def hold(frame: Frame) -> None:
        if frame.frame_id == 9:
            held.set()
            assert released.wait(HANG_S)

    async def interrupt_thrice() -> None:
        await until(held.is_set)
        os.kill(os.getpid(), signal.SIGINT)
        await until(lambda: "are still mapped" in caplog.text)
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: "dropping the" in caplog.text)
        os.kill(os.getpid(), signal.SIGINT)
        await left.wait()
        released.set()

    tasks: list[asyncio.Task[None]] = []

    async def interrupt() -> None:
        tasks.append(asyncio.create_task(interrupt_thrice()))
        await asyncio.Event().wait()

    live = FakeLiveSource(happenings=[*frames(1, 12), interrupt])
    outcome, written = run_frames(
        tmp_path / "run",
        matcher=bad_matcher(before_describing=hold),
        sources=[live],
        settings=["sources.frame_queue_size=100"],
        leave=left.set,
    )
    assert outcome.stopped_by is StoppedBy.SIGNAL
    assert written.statuses[:8] == ["keyframe"] * 8
    assert set(written.statuses[9:]) == {"dropped:stopped"}
    assert written.summary["frames_dropped"]["stopped"] >= 3
    assert model_of(outcome).num_reg_images() >= 8
    (waiting,) = [line for line in caplog.messages if "are still mapped" in line]
    assert 4 <= int(waiting.split()[1]) <= 12  # frame 9 is held, and those after it wait
