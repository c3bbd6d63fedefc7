"""Depth maps and dense points of keyframes on disk, a NumPy archive each: ``dense/000123.npz``.

A depth map of 640 x 480 px takes about 0.8 MB: depths as 16 bit logarithms, which PNG would make
smaller by 0.25 MB for twice the CPU time of all else; votes as PNG, errors as PNG of half the size,
colours as JPEG. Points are kept as they are, 23 bytes each.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from engine.dense.dense_map import Shares, SmallDepth
from engine.dense_types import DensePoints, DepthMap
from engine.errors import JournalError
from engine.output.files import temporary_sibling
from engine.output.run_folder import DENSE_FOLDER
from engine.types import Float32Array, FrameId, Uint8Array

_VERSION = 2
_JPEG_QUALITY = 90
_NUM_LEVELS = 65534  # of a logarithm of depth, from the nearest to the farthest
_NORMAL_SCALE = 127.0
_ERROR_LEVELS_PER_E = 24.0  # of a logarithm of relative errors, 4 % apart
_ERROR_LEAST = 1e-5
_SHARE_NAMES = ("other_ids", "other_versions", "others_from_own", "num_points", "num_sampled")
Part = TypeVar("Part")

_BROKEN = (OSError, LookupError, ValueError, TypeError, EOFError, zipfile.BadZipFile)


class DepthStore:
    """A ``DepthStorage`` in the folder of a run. One thread at a time.

    Args:
        run_path: where the run folder is at present.
    """

    def __init__(self, run_path: Callable[[], Path]) -> None:
        self._run_path = run_path

    def frame_ids(self) -> list[FrameId]:
        """Keyframes that it has, in order."""
        names = (path.stem for path in self._folder().glob("*.npz"))
        return sorted(FrameId(int(name)) for name in names if name.isdecimal())

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
            temporary.replace(path)  # after a power cut it may be broken, and is made again
        except OSError as error:
            raise JournalError(f"{path}: cannot be written: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def depth_map(self, frame_id: FrameId) -> DepthMap | None:
        """The whole depth map of a keyframe; None where it cannot be read any more."""
        return self._read(frame_id, "map", lambda arrays: _unpacked_map(frame_id, arrays))

    def points(self, frame_id: FrameId) -> DensePoints | None:
        """All points of a keyframe; None where they cannot be read any more."""
        return self._read(frame_id, "points", _unpacked_points)

    def small(self, frame_id: FrameId) -> SmallDepth | None:
        """What of a keyframe stays in memory; None where it cannot be read any more."""
        return self._read(frame_id, "small", lambda arrays: _small_of(frame_id, arrays))

    def _read(
        self, frame_id: FrameId, prefix: str, unpack: Callable[[Mapping[str, Any]], Part]
    ) -> Part | None:
        try:
            with (
                self._path(frame_id).open("rb") as file,
                np.load(file, allow_pickle=False) as archive,
            ):
                if int(archive["version"]) != _VERSION:
                    return None
                names = [name for name in archive.files if name.startswith(f"{prefix}_")]
                return unpack({name.removeprefix(f"{prefix}_"): archive[name] for name in names})
        except _BROKEN:
            return None

    def _folder(self) -> Path:
        return self._run_path() / DENSE_FOLDER

    def _path(self, frame_id: FrameId) -> Path:
        return self._folder() / f"{int(frame_id):06d}.npz"


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
    depth = _depth_of_levels(arrays["depth"], nearest, farthest)
    error = _error_of_levels(_image(arrays["relative_error"])).repeat(2, axis=0).repeat(2, axis=1)
    error = error[: depth.shape[0], : depth.shape[1]]
    return DepthMap(
        frame_id=frame_id,
        pinhole=arrays["pinhole"],
        depth=depth,
        relative_error=np.where(depth > 0, error, np.float32(0.0)),
        num_agreeing=_image(arrays["num_agreeing"]),
        colors=_image(arrays["colors"])[:, :, ::-1],
        neighbour_ids=arrays["neighbour_ids"],
        neighbour_from_keyframe=arrays["neighbour_from_keyframe"],
    )


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
    return SmallDepth(
        depth_map=DepthMap(
            frame_id=frame_id,
            pinhole=arrays["pinhole"],
            depth=arrays["depth"],
            relative_error=arrays["relative_error"],
            num_agreeing=arrays["num_agreeing"],
            colors=arrays["colors"],
            neighbour_ids=arrays["neighbour_ids"],
            neighbour_from_keyframe=arrays["neighbour_from_keyframe"],
        ),
        version=int(arrays["version"]),
        shares=Shares(**{name: arrays[f"share_{name}"] for name in _SHARE_NAMES}),
        sample_xyz=arrays["sample_xyz"],
        sample_colors=arrays["sample_colors"],
        border_rays=arrays["border_rays"],
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


def _image(data: Uint8Array) -> Any:
    """An encoded image as it was.

    Raises:
        ValueError: it is none.
    """
    import cv2

    pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    if pixels is None:
        raise ValueError("no image")
    return pixels
