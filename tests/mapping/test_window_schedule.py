from __future__ import annotations

import functools

import pytest
from engine.mapping.facts import MappingFacts

from engine.config import LocalBundleAdjustmentConfig, RegistrationConfig, WindowConfig
from engine.events import Event, WindowPurpose, WindowSolved, WindowVerdict
from engine.mapping.window_merging import WindowMergeConfig
from engine.mapping.window_schedule import WindowWork
from engine.matching.scene_graph import SceneGraph
from engine.types import FrameId
from engine.windows.model import WindowSolverConfig
from engine.windows.solver import solve_window
from tests.support.synthetic import SyntheticWorld, straight_path
from tests.support.window_maps import graph_and_map

CONFIG = WindowConfig(size=4, num_older=4, interval=3, min_keyframes=6, merge_after_keyframes=2)


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(12), noise_px=0.3)


def work_on(graph: SceneGraph, told: list[Event], config: WindowConfig = CONFIG) -> WindowWork:
    def emit(event: Event) -> None:
        told.append(event)

    return WindowWork(
        config,
        graph=graph,
        solve=functools.partial(solve_window, config=WindowSolverConfig()),
        merge_config=lambda: WindowMergeConfig(
            window=config,
            registration=RegistrationConfig(),
            local_bundle_adjustment=LocalBundleAdjustmentConfig(),
            constant_camera_ids=frozenset({1}),
        ),
        facts=MappingFacts(emit=emit, clock=lambda: 5.0),
    )


def test_one_window_is_in_flight_and_is_merged_when_its_time_has_come(
    world: SyntheticWorld,
) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids)
    told: list[Event] = []
    work = work_on(graph, told)
    job = work.start(sparse_map)
    assert job is not None
    assert work.start(sparse_map) is None
    work.keyframe_added()
    assert not work.merge_is_due
    work.keyframe_added()
    assert work.merge_is_due
    merge = work.merge(sparse_map, work.solved(job))
    assert merge is not None
    assert not work.merge_is_due
    (event,) = told
    assert isinstance(event, WindowSolved)
    assert event.purpose is WindowPurpose.RESOLVE
    assert event.keyframe_ids == tuple(range(5, 13))
    assert event.num_observations_before == merge.before.num_observations > 100
    assert 0.0 < event.error_before_px < 1.0
    assert event.cpu_s > 0.0


def test_a_forgotten_window_changes_nothing_and_tells_nothing(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids)
    told: list[Event] = []
    work = work_on(graph, told)
    job = work.start(sparse_map)
    assert job is not None
    work.abandon()
    assert work.merge(sparse_map, work.solved(job)) is None
    assert told == []


def test_missing_keyframes_are_rescued(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids[:8])
    told: list[Event] = []
    merge = work_on(graph, told).rescue(sparse_map)
    assert merge is not None
    assert set(merge.registered) <= {9, 10, 11, 12}
    assert {9, 10} <= set(merge.registered)
    assert {event.purpose for event in told if isinstance(event, WindowSolved)} == {
        WindowPurpose.RESCUE
    }


def test_a_whole_map_needs_no_rescue(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids)
    told: list[Event] = []
    assert work_on(graph, told).rescue(sparse_map) is None
    assert told == []


def test_windows_that_are_off_do_nothing(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids[:8])
    told: list[Event] = []
    work = work_on(graph, told, CONFIG.model_copy(update={"enabled": False}))
    assert work.start(sparse_map) is None
    assert work.rescue(sparse_map) is None
    assert work.improve(sparse_map, tried=set()) is None
    assert told == []


def test_the_weakest_part_is_solved_again_once(world: SyntheticWorld) -> None:
    graph, sparse_map = graph_and_map(world, registered=world.frame_ids)
    pose = sparse_map.cam_from_world(FrameId(6)).copy()
    pose[:, 3] += (0.02, 0.0, 0.01)
    sparse_map.set_pose(FrameId(6), pose)
    told: list[Event] = []
    work, tried = work_on(graph, told), set[FrameId]()
    merge = work.improve(sparse_map, tried=tried)
    assert merge is not None
    assert merge.verdict is WindowVerdict.MERGED, merge.reason
    assert FrameId(6) in tried
    assert merge.after.mean_error_px < merge.before.mean_error_px
