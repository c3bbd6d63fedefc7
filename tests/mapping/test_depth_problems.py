"""Depth problems: what the mapper hands out to the dense map, frozen."""

from __future__ import annotations

import numpy as np
import pytest

from engine.estimators.lenses import border_rays, camera_of
from engine.geometry import transform_points
from engine.mapping import depth_problems as depth_problems_module
from engine.mapping.assembly import empty_map
from engine.mapping.depth_problems import hand_out, poses_of
from engine.mapping.model.sparse_map import SparseMap
from engine.types import FrameId
from tests.support.mapper_runs import WITHOUT_WINDOWS, MapperRun
from tests.support.synthetic import FakeMatcher, SyntheticWorld, scene_graph, straight_path

NUM_KEYFRAMES = 8


@pytest.fixture(scope="module")
def sparse_map() -> SparseMap:
    """A map of a straight flight."""
    world = SyntheticWorld(straight_path(NUM_KEYFRAMES))
    config = WITHOUT_WINDOWS
    run = MapperRun(config, matcher=FakeMatcher(world=world), graph=scene_graph())
    for frame_id in world.frame_ids:
        run.add_keyframe(world.keyframe(frame_id))
    run.end()
    assert len(run.registered_ids) == NUM_KEYFRAMES
    return run.sparse_map


def test_the_newest_keyframe_with_others_after_it_comes_first(sparse_map: SparseMap) -> None:
    handout = hand_out(sparse_map, done=())
    assert handout.problem is not None
    assert handout.problem.view.frame_id == 5
    assert handout.num_waiting == 5
    final = hand_out(sparse_map, done=(), is_final=True)
    assert final.problem is not None
    assert final.problem.view.frame_id == 8
    assert final.num_waiting == 8


def test_keyframes_that_had_their_turn_are_left_out(sparse_map: SparseMap) -> None:
    handout = hand_out(sparse_map, done={FrameId(5), FrameId(4)})
    assert handout.problem is not None
    assert handout.problem.view.frame_id == 3
    every = {FrameId(i) for i in range(1, 9)}
    assert hand_out(sparse_map, done=every).problem is None


def test_poses_are_handed_out_without_making_a_problem(
    sparse_map: SparseMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(depth_problems_module, "_problem")
    handout = hand_out(sparse_map, done=(), is_final=True, wants_problem=False, wants_poses=True)
    assert handout.problem is None
    assert handout.num_waiting == len(sparse_map.registered_ids)
    assert handout.poses is not None


def test_keyframes_come_again_in_their_turn(sparse_map: SparseMap) -> None:
    again = (FrameId(99), FrameId(2), FrameId(4))  # keyframe 99 is not registered
    done = {FrameId(i) for i in (2, 4)}
    every = {FrameId(i) for i in range(1, 9)}
    first = [{*done}, {*done, FrameId(5)}, every]
    problems = [hand_out(sparse_map, done=ids, again=again).problem for ids in first]
    assert [one and one.view.frame_id for one in problems] == [5, 4, 4]


def test_where_nothing_new_is_wanted_only_what_is_made_again_comes(sparse_map: SparseMap) -> None:
    oldest = sparse_map.registered_ids[0]
    handed = hand_out(sparse_map, done={oldest}, again=(oldest,), wants_new=False)
    assert handed.problem is not None
    assert handed.problem.view.frame_id == oldest
    assert handed.num_waiting > 0
    assert hand_out(sparse_map, done={oldest}, wants_new=False).problem is None


def test_views_hold_what_the_map_knows_of_them(sparse_map: SparseMap) -> None:
    problem = hand_out(sparse_map, done=()).problem
    assert problem is not None
    counts = list(sparse_map.covisibility(problem.view.frame_id).values())
    assert [len(one.points3D_ids) for one in problem.neighbours] == counts[:12]
    for one in (problem.view, *problem.neighbours):
        in_camera = transform_points(one.cam_from_world, one.points3D_in_world)
        projected = np.asarray(camera_of(one.intrinsics).img_from_cam(in_camera))
        assert len(one.points3D_ids) > 20
        assert np.abs(projected - one.keypoints_xy).max() < 2.0
        assert np.isin(one.points3D_ids, problem.view.points3D_ids).all()


def test_every_view_has_the_name_of_its_image(sparse_map: SparseMap) -> None:
    handout = hand_out(sparse_map, done=())
    assert handout.problem is not None
    views = (handout.problem.view, *handout.problem.neighbours)
    assert handout.image_names == {
        one.frame_id: sparse_map.keyframe(one.frame_id).name for one in views
    }


def test_poses_come_where_they_are_asked_for(sparse_map: SparseMap) -> None:
    assert hand_out(sparse_map, done=()).poses is None
    poses = hand_out(sparse_map, done=(), wants_poses=True).poses
    assert poses is not None
    assert poses.frame_ids.tolist() == sparse_map.registered_ids
    assert np.array_equal(poses.by_id()[3], sparse_map.cam_from_world(FrameId(3)))
    camera = sparse_map.camera(sparse_map.keyframe(FrameId(3)).calibration_key)
    assert poses.focal_px[2] == camera.params[0]
    assert np.array_equal(poses.border_rays[2], border_rays(camera))


def test_an_empty_map_has_no_problem() -> None:
    empty = empty_map(WITHOUT_WINDOWS)
    handout = hand_out(empty, done=(), is_final=True, wants_poses=True)
    assert handout.problem is None
    assert poses_of(empty).cam_from_world.shape == (0, 3, 4)
