from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

import pytest

from engine.config import RuntimeConfig
from engine.errors import ConfigError, JournalError
from engine.output.disk import (
    Trouble,
    free_bytes,
    refuse_full_disk,
    rescue_folders,
    reserve_bytes,
    trouble_of,
)


def because(cause: Exception) -> JournalError:
    error = JournalError("cannot be written")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("number", "trouble"),
    [
        (errno.ENOSPC, Trouble.FULL),
        (errno.EDQUOT, Trouble.FULL),
        (errno.EROFS, Trouble.UNUSABLE),
        (errno.EIO, Trouble.UNUSABLE),
        (errno.EACCES, Trouble.UNUSABLE),
        (errno.ENOENT, Trouble.MISSING),
        (errno.EMFILE, Trouble.NONE),
    ],
)
def test_a_failed_write_says_what_ails_the_disk(number: int, trouble: Trouble) -> None:
    assert trouble_of(because(OSError(number, "words"))) is trouble


def test_a_locked_database_is_told_from_one_that_refuses_a_row(tmp_path: Path) -> None:
    first, second = (
        sqlite3.connect(tmp_path / "a.db", isolation_level=None, timeout=0.0) for _ in range(2)
    )
    first.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY)")
    first.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError) as locked:
        second.execute("INSERT INTO rows VALUES (1)")
    assert trouble_of(because(locked.value)) is Trouble.LOCKED
    first.execute("INSERT INTO rows VALUES (1)")
    with pytest.raises(sqlite3.IntegrityError) as taken:
        first.execute("INSERT INTO rows VALUES (1)")
    assert trouble_of(because(taken.value)) is Trouble.NONE
    first.close()
    second.close()


def test_what_must_stay_free_is_a_share_of_a_small_disk_and_room_for_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RuntimeConfig(min_free_mb=500)
    real = os.statvfs(tmp_path)

    def disk_of(num_bytes: int) -> None:
        values = list(real)
        values[1], values[2], values[4] = 1, num_bytes, num_bytes // 100
        result = os.statvfs_result(values)
        monkeypatch.setattr(os, "statvfs", lambda path: result)

    disk_of(10**12)
    assert reserve_bytes(tmp_path, config) == 500_000_000
    assert reserve_bytes(tmp_path, config, num_keypoints=10**6) == 548_000_000
    assert reserve_bytes(tmp_path, RuntimeConfig(min_free_mb=0), num_keypoints=10**6) == 0
    refuse_full_disk(tmp_path / "new" / "run", config)
    disk_of(6_000_000)
    assert reserve_bytes(tmp_path, config) == 300_000
    (tmp_path / "database.db-wal").write_bytes(bytes(1000))
    assert reserve_bytes(tmp_path, config) == 301_000
    assert free_bytes(tmp_path) == 60_000
    with pytest.raises(ConfigError, match="0 MB are free on its disk"):
        refuse_full_disk(tmp_path / "new" / "run", config)


def test_a_run_is_rescued_beside_its_folder_unless_the_disk_is_gone_or_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "home", "beside"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run, device = tmp_path / "beside" / "run", tmp_path.stat().st_dev

    def names(*, device: int = device, min_free_bytes: int = 0) -> list[str]:
        found = rescue_folders(run, device=device, min_free_bytes=min_free_bytes)
        return [str(path.relative_to(tmp_path)) for path in found]

    assert names() == ["beside/run.rescued", "here/run.rescued", "home/run.rescued"]
    assert names(device=device + 1) == ["here/run.rescued", "home/run.rescued"]
    assert names(min_free_bytes=10**18) == []
    (tmp_path / "here" / "run.rescued").mkdir()
    assert names()[1] == "here/run.rescued-2"
