"""Poses of frames by copies of keyframes, as the mapper itself would give them."""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import Config, RegistrationConfig
from engine.events import FramePosed
from engine.mapping.ahead_posing import AheadPoser, PosingReference
from engine.types import TrackedFrame
from tests.support.mapper_runs import MapperRun
from tests.support.synthetic import FakeMatcher, SyntheticWorld, scene_graph, straight_path

KEYFRAMES = (1, 4, 7, 10, 13)


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(18, step=0.6), noise_px=0.5)


@pytest.fixture
def mapped(world: SyntheticWorld) -> MapperRun:
    run = MapperRun(Config(), matcher=FakeMatcher(world=world), graph=scene_graph())
    for frame_id in KEYFRAMES[:-1]:
        run.add_keyframe(world.keyframe(frame_id))
    return run


def references(run: MapperRun, world: SyntheticWorld) -> tuple[PosingReference, ...]:
    """Of the last keyframe, which is added here."""
    to_match = run.begin_keyframe(world.keyframe(KEYFRAMES[-1]))
    matched = run.matching.match_keyframe(
        to_match.frame_id, wants_pointmaps=False, intrinsics=to_match.intrinsics
    )
    return run.mapper.add_keyframe(matched, wants_references=True).references


def poser_with(references: tuple[PosingReference, ...]) -> AheadPoser:
    poser = AheadPoser(RegistrationConfig(), seed=0)
    poser.take(references)
    return poser


def tracked(world: SyntheticWorld, frame_id: int, *, keyframe_id: int = 13) -> TrackedFrame:
    return world.tracked(frame_id, keyframe_id=keyframe_id)


def test_a_frame_has_the_pose_that_the_mapper_gives_it(
    mapped: MapperRun, world: SyntheticWorld
) -> None:
    poser = poser_with(references(mapped, world))
    for frame_id in (14, 15, 16):
        posed = poser.pose(tracked(world, frame_id), fallback=None)
        assert posed is not None
        pose, camera_key = posed
        (by_mapper,) = mapped.mapper.add_frame(tracked(world, frame_id)).new_poses
        assert (pose.frame_id, pose.map_number, pose.world_number) == (frame_id, 0, 0)
        assert camera_key == "camera"
        np.testing.assert_allclose(pose.cam_from_world, by_mapper.cam_from_world, atol=1e-6)


def test_a_frame_of_a_newer_keyframe_is_posed_by_its_fallback(
    mapped: MapperRun, world: SyntheticWorld
) -> None:
    poser = poser_with(references(mapped, world))
    newer, older = tracked(world, 17, keyframe_id=16), tracked(world, 17)
    assert poser.pose(newer, fallback=None) is None
    by_fallback, by_itself = poser.pose(newer, fallback=older), poser.pose(older, fallback=None)
    assert by_fallback is not None
    assert by_itself is not None
    np.testing.assert_allclose(
        by_fallback[0].cam_from_world, by_itself[0].cam_from_world, atol=1e-3
    )


def test_references_stay_as_they_were_while_the_map_changes(
    mapped: MapperRun, world: SyntheticWorld
) -> None:
    *_, reference = references(mapped, world)
    before = reference.cam_from_world.copy(), reference.points3D_in_world.copy()
    focal_px = reference.camera.mean_focal_length()
    for frame_id in (14, 15, 16, 17, 18):
        mapped.add_keyframe(world.keyframe(frame_id))
    mapped.end()
    np.testing.assert_array_equal(reference.cam_from_world, before[0])
    np.testing.assert_array_equal(reference.points3D_in_world, before[1])
    assert reference.camera.mean_focal_length() == focal_px


def test_a_pose_that_was_published_is_kept_and_not_emitted_again(
    mapped: MapperRun, world: SyntheticWorld
) -> None:
    posed = poser_with(references(mapped, world)).pose(tracked(world, 14), fallback=None)
    assert posed is not None
    num_emitted = len(mapped.emitted(FramePosed))
    step = mapped.mapper.add_frame(tracked(world, 14), reported=posed[0])
    assert step.new_poses == (posed[0],)
    assert len(mapped.emitted(FramePosed)) == num_emitted
    assert [one.frame_id for one in step.relative_poses] == [14]


def test_there_are_no_references_before_there_is_a_map(world: SyntheticWorld) -> None:
    run = MapperRun(Config(), matcher=FakeMatcher(world=world), graph=scene_graph())
    assert references(run, world) == ()
