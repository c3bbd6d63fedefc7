"""Runs whose map lies on the globe: a flight over sloping ground with houses, of exact geometry."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pycolmap

from engine.dense_types import DensePoints, KeyframePoses
from engine.geometry import rotation_from_vector
from engine.output.dense_ply import camera_comments, write_dense_ply
from engine.types import Float64Array, Uint8Array

WIDTH, HEIGHT = 320, 240
SLOPE = 0.08  # of the ground: up towards the east
FLIGHT_M = 60.0  # above the origin
PARAMS = {  # of the camera models that flights are made with, focal lengths about 300 px
    "SIMPLE_PINHOLE": [300.0, 160.0, 120.0],
    "SIMPLE_RADIAL": [300.0, 160.0, 120.0, 0.08],
    "RADIAL": [300.0, 160.0, 120.0, 0.08, -0.02],
    "PINHOLE": [300.0, 310.0, 163.0, 118.0],
    "OPENCV": [300.0, 310.0, 163.0, 118.0, 0.05, -0.01, 0.002, -0.003],
    "FULL_OPENCV": [300.0, 310.0, 163.0, 118.0, 0.05, -0.01, 0.002, -0.003, 0.01, 0.0, 0.0, 0.0],
    "FOV": [300.0, 310.0, 163.0, 118.0, 0.4],
    "SIMPLE_RADIAL_FISHEYE": [150.0, 160.0, 120.0, 0.01],
    "OPENCV_FISHEYE": [150.0, 155.0, 163.0, 118.0, 0.05, -0.01, 0.002, -0.003],
    "EQUIRECTANGULAR": [320.0, 160.0],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a map lies."""

    latitude_deg: float
    longitude_deg: float
    altitude_m: float | None


DULUTH = Origin(latitude_deg=46.8428, longitude_deg=-91.9942, altitude_m=198.5)


def make_placed_run(
    run: Path,
    *,
    models: Sequence[str] = ("SIMPLE_RADIAL",),
    origin: Origin | None = DULUTH,
    num_images: int = 6,
    suffix: str = ".png",
) -> pycolmap.Reconstruction:
    """Makes the folder of a run, and returns its map.

    Args:
        run: the folder.
        models: of cameras, which take turns.
        origin: of the map; None: it has no place.
        num_images: in a row, half of them in each of two folders, a second apart from 100 s.
        suffix: of images.
    """
    reconstruction = _flight(models, num_images=num_images, suffix=suffix)
    sparse = run / "snapshots" / "000001" / "sparse" / "0"
    sparse.mkdir(parents=True)
    reconstruction.write_binary(sparse)
    (run / "latest").symlink_to("snapshots/000001")
    record = {
        "models": [{"is_georeferenced": origin is not None}],
        "georeference": None
        if origin is None
        else {
            "origin": {
                "latitude_deg": origin.latitude_deg,
                "longitude_deg": origin.longitude_deg,
                "altitude_m": origin.altitude_m,
            }
        },
    }
    (run / "latest" / "snapshot.json").write_text(json.dumps(record))
    rows = ["frame_id,source,index,name,captured_at_s,status"]
    for number, image in enumerate(_in_order(reconstruction)):
        path = run / "images" / image.name
        path.parent.mkdir(parents=True, exist_ok=True)
        camera = reconstruction.camera(image.camera_id)
        pixels = np.random.default_rng(number).integers(0, 255, (camera.height, camera.width, 3))
        cv2.imwrite(str(path), pixels.astype(np.uint8))
        rows.append(f"{image.image_id},flight.mp4,{number},{image.name},{100 + number}.5,keyframe")
    (run / "frames.csv").write_text("\n".join(rows) + "\n")
    _write_dense(run, reconstruction)
    return reconstruction


def dense_points() -> tuple[Float64Array, Uint8Array]:
    """Dense points and colours of every such run, in the world of its map."""
    rng = np.random.default_rng(5)
    return rng.uniform(-80, 80, (500, 3)), rng.integers(0, 255, (500, 3)).astype(np.uint8)


