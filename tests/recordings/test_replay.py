"""Recordings of runs: a run that repeats one makes the same map, whatever its timing was."""

from __future__ import annotations

import asyncio
import functools
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from adapters.cli import app
from adapters.images.camera_masks import MaskedCameras
from adapters.matchers.sift import SiftMatcher
from adapters.recordings.input_recording import FolderRecording
from adapters.recordings.replay import RepeatedSource, open_replay
from adapters.town.source import SyntheticTown, parse_town_spec
from engine.config import Config, SiftConfig, SourcesConfig, load_config
from engine.errors import ConfigError, MapError, SourceError
from engine.mapping.mapper import Mapper
from engine.ports import PairMatcher, Source
from engine.run import stages
from engine.run.background import Snapshots
from engine.run.engine import RunOutcome
from engine.types import (
    Arrival,
    Frame,
    FrameId,
    GpsFix,
    GpsReading,
    Keyframe,
    MapCounts,
    SourceNotice,
    SourceState,
)
from tests.run.test_ownership import (
    KEYFRAMES,
    NO_SNAPSHOTS,
    WORLD,
    PoseWaitingView,
    WorldTracker,
    until,
)
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
    world_of,
)

NUM_FRAMES = 16
HANG_S = 300.0  # a guard, no measure
LIMITS = SourcesConfig(min_image_edge_px=1)


def world_frames(first: int = 1, last: int = NUM_FRAMES, **changes: Any) -> list[Frame]:
    """Frames of a flight; without bytes as received, which show nothing here."""
    return [
        replace(frame, jpeg=None, **changes)
        for frame in frames_of(world_of(NUM_FRAMES))[first - 1 : last]
    ]


def reading(frame_id: int) -> GpsReading:
    return GpsReading(
        source="fake",
        camera_key=None,
        captured_at_s=0.1 * (frame_id - 1),
        fix=GpsFix(latitude_deg=frame_id * 1e-5, longitude_deg=8.0, altitude_m=400.0),
    )


def run_with(
    path: Path, sources: Sequence[Source], *, matcher: PairMatcher, **options: Any
) -> RunOutcome:
    engine = engine_of(path, sources=sources, matcher=matcher, **options)
    return asyncio.run(asyncio.wait_for(engine.run(), HANG_S))


def record(
    folder: Path, sources: Sequence[Source], *, matcher: PairMatcher | None = None, **options: Any
) -> RunOutcome:
    """A run whose input is recorded in ``folder / "input"``."""
    recording = FolderRecording.create(
        folder / "input",
        config=load_config((), options.get("settings", ())),
        sources=[source.info for source in sources],
    )
    matcher = matcher or WorldMatcher(world=world_of(NUM_FRAMES))
    return run_with(folder / "run", sources, matcher=matcher, recording=recording, **options)


def repeat(folder: Path, *, matcher: PairMatcher | None = None, **options: Any) -> RunOutcome:
    sources = open_replay(folder / "input", config=LIMITS)
    matcher = matcher or WorldMatcher(world=world_of(NUM_FRAMES))
    return run_with(folder / "again", sources, matcher=matcher, **options)


def assert_same_run(one: RunOutcome, other: RunOutcome) -> None:
    """The same map to the bit, the same first poses, and the same account of every frame."""
    for name in ("trajectory.txt", "frames.csv"):
        assert (one.path / name).read_text() == (other.path / name).read_text()
    first_poses = [
        {file.name: file.read_text() for file in outcome.path.glob("trajectory_live*.txt")}
        for outcome in (one, other)
    ]
    assert first_poses[0] == first_poses[1]
    for name in ("points3D.bin", "images.bin", "cameras.bin"):
        model = Path("latest/sparse/0") / name
        assert (one.path / model).read_bytes() == (other.path / model).read_bytes()
    summaries = [Written.by(outcome).summary for outcome in (one, other)]
    assert summaries[0]["frames_dropped"] == summaries[1]["frames_dropped"]


# -- what is repeated ------------------------------------------------------------------------------


def test_a_run_of_photos_is_repeated_to_the_bit(tmp_path: Path) -> None:
    happenings: list[Happening] = [*world_frames(1, 7), rejected(7), *world_frames(9)]
    recorded = record(tmp_path, [FakeSource(happenings=happenings)])
    assert recorded.num_registered == NUM_FRAMES - 1
    assert_same_run(recorded, repeat(tmp_path))


