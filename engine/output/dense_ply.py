"""``products/dense.ply``: dense points in binary PLY, as splat trainers read points3D.ply.

Comments of its header say which world the points are in: where some keyframes are in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from engine.dense_types import DensePoints, KeyframePoses
from engine.output.files import written_atomically

DENSE_PLY_NAME = "dense.ply"
_VERTEX = np.dtype(
    [
        *((name, "<f4") for name in ("x", "y", "z", "nx", "ny", "nz")),
        *((name, "u1") for name in ("red", "green", "blue")),
    ]
)
_TYPE_NAMES = {"f": "float", "u": "uchar"}
_COUNT_DIGITS = 12
_CAMERA = "cam_from_world of keyframe"  # such a comment begins with it
_NUM_CAMERAS = 16


def camera_comments(poses: KeyframePoses) -> list[str]:
    """Comments that say where some keyframes are in the world of the points."""
    step = -(-len(poses.frame_ids) // _NUM_CAMERAS) or 1
    return [
        f"{_CAMERA} {frame_id} {' '.join(f'{number:.12g}' for number in pose.ravel().tolist())}"
        for frame_id, pose in zip(
            poses.frame_ids[::step].tolist(), poses.cam_from_world[::step], strict=True
        )
    ]


def write_dense_ply(
    path: Path, parts: Iterable[DensePoints], *, comments: Sequence[str] = ()
) -> int:
    """Writes points part by part; the file replaces a former one when it is whole.

    Args:
        path: of the file, in a folder that exists.
        parts: taken one after the other.
        comments: lines of the header, such as the verdict on the map.

    Returns:
        The number of points.

    Raises:
        OSError: it cannot be written; the former file is untouched.
    """
    num_points = 0
    with written_atomically(path) as file:
        file.write(_header(num_points, comments))
        for part in parts:
            file.write(_vertices(part).tobytes())
            num_points += len(part.xyz)
        file.seek(0)
        file.write(_header(num_points, comments))
    return num_points


def _header(num_points: int, comments: Sequence[str]) -> bytes:
    """A header of the same length for any number of points."""
    count = str(num_points)
    lines = [
        "ply",
        "format binary_little_endian 1.0",
        *(f"comment {' '.join(comment.split())}" for comment in comments),
        f"comment {'-' * (_COUNT_DIGITS - len(count))}",
        f"element vertex {count}",
        *(f"property {_TYPE_NAMES[_VERTEX[name].kind]} {name}" for name in _VERTEX.names or ()),
        "end_header",
    ]
    return "".join(f"{line}\n" for line in lines).encode("ascii", "replace")


def _vertices(points: DensePoints) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    vertices = np.empty(len(points.xyz), _VERTEX)
    for axis, name in enumerate("xyz"):
        vertices[name] = points.xyz[:, axis]
        vertices[f"n{name}"] = points.normals[:, axis]
    for channel, name in enumerate(("red", "green", "blue")):
        vertices[name] = points.colors[:, channel]
    return vertices
