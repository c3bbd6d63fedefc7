"""The watch over a growing map: it judges now and then, and emits only what changed."""

from __future__ import annotations

import pytest

from engine.events import Event, VerdictChanged
from engine.mapping.verdict import verdict_watch
from engine.mapping.verdict.map_evidence import Beside, MapEvidence
from engine.mapping.verdict.verdict_watch import VerdictWatch
from engine.types import FrameId, Verdict, VerdictLevel
from tests.mapping.verdict.test_map_evidence import move
from tests.support.synthetic import SyntheticWorld, grow, map_of_keyframes, round_path, scene_graph

NUM = 24


class Watched:
    """A map that grows under a watch, and what the watch emitted."""

    def __init__(self) -> None:
        self.world = SyntheticWorld(round_path(NUM, turns=0.8), noise_px=0.3)
        self.sparse_map = map_of_keyframes(self.world)
        self.events: list[Event] = []
        self.num_asked = 0
        self.graph = scene_graph()
        self.watch = VerdictWatch(graph=self.graph, emit=self._emit)

    def grow_to(self, num: int, *, fits: bool = True) -> None:
        """Adds keyframes, registers those that fit, and lets the watch see each."""
        for number in range(len(self.graph.keyframe_ids) + 1, num + 1):
            frame_id = FrameId(number)
            self.graph.add_keyframe(self.sparse_map.keyframe(frame_id))
            for other, verified in self.sparse_map.neighbors(frame_id).items():
                if other < frame_id:
                    self.graph.record_pair(verified)
            if not fits:
                pass
            elif number == 2:
                grow(self.sparse_map, self.world, (1, 2))
            elif number > 2:
                self.sparse_map.register(frame_id, min_inlier_ratio=0.25)
                self.sparse_map.triangulate(frame_id)
            self.watch.watch(self.sparse_map, self._beside)

    def _emit(self, event: Event) -> None:
        self.events.append(event)

    def _beside(self) -> Beside:
        self.num_asked += 1
        return Beside()

    @property
    def levels(self) -> list[VerdictLevel]:
        return [e.verdict.level for e in self.events if isinstance(e, VerdictChanged)]


def test_a_growing_map_is_judged_a_few_times() -> None:
    watched = Watched()
    watched.grow_to(7)
    assert watched.num_asked == 0
    watched.grow_to(NUM)
    assert watched.num_asked == 2  # at 8 and 18 keyframes


def test_what_changes_is_emitted_once() -> None:
    watched = Watched()
    watched.grow_to(NUM)
    watched.watch.judge(watched.sparse_map, Beside())
    assert watched.watch.verdict.level is VerdictLevel.GOOD
    num_before = len(watched.events)
    move(watched.sparse_map, FrameId(12), (0.0, 0.0, 2.0))
    for _ in range(2):
        watched.watch.judge(watched.sparse_map, Beside())
    assert watched.levels[num_before:] == [VerdictLevel.DOUBTFUL]
    assert "frame" in watched.watch.verdict.reasons[0].sentence


def test_a_growing_map_is_doubted_only_by_as_many_pairs_as_at_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    examined: list[int] = []

    def judge_by_number(evidence: MapEvidence) -> Verdict:
        examined.append(evidence.pairs.num_pairs)
        is_doubted = evidence.pairs.num_pairs < 50
        return Verdict(level=VerdictLevel.DOUBTFUL if is_doubted else VerdictLevel.GOOD)

    monkeypatch.setattr(verdict_watch, "judge", judge_by_number)
    watched = Watched()
    watched.grow_to(NUM)
    assert len(examined) > watched.num_asked == 2
    assert watched.watch.verdict.level is VerdictLevel.GOOD
    few, many = examined[-2:]
    assert few < 50 <= many


def test_keyframes_that_fit_nowhere_are_said_while_they_come() -> None:
    watched = Watched()
    watched.grow_to(9)
    watched.grow_to(NUM, fits=False)
    assert watched.levels == [VerdictLevel.DOUBTFUL]
    assert watched.watch.verdict.reasons[0].kind == "missing_keyframes"


def test_a_run_without_a_map_says_why() -> None:
    watched = Watched()
    watched.grow_to(13, fits=False)
    assert watched.levels == [VerdictLevel.WRONG]
    assert watched.watch.verdict.reasons[0].kind == "no_map"


def test_a_run_that_breaks_off_has_no_good_map() -> None:
    watched = Watched()
    watched.grow_to(12)
    assert watched.levels == []
    watched.watch.end()
    watched.watch.end()
    assert watched.levels == [VerdictLevel.DOUBTFUL]
    assert watched.watch.verdict.reasons[0].kind == "broke_off"


def test_a_map_judged_at_its_end_stays_as_it_was_judged() -> None:
    watched = Watched()
    watched.grow_to(NUM)
    watched.watch.judge(watched.sparse_map, Beside())
    watched.watch.end()
    assert watched.levels == []


def test_the_last_words_are_emitted_where_only_they_changed() -> None:
    watched = Watched()
    watched.grow_to(9)
    watched.grow_to(NUM, fits=False)
    (live,) = watched.events
    watched.watch.judge(watched.sparse_map, Beside())
    final = watched.events[-1]
    assert isinstance(live, VerdictChanged) and isinstance(final, VerdictChanged)
    assert final.verdict == watched.watch.verdict
    assert final.verdict.reasons[0].sentence != live.verdict.reasons[0].sentence
