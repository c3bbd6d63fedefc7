"""Merging maps: the smaller of two is moved into the larger one by a similarity.

Points of both maps that pairs across match give the similarity (see ``estimators.similarity``). It
has to be supported by several keyframes on either side, so that one wrong pair joins nothing.
Repeated structure gives several similarities: the one counts that pairs agree with as a whole, and
where two have such pairs, the maps stay apart until more is seen. Everything is tried on a copy of
the larger map: the smaller one's keyframes are placed, their matches are triangulated anew, and the
copy stays only if most of them hold in their place and what was there before kept its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.config import RegistrationConfig
from engine.estimators.similarity import (
    MapSimilarity,
    MatchedPoints,
    estimate_map_similarity,
    estimate_rival,
)
from engine.geometry import pose_in_other_world
from engine.mapping.model.growth import GrowthConfig, adjust_in_place, register_and_refine
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.places.map_similarity import MapMatches
from engine.matching.pair_strength import is_open, is_outweighed, place_support
from engine.types import (
    BoolArray,
    Float64Array,
    FrameId,
    Int64Array,
    RegistrationStatus,
    VerifiedPair,
)

_MIN_PER_KEYFRAME = 8  # keypoints that agree, for a keyframe to support a similarity
_MIN_KEYFRAMES = 2  # of either map that support it
_MIN_INLIERS_PER_REGISTRATION = 1.5  # times the inliers that a single keyframe needs
_OVERRULING_PER_REGISTRATION = 3.0  # likewise, of pairs against what most matches agree with
_MIN_OVERRULING_PAIRS = 2
_INLIER_RATIO_SHARE = 0.6  # of the share of inliers that a single keyframe needs
_ADJUSTED_UP_TO = 80  # keyframes of a merged map that is adjusted at once
_HELD_RATIO = 0.8  # of the keyframes moved must hold in their place
_KEPT_RATIO = 0.9  # of what the larger map's keyframes observed must remain
_TAKEN_RATIO = 0.5  # of a map's keyframes that must register alone for it to be taken apart
_BETTER_RATIO = 0.8  # of what they observed in it they must observe elsewhere


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MergedMap:
    """A map that holds another one as well, and how it came to."""

    sparse_map: SparseMap
    moved_ids: tuple[FrameId, ...]
    num_inliers: int  # keypoints that agree on how the maps lie; 0: each keyframe came alone


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MapAlignment:
    """How two maps lie to each other, and what agrees with it."""

    larger_from_smaller: Float64Array  # (3, 4), [s R | t]
    num_inliers: int  # matches of points of both maps
    num_matches: int
    num_supporting: int  # keyframes of either map that have a part in it, the fewer ones
    is_ambiguous: bool  # another one is supported nearly as well: which is right is open


def merge_maps(
    larger: SparseMap,
    smaller: SparseMap,
    *,
    alignment: MapAlignment,
    registration: RegistrationConfig,
    config: GrowthConfig,
) -> MergedMap | None:
    """Moves a map into a copy of another one, as pairs across both show that they lie.

    Args:
        larger: holds all keyframes of the smaller map, unregistered, with the pairs across.
        smaller: stays as it is.
        alignment: of the two, by `find_similarity`.
        registration: how many keypoints must agree, and how well.
        config: thresholds of growing; its share of inliers counts here, too.

    Returns:
        None when too little agrees on the similarity, or what is moved does not hold.
    """
    if not _is_sure(alignment, registration=registration, config=config):
        return None
    moved_ids = smaller.registered_ids
    before_ids = larger.registered_ids
    num_before = _num_observations(larger, before_ids)
    merged = larger.copy()
    poses = np.array([smaller.cam_from_world(i) for i in moved_ids])
    placed = pose_in_other_world(poses, alignment.larger_from_smaller)
    merged.place(dict(zip(moved_ids, placed, strict=True)))
    for frame_id in moved_ids:
        merged.triangulate(frame_id)
    if merged.num_registered <= _ADJUSTED_UP_TO:
        adjust_in_place(merged, config=config)
        merged.retriangulate()
        adjust_in_place(merged, config=config)
    else:
        merged.filter_all()
    held = [i for i in moved_ids if _num_points(merged, i) >= registration.min_inliers]
    if (
        len(held) < _HELD_RATIO * len(moved_ids)
        or _num_observations(merged, before_ids) < _KEPT_RATIO * num_before
        or _num_shared(merged, before_ids, held) < registration.min_inliers
    ):
        return None
    merged.deregister([i for i in moved_ids if i not in held])
    return MergedMap(sparse_map=merged, moved_ids=tuple(held), num_inliers=alignment.num_inliers)


def take_apart(larger: SparseMap, smaller: SparseMap, *, config: GrowthConfig) -> MergedMap | None:
    """Registers the keyframes of a map in a copy of another one, each by itself.

    So a map that is wrong, or too weak to be moved as a whole, gives its keyframes up.

    Args:
        larger: holds all keyframes of the smaller map, unregistered, with the pairs across.
        smaller: stays as it is.
        config: thresholds of growing.

    Returns:
        None when few of them find a place, or they see less from there.
    """
    missing = {
        i: larger.num_visible_points(i)
        for i in smaller.registered_ids
        if not larger.is_registered(i)
    }
    if not any(missing.values()):
        return None
    enough = _TAKEN_RATIO * len(missing)
    merged = larger.copy()
    taken: list[FrameId] = []
    while missing:
        frame_id = max(missing, key=lambda i: (missing[i], -i))
        if missing.pop(frame_id) == 0:
            break
        registration = register_and_refine(merged, frame_id, config=config)
        if registration.status is RegistrationStatus.REGISTERED:
            taken.append(frame_id)
            near = merged.neighbors(frame_id).keys() & missing.keys()
            missing.update({i: merged.num_visible_points(i) for i in sorted(near)})
        elif len(taken) + len(missing) < enough:
            return None
    if len(taken) < enough or (
        _num_observations(merged, taken) < _BETTER_RATIO * _num_observations(smaller, taken)
    ):
        return None
    return MergedMap(sparse_map=merged, moved_ids=tuple(sorted(taken)), num_inliers=0)


def find_similarity(
    larger: SparseMap, smaller: SparseMap, *, registration: RegistrationConfig
) -> MapAlignment | None:
    """How two maps lie to each other by what pairs across them show, sure or not.

    Args:
        larger: holds all keyframes of the smaller map, unregistered, with the pairs across.
        smaller: the other map.
        registration: how far off a point may be.

    Returns:
        None where nothing fixes a similarity.
    """
    ends: list[tuple[FrameId, FrameId]] = []
    pairs: list[VerifiedPair] = []
    for frame_id in smaller.registered_ids:
        for other, verified in sorted(larger.neighbors(frame_id).items()):
            if larger.is_registered(other):
                ends.append((other, frame_id))
                pairs.append(verified)
    matches = MapMatches(larger, smaller, max_error_px=registration.max_error_px)
    matched = matches.matched_points(pairs)
    similarity = estimate_map_similarity(matched, seed=0)
    if similarity is None:
        return None
    enough = _OVERRULING_PER_REGISTRATION * registration.min_inliers
    similarity, counted, is_ambiguous = _decided(matched, similarity, enough=enough)
    counts: tuple[Counter[FrameId], Counter[FrameId]] = (Counter(), Counter())
    for pair_idx in matched.pair_idx[counted & similarity.is_inlier].tolist():
        for side, frame_id in zip(counts, ends[pair_idx], strict=True):
            side[frame_id] += 1
    supporting = [sum(num >= _MIN_PER_KEYFRAME for num in side.values()) for side in counts]
    return MapAlignment(
        larger_from_smaller=similarity.a_from_b,
        num_inliers=int(np.count_nonzero(counted & similarity.is_inlier)),
        num_matches=int(np.count_nonzero(counted)),
        num_supporting=min(supporting),
        is_ambiguous=is_ambiguous,
    )


def _decided(
    matched: MatchedPoints, found: MapSimilarity, *, enough: float
) -> tuple[MapSimilarity, BoolArray, bool]:
    """The right one of two similarities, where repeated structure gives a second one.

    Pairs decide that agree with either as a whole. Where they overrule most matches, no others
    count: these show a pattern, and no place.

    Args:
        matched: the matches.
        found: what most of them agree with.
        enough: support of pairs that overrules most matches.

    Returns:
        The similarity, the matches (N,) that count, and whether it is open which one is right.
    """
    all_count = np.ones(len(matched), np.bool_)
    rival = estimate_rival(matched, found, seed=0)
    if rival is None:
        return found, all_count, False
    # Keyframes of both maps match a point many times over: it counts once, wherever it lies.
    _, points = np.unique(matched.points_in_b, axis=0, return_inverse=True)
    points = points.reshape(-1).astype(np.int64)
    own, others = (
        place_support(matched.pair_idx, one.is_inlier, keypoints=points, cells=points)
        for one in (found, rival)
    )
    is_overruled = (
        others.independent >= enough
        and np.count_nonzero(others.by_pair) >= _MIN_OVERRULING_PAIRS
        and is_outweighed(own, others)
    )
    if is_overruled:
        return rival, (own.by_pair + others.by_pair)[matched.pair_idx] > 0, False
    return found, all_count, is_open(own, others)


def _is_sure(
    alignment: MapAlignment, *, registration: RegistrationConfig, config: GrowthConfig
) -> bool:
    min_ratio = _INLIER_RATIO_SHARE * config.min_inlier_ratio
    return (
        alignment.num_supporting >= _MIN_KEYFRAMES
        and alignment.num_inliers >= _MIN_INLIERS_PER_REGISTRATION * registration.min_inliers
        and alignment.num_inliers >= min_ratio * alignment.num_matches
        and not alignment.is_ambiguous
    )


def _num_points(sparse_map: SparseMap, frame_id: FrameId) -> int:
    return int(np.count_nonzero(sparse_map.point3D_ids(frame_id) >= 0))


def _num_observations(sparse_map: SparseMap, frame_ids: Sequence[FrameId]) -> int:
    return sum(_num_points(sparse_map, i) for i in frame_ids)


def _num_shared(
    sparse_map: SparseMap, frame_ids: Sequence[FrameId], moved_ids: Sequence[FrameId]
) -> int:
    """Points that keyframes of both sides observe."""

    def seen(ids: Sequence[FrameId]) -> Int64Array:
        observed = [sparse_map.point3D_ids(i) for i in ids]
        return np.unique(np.concatenate(observed)) if observed else np.empty(0, np.int64)

    shared = np.intersect1d(seen(frame_ids), seen(moved_ids))
    return int(np.count_nonzero(shared >= 0))
