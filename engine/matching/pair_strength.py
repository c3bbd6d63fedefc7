"""How much evidence a verified pair is: by how far its inliers are spread, not by how many.

A logo, or one poster on a wall, gives many matches in few cells of a grid, and all of them say the
same.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from engine.types import BoolArray, Float64Array, Int64Array, Keyframe, VerifiedPair

_CELLS_PER_EDGE = 8
_MAX_PER_CELL = 4  # inliers of one cell that count: more of them say the same again
_MIN_OF_PAIR = 8  # matches of a pair that can support a place
_RIVAL_RATIO = 0.5  # of what supports a place, that supports another one: which is open
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
        np.bincount(cells_of(keyframe, rows), minlength=_CELLS_PER_EDGE**2)
        for keyframe, rows in zip((first, second), verified.inlier_matches_idx.T, strict=True)
    ]
    return PairStrength(
        num_cells=min(int(np.count_nonzero(one)) for one in counts),
        num_independent=min(int(np.minimum(one, _MAX_PER_CELL).sum()) for one in counts),
        inlier_ratio=verified.num_inliers / max(1, verified.num_matches),
    )


def num_cells(keyframe: Keyframe, rows: Int64Array) -> int:
    """Cells of an 8 x 8 grid over a keyframe that hold some of its keypoints (K,)."""
    return len(np.unique(cells_of(keyframe, rows)))


def cells_of(keyframe: Keyframe, rows: Collection[int] | Int64Array) -> Int64Array:
    """The cell (K,) of an 8 x 8 grid over a keyframe in which each of some keypoints (K,) lies."""
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlaceSupport:
    """What supports a place, each keypoint counted once, however many pairs match it."""

    by_pair: Int64Array  # (P,) see `pair_supports`
    independent: float  # keypoints of pairs that agree as a whole, at most a few of each cell
    num_keypoints: int  # that agree, of any pair


def place_support(
    pair_idx: Int64Array, agrees: BoolArray, *, keypoints: Int64Array, cells: Int64Array
) -> PlaceSupport:
    """How much all pairs together support a place.

    Pairs that see the same few keypoints say the same again, and so do the keypoints of one cell. A
    keypoint counts as far as the pair that supports the place best is not outweighed.

    Args:
        pair_idx: (N,) the pair that each match is of, from 0.
        agrees: (N,) whether it agrees with the place.
        keypoints: (N,) the keypoint that each match is of, from 0.
        cells: (N,) the cell in which that keypoint lies.
    """
    by_pair = pair_supports(pair_idx, agrees)
    num_agreeing = np.bincount(pair_idx[agrees], minlength=len(by_pair))
    share_of_pair = by_pair / np.maximum(num_agreeing, 1)
    shares = np.where(agrees, share_of_pair[pair_idx], 0.0)
    order = np.argsort(-shares, kind="stable")
    _, first = np.unique(keypoints[order], return_index=True)
    best = order[first]  # the match of each keypoint that counts most
    return PlaceSupport(
        by_pair=by_pair,
        independent=_at_most_per_cell(shares[best], cells[best]),
        num_keypoints=len(np.unique(keypoints[agrees])),
    )


def is_open(own: PlaceSupport, rival: PlaceSupport) -> bool:
    """Whether a place has a rival that may be the right one as well.

    Where no pair agrees with either as a whole, all keypoints that agree count: an object that
    moves has its own place, with few of them.
    """
    if not own.independent and not rival.independent:
        return rival.num_keypoints > _RIVAL_RATIO * own.num_keypoints
    return rival.independent > 0.0 and rival.independent >= _RIVAL_RATIO * own.independent


def is_outweighed(own: PlaceSupport, rival: PlaceSupport) -> bool:
    """Whether a rival has so much more support that it is the right place."""
    return rival.independent > 0.0 and own.independent <= _RIVAL_RATIO * rival.independent


def _at_most_per_cell(shares: Float64Array, cells: Int64Array) -> float:
    """The sum of shares (K,), of the largest few in each cell."""
    order = np.lexsort((-shares, cells))
    cells, shares = cells[order], shares[order]
    _, begin, inverse = np.unique(cells, return_index=True, return_inverse=True)
    rank = np.arange(len(cells)) - begin[inverse]
    return float(shares[rank < _MAX_PER_CELL].sum())