def test_frames_that_a_busy_engine_dropped_stay_dropped(tmp_path: Path) -> None:
    describing, all_given = threading.Event(), threading.Event()

    def hold_up(_: Frame) -> None:
        describing.set()
        assert all_given.wait(HANG_S)

    async def until_describing() -> None:
        assert await asyncio.to_thread(describing.wait, HANG_S)

    async def end() -> None:
        all_given.set()

    frames = world_frames()
    source = FakeLiveSource(happenings=[*frames[:1], until_describing, *frames[1:], end])
    busy = WorldMatcher(world=world_of(NUM_FRAMES), before_describing=hold_up)
    settings = ["sources.frame_queue_size=8"]
    recorded = record(tmp_path, [source], matcher=busy, settings=settings)
    assert Written.by(recorded).summary["frames_dropped"] == {"overload": NUM_FRAMES - 9}
    again = repeat(tmp_path)
    rows = [Written.by(outcome).rows for outcome in (recorded, again)]
    assert [sorted(r["status"] for r in each) for each in rows][0] == sorted(
        r["status"] for r in rows[1]
    )
    for name in ("trajectory.txt", "latest/sparse/0/points3D.bin"):
        assert (recorded.path / name).read_bytes() == (again.path / name).read_bytes()


def test_several_sources_take_turns_as_they_did(tmp_path: Path) -> None:
    async def pause() -> None:
        await asyncio.sleep(0)

    frames = world_frames()
    one = FakeSource(happenings=[frames[0], pause, *frames[1:5], *frames[10:]])
    other = FakeSource(happenings=[frames[5], pause, pause, *frames[6:10]], label="other")
    recorded = record(tmp_path, [one, other])
    rows = Written.by(recorded).rows
    assert {row["source"] for row in rows} == {"fake", "other"}
    assert_same_run(recorded, repeat(tmp_path))


def test_the_map_knows_positions_when_it_did_however_early_a_replay_reads_them(
    tmp_path: Path,
) -> None:
    happenings: list[Any] = []
    for frame in world_frames():
        happenings += [reading(int(frame.frame_id)), frame]
    recorded = record(tmp_path, [FakeLiveSource(happenings=happenings)])
    decisions = (tmp_path / "input" / "decisions.jsonl").read_text().splitlines()
    known = [json.loads(line)["mapping"]["num_readings"] for line in decisions if "mapping" in line]
    assert known == sorted(known)
    assert known[-1] > 0
    again = repeat(tmp_path)
    assert_same_run(recorded, again)
    assert Written.by(recorded).summary["gps_rmse_m"] == Written.by(again).summary["gps_rmse_m"]


def test_masks_come_with_the_frames(tmp_path: Path) -> None:
    import cv2

    frames = world_frames()
    shape = frames[0].pixels.shape[:2]
    mask = np.full(shape, 255, np.uint8)
    mask[:, : shape[1] // 4] = 0
    file = tmp_path / "mask.png"
    cv2.imwrite(str(file), mask)
    masks = MaskedCameras({"*": str(file)}, config=SourcesConfig())
    record(tmp_path, [FakeSource(happenings=frames)], masks=masks)
    file.unlink()
    assert len(list((tmp_path / "input" / "masks").iterdir())) == 1
    (source,) = open_replay(tmp_path / "input", config=LIMITS)
    given = [frame.mask for frame in decoded(source)]
    assert all(one is not None and (one == (mask > 0)).all() for one in given)


def decoded(source: RepeatedSource) -> list[Frame]:
    async def take() -> list[Frame]:
        return [
            frame
            async for item in source.frames()
            if isinstance(item, Arrival) and isinstance(frame := item.decode(), Frame)
        ]

    return asyncio.run(take())


def test_a_frame_is_the_same_in_all_that_it_says(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8)
    fix = GpsFix(latitude_deg=1 / 3, longitude_deg=-2 / 3, altitude_m=1e-9, accuracy_m=None)
    (first,) = world_frames(1, 1)
    frame = replace(
        first,
        pixels=pixels,
        gps=fix,
        quarter_turns=3,
        captured_at_s=0.1 + 0.2,
        name="../a b\n.jpg",
        frame_id=FrameId(123_456_789),
    )
    recording = FolderRecording.create(
        tmp_path / "input", config=Config(), sources=[FakeSource(happenings=()).info]
    )
    recording.add_frame(frame, source_idx=0)
    recording.close()
    (again,) = decoded(open_replay(tmp_path / "input", config=LIMITS)[0])
    assert (again.pixels == pixels).all()
    fields = ("frame_id", "camera_key", "source", "index", "name", "captured_at_s", "gps")
    for field in (*fields, "intrinsics_prior", "quarter_turns", "jpeg", "mask"):
        assert getattr(again, field) == getattr(frame, field), field


@pytest.mark.slow
@pytest.mark.usefixtures("towns_painted_once")
def test_a_live_video_that_outruns_mapping_is_repeated_to_the_bit(tmp_path: Path) -> None:
    town = SyntheticTown(
        parse_town_spec("synthetic:town?frames=30&width=320&height=240"),
        next_frame_id=counter(),
        config=SourcesConfig(),
    )

    async def play() -> list[Frame]:
        return [
            frame
            async for item in town.frames()
            if isinstance(item, Arrival) and isinstance(frame := item.decode(), Frame)
        ]

    source = FakeLiveSource(happenings=asyncio.run(play()), is_sequence=True)
    settings = ["sources.frame_queue_size=30"]
    sift = SiftConfig(max_features=600)
    recorded = record(tmp_path, [source], matcher=SiftMatcher(sift), settings=settings)
    assert recorded.num_registered >= 2
    lines = (tmp_path / "input" / "decisions.jsonl").read_text().splitlines()
    decisions = [json.loads(line) for line in lines]
    assert any(one.get("tracking", {}).get("is_behind") for one in decisions)
    assert_same_run(recorded, repeat(tmp_path, matcher=SiftMatcher(sift)))


# -- frames that come while the mapper is busy -----------------------------------------------------

BUSY_ID = KEYFRAMES[6]  # of the keyframe that the mapper is busy with
WITHOUT_SNAPSHOTS = [*NO_SNAPSHOTS, "sources.frame_queue_size=1000"]


@pytest.fixture
def _tracked_by_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "FrameTracker", WorldTracker)


