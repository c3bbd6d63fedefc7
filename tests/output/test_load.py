"""Figures of how busy a run is."""

from __future__ import annotations

import json
import time

import pytest

from engine.cpu_time import Stage, charged_to
from engine.output.load import Lateness, LoadStatistics, QueueName


def late(late_s: float, *, core_s: float = 0.0) -> Lateness:
    return Lateness(
        late_s=late_s,
        own_s=0.0,
        core_s=core_s,
        lock_s=late_s - core_s,
        at_s=2.0,
        thread="mapping_0",
        stage="local_ba",
    )


def compute(cpu_s: float) -> None:
    until_s = time.thread_time() + cpu_s
    while time.thread_time() < until_s:
        sum(range(1000))


def test_a_run_that_measured_nothing_has_every_figure() -> None:
    figures = LoadStatistics().figures(cpu_s=time.process_time())
    assert set(figures["cpu_by_stage_s"]) == {*(one.value for one in Stage), "start", "rest"}
    assert figures["loop_lag_ms"] == {"p50": None, "p99": None, "max": None}
    assert figures["loop_lag_but_for_cores_ms"] == figures["loop_lag_ms"]
    assert figures["loop_stalls"] == []
    assert figures["queue_wait_ms"] == {
        one.value: {"p50": None, "p95": None, "max": None} for one in QueueName
    }
    json.dumps(figures, allow_nan=False)


def test_stages_and_the_rest_add_up_to_the_cpu_time_of_the_process() -> None:
    load = LoadStatistics()
    with charged_to(Stage.WINDOWS):
        compute(0.02)
    compute(0.03)
    cpu_s = time.process_time()
    by_stage_s = load.figures(cpu_s=cpu_s)["cpu_by_stage_s"]
    assert by_stage_s["windows"] == pytest.approx(0.02, abs=0.01)
    assert by_stage_s["rest"] > 0.02
    assert sum(by_stage_s.values()) == pytest.approx(cpu_s, abs=0.002)


def test_the_lag_of_the_event_loop_is_reported_at_its_worst_with_and_without_busy_cores() -> None:
    load = LoadStatistics()
    for milliseconds in range(101):  # 0, 1, ..., 100 ms
        load.add_lateness(late(milliseconds / 1000.0, core_s=milliseconds / 2000.0))
    figures = load.figures(cpu_s=0.0)
    assert figures["loop_lag_ms"] == {"p50": 50.0, "p99": 99.0, "max": 100.0}
    assert figures["loop_lag_but_for_cores_ms"] == {"p50": 25.0, "p99": 49.5, "max": 50.0}


def test_the_longest_stalls_are_listed_with_who_held_the_lock() -> None:
    load = LoadStatistics()
    for milliseconds in (30, 20, 90, 10, 70, 40, 50):
        load.add_lateness(late(milliseconds / 1000.0))
    stalls = load.figures(cpu_s=0.0)["loop_stalls"]
    assert [one["late_ms"] for one in stalls] == [90.0, 70.0, 50.0, 40.0, 30.0]
    assert stalls[0] == {
        "at_s": 2.0,
        "late_ms": 90.0,
        "own_ms": 0.0,
        "core_ms": 0.0,
        "lock_ms": 90.0,
        "thread": "mapping_0",
        "stage": "local_ba",
    }


def test_waits_are_reported_by_queue() -> None:
    load = LoadStatistics()
    for number in range(1, 22):
        load.add_wait(QueueName.WRITES, 0.01 * number)
    waits_ms = load.figures(cpu_s=0.0)["queue_wait_ms"]
    assert waits_ms["writes"] == {"p50": 110.0, "p95": 200.0, "max": 210.0}
    assert waits_ms["arrivals"] == {"p50": None, "p95": None, "max": None}


def test_a_sample_holds_what_was_measured_since_the_last_one() -> None:
    load = LoadStatistics()
    load.add_lateness(late(0.05))
    load.add_lateness(late(0.02))
    load.add_wait(QueueName.ARRIVALS, 0.3)
    with charged_to(Stage.JOURNAL):
        compute(0.01)
    first, second = load.sample(), load.sample()

    assert first.loop_late_s == 0.05
    assert first.queue_wait_s["arrivals"] == 0.3
    assert first.cpu_s["journal"] >= 0.01
    assert first.period_s >= 0.01
    assert second.loop_late_s == 0.0
    assert second.queue_wait_s == {one.value: 0.0 for one in QueueName}
    assert second.cpu_s["journal"] == 0.0
