from __future__ import annotations

import functools

import pytest
from engine.mapping.window_bootstrap import bootstrap_map

from engine.config import (
    GlobalBundleAdjustmentConfig,
    InitializationConfig,
    LocalBundleAdjustmentConfig,
)
from engine.mapping.growth import BuiltMap, GrowthConfig
from engine.matching.scene_graph import SceneGraph
from engine.windows.model import WindowSolverConfig
from engine.windows.solver import solve_window
from tests.support.synthetic import (
    SyntheticWorld,
    pose_errors,
    poses_of,
    straight_path,
    turning_path,
)
from tests.support.window_maps import graph_and_map, new_map_like

CONFIG = GrowthConfig(
    initialization=InitializationConfig(),
    min_inlier_ratio=0.25,
    local_bundle_adjustment=LocalBundleAdjustmentConfig(),
    global_bundle_adjustment=GlobalBundleAdjustmentConfig(),
    constant_camera_ids=frozenset(),
    num_threads=1,
    seed=0,
)


def bootstrapped(
    world: SyntheticWorld, graph: SceneGraph, *, size: int = 10, unknown: bool = False
) -> BuiltMap | None:
    return bootstrap_map(
        graph,
        graph.edges(),
        new_map=lambda: new_map_like(world, focal_factor=1.5 if unknown else 1.0),
        unknown_cameras=["camera"] if unknown else [],
        size=size,
        solve=functools.partial(solve_window, config=WindowSolverConfig()),
        config=CONFIG,
    )


@pytest.mark.parametrize("unknown", [False, True], ids=["known focal", "unknown focal"])
def test_a_window_gives_a_first_map_that_grows(unknown: bool) -> None:
    world = SyntheticWorld(straight_path(14), noise_px=0.3)
    graph, _ = graph_and_map(world, registered=[1, 2])
    built = bootstrapped(world, graph, unknown=unknown)
    assert built is not None
    assert built.initial is None
    assert built.sparse_map.registered_ids == world.frame_ids  # beyond the window, too
    assert 0.0 < pose_errors(poses_of(built.sparse_map), world).rmse_ratio < 0.01
    focal_px = built.sparse_map.camera("camera").mean_focal_length()
    assert focal_px == pytest.approx(800.0, rel=0.02)


def test_a_turn_on_the_spot_gives_no_map() -> None:
    world = SyntheticWorld(turning_path(12), noise_px=0.3)
    graph, _ = graph_and_map(world, registered=[])
    assert bootstrapped(world, graph) is None


def test_too_few_keyframes_give_no_map() -> None:
    world = SyntheticWorld(straight_path(4))
    graph, _ = graph_and_map(world, registered=[1, 2])
    assert bootstrapped(world, graph) is None
