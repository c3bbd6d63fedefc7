"""Depth maps from what a matcher sees, such as pointmaps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from engine.dense.depth import DepthOptions, estimate_depth
from engine.dense_types import DenseImage, DepthMap, DepthProblem, DepthStatus, SeenDepth
from engine.errors import InferenceError
from engine.types import Float32Array, FrameId, Intrinsics
from tests.support.depth_scenes import (
    BOX,
    FISHEYE,
    PINHOLE,
    WALL,
    Rendered,
    pose_at,
    problem_of,
    relative_errors,
)

OPTIONS = DepthOptions(edge_px=512, num_neighbours=2)
POSES = [pose_at((0.0, 0.0, 0.0)), pose_at((1.0, 0.0, 0.0)), pose_at((-0.8, 0.1, 0.0))]
UNIT = 7.3  # of the matcher, in the map's

See = Callable[[FrameId, FrameId], SeenDepth | None]


def seen_of(depth: Float32Array, *, scale: float = 1.0, offset_px: float = 0.0) -> SeenDepth:
    return SeenDepth(depth=depth, scale_xy=np.full(2, scale), offset_xy=np.full(2, offset_px))


def true_depth(truth: Rendered) -> Float32Array:
    return np.where(np.isfinite(truth.depth), truth.depth, 0.0).astype(np.float32)


def made_by(problem: DepthProblem, images: dict[FrameId, DenseImage], see: See) -> DepthMap:
    estimate = estimate_depth(problem, images, OPTIONS, see)
    assert estimate.status is DepthStatus.MADE, estimate.reason
    assert "as the matcher sees it" in estimate.reason
    assert estimate.depth_map is not None
    return estimate.depth_map


@pytest.mark.parametrize("intrinsics", [PINHOLE, FISHEYE], ids=["pinhole", "fisheye"])
def test_depth_in_another_unit_and_at_another_size_is_that_of_the_map(
    intrinsics: Intrinsics,
) -> None:
    problem, images, truth = problem_of([WALL, BOX], POSES, intrinsics=intrinsics)
    smaller = np.ascontiguousarray(true_depth(truth)[4:-4:2, 4:-4:2] / UNIT)
    asked: list[tuple[FrameId, FrameId]] = []

    def see(frame_id: FrameId, neighbour_id: FrameId) -> SeenDepth:
        asked.append((frame_id, neighbour_id))
        # Every second pixel from the fourth on: their centres lie at 4.5, 6.5, ...
        return seen_of(smaller, scale=2.0, offset_px=3.5)

    depth_map = made_by(problem, images, see)
    errors = relative_errors(depth_map, truth, intrinsics)
    assert np.median(errors) < 0.003
    assert np.mean(errors < 0.02) > 0.97
    assert np.mean(depth_map.depth > 0) > 0.5
    own_id = problem.view.frame_id
    assert sorted(asked) == [(own_id, one.frame_id) for one in problem.neighbours]
    assert depth_map.num_agreeing.max() == 2


def test_what_is_masked_and_the_sky_have_no_depth() -> None:
    mask = np.ones((PINHOLE.height, PINHOLE.width), np.bool_)
    mask[:, :60] = False
    problem, images, truth = problem_of([WALL], POSES, masks=[mask, None, None])
    depth = true_depth(truth)
    depth[:40] = 0.0  # of which the matcher is not sure
    depth_map = made_by(problem, images, lambda *ids: seen_of(depth))
    assert not depth_map.depth[:, :58].any()
    assert not depth_map.depth[:38].any()
    assert depth_map.depth[44:-5, 64:-5].all()


def test_the_error_that_is_claimed_is_that_at_the_sparse_points() -> None:
    problem, images, truth = problem_of([WALL], POSES)
    noise = np.random.default_rng(0).normal(scale=0.01, size=truth.depth.shape)
    noisy = (true_depth(truth) * (1.0 + noise)).astype(np.float32)
    depth_map = made_by(problem, images, lambda *ids: seen_of(noisy))
    claimed = np.median(depth_map.relative_error[depth_map.depth > 0])
    assert 0.005 < claimed < 0.012  # of the mean of two
    assert 0.004 < np.median(relative_errors(depth_map, truth, PINHOLE)) < 0.012


def unseen(*ids: FrameId) -> SeenDepth | None:
    return None


def failing(*ids: FrameId) -> SeenDepth | None:
    raise InferenceError("no room for a single pair")


def wrong(*ids: FrameId) -> SeenDepth | None:
    rng = np.random.default_rng(1)
    return seen_of(rng.uniform(1.0, 9.0, (PINHOLE.height, PINHOLE.width)).astype(np.float32))


@pytest.mark.parametrize("see", [unseen, failing, wrong])
def test_what_is_not_seen_or_is_far_off_is_matched(see: See) -> None:
    problem, images, _ = problem_of([WALL, BOX], POSES)
    estimate = estimate_depth(problem, images, OPTIONS, see)
    matched = estimate_depth(problem, images, OPTIONS)
    assert estimate.reason == matched.reason
    assert estimate.depth_map is not None
    assert matched.depth_map is not None
    assert np.array_equal(estimate.depth_map.depth, matched.depth_map.depth)
