"""Tables of our own in a run's COLMAP database: what a run that goes on needs besides COLMAP's.

COLMAP and pycolmap open such a database as any other and leave these tables alone. Their names
begin with ``livesfm_``. Where there is a column ``position``, rows are numbered in the order of
recording. Arrays are little-endian, row by row. JSON is text, and null where nothing is known.

livesfm_format
    version             of the run folder, see `run_format`; the only row
livesfm_keyframes
    image_id            COLMAP's, and our frame id; the name is in COLMAP's ``images``
    source, idx         the label of its source, and where it stands in it, from 0
    camera_key          the source's word for its camera
    calibration_key     the calibration that it had last
    width, height       px
    captured_at_s       the source's clock
    is_photo            0 or 1
    gps                 JSON of a `GpsFix`; COLMAP's ``pose_priors`` have the position, too
    intrinsics_prior    JSON of an `IntrinsicsPrior`
    mask_key            null: the whole image may be used
livesfm_masks
    mask_key, width, height
    data                a mask as its source gave it, a bit a pixel, deflated; the files in
                        ``masks/`` may lack what overlays cover, too
livesfm_features        keypoint tables, beside COLMAP's ``keypoints`` (32 bits a number) and
                        ``descriptors`` (of type SIFT: twice the bytes of ours)
    image_id, rows      N is rows
    keypoints_xy        (N, 2) float64, px
    scales              (N,) float32, px
    colors              (N, 3) uint8, RGB
    is_free             (N,) uint8, 0 or 1; null: no row is
    descriptor_kind     what the bytes of descriptors mean, see `DescriptorKind`
livesfm_pairs           verified pairs, whose inliers are in COLMAP's ``two_view_geometries``
    pair_id             COLMAP's
    reason              why it was proposed, see `PairReason`
    num_matches         before verification
    fundamental         (3, 3) float64
    cam2_from_cam1      (3, 4) float64, or null
    homography_inlier_ratio
livesfm_tried_pairs     pairs that were matched and did not hold, then or later
    pair_id
livesfm_calibrations
    calibration_key
    camera_id           COLMAP's; ``cameras`` has its parameters as they are now
    initial             JSON of the camera as it entered the map
    prior               JSON of a `CameraPrior`
livesfm_frames          frames that arrived
    frame_id            null: it never got pixels
    camera_key, source, idx, name, captured_at_s
    status              as in ``frames.csv``; null: the run ended before its turn came
livesfm_relative_poses  frames between keyframes
    frame_id, keyframe_id, idx, captured_at_s
    cam_from_keyframe   (3, 4) float64, translation at scale 1 of the keyframe; null: not posed
livesfm_gps_readings    positions that came beside the frames
    source, camera_key, captured_at_s
    fix                 JSON of a `GpsFix`
livesfm_facts           small states of the mapper
    name
    json                the state, or "dtype" (NumPy's) and "shape" of an array
    array               its bytes, else null

The functions write single rows, within a transaction of the caller.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pycolmap

from engine.mapping.stored_state import (
    Fact,
    StoredCalibration,
    StoredFrame,
    StoredRelativePose,
)
from engine.output.run_format import FORMAT_VERSION
from engine.types import Features, GpsReading, ImagePair, Keyframe, PackedMask, VerifiedPair

_IMAGE = "REFERENCES images(image_id) ON DELETE CASCADE"
OWN_TABLES = {
    "livesfm_format": "version INTEGER NOT NULL",
    "livesfm_keyframes": f"""
        position INTEGER PRIMARY KEY, image_id INTEGER NOT NULL UNIQUE {_IMAGE},
        source TEXT NOT NULL, idx INTEGER NOT NULL, camera_key TEXT NOT NULL,
        calibration_key TEXT NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL,
        captured_at_s REAL NOT NULL, is_photo INTEGER NOT NULL, gps TEXT, intrinsics_prior TEXT,
        mask_key TEXT""",
    "livesfm_masks": """
        mask_key TEXT PRIMARY KEY, width INTEGER NOT NULL, height INTEGER NOT NULL,
        data BLOB NOT NULL""",
    "livesfm_features": f"""
        image_id INTEGER PRIMARY KEY {_IMAGE}, rows INTEGER NOT NULL, keypoints_xy BLOB NOT NULL,
        scales BLOB NOT NULL, colors BLOB NOT NULL, is_free BLOB, descriptor_kind TEXT NOT NULL""",
    "livesfm_pairs": """
        position INTEGER PRIMARY KEY, pair_id INTEGER NOT NULL UNIQUE, reason TEXT NOT NULL,
        num_matches INTEGER NOT NULL, fundamental BLOB NOT NULL, cam2_from_cam1 BLOB,
        homography_inlier_ratio REAL NOT NULL""",
    "livesfm_tried_pairs": "position INTEGER PRIMARY KEY, pair_id INTEGER NOT NULL UNIQUE",
    "livesfm_calibrations": """
        position INTEGER PRIMARY KEY, calibration_key TEXT NOT NULL UNIQUE,
        camera_id INTEGER NOT NULL, initial TEXT NOT NULL, prior TEXT NOT NULL""",
    "livesfm_frames": """
        position INTEGER PRIMARY KEY, frame_id INTEGER UNIQUE, camera_key TEXT,
        source TEXT NOT NULL, idx INTEGER NOT NULL, name TEXT NOT NULL, captured_at_s REAL NOT NULL,
        status TEXT""",
    "livesfm_relative_poses": """
        position INTEGER PRIMARY KEY, frame_id INTEGER NOT NULL UNIQUE,
        keyframe_id INTEGER NOT NULL, idx INTEGER NOT NULL, captured_at_s REAL NOT NULL,
        cam_from_keyframe BLOB""",
    "livesfm_gps_readings": """
        position INTEGER PRIMARY KEY, source TEXT NOT NULL, camera_key TEXT,
        captured_at_s REAL NOT NULL, fix TEXT NOT NULL""",
    "livesfm_facts": "name TEXT PRIMARY KEY, json TEXT NOT NULL, array BLOB",
}


def make_own_tables(connection: sqlite3.Connection) -> None:
    """Makes the tables, empty, with the format version of today's run folders."""
    for name, columns in OWN_TABLES.items():
        connection.execute(f"CREATE TABLE {name} ({columns})")
    connection.execute("INSERT INTO livesfm_format (version) VALUES (?)", (FORMAT_VERSION,))


