"""From a keyframe's candidates to verified pairs in its scene graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx
import numpy as np
import pycolmap
import pytest

from adapters.town.oracle import OracleMatcher
from engine.config import (
    CoarseToFineConfig,
    DenseMatchingConfig,
    OracleConfig,
    SecondMatcherConfig,
    TwoViewConfig,
)
from engine.estimators.lenses import intrinsics_of
from engine.geometry import camera_center, grid_over_image, transform_points
from engine.matching.pair_matching import MatchedKeyframe, PairMatching
from engine.matching.scene_graph import SceneGraph
from engine.ports import PairMatcher
from engine.types import (
    NO_ROW,
    Features,
    FrameId,
    ImagePair,
    Keyframe,
    MatchRequest,
    PackedMask,
    PairCandidate,
    PairMatches,
    PairReason,
    VerifiedPair,
)
from tests.support import true_scene
from tests.support.dense_world import DEPTH_NOISE_RATIO, DenseFakeMatcher, dense_graph, table_of
from tests.support.synthetic import (
    HEIGHT,
    WIDTH,
    FakeMatcher,
    SyntheticCamera,
    SyntheticWorld,
    round_path,
    scene_graph,
    straight_path,
)

CONFIG = TwoViewConfig()
DENSE = DenseMatchingConfig()


def pair(first: int, second: int) -> ImagePair:
    return ImagePair(FrameId(first), FrameId(second))


def candidate(first: int, second: int) -> PairCandidate:
    return PairCandidate(pair=pair(first, second), reason=PairReason.TEMPORAL, score=1.0)


def matching_over(
    graph: SceneGraph, matcher: PairMatcher, keyframes: Iterable[Keyframe] = (), **dense: Any
) -> PairMatching:
    matching = PairMatching(
        graph,
        matcher,
        two_view=CONFIG,
        dense=DENSE.model_copy(update=dense),
        coarse_to_fine=CoarseToFineConfig(),
    )
    for keyframe in keyframes:
        matching.add_keyframe(keyframe)
    return matching


def keyframes_of(world: SyntheticWorld) -> list[Keyframe]:
    return [world.keyframe(frame_id) for frame_id in world.frame_ids]


def match_next(matching: PairMatching, keyframe: Keyframe) -> MatchedKeyframe:
    matching.add_keyframe(keyframe)
    return matching.match_keyframe(keyframe.frame_id)


def changes_since(matching: PairMatching, frame_id: int) -> tuple[Features, ...]:
    """The tables that changed, from a match of a keyframe that has no candidates left."""
    matched = matching.match_keyframe(FrameId(frame_id))
    assert matched.failure is None
    return matched.changed_features


def test_pairs_that_hold_are_returned_in_order_and_recorded() -> None:
    world = SyntheticWorld(straight_path(4), noise_px=0.5)
    graph, matcher = scene_graph(), FakeMatcher(world=world)
    matching = matching_over(graph, matcher, keyframes_of(world))
    asked = [candidate(2, 4), candidate(1, 2), candidate(3, 4)]
    held = matching.match_pairs(asked)
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
    graph, matcher = scene_graph(), FakeMatcher(world=world, wrong_ratio=0.2)
    matching = matching_over(graph, matcher, keyframes_of(world))
    (verified,) = matching.match_pairs([candidate(1, 2)])
    true = {tuple(row) for row in world.matches(pair(1, 2)).tolist()}
    kept = {tuple(row) for row in verified.inlier_matches_idx.tolist()}
    assert len(kept & true) >= 0.75 * len(true)  # a fifth of them was spoiled
    assert len(kept - true) <= 0.05 * len(kept)
    assert verified.num_matches == len(true)


def test_pairs_that_do_not_hold_are_tried_once() -> None:
    world = SyntheticWorld(straight_path(16))
    graph, matcher = scene_graph(), FakeMatcher(world=world)
    matching = matching_over(graph, matcher, keyframes_of(world))
    asked = [candidate(1, 16), candidate(1, 2)]
    held = matching.match_pairs(asked)
    assert [one.pair for one in held] == [pair(1, 2)]
    assert graph.was_tried(pair(1, 16))
    assert graph.was_tried(pair(1, 2))
    assert not graph.was_tried(pair(2, 3))


def test_a_matcher_that_finds_nothing_makes_no_pair() -> None:
    world = SyntheticWorld(straight_path(3))
    graph, matcher = scene_graph(), FakeMatcher(world=world, dropped=lambda one: True)
    matching = matching_over(graph, matcher, keyframes_of(world))
    assert matching.match_pairs([candidate(1, 2)]) == []
    assert graph.edges() == []
    assert graph.was_tried(pair(1, 2))


def test_no_candidates_give_no_pairs() -> None:
    world = SyntheticWorld(straight_path(1))
    graph, matcher = scene_graph(), FakeMatcher(world=world)
    matching = matching_over(graph, matcher, keyframes_of(world))
    assert matching.match_pairs([]) == []
    matched = matching.match_keyframe(FrameId(1))
    assert (matched.frame_id, matched.pairs, matched.failure) == (1, (), None)
    assert not any(matcher.calls)


def test_thresholds_grow_with_the_larger_image() -> None:
    """3 px at an edge of 1000 px are 12 px at one of 4000."""
    world = SyntheticWorld(straight_path(2), noise_px=3.0)
    held = {}
    for width in (1000, 4000):
        keyframes = [world.keyframe(1), dataclasses.replace(world.keyframe(2), width=width)]
        matching = matching_over(scene_graph(), FakeMatcher(world=world), keyframes)
        (verified,) = matching.match_pairs([candidate(1, 2)])
        held[width] = verified.num_inliers / verified.num_matches
    assert held[1000] < 0.85
    assert held[4000] > 0.95


def test_a_keyframe_is_matched_around_the_place_it_returns_to() -> None:
    """The ring closes: recognition finds some keyframes of the old place, the rest follow."""
    world = SyntheticWorld(round_path(32, turns=1.25), density=1.0, noise_px=0.5)
    graph = scene_graph(exhaustive_below=2, temporal_offsets=(1, 2, 3), num_retrieved=2)
    matcher = FakeMatcher(world=world)
    matching = matching_over(graph, matcher)
    for frame_id in range(1, 27):
        match_next(matching, world.keyframe(frame_id))
    matcher.calls.clear()
    held = match_next(matching, world.keyframe(27)).pairs
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


def test_a_matcher_that_fails_costs_the_pairs_it_did_not_match_and_what_held_before_stays() -> None:
    world = SyntheticWorld(round_path(32, turns=1.25), density=1.0, noise_px=0.5)
    graph = scene_graph(exhaustive_below=2, temporal_offsets=(1, 2, 3), num_retrieved=2)
    matcher = FakeMatcher(world=world)
    matching = matching_over(graph, matcher)
    for frame_id in range(1, 27):
        match_next(matching, world.keyframe(frame_id))
    matcher.fails = [len(matcher.calls) + 1]  # the second round
    matched = match_next(matching, world.keyframe(27))
    assert matched.failure == "out of memory"
    assert matched.pairs == tuple(graph.verified_pairs(FrameId(27)))
    first_round, second_round = matcher.calls[-2:]
    assert all(graph.was_tried(one) for one in first_round)
    assert not any(graph.was_tried(one) for one in second_round)
    assert {one.pair for one in graph.verified_pairs(FrameId(27))} <= set(first_round)
    assert graph.verified_pairs(FrameId(27))


# -- dense matches --------------------------------------------------------------------------------

NUM_DENSE = 12
Tracks = list[list[tuple[FrameId, int]]]  # frames and rows


@pytest.fixture(scope="module")
def dense_world() -> SyntheticWorld:
    return SyntheticWorld(straight_path(NUM_DENSE, step=1.2), density=1.0)


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A graph whose keyframes were matched densely, one after the other."""

    matcher: DenseFakeMatcher
    graph: SceneGraph
    matching: PairMatching

    def tracks(self) -> Tracks:
        """Keypoints that matches join."""
        joined: networkx.Graph[tuple[FrameId, int]] = networkx.Graph()
        for edge in self.graph.edges():
            first, second = edge.pair.first, edge.pair.second
            joined.add_edges_from(
                ((first, a), (second, b)) for a, b in edge.inlier_matches_idx.tolist()
            )
        return [list(track) for track in networkx.connected_components(joined)]

    def points_of(self, frame_id: FrameId, rows: Any) -> Any:
        """Which points of the world rows (M,) of a keyframe show, -1 for none."""
        keypoints_xy = self.graph.keyframe(frame_id).features.keypoints_xy
        return self.matcher.point_ids(frame_id, keypoints_xy[np.asarray(rows, np.int64)])


