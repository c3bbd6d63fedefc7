"""``products/dense.ply``, read back as splat trainers do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.dense_types import DensePoints, KeyframePoses
from engine.output.dense_ply import camera_comments, write_dense_ply


def _points(num: int) -> DensePoints:
    rng = np.random.default_rng(num)
    return DensePoints(
        xyz=rng.normal(size=(num, 3)).astype(np.float32),
        colors=rng.integers(0, 256, (num, 3)).astype(np.uint8),
        normals=np.tile([0, 1, 0], (num, 1)),
        sampling=np.ones(num, np.float32),
        num_views=np.full(num, 2, np.uint8),
    )


def _read(path: Path) -> tuple[list[str], np.ndarray]:
    """Header lines, and vertices by the header's own types."""
    data = path.read_bytes()
    end = data.index(b"end_header\n") + len(b"end_header\n")
    lines = data[:end].decode("ascii").splitlines()
    types = {"float": "<f4", "uchar": "u1"}
    properties = [line.split()[1:] for line in lines if line.startswith("property")]
    vertex = np.dtype([(name, types[kind]) for kind, name in properties])
    return lines, np.frombuffer(data[end:], vertex)


def test_points_are_read_back_under_the_names_that_trainers_use(tmp_path: Path) -> None:
    parts = [_points(5), _points(0), _points(7)]
    num = write_dense_ply(tmp_path / "dense.ply", parts, comments=["verdict: good\nreally"])
    lines, vertices = _read(tmp_path / "dense.ply")
    assert num == len(vertices) == 12
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    assert "element vertex 12" in lines
    assert "comment verdict: good really" in lines
    names = ("x", "y", "z", "nx", "ny", "nz", "red", "green", "blue")
    assert vertices.dtype.names == names
    xyz = np.stack([vertices[name] for name in "xyz"], axis=1)
    assert np.array_equal(xyz, np.concatenate([part.xyz for part in parts]))
    assert np.array_equal(vertices["green"][5:], parts[2].colors[:, 1])
    assert (vertices["ny"] == 1).all()


def test_the_header_says_where_some_keyframes_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    poses = KeyframePoses(
        frame_ids=np.arange(40) + 7,
        cam_from_world=rng.normal(size=(40, 3, 4)),
        focal_px=np.ones(40),
        border_rays=np.full((40, 8, 3), np.nan),
    )
    write_dense_ply(tmp_path / "dense.ply", [], comments=camera_comments(poses))
    prefix = "comment cam_from_world of keyframe "
    lines = _read(tmp_path / "dense.ply")[0]
    cameras = [line.removeprefix(prefix).split() for line in lines if line.startswith(prefix)]
    assert 10 <= len(cameras) <= 16
    for frame_id, *numbers in cameras:
        expected = poses.by_id()[int(frame_id)].ravel()
        np.testing.assert_allclose([float(one) for one in numbers], expected, rtol=1e-11)


def test_pycolmap_and_opencv_free_readers_need_no_list_of_faces(tmp_path: Path) -> None:
    write_dense_ply(tmp_path / "dense.ply", [])
    lines, vertices = _read(tmp_path / "dense.ply")
    assert len(vertices) == 0
    assert sum(line.startswith("element") for line in lines) == 1


def test_a_failure_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "dense.ply"
    write_dense_ply(path, [_points(3)])

    def broken() -> Iterator[DensePoints]:
        yield _points(4)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_dense_ply(path, broken())
    assert len(_read(path)[1]) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["dense.ply"]
