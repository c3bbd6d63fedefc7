"""Evidence of places: pairs that agree with them, and pairs that contradict them."""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import GlobalBundleAdjustmentConfig, LocalBundleAdjustmentConfig
from engine.geometry import rotation_from_vector
from engine.mapping.model.growth import GrowthConfig, register_and_refine
from engine.mapping.model.place_evidence import (
    PairErrors,
    contradicting_neighbors,
    epipolar_error_px,
)
from engine.mapping.model.sparse_map import SparseMap
from engine.types import FrameId, RegistrationStatus
from tests.support.synthetic import (
    SyntheticWorld,
    ground,
    grow,
    map_of_keyframes,
    pose_errors,
    poses_of,
    straight_path,
)

NUM = 6
LAST = FrameId(NUM)
WORLD = SyntheticWorld(straight_path(NUM), points=ground(straight_path(NUM), density=2.0))
TURN = rotation_from_vector(np.array([0.0, 0.0, 0.3]))
GROWTH = GrowthConfig(
    min_inlier_ratio=0.25,
    local_bundle_adjustment=LocalBundleAdjustmentConfig(),
    global_bundle_adjustment=GlobalBundleAdjustmentConfig(),
    num_threads=1,
)


def whole_map() -> SparseMap:
    sparse_map = map_of_keyframes(WORLD)
    grow(sparse_map, WORLD, WORLD.frame_ids)
    return sparse_map


def test_pairs_agree_with_true_places_and_contradict_others() -> None:
    sparse_map = whole_map()
    pairs = list(sparse_map.neighbors(LAST).values())
    assert len(pairs) > 1
    assert all(epipolar_error_px(sparse_map, pair) < 8.0 for pair in pairs)
    turned = TURN @ sparse_map.cam_from_world(LAST)
    elsewhere = [
        epipolar_error_px(
            sparse_map, pair, poses=(sparse_map.cam_from_world(pair.pair.first), turned)
        )
        for pair in pairs
    ]
    assert min(elsewhere) > 20.0
    sparse_map.set_pose(LAST, turned)
    assert [epipolar_error_px(sparse_map, pair) for pair in pairs] == pytest.approx(elsewhere)


def test_a_look_at_some_matches_says_what_all_of_them_say() -> None:
    for turn in (np.eye(3), TURN):
        sparse_map = whole_map()
        sparse_map.set_pose(LAST, turn @ sparse_map.cam_from_world(LAST))
        errors = PairErrors(sparse_map)
        pairs = [
            pair for i in sparse_map.registered_ids for pair in sparse_map.neighbors(i).values()
        ]
        assert max(pair.num_inliers for pair in pairs) > 100
        for pair in pairs:
            assert errors.contradicts(pair) == (epipolar_error_px(sparse_map, pair) > 20.0)
        assert any(errors.contradicts(pair) for pair in pairs) == (turn is TURN)


def test_a_pose_that_all_strong_pairs_contradict_is_not_credible() -> None:
    sparse_map = whole_map()
    pose = sparse_map.cam_from_world(LAST)
    assert contradicting_neighbors(sparse_map, LAST, pose) == {}
    against = contradicting_neighbors(sparse_map, LAST, TURN @ pose)
    assert set(against) <= set(sparse_map.neighbors(LAST))
    assert len(against) > 1


def test_a_keyframe_registers_where_its_strong_pairs_agree() -> None:
    sparse_map = map_of_keyframes(WORLD)
    grow(sparse_map, WORLD, WORLD.frame_ids[:-1])
    registration = register_and_refine(sparse_map, LAST, config=GROWTH)
    assert registration.status is RegistrationStatus.REGISTERED
    assert pose_errors(poses_of(sparse_map), WORLD).max_ratio < 1e-3


def test_a_pose_that_is_not_credible_registers_nothing() -> None:
    sparse_map = map_of_keyframes(WORLD)
    grow(sparse_map, WORLD, WORLD.frame_ids[:-1])
    refused = sparse_map.register(LAST, min_inlier_ratio=0.25, is_credible=lambda _: False)
    assert refused.status is RegistrationStatus.CONTRADICTED
    assert refused.num_inliers > 20
    assert not sparse_map.is_registered(LAST)