def matched_densely(
    world: SyntheticWorld, *, matcher: DenseFakeMatcher | None = None, **dense: Any
) -> Dense:
    matcher = matcher or DenseFakeMatcher(world=world)
    graph = dense_graph(exhaustive_below=NUM_DENSE)
    matching = matching_over(graph, matcher, **dense)
    for frame_id in world.frame_ids:
        match_next(matching, matcher.keyframe(frame_id))
    return Dense(matcher=matcher, graph=graph, matching=matching)


@pytest.fixture(scope="module")
def dense(dense_world: SyntheticWorld) -> Dense:
    """Tests only read it."""
    return matched_densely(dense_world)


def num_frames(track: list[tuple[FrameId, int]]) -> int:
    return len({frame_id for frame_id, _ in track})


@pytest.mark.slow
def test_dense_matches_become_keypoints_of_both_images(dense: Dense) -> None:
    num = num_right = 0
    for edge in dense.graph.edges():
        rows1, rows2 = edge.inlier_matches_idx.astype(np.int64).T
        assert len(np.unique(rows1)) == len(np.unique(rows2)) == edge.num_inliers
        for frame_id, rows in ((edge.pair.first, rows1), (edge.pair.second, rows2)):
            assert not dense.graph.keyframe(frame_id).features.is_free[rows].any()
        points1, points2 = (
            dense.points_of(frame_id, rows)
            for frame_id, rows in ((edge.pair.first, rows1), (edge.pair.second, rows2))
        )
        num_right += int(((points1 == points2) & (points1 >= 0)).sum())
        num += edge.num_inliers
    assert len(dense.graph.edges()) > 50
    assert num > 5000
    assert 0.97 * num < num_right <= num


