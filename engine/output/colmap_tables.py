"""Rows of COLMAP's own tables, as COLMAP writes them.

The functions write single rows, within a transaction of the caller.
"""

from __future__ import annotations

import math
import sqlite3

import numpy as np
import pycolmap

from engine.geometry import quat_xyzw_from_rotation, skew
from engine.types import (
    DescriptorKind,
    Features,
    Float32Array,
    GpsFix,
    Keyframe,
    Uint8Array,
    VerifiedPair,
)

SIFT_PER_ROOT_SIFT = 2  # COLMAP's bytes are RootSIFT times 512, ours times 256
SIFT_TYPE = int(pycolmap.FeatureExtractorType.SIFT)

_OTHER_TYPE = int(pycolmap.FeatureExtractorType.UNDEFINED)
_SIFT_DIMENSIONS = 128
_MAX_ROOT_SIFT = 255 // SIFT_PER_ROOT_SIFT
_CAMERA_SENSOR = 0  # colmap::SensorType::CAMERA
_UNKNOWN_3X3 = np.full(9, np.nan).tobytes()
_UNKNOWN_3 = np.full(3, np.nan).tobytes()


def has_camera(connection: sqlite3.Connection, camera_id: int) -> bool:
    """Whether a camera is there."""
    row = connection.execute("SELECT 1 FROM cameras WHERE camera_id = ?", (camera_id,))
    return row.fetchone() is not None


def insert_camera(connection: sqlite3.Connection, camera: pycolmap.Camera) -> None:
    """Writes a camera with its focal length prior, and the rig that holds only it."""
    camera_id = camera.camera_id
    connection.execute(
        "INSERT INTO cameras (camera_id, model, width, height, params, prior_focal_length)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (camera_id, *_camera_values(camera)),
    )
    connection.execute(
        "INSERT INTO rigs (rig_id, ref_sensor_id, ref_sensor_type) VALUES (?, ?, ?)",
        (camera_id, camera_id, _CAMERA_SENSOR),
    )


def write_camera(connection: sqlite3.Connection, camera: pycolmap.Camera) -> None:
    """Writes a camera as it is now, in place of a former one."""
    updated = connection.execute(
        "UPDATE cameras SET model = ?, width = ?, height = ?, params = ?, prior_focal_length = ?"
        " WHERE camera_id = ?",
        (*_camera_values(camera), camera.camera_id),
    )
    if updated.rowcount != 1:
        insert_camera(connection, camera)


def insert_keyframe(connection: sqlite3.Connection, keyframe: Keyframe, *, camera_id: int) -> None:
    """Writes a keyframe with its features and position, under its frame's id."""
    image_id = int(keyframe.frame_id)
    connection.execute("INSERT INTO frames (frame_id, rig_id) VALUES (?, ?)", (image_id, camera_id))
    connection.execute(
        "INSERT INTO frame_data (frame_id, data_id, sensor_id, sensor_type) VALUES (?, ?, ?, ?)",
        (image_id, image_id, camera_id, _CAMERA_SENSOR),
    )
    connection.execute(
        "INSERT INTO images (image_id, name, camera_id) VALUES (?, ?, ?)",
        (image_id, keyframe.name, camera_id),
    )
    _insert_features(connection, keyframe.features)
    if keyframe.gps is not None:
        _insert_pose_prior(connection, image_id, gps=keyframe.gps, camera_id=camera_id)


def set_camera(connection: sqlite3.Connection, image_id: int, *, camera_id: int) -> bool:
    """Gives a keyframe another camera in every table; returns whether it is there."""
    updated = connection.execute(
        "UPDATE images SET camera_id = ? WHERE image_id = ?", (camera_id, image_id)
    )
    for statement in (
        "UPDATE frames SET rig_id = ? WHERE frame_id = ?",
        "UPDATE frame_data SET sensor_id = ? WHERE frame_id = ?",
        "UPDATE pose_priors SET corr_sensor_id = ? WHERE corr_data_id = ?",
    ):
        connection.execute(statement, (camera_id, image_id))
    return updated.rowcount == 1


def update_keypoints(connection: sqlite3.Connection, features: Features) -> bool:
    """Replaces a keypoint table by one as long; returns whether it is there."""
    updated = connection.execute(
        "UPDATE keypoints SET data = ? WHERE image_id = ? AND rows = ?",
        (_keypoint_rows(features).tobytes(), int(features.frame_id), len(features)),
    )
    return updated.rowcount == 1


