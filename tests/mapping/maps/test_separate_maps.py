"""The end of a run: what cannot be joined gets a map of its own; the fullest is the map."""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import Config, RescueConfig
from engine.events import MainMapChanged
from engine.mapping.model.sparse_map import SparseMap
from engine.types import Float64Array, FrameId, PoseKind
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
    assert [one.num_registered for one in run.figures.maps] == [12, 8]
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


NO_RESTARTS = RescueConfig(final_rebuilds=0)


@pytest.fixture(scope="module")
def later_field() -> MapperRun:
    """The map starts over the field of few keyframes; a frame lies between those of each."""
    world = two_fields(8, 14)
    run = MapperRun(
        Config(rescue=NO_RESTARTS), matcher=FakeMatcher(world=world), graph=scene_graph()
    )
    for frame_id in world.frame_ids:
        if frame_id in (6, 20):
            run.add_frame(world.tracked(frame_id, keyframe_id=frame_id - 1))
        else:
            run.add_keyframe(world.keyframe(frame_id))
    run.end()
    return run


@pytest.mark.slow
def test_the_fullest_map_becomes_the_map(later_field: MapperRun) -> None:
    run, (separate,) = later_field, later_field.separate_maps
    first, second = [1, 2, 3, 4, 5, 7, 8], [*range(9, 20), 21, 22]
    assert run.registered_ids == second
    assert separate.registered_ids == first
    (changed,) = run.emitted(MainMapChanged)
    assert changed.num_registered_in_former == 7
    assert 1.25 * 7 <= changed.num_registered < 13  # while the flight went on
    assert run.figures.counts.num_registered == 13
    assert [one.num_registered for one in run.figures.maps] == [13, 7]
    assert [one.first_name for one in run.figures.maps] == [
        run.sparse_map.keyframe(FrameId(9)).name,
        separate.keyframe(FrameId(1)).name,
    ]
    copies = run.mapper.snapshot().copies
    assert [copy.reconstruction.num_reg_images() for copy in copies] == [13, 7]
    assert run.mapper.view().keyframe_ids.tolist() == second


@pytest.mark.slow
def test_frames_have_their_pose_in_the_map_of_their_keyframe(later_field: MapperRun) -> None:
    of_map, of_separate = later_field.mapper.trajectories()
    assert [pose.frame_id for pose in of_map if pose.kind is PoseKind.TRACKED] == [20]
    assert [pose.frame_id for pose in of_separate if pose.kind is PoseKind.TRACKED] == [6]
    assert len(of_map) + len(of_separate) == 22
    assert later_field.figures.num_frames_without_pose == 0
    assert [one.num_posed_frames for one in later_field.figures.maps] == [14, 8]


@pytest.mark.slow
def test_a_map_that_no_other_exceeds_stays_the_map() -> None:
    run = finished(two_fields(8, 8), rescue=NO_RESTARTS)
    assert run.registered_ids == list(range(1, 9))
    assert [one.num_registered for one in run.separate_maps] == [8]
    assert run.emitted(MainMapChanged) == []
