"""Copies of run folders: a new run begins with the map of another one, which stays as it is."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from engine.errors import JournalError
from engine.output.files import link_atomically, link_or_copy
from engine.output.laid_onto import LAID_ONTO
from engine.output.run_folder import DENSE_FOLDER, MASKS_FOLDER, RunFolder, delete_former_run
from engine.output.run_lock import RunLock, refuse_running

_TABLES = ("config.yaml", "events.jsonl", LAID_ONTO)
_DATABASE = ("database.db", "database.db-wal")  # what a killed run committed last is in the log


def copy_run(former: Path, path: Path, *, overwrite: bool) -> RunLock:
    """Copies what a run needs to go on into a folder, which is locked.

    Images, masks, depth maps and the latest snapshot are hard links where the file system has them:
    files of a run are replaced, never changed.

    Args:
        former: the run's folder; no live run may hold it.
        path: of the new folder, see ``RunFolder.create``.
        overwrite: a former run may be in the new folder.

    Raises:
        ConfigError: a live run holds the former folder, or the new one cannot be used.
        JournalError: something cannot be copied.
    """
    refuse_running(former)
    lock = RunFolder.prepare(path, overwrite=overwrite)
    try:
        for folder in ("images", MASKS_FOLDER, DENSE_FOLDER):
            if (former / folder).is_dir():
                _link_folder(former / folder, path / folder)
        _link_latest(former, path)
        live = (one.name for one in former.glob("trajectory_live*.txt"))
        for name in (*_TABLES, *live, *_DATABASE):
            if (former / name).exists():
                shutil.copyfile(former / name, path / name)
        refuse_running(former)  # it may have gone on meanwhile
    except (OSError, shutil.Error) as error:
        delete_copy(path, lock)
        raise JournalError(f"{former}: cannot be copied to {path}: {error}") from error
    except BaseException:
        delete_copy(path, lock)
        raise
    return lock


def delete_copy(path: Path, lock: RunLock) -> None:
    """Deletes what a copy has made and lets go of its lock; other files in the folder stay."""
    with suppress(OSError):
        delete_former_run(path)
    lock.release()
    with suppress(OSError):  # it is not empty
        path.rmdir()


def _link_latest(former: Path, path: Path) -> None:
    latest = (former / "latest").resolve()
    if not latest.is_dir():
        return
    snapshot = path / "snapshots" / latest.name
    _link_folder(latest, snapshot)
    link_atomically(path / "latest", f"snapshots/{latest.name}")


def _link_folder(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    link_or_copy(Path(source), Path(target))