def ground_height(places: Float64Array) -> Float64Array:
    """The height of the ground (P,) below places (P, 3)."""
    return np.asarray(SLOPE * places[:, 0])


def _in_order(reconstruction: pycolmap.Reconstruction) -> list[pycolmap.Image]:
    return sorted(reconstruction.images.values(), key=lambda image: image.image_id)


def _flight(models: Sequence[str], *, num_images: int, suffix: str) -> pycolmap.Reconstruction:
    rng = np.random.default_rng(0)
    points = rng.uniform(-90, 90, (600, 3))
    points[:, 2] = ground_height(points)
    points[:90, 2] += rng.uniform(3, 8, 90)  # roofs
    reconstruction = pycolmap.Reconstruction()
    for number, model in enumerate(models):
        is_sphere = model == "EQUIRECTANGULAR"
        size = (WIDTH, WIDTH // 2 if is_sphere else HEIGHT)
        camera = pycolmap.Camera.create_from_model_name(number + 1, model, 300.0, *size)
        camera.params = PARAMS[model]
        reconstruction.add_camera_with_trivial_rig(camera)
    seen: dict[int, list[tuple[int, int]]] = {}
    for number in range(num_images):
        camera = reconstruction.camera(number % len(models) + 1)
        pose = _pose(number, num_images)
        in_cam = points @ pose[:, :3].T + pose[:, 3]
        places_xy = np.asarray(camera.img_from_cam(in_cam)).reshape(-1, 2)
        inside = (places_xy >= 0).all(axis=1) & (places_xy < [camera.width, camera.height]).all(1)
        inside &= camera.is_spherical() | (in_cam[:, 2] > 0)
        rows = np.flatnonzero(inside)
        folder = "left" if number < num_images // 2 else "right side"
        image = pycolmap.Image(
            name=f"{folder}/{number % (num_images // 2):06d}{suffix}",
            keypoints=places_xy[rows],
            camera_id=camera.camera_id,
            image_id=number + 1,
        )
        reconstruction.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pose))
        for point2D_idx, row in enumerate(rows.tolist()):
            seen.setdefault(row, []).append((number + 1, point2D_idx))
    for row, elements in sorted(seen.items()):
        if len(elements) > 1:
            track = pycolmap.Track()
            for element in elements:
                track.add_element(*element)
            color = rng.integers(0, 255, 3).astype(np.uint8)
            reconstruction.add_point3D(points[row], track, color)
    return reconstruction


def _pose(number: int, num_images: int) -> Float64Array:
    """A camera that looks down, tilted to the north, on a way to the east."""
    center = np.array([-40.0 + 80.0 * number / max(num_images - 1, 1), -10.0, FLIGHT_M + number])
    down = np.array([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, -1.0]])
    rotation = rotation_from_vector(np.array([-0.3, 0.02 * number, 0.05])) @ down
    return np.column_stack([rotation, -rotation @ center])


def _write_dense(run: Path, reconstruction: pycolmap.Reconstruction) -> None:
    images = _in_order(reconstruction)
    poses = KeyframePoses(
        frame_ids=np.array([image.image_id for image in images]),
        cam_from_world=np.array([image.cam_from_world().matrix() for image in images]),
        focal_px=np.ones(len(images)),
        border_rays=np.full((len(images), 8, 3), np.nan),
    )
    xyz, colors = dense_points()
    points = DensePoints(
        xyz=xyz.astype(np.float32),
        colors=colors,
        normals=np.tile([0.0, 0.0, 1.0], (len(xyz), 1)).astype(np.float32),
        sampling=np.ones(len(xyz), np.float32),
        num_views=np.full(len(xyz), 2, np.uint8),
    )
    (run / "products").mkdir()
    write_dense_ply(run / "products" / "dense.ply", [points], comments=camera_comments(poses))
