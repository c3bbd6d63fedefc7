"""When loops are closed: what waits for it, when a correction is tried, and what is reported."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from engine.config import LoopsConfig
from engine.events import LoopClosed
from engine.mapping.model.growth import GrowthConfig
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.places.contradictions import find_contradictions
from engine.mapping.places.loop_correction import correct_loops, is_enough
from engine.matching.scene_graph import SceneGraph
from engine.ports import EventSink
from engine.types import Contradiction, FrameId, ImagePair, VerifiedPair

_MIN_SHARED_RATIO = 0.25  # of a loop's inliers that must be common points; the loop is closed then
_MIN_LIVE_PAIRS = 3  # that contradict the map, of two new keyframes at least
_TRIED_AGAIN_RATIO = 1.5  # times the pairs of a former try, that another one needs while running
_NEW_PAIRS_RATIO = 0.25  # of the pairs, not tried before, that a try needs while running
_MAX_OPEN = 256  # loops that are looked after, the latest: all are after each keyframe


class LoopClosing:
    """Watches pairs of new keyframes, and corrects the map when enough of them contradict it.

    Args:
        config: of loops.
        growth: thresholds of adjusting a corrected map.
        min_inliers: points that hold a keyframe in its place.
        seed: of everything random.
        emit: takes the events.
    """

    def __init__(
        self,
        config: LoopsConfig,
        *,
        growth: GrowthConfig,
        min_inliers: int,
        seed: int,
        emit: EventSink,
    ) -> None:
        self._config = config
        self._growth = growth
        self._min_inliers = min_inliers
        self._seed = seed
        self._emit = emit
        self._open: deque[VerifiedPair] = deque(maxlen=_MAX_OPEN)  # their tracks are not one yet
        self._contradicting: dict[ImagePair, FrameId] = {}  # seen to, and by which keyframe
        self._tried: set[ImagePair] = set()
        self._num_tried = 0  # pairs that contradicted the map when all were examined last
        self._refuted: dict[ImagePair, VerifiedPair] = {}  # that the map does not use any more
        self._tried_finally: tuple[set[ImagePair], int] | None = None  # and keyframes by then

    def facts(self) -> dict[str, Any]:
        """The loops that are open, and what was tried while the run went on."""
        return {
            "open": [_ids(verified.pair) for verified in self._open],
            "contradicting": [[*_ids(pair), by] for pair, by in self._contradicting.items()],
            "tried": [_ids(pair) for pair in sorted(self._tried)],
            "num_tried": self._num_tried,
        }

    def restore(self, facts: Mapping[str, Any], graph: SceneGraph) -> None:
        """Goes on with `facts`; loops whose pair does not hold any more are left out."""
        edges = [graph.edge(ImagePair(*pair)) for pair in facts["open"]]
        self._open.extend(verified for verified in edges if verified is not None)
        self._contradicting = {ImagePair(*pair): by for *pair, by in facts["contradicting"]}
        self._tried = {ImagePair(*pair) for pair in facts["tried"]}
        self._num_tried = facts["num_tried"]

    def add_loop(self, verified: VerifiedPair) -> None:
        """Takes a pair that joins parts which were far from each other."""
        self._open.append(verified)

    def watch(self, sparse_map: SparseMap, frame_id: FrameId) -> None:
        """Examines the pairs of a keyframe that was registered."""
        if self._config.correct:
            for verified, _ in find_contradictions(sparse_map, [frame_id]):
                self._contradicting[verified.pair] = frame_id

    def report(self, sparse_map: SparseMap) -> None:
        """Emits the loops that are closed by now."""
        still_open = []
        for verified in self._open:
            if _is_closed(sparse_map, verified):
                self._emit(
                    LoopClosed(
                        first=verified.pair.first,
                        second=verified.pair.second,
                        num_inliers=verified.num_inliers,
                    )
                )
            else:
                still_open.append(verified)
        self._open = deque(still_open, maxlen=_MAX_OPEN)

    def correct(self, sparse_map: SparseMap, *, is_final: bool = False) -> SparseMap | None:
        """Corrects the map where enough pairs contradict it, not twice for the same ones.

        At the end those count as new that were tried while the run went on.

        Args:
            sparse_map: the map; it stays as it is.
            is_final: whether all of its pairs are examined, and maps of any size.

        Returns:
            The map to take its place: corrected, or at the end without pairs that all the others
            together contradict. None: nothing is to be done, or nothing helps.
        """
        if not self._config.correct or not self._is_due(sparse_map, is_final=is_final):
            return None
        found = find_contradictions(sparse_map)
        self._num_tried = len(found)
        pairs = [verified for verified, _ in found]
        known = {verified.pair for verified in pairs}
        if not (is_enough(pairs) and self._is_new(sparse_map, known, is_final=is_final)):
            self._contradicting = {p: i for p, i in self._contradicting.items() if p in known}
            return None
        self._tried |= known
        self._contradicting.clear()
        correction = correct_loops(
            sparse_map,
            found,
            config=self._growth,
            min_inliers=self._min_inliers,
            seed=self._seed,
        )
        self._emit(correction.event)
        if correction.better_map is not None:
            self._num_tried = 0
            return correction.better_map
        if not (is_final and correction.refuted):
            return None
        contradicting = {verified.pair: verified for verified in pairs}
        self._refuted.update((p, contradicting[p]) for p in correction.refuted if p in known)
        without = sparse_map.copy()
        without.forget_pairs(correction.refuted)
        return without

    def contradictions(
        self, sparse_map: SparseMap, *, is_confirmed: Callable[[ImagePair], bool]
    ) -> list[tuple[VerifiedPair, Contradiction]]:
        """Pairs that contradict a map at the end, also such that were refuted and taken out of it.

        A map that no correction puts right may be wrong, and pairs right that it refutes.

        Args:
            sparse_map: the map.
            is_confirmed: whether other images confirm a pair that was refuted.
        """
        refuted = [one for one in self._refuted.values() if is_confirmed(one.pair)]
        return find_contradictions(sparse_map, beside=refuted)

    def _is_new(self, sparse_map: SparseMap, pairs: set[ImagePair], *, is_final: bool) -> bool:
        """Whether there is more to go by than when a correction was tried last."""
        if not is_final:
            return len(pairs - self._tried) >= _NEW_PAIRS_RATIO * len(pairs)
        before, self._tried_finally = self._tried_finally, (pairs, sparse_map.num_registered)
        return before != self._tried_finally

    def _is_due(self, sparse_map: SparseMap, *, is_final: bool) -> bool:
        if is_final:
            return True
        limit = self._config.max_live_keyframes
        if 0 < limit < sparse_map.num_registered:
            return False
        num_pairs = len(self._contradicting)
        return num_pairs >= max(_MIN_LIVE_PAIRS, _TRIED_AGAIN_RATIO * self._num_tried) and (
            len(set(self._contradicting.values())) > 1
        )


def _ids(pair: ImagePair) -> list[FrameId]:
    return [pair.first, pair.second]


def _is_closed(sparse_map: SparseMap, verified: VerifiedPair) -> bool:
    pair = verified.pair
    if not (sparse_map.is_registered(pair.first) and sparse_map.is_registered(pair.second)):
        return False
    shared = sparse_map.covisibility(pair.second).get(pair.first, 0)
    return shared >= _MIN_SHARED_RATIO * verified.num_inliers
