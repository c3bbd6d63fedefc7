"""Depth maps after the poses have changed that they were made with."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from engine.dense.following import depth_change, scaled_depth_map
from engine.dense_types import DepthMap
from engine.types import Float64Array, FrameId
from tests.support.depth_scenes import BOX, PINHOLE, WALL, pose_at, render

POSES = np.stack([pose_at((1.0, 0.0, 0.0)), pose_at((-0.8, 0.2, 0.1))])
ERROR = 0.003


@pytest.fixture(scope="module")
def depth_map() -> DepthMap:
    rendered = render([WALL, BOX], pose_at((0.0, 0.0, 0.0)), PINHOLE)
    known = np.isfinite(rendered.depth)
    return DepthMap(
        frame_id=FrameId(1),
        pinhole=np.array(PINHOLE.params),
        depth=np.where(known, rendered.depth, 0.0),
        relative_error=np.where(known, ERROR, 0.0),
        num_agreeing=known.astype(np.uint8),
        colors=rendered.pixels,
        neighbour_ids=np.array([2, 3]),
        neighbour_from_keyframe=POSES,
    )


def turned(poses: Float64Array, degrees: float) -> Float64Array:
    turn, _ = cv2.Rodrigues(np.array([0.0, np.deg2rad(degrees), 0.0]))
    return np.asarray(turn @ poses)


def test_unchanged_poses_change_nothing(depth_map: DepthMap) -> None:
    change = depth_change(depth_map, POSES)
    assert change is not None
    assert change.depth_factor == pytest.approx(1.0, abs=1e-6)
    assert change.error_ratio < 1e-3


@pytest.mark.parametrize("factor", [0.02, 0.5, 1.1, 40.0])
def test_another_unit_is_followed_exactly(depth_map: DepthMap, factor: float) -> None:
    poses = POSES.copy()
    poses[:, :, 3] *= factor
    change = depth_change(depth_map, poses)
    assert change is not None
    assert change.depth_factor == pytest.approx(factor, rel=1e-6)
    assert change.error_ratio < 1e-3
    scaled = scaled_depth_map(depth_map, change.depth_factor)
    assert np.allclose(scaled.depth, depth_map.depth * factor, rtol=1e-5)
    again = depth_change(scaled, poses)
    assert again is not None
    assert again.depth_factor == pytest.approx(1.0, abs=1e-6)


def test_a_turned_neighbour_puts_depth_off_by_more_than_its_error(depth_map: DepthMap) -> None:
    little = depth_change(depth_map, turned(POSES, 0.005))
    much = depth_change(depth_map, turned(POSES, 0.5))
    assert little is not None
    assert much is not None
    assert 0.0 < little.error_ratio < 0.5
    # Half a degree at a parallax of 8 to 11 degrees.
    assert 0.02 < much.error_ratio * ERROR < 0.15


def test_a_neighbour_without_a_pose_does_not_count(depth_map: DepthMap) -> None:
    poses = POSES.copy()
    poses[:, :, 3] *= 2.0
    poses[1] = np.nan
    change = depth_change(depth_map, poses)
    assert change is not None
    assert change.depth_factor == pytest.approx(2.0, rel=1e-6)
    assert depth_change(depth_map, np.full_like(POSES, np.nan)) is None


def test_neighbours_that_fell_onto_the_keyframe_leave_nothing_to_triangulate(
    depth_map: DepthMap,
) -> None:
    poses = POSES.copy()
    poses[:, :, 3] = 0.0
    assert depth_change(depth_map, poses) is None
