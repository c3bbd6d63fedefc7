"""Matches that stay while the camera moves: fixed to it, or as far away as that."""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import TwoViewConfig
from engine.estimators.stationary_matches import MotionEvidence, verify_by_motion
from engine.estimators.two_view_geometry import PairVerifier
from engine.geometry import rotation_from_vector, transform_points
from engine.types import Float64Array, FrameId, ImagePair, PairMatches
from tests.support.overlays import marks

SIZE = (1000, 750)
FOCAL_PX = 800.0
VERIFIER = PairVerifier(image_size=SIZE, config=TwoViewConfig())
LOGO = marks((780, 40, 960, 120))


def scattered(num: int = 400, *, near: float = 6.0, far: float = 20.0) -> Float64Array:
    """Points (num, 3) all over the first view, at depths from near to far."""
    rng = np.random.default_rng(1)
    depth = rng.uniform(near, far, num)
    xy = (rng.uniform((20, 20), (980, 730), (num, 2)) - (500, 375)) / FOCAL_PX
    return np.column_stack([xy * depth[:, None], depth])


def seen(points: Float64Array, pose: Float64Array, *, seed: int) -> Float64Array:
    in_cam = transform_points(pose, points)
    noise_px = np.random.default_rng(seed).normal(scale=0.3, size=(len(points), 2))
    return FOCAL_PX * in_cam[:, :2] / in_cam[:, 2:] + (500, 375) + noise_px


def pose(*, turn: tuple[float, float, float], shift: tuple[float, float, float]) -> Float64Array:
    return np.column_stack([rotation_from_vector(np.array(turn)), np.array(shift)])


def find(
    points: Float64Array, second: Float64Array, fixed_xy: Float64Array
) -> tuple[MotionEvidence | None, int]:
    """What is found in a pair of views of points with fixed marks, which come last."""
    points1_xy = np.vstack([seen(points, np.eye(4)[:3], seed=2), fixed_xy])
    points2_xy = np.vstack([seen(points, second, seed=3), fixed_xy])
    rows = np.arange(len(points1_xy))
    matches = PairMatches(
        pair=ImagePair(FrameId(1), FrameId(2)),
        matches_idx=np.column_stack([rows, rows]),
        points1_xy=points1_xy,
        points2_xy=points2_xy,
        confidence=np.ones(len(rows), np.float32),
    )
    found = verify_by_motion(matches, verifier=VERIFIER)
    if found is None:
        return None, len(points)
    verified, evidence = found
    assert not np.isin(verified.inliers.matches_idx[:, 0], rows[evidence.is_fixed]).any()
    return evidence if evidence.is_fixed.any() else None, len(points)


@pytest.mark.parametrize("num_moving", [400, 30])
def test_marks_are_found_even_where_they_are_most_of_the_matches(num_moving: int) -> None:
    second = pose(turn=(0.02, 0.05, 0.01), shift=(-1.0, 0.1, 0.2))
    found, num = find(scattered(num_moving), second, LOGO)
    assert found is not None
    assert found.is_fixed[num:].mean() > 0.9
    assert not found.is_fixed[:num].any()
    assert found.is_moving[:num].mean() > 0.8
    assert not found.is_moving[num:].any()


NOTHING = np.empty((0, 2))


@pytest.mark.parametrize(
    ("points", "second"),
    [
        pytest.param(
            np.vstack([scattered(), scattered(200, near=1e5, far=1e6)]),
            pose(turn=(0, 0, 0), shift=(0, 0, -2.0)),
            id="flying straight ahead, the horizon stays",
        ),
        pytest.param(
            np.vstack([scattered(), scattered(200, near=1e5, far=1e6)]),
            pose(turn=(0, 0, 0), shift=(-1.5, 0, 0)),
            id="driving by, the mountains stay",
        ),
        pytest.param(
            scattered(600, near=9.0, far=11.0),
            pose(turn=(0, 0.2, 0), shift=(-10 * np.sin(0.2), 0, 10 * (1 - np.cos(0.2)))),
            id="around an object, its middle stays",
        ),
        pytest.param(
            scattered(), pose(turn=(0, 0, 0.3), shift=(0, 0, 0)), id="rolling, the middle stays"
        ),
        pytest.param(scattered(), pose(turn=(0, 0, 0), shift=(-0.005, 0, 0)), id="nearly still"),
        pytest.param(scattered(), np.eye(4)[:3], id="a tripod"),
    ],
)
def test_points_of_the_world_that_stay_are_not_found(
    points: Float64Array, second: Float64Array
) -> None:
    assert find(points, second, NOTHING)[0] is None


def test_far_points_beside_a_plane_are_not_found_when_the_camera_only_shifts() -> None:
    plane = scattered(400, near=8.0, far=8.0 + 1e-6)
    far = scattered(100, near=1e5, far=1e6)
    shifted = pose(turn=(0, 0, 0), shift=(-0.8, 0.1, 0))
    assert find(np.vstack([plane, far]), shifted, NOTHING)[0] is None


def test_marks_before_a_plane_are_found_when_the_camera_turns() -> None:
    plane = scattered(400, near=8.0, far=8.0 + 1e-6)
    found = [
        find(plane, pose(turn=(0.03, 0.08, roll), shift=(-0.8, 0.1, 0)), LOGO)[0]
        for roll in (0.05, 0.1, -0.08)
    ]
    # One plane leaves the epipolar geometry open, and it may fit a mark by chance.
    assert any(one is not None and one.is_fixed[-len(LOGO) :].any() for one in found)


def test_marks_alone_are_not_found_without_motion_that_agrees() -> None:
    rng = np.random.default_rng(4)
    num = 60
    points1_xy = np.vstack([rng.uniform((0, 0), SIZE, (num, 2)), LOGO])
    points2_xy = np.vstack([rng.uniform((0, 0), SIZE, (num, 2)), LOGO])
    rows = np.arange(len(points1_xy))
    matches = PairMatches(
        pair=ImagePair(FrameId(1), FrameId(2)),
        matches_idx=np.column_stack([rows, rows]),
        points1_xy=points1_xy,
        points2_xy=points2_xy,
        confidence=np.ones(len(rows), np.float32),
    )
    assert verify_by_motion(matches, verifier=VERIFIER) is None