def test_tracks_are_long_because_ends_of_matches_merge(
    dense: Dense, dense_world: SyntheticWorld
) -> None:
    tracks = dense.tracks()
    seen = np.concatenate([dense_world.view(i).point_ids for i in dense_world.frame_ids])
    num_sights = np.bincount(seen)
    lengths = [num_frames(track) for track in tracks]
    # As many tracks as points that two frames see, and about as long as they are seen.
    assert len(tracks) < 1.1 * (num_sights >= 2).sum()
    assert np.mean(lengths) > 0.9 * num_sights[num_sights >= 2].mean()
    assert max(lengths) == NUM_DENSE
    # Nearly all see one point, each frame at one of its keypoints.
    points = [{int(dense.points_of(i, [row])[0]) for i, row in track} for track in tracks]
    assert np.mean([len(track_points) == 1 for track_points in points]) > 0.97
    assert np.mean([num_frames(track) == len(track) for track in tracks]) > 0.85


@pytest.mark.slow
def test_ends_that_never_merge_make_more_keypoints_and_worse_tracks(
    dense: Dense, dense_world: SyntheticWorld
) -> None:
    apart = matched_densely(dense_world, merge_radius_px=0.5, expected_radius_px=0.5)
    num_keypoints, num_apart = (
        sum(len(one.graph.keyframe(i).features.fixed_rows) for i in dense_world.frame_ids)
        for one in (dense, apart)
    )
    assert num_apart > 1.1 * num_keypoints
    assert sum(e.num_inliers for e in apart.graph.edges()) < 0.7 * sum(
        e.num_inliers for e in dense.graph.edges()
    )
    assert np.mean([num_frames(track) == len(track) for track in apart.tracks()]) < 0.75


def test_a_table_never_grows_and_only_free_rows_move(
    dense: Dense, dense_world: SyntheticWorld
) -> None:
    for frame_id in dense_world.frame_ids:
        before = dense.matcher.keyframe(frame_id).features
        after = dense.graph.keyframe(frame_id).features
        assert len(after) == len(before)
        fixed = before.fixed_rows
        assert np.array_equal(after.keypoints_xy[fixed], before.keypoints_xy[fixed])
        assert len(after.fixed_rows) > 1.5 * len(fixed)
        still_free = np.flatnonzero(after.is_free)
        assert np.array_equal(after.keypoints_xy[still_free], before.keypoints_xy[still_free])


def test_the_same_keyframes_give_the_same_keypoints_to_the_last_bit(
    dense: Dense, dense_world: SyntheticWorld
) -> None:
    again = matched_densely(dense_world)
    for one, other in zip(dense.graph.edges(), again.graph.edges(), strict=True):
        assert np.array_equal(one.inlier_matches_idx, other.inlier_matches_idx)
    for frame_id in dense_world.frame_ids:
        one_xy, other_xy = (
            each.graph.keyframe(frame_id).features.keypoints_xy for each in (dense, again)
        )
        assert np.array_equal(one_xy, other_xy)


def all_pairs(num: int) -> list[PairCandidate]:
    return [candidate(i, j) for j in range(2, num + 1) for i in range(1, j)]


@pytest.mark.slow
def test_the_order_of_pairs_hardly_matters(dense_world: SyntheticWorld) -> None:
    """Which match claims a cell depends on it, how much holds does not."""
    outcomes = []
    for seed in range(3):
        asked = [all_pairs(8)[k] for k in np.random.default_rng(seed).permutation(28)]
        matcher, graph = DenseFakeMatcher(world=dense_world), dense_graph()
        keyframes = [matcher.keyframe(frame_id) for frame_id in range(1, 9)]
        matching = matching_over(graph, matcher, keyframes)
        matching.match_pairs(asked)
        made = Dense(matcher=matcher, graph=graph, matching=matching)
        lengths = [num_frames(track) for track in made.tracks()]
        num_inliers = sum(edge.num_inliers for edge in graph.edges())
        outcomes.append((len(graph.edges()), num_inliers, len(lengths), np.mean(lengths)))
    figures = np.array(outcomes)
    assert (figures[:, 0] == figures[0, 0]).all()
    assert (np.ptp(figures, axis=0) <= 0.05 * figures.mean(axis=0)).all()
    assert len(np.unique(figures[:, 1])) > 1


# -- dense matches and third keyframes ------------------------------------------------------------


@dataclass(kw_only=True)
class Misled(DenseFakeMatcher):
    """Sees a share of the points of one pair at another depth, where epipolar lines allow it."""

    misled_pair: ImagePair
    misled_share: float

    def _match(self, request: MatchRequest) -> PairMatches:
        matches = super()._match(request)
        if request.pair != self.misled_pair:
            return matches
        rng = np.random.default_rng(23)
        is_there = np.flatnonzero(matches.matches_idx[:, 0] != NO_ROW)
        chosen = is_there[rng.random(len(is_there)) < self.misled_share]
        points = self.world.points[self.point_ids(request.pair.first, matches.points1_xy[chosen])]
        eye = camera_center(self.world.pose(request.pair.first))
        camera = self.world.camera(request.pair.second).as_colmap()
        nearer = transform_points(self.world.pose(request.pair.second), eye + 0.9 * (points - eye))
        points2_xy = matches.points2_xy.copy()
        points2_xy[chosen] = camera.img_from_cam(nearer)
        return dataclasses.replace(matches, points2_xy=points2_xy)


