"""The end of a run: what cannot be joined to the map gets a map of its own, or is left out."""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import Config, RescueConfig
from engine.mapping.sparse_map import SparseMap
from engine.types import Float64Array, FrameId
from tests.support.mapper_runs import MapperRun
from tests.support.synthetic import (
    FakeMatcher,
    SyntheticWorld,
    pose_errors,
    scene_graph,
    straight_path,
)

FAR = 500.0  # units of the map: nothing is seen of one field from the other


def shifted(poses: Float64Array) -> Float64Array:
    """Poses (N, 3, 4) over the next field."""
    moved = poses.copy()
    moved[:, :, 3] -= moved[:, :, :3] @ np.array((0.0, FAR, 0.0))
    return moved


def two_fields(num_first: int, num_second: int, *, noise_px: float = 0.0) -> SyntheticWorld:
    """One flight over two fields that share no point."""
    poses = np.concatenate([straight_path(num_first), straight_path(num_second)])
    poses[num_first:] = shifted(poses[num_first:])
    near_ground = SyntheticWorld(straight_path(num_first)).points
    far_ground = SyntheticWorld(straight_path(num_second), seed=1).points + (0.0, FAR, 0.0)
    return SyntheticWorld(
        poses, points=np.concatenate([near_ground, far_ground]), noise_px=noise_px
    )


def finished(world: SyntheticWorld, *, rescue: RescueConfig | None = None) -> MapperRun:
    run = MapperRun(
        Config(rescue=rescue or RescueConfig()),
        matcher=FakeMatcher(world=world),
        graph=scene_graph(),
    )
    for frame_id in world.frame_ids:
        run.add_keyframe(world.keyframe(frame_id))
    run.end()
    return run


def poses_in(sparse_map: SparseMap) -> dict[FrameId, np.ndarray]:
    return {i: sparse_map.cam_from_world(i) for i in sparse_map.registered_ids}


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return two_fields(12, 8, noise_px=0.5)


@pytest.fixture(scope="module")
def run(world: SyntheticWorld) -> MapperRun:
    return finished(world)


@pytest.mark.slow
def test_a_field_that_nothing_joins_to_the_map_gets_a_map_of_its_own(
    run: MapperRun, world: SyntheticWorld
) -> None:
    (separate,) = run.separate_maps
    assert run.registered_ids == world.frame_ids[:12]
    assert separate.registered_ids == world.frame_ids[12:]
    for sparse_map in (run.sparse_map, separate):
        assert 1e-6 < pose_errors(poses_in(sparse_map), world).rmse_ratio < 2e-3
        assert 0.3 < sparse_map.mean_reprojection_error_px() < 0.7
        assert sparse_map.reconstruction.is_valid()
    assert run.figures.num_components == 2
    copies = run.mapper.snapshot().copies
    assert [copy.reconstruction.num_reg_images() for copy in copies] == [12, 8]


@pytest.mark.slow
def test_a_separate_map_knows_nothing_of_the_other_keyframes(run: MapperRun) -> None:
    (separate,) = run.separate_maps
    assert separate.keyframe_ids == separate.registered_ids
    assert {image.name for image in separate.reconstruction.images.values()} == {
        separate.keyframe(i).name for i in separate.keyframe_ids
    }


def test_a_few_keyframes_that_cannot_be_joined_are_left_out() -> None:
    world = two_fields(12, 4)
    run = finished(world)
    assert run.separate_maps == []
    assert run.registered_ids == world.frame_ids[:12]


@pytest.mark.slow
def test_separate_maps_are_made_on_request_only() -> None:
    run = finished(two_fields(12, 8), rescue=RescueConfig(separate_maps=False))
    assert run.separate_maps == []


def test_a_whole_map_leaves_nothing_for_another() -> None:
    assert finished(SyntheticWorld(straight_path(12))).separate_maps == []


@pytest.mark.slow
def test_the_fullest_of_several_separate_maps_comes_first() -> None:
    """Three fields; the map holds the largest."""
    near, far = two_fields(8, 5), two_fields(8, 6)
    world = SyntheticWorld(
        np.concatenate([near.poses, shifted(far.poses[8:])]),
        points=np.concatenate([near.points, far.points + (0.0, FAR, 0.0)]),
    )
    run = finished(world)
    assert run.registered_ids == world.frame_ids[:8]
    assert [one.registered_ids for one in run.separate_maps] == [
        world.frame_ids[13:],
        world.frame_ids[8:13],
    ]