def busy_run(
    folder: Path, *, is_busy: threading.Event, view: PoseWaitingView, **changes: Any
) -> RunOutcome:
    """Records a live run in which frames after `BUSY_ID` come when ``is_busy`` is set.

    The other ones come after the one that the view waits for has its pose. ``changes`` are made to
    every frame.
    """
    happenings = [
        *view.paced(1, BUSY_ID - 1),
        frame_of(BUSY_ID, world=WORLD),
        until(is_busy),
        *view.paced(BUSY_ID + 1, view.frame_id),
        until(view.is_posed),
        *view.paced(view.frame_id + 1, WORLD.frame_ids[-1]),
    ]
    source = FakeLiveSource(
        happenings=[
            replace(one, jpeg=None, **changes) if isinstance(one, Frame) else one
            for one in happenings
        ]
    )
    matcher = WorldMatcher(world=WORLD)
    return record(folder, [source], matcher=matcher, settings=WITHOUT_SNAPSHOTS, views=[view])


def hold(
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    *,
    until_set: threading.Event,
    is_held: threading.Event | None = None,
) -> None:
    """Has a method of the mapper wait for an event before it takes `BUSY_ID`."""
    original = getattr(Mapper, method)

    @functools.wraps(original)
    def held(mapper: Mapper, item: Any, *args: Any, **kwargs: Any) -> Any:
        if item.frame_id == BUSY_ID:
            if is_held is not None:
                is_held.set()
            assert until_set.wait(HANG_S)
        return original(mapper, item, *args, **kwargs)

    monkeypatch.setattr(Mapper, method, held)


@pytest.mark.usefixtures("_tracked_by_the_world")
def test_early_poses_are_the_same_however_long_the_mapper_takes_in_a_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_added, view = threading.Event(), PoseWaitingView(frame_id=BUSY_ID + 1)
    write_if_due = Snapshots.write_if_due

    async def after_adding(self: Snapshots, counts: MapCounts) -> None:
        if counts.num_keyframes == KEYFRAMES.index(BUSY_ID) + 1:
            is_added.set()  # in the map, but the frame behind it still has to come
            await until(view.is_posed)()
        await write_if_due(self, counts)

    with monkeypatch.context() as patch:
        patch.setattr(Snapshots, "write_if_due", after_adding)
        recorded = busy_run(tmp_path, is_busy=is_added, view=view)
    view = PoseWaitingView(frame_id=BUSY_ID + 1)
    hold(monkeypatch, "add_keyframe", until_set=view.is_posed)  # not yet in the map
    again = repeat(
        tmp_path, matcher=WorldMatcher(world=WORLD), settings=WITHOUT_SNAPSHOTS, views=[view]
    )
    assert_same_run(recorded, again)


@pytest.mark.usefixtures("_tracked_by_the_world")
def test_early_poses_are_repeated_beside_a_keyframe_that_cannot_be_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_busy, view = threading.Event(), PoseWaitingView(frame_id=BUSY_ID + 1)
    begin_keyframe = Mapper.begin_keyframe

    def refuse(self: Mapper, keyframe: Keyframe, *args: Any) -> Any:
        if keyframe.frame_id == BUSY_ID:
            is_busy.set()
            assert view.is_posed.wait(HANG_S)
            raise MapError("cannot be added")
        return begin_keyframe(self, keyframe, *args)

    monkeypatch.setattr(Mapper, "begin_keyframe", refuse)
    recorded = busy_run(tmp_path, is_busy=is_busy, view=view)
    again = repeat(tmp_path, matcher=WorldMatcher(world=WORLD), settings=WITHOUT_SNAPSHOTS)
    assert Written.by(recorded).rows[BUSY_ID - 1]["status"] == "dropped:failed"
    assert_same_run(recorded, again)
    warnings = Written.by(again).warnings()
    assert not any("differs from the recorded one" in words for words in warnings)


