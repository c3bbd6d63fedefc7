"""Calls to a cluster, and the process that carries them; a thread stands for that process."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.remote import cluster as cluster_module
from adapters.remote.cluster import Cluster, ClusterAwayError
from adapters.remote.messages import Message
from engine.config import load_config
from tests.support.fake_cluster import AWAY_S, WAIT_S, FakeProcess, FakeProcesses, result

STALL_S = 600.0  # what a process said counts for the whole test

Open = Callable[[Any], Cluster]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Makes clusters, not yet connected, whose processes are started by what is given."""
    clusters: list[Cluster] = []
    monkeypatch.setattr(cluster_module, "_FIRST_PAUSE_S", 0.001)
    settings = [
        "remote.address=nowhere:1",
        f"remote.stall_s={STALL_S}",
        f"remote.connect_timeout_s={WAIT_S}",
    ]

    def make(processes: Any) -> Cluster:
        stand_in = SimpleNamespace(
            Popen=processes,
            DEVNULL=subprocess.DEVNULL,
            TimeoutExpired=subprocess.TimeoutExpired,
        )
        monkeypatch.setattr(cluster_module, "subprocess", stand_in)
        config = load_config(settings=settings).remote
        clusters.append(Cluster(config, spec={}, provide=lambda key: None))
        return clusters[-1]

    yield make
    for one in clusters:
        one.close()


def wait_for(is_so: Callable[[], bool]) -> None:
    """Waits until something is so; fails when it never comes to be."""
    waiting = threading.Event()
    for _ in range(int(WAIT_S / 0.005)):
        if is_so():
            return
        waiting.wait(0.005)
    pytest.fail("it never came to be")


def test_a_call_that_several_wait_for_keeps_its_result_for_those_who_come_later(
    opened: Open,
) -> None:
    processes = FakeProcesses()
    cluster = opened(processes)
    assert cluster.start()
    (process,) = processes.all
    call = cluster.call("match", {}, {}, stage="match")
    process.answers(silent_s=AWAY_S)
    with pytest.raises(ClusterAwayError, match="does not answer"):
        cluster.result(call)
    process.answers()
    process.channel.send(result(call.message, {"pairs": 2}))
    assert call.result.result(WAIT_S).fields == {"pairs": 2}
    assert cluster.result(call).fields == {"pairs": 2}
    assert cluster.result(call).fields == {"pairs": 2}


def test_a_call_that_nobody_asks_for_is_kept_no_longer_than_until_its_result(
    opened: Open,
) -> None:
    cluster = opened(FakeProcesses(result))
    assert cluster.start()
    calls = [cluster.call("match", {}, {}, stage="match", is_ahead=True) for _ in range(5)]
    for call in calls:
        call.result.result(WAIT_S)
    assert not cluster._calls


def test_calls_on_their_way_end_with_their_process_and_another_one_is_started(
    opened: Open,
) -> None:
    processes = FakeProcesses()
    cluster = opened(processes)
    assert cluster.start()
    call = cluster.call("match", {}, {}, stage="match")
    processes.all[0].kill()
    with pytest.raises(ClusterAwayError, match="ended"):
        cluster.result(call)
    wait_for(cluster.is_usable)
    assert len(processes.all) == 2
    assert cluster.figures()["process_ends"] == 1


def test_closing_while_a_process_is_being_started_ends_that_process(opened: Open) -> None:
    processes: list[FakeProcess] = []
    closing: list[threading.Thread] = []

    def start_slowly(command: list[str], **_: object) -> FakeProcess:
        closing.append(threading.Thread(target=cluster.close))
        closing[0].start()
        wait_for(lambda: cluster._is_closed)
        processes.append(FakeProcess(int(command[-1]), reply=lambda call: None))
        return processes[0]

    cluster = opened(start_slowly)
    assert not cluster.start()
    closing[0].join()
    assert processes[0].has_ended
    assert not cluster._supervising.is_alive()


def test_a_process_that_cannot_be_started_is_tried_again(opened: Open) -> None:
    processes = FakeProcesses()
    num_tried = 0

    def start(command: list[str], **_: object) -> FakeProcess:
        nonlocal num_tried
        num_tried += 1
        if num_tried == 1:
            raise OSError(12, "Cannot allocate memory")
        return processes(command)

    cluster = opened(start)
    assert cluster.start()
    assert num_tried == 2
    assert "Cannot allocate memory" in cluster.trouble


def test_a_process_that_sends_nonsense_is_replaced(
    opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    processes = FakeProcesses()
    cluster = opened(processes)
    assert cluster.start()
    processes.all[0].channel.send(Message(kind="alive"))
    wait_for(lambda: len(processes.all) == 2 and cluster.is_usable())
    assert processes.all[0].has_ended
    assert "silent_s" in cluster.trouble
    assert "started again" in caplog.text


def test_a_cluster_that_is_away_from_the_start_is_warned_of_once(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = opened(FakeProcesses(is_up=False))
    monkeypatch.setattr(
        cluster, "_config", cluster._config.model_copy(update={"connect_timeout_s": 0.01})
    )
    assert not cluster.start()
    warnings: list[str] = []
    cluster.report_to(warnings.append)
    cluster._report_changes()
    (words,) = warnings
    assert words.startswith("the cluster at nowhere:1 is away")
    assert "done here" in words
    assert cluster.figures()["times_away"] == 1


def test_work_that_the_cluster_refuses_is_counted_and_warned_of_once_a_stage(
    opened: Open,
) -> None:
    def refuse(call: Message) -> Message:
        words = f"Traceback:\nno room for {call.number}"
        return Message(kind="failed", number=call.number, fields={"words": words})

    cluster = opened(FakeProcesses(refuse))
    warnings: list[str] = []
    cluster.report_to(warnings.append)
    assert cluster.start()
    for stage in ("describe", "match", "match", "describe"):
        with pytest.raises(ClusterAwayError, match="no room"):
            cluster.result(cluster.call("any", {}, {}, stage=stage))
    assert len(warnings) == 2
    assert "(describe)" in warnings[0]
    assert "no room for 1" in warnings[0]
    assert "(match)" in warnings[1]
    figures = cluster.figures()
    assert (figures["calls_refused"], figures["times_away"]) == (4, 0)


def test_a_call_whose_turn_has_come_is_urgent_also_when_its_states_are_sent_again(
    opened: Open,
) -> None:
    processes = FakeProcesses()
    cluster = opened(processes)
    assert cluster.start()
    call = cluster.call("match", {}, {}, stage="match", is_ahead=True)
    cluster.make_urgent(call)
    (process,) = processes.all
    number = call.message.number
    process.channel.send(Message(kind="unknown", number=number, fields={"keys": ["a"]}))
    wait_for(lambda: [one.kind for one in process.received].count("urgent") == 2)
    assert [one.kind for one in process.received[1:]] == ["call", "urgent", "call", "urgent"]
