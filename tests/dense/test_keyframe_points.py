"""The points that a keyframe adds to the dense map."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.dense.keyframe_points import keyframe_points, shown_by, surface_normals
from tests.support.boxed_ground import (
    SIZE,
    depth_map,
    distance_to_surface,
    in_world,
    other_depth,
    pose_above,
)

_PIXELS = SIZE[0] * SIZE[1] // 4  # that may become points


def test_points_lie_on_the_surface_and_their_normals_point_out_of_it() -> None:
    pose = pose_above(1.0, -8.0, 12.0, tilt_deg=30.0)
    points = in_world(keyframe_points(depth_map(pose)), pose)
    xyz = points.xyz.astype(np.float64)
    on_ground = np.abs(xyz[:, 2]) < 1e-3
    assert np.percentile(distance_to_surface(xyz), 99) < 1e-4
    assert 0.8 * _PIXELS < len(xyz) < _PIXELS
    assert on_ground.sum() > 0.6 * len(xyz)
    assert np.median(points.normals[on_ground, 2]) > 0.9999
    on_side = (np.abs(xyz[:, 1] + 2.0) < 1e-3) & (xyz[:, 2] > 0.5) & (xyz[:, 2] < 2.5)
    assert on_side.sum() > 50
    assert np.median(points.normals[on_side, 1]) < -0.999
    assert (points.num_views == 4).all()


def test_sampling_is_the_distance_of_points_on_the_surface() -> None:
    pose = pose_above(0.0, 0.0, 15.0)
    points = keyframe_points(depth_map(pose, has_box=False))
    assert np.allclose(points.sampling, 2 * 15.0 / 150.0, rtol=0.15)
    line = points.xyz[: SIZE[0] // 2 - 2]
    assert np.allclose(np.diff(line[:, 0]), 2 * 15.0 / 150.0, rtol=1e-3)


def test_noise_turns_normals_but_leaves_them_on_average() -> None:
    pose = pose_above(0.0, 0.0, 15.0)
    normals, cosines = surface_normals(depth_map(pose, has_box=False, noise=0.002))
    along = -normals[2].reshape(cosines.shape)[cosines > 0]
    assert 0.5 < along.mean() < 0.9995
    mean = normals.sum(axis=1)
    assert -mean[2] / np.linalg.norm(mean) > 0.999


def test_a_depth_step_has_no_points() -> None:
    flat = depth_map(pose_above(0.0, 0.0, 15.0), has_box=False)
    depth = flat.depth.copy()
    depth[:, : SIZE[0] // 2] *= 0.7
    points = keyframe_points(replace(flat, depth=depth))
    columns = points.xyz[:, 0] / points.xyz[:, 2] * 150.0 + SIZE[0] / 2
    assert np.abs(columns - SIZE[0] / 2).min() > 1.0
    assert len(points.xyz) > 0.9 * _PIXELS
    facing = -points.normals[:, 2]
    assert facing.min() > 0.99  # the step bends none of its surroundings


def test_what_too_few_neighbours_agree_on_is_left_out() -> None:
    pose = pose_above(0.0, 0.0, 15.0)
    one_view = depth_map(pose, num_agreeing=1)
    assert len(keyframe_points(one_view).xyz) == 0
    assert len(keyframe_points(one_view, min_agreeing=1).xyz) > 0.8 * _PIXELS
    only = replace(
        one_view,
        neighbour_ids=one_view.neighbour_ids[:1],
        neighbour_from_keyframe=one_view.neighbour_from_keyframe[:1],
    )
    assert len(keyframe_points(only).xyz) > 0.8 * _PIXELS


def test_a_surface_that_an_earlier_keyframe_shows_is_left_out() -> None:
    poses = pose_above(-2.0, 0.0, 15.0), pose_above(2.0, 0.0, 15.0)
    maps = [depth_map(pose, frame_id=i + 1, noise=0.002) for i, pose in enumerate(poses)]
    alone = keyframe_points(maps[1])
    shown = shown_by(alone, maps[1], [other_depth(maps[0], poses[0], seen_from=poses[1])])
    new = in_world(alone, poses[1]).xyz[shown == 0]
    assert set(shown) == {0, 1}
    assert 0.15 * len(alone.xyz) < len(new) < 0.4 * len(alone.xyz)
    beyond_the_earlier_view = new[:, 0] > -2.0 + 15.0 * 80 / 150
    assert beyond_the_earlier_view.mean() > 0.75


def test_a_surface_that_is_seen_much_closer_is_added_again() -> None:
    far, near = pose_above(0.0, 0.0, 20.0), pose_above(0.0, 0.0, 8.0)
    far_map, near_map = depth_map(far, has_box=False), depth_map(near, has_box=False)
    far_first, near_first = (
        other_depth(far_map, far, seen_from=near),
        other_depth(near_map, near, seen_from=far),
    )
    closer = shown_by(keyframe_points(near_map), near_map, [far_first]) == 0
    farther = shown_by(keyframe_points(far_map), far_map, [near_first]) == 0
    assert closer.all()
    share_seen_closer = (8.0 / 20.0) ** 2
    assert 0.8 * (1 - share_seen_closer) < farther.sum() / _PIXELS < 1 - share_seen_closer


def test_another_surface_in_front_of_the_earlier_one_is_kept() -> None:
    pose = pose_above(0.0, 0.0, 15.0)
    points = keyframe_points(depth_map(pose))
    flat = other_depth(depth_map(pose, has_box=False), pose, seen_from=pose)
    is_box = shown_by(points, depth_map(pose), [flat]) == 0
    height = in_world(points, pose).xyz[is_box, 2]
    assert len(height) > 300
    assert (height > 2.9).mean() > 0.99


def test_an_empty_or_tiny_depth_map_gives_no_points() -> None:
    whole = depth_map(pose_above(0.0, 0.0, 15.0))
    tiny = replace(
        whole,
        depth=whole.depth[:3, :3],
        relative_error=whole.relative_error[:3, :3],
        num_agreeing=whole.num_agreeing[:3, :3],
        colors=whole.colors[:3, :3],
    )
    assert len(keyframe_points(tiny).xyz) == 0
    nothing = replace(whole, depth=np.zeros_like(whole.depth))
    assert len(keyframe_points(nothing).xyz) == 0
