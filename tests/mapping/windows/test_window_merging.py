from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from engine.config import LocalBundleAdjustmentConfig, RegistrationConfig, WindowConfig
from engine.events import WindowPurpose, WindowVerdict
from engine.geometry import rotation_from_vector
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.windows.window_merging import WindowMergeConfig, try_window
from engine.mapping.windows.window_selection import Window, WindowJob, make_job
from engine.matching.scene_graph import SceneGraph
from engine.types import FrameId
from engine.window_types import WindowEstimate, WindowStatus
from engine.windows.model import WindowSolverConfig
from engine.windows.solver import solve_window
from tests.support.synthetic import SyntheticWorld, pose_errors, poses_of, straight_path
from tests.support.window_maps import graph_and_map

NUM_FRAMES = 12
CONFIG = WindowMergeConfig(
    window=WindowConfig(),
    registration=RegistrationConfig(),
    local_bundle_adjustment=LocalBundleAdjustmentConfig(),
)


@pytest.fixture
def world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(NUM_FRAMES), noise_px=0.3)


def job_of(
    graph: SceneGraph, sparse_map: SparseMap, free: Sequence[int], held: Sequence[int]
) -> WindowJob:
    window = Window(
        frame_ids=tuple(FrameId(i) for i in sorted([*free, *held])),
        free_ids=frozenset(FrameId(i) for i in free),
        purpose=WindowPurpose.RESOLVE,
    )
    job = make_job(graph, sparse_map, window)
    assert job is not None
    return job


def solved(job: WindowJob) -> WindowEstimate:
    estimate = solve_window(job.problem, WindowSolverConfig())
    assert estimate.status is WindowStatus.SOLVED, estimate.reason
    return estimate


def nudge(sparse_map: SparseMap, frame_id: int) -> None:
    """Moves a keyframe a little out of its place."""
    pose = sparse_map.cam_from_world(FrameId(frame_id)).copy()
    turn = rotation_from_vector(np.array([0.002, -0.003, 0.001]))
    pose = np.column_stack([turn @ pose[:, :3], turn @ pose[:, 3] + (0.02, -0.01, 0.01)])
    sparse_map.set_pose(FrameId(frame_id), pose)


def test_misplaced_keyframes_are_put_right(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids)
    for frame_id in (10, 11, 12):
        nudge(sparse_map, frame_id)
    spoiled = pose_errors(poses_of(sparse_map), world)
    job = job_of(graph, sparse_map, [10, 11, 12], [6, 7, 8, 9])
    merge = try_window(sparse_map, job, solved(job), config=CONFIG)
    assert merge.verdict is WindowVerdict.MERGED, merge.reason
    assert merge.better_map is not None
    assert merge.after.mean_error_px < 0.6 * merge.before.mean_error_px
    assert merge.moved_map > 0.01
    mended = pose_errors(poses_of(merge.better_map), world)
    assert 0.0 < mended.rmse_ratio < 0.7 * spoiled.rmse_ratio


def test_a_good_map_stays_as_it_is_to_the_bit(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids)
    before, points = poses_of(sparse_map), sparse_map.num_points3D
    job = job_of(graph, sparse_map, [10, 11, 12], [6, 7, 8, 9])
    merge = try_window(sparse_map, job, solved(job), config=CONFIG)
    if merge.better_map is not None:  # then it is better by what was asked
        assert merge.after.gain >= 1.01 * merge.before.gain
    assert sparse_map.num_points3D == points
    for frame_id, pose in before.items():
        assert np.array_equal(sparse_map.cam_from_world(frame_id), pose)


def test_missing_keyframes_come_in(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids[:9])
    job = job_of(graph, sparse_map, [10, 11], [6, 7, 8, 9])
    merge = try_window(sparse_map, job, solved(job), config=CONFIG)
    assert merge.verdict is WindowVerdict.MERGED, merge.reason
    assert merge.registered == (10, 11)
    assert merge.better_map is not None
    assert merge.better_map.registered_ids == list(range(1, 12))
    assert 0.0 < pose_errors(poses_of(merge.better_map), world).max_ratio < 0.01
    assert sparse_map.registered_ids == list(range(1, 10))


def test_a_window_follows_a_map_that_was_moved_meanwhile(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids[:9])
    job = job_of(graph, sparse_map, [10, 11], [6, 7, 8, 9])
    estimate = solved(job)
    sparse_map.scale(3.0)
    merge = try_window(sparse_map, job, estimate, config=CONFIG)
    assert merge.registered == (10, 11)
    assert merge.better_map is not None
    assert pose_errors(poses_of(merge.better_map), world).max_ratio < 0.01


def test_a_window_whose_held_keyframes_were_moved_apart_is_stale(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids[:9])
    job = job_of(graph, sparse_map, [10, 11], [6, 7, 8, 9])
    estimate = solved(job)
    pose = sparse_map.cam_from_world(FrameId(7)).copy()
    pose[:, 3] += 2.0
    sparse_map.set_pose(FrameId(7), pose)
    merge = try_window(sparse_map, job, estimate, config=CONFIG)
    assert merge.verdict is WindowVerdict.STALE
    assert merge.better_map is None


def test_a_window_whose_held_keyframes_left_the_map_is_stale(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids[:9])
    job = job_of(graph, sparse_map, [10, 11], [6, 7, 8, 9])
    estimate = solved(job)
    sparse_map.deregister([FrameId(i) for i in (6, 7, 8)])
    assert try_window(sparse_map, job, estimate, config=CONFIG).verdict is WindowVerdict.STALE


def test_a_window_that_was_not_solved_says_why(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids)
    job = job_of(graph, sparse_map, [10, 11, 12], [6, 7, 8, 9])
    failed = replace(solved(job), status=WindowStatus.NO_PARALLAX, reason="all is far away")
    merge = try_window(sparse_map, job, failed, config=CONFIG)
    assert merge.verdict is WindowVerdict.NOT_SOLVED
    assert merge.reason == "no_parallax: all is far away"
    assert merge.before == merge.after


def test_a_new_keyframe_in_a_wrong_place_is_not_taken_in(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids[:9])
    job = job_of(graph, sparse_map, [10, 11], [6, 7, 8, 9])
    estimate = solved(job)
    poses = estimate.cam_from_world.copy()
    poses[-1, :, 3] += (3.0, 0.0, 0.0)  # keyframe 11
    merge = try_window(sparse_map, job, replace(estimate, cam_from_world=poses), config=CONFIG)
    assert 11 not in merge.registered
    if merge.better_map is not None:
        assert not merge.better_map.is_registered(FrameId(11))
