"""Runs of live sources: news of them, requests of who watches, and what a slow engine drops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pycolmap
import pytest

from engine.events import CommandTaken, Event, FramePosed
from engine.mapping import pose_reports
from engine.ports import Source
from engine.run.engine import RunOutcome, StoppedBy
from engine.run.event_loop import RunRequests
from engine.types import (
    DropReason,
    Features,
    Frame,
    FramePose,
    GpsFix,
    GpsReading,
    MapView,
    MatchRequest,
    PairMatches,
    RunCommand,
    SourceNotice,
    SourceState,
)
from tests.support.fake_runs import (
    FakeLiveSource,
    FakeSource,
    Happening,
    WorldMatcher,
    Written,
    engine_of,
    frame_of,
    rejected,
    world_of,
)
from tests.support.synthetic import SyntheticWorld, straight_path
from tests.support.waiting import HANG_S, until

NUM_FRAMES = 20


def frames(first: int, last: int, **options: Any) -> list[Frame]:
    world = world_of(NUM_FRAMES)
    return [frame_of(i, world=world, **options) for i in range(first, last + 1)]


def live(happenings: Sequence[Happening]) -> FakeLiveSource:
    return FakeLiveSource(happenings=happenings)


def run_world(path: Path, sources: Sequence[Source], **options: Any) -> tuple[RunOutcome, Any]:
    options.setdefault("matcher", WorldMatcher(world=world_of(NUM_FRAMES)))
    engine = engine_of(path, sources=sources, **options)
    outcome = asyncio.run(asyncio.wait_for(engine.run(), HANG_S))
    return outcome, Written.by(outcome)


def at_ease(matcher: WorldMatcher, num: int) -> Callable[[], Awaitable[None]]:
    """Waits until so many keyframes have been described."""

    async def wait() -> None:
        await until(lambda: len(matcher.described) >= num)

    return wait


class EventsSeen:
    """A view that keeps the events of a run."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def show_frame(self, frame: Frame, pose: FramePose | None) -> None:
        pass

    def show_map(self, view: MapView) -> None:
        pass

    def show_event(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass

    async def until(self, kind: type[Event], num: int) -> None:
        """Waits until so many events of a kind were shown."""
        await until(lambda: sum(isinstance(event, kind) for event in self.events) >= num)


# -- news -----------------------------------------------------------------------------------------


def test_news_of_a_source_are_told_in_order_between_its_frames(tmp_path: Path) -> None:
    def notice(state: SourceState) -> SourceNotice:
        return SourceNotice(source="rtsp://drone", state=state, detail=f"it is {state}")

    source = live(
        [
            notice(SourceState.CONNECTED),
            *frames(1, 2),
            notice(SourceState.LOST),
            notice(SourceState.CONNECTED),
            *frames(3, 4),
        ]
    )
    _, written = run_world(tmp_path / "run", [source])
    told = written.of_kind("SourceChanged")
    assert [event["state"] for event in told] == ["connected", "lost", "connected"]
    assert told[1]["detail"] == "it is lost"
    assert len(written.rows) == 4


def test_what_a_source_dropped_itself_counts_as_received_and_dropped_once(tmp_path: Path) -> None:
    dropped = [replace(rejected(index), reason=DropReason.OVERLOAD) for index in range(4, 7)]
    _, written = run_world(tmp_path / "run", [live([*frames(1, 4), *dropped])])
    assert written.summary["frames_received"] == 7
    assert written.summary["frames_dropped"]["overload"] >= 3
    assert len(written.rows) == 7


# -- positions ------------------------------------------------------------------------------------


def reading(frame_id: int, *, camera_key: str | None = None) -> GpsReading:
    return GpsReading(
        source="fake",
        camera_key=camera_key,
        captured_at_s=0.1 * (frame_id - 1),
        fix=GpsFix(latitude_deg=frame_id * 1e-4, longitude_deg=8.0, altitude_m=400.0),
    )


def recorded_latitudes_deg(path: Path) -> dict[int, float]:
    """Latitudes of the keyframes that have a position, by their ids."""
    database = pycolmap.Database.open(path / "database.db")
    priors = database.read_all_pose_priors()
    database.close()
    return {prior.corr_data_id.id: float(prior.position[0]) for prior in priors}


def test_frames_get_positions_that_came_beside_them(tmp_path: Path) -> None:
    world_frames = frames(1, 4)
    source = FakeSource(
        happenings=[reading(1), world_frames[0], reading(3), *world_frames[1:]], is_sequence=False
    )
    outcome, _ = run_world(tmp_path / "run", [source])
    latitudes_deg = recorded_latitudes_deg(outcome.path)
    assert latitudes_deg.keys() == {frame.frame_id for frame in world_frames}
    assert [latitudes_deg[i] for i in (1, 2, 3)] == pytest.approx([1e-4, 2e-4, 3e-4])


def test_positions_of_one_source_are_not_those_of_another(tmp_path: Path) -> None:
    here, there = frames(1, 2), frames(3, 4)
    sources = [
        FakeSource(happenings=[reading(1), *here]),
        FakeSource(happenings=there, label="other"),
    ]
    outcome, written = run_world(tmp_path / "run", sources)
    assert written.statuses == ["keyframe"] * 4
    assert recorded_latitudes_deg(outcome.path).keys() == {frame.frame_id for frame in here}


# -- requests -------------------------------------------------------------------------------------


def test_frames_that_come_while_the_run_is_paused_are_dropped_and_counted(tmp_path: Path) -> None:
    requests, matcher, seen = RunRequests(), WorldMatcher(world=world_of(NUM_FRAMES)), EventsSeen()

    def ask(command: RunCommand, *, num: int) -> Callable[[], Awaitable[None]]:
        async def asked() -> None:
            await asyncio.to_thread(requests, command)  # as watchers do: from another thread
            await seen.until(CommandTaken, num)

        return asked

    source = live(
        [
            *frames(1, 4),
            at_ease(matcher, 4),
            ask(RunCommand.PAUSE, num=1),
            *frames(5, 8),
            ask(RunCommand.RESUME, num=2),
            *frames(9, 12),
        ]
    )
    outcome, written = run_world(
        tmp_path / "run", [source], matcher=matcher, requests=requests, views=[seen]
    )
    assert written.statuses == ["keyframe"] * 4 + ["dropped:paused"] * 4 + ["keyframe"] * 4
    assert written.summary["frames_dropped"] == {"paused": 4}
    assert written.summary["frames_received"] == 12
    assert [event["command"] for event in written.of_kind("CommandTaken")] == ["pause", "resume"]
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES


def test_a_file_waits_while_the_run_is_paused_and_loses_nothing(tmp_path: Path) -> None:
    requests, seen = RunRequests(), EventsSeen()
    num_given: list[int] = []

    async def resume() -> None:
        for _ in range(100):  # in which a run that goes on would take the next frames
            await asyncio.sleep(0)
        num_given.append(source.num_given)
        requests(RunCommand.RESUME)

    async def pause() -> None:
        requests(RunCommand.PAUSE)
        await seen.until(CommandTaken, 1)
        resuming.append(asyncio.create_task(resume()))

    resuming: list[asyncio.Task[None]] = []
    source = FakeSource(happenings=[*frames(1, 4), pause, *frames(5, 8)])
    _, written = run_world(tmp_path / "run", [source], requests=requests, views=[seen])
    assert written.statuses == ["keyframe"] * 8
    assert num_given == [5], "the frame that waits"


def test_a_paused_run_can_be_stopped(tmp_path: Path) -> None:
    requests, seen = RunRequests(), EventsSeen()

    async def pause_and_stop() -> None:
        requests(RunCommand.PAUSE)
        requests(RunCommand.STOP)
        await seen.until(CommandTaken, 2)

    source = FakeSource(happenings=[*frames(1, 4), pause_and_stop, *frames(5, 8)])
    outcome, written = run_world(tmp_path / "run", [source], requests=requests, views=[seen])
    assert outcome.stopped_by is StoppedBy.COMMAND
    assert written.summary["stopped_by"] == "command"
    assert len(written.rows) <= 5


def test_a_snapshot_on_request_comes_at_once(tmp_path: Path) -> None:
    requests, seen = RunRequests(), EventsSeen()

    async def ask() -> None:
        await seen.until(FramePosed, 8)
        requests(RunCommand.SNAPSHOT)
        await until((tmp_path / "run" / "snapshots" / "000001").is_dir)

    source = FakeSource(happenings=[*frames(1, 8), ask, *frames(9, 10)])
    settings = ["snapshots.every_keyframes=0", "snapshots.every_s=0"]
    _, written = run_world(
        tmp_path / "run", [source], requests=requests, views=[seen], settings=settings
    )
    sizes = [event["num_keyframes"] for event in written.of_kind("SnapshotWritten")]
    assert len(sizes) == 2
    assert sizes[0] <= 8 < sizes[1]
    assert Path(written.of_kind("SnapshotWritten")[0]["path"]).name == "000001"


def test_a_request_before_the_run_is_answered_when_it_starts(tmp_path: Path) -> None:
    requests = RunRequests()
    requests(RunCommand.STOP)
    source = live([asyncio.Event().wait])  # type: ignore[list-item]
    outcome, _ = run_world(tmp_path / "run", [source], requests=requests)
    assert outcome.stopped_by is StoppedBy.COMMAND


# -- overload -------------------------------------------------------------------------------------


FRAMES_PER_MAPPING = 30  # that come while a keyframe is mapped


class Pace:
    """A clock that counts the frames that came; more come as the engine works."""

    def __init__(self, num_frames: int) -> None:
        self._num_frames = num_frames
        self._num_let_in = 1
        self._num_given = 0
        self._changed = threading.Condition()

    def monotonic(self) -> float:
        """How many frames came."""
        return float(self._num_given)

    def let_in(self, num: int) -> int:
        """Lets in so many more frames; how many came in all once they are there."""
        with self._changed:
            self._num_let_in = min(self._num_let_in + num, self._num_frames)
            self._changed.notify_all()
            return self._num_let_in

    def work(self, num: int) -> None:
        """Works until so many more frames came."""
        num_then = self.let_in(num)
        with self._changed:
            assert self._changed.wait_for(lambda: self._num_given >= num_then, HANG_S)

    def next_frame(self) -> None:
        """Waits until the next frame comes."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._num_given < self._num_let_in, HANG_S)
            self._num_given += 1
            self._changed.notify_all()


@dataclass(kw_only=True)
class SlowMatcher(WorldMatcher):
    """Matches as slowly as a large network; a frame comes while another is described."""

    pace: Pace

    def describe(self, frame: Frame) -> Features:
        self.pace.let_in(1)
        return super().describe(frame)

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        # Is called twice for each keyframe: beside it and farther away.
        self.pace.work(FRAMES_PER_MAPPING // 2)
        return super().match(requests)


@pytest.mark.slow
def test_a_slow_engine_maps_fresh_frames_and_drops_those_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_frames = 300
    world = SyntheticWorld(straight_path(num_frames, step=0.07))
    pace = Pace(num_frames)
    monkeypatch.setattr(pose_reports, "time", pace)

    async def tick() -> None:
        await asyncio.to_thread(pace.next_frame)

    def arriving_now() -> Iterator[Happening]:
        for frame_id in world.frame_ids:
            yield tick
            yield replace(frame_of(frame_id, world=world), received_at_s=pace.monotonic())

    source = FakeLiveSource(happenings=arriving_now())
    settings = ["sources.frame_queue_size=2"]
    _, written = run_world(
        tmp_path / "run", [source], matcher=SlowMatcher(world=world, pace=pace), settings=settings
    )
    assert written.summary["frames_received"] == num_frames
    assert written.summary["frames_dropped"]["overload"] > 0.75 * num_frames
    events = iter(written.events)
    assert any(event["event"] == "MapInitialized" for event in events)
    assert any(event["event"] == "KeyframeAdded" for event in events)  # the first after that
    ages = [event["latency_s"] for event in events if event["event"] == "FramePosed"]
    # One more may wait while one is mapped; the last two wait with no newer ones to replace them.
    assert FRAMES_PER_MAPPING <= max(ages[:-2]) < 2.6 * FRAMES_PER_MAPPING


def test_cameras_of_one_live_source_do_not_push_out_each_other_s_frames(tmp_path: Path) -> None:
    describing, all_given = threading.Event(), threading.Event()

    def hold_up(frame: Frame) -> None:
        describing.set()
        assert all_given.wait(HANG_S)

    async def until_describing() -> None:
        assert await asyncio.to_thread(describing.wait, HANG_S)

    async def end() -> None:
        all_given.set()

    slow_camera = frames(2, 3, camera_key="slow")
    fast_camera = frames(4, 12, camera_key="fast")
    source = live([*frames(1, 1), until_describing, *slow_camera, *fast_camera, end])
    matcher = WorldMatcher(world=world_of(NUM_FRAMES), before_describing=hold_up)
    settings = ["sources.frame_queue_size=2"]
    _, written = run_world(tmp_path / "run", [source], matcher=matcher, settings=settings)
    used = [int(row["frame_id"]) for row in written.rows if row["status"] == "keyframe"]
    assert used == [1, 2, 3, 11, 12]
    assert written.summary["frames_dropped"] == {"overload": 7}
