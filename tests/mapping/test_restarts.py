"""Starting maps anew: when, from which pairs, and what a started map is like."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from engine.config import (
    CamerasConfig,
    GlobalBundleAdjustmentConfig,
    InitializationConfig,
    LocalBundleAdjustmentConfig,
    RegistrationConfig,
    RescueConfig,
    TriangulationConfig,
    WindowConfig,
)
from engine.geometry import camera_center
from engine.mapping.cameras import CameraCalibration
from engine.mapping.growth import GrowthConfig
from engine.mapping.restarts import MapStarts
from engine.mapping.sparse_map import SparseMap
from engine.types import FrameId, ImagePair
from engine.windows.model import WindowSolverConfig
from engine.windows.solver import solve_window
from tests.support.synthetic import (
    SyntheticWorld,
    grow,
    map_of_keyframes,
    pose_errors,
    poses_of,
    scene_graph,
    straight_path,
)

GROWTH = GrowthConfig(
    initialization=InitializationConfig(),
    min_inlier_ratio=0.65,
    local_bundle_adjustment=LocalBundleAdjustmentConfig(),
    global_bundle_adjustment=GlobalBundleAdjustmentConfig(),
    constant_camera_ids=frozenset({1}),
    num_threads=1,
    seed=0,
)
RESCUE = RescueConfig(restart_below_registered_ratio=0.5, restart_min_keyframes=8, max_restarts=2)
NUM_FRAMES = 10

Skips = Callable[[ImagePair], bool]


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(NUM_FRAMES), noise_px=0.3)


def nothing(pair: ImagePair) -> bool:
    return False


class Scene:
    """A scene graph with everything in it, the starts of maps from it, and a map to replace.

    Args:
        world: what keyframes see.
        order: keyframes in order of arrival.
        skips: pairs left out.
        registered: keyframes of the present map.
        window: whether a window may give the first map.
    """

    def __init__(
        self,
        world: SyntheticWorld,
        *,
        order: Sequence[int] | None = None,
        skips: Skips = nothing,
        registered: Sequence[int] = (),
        window: WindowConfig = WindowConfig(enabled=False),  # noqa: B008 - frozen
    ) -> None:
        self.world = world
        self.graph = scene_graph()
        self.present = new_map()
        self._skips = skips
        self._cameras = CameraCalibration(
            CamerasConfig(), emit=lambda event: None, clock=lambda: 0.0
        )
        self.starts = MapStarts(
            initialization=InitializationConfig(min_keyframes=4),
            rescue=RESCUE,
            window=window,
            graph=self.graph,
            cameras=self._cameras,
            new_map=new_map,
            solve_window=functools.partial(solve_window, config=WindowSolverConfig()),
        )
        for frame_id in order or world.frame_ids:
            self.add(frame_id)
        if registered:
            grow(self.present, world, registered)

    def add(self, frame_id: int) -> None:
        keyframe = self.world.keyframe(frame_id)
        earlier = self.graph.keyframe_ids
        self._cameras.meet(keyframe, self.present)
        self.graph.add_keyframe(keyframe)
        pairs = [
            self.world.verified_pair(other, frame_id)
            for other in earlier
            if abs(other - frame_id) <= 4
            and not self._skips(ImagePair.of(FrameId(other), FrameId(frame_id)))
        ]
        for pair in pairs:
            self.graph.record_pair(pair)
        self.present.add_keyframe(keyframe, pairs)


def new_map() -> SparseMap:
    return SparseMap(triangulation=TriangulationConfig(), registration=RegistrationConfig(), seed=0)


def splits_after(last: int) -> Skips:
    return lambda pair: pair.first <= last < pair.second


# -- the first map --------------------------------------------------------------------------------


def test_a_first_map_waits_for_enough_keyframes(world: SyntheticWorld) -> None:
    scene = Scene(world, order=[1, 2, 3])
    assert scene.starts.first(scene.present, scene.graph.edges(), config=GROWTH) is None
    at_end = scene.starts.first_at_end(scene.present, config=GROWTH)
    assert at_end is not None
    assert at_end.sparse_map.registered_ids == [1, 2, 3]
    scene.add(4)
    built = scene.starts.first(scene.present, [], config=GROWTH)
    assert built is not None
    assert built.sparse_map.registered_ids == [1, 2, 3, 4]
    assert scene.present.num_registered == 0


def test_pairs_of_older_keyframes_are_tried_once_and_again_at_the_end(
    world: SyntheticWorld,
) -> None:
    scene = Scene(world, order=[1, 2, 3, 4], skips=lambda pair: True)
    assert scene.starts.first(scene.present, [], config=GROWTH) is None
    late = [world.verified_pair(i, j) for i, j in ((1, 2), (1, 3), (2, 3), (2, 4), (3, 4))]
    for pair in late:
        scene.graph.record_pair(pair)
    assert scene.starts.first(scene.present, [], config=GROWTH) is None
    assert scene.starts.first(scene.present, late[1:2], config=GROWTH) is not None
    assert scene.starts.first_at_end(scene.present, config=GROWTH) is not None


def test_a_started_map_knows_every_keyframe_and_pair(world: SyntheticWorld) -> None:
    scene = Scene(world)
    built = scene.starts.first_at_end(scene.present, config=GROWTH)
    assert built is not None
    assert built.sparse_map.keyframe_ids == world.frame_ids
    for frame_id in world.frame_ids:
        assert built.sparse_map.neighbors(frame_id).keys() == set(scene.graph.neighbors(frame_id))
    assert 1e-5 < pose_errors(poses_of(built.sparse_map), world).rmse_ratio < 1e-3


def test_keyframes_may_come_in_any_order(world: SyntheticWorld) -> None:
    order = [3, 1, 2, 6, 4, 5, 10, 8, 9, 7]
    scene = Scene(world, order=order)
    built = scene.starts.first_at_end(scene.present, config=GROWTH)
    assert built is not None
    assert built.sparse_map.keyframe_ids == order
    assert built.sparse_map.registered_ids == world.frame_ids


def test_pairs_that_misled_a_map_do_not_come_back(world: SyntheticWorld) -> None:
    scene = Scene(world)
    misleading = [ImagePair(FrameId(i), FrameId(j)) for i in (3, 4, 5) for j in (6, 7, 8, 9)]
    scene.starts.distrust(misleading)
    built = scene.starts.first_at_end(scene.present, config=GROWTH)
    assert built is not None
    for pair in misleading:
        assert pair.second not in built.sparse_map.neighbors(pair.first)
    assert built.pair not in misleading


# -- another map ----------------------------------------------------------------------------------


def test_a_map_that_holds_most_keyframes_is_not_replaced(world: SyntheticWorld) -> None:
    scene = Scene(world, registered=[1, 2, 3, 4, 5])
    assert scene.starts.instead_of_poor(scene.present, config=GROWTH) is None


def test_a_poor_map_gets_a_rival_placed_onto_it() -> None:
    world = SyntheticWorld(straight_path(NUM_FRAMES))
    scene = Scene(world, registered=[3, 5, 4])  # in the frame of keyframe 3
    rival = scene.starts.instead_of_poor(scene.present, config=GROWTH)
    assert rival is not None
    assert rival.sparse_map.registered_ids == world.frame_ids
    assert not {rival.pair.first, rival.pair.second} <= {3, 4, 5}
    for frame_id in (3, 4, 5):
        center, present = (
            camera_center(m.cam_from_world(FrameId(frame_id)))
            for m in (rival.sparse_map, scene.present)
        )
        assert np.linalg.norm(center - present) < 1e-4 * world.extent
    assert scene.present.registered_ids == [3, 4, 5]


def test_a_rival_that_shares_too_little_stands_on_its_own(world: SyntheticWorld) -> None:
    scene = Scene(world, skips=splits_after(3), registered=[1, 3, 2])
    rival = scene.starts.instead_of_poor(scene.present, config=GROWTH)
    assert rival is not None
    assert rival.sparse_map.registered_ids == world.frame_ids[3:]


def test_restarts_come_as_keyframes_come_and_not_for_ever() -> None:
    long_world = SyntheticWorld(straight_path(16), noise_px=0.3)
    scene = Scene(long_world, order=range(1, 8), registered=[1, 3, 2])
    tried_at = []
    for num_seen in range(7, 17):
        if num_seen > 7:
            scene.add(num_seen)
        if scene.starts.instead_of_poor(scene.present, config=GROWTH) is not None:
            tried_at.append(num_seen)
    assert tried_at == [8, 10]  # a quarter more each time, at most two


def test_other_starts_are_tried_at_the_end_each_once(world: SyntheticWorld) -> None:
    scene = Scene(world, skips=splits_after(5), registered=[1, 3, 2])
    tried = []
    for _ in range(3):
        built = scene.starts.another_at_end(scene.present, config=GROWTH)
        assert built is not None
        tried.append(built.pair)
    assert len(set(tried)) == 3


def test_a_complete_map_needs_no_other_start(world: SyntheticWorld) -> None:
    scene = Scene(world, registered=world.frame_ids)
    assert scene.starts.another_at_end(scene.present, config=GROWTH) is None


def test_when_no_pair_leads_outside_the_map_all_pairs_are_tried(world: SyntheticWorld) -> None:
    """All pairs of keyframe 10 are distrusted: another start cannot reach it, but may be tried."""
    scene = Scene(world, registered=list(range(1, NUM_FRAMES)))
    scene.starts.distrust(pair.pair for pair in scene.graph.verified_pairs(FrameId(10)))
    built = scene.starts.another_at_end(scene.present, config=GROWTH)
    assert built is not None
    assert built.sparse_map.registered_ids == world.frame_ids[:-1]


def test_nothing_to_start_from_is_no_map() -> None:
    world = SyntheticWorld(straight_path(5), points=np.empty((0, 3)))
    scene = Scene(world, skips=lambda pair: True)
    assert scene.starts.first(scene.present, [], config=GROWTH) is None
    assert scene.starts.first_at_end(scene.present, config=GROWTH) is None
    assert scene.starts.another_at_end(scene.present, config=GROWTH) is None
    assert map_of_keyframes(world).num_registered == 0


# -- from a window --------------------------------------------------------------------------------


def test_a_window_gives_the_first_map_where_no_pair_does(world: SyntheticWorld) -> None:
    impossible = dataclasses.replace(
        GROWTH,
        initialization=GROWTH.initialization.model_copy(
            update={"min_triangulation_angle_deg": 89.0}
        ),
    )
    for window, is_expected in ((WindowConfig(), True), (WindowConfig(bootstrap=False), False)):
        scene = Scene(world, window=window)
        built = scene.starts.first_at_end(scene.present, config=impossible)
        assert (built is not None) is is_expected
        if built is not None:
            assert built.initial is None
            assert built.sparse_map.registered_ids == world.frame_ids
            assert pose_errors(poses_of(built.sparse_map), world).rmse_ratio < 0.01


def test_a_keyframe_that_matches_nothing_asks_for_no_other_start(world: SyntheticWorld) -> None:
    alone = FrameId(5)
    scene = Scene(
        world,
        skips=lambda pair: alone in (pair.first, pair.second),
        registered=[i for i in world.frame_ids if i != alone],
    )
    assert scene.starts.another_at_end(scene.present, config=GROWTH) is None
