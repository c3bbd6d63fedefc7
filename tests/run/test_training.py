"""The training folder beside mapping: it follows the snapshots, and what breaks in it."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest

from engine.errors import JournalError
from engine.output.recorder import Recorder
from engine.output.training_folder import TrainingFolder
from engine.run.engine import Engine, RunOutcome
from engine.run.faults import StoppedError
from tests.support.fake_runs import FakeSource, WorldMatcher, Written, engine_of, frames_of
from tests.support.synthetic import SyntheticWorld, straight_path
from tests.support.trainer_readers import READERS, read_as_gaussian_splatting

NUM_FRAMES = 14
WORLD = SyntheticWorld(straight_path(NUM_FRAMES))
ON = ("snapshots.train=true", "snapshots.every_keyframes=3", "dense.enabled=false")


async def nothing() -> None:
    pass


def an_engine(
    path: Path,
    *settings: str,
    before_the_last: Callable[[], Awaitable[None]] = nothing,
    **options: Any,
) -> Engine:
    *frames, last = frames_of(WORLD)
    return engine_of(
        path,
        matcher=WorldMatcher(world=WORLD),
        sources=[FakeSource(happenings=[*frames, before_the_last, last])],
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


def test_what_nobody_expected_is_a_fault_and_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: TrainingFolder, snapshot: Path, **options: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(TrainingFolder, "update", broken)
    outcome, written = a_run(tmp_path / "run", *ON)
    assert outcome.num_registered == NUM_FRAMES
    figures = written.summary["train"]
    assert figures["failed"] >= 1 and figures["updates"] == 0
    # The last snapshot is tried once more at the end, where an update of it failed before.
    num_snapshots = written.summary["snapshots_written"]
    assert figures["failed"] + figures["snapshots_passed_over"] in (
        num_snapshots,
        num_snapshots + 1,
    )
    assert {one["part"] for one in written.of_kind("FaultOccurred")} == {"the training folder"}
    assert written.summary["not_saved"] == ["train/"] == list(outcome.not_saved)


def test_an_update_after_a_failed_one_makes_up_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, has_failed = TrainingFolder.update, threading.Event()

    def failing_first(folder: TrainingFolder, snapshot: Path, **options: Any) -> Any:
        if not has_failed.is_set():
            has_failed.set()
            raise RuntimeError("no room")
        return update(folder, snapshot, **options)

    async def until_it_has_failed() -> None:
        await asyncio.to_thread(has_failed.wait)

    monkeypatch.setattr(TrainingFolder, "update", failing_first)
    outcome, written = a_run(tmp_path / "run", *ON, before_the_last=until_it_has_failed)
    assert written.summary["train"]["failed"] == 1 <= written.summary["train"]["updates"]
    assert not written.summary["not_saved"] and not outcome.not_saved
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
    hangs, release, ended = threading.Event(), threading.Event(), threading.Event()
    broken: list[BaseException] = []

    def hanging(folder: TrainingFolder, snapshot: Path, *, between: Any) -> None:
        hangs.set()
        release.wait()
        try:
            between()
        except BaseException as error:  # noqa: BLE001 - what a call left behind is told
            broken.append(error)
        ended.set()

    def give_up(result: Future[object], limit_s: float) -> bool:
        """Waits for every call but the one that hangs."""
        while not result.done():
            wait([result], 0.01)
            if hangs.is_set() and threading.current_thread().name.startswith("training"):
                return False
        return True

    monkeypatch.setattr(TrainingFolder, "update", hanging)
    outcome, written = a_run(tmp_path / "run", *ON, wait_for_call=give_up)
    assert outcome.num_registered == NUM_FRAMES
    faults = written.of_kind("FaultOccurred")
    assert [one["part"] for one in faults].count("the training folder") == 1
    assert outcome.not_saved == ("train/",)
    release.set()
    assert ended.wait(60.0)
    assert type(broken[0]) is StoppedError
    assert not (outcome.path / "train").exists()
