"""Pairs with many keypoints: by the largest first, then guided, in full, or given up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from engine.config import CoarseToFineConfig, DenseMatchingConfig, TwoViewConfig
from engine.matching.pair_matching import PairMatching
from engine.matching.scene_graph import SceneGraph
from engine.types import (
    FrameId,
    ImagePair,
    Keyframe,
    MatchRequest,
    PairCandidate,
    PairMatches,
    PairReason,
)
from tests.support.synthetic import (
    DENSITY,
    FakeMatcher,
    SyntheticWorld,
    scene_graph,
    spoil_matches,
    straight_path,
)

NUM_COARSE = 60
CONFIG = CoarseToFineConfig(num_keypoints=NUM_COARSE, min_coarse_matches=4, enough_pairs=2)
MANY = 10_000
LARGE, SMALL = 20.0, 2.0  # px, keypoints


def pair(first: int, second: int) -> ImagePair:
    return ImagePair(FrameId(first), FrameId(second))


def candidates(*pairs: ImagePair) -> list[PairCandidate]:
    return [PairCandidate(pair=one, reason=PairReason.EXHAUSTIVE, score=1.0) for one in pairs]


@dataclass
class LookMatcher(FakeMatcher):
    """Matches the keypoints that it is given, and remembers the requests.

    ``limits`` says of which pairs it finds no more than so many matches, by the largest keypoints
    and by all.
    """

    limits: dict[ImagePair, tuple[int, int]] = field(default_factory=dict)
    wrong_coarse: float = 0.0  # share of the matches by the largest keypoints that are wrong
    requests: list[MatchRequest] = field(default_factory=list)

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        self.requests += requests
        return [self._match(request) for request in requests]

    def _match(self, request: MatchRequest) -> PairMatches:
        tables = [
            self.world.keyframe(i).features for i in (request.pair.first, request.pair.second)
        ]
        back = [
            {tuple(xy): row for row, xy in enumerate(given.keypoints_xy.tolist())}
            for given in (request.first, request.second)
        ]
        rows = [
            (back[0][xy1], back[1][xy2])
            for row1, row2 in self.world.matches(request.pair).tolist()
            if (xy1 := tuple(tables[0].keypoints_xy[row1].tolist())) in back[0]
            and (xy2 := tuple(tables[1].keypoints_xy[row2].tolist())) in back[1]
        ]
        is_coarse = len(request.first) <= NUM_COARSE
        limits = self.limits.get(request.pair, (len(rows), len(rows)))
        rows = rows[: limits[0] if is_coarse else limits[1]]
        matches = np.array(rows, np.uint32).reshape(-1, 2)
        wrong_ratio = self.wrong_coarse if is_coarse else 0.0
        return PairMatches.of_rows(
            request,
            matches_idx=spoil_matches(
                matches, wrong_ratio=wrong_ratio, rng=np.random.default_rng(7)
            ),
            confidence=np.ones(len(rows), np.float32),
        )

    def kinds(self, one: ImagePair) -> list[str]:
        """What was asked of a pair, in order."""
        asked = [request for request in self.requests if request.pair == one]
        return [
            "guided"
            if request.guide is not None
            else ("coarse" if len(request.first) <= NUM_COARSE else "full")
            for request in asked
        ]


def with_large_keypoints(world: SyntheticWorld, frame_id: int) -> Keyframe:
    """A keyframe whose keypoints of every sixth point are large."""
    keyframe = world.keyframe(frame_id)
    is_large = world.view(frame_id).point_ids % 6 == 0
    scales = np.where(is_large, LARGE, SMALL).astype(np.float32)
    return replace(keyframe, features=replace(keyframe.features, scales=scales))


def photos(
    num: int,
    limits: dict[ImagePair, tuple[int, int]] | None = None,
    *,
    config: CoarseToFineConfig = CONFIG,
) -> tuple[SceneGraph, LookMatcher, PairMatching]:
    world = SyntheticWorld(straight_path(num), density=3 * DENSITY, noise_px=0.3)
    graph = scene_graph()
    matcher = LookMatcher(world=world, limits=limits or {})
    matching = PairMatching(
        graph,
        matcher,
        two_view=TwoViewConfig(),
        dense=DenseMatchingConfig(),
        coarse_to_fine=config,
    )
    for frame_id in world.frame_ids:
        matching.add_keyframe(with_large_keypoints(world, frame_id))
    return graph, matcher, matching


def test_a_pair_that_holds_by_its_largest_keypoints_is_matched_again_near_their_geometry() -> None:
    _, matcher, matching = photos(2)
    (verified,) = matching.match_pairs(candidates(pair(1, 2)))
    assert matcher.kinds(pair(1, 2)) == ["coarse", "guided"]
    true = matcher.world.matches(pair(1, 2))
    assert verified.num_inliers >= 0.95 * len(true)
    assert len(true) > NUM_COARSE
    coarse = matcher.requests[0]
    assert (coarse.first.scales == LARGE).mean() >= 0.8
    assert len(coarse.first) == len(coarse.second) == NUM_COARSE


def test_matches_of_the_largest_keypoints_are_rows_of_the_whole_table() -> None:
    _, matcher, matching = photos(2)
    (verified,) = matching.match_pairs(candidates(pair(1, 2)))
    true = {tuple(row) for row in matcher.world.matches(pair(1, 2)).tolist()}
    assert {tuple(row) for row in verified.inlier_matches_idx.tolist()} <= true


def test_a_pair_with_hardly_a_coarse_match_is_given_up() -> None:
    graph, matcher, matching = photos(3, {pair(1, 3): (2, 2)})
    held = matching.match_pairs(candidates(pair(1, 2), pair(1, 3)))
    assert [one.pair for one in held] == [pair(1, 2)]
    assert matcher.kinds(pair(1, 3)) == ["coarse"]
    assert graph.was_tried(pair(1, 3))
    assert graph.tried_in_part(FrameId(3)) == [FrameId(1)]


def test_a_weak_pair_is_matched_in_full_while_a_keyframe_has_few() -> None:
    graph, matcher, matching = photos(2, {pair(1, 2): (12, MANY)})
    (verified,) = matching.match_pairs(candidates(pair(1, 2)))
    assert matcher.kinds(pair(1, 2)) == ["coarse", "full"]
    assert verified.num_inliers > NUM_COARSE
    assert graph.tried_in_part(FrameId(1)) == []


def test_a_weak_pair_is_given_up_where_both_keyframes_have_enough() -> None:
    graph, matcher, matching = photos(4, {pair(1, 4): (12, MANY)})
    all_pairs = [pair(i, j) for i in range(1, 5) for j in range(i + 1, 5)]
    held = matching.match_pairs(candidates(*all_pairs))
    assert matcher.kinds(pair(1, 4)) == ["coarse"]
    assert [one.pair for one in held] == [one for one in all_pairs if one != pair(1, 4)]
    assert graph.was_tried(pair(1, 4))


def test_weak_pairs_that_fail_count_as_often_as_a_keyframe_lacks_pairs() -> None:
    among_others = [pair(i, j) for i in range(1, 5) for j in range(i + 1, 5)]
    weak = [pair(i, 5) for i in range(1, 5)]
    graph, matcher, matching = photos(5, dict.fromkeys(weak, (6, 6)))
    assert len(matching.match_pairs(candidates(*among_others))) == len(among_others)
    assert matching.match_pairs(candidates(*weak)) == []
    in_full = [one for one in weak if matcher.kinds(one) == ["coarse", "full"]]
    assert len(in_full) == CONFIG.enough_pairs
    assert len(graph.tried_in_part(FrameId(5))) == len(weak) - len(in_full)


def test_a_run_that_goes_on_counts_the_weak_pairs_that_failed_before() -> None:
    among_others = [pair(i, j) for i in range(1, 5) for j in range(i + 1, 5)]
    weak = [pair(i, 5) for i in range(1, 5)]
    _, _, matching = photos(5, dict.fromkeys(weak, (6, 6)))
    matching.match_pairs(candidates(*among_others))
    assert matching.match_pairs(candidates(*weak[: CONFIG.enough_pairs])) == []
    facts = matching.take_facts()
    assert not matching.take_facts()
    _, matcher, resumed = photos(5, dict.fromkeys(weak, (6, 6)))
    resumed.match_pairs(candidates(*among_others))
    resumed.restore(facts)
    later = weak[CONFIG.enough_pairs :]
    assert resumed.match_pairs(candidates(*later)) == []
    assert [matcher.kinds(one) for one in later] == [["coarse"]] * len(later)


def test_a_run_that_goes_on_knows_which_pairs_were_given_up_early() -> None:
    _, _, matching = photos(3, {pair(1, 3): (2, 2)})
    matching.match_pairs(candidates(pair(1, 2), pair(1, 3)))
    facts = matching.take_facts()
    again, _, resumed = photos(3)
    resumed.restore(facts)
    assert again.tried_in_part(FrameId(1)) == [FrameId(3)]
    assert again.was_tried(pair(1, 3))
    resumed.match_pairs(candidates(pair(1, 3)), in_full=True)
    again, _, later = photos(3)
    later.restore(facts | resumed.take_facts())
    assert again.tried_in_part(FrameId(1)) == []


def test_the_inlier_ratio_is_that_of_matches_that_nothing_guided() -> None:
    _, matcher, matching = photos(2)
    matcher.wrong_coarse = 0.3
    (verified,) = matching.match_pairs(candidates(pair(1, 2)))
    assert 0.6 <= verified.num_inliers / verified.num_matches <= 0.8


def test_a_small_table_is_matched_at_once() -> None:
    _, matcher, matching = photos(2, config=CoarseToFineConfig(num_keypoints=2000))
    assert matching.match_pairs(candidates(pair(1, 2)))
    assert len(matcher.requests) == 1


def test_without_a_coarse_pass_all_are_matched_at_once() -> None:
    _, matcher, matching = photos(2, config=CoarseToFineConfig(num_keypoints=0))
    assert matching.match_pairs(candidates(pair(1, 2)))
    assert matcher.kinds(pair(1, 2)) == ["full"]


@pytest.mark.parametrize("in_full", [False, True])
def test_a_pair_given_up_early_is_open_to_a_keyframe_that_fits_nowhere(in_full: bool) -> None:
    graph, matcher, matching = photos(8, {pair(1, 8): (2, 2)})
    matching.match_pairs(candidates(pair(1, 8)), in_full=in_full)
    graph.set_registered(FrameId(1), True)
    places = graph.choose_places(FrameId(8), limit=8)
    assert (pair(1, 8) in [one.pair for one in places]) is not in_full
    assert graph.was_tried(pair(1, 8))
