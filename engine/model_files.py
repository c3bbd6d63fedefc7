"""COLMAP's binary model files, checked before COLMAP reads them.

COLMAP believes the counts in a file: one of a damaged or foreign file makes it ask for any amount
of memory, and a name in it may lead anywhere. Formats: COLMAP's documentation, "Output format";
rigs and frames as of version 3.12.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engine.camera_models import CAMERA_MODELS
from engine.regular_files import read_regular_file
from engine.types import Float64Array, Uint8Array

CAMERA_MODEL_OF_ID = (  # position: the model's id in files
    *("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "OPENCV_FISHEYE"),
    *("FULL_OPENCV", "FOV", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE", "THIN_PRISM_FISHEYE"),
    *("RAD_TAN_THIN_PRISM_FISHEYE", "SIMPLE_DIVISION", "DIVISION", "SIMPLE_FISHEYE", "FISHEYE"),
    *("EUCM", "EQUIRECTANGULAR"),
)
_MAX_BYTES = 2**33  # of one file
_MAX_EDGE_PX = 2**17
_MAX_PIXELS = 2**28
_MAX_COORDINATE = 1e30  # of positions: squares of them are still numbers
_NO_POINT = 2**64 - 1  # of a keypoint
_NAMES_CHARS = 1000
_POINT2D: DTypeLike = np.dtype([("xy", "<f8", 2), ("point3D_id", "<u8")])
_ELEMENT: DTypeLike = np.dtype([("image_id", "<u4"), ("point2D_idx", "<u4")])
_CAMERA_SENSOR = 0


class ModelFileError(Exception):
    """A model's files are not what they should be; says which one and why."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Image:
    camera_id: int
    point3D_ids: NDArray[np.uint64]  # (K,) of its keypoints


def check_model_files(folder: Path) -> None:
    """Checks a model's five files: whole, finite, and referring only to what is in them.

    Names of images must be relative paths that stay below the folder of the images.

    Args:
        folder: holds ``cameras.bin``, ``rigs.bin``, ``frames.bin``, ``images.bin`` and
            ``points3D.bin``.

    Raises:
        ModelFileError: they are not so.
    """
    cameras = _cameras(_File(folder / "cameras.bin"))
    rigs = _rigs(_File(folder / "rigs.bin"), cameras)
    images = _images(_File(folder / "images.bin"), cameras)
    _frames(_File(folder / "frames.bin"), rigs, images)
    _points(_File(folder / "points3D.bin"), images)


def read_points(path: Path) -> tuple[Float64Array, Uint8Array]:
    """Positions (P, 3) and colours (P, 3) RGB of the points of a ``points3D.bin``.

    Raises:
        ModelFileError: it is not whole, or holds numbers that are none.
    """
    file = _File(path)
    records = []
    for _ in range(file.count(num_bytes=51)):
        _, x, y, z, red, green, blue, _ = file.values("Q3d3Bd")
        records.append((x, y, z, red, green, blue))
        file.array(_ELEMENT, file.count(num_bytes=8))
    file.end()
    table = np.array(records, np.float64).reshape(-1, 6)
    file.finite(table)
    return table[:, :3], table[:, 3:].astype(np.uint8)


def is_safe_image_name(name: str) -> bool:
    """Whether an image's name is a plain relative path: it leads to one place, below its folder."""
    path = PurePosixPath(name)
    return (
        0 < len(name) <= _NAMES_CHARS
        and name.isprintable()
        and "\\" not in name
        and not path.is_absolute()
        and str(path) == name  # no empty parts and no .
        and ".." not in path.parts
        and name != "."
    )


