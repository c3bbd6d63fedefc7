"""Tasks of a cluster: what it does not do is done here, and it is not asked again at once."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from adapters.remote import tasks
from adapters.remote.cluster import Cluster, ClusterAwayError
from adapters.remote.messages import Message
from adapters.remote.tasks import RemoteTasks
from adapters.remote.windows import RemoteWindowSolver
from engine.window_types import WindowEstimate, WindowProblem
from engine.windows.model import WindowSolverConfig
from engine.windows.solver import solve_window


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


class FakeCluster:
    """Answers with what it is given, after a while."""

    def __init__(self, clock: Clock) -> None:
        self.answer: Message | None = None
        self.takes_s = 0.0
        self.is_there = True
        self.num_asked = 0
        self.counted: list[str] = []
        self.refused: list[str] = []
        self._clock = clock

    def is_usable(self) -> bool:
        return self.is_there

    def call(self, *_: Any, **__: Any) -> object:
        self.num_asked += 1
        return object()

    def result(self, call: object) -> Message:
        self._clock.now_s += self.takes_s
        if self.answer is None:
            raise ClusterAwayError("no")
        return self.answer

    def count(self, name: str) -> None:
        self.counted.append(name)

    def report_refusal(self, stage: str, words: str) -> None:
        self.refused.append(f"{stage}: {words}")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tasks, "time", clock)
    return clock


@pytest.fixture
def cluster(clock: Clock) -> FakeCluster:
    return FakeCluster(clock)


def ask(remote: RemoteTasks) -> object:
    return remote.result(
        "window", {}, {}, stage="windows", read=lambda fields, arrays: (fields, arrays)
    )


def test_a_cluster_that_refuses_at_once_is_asked_again(cluster: FakeCluster) -> None:
    remote = RemoteTasks(cast(Cluster, cluster))
    assert ask(remote) is None
    cluster.answer = Message(kind="result", fields={"is_done": True})
    assert ask(remote) == ({"is_done": True}, {})
    assert cluster.counted == ["windows_here", "windows_there"]


def test_a_cluster_that_was_waited_for_in_vain_is_left_alone_for_a_while(
    cluster: FakeCluster, clock: Clock
) -> None:
    remote = RemoteTasks(cast(Cluster, cluster))
    cluster.takes_s = 30.0
    assert ask(remote) is None
    assert ask(remote) is None
    assert cluster.num_asked == 1
    clock.now_s += 61.0
    cluster.answer = Message(kind="result")
    assert ask(remote) == ({}, {})


def test_a_cluster_that_is_away_is_not_asked(cluster: FakeCluster) -> None:
    cluster.is_there = False
    assert ask(RemoteTasks(cast(Cluster, cluster))) is None
    assert (cluster.num_asked, cluster.counted) == (0, ["windows_here"])


@pytest.mark.parametrize("answer", [None, Message(kind="result", fields={"status": "what"})])
def test_a_window_that_does_not_come_back_whole_is_solved_here(
    cluster: FakeCluster, answer: Message | None
) -> None:
    solved: list[WindowProblem] = []

    def here(problem: WindowProblem) -> WindowEstimate:
        solved.append(problem)
        return solve_window(problem, config=WindowSolverConfig())

    cluster.answer = answer
    problem = WindowProblem(
        tracks_xy=np.zeros((2, 1, 2)),
        is_visible=np.zeros((2, 1), bool),
        image_sizes=np.array([[10, 10]]),
    )
    RemoteWindowSolver(RemoteTasks(cast(Cluster, cluster)), here)(problem)
    assert solved == [problem]
    assert cluster.counted == ["windows_here"]
    assert len(cluster.refused) == (answer is not None)
