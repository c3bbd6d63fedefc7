"""When a map is judged: now and then while it grows, and at the end; and what is emitted of it."""

from __future__ import annotations

from collections.abc import Callable

from engine.cpu_time import Stage, charged_to
from engine.events import VerdictChanged
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.verdict.map_evidence import PAIRS_PER_KEYFRAME, Beside, gather
from engine.mapping.verdict.part_evidence import NUM_ASKED
from engine.mapping.verdict.verdict import broken_off, judge
from engine.matching.scene_graph import SceneGraph
from engine.ports import EventSink
from engine.types import Verdict, VerdictLevel

_LEAST_REGISTERED = 8  # of a growing map: smaller ones still change with every keyframe
_LEAST_KEYFRAMES = 12  # or so many came, whatever fits
_LEAST_GROWTH = 10  # keyframes, registered or not, since the last time
_GROWTH_RATIO = 0.5  # likewise, of those before
_LIVE_ASKED = 2  # pairs that contradict a part, for third views, while the map grows
# Pairs of each keyframe that are examined while the map grows: where these few do not find it good,
# which three of one keyframe may fail to by chance, as many as at the end.
_LIVE_PAIRS = (3, PAIRS_PER_KEYFRAME)


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
        self._is_final = False
        self._num_registered = 0  # keyframes when the map was judged last
        self._num_keyframes = 0  # likewise, registered or not

    @property
    def verdict(self) -> Verdict:
        """What was said of the map last."""
        return self._verdict

    def watch(self, sparse_map: SparseMap, beside: Callable[[], Beside]) -> None:
        """Judges a growing map when it has changed much since the last time."""
        num_registered, num = sparse_map.num_registered, len(self._graph.keyframe_ids)
        if not self._num_keyframes:
            is_due = num_registered >= _LEAST_REGISTERED or num >= _LEAST_KEYFRAMES
        else:
            is_due = _has_grown(num, self._num_keyframes) or _has_grown(
                num_registered, self._num_registered
            )
        if is_due:
            self._judge(sparse_map, beside())

    def judge(self, sparse_map: SparseMap, beside: Beside) -> None:
        """Judges a map at its end, which may be empty, with what stands beside it.

        What is said then is emitted in its last words, also where its causes are the same.
        """
        self._judge(sparse_map, beside, is_final=True)
        self._is_final = True

    def end(self) -> None:
        """Doubts a map that was not judged at its end: the run broke off before."""
        if not self._is_final:
            self._is_final = True
            self._change(broken_off(self._verdict), is_final=True)

    @charged_to(Stage.VERDICT)
    def _judge(self, sparse_map: SparseMap, beside: Beside, *, is_final: bool = False) -> None:
        self._num_registered = sparse_map.num_registered
        self._num_keyframes = len(self._graph.keyframe_ids)
        for pairs_per_keyframe in (PAIRS_PER_KEYFRAME,) if is_final else _LIVE_PAIRS:
            evidence = gather(
                sparse_map,
                self._graph,
                beside,
                pairs_per_keyframe=pairs_per_keyframe,
                num_asked=NUM_ASKED if is_final else _LIVE_ASKED,
                asks_of_all=is_final,
            )
            verdict = judge(evidence)
            if verdict.level is VerdictLevel.GOOD:
                break
        self._change(verdict, is_final=is_final)

    def _change(self, verdict: Verdict, *, is_final: bool = False) -> None:
        former, self._verdict = self._verdict, verdict
        if _causes(former) != _causes(verdict) or (is_final and former != verdict):
            self._emit(VerdictChanged(verdict=verdict, is_final=is_final))


def _has_grown(num: int, before: int) -> bool:
    return abs(num - before) >= max(_LEAST_GROWTH, _GROWTH_RATIO * before)


def _causes(verdict: Verdict) -> tuple[VerdictLevel, frozenset[str]]:
    return verdict.level, frozenset(reason.kind for reason in verdict.reasons)
