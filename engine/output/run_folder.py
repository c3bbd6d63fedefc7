"""Run folder: every file of a run but the journal, the snapshots and the recording.

Every file is readable while the run goes on: tables grow by whole lines, documents are replaced in
one step. All methods are called from one I/O thread.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, FolderTakenError, JournalError
from engine.events import Event
from engine.geometry import invert_pose, quat_xyzw_from_rotation
from engine.mapping.stored_state import StoredFrame
from engine.output.files import (
    TEMPORARY_PREFIX,
    LineFile,
    cut_unfinished_line,
    is_file_at,
    path_of_descriptor,
    write_atomically,
    written_atomically,
)
from engine.output.laid_onto import LAID_ONTO, record_of
from engine.output.run_format import format_line
from engine.output.run_lock import (
    LOCK_NAME,
    RunLock,
    RunState,
    is_alive,
    refuse_running,
    run_state,
)
from engine.types import (
    DropReason,
    Float64Array,
    Frame,
    FrameId,
    FramePose,
    PoseKind,
    RejectedFrame,
)

FRAMES_HEADER = ("frame_id", "source", "index", "name", "captured_at_s", "status", "pose", "map")
MASKS_FOLDER = "masks"  # made when there is a mask
PROFILE_FOLDER = "profile"  # made when the run was profiled
DENSE_FOLDER = "dense"  # made with the first depth map
PRODUCTS_FOLDER = "products"  # made with the first of them
REPORT_NAME = "report.html"  # written when the run has ended
TRAINING_FOLDER = "training"  # made where a trainer is to read the run
TRAIN_LINK = "train"  # to the newest version in it
KEYFRAME_STATUS = "keyframe"
TRACKED_STATUS = "tracked"

_TUM_HEADER = "# timestamp tx ty tz qx qy qz qw (world_from_cam)"
_FILES = {
    LOCK_NAME,
    "config.yaml",
    "database.db",
    "database.db-shm",
    "database.db-wal",
    "events.jsonl",
    "frames.csv",
    "groundtruth.txt",
    LAID_ONTO,
    "latest",
    REPORT_NAME,
    "summary.json",
    TRAIN_LINK,
}
_NUMBERED_FILES = re.compile(r"trajectory(_live)?(_[0-9]+)?\.txt|recording(_[0-9]+)?\.rrd")
_FORMER_HEADER = FRAMES_HEADER[:6]  # of runs that had no columns for poses
_FOLDERS = {"images", "snapshots"}
_OPTIONAL_FOLDERS = {MASKS_FOLDER, PROFILE_FOLDER, DENSE_FOLDER, PRODUCTS_FOLDER, TRAINING_FOLDER}


def trajectory_name(map_idx: int) -> str:
    """The file of the poses in the map ``sparse/MAP_IDX``."""
    return f"trajectory_{map_idx}.txt" if map_idx else "trajectory.txt"


def live_trajectory_name(world_number: int) -> str:
    """The file of poses as first reported in a world: a reader of TUM files expects only one."""
    return f"trajectory_live_{world_number}.txt" if world_number else "trajectory_live.txt"


def dropped_status(reason: DropReason) -> str:
    """The status in ``frames.csv`` of a frame that was not used."""
    return f"dropped:{reason.value}"


def unique_run_path(base: Path, stem: str) -> Path:
    """The first of ``base/stem``, ``base/stem-2``, ``base/stem-3``, ... that does not exist.

    Characters of ``stem`` that do not suit a folder's name become dashes.
    """
    name = re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "run"
    path, number = base / name, 1
    while path.exists() or path.is_symlink():
        number += 1
        path = base / f"{name}-{number}"
    return path


def format_timestamp(captured_at_s: float) -> str:
    """A capture time as text, as in every file of a run: to the nanosecond, no trailing zeros."""
    return f"{captured_at_s:.9f}".rstrip("0").rstrip(".")


@dataclass(slots=True)
class _FrameRow:
    """A row of ``frames.csv`` that may still wait for its status."""

    frame_id: FrameId | None
    source: str
    index: int
    name: str
    captured_at_s: float
    status: str | None

    def as_line(self) -> str:
        """The row without its pose, which is known at the end only."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(
            [
                "" if self.frame_id is None else self.frame_id,
                self.source,
                self.index,
                self.name,
                format_timestamp(self.captured_at_s),
                self.status,
                "",
                "",
            ]
        )
        return text.getvalue().removesuffix("\n")