def related_by_second(one: VerifiedPair, other: VerifiedPair) -> dict[int, int]:
    """Rows of keyframe 3 by the rows of keyframe 1 that match the same row of keyframe 2."""
    row3_of_row2 = dict(other.inlier_matches_idx.tolist())
    return {
        row1: row3_of_row2[row2]
        for row1, row2 in one.inlier_matches_idx.tolist()
        if row2 in row3_of_row2
    }


def test_what_third_keyframes_contradict_is_left_out(dense_world: SyntheticWorld) -> None:
    matcher = Misled(world=dense_world, misled_pair=pair(1, 3), misled_share=1.0)
    keyframes = [matcher.keyframe(frame_id) for frame_id in (1, 2, 3)]
    graph = dense_graph()
    matching = matching_over(graph, matcher, keyframes)
    one, other = matching.match_pairs([candidate(1, 2), candidate(2, 3)])
    expected = related_by_second(one, other)
    alone = matching_over(dense_graph(), matcher, keyframes)
    num_wrong = []
    for which in (matching, alone):
        (verified,) = which.match_pairs([candidate(1, 3)])
        found = dict(verified.inlier_matches_idx.tolist())
        assert len(found) > 60
        num_wrong.append(sum(found[row] != expected[row] for row in expected.keys() & found.keys()))
    assert num_wrong[0] <= 2
    assert num_wrong[1] >= 15, "without the second keyframe they are believed"


def test_rows_that_third_keyframes_relate_are_matched_with_each_other(
    dense_world: SyntheticWorld,
) -> None:
    matcher = DenseFakeMatcher(world=dense_world)
    keyframes = [matcher.keyframe(frame_id) for frame_id in (1, 2, 3)]
    matching = matching_over(dense_graph(), matcher, keyframes)
    one, other, last = matching.match_pairs([candidate(1, 2), candidate(2, 3), candidate(1, 3)])
    expected, found = related_by_second(one, other), dict(last.inlier_matches_idx.tolist())
    common = expected.keys() & found.keys()
    assert len(common) > 40
    assert np.mean([found[row] == expected[row] for row in common]) > 0.98


# -- dense matches: changed tables, focal lengths and depths --------------------------------------


def test_tables_that_changed_are_returned_once(dense_world: SyntheticWorld) -> None:
    matcher, graph = DenseFakeMatcher(world=dense_world), dense_graph()
    matching = matching_over(graph, matcher)
    for frame_id, expected in ((1, set()), (2, {1, 2}), (3, {1, 2, 3})):
        matched = match_next(matching, matcher.keyframe(frame_id))
        changed = {features.frame_id: features for features in matched.changed_features}
        assert changed.keys() == expected
        assert len(matched.changed_features) == len(changed)
        for changed_id, features in changed.items():
            assert graph.keyframe(changed_id).features is features
    assert changes_since(matching, 3) == ()


def test_tables_of_sparse_matchers_never_change() -> None:
    world = SyntheticWorld(straight_path(3))
    graph = scene_graph()
    matching = matching_over(graph, FakeMatcher(world=world), keyframes_of(world))
    assert len(matching.match_pairs(all_pairs(3))) == 3
    assert not matching.depths_m(FrameId(1)).any()
    matched = matching.match_keyframe(FrameId(3))
    assert (matched.changed_features, matched.focal_lengths_px) == ((), ())


def test_queries_are_limited_and_pointmaps_asked_for_when_wanted(
    dense_world: SyntheticWorld,
) -> None:
    matcher = DenseFakeMatcher(world=dense_world)
    keyframes = [matcher.keyframe(frame_id) for frame_id in (1, 2, 3)]
    matching = matching_over(dense_graph(), matcher, keyframes, max_query_points=150)
    matching.match_pairs([candidate(1, 2)])
    matching.match_keyframe(FrameId(3), wants_pointmaps=True)
    asked = [request for call in matcher.requests for request in call]
    assert [request.wants_pointmaps for request in asked] == [False, True, True]
    assert all(len(request.query_rows1) == len(request.query_rows2) == 150 for request in asked)


def test_focal_lengths_are_returned_once_and_of_verified_pairs_only() -> None:
    cameras = (SyntheticCamera.known("a"), SyntheticCamera.known("b", focal_px=900.0))
    world = SyntheticWorld(straight_path(16), cameras=cameras)
    matcher = DenseFakeMatcher(world=world, tells_focal_length=True)
    for wants_pointmaps, expected in ((True, ((1, 800.0), (2, 900.0))), (False, ())):
        graph = dense_graph()
        matching = matching_over(graph, matcher, [matcher.keyframe(1), matcher.keyframe(2)])
        matched = matching.match_keyframe(FrameId(2), wants_pointmaps=wants_pointmaps)
        assert len(matched.pairs) == 1
        assert matched.focal_lengths_px == expected
        matching.add_keyframe(matcher.keyframe(16))
        matched = matching.match_keyframe(FrameId(16), wants_pointmaps=wants_pointmaps)
        assert graph.was_tried(pair(1, 16))
        assert (matched.pairs, matched.focal_lengths_px) == ((), ())


