"""Which pairs a second matcher gets: those of weak keyframes, each once, within its bounds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.config import SceneGraphConfig, SecondMatcherConfig
from engine.matching.scene_graph import SceneGraph
from engine.matching.second_matching import DescriberForBoth, SecondChoice, SecondMatching
from engine.types import (
    Features,
    Frame,
    FrameId,
    ImagePair,
    Keyframe,
    MatchRequest,
    PairMatches,
    PairReason,
    VerifiedPair,
)
from tests.support.synthetic import FakeMatcher, SyntheticWorld, straight_path
from tests.support.textured_images import features_at, frame_of, random_texture, similarity_about

STRONG, WEAK = 100, 20


class FakeSecond:
    """A second matcher that holds some keyframes and matches nothing."""

    def __init__(self, held: Collection[int] | None = None) -> None:
        self.held = held
        self.kept: list[FrameId] = []

    @property
    def name(self) -> str:
        return "fake second"

    @property
    def peak_gpu_mb(self) -> float:
        return 0.0

    def keep(self, frame: Frame) -> None:
        self.kept.append(frame.frame_id)

    def holds(self, frame_id: FrameId) -> bool:
        return self.held is None or frame_id in self.held

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        none = np.zeros((0, 2), np.int64)
        return [
            PairMatches.of_rows(one, matches_idx=none, confidence=np.zeros(0, np.float32))
            for one in requests
        ]


class ScriptedPlaces:
    """Places by script."""

    def __init__(self, answers: Mapping[int, Sequence[int]]) -> None:
        self._answers = answers

    def add(self, features: Features) -> None:
        pass

    def query(
        self, frame_id: FrameId, *, exclude: Collection[FrameId], limit: int
    ) -> list[tuple[FrameId, float]]:
        hits = [FrameId(one) for one in self._answers.get(frame_id, ()) if one not in exclude]
        return [(one, 0.5) for one in hits][:limit]


def keyframe(frame_id: int, *, captured_at_s: float | None = None, **changes: Any) -> Keyframe:
    return Keyframe(
        frame_id=FrameId(frame_id),
        camera_key="camera",
        index=frame_id - 1,
        name=f"{frame_id:06d}.jpg",
        width=640,
        height=480,
        captured_at_s=float(frame_id) if captured_at_s is None else captured_at_s,
        received_at_s=0.0,
        features=features_at(np.zeros((0, 2)), frame_id=frame_id),
        **changes,
    )


def pair(one: int, other: int) -> ImagePair:
    return ImagePair.of(FrameId(one), FrameId(other))


def edge(one: int, other: int, num_inliers: int = STRONG) -> VerifiedPair:
    return VerifiedPair(
        pair=pair(one, other),
        reason=PairReason.TEMPORAL,
        inlier_matches_idx=np.zeros((num_inliers, 2), np.uint32),
        num_matches=num_inliers,
        fundamental=np.eye(3),
        homography_inlier_ratio=0.1,
    )


def graph_of(
    keyframes: Iterable[Keyframe],
    edges: Iterable[VerifiedPair] = (),
    places: Mapping[int, Sequence[int]] | None = None,
) -> SceneGraph:
    graph = SceneGraph(SceneGraphConfig(), recognizer=ScriptedPlaces(places or {}))
    for added in keyframes:
        graph.add_keyframe(added)
    for verified in edges:
        graph.record_pair(verified)
    return graph


def second_of(
    graph: SceneGraph, *, held: Collection[int] | None = None, **settings: Any
) -> SecondMatching:
    return SecondMatching(SecondMatcherConfig(**settings), graph=graph, matcher=FakeSecond(held))


def chain(num: int, num_inliers: int = STRONG) -> list[VerifiedPair]:
    """Each keyframe with the two before it."""
    return [
        edge(one - back, one, num_inliers)
        for one in range(2, num + 1)
        for back in (1, 2)
        if one > back
    ]


def test_keyframes_that_match_well_get_no_pairs() -> None:
    second = second_of(graph_of([keyframe(i) for i in range(1, 9)], chain(8)))
    choice = second.choose()
    assert (choice.pairs, choice.num_left_out) == ((), 0)


@pytest.mark.parametrize("num_inliers", [None, WEAK])
def test_a_keyframe_that_hardly_matches_gets_pairs_with_those_beside_it(
    num_inliers: int | None,
) -> None:
    edges = chain(7) + ([] if num_inliers is None else [edge(7, 8, num_inliers)])
    choice = second_of(graph_of([keyframe(i) for i in range(1, 9)], edges)).choose()
    assert len(choice.pairs) == SecondMatcherConfig().pairs_at_once
    assert all(8 in (one.first, one.second) for one in choice.pairs)
    assert {pair(6, 8), pair(7, 8)} <= set(choice.pairs)  # also the weak one
    assert set(choice.pairs).isdisjoint(one.pair for one in chain(7))


def test_a_likely_pair_comes_with_what_can_confirm_it() -> None:
    keyframes = [keyframe(i, is_photo=True) for i in range(1, 9)]
    graph = graph_of(keyframes, [edge(1, 2), edge(1, 3), edge(2, 3)], places={8: [2]})
    chosen = second_of(graph, pairs_at_once=8).choose().pairs
    own = [one for one in chosen if 8 in (one.first, one.second)]
    assert {pair(2, 8), pair(1, 8)} <= set(own)  # the place, and its strongest neighbour


def test_a_keyframe_of_no_map_is_weak_however_it_matches() -> None:
    graph = graph_of([keyframe(i) for i in range(1, 9)], chain(8))
    for frame_id in range(1, 8):
        graph.set_registered(FrameId(frame_id), True)
    chosen = second_of(graph).choose().pairs
    assert chosen
    assert all(8 in (one.first, one.second) for one in chosen)


def test_each_pair_is_chosen_once_and_a_keyframe_has_its_share() -> None:
    graph = graph_of([keyframe(i, is_photo=True) for i in range(1, 31)], chain(29))
    second = second_of(graph, pairs_at_once=3, pairs_per_keyframe=8)
    rounds = [second.choose() for _ in range(5)]
    chosen = [one for each in rounds for one in each.pairs]
    assert [len(each.pairs) for each in rounds] == [3, 3, 2, 0, 0]
    assert len(set(chosen)) == 8


def test_what_has_no_room_is_counted() -> None:
    second = second_of(graph_of([keyframe(i, is_photo=True) for i in range(1, 9)]))
    choice = second.choose()
    assert len(choice.pairs) == SecondMatcherConfig().pairs_at_once
    assert choice.num_left_out > 0


def test_a_pair_that_has_no_room_again_is_counted_once() -> None:
    second = second_of(graph_of([keyframe(i, is_photo=True) for i in range(1, 9)]), pairs_at_once=1)
    rounds = [second.choose() for _ in range(20)]
    assert all(len(one.pairs) == 1 for one in rounds)
    assert 0 < sum(one.num_left_out for one in rounds) <= 8 * 7 // 2


def test_nothing_is_looked_at_while_a_video_has_earned_no_pair() -> None:
    graph = graph_of([keyframe(i) for i in range(1, 9)])
    second = second_of(graph, pairs_per_s=1.0)
    assert second.choose().num_left_out > 0
    graph.add_keyframe(keyframe(9, captured_at_s=8.001))
    assert second.choose() == SecondChoice(pairs=())


def test_a_video_earns_its_pairs_by_the_second() -> None:
    graph = graph_of([keyframe(1)])
    second = second_of(graph, pairs_per_s=2.0, pairs_at_once=4, pairs_per_keyframe=100)
    second.choose()
    nums = []
    for number in range(2, 42):
        graph.add_keyframe(keyframe(number, captured_at_s=1.0 + (number - 1) * 0.25))
        nums.append(len(second.choose().pairs))
    assert 16 <= sum(nums) <= 2.0 * 10.0 + 4  # ten seconds, and what it may begin with
    assert max(nums) <= 4


def test_a_clock_that_jumps_earns_no_more_than_one_batch() -> None:
    graph = graph_of([keyframe(i) for i in range(1, 9)])
    second = second_of(graph, pairs_per_s=0.001)
    second.choose()
    for number, captured_at_s in ((9, 1e9), (10, 5.0), (11, 5.1)):
        graph.add_keyframe(keyframe(number, captured_at_s=captured_at_s))
        num = len(second.choose().pairs)
        assert num == (SecondMatcherConfig().pairs_at_once if number == 9 else 0)


def test_keyframes_whose_images_are_gone_are_not_chosen() -> None:
    graph = graph_of([keyframe(i, is_photo=True) for i in range(1, 9)])
    chosen = second_of(graph, held=(5, 6, 8), pairs_at_once=50).choose().pairs
    assert {i for one in chosen for i in (one.first, one.second)} == {5, 6, 8}


def test_only_the_newest_keyframes_are_looked_at_until_the_end() -> None:
    keyframes = [keyframe(i, is_photo=True) for i in range(1, 51)]
    edges = [one for one in chain(50) if 3 not in (one.pair.first, one.pair.second)]
    graph = graph_of(keyframes, [*edges, edge(2, 4), edge(1, 4), edge(4, 5)])
    for frame_id in range(1, 51):
        graph.set_registered(FrameId(frame_id), frame_id not in (3, 50))
    second = second_of(graph, look_back=10, pairs_per_keyframe=4)
    assert all(50 in (one.first, one.second) for one in second.choose().pairs)
    final = second.choose(is_final=True).pairs
    assert final
    assert all(3 in (one.first, one.second) for one in final)


def test_the_end_has_bounds_too() -> None:
    graph = graph_of([keyframe(i, is_photo=True) for i in range(1, 51)])
    second = second_of(graph, final_pairs=10)
    num = 0
    while pairs := second.choose(is_final=True).pairs:
        num += len(pairs)
    assert num == 10


def test_an_empty_graph_has_no_pairs() -> None:
    assert second_of(graph_of([])).choose().pairs == ()


def test_keyframes_get_free_rows_after_the_keypoints_of_the_first_matcher() -> None:
    world = SyntheticWorld(straight_path(1))
    described = world.keyframe(1).features
    with_descriptors = replace(described, descriptors=np.ones((len(described), 8), np.uint8))

    class First(FakeMatcher):
        def describe(self, frame: Frame) -> Features:
            return with_descriptors

    second = FakeSecond()
    pixels = random_texture(0).image(64, 48, image_from_texture=similarity_about((0.0, 0.0)))
    frame = frame_of(pixels, frame_id=1)
    config = SecondMatcherConfig(free_keypoints=48)
    features = DescriberForBoth(First(world=world), second, config).describe(frame)
    num = len(described)
    assert second.kept == [1]
    np.testing.assert_array_equal(features.keypoints_xy[:num], described.keypoints_xy)
    assert not features.is_free[:num].any()
    assert features.is_free[num:].all()
    assert len(features) == num + 48
    assert not features.descriptors[num:].any()
    first_part = features.described()
    np.testing.assert_array_equal(first_part.descriptors, with_descriptors.descriptors)
    assert with_descriptors.described() is with_descriptors


def test_a_described_keypoint_of_no_contrast_is_one_of_those_that_are_described() -> None:
    keypoints = SyntheticWorld(straight_path(1)).keyframe(1).features
    descriptors = np.ones((len(keypoints), 8), np.uint8)
    descriptors[[3, -1]] = 0
    plain = replace(keypoints, descriptors=descriptors)
    assert plain.described() is plain
    with_room = plain.with_free_rows(np.ones((5, 2)), np.zeros((5, 3), np.uint8))
    np.testing.assert_array_equal(with_room.described().keypoints_xy, plain.keypoints_xy)
    some = with_room.take(np.arange(2, len(with_room)))
    np.testing.assert_array_equal(some.described().keypoints_xy, plain.keypoints_xy[2:])
