"""Atomic files: written whole or not at all, and append-only files of whole lines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_PREFIX = ".tmp-"  # unfinished work; what a crash leaves under it may be deleted
_KEPT_NAME_CHARS = 40
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


def is_file_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that lies at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


class LineFile:
    """An append-only text file of whole lines, each readable as soon as it is appended."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, line: str) -> None:
        """Appends one line.

        Raises:
            OSError: it cannot be written; no part of it stays in the file.
        """
        # Names of files need not be valid Unicode; such a character is written as its escape.
        data = f"{line}\n".encode(errors="backslashreplace")
        size_before = os.fstat(self._descriptor).st_size
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            os.ftruncate(self._descriptor, size_before)
            raise

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)
