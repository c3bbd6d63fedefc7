"""What trainers of splats read of a folder, each by its own documentation; none of their code.

- 3D Gaussian Splatting: README "Processing your own Scenes", COLMAP's "Output Format" page
  (https://colmap.github.io/format.html): ``images/``, ``sparse/0`` binary or else text, PINHOLE or
  SIMPLE_PINHOLE cameras only, ``points3D.ply`` with normals and colours.
- gsplat: README of its examples: ``sparse/0`` by COLMAP's own reader, images by their names, the
  points that each image sees by the tracks.
- nerfstudio: page "Data conventions": ``transforms.json``, OpenGL axes, intrinsics with each frame.
- Brush: README: a COLMAP folder whose images are found by their file names anywhere below, or
  ``transforms.json``; masks are files of the images' names in ``masks/``.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pycolmap

from engine.types import Float64Array

_PINHOLES = {0: "SIMPLE_PINHOLE", 1: "PINHOLE"}
_PLY_FIELDS = ["x", "y", "z", "nx", "ny", "nz", "red", "green", "blue"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainerCamera:
    """An image as a trainer has it."""

    image: Path
    size: tuple[int, int]
    intrinsics: Float64Array  # (3, 3)
    cam_from_world: Float64Array  # (3, 4) x right, y down, z forward


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainerScene:
    """What a trainer begins with."""

    cameras: dict[str, TrainerCamera]  # by file name
    points: Float64Array  # (P, 3)


def read_as_gaussian_splatting(folder: Path) -> TrainerScene:
    sparse = folder / "sparse" / "0"
    if (sparse / "images.bin").exists():
        cameras, images = _binary_cameras(sparse), _binary_images(sparse)
    else:
        cameras, images = _text_cameras(sparse), _text_images(sparse)
    found: dict[str, TrainerCamera] = {}
    stems = set()
    for name, camera_id, quat_wxyz, translation in images:
        size, intrinsics = cameras[camera_id]
        path = folder / "images" / Path(name).name  # it takes the last part
        stems.add(path.name.split(".")[0])  # and cuts it at its first dot
        found[path.name] = TrainerCamera(
            image=path,
            size=size,
            intrinsics=intrinsics,
            cam_from_world=np.column_stack([_rotation(quat_wxyz), translation]),
        )
    assert len(stems) == len(found) == len(images)
    return TrainerScene(cameras=found, points=_ply_points(sparse / "points3D.ply"))


def read_as_gsplat(folder: Path) -> TrainerScene:
    model = pycolmap.Reconstruction(folder / "sparse" / "0")
    names = {i: model.image(i).name for i in model.reg_image_ids()}
    seen: dict[str, list[int]] = {name: [] for name in names.values()}
    for point3D_id, point3D in model.points3D.items():
        for element in point3D.track.elements:
            seen[names[element.image_id]].append(point3D_id)  # a KeyError: not its image
    on_disk = {str(path.relative_to(folder / "images")) for path in (folder / "images").iterdir()}
    assert set(names.values()) <= on_disk
    found = {}
    for image_id, name in names.items():
        image = model.image(image_id)
        camera = model.camera(image.camera_id)
        assert camera.model_name in _PINHOLES.values()
        found[name] = TrainerCamera(
            image=folder / "images" / name,
            size=(camera.width, camera.height),
            intrinsics=np.asarray(camera.calibration_matrix()),
            cam_from_world=np.asarray(image.cam_from_world().matrix()),
        )
    points = np.array([point.xyz for point in model.points3D.values()]).reshape(-1, 3)
    return TrainerScene(cameras=found, points=points)


def read_as_nerfstudio(folder: Path) -> TrainerScene:
    record = json.loads((folder / "transforms.json").read_text())
    assert record["camera_model"] == "OPENCV"
    found = {}
    for frame in record["frames"]:
        path = folder / frame["file_path"]
        if "mask_path" in frame:
            assert (folder / frame["mask_path"]).is_file()
        found[path.name] = _opengl_camera(path, frame)
    assert len(found) == len(record["frames"])
    return TrainerScene(cameras=found, points=_ply_points(folder / record["ply_file_path"]))


def read_as_brush(folder: Path) -> TrainerScene:

    models = sorted(path.parent for path in folder.rglob("cameras.bin"))
    sparse = models[0]
    files = {path.name: path for path in folder.rglob("*") if path.suffix in {".jpg", ".png"}}
    cameras, found = _binary_cameras(sparse), {}
    for name, camera_id, quat_wxyz, translation in _binary_images(sparse):
        size, intrinsics = cameras[camera_id]
        found[Path(name).name] = TrainerCamera(
            image=files[Path(name).name],
            size=size,
            intrinsics=intrinsics,
            cam_from_world=np.column_stack([_rotation(quat_wxyz), translation]),
        )
    return TrainerScene(cameras=found, points=_binary_points(sparse))


READERS = (read_as_gaussian_splatting, read_as_gsplat, read_as_nerfstudio, read_as_brush)


def _opengl_camera(path: Path, frame: dict[str, Any]) -> TrainerCamera:
    assert frame["k1"] == frame["k2"] == frame["p1"] == frame["p2"] == 0
    world_from_cam = np.array(frame["transform_matrix"]) @ np.diag([1.0, -1.0, -1.0, 1.0])
    intrinsics = np.eye(3)
    intrinsics[[0, 1], [0, 1]] = frame["fl_x"], frame["fl_y"]
    intrinsics[:2, 2] = frame["cx"], frame["cy"]
    return TrainerCamera(
        image=path,
        size=(frame["w"], frame["h"]),
        intrinsics=intrinsics,
        cam_from_world=np.linalg.inv(world_from_cam)[:3],
    )


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))


def _intrinsics(model: str, params: list[float]) -> Float64Array:
    fx, fy, cx, cy = params if model == "PINHOLE" else [params[0], *params]
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def _binary_cameras(sparse: Path) -> dict[int, tuple[tuple[int, int], Float64Array]]:
    cameras = {}
    with (sparse / "cameras.bin").open("rb") as file:
        for _ in range(_unpack(file, "Q")[0]):
            camera_id, model_id, width, height = _unpack(file, "iiQQ")
            model = _PINHOLES[model_id]
            params = list(_unpack(file, "4d" if model == "PINHOLE" else "3d"))
            cameras[camera_id] = (width, height), _intrinsics(model, params)
        assert not file.read(1)
    return cameras


def _binary_images(sparse: Path) -> list[tuple[str, int, Float64Array, Float64Array]]:
    images = []
    with (sparse / "images.bin").open("rb") as file:
        for _ in range(_unpack(file, "Q")[0]):
            _, *pose, camera_id = _unpack(file, "I7dI")
            name = ""
            while (char := file.read(1)) != b"\0":
                name += char.decode("utf-8")  # byte by byte: no character may have two
            file.read(24 * _unpack(file, "Q")[0])
            images.append((name, camera_id, np.array(pose[:4]), np.array(pose[4:])))
        assert not file.read(1)
    return images


def _binary_points(sparse: Path) -> Float64Array:
    points = []
    with (sparse / "points3D.bin").open("rb") as file:
        for _ in range(_unpack(file, "Q")[0]):
            points.append(_unpack(file, "Q3d3Bd")[1:4])
            file.read(8 * _unpack(file, "Q")[0])
        assert not file.read(1)
    return np.array(points).reshape(-1, 3)


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if not line.startswith("#")]


def _text_cameras(sparse: Path) -> dict[int, tuple[tuple[int, int], Float64Array]]:
    cameras = {}
    for line in _lines(sparse / "cameras.txt"):
        camera_id, model, width, height, *params = line.split()
        intrinsics = _intrinsics(model, [float(value) for value in params])
        cameras[int(camera_id)] = (int(width), int(height)), intrinsics
    return cameras


def _text_images(sparse: Path) -> list[tuple[str, int, Float64Array, Float64Array]]:
    images = []
    for line in _lines(sparse / "images.txt")[::2]:
        _, *pose, camera_id, name = line.split(" ")  # a name with a space would be cut
        numbers = np.array([float(value) for value in pose])
        images.append((name, int(camera_id), numbers[:4], numbers[4:]))
    return images


def _ply_points(path: Path) -> Float64Array:
    """Points of a PLY whose vertices have exactly what 3D Gaussian Splatting asks for."""
    head, _, body = path.read_bytes().partition(b"end_header\n")
    lines = head.decode("ascii").splitlines()
    count = next(int(line.split()[-1]) for line in lines if line.startswith("element vertex"))
    assert [line.split()[-1] for line in lines if line.startswith("property")] == _PLY_FIELDS
    layout = np.dtype([("xyz", "<f4", 3), ("normal", "<f4", 3), ("rgb", "u1", 3)])
    vertices = np.frombuffer(body, layout)
    assert len(vertices) == count
    return vertices["xyz"].astype(np.float64)


def _rotation(quat_wxyz: Float64Array) -> Float64Array:
    w, x, y, z = quat_wxyz / np.linalg.norm(quat_wxyz)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
