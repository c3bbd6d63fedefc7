"""Journal: the durable record of a run, a COLMAP database, keyframe images and their masks.

pycolmap makes the database, so that its layout is COLMAP's own. The rows are written through
sqlite3, because pycolmap's transaction ends the process when its commit fails, as it does on a
full disk; here a failed commit is an error and the journal goes on from the last keyframe.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path, PurePosixPath

import numpy as np
import pycolmap

from engine.errors import JournalError
from engine.geometry import quat_xyzw_from_rotation, skew
from engine.output.files import temporary_sibling, write_atomically
from engine.output.run_folder import MASKS_FOLDER
from engine.types import (
    BoolArray,
    Features,
    Float32Array,
    Frame,
    FrameId,
    GpsFix,
    ImagePair,
    Keyframe,
    VerifiedPair,
)

_DATABASE = "database.db"
_BUSY_TIMEOUT_S = 0.25  # for which another program may hold the database; who writes tries again
_CAMERA_SENSOR = 0  # colmap::SensorType::CAMERA
_SIFT_DIMENSIONS = 128
_UNKNOWN_3X3 = np.full(9, np.nan).tobytes()
_UNKNOWN_3 = np.full(3, np.nan).tobytes()


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
    """Writes keyframes and verified pairs so that they outlive the process.

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
            JournalError: the folder or the database cannot be used.
        """
        database_path = run_folder_path / _DATABASE
        try:
            (run_folder_path / "images").mkdir(parents=True, exist_ok=True)
            pycolmap.Database.open(database_path).close()  # makes or updates the tables
            return cls(run_folder_path, _connect(database_path))
        except (OSError, RuntimeError, ValueError, sqlite3.Error) as error:
            raise JournalError(f"{database_path}: cannot be opened: {error}") from error

    @property
    def is_in_place(self) -> bool:
        """Whether the database that is open is still the one at its path."""
        return self._is_at(self._path)

    def image_names(self) -> list[str]:
        """Names of all keyframe images."""
        return [name for (name,) in self._connection.execute("SELECT name FROM images")]

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

    def add_camera(self, camera: pycolmap.Camera) -> None:
        """Writes a camera with its focal length prior, and the rig that holds only it.

        Raises:
            JournalError: it cannot be written, or the id is taken.
        """
        with self._transaction(f"camera {camera.camera_id}"):
            self._insert_camera(camera)

    def update_camera(self, camera: pycolmap.Camera) -> None:
        """Writes the current parameters of a camera.

        Raises:
            JournalError: it cannot be written, or is not in the journal.
        """
        camera_id, *values = _camera_row(camera)
        with self._transaction(f"camera {camera.camera_id}"):
            updated = self._connection.execute(
                "UPDATE cameras SET model = ?, width = ?, height = ?, params = ?,"
                " prior_focal_length = ? WHERE camera_id = ?",
                (*values, camera_id),
            )
            if updated.rowcount != 1:
                raise JournalError(f"camera {camera.camera_id} is not in the journal")

    def add_keyframe(
        self,
        keyframe: Keyframe,
        *,
        camera: pycolmap.Camera,
        image_bytes: bytes,
        mask_bytes: bytes | None = None,
    ) -> None:
        """Writes a keyframe: first its image file and its mask's, then all its rows at once.

        The rows have the frame's id as COLMAP's image and frame id. A camera that is not in the
        journal yet is written, too.

        Raises:
            JournalError: something cannot be written, the id or the name is taken, or the name
                leads out of the folder of images. No row of the keyframe stays.
        """
        name = _checked_name(keyframe.name)
        what = f"keyframe {keyframe.name}"
        with self._transaction(what):
            if not self._has_camera(camera.camera_id):
                self._insert_camera(camera)
            self._insert_image(keyframe, camera_id=camera.camera_id)
            self._insert_features(keyframe)
            if keyframe.gps is not None:
                self._insert_pose_prior(keyframe, gps=keyframe.gps, camera_id=camera.camera_id)
            # Last before the commit: a name that is taken must not replace a former image.
            _write_file(self._images_path / name, image_bytes)
            if mask_bytes is not None:
                _write_file(self._mask_path(name), mask_bytes)

    def change_camera(self, frame_id: FrameId, camera: pycolmap.Camera) -> None:
        """Gives a keyframe another camera, which is written if it is not in the journal yet.

        Raises:
            JournalError: it cannot be written, or the keyframe is not in the journal.
        """
        camera_id, image_id = camera.camera_id, int(frame_id)
        with self._transaction(f"camera of keyframe {image_id}"):
            if not self._has_camera(camera_id):
                self._insert_camera(camera)
            updated = self._connection.execute(
                "UPDATE images SET camera_id = ? WHERE image_id = ?", (camera_id, image_id)
            )
            if updated.rowcount != 1:
                raise JournalError(f"keyframe {image_id} is not in the journal")
            for statement in (
                "UPDATE frames SET rig_id = ? WHERE frame_id = ?",
                "UPDATE frame_data SET sensor_id = ? WHERE frame_id = ?",
                "UPDATE pose_priors SET corr_sensor_id = ? WHERE corr_data_id = ?",
            ):
                self._connection.execute(statement, (camera_id, image_id))

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
            updated = self._connection.execute(
                "UPDATE keypoints SET data = ? WHERE image_id = ? AND rows = ?",
                (_keypoint_rows(features).tobytes(), image_id, len(features)),
            )
            if updated.rowcount != 1:
                raise JournalError(f"keyframe {image_id} has no table of {len(features)} rows")

    def add_pair(self, verified: VerifiedPair) -> None:
        """Writes a pair's verified matches and geometry; a pair written again is replaced.

        The inliers stand as matches, too, so that COLMAP can verify them anew. A pair that was
        verified on viewing rays is a calibrated one: it has an essential matrix and the pose.

        Raises:
            JournalError: it cannot be written.
        """
        first, second = verified.pair.first, verified.pair.second
        pair_id = pycolmap.image_pair_to_pair_id(first, second)
        matches = verified.inlier_matches_idx
        config, geometry = _geometry_of(verified)
        with self._transaction(f"pair {first}-{second}"):
            self._check_pair(verified.pair)
            self._connection.execute(
                "INSERT OR REPLACE INTO matches (pair_id, rows, cols, data) VALUES (?, ?, 2, ?)",
                (pair_id, len(matches), matches.tobytes()),
            )
            self._connection.execute(
                "INSERT OR REPLACE INTO two_view_geometries (pair_id, rows, cols, data, config,"
                " F, E, qvec, tvec) VALUES (?, ?, 2, ?, ?, ?, ?, ?, ?)",
                (pair_id, len(matches), matches.tobytes(), config, *geometry),
            )

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
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise JournalError(f"{what}: cannot be written to the journal: {error}") from error
        except OSError as error:
            raise JournalError(f"{what}: cannot be written: {error.strerror}") from error
        finally:
            if self._connection.in_transaction:
                with suppress(sqlite3.Error):  # the first error is the one to raise
                    self._connection.execute("ROLLBACK")

    def _mask_path(self, image_name: str) -> Path:
        return self._masks_path / mask_name(_checked_name(image_name))

    def _has_camera(self, camera_id: int) -> bool:
        row = self._connection.execute("SELECT 1 FROM cameras WHERE camera_id = ?", (camera_id,))
        return row.fetchone() is not None

    def _check_pair(self, pair: ImagePair) -> None:
        found = self._connection.execute(
            "SELECT COUNT(*) FROM images WHERE image_id IN (?, ?)", (pair.first, pair.second)
        )
        if found.fetchone()[0] != 2:
            raise JournalError(f"pair {pair.first}-{pair.second}: both must be keyframes first")

    def _insert_camera(self, camera: pycolmap.Camera) -> None:
        camera_id = camera.camera_id
        self._connection.execute(
            "INSERT INTO cameras (camera_id, model, width, height, params, prior_focal_length)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            _camera_row(camera),
        )
        self._connection.execute(
            "INSERT INTO rigs (rig_id, ref_sensor_id, ref_sensor_type) VALUES (?, ?, ?)",
            (camera_id, camera_id, _CAMERA_SENSOR),
        )

    def _insert_image(self, keyframe: Keyframe, *, camera_id: int) -> None:
        image_id = int(keyframe.frame_id)
        self._connection.execute(
            "INSERT INTO frames (frame_id, rig_id) VALUES (?, ?)", (image_id, camera_id)
        )
        self._connection.execute(
            "INSERT INTO frame_data (frame_id, data_id, sensor_id, sensor_type)"
            " VALUES (?, ?, ?, ?)",
            (image_id, image_id, camera_id, _CAMERA_SENSOR),
        )
        self._connection.execute(
            "INSERT INTO images (image_id, name, camera_id) VALUES (?, ?, ?)",
            (image_id, keyframe.name, camera_id),
        )

    def _insert_features(self, keyframe: Keyframe) -> None:
        features, image_id = keyframe.features, int(keyframe.frame_id)
        num, dimensions = features.descriptors.shape
        feature_type = (
            pycolmap.FeatureExtractorType.SIFT
            if dimensions == _SIFT_DIMENSIONS
            else pycolmap.FeatureExtractorType.UNDEFINED
        )
        self._connection.execute(
            "INSERT INTO keypoints (image_id, rows, cols, data) VALUES (?, ?, 4, ?)",
            (image_id, num, _keypoint_rows(features).tobytes()),
        )
        self._connection.execute(
            "INSERT INTO descriptors (image_id, type, rows, cols, data) VALUES (?, ?, ?, ?, ?)",
            (image_id, int(feature_type), num, dimensions, features.descriptors.tobytes()),
        )

    def _insert_pose_prior(self, keyframe: Keyframe, *, gps: GpsFix, camera_id: int) -> None:
        position = np.array([gps.latitude_deg, gps.longitude_deg, gps.altitude_m])
        self._connection.execute(
            "INSERT INTO pose_priors (corr_data_id, corr_sensor_id, corr_sensor_type, position,"
            " position_covariance, gravity, coordinate_system) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                int(keyframe.frame_id),
                camera_id,
                _CAMERA_SENSOR,
                position.tobytes(),
                _UNKNOWN_3X3,
                _UNKNOWN_3,
                int(pycolmap.PosePriorCoordinateSystem.WGS84),
            ),
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


def _geometry_of(
    verified: VerifiedPair,
) -> tuple[int, tuple[bytes | None, bytes | None, bytes | None, bytes | None]]:
    """COLMAP's configuration of a pair, and its columns F, E, qvec (w first) and tvec."""
    pose = verified.cam2_from_cam1
    if pose is None:
        config = pycolmap.TwoViewGeometryConfiguration.UNCALIBRATED
        return int(config), (verified.fundamental.tobytes(), None, None, None)
    rotation, translation = pose[:, :3], pose[:, 3]
    essential = skew(translation) @ rotation
    quat_wxyz = np.roll(quat_xyzw_from_rotation(rotation), 1)
    config = pycolmap.TwoViewGeometryConfiguration.CALIBRATED
    return int(config), (
        None,
        essential.tobytes(),
        quat_wxyz.tobytes(),
        np.ascontiguousarray(translation).tobytes(),
    )


def _keypoint_rows(features: Features) -> Float32Array:
    """COLMAP's columns (N, 4): x, y, scale (a radius, not a diameter), orientation."""
    rows = np.zeros((len(features), 4), dtype=np.float32)
    rows[:, :2] = features.keypoints_xy
    rows[:, 2] = features.scales / 2
    return rows


def _camera_row(camera: pycolmap.Camera) -> tuple[int, int, int, int, bytes, bool]:
    params = np.asarray(camera.params, dtype=np.float64).tobytes()
    model = int(camera.model)
    return (
        camera.camera_id,
        model,
        camera.width,
        camera.height,
        params,
        camera.has_prior_focal_length,
    )
