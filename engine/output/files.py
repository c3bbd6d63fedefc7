"""Atomic files: written whole or not at all, and append-only files of whole lines."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

TEMPORARY_PREFIX = ".tmp-"  # unfinished work; what a crash leaves under it may be deleted
_NO_COPY_EITHER = {errno.ENOSPC, errno.EEXIST}
_KEPT_NAME_CHARS = 40
_MAX_WAITING_LINES = 20_000  # of a file that cannot be written; older ones are lost
_CHUNK_BYTES = 1 << 20
_LONGEST_LINE_BYTES = 1 << 20


def temporary_sibling(path: Path) -> Path:
    """The temporary path where ``path`` is prepared before it is renamed into place.

    A name as long as the file system allows leaves no room for more, so only its start is kept.
    """
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name[:_KEPT_NAME_CHARS]}-{os.getpid()}")


@contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write the new content to; it replaces the former one at the end of the block.

    Readers, also after a power cut, see the former or the new content, and after an exception in
    the block the former one.

    Raises:
        OSError: it cannot be written; the former content is untouched.
    """
    temporary = temporary_sibling(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that readers, also after a power cut, see the former or the new content.

    Raises:
        OSError: it cannot be written; the former content is untouched.
    """
    with written_atomically(path) as file:
        file.write(data)


def link_atomically(path: Path, target: str) -> None:
    """Makes ``path`` a symbolic link to ``target``, replacing a former link in one step.

    Raises:
        OSError: the link cannot be made; the former one is untouched.
    """
    temporary = temporary_sibling(path)
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Gives a file a second place: a hard link, or a copy where there is none to be had.

    Systems say in many ways that they have no hard links, or none there.

    Raises:
        OSError: there is a file in that place, the disk is full, or it can be copied neither.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in _NO_COPY_EITHER:
            raise
        shutil.copyfile(source, target)
        with suppress(OSError):  # times and permissions, as a link has them
            shutil.copystat(source, target)


def flush_to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's list of entries, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cut_unfinished_line(path: Path) -> None:
    """Takes what stands behind the last line end off a file; a power cut may leave half a line.

    Raises:
        OSError: the file cannot be changed.
    """
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        start = max(end - _LONGEST_LINE_BYTES, 0)
        file.seek(start)
        file.truncate(start + file.read().rfind(b"\n") + 1)


def is_file_at(descriptor: int, path: Path, *, follow_symlinks: bool = False) -> bool:
    """Whether an open file or folder is the one that lies at a path."""
    try:
        at_path = os.stat(path, follow_symlinks=follow_symlinks)
        return os.path.samestat(os.fstat(descriptor), at_path)
    except OSError:
        return False


def path_of_descriptor(descriptor: int) -> Path | None:
    """Where an open file or folder lies now; None where the system does not say."""
    try:
        if sys.platform == "darwin":
            import fcntl

            name = fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0")
            return Path(os.fsdecode(name))
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    except OSError:
        return None


class LineFile:
    """An append-only text file of whole lines, each readable as soon as it is appended.

    Lines that cannot be written wait, in order, and are written with later ones.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = _opened_for_appending(path)
        self._waiting: deque[bytes] = deque()
        self._num_lost = 0

    @property
    def num_unwritten(self) -> int:
        """Lines that are not in the file: that wait, or were lost.

        They are lost when too many wait. What a failing disk does not give back counts as one.
        """
        return len(self._waiting) + self._num_lost

    @property
    def is_in_place(self) -> bool:
        """Whether the file that is open still lies at its path."""
        return is_file_at(self._descriptor, self._path)

    def append(self, line: str) -> None:
        """Appends one line.

        Raises:
            OSError: it cannot be written; no part of it is in the file, and it waits.
        """
        if len(self._waiting) == _MAX_WAITING_LINES:
            self._waiting.popleft()
            self._num_lost += 1
        # Names of files need not be valid Unicode; such a character is written as its escape.
        self._waiting.append(f"{line}\n".encode(errors="backslashreplace"))
        self.write_waiting()

    def write_waiting(self) -> None:
        """Writes the lines that wait.

        Raises:
            OSError: one cannot be written; it and those after it still wait.
        """
        while self._waiting:
            self._write(self._waiting[0])
            self._waiting.popleft()

    def move(self, path: Path) -> None:
        """Goes on at another path, or at the same one where the file was deleted or replaced.

        What was written goes along, as far as it can be read, unless the file lies there already.

        Raises:
            OSError: the file cannot be made there; the former one stays in use.
        """
        if not is_file_at(self._descriptor, path):
            with written_atomically(path) as new:
                num_missing = _copy_readable(self._descriptor, new)
            moved = _opened_for_appending(path)
            os.close(self._descriptor)
            self._descriptor = moved
            if num_missing:
                self._num_lost += 1  # or more
                logger.error("%s: the last %d bytes could not be read", self._path, num_missing)
        self._path = path

    def reopen(self) -> None:
        """Goes on in the file that replaced the former one at its path.

        Raises:
            OSError: it cannot be opened; the former one stays in use.
        """
        replaced = _opened_for_appending(self._path)
        os.close(self._descriptor)
        self._descriptor = replaced

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def _write(self, data: bytes) -> None:
        size_before = os.fstat(self._descriptor).st_size
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            os.ftruncate(self._descriptor, size_before)
            raise


def _opened_for_appending(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)


def _copy_readable(descriptor: int, target: BinaryIO) -> int:
    """Copies the whole lines of an open file, up to its end or to where its disk fails.

    Returns:
        How many bytes of the file could not be read.
    """
    offset, unfinished = 0, b""
    while chunk := _read_at(descriptor, offset):
        offset += len(chunk)
        lines, end, unfinished = (unfinished + chunk).rpartition(b"\n")
        target.write(lines + end)
    return max(os.fstat(descriptor).st_size - offset, 0)


def _read_at(descriptor: int, offset: int) -> bytes:
    try:
        return os.pread(descriptor, _CHUNK_BYTES, offset)
    except OSError:
        return b""
