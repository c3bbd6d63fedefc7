"""Runs that go on: in the folder of a run that was cut off or ended, from its start to its end."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import sqlite3
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import pycolmap
import pytest

from engine.config import load_config
from engine.errors import MapError
from engine.mapping.mapper import Mapper
from engine.mapping.stored_state import StoredRun
from engine.output.recovery import recover_run
from engine.output.run_folder import RunFolder
from engine.output.run_lock import RunLock, RunState, run_state
from engine.output.stored_run import read_stored_run
from engine.ports import Source
from engine.run import dense
from engine.run.engine import Engine
from engine.run.ingestion import SourceRole
from engine.types import Frame, GpsFix, GpsReading, ImagePair, MatchRequest, PairMatches
from tests.support import flat_depth
from tests.support.fake_runs import (
    FakeLiveSource,
    FakeSource,
    Happening,
    WorldMatcher,
    Written,
    engine_of,
    frame_of,
    trajectory_lines,
    world_of,
)

NUM_FRAMES = 16
WORLD = world_of(NUM_FRAMES)
SETTINGS = ("snapshots.every_keyframes=4", "window.enabled=false")

pytestmark = pytest.mark.slow


@dataclass(kw_only=True)
class CountingMatcher(WorldMatcher):
    """Remembers the pairs that it was asked to match."""

    asked: list[ImagePair] = field(default_factory=list)

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        self.asked += [one.pair for one in requests]
        return super().match(requests)


def frames(first: int, last: int) -> list[Frame]:
    return [frame_of(number, world=WORLD) for number in range(first, last + 1)]


def matcher() -> CountingMatcher:
    return CountingMatcher(world=WORLD)


def num_journaled(path: Path) -> int:
    with closing(sqlite3.connect(path / "database.db")) as connection:
        return int(connection.execute("SELECT COUNT(*) FROM images").fetchone()[0])


def run_until_copied(path: Path, *, after: int) -> tuple[Path, CountingMatcher]:
    """A run whose folder is copied when it holds so many keyframes, as a power cut leaves it."""
    copied = path.with_name("cut")

    def copy_when_journaled() -> None:
        while num_journaled(path) < after:
            time.sleep(0.01)
        shutil.copytree(path, copied, symlinks=True)

    async def copy() -> None:
        await asyncio.to_thread(copy_when_journaled)

    happenings: list[Happening] = [*frames(1, after), copy, *frames(after + 1, NUM_FRAMES)]
    first = matcher()
    engine = engine_of(
        path, matcher=first, sources=[FakeSource(happenings=happenings)], settings=SETTINGS
    )
    asyncio.run(engine.run())
    return copied, first


def go_on(
    path: Path,
    *,
    sources: Sequence[Source],
    matching: CountingMatcher,
    label: str = "",
    read: Callable[[Path], StoredRun] = read_stored_run,
    **options: Any,
) -> Written:
    """Goes on with a run; its first source is the one of before, whose label may be another."""
    lock = RunLock.acquire(path)
    former = recover_run(read(path))
    taken = former.sources[0].taken
    roles = [
        SourceRole(label=label or source.info.label, taken=taken, part=former.part)
        if place == 0
        else SourceRole(label=source.info.label, prefix=f"source{place + 1}")
        for place, source in enumerate(sources)
    ]
    config = load_config((), SETTINGS)
    engine = Engine(
        config,
        folder=RunFolder.reopen(path, former.frames, config_text="{}", lock=lock),
        sources=sources,
        matcher=matching,
        roles=roles,
        former=former,
        **options,
    )
    del former
    return Written.by(asyncio.run(engine.run()))


def registered(path: Path) -> set[str]:
    model = pycolmap.Reconstruction(str(path / "latest" / "sparse" / "0"))
    return {image.name for image in model.images.values()}


def test_a_run_that_was_cut_off_goes_on_without_a_frame_twice_or_a_pair_again(
    tmp_path: Path,
) -> None:
    cut, _ = run_until_copied(tmp_path / "run", after=11)
    num_stored = len(read_stored_run(cut).keyframes)
    assert 3 < num_stored < NUM_FRAMES
    second = matcher()
    written = go_on(cut, sources=[FakeSource(happenings=frames(1, NUM_FRAMES))], matching=second)
    stored_ids = set(range(1, num_stored + 1))
    assert not {one for one in second.asked if {one.first, one.second} <= stored_ids}
    assert set(second.described) == set(range(num_stored + 1, NUM_FRAMES + 1))
    assert [int(row["index"]) for row in written.rows] == list(range(NUM_FRAMES))
    assert set(written.statuses) == {"keyframe"}
    assert len(registered(cut)) == NUM_FRAMES
    assert written.summary["frames_received"] == NUM_FRAMES
    assert written.summary["keyframes"] == NUM_FRAMES
    (resumed,) = written.of_kind("RunResumed")
    assert resumed["num_keyframes"] == num_stored
    assert resumed["num_registered"] >= num_stored - 1
    times = [event["at_s"] for event in written.events]
    assert times == sorted(times)
    assert written.summary["wall_s"] == pytest.approx(times[-1], abs=5.0)
    assert len(trajectory_lines(cut / "trajectory.txt")) == NUM_FRAMES
    assert len(written.of_kind("RunStarted")) == 1
    posed = written.of_kind("FramePosed")[-(NUM_FRAMES - num_stored) :]
    assert all(0.0 <= event["latency_s"] < 3600.0 for event in posed)  # of this process's clock
    sequences = [event["sequence"] for event in written.of_kind("SnapshotWritten")]
    assert sequences == sorted(set(sequences))


class _Facts(dict[str, Any]):
    """A part of what was read that weak references can be made to."""


def test_what_was_read_of_a_run_is_not_kept_while_it_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run"
    source = FakeSource(happenings=frames(1, 4))
    engine = engine_of(path, matcher=matcher(), sources=[source], settings=SETTINGS)
    asyncio.run(engine.run())
    read: list[weakref.ref[_Facts]] = []
    are_kept: list[bool] = []

    def reading(path: Path) -> StoredRun:
        facts = _Facts()
        read.append(weakref.ref(facts))
        return replace(read_stored_run(path), facts=facts)

    def look(frame: Frame) -> None:
        are_kept.append(read[0]() is not None)

    matching = CountingMatcher(world=WORLD, before_describing=look)
    source = FakeSource(happenings=frames(1, 8))
    go_on(path, sources=[source], matching=matching, read=reading)
    assert are_kept == [False] * 4


def test_depth_that_was_made_is_used_again_and_nothing_is_there_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "estimate_depth", flat_depth.made)
    monkeypatch.setattr(dense.CpuBudget, "has_room_for", lambda self, cpu_s: True)
    path = tmp_path / "run"
    source = FakeSource(happenings=frames(1, 9))
    engine = engine_of(path, matcher=matcher(), sources=[source], settings=SETTINGS)
    first = Written.by(asyncio.run(engine.run()))
    assert first.summary["dense"]["keyframes_with_depth"] == 9
    written = go_on(path, sources=[FakeSource(happenings=frames(1, 16))], matching=matcher())
    since = written.of_kind("DepthEstimated")[9:]
    new = [one["frame_id"] for one in since if not one["is_again"]]
    assert sorted(new) == list(range(10, NUM_FRAMES + 1))
    assert written.summary["dense"]["keyframes_with_depth"] == NUM_FRAMES
    assert len(list((path / "dense").iterdir())) == NUM_FRAMES
    last = written.of_kind("DenseMapWritten")[-1]
    assert last["num_keyframes"] == NUM_FRAMES
    assert last["num_points"] < 2.5 * first.of_kind("DenseMapWritten")[-1]["num_points"]


def test_going_on_twice_from_one_state_gives_the_same_map_to_the_bit(tmp_path: Path) -> None:
    cut, _ = run_until_copied(tmp_path / "run", after=11)
    again = Path(shutil.copytree(cut, tmp_path / "again", symlinks=True))
    for path in (cut, again):
        go_on(path, sources=[FakeSource(happenings=frames(1, NUM_FRAMES))], matching=matcher())
    for name in ("cameras.bin", "images.bin", "points3D.bin"):
        one, other = (path / "latest" / "sparse" / "0" / name for path in (cut, again))
        assert one.read_bytes() == other.read_bytes()


def test_a_broken_snapshot_costs_time_and_no_keyframe(tmp_path: Path) -> None:
    cut, _ = run_until_copied(tmp_path / "run", after=11)
    for points in cut.glob("snapshots/*/sparse/0/points3D.bin"):
        points.write_bytes(b"\xff" * 8 + points.read_bytes()[8:])
    second = matcher()
    written = go_on(cut, sources=[FakeSource(happenings=frames(1, NUM_FRAMES))], matching=second)
    assert any("built anew" in event["message"] for event in written.of_kind("Warned"))
    num_stored = written.of_kind("RunResumed")[0]["num_keyframes"]
    stored_ids = set(range(1, num_stored + 1))
    assert not {one for one in second.asked if {one.first, one.second} <= stored_ids}
    assert len(registered(cut)) == NUM_FRAMES


def test_of_several_snapshots_the_newest_that_can_be_read_is_taken(tmp_path: Path) -> None:
    cut, _ = run_until_copied(tmp_path / "run", after=11)
    assert len(list((cut / "snapshots").iterdir())) > 1
    points = cut / "latest" / "sparse" / "0" / "points3D.bin"
    points.write_bytes(b"\xff" * 8 + points.read_bytes()[8:])
    written = go_on(cut, sources=[FakeSource(happenings=frames(1, NUM_FRAMES))], matching=matcher())
    warnings = [event["message"] for event in written.of_kind("Warned")]
    assert any("the snapshot before it is taken" in message for message in warnings)
    assert not any("built anew" in message for message in warnings)
    assert len(registered(cut)) == NUM_FRAMES


def cut_off(path: Path) -> None:
    """A short run, whose folder says that it was killed."""
    source = FakeSource(happenings=frames(1, 6))
    engine = engine_of(path, matcher=matcher(), sources=[source], settings=SETTINGS)
    asyncio.run(engine.run())
    holder = {"pid": 1, "host": socket.gethostname(), "started_at": "2026-01-01T00:00:00+00:00"}
    (path / ".lock").write_text(json.dumps(holder))
    (path / "summary.json").unlink()


def test_a_run_whose_map_cannot_be_restored_stays_as_it_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    cut_off(path)
    assert run_state(path)[0] is RunState.INTERRUPTED

    def fail(*_: object) -> NoReturn:
        raise MapError("no map")

    monkeypatch.setattr(Mapper, "restore", fail)
    with pytest.raises(MapError, match="no map"):
        go_on(path, sources=[FakeSource(happenings=frames(1, 6))], matching=matcher())
    assert run_state(path)[0] is RunState.INTERRUPTED
    assert not (path / "summary.json").exists()
    monkeypatch.undo()
    written = go_on(path, sources=[FakeSource(happenings=frames(1, 6))], matching=matcher())
    assert len(written.rows) == 6
    assert run_state(path)[0] is RunState.ENDED


def test_a_run_that_ended_and_whose_map_cannot_be_restored_keeps_all_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    source = FakeSource(happenings=frames(1, 6))
    asyncio.run(engine_of(path, matcher=matcher(), sources=[source], settings=SETTINGS).run())
    names = ("frames.csv", "summary.json", "config.yaml", "events.jsonl")
    before = [(path / name).read_bytes() for name in names]

    def fail(*_: object) -> NoReturn:
        raise MapError("no map")

    monkeypatch.setattr(Mapper, "restore", fail)
    with pytest.raises(MapError, match="no map"):
        go_on(path, sources=[FakeSource(happenings=frames(1, 6))], matching=matcher())
    assert [(path / name).read_bytes() for name in names] == before


def test_while_a_map_is_restored_signals_are_taken_as_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    cut_off(path)
    is_taken: list[bool] = []

    def fail(*_: object) -> NoReturn:
        is_taken.append(signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)
        raise MapError("no map")

    monkeypatch.setattr(Mapper, "restore", fail)
    with pytest.raises(MapError):
        go_on(path, sources=[FakeSource(happenings=frames(1, 6))], matching=matcher())
    assert is_taken == [True]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_run_that_ended_is_added_to(tmp_path: Path) -> None:
    path = tmp_path / "run"
    source = FakeSource(happenings=frames(1, 8))
    engine = engine_of(path, matcher=matcher(), sources=[source], settings=SETTINGS)
    asyncio.run(engine.run())
    more = [
        replace(frame, source="more", index=frame.index - 8, name=f"{frame.index}.jpg")
        for frame in frames(9, NUM_FRAMES)
    ]
    sources = [
        FakeSource(happenings=frames(1, 8)),
        FakeSource(happenings=more, label="more"),
    ]
    written = go_on(path, sources=sources, matching=matcher())
    assert len(registered(path)) == NUM_FRAMES
    assert written.rows[-1]["name"] == "source2/15.jpg"
    assert [row["source"] for row in written.rows] == ["fake"] * 8 + ["more"] * 8
    assert written.summary["keyframes"] == NUM_FRAMES


def test_positions_are_kept_once_under_the_name_that_their_source_had_first(tmp_path: Path) -> None:
    def reading(index: int) -> GpsReading:
        fix = GpsFix(latitude_deg=1e-5 * index, longitude_deg=8.0, altitude_m=400.0)
        return GpsReading(source=label, camera_key=None, captured_at_s=0.1 * index, fix=fix)

    path, label = tmp_path / "run", "fake"
    source = FakeSource(happenings=[reading(0), reading(1), *frames(1, 4)])
    engine = engine_of(path, matcher=matcher(), sources=[source], settings=SETTINGS)
    asyncio.run(engine.run())
    label = "elsewhere"
    moved = FakeSource(happenings=[*map(reading, range(3)), *frames(1, 8)], label=label)
    go_on(path, sources=[moved], matching=matcher(), label="fake")
    kept = read_stored_run(path).gps_readings
    assert [(one.source, one.captured_at_s) for one in kept] == [
        ("fake", 0.0),
        ("fake", 0.1),
        ("fake", 0.2),
    ]


def test_a_live_source_is_listened_to_again_under_its_cameras_and_new_names(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run"
    source = FakeLiveSource(happenings=frames(1, 4))
    settings = (*SETTINGS, "sources.frame_queue_size=32")
    engine = engine_of(path, matcher=matcher(), sources=[source], settings=settings)
    asyncio.run(engine.run())
    again = [replace(frame, index=frame.index - 4) for frame in frames(5, 8)]
    again = [replace(frame, name=f"{frame.index:06d}.jpg") for frame in again]
    written = go_on(path, sources=[FakeLiveSource(happenings=again)], matching=matcher())
    names = [row["name"] for row in written.rows]
    assert names[:4] == [f"{index:06d}.jpg" for index in range(4)]
    assert names[4:] == [f"part2/{index:06d}.jpg" for index in range(4)]
    assert [int(row["index"]) for row in written.rows] == list(range(8))
    keys = {event["camera_key"] for event in written.of_kind("KeyframeAdded")}
    assert keys == {"camera"}
