"""Run lock: one run at a time writes a folder, which says whether it lives, was killed or ended.

The file ``.lock`` in the folder names the process, the host and the start of the run that writes
there. The run holds an advisory lock on it (``flock``) for as long as it lives; the system lets it
go when the process ends, however it ends. A run that ends by itself deletes the file:

    a lock that is held         the run is alive
    a lock that nobody holds    the run was killed, or the machine went down
    no lock                     the run ended by itself

Some file systems have no ``flock``, and on some network drives it holds on one machine only. There
the time of the file decides, which a run sets every few seconds.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from engine.errors import ConfigError
from engine.output.files import is_file_at

LOCK_NAME = ".lock"
_MAX_SILENT_S = 120.0  # a run on another host that did not set the time for so long is gone
_HELD_BY_ANOTHER = {errno.EWOULDBLOCK, errno.EACCES}
_NUM_TRIES, _RETRY_S = 4, 0.05  # who looks at the state of a run holds its lock for a moment
_MAX_LOCK_BYTES = 4096


class RunState(StrEnum):
    """What became of the run in a folder."""

    RUNNING = "running"
    INTERRUPTED = "interrupted"  # killed, left at once, or the machine went down
    ENDED = "ended"  # by itself; or written by a version that had no locks


@dataclass(frozen=True, slots=True, kw_only=True)
class LockHolder:
    """The run that a lock names."""

    pid: int
    host: str
    started_at: str  # ISO 8601, UTC

    @property
    def words(self) -> str:
        """Which process, where and since when, for people."""
        where = "" if self.host == socket.gethostname() else f" on {self.host}"
        return f"process {self.pid}{where}, since {self.started_at}"


class RunLock:
    """The lock of a run folder, held; made by `acquire`.

    It belongs to the file and goes with a folder that is renamed.

    Args:
        path: the run folder.
        descriptor: of the file, locked.
        interrupted: the run that was cut off in the folder before, if one was.
    """

    def __init__(self, path: Path, descriptor: int, *, interrupted: LockHolder | None) -> None:
        self._path = path / LOCK_NAME
        self._descriptor: int | None = descriptor
        self.interrupted = interrupted

    @classmethod
    def acquire(cls, path: Path) -> RunLock:
        """Locks a run folder, which must exist.

        Raises:
            ConfigError: another run holds it, in words that name it; or the folder cannot be
                locked.
        """
        try:
            return cls._acquire(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be locked: {error.strerror}") from error

    @classmethod
    def _acquire(cls, path: Path) -> RunLock:
        for _ in range(_NUM_TRIES):
            descriptor, is_new = _opened_for_writing(path / LOCK_NAME)
            try:
                is_locked = _try_to_lock(descriptor)
                former = _read_holder(descriptor)
                if not is_file_at(descriptor, path / LOCK_NAME):
                    continue  # its run ended meanwhile
                if is_new or _is_free(descriptor, is_locked=is_locked, holder=former):
                    _write_own(descriptor)
                    kept, descriptor = descriptor, -1
                    return cls(path, kept, interrupted=former)
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
            time.sleep(_RETRY_S)
        raise _in_use(path, former)

    def beat(self) -> None:
        """Sets the time of the lock: the run is alive, for machines that do not see it held."""
        if self._descriptor is not None:
            with suppress(OSError):  # what cannot be written is reported by who writes it
                os.utime(self._descriptor)

    @property
    def is_in_place(self) -> bool:
        """Whether the lock that is held is still the one in the folder."""
        return self._descriptor is not None and is_file_at(self._descriptor, self._path)

    def follow(self, path: Path) -> bool:
        """Whether the lock that is held lies in a folder, which may be the renamed one."""
        if self._descriptor is None or not is_file_at(self._descriptor, path / LOCK_NAME):
            return False
        self._path = path / LOCK_NAME
        return True

    def release(self) -> None:
        """Deletes the file, which says that the run ended by itself, and lets go of the lock."""
        if self._descriptor is None:
            return
        with suppress(OSError):
            if self.is_in_place:
                self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def let_go(self) -> None:
        """Lets go of the lock and leaves the state of the folder as it was before."""
        if self.interrupted is None:
            self.release()
        elif self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def run_state(path: Path) -> tuple[RunState, LockHolder | None]:
    """The state of the run in a folder, and the run that its lock names.

    Nothing is written. A folder without a lock, or that cannot be read, counts as ended.
    """
    try:
        descriptor = os.open(path / LOCK_NAME, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return RunState.ENDED, None
    try:
        is_locked = _try_to_lock(descriptor)
        holder = _read_holder(descriptor)
        is_free = _is_free(descriptor, is_locked=is_locked, holder=holder)
    finally:
        os.close(descriptor)
    return (RunState.INTERRUPTED if is_free else RunState.RUNNING), holder


def refuse_running(path: Path) -> None:
    """Refuses a folder that a run is writing.

    Raises:
        ConfigError: in words that name the run.
    """
    state, holder = run_state(path)
    if state is RunState.RUNNING:
        raise _in_use(path, holder)


def _in_use(path: Path, holder: LockHolder | None) -> ConfigError:
    return ConfigError(
        f"{path}: a run is writing there ({holder.words if holder else 'another process'});"
        " wait for its end or choose another folder"
    )


def _opened_for_writing(path: Path) -> tuple[int, bool]:
    """A descriptor of the lock's file, and whether the file was made for it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_EXCL, 0o644), True
    except FileExistsError:
        return os.open(path, flags, 0o644), False


def _try_to_lock(descriptor: int) -> bool | None:
    """Whether the lock is held by this process now; None: the file system has no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _HELD_BY_ANOTHER else None
    return True


def _is_free(descriptor: int, *, is_locked: bool | None, holder: LockHolder | None) -> bool:
    """Whether no live run holds a lock, as far as this machine can know."""
    if is_locked is False:
        return False
    is_of_here = holder is None or holder.host == socket.gethostname()
    if is_locked and is_of_here:
        return True
    if holder is not None and is_of_here and not is_alive(holder.pid):
        return True
    return abs(time.time() - os.fstat(descriptor).st_mtime) > _MAX_SILENT_S


def is_alive(pid: int) -> bool:
    """Whether a process of this machine lives, or may."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is somebody else's, or no number of a process
        return True
    return True


def _read_holder(descriptor: int) -> LockHolder | None:
    """Who a lock names; None where it names nobody, as when its run was killed at once."""
    try:
        record = json.loads(os.pread(descriptor, _MAX_LOCK_BYTES, 0))
        holder = LockHolder(
            pid=int(record["pid"]),
            host=str(record["host"]),
            started_at=str(record["started_at"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return holder if holder.words.isprintable() else None


def _write_own(descriptor: int) -> None:
    own = LockHolder(
        pid=os.getpid(),
        host=socket.gethostname(),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{json.dumps(asdict(own))}\n".encode(), 0)
    os.fsync(descriptor)
