"""Dense points of a run, read as a stranger's and laid beside the cameras of a snapshot.

They may be of a former snapshot's world: the map was placed on the globe later, or the run broke
off. Comments of the file say where some keyframes are in the world of its points.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from engine.geometry import camera_center, similarity_between_poses, transform_points
from engine.types import Float64Array

_VERTEX = np.dtype([("xyz", "<f4", 3), ("normal", "<f4", 3), ("rgb", "u1", 3)])
_FIRST_LINES = ["ply", "format binary_little_endian 1.0"]
_LAYOUT = [
    *(f"property float {name}" for name in ("x", "y", "z", "nx", "ny", "nz")),
    *(f"property uchar {name}" for name in ("red", "green", "blue")),
    "end_header",
]
_FRAME, _CAMERA = "frame:", "cam_from_world of keyframe"  # comments begin with
_LEAST_CAMERAS = 3  # in both worlds
_POSE_NUMBERS = 12
_MAX_OFF_RATIO = 0.05  # of the spread of cameras, that half of them may be off at most
_MAX_HEADER_LINES, _MAX_LINE_BYTES = 1_000, 10_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DensePlyHeader:
    """What the header of a ``dense.ply`` says."""

    comments: tuple[str, ...]
    cam_from_world: Mapping[int, Float64Array]  # (3, 4) of some keyframes, in the points' world
    num_points: int
    num_bytes: int  # of the header itself


def read_dense_ply_header(path: Path) -> DensePlyHeader:
    """The header of a file of dense points.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or not a whole one.
    """
    with path.open("rb") as file:
        lines = [file.readline(_MAX_LINE_BYTES)]
        while lines[-1] not in (b"", b"end_header\n") and len(lines) < _MAX_HEADER_LINES:
            lines.append(file.readline(_MAX_LINE_BYTES))
        num_bytes = file.tell()
    words = [line.decode("ascii", "replace").rstrip("\n") for line in lines]
    comments = tuple(one.removeprefix("comment ") for one in words if one.startswith("comment "))
    counts = [one.split()[-1] for one in words if one.startswith("element vertex ")]
    if len(counts) != 1 or not counts[0].isdecimal():
        raise ValueError("it has no number of points")
    num_points = int(counts[0])
    layout = [f"element vertex {num_points}", *_LAYOUT]
    if words[:2] != _FIRST_LINES or words[-len(layout) :] != layout:
        raise ValueError("it is not laid out as dense points of a run")
    if path.stat().st_size != num_bytes + num_points * _VERTEX.itemsize:
        raise ValueError("it is not whole")
    return DensePlyHeader(
        comments=comments,
        cam_from_world=_cameras_of(comments),
        num_points=num_points,
        num_bytes=num_bytes,
    )


def similarity_onto(
    header: DensePlyHeader, onto_cam_from_world: Mapping[int, Float64Array]
) -> Float64Array | None:
    """The similarity [s R | t] (3, 4) from the points' world to another one.

    Args:
        header: of the points.
        onto_cam_from_world: poses (3, 4) in the other world, by keyframe.

    Returns:
        ``onto_from_world``; None where too few keyframes are in both worlds, or they do not lie to
        each other in one as in the other.
    """
    common = [i for i in header.cam_from_world if i in onto_cam_from_world]
    if len(common) < _LEAST_CAMERAS:
        return None
    poses = np.array([header.cam_from_world[i] for i in common])
    onto_poses = np.array([onto_cam_from_world[i] for i in common])
    onto = similarity_between_poses(poses, onto_poses)
    if onto is None:
        return None
    onto_centers = camera_center(onto_poses)
    off = np.linalg.norm(transform_points(onto, camera_center(poses)) - onto_centers, axis=1)
    spread = np.linalg.norm(onto_centers - onto_centers.mean(axis=0), axis=1)
    return onto if np.median(off) <= _MAX_OFF_RATIO * spread.max() else None


def header_of_moved(header: DensePlyHeader, *, frame: str) -> bytes:
    """The header of a file of the same points in another world.

    Args:
        header: of the points.
        frame: what the other world is, in words.
    """
    others = (one for one in header.comments if not one.startswith((_FRAME, _CAMERA, "-")))
    lines = [
        *_FIRST_LINES,
        f"comment {_FRAME} {frame}",
        *(f"comment {one}" for one in others),
        f"element vertex {header.num_points}",
        *_LAYOUT,
    ]
    return "".join(f"{line}\n" for line in lines).encode("ascii", "replace")


def read_moved_vertices(
    file: BinaryIO, num_points: int, onto_from_world: Float64Array
) -> NDArray[np.void]:
    """The next points of a file, in another world.

    Args:
        file: of dense points, behind its header.
        num_points: how many.
        onto_from_world: a similarity [s R | t] (3, 4).

    Returns:
        ``xyz``, ``normal`` and ``rgb`` of each.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is cut short.
    """
    vertices = np.frombuffer(file.read(num_points * _VERTEX.itemsize), _VERTEX).copy()
    if len(vertices) != num_points:
        raise ValueError("it is not whole")
    rotation = onto_from_world[:, :3] / np.cbrt(np.linalg.det(onto_from_world[:, :3]))
    turn = np.column_stack([rotation, np.zeros(3)])
    for name, onto in (("xyz", onto_from_world), ("normal", turn)):
        vertices[name] = transform_points(onto, vertices[name].astype(np.float64))
    return vertices


def _cameras_of(comments: Iterable[str]) -> dict[int, Float64Array]:
    """The poses in comments.

    Raises:
        ValueError: one of them is none.
    """
    poses: dict[int, Float64Array] = {}
    for comment in comments:
        if comment.startswith(_CAMERA):
            frame_id, *numbers = comment.removeprefix(_CAMERA).split()
            pose = np.array([float(number) for number in numbers])
            if len(pose) != _POSE_NUMBERS or not np.isfinite(pose).all():
                raise ValueError("it has a pose that is none")
            poses[int(frame_id)] = pose.reshape(3, 4)
    return poses
