"""The contracts of ports, kept by every implementation, those of the tests too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from adapters.matchers.sift import SiftMatcher
from adapters.town.oracle import OracleMatcher, OraclePlaces
from engine.config import DenseMatchingConfig, OracleConfig, RetrievalConfig, SiftConfig
from engine.matching.place_recognition import PlaceRecognizer
from engine.ports import PairMatcher, PlaceIndex
from engine.types import NO_ROW, Features, Frame, FrameId, ImagePair, MatchRequest, PairMatches
from tests.support import true_scene
from tests.support.dense_world import DenseFakeMatcher
from tests.support.fake_runs import WorldMatcher
from tests.support.fake_runs import frame_of as world_frame
from tests.support.synthetic import SyntheticWorld, straight_path
from tests.support.textured_images import frame_of as textured_frame
from tests.support.textured_images import random_texture, similarity_about

ARRAYS = ("matches_idx", "points1_xy", "points2_xy", "confidence", "depths_m")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A matcher and some frames that overlap."""

    matcher: PairMatcher
    frames: Sequence[Frame]


def sift() -> Kind:
    texture = random_texture()
    motions = [similarity_about((160.0, 120.0), angle_rad=0.1 * k) for k in range(3)]
    frames = [
        textured_frame(texture.image(320, 240, image_from_texture=motion), frame_id=number)
        for number, motion in enumerate(motions, start=1)
    ]
    return Kind(matcher=SiftMatcher(SiftConfig()), frames=frames)


def oracle() -> Kind:
    matcher = OracleMatcher(
        OracleConfig(),
        dense=DenseMatchingConfig(max_corners=200, max_keypoints=1000),
        truth=true_scene.true_view,
        seed=0,
    )
    return Kind(matcher=matcher, frames=[true_scene.frame_of(index) for index in range(3)])


def sparse_fake() -> Kind:
    world = SyntheticWorld(straight_path(3))
    return Kind(
        matcher=WorldMatcher(world=world), frames=[world_frame(i, world=world) for i in (1, 2, 3)]
    )


def dense_fake() -> Kind:
    world = SyntheticWorld(straight_path(3))
    return Kind(
        matcher=DenseFakeMatcher(world=world),
        frames=[world_frame(i, world=world) for i in (1, 2, 3)],
    )


every_matcher = pytest.mark.parametrize("kind", [sift, oracle, sparse_fake, dense_fake])


def request(first: Features, second: Features, *, every: int = 1) -> MatchRequest:
    """Two tables, each n-th row of them to look up."""
    return MatchRequest(
        pair=ImagePair(first.frame_id, second.frame_id),
        first=first,
        second=second,
        query_rows1=np.arange(0, len(first), every),
        query_rows2=np.arange(0, len(second), every),
        wants_pointmaps=True,
    )


def requests_of(kind: Kind, *, every: int = 1) -> list[MatchRequest]:
    one, two, three = (kind.matcher.describe(frame) for frame in kind.frames)
    pairs = ((two, three), (one, three), (one, two))
    return [request(first, second, every=every) for first, second in pairs]


@every_matcher
def test_a_matcher_has_a_name_and_reports_its_memory(kind: Callable[[], Kind]) -> None:
    matcher = kind().matcher
    assert matcher.name
    assert matcher.peak_gpu_mb >= 0.0


@every_matcher
def test_a_table_is_of_its_frame_and_inside_it(kind: Callable[[], Kind]) -> None:
    made = kind()
    for frame in made.frames:
        features = made.matcher.describe(frame)
        assert features.frame_id == frame.frame_id
        assert len(features) > 100
        assert (features.keypoints_xy >= 0).all()
        assert (features.keypoints_xy <= (frame.width, frame.height)).all()
        assert (features.scales > 0).all()
        again = made.matcher.describe(frame)
        assert np.array_equal(again.keypoints_xy, features.keypoints_xy)
        assert np.array_equal(again.is_free, features.is_free)


@every_matcher
def test_each_request_is_answered_in_order(kind: Callable[[], Kind]) -> None:
    made = kind()
    requests = requests_of(made)
    answers = made.matcher.match(requests)
    assert [answer.pair for answer in answers] == [asked.pair for asked in requests]
    assert all(len(answer) > 50 for answer in answers)
    assert made.matcher.match([]) == []


