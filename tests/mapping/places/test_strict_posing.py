"""Keyframes that no agreed pair joins to the map come in only where several things prove it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from engine.config import (
    GlobalBundleAdjustmentConfig,
    LocalBundleAdjustmentConfig,
    RegistrationConfig,
)
from engine.mapping.model.growth import GrowthConfig
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.places.strict_posing import StrictPosing
from engine.types import FrameId, ImagePair, VerifiedPair
from tests.support.false_pairs import false_pair
from tests.support.synthetic import (
    SyntheticWorld,
    grow,
    map_of_keyframes,
    pose_errors,
    poses_of,
    scene_graph,
    straight_path,
)

GROWTH = GrowthConfig(
    min_inlier_ratio=0.65,
    local_bundle_adjustment=LocalBundleAdjustmentConfig(),
    global_bundle_adjustment=GlobalBundleAdjustmentConfig(),
    num_threads=1,
)
WORLD = SyntheticWorld(straight_path(6), noise_px=0.4)
LAST = FrameId(6)


def map_without_last(held_back: Sequence[VerifiedPair]) -> tuple[SparseMap, StrictPosing]:
    """A map of all frames but the last, whose pairs are held back."""
    sparse_map = map_of_keyframes(WORLD, skips=lambda pair: LAST in (pair.first, pair.second))
    grow(sparse_map, WORLD, WORLD.frame_ids[:-1])
    graph = scene_graph()
    for frame_id in WORLD.frame_ids:
        graph.add_keyframe(WORLD.keyframe(frame_id))
    for verified in held_back:
        graph.record_pair(verified)
        graph.hold_back(verified.pair)
    for frame_id in sparse_map.registered_ids:
        graph.set_registered(frame_id, True)
    posing = StrictPosing(graph=graph, registration=RegistrationConfig(), growth=GROWTH, seed=0)
    return sparse_map, posing


def in_one_corner(verified: VerifiedPair, *, num: int) -> VerifiedPair:
    """The same with few of its matches, next to each other in the last frame."""
    is_second = verified.pair.second == LAST
    rows = verified.inlier_matches_idx[:, 1 if is_second else 0]
    places = WORLD.view(LAST).points_xy[rows]
    nearest = np.argsort(np.linalg.norm(places - places[0], axis=1))[:num]
    return replace(verified, inlier_matches_idx=verified.inlier_matches_idx[nearest])


def test_two_pairs_that_say_the_same_place_bring_a_keyframe_in() -> None:
    held_back = [WORLD.verified_pair(other, LAST) for other in (4, 5)]
    sparse_map, posing = map_without_last(held_back)

    registered = posing.register_waiting(sparse_map)

    assert list(registered) == [LAST]
    assert set(sparse_map.neighbors(LAST)) == {4, 5}
    assert pose_errors(poses_of(sparse_map), WORLD).max_ratio < 0.01


@pytest.mark.parametrize("seed", range(4))
def test_false_pairs_bring_no_keyframe_in(seed: int) -> None:
    held_back = [false_pair(WORLD, other, LAST, seed=seed) for other in (1, 2, 3, 4)]
    sparse_map, posing = map_without_last(held_back)

    assert posing.register_waiting(sparse_map) == {}
    assert not sparse_map.is_registered(LAST)
    assert not sparse_map.neighbors(LAST)


def test_a_pattern_in_one_corner_brings_no_keyframe_in() -> None:
    held_back = [in_one_corner(WORLD.verified_pair(other, LAST), num=22) for other in (4, 5)]
    sparse_map, posing = map_without_last(held_back)

    assert posing.register_waiting(sparse_map) == {}


def test_the_same_witnesses_are_asked_once_until_the_end() -> None:
    held_back = [in_one_corner(WORLD.verified_pair(other, LAST), num=22) for other in (4, 5)]
    sparse_map, posing = map_without_last(held_back)
    posing.register_waiting(sparse_map)
    asked: list[FrameId] = []
    sparse_map.visible_points = lambda *args, **options: asked.append(LAST)  # type: ignore[assignment]

    assert posing.register_waiting(sparse_map) == {}
    assert asked == []


def test_a_keyframe_that_agreed_pairs_join_is_left_to_them() -> None:
    held_back = [WORLD.verified_pair(other, LAST) for other in (4, 5)]
    sparse_map, posing = map_without_last(held_back)
    sparse_map.add_pairs([WORLD.verified_pair(3, LAST)])

    assert posing.register_waiting(sparse_map) == {}


def test_pairs_that_come_late_make_points_where_both_keyframes_are_registered() -> None:
    late = WORLD.verified_pair(1, 3)
    sparse_map = map_of_keyframes(WORLD, skips=lambda pair: pair == late.pair)
    grow(sparse_map, WORLD, WORLD.frame_ids)
    before = sparse_map.reconstruction.compute_num_observations()
    sparse_map.add_pairs([late])
    sparse_map.add_pairs([])

    assert ImagePair.of(FrameId(1), FrameId(3)) == late.pair
    assert sparse_map.neighbors(FrameId(1))[FrameId(3)] is late
    assert sparse_map.reconstruction.compute_num_observations() >= before
