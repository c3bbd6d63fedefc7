"""Loops that close: a map that pairs contradict is moved until their matches are common points.

A way that comes back finds its own points a little beside themselves, by what has drifted, or far
off where repeated structure let the map slip. Bundle adjustment cannot bring them together: it
moves only what is tied by common points, and points are tied only within a few pixels. So the parts
of the map are moved first, by a graph of similarities over all pairs; then tracks are merged with a
gate as wide as what remains, and all is adjusted. It is tried on a copy, and kept only where the
pairs have become common points and nothing else is lost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import networkx
import numpy as np

from engine.estimators.similarity import (
    compose_similarities,
    estimate_map_similarity,
    invert_similarity,
    similarity_scale,
)
from engine.estimators.similarity_graph import GraphEdge, SolvedGraph, solve_similarity_graph
from engine.events import LoopCorrected, LoopRefused
from engine.geometry import camera_center, rotation_vector_from, transform_points
from engine.mapping.model.growth import GrowthConfig, adjust_in_place
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.places.map_similarity import MAX_ERROR_PX, MIN_AGREEING, MapMatches
from engine.types import (
    Contradiction,
    Float64Array,
    FrameId,
    ImagePair,
    VerifiedPair,
)

_MIN_MATCHES = 10  # with a point on both sides
_MIN_PAIRS = 3  # that ask for the same correction
_MIN_KEYFRAMES = 2  # different ones at either end
_USED_RATIO = 0.5  # of the matches with two points, that are common points
_MAX_PARTS = 150
_WIDE_GATE = 4.0  # times the threshold of observations, before the adjustment
_NUM_ADJUSTMENTS = 2
_BEHIND_PX = 1e6  # where points lie behind the camera
_MIN_KEPT_RATIO = 0.99  # of the matches that are common points
_MAX_ERROR_RATIO = 1.15
_CLOSED_RATIO = 0.5  # of the matches with two points, that must be common ones afterwards


_Contradicting = tuple[VerifiedPair, Contradiction]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoopCorrection:
    """What became of trying to correct a map."""

    event: LoopCorrected | LoopRefused
    better_map: SparseMap | None = None  # takes the place of the map, where there is one
    refuted: tuple[ImagePair, ...] = ()  # pairs that all the others together contradict


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Link:
    """An edge of the graph of keyframes."""

    verified: VerifiedPair
    edge: GraphEdge  # between keyframes, by their position in order
    is_used: bool  # its points are common ones


def correct_loops(
    sparse_map: SparseMap,
    contradictions: Sequence[tuple[VerifiedPair, Contradiction]],
    *,
    config: GrowthConfig,
    min_inliers: int,
    seed: int,
) -> LoopCorrection:
    """Tries to correct a map so that pairs agree with it that contradict it.

    Args:
        sparse_map: the map; it stays as it is.
        contradictions: the pairs, at least one.
        config: thresholds of adjusting.
        min_inliers: points that a keyframe needs to stay in its place.
        seed: of everything random.
    """
    started_s = time.monotonic()
    links = _links(sparse_map, seed=seed)
    parts = _parts(sparse_map, links)
    solved = _solve(links, parts)
    if solved is None:
        return _refused(contradictions, "too few pairs hold the map together")
    graph, numbers = solved
    agreeing = [
        links[number].verified
        for number, edge in numbers.items()
        if graph.holds[edge] and not graph.held_before[edge]
    ]
    wrong = tuple(
        links[number].verified.pair for number, edge in numbers.items() if not graph.holds[edge]
    )
    if not is_enough(agreeing):
        reason = "the pairs do not ask for one and the same correction"
        return _refused(contradictions, reason, refuted=wrong)
    moved = {i: graph.moved_from_map[part] for i, part in parts.items()}
    candidate = _moved_map(sparse_map, moved, wrong, config=config)
    before, after = sparse_map.fit(parts), candidate.fit(parts)
    pairs = [link.verified for link in links]
    num_before, num_after = _num_common(sparse_map, pairs), _num_common(candidate, pairs)
    if num_after < _MIN_KEPT_RATIO * num_before or (
        after.mean_error_px > _MAX_ERROR_RATIO * before.mean_error_px
    ):
        kept = num_after / max(num_before, 1)
        return _refused(contradictions, f"{kept:.0%} of the matches that fit now would fit then")
    if any(np.count_nonzero(candidate.point3D_ids(i) >= 0) < min_inliers for i in parts):
        return _refused(contradictions, "keyframes would lose their place")
    matches = MapMatches(candidate, candidate, max_error_px=1.0)
    closed = [verified for verified in agreeing if _is_closed(verified, matches)]
    if not is_enough(closed) or len(closed) < len(agreeing) / 2:
        return _refused(contradictions, "the pairs' matches would not become common points")
    event = _corrected(sparse_map, candidate, closed, moved, elapsed_s=time.monotonic() - started_s)
    return LoopCorrection(event=event, better_map=candidate, refuted=wrong)


def _links(sparse_map: SparseMap, *, seed: int) -> list[_Link]:
    """What each pair of registered keyframes says of their places."""
    order = {frame_id: number for number, frame_id in enumerate(sparse_map.registered_ids)}
    matches = MapMatches(sparse_map, sparse_map, max_error_px=MAX_ERROR_PX)
    links = []
    for frame_id in order:
        for other, verified in sorted(sparse_map.neighbors(frame_id).items()):
            if other < frame_id and other in order:
                link = _link(verified, matches, order=order, seed=seed)
                if link is not None:
                    links.append(link)
    return links


def _link(
    verified: VerifiedPair, matches: MapMatches, *, order: dict[FrameId, int], seed: int
) -> _Link | None:
    ids1, ids2 = matches.point3D_ids(verified)
    has_both = (ids1 >= 0) & (ids2 >= 0)
    num_both = int(np.count_nonzero(has_both))
    if num_both < _MIN_MATCHES:
        return None
    matched = matches.matched_points([verified])
    is_common = (ids1 == ids2)[has_both]
    is_used = bool(np.count_nonzero(is_common) >= _USED_RATIO * num_both)
    if is_used:
        agrees, similarity = is_common, np.eye(4)[:3]
    else:
        found = estimate_map_similarity(matched, seed=seed)
        if found is None or found.num_inliers < MIN_AGREEING:
            return None
        agrees, similarity = found.is_inlier, found.a_from_b
    offsets = matched.points_in_a[agrees] - matched.centers_in_a[agrees]
    edge = GraphEdge(
        first=order[verified.pair.first],
        second=order[verified.pair.second],
        points1=matched.points_in_a[agrees],
        points2=matched.points_in_b[agrees],
        strength=verified.num_inliers * float(agrees.mean()),
        distance=float(np.median(np.linalg.norm(offsets, axis=1))),
        first_from_second=similarity,
    )
    return _Link(verified=verified, edge=edge, is_used=is_used)


def _parts(sparse_map: SparseMap, links: Sequence[_Link]) -> dict[FrameId, int]:
    """The part of each registered keyframe: those held together best move as one in large maps."""
    frame_ids = sparse_map.registered_ids
    max_size = math.ceil(len(frame_ids) / _MAX_PARTS)
    union = networkx.utils.UnionFind(range(len(frame_ids)))
    sizes = dict.fromkeys(range(len(frame_ids)), 1)
    for link in sorted(links, key=lambda one: -one.edge.strength):
        first, second = union[link.edge.first], union[link.edge.second]
        if not link.is_used or first == second or sizes[first] + sizes[second] > max_size:
            continue
        total = sizes[first] + sizes[second]
        union.union(first, second)
        sizes[union[first]] = total
    roots = {root: part for part, root in enumerate(sorted({union[i] for i in sizes}))}
    return {frame_id: roots[union[number]] for number, frame_id in enumerate(frame_ids)}


def _solve(
    links: Sequence[_Link], parts: dict[FrameId, int]
) -> tuple[SolvedGraph, dict[int, int]] | None:
    """The graph of parts, and the edge of each link that joins two of them."""
    part_of = list(parts.values())
    edges: list[GraphEdge] = []
    numbers: dict[int, int] = {}
    for number, link in enumerate(links):
        first, second = part_of[link.edge.first], part_of[link.edge.second]
        if first == second:
            continue
        numbers[number] = len(edges)
        edges.append(
            GraphEdge(
                first=first,
                second=second,
                points1=link.edge.points1,
                points2=link.edge.points2,
                strength=link.edge.strength,
                distance=link.edge.distance,
                first_from_second=link.edge.first_from_second,
            )
        )
    if not edges:
        return None
    graph = solve_similarity_graph(len(set(part_of)), edges)
    return None if graph is None else (graph, numbers)


def is_enough(pairs: Sequence[VerifiedPair]) -> bool:
    """Whether pairs are several, and of several keyframes at either end."""
    firsts = {verified.pair.first for verified in pairs}
    seconds = {verified.pair.second for verified in pairs}
    return len(pairs) >= _MIN_PAIRS and min(len(firsts), len(seconds)) >= _MIN_KEYFRAMES


def _moved_map(
    sparse_map: SparseMap,
    moved: dict[FrameId, Float64Array],
    wrong: Sequence[ImagePair],
    *,
    config: GrowthConfig,
) -> SparseMap:
    """A copy with moved parts, tracks merged across them, and adjusted, without wrong pairs."""
    candidate = sparse_map.copy()
    candidate.forget_pairs(wrong)
    candidate.transform_parts(moved)
    candidate.filter_all(gate=_WIDE_GATE)
    candidate.merge_all(gate=_WIDE_GATE)
    for _ in range(_NUM_ADJUSTMENTS):
        adjust_in_place(candidate, config=config)
        candidate.retriangulate()
    candidate.filter_all()
    return candidate


def _num_common(sparse_map: SparseMap, pairs: Sequence[VerifiedPair]) -> int:
    """How many matches of pairs are common points."""
    matches = MapMatches(sparse_map, sparse_map, max_error_px=1.0)
    ids = [matches.point3D_ids(verified) for verified in pairs]
    return sum(int(np.count_nonzero((ids1 >= 0) & (ids1 == ids2))) for ids1, ids2 in ids)


def _is_closed(verified: VerifiedPair, matches: MapMatches) -> bool:
    """Whether a pair's matches are common points now."""
    ids1, ids2 = matches.point3D_ids(verified)
    has_both = (ids1 >= 0) & (ids2 >= 0)
    num_common = np.count_nonzero(has_both & (ids1 == ids2))
    return bool(num_common >= max(_CLOSED_RATIO * np.count_nonzero(has_both), 1))


