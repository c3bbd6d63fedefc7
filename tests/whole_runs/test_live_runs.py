"""Runs of live sources: news of them, requests of who watches, and what a slow engine drops."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pycolmap
import pytest

from engine.ports import Source
from engine.run.engine import RunOutcome, StoppedBy
from engine.run.event_loop import RunRequests
from engine.types import (
    DropReason,
    Frame,
    GpsFix,
    GpsReading,
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
from tests.support.waiting import HANG_S

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
        async with asyncio.timeout(HANG_S):
            while len(matcher.described) < num:  # noqa: ASYNC110 - the matcher has no event
                await asyncio.sleep(0.005)

    return wait


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
    requests, matcher = RunRequests(), WorldMatcher(world=world_of(NUM_FRAMES))

    def ask(command: RunCommand) -> Callable[[], Awaitable[None]]:
        async def asked() -> None:
            await asyncio.to_thread(requests, command)  # as watchers do: from another thread
            await asyncio.sleep(0.05)

        return asked

    source = live(
        [
            *frames(1, 4),
            at_ease(matcher, 4),
            ask(RunCommand.PAUSE),
            *frames(5, 8),
            ask(RunCommand.RESUME),
            *frames(9, 12),
        ]
    )
    outcome, written = run_world(tmp_path / "run", [source], matcher=matcher, requests=requests)
    assert written.statuses == ["keyframe"] * 4 + ["dropped:paused"] * 4 + ["keyframe"] * 4
    assert written.summary["frames_dropped"] == {"paused": 4}
    assert written.summary["frames_received"] == 12
    assert [event["command"] for event in written.of_kind("CommandTaken")] == ["pause", "resume"]
    assert outcome.stopped_by is StoppedBy.END_OF_SOURCES


def test_a_file_waits_while_the_run_is_paused_and_loses_nothing(tmp_path: Path) -> None:
    requests = RunRequests()

    async def pause() -> None:
        requests(RunCommand.PAUSE)
        await asyncio.sleep(0.02)
        asyncio.get_running_loop().call_later(0.2, requests, RunCommand.RESUME)

    started_s = time.monotonic()
    source = FakeSource(happenings=[*frames(1, 4), pause, *frames(5, 8)])
    _, written = run_world(tmp_path / "run", [source], requests=requests)
    assert written.statuses == ["keyframe"] * 8
    assert time.monotonic() - started_s > 0.2


def test_a_paused_run_can_be_stopped(tmp_path: Path) -> None:
    requests = RunRequests()

    async def pause_and_stop() -> None:
        requests(RunCommand.PAUSE)
        requests(RunCommand.STOP)
        await asyncio.sleep(0.02)

    source = FakeSource(happenings=[*frames(1, 4), pause_and_stop, *frames(5, 8)])
    outcome, written = run_world(tmp_path / "run", [source], requests=requests)
    assert outcome.stopped_by is StoppedBy.COMMAND
    assert written.summary["stopped_by"] == "command"
    assert len(written.rows) <= 5


def test_a_snapshot_on_request_comes_at_once(tmp_path: Path) -> None:
    requests, matcher = RunRequests(), WorldMatcher(world=world_of(NUM_FRAMES))

    async def ask() -> None:
        await at_ease(matcher, 8)()
        await asyncio.sleep(0.5)
        requests(RunCommand.SNAPSHOT)
        await asyncio.sleep(0.3)

    source = FakeSource(happenings=[*frames(1, 8), ask, *frames(9, 10)])
    settings = ["snapshots.every_keyframes=0", "snapshots.every_s=0"]
    _, written = run_world(
        tmp_path / "run", [source], matcher=matcher, requests=requests, settings=settings
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


MAPPING_S = 0.6


class SlowMatcher(WorldMatcher):
    """Matches as slowly as a large network."""

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        time.sleep(MAPPING_S / 2)  # is called twice for each keyframe: beside it and farther away
        return super().match(requests)


def test_a_slow_engine_maps_fresh_frames_and_drops_those_between(tmp_path: Path) -> None:
    world = SyntheticWorld(straight_path(200, step=0.1))
    period_s = 0.02

    async def tick() -> None:
        await asyncio.sleep(period_s)

    def arriving_now() -> Iterator[Happening]:
        for frame_id in world.frame_ids:
            yield tick
            yield frame_of(frame_id, world=world)

    source = FakeLiveSource(happenings=arriving_now())
    settings = ["sources.frame_queue_size=2"]
    _, written = run_world(
        tmp_path / "run", [source], matcher=SlowMatcher(world=world), settings=settings
    )
    assert written.summary["frames_received"] == 200
    assert written.summary["frames_dropped"]["overload"] > 150
    started_s = written.of_kind("MapInitialized")[0]["at_s"]
    ages_s = [e["latency_s"] for e in written.of_kind("FramePosed") if e["at_s"] > started_s + 0.01]
    # One more may wait while one is mapped; the last two wait with no newer ones to replace them.
    assert MAPPING_S <= max(ages_s[:-2]) < 2.6 * MAPPING_S


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