def write_pair(connection: sqlite3.Connection, verified: VerifiedPair) -> None:
    """Writes a pair in place of a former one; its inliers stand as matches, too."""
    pair_id = pycolmap.image_pair_to_pair_id(verified.pair.first, verified.pair.second)
    matches = verified.inlier_matches_idx
    config, geometry = _geometry_of(verified)
    connection.execute(
        "INSERT OR REPLACE INTO matches (pair_id, rows, cols, data) VALUES (?, ?, 2, ?)",
        (pair_id, len(matches), matches.tobytes()),
    )
    connection.execute(
        "INSERT OR REPLACE INTO two_view_geometries (pair_id, rows, cols, data, config, F, E,"
        " qvec, tvec) VALUES (?, ?, 2, ?, ?, ?, ?, ?, ?)",
        (pair_id, len(matches), matches.tobytes(), config, *geometry),
    )


def _insert_features(connection: sqlite3.Connection, features: Features) -> None:
    image_id, num = int(features.frame_id), len(features)
    descriptor_type, descriptors = _descriptors_of(features)
    connection.execute(
        "INSERT INTO keypoints (image_id, rows, cols, data) VALUES (?, ?, 4, ?)",
        (image_id, num, _keypoint_rows(features).tobytes()),
    )
    connection.execute(
        "INSERT INTO descriptors (image_id, type, rows, cols, data) VALUES (?, ?, ?, ?, ?)",
        (image_id, descriptor_type, num, descriptors.shape[1], descriptors.tobytes()),
    )


def _insert_pose_prior(
    connection: sqlite3.Connection, image_id: int, *, gps: GpsFix, camera_id: int
) -> None:
    altitude_m = math.nan if gps.altitude_m is None else gps.altitude_m
    position = np.array([gps.latitude_deg, gps.longitude_deg, altitude_m])
    connection.execute(
        "INSERT INTO pose_priors (corr_data_id, corr_sensor_id, corr_sensor_type, position,"
        " position_covariance, gravity, coordinate_system) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            image_id,
            camera_id,
            _CAMERA_SENSOR,
            position.tobytes(),
            _UNKNOWN_3X3,
            _UNKNOWN_3,
            int(pycolmap.PosePriorCoordinateSystem.WGS84),
        ),
    )


def descriptors_of_row(descriptor_type: int, values: Uint8Array) -> Uint8Array:
    """Descriptors (N, D) as the engine has them, from a row as COLMAP has it."""
    return values // np.uint8(SIFT_PER_ROOT_SIFT) if descriptor_type == SIFT_TYPE else values


def _descriptors_of(features: Features) -> tuple[int, Uint8Array]:
    """COLMAP's type of descriptors, and these as it has them."""
    descriptors = features.descriptors
    is_sift = (
        features.descriptor_kind is DescriptorKind.ROOT_SIFT
        and descriptors.shape[1] == _SIFT_DIMENSIONS
        and descriptors.max(initial=0) <= _MAX_ROOT_SIFT
    )
    if not is_sift:
        return _OTHER_TYPE, descriptors
    return SIFT_TYPE, descriptors * np.uint8(SIFT_PER_ROOT_SIFT)


def _keypoint_rows(features: Features) -> Float32Array:
    """COLMAP's columns (N, 4): x, y, scale (a radius, not a diameter), orientation."""
    rows = np.zeros((len(features), 4), dtype=np.float32)
    rows[:, :2] = features.keypoints_xy
    rows[:, 2] = features.scales / 2
    return rows


def _geometry_of(
    verified: VerifiedPair,
) -> tuple[int, tuple[bytes | None, bytes | None, bytes | None, bytes | None]]:
    """COLMAP's configuration of a pair, and its columns F, E, qvec (w first) and tvec.

    A pair that was verified on viewing rays is a calibrated one: it has an essential matrix and the
    pose.
    """
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


def _camera_values(camera: pycolmap.Camera) -> tuple[int, int, int, bytes, bool]:
    params = np.asarray(camera.params, dtype=np.float64).tobytes()
    model = int(camera.model)
    return model, camera.width, camera.height, params, camera.has_prior_focal_length
