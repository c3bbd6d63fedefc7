"""The disk of a run: how much is free, what a failed write says about it, and where else to go."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from engine.config import RuntimeConfig
from engine.errors import ConfigError

_SMALL_DISK_SHARE = 0.05  # of a disk, that must stay free where `min_free_mb` is more
_BYTES_PER_KEYPOINT = 48  # of a COLMAP model: 24 in images.bin, and as much in points3D.bin
_RESCUED = ".rescued"
_RESCUED_NAME = re.compile(r"\.rescued(-\d+)?$")

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNUSABLE = {
    errno.EROFS,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.ENXIO,
    errno.ENODEV,
    errno.ESTALE,
    errno.ENOTCONN,
}
_MISSING = {errno.ENOENT, errno.ENOTDIR}
_LOCKED_CODES = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_UNUSABLE_CODES = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR}


class Trouble(StrEnum):
    """What a failed write says about the disk."""

    FULL = "full"
    LOCKED = "locked"  # the database, by another program
    MISSING = "missing"  # a folder of the run is not there any more
    UNUSABLE = "unusable"  # read-only, failing, gone, or not allowed any more
    NONE = "none"  # the disk is not to blame


def trouble_of(error: BaseException) -> Trouble:
    """What the first error of a chain of causes says about the disk."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # extended codes have more bits
        if code in _LOCKED_CODES:
            return Trouble.LOCKED
        if code == sqlite3.SQLITE_FULL:
            return Trouble.FULL
        return Trouble.UNUSABLE if code in _UNUSABLE_CODES else Trouble.NONE
    if isinstance(error, OSError):
        for numbers, trouble in (
            (_FULL, Trouble.FULL),
            (_UNUSABLE, Trouble.UNUSABLE),
            (_MISSING, Trouble.MISSING),
        ):
            if error.errno in numbers:
                return trouble
    return Trouble.NONE


def free_bytes(path: Path) -> int | None:
    """What is free for this process on the disk of an existing path; None where nobody knows."""
    try:
        disk = os.statvfs(path)
    except OSError:
        return None
    # Some network drives and FUSE file systems report nothing at all.
    return disk.f_bavail * disk.f_frsize if disk.f_blocks else None


def reserve_bytes(path: Path, config: RuntimeConfig, *, num_keypoints: int = 0) -> int:
    """What must stay free on the disk of a run, so that its map can be saved; 0: no limit.

    Args:
        path: the run folder, or an existing folder above it.
        config: has the limit of large disks.
        num_keypoints: of all keyframes so far; a model of them is written beside the former one.
    """
    if not config.min_free_mb:
        return 0
    try:
        disk = os.statvfs(path)
    except OSError:
        return 0
    fixed = min(config.min_free_mb * 1e6, _SMALL_DISK_SHARE * disk.f_blocks * disk.f_frsize)
    unmerged = sum(_size(path / name) for name in ("database.db-wal", "frames.csv"))
    return int(fixed) + unmerged + _BYTES_PER_KEYPOINT * num_keypoints


def refuse_full_disk(path: Path, config: RuntimeConfig) -> None:
    """Refuses to begin a run where no frame would be taken.

    Raises:
        ConfigError: in words with the figures and the setting.
    """
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free, reserve = free_bytes(existing), reserve_bytes(existing, config)
    if free is not None and free < reserve:
        raise ConfigError(
            f"{path}: {free / 1e6:.0f} MB are free on its disk, and {reserve / 1e6:.0f} MB must"
            " stay free to save the map (runtime.min_free_mb); make room or choose another disk"
        )


def rescue_folders(path: Path, *, device: int, min_free_bytes: int) -> Iterator[Path]:
    """Folders, not yet made, where a run whose folder is lost may go on; the nearest first.

    Beside the folder unless its disk was unmounted, in the working folder, at home: where there is
    room.

    Args:
        path: the folder that is lost.
        device: the number of its disk.
        min_free_bytes: what there must be room for.
    """
    beside = path.absolute().parent
    for parent in dict.fromkeys((beside, Path.cwd(), Path.home())):
        if parent == beside and not _is_on(parent, device):
            continue
        free = free_bytes(parent)
        if free is None or free < min_free_bytes or not os.access(parent, os.W_OK):
            continue
        stem = _RESCUED_NAME.sub("", path.name) + _RESCUED
        candidate, number = parent / stem, 1
        while candidate.exists() or candidate.is_symlink():
            number += 1
            candidate = parent / f"{stem}-{number}"
        yield candidate


def _is_on(path: Path, device: int) -> bool:
    try:
        return path.stat().st_dev == device
    except OSError:
        return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
