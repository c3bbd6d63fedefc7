"""When a map is judged: while it grows, and at the end; and when that is emitted."""

from __future__ import annotations

from collections.abc import Sequence

from engine.events import VerdictChanged
from engine.mapping.map_evidence import gather
from engine.mapping.sparse_map import SparseMap
from engine.mapping.verdict import judge
from engine.matching.scene_graph import SceneGraph
from engine.ports import EventSink
from engine.types import Verdict, VerdictLevel

_EVERY_KEYFRAMES = 10
_GROWTH = 1.1  # of the registered keyframes since the last time


class VerdictWatch:
    """Judges the map of a run now and then, and emits what changed.

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

    def watch(self, sparse_map: SparseMap) -> None:
        """Judges a growing map when it is much larger than last time."""
        num = sparse_map.num_registered
        if self._num_judged <= num < max(self._num_judged + _EVERY_KEYFRAMES, 1):
            return
        self.judge(sparse_map)

    def judge(self, sparse_map: SparseMap, separate_maps: Sequence[SparseMap] = ()) -> None:
        """Judges a map at its end, with what stands beside it."""
        self._num_judged = sparse_map.num_registered
        verdict = judge(gather(sparse_map, self._graph, separate_maps))
        if _cause(verdict) != _cause(self._verdict):
            self._emit(VerdictChanged(verdict=verdict))
        self._verdict = verdict


def _cause(verdict: Verdict) -> tuple[VerdictLevel, frozenset[str]]:
    return verdict.level, frozenset(reason.kind for reason in verdict.reasons)
