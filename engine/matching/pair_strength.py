"""How much evidence a verified pair is: by how far its inliers are spread, not by how many.

A logo, or one poster on a wall, gives many matches in few cells of a grid, and all of them say the
same.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from engine.types import BoolArray, Int64Array, Keyframe, VerifiedPair

_CELLS_PER_EDGE = 8
_MAX_PER_CELL = 4  # inliers of one cell that count: more of them say the same again
_MIN_OF_PAIR = 8  # matches of a pair that can agree with a place as a whole
_WHOLE_RATIO = 0.8  # of them, that do


@dataclass(frozen=True, slots=True, kw_only=True)
class PairStrength:
    """How much evidence the inliers of a pair are."""

    num_cells: int  # of 8 x 8 in each image that hold inliers; the lower of two
    num_independent: int  # inliers, at most a few of each cell; the lower of two images
    inlier_ratio: float  # of the matches

    @property
    def score(self) -> float:
        """Independent inliers, less those that matches at random would give."""
        return self.num_independent * self.inlier_ratio


def pair_strength(verified: VerifiedPair, first: Keyframe, second: Keyframe) -> PairStrength:
    """The strength of a pair by spread and independence: a hundred inliers in a corner are few.

    Args:
        verified: the pair.
        first: its first keyframe.
        second: its second one.
    """
    counts = [
        np.bincount(_cells(keyframe, rows), minlength=_CELLS_PER_EDGE**2)
        for keyframe, rows in zip((first, second), verified.inlier_matches_idx.T, strict=True)
    ]
    return PairStrength(
        num_cells=min(int(np.count_nonzero(one)) for one in counts),
        num_independent=min(int(np.minimum(one, _MAX_PER_CELL).sum()) for one in counts),
        inlier_ratio=verified.num_inliers / max(1, verified.num_matches),
    )


def num_cells(keyframe: Keyframe, rows: Int64Array) -> int:
    """Cells of an 8 x 8 grid over a keyframe that hold some of its keypoints (K,)."""
    return len(np.unique(_cells(keyframe, rows)))


def _cells(keyframe: Keyframe, rows: Collection[int]) -> Int64Array:
    size = (keyframe.width, keyframe.height)
    places = keyframe.features.keypoints_xy[np.asarray(rows, np.int64)] / size * _CELLS_PER_EDGE
    columns, lines = np.clip(places.astype(np.int64), 0, _CELLS_PER_EDGE - 1).T
    return np.asarray(_CELLS_PER_EDGE * lines + columns)


def in_whole_pairs(pair_idx: Int64Array, agrees: BoolArray) -> BoolArray:
    """Which matches agree with a place, in pairs that agree with it as a whole.

    The matches of a verified pair show one place: they agree with it all, but for mistakes. Matches
    of repeated structure agree with several wrong places, some with each.

    Args:
        pair_idx: (N,) the pair that each match is of, from 0.
        agrees: (N,) whether it agrees with the place.

    Returns:
        (N,).
    """
    num = np.bincount(pair_idx)
    num_agreeing = np.bincount(pair_idx[agrees], minlength=len(num))
    is_whole = (num >= _MIN_OF_PAIR) & (num_agreeing >= _WHOLE_RATIO * num)
    return np.asarray(agrees & is_whole[pair_idx])
