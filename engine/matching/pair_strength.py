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
_MIN_OF_PAIR = 8  # matches of a pair that can support a place
_OUTWEIGHED = 4  # matches that agree, by each that does not: 0.95 and 0.05 against a half agree


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


def pair_supports(pair_idx: Int64Array, agrees: BoolArray) -> Int64Array:
    """How much each pair supports a place with which some of its matches agree.

    The matches of a verified pair show one place: they agree with it all, but for mistakes. Matches
    of repeated structure agree with several wrong places, some with each; so one that does not
    agree outweighs several that do, as in the ratio of the two likelihoods.

    Args:
        pair_idx: (N,) the pair that each match is of, from 0.
        agrees: (N,) whether it agrees with the place.

    Returns:
        For each pair (P,) the matches that agree, less those that the others outweigh; not below 0.
    """
    num = np.bincount(pair_idx)
    num_agreeing = np.bincount(pair_idx[agrees], minlength=len(num))
    support = num_agreeing - _OUTWEIGHED * (num - num_agreeing)
    return np.where(num >= _MIN_OF_PAIR, np.maximum(support, 0), 0)