@pytest.mark.slow
def test_depths_are_kept_for_the_keypoints_of_verified_pairs(dense_world: SyntheticWorld) -> None:
    made = matched_densely(
        dense_world, matcher=DenseFakeMatcher(world=dense_world, metres_per_unit=3.0)
    )
    ratios = []
    for frame_id in dense_world.frame_ids:
        depths_m = made.matching.depths_m(frame_id)
        assert len(depths_m) == len(made.graph.keyframe(frame_id).features)
        rows = np.flatnonzero(depths_m)
        matched = {
            int(row)
            for edge in made.graph.verified_pairs(frame_id)
            for row in edge.inlier_matches_idx[:, int(frame_id == edge.pair.second)]
        }
        assert set(rows.tolist()) == matched
        points = made.points_of(frame_id, rows)
        in_cam = transform_points(dense_world.pose(frame_id), dense_world.points[points])
        ratios.append(depths_m[rows] / (3.0 * in_cam[:, 2]))
    together = np.concatenate(ratios)
    assert 0.8 * DEPTH_NOISE_RATIO < np.std(together) < 1.3 * DEPTH_NOISE_RATIO
    assert abs(np.median(together) - 1.0) < 0.01


def test_a_pair_of_whose_matches_too_few_find_a_keypoint_does_not_hold(
    dense_world: SyntheticWorld,
) -> None:
    """Matches that pass verification may still fall into a few cells."""
    matcher, graph = DenseFakeMatcher(world=dense_world), dense_graph()
    size = (WIDTH, HEIGHT)
    keyframes = []
    for frame_id in (1, 2):
        keyframe = matcher.keyframe(frame_id)
        fixed_xy = keyframe.features.keypoints_xy[keyframe.features.fixed_rows]
        some_xy = fixed_xy if frame_id == 1 else fixed_xy[:0]
        coarse = table_of(some_xy, size=size, grid=(4, 3), frame_id=frame_id)
        keyframes.append(dataclasses.replace(keyframe, features=coarse))
    matching = matching_over(graph, matcher, keyframes)
    assert matching.match_pairs([candidate(1, 2)]) == []
    assert graph.was_tried(pair(1, 2))
    assert graph.edges() == []
    assert changes_since(matching, 2) == ()  # it claims no rows
    assert not len(graph.keyframe(FrameId(2)).features.fixed_rows)


def test_a_failing_matcher_leaves_tables_as_they_were(dense_world: SyntheticWorld) -> None:
    matcher, graph = DenseFakeMatcher(world=dense_world), dense_graph()
    matching = matching_over(graph, matcher)
    for frame_id in (1, 2):
        match_next(matching, matcher.keyframe(frame_id))
    tables = [graph.keyframe(frame_id).features for frame_id in graph.keyframe_ids]
    matcher.fails = [len(matcher.requests)]
    failed = match_next(matching, matcher.keyframe(3))
    assert failed.failure == "out of memory"
    assert (failed.pairs, failed.changed_features, failed.focal_lengths_px) == ((), (), ())
    assert all(graph.keyframe(one.frame_id).features is one for one in tables)
    assert len(matching.match_keyframe(FrameId(3)).pairs) == 2


def test_a_keyframe_is_added_to_the_graph_and_comes_once(dense_world: SyntheticWorld) -> None:
    matcher, graph = DenseFakeMatcher(world=dense_world), dense_graph()
    matching = matching_over(graph, matcher, [matcher.keyframe(1)])
    assert graph.keyframe_ids == [1]
    match_next(matching, matcher.keyframe(2))
    table = graph.keyframe(FrameId(1)).features
    with pytest.raises(ValueError, match="keyframe 1 was added before"):
        matching.add_keyframe(matcher.keyframe(1))
    assert graph.keyframe(FrameId(1)).features is table
    assert len(match_next(matching, matcher.keyframe(3)).pairs) == 2


def test_pairs_of_one_batch_do_not_take_each_others_free_rows_for_something_else() -> None:
    """All are looked up before the first of them claims rows; every match must still be true."""
    oracle = OracleMatcher(
        OracleConfig(noise_px=0.0, outlier_ratio=0.0),
        dense=DenseMatchingConfig(max_corners=100, max_keypoints=2000),
        truth=true_scene.true_view,
        seed=0,
    )
    graph = dense_graph()
    matching = matching_over(graph, oracle)
    for index in range(4):
        keyframe = true_scene.keyframe_of(index, oracle.describe(true_scene.frame_of(index)))
        matching.add_keyframe(keyframe)
    held = matching.match_pairs(all_pairs(4))
    assert len(held) == 6
    for verified in held:
        first, second = (graph.keyframe(i) for i in (verified.pair.first, verified.pair.second))
        rows1, rows2 = verified.inlier_matches_idx.astype(np.int64).T
        points = true_scene.points_at(first.index, first.features.keypoints_xy[rows1])
        ends_xy = true_scene.project(second.index, points)
        errors_px = np.linalg.norm(ends_xy - second.features.keypoints_xy[rows2], axis=1)
        assert errors_px.max() < 1.5, "cells are 6 px wide, and ends merge within 0.64 px"


