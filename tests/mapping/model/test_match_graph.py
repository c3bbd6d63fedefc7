"""Verified pairs by keyframe and in COLMAP's correspondence graph."""

from __future__ import annotations

import pytest

from engine.errors import MapError
from engine.mapping.model.match_graph import MatchGraph
from engine.types import FrameId, ImagePair, VerifiedPair
from tests.support.synthetic import SyntheticWorld, straight_path

WORLD = SyntheticWorld(straight_path(5))
ONE, TWO, THREE, FOUR = (FrameId(i) for i in range(1, 5))


def add(graph: MatchGraph, frame_id: int, pairs: list[VerifiedPair]) -> None:
    num_keypoints = len(WORLD.view(frame_id).point_ids)
    graph.add_keyframe(FrameId(frame_id), pairs, num_keypoints=num_keypoints)


@pytest.fixture
def graph() -> MatchGraph:
    """Keyframes 1, 2, 3 in a chain."""
    graph = MatchGraph()
    add(graph, 1, [])
    add(graph, 2, [WORLD.verified_pair(1, 2)])
    add(graph, 3, [WORLD.verified_pair(2, 3)])
    return graph


def num_matches(graph: MatchGraph, first: int, second: int) -> int:
    return int(graph.correspondence_graph.num_matches_between_images(first, second))


def test_a_pair_is_known_from_both_sides_and_to_colmap(graph: MatchGraph) -> None:
    assert graph.neighbors(TWO).keys() == {1, 3}
    assert graph.neighbors(ONE)[TWO] is graph.neighbors(TWO)[ONE]
    assert num_matches(graph, 1, 2) == WORLD.verified_pair(1, 2).num_inliers
    assert num_matches(graph, 1, 3) == 0
    assert graph.correspondence_graph.num_images() == 3


def test_a_keyframe_may_come_after_one_with_a_larger_id(graph: MatchGraph) -> None:
    add(graph, 5, [])
    add(graph, 4, [WORLD.verified_pair(4, 5), WORLD.verified_pair(3, 4)])
    assert graph.neighbors(FOUR).keys() == {3, 5}


def test_a_distrusted_pair_is_no_neighbour(graph: MatchGraph) -> None:
    graph.distrust(ImagePair(ONE, TWO))
    assert graph.neighbors(ONE) == {}
    assert graph.neighbors(TWO).keys() == {3}
    assert num_matches(graph, 1, 2) > 0


def test_a_distrusted_pair_may_be_added_again(graph: MatchGraph) -> None:
    pair = WORLD.verified_pair(1, 2)
    graph.distrust(pair.pair)
    graph.add_pairs([pair])
    assert graph.neighbors(ONE) == {TWO: pair}
    assert num_matches(graph, 1, 2) == pair.num_inliers
    with pytest.raises(MapError, match="was added before"):
        graph.add_pairs([pair])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(1, 2)], "does not join the new keyframe 4"),
        ([(3, 4), (4, 5)], "does not join keyframes of this map"),
        ([(3, 4), (3, 4)], "was added before"),
    ],
    ids=["foreign", "unknown", "twice"],
)
def test_a_keyframe_is_refused_with_all_its_pairs(
    graph: MatchGraph, pairs: list[tuple[int, int]], message: str
) -> None:
    with pytest.raises(MapError, match=message):
        add(graph, 4, [WORLD.verified_pair(*pair) for pair in pairs])
    assert graph.neighbors(THREE).keys() == {2}
    assert graph.correspondence_graph.num_images() == 3
    add(graph, 4, [WORLD.verified_pair(3, 4)])
    assert graph.neighbors(FOUR).keys() == {3}


def test_a_keyframe_comes_once(graph: MatchGraph) -> None:
    with pytest.raises(MapError, match="keyframe 3 was added before"):
        add(graph, 3, [])
    assert graph.neighbors(THREE).keys() == {2}
