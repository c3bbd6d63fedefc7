"""How long a map's unit is, told by depths of known scale, noise and blunders."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from engine.geometry import transform_points
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.positions.metric_scale import MetricScale, estimate_metric_scale
from engine.types import Float32Array, FrameId
from tests.support.synthetic import SyntheticWorld, grow, grown_map, map_of_keyframes, straight_path

METRES_PER_UNIT = 7.3

Depths = Callable[[FrameId], Float32Array]


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(8))


@pytest.fixture(scope="module")
def exact_map(world: SyntheticWorld) -> SparseMap:
    """A map whose unit is the world's; tests only read it."""
    return grown_map(world)


def true_depths(world: SyntheticWorld) -> Depths:
    """Depths of all keypoints in metres."""

    def depths_m(frame_id: FrameId) -> Float32Array:
        points = world.points[world.view(frame_id).point_ids]
        depths = transform_points(world.pose(frame_id), points)[:, 2]
        return np.asarray(METRES_PER_UNIT * depths, np.float32)

    return depths_m


def spoilt_depths(
    world: SyntheticWorld, *, noise_ratio: float = 0.0, unknown: float = 0.0, wild: float = 0.0
) -> Depths:
    """True ones with noise, of which some are unknown and some are anything."""
    truth = true_depths(world)

    def depths_m(frame_id: FrameId) -> Float32Array:
        rng = np.random.default_rng((5, frame_id))
        depths = truth(frame_id) * np.exp(rng.normal(scale=noise_ratio, size=len(truth(frame_id))))
        is_wild = rng.random(len(depths)) < wild
        depths[is_wild] *= rng.uniform(1.0, 20.0, int(is_wild.sum()))
        depths[rng.random(len(depths)) < unknown] = 0.0
        return depths.astype(np.float32)

    return depths_m


def estimated(sparse_map: SparseMap, depths_m: Depths) -> MetricScale:
    scale = estimate_metric_scale(sparse_map, depths_m)
    assert scale is not None
    return scale


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_depths_that_are_none_have_no_say(
    exact_map: SparseMap, world: SyntheticWorld, value: float
) -> None:
    truth = true_depths(world)

    def depths_m(frame_id: FrameId) -> Float32Array:
        depths = truth(frame_id).copy()
        depths[::2] = value
        return depths

    scale = estimated(exact_map, depths_m)
    assert abs(scale.metres_per_map_unit / METRES_PER_UNIT - 1.0) < 1e-5
    assert 0 < scale.num_depths < exact_map.reconstruction.compute_num_observations()


def test_true_depths_tell_the_scale(exact_map: SparseMap, world: SyntheticWorld) -> None:
    scale = estimated(exact_map, true_depths(world))
    assert abs(scale.metres_per_map_unit / METRES_PER_UNIT - 1.0) < 1e-5
    assert scale.num_depths == int(exact_map.reconstruction.compute_num_observations())
    assert scale.spread_ratio < 1e-4


@pytest.mark.parametrize("factor", [0.02, 1.0, 300.0])
def test_the_scale_goes_with_the_length_of_the_maps_unit(
    world: SyntheticWorld, factor: float
) -> None:
    sparse_map = grown_map(world)
    sparse_map.scale(factor)
    scale = estimated(sparse_map, true_depths(world))
    assert abs(scale.metres_per_map_unit * factor / METRES_PER_UNIT - 1.0) < 1e-5
    sparse_map.scale(scale.metres_per_map_unit)
    assert abs(estimated(sparse_map, true_depths(world)).metres_per_map_unit - 1.0) < 1e-5


def test_noise_is_told_and_averages_out(exact_map: SparseMap, world: SyntheticWorld) -> None:
    scale = estimated(exact_map, spoilt_depths(world, noise_ratio=0.2))
    assert 1e-5 < abs(scale.metres_per_map_unit / METRES_PER_UNIT - 1.0) < 0.03
    assert 0.18 < scale.spread_ratio < 0.27


def test_a_third_of_blunders_to_one_side_hardly_matters(
    exact_map: SparseMap, world: SyntheticWorld
) -> None:
    scale = estimated(exact_map, spoilt_depths(world, noise_ratio=0.05, wild=0.33))
    assert 0.0 < scale.metres_per_map_unit / METRES_PER_UNIT - 1.0 < 0.06


def test_depths_that_are_unknown_do_not_count(exact_map: SparseMap, world: SyntheticWorld) -> None:
    everything = estimated(exact_map, true_depths(world))
    half = estimated(exact_map, spoilt_depths(world, unknown=0.5))
    assert 0.4 * everything.num_depths < half.num_depths < 0.6 * everything.num_depths
    assert abs(half.metres_per_map_unit / METRES_PER_UNIT - 1.0) < 1e-5


def test_keypoints_without_a_point_of_the_map_do_not_count(world: SyntheticWorld) -> None:
    part = map_of_keyframes(world)
    grow(part, world, [1, 2, 3, 4])
    scale = estimated(part, true_depths(world))
    assert scale.num_depths == int(part.reconstruction.compute_num_observations())
    assert abs(scale.metres_per_map_unit / METRES_PER_UNIT - 1.0) < 1e-5


def test_too_few_depths_tell_nothing(exact_map: SparseMap, world: SyntheticWorld) -> None:
    observed = np.flatnonzero(exact_map.point3D_ids(FrameId(3)) >= 0)

    def some_depths(num: int) -> Depths:
        def depths_m(frame_id: FrameId) -> Float32Array:
            depths = np.zeros(len(exact_map.keyframe(frame_id).features), np.float32)
            if frame_id == 3:
                depths[observed[:num]] = true_depths(world)(frame_id)[observed[:num]]
            return depths

        return depths_m

    assert estimate_metric_scale(exact_map, some_depths(0)) is None
    assert estimate_metric_scale(exact_map, some_depths(49)) is None
    assert estimated(exact_map, some_depths(50)).num_depths == 50


def test_points_behind_a_camera_tell_nothing(world: SyntheticWorld) -> None:
    sparse_map = grown_map(world)
    num_before = estimated(sparse_map, true_depths(world)).num_depths
    backwards = np.diag([-1.0, 1.0, -1.0])  # half a turn about the vertical axis
    sparse_map.set_pose(FrameId(4), backwards @ sparse_map.cam_from_world(FrameId(4)))
    scale = estimated(sparse_map, true_depths(world))
    num_lost = int((sparse_map.point3D_ids(FrameId(4)) >= 0).sum())
    assert scale.num_depths == num_before - num_lost
    assert abs(scale.metres_per_map_unit / METRES_PER_UNIT - 1.0) < 1e-5


def test_a_map_without_keyframes_tells_nothing(world: SyntheticWorld) -> None:
    assert estimate_metric_scale(map_of_keyframes(world), true_depths(world)) is None
