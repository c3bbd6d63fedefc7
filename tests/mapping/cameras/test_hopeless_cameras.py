"""Maps whose cameras went wrong: nothing of the mapper raises, and all that it reports is finite.

Adjustments that lack evidence, and calibrations of somebody else, lead to cameras that see a part
of their image nowhere, or all of it at one place.
"""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import Config, LocalBundleAdjustmentConfig, RuntimeConfig
from engine.geometry import camera_center
from engine.mapping.maps.separate_maps import build_separate_maps
from engine.mapping.model.bundle_adjustment import (
    adjust_globally,
    adjust_locally,
    merge_global_adjustment,
    start_global_adjustment,
)
from engine.mapping.model.initialization import rank_initial_pairs
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.places.misplacement import find_misplacement
from tests.support.degenerate import HOPELESS_PARAMS, camera_of
from tests.support.initial_pairs import INITIALIZATION, SEED, pairs_of
from tests.support.mapper_runs import MapperRun
from tests.support.synthetic import (
    EXACT_CAMERA,
    FakeMatcher,
    SyntheticCamera,
    SyntheticWorld,
    ground,
    grown_map,
    map_of_keyframes,
    poses_of,
    scene_graph,
    straight_path,
    turning_path,
)

CONFIG = Config(runtime=RuntimeConfig(num_threads=1))
NUM_KEYFRAMES, GOES_WRONG_AT = 7, 4


def flat_world(*, is_known: bool = True) -> SyntheticWorld:
    """A flight over a plane, where pairs may be turns as well."""
    poses = straight_path(2 * NUM_KEYFRAMES)
    camera = SyntheticCamera.known() if is_known else SyntheticCamera()
    return SyntheticWorld(poses, points=ground(poses, relief=0.0), cameras=(camera,))


@pytest.mark.slow
@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("params", HOPELESS_PARAMS, ids=str)
def test_a_run_whose_camera_goes_wrong_goes_on_to_its_end(
    params: tuple[float, ...], is_known: bool
) -> None:
    world = flat_world(is_known=is_known)
    run = MapperRun(CONFIG, matcher=FakeMatcher(world=world), graph=scene_graph())
    for number in range(NUM_KEYFRAMES):
        if number == GOES_WRONG_AT:
            run.sparse_map.set_camera_params("camera", params)
        frame_id = 2 * number + 1
        run.add_keyframe(world.keyframe(frame_id, gps=world.gps(frame_id)), wants_view=True)
        run.add_frame(world.tracked(frame_id + 1, keyframe_id=frame_id))
    run.end()
    assert len(run.registered_ids) >= GOES_WRONG_AT
    assert np.isfinite(run.mapper.view().cam_from_world).all()
    assert all(np.isfinite(pose.cam_from_world).all() for pose in run.trajectory)
    assert run.figures.counts.num_keyframes == NUM_KEYFRAMES
    assert len(run.mapper.snapshot().copies) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("params", HOPELESS_PARAMS, ids=str)
def test_keyframes_without_a_map_are_built_into_separate_maps_or_none(
    params: tuple[float, ...],
) -> None:
    world = flat_world()
    run = MapperRun(CONFIG, matcher=FakeMatcher(world=world), graph=scene_graph())
    for frame_id in range(1, NUM_KEYFRAMES + 1):
        run.add_keyframe(world.keyframe(frame_id))
    run.sparse_map.set_camera_params("camera", params)
    run.sparse_map.deregister(run.registered_ids[2:])
    mapper = run.mapper
    for separate in build_separate_maps(mapper._builder, run.graph, [run.sparse_map]):
        poses = [separate.cam_from_world(i) for i in separate.registered_ids]
        assert np.isfinite(np.array(poses)).all()


@pytest.mark.slow
@pytest.mark.parametrize("params", HOPELESS_PARAMS, ids=str)
def test_first_pairs_of_hopeless_cameras_are_ranked_or_left_out(params: tuple[float, ...]) -> None:
    for world in (flat_world(), SyntheticWorld(turning_path(8))):
        sparse_map = map_of_keyframes(world, frame_ids=range(1, 8))
        sparse_map.set_camera_params("camera", params)
        ranked = rank_initial_pairs(
            sparse_map, pairs_of(sparse_map), config=INITIALIZATION, seed=SEED
        )
        assert all(np.isfinite(initial.score) for initial in ranked)