class _File:
    """The records of one file, read one after the other."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._place = 0
        try:
            self._data = read_regular_file(path, max_bytes=_MAX_BYTES)
        except OSError as error:
            raise ModelFileError(f"{path.name}: {error.strerror or error}") from error

    def refuse(self, why: str) -> ModelFileError:
        """The error that says what is wrong with this file."""
        return ModelFileError(f"{self._name}: {why}")

    def values(self, layout: str) -> tuple[Any, ...]:
        """The next values, as ``struct`` names them; little-endian, packed."""
        layout = f"<{layout}"
        try:
            values = struct.unpack_from(layout, self._data, self._place)
        except struct.error as error:
            raise self.refuse("is cut short") from error
        self._place += struct.calcsize(layout)
        return values

    def count(self, *, num_bytes: int, layout: str = "Q") -> int:
        """How many records of at least so many bytes follow."""
        (count,) = self.values(layout)
        if count * num_bytes > len(self._data) - self._place:
            raise self.refuse("is cut short, or counts more than it holds")
        return int(count)

    def array(self, dtype: DTypeLike, count: int) -> NDArray[Any]:
        """The next values of one type; ``count`` is known to fit."""
        array = np.frombuffer(self._data, dtype, count, self._place)
        self._place += array.nbytes
        return array

    def text(self) -> str:
        """The next text, up to its zero byte."""
        end = self._data.find(b"\0", self._place, self._place + 4 * _NAMES_CHARS)
        if end < 0:
            raise self.refuse("holds a name without an end")
        try:
            text = self._data[self._place : end].decode()
        except UnicodeDecodeError as error:
            raise self.refuse("holds a name that is no UTF-8") from error
        self._place = end + 1
        return text

    def finite(self, values: Any) -> None:
        """Refuses values that are no usable numbers."""
        with np.errstate(invalid="ignore"):
            is_usable = (np.abs(np.asarray(values)) <= _MAX_COORDINATE).all()
        if not is_usable:
            raise self.refuse("holds numbers that are not finite, or absurdly large")

    def end(self) -> None:
        """Refuses what lies behind the last record."""
        if self._place != len(self._data):
            raise self.refuse("goes on behind its last record")


def _unique(file: _File, ids: Sequence[Any], what: str) -> None:
    if len(set(ids)) != len(ids):
        raise file.refuse(f"holds a {what} twice")


def _cameras(file: _File) -> set[int]:
    """The ids of the cameras."""
    ids: list[int] = []
    for _ in range(file.count(num_bytes=24)):
        camera_id, model_id, width, height = file.values("IiQQ")
        if not 0 <= model_id < len(CAMERA_MODEL_OF_ID):
            raise file.refuse(f"holds a camera of the unknown model {model_id}")
        if not 0 < min(width, height) <= max(width, height) <= _MAX_EDGE_PX or (
            width * height > _MAX_PIXELS
        ):
            raise file.refuse(f"holds a camera of {width} x {height} px")
        model = CAMERA_MODELS[CAMERA_MODEL_OF_ID[model_id]]
        params = file.values(f"{model.num_params}d")
        file.finite(params)
        if min(params[: model.num_positive]) <= 0:
            raise file.refuse("holds a camera whose focal length is not above 0")
        ids.append(camera_id)
    file.end()
    _unique(file, ids, "camera")
    return set(ids)


def _rigs(file: _File, cameras: set[int]) -> dict[int, set[int]]:
    """The cameras of each rig."""
    rigs: list[tuple[int, set[int]]] = []
    for _ in range(file.count(num_bytes=16)):
        rig_id, num_sensors = file.values("II")
        sensors = [file.values("iI")] if num_sensors else []
        for _ in range(num_sensors - 1):
            *sensor, has_pose = file.values("iIB")
            if has_pose:
                file.finite(file.values("7d"))
            sensors.append((sensor[0], sensor[1]))
        _unique(file, sensors, "camera of a rig")
        if not sensors or any(kind == _CAMERA_SENSOR and i not in cameras for kind, i in sensors):
            raise file.refuse("holds a rig of unknown cameras")
        rigs.append((rig_id, {i for kind, i in sensors if kind == _CAMERA_SENSOR}))
    file.end()
    _unique(file, [rig_id for rig_id, _ in rigs], "rig")
    return dict(rigs)


def _images(file: _File, cameras: set[int]) -> dict[int, _Image]:
    """The images by id."""
    images: dict[int, _Image] = {}
    names: list[str] = []
    num_records = file.count(num_bytes=73)
    for _ in range(num_records):
        image_id, *pose, camera_id = file.values("I7dI")
        _check_pose(file, pose)
        name = file.text()
        if not is_safe_image_name(name):
            shown = name.encode("unicode_escape").decode()[:80]
            raise file.refuse(f"holds the image name {shown}, which leads elsewhere or is no name")
        if camera_id not in cameras:
            raise file.refuse(f"holds an image of the unknown camera {camera_id}")
        points = file.array(_POINT2D, file.count(num_bytes=24))
        file.finite(points["xy"])
        images[image_id] = _Image(camera_id=camera_id, point3D_ids=points["point3D_id"])
        names.append(name)
    file.end()
    if len(images) != num_records:
        raise file.refuse("holds an image twice")
    _unique(file, names, "name of an image")
    return images


def _frames(file: _File, rigs: dict[int, set[int]], images: dict[int, _Image]) -> None:
    ids: list[int] = []
    seen: list[int] = []
    for _ in range(file.count(num_bytes=84)):
        frame_id, rig_id, *pose = file.values("II7d")
        _check_pose(file, pose)
        if rig_id not in rigs:
            raise file.refuse(f"holds a frame of the unknown rig {rig_id}")
        for _ in range(file.count(num_bytes=16, layout="I")):
            kind, sensor_id, data_id = file.values("iIQ")
            if kind != _CAMERA_SENSOR:
                continue
            image = images.get(data_id)
            if image is None or image.camera_id != sensor_id or sensor_id not in rigs[rig_id]:
                raise file.refuse("holds a frame of unknown images")
            seen.append(data_id)
        ids.append(frame_id)
    file.end()
    _unique(file, ids, "frame")
    if sorted(seen) != sorted(images):
        raise file.refuse("does not hold each image once")


def _check_pose(file: _File, pose: Sequence[float]) -> None:
    """Quaternion and translation."""
    file.finite(pose)
    if abs(float(np.linalg.norm(pose[:4])) - 1.0) > 1e-3:
        raise file.refuse("holds a pose whose rotation is none")


def _points(file: _File, images: dict[int, _Image]) -> None:
    ids: list[int] = []
    positions: list[tuple[float, ...]] = []
    tracks: list[NDArray[Any]] = []
    for _ in range(file.count(num_bytes=51)):
        point3D_id, *xyz, _, _, _, error = file.values("Q3d3Bd")
        ids.append(point3D_id)
        positions.append((*xyz, error))
        tracks.append(file.array(_ELEMENT, file.count(num_bytes=8)))
    file.end()
    file.finite(positions)
    _unique(file, ids, "point")
    _check_tracks(file, ids, tracks, images)


def _check_tracks(
    file: _File, ids: list[int], tracks: list[NDArray[Any]], images: dict[int, _Image]
) -> None:
    """Every element of a track is a keypoint that names the track's point, and the other way."""
    owners = np.repeat(np.array(ids, np.uint64), [len(track) for track in tracks])
    elements = np.concatenate(tracks) if tracks else np.empty(0, _ELEMENT)
    num_observations = sum(int((one.point3D_ids != _NO_POINT).sum()) for one in images.values())
    rows = np.argsort(elements["image_id"], kind="stable")
    image_ids, starts = np.unique(elements["image_id"][rows], return_index=True)
    parts = np.split(rows, starts[1:])  # without any elements one, and no id
    for image_id, own in zip(image_ids.tolist(), parts, strict=False):
        if image_id not in images:
            raise file.refuse(f"holds a track in the unknown image {image_id}")
        keypoints = images[image_id].point3D_ids
        places = elements["point2D_idx"][own].astype(np.int64)
        if len(np.unique(places)) != len(places) or places.max() >= len(keypoints):
            raise file.refuse("holds a track of unknown keypoints")
        if not np.array_equal(keypoints[places], owners[own]):
            raise file.refuse("holds a track of keypoints of another one")
    if num_observations != len(elements):
        raise file.refuse("lacks points that images have keypoints of")
