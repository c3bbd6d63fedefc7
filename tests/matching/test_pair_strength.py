"""The strength of a pair: inliers that are spread count, those that say the same again do not."""

from __future__ import annotations

import numpy as np

from engine.matching.pair_strength import pair_strength, pair_supports
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
