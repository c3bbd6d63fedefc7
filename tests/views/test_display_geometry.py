"""Sizes, pyramids and plans of a map, and which parts of it are drawn again."""

from __future__ import annotations

import numpy as np
import pytest

from adapters.views.display_geometry import (
    cam_centers,
    display_scale,
    frustum_strokes,
    median_spacing,
    plan_positions,
)
from adapters.views.display_parts import ChunkNumbers, Part, PartTracker, split_parts
from engine.types import Float64Array


def camera(center: Float64Array, target: Float64Array, down: Float64Array) -> Float64Array:
    """cam_from_world (3, 4) of a camera at ``center`` that faces ``target``."""
    forward = (target - center) / np.linalg.norm(target - center)
    right = np.cross(down, forward)
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    return np.column_stack([rotation, -rotation @ center])


def circle_of_cameras(num: int, *, radius: float = 10.0, height: float = 4.0) -> Float64Array:
    down = np.array([0.0, 1.0, 0.0])
    angles = np.linspace(0.0, 2.0 * np.pi, num, endpoint=False)
    centers = [np.array([radius * np.cos(a), -height, radius * np.sin(a)]) for a in angles]
    return np.stack([camera(center, np.zeros(3), down) for center in centers])


@pytest.fixture
def points() -> Float64Array:
    return np.random.default_rng(0).uniform(-5.0, 5.0, (2000, 3))


def test_a_few_points_far_outside_change_no_size_and_are_not_shown(points: Float64Array) -> None:
    centers = cam_centers(circle_of_cameras(20))
    clean = display_scale(points.astype(np.float32), centers)
    far = np.random.default_rng(1).normal(size=(20, 3)) * 1e4
    spoiled_points = np.concatenate([points, far]).astype(np.float32)
    spoiled = display_scale(spoiled_points, centers)

    assert clean is not None
    assert spoiled is not None
    assert spoiled.extent_map == pytest.approx(clean.extent_map, rel=0.05)
    shown = spoiled.shows(spoiled_points)
    assert shown[: len(points)].all()
    assert not shown[len(points) :].any()


def test_sizes_follow_the_unit_of_the_map(points: Float64Array) -> None:
    centers = cam_centers(circle_of_cameras(20))
    small = display_scale(points.astype(np.float32), centers)
    large = display_scale((1e3 * points).astype(np.float32), 1e3 * centers)

    assert small is not None
    assert large is not None
    assert large.frustum_depth_map == pytest.approx(1e3 * small.frustum_depth_map, rel=1e-5)
    assert large.tolerance_map == pytest.approx(1e3 * small.tolerance_map, rel=1e-5)


def test_sizes_stay_while_the_map_grows_a_little_and_change_when_it_doubles(
    points: Float64Array,
) -> None:
    centers = cam_centers(circle_of_cameras(20))
    first = display_scale(points.astype(np.float32), centers)
    slightly = display_scale((1.05 * points).astype(np.float32), centers, previous=first)
    doubled = display_scale((2.0 * points).astype(np.float32), 2.0 * centers, previous=first)

    assert slightly is first
    assert doubled is not first


def test_an_empty_map_has_no_size() -> None:
    assert display_scale(np.zeros((0, 3), np.float32), np.zeros((0, 3))) is None


def test_one_camera_alone_still_gets_a_pyramid() -> None:
    scale = display_scale(np.zeros((0, 3), np.float32), np.array([[3.0, 0.0, 0.0]]))

    assert scale is not None
    assert scale.frustum_depth_map > 0.0


def test_spacing_is_the_distance_to_the_nearest_neighbour_and_ignores_a_straggler() -> None:
    line = np.column_stack([np.arange(30.0) * 0.5, np.zeros((30, 2))])

    assert median_spacing(line) == pytest.approx(0.5)
    assert median_spacing(np.vstack([line, [1e6, 0.0, 0.0]])) == pytest.approx(0.5)
    assert median_spacing(line[:1]) == 0.0


def test_the_corners_of_a_pyramid_project_to_the_corners_of_the_image() -> None:
    cam_from_world = circle_of_cameras(3)
    strokes = frustum_strokes(
        cam_from_world,
        focal_px=np.full(3, 500.0),
        image_sizes=np.tile([640, 480], (3, 1)),
        depth_map=0.7,
    )

    assert strokes.shape == (3, 10, 3)
    for pose, stroke in zip(cam_from_world, strokes, strict=True):
        in_cam = np.unique(np.round(stroke @ pose[:, :3].T + pose[:, 3], 4), axis=0)
        apex, corners = in_cam[in_cam[:, 2] < 0.1], in_cam[in_cam[:, 2] >= 0.1]
        assert np.allclose(apex, 0.0, atol=1e-3)
        pixels = 500.0 * corners[:, :2] / corners[:, 2:] + [320.0, 240.0]
        assert len(corners) == 4
        assert np.allclose(np.abs(pixels - [320, 240]), [320.0, 240.0], atol=0.2)
        assert np.allclose(corners[:, 2], 0.7, atol=1e-3)