# -- masks ----------------------------------------------------------------------------------------


def half_masked(keyframe: Keyframe, *, left: bool) -> Keyframe:
    mask = np.ones((keyframe.height, keyframe.width), np.bool_)
    half = keyframe.width // 2
    mask[:, slice(half) if left else slice(half, None)] = False
    return dataclasses.replace(keyframe, mask=PackedMask.of(mask))


def test_dense_matches_have_no_end_under_a_mask_and_look_nothing_up_there() -> None:
    world = SyntheticWorld(straight_path(4), noise_px=0.0)
    matcher = DenseFakeMatcher(world=world)
    keyframes = [half_masked(matcher.keyframe(i), left=i % 2 == 0) for i in world.frame_ids]
    graph = dense_graph()
    matching = matching_over(graph, matcher, keyframes)
    held = matching.match_pairs([candidate(1, 3), candidate(2, 4)])
    assert [one.pair for one in held] == [pair(1, 3), pair(2, 4)]
    for verified in held:
        sides = zip((verified.pair.first, verified.pair.second), (0, 1), strict=True)
        for frame_id, side in sides:
            rows = verified.inlier_matches_idx[:, side]
            xy = graph.keyframe(frame_id).features.keypoints_xy[rows]
            assert len(xy) > 25
            is_left = xy[:, 0] < WIDTH // 2
            assert not (is_left if frame_id % 2 == 0 else ~is_left).any()
    for request in matcher.requests[0]:
        is_left = request.first.keypoints_xy[request.query_rows1, 0] < WIDTH // 2
        assert len(is_left) > 50
        assert not (is_left if request.pair.first % 2 == 0 else ~is_left).any()


def test_an_image_that_is_all_masked_matches_nothing() -> None:
    world = SyntheticWorld(straight_path(2), noise_px=0.0)
    matcher = DenseFakeMatcher(world=world)
    keyframes = [matcher.keyframe(i) for i in world.frame_ids]
    nothing = PackedMask.of(np.zeros((HEIGHT, WIDTH), np.bool_))
    keyframes[1] = dataclasses.replace(keyframes[1], mask=nothing)
    matching = matching_over(dense_graph(), matcher, keyframes)
    assert matching.match_pairs([candidate(1, 2)]) == []


# -- another lens ---------------------------------------------------------------------------------


def fisheye_world() -> SyntheticWorld:
    """A fisheye of 150 degrees across, whose pairs no fundamental matrix describes."""
    focal_px = WIDTH / 2 / np.radians(75.0)
    camera = SyntheticCamera(
        model="SIMPLE_RADIAL_FISHEYE", params=(focal_px, WIDTH / 2, HEIGHT / 2, 0.0)
    )
    return SyntheticWorld(straight_path(4), cameras=[camera], noise_px=0.3)


def test_pairs_verified_again_with_the_right_lens_keep_their_matches() -> None:
    world, graph = fisheye_world(), scene_graph()
    matching = matching_over(graph, FakeMatcher(world=world, wrong_ratio=0.1))
    for keyframe in keyframes_of(world):
        match_next(matching, keyframe)
    before = {verified.pair: verified for verified in graph.edges()}
    intrinsics = intrinsics_of(world.camera(1).as_colmap(), is_wide=True)
    matching.verify_again({"camera": intrinsics}, camera_key="camera")
    after = {verified.pair: verified for verified in graph.edges()}
    assert len(after) == 6  # all pairs of four
    for one, verified in after.items():
        num_right = 0.9 * len(world.matches(one))
        assert 0.95 * num_right < verified.num_inliers < 1.03 * num_right
        assert verified.cam2_from_cam1 is not None
        assert len(matching.all_matches(verified)) == len(world.matches(one))
    num_before = sum(verified.num_inliers for verified in before.values())
    assert num_before < 0.9 * sum(verified.num_inliers for verified in after.values())


def test_pairs_that_do_not_hold_with_the_right_lens_lose_their_edge() -> None:
    world, graph = fisheye_world(), scene_graph()
    matching = matching_over(graph, FakeMatcher(world=world, wrong_ratio=0.1))
    for keyframe in keyframes_of(world):
        match_next(matching, keyframe)
    num_edges = len(graph.edges())
    tiny = pycolmap.Camera(
        model="SIMPLE_RADIAL_FISHEYE",
        width=WIDTH,
        height=HEIGHT,
        params=(90.0, WIDTH / 2, HEIGHT / 2, 0.0),
    )
    intrinsics = intrinsics_of(tiny, is_wide=True)
    matching.verify_again({"camera": intrinsics}, camera_key="another")
    assert len(graph.edges()) == num_edges
    matching.verify_again({"camera": intrinsics}, camera_key="camera")
    assert len(graph.edges()) < num_edges
    assert all(graph.was_tried(pair(one, two)) for one, two in ((1, 2), (2, 3), (3, 4)))


