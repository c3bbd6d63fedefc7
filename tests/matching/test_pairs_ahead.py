"""Pairs that a matcher elsewhere begins with before the turn of a keyframe comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from engine.config import CoarseToFineConfig, SceneGraphConfig
from engine.matching.coarse_to_fine import is_coarse_first
from engine.matching.pairs_ahead import PairsAhead
from engine.matching.scene_graph import SceneGraph
from engine.types import Features, Frame, FrameId, ImagePair, Keyframe, MatchRequest
from tests.support.synthetic import scene_graph

OFFSETS = (1, 2, 4)


class Elsewhere:
    """Keeps what it is asked for."""

    def __init__(self, *, keyframes_ahead: int = 4) -> None:
        self.keyframes_ahead = keyframes_ahead
        self.asked: dict[FrameId, list[MatchRequest]] = {}
        self.forgotten: list[FrameId] = []

    def describe_ahead(self, frame: Frame) -> None:
        raise AssertionError("nobody asks for it here")

    def match_ahead(self, frame_id: FrameId, requests: Sequence[MatchRequest]) -> None:
        self.asked[frame_id] = list(requests)

    def forget_ahead(self, frame_id: FrameId) -> None:
        self.forgotten.append(frame_id)

    def report_to(self, warn: Callable[[str], None]) -> None:
        """Warns of nothing."""

    def figures(self) -> dict[str, object]:
        return {}

    def close(self) -> None:
        """Holds nothing."""

    def partners(self, frame_id: int) -> set[int]:
        asked = self.asked[FrameId(frame_id)]
        return {int(one.pair.other(FrameId(frame_id))) for one in asked}


def keyframe(frame_id: int, *, camera: str = "camera", num: int = 20) -> Keyframe:
    rng = np.random.default_rng(frame_id)
    return Keyframe(
        frame_id=FrameId(frame_id),
        camera_key=camera,
        index=frame_id,
        name=f"{frame_id}.jpg",
        width=640,
        height=480,
        captured_at_s=float(frame_id),
        received_at_s=0.0,
        features=Features(
            frame_id=FrameId(frame_id),
            keypoints_xy=rng.random((num, 2)) * 400,
            descriptors=rng.integers(0, 99, (num, 128)).astype(np.uint8),
            scales=rng.random(num).astype(np.float32) + 1,
            colors=np.zeros((num, 3), np.uint8),
        ),
    )


def ahead_of(matcher: Elsewhere, *, exhaustive_below: int = 0, num_largest: int = 0) -> PairsAhead:
    return PairsAhead(
        SceneGraphConfig(temporal_offsets=OFFSETS, exhaustive_below=exhaustive_below),
        coarse_to_fine=CoarseToFineConfig(num_keypoints=num_largest),
        matcher=matcher,
    )


def test_the_gaps_in_time_are_begun_with_and_no_more_keyframes_than_may_be_ahead() -> None:
    matcher = Elsewhere(keyframes_ahead=7)
    ahead = ahead_of(matcher)
    for frame_id in range(1, 11):
        ahead.keyframe_waits(keyframe(frame_id))
    assert list(matcher.asked) == list(range(1, 8))
    assert [matcher.partners(i) for i in (1, 2, 7)] == [set(), {1}, {6, 5, 3}]
    ahead.keyframe_matched(FrameId(1), [])
    assert matcher.forgotten == [1]
    assert list(matcher.asked)[-1] == 8  # another one has its turn


def test_while_matching_is_exhaustive_every_pair_that_the_scene_graph_chooses_is_begun_with() -> (
    None
):
    matcher = Elsewhere()
    ahead = ahead_of(matcher, exhaustive_below=4)
    graph: SceneGraph = scene_graph(temporal_offsets=OFFSETS, exhaustive_below=4)
    for frame_id in range(1, 5):
        camera = f"camera {frame_id % 2}"
        ahead.keyframe_waits(keyframe(frame_id, camera=camera))
        graph.add_keyframe(keyframe(frame_id, camera=camera))
        chosen = {int(one.pair.other(FrameId(frame_id))) for one in graph.choose_pairs(frame_id)}  # type: ignore[arg-type]
        assert matcher.partners(frame_id) == chosen


def test_pairs_like_those_of_the_keyframe_matched_last_are_begun_with() -> None:
    matcher = Elsewhere(keyframes_ahead=64)
    ahead = ahead_of(matcher)
    for frame_id in range(1, 9):
        ahead.keyframe_waits(keyframe(frame_id))
    matched = [ImagePair.of(FrameId(8), FrameId(other)) for other in (7, 5, 3)]
    ahead.keyframe_matched(FrameId(8), matched)
    ahead.keyframe_waits(keyframe(9))
    assert matcher.partners(9) == {8, 7, 5} | {8, 6, 4}
    ahead.keyframe_waits(keyframe(10, camera="another"))
    assert matcher.partners(10) == set()


def test_the_oldest_keyframe_whose_table_is_kept_may_be_a_partner() -> None:
    matcher = Elsewhere(keyframes_ahead=64)
    ahead = ahead_of(matcher)  # keeps the tables of twice four keyframes
    ahead.keyframe_waits(keyframe(1, camera="another"))
    for frame_id in range(2, 9):
        ahead.keyframe_waits(keyframe(frame_id))
    ahead.keyframe_matched(FrameId(8), [ImagePair.of(FrameId(1), FrameId(8))])
    ahead.keyframe_waits(keyframe(9))
    assert matcher.partners(9) == {8, 7, 5, 1}
    ahead.keyframe_waits(keyframe(10))
    assert 1 not in matcher.partners(10)


def test_the_largest_keypoints_of_photos_are_begun_with() -> None:
    matcher = Elsewhere()
    ahead = ahead_of(matcher, num_largest=5)
    for frame_id in (1, 2):
        ahead.keyframe_waits(keyframe(frame_id))
    (request,) = matcher.asked[FrameId(2)]
    scales = keyframe(1).features.scales
    assert np.array_equal(request.first.scales, np.sort(scales)[::-1][:5])
    whole = MatchRequest(
        pair=request.pair,
        first=keyframe(1).features,
        second=keyframe(2).features,
        query_rows1=np.empty(0, np.int64),
        query_rows2=np.empty(0, np.int64),
    )
    assert is_coarse_first(whole, CoarseToFineConfig(num_keypoints=5))
    assert not is_coarse_first(whole, CoarseToFineConfig(num_keypoints=0))


def test_a_keyframe_that_is_dropped_makes_room_and_nothing_is_begun_with_it() -> None:
    matcher = Elsewhere(keyframes_ahead=2)
    ahead = ahead_of(matcher)
    for frame_id in range(1, 6):
        ahead.keyframe_waits(keyframe(frame_id))
    assert list(matcher.asked) == [1, 2]
    for frame_id in (4, 1, 2):  # the fourth before its pairs were begun with
        ahead.keyframe_dropped(FrameId(frame_id))
    assert matcher.forgotten == [4, 1, 2]
    assert list(matcher.asked)[2:] == [3, 5]
    assert matcher.partners(5) == {3}
    assert ahead._begun == {3, 5}


def test_a_keyframe_that_is_matched_before_its_pairs_were_begun_with_takes_no_room() -> None:
    matcher = Elsewhere(keyframes_ahead=1)
    ahead = ahead_of(matcher)
    for frame_id in (1, 2, 3):
        ahead.keyframe_waits(keyframe(frame_id))
    ahead.keyframe_matched(FrameId(2), [])
    ahead.keyframe_matched(FrameId(1), [])
    assert list(matcher.asked) == [1, 3]
    assert matcher.partners(3) == {1, 2}


def test_where_nothing_may_be_ahead_matched_keyframes_do_not_pile_up() -> None:
    ahead = ahead_of(Elsewhere(keyframes_ahead=0))
    for frame_id in range(1, 100):
        ahead.keyframe_waits(keyframe(frame_id))
        ahead.keyframe_matched(FrameId(frame_id), [])
    assert not ahead._waiting
    assert len(ahead._features) <= ahead._num_kept