def _row_of(frame: StoredFrame) -> _FrameRow:
    return _FrameRow(
        frame_id=frame.frame_id,
        source=frame.source,
        index=frame.index,
        name=frame.name,
        captured_at_s=frame.captured_at_s,
        status=frame.status,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _FormerTables:
    """Files of a run that goes on, as it begins with them."""

    frames: bytes
    config: bytes


class RunFolder:
    """Writes the tables and documents of one run."""

    def __init__(self, path: Path, *, lock: RunLock) -> None:
        """Opens the tables of a folder that the run holds the lock of, for appending.

        Raises:
            JournalError: they cannot be opened.
        """
        self.path = path
        self.lock = lock
        self._former: _FormerTables | None = None  # what `go_on` is to write
        self._is_settled = False
        self._is_closed = False
        self._unsettled_rows: dict[FrameId, _FrameRow] = {}
        self._rows: deque[_FrameRow] = deque()  # in order of arrival, not yet written
        self._poses: dict[str, tuple[str, str]] | None = None  # by frame: kind, map; None: not yet
        with _writing(path):
            self._config = (path / "config.yaml").read_bytes()
            self._descriptor = os.open(path, os.O_RDONLY)  # finds the folder where it was renamed
            self._frames = LineFile(path / "frames.csv")
            self._events = LineFile(path / "events.jsonl")
            self._live_trajectory = LineFile(path / live_trajectory_name(0))
        self._tables = {
            "frames.csv": self._frames,
            "events.jsonl": self._events,
            live_trajectory_name(0): self._live_trajectory,
        }

    @classmethod
    def create(cls, path: Path, *, config_text: str, overwrite: bool = False) -> RunFolder:
        """Makes the folder of a new run.

        Args:
            path: a folder that does not exist, or is empty. It is locked until `close`.
            config_text: the resolved configuration, for ``config.yaml``, after the format version.
            overwrite: a former run may be in the folder; what it wrote is deleted. Files that no
                run writes stay.

        Raises:
            ConfigError: the folder holds something and may not be used, another run is writing
                there, or it cannot be made.
            JournalError: the first files cannot be written.
        """
        lock = cls.prepare(path, overwrite=overwrite)
        try:
            with _writing(path):
                write_atomically(path / "config.yaml", (format_line() + config_text).encode())
            run = cls(path, lock=lock)
            with _writing(path):
                run._frames.append(",".join(FRAMES_HEADER))
                run._live_trajectory.append(_TUM_HEADER)
        except BaseException:
            lock.release()
            raise
        return run

    @staticmethod
    def prepare(path: Path, *, overwrite: bool) -> RunLock:
        """Makes and locks an empty folder for a run; arguments and errors are those of `create`."""
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path}: is a file; a run needs a folder of its own")
        if path.is_symlink() and not path.exists():
            raise ConfigError(f"{path}: is a link to {path.readlink()}, which is not there")
        with _making(path):
            refuse_running(path)
            _refuse_unusable(path, overwrite=overwrite)
            path.mkdir(parents=True, exist_ok=True)
        lock = RunLock.acquire(path)
        try:
            with _making(path):
                # Again, now that nothing else writes there.
                _refuse_unusable(path, overwrite=overwrite)
                delete_former_run(path)
                for folder in _FOLDERS:
                    (path / folder).mkdir(exist_ok=True)
        except BaseException:
            lock.release()
            raise
        return lock

    @classmethod
    def reopen(
        cls, path: Path, frames: Iterable[StoredFrame], *, config_text: str, lock: RunLock
    ) -> RunFolder:
        """Opens the folder of a run that goes on; until `go_on` it says what it said before.

        Args:
            path: the folder.
            frames: all rows of ``frames.csv``, in order of arrival; rows of frames that are to be
                read again are not among them.
            config_text: the resolved configuration, for ``config.yaml``.
            lock: of the folder; released at `close`.

        Raises:
            JournalError: a file cannot be written.
        """
        delete_unfinished(path, lock=lock)
        with _writing(path):
            for table in (path / "events.jsonl", *path.glob("trajectory_live*.txt")):
                if table.exists():
                    cut_unfinished_line(table)
        run = cls(path, lock=lock)
        rows = [",".join(FRAMES_HEADER), *(_row_of(frame).as_line() for frame in frames)]
        run._former = _FormerTables(
            frames="".join(f"{row}\n" for row in rows).encode(errors="backslashreplace"),
            config=(format_line() + config_text).encode(),
        )
        return run

    def keep_what_it_is_laid_onto(self, arguments: Sequence[str]) -> None:
        """Keeps what the map is to be laid onto when the run ends, for a resume.

        Args:
            arguments: of ``livesfm georeference RUN``.

        Raises:
            JournalError: the file cannot be written.
        """
        with _writing(self.path):
            write_atomically(self.path / LAID_ONTO, record_of(arguments))

    def go_on(self) -> None:
        """Makes the folder that of a run that is not finished any more: its map is restored.

        Does nothing in the folder of a new run.

        Raises:
            JournalError: a file cannot be written.
        """
        if self._former is None:
            return
        with _writing(self.path):
            write_atomically(self.path / "frames.csv", self._former.frames)
            self._frames.reopen()
            write_atomically(self.path / "config.yaml", self._former.config)
            self._config = self._former.config
            for name in ("summary.json", REPORT_NAME):
                (self.path / name).unlink(missing_ok=True)
        self._former = None

    # -- where the folder is --------------------------------------------------------------------

    @property
    def is_in_place(self) -> bool:
        """Whether the folder, its lock and its tables are still those at their paths."""
        return self._is_folder_at(self.path) and not self.missing()

    @property
    def device(self) -> int:
        """The number of the disk that the folder is on, or was on."""
        return os.fstat(self._descriptor).st_dev

    def beat(self) -> None:
        """Shows that the run is alive, see `RunLock.beat`."""
        self.lock.beat()

    def missing(self) -> list[str]:
        """Open files that were deleted or replaced."""
        tables = [name for name, table in self._tables.items() if not table.is_in_place]
        return tables if self.lock.is_in_place else [LOCK_NAME, *tables]

    def find(self) -> Path | None:
        """Where the folder is now, which may have been renamed; None: deleted or unmounted."""
        if self._is_folder_at(self.path):
            return self.path
        found = path_of_descriptor(self._descriptor)
        return found if found is not None and self._is_folder_at(found) else None

    def move(self, path: Path) -> None:
        """Goes on in another folder, or in the same one, with all that is missing there.

        What was written goes along, as far as it can be read. Another folder must be empty.

        Raises:
            ConfigError: the folder cannot be locked.
            JournalError: a file cannot be written there.
        """
        if not self._is_folder_at(path):
            self._take(path)
        elif not self.lock.follow(path):
            self._change_lock(RunLock.acquire(path))
        self.path = path
        with _writing(path):
            for name, table in self._tables.items():
                table.move(path / name)
            if not (path / "config.yaml").exists():
                write_atomically(path / "config.yaml", self._config)

    def unwritten(self) -> dict[str, int]:
        """Lines of each table that are not on disk, where there are any."""
        waiting = {name: table.num_unwritten for name, table in self._tables.items()}
        return {name: number for name, number in waiting.items() if number}

    def write_waiting(self) -> None:
        """Writes the lines that could not be written before.

        Raises:
            JournalError: they still cannot.
        """
        for name, table in self._tables.items():
            with _writing(self.path / name):
                table.write_waiting()

    def _is_folder_at(self, path: Path) -> bool:
        return is_file_at(self._descriptor, path, follow_symlinks=True)

    def _take(self, path: Path) -> None:
        """Makes another folder the run's, or leaves everything as it is."""
        lock = RunLock.acquire(path)
        try:
            with _writing(path):
                for folder in _FOLDERS:
                    (path / folder).mkdir()
                descriptor = os.open(path, os.O_RDONLY)
        except BaseException:
            lock.release()
            raise
        self._change_lock(lock)
        os.close(self._descriptor)
        self._descriptor = descriptor

    def _change_lock(self, lock: RunLock) -> None:
        self.lock.release()
        self.lock = lock

    # -- what is written ------------------------------------------------------------------------

    def frame_arrived(self, frame: Frame | RejectedFrame) -> None:
        """Adds a frame; its row is written once its status and those of earlier frames are known.

        A rejected frame has its status already.

        Raises:
            JournalError: rows cannot be written; they are kept and tried again with the next ones.
        """
        row = _FrameRow(
            frame_id=None,
            source=frame.source,
            index=frame.index,
            name=frame.name,
            captured_at_s=frame.captured_at_s,
            status=None,
        )
        self._rows.append(row)
        if isinstance(frame, RejectedFrame):
            row.status = dropped_status(frame.reason)
            self._write_settled_rows()
        else:
            row.frame_id = frame.frame_id
            self._unsettled_rows[frame.frame_id] = row

    def frame_settled(self, frame_id: FrameId, *, status: str) -> None:
        """Sets the status of a frame that arrived, once.

        Raises:
            JournalError: rows cannot be written; they are kept and tried again with the next ones.
        """
        self._unsettled_rows.pop(frame_id).status = status
        self._write_settled_rows()

    def append_event(self, event: Event) -> None:
        """Appends an event to ``events.jsonl``.

        Raises:
            JournalError: it cannot be written.
        """
        with _writing(self.path / "events.jsonl"):
            self._events.append(_json_text(event.as_record()))

    def append_live_pose(self, pose: FramePose) -> None:
        """Appends a pose, as it was first reported, to the live trajectory of its world.

        Raises:
            JournalError: it cannot be written.
        """
        line = _tum_line(pose.captured_at_s, pose.cam_from_world)
        path = self.path / live_trajectory_name(pose.world_number)
        with _writing(path):
            if pose.world_number == 0:
                self._live_trajectory.append(line)
                return
            # Any number of maps may come and go: their files are not kept open.
            is_new = not path.exists()
            file = LineFile(path)
            try:
                for one in (_TUM_HEADER, line) if is_new else (line,):
                    file.append(one)
            finally:
                file.close()

    def write_trajectories(self, poses: Sequence[Sequence[FramePose]]) -> None:
        """Writes the final poses of each map in TUM format, one line per frame, by capture time.

        Those of the first map are ``trajectory.txt``, which is empty without a map. `close` brings
        the kinds and maps of poses into ``frames.csv``.

        Raises:
            JournalError: a file cannot be written; a former one stays as it was.
        """
        self._poses = {
            str(pose.frame_id): (pose.kind.value, str(map_idx))
            for map_idx, own in enumerate(poses)
            for pose in own
        }
        for map_idx, own in enumerate(poses or [()]):
            ordered = sorted(own, key=lambda pose: (pose.captured_at_s, pose.frame_id))
            rows = ((pose.captured_at_s, pose.cam_from_world) for pose in ordered)
            self._write_tum(trajectory_name(map_idx), rows)

    def write_groundtruth(self, rows: Iterable[tuple[float, Float64Array]]) -> None:
        """Writes ``groundtruth.txt``: capture times and true ``cam_from_world`` (3, 4).

        Raises:
            JournalError: it cannot be written.
        """
        self._write_tum("groundtruth.txt", sorted(rows, key=lambda row: row[0]))

    def write_summary(self, figures: Mapping[str, Any]) -> None:
        """Writes ``summary.json``; figures that are not finite become null.

        Raises:
            JournalError: it cannot be written; a former file stays as it was.
        """
        with _writing(self.path / "summary.json"):
            text = _json_text(figures, indent=2) + "\n"
            write_atomically(self.path / "summary.json", text.encode(errors="backslashreplace"))

    def settle_all(self) -> None:
        """Writes the pending rows, frames without a status as stopped.

        Where the final poses are known, their kinds and maps are in all rows then. May be called
        again when something could not be written.

        Raises:
            JournalError: the rows cannot be written.
        """
        for row in self._unsettled_rows.values():
            row.status = dropped_status(DropReason.STOPPED)
        self._unsettled_rows.clear()
        self._write_settled_rows()
        with _writing(self.path / "frames.csv"):
            self._frames.write_waiting()
        if self._poses is not None:
            self._write_poses(self._poses)
        self._is_settled = True

    def close(self) -> None:
        """Writes what is pending, see `settle_all`, closes the files and lets go of the lock.

        Raises:
            JournalError: the rows cannot be written; the files are closed all the same.
        """
        if self._is_closed:
            return
        self._is_closed = True
        try:
            if not self._is_settled:
                self.settle_all()
        finally:
            self._close_files()
            self.lock.release()

    def abandon(self) -> None:
        """Closes the files without writing anything, and leaves the lock as it was before."""
        if self._is_closed:
            return
        self._is_closed = True
        self._close_files()
        self.lock.let_go()

    def _close_files(self) -> None:
        for table in self._tables.values():
            table.close()
        os.close(self._descriptor)

    def _write_settled_rows(self) -> None:
        with _writing(self.path / "frames.csv"):
            while self._rows and self._rows[0].status is not None:
                self._frames.append(self._rows.popleft().as_line())

    def _write_poses(self, poses: Mapping[str, tuple[str, str]]) -> None:
        """Replaces ``frames.csv`` by itself with the columns of poses filled, row by row."""
        path = self.path / "frames.csv"
        with (
            _writing(path),
            path.open(newline="", encoding="utf-8") as former,
            written_atomically(path) as new,
        ):
            text = io.TextIOWrapper(new, encoding="utf-8", newline="")
            writer = csv.writer(text, lineterminator="\n")
            for number, row in enumerate(csv.reader(former)):
                known = poses.get(row[0], (PoseKind.NONE.value, ""))
                writer.writerow(row if number == 0 else [*row[:-2], *known])
            text.detach()
        with _writing(path):
            self._frames.reopen()

    def _write_tum(self, name: str, rows: Iterable[tuple[float, Float64Array]]) -> None:
        lines = [_TUM_HEADER, *(_tum_line(captured_at_s, pose) for captured_at_s, pose in rows)]
        with _writing(self.path / name):
            write_atomically(self.path / name, ("\n".join(lines) + "\n").encode())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise JournalError(f"{path}: cannot be written: {error.strerror}") from error


