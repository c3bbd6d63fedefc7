"""Windows of a run: when they are due, what becomes of them, and what is emitted."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from engine.config import LocalBundleAdjustmentConfig, RegistrationConfig, WindowConfig
from engine.events import Event, WindowPurpose, WindowSolved, WindowVerdict
from engine.geometry import compose_poses
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.windows.window_merging import WindowMergeConfig
from engine.mapping.windows.window_schedule import WindowRefinement, solve_job
from engine.matching.scene_graph import SceneGraph
from engine.types import FrameId
from engine.window_types import WindowStatus
from engine.windows.model import WindowSolverConfig
from engine.windows.solver import solve_window
from tests.support.synthetic import SyntheticWorld, straight_path
from tests.support.window_maps import graph_and_map

OFTEN = WindowConfig(size=4, num_older=4, interval=3, min_keyframes=6, merge_after_keyframes=2)
CONFIG = OFTEN.model_copy(update={"weak_fit_ratio": 10.0})  # however well keyframes fit


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(12), noise_px=0.3)


class Refinement:
    """The refinement of a map by windows, and what it emitted."""

    def __init__(self, graph: SceneGraph, config: WindowConfig = CONFIG) -> None:
        self.emitted: list[WindowSolved] = []
        self.windows = WindowRefinement(
            config,
            merging=WindowMergeConfig(
                window=config,
                registration=RegistrationConfig(),
                local_bundle_adjustment=LocalBundleAdjustmentConfig(),
            ),
            graph=graph,
            solve=functools.partial(solve_window, config=WindowSolverConfig()),
            emit=self._emit,
        )

    def _emit(self, event: Event) -> None:
        assert isinstance(event, WindowSolved)
        self.emitted.append(event)


def drift(sparse_map: SparseMap, frame_ids: Sequence[FrameId], *, shift: float) -> None:
    """Moves keyframes away from the rest, with what only they observe; the rest is filtered."""
    moved = set(frame_ids)
    for point3D_id in list(sparse_map.reconstruction.point3D_ids()):
        point = sparse_map.reconstruction.point3D(point3D_id)
        if {element.image_id for element in point.track.elements} <= moved:
            point.xyz += (shift, 0.0, 0.0)
    for frame_id in frame_ids:
        pose = sparse_map.cam_from_world(frame_id)
        pose = compose_poses(pose, np.column_stack([np.eye(3), (-shift, 0.0, 0.0)]))
        sparse_map.set_pose(frame_id, pose)
    sparse_map.filter_all()


def test_a_window_of_the_newest_keyframes_is_due_once_and_its_result_is_reported(
    world: SyntheticWorld,
) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids)
    refinement = Refinement(graph)
    job = refinement.windows.start_if_due(sparse_map)
    assert job is not None
    assert refinement.windows.start_if_due(sparse_map) is None  # no keyframe came since
    solved = solve_job(job, solve=refinement.windows._solve)
    assert refinement.emitted == []
    merge = refinement.windows.merge(sparse_map, solved)
    (event,) = refinement.emitted
    assert event.purpose is WindowPurpose.RESOLVE
    assert (event.verdict, event.reason) == (merge.verdict, merge.reason)
    assert event.keyframe_ids == tuple(range(5, 13))
    assert event.num_registered == len(merge.registered)
    assert event.num_observations_before == merge.before.num_observations > 100
    assert event.num_observations_after == merge.after.num_observations
    assert 0.0 < event.error_before_px < 1.0
    assert event.error_after_px == merge.after.mean_error_px
    assert event.moved_map == merge.moved_map
    assert event.cpu_s > 0.0
    assert event.elapsed_s > 0.0


def test_windows_come_later_while_they_change_nothing() -> None:
    longer = SyntheticWorld(straight_path(12 + 2 * CONFIG.interval), noise_px=0.3)
    world = SyntheticWorld(longer.poses[:12], points=longer.points, noise_px=0.3)
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids)
    refinement = Refinement(graph)
    job = refinement.windows.start_if_due(sparse_map)
    assert job is not None
    solved = solve_job(job, solve=refinement.windows._solve)
    unsolved = replace(solved.estimate, status=WindowStatus.NO_PARALLAX)
    refinement.windows.merge(sparse_map, replace(solved, estimate=unsolved))
    assert refinement.emitted[0].verdict is WindowVerdict.NOT_SOLVED
    for frame_id in longer.frame_ids[12:]:
        assert refinement.windows.start_if_due(sparse_map) is None
        graph.add_keyframe(longer.keyframe(frame_id))
        for older in (frame_id - 2, frame_id - 1):
            graph.record_pair(longer.verified_pair(older, frame_id))
        sparse_map.add_keyframe(longer.keyframe(frame_id), list(graph.verified_pairs(frame_id)))
        sparse_map.register(frame_id, min_inlier_ratio=0.25)
        sparse_map.triangulate(frame_id)
        graph.set_registered(frame_id, True)
    assert refinement.windows.start_if_due(sparse_map) is not None


def test_newest_keyframes_that_fit_well_need_no_window(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids)
    assert Refinement(graph, OFTEN).windows.start_if_due(sparse_map) is None
    assert Refinement(graph, CONFIG).windows.start_if_due(sparse_map) is not None


@pytest.mark.parametrize("shift", [0.1, 0.5])
def test_newest_keyframes_that_drifted_get_a_window(world: SyntheticWorld, shift: float) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids)
    drift(sparse_map, world.frame_ids[-4:], shift=shift)
    job = Refinement(graph, OFTEN).windows.start_if_due(sparse_map)
    assert job is not None
    assert job.window.free_ids == {9, 10, 11, 12}


def test_a_drift_below_the_noise_of_keypoints_needs_no_window(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids)
    drift(sparse_map, world.frame_ids[-4:], shift=0.002)  # about 0.1 px
    assert Refinement(graph, OFTEN).windows.start_if_due(sparse_map) is None


def test_a_keyframe_that_the_map_misses_gets_a_window_if_pairs_lead_to_it(
    world: SyntheticWorld,
) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids[:-1])
    assert Refinement(graph, OFTEN).windows.start_if_due(sparse_map) is not None

    alone = world.frame_ids[-1]
    graph, sparse_map = graph_and_map(
        world,
        registered=world.frame_ids[:-1],
        skips=lambda pair: alone in (pair.first, pair.second),
    )
    assert Refinement(graph, OFTEN).windows.start_if_due(sparse_map) is None


def test_missing_keyframes_are_rescued(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids[:8])
    refinement = Refinement(graph)
    merge = refinement.windows.rescue(sparse_map)
    assert merge is not None
    assert set(merge.registered) <= {9, 10, 11, 12}
    assert {9, 10} <= set(merge.registered)
    assert {event.purpose for event in refinement.emitted} == {WindowPurpose.RESCUE}


def test_a_whole_map_needs_no_rescue(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids)
    refinement = Refinement(graph)
    assert refinement.windows.rescue(sparse_map) is None
    assert refinement.emitted == []


def test_windows_that_are_off_do_nothing(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids[:8])
    refinement = Refinement(graph, CONFIG.model_copy(update={"enabled": False}))
    assert refinement.windows.start_if_due(sparse_map) is None
    assert refinement.windows.rescue(sparse_map) is None
    assert refinement.windows.improve(sparse_map, tried=set()) is None
    assert refinement.emitted == []


def test_the_weakest_part_is_solved_again_once(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids)
    pose = sparse_map.cam_from_world(FrameId(6)).copy()
    pose[:, 3] += (0.02, 0.0, 0.01)
    sparse_map.set_pose(FrameId(6), pose)
    refinement, tried = Refinement(graph), set[FrameId]()
    merge = refinement.windows.improve(sparse_map, tried=tried)
    assert merge is not None
    assert merge.verdict is WindowVerdict.MERGED, merge.reason
    assert FrameId(6) in tried
    assert merge.after.mean_error_px < merge.before.mean_error_px
