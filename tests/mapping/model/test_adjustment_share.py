"""The share of a large map that is adjusted, and the points outside it."""

from __future__ import annotations

import itertools

import numpy as np
import pycolmap
import pytest

from engine.config import GlobalBundleAdjustmentConfig, LocalBundleAdjustmentConfig
from engine.geometry import rotation_from_vector
from engine.mapping.model import adjustment_share
from engine.mapping.model.adjustment_share import AdjustmentShare
from engine.mapping.model.bundle_adjustment import (
    GlobalAdjustment,
    adjust_copy,
    merge_global_adjustment,
    start_global_adjustment,
)
from engine.mapping.model.growth import GrowthConfig, adjust_in_place
from engine.mapping.model.sparse_map import SparseMap
from engine.types import BoolArray, FrameId, Int64Array
from tests.support.synthetic import (
    HEIGHT,
    WIDTH,
    SyntheticWorld,
    grown_map,
    pose_errors,
    poses_of,
    straight_path,
)

NUM_FRAMES = 14
GRID = (4, 3)
MIN_SHARED = 4
GROWTH = GrowthConfig(
    min_inlier_ratio=0.25,
    local_bundle_adjustment=LocalBundleAdjustmentConfig(),
    global_bundle_adjustment=GlobalBundleAdjustmentConfig(max_iterations=30),
    num_threads=1,
)


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(NUM_FRAMES, step=1.0), noise_px=0.5)


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of any size count as large; tests have few points a keyframe."""
    monkeypatch.setattr(adjustment_share, "_WHOLE_UNTIL", 0)
    monkeypatch.setattr(adjustment_share, "_GRID", GRID)
    monkeypatch.setattr(adjustment_share, "_MIN_SHARED", MIN_SHARED)
    monkeypatch.setattr(adjustment_share, "_MIN_OF_KEYFRAME", 0)
    monkeypatch.setattr(adjustment_share, "_MIN_OF_MAP", 0)


def drift(sparse_map: SparseMap) -> None:
    """Bends a map, keyframe by keyframe, and its points with it."""
    moved = {}
    for number, frame_id in enumerate(sparse_map.registered_ids):
        turn = rotation_from_vector(np.array([0.0, 0.0, 4e-4 * number]))
        shift = np.array([0.0, 0.002 * number, 0.004 * number])
        moved[frame_id] = np.column_stack([turn, shift])
    sparse_map.transform_parts(moved)


def adjusted(sparse_map: SparseMap) -> GlobalAdjustment:
    return adjust_copy(start_global_adjustment(sparse_map), max_iterations=30, num_threads=1)


def observed(reconstruction: pycolmap.Reconstruction, frame_id: FrameId) -> set[int]:
    observations = reconstruction.image(frame_id).get_observation_points2D()
    return {int(one.point3D_id) for one in observations}


def cells_with_points(sparse_map: SparseMap, frame_id: FrameId, is_point: BoolArray) -> Int64Array:
    xy = sparse_map.keyframe(frame_id).features.keypoints_xy[is_point]
    column, row = (xy / (WIDTH, HEIGHT) * GRID).astype(int).T
    return np.unique(row * GRID[0] + column)


def test_each_part_of_each_image_keeps_a_point_where_it_has_one(world: SyntheticWorld) -> None:
    sparse_map = grown_map(world)
    share = adjusted(sparse_map).reduced().reconstruction
    assert share.num_points3D() < 0.8 * sparse_map.num_points3D
    for frame_id in sparse_map.registered_ids:
        ids = sparse_map.point3D_ids(frame_id)
        is_kept = np.isin(ids, sorted(observed(share, frame_id)))
        before = cells_with_points(sparse_map, frame_id, ids >= 0)
        assert np.array_equal(cells_with_points(sparse_map, frame_id, is_kept), before)
        assert 0 < np.count_nonzero(is_kept) < np.count_nonzero(ids >= 0)


@pytest.mark.parametrize(
    ("bound", "least"), [("_MIN_OF_KEYFRAME", 60), ("_MIN_OF_MAP", 60 * NUM_FRAMES)]
)
def test_each_keyframe_keeps_enough_to_be_held_or_all_that_it_has(
    world: SyntheticWorld, monkeypatch: pytest.MonkeyPatch, bound: str, least: int
) -> None:
    monkeypatch.setattr(adjustment_share, "_GRID", (1, 1))
    monkeypatch.setattr(adjustment_share, "_MIN_SHARED", 0)
    sparse_map = grown_map(world)
    first = sparse_map.registered_ids[0]
    assert len(observed(adjusted(sparse_map).reduced().reconstruction, first)) < 40
    monkeypatch.setattr(adjustment_share, bound, least)
    share = adjusted(sparse_map).reduced().reconstruction
    for frame_id in sparse_map.registered_ids:
        has = int(np.count_nonzero(sparse_map.point3D_ids(frame_id) >= 0))
        assert len(observed(share, frame_id)) >= min(60, has)
    assert share.num_points3D() < sparse_map.num_points3D


def test_what_keyframes_share_is_kept_in_part_and_whole_where_it_is_little() -> None:
    sparse_map = grown_map(SyntheticWorld(straight_path(NUM_FRAMES, step=2.0)))
    whole = sparse_map.reconstruction
    first, last = sparse_map.registered_ids[0], sparse_map.registered_ids[-1]
    assert not observed(whole, first) & observed(whole, last)
    ends = zip(sorted(observed(whole, first)), sorted(observed(whole, last)), strict=False)
    for old, new in itertools.islice(ends, MIN_SHARED - 1):  # as a loop that was closed
        whole.merge_points3D(old, new)
    share = start_global_adjustment(sparse_map).reduced().reconstruction
    pairs = list(itertools.combinations(sparse_map.registered_ids, 2))
    num_weaker = 0
    for pair in pairs:
        before, kept = (set.intersection(*(observed(m, i) for i in pair)) for m in (whole, share))
        assert len(kept) >= min(MIN_SHARED, len(before))
        num_weaker += len(kept) < len(before)
    assert num_weaker > len(pairs) // 20
    assert len(observed(share, first) & observed(share, last)) == MIN_SHARED - 1


def test_the_longest_tracks_are_kept(world: SyntheticWorld) -> None:
    sparse_map = grown_map(world)
    share = start_global_adjustment(sparse_map).reduced().reconstruction
    lengths = {i: p.track.length() for i, p in sparse_map.reconstruction.points3D.items()}
    kept = [length for i, length in lengths.items() if share.exists_point3D(i)]
    others = [length for i, length in lengths.items() if not share.exists_point3D(i)]
    assert np.mean(kept) > 1.2 * np.mean(others)


def test_a_map_that_drifted_is_as_right_as_if_it_was_adjusted_whole(
    world: SyntheticWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_share, whole = grown_map(world), grown_map(world)
    for sparse_map in (by_share, whole):
        drift(sparse_map)
    drifted_px = whole.mean_reprojection_error_px()
    result = adjusted(by_share)
    merge_global_adjustment(by_share, result)
    monkeypatch.setattr(adjustment_share, "_WHOLE_UNTIL", 1_000_000)
    merge_global_adjustment(whole, adjusted(whole))
    assert result.reconstruction.num_points3D() < 0.8 * by_share.num_points3D
    assert drifted_px > 1.5 * whole.mean_reprojection_error_px()
    error_px = by_share.mean_reprojection_error_px()
    assert whole.mean_reprojection_error_px() < error_px
    assert error_px < 1.1 * whole.mean_reprojection_error_px()
    errors = [pose_errors(poses_of(one), world).rmse_ratio for one in (by_share, whole)]
    assert 1e-5 < errors[0] < 2.0 * errors[1] + 2e-4
    assert by_share.num_points3D > 0.97 * whole.num_points3D


def test_points_outside_the_share_follow_their_keyframes() -> None:
    sparse_map = grown_map(SyntheticWorld(straight_path(NUM_FRAMES, step=1.0)))
    start = start_global_adjustment(sparse_map).reduced()
    moved_from_map = pycolmap.Sim3d(
        1.0, pycolmap.Rotation3d(np.array([0.0, 0.6, 0.0, 0.8])), np.array([5.0, -3.0, 40.0])
    )
    start.reconstruction.transform(moved_from_map)
    start.complete()
    assert start.share is not None
    matrix = moved_from_map.matrix()
    others = start.share.others
    assert len(others) == sparse_map.num_points3D - start.reconstruction.num_points3D() > 20
    before = sparse_map.points3D_in_world(others)
    expected = before @ matrix[:, :3].T + matrix[:, 3]
    np.testing.assert_allclose(np.array(list(others.values())), expected, atol=1e-3)


def test_a_large_map_in_place_is_adjusted_as_a_copy_is(world: SyntheticWorld) -> None:
    in_place, merged = grown_map(world), grown_map(world)
    for sparse_map in (in_place, merged):
        drift(sparse_map)
    adjust_in_place(in_place, config=GROWTH)
    merge_global_adjustment(merged, adjusted(merged))
    for frame_id, pose in poses_of(in_place).items():
        assert np.array_equal(pose, merged.cam_from_world(frame_id))
    points = merged.reconstruction.points3D
    assert set(points) == set(in_place.reconstruction.points3D)
    for point3D_id, point in points.items():
        assert np.array_equal(point.xyz, in_place.reconstruction.point3D(point3D_id).xyz)
    assert in_place.reconstruction.is_valid()


def test_small_maps_are_adjusted_whole(
    world: SyntheticWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse_map = grown_map(world)
    num_observations = sparse_map.reconstruction.compute_num_observations()
    for limit, is_whole in ((num_observations, True), (num_observations - 1, False)):
        monkeypatch.setattr(adjustment_share, "_WHOLE_UNTIL", limit)
        assert AdjustmentShare.is_worthwhile(sparse_map.reconstruction) is not is_whole
        start = start_global_adjustment(sparse_map)
        assert (start.reduced() is start) is is_whole
        assert (adjusted(sparse_map).share is None) is is_whole
