"""Pairs that contradict the map: their matches are of different points, far from each other.

A pair whose matches became common points is in use. One whose keypoints observe points of their own
on each side says that those points are the same; where the map puts them far apart, the map has
drifted or misplaced a part, or the pair shows things that only look alike.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from engine.estimators.similarity import estimate_map_similarity
from engine.mapping.model.place_evidence import CONTRADICTION_PX
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.places.map_similarity import MAX_ERROR_PX, MIN_AGREEING, MapMatches
from engine.types import Contradiction, FrameId, VerifiedPair

_MIN_INLIERS = 30  # of a pair that counts
_MIN_MATCHES = 15  # with a point on both sides
_USED_RATIO = 0.25  # of the inliers that are common points: a pair with more is in use


def find_contradictions(
    sparse_map: SparseMap,
    frame_ids: Iterable[FrameId] | None = None,
    *,
    beside: Iterable[VerifiedPair] = (),
) -> list[tuple[VerifiedPair, Contradiction]]:
    """The pairs that contradict a map.

    Args:
        sparse_map: the map.
        frame_ids: keyframes whose pairs are examined; by default all that are registered.
        beside: further pairs, of its keyframes, that the map does not use.

    Returns:
        The pairs with what contradicts the map, in order of their keyframes.
    """
    if frame_ids is None:
        sparse_map.count_covisibility()
    asked = sparse_map.registered_ids if frame_ids is None else sorted(frame_ids)
    unused: dict[tuple[FrameId, FrameId], VerifiedPair] = {
        (one.pair.first, one.pair.second): one
        for one in beside
        if sparse_map.is_registered(one.pair.first) and sparse_map.is_registered(one.pair.second)
    }
    for frame_id in asked:
        if not sparse_map.is_registered(frame_id):
            continue
        shared = sparse_map.covisibility(frame_id)
        for other, verified in sparse_map.neighbors(frame_id).items():
            num_inliers = verified.num_inliers
            if num_inliers < _MIN_INLIERS or shared.get(other, 0) >= _USED_RATIO * num_inliers:
                continue
            if sparse_map.is_registered(other):
                unused[verified.pair.first, verified.pair.second] = verified
    matches = MapMatches(sparse_map, sparse_map, max_error_px=MAX_ERROR_PX)
    examined = ((verified, _examine(verified, matches)) for _, verified in sorted(unused.items()))
    return [(verified, found) for verified, found in examined if found is not None]


def _examine(verified: VerifiedPair, matches: MapMatches) -> Contradiction | None:
    ids1, ids2 = matches.point3D_ids(verified)
    num_apart = int(np.count_nonzero((ids1 >= 0) & (ids2 >= 0) & (ids1 != ids2)))
    num_common = int(np.count_nonzero((ids1 >= 0) & (ids1 == ids2)))
    if num_apart < _MIN_MATCHES or num_common >= _USED_RATIO * verified.num_inliers:
        return None
    matched = matches.matched_points([verified])
    error_px = MAX_ERROR_PX * float(np.median(matched.errors(np.eye(4)[None, :3])[0]))
    if error_px <= CONTRADICTION_PX:
        return None
    asked = estimate_map_similarity(matched, seed=0)
    if asked is None or asked.num_inliers < MIN_AGREEING:
        return None  # its matches contradict each other, too
    return Contradiction(pair=verified.pair, num_matches=num_apart, error_px=min(error_px, 1e6))
