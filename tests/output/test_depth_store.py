"""Depth maps and points on disk: what is read back, and what cannot be."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from engine.dense.dense_map import Shares, SmallDepth, small_depth
from engine.dense_types import DensePoints, DepthMap
from engine.errors import JournalError
from engine.output.depth_store import DepthStore
from engine.types import FrameId

SHAPE = (75, 101)  # odd on purpose
ID = FrameId(12)
RAYS = np.vstack([np.eye(3), np.full((5, 3), np.nan)])


def depth_map(frame_id: FrameId = ID) -> DepthMap:
    """Depths from 1 to 100, a tenth of them unknown."""
    rng = np.random.default_rng(0)
    known = rng.random(SHAPE) > 0.1
    return DepthMap(
        frame_id=frame_id,
        pinhole=np.array([90.0, 91.0, 50.0, 37.0]),
        depth=np.where(known, np.exp(rng.uniform(0.0, np.log(100.0), SHAPE)), 0).astype(np.float32),
        relative_error=np.where(known, 0.003, 0.0).astype(np.float32),
        num_agreeing=np.where(known, rng.integers(1, 5, SHAPE), 0).astype(np.uint8),
        colors=np.tile(np.linspace(0, 255, SHAPE[1])[None, :, None], (SHAPE[0], 1, 3)).astype(
            np.uint8
        ),
        neighbour_ids=np.array([3, 14]),
        neighbour_from_keyframe=np.random.default_rng(1).standard_normal((2, 3, 4)),
    )


def some_points(num: int = 300) -> DensePoints:
    rng = np.random.default_rng(2)
    normals = rng.standard_normal((num, 3))
    return DensePoints(
        xyz=rng.standard_normal((num, 3)).astype(np.float32),
        colors=rng.integers(0, 256, (num, 3), dtype=np.uint8),
        normals=(normals / np.linalg.norm(normals, axis=1, keepdims=True)).astype(np.float32),
        sampling=rng.uniform(0.01, 0.02, num).astype(np.float32),
        num_views=rng.integers(1, 9, num, dtype=np.uint8),
    )


def few_of(one: DepthMap, points: DensePoints) -> SmallDepth:
    num_left = len(points.xyz) // 3
    shares = Shares(
        other_ids=np.array([7]),
        other_versions=np.array([3]),
        others_from_own=np.eye(4)[None, :3],
        num_points=np.array([len(points.xyz) - num_left, num_left]),
        num_sampled=np.zeros(2, np.int64),
    )
    return small_depth(one, points, shares, version=5, border_rays=RAYS)


@pytest.fixture
def store(tmp_path: Path) -> DepthStore:
    return DepthStore(lambda: tmp_path)


def written(store: DepthStore, frame_id: FrameId = ID) -> None:
    one, points = depth_map(frame_id), some_points()
    store.write(one, points, few_of(one, points))


def test_depth_is_read_back_within_a_small_share_of_its_error(store: DepthStore) -> None:
    written(store)
    before, after = depth_map(), store.depth_map(ID)
    assert after is not None
    known = before.depth > 0
    assert np.array_equal(after.depth > 0, known)
    assert np.abs(after.depth[known] / before.depth[known] - 1.0).max() < 1e-4
    assert np.abs(after.relative_error[known] / 0.003 - 1.0).max() < 0.05
    assert not after.relative_error[~known].any()
    assert np.array_equal(after.num_agreeing, before.num_agreeing)
    assert np.abs(after.colors.astype(int) - before.colors).max() < 16
    assert np.array_equal(after.neighbour_from_keyframe, before.neighbour_from_keyframe)
    assert after.frame_id == ID


def test_points_and_what_stays_in_memory_are_read_back(store: DepthStore) -> None:
    written(store)
    points, small = store.points(ID), store.small(ID)
    assert points is not None
    assert np.array_equal(points.xyz, some_points().xyz)
    assert np.abs(points.normals - some_points().normals).max() < 0.01
    assert np.allclose(np.linalg.norm(points.normals, axis=1), 1.0, atol=1e-5)
    assert small is not None
    assert small.version == 5
    assert small.shares.other_ids.tolist() == [7]
    assert small.shares.other_versions.tolist() == [3]
    assert np.array_equal(small.shares.others_from_own[0], np.eye(4)[:3])
    assert small.shares.num_points.tolist() == [200, 100]
    assert small.shares.num_sampled.tolist() == [200, 100]
    assert {*map(tuple, small.sample_xyz[:200])} == {*map(tuple, points.xyz[:200])}
    assert np.array_equal(small.border_rays, RAYS, equal_nan=True)
    assert len(small.sample_xyz) == 300
    assert np.array_equal(np.unique(small.sample_xyz, axis=0), np.unique(points.xyz, axis=0))


def test_a_depth_map_without_any_depth_is_one_too(store: DepthStore) -> None:
    full, points = depth_map(), some_points(0)
    nothing = np.zeros(SHAPE, np.float32)
    empty = DepthMap(
        frame_id=ID,
        pinhole=full.pinhole,
        depth=nothing,
        relative_error=nothing,
        num_agreeing=nothing.astype(np.uint8),
        colors=full.colors,
        neighbour_ids=full.neighbour_ids,
        neighbour_from_keyframe=full.neighbour_from_keyframe,
    )
    store.write(empty, points, few_of(empty, points))
    read = store.depth_map(ID)
    assert read is not None
    assert not read.depth.any()
    assert store.points(ID) is not None


def test_keyframes_come_in_order_and_other_files_are_left_alone(
    store: DepthStore, tmp_path: Path
) -> None:
    assert store.frame_ids() == []
    for frame_id in (30, 4, 1_000_001):
        written(store, FrameId(frame_id))
    (tmp_path / "dense" / "notes.npz").write_bytes(b"")
    assert store.frame_ids() == [4, 30, 1_000_001]


def test_the_small_copy_has_the_depth_that_its_pixels_have(store: DepthStore) -> None:
    one = depth_map()
    few = few_of(one, some_points()).depth_map
    focal, _, center_x, center_y = one.pinhole
    few_focal, _, few_x, few_y = few.pinhole
    for line, column in ((0, 0), (3, 5)):
        assert few.depth[line, column] == one.depth[8 + 16 * line, 8 + 16 * column]
        ray = (8 + 16 * column + 0.5 - center_x) / focal
        assert (column + 0.5 - few_x) / few_focal == pytest.approx(ray)
        ray_y = (8 + 16 * line + 0.5 - center_y) / one.pinhole[1]
        assert (line + 0.5 - few_y) / few.pinhole[1] == pytest.approx(ray_y)


@pytest.mark.parametrize("num_bytes", [0, 10, 500, 4000])
def test_a_file_that_was_cut_off_is_as_if_it_were_not_there(
    store: DepthStore, tmp_path: Path, num_bytes: int
) -> None:
    written(store)
    path = tmp_path / "dense" / "000012.npz"
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert (store.depth_map(ID), store.points(ID), store.small(ID)) == (None, None, None)


def test_a_file_of_another_kind_is_as_if_it_were_not_there(
    store: DepthStore, tmp_path: Path
) -> None:
    (tmp_path / "dense").mkdir()
    np.savez(tmp_path / "dense" / "000012.npz", version=np.array(99))
    assert store.small(ID) is None
    assert store.depth_map(FrameId(13)) is None


def changed(path: Path, name: str, value: object) -> None:
    """Writes an archive again with one array in place of another."""
    with np.load(path) as archive:
        arrays = {one: archive[one] for one in archive.files}
    np.savez(path, **{**arrays, name: np.asarray(value)})


def with_header(path: Path, member: str, header: bytes) -> None:
    """Writes an archive again with another header, of the same length, of one of its arrays."""
    with zipfile.ZipFile(path) as archive:
        members = {one: archive.read(one) for one in archive.namelist()}
    start = members[member].index(b"{")
    length = members[member].index(b"\n") - start
    assert len(header) <= length
    members[member] = (
        members[member][:start] + header.ljust(length) + members[member][start + length :]
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def test_a_header_of_an_array_larger_than_its_file_takes_no_memory(
    store: DepthStore, tmp_path: Path
) -> None:
    written(store)
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000, 10000000)}"
    with_header(tmp_path / "dense" / "000012.npz", "small_depth.npy", header)
    assert store.small(ID) is None
    assert store.depth_map(ID) is not None


def test_an_unknown_compression_is_as_if_the_file_were_not_there(
    store: DepthStore, tmp_path: Path
) -> None:
    written(store)
    path = tmp_path / "dense" / "000012.npz"
    data = bytearray(path.read_bytes())
    start = 0
    while (start := data.find(b"PK\x01\x02", start)) >= 0:  # members of the table of contents
        data[start + 10 : start + 12] = (97).to_bytes(2, "little")
        start += 4
    path.write_bytes(data)
    assert (store.depth_map(ID), store.points(ID), store.small(ID)) == (None, None, None)


def test_a_fifo_in_place_of_depth_blocks_nobody(store: DepthStore, tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    os.mkfifo(tmp_path / "dense" / "000012.npz")
    assert store.small(ID) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("small_version", 0),
        ("small_border_rays", np.zeros((7, 3))),
        ("small_share_others_from_own", np.full((1, 3, 4), math.nan)),
        ("small_share_num_sampled", [301, -1]),
        ("small_pinhole", [0.0, 91.0, 50.0, 37.0]),
        ("small_pinhole", [math.nan, 91.0, 50.0, 37.0]),
        ("small_sample_xyz", np.zeros((5, 2), np.float32)),
        ("small_share_num_points", [1, 100]),
        ("small_share_num_points", [2**60, 100]),
        ("small_neighbour_from_keyframe", np.zeros((2, 3, 4))),
        ("small_depth", np.full((5, 6), -1.0, np.float32)),
        ("small_depth", np.full((5, 6), "pickled", object)),
    ],
)
def test_values_that_cannot_be_are_as_if_the_file_were_not_there(
    store: DepthStore, tmp_path: Path, name: str, value: object
) -> None:
    written(store)
    changed(tmp_path / "dense" / "000012.npz", name, value)
    assert store.small(ID) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("map_range", [0.0, 100.0]),
        ("map_range", [1.0, math.inf]),
        ("map_depth", np.zeros((0, 101), np.uint16)),
        ("map_depth", np.zeros((10, 10), np.uint16)),
        ("map_num_agreeing", np.zeros(20, np.uint8)),
        ("map_colors", np.frombuffer(b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff", np.uint8)),
        ("map_relative_error", np.zeros(0, np.uint8)),
    ],
)
def test_a_depth_map_that_cannot_be_is_as_if_the_file_were_not_there(
    store: DepthStore, tmp_path: Path, name: str, value: object
) -> None:
    written(store)
    changed(tmp_path / "dense" / "000012.npz", name, value)
    assert store.depth_map(ID) is None
    assert store.small(ID) is not None


def test_what_cannot_be_written_leaves_the_former_file(
    store: DepthStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(store)
    before = (tmp_path / "dense" / "000012.npz").read_bytes()

    def is_full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", is_full)
    with pytest.raises(JournalError, match="No space left"):
        written(store)
    assert [path.name for path in (tmp_path / "dense").iterdir()] == ["000012.npz"]
    assert (tmp_path / "dense" / "000012.npz").read_bytes() == before


def test_a_run_that_let_go_of_its_folder_meanwhile_changes_nothing_there(tmp_path: Path) -> None:
    paths: list[Path] = [tmp_path]
    let_go = DepthStore(paths.pop)
    written(DepthStore(lambda: tmp_path))
    before = (tmp_path / "dense" / "000012.npz").read_bytes()
    with pytest.raises(IndexError):
        written(let_go)
    assert (tmp_path / "dense" / "000012.npz").read_bytes() == before
    assert len(list((tmp_path / "dense").iterdir())) == 1
