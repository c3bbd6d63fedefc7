"""Runs whose folder or disk fails under them: what they say, and what is on disk afterwards."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pycolmap
import pytest

from engine.output.run_lock import RunState, run_state
from engine.output.stored_descriptors import StoredDescriptors
from engine.run import engine as engine_module
from engine.run.engine import RunOutcome, StoppedBy
from engine.types import FrameId
from tests.support.fake_runs import (
    FakeSource,
    Happening,
    WorldMatcher,
    Written,
    engine_of,
    frames_of,
    world_of,
)

NUM_FRAMES = 16


def after(num_frames: int, happening: Callable[[], object]) -> list[Happening]:
    """The frames of a world; the happening comes once some are mapped."""

    async def happen() -> None:
        await asyncio.sleep(0.3)
        happening()

    frames: list[Happening] = list(frames_of(world_of(NUM_FRAMES)))
    return [*frames[:num_frames], happen, *frames[num_frames:]]


def run(
    path: Path, happenings: list[Happening], *, settings: tuple[str, ...] = (), **options: Any
) -> RunOutcome:
    engine = engine_of(
        path,
        matcher=WorldMatcher(world=world_of(NUM_FRAMES)),
        sources=[FakeSource(happenings=happenings)],
        settings=settings,
        **options,
    )
    return asyncio.run(asyncio.wait_for(engine.run(), 120))


def delete(path: Path) -> None:
    """Deletes a folder in which the run makes and renames files meanwhile."""
    while path.exists():
        shutil.rmtree(path, ignore_errors=True)


def journalled(path: Path) -> list[str]:
    """Names of the keyframes in a sound journal."""
    connection = sqlite3.connect(path / "database.db")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    names = [name for (name,) in connection.execute("SELECT name FROM images ORDER BY name")]
    connection.close()
    return names


def num_in_latest(path: Path) -> int:
    return pycolmap.Reconstruction(path / "latest" / "sparse" / "0").num_reg_images()


@pytest.mark.slow
def test_a_run_whose_folder_is_deleted_goes_on_in_another_one_and_says_so(tmp_path: Path) -> None:
    path, rescued = tmp_path / "run", tmp_path / "run.rescued"
    outcome = run(path, after(8, lambda: delete(path)))
    assert not path.exists()
    assert (outcome.path, outcome.asked_path) == (rescued, path)
    assert len(journalled(rescued)) == NUM_FRAMES  # also those from before
    assert num_in_latest(rescued) == NUM_FRAMES
    written = Written.read(rescued)
    assert len(written.rows) == NUM_FRAMES
    assert {row["pose"] for row in written.rows} == {"keyframe"}
    assert [event["event"] for event in written.events][0] == "RunStarted"
    (moved,) = written.of_kind("RunFolderMoved")
    num_lost = NUM_FRAMES - len(list((rescued / "images").iterdir()))
    assert moved["num_images_lost"] == num_lost > 0
    assert outcome.not_saved == (f"{num_lost} images of the map",)
    assert written.summary["not_saved"] == [f"{num_lost} images of the map"]
    (words,) = [one for one in written.warnings() if "was deleted" in one]
    assert f"the run goes on in {rescued}; {num_lost} keyframe images are lost" in words
    assert run_state(rescued)[0] is RunState.ENDED


@pytest.mark.slow
def test_a_folder_that_is_renamed_is_followed(tmp_path: Path) -> None:
    path, renamed = tmp_path / "run", tmp_path / "renamed"
    outcome = run(path, after(8, lambda: path.rename(renamed)))
    assert not path.exists()
    assert (outcome.path, outcome.asked_path, outcome.not_saved) == (renamed, path, ())
    assert len(journalled(renamed)) == num_in_latest(renamed) == NUM_FRAMES
    assert len(list((renamed / "images").iterdir())) == NUM_FRAMES
    assert not list(renamed.glob("database.db-*"))
    (moved,) = Written.read(renamed).of_kind("RunFolderMoved")
    assert moved["num_images_lost"] == 0


@pytest.mark.slow
def test_files_that_are_deleted_during_a_run_are_made_again(tmp_path: Path) -> None:
    path = tmp_path / "run"

    def delete() -> None:
        for name in ("database.db", "events.jsonl", "frames.csv", ".lock"):
            (path / name).unlink()

    outcome = run(path, after(8, delete))
    assert (outcome.path, outcome.asked_path, outcome.not_saved) == (path, None, ())
    assert len(journalled(path)) == num_in_latest(path) == NUM_FRAMES
    written = Written.read(path)
    assert len(written.rows) == NUM_FRAMES
    assert len(written.of_kind("KeyframeAdded")) == NUM_FRAMES
    (words,) = [one for one in written.warnings() if "made again" in one]
    assert ".lock, frames.csv, events.jsonl, database.db had been deleted" in words


def test_a_run_that_reads_descriptors_back_leaves_its_database_in_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[StoredDescriptors] = []

    def make(folder: Callable[[], Path]) -> StoredDescriptors:
        made.append(StoredDescriptors(folder))
        return made[-1]

    async def read_back() -> None:
        await asyncio.to_thread(made[0].read, FrameId(1))

    monkeypatch.setattr(engine_module, "StoredDescriptors", make)
    run(tmp_path / "run", [*frames_of(world_of(NUM_FRAMES))[:4], read_back])
    assert [path.name for path in (tmp_path / "run").glob("database.db*")] == ["database.db"]


@pytest.mark.slow
def test_images_that_are_deleted_during_a_run_are_missed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    outcome = run(path, after(8, (path / "images" / "000002.jpg").unlink))
    assert outcome.not_saved == ("1 image of the map",)
    (words,) = [one for one in Written.read(path).warnings() if "images that the map" in one]
    assert "000002.jpg" in words


@pytest.mark.slow
def test_a_disk_that_is_nearly_full_ends_a_run_early_with_its_map_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_full: list[int] = []
    monkeypatch.setattr(engine_module, "_LOOK_PERIOD_S", 0.05)
    monkeypatch.setattr(
        "engine.output.recorder.free_bytes", lambda path: 1_000_000 if is_full else 10**12
    )
    path = tmp_path / "run"
    outcome = run(path, after(8, lambda: is_full.append(1)) + [pause])
    written = Written.read(path)
    assert outcome.stopped_by is StoppedBy.FULL_DISK
    assert outcome.not_saved == ()
    assert 8 <= outcome.num_keyframes == num_in_latest(path)
    (low,) = written.of_kind("DiskSpaceLow")
    assert low["free_mb"] == 1.0
    (words,) = [one for one in written.warnings() if "no more frames are taken" in one]
    assert "only 1.0 MB are free" in words


async def pause() -> None:
    await asyncio.sleep(0.5)


# -- small disks, in a mount namespace of their own -----------------------------------------------

ON_A_SMALL_DISK = """
import asyncio, json, logging, os, subprocess, sys
from pathlib import Path
from tests.run.test_lost_folders import NUM_FRAMES, after, run
from tests.support.fake_runs import frames_of, world_of

