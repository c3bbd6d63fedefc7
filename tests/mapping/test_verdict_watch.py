"""The watch over a growing map: it judges now and then, and emits only what changed."""

from __future__ import annotations

from engine.events import Event, VerdictChanged
from engine.mapping.map_evidence import Beside
from engine.mapping.verdict_watch import VerdictWatch
from engine.types import FrameId, VerdictLevel
from tests.mapping.test_map_evidence import graph_of, move
from tests.support.synthetic import SyntheticWorld, grow, map_of_keyframes, round_path

NUM = 24


class Watched:
    """A map that grows under a watch, and what the watch emitted."""

    def __init__(self) -> None:
        self.world = SyntheticWorld(round_path(NUM, turns=0.8), noise_px=0.3)
        self.sparse_map = map_of_keyframes(self.world)
        self.events: list[Event] = []
        self.num_asked = 0
        self.watch = VerdictWatch(graph=graph_of(self.sparse_map), emit=self.events.append)

    def grow_to(self, num: int) -> None:
        """Registers keyframes, and lets the watch see each."""
        for number in range(self.sparse_map.num_registered + 1, num + 1):
            if number == 2:
                grow(self.sparse_map, self.world, (1, 2))
            elif number > 2:
                self.sparse_map.register(FrameId(number), min_inlier_ratio=0.25)
                self.sparse_map.triangulate(FrameId(number))
            self.watch.watch(self.sparse_map, self._beside)

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


def test_a_run_without_a_map_says_why() -> None:
    watched = Watched()
    watched.watch.judge(watched.sparse_map, Beside())
    assert watched.levels == [VerdictLevel.WRONG]
    assert watched.watch.verdict.reasons[0].kind == "no_map"
