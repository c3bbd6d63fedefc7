"""Journal: the durable record of a run, a COLMAP database, keyframe images and their masks.

pycolmap makes the database, so that its layout is COLMAP's own; `own_tables` has what is ours. The
rows are written through sqlite3, because pycolmap's transaction ends the process when its commit
fails, as it does on a full disk; here a failed commit is an error and the journal goes on from the
last moment that was written.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath

import numpy as np
import pycolmap

from engine.errors import JournalError
from engine.mapping.stored_state import (
    Fact,
    StoredCalibration,
    StoredFrame,
    StoredRelativePose,
)
from engine.output import colmap_tables, own_tables
from engine.output.files import temporary_sibling, write_atomically
from engine.output.run_folder import MASKS_FOLDER
from engine.output.run_format import refuse_newer, refuse_older
from engine.types import (
    BoolArray,
    Features,
    Frame,
    FrameId,
    GpsReading,
    ImagePair,
    Keyframe,
    VerifiedPair,
)

_DATABASE = "database.db"
_BUSY_TIMEOUT_S = 0.25  # for which another program may hold the database; writes are tried again


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NewKeyframe:
    """A keyframe with what only the journal gets of it."""

    keyframe: Keyframe
    camera: pycolmap.Camera
    source: str  # the source as the user named it, without credentials
    image_bytes: bytes
    mask_bytes: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moment:
    """What changed up to one moment of the run: the journal has all of it, or none."""

    keyframe: NewKeyframe | None = None
    moved: tuple[Features, ...] = ()  # keypoint tables of earlier keyframes
    pairs: tuple[VerifiedPair, ...] = ()  # without matches where they do not hold any more
    tried: tuple[ImagePair, ...] = ()  # pairs that were matched and do not hold
    recalibrated: Mapping[FrameId, pycolmap.Camera] = field(default_factory=dict)  # other cameras
    cameras: tuple[pycolmap.Camera, ...] = ()  # with their present parameters
    calibrations: Mapping[str, StoredCalibration] = field(default_factory=dict)  # by key
    relative_poses: tuple[StoredRelativePose, ...] = ()
    frames: tuple[StoredFrame, ...] = ()
    gps_readings: tuple[GpsReading, ...] = ()
    facts: Mapping[str, Fact] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing changed."""
        return not any(getattr(self, one.name) for one in fields(self))


def encode_keyframe_image(frame: Frame, *, quality: int) -> bytes:
    """The bytes of a keyframe's image file: the JPEG as received, else encoded here.

    Args:
        frame: the frame; a name that ends in ``.png`` asks for lossless PNG instead of JPEG.
        quality: of the JPEG, 1 to 100.

    Raises:
        JournalError: the image cannot be encoded.
    """
    if frame.jpeg is not None:
        return frame.jpeg
    import cv2

    bgr = cv2.cvtColor(frame.pixels, cv2.COLOR_RGB2BGR)
    if frame.name.lower().endswith(".png"):
        encoded, data = cv2.imencode(".png", bgr)
    else:
        encoded, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not encoded:
        raise JournalError(f"{frame.name}: the image cannot be encoded")
    return bytes(data)


def mask_name(image_name: str) -> str:
    """The name of an image's mask in the folder of masks, as COLMAP has it."""
    return f"{image_name}.png"


def encode_mask(mask: BoolArray) -> bytes:
    """A mask (H, W) as a grey PNG: 0 where a pixel is left out, 255 where it may be used.

    Raises:
        JournalError: it cannot be encoded.
    """
    import cv2

    encoded, data = cv2.imencode(".png", mask.view(np.uint8) * 255)
    if not encoded:
        raise JournalError("a mask cannot be encoded")
    return bytes(data)