def test_a_pair_is_ranked_by_the_points_whose_distortion_can_be_undone() -> None:
    world = flat_world()  # whose pairs may be turns
    sparse_map = map_of_keyframes(world, frame_ids=range(1, 8))
    exact = list(
        rank_initial_pairs(sparse_map, pairs_of(sparse_map), config=INITIALIZATION, seed=SEED)
    )
    bent = (*EXACT_CAMERA[:3], -0.35)  # the corners have no rays
    keyframes = [sparse_map.keyframe(i) for i in sparse_map.keyframe_ids]
    keypoints_xy = np.concatenate([keyframe.features.keypoints_xy for keyframe in keyframes])
    has_ray = np.isfinite(np.asarray(camera_of(bent).cam_from_img(keypoints_xy))).all(axis=1)
    assert 0.7 < has_ray.mean() < 1.0
    sparse_map.set_camera_params("camera", bent)
    ranked = list(
        rank_initial_pairs(sparse_map, pairs_of(sparse_map), config=INITIALIZATION, seed=SEED)
    )
    assert {initial.pair for initial in ranked} & {initial.pair for initial in exact}
    assert all(np.isfinite(initial.score) for initial in ranked)


NOWHERE, CENTRE, BEHIND, FAR, NO_POINTS = "nowhere", "centre", "behind", "far", "no points"


def spoil(sparse_map: SparseMap, how: str) -> None:
    """Moves every third point of a map to where no point is seen."""
    center = camera_center(sparse_map.cam_from_world(sparse_map.registered_ids[1]))
    points = sparse_map.reconstruction.points3D
    for number, point in enumerate(points.values()):
        if number % 3 == 0:
            moved = {
                NOWHERE: np.full(3, np.nan),
                CENTRE: center,
                BEHIND: 2.0 * center - point.xyz,
                FAR: 1e200 * point.xyz,
            }
            point.xyz = moved.get(how, point.xyz)
    if how == NO_POINTS:
        for point3D_id in list(points):
            sparse_map.reconstruction.delete_point3D(point3D_id)


@pytest.mark.slow
@pytest.mark.parametrize("how", [NOWHERE, CENTRE, BEHIND, FAR, NO_POINTS])
def test_points_that_no_camera_can_see_end_no_adjustment(how: str) -> None:
    world = flat_world(is_known=False)
    sparse_map = grown_map(world)
    poses = poses_of(sparse_map)
    spoil(sparse_map, how)
    sparse_map = sparse_map.copy()  # whose managers count anew
    adjust_locally(sparse_map, sparse_map.registered_ids[-1], config=LocalBundleAdjustmentConfig())
    adjustment = start_global_adjustment(sparse_map)
    adjust_globally(
        adjustment.reconstruction,
        calibration=adjustment.calibration,
        max_iterations=10,
        num_threads=1,
    )
    merge_global_adjustment(sparse_map, adjustment)
    sparse_map.filter_all()
    sparse_map.retriangulate()
    assert set(poses_of(sparse_map)) == set(poses)
    assert all(np.isfinite(pose).all() for pose in poses_of(sparse_map).values())


@pytest.mark.parametrize("params", HOPELESS_PARAMS, ids=str)
def test_hopeless_cameras_contradict_no_pair_and_fit_nothing(params: tuple[float, ...]) -> None:
    world = flat_world()
    sparse_map = grown_map(world)
    assert sparse_map.num_registered == len(world.frame_ids)
    sparse_map.set_camera_params("camera", params)
    for frame_id in sparse_map.registered_ids:
        misplaced = find_misplacement(sparse_map, [frame_id])
        assert misplaced is None or misplaced.keyframe_ids
    fit = sparse_map.fit(sparse_map.registered_ids)
    assert fit.num_observations > 0
    sparse_map.filter_all()
    sparse_map.retriangulate()
