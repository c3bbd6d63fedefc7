"""Where a run goes on whose folder is lost, and what it takes along."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.errors import JournalError
from engine.events import Event, RunFolderMoved, Warned
from engine.output import folder_check
from engine.output.folder_check import DELETED, FolderCheck
from engine.output.journal import Journal
from engine.output.run_folder import RunFolder
from engine.output.run_lock import RunLock, RunState, run_state
from tests.support.fake_runs import trajectory_lines


class EmittedEvents(list[Event]):
    """Events in order."""

    def __call__(self, event: Event) -> None:
        self.append(event)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A run folder with its check."""

    folder: RunFolder
    check: FolderCheck
    events: EmittedEvents


@pytest.fixture
def checked(tmp_path: Path) -> Iterator[Checked]:
    folder = RunFolder.create(tmp_path / "run", config_text="{}")
    journal = Journal.open(folder.path)
    events = EmittedEvents()
    check = FolderCheck(folder, journal, emit=events, reserve=lambda: 0)
    yield Checked(folder=folder, check=check, events=events)
    journal.close()
    folder.abandon()


def test_a_rescued_folder_has_the_live_trajectories_of_all_worlds(
    checked: Checked, tmp_path: Path
) -> None:
    for number in ("", "_1", "_12"):
        line = f"{number or 0} 0 0 0 0 0 0 1\n"
        with (tmp_path / "run" / f"trajectory_live{number}.txt").open("a") as file:
            file.write(line)
    assert checked.check.rescue(DELETED)
    rescued = tmp_path / "run.rescued"
    for number in ("", "_1", "_12"):
        assert len(trajectory_lines(rescued / f"trajectory_live{number}.txt")) == 1


def test_a_run_that_cannot_be_written_in_a_second_folder_either_makes_no_third(
    checked: Checked, tmp_path: Path
) -> None:
    assert checked.check.rescue("cannot be written any more")
    for is_last_try in (False, False, True):
        assert not checked.check.rescue("cannot be written any more", is_last_try=is_last_try)
    assert {path.name for path in tmp_path.glob("run*")} == {"run", "run.rescued"}
    assert checked.folder.path == tmp_path / "run.rescued"
    assert len([event for event in checked.events if isinstance(event, RunFolderMoved)]) == 1
    words = [event.message for event in checked.events if isinstance(event, Warned)]
    assert len([one for one in words if "as the folder before it" in one]) == 1


def test_a_folder_that_is_deleted_again_and_again_is_left_each_time(
    checked: Checked, tmp_path: Path
) -> None:
    for name in ("run.rescued", "run.rescued-2", "run.rescued-3"):
        assert checked.check.rescue(DELETED)
        assert checked.folder.path == tmp_path / name


def test_a_folder_that_another_run_takes_first_stays_that_run_s(
    checked: Checked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, taken, free = (tmp_path / name for name in ("made", "taken", "free"))
    made.mkdir()
    (made / "frames.csv").write_text("of another run")
    locks: list[RunLock] = []
    make = Path.mkdir

    def make_and_lose(path: Path, *args: Any, **options: Any) -> None:
        make(path, *args, **options)
        if path == taken or (path.parent == taken and not locks):
            locks.append(RunLock.acquire(taken))
            (taken / "config.yaml").write_text("of another run")

    monkeypatch.setattr(Path, "mkdir", make_and_lose)
    monkeypatch.setattr(folder_check, "rescue_folders", lambda *_, **__: (made, taken, free))
    assert checked.check.rescue(DELETED)
    assert checked.folder.path == free
    assert (made / "frames.csv").read_text() == "of another run"
    assert (taken / "config.yaml").read_text() == "of another run"
    assert run_state(taken)[0] is RunState.RUNNING
    (moved,) = [event for event in checked.events if isinstance(event, RunFolderMoved)]
    assert moved.path == str(free)
    locks[0].release()


def test_a_folder_that_cannot_be_moved_to_leaves_the_former_one_in_use(
    checked: Checked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, original = tmp_path / "other", os.open
    path.mkdir()

    def fail(opened: Path, *args: int) -> int:
        if opened == path:
            raise OSError(5, "Input/output error")
        return original(opened, *args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(JournalError, match="Input/output"):
            checked.folder.move(path)
    assert checked.folder.is_in_place
    assert checked.folder.find() == tmp_path / "run"
    assert run_state(tmp_path / "run")[0] is RunState.RUNNING


def test_a_table_that_can_be_read_in_part_is_taken_along_in_whole_lines_and_said(
    checked: Checked, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(10):
        checked.folder.append_event(Warned(at_s=0.0, message=f"event {number}"))
    size = (checked.folder.path / "events.jsonl").stat().st_size
    readable, read = size // 2 + 5, os.pread

    def read_half(descriptor: int, num_bytes: int, offset: int) -> bytes:
        if os.fstat(descriptor).st_size != size:
            return read(descriptor, num_bytes, offset)
        if offset >= readable:
            raise OSError(5, "Input/output error")
        return read(descriptor, min(num_bytes, readable - offset, 100), offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", read_half)
        assert checked.check.rescue("cannot be read")
    text = (checked.folder.path / "events.jsonl").read_text()
    messages = [json.loads(line)["message"] for line in text.splitlines()]
    assert messages == [f"event {number}" for number in range(5)]
    assert text.endswith("\n")
    assert checked.folder.unwritten() == {"events.jsonl": 1}
    assert f"the last {size - readable} bytes could not be read" in caplog.text