class Journal:
    """Writes what happens in a run so that it outlives the process.

    What a method wrote before it returned survives a crash of the process; a power cut may take the
    last moments, never the database. One thread owns the journal.
    """

    def __init__(self, run_folder_path: Path, connection: sqlite3.Connection) -> None:
        """Wraps an open database; use `open`."""
        self._path = run_folder_path / _DATABASE
        self._images_path = run_folder_path / "images"
        self._masks_path = run_folder_path / MASKS_FOLDER
        self._connection = connection
        self._file = os.stat(self._path)

    @classmethod
    def open(cls, run_folder_path: Path) -> Journal:
        """Opens the journal of a run, making it if necessary.

        Raises:
            JournalError: the folder or the database cannot be used, or was written by another
                version of LiveSfM, or by something else.
        """
        database_path = run_folder_path / _DATABASE
        try:
            (run_folder_path / "images").mkdir(parents=True, exist_ok=True)
            pycolmap.Database.open(database_path).close()  # makes or updates COLMAP's tables
            connection = _connect(database_path)
        except (OSError, RuntimeError, ValueError, sqlite3.Error) as error:
            raise JournalError(f"{database_path}: cannot be opened: {error}") from error
        journal = cls(run_folder_path, connection)
        try:
            journal._prepare(database_path)
        except JournalError:
            journal.close()
            raise
        return journal

    @property
    def is_in_place(self) -> bool:
        """Whether the database that is open is still the one at its path."""
        return self._is_at(self._path)

    def image_names(self) -> list[str]:
        """Names of all keyframe images."""
        return [name for (name,) in self._connection.execute("SELECT name FROM images")]

    def num_keypoints(self) -> int:
        """Keypoints of all keyframes."""
        (number,) = self._connection.execute(
            "SELECT coalesce(sum(rows), 0) FROM keypoints"
        ).fetchone()
        return int(number)

    def move(self, run_folder_path: Path) -> None:
        """Goes on in another folder, or in the same one where the database was deleted.

        A database that is open can be read to its end though it was deleted, and is copied where it
        does not lie in the folder. Images stay where they are.

        Raises:
            JournalError: the database cannot be made there; the former one stays in use.
        """
        path = run_folder_path / _DATABASE
        try:
            if not self._is_at(path):
                self._copy_to(path)
            moved = _connect(path)
            former, self._connection = self._connection, moved
            self._file = os.stat(path)
        except (OSError, sqlite3.Error) as error:
            raise JournalError(f"{path}: cannot be written: {error}") from error
        with suppress(sqlite3.Error):  # its log is read by whoever opens the database next
            former.close()
        self._path = path
        self._images_path = run_folder_path / "images"
        self._masks_path = run_folder_path / MASKS_FOLDER

    def write(self, moment: Moment) -> None:
        """Writes all that changed up to a moment, or nothing of it.

        Tables, pairs and cameras of keyframes that the journal does not have are left out: what
        is lost of a run is whole keyframes, and one that is still to come brings them again.

        Raises:
            JournalError: something cannot be written, or does not fit what is in the journal. Files
                of an image and a mask may stay, no row does.
        """
        with self._transaction("what changed"):
            for features in moment.moved:
                if self._has_keyframes(features.frame_id):
                    self.move_keypoints(features)
            if moment.keyframe is not None:
                self.add_keyframe(moment.keyframe)
            for verified in moment.pairs:
                if self._has_keyframes(verified.pair.first, verified.pair.second):
                    self.add_pair(verified)
            own_tables.write_tried(self._connection, moment.tried)
            for key, calibration in moment.calibrations.items():
                self.write_calibration(key, calibration)
            for frame_id, camera in moment.recalibrated.items():
                if self._has_keyframes(frame_id):
                    self.change_camera(frame_id, camera)
            for camera in (*moment.recalibrated.values(), *moment.cameras):
                colmap_tables.write_camera(self._connection, camera)
            own_tables.write_relative_poses(self._connection, moment.relative_poses)
            own_tables.write_frames(self._connection, moment.frames)
            own_tables.insert_gps_readings(self._connection, moment.gps_readings)
            own_tables.write_facts(self._connection, moment.facts)

    def write_calibration(self, calibration_key: str, calibration: StoredCalibration) -> None:
        """Writes a calibration and its camera, in place of a former one.

        Raises:
            JournalError: it cannot be written.
        """
        with self._transaction(f"calibration {calibration_key}"):
            colmap_tables.write_camera(self._connection, calibration.camera)
            own_tables.write_calibration(self._connection, calibration_key, calibration)

    def add_keyframe(self, new: NewKeyframe) -> None:
        """Writes a keyframe: first its image file and its mask's, then all its rows at once.

        The rows have the frame's id as COLMAP's image and frame id. A camera that is not in the
        journal yet is written, too.

        Raises:
            JournalError: something cannot be written, the id or the name is taken, or the name
                leads out of the folder of images. No row of the keyframe stays.
        """
        keyframe, camera_id = new.keyframe, new.camera.camera_id
        name = _checked_name(keyframe.name)
        with self._transaction(f"keyframe {keyframe.name}"):
            if not colmap_tables.has_camera(self._connection, camera_id):
                colmap_tables.insert_camera(self._connection, new.camera)
            colmap_tables.insert_keyframe(self._connection, keyframe, camera_id=camera_id)
            own_tables.insert_keyframe(self._connection, keyframe, source=new.source)
            # After the rows: a name that is taken must not replace a former image.
            _write_file(self._images_path / name, new.image_bytes)
            if new.mask_bytes is not None:
                _write_file(self._mask_path(name), new.mask_bytes)

    def change_camera(self, frame_id: FrameId, camera: pycolmap.Camera) -> None:
        """Gives a keyframe another camera, which is written if it is not in the journal yet.

        Raises:
            JournalError: it cannot be written, or the keyframe is not in the journal.
        """
        camera_id, image_id = camera.camera_id, int(frame_id)
        with self._transaction(f"camera of keyframe {image_id}"):
            if not colmap_tables.has_camera(self._connection, camera_id):
                colmap_tables.insert_camera(self._connection, camera)
            if not colmap_tables.set_camera(self._connection, image_id, camera_id=camera_id):
                raise JournalError(f"keyframe {image_id} is not in the journal")
            own_tables.set_calibration(self._connection, image_id, camera_id=camera_id)

    def read_mask(self, image_name: str) -> BoolArray | None:
        """The mask (H, W) of a keyframe image; None where it has none.

        Raises:
            JournalError: it cannot be read, or the name leads out of the run.
        """
        import cv2

        path = self._mask_path(image_name)
        if not path.exists():
            return None
        mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        if mask is None:
            raise JournalError(f"{path}: cannot be read")
        return np.asarray(mask) > 0

    def write_mask(self, image_name: str, data: bytes) -> None:
        """Writes the mask of a keyframe image, see ``encode_mask``, in place of a former one.

        Raises:
            JournalError: it cannot be written, or the name leads out of the run.
        """
        path = self._mask_path(image_name)
        try:
            _write_file(path, data)
        except OSError as error:
            raise JournalError(f"{path}: cannot be written: {error.strerror}") from error

    def move_keypoints(self, features: Features) -> None:
        """Replaces the keypoint table of a keyframe by one of the same length.

        Raises:
            JournalError: it cannot be written, or the keyframe is not in the journal.
        """
        image_id = int(features.frame_id)
        with self._transaction(f"keypoints of keyframe {image_id}"):
            if not colmap_tables.update_keypoints(self._connection, features):
                raise JournalError(f"keyframe {image_id} has no table of {len(features)} rows")
            own_tables.write_features(self._connection, features)

    def add_pair(self, verified: VerifiedPair) -> None:
        """Writes a pair's verified matches and geometry; a pair written again is replaced.

        The inliers stand as matches, too, so that COLMAP can verify them anew.

        Raises:
            JournalError: it cannot be written.
        """
        first, second = verified.pair.first, verified.pair.second
        with self._transaction(f"pair {first}-{second}"):
            if not self._has_keyframes(first, second):
                raise JournalError(f"pair {first}-{second}: both must be keyframes first")
            colmap_tables.write_pair(self._connection, verified)
            own_tables.write_pair(self._connection, verified)

    def close(self) -> None:
        """Merges the write-ahead log into ``database.db`` and closes it.

        Raises:
            JournalError: it cannot be written; what was committed is still in the log.
        """
        try:
            self._connection.close()
        except sqlite3.Error as error:
            raise JournalError(f"the journal cannot be closed: {error}") from error

    def _is_at(self, path: Path) -> bool:
        try:
            return os.path.samestat(self._file, os.stat(path))
        except OSError:
            return False

    def _copy_to(self, path: Path) -> None:
        """Copies the database, also one that was deleted.

        Raises:
            OSError, sqlite3.Error: it cannot be read or written.
        """
        for name in (f"{path.name}-wal", f"{path.name}-shm"):
            path.with_name(name).unlink(missing_ok=True)  # of the database that was there
        temporary = temporary_sibling(path)
        temporary.unlink(missing_ok=True)
        with closing(sqlite3.connect(temporary)) as copy:
            self._connection.backup(copy)
        temporary.replace(path)

    @contextmanager
    def _transaction(self, what: str) -> Iterator[None]:
        """Writes of the block are kept together; one inside another one is part of that."""
        is_outermost = not self._connection.in_transaction
        try:
            if is_outermost:
                self._connection.execute("BEGIN IMMEDIATE")
            yield
            if is_outermost:
                self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise JournalError(f"{what}: cannot be written to the journal: {error}") from error
        except OSError as error:
            raise JournalError(f"{what}: cannot be written: {error.strerror}") from error
        finally:
            if is_outermost and self._connection.in_transaction:
                with suppress(sqlite3.Error):  # the first error is the one to raise
                    self._connection.execute("ROLLBACK")

    def _prepare(self, database_path: Path) -> None:
        """Makes our own tables in a new database; refuses one of another version."""
        with self._transaction(str(database_path)):
            version = own_tables.format_version(self._connection)
            if version is None:
                if self._connection.execute("SELECT 1 FROM images").fetchone() is not None:
                    refuse_older(database_path, 1)
                own_tables.make_own_tables(self._connection)
                return
            refuse_newer(database_path, version)
            refuse_older(database_path, version)

    def _mask_path(self, image_name: str) -> Path:
        return self._masks_path / mask_name(_checked_name(image_name))

    def _has_keyframes(self, *frame_ids: FrameId) -> bool:
        return all(
            self._connection.execute(
                "SELECT 1 FROM images WHERE image_id = ?", (int(frame_id),)
            ).fetchone()
            for frame_id in frame_ids
        )


def _connect(path: Path) -> sqlite3.Connection:
    # Opening and using may happen on two threads, one after the other.
    connection = sqlite3.connect(
        path, isolation_level=None, check_same_thread=False, timeout=_BUSY_TIMEOUT_S
    )
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _checked_name(name: str) -> str:
    """A name of an image, if it is one inside its folder.

    Raises:
        JournalError: it is not.
    """
    relative = PurePosixPath(name)
    is_inside = bool(relative.parts) and not relative.is_absolute() and ".." not in relative.parts
    is_text = not any(ord(char) < ord(" ") or 0xD800 <= ord(char) < 0xE000 for char in name)
    # Two spellings of one path would be two names with one file.
    if not (is_inside and is_text and str(relative) == name):
        raise JournalError(f"{name!r}: is not a name for an image inside the run")
    return name


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
