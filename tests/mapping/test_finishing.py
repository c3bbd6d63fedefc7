"""The end of a run: what cannot be joined to the map gets a map of its own, or is left out."""

from __future__ import annotations

import numpy as np

from engine.config import Config, RescueConfig
from engine.mapping.mapper import MappingPipeline
from engine.mapping.sparse_map import SparseMap
from engine.types import FrameId
from tests.support.synthetic import (
    FakeMatcher,
    SyntheticWorld,
    pose_errors,
    scene_graph,
    straight_path,
)

FAR = 500.0  # units of the map: nothing is seen of one field from the other


def two_fields(num_first: int, num_second: int, *, noise_px: float = 0.0) -> SyntheticWorld:
    """One flight over two fields that share no point."""
    poses = np.concatenate([straight_path(num_first), straight_path(num_second)])
    far = poses[num_first:]
    far[:, :, 3] -= far[:, :, :3] @ np.array((0.0, FAR, 0.0))
    near_ground = SyntheticWorld(straight_path(num_first)).points
    far_ground = SyntheticWorld(straight_path(num_second), seed=1).points + (0.0, FAR, 0.0)
    return SyntheticWorld(
        poses, points=np.concatenate([near_ground, far_ground]), noise_px=noise_px
    )


def finished(world: SyntheticWorld, *, rescue: RescueConfig | None = None) -> MappingPipeline:
    pipeline = MappingPipeline(
        Config(rescue=rescue or RescueConfig()),
        matcher=FakeMatcher(world=world),
        graph=scene_graph(),
        emit=lambda event: None,
        clock=lambda: 0.0,
    )
    for frame_id in world.frame_ids:
        pipeline.add_keyframe(world.keyframe(frame_id))
    pipeline.finish()
    return pipeline


def poses_in(sparse_map: SparseMap) -> dict[FrameId, np.ndarray]:
    return {i: sparse_map.cam_from_world(i) for i in sparse_map.registered_ids}


def test_a_field_that_nothing_joins_to_the_map_gets_a_map_of_its_own() -> None:
    world = two_fields(12, 8, noise_px=0.5)
    pipeline = finished(world)
    (separate,) = pipeline.separate_maps
    assert pipeline.sparse_map.registered_ids == world.frame_ids[:12]
    assert separate.registered_ids == world.frame_ids[12:]
    for sparse_map in (pipeline.sparse_map, separate):
        assert 1e-6 < pose_errors(poses_in(sparse_map), world).rmse_ratio < 2e-3
        assert 0.3 < sparse_map.mean_reprojection_error_px() < 0.7
        assert sparse_map.reconstruction.is_valid()


def test_a_separate_map_knows_nothing_of_the_other_keyframes() -> None:
    (separate,) = finished(two_fields(12, 8)).separate_maps
    assert separate.keyframe_ids == separate.registered_ids
    assert {image.name for image in separate.reconstruction.images.values()} == {
        separate.keyframe(i).name for i in separate.keyframe_ids
    }


def test_a_few_keyframes_that_cannot_be_joined_are_left_out() -> None:
    world = two_fields(12, 4)
    pipeline = finished(world)
    assert pipeline.separate_maps == ()
    assert pipeline.sparse_map.registered_ids == world.frame_ids[:12]


def test_separate_maps_are_made_on_request_only() -> None:
    pipeline = finished(two_fields(12, 8), rescue=RescueConfig(separate_maps=False))
    assert pipeline.separate_maps == ()


def test_a_whole_map_leaves_nothing_for_another() -> None:
    assert finished(SyntheticWorld(straight_path(12))).separate_maps == ()
