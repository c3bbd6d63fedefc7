"""Dense points of keyframes, fused in the world."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.dense.fusion import FusionLimits, fuse
from engine.dense.keyframe_points import keyframe_points
from engine.dense_types import DensePoints
from tests.support.boxed_ground import depth_map, distance_to_surface, in_world, pose_above
from tests.support.dense_points import concatenate

_NOISE = 0.004  # of a depth of 15: about a third of the distance of points


def test_fusing_noisy_keyframes_gives_thinner_surfaces_and_the_same_ones() -> None:
    chunks = _chunks()
    fused = concatenate(list(fuse(chunks, voxel_size=0.2)))
    before = distance_to_surface(concatenate(chunks).xyz.astype(np.float64))
    after = distance_to_surface(fused.xyz.astype(np.float64))
    assert np.sqrt(np.mean(before**2)) > 0.03
    assert np.sqrt(np.mean(after**2)) < 0.7 * np.sqrt(np.mean(before**2))
    assert np.mean(after < 0.4) > 0.98
    ground = fused.xyz[np.abs(fused.xyz[:, 2]) < 0.5]
    cells = np.unique(np.floor(ground[:, :2] / 0.2), axis=0)
    assert len(ground) < 1.15 * len(cells)  # one layer
    assert len(cells) > 0.9 * 12 * 9 / 0.04


def test_colours_and_normals_are_those_of_the_surface() -> None:
    fused = concatenate(list(fuse(_chunks(), voxel_size=0.2)))
    top = (np.abs(fused.xyz[:, 2] - 3.0) < 0.2) & (np.abs(fused.xyz[:, :2]) < 1.7).all(axis=1)
    assert top.sum() > 200
    assert np.median(fused.normals[top, 2]) > 0.97
    assert np.allclose(np.linalg.norm(fused.normals, axis=1), 1.0, atol=1e-4)


def test_what_one_view_alone_claims_is_left_out_and_a_second_view_confirms_it() -> None:
    ghost = _patch(height=5.0, num_views=1)
    real = _patch(height=0.0, num_views=3)
    alone = concatenate(list(fuse([real, ghost], voxel_size=0.1)))
    assert alone.xyz[:, 2].max() < 0.01
    assert len(alone.xyz) == len(real.xyz)
    confirmed = concatenate(list(fuse([real, ghost, ghost], voxel_size=0.1)))
    assert len(confirmed.xyz) == len(real.xyz) + len(ghost.xyz)


def test_a_finer_view_outweighs_a_coarse_one() -> None:
    near = _patch(height=0.05, num_views=2, sampling=0.1)
    far = _patch(height=0.12, num_views=2, sampling=1.0)
    fused = concatenate(list(fuse([near, far], voxel_size=0.1)))
    assert np.abs(fused.xyz[:, 2] - 0.05).max() < 0.005


def test_surfaces_that_face_apart_stay_apart() -> None:
    front = _patch(height=0.15, num_views=3)
    back = replace(_patch(height=0.05, num_views=3), normals=-front.normals)
    fused = concatenate(list(fuse([front, back], voxel_size=0.1)))
    is_upper = fused.xyz[:, 2] > 0.1
    assert is_upper.sum() == 625
    assert np.allclose(fused.xyz[:, 2], np.where(is_upper, 0.15, 0.05))
    assert (fused.normals[is_upper, 2] == 1).all()


def test_the_voxel_size_comes_from_the_sampling() -> None:
    fused = concatenate(list(fuse([_patch(height=0.0, num_views=2, sampling=0.4)])))
    assert len(fused.xyz) == 7 * 7  # 2.5 by 2.5 in cells of 0.4


def test_a_file_instead_of_memory_changes_nothing(tmp_path: Path) -> None:
    limits = FusionLimits(max_points_in_memory=5000, folder=tmp_path)
    taken = []

    def one_by_one() -> Iterator[DensePoints]:
        for chunk in _chunks():
            taken.append(len(chunk.xyz))
            yield chunk

    in_memory = concatenate(list(fuse(_chunks())))
    from_file = concatenate(list(fuse(one_by_one(), limits=limits)))
    assert sum(taken) > 5000
    assert in_memory.xyz.tobytes() == from_file.xyz.tobytes()
    assert in_memory.colors.tobytes() == from_file.colors.tobytes()
    assert not list(tmp_path.iterdir())


def test_voxels_grow_until_no_more_points_come_out_than_wanted() -> None:
    most = 1500
    fused = list(fuse(_chunks(), voxel_size=0.2, limits=FusionLimits(max_points=most)))
    num_points = sum(len(part.xyz) for part in fused)
    assert most / 5 < num_points <= most


def test_blocks_of_space_leave_no_gap_and_no_double_points() -> None:
    x = np.arange(-300, 300) * 0.1 + 0.05  # over several blocks of 25.6
    xyz = np.stack([x, np.full_like(x, 0.05), np.full_like(x, 0.05)], axis=1)
    fused = concatenate(list(fuse([_points(xyz, num_views=2)], voxel_size=0.1)))
    assert np.allclose(np.sort(fused.xyz[:, 0]), x, atol=1e-5)


def test_voxels_far_finer_than_the_sampling_are_enlarged_and_lose_no_points(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fused = concatenate(list(fuse([_patch(height=0.0, num_views=2)], voxel_size=1e-9)))
    assert len(fused.xyz) == 625
    assert "cells of 1e-09" in caplog.text


def test_points_far_out_do_not_take_all_memory() -> None:
    far = _points(np.array([[1e12, 0.0, 0.0], [1e5, 0.0, 0.0]]), num_views=2)
    fused = concatenate(list(fuse([_patch(height=0.0, num_views=2), far], voxel_size=0.1)))
    assert len(fused.xyz) == 625 + 1  # one is further out than blocks are numbered


def test_nothing_gives_nothing() -> None:
    assert not list(fuse([]))
    assert not list(fuse([_points(np.empty((0, 3)), num_views=2)]))


def _chunks() -> list[DensePoints]:
    """Points of four keyframes that all see the box."""
    chunks = []
    for i, (x, y) in enumerate([(-1.5, -1.0), (1.5, -1.0), (-1.5, 1.0), (1.5, 1.0)]):
        pose = pose_above(x, y, 15.0)
        points = keyframe_points(depth_map(pose, frame_id=i + 1, noise=_NOISE))
        chunks.append(in_world(points, pose))
    return chunks


def _patch(*, height: float, num_views: int, sampling: float = 0.1) -> DensePoints:
    """A level square of 25 by 25 points, 0.1 apart."""
    x, y = np.meshgrid(np.arange(25) * 0.1 + 0.05, np.arange(25) * 0.1 + 0.05)
    xyz = np.stack([x, y, np.full_like(x, height)], axis=-1).reshape(-1, 3)
    return _points(xyz, num_views=num_views, sampling=sampling)


def _points(xyz: np.ndarray, *, num_views: int, sampling: float = 0.1) -> DensePoints:
    num = len(xyz)
    return DensePoints(
        xyz=xyz,
        colors=np.full((num, 3), 100, np.uint8),
        normals=np.tile([0, 0, 1], (num, 1)),
        sampling=np.full(num, sampling, np.float32),
        num_views=np.full(num, num_views, np.uint8),
    )