def format_version(connection: sqlite3.Connection) -> int | None:
    """The version that the database names; None where it has no tables of our own."""
    table = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'livesfm_format'"
    if connection.execute(table).fetchone() is None:
        return None
    row = connection.execute("SELECT version FROM livesfm_format").fetchone()
    return int(row[0]) if row is not None and isinstance(row[0], int) else 0


def insert_keyframe(connection: sqlite3.Connection, keyframe: Keyframe, *, source: str) -> None:
    """Writes what COLMAP's tables do not have of a keyframe, with its keypoint table."""
    mask_key = None if keyframe.mask is None else _insert_mask(connection, keyframe.mask)
    connection.execute(
        "INSERT INTO livesfm_keyframes (image_id, source, idx, camera_key, calibration_key, width,"
        " height, captured_at_s, is_photo, gps, intrinsics_prior, mask_key)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            int(keyframe.frame_id),
            _text(source),
            keyframe.index,
            _text(keyframe.camera_key),
            _text(keyframe.calibration_key),
            keyframe.width,
            keyframe.height,
            keyframe.captured_at_s,
            keyframe.is_photo,
            None if keyframe.gps is None else json.dumps(asdict(keyframe.gps)),
            None
            if keyframe.intrinsics_prior is None
            else json.dumps(asdict(keyframe.intrinsics_prior)),
            mask_key,
        ),
    )
    write_features(connection, keyframe.features)


def write_features(connection: sqlite3.Connection, features: Features) -> None:
    """Writes a keypoint table but for its descriptors, in place of a former one."""
    connection.execute(
        "INSERT OR REPLACE INTO livesfm_features (image_id, rows, keypoints_xy, scales, colors,"
        " is_free, descriptor_kind) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            int(features.frame_id),
            len(features),
            features.keypoints_xy.tobytes(),
            features.scales.tobytes(),
            features.colors.tobytes(),
            features.is_free.tobytes() if features.is_free.any() else None,
            features.descriptor_kind.value,
        ),
    )


def set_calibration(connection: sqlite3.Connection, image_id: int, *, camera_id: int) -> None:
    """Names the calibration of a keyframe that has another camera now, where it is known."""
    connection.execute(
        "UPDATE livesfm_keyframes SET calibration_key = coalesce((SELECT calibration_key"
        " FROM livesfm_calibrations WHERE camera_id = ?), calibration_key) WHERE image_id = ?",
        (camera_id, image_id),
    )


def write_pair(connection: sqlite3.Connection, verified: VerifiedPair) -> None:
    """Writes what COLMAP's tables do not have of a pair; one without matches is a tried one."""
    pair_id = _pair_id(verified.pair)
    if not verified.num_inliers:
        connection.execute("DELETE FROM livesfm_pairs WHERE pair_id = ?", (pair_id,))
        write_tried(connection, (verified.pair,))
        return
    pose = verified.cam2_from_cam1
    connection.execute(
        "INSERT INTO livesfm_pairs (pair_id, reason, num_matches, fundamental, cam2_from_cam1,"
        " homography_inlier_ratio) VALUES (?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (pair_id) DO UPDATE SET reason = excluded.reason,"
        " num_matches = excluded.num_matches, fundamental = excluded.fundamental,"
        " cam2_from_cam1 = excluded.cam2_from_cam1,"
        " homography_inlier_ratio = excluded.homography_inlier_ratio",
        (
            pair_id,
            verified.reason.value,
            verified.num_matches,
            verified.fundamental.tobytes(),
            None if pose is None else pose.tobytes(),
            verified.homography_inlier_ratio,
        ),
    )


