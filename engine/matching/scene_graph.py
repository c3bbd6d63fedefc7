"""The scene graph: which keyframes see the same things, and which pairs to match next.

Nodes are keyframes, edges are verified pairs. For each new keyframe the graph proposes a bounded
number of earlier ones of four kinds: the last few with exponentially growing gaps, GPS neighbours,
covisible neighbours of the last few, and retrieved places.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import networkx as nx
import numpy as np

from engine.config import SceneGraphConfig
from engine.geo.georeference import positions_in_enu
from engine.ports import PlaceIndex
from engine.types import (
    Features,
    Float64Array,
    FrameId,
    GpsFix,
    ImagePair,
    Keyframe,
    PairCandidate,
    PairReason,
    VerifiedPair,
)

_NUM_PREDECESSORS = 3  # the last keyframes of a sequence; their neighbours are candidates
_MIN_SHARED = 15  # fewer shared points (or inliers) do not make two keyframes covisible
_EXTRA_PAIRS = 4  # beyond `pairs_per_keyframe`, for the second round around a found place
_PLACE_RADIUS = 2  # keyframes this close in their sequence show one place
_MAX_PER_PLACE = 2  # retrieved of one place; its other neighbours come in the second round
_RETRIEVED_POOL = 8  # similar keyframes considered for each one wanted

Ranked = Iterable[tuple[FrameId, float]]  # best first


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """One kind of candidates, ranked."""

    reason: PairReason
    ranked: Iterator[tuple[FrameId, float]]
    limit: int  # candidates of this kind at most

    @property
    def per_round(self) -> int:
        """Candidates taken before the other kinds have their turn."""
        return 2 if self.reason is PairReason.TEMPORAL else 1


class SceneGraph:
    """Keyframes, the verified pairs between them, and which the map has registered.

    Orders ("earlier", gaps) are orders of adding. The keyframes of one camera are a sequence.
    Choosing changes nothing: a pair counts as tried once it is recorded, as verified
    (`record_pair`) or not (`record_tried`), and is not proposed again. Verified pairs that nothing
    confirms may be held back: they lead to further pairs, and no map uses them.

    The state of the map enters through `set_registered` and `set_covisibility` only.

    Memory: the keyframes themselves, and per keyframe at most ``pairs_per_keyframe`` + 4 pairs
    (``exhaustive_below`` while matching is exhaustive) with their inlier matches. One thread at a
    time.
    """

    def __init__(self, config: SceneGraphConfig, *, recognizer: PlaceIndex) -> None:
        self._config = config
        self._recognizer = recognizer
        self._graph: nx.Graph[FrameId] = nx.Graph()  # edges: is_loop
        self._covisibility: dict[FrameId, dict[FrameId, int]] = {}  # shared points, both ways
        self._keyframes: dict[FrameId, Keyframe] = {}
        self._order: dict[FrameId, int] = {}
        self._sequences: dict[str, list[FrameId]] = {}
        self._place_in_sequence: dict[FrameId, int] = {}
        self._verified: dict[ImagePair, VerifiedPair] = {}
        self._tried: dict[FrameId, set[FrameId]] = {}
        self._tried_in_part: set[ImagePair] = set()  # of those
        self._registered: dict[FrameId, int] = {}  # the number of the map that has it
        self._beside: set[FrameId] = set()  # of them, those in other maps than the main one
        self._connected: dict[str, list[FrameId]] = {}  # by calibration key, in order of adding
        self._held_back: dict[FrameId, set[FrameId]] = {}
        self._gps_origin: GpsFix | None = None
        self._east_north_m: dict[FrameId, Float64Array] = {}  # (2,) from the first fix

    # -- keyframes and pairs --------------------------------------------------------------------

    def add_keyframe(self, keyframe: Keyframe) -> None:
        """Adds a keyframe without pairs, also to the place recognition.

        Raises:
            ValueError: the keyframe is already there.
        """
        frame_id = keyframe.frame_id
        if frame_id in self._keyframes:
            raise ValueError(f"keyframe {frame_id} was added before")
        self._recognizer.add(keyframe.features.described())
        self._graph.add_node(frame_id)
        self._covisibility[frame_id] = {}
        self._order[frame_id] = len(self._keyframes)
        self._keyframes[frame_id] = keyframe
        self._tried[frame_id] = set()
        self._held_back[frame_id] = set()
        sequence = self._sequences.setdefault(keyframe.camera_key, [])
        self._place_in_sequence[frame_id] = len(sequence)
        sequence.append(frame_id)
        if keyframe.gps is not None:
            self._gps_origin = self._gps_origin or keyframe.gps
            position_in_enu = positions_in_enu([keyframe.gps], origin=self._gps_origin)[0]
            self._east_north_m[frame_id] = position_in_enu[:2]

    def replace_features(self, features: Features) -> None:
        """Replaces a keyframe's keypoint table.

        Raises:
            KeyError: the keyframe was never added.
        """
        keyframe = self._keyframes[features.frame_id]
        self._keyframes[features.frame_id] = replace(keyframe, features=features)

    def set_calibration_key(self, frame_id: FrameId, calibration_key: str) -> None:
        """Names the calibration of a keyframe; its sequence stays that of its camera.

        Raises:
            KeyError: the keyframe was never added.
        """
        keyframe = self._keyframes[frame_id]
        if keyframe.calibration_key == calibration_key:
            return
        self._set_connected(frame_id, False)
        self._keyframes[frame_id] = replace(keyframe, calibration_key=calibration_key)
        self._update_connected(frame_id)

    def record_pair(self, verified: VerifiedPair) -> None:
        """Adds the edge of a verified pair; matches of a pair recorded again are replaced.

        Raises:
            KeyError: a keyframe of the pair was never added.
        """
        pair = verified.pair
        is_loop = self.is_loop(pair)
        self.record_tried(pair)
        self._verified[pair] = verified
        self._graph.add_edge(pair.first, pair.second, is_loop=is_loop)
        self._update_connected(pair.first, pair.second)

    def record_tried(self, pair: ImagePair, *, in_part: bool = False) -> None:
        """Records that a pair was matched, verified or not.

        Args:
            pair: the pair.
            in_part: whether it was given up early: it is proposed once more to a keyframe that
                fits nowhere.

        Raises:
            KeyError: a keyframe of the pair was never added.
        """
        tried_first, tried_second = self._tried[pair.first], self._tried[pair.second]
        tried_first.add(pair.second)
        tried_second.add(pair.first)
        if in_part:
            self._tried_in_part.add(pair)
        else:
            self._tried_in_part.discard(pair)

    def remove_pair(self, pair: ImagePair) -> None:
        """Takes away the edge of a pair, if there is one; the pair stays tried."""
        if self._verified.pop(pair, None) is not None:
            self._graph.remove_edge(pair.first, pair.second)
            self.release(pair)
            self._update_connected(pair.first, pair.second)

    def hold_back(self, pair: ImagePair) -> None:
        """Withholds a verified pair from all maps, until it is released; it stays an edge.

        Raises:
            KeyError: a keyframe of the pair was never added.
        """
        held_first, held_second = self._held_back[pair.first], self._held_back[pair.second]
        held_first.add(pair.second)
        held_second.add(pair.first)
        self._update_connected(pair.first, pair.second)

    def release(self, pair: ImagePair) -> None:
        """Lets maps use a pair that was held back, if it was; whether it is a loop is decided anew.

        Raises:
            KeyError: a keyframe of the pair was never added.
        """
        was_held_back = self.is_held_back(pair)
        edge = self._graph.get_edge_data(pair.first, pair.second)
        if was_held_back and edge is not None:
            edge["is_loop"] = self._is_far(pair)
        self._held_back[pair.first].discard(pair.second)
        self._held_back[pair.second].discard(pair.first)
        self._update_connected(pair.first, pair.second)

    def is_held_back(self, pair: ImagePair) -> bool:
        """Whether no map may use a pair yet."""
        return pair.second in self._held_back.get(pair.first, ())

    def was_tried(self, pair: ImagePair) -> bool:
        """Whether a pair was recorded, verified or not."""
        return pair.second in self._tried.get(pair.first, ())

    def is_loop(self, pair: ImagePair) -> bool:
        """Whether a pair joins parts of the graph that were far from each other.

        They are far when at least ``loop_min_gap`` keyframes were added between the two (the pair
        included) and no chain of at most three links leads from one to the other without the pair
        itself; links are verified pairs that are not held back, and steps within a sequence. It is
        decided when the pair is recorded, or released, and stays: the first pair with an old place
        is a loop, those that follow beside it are not.
        """
        edge = self._graph.get_edge_data(pair.first, pair.second)
        return self._is_far(pair) if edge is None else bool(edge["is_loop"])

    def _is_far(self, pair: ImagePair) -> bool:
        gap = abs(self._order[pair.first] - self._order[pair.second])
        return gap >= self._config.loop_min_gap and not self._is_short_way(pair)

    def tried_in_part(self, frame_id: FrameId) -> list[FrameId]:
        """Keyframes with which one was matched in part only, in order of adding."""
        tried = sorted(self._tried[frame_id], key=self._order.__getitem__)
        return [i for i in tried if ImagePair.of(frame_id, i) in self._tried_in_part]

    @property
    def keyframe_ids(self) -> list[FrameId]:
        """All keyframes in order of adding."""
        return list(self._keyframes)

    @property
    def connected_ids(self) -> list[FrameId]:
        """Keyframes with a pair that maps may use, in order of adding: they can be in one."""
        by_camera = self._connected.values()
        return list(heapq.merge(*by_camera, key=self._order.__getitem__))

    @property
    def connected_by_calibration(self) -> Mapping[str, Sequence[FrameId]]:
        """The same by calibration key; the calibration whose first one came first comes first."""
        connected = [(key, list(ids)) for key, ids in self._connected.items() if ids]
        return dict(sorted(connected, key=lambda one: self._order[one[1][0]]))

    def _update_connected(self, *frame_ids: FrameId) -> None:
        for frame_id in frame_ids:
            num_held_back = len(self._held_back[frame_id])
            self._set_connected(frame_id, self._graph.degree[frame_id] > num_held_back)

    def _set_connected(self, frame_id: FrameId, is_connected: bool) -> None:
        ids = self._connected.setdefault(self._keyframes[frame_id].calibration_key, [])
        order = self._order.__getitem__
        place = bisect.bisect_left(ids, order(frame_id), key=order)
        was_connected = place < len(ids) and ids[place] == frame_id
        if is_connected and not was_connected:
            ids.insert(place, frame_id)
        elif was_connected and not is_connected:
            del ids[place]

    def keyframe(self, frame_id: FrameId) -> Keyframe:
        """One keyframe; KeyError when it was never added."""
        return self._keyframes[frame_id]

    def edges(self) -> list[VerifiedPair]:
        """The verified pairs that maps may use, in the order in which they were first recorded."""
        return [
            verified for pair, verified in self._verified.items() if not self.is_held_back(pair)
        ]

    def all_edges(self) -> list[VerifiedPair]:
        """All verified pairs, also those held back, in the same order."""
        return list(self._verified.values())

    def edges_among(self, frame_ids: Iterable[FrameId]) -> list[VerifiedPair]:
        """Those of `edges` of which both keyframes are among those given, in the same order."""
        inside = set(frame_ids)
        return [
            verified
            for verified in self.edges()
            if verified.pair.first in inside and verified.pair.second in inside
        ]

    def edges_of(self, calibration_key: str) -> list[VerifiedPair]:
        """Those of `edges` of which both keyframes have a calibration, in the same order."""
        return self.edges_among(
            i for i, one in self._keyframes.items() if one.calibration_key == calibration_key
        )

    def edge(self, pair: ImagePair) -> VerifiedPair | None:
        """One verified pair; None when it is not."""
        return self._verified.get(pair)

    def neighbors(self, frame_id: FrameId) -> list[FrameId]:
        """Keyframes with a verified pair to this one, in order of adding."""
        return sorted(self._graph[frame_id], key=self._order.__getitem__)

    def verified_pairs(self, frame_id: FrameId) -> list[VerifiedPair]:
        """Verified pairs of a keyframe, in the order of `neighbors`."""
        return [self._edge(frame_id, other) for other in self.neighbors(frame_id)]

    # -- state of the map -----------------------------------------------------------------------

    def set_registered(
        self, frame_id: FrameId, is_registered: bool, *, map_number: int = 0
    ) -> None:
        """Sets whether a keyframe is registered; one that is not shares no points either.

        Args:
            frame_id: the keyframe.
            is_registered: whether it has its place in a map.
            map_number: of that map; 0 is the main one.

        Raises:
            KeyError: the keyframe was never added.
        """
        if frame_id not in self._keyframes:
            raise KeyError(frame_id)
        self._beside.discard(frame_id)
        if is_registered:
            self._registered[frame_id] = map_number
            if map_number:
                self._beside.add(frame_id)
        else:
            self._registered.pop(frame_id, None)
            self.set_covisibility(frame_id, {})

    def map_number(self, frame_id: FrameId) -> int | None:
        """The number of the map in which a keyframe is registered; None: in no map."""
        return self._registered.get(frame_id)

    def set_covisibility(self, frame_id: FrameId, counts: Mapping[FrameId, int]) -> None:
        """Replaces the numbers of 3D points that a keyframe shares with others, on both sides.

        Raises:
            KeyError: a keyframe was never added.
        """
        for other in (frame_id, *counts):
            if other not in self._keyframes:
                raise KeyError(other)
        for other in self._covisibility[frame_id]:
            del self._covisibility[other][frame_id]
        self._covisibility[frame_id] = dict(counts)
        for other, num_points in counts.items():
            self._covisibility[other][frame_id] = num_points

    def retry_candidates(
        self, limit: int, *, map_number: int = 0, exclude: Collection[FrameId] = ()
    ) -> list[FrameId]:
        """Keyframes that a map lacks, those with most verified inliers to its keyframes first.

        Args:
            limit: how many at most.
            map_number: of the map.
            exclude: keyframes to leave out.
        """
        inliers = {
            frame_id: sum(
                self._edge(frame_id, other).num_inliers
                for other in self._graph[frame_id]
                if self._registered.get(other) == map_number
                and other not in self._held_back[frame_id]
            )
            for frame_id in self._not_in_map(map_number)
            if frame_id not in exclude
        }
        candidates = [frame_id for frame_id, total in inliers.items() if total > 0]
        return sorted(candidates, key=lambda frame_id: -inliers[frame_id])[:limit]

    def _not_in_map(self, map_number: int) -> list[FrameId]:
        """Keyframes that a map lacks, in order of adding."""
        lacking = self._keyframes.keys() - self._registered.keys()
        lacking.update(i for i in self._beside if self._registered[i] != map_number)
        if map_number:
            lacking.update(self._registered.keys() - self._beside)
        return sorted(lacking, key=self._order.__getitem__)

    # -- choosing pairs -------------------------------------------------------------------------

    def choose_pairs(self, frame_id: FrameId) -> list[PairCandidate]:
        """The pairs of a new keyframe with earlier ones that are worth matching, best first.

        All of them while there are at most ``exhaustive_below`` keyframes. After that at most
        ``pairs_per_keyframe``, shared out in rounds: two temporal ones, one near by GPS, one
        covisible, one retrieved; what one kind does not use goes to the others. A keyframe that
        several kinds propose counts for the first of them only, and the others go on.
        """
        if self._order[frame_id] < self._config.exhaustive_below:
            newest_first = reversed(self.keyframe_ids[: self._order[frame_id]])
            ranked = ((other, 1.0 / gap) for gap, other in enumerate(newest_first, start=1))
            return self._open_candidates(frame_id, ranked, reason=PairReason.EXHAUSTIVE)
        config, reached = self._config, self._reached(frame_id)
        temporal = self._temporal(frame_id)
        planned = {other for other, _ in temporal}
        further = (
            (PairReason.GPS, self._near_by_gps(frame_id), config.num_gps),
            (PairReason.COVISIBLE, self._covisible(frame_id, reached), config.num_covisible),
            (PairReason.RETRIEVED, self._retrieved(frame_id, reached), config.num_retrieved),
        )
        kinds = [_Kind(reason=PairReason.TEMPORAL, ranked=iter(temporal), limit=len(temporal))]
        for reason, hits, limit in further:
            unplanned = (hit for hit in hits if hit[0] not in planned)
            kinds.append(_Kind(reason=reason, ranked=unplanned, limit=limit))
        return self._share_out(frame_id, kinds)

    def expand_pairs(
        self, frame_id: FrameId, verified: Sequence[VerifiedPair]
    ) -> list[PairCandidate]:
        """The second round of pairs: keyframes around the places that the first round found.

        Args:
            frame_id: the new keyframe.
            verified: its verified pairs; all pairs of the first round must be recorded.

        Returns:
            Earlier keyframes not yet tried that share most with the far ends of ``verified``
            (those that the last few keyframes do not lead to), best first, as many as complete
            ``pairs_per_keyframe`` + 4 pairs.
        """
        reached = self._reached(frame_id)
        ends = [found.pair.other(frame_id) for found in verified]
        ranked = self._by_shared(end for end in ends if end not in reached)
        far = (hit for hit in ranked if hit[0] not in reached)
        num_tried = sum(self._is_earlier(other, frame_id) for other in self._tried[frame_id])
        room = max(self._config.pairs_per_keyframe + _EXTRA_PAIRS - num_tried, 0)
        return self._open_candidates(frame_id, far, reason=PairReason.COVISIBLE)[:room]

    def choose_places(self, frame_id: FrameId, *, limit: int) -> list[PairCandidate]:
        """Further pairs of a keyframe that fits nowhere, or only beside the map: what looks alike.

        The most similar keyframes of all maps but its own, earlier or later ones, a few of each
        place; none that it was matched with in full before. For one without a place they need not
        be much alike; one that has a place in a map gets half as many, those as similar as
        retrieved ones.
        """
        own = self._registered.get(frame_id)
        excluded = {i for i in self._keyframes if self._registered.get(i, own) == own}
        hits: Ranked = self._recognizer.query(
            frame_id,
            exclude=excluded | (self._tried[frame_id] - set(self.tried_in_part(frame_id))),
            limit=_RETRIEVED_POOL * limit,
        )
        if own is not None:
            limit = max(1, limit // 2)
            hits = [hit for hit in hits if hit[1] >= self._config.min_retrieval_score]
        return [
            PairCandidate(
                pair=ImagePair.of(frame_id, other), reason=PairReason.RETRIEVED, score=score
            )
            for other, score in islice(self._spread_over_places(hits), limit)
        ]

    def is_weak(self, frame_id: FrameId, *, min_pairs: int, min_inliers: int) -> bool:
        """Whether a keyframe is in no map though there is one, or hardly matches others.

        Args:
            frame_id: the keyframe.
            min_pairs: it hardly matches with fewer pairs that maps may use
            min_inliers: and have so many inliers.
        """
        if self._registered and frame_id not in self._registered:
            return True
        others = set(self._graph[frame_id]) - self._held_back[frame_id]
        strong = (self._edge(frame_id, one).num_inliers >= min_inliers for one in others)
        return sum(strong) < min_pairs

    def second_pairs(
        self,
        frame_id: FrameId,
        *,
        limit: int,
        min_inliers: int,
        is_open: Callable[[FrameId], bool],
    ) -> list[ImagePair]:
        """Pairs of a weak keyframe for a second matcher, best first, none of them strong.

        A pair counts only with a third keyframe, so what is likely comes with what matches it: in
        turn, keyframes that share most with those which it matches; its neighbours in its sequence;
        and what looks alike, each with its own strongest neighbour.

        Args:
            frame_id: the keyframe.
            limit: how many at most.
            min_inliers: that make a pair strong.
            is_open: whether a keyframe may be matched with it.
        """
        near = {
            other
            for other in self._graph[frame_id]
            if self._edge(frame_id, other).num_inliers >= min_inliers
        }
        likely = (
            iter(self._second_degree(frame_id)),
            self._nearest_in_sequence(frame_id),
            (hit[0] for hit in self._places_like(frame_id, exclude=near, limit=limit)),
        )
        chosen: dict[FrameId, None] = {}
        for other in _in_turn(likely):
            for one in (other, *self._strongest_neighbors(other)[:1]):
                if len(chosen) < limit and one != frame_id and one not in near and is_open(one):
                    chosen[one] = None
        return [ImagePair.of(frame_id, other) for other in chosen]

    def _second_degree(self, frame_id: FrameId) -> list[FrameId]:
        """Keyframes that share most with the usable neighbours of one, most first."""
        neighbors = set(self._graph[frame_id]) - self._held_back[frame_id]
        return [other for other, _ in self._by_shared(neighbors)]

    def _nearest_in_sequence(self, frame_id: FrameId) -> Iterator[FrameId]:
        """The other keyframes of a sequence, the nearest first, an earlier one before a later."""
        sequence, place = self._sequence(frame_id), self._place_in_sequence[frame_id]
        for gap in range(1, len(sequence)):
            for other in (place - gap, place + gap):
                if 0 <= other < len(sequence):
                    yield sequence[other]

    def _places_like(
        self, frame_id: FrameId, *, exclude: Collection[FrameId], limit: int
    ) -> Iterator[tuple[FrameId, float]]:
        hits = self._recognizer.query(frame_id, exclude=exclude, limit=_RETRIEVED_POOL * limit)
        return self._spread_over_places(hits)

    def _strongest_neighbors(self, frame_id: FrameId) -> list[FrameId]:
        """Keyframes by usable inliers with one, most first."""
        others = set(self._graph[frame_id]) - self._held_back[frame_id]
        return sorted(
            others, key=lambda one: (-self._edge(frame_id, one).num_inliers, self._order[one])
        )

    def _share_out(self, frame_id: FrameId, kinds: Sequence[_Kind]) -> list[PairCandidate]:
        """Takes candidates of each kind in turn until the budget is spent or none is left."""
        chosen: dict[FrameId, PairCandidate] = {}
        turns = deque(kinds)
        while turns:
            kind = turns.popleft()
            num_of_kind = sum(known.reason is kind.reason for known in chosen.values())
            room = min(
                kind.per_round,
                kind.limit - num_of_kind,
                self._config.pairs_per_keyframe - len(chosen),
            )
            fresh = (hit for hit in kind.ranked if hit[0] not in chosen)
            taken = self._open_candidates(frame_id, fresh, reason=kind.reason, limit=room)
            chosen.update((new.pair.other(frame_id), new) for new in taken)
            if taken:
                turns.append(kind)
        return list(chosen.values())

    def _open_candidates(
        self, frame_id: FrameId, ranked: Ranked, *, reason: PairReason, limit: int | None = None
    ) -> list[PairCandidate]:
        """The best ``limit`` of a ranking that are earlier than a keyframe and not yet tried."""
        open_hits = (
            hit
            for hit in ranked
            if self._is_earlier(hit[0], frame_id) and hit[0] not in self._tried[frame_id]
        )
        return [
            PairCandidate(pair=ImagePair.of(frame_id, other), reason=reason, score=score)
            for other, score in islice(open_hits, limit)
        ]

    # -- kinds of candidates --------------------------------------------------------------------

    def _temporal(self, frame_id: FrameId) -> list[tuple[FrameId, float]]:
        """Earlier keyframes of the same sequence at the configured gaps."""
        recent = self._recent(frame_id, max(self._config.temporal_offsets, default=0))
        return [
            (recent[-offset], 1.0 / offset)
            for offset in sorted(set(self._config.temporal_offsets))
            if offset <= len(recent)
        ]

    def _near_by_gps(self, frame_id: FrameId) -> Ranked:
        """The nearest keyframes over ground; altitudes of consumer receivers wander too much."""
        position = self._east_north_m.get(frame_id)
        if position is None:
            return []
        frame_ids = list(self._east_north_m)
        offsets_m = np.array(list(self._east_north_m.values())) - position
        distances_m = np.hypot(*offsets_m.T)
        limit_m = self._config.max_gps_distance_m
        nearest = [int(idx) for idx in np.argsort(distances_m, kind="stable")]
        return (
            (frame_ids[idx], 1.0 - float(distances_m[idx]) / limit_m)
            for idx in nearest
            if distances_m[idx] <= limit_m
        )

    def _covisible(self, frame_id: FrameId, reached: Collection[FrameId]) -> Ranked:
        """Keyframes that share most with the last few; those not reached anyway come first."""
        ranked = self._by_shared(self._recent(frame_id, _NUM_PREDECESSORS))
        return sorted(ranked, key=lambda hit: hit[0] in reached)

    def _retrieved(self, frame_id: FrameId, reached: Collection[FrameId]) -> Ranked:
        """Similar places, beyond those that the last few keyframes lead to anyway."""
        num_retrieved = self._config.num_retrieved
        if num_retrieved == 0:
            return
        hits = self._recognizer.query(
            frame_id,
            exclude=self._tried[frame_id] | set(reached),
            limit=_RETRIEVED_POOL * num_retrieved,
        )
        yield from self._spread_over_places(
            hit for hit in hits if hit[1] >= self._config.min_retrieval_score
        )

    def _spread_over_places(self, ranked: Ranked) -> Iterator[tuple[FrameId, float]]:
        """A ranking with a few keyframes of each place only."""
        taken: list[FrameId] = []
        for other, score in ranked:
            if sum(self._is_one_place(other, known) for known in taken) < _MAX_PER_PLACE:
                taken.append(other)
                yield other, score

    def _reached(self, frame_id: FrameId) -> set[FrameId]:
        """Temporal candidates, and recent keyframes with a verified pair to the last few."""
        recent = self._recent(frame_id, max(self._config.temporal_offsets, default=0))
        last_few = set(self._recent(frame_id, _NUM_PREDECESSORS))
        linked = {other for other in recent if not last_few.isdisjoint(self._graph[other])}
        return linked | {other for other, _ in self._temporal(frame_id)}

    # -- helpers --------------------------------------------------------------------------------

    def _by_shared(self, frame_ids: Iterable[FrameId]) -> list[tuple[FrameId, float]]:
        """Keyframes by what they share with the given ones together, most first.

        3D points between registered keyframes of one map; else verified inliers, the best guess
        there is.
        """
        totals: Counter[FrameId] = Counter()
        for frame_id in frame_ids:
            own = self._registered.get(frame_id)
            for other in self._graph[frame_id]:
                if own is None or self._registered.get(other) != own:
                    totals[other] += self._edge(frame_id, other).num_inliers
            for other, num_points in self._covisibility[frame_id].items():
                totals[other] += num_points
        ranked = sorted(totals.items(), key=lambda item: (-item[1], self._order[item[0]]))
        return [(other, float(total)) for other, total in ranked if total >= _MIN_SHARED]

    def _is_short_way(self, pair: ImagePair) -> bool:
        """Whether at most three links join a pair, itself not counted."""
        near_first = self._linked(pair.first) - {pair.second}
        near_second = self._linked(pair.second) - {pair.first}
        return not near_first.isdisjoint(near_second) or any(
            not near_second.isdisjoint(self._linked(frame_id)) for frame_id in near_first
        )

    def _linked(self, frame_id: FrameId) -> set[FrameId]:
        place = self._place_in_sequence[frame_id]
        beside = self._sequence(frame_id)[max(place - 1, 0) : place + 2]
        joined = set(self._graph[frame_id]) - self._held_back[frame_id]
        return {*joined, *beside} - {frame_id}

    def _sequence(self, frame_id: FrameId) -> list[FrameId]:
        return self._sequences[self._keyframes[frame_id].camera_key]

    def _recent(self, frame_id: FrameId, num: int) -> list[FrameId]:
        """The last ``num`` keyframes before one in its sequence, oldest first."""
        place = self._place_in_sequence[frame_id]
        return self._sequence(frame_id)[max(place - num, 0) : place]

    def _is_earlier(self, frame_id: FrameId, than: FrameId) -> bool:
        return self._order[frame_id] < self._order[than]

    def _is_one_place(self, one: FrameId, other: FrameId) -> bool:
        gap = abs(self._place_in_sequence[one] - self._place_in_sequence[other])
        return self._sequence(one) is self._sequence(other) and gap <= _PLACE_RADIUS

    def _edge(self, one: FrameId, other: FrameId) -> VerifiedPair:
        return self._verified[ImagePair.of(one, other)]


def _in_turn(rankings: Iterable[Iterator[FrameId]]) -> Iterator[FrameId]:
    """The first of each ranking, then the second of each, and so on."""
    turns = deque(rankings)
    while turns:
        ranking = turns.popleft()
        for frame_id in islice(ranking, 1):
            yield frame_id
            turns.append(ranking)