@contextmanager
def _making(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be made: {error.strerror}") from error


def _refuse_unusable(path: Path, *, overwrite: bool) -> None:
    """Refuses a folder with something in it, unless it is a former run to be overwritten."""
    if not path.exists() or all(entry.name == LOCK_NAME for entry in path.iterdir()):
        return
    if not overwrite:
        interrupted = run_state(path)[0] is RunState.INTERRUPTED
        if interrupted:
            raise FolderTakenError(
                f"{path}: holds a run that was interrupted; go on with it: livesfm resume {path};"
                " or choose another folder"
            )
        raise FolderTakenError(f"{path}: exists and is not empty; choose another folder")
    if not is_run(path):
        raise ConfigError(f"{path}: is not the folder of a run, so it is not overwritten")


def delete_former_run(path: Path) -> None:
    """Deletes what a run wrote into the folder, and nothing else; the lock stays."""
    folders = _FOLDERS | _OPTIONAL_FOLDERS
    for entry in path.iterdir():
        if entry.name in folders and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK_NAME and _is_of_a_run(entry.name):
            entry.unlink()


def discard_run(path: Path) -> None:
    """Deletes the folder of a run that has ended; what else lies in it stays, and so does it.

    Raises:
        OSError: something cannot be deleted.
    """
    delete_former_run(path)
    (path / LOCK_NAME).unlink(missing_ok=True)
    with suppress(OSError):  # of something else
        path.rmdir()


def delete_unfinished(path: Path, *, lock: RunLock) -> None:
    """Deletes what processes that are dead were writing when they ended; what cannot be, stays.

    Args:
        path: the run folder, in which this process writes nothing yet.
        lock: of the folder, held.
    """
    dead = {os.getpid()} | ({lock.interrupted.pid} if lock.interrupted else set())
    folders = [path / name for name in _FOLDERS | _OPTIONAL_FOLDERS]
    for folder in [path, *(folder for folder in folders if not folder.is_symlink())]:
        for entry in folder.glob(f"{TEMPORARY_PREFIX}*"):
            pid = _writer_of(entry.name)
            if pid is None or (pid not in dead and is_alive(pid)):
                continue
            with suppress(OSError):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()


def _writer_of(temporary: str) -> int | None:
    """The number of the process that wrote a temporary file: the last part of its name or first."""
    name = temporary.removeprefix(TEMPORARY_PREFIX)
    found = re.search(r"-(\d+)$", name) or re.match(r"(\d+)-", name)
    return None if found is None else int(found[1])


def _is_of_a_run(name: str) -> bool:
    return (
        name in _FILES | _FOLDERS | _OPTIONAL_FOLDERS
        or name.startswith(TEMPORARY_PREFIX)
        or _NUMBERED_FILES.fullmatch(name) is not None
    )


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run."""
    names = {entry.name for entry in path.iterdir()}
    if LOCK_NAME in names and all(_is_of_a_run(name) for name in names):
        return True  # also where its run was killed before it had written anything
    frames, config = path / "frames.csv", path / "config.yaml"
    if not (frames.is_file() and config.is_file()):
        return False
    with frames.open("rb") as file:
        header = tuple(file.readline().decode(errors="replace").strip().split(","))
    return header in (FRAMES_HEADER, _FORMER_HEADER)


def _tum_line(captured_at_s: float, cam_from_world: Float64Array) -> str:
    world_from_cam = invert_pose(cam_from_world)
    center = " ".join(f"{value:.12g}" for value in world_from_cam[:, 3])
    quat_xyzw = quat_xyzw_from_rotation(world_from_cam[:, :3])
    rotation = " ".join(f"{value:.12g}" for value in quat_xyzw)
    return f"{format_timestamp(captured_at_s)} {center} {rotation}"


def _json_text(record: Mapping[str, Any], *, indent: int | None = None) -> str:
    return json.dumps(_json_value(record), indent=indent, ensure_ascii=False, allow_nan=False)


def _json_value(value: Any) -> Any:
    """``value`` in JSON's own types: numpy's become lists and numbers, what is not finite null."""
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _json_value(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
