"""The strength of a pair: inliers that are spread count, those that say the same again do not."""

from __future__ import annotations

import numpy as np
import pytest

from engine.matching.pair_strength import (
    PlaceSupport,
    is_open,
    is_outweighed,
    pair_strength,
    pair_supports,
    place_support,
)
from engine.types import VerifiedPair
from tests.support.synthetic import SyntheticWorld, straight_path

WORLD = SyntheticWorld(straight_path(6), density=1.0, noise_px=0.4)


def test_many_inliers_in_one_place_are_little_evidence() -> None:
    first, second = WORLD.keyframe(1), WORLD.keyframe(2)
    whole = WORLD.verified_pair(1, 2)
    in_first = first.features.keypoints_xy[whole.inlier_matches_idx[:, 0]]
    order = np.argsort(np.linalg.norm(in_first - in_first[0], axis=1))
    patch = VerifiedPair(
        pair=whole.pair,
        reason=whole.reason,
        inlier_matches_idx=whole.inlier_matches_idx[order[: len(order) // 4]],
        num_matches=len(order) // 4,
        fundamental=whole.fundamental,
        homography_inlier_ratio=0.0,
    )
    spread = VerifiedPair(
        pair=whole.pair,
        reason=whole.reason,
        inlier_matches_idx=whole.inlier_matches_idx[::4],
        num_matches=len(order) // 4,
        fundamental=whole.fundamental,
        homography_inlier_ratio=0.0,
    )

    dense, sparse = (pair_strength(one, first, second) for one in (patch, spread))

    assert patch.num_inliers <= spread.num_inliers
    assert dense.num_cells < 0.6 * sparse.num_cells
    assert dense.score < 0.8 * sparse.score


def test_a_pair_supports_a_place_only_as_a_whole() -> None:
    pair_idx = np.repeat(np.arange(4), (20, 20, 7, 10))
    agrees = np.ones(57, np.bool_)
    agrees[[3, 4]] = False  # a tenth of the first pair
    agrees[20:30] = False  # half of the second
    agrees[50] = False
    assert pair_supports(pair_idx, agrees).tolist() == [18 - 8, 0, 0, 9 - 4]
    assert not pair_supports(pair_idx, np.zeros(57, np.bool_)).any()
    assert pair_supports(np.zeros(0, np.int64), np.zeros(0, np.bool_)).shape == (0,)


def support(*pairs: tuple[range, int], cells: int, wrong: int = 0) -> PlaceSupport:
    """Of a place by pairs, each of a range of keypoints, by turns in so many cells.

    The last ones of each pair do not agree.
    """
    keypoints = np.concatenate([np.array(one) for one, _ in pairs])
    pair_idx = np.concatenate([np.full(len(one), number) for one, number in pairs])
    agrees = np.concatenate([np.arange(len(one)) < len(one) - wrong for one, _ in pairs])
    return place_support(pair_idx, agrees, keypoints=keypoints, cells=keypoints % cells)


def test_a_pair_over_the_whole_image_outweighs_a_patch_that_many_pairs_see() -> None:
    whole = support((range(65), 0), cells=64)
    patch = support(*((range(27), number) for number in range(5)), cells=2)
    assert whole.independent == 65.0
    assert patch.independent == 8.0
    assert patch.by_pair.sum() > whole.by_pair.sum()
    assert not is_open(whole, patch)
    assert is_outweighed(patch, whole)
    assert is_open(whole, support((range(40), 0), cells=64))


def test_a_keypoint_counts_once_by_the_pair_that_is_outweighed_least() -> None:
    one = support((range(20), 0), cells=64, wrong=2)
    assert one.independent == 18 - 4 * 2
    more = support((range(20), 0), (range(18, 40), 1), cells=64, wrong=2)
    assert more.independent == pytest.approx((18 - 8) + (20 - 8))
    assert more.num_keypoints == 18 + 20


def test_a_rival_that_no_pair_agrees_with_needs_half_of_the_keypoints() -> None:
    """As an object that moves has, or nothing at all."""
    own, few = support((range(200), 0), cells=64, wrong=54), support((range(40), 0), cells=64)
    nothing = support((range(200), 0), cells=64, wrong=200)
    none_as_a_whole = support((range(200), 0), cells=64, wrong=160)
    assert own.independent == nothing.independent == none_as_a_whole.independent == 0.0
    assert not is_open(own, none_as_a_whole)
    assert not is_open(own, nothing)
    assert is_open(own, support((range(200), 0), cells=64, wrong=100))
    assert is_open(own, few)
    assert not is_outweighed(own, nothing)
