"""Files that others wrote, read whole: regular ones alone, and never more than a limit.

A name may stand for anything: a device that never ends, a FIFO that nobody writes to, a sparse
file larger than memory, or a file that grows while it is read.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

_CHUNK_BYTES = 1 << 20
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def read_regular_file(path: Path, *, max_bytes: int) -> bytes:
    """The whole content of a regular file; links are followed.

    Args:
        path: the file.
        max_bytes: how large it may be.

    Raises:
        OSError: it cannot be read, or is no regular file (``strerror`` says what it is); with
            ``errno.EFBIG`` where it is larger than allowed or does not fit in memory.
    """
    size = regular_file_size(path)
    if size > max_bytes:
        raise _too_large(path, f"{size / 1e6:.3g} MB")
    # A name may come to stand for something else after the look at it: opening waits for nobody.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _refuse_irregular(path, os.fstat(descriptor).st_mode)
        return _read(descriptor, path, max_bytes=max_bytes, expected_bytes=size)
    except MemoryError as error:
        raise _too_large(path, f"{size / 1e6:.3g} MB do not fit in memory") from error
    finally:
        os.close(descriptor)


def read_regular_head(path: Path, *, num_bytes: int) -> bytes:
    """The first bytes of a regular file, or all of one that is shorter; links are followed.

    Args:
        path: the file.
        num_bytes: how many at most.

    Raises:
        OSError: it cannot be read, or is no regular file (``strerror`` says what it is).
    """
    regular_file_size(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _refuse_irregular(path, os.fstat(descriptor).st_mode)
        head = b""
        while len(head) < num_bytes and (chunk := os.read(descriptor, num_bytes - len(head))):
            head += chunk
        return head
    finally:
        os.close(descriptor)


def regular_file_size(path: Path) -> int:
    """Bytes of a regular file; 0 where the system does not say, as below ``/proc``.

    Raises:
        OSError: it is not there, or is no regular file (``strerror`` says what it is).
    """
    status = os.stat(path)
    _refuse_irregular(path, status.st_mode)
    return status.st_size


def _read(descriptor: int, path: Path, *, max_bytes: int, expected_bytes: int) -> bytes:
    # One byte more than expected, so that the file's end shows without another chunk.
    chunks = [os.read(descriptor, min(expected_bytes, max_bytes) + 1)]
    num_bytes = len(chunks[0])
    while chunks[-1]:
        if num_bytes > max_bytes:
            raise _too_large(path, f"more than {max_bytes / 1e6:.3g} MB")
        chunks.append(os.read(descriptor, _CHUNK_BYTES))
        num_bytes += len(chunks[-1])
    return b"".join(chunks[:-1])  # of one chunk no copy is made


def _refuse_irregular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((words for is_kind, words in _KINDS if is_kind(mode)), "something else")
        raise OSError(errno.EINVAL, f"is {kind}, no file", str(path))


def _too_large(path: Path, words: str) -> OSError:
    return OSError(errno.EFBIG, f"too large, {words}", str(path))