logging.basicConfig(level=logging.ERROR)
disk = Path(sys.argv[1])
path = disk / "run"
def ballast():
    try:
        with (disk / "ballast").open("wb") as file:
            while file.write(bytes(4096)):
                file.flush()
    except OSError:
        pass
def unmount():
    os.chdir(Path.home())
    subprocess.run(["umount", "-l", str(disk)], check=True)
def forbid():
    for folder in (path, path / "images", path / "snapshots", disk):
        folder.chmod(0o555)
async def pause():
    await asyncio.sleep(0.7)
happening = {"ballast": ballast, "unmount": unmount, "forbid": forbid}[sys.argv[2]]
happenings = after(int(sys.argv[3]), happening)
if sys.argv[4] == "room":
    async def free():
        await asyncio.sleep(0.2)
        (disk / "ballast").unlink()
    happenings += [free]
outcome = run(path, happenings, settings=("runtime.min_free_mb=0",))
summary = outcome.path / "summary.json"
print(json.dumps({
    "path": str(outcome.path), "not_saved": outcome.not_saved,
    "summary": summary.exists(), "saved": (outcome.path / "latest" / "snapshot.json").exists(),
}))
subprocess.run(["cp", "-a", str(disk) + "/run", sys.argv[1] + "-copy"], check=False)
"""


def on_a_small_disk(
    tmp_path: Path, happening: str, *, after_frames: int, then: str = "", size: str = "20m"
) -> tuple[dict[str, Any], Path, str]:
    """How a run ends in a file system of its own; a copy of its folder; what it said.

    Skips where mounting is not allowed.
    """
    import json

    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "home").mkdir()
    mount = f"mount -t tmpfs -o size={size} tmpfs {disk}"
    tried = (
        subprocess.run(
            ["unshare", "-m", "sh", "-c", mount], capture_output=True, text=True, check=False
        )
        if shutil.which("unshare")
        else None
    )
    if tried is None or tried.returncode:
        pytest.skip("needs the right to mount a small file system (unshare -m; mount -t tmpfs)")
    # Root may write everywhere, unless it gives that up.
    obeying = "setpriv --bounding-set=-dac_override,-dac_read_search"
    arguments = " ".join([str(disk), happening, str(after_frames), then or "-"])
    ended = subprocess.run(
        [
            "unshare",
            "-m",
            "sh",
            "-c",
            f"{mount} && cd {tmp_path / 'home'} &&"
            f" HOME={tmp_path / 'home'} PYTHONPATH={Path.cwd()} {obeying} {sys.executable} -"
            f" {arguments}",
        ],
        input=ON_A_SMALL_DISK,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1]), tmp_path / "disk-copy", ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("after_frames", [2, 9, 15])
def test_a_disk_that_fills_up_at_some_moment_costs_no_keyframe(
    tmp_path: Path, after_frames: int
) -> None:
    ended, copy, said = on_a_small_disk(tmp_path, "ballast", after_frames=after_frames)
    assert "No space left on device" in said
    rescued = Path(ended["path"])
    assert rescued == tmp_path / "home" / "run.rescued"
    assert ended["not_saved"] == []
    assert len(journalled(rescued)) == num_in_latest(rescued) == NUM_FRAMES
    assert len(list((rescued / "images").iterdir())) == NUM_FRAMES
    assert len(Written.read(rescued).rows) == NUM_FRAMES
    assert len(journalled(copy)) > 0  # sound, as far as it went


@pytest.mark.slow
def test_a_disk_that_has_room_again_at_the_end_gets_everything(tmp_path: Path) -> None:
    ended, copy, said = on_a_small_disk(tmp_path, "ballast", after_frames=9, then="room")
    assert "No space left on device" in said
    assert Path(ended["path"]).name == "run"
    assert ended["not_saved"] == []
    assert len(journalled(copy)) == num_in_latest(copy) == NUM_FRAMES
    assert len(Written.read(copy).rows) == NUM_FRAMES
    assert not (tmp_path / "home" / "run.rescued").exists()


@pytest.mark.slow
def test_a_disk_that_is_unmounted_is_left_for_another_one(tmp_path: Path) -> None:
    ended, _, said = on_a_small_disk(tmp_path, "unmount", after_frames=9)
    rescued = Path(ended["path"])
    assert rescued == tmp_path / "home" / "run.rescued"
    assert "its disk is not there any more" in said
    assert len(journalled(rescued)) == num_in_latest(rescued) == NUM_FRAMES
    num_lost = NUM_FRAMES - len(list((rescued / "images").iterdir()))
    assert ended["not_saved"] == [f"{num_lost} images of the map"]


@pytest.mark.slow
def test_a_run_that_may_not_write_its_folder_any_more_goes_on_elsewhere_with_all_images(
    tmp_path: Path,
) -> None:
    ended, copy, said = on_a_small_disk(tmp_path, "forbid", after_frames=9)
    rescued = Path(ended["path"])
    assert rescued == tmp_path / "home" / "run.rescued"
    assert "cannot be written any more (Permission denied)" in said
    assert ended["not_saved"] == []
    assert len(journalled(rescued)) == num_in_latest(rescued) == NUM_FRAMES
    assert len(list((rescued / "images").iterdir())) == NUM_FRAMES
    assert len(journalled(copy)) > 0
    assert run_state(copy)[0] is RunState.INTERRUPTED


@pytest.mark.slow
def test_a_database_that_another_program_holds_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "run"
    held: list[sqlite3.Connection] = []

    def hold() -> None:
        connection = sqlite3.connect(path / "database.db", isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        held.append(connection)

    async def let_go() -> None:
        await asyncio.sleep(1.0)
        held.pop().close()

    outcome = run(path, [*after(4, hold), let_go])
    assert outcome.not_saved == ()
    assert len(journalled(path)) == num_in_latest(path) == NUM_FRAMES
    written = Written.read(path)
    assert written.statuses == ["keyframe"] * NUM_FRAMES
    assert len([one for one in written.warnings() if "is locked by another program" in one]) == 1
    assert len([one for one in written.warnings() if "can be written again" in one]) == 1
    assert written.summary["failed_writes"] == 0