def test_the_pyramid_of_a_fisheye_has_the_edges_of_its_view() -> None:
    poses = circle_of_cameras(2)
    rays = np.array([(-0.7, -0.6, 0.1), (0.7, -0.6, 0.1), (0.7, 0.6, 0.1), (-0.7, 0.6, 0.1)])
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)  # 84 degrees off the axis
    strokes = frustum_strokes(
        poses,
        focal_px=np.full(2, 300.0),
        image_sizes=np.tile([640, 480], (2, 1)),
        depth_map=0.7,
        corner_rays=np.stack([rays, np.full((4, 3), np.nan)]),
    )
    in_cam = strokes[0] @ poses[0, :, :3].T + poses[0, :, 3]
    assert np.allclose(in_cam[:4], 0.7 * rays, atol=1e-5)
    assert np.allclose(in_cam[5], 0.0, atol=1e-5)
    pinhole = frustum_strokes(
        poses[1:],
        focal_px=np.full(1, 300.0),
        image_sizes=np.array([[640, 480]]),
        depth_map=0.7,
    )
    assert np.array_equal(strokes[1:], pinhole)


def test_a_camera_that_sees_all_around_is_drawn_around_its_centre() -> None:
    poses = circle_of_cameras(1)
    strokes = frustum_strokes(
        poses,
        focal_px=np.full(1, 300.0),
        image_sizes=np.array([[640, 320]]),
        depth_map=0.8,
        corner_rays=np.zeros((1, 4, 3)),
    )
    in_cam = strokes[0] @ poses[0, :, :3].T + poses[0, :, 3]
    assert np.allclose(np.linalg.norm(in_cam, axis=1), 0.4, atol=1e-5)
    assert np.allclose(in_cam.min(axis=0), -0.4, atol=1e-5)
    assert np.allclose(in_cam.max(axis=0), 0.4, atol=1e-5)


def test_a_plan_keeps_distances_on_the_main_plane_with_neighbours_one_apart() -> None:
    centers = cam_centers(circle_of_cameras(12))
    plan = plan_positions(np.arange(12), centers, previous={})
    positions = np.stack(list(plan.values()))

    assert median_spacing(positions) == pytest.approx(1.0)
    assert np.ptp(np.linalg.norm(positions, axis=1)) < 1e-6  # still a circle


def test_a_plan_stays_where_it_is_while_the_map_grows() -> None:
    centers = cam_centers(circle_of_cameras(40))
    before = plan_positions(np.arange(20), centers[:20], previous={})
    after = plan_positions(np.arange(24), centers[:24], previous=before)
    old = np.stack([before[frame_id] for frame_id in range(20)])
    new = np.stack([after[frame_id] for frame_id in range(20)])
    moves = (new - new.mean(axis=0)) - (old - old.mean(axis=0))

    assert np.abs(moves).max() < 0.05


@pytest.mark.parametrize("num", [0, 1, 2])
def test_a_plan_of_hardly_any_cameras_is_finite(num: int) -> None:
    plan = plan_positions(np.arange(num), cam_centers(circle_of_cameras(3))[:num], previous={})

    assert len(plan) == num
    assert all(np.isfinite(position).all() for position in plan.values())


def test_parts_keep_their_rows_in_order() -> None:
    positions = np.arange(18, dtype=np.float32).reshape(6, 3)
    parts = split_parts(np.array([2, 0, 2, 0, 5, 2]), positions)

    assert list(parts) == [0, 2, 5]
    assert np.array_equal(parts[2].positions, positions[[0, 2, 5]])
    assert split_parts(np.zeros(0, np.int64), np.zeros((0, 3), np.float32)) == {}


def test_only_changed_parts_are_drawn_and_vanished_ones_cleared() -> None:
    tracker = PartTracker()
    one, two = (Part(positions=np.full((4, 3), value, np.float32)) for value in (1.0, 2.0))

    assert tracker.update({1: one, 2: two}, tolerance_map=0.1) == ({1: one, 2: two}, [])
    assert tracker.update({1: one, 2: two}, tolerance_map=0.1) == ({}, [])
    moved = Part(positions=two.positions + np.float32(0.2))
    assert tracker.update({2: moved}, tolerance_map=0.1) == ({2: moved}, [1])


def test_moves_too_small_to_see_add_up_until_they_are_drawn() -> None:
    tracker = PartTracker()
    drawn = []
    for step in range(10):
        part = Part(positions=np.full((4, 3), 0.04 * step, np.float32))
        changed, _ = tracker.update({0: part}, tolerance_map=0.1)
        drawn.append(bool(changed))

    assert drawn == [step % 3 == 0 for step in range(10)]


def test_new_colours_and_new_points_are_drawn() -> None:
    tracker = PartTracker()
    positions = np.zeros((2, 3), np.float32)
    grey = Part(positions=positions, colors=np.full((2, 3), 99, np.uint8))
    red = Part(positions=positions, colors=np.full((2, 3), [200, 0, 0], np.uint8))
    more = Part(positions=np.zeros((3, 3), np.float32), colors=np.zeros((3, 3), np.uint8))

    for part in (grey, red, more):
        assert tracker.update({0: part}, tolerance_map=1.0)[0] == {0: part}


def test_a_keyframe_keeps_its_chunk_when_earlier_ones_come_later() -> None:
    chunks = ChunkNumbers(size=2)
    first = chunks.of(np.array([10, 30, 20, 30]))
    second = chunks.of(np.array([5, 10, 20, 30]))

    assert first.tolist() == [0, 1, 0, 1]
    assert second.tolist() == [1, 0, 0, 1]
    assert chunks.of(np.zeros(0, np.int64)).shape == (0,)
