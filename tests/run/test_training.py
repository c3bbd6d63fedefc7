"""The training folder beside mapping: it follows the snapshots, and what breaks in it."""

from __future__ import annotations

import asyncio
import errno
import threading
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest

import engine.run.training as training_module
from engine.errors import JournalError
from engine.output.recorder import Recorder
from engine.output.training_folder import TrainingFolder
from engine.run.engine import Engine, RunOutcome
from tests.support.fake_runs import FakeSource, WorldMatcher, Written, engine_of, frames_of
from tests.support.synthetic import SyntheticWorld, straight_path
from tests.support.trainer_readers import READERS, read_as_gaussian_splatting

NUM_FRAMES = 14
WORLD = SyntheticWorld(straight_path(NUM_FRAMES))
ON = ("snapshots.train=true", "snapshots.every_keyframes=3", "dense.enabled=false")


def an_engine(path: Path, *settings: str, **options: Any) -> Engine:
    return engine_of(
        path,
        matcher=WorldMatcher(world=WORLD),
        sources=[FakeSource(happenings=frames_of(WORLD))],
        settings=settings,
        **options,
    )


def a_run(path: Path, *settings: str, **options: Any) -> tuple[RunOutcome, Written]:
    outcome = asyncio.run(an_engine(path, *settings, **options).run())
    return outcome, Written.by(outcome)


def test_at_the_end_it_has_the_final_snapshot_for_every_trainer(tmp_path: Path) -> None:
    outcome, written = a_run(tmp_path / "run", *ON)
    scenes = [read(outcome.path / "train") for read in READERS]
    assert all(len(scene.cameras) == outcome.num_registered == NUM_FRAMES for scene in scenes)
    figures = written.summary["train"]
    assert figures["enabled"] and figures["failed"] == figures["images_missing"] == 0
    assert figures["images"] == NUM_FRAMES
    num_snapshots = written.summary["snapshots_written"]
    assert 1 <= figures["updates"] <= num_snapshots
    assert figures["updates"] + figures["snapshots_passed_over"] == num_snapshots
    assert not written.summary["not_saved"]


def test_the_map_is_the_same_without_it(tmp_path: Path) -> None:
    without, _ = a_run(tmp_path / "without", *ON[1:])
    with_it, _ = a_run(tmp_path / "with", *ON)
    assert not (without.path / "train").exists()
    assert without.summary["train"]["enabled"] is False
    for name in ("trajectory.txt", "latest/sparse/0/points3D.bin", "latest/sparse/0/images.bin"):
        assert (with_it.path / name).read_bytes() == (without.path / name).read_bytes()


def test_what_cannot_be_written_is_counted_and_reported_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: TrainingFolder, snapshot: Path, **options: Any) -> None:
        raise JournalError(f"{folder.run_path}: no room") from OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(TrainingFolder, "update", full)
    outcome, written = a_run(tmp_path / "run", *ON)
    assert outcome.num_registered == NUM_FRAMES
    assert written.summary["train"]["failed"] >= 1 and written.summary["train"]["updates"] == 0
    assert len([one for one in written.of_kind("Warned") if "no room" in one["message"]]) == 1
    assert "train/" in written.summary["not_saved"]


def test_an_update_after_a_failed_one_makes_up_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, calls = TrainingFolder.update, 0

    def failing_first(folder: TrainingFolder, snapshot: Path, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise JournalError("no room")
        return update(folder, snapshot, **options)

    monkeypatch.setattr(TrainingFolder, "update", failing_first)
    outcome, written = a_run(tmp_path / "run", *ON)
    if calls == 1:  # the thread was free for none before the end
        assert written.summary["not_saved"] == ["train/"]
    else:
        assert not written.summary["not_saved"]
        assert len(read_as_gaussian_splatting(outcome.path / "train").cameras) == NUM_FRAMES


def test_no_file_is_begun_on_a_disk_that_is_nearly_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_low(recorder: Recorder) -> bool:
        return (recorder.path / "snapshots" / "000001").exists()

    low = property(is_low, lambda self, value: None)
    monkeypatch.setattr(Recorder, "is_space_low", low, raising=False)
    outcome, written = a_run(tmp_path / "run", *ON)
    assert not (outcome.path / "train").exists()
    assert written.summary["train"]["failed"] >= 1


def test_an_update_that_hangs_is_left_behind_and_writes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, ended = threading.Event(), threading.Event()
    broken: list[BaseException] = []

    def hanging(folder: TrainingFolder, snapshot: Path, *, between: Any) -> None:
        release.wait()
        try:
            between()
        except BaseException as error:  # noqa: BLE001 - what a call left behind is told
            broken.append(error)
        ended.set()

    def give_up(result: Future[object], limit_s: float) -> bool:
        return wait([result], 0.05).done != set()

    monkeypatch.setattr(TrainingFolder, "update", hanging)
    outcome, written = a_run(tmp_path / "run", *ON, wait_for_call=give_up)
    assert outcome.num_registered == NUM_FRAMES
    faults = written.of_kind("FaultOccurred")
    assert [one["part"] for one in faults].count("the training folder") == 1
    release.set()
    assert ended.wait(60.0)
    assert type(broken[0]) is training_module._StoppedError
    assert not (outcome.path / "train").exists()