def _median_error_px(sparse_map: SparseMap, pairs: Sequence[VerifiedPair]) -> float:
    """How far the matches of pairs are off in a map, at an image edge of 1000 px."""
    matched = MapMatches(sparse_map, sparse_map, max_error_px=1.0).matched_points(pairs)
    errors_px = matched.errors(np.eye(4)[None, :3])[0]
    return float(min(np.median(errors_px), _BEHIND_PX))


def _refused(
    contradictions: Sequence[_Contradicting], reason: str, *, refuted: tuple[ImagePair, ...] = ()
) -> LoopCorrection:
    strongest = _strongest([verified for verified, _ in contradictions])
    event = LoopRefused(
        first=strongest.pair.first,
        second=strongest.pair.second,
        num_pairs=len(contradictions),
        error_px=float(np.median([one.error_px for _, one in contradictions])),
        reason=reason,
    )
    return LoopCorrection(event=event, refuted=refuted)


def _strongest(pairs: Sequence[VerifiedPair]) -> VerifiedPair:
    return max(pairs, key=lambda verified: verified.num_inliers)


def _corrected(
    sparse_map: SparseMap,
    candidate: SparseMap,
    closed: Sequence[VerifiedPair],
    moved: dict[FrameId, Float64Array],
    *,
    elapsed_s: float,
) -> LoopCorrected:
    strongest = _strongest(closed)
    first, second = strongest.pair.first, strongest.pair.second
    change = compose_similarities(invert_similarity(moved[first]), moved[second])
    scale = similarity_scale(change)
    center = camera_center(sparse_map.cam_from_world(second))
    return LoopCorrected(
        first=first,
        second=second,
        num_pairs=len(closed),
        error_before_px=_median_error_px(sparse_map, closed),
        error_after_px=_median_error_px(candidate, closed),
        scale_ratio=scale,
        rotation_rad=float(np.linalg.norm(rotation_vector_from(change[:, :3] / scale))),
        moved_map=float(np.linalg.norm(transform_points(change, center[None])[0] - center)),
        num_points_merged=max(0, sparse_map.num_points3D - candidate.num_points3D),
        elapsed_s=elapsed_s,
    )
