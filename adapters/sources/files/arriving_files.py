"""Which image files of a folder are there to be taken, while others write them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from adapters.images.raw_photos import RAW_SUFFIXES
from adapters.sources.files.photo_files import IMAGE_SUFFIXES, natural_key
from adapters.sources.files.photo_search import counted, reason_by_name
from engine.types import LeftOut

_ENDS_OF_IMAGES: Mapping[str, bytes] = {  # by suffix; the end marker, where a format has one
    ".jpg": b"\xff\xd9",
    ".jpeg": b"\xff\xd9",
    ".png": b"\0\0\0\0IEND\xaeB\x60\x82",
}
_MAX_LEFT_OUT = 100_000  # that are counted
_PATIENCE_WITH_EMPTY_FILES = 10  # times longer: something is to come


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivingFile:
    """A file to be taken."""

    name: str
    is_settled: bool  # unchanged for long; False: it ends as a whole image does


@dataclass(frozen=True, slots=True)
class _Fingerprint:
    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unfinished:
    fingerprint: _Fingerprint
    since_s: float  # unchanged
    was_tried: bool = False  # it ended as a whole image does, but was none


class ArrivingFiles:
    """The image files of a folder, each given out once, when it seems to be written.

    A file is there when it ends as a whole JPEG or PNG does, which what is renamed into the folder
    does at once, or when neither size nor time have changed for ``settle_s`` (by our clock; that of
    a file server may be another). Hidden files, temporary ones and subfolders are left alone. All
    methods block briefly.
    """

    def __init__(self, folder: Path, *, settle_s: float) -> None:
        """Looks at nothing yet.

        Args:
            folder: it alone, not what is below.
            settle_s: how long a file must not change.
        """
        self._folder = folder
        self._settle_s = settle_s
        self._taken: set[str] = set()
        self._unfinished: dict[str, _Unfinished] = {}
        self._identity = (0, 0)
        self._left_out: dict[PurePosixPath, str] = {}  # by name, with the reason
        self._num_reported = 0  # kinds and reasons

    @property
    def num_unfinished(self) -> int:
        """Files that were seen and not given out."""
        return len(self._unfinished)

    @property
    def folder_identity(self) -> tuple[int, int]:
        """Device and inode of the folder looked at last; another folder may take its place."""
        return self._identity

    def scan(self, *, now_s: float) -> list[ArrivingFile]:
        """Files that are there now and were not given out, in natural order.

        Args:
            now_s: on a clock that never jumps.

        Raises:
            OSError: the folder cannot be read, or is none.
        """
        found = self._find()
        self._unfinished = {
            name: self._followed(name, fingerprint, now_s=now_s)
            for name, fingerprint in found.items()
        }
        arrived = [
            ArrivingFile(name=name, is_settled=is_settled)
            for name, file in self._unfinished.items()
            if (is_settled := self._is_settled(file, now_s=now_s))
            or (not file.was_tried and self._ends_as_a_whole(name))
        ]
        return sorted(arrived, key=lambda file: natural_key(PurePosixPath(file.name)))

    def settles_in_s(self, *, now_s: float) -> float:
        """How long until the next of the files not given out settles, if they stay as they are."""
        due_s = (file.since_s + self._patience_s(file) for file in self._unfinished.values())
        return max(min(due_s, default=math.inf) - now_s, 0.0)

    def new_left_out(self) -> tuple[LeftOut, ...]:
        """All files left out so far, if a kind that could be missed was not reported yet."""
        left_out = counted(self._left_out)
        num_missed = sum(one.is_missed for one in left_out)
        if num_missed == self._num_reported:
            return ()
        self._num_reported = num_missed
        return left_out

    def take(self, file: ArrivingFile) -> None:
        """Does not give this file out again, whatever becomes of it."""
        self._unfinished.pop(file.name, None)
        self._taken.add(file.name)

    def wait_for(self, file: ArrivingFile) -> None:
        """Gives a file out again only when it has settled: it was no whole image after all."""
        if file.name in self._unfinished:
            unfinished = self._unfinished[file.name]
            self._unfinished[file.name] = replace(unfinished, was_tried=True)

    def _find(self) -> dict[str, _Fingerprint]:
        status = os.stat(self._folder)
        self._identity = (status.st_dev, status.st_ino)
        found: dict[str, _Fingerprint] = {}
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if not _is_image_name(entry.name):
                    self._leave_out(entry)
                elif entry.name not in self._taken:
                    fingerprint = _fingerprint_of(entry)
                    if fingerprint is not None:
                        found[entry.name] = fingerprint
        return found

    def _leave_out(self, entry: os.DirEntry[str]) -> None:
        file = PurePosixPath(entry.name)
        is_known = file in self._left_out or len(self._left_out) >= _MAX_LEFT_OUT
        if is_known or entry.name.startswith((".", "~")) or not entry.is_file():
            return
        is_raw = file.suffix.lower() in RAW_SUFFIXES
        reason = "raw photos are not watched for" if is_raw else reason_by_name(entry.name)
        self._left_out[file] = reason

    def _followed(self, name: str, fingerprint: _Fingerprint, *, now_s: float) -> _Unfinished:
        before = self._unfinished.get(name)
        if before is not None and before.fingerprint == fingerprint:
            return before
        return _Unfinished(fingerprint=fingerprint, since_s=now_s)

    def _is_settled(self, file: _Unfinished, *, now_s: float) -> bool:
        return now_s >= file.since_s + self._patience_s(file)

    def _patience_s(self, file: _Unfinished) -> float:
        return self._settle_s * (1 if file.fingerprint.size else _PATIENCE_WITH_EMPTY_FILES)

    def _ends_as_a_whole(self, name: str) -> bool:
        end = _ENDS_OF_IMAGES.get(os.path.splitext(name)[1].lower())
        if end is None:
            return False
        try:
            with open(self._folder / name, "rb") as file:
                file.seek(-len(end), os.SEEK_END)
                return file.read() == end
        except OSError:  # shorter than its end, not readable yet, or gone
            return False


def _is_image_name(name: str) -> bool:
    return not name.startswith((".", "~")) and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _fingerprint_of(entry: os.DirEntry[str]) -> _Fingerprint | None:
    """What changes when a file is written; None when it is no file, or gone."""
    try:
        if not entry.is_file():
            return None
        status = entry.stat()
    except OSError:
        return None
    return _Fingerprint(status.st_size, status.st_mtime_ns, status.st_ino)