@pytest.mark.usefixtures("_tracked_by_the_world")
@pytest.mark.parametrize("method", ["begin_keyframe", "add_keyframe"])
def test_a_replay_has_the_frames_that_it_waits_for_though_their_memory_is_used_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    is_busy, view = threading.Event(), PoseWaitingView(frame_id=BUSY_ID + 2)
    large = np.zeros((600, 400, 3), np.uint8)  # two of them are more than 1 MB
    hold(monkeypatch, method, until_set=view.is_posed, is_held=is_busy)
    recorded = busy_run(tmp_path, is_busy=is_busy, view=view, pixels=large)
    settings = [*NO_SNAPSHOTS, "sources.frame_queue_size=1", "sources.max_buffered_mb=1"]
    again = repeat(tmp_path, matcher=WorldMatcher(world=WORLD), settings=settings)
    assert_same_run(recorded, again)


def counter() -> Any:
    ids: Iterator[int] = iter(range(1, 1_000))
    return lambda: FrameId(next(ids))


def test_a_replay_that_leaves_the_recorded_run_says_so_once(tmp_path: Path) -> None:
    record(tmp_path, [FakeSource(happenings=world_frames())])
    path = tmp_path / "input" / "decisions.jsonl"
    lines = [line for line in path.read_text().splitlines() if '"mapping"' not in line]
    path.write_text("\n".join([*lines, ""]))
    again = repeat(tmp_path)
    warnings = [e["message"] for e in Written.by(again).events if e["event"] == "Warned"]
    assert sum("differs from the recorded one" in one for one in warnings) == 1
    assert again.num_registered == NUM_FRAMES


# -- what is refused or damaged --------------------------------------------------------------------


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """A short recording with a notice."""
    notice = SourceNotice(source="fake", state=SourceState.CONNECTED, detail="here")
    record(tmp_path, [FakeSource(happenings=[notice, *world_frames(1, 3)])])
    return tmp_path / "input"


def test_a_last_line_that_was_cut_is_left_out(recording: Path) -> None:
    path = recording / "input.jsonl"
    path.write_text(path.read_text()[:-20])
    (source,) = open_replay(recording, config=LIMITS)
    assert source.info.num_frames == 2


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("input.jsonl", "{}\n", "input.jsonl: line 1"),
        ("input.jsonl", '{"source_idx": 7}\n', "names a source that"),
        ("input.jsonl", "[" * 100_000 + "\n", "line 1"),
        ("decisions.jsonl", '{"mapping": {"frame_id": "x"}}\n', "line 1"),
        ("recording.json", '{"format_version": 99, "sources": []}', "has format 99"),
        ("recording.json", "", "recording.json"),
    ],
)
def test_a_damaged_recording_is_refused_in_one_line(
    recording: Path, name: str, text: str, words: str
) -> None:
    (recording / name).write_text(text)
    with pytest.raises(SourceError, match=words) as caught:
        open_replay(recording, config=LIMITS)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_frame_whose_file_is_gone_is_dropped_and_counted(recording: Path) -> None:
    (recording / "frames" / "000002.png").unlink()
    again = repeat(recording.parent)
    assert Written.by(again).summary["frames_dropped"] == {"unreadable": 1}


def test_a_folder_in_use_is_not_recorded_into(recording: Path) -> None:
    with pytest.raises(ConfigError, match="not empty"):
        FolderRecording.create(recording, config=Config(), sources=[])


def test_a_recording_that_cannot_go_on_does_not_cost_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_frame = FolderRecording.add_frame

    def on_a_full_disk(self: FolderRecording, frame: Frame, *, source_idx: int) -> None:
        if frame.frame_id == 3:
            shutil.rmtree(tmp_path / "input" / "frames")
        add_frame(self, frame, source_idx=source_idx)

    monkeypatch.setattr(FolderRecording, "add_frame", on_a_full_disk)
    outcome = record(tmp_path, [FakeSource(happenings=world_frames())])
    assert outcome.num_registered == NUM_FRAMES
    warnings = [e["message"] for e in Written.by(outcome).events if e["event"] == "Warned"]
    assert sum("the input is recorded no further" in one for one in warnings) == 1


def test_a_replay_is_the_only_source_and_needs_a_recording(tmp_path: Path) -> None:
    for arguments in (["replay:nowhere"], ["replay:nowhere", "synthetic:town"]):
        result = CliRunner().invoke(app, ["run", *arguments, "--out", str(tmp_path / "run")])
        assert result.exit_code == 2, result.output
    assert not (tmp_path / "run").exists()
