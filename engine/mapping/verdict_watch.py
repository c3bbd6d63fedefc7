"""When a map is judged: now and then while it grows, and at the end; and what is emitted of it."""

from __future__ import annotations

from collections.abc import Callable

from engine.events import VerdictChanged
from engine.mapping.map_evidence import PAIRS_PER_KEYFRAME, Beside, gather
from engine.mapping.sparse_map import SparseMap
from engine.mapping.verdict import judge
from engine.matching.scene_graph import SceneGraph
from engine.ports import EventSink
from engine.types import Verdict, VerdictLevel

_LEAST_KEYFRAMES = 8  # of a growing map: smaller ones still change with every keyframe
_LEAST_GROWTH = 10  # registered keyframes since the last time
_GROWTH_RATIO = 0.3  # likewise, of the map
_LIVE_PAIRS = 3  # of each keyframe that are examined while the map grows


class VerdictWatch:
    """Judges the map of a run now and then, and emits changes of what is said of it.

    Args:
        graph: of all keyframes and their pairs.
        emit: takes the events.
    """

    def __init__(self, *, graph: SceneGraph, emit: EventSink) -> None:
        self._graph = graph
        self._emit = emit
        self._verdict = Verdict()
        self._num_judged = 0  # registered keyframes when the map was judged last

    @property
    def verdict(self) -> Verdict:
        """What was said of the map last."""
        return self._verdict

    def watch(self, sparse_map: SparseMap, beside: Callable[[], Beside]) -> None:
        """Judges a growing map when it has changed much since the last time."""
        num, before = sparse_map.num_registered, self._num_judged
        growth = max(_LEAST_GROWTH, _GROWTH_RATIO * before) if before else _LEAST_KEYFRAMES
        if abs(num - before) >= growth:
            self._judge(sparse_map, beside(), pairs_per_keyframe=_LIVE_PAIRS)

    def judge(self, sparse_map: SparseMap, beside: Beside) -> None:
        """Judges a map, which may be empty, with what stands beside it."""
        self._judge(sparse_map, beside, pairs_per_keyframe=PAIRS_PER_KEYFRAME)

    def _judge(self, sparse_map: SparseMap, beside: Beside, *, pairs_per_keyframe: int) -> None:
        self._num_judged = sparse_map.num_registered
        former = self._verdict
        self._verdict = judge(
            gather(sparse_map, self._graph, beside, pairs_per_keyframe=pairs_per_keyframe)
        )
        if _causes(former) != _causes(self._verdict):
            self._emit(VerdictChanged(verdict=self._verdict))


def _causes(verdict: Verdict) -> tuple[VerdictLevel, frozenset[str]]:
    return verdict.level, frozenset(reason.kind for reason in verdict.reasons)