@every_matcher
def test_matches_end_at_keypoints_where_they_name_rows(kind: Callable[[], Kind]) -> None:
    made = kind()
    requests = requests_of(made)
    for asked, answer in zip(requests, made.matcher.match(requests), strict=True):
        ends_xy = (answer.points1_xy, answer.points2_xy)
        for side, features in enumerate((asked.first, asked.second)):
            rows = answer.matches_idx[:, side]
            is_row = rows != NO_ROW
            assert (rows < len(features)).all()
            assert np.array_equal(ends_xy[side][is_row], features.keypoints_xy[rows[is_row]])
        assert ((answer.confidence >= 0.0) & (answer.confidence <= 1.0)).all()
        assert (answer.depths_m >= 0.0).all()
        assert min(answer.focal_px) >= 0.0


@every_matcher
def test_dense_matchers_look_up_what_they_are_asked_and_sparse_ones_name_both_rows(
    kind: Callable[[], Kind],
) -> None:
    made = kind()
    requests = requests_of(made, every=3)
    for asked, answer in zip(requests, made.matcher.match(requests), strict=True):
        is_dense = asked.first.is_free.any()
        assert is_dense == (answer.matches_idx == NO_ROW).any()
        for side, queries in enumerate((asked.query_rows1, asked.query_rows2)):
            rows = answer.matches_idx[:, side]
            if is_dense:
                assert np.isin(rows[rows != NO_ROW], queries).all()
            else:
                assert len(np.unique(rows)) == len(rows) > 0


@every_matcher
def test_a_pair_is_matched_alike_alone_and_among_others(kind: Callable[[], Kind]) -> None:
    made, again = kind(), kind()
    batch = made.matcher.match(requests_of(made))
    for answer, asked in zip(batch, requests_of(again), strict=True):
        (alone,) = again.matcher.match([asked])
        assert all(np.array_equal(getattr(alone, n), getattr(answer, n)) for n in ARRAYS)


@every_matcher
def test_nothing_to_look_up_is_no_error(kind: Callable[[], Kind]) -> None:
    made = kind()
    one, two, _ = (made.matcher.describe(frame) for frame in made.frames)
    asked = request(one, two, every=10**6)
    (answer,) = made.matcher.match([asked])
    assert isinstance(answer, PairMatches)
    if one.is_free.any():
        assert len(answer) <= 2


# -- places ---------------------------------------------------------------------------------------


def oracle_places() -> tuple[PlaceIndex, list[Features]]:
    kind = oracle()
    assert isinstance(kind.matcher, OracleMatcher)
    return OraclePlaces(kind.matcher), [kind.matcher.describe(frame) for frame in kind.frames]


def recognized_places() -> tuple[PlaceIndex, list[Features]]:
    world = SyntheticWorld(straight_path(12, step=1.2))
    index = PlaceRecognizer(RetrievalConfig(num_words=64, first_vocabulary_at=4), seed=0)
    return index, [world.keyframe(i).features for i in world.frame_ids]


every_index = pytest.mark.parametrize("make", [oracle_places, recognized_places])
Made = Callable[[], tuple[PlaceIndex, list[Features]]]


@every_index
def test_places_are_returned_best_first_with_scores_of_at_most_one(make: Made) -> None:
    index, tables = make()
    for features in tables:
        index.add(features)
    newest = tables[-1].frame_id
    hits = index.query(newest, exclude=(), limit=100)
    assert hits
    scores = [score for _, score in hits]
    assert scores == sorted(scores, reverse=True)
    assert all(0.0 < score <= 1.0 for score in scores)
    found = [frame_id for frame_id, _ in hits]
    assert len(set(found)) == len(found)
    assert newest not in found
    assert index.query(newest, exclude=(), limit=1) == hits[:1]
    assert index.query(newest, exclude={found[0]}, limit=100)[:1] == hits[1:2]


@every_index
def test_a_place_is_known_once_it_was_added_and_only_once(make: Made) -> None:
    index, tables = make()
    with pytest.raises(KeyError):
        index.query(tables[0].frame_id, exclude=(), limit=1)
    index.add(tables[0])
    assert index.query(tables[0].frame_id, exclude=(), limit=1) == []
    with pytest.raises(ValueError, match="added before"):
        index.add(tables[0])
    with pytest.raises(KeyError):
        index.query(FrameId(99), exclude=(), limit=1)
