"""Copies of run folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.output.run_copy import copy_run
from engine.output.run_folder import RunFolder
from engine.output.run_lock import RunLock, RunState, run_state


@pytest.fixture
def former(tmp_path: Path) -> Path:
    """A run that ended, with an image in a subfolder and two snapshots."""
    path = tmp_path / "former"
    RunFolder.create(path, config_text="a: 1\n").close()
    for name in (
        "images/left/1.jpg",
        "masks/left/1.jpg.png",
        "dense/000001.npz",
        "database.db",
        "database.db-wal",
    ):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(name.encode())
    for number in ("000001", "000002"):
        model = path / "snapshots" / number / "sparse" / "0"
        model.mkdir(parents=True)
        (model / "images.bin").write_bytes(number.encode())
        (model.parents[1] / "images").symlink_to("../../images")
    (path / "latest").symlink_to("snapshots/000002")
    return path


def contents(path: Path) -> dict[str, bytes]:
    files = (file for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def test_a_copy_has_what_a_run_goes_on_from_and_shares_its_images(former: Path) -> None:
    before = contents(former)
    target = former.with_name("new")
    lock = copy_run(former, target, overwrite=False)
    try:
        assert os.path.samefile(target / "images/left/1.jpg", former / "images/left/1.jpg")
        assert os.path.samefile(target / "dense/000001.npz", former / "dense/000001.npz")
        assert (target / "database.db-wal").read_bytes() == b"database.db-wal"
        assert not os.path.samefile(target / "database.db", former / "database.db")
        assert (target / "latest/sparse/0/images.bin").read_bytes() == b"000002"
        assert os.path.samefile(target / "latest/images", target / "images")
        assert [one.name for one in (target / "snapshots").iterdir()] == ["000002"]
        assert run_state(target)[0] is RunState.RUNNING
    finally:
        lock.release()
    assert contents(former) == before


def test_images_are_copied_where_no_links_are_to_be_had(
    former: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refuse)
    target = former.with_name("new")
    copy_run(former, target, overwrite=False).release()
    assert (target / "images/left/1.jpg").read_bytes() == b"images/left/1.jpg"
    assert not os.path.samefile(target / "images/left/1.jpg", former / "images/left/1.jpg")


def test_a_run_that_goes_on_is_not_copied(former: Path) -> None:
    lock = RunLock.acquire(former)
    try:
        with pytest.raises(ConfigError, match="a run is writing there"):
            copy_run(former, former.with_name("new"), overwrite=False)
    finally:
        lock.release()
    assert not former.with_name("new").exists()


def test_a_folder_that_holds_something_is_not_used(former: Path) -> None:
    target = former.with_name("new")
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        copy_run(former, target, overwrite=False)
