"""The format version of run folders: which ones this version of LiveSfM reads and goes on with.

It is in the first line of ``config.yaml``, which is written before all else, and in the database.

1  folders without a version: keyframes with keypoints and pairs, not all that a resume needs
2  the database has tables of our own, see `own_tables`
"""

from __future__ import annotations

import re
from pathlib import Path

from engine.errors import ConfigError, JournalError

FORMAT_VERSION = 2

_FIRST_LINE = re.compile(rb"# LiveSfM run folder, format ([0-9]{1,9})\r?\n")
_MAX_FIRST_LINE = 200  # bytes


def format_line() -> str:
    """The first line of ``config.yaml``, a comment."""
    return f"# LiveSfM run folder, format {FORMAT_VERSION}\n"


def read_format_version(run_folder: Path) -> int:
    """The format version of a run folder by its ``config.yaml``; 1 where that names none.

    Raises:
        JournalError: the file cannot be read.
    """
    path = run_folder / "config.yaml"
    try:
        if not path.is_file():
            return 1
        with path.open("rb") as file:
            found = _FIRST_LINE.match(file.readline(_MAX_FIRST_LINE))
    except OSError as error:
        raise JournalError(f"{path}: cannot be read: {error.strerror}") from error
    return int(found.group(1)) if found else 1


def check_readable(run_folder: Path) -> None:
    """Refuses to read a run folder that is none, or that a newer version of LiveSfM wrote.

    Raises:
        ConfigError: there is no such folder, it did, or the version cannot be read.
    """
    if not run_folder.is_dir():
        raise ConfigError(f"{run_folder}: no such run folder")
    try:
        refuse_newer(run_folder, read_format_version(run_folder))
    except JournalError as error:
        raise ConfigError(str(error)) from error


def check_resumable(run_folder: Path) -> None:
    """Refuses to go on in a run folder that another version of LiveSfM wrote.

    Raises:
        ConfigError: it did, or the version cannot be read.
    """
    check_readable(run_folder)
    config = run_folder / "config.yaml"
    if config.is_file() and not config.stat().st_size:
        raise ConfigError(f"{config}: is empty, so the settings of the run are lost; begin it anew")
    try:
        refuse_older(run_folder, read_format_version(run_folder))
    except JournalError as error:
        raise ConfigError(str(error)) from error


def refuse_newer(path: Path, version: int) -> None:
    """Refuses a format version that this version of LiveSfM does not know.

    Raises:
        JournalError: it does not.
    """
    if version > FORMAT_VERSION:
        raise JournalError(
            f"{path}: was written by a newer version of LiveSfM (run format {version}, this one"
            f" reads up to {FORMAT_VERSION}); install that"
        )


def refuse_older(path: Path, version: int) -> None:
    """Refuses a run that does not hold what a run that goes on needs.

    Raises:
        JournalError: it does not.
    """
    if version < FORMAT_VERSION:
        raise JournalError(
            f"{path}: was written by an older version of LiveSfM, which kept too little to go on"
            " from; evaluate and export read it, and a new run may read its images"
        )
