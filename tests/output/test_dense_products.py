"""Products of the dense map say which world they are in, and what is said against the map."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.config import DenseConfig
from engine.dense_types import DensePoints, KeyframePoses
from engine.output.dense_products import DENSE_PLY, DenseWorld, write_dense_points
from engine.types import Verdict, VerdictLevel
from tests.support.verdicts import verdict_of

POSES = KeyframePoses(
    frame_ids=np.array([1]),
    cam_from_world=np.eye(4)[None, :3],
    focal_px=np.array([100.0]),
    border_rays=np.tile([0.0, 0.0, 1.0], (1, 8, 1)),
)
WORLD = DenseWorld(poses=POSES, origin=None, verdict=Verdict())


def wall() -> DensePoints:
    x, y = np.meshgrid(np.linspace(-1.0, 1.0, 40), np.linspace(-1.0, 1.0, 40))
    num = x.size
    return DensePoints(
        xyz=np.column_stack([x.ravel(), y.ravel(), np.full(num, 5.0)]).astype(np.float32),
        colors=np.full((num, 3), 90, np.uint8),
        normals=np.tile(np.array([0.0, 0.0, -1.0], np.float32), (num, 1)),
        sampling=np.full(num, 0.05, np.float32),
        num_views=np.full(num, 3, np.uint8),
    )


def header(path: Path) -> str:
    return path.read_bytes().partition(b"end_header")[0].decode("ascii")


@pytest.mark.parametrize("level", [VerdictLevel.DOUBTFUL, VerdictLevel.WRONG])
def test_points_of_a_map_that_may_be_wrong_say_so(tmp_path: Path, level: VerdictLevel) -> None:
    verdict = verdict_of(level)
    assert verdict.reasons
    num = write_dense_points(tmp_path, [wall()], replace(WORLD, verdict=verdict), DenseConfig())
    assert num > 500
    words = header(tmp_path / DENSE_PLY)
    assert f"comment verdict on the map: {level.value}" in words
    assert all(f"comment {reason.sentence}" in words for reason in verdict.reasons)


def test_points_of_a_good_map_say_that_too(tmp_path: Path) -> None:
    write_dense_points(tmp_path, [wall()], WORLD, DenseConfig())
    assert "comment verdict on the map: good" in header(tmp_path / DENSE_PLY)
