"""Growing a map, on a synthetic world."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from engine.config import GlobalBundleAdjustmentConfig, LocalBundleAdjustmentConfig
from engine.geometry import camera_center
from engine.mapping.model import growth
from engine.mapping.model.growth import (
    GrowthConfig,
    adjust_in_place,
    grow_fully,
    register_and_refine,
)
from engine.mapping.model.sparse_map import SparseMap
from engine.types import Float64Array, FrameId, RegistrationStatus, VerifiedPair
from tests.support.synthetic import (
    FOCAL_PX,
    Photos,
    SyntheticWorld,
    ground,
    grow,
    grown_map,
    map_of_keyframes,
    pose_errors,
    poses_of,
    repeated_place,
    straight_path,
)

CONFIG = GrowthConfig(
    min_inlier_ratio=0.65,
    local_bundle_adjustment=LocalBundleAdjustmentConfig(),
    global_bundle_adjustment=GlobalBundleAdjustmentConfig(),
    num_threads=1,
)
NUM_FRAMES = 11


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(NUM_FRAMES), noise_px=0.3)


def started_map(world: SyntheticWorld, first: int, second: int, **settings: Any) -> SparseMap:
    sparse_map = map_of_keyframes(world, **settings)
    grow(sparse_map, world, [first, second])
    return sparse_map


def test_growing_takes_everything_best_seen_first(world: SyntheticWorld) -> None:
    sparse_map = started_map(world, 5, 7)
    visible = {
        i: sparse_map.num_visible_points(i)
        for i in world.frame_ids
        if not sparse_map.is_registered(i)
    }
    registered = grow_fully(sparse_map, config=CONFIG)
    assert sparse_map.registered_ids == world.frame_ids
    assert set(registered) == set(world.frame_ids) - {5, 7}
    assert all(r.status is RegistrationStatus.REGISTERED for r in registered.values())
    order = list(registered)
    assert order[0] == max(visible, key=lambda i: visible[i]) == 6
    assert order.index(FrameId(8)) < order.index(FrameId(9)) < order.index(FrameId(11))
    assert order.index(FrameId(4)) < order.index(FrameId(3)) < order.index(FrameId(1))
    assert 1e-5 < pose_errors(poses_of(sparse_map), world).rmse_ratio < 2e-3


def test_growing_stops_where_nothing_is_seen(world: SyntheticWorld) -> None:
    sparse_map = started_map(world, 2, 3, skips=lambda pair: pair.first <= 6 < pair.second)
    registered = grow_fully(sparse_map, config=CONFIG)
    assert sorted(registered) == [1, 4, 5, 6]
    assert sparse_map.registered_ids == [1, 2, 3, 4, 5, 6]
    assert grow_fully(sparse_map, config=CONFIG) == {}


def test_a_keyframe_that_failed_is_tried_again_when_a_neighbour_came(world: SyntheticWorld) -> None:
    """Keyframe 4 has bad pairs with the first ones and good pairs with those behind it."""
    bad = [world.verified_pair(i, 4, wrong_ratio=0.6) for i in (1, 2, 3)]
    sparse_map = map_of_keyframes(
        world,
        frame_ids=[1, 2, 3, 4, 5],
        skips=lambda pair: 4 in (pair.first, pair.second),
        given_pairs=[*bad, world.verified_pair(4, 5)],
    )
    grow(sparse_map, world, [1, 2, 3])
    assert sparse_map.num_visible_points(FrameId(4)) > sparse_map.num_visible_points(FrameId(5))
    refused = sparse_map.register(FrameId(4), min_inlier_ratio=CONFIG.min_inlier_ratio)
    assert refused.status is RegistrationStatus.TOO_FEW_INLIERS
    assert list(grow_fully(sparse_map, config=CONFIG)) == [5, 4]


def test_a_registration_that_fails_leaves_the_map_alone(world: SyntheticWorld) -> None:
    sparse_map = started_map(world, 1, 2, wrong_ratio=0.6)
    points = sparse_map.point_cloud().points3D_in_world
    registration = register_and_refine(sparse_map, FrameId(3), config=CONFIG)
    assert registration.status is RegistrationStatus.TOO_FEW_INLIERS
    assert sparse_map.registered_ids == [1, 2]
    assert np.array_equal(sparse_map.point_cloud().points3D_in_world, points)


def test_a_registered_keyframe_brings_points_and_is_refined(world: SyntheticWorld) -> None:
    sparse_map = started_map(world, 1, 2)
    num_points = sparse_map.num_points3D
    plain = started_map(world, 1, 2)
    plain.register(FrameId(3), min_inlier_ratio=0.65)
    plain.triangulate(FrameId(3))
    registration = register_and_refine(sparse_map, FrameId(3), config=CONFIG)
    assert registration.status is RegistrationStatus.REGISTERED
    assert sparse_map.num_points3D > num_points
    assert sparse_map.mean_reprojection_error_px() < plain.mean_reprojection_error_px()


@pytest.mark.parametrize("is_constant", [True, False])
def test_adjusting_in_place_refines_what_may_change(
    world: SyntheticWorld, is_constant: bool
) -> None:
    sparse_map = grown_map(world, is_constant=is_constant)
    before_px = sparse_map.mean_reprojection_error_px()
    adjust_in_place(sparse_map, config=CONFIG)
    assert 0.2 < sparse_map.mean_reprojection_error_px() < before_px
    assert (sparse_map.camera("camera").mean_focal_length() == FOCAL_PX) is is_constant


def test_between_two_parts_a_drift_apart_a_keyframe_waits_until_the_end() -> None:
    world = SyntheticWorld(straight_path(20), noise_px=0.3)
    sparse_map = map_of_keyframes(world)
    shift = np.zeros((3, 4))
    shift[0, 3] = 1.0
    sparse_map.place({i: world.pose(i) + (i > 11) * shift for i in world.frame_ids if i != 11})
    for frame_id in sparse_map.registered_ids:
        sparse_map.triangulate(frame_id)
    sparse_map.filter_all()

    assert grow_fully(sparse_map, config=CONFIG) == {}
    finally_grown = grow_fully(sparse_map, config=dataclasses.replace(CONFIG, is_final=True))

    assert list(finally_grown) == [11]
    assert finally_grown[FrameId(11)].status is RegistrationStatus.REGISTERED


def test_a_strong_pair_poses_a_keyframe_that_repeated_structure_puts_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where that structure outvotes it so clearly that both places are open."""
    poses = straight_path(26)
    points, looks_like = repeated_place(
        ground(poses, density=2.0), x_range=(-9.0, 15.0), shift=40.0, ratio=0.6
    )
    world = Photos(poses, points=points, looks_like=looks_like, noise_px=0.1)
    alike = looks_like != np.arange(len(points))
    among = {*np.flatnonzero(alike).tolist(), *looks_like[alike].tolist()}
    sparse_map = map_of_keyframes(
        world,
        skips=lambda pair: 3 in (pair.first, pair.second),
        given_pairs=[
            world.verified_pair(3, 5, among=range(0, len(points), 4)),
            *(world.verified_pair(3, other, among=among, wrong_ratio=0.45) for other in (22, 23)),
        ],
    )
    grow(sparse_map, world, [i for i in world.frame_ids if i != 3])
    strong = sparse_map.neighbors(FrameId(3))[FrameId(5)]

    def contradicting(
        sparse_map: SparseMap, frame_id: FrameId, cam_from_world: Float64Array
    ) -> dict[FrameId, VerifiedPair]:
        beside = camera_center(sparse_map.cam_from_world(FrameId(4)))
        is_right = np.linalg.norm(camera_center(cam_from_world) - beside) < 4.0
        return {} if is_right else {FrameId(5): strong}

    monkeypatch.setattr(growth, "contradicting_neighbors", contradicting)
    registration = register_and_refine(
        sparse_map, FrameId(3), config=dataclasses.replace(CONFIG, min_inlier_ratio=0.2)
    )
    assert registration.status is RegistrationStatus.REGISTERED
    assert contradicting(sparse_map, FrameId(3), sparse_map.cam_from_world(FrameId(3))) == {}
