"""Joining maps: what a former map holds moves into one that shares a single keyframe with it."""

from __future__ import annotations

import pytest

from engine.config import (
    GlobalBundleAdjustmentConfig,
    LocalBundleAdjustmentConfig,
    RegistrationConfig,
)
from engine.mapping.maps.map_joining import join_former
from engine.mapping.model.growth import GrowthConfig
from engine.mapping.model.sparse_map import SparseMap
from engine.types import FrameId
from tests.support.synthetic import (
    SyntheticWorld,
    grow,
    map_of_keyframes,
    pose_errors,
    poses_of,
    straight_path,
)

GROWTH = GrowthConfig(
    min_inlier_ratio=0.65,
    local_bundle_adjustment=LocalBundleAdjustmentConfig(),
    global_bundle_adjustment=GlobalBundleAdjustmentConfig(),
    num_threads=1,
)
REGISTRATION = RegistrationConfig()
NUM_FRAMES = 9
FORMER = [1, 2, 3, 4, 5]
LATER = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(NUM_FRAMES), noise_px=0.3)


def part(world: SyntheticWorld, registered: list[int]) -> SparseMap:
    """A map of all keyframes of which some are registered."""
    sparse_map = map_of_keyframes(world)
    grow(sparse_map, world, registered)
    return sparse_map


@pytest.mark.parametrize("scale", [0.2, 1.0, 7.0])
def test_a_former_map_of_any_scale_joins_by_one_keyframe(
    world: SyntheticWorld, scale: float
) -> None:
    sparse_map, former = part(world, LATER), part(world, FORMER)
    former.scale(scale)
    before = poses_of(former)
    joined = join_former(sparse_map, former, registration=REGISTRATION, config=GROWTH)
    assert joined == FORMER[:-1]
    assert sparse_map.registered_ids == world.frame_ids
    errors = pose_errors(poses_of(sparse_map), world)
    assert 1e-6 < errors.rmse_ratio < 3e-3
    assert errors.max_rotation_rad < 3e-3
    assert former.registered_ids == FORMER
    assert all((former.cam_from_world(i) == before[i]).all() for i in before)


def test_what_sees_too_little_of_the_map_stays_out(world: SyntheticWorld) -> None:
    sparse_map, former = part(world, LATER), part(world, FORMER)
    num_visible = sum(sparse_map.num_visible_points(FrameId(i)) for i in FORMER[:-1])
    strict = RegistrationConfig(min_inliers=num_visible + 1)
    assert join_former(sparse_map, former, registration=strict, config=GROWTH) == []
    assert sparse_map.registered_ids == LATER


def test_a_former_map_that_is_wrong_stays_out(world: SyntheticWorld) -> None:
    sparse_map, former = part(world, LATER), part(world, FORMER)
    turned = former.cam_from_world(FrameId(5)).copy()
    turned[:, :3] = turned[:, :3] @ [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]
    former.set_pose(FrameId(5), turned)
    assert join_former(sparse_map, former, registration=REGISTRATION, config=GROWTH) == []
    assert sparse_map.registered_ids == LATER


def test_maps_without_a_common_keyframe_stay_apart(world: SyntheticWorld) -> None:
    sparse_map, former = part(world, LATER[1:]), part(world, FORMER)
    assert join_former(sparse_map, former, registration=REGISTRATION, config=GROWTH) == []
    assert sparse_map.registered_ids == LATER[1:]