def test_pairs_that_do_not_hold_are_handed_over_once() -> None:
    world = SyntheticWorld(straight_path(6, step=9.0))
    matching = matching_over(scene_graph(), FakeMatcher(world=world))
    tried: set[ImagePair] = set()
    for keyframe in keyframes_of(world):
        matched = match_next(matching, keyframe)
        assert tried.isdisjoint(matched.tried_pairs)
        tried.update(matched.tried_pairs)
    held = {verified.pair for verified in matching._graph.all_edges()}
    assert tried
    assert tried.isdisjoint(held)
    assert len(tried) + len(held) == 15


@pytest.mark.slow
def test_dense_matching_that_goes_on_finds_the_pairs_of_one_that_did_not_stop(
    dense_world: SyntheticWorld,
) -> None:
    """Keypoints claimed, counts of matches and depths are as they were."""
    matcher = DenseFakeMatcher(world=dense_world, metres_per_unit=2.0)
    whole = matching_over(dense_graph(exhaustive_below=NUM_DENSE), matcher)
    again = matching_over(dense_graph(exhaustive_below=NUM_DENSE), matcher)
    *before, last = [matcher.keyframe(frame_id) for frame_id in dense_world.frame_ids]
    pairs: dict[FrameId, tuple[VerifiedPair, ...]] = {}
    for keyframe in before:
        pairs[keyframe.frame_id] = match_next(whole, keyframe).pairs
    facts = whole.take_facts()
    for keyframe in before:
        frame_id = keyframe.frame_id
        again.restore_keyframe(whole._graph.keyframe(frame_id), facts)
        again.restore_matches(frame_id, pairs[frame_id], [])
    again.restore(facts)

    expected, found = (match_next(one, last) for one in (whole, again))
    assert len(expected.pairs) >= 4
    assert [one.pair for one in found.pairs] == [one.pair for one in expected.pairs]
    for own, wanted in zip(found.pairs, expected.pairs, strict=True):
        assert np.array_equal(own.inlier_matches_idx, wanted.inlier_matches_idx)
    for keyframe in before:
        frame_id = keyframe.frame_id
        one, other = (m._graph.keyframe(frame_id).features for m in (whole, again))
        assert np.array_equal(one.keypoints_xy, other.keypoints_xy)
        assert np.array_equal(whole.depths_m(frame_id), again.depths_m(frame_id))


# -- a second matcher -----------------------------------------------------------------------------

NUM_CELLS = 600


class DescribedWorld(FakeMatcher):
    """Matches keypoints that it described, and says which rows it was given."""

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        for one in requests:
            assert one.first.descriptors.any(axis=1).all()
            assert one.second.descriptors.any(axis=1).all()
        return super().match(requests)


def with_room(keyframe: Keyframe) -> Keyframe:
    """A keyframe with descriptors, and free rows after its keypoints."""
    size = (keyframe.width, keyframe.height)
    points_xy = grid_over_image(size, num=NUM_CELLS)
    described = dataclasses.replace(
        keyframe.features, descriptors=np.ones((len(keyframe.features), 8), np.uint8)
    )
    features = described.with_free_rows(points_xy, np.zeros((len(points_xy), 3), np.uint8))
    return dataclasses.replace(keyframe, features=features)


def points_of(world: SyntheticWorld, one: ImagePair, *, beside: bool) -> PairMatches:
    """True matches as points; beside all keypoints, where these are not to be met."""
    rows = world.matches(one)
    first, second = (world.keyframe(i).features for i in (one.first, one.second))
    shift = np.array([7.0, 0.0]) if beside else np.zeros(2)
    return PairMatches(
        pair=one,
        matches_idx=np.full(rows.shape, NO_ROW),
        points1_xy=first.keypoints_xy[rows[:, 0]] + shift,
        points2_xy=second.keypoints_xy[rows[:, 1]] + shift,
        confidence=np.ones(len(rows), np.float32),
    )


def second_matching(world: SyntheticWorld) -> tuple[SceneGraph, PairMatching]:
    graph = scene_graph()
    matcher = DescribedWorld(world=world, dropped=lambda one: one == pair(1, 2))
    matching = PairMatching(
        graph,
        matcher,
        two_view=CONFIG,
        dense=DENSE,
        coarse_to_fine=CoarseToFineConfig(),
        second=SecondMatcherConfig(),
    )
    for keyframe in keyframes_of(world):
        matching.add_keyframe(with_room(keyframe))
    return graph, matching


def test_the_first_matcher_gets_what_it_described_and_the_second_one_all_rows() -> None:
    world = SyntheticWorld(straight_path(3), noise_px=0.3)
    graph, matching = second_matching(world)
    assert [one.pair for one in matching.match_pairs([candidate(2, 3)])] == [pair(2, 3)]
    (request,) = matching.second_requests([pair(1, 2)])
    num_rows = len(graph.keyframe(FrameId(1)).features)
    assert len(request.first) == num_rows
    assert not request.first.descriptors.size
    assert request.query_rows1.max() >= num_rows - NUM_CELLS  # free rows are looked up, too


