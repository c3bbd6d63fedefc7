from __future__ import annotations

import numpy as np

from engine.types import NO_ROW, FrameId, ImagePair, PairReason, VerifiedPair
from engine.windows.tracks import tracks_through

FRAMES = [FrameId(i) for i in (1, 2, 3, 4)]


def pair_of(first: int, second: int, *rows: tuple[int, int]) -> VerifiedPair:
    return VerifiedPair(
        pair=ImagePair(FrameId(first), FrameId(second)),
        reason=PairReason.EXHAUSTIVE,
        inlier_matches_idx=np.array(rows, np.uint32).reshape(-1, 2),
        num_matches=len(rows),
        fundamental=np.eye(3),
        homography_inlier_ratio=0.0,
    )


CHAIN = [pair_of(1, 2, (5, 7), (6, 9)), pair_of(2, 3, (7, 2), (9, 3)), pair_of(3, 4, (2, 8))]


def rows_of(pairs: list[VerifiedPair], *, min_length: int = 2) -> list[list[int]]:
    return sorted(tracks_through(FRAMES, pairs, min_length=min_length).tolist())


def test_matches_that_share_a_keypoint_are_one_track() -> None:
    assert rows_of(CHAIN) == [[5, 7, 2, 8], [6, 9, 3, NO_ROW]]


def test_short_tracks_are_left_out() -> None:
    assert rows_of(CHAIN, min_length=4) == [[5, 7, 2, 8]]


def test_tracks_do_not_depend_on_the_order_of_pairs_and_matches() -> None:
    backwards = [
        pair_of(3, 4, (2, 8)),
        pair_of(2, 3, (9, 3), (7, 2)),
        pair_of(1, 2, (6, 9), (5, 7)),
    ]
    assert rows_of(backwards) == rows_of(CHAIN)
    shuffled = tracks_through(FRAMES, backwards)
    assert np.array_equal(shuffled, tracks_through(FRAMES, CHAIN))


def test_a_keyframe_of_which_a_track_has_two_keypoints_is_left_out_of_it() -> None:
    both_ways = [*CHAIN, pair_of(1, 4, (5, 1))]  # keypoints 8 and 1 of the last keyframe
    assert [5, 7, 2, NO_ROW] in rows_of(both_ways)


def test_pairs_with_keyframes_outside_the_window_do_not_count() -> None:
    outside = pair_of(4, 9, (8, 0))
    assert rows_of([*CHAIN, outside]) == rows_of(CHAIN)
    assert tracks_through(FRAMES, [outside]).shape == (0, 4)


def test_long_chains_become_one_track() -> None:
    frame_ids = [FrameId(i) for i in range(1, 41)]
    pairs = [pair_of(i, i + 1, (3, 3)) for i in range(1, 40)]
    assert np.array_equal(tracks_through(frame_ids, pairs), np.full((1, 40), 3))