def write_tried(connection: sqlite3.Connection, pairs: Iterable[ImagePair]) -> None:
    """Writes that pairs were matched and do not hold."""
    connection.executemany(
        "INSERT OR IGNORE INTO livesfm_tried_pairs (pair_id) VALUES (?)",
        ((_pair_id(pair),) for pair in pairs),
    )


def write_calibration(
    connection: sqlite3.Connection, calibration_key: str, calibration: StoredCalibration
) -> None:
    """Writes what COLMAP's tables do not have of a calibration, in place of a former one."""
    connection.execute(
        "INSERT INTO livesfm_calibrations (calibration_key, camera_id, initial, prior)"
        " VALUES (?, ?, ?, ?) ON CONFLICT (calibration_key) DO UPDATE SET"
        " camera_id = excluded.camera_id, initial = excluded.initial, prior = excluded.prior",
        (
            _text(calibration_key),
            calibration.camera.camera_id,
            json.dumps(_camera_record(calibration.initial)),
            json.dumps(asdict(calibration.prior)),
        ),
    )


def write_frames(connection: sqlite3.Connection, frames: Iterable[StoredFrame]) -> None:
    """Writes frames that arrived; of one that was written before, its status."""
    connection.executemany(
        "INSERT INTO livesfm_frames (frame_id, camera_key, source, idx, name, captured_at_s,"
        " status) VALUES (?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (frame_id) DO UPDATE SET status = excluded.status",
        (
            (
                frame.frame_id,
                _text_or_none(frame.camera_key),
                _text(frame.source),
                frame.index,
                _text(frame.name),
                frame.captured_at_s,
                frame.status,
            )
            for frame in frames
        ),
    )


def write_relative_poses(
    connection: sqlite3.Connection, poses: Iterable[StoredRelativePose]
) -> None:
    """Writes where frames between keyframes were, in place of what was written before."""
    connection.executemany(
        "INSERT INTO livesfm_relative_poses (frame_id, keyframe_id, idx, captured_at_s,"
        " cam_from_keyframe) VALUES (?, ?, ?, ?, ?) ON CONFLICT (frame_id) DO UPDATE SET"
        " keyframe_id = excluded.keyframe_id, cam_from_keyframe = excluded.cam_from_keyframe",
        (
            (
                int(pose.frame_id),
                int(pose.keyframe_id),
                pose.index,
                pose.captured_at_s,
                None if pose.cam_from_keyframe is None else pose.cam_from_keyframe.tobytes(),
            )
            for pose in poses
        ),
    )


def insert_gps_readings(connection: sqlite3.Connection, readings: Iterable[GpsReading]) -> None:
    """Writes positions that came beside the frames."""
    connection.executemany(
        "INSERT INTO livesfm_gps_readings (source, camera_key, captured_at_s, fix)"
        " VALUES (?, ?, ?, ?)",
        (
            (
                _text(reading.source),
                _text_or_none(reading.camera_key),
                reading.captured_at_s,
                json.dumps(asdict(reading.fix)),
            )
            for reading in readings
        ),
    )


def write_facts(connection: sqlite3.Connection, facts: Mapping[str, Fact]) -> None:
    """Writes small states in place of former ones; those that are None are deleted."""
    for name, fact in facts.items():
        if fact is None:
            connection.execute("DELETE FROM livesfm_facts WHERE name = ?", (name,))
            continue
        text, array = (
            (json.dumps({"dtype": fact.dtype.str, "shape": fact.shape}), fact.tobytes())
            if isinstance(fact, np.ndarray)
            else (json.dumps(fact), None)
        )
        connection.execute(
            "INSERT OR REPLACE INTO livesfm_facts (name, json, array) VALUES (?, ?, ?)",
            (name, text, array),
        )


def _insert_mask(connection: sqlite3.Connection, mask: PackedMask) -> str:
    """Writes a mask unless it is there; returns its key."""
    text = f"{mask.width}x{mask.height}-{hashlib.sha256(mask.data).hexdigest()}"
    connection.execute(
        "INSERT OR IGNORE INTO livesfm_masks (mask_key, width, height, data) VALUES (?, ?, ?, ?)",
        (text, mask.width, mask.height, mask.data),
    )
    return text


def _camera_record(camera: pycolmap.Camera) -> dict[str, Any]:
    return {
        "camera_id": camera.camera_id,
        "model": camera.model_name,
        "width": camera.width,
        "height": camera.height,
        "params": [float(value) for value in camera.params],
        "has_prior_focal_length": camera.has_prior_focal_length,
    }


def _pair_id(pair: ImagePair) -> int:
    return int(pycolmap.image_pair_to_pair_id(pair.first, pair.second))


def _text(name: str) -> str:
    """A name as SQLite takes it; characters that are no valid Unicode become escapes."""
    return name.encode(errors="backslashreplace").decode()


def _text_or_none(name: str | None) -> str | None:
    return None if name is None else _text(name)
