"""Depth maps and dense points of keyframes on disk, a NumPy archive each: ``dense/000123.npz``.

A depth map of 640 x 480 px takes about 0.8 MB: depths as 16 bit logarithms, which PNG would make
smaller by 0.25 MB for twice the CPU time of all else; votes as PNG, errors as PNG of half the size,
colours as JPEG. Points are kept as they are, 23 bytes each, those left to other keyframes too: of
such a depth map 1.8 MB at most.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from engine.dense.dense_map import Shares, SmallDepth
from engine.dense_types import DensePoints, DepthMap
from engine.errors import JournalError
from engine.output.files import temporary_sibling
from engine.output.run_folder import DENSE_FOLDER
from engine.regular_files import regular_file_size
from engine.types import Float32Array, FrameId, Uint8Array, frozen_array

_VERSION = 2
_JPEG_QUALITY = 90
_NUM_LEVELS = 65534  # of a logarithm of depth, from the nearest to the farthest
_NORMAL_SCALE = 127.0
_ERROR_LEVELS_PER_E = 24.0  # of a logarithm of relative errors, 4 % apart
_ERROR_LEAST = 1e-5
_SHARE_NAMES = ("other_ids", "other_versions", "others_from_own", "num_points", "num_sampled")
Part = TypeVar("Part")

_MAX_FILE_BYTES = 1 << 31  # of a keyframe; one of 8192 x 8192 px takes less
_MAX_VERSION = 1 << 53  # of a keyframe's depth
_MAX_PIXELS = 8192 * 8192  # as the configuration allows
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_PNG_SIZE = slice(16, 24)  # bytes of a PNG file that hold its width and height
_JPEG_MARKERS = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # that hold the size

# What is read, by name: type and number of dimensions.
_LENS = {"pinhole": ("<f8", 1), "neighbour_ids": ("<i8", 1), "neighbour_from_keyframe": ("<f8", 3)}
_MAP_LAYOUT = {
    **_LENS,
    "range": ("<f8", 1),
    "depth": ("<u2", 2),
    "relative_error": ("|u1", 1),
    "num_agreeing": ("|u1", 1),
    "colors": ("|u1", 1),
}
_POINTS_LAYOUT = {
    "xyz": ("<f4", 2),
    "colors": ("|u1", 2),
    "normals": ("|i1", 2),
    "sampling": ("<f4", 1),
    "num_views": ("|u1", 1),
}
_SMALL_LAYOUT = {
    **_LENS,
    "depth": ("<f4", 2),
    "relative_error": ("<f4", 2),
    "num_agreeing": ("|u1", 2),
    "colors": ("|u1", 3),
    "sample_xyz": ("<f4", 2),
    "sample_colors": ("|u1", 2),
    "border_rays": ("<f8", 2),
    "version": ("<i8", 0),
    "share_other_ids": ("<i8", 1),
    "share_other_versions": ("<i8", 1),
    "share_others_from_own": ("<f8", 3),
    "share_num_points": ("<i8", 1),
    "share_num_sampled": ("<i8", 1),
}

# What reading a file raises that anyone may have written.
_BROKEN = (
    OSError,
    LookupError,
    ValueError,
    TypeError,
    ArithmeticError,
    EOFError,
    MemoryError,
    RuntimeError,  # an encrypted member; a method of compression that is not known
    SyntaxError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


class DepthStore:
    """A ``DepthStorage`` in the folder of a run. One thread at a time.

    Args:
        run_path: where the run folder is at present; called before and after each use of it. What
            it raises ends that: the folder must not be used any more.
    """

    def __init__(self, run_path: Callable[[], Path]) -> None:
        self._run_path = run_path

    def frame_ids(self) -> list[FrameId]:
        """Keyframes that it has, in order."""
        names = (path.stem for path in self._folder().glob("*.npz"))
        ids = {name: FrameId(int(name)) for name in names if name.isdecimal()}
        return sorted(frame_id for name, frame_id in ids.items() if name == f"{frame_id:06d}")

    def write(self, depth_map: DepthMap, points: DensePoints, small: SmallDepth) -> None:
        """Keeps what belongs to a keyframe, in place of what it had.

        Args:
            depth_map: the whole one.
            points: all of them, by the shares of what stays in memory.
            small: what stays in memory.

        Raises:
            JournalError: it cannot be written; the file is as it was.
        """
        path = self._path(depth_map.frame_id)
        temporary = temporary_sibling(path)
        try:
            path.parent.mkdir(exist_ok=True)
            with temporary.open("wb") as file:
                np.savez(
                    file,
                    allow_pickle=False,
                    version=np.array(_VERSION),
                    **_prefixed("map", _packed_map(depth_map)),
                    **_prefixed("points", _packed_points(points)),
                    **_prefixed("small", _small_arrays(small)),
                )
            self._run_path()
            temporary.replace(path)  # after a power cut it may be broken, and is made again
        except OSError as error:
            raise JournalError(f"{path}: cannot be written: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def depth_map(self, frame_id: FrameId) -> DepthMap | None:
        """The whole depth map of a keyframe; None where it cannot be read any more."""
        return self._read(
            frame_id, "map", _MAP_LAYOUT, lambda arrays: _unpacked_map(frame_id, arrays)
        )

    def points(self, frame_id: FrameId) -> DensePoints | None:
        """All points of a keyframe; None where they cannot be read any more."""
        return self._read(frame_id, "points", _POINTS_LAYOUT, _unpacked_points)

    def small(self, frame_id: FrameId) -> SmallDepth | None:
        """What of a keyframe stays in memory; None where it cannot be read any more."""
        return self._read(
            frame_id, "small", _SMALL_LAYOUT, lambda arrays: _small_of(frame_id, arrays)
        )

    def _read(
        self,
        frame_id: FrameId,
        prefix: str,
        layout: Mapping[str, tuple[str, int]],
        unpack: Callable[[Mapping[str, Any]], Part],
    ) -> Part | None:
        part = _part_of(self._path(frame_id), prefix, layout, unpack)
        self._run_path()
        return part

    def _folder(self) -> Path:
        return self._run_path() / DENSE_FOLDER

    def _path(self, frame_id: FrameId) -> Path:
        return self._folder() / f"{int(frame_id):06d}.npz"


def _part_of(
    path: Path,
    prefix: str,
    layout: Mapping[str, tuple[str, int]],
    unpack: Callable[[Mapping[str, Any]], Part],
) -> Part | None:
    """What ``unpack`` makes of the arrays of a file whose names begin so; None: it is broken."""
    try:
        if regular_file_size(path) > _MAX_FILE_BYTES:
            return None
        with (
            open(path, "rb", opener=_open_at_once) as file,
            zipfile.ZipFile(file) as archive,
        ):
            if int(_array(archive, "version", "<i8", num_dims=0)) != _VERSION:
                return None
            return unpack(
                {
                    name: _array(archive, f"{prefix}_{name}", dtype, num_dims=num_dims)
                    for name, (dtype, num_dims) in layout.items()
                }
            )
    except _BROKEN:
        return None


def _open_at_once(path: str, flags: int) -> int:
    """Opens a file without waiting, whatever its name has come to stand for."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _array(archive: zipfile.ZipFile, name: str, dtype: str, *, num_dims: int) -> Any:
    """An array of an archive, whose memory is taken only where the file has as much.

    Raises:
        ValueError: it is of another type, or its size is not that of its part of the file.
        Whatever ``zipfile`` raises.
    """
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type != zipfile.ZIP_STORED or member.file_size > _MAX_FILE_BYTES:
        raise ValueError(f"{name}: not stored as it is")
    with archive.open(member) as file:
        shape, is_fortran, found = _HEADERS[np.lib.format.read_magic(file)](file)
        num_bytes = math.prod(shape) * found.itemsize
        if (
            found != np.dtype(dtype)
            or len(shape) != num_dims
            or is_fortran
            or min(shape, default=0) < 0
        ):
            raise ValueError(f"{name}: {found} {shape}")
        if num_bytes != member.file_size - file.tell():
            raise ValueError(f"{name}: {shape} in {member.file_size} bytes")
        return np.frombuffer(file.read(num_bytes), found).reshape(shape)


