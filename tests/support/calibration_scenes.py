"""Scenes with exact truth for calibrations: a reconstruction as bundle adjustment gets it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pycolmap

from engine.types import Float64Array
from tests.support.synthetic import look_at

WIDTH, HEIGHT = 1000, 750
FOCAL_PX = 800.0
CAMERA_ID = 1


def camera_with(
    focal_px: float = FOCAL_PX, k: float = 0.0, *, model: str = "SIMPLE_RADIAL"
) -> pycolmap.Camera:
    """A camera of 1000 x 750 px whose first distortion parameter is ``k``."""
    camera = pycolmap.Camera.create_from_model_name(CAMERA_ID, model, focal_px, WIDTH, HEIGHT)
    params = list(camera.params)
    for idx in list(camera.extra_params_idxs())[:1]:
        params[idx] = k
    camera.params = params
    return camera


def orbit(num: int = 12) -> Float64Array:
    """Poses (num, 3, 4) around the origin, at different heights, that look at it."""
    angles = np.linspace(0.0, 1.6 * np.pi, num)
    centers = np.column_stack(
        [6.0 * np.cos(angles), 6.0 * np.sin(angles), 2.5 + 1.5 * np.sin(3 * angles)]
    )
    return np.array([look_at(center, np.zeros(3)) for center in centers])


def lawnmower(*, columns: int = 5, rows: int = 4, jitter_deg: float = 1.0) -> Float64Array:
    """Poses (columns * rows, 3, 4) straight down from one height, lines flown to and fro."""
    rng = np.random.default_rng(7)
    poses = []
    for row in range(rows):
        for column in range(columns):
            turn = (0.0 if row % 2 == 0 else np.pi) + rng.normal(0.0, 0.03)
            down = np.array(
                [
                    [np.cos(turn), np.sin(turn), 0.0],
                    [np.sin(turn), -np.cos(turn), 0.0],
                    [0.0, 0.0, -1.0],
                ]
            )
            tilt = np.radians(rng.normal(0.0, jitter_deg, 2))
            wobble = np.array([[1, 0, tilt[0]], [0, 1, tilt[1]], [-tilt[0], -tilt[1], 1]])
            rotation = np.linalg.qr(wobble)[0]
            rotation *= np.sign(np.diag(rotation))
            center = np.array([2.5 * column, 3.0 * row, 10.0 + rng.normal(0.0, 0.05)])
            turned = rotation @ down
            poses.append(np.column_stack([turned, -turned @ center]))
    return np.array(poses)


def turn(num: int = 10, *, baseline: float = 0.001) -> Float64Array:
    """Poses (num, 3, 4) of a camera that turns by a few degrees and hardly moves."""
    aims = np.column_stack(
        [10.0 * np.ones(num), np.linspace(-0.8, 0.8, num), 0.2 * np.cos(np.arange(num))]
    )
    centers = baseline * np.random.default_rng(3).normal(size=(num, 3))
    return np.array([look_at(c, c + a) for c, a in zip(centers, aims, strict=True)])


def cloud(num: int = 400, *, radius: float = 2.5, seed: int = 1) -> Float64Array:
    """Points (num, 3) in a ball around the origin."""
    points = np.random.default_rng(seed).normal(size=(num, 3))
    return np.asarray(radius * points / np.maximum(1.0, np.linalg.norm(points, axis=1))[:, None])


def plane(num: int = 1500, *, seed: int = 1) -> Float64Array:
    """Points (num, 3) on the ground z = 0 below `lawnmower`."""
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.uniform(-8, 18, num), rng.uniform(-6, 15, num), np.zeros(num)])


def reconstruction_of(
    poses: Float64Array,
    points: Float64Array,
    camera: pycolmap.Camera,
    *,
    start: Sequence[float] | None = None,
    noise_px: float = 0.3,
    seed: int = 5,
    cameras_each: bool = False,
) -> pycolmap.Reconstruction:
    """The true poses and points with noisy keypoints, and the camera as adjustment begins with it.

    Args:
        poses: (S, 3, 4) cam_from_world.
        points: (P, 3) in the world; those that two images see.
        camera: the true one.
        start: its parameters in the reconstruction; by default the true ones.
        noise_px: of each coordinate of the keypoints.
        seed: of the noise.
        cameras_each: every image has a camera of its own; else the first one is of all.
    """
    rng = np.random.default_rng(seed)
    reconstruction = pycolmap.Reconstruction()
    for camera_id in range(CAMERA_ID, CAMERA_ID + (len(poses) if cameras_each else 1)):
        begun = copy.deepcopy(camera)
        begun.camera_id = camera_id
        begun.params = list(camera.params if start is None else start)
        reconstruction.add_camera_with_trivial_rig(begun)
    tracks: list[list[pycolmap.TrackElement]] = [[] for _ in points]
    for image_id, pose in enumerate(poses, start=1):
        in_cam = points @ pose[:, :3].T + pose[:, 3]
        projected = np.asarray(camera.img_from_cam(in_cam))
        is_seen = in_cam[:, 2] > 0.1
        is_seen &= ((projected > 0) & (projected < (WIDTH, HEIGHT))).all(axis=1)
        rows = np.flatnonzero(is_seen)
        keypoints = projected[rows] + rng.normal(0.0, noise_px, (len(rows), 2))
        image = pycolmap.Image(
            name=f"{image_id}.jpg",
            keypoints=keypoints,
            camera_id=image_id if cameras_each else CAMERA_ID,
            image_id=image_id,
        )
        reconstruction.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pose))
        for k, row in enumerate(rows.tolist()):
            tracks[row].append(pycolmap.TrackElement(image_id, k))
    for point, elements in zip(points, tracks, strict=True):
        if len(elements) >= 2:
            reconstruction.add_point3D(point, pycolmap.Track(elements))
    return reconstruction
