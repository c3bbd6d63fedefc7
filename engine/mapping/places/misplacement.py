"""Finding keyframes that repeated structure put in the wrong place, and putting them right.

Wallpaper, facades and rows of chairs give a keyframe many small agreements with a wrong place.
Sooner or later a stronger pair contradicts the poses that the map gave to its two keyframes. Pairs
are then trusted in order of their strength: the maximum spanning tree of the verified pairs joins
every keyframe by the strongest evidence there is for it. Where a pair of the tree contradicts the
map, the map may be wrong; where a pair outside the tree does, the map has drifted or the pair is
wrong, and nothing is done. (Spanning trees of pair evidence: Snavely et al., CVPR 2008;
measurements that contradict each other show which are wrong: Zach et al., CVPR 2010.)

One pair proves nothing: it is a hypothesis, too. On a copy of the map the keyframes are taken out,
the pairs that misled them are left out, and what can be is registered again. The copy takes the
place of the map only where no fewer keyframes come back, at least two of the pairs that
contradicted the map agree with it, and keypoints fit it better: more of them, or more closely.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import networkx

from engine.mapping.model.growth import GrowthConfig, adjust_in_place, grow_fully
from engine.mapping.model.place_evidence import PairErrors, is_strong
from engine.mapping.model.sparse_map import SparseMap
from engine.types import FrameId, ImagePair, VerifiedPair

_NEARLY_AS_STRONG = 0.7  # times as strong
_CLEARLY_STRONGER = 1.25  # times as strong
_SAME_GAIN, _MORE_GAIN = 0.98, 1.005  # times the fit of all observations before
_MAX_SMALL = 100  # keyframes of a map that is repaired whenever it is contradicted
_GROWTH_RATIO = 1.1  # times the keyframes at the last try of a larger one, before the next
_MIN_EVIDENCE = 2  # pairs that contradicted the map and agree with the repaired one


@dataclass(frozen=True, slots=True, kw_only=True)
class Misplacement:
    """Keyframes that may be in the wrong place, and the pairs that put them there."""

    keyframe_ids: tuple[FrameId, ...]
    misleading: tuple[ImagePair, ...]
    evidence: ImagePair  # the strong pair that contradicts them
    contradicting: tuple[ImagePair, ...]  # all pairs of theirs with the others that do


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Repair:
    """A map in which misplaced keyframes have other places."""

    sparse_map: SparseMap
    misplacement: Misplacement


class MisplacementRepair:
    """Finds misplaced keyframes and tries to put them right, each evidence once.

    A try adjusts the whole map some times. So one of a large map is put off until the map has grown
    by a tenth since the last, or to the end of the run.
    """

    def __init__(self) -> None:
        self._tried: set[ImagePair] = set()
        self._num_at_last_try = 0  # registered keyframes
        self.num_put_off = 0  # contradictions that were not tried when they came

    def forget(self) -> None:
        """Tries everything again: the map is another one."""
        self._tried.clear()
        self._num_at_last_try = 0

    def repair(
        self,
        sparse_map: SparseMap,
        frame_ids: Collection[FrameId],
        *,
        config: GrowthConfig,
        exclude: Collection[FrameId] = (),
    ) -> Repair | None:
        """Puts misplaced keyframes right on a copy of the map; None when that makes it no better.

        Args:
            sparse_map: the map; it stays as it is.
            frame_ids: registered keyframes whose pairs are asked for contradictions.
            config: thresholds of growing.
            exclude: keyframes that the map must not get, such as those of other maps.
        """
        errors = PairErrors(sparse_map)
        if not _are_contradicted(sparse_map, frame_ids, ignored=self._tried, errors=errors):
            return None
        num_registered = sparse_map.num_registered
        if _MAX_SMALL < num_registered < _GROWTH_RATIO * self._num_at_last_try:
            self.num_put_off += 1
            return None
        misplacement = find_misplacement(sparse_map, frame_ids, ignored=self._tried, errors=errors)
        if misplacement is None:
            return None
        self._num_at_last_try = num_registered
        return self._try(sparse_map, misplacement, config=config, exclude=exclude)

    def repair_all(
        self,
        sparse_map: SparseMap,
        *,
        config: GrowthConfig,
        max_tries: int,
        exclude: Collection[FrameId] = (),
    ) -> Iterator[Repair]:
        """Puts misplaced keyframes right one after the other, each on a copy of the map before.

        All pairs are examined, and thoroughly (see `find_misplacement`): for the end of a run. The
        maps must stay as they are meanwhile.

        Args:
            sparse_map: the map.
            config: thresholds of growing.
            max_tries: misplacements that are tried at most.
            exclude: keyframes that the map must not get, such as those of other maps.
        """
        self.forget()
        errors = PairErrors(sparse_map)
        for _ in range(max_tries):
            misplacement = find_misplacement(
                sparse_map,
                sparse_map.registered_ids,
                ignored=self._tried,
                is_thorough=True,
                errors=errors,
            )
            if misplacement is None:
                return
            repair = self._try(sparse_map, misplacement, config=config, exclude=exclude)
            if repair is not None:
                sparse_map, errors = repair.sparse_map, PairErrors(repair.sparse_map)
                yield repair

    def _try(
        self,
        sparse_map: SparseMap,
        misplacement: Misplacement,
        *,
        config: GrowthConfig,
        exclude: Collection[FrameId],
    ) -> Repair | None:
        self._tried.update((misplacement.evidence, *misplacement.contradicting))
        candidate = repaired(sparse_map, misplacement, config=config, exclude=exclude)
        if candidate is None:
            return None
        return Repair(sparse_map=candidate, misplacement=misplacement)


def find_misplacement(
    sparse_map: SparseMap,
    frame_ids: Iterable[FrameId],
    *,
    ignored: Collection[ImagePair] = (),
    is_thorough: bool = False,
    errors: PairErrors | None = None,
) -> Misplacement | None:
    """Finds keyframes in the wrong place when strong pairs contradict the map.

    Args:
        sparse_map: the map.
        frame_ids: registered keyframes, usually the newest; only when one of their strong pairs
            contradicts the map is the whole map examined.
        ignored: pairs that are no evidence.
        is_thorough: whether contradictions count, too, that are a little weaker than what holds the
            keyframes where they are.
        errors: of the map's pairs, as far as they are known.

    Returns:
        What to take out of the map, or None when the strongest evidence agrees with it.
    """
    errors = errors or PairErrors(sparse_map)
    if not _are_contradicted(sparse_map, frame_ids, ignored=ignored, errors=errors):
        return None
    tree = networkx.maximum_spanning_tree(_registered_graph(sparse_map), weight="strength")
    contradicted = [
        (data["strength"], data["pair"])
        for _, _, data in sorted(tree.edges(data=True), key=lambda edge: edge[2]["pair"].pair)
        if data["pair"].pair not in ignored
        and is_strong(sparse_map, data["pair"])
        and errors.contradicts(data["pair"])
    ]
    if not contradicted:
        return _weakly_held(sparse_map, ignored, errors) if is_thorough else None
    tree.remove_edges_from([(pair.pair.first, pair.pair.second) for _, pair in contradicted])
    strongest = max(contradicted, key=lambda one: (one[0], one[1].pair))
    return _misplacement(sparse_map, tree, errors, evidence=strongest[1].pair)


def _are_contradicted(
    sparse_map: SparseMap,
    frame_ids: Iterable[FrameId],
    *,
    ignored: Collection[ImagePair],
    errors: PairErrors,
) -> bool:
    """Whether a strong pair of some keyframes contradicts the map."""
    return any(
        pair.pair not in ignored and errors.contradicts(pair)
        for frame_id in frame_ids
        for pair in strong_pairs(sparse_map, frame_id)
    )


def _weakly_held(
    sparse_map: SparseMap, ignored: Collection[ImagePair], errors: PairErrors
) -> Misplacement | None:
    """Keyframes that pairs hold where they are which are little stronger than a contradiction.

    Of the pairs that agree with the map the strongest ones join all keyframes. The weakest of these
    between the ends of a pair that contradicts the map is where the map may be wrong.
    """
    graph = _registered_graph(sparse_map)
    contradicting = []
    for first, second, data in list(graph.edges(data=True)):
        if not errors.contradicts(data["pair"]):
            continue  # it holds its keyframes where they are
        graph.remove_edge(first, second)
        if data["pair"].pair not in ignored and is_strong(sparse_map, data["pair"]):
            contradicting.append((data["strength"], data["pair"].pair))
    tree = networkx.maximum_spanning_tree(graph, weight="strength")
    for strength, pair in sorted(contradicting, key=lambda one: (-one[0], one[1])):
        if not networkx.has_path(tree, pair.first, pair.second):
            return _misplacement(sparse_map, tree, errors, evidence=pair)
        path = networkx.shortest_path(tree, pair.first, pair.second)
        links = [(tree.edges[link]["strength"], link) for link in itertools.pairwise(path)]
        weakest, link = min(links)
        if strength > _NEARLY_AS_STRONG * weakest:
            tree.remove_edge(*link)
            return _misplacement(sparse_map, tree, errors, evidence=pair)
    return None


def _misplacement(
    sparse_map: SparseMap,
    tree: networkx.Graph[FrameId],
    errors: PairErrors,
    *,
    evidence: ImagePair,
) -> Misplacement:
    """What is wrong if the parts of a tree that was cut are not where they are to each other."""
    # The largest part stays; of equal ones the part with the oldest keyframe.
    parts = sorted(networkx.connected_components(tree), key=lambda part: (-len(part), min(part)))
    between = _pairs_between(sparse_map, parts)
    is_contradicting = [errors.contradicts(pair) for pair in between]
    return Misplacement(
        keyframe_ids=tuple(sorted(set().union(*parts[1:]))),
        misleading=_pairs_where(between, is_contradicting, wanted=False),
        evidence=evidence,
        contradicting=_pairs_where(between, is_contradicting, wanted=True),
    )


def repaired(
    sparse_map: SparseMap,
    misplacement: Misplacement,
    *,
    config: GrowthConfig,
    exclude: Collection[FrameId] = (),
) -> SparseMap | None:
    """A copy of the map with misplaced keyframes registered anew; None when it is no better.

    Keyframes of other maps, to be excluded, must not come in by the way: one pair is no reason.
    """
    candidate = sparse_map.copy()
    take_out(candidate, misplacement)
    grow_fully(candidate, config=config, exclude=exclude)
    if candidate.num_registered < sparse_map.num_registered:
        return None
    errors = PairErrors(candidate)
    confirmed = [
        pair
        for pair in misplacement.contradicting
        if candidate.is_registered(pair.first)
        and candidate.is_registered(pair.second)
        and not errors.contradicts(candidate.neighbors(pair.first)[pair.second])
    ]
    if len(confirmed) < _MIN_EVIDENCE:
        return None
    present = sparse_map.copy()
    for one in (present, candidate):
        adjust_in_place(one, config=config)
        one.retriangulate()
        adjust_in_place(one, config=config)
    before, after = (one.fit(one.registered_ids).gain for one in (present, candidate))
    is_by_stronger = _strongest(candidate, confirmed) >= _CLEARLY_STRONGER * _strongest(
        sparse_map, misplacement.misleading
    )
    enough = _SAME_GAIN if is_by_stronger else _MORE_GAIN
    return candidate if after > enough * before else None


def _strongest(sparse_map: SparseMap, pairs: Collection[ImagePair]) -> float:
    return max(
        (sparse_map.pair_strength(sparse_map.neighbors(pair.first)[pair.second]) for pair in pairs),
        default=0.0,
    )


def take_out(sparse_map: SparseMap, misplacement: Misplacement) -> None:
    """Takes misplaced keyframes out of the map and forgets the pairs that misled it."""
    for pair in misplacement.misleading:
        sparse_map.distrust_pair(pair)
    sparse_map.deregister(misplacement.keyframe_ids)


def strong_pairs(sparse_map: SparseMap, frame_id: FrameId) -> list[VerifiedPair]:
    """The strong pairs of a keyframe with registered ones."""
    return [
        pair
        for other, pair in sparse_map.neighbors(frame_id).items()
        if sparse_map.is_registered(other) and is_strong(sparse_map, pair)
    ]


def _registered_graph(sparse_map: SparseMap) -> networkx.Graph[FrameId]:
    graph: networkx.Graph[FrameId] = networkx.Graph()
    for frame_id in sparse_map.registered_ids:
        graph.add_node(frame_id)
        for other, pair in sorted(sparse_map.neighbors(frame_id).items()):
            if other < frame_id and sparse_map.is_registered(other):
                strength = sparse_map.pair_strength(pair)
                graph.add_edge(other, frame_id, strength=strength, pair=pair)
    return graph


def _pairs_between(sparse_map: SparseMap, parts: Sequence[set[FrameId]]) -> list[VerifiedPair]:
    part_of = {frame_id: number for number, part in enumerate(parts) for frame_id in part}
    return [
        pair
        for frame_id in sorted(part_of)
        for other, pair in sorted(sparse_map.neighbors(frame_id).items())
        if other < frame_id and other in part_of and part_of[other] != part_of[frame_id]
    ]


def _pairs_where(
    pairs: Sequence[VerifiedPair], flags: Sequence[bool], *, wanted: bool
) -> tuple[ImagePair, ...]:
    return tuple(one.pair for one, flag in zip(pairs, flags, strict=True) if flag is wanted)
