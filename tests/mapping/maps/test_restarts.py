"""Building maps: when, from which pairs or window, and what a built map is like."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from engine.config import (
    CamerasConfig,
    GlobalBundleAdjustmentConfig,
    InitializationConfig,
    LocalBundleAdjustmentConfig,
    RegistrationConfig,
    TriangulationConfig,
    WindowConfig,
)
from engine.estimators.two_view_geometry import estimate_relative_pose
from engine.geometry import camera_center
from engine.mapping.cameras.cameras import CameraCalibration, CameraChange, InitialCamera
from engine.mapping.maps.restarts import BuiltMap, MapBuilder, bootstrap_map, build_best_map
from engine.mapping.model.camera_priors import CameraPrior
from engine.mapping.model.growth import GrowthConfig
from engine.mapping.model.initialization import InitialPair
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.places.turning import TurningWatch
from engine.matching.scene_graph import SceneGraph
from engine.types import FrameId, ImagePair
from engine.windows.model import WindowSolverConfig
from engine.windows.solver import solve_window
from tests.support.initial_pairs import INITIALIZATION, SEED, initial_pair
from tests.support.synthetic import (
    EXACT_CAMERA,
    FOCAL_PX,
    SyntheticCamera,
    SyntheticWorld,
    grow,
    map_of_keyframes,
    pose_errors,
    poses_of,
    scene_graph,
    straight_path,
    turning_path,
)
from tests.support.window_maps import graph_and_map, new_map_like

GROWTH = GrowthConfig(
    min_inlier_ratio=0.65,
    local_bundle_adjustment=LocalBundleAdjustmentConfig(),
    global_bundle_adjustment=GlobalBundleAdjustmentConfig(),
    num_threads=1,
)
BOOTSTRAP = dataclasses.replace(GROWTH, min_inlier_ratio=0.25)
SOLVE_WINDOW = functools.partial(solve_window, config=WindowSolverConfig())
NUM_FRAMES = 10

Skips = Callable[[ImagePair], bool]


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(NUM_FRAMES), noise_px=0.3)


@pytest.fixture(scope="module")
def flight() -> SyntheticWorld:
    return SyntheticWorld(straight_path(11), noise_px=0.3)


def nothing(pair: ImagePair) -> bool:
    return False


class Scene:
    """A scene graph with everything in it, a builder of maps from it, and a map to replace.

    Args:
        world: what keyframes see.
        order: keyframes in order of arrival.
        skips: pairs left out.
        registered: keyframes of the present map.
        window: whether a window may give the first map.
        initialization: thresholds of starting.
    """

    def __init__(
        self,
        world: SyntheticWorld,
        *,
        order: Sequence[int] | None = None,
        skips: Skips = nothing,
        registered: Sequence[int] = (),
        window: WindowConfig = WindowConfig(enabled=False),  # noqa: B008 - frozen
        initialization: InitializationConfig = InitializationConfig(min_keyframes=4),  # noqa: B008
    ) -> None:
        self.world = world
        self.graph = scene_graph()
        self.present = new_map()
        self._skips = skips
        self._cameras = CameraCalibration(CamerasConfig(), emit=lambda event: None)
        self.builder = MapBuilder(
            initialization=initialization,
            window=window,
            growth=GROWTH,
            final_growth=GROWTH,
            graph=self.graph,
            cameras=self._cameras,
            new_map=new_map,
            solve_window=SOLVE_WINDOW,
            calibrate=lambda sparse_map: self._cameras.calibrate_from_pairs(sparse_map, self.graph),
            calibrate_trial=lambda _: None,
            turning=TurningWatch(
                graph=self.graph, emit=lambda event: None, is_refused=True, may_zoom=True
            ),
            seed=SEED,
        )
        for frame_id in order or world.frame_ids:
            self.add(frame_id)
        if registered:
            grow(self.present, world, registered)

    def add(self, frame_id: int) -> None:
        keyframe = self.world.keyframe(frame_id)
        earlier = self.graph.keyframe_ids
        self._cameras.add(keyframe, self.present)
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
    assert scene.builder.first(scene.present, scene.graph.edges()) is None
    at_end = scene.builder.first_at_end(scene.present)
    assert at_end is not None
    assert at_end.sparse_map.registered_ids == [1, 2, 3]
    scene.add(4)
    built = scene.builder.first(scene.present, [])
    assert built is not None
    assert built.sparse_map.registered_ids == [1, 2, 3, 4]
    assert scene.present.num_registered == 0


def test_pairs_of_older_keyframes_are_tried_once_and_again_at_the_end(
    world: SyntheticWorld,
) -> None:
    scene = Scene(world, order=[1, 2, 3, 4], skips=lambda pair: True)
    assert scene.builder.first(scene.present, []) is None
    late = [world.verified_pair(i, j) for i, j in ((1, 2), (1, 3), (2, 3), (2, 4), (3, 4))]
    for pair in late:
        scene.graph.record_pair(pair)
    assert scene.builder.first(scene.present, []) is None
    assert scene.builder.first(scene.present, late[1:2]) is not None
    assert scene.builder.first_at_end(scene.present) is not None


def test_a_started_map_knows_every_keyframe_and_pair(world: SyntheticWorld) -> None:
    scene = Scene(world)
    built = scene.builder.first_at_end(scene.present)
    assert built is not None
    assert built.sparse_map.keyframe_ids == world.frame_ids
    for frame_id in world.frame_ids:
        assert built.sparse_map.neighbors(frame_id).keys() == set(scene.graph.neighbors(frame_id))
    assert 1e-5 < pose_errors(poses_of(built.sparse_map), world).rmse_ratio < 1e-3


def test_keyframes_may_come_in_any_order(world: SyntheticWorld) -> None:
    order = [3, 1, 2, 6, 4, 5, 10, 8, 9, 7]
    scene = Scene(world, order=order)
    built = scene.builder.first_at_end(scene.present)
    assert built is not None
    assert built.sparse_map.keyframe_ids == order
    assert built.sparse_map.registered_ids == world.frame_ids


def test_pairs_that_misled_a_map_do_not_come_back(world: SyntheticWorld) -> None:
    scene = Scene(world)
    misleading = [ImagePair(FrameId(i), FrameId(j)) for i in (3, 4, 5) for j in (6, 7, 8, 9)]
    scene.builder.distrust(misleading)
    built = scene.builder.first_at_end(scene.present)
    assert built is not None
    for pair in misleading:
        assert pair.second not in built.sparse_map.neighbors(pair.first)
    assert built.pair not in misleading


# -- another map ----------------------------------------------------------------------------------


def test_a_poor_map_gets_a_rival_placed_onto_it() -> None:
    world = SyntheticWorld(straight_path(NUM_FRAMES))
    scene = Scene(world, registered=[3, 5, 4])  # in the frame of keyframe 3
    rival = scene.builder.another_at_end(scene.present)
    assert rival is not None
    assert rival.is_placed
    assert rival.sparse_map.registered_ids == world.frame_ids
    assert not {rival.pair.first, rival.pair.second} <= {3, 4, 5}
    for frame_id in (3, 4, 5):
        center, present = (
            camera_center(m.cam_from_world(FrameId(frame_id)))
            for m in (rival.sparse_map, scene.present)
        )
        assert np.linalg.norm(center - present) < 1e-4 * world.extent
    assert scene.present.registered_ids == [3, 4, 5]


@pytest.mark.slow
def test_a_rival_that_shares_too_little_stands_on_its_own(world: SyntheticWorld) -> None:
    scene = Scene(world, skips=splits_after(3), registered=[1, 3, 2])
    rival = scene.builder.another_at_end(scene.present)
    assert rival is not None
    assert not rival.is_placed
    assert rival.sparse_map.registered_ids == world.frame_ids[3:]


@pytest.mark.slow
def test_other_starts_are_tried_at_the_end_each_once(world: SyntheticWorld) -> None:
    scene = Scene(world, skips=splits_after(5), registered=[1, 3, 2])
    tried = []
    for _ in range(3):
        built = scene.builder.another_at_end(scene.present)
        assert built is not None
        tried.append(built.pair)
    assert len(set(tried)) == 3


def test_a_complete_map_needs_no_other_start(world: SyntheticWorld) -> None:
    scene = Scene(world, registered=world.frame_ids)
    assert scene.builder.another_at_end(scene.present) is None


def test_a_keyframe_that_no_start_can_reach_asks_for_none(world: SyntheticWorld) -> None:
    scene = Scene(world, registered=list(range(1, NUM_FRAMES)))
    scene.builder.distrust(pair.pair for pair in scene.graph.verified_pairs(FrameId(10)))
    assert scene.builder.another_at_end(scene.present) is None


def test_no_start_is_tried_where_fewer_keyframes_hang_together(world: SyntheticWorld) -> None:
    scene = Scene(world, skips=splits_after(6), registered=world.frame_ids[:6])
    assert scene.builder.another_at_end(scene.present) is None


def test_nothing_to_start_from_is_no_map() -> None:
    world = SyntheticWorld(straight_path(5), points=np.empty((0, 3)))
    scene = Scene(world, skips=lambda pair: True)
    assert scene.builder.first(scene.present, []) is None
    assert scene.builder.first_at_end(scene.present) is None
    assert scene.builder.another_at_end(scene.present) is None
    assert map_of_keyframes(world).num_registered == 0


def test_a_keyframe_that_matches_nothing_asks_for_no_other_start(world: SyntheticWorld) -> None:
    alone = FrameId(5)
    scene = Scene(
        world,
        skips=lambda pair: alone in (pair.first, pair.second),
        registered=[i for i in world.frame_ids if i != alone],
    )
    assert scene.builder.another_at_end(scene.present) is None


# -- some keyframes alone -------------------------------------------------------------------------


def test_a_separate_map_holds_nothing_but_its_keyframes(world: SyntheticWorld) -> None:
    scene = Scene(world, skips=splits_after(4), registered=[1, 3, 2, 4])
    built = scene.builder.separate(scene.present, set(world.frame_ids[4:]))
    assert built is not None
    assert built.sparse_map.keyframe_ids == built.sparse_map.registered_ids == world.frame_ids[4:]
    assert 1e-5 < pose_errors(poses_of(built.sparse_map), world).rmse_ratio < 1e-3
    assert scene.present.registered_ids == [1, 2, 3, 4]


# -- from a pair ----------------------------------------------------------------------------------


def built_from(
    world: SyntheticWorld,
    initial_pairs: Sequence[InitialPair],
    *,
    max_grown: int | None = None,
    **settings: Any,
) -> tuple[SparseMap | None, InitialPair | None, int]:
    """The best map, what it started from, and how many maps were made on the way."""
    made: list[SparseMap] = []

    def new_map() -> SparseMap:
        made.append(map_of_keyframes(world, **settings))
        return made[-1]

    built = build_best_map(
        new_map,
        initial_pairs,
        initialization=INITIALIZATION,
        config=GROWTH,
        max_grown=max_grown,
    )
    if built is None:
        return None, None, len(made)
    return built.sparse_map, built.initial, len(made)


def test_a_good_start_gives_the_whole_map_at_once(flight: SyntheticWorld) -> None:
    sparse_map, initial, num_made = built_from(
        flight, [initial_pair(flight, 5, 7), initial_pair(flight, 5, 8)]
    )
    assert sparse_map is not None
    assert num_made == 1
    assert initial is not None
    assert sparse_map.registered_ids == flight.frame_ids
    errors = pose_errors(poses_of(sparse_map), flight)
    assert 1e-5 < errors.rmse_ratio < 1e-3
    assert sparse_map.mean_reprojection_error_px() < 0.5


def test_the_next_pair_is_tried_when_the_first_leads_nowhere(flight: SyntheticWorld) -> None:
    """Keyframes 1 and 3 have a pair with each other only."""

    def cut(pair: ImagePair) -> bool:
        return pair.first <= 3 < pair.second

    frame_ids = [1, *flight.frame_ids[2:]]
    poor, good = initial_pair(flight, 1, 3), initial_pair(flight, 5, 7)
    sparse_map, initial, num_made = built_from(
        flight, [poor, good, good], frame_ids=frame_ids, skips=cut
    )
    assert sparse_map is not None
    assert initial is good
    assert sparse_map.registered_ids == frame_ids[2:]
    assert num_made == 2  # eight of ten are enough, the third pair is not tried


def test_the_fullest_of_several_poor_maps_is_kept(flight: SyntheticWorld) -> None:
    def cut(pair: ImagePair) -> bool:
        return pair.first <= 4 < pair.second

    few, more = initial_pair(flight, 1, 3), initial_pair(flight, 6, 8)
    for order, num_tried in (([few, more], 2), ([more, few], 1)):
        sparse_map, initial, num_made = built_from(flight, order, skips=cut)
        assert sparse_map is not None
        assert initial is more
        assert sparse_map.registered_ids == flight.frame_ids[4:]
        assert num_made == num_tried  # the few keyframes cannot hold more


@pytest.mark.parametrize(("max_grown", "num_built"), [(4, 1), (5, 2)])
def test_no_other_map_is_built_when_all_have_grown_enough_together(
    flight: SyntheticWorld, max_grown: int, num_built: int
) -> None:
    def cut(pair: ImagePair) -> bool:
        return pair.first <= 4 < pair.second

    few, more = initial_pair(flight, 1, 3), initial_pair(flight, 6, 8)
    _, initial, num_made = built_from(flight, [few, more], skips=cut, max_grown=max_grown)
    assert num_made == num_built
    assert initial is (few, more)[num_built - 1]


def test_a_start_with_a_wrong_relative_pose_makes_no_map(flight: SyntheticWorld) -> None:
    right = initial_pair(flight, 5, 7)
    wrong_pose = right.relative_pose.cam2_from_cam1.copy()
    wrong_pose[:, 3] = np.roll(wrong_pose[:, 3], 1)
    relative_pose = type(right.relative_pose)(
        cam2_from_cam1=wrong_pose,
        num_inliers=right.relative_pose.num_inliers,
        median_triangulation_angle_rad=right.relative_pose.median_triangulation_angle_rad,
    )
    wrong = InitialPair(pair=right.pair, relative_pose=relative_pose, score=right.score)
    assert built_from(flight, [wrong])[0] is None
    assert built_from(flight, [])[0] is None
    sparse_map, initial, _ = built_from(flight, [wrong, right])
    assert sparse_map is not None
    assert initial is right


def test_a_map_that_loses_its_points_when_adjusted_is_none() -> None:
    """A turn taken for a motion before a plane: the right focal length leaves it no depth."""
    world = SyntheticWorld(turning_path(8), noise_px=0.5)
    wrong_params = (0.8 * FOCAL_PX, *EXACT_CAMERA[1:])

    def new_map() -> SparseMap:
        sparse_map = map_of_keyframes(world, is_constant=False)
        sparse_map.set_camera_params("camera", wrong_params)
        return sparse_map

    sparse_map = new_map()
    first, second = sparse_map.keyframe(FrameId(1)), sparse_map.keyframe(FrameId(5))
    rows1, rows2 = sparse_map.neighbors(FrameId(1))[FrameId(5)].inlier_matches_idx.T
    relative_pose = estimate_relative_pose(
        first.features.keypoints_xy[rows1],
        second.features.keypoints_xy[rows2],
        camera1=sparse_map.camera("camera"),
        camera2=sparse_map.camera("camera"),
        max_error_px=3.0,
        seed=0,
    )
    assert relative_pose is not None
    pair = ImagePair(FrameId(1), FrameId(5))
    initial = InitialPair(pair=pair, relative_pose=relative_pose, score=1.0)
    built = build_best_map(new_map, [initial], initialization=INITIALIZATION, config=GROWTH)
    assert built is None


def test_two_keyframes_are_a_map_when_there_are_no_others(flight: SyntheticWorld) -> None:
    pair = initial_pair(flight, 5, 7)
    sparse_map, _, _ = built_from(flight, [pair], frame_ids=[5, 7])
    assert sparse_map is not None
    assert sparse_map.registered_ids == [5, 7]
    assert sparse_map.num_points3D >= 60


def test_two_of_three_keyframes_are_no_map(flight: SyntheticWorld) -> None:
    pair = initial_pair(flight, 5, 7)
    sparse_map, _, _ = built_from(flight, [pair], frame_ids=[1, 5, 7], max_gap=2)
    assert sparse_map is None


# -- from a window --------------------------------------------------------------------------------


def test_a_window_gives_the_first_map_where_no_pair_does(world: SyntheticWorld) -> None:
    impossible = InitializationConfig(min_keyframes=4, min_triangulation_angle_deg=89.0)
    for window, is_expected in ((WindowConfig(), True), (WindowConfig(bootstrap=False), False)):
        scene = Scene(world, window=window, initialization=impossible)
        built = scene.builder.first_at_end(scene.present)
        assert (built is not None) is is_expected
        if built is not None:
            assert built.initial is None
            assert built.sparse_map.registered_ids == world.frame_ids
            assert pose_errors(poses_of(built.sparse_map), world).rmse_ratio < 0.01


def bootstrapped(
    world: SyntheticWorld, graph: SceneGraph, *, size: int = 10, unknown: bool = False
) -> BuiltMap | None:
    return bootstrap_map(
        graph,
        graph.edges(),
        new_map=lambda: new_map_like(world, focal_factor=1.5 if unknown else 1.0),
        unknown_cameras=["camera"] if unknown else [],
        size=size,
        solve=SOLVE_WINDOW,
        initialization=InitializationConfig(),
        config=BOOTSTRAP,
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


# -- a map with changed cameras -------------------------------------------------------------------


def initial(camera: SyntheticCamera) -> InitialCamera:
    colmap = camera.as_colmap()
    return InitialCamera(camera=colmap, prior=CameraPrior.assumed(colmap))


def test_a_map_whose_cameras_change_is_rebuilt_where_it_stands() -> None:
    wide = SyntheticCamera.known()
    zoomed = SyntheticCamera(key="camera", params=(1.5 * FOCAL_PX, *EXACT_CAMERA[1:]))
    zoomed_ids = [FrameId(i) for i in range(6, 11)]
    world = SyntheticWorld(
        straight_path(10), cameras=(wide, zoomed), camera_idx=[0] * 5 + [1] * 5, noise_px=0.3
    )
    scene = Scene(world, registered=range(1, 6))
    change = CameraChange(
        cameras={"camera#2": initial(zoomed)},
        calibration_keys=dict.fromkeys(zoomed_ids, "camera#2"),
    )

    rebuilt = scene.builder.rebuilt(scene.present, change)

    assert rebuilt.registered_ids == world.frame_ids
    assert {rebuilt.keyframe(i).calibration_key for i in zoomed_ids} == {"camera#2"}
    assert {rebuilt.keyframe(i).camera_key for i in world.frame_ids} == {"camera"}
    assert 1e-5 < pose_errors(poses_of(rebuilt), world).rmse_ratio < 1e-3
    assert rebuilt.camera("camera#2").mean_focal_length() == pytest.approx(1.5 * FOCAL_PX, rel=0.01)
    assert scene.present.registered_ids == world.frame_ids[:5]
    assert {scene.graph.keyframe(i).calibration_key for i in zoomed_ids} == {"camera"}


@pytest.mark.parametrize("is_elsewhere", [True, False])
def test_a_rebuilt_map_takes_no_keyframes_of_other_maps(
    world: SyntheticWorld, is_elsewhere: bool
) -> None:
    scene = Scene(world, registered=world.frame_ids[:8])
    for frame_id in world.frame_ids[8:]:
        scene.graph.set_registered(frame_id, is_elsewhere, map_number=2)
    change = CameraChange(cameras={"camera": initial(SyntheticCamera.known())})
    rebuilt = scene.builder.rebuilt(scene.present, change)
    assert rebuilt.registered_ids == (world.frame_ids[:8] if is_elsewhere else world.frame_ids)


def test_a_rebuilt_map_places_the_keyframes_it_is_given(world: SyntheticWorld) -> None:
    scene = Scene(world, registered=world.frame_ids)
    camera = initial(SyntheticCamera.known())
    poses = {i: world.pose(i) for i in world.frame_ids[:4]}

    rebuilt = scene.builder.rebuilt(
        scene.present, CameraChange(cameras={"camera": camera}), poses=poses
    )

    assert rebuilt.registered_ids == world.frame_ids
    assert rebuilt.camera("camera").camera_id == scene.present.camera("camera").camera_id
    assert 1e-5 < pose_errors(poses_of(rebuilt), world).rmse_ratio < 1e-3
