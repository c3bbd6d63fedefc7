"""From a keyframe's candidates to verified pairs in its scene graph."""

from __future__ import annotations

import dataclasses

import pytest
from synthetic import FakeMatcher, SyntheticWorld, round_path, scene_graph, straight_path

from engine.config import TwoViewConfig
from engine.errors import InferenceError
from engine.pair_matching import match_keyframe, match_pairs
from engine.scene_graph import SceneGraph
from engine.types import FrameId, ImagePair, PairCandidate, PairReason, VerifiedPair

CONFIG = TwoViewConfig()


def pair(first: int, second: int) -> ImagePair:
    return ImagePair(FrameId(first), FrameId(second))


def candidate(first: int, second: int) -> PairCandidate:
    return PairCandidate(pair=pair(first, second), reason=PairReason.TEMPORAL, score=1.0)


def graph_of(world: SyntheticWorld, **settings: int) -> SceneGraph:
    graph = scene_graph(**settings)
    for frame_id in world.frame_ids:
        graph.add_keyframe(world.keyframe(frame_id))
    return graph


def match_next(
    graph: SceneGraph, world: SyntheticWorld, matcher: FakeMatcher, frame_id: int
) -> list[VerifiedPair]:
    graph.add_keyframe(world.keyframe(frame_id))
    return match_keyframe(FrameId(frame_id), graph=graph, matcher=matcher, config=CONFIG)


def test_pairs_that_hold_are_returned_in_order_and_recorded() -> None:
    world = SyntheticWorld(straight_path(4), noise_px=0.5)
    graph, matcher = graph_of(world), FakeMatcher(world=world)
    asked = [candidate(2, 4), candidate(1, 2), candidate(3, 4)]
    held = match_pairs(asked, graph=graph, matcher=matcher, config=CONFIG)
    assert [one.pair for one in held] == [pair(2, 4), pair(1, 2), pair(3, 4)]
    assert graph.edges() == held
    assert matcher.calls == [[one.pair for one in asked]]
    for verified in held:
        assert verified.reason is PairReason.TEMPORAL
        assert verified.num_matches == len(world.matches(verified.pair))
        assert verified.num_inliers > 0.95 * verified.num_matches
        assert verified.homography_inlier_ratio < 0.8


def test_matches_that_break_the_geometry_are_left_out() -> None:
    world = SyntheticWorld(straight_path(3), noise_px=0.5)
    graph, matcher = graph_of(world), FakeMatcher(world=world, wrong_ratio=0.2)
    (verified,) = match_pairs([candidate(1, 2)], graph=graph, matcher=matcher, config=CONFIG)
    true = {tuple(row) for row in world.matches(pair(1, 2)).tolist()}
    kept = {tuple(row) for row in verified.inlier_matches_idx.tolist()}
    assert len(kept & true) >= 0.75 * len(true)  # a fifth of them was spoiled
    assert len(kept - true) <= 0.05 * len(kept)
    assert verified.num_matches == len(true)


def test_pairs_that_do_not_hold_are_tried_once() -> None:
    world = SyntheticWorld(straight_path(16))
    graph, matcher = graph_of(world), FakeMatcher(world=world)
    asked = [candidate(1, 16), candidate(1, 2)]
    held = match_pairs(asked, graph=graph, matcher=matcher, config=CONFIG)
    assert [one.pair for one in held] == [pair(1, 2)]
    assert graph.was_tried(pair(1, 16))
    assert graph.was_tried(pair(1, 2))
    assert not graph.was_tried(pair(2, 3))


def test_a_matcher_that_finds_nothing_makes_no_pair() -> None:
    world = SyntheticWorld(straight_path(3))
    graph = graph_of(world)
    matcher = FakeMatcher(world=world, dropped=lambda one: True)
    assert match_pairs([candidate(1, 2)], graph=graph, matcher=matcher, config=CONFIG) == []
    assert graph.edges() == []
    assert graph.was_tried(pair(1, 2))


def test_nothing_asked_is_nothing_answered() -> None:
    world = SyntheticWorld(straight_path(1))
    graph, matcher = graph_of(world), FakeMatcher(world=world)
    assert match_pairs([], graph=graph, matcher=matcher, config=CONFIG) == []
    assert match_keyframe(FrameId(1), graph=graph, matcher=matcher, config=CONFIG) == []
    assert not any(matcher.calls)


def test_thresholds_grow_with_the_larger_image() -> None:
    """3 px at an edge of 1000 px are 12 px at one of 4000."""
    world = SyntheticWorld(straight_path(2), noise_px=3.0)
    held = {}
    for width in (1000, 4000):
        graph, matcher = scene_graph(), FakeMatcher(world=world)
        graph.add_keyframe(world.keyframe(1))
        graph.add_keyframe(dataclasses.replace(world.keyframe(2), width=width))
        (verified,) = match_pairs([candidate(1, 2)], graph=graph, matcher=matcher, config=CONFIG)
        held[width] = verified.num_inliers / verified.num_matches
    assert held[1000] < 0.85
    assert held[4000] > 0.95


def test_a_keyframe_is_matched_around_the_place_it_returns_to() -> None:
    """The ring closes: recognition finds some keyframes of the old place, the rest follow."""
    world = SyntheticWorld(round_path(32, turns=1.25), noise_px=0.5)
    graph = scene_graph(exhaustive_below=2, temporal_offsets=(1, 2, 3), num_retrieved=2)
    matcher = FakeMatcher(world=world)
    for frame_id in range(1, 27):
        match_next(graph, world, matcher, frame_id)
    matcher.calls.clear()
    held = match_next(graph, world, matcher, 27)
    first_round, second_round = matcher.calls
    reasons = {one.pair: one.reason for one in held}
    assert PairReason.RETRIEVED in reasons.values()
    assert second_round
    assert not set(first_round) & set(second_round)
    assert all(
        reasons.get(one, PairReason.COVISIBLE) is PairReason.COVISIBLE for one in second_round
    )
    assert any(one in reasons for one in second_round)
    assert any(one.first <= 3 for one in reasons)


def test_an_error_of_the_matcher_passes_and_what_held_before_stays() -> None:
    world = SyntheticWorld(round_path(32, turns=1.25), noise_px=0.5)
    graph = scene_graph(exhaustive_below=2, temporal_offsets=(1, 2, 3), num_retrieved=2)
    matcher = FakeMatcher(world=world)
    for frame_id in range(1, 27):
        match_next(graph, world, matcher, frame_id)
    matcher.fails = [len(matcher.calls) + 1]  # the second round
    with pytest.raises(InferenceError, match="out of memory"):
        match_next(graph, world, matcher, 27)
    first_round, second_round = matcher.calls[-2:]
    assert all(graph.was_tried(one) for one in first_round)
    assert not any(graph.was_tried(one) for one in second_round)
    assert {one.pair for one in graph.verified_pairs(FrameId(27))} <= set(first_round)
    assert graph.verified_pairs(FrameId(27))