def _prefixed(prefix: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}_{name}": array for name, array in arrays.items()}


def _packed_map(depth_map: DepthMap) -> dict[str, Any]:
    known = depth_map.depth > 0
    nearest = float(depth_map.depth[known].min()) if known.any() else 1.0
    farthest = float(depth_map.depth.max()) if known.any() else 1.0
    return {
        "pinhole": depth_map.pinhole,
        "range": np.array([nearest, farthest]),
        "depth": _levels_of_depth(depth_map.depth, nearest, farthest),
        "relative_error": _png(_levels_of_error(_largest_of_four(depth_map.relative_error))),
        "num_agreeing": _png(depth_map.num_agreeing),
        "colors": _jpeg(depth_map.colors),
        "neighbour_ids": depth_map.neighbour_ids,
        "neighbour_from_keyframe": depth_map.neighbour_from_keyframe,
    }


def _unpacked_map(frame_id: FrameId, arrays: Mapping[str, Any]) -> DepthMap:
    nearest, farthest = arrays["range"].tolist()
    _require(0.0 < nearest <= farthest < math.inf, "range")
    height, width = arrays["depth"].shape
    _require(0 < height * width <= _MAX_PIXELS, "depth")
    depth = _depth_of_levels(arrays["depth"], nearest, farthest)
    half = _image(arrays["relative_error"], (-(-height // 2), -(-width // 2)))
    error = _error_of_levels(half).repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    return _sound(
        DepthMap(
            frame_id=frame_id,
            pinhole=arrays["pinhole"],
            depth=depth,
            relative_error=np.where(depth > 0, error, np.float32(0.0)),
            num_agreeing=_image(arrays["num_agreeing"], (height, width)),
            colors=_image(arrays["colors"], (height, width))[:, :, ::-1],
            neighbour_ids=arrays["neighbour_ids"],
            neighbour_from_keyframe=arrays["neighbour_from_keyframe"],
        )
    )


def _sound(depth_map: DepthMap) -> DepthMap:
    """A depth map that others can be computed from.

    Raises:
        ValueError: a value cannot be.
    """
    _require(bool((depth_map.pinhole[:2] > 0).all()), "pinhole")
    _require(bool((depth_map.depth >= 0).all()), "depth")
    _require(bool((depth_map.relative_error >= 0).all()), "relative_error")
    distances = np.linalg.norm(depth_map.neighbour_from_keyframe[:, :, 3], axis=1)
    _require(bool((distances > 0).all()), "neighbour_from_keyframe")
    return depth_map


def _require(is_right: bool, name: str) -> None:
    if not is_right:
        raise ValueError(f"{name}: holds values that cannot be")


def _levels_of_depth(depth: Float32Array, nearest: float, farthest: float) -> np.ndarray[Any, Any]:
    """Logarithms of depths (H, W) as 16 bit levels, 1 the nearest; 0: unknown."""
    span = max(float(np.log(farthest / nearest)), 1e-9)
    ratio = np.maximum(depth, np.float32(nearest)) * np.float32(1.0 / nearest)
    levels = np.log(ratio) * np.float32(_NUM_LEVELS / span) + np.float32(1.5)
    return np.where(depth > 0, np.minimum(levels, _NUM_LEVELS + 1), 0).astype(np.uint16)


def _depth_of_levels(levels: np.ndarray[Any, Any], nearest: float, farthest: float) -> Float32Array:
    span = max(float(np.log(farthest / nearest)), 1e-9)
    table = nearest * np.exp(np.arange(-1, _NUM_LEVELS + 1) * (span / _NUM_LEVELS))
    table[0] = 0.0
    return np.asarray(table.astype(np.float32)[levels])


def _levels_of_error(relative_error: Float32Array) -> Uint8Array:
    levels = np.log(np.maximum(relative_error, _ERROR_LEAST) / _ERROR_LEAST) * _ERROR_LEVELS_PER_E
    return np.where(relative_error > 0, np.clip(levels + 1.5, 1, 255), 0).astype(np.uint8)


def _error_of_levels(levels: Uint8Array) -> Float32Array:
    table = _ERROR_LEAST * np.exp(np.arange(-1, 255) / _ERROR_LEVELS_PER_E)
    table[0] = 0.0
    return table.astype(np.float32)[levels]


def _largest_of_four(values: Float32Array) -> Float32Array:
    """The largest value of every two by two pixels."""
    height, width = values.shape
    padded = np.pad(values, ((0, height % 2), (0, width % 2)))
    rows = np.maximum(padded[::2], padded[1::2])
    return np.asarray(np.maximum(rows[:, ::2], rows[:, 1::2]))


def _packed_points(points: DensePoints) -> dict[str, Any]:
    return {
        "xyz": points.xyz,
        "colors": points.colors,
        "normals": np.rint(points.normals * _NORMAL_SCALE).astype(np.int8),
        "sampling": points.sampling,
        "num_views": points.num_views,
    }


def _unpacked_points(arrays: Mapping[str, Any]) -> DensePoints:
    _require(bool((arrays["sampling"] >= 0).all()), "sampling")
    normals = arrays["normals"].astype(np.float32)
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    return DensePoints(
        xyz=arrays["xyz"],
        colors=arrays["colors"],
        normals=normals / np.maximum(lengths, 1.0),
        sampling=arrays["sampling"],
        num_views=arrays["num_views"],
    )


def _small_arrays(small: SmallDepth) -> dict[str, Any]:
    few = small.depth_map
    return {
        "pinhole": few.pinhole,
        "depth": few.depth,
        "relative_error": few.relative_error,
        "num_agreeing": few.num_agreeing,
        "colors": few.colors,
        "neighbour_ids": few.neighbour_ids,
        "neighbour_from_keyframe": few.neighbour_from_keyframe,
        "sample_xyz": small.sample_xyz,
        "sample_colors": small.sample_colors,
        "version": np.array(small.version),
        **{f"share_{name}": getattr(small.shares, name) for name in _SHARE_NAMES},
        "border_rays": small.border_rays,
    }


def _small_of(frame_id: FrameId, arrays: Mapping[str, Any]) -> SmallDepth:
    version = int(arrays["version"])
    shares = Shares(**{name: arrays[f"share_{name}"] for name in _SHARE_NAMES})
    sample_xyz = frozen_array("sample_xyz", arrays["sample_xyz"], (None, 3), np.float32)
    _require(0 < version < _MAX_VERSION, "version")
    _require(bool((shares.num_points <= _MAX_PIXELS).all()), "num_points")
    _require(bool((shares.num_sampled >= 0).all()), "num_sampled")
    _require(bool((shares.num_sampled <= shares.num_points).all()), "num_sampled")
    _require(int(shares.num_sampled.sum()) == len(sample_xyz), "num_sampled")
    return SmallDepth(
        depth_map=_sound(
            DepthMap(
                frame_id=frame_id,
                pinhole=arrays["pinhole"],
                depth=arrays["depth"],
                relative_error=arrays["relative_error"],
                num_agreeing=arrays["num_agreeing"],
                colors=arrays["colors"],
                neighbour_ids=arrays["neighbour_ids"],
                neighbour_from_keyframe=arrays["neighbour_from_keyframe"],
            )
        ),
        version=version,
        shares=shares,
        sample_xyz=sample_xyz,
        sample_colors=frozen_array(
            "sample_colors", arrays["sample_colors"], (len(sample_xyz), 3), np.uint8
        ),
        border_rays=frozen_array(
            "border_rays", arrays["border_rays"], (8, 3), np.float64, finite=False
        ),
    )


def _png(pixels: np.ndarray[Any, Any]) -> Uint8Array:
    import cv2

    options = [
        cv2.IMWRITE_PNG_COMPRESSION,
        1,
        cv2.IMWRITE_PNG_STRATEGY,
        cv2.IMWRITE_PNG_STRATEGY_RLE,  # a third faster than the default, and no larger
    ]
    _, data = cv2.imencode(".png", pixels, options)
    return np.asarray(data, np.uint8).reshape(-1)


def _jpeg(colors: Uint8Array) -> Uint8Array:
    import cv2

    bgr = np.ascontiguousarray(colors[:, :, ::-1])
    _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return np.asarray(data, np.uint8).reshape(-1)


def _image(data: Uint8Array, shape: tuple[int, int]) -> Any:
    """An encoded image (H, W) or (H, W, 3) as it was.

    Raises:
        ValueError: it is none of that height and width.
    """
    import cv2

    if _encoded_shape(data.tobytes()) != shape:
        raise ValueError(f"no image of {shape} px")
    try:
        pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ValueError("no image") from error
    if pixels is None or pixels.shape[:2] != shape:
        raise ValueError("no image")
    return pixels


def _encoded_shape(data: bytes) -> tuple[int, int] | None:
    """Height and width of a PNG or JPEG by its header, before memory is taken for it."""
    if data.startswith(b"\x89PNG"):
        width, height = struct.unpack(">II", data[_PNG_SIZE])
        return height, width
    place = 2  # of the marker that comes next in a JPEG
    while data[place : place + 1] == b"\xff":
        marker, length = struct.unpack(">BH", data[place + 1 : place + 4])
        if marker in _JPEG_MARKERS:
            height, width = struct.unpack(">HH", data[place + 5 : place + 9])
            return height, width
        place += 2 + length
    return None