def test_matches_of_a_second_matcher_become_keypoints_of_the_first_one_where_they_meet() -> None:
    world = SyntheticWorld(straight_path(3), noise_px=0.3)
    graph, matching = second_matching(world)
    matching.add_second([points_of(world, pair(1, 2), beside=False)])
    (verified,) = matching.verify_second()
    assert verified.reason is PairReason.SECOND
    assert graph.edge(pair(1, 2)) is verified
    true = {tuple(row) for row in world.matches(pair(1, 2)).tolist()}
    found = {tuple(row) for row in verified.inlier_matches_idx.tolist()}
    assert len(found & true) >= 0.9 * len(true)
    assert matching.verify_second() == []


def test_matches_beside_all_keypoints_take_free_rows_which_are_reported() -> None:
    world = SyntheticWorld(straight_path(3), density=0.3, noise_px=0.3)
    graph, matching = second_matching(world)
    num_own = len(world.keyframe(1).features)
    matching.add_second([points_of(world, pair(1, 2), beside=True)])
    (verified,) = matching.verify_second()
    assert (verified.inlier_matches_idx[:, 0] >= num_own).mean() > 0.8
    late = matching.found_late(FrameId(3), [verified])
    assert {features.frame_id for features in late.changed_features} == {1, 2}
    assert late.found_pairs == (verified,)
    claimed = graph.keyframe(FrameId(1)).features
    assert np.count_nonzero(claimed.is_free) < NUM_CELLS
    assert len(claimed.described()) == num_own


def test_a_pair_that_holds_stays_and_what_is_found_besides_is_kept_apart() -> None:
    world = SyntheticWorld(straight_path(3), noise_px=0.3)
    graph, matching = second_matching(world)
    (own,) = matching.match_pairs([candidate(2, 3)])
    few = dataclasses.replace(own, inlier_matches_idx=own.inlier_matches_idx[:20])
    graph.record_pair(few)
    matching.add_second([points_of(world, pair(2, 3), beside=False)])
    assert matching.verify_second() == []
    assert graph.edge(pair(2, 3)) is few
    (other,) = matching.found_late(FrameId(3), []).other_matches
    assert (other.pair, other.reason) == (pair(2, 3), PairReason.SECOND)
    kept = {tuple(row) for row in other.inlier_matches_idx.tolist()}
    assert len(kept) > 2 * len(few.inlier_matches_idx)
    assert len(kept & {tuple(row) for row in few.inlier_matches_idx.tolist()}) >= 18


def test_what_is_worse_than_what_a_pair_has_moves_no_keypoint() -> None:
    world = SyntheticWorld(straight_path(3), noise_px=0.3)
    graph, matching = second_matching(world)
    (own,) = matching.match_pairs([candidate(2, 3)])
    tables = [graph.keyframe(FrameId(i)).features for i in (2, 3)]
    rows = own.inlier_matches_idx.astype(np.int64)
    first, second = (table.keypoints_xy for table in tables)
    elsewhere = PairMatches(  # of keypoints that have matches, so that no other one is left
        pair=pair(2, 3),
        matches_idx=np.column_stack([rows[:, 0], np.full(len(rows), NO_ROW)]),
        points1_xy=first[rows[:, 0]],
        points2_xy=second[rows[:, 1]] + (7.0, 0.0),
        confidence=np.full(len(rows), 0.9, np.float32),
    )
    matching.add_second([elsewhere])
    assert matching.verify_second() == []
    late = matching.found_late(FrameId(3), [])
    assert (late.other_matches, late.changed_features) == ((), ())
    assert graph.edge(pair(2, 3)) is own
    assert all(matching._tables.features(one.frame_id) is one for one in tables)


def test_a_second_matcher_that_finds_nothing_changes_no_count_of_matches() -> None:
    world = SyntheticWorld(straight_path(3), noise_px=0.3)
    _, matching = second_matching(world)
    matching.match_pairs([candidate(2, 3)])
    counts = [matching._tables._tables[FrameId(i)]._num_matches.copy() for i in (2, 3)]
    matching.add_second([points_of(world, pair(2, 3), beside=False).take(np.arange(0))])
    assert matching.verify_second() == []
    for frame_id, before in zip((2, 3), counts, strict=True):
        now = matching._tables._tables[FrameId(frame_id)]._num_matches
        np.testing.assert_array_equal(now, before)


def test_a_run_that_goes_on_knows_which_keypoints_the_first_matcher_described() -> None:
    world = SyntheticWorld(straight_path(3), density=0.3, noise_px=0.3)
    graph, matching = second_matching(world)
    matching.add_second([points_of(world, pair(1, 2), beside=True)])
    assert matching.verify_second()
    facts = matching.take_facts()
    again = scene_graph()
    resumed = matching_over(again, DescribedWorld(world=world))
    for frame_id in graph.keyframe_ids:
        keyframe = graph.keyframe(frame_id)
        stored = dataclasses.replace(keyframe.features, num_described=None)
        resumed.restore_keyframe(dataclasses.replace(keyframe, features=stored), facts)
        described = again.keyframe(frame_id).features.described()
        assert len(described) == len(world.keyframe(frame_id).features)
