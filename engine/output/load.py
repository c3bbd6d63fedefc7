"""How busy a run is: CPU time by stage, lateness of the event loop, waits in queues.

Of the present part of a run only; like the CPU time of its process, nothing of it is resumed.
"""

from __future__ import annotations

import heapq
import time
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from engine.cpu_time import Stage, cpu_by_stage
from engine.events import LoadMeasured

_NUM_STALLS = 5  # that are listed


class QueueName(StrEnum):
    """What waits."""

    ARRIVALS = "arrivals"  # frames to be decoded; of a file with the time until there is room
    MAPPING = "mapping"  # tracked frames and keyframes, likewise
    EVENTS = "events"  # to be published: the oldest
    WRITES = "writes"  # to begin
    VIEWS = "views"  # what views are to show: the oldest


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Lateness:
    """How late the event loop woke up once, and what it waited for.

    Where the system does not say how long the loop waited for a core, that is in `lock_s`.
    """

    late_s: float
    own_s: float = field(compare=False)  # its own callbacks took
    core_s: float = field(compare=False)  # it waited for a core
    lock_s: float = field(compare=False)  # the rest: it waited for the interpreter lock
    at_s: float = field(compare=False)  # from the start of the run
    thread: str = field(compare=False, default="")  # that held the lock most likely; "": unknown
    stage: str = field(compare=False, default="")  # that it was in

    def as_record(self) -> dict[str, Any]:
        """The figures as a JSON-able mapping, in milliseconds."""
        parts = {"late": self.late_s, "own": self.own_s, "core": self.core_s, "lock": self.lock_s}
        return {
            "at_s": round(self.at_s, 2),
            **{f"{name}_ms": round(1e3 * part_s, 1) for name, part_s in parts.items()},
            "thread": self.thread,
            "stage": self.stage,
        }


class LoadStatistics:
    """Measures the load of a run. Waits may be added on any thread, all else on one.

    Memory: 4 bytes for each wait, and 8 for each measurement of the event loop's lateness.
    """

    def __init__(self) -> None:
        self._before_cpu_s = time.process_time()
        self._before_s = cpu_by_stage()
        self._late_s = array("f")
        self._late_but_for_cores_s = array("f")
        self._stalls: list[Lateness] = []  # the longest, as a heap
        self._waits_s: dict[QueueName, array[float]] = {name: array("f") for name in QueueName}
        self._last_sample_s = time.monotonic()
        self._last_cpu_s = dict(self._before_s)
        self._newest_late_s = 0.0  # the most since the last sample
        self._newest_waits_s = dict.fromkeys(QueueName, 0.0)

    def add_lateness(self, lateness: Lateness) -> None:
        """Adds one measurement of how late the event loop woke up."""
        self._late_s.append(lateness.late_s)
        self._late_but_for_cores_s.append(lateness.late_s - lateness.core_s)
        self._newest_late_s = max(self._newest_late_s, lateness.late_s)
        if len(self._stalls) < _NUM_STALLS:
            heapq.heappush(self._stalls, lateness)
        else:
            heapq.heappushpop(self._stalls, lateness)

    def add_wait(self, name: QueueName, wait_s: float) -> None:
        """Adds how long one thing waited in a queue."""
        self._waits_s[name].append(wait_s)
        self._newest_waits_s[name] = max(self._newest_waits_s[name], wait_s)

    def sample(self) -> LoadMeasured:
        """What was measured since the last sample."""
        now_s, cpu_s = time.monotonic(), cpu_by_stage()
        measured = LoadMeasured(
            period_s=round(now_s - self._last_sample_s, 3),
            cpu_s=_used(cpu_s, self._last_cpu_s),
            loop_late_s=round(self._newest_late_s, 4),
            queue_wait_s={
                name.value: round(wait_s, 4) for name, wait_s in self._newest_waits_s.items()
            },
        )
        self._last_sample_s, self._last_cpu_s = now_s, cpu_s
        self._newest_late_s = 0.0
        self._newest_waits_s.update(dict.fromkeys(QueueName, 0.0))
        return measured

    def figures(self, *, cpu_s: float) -> dict[str, Any]:
        """The figures of ``summary.json`` about what a run spent its time on.

        Args:
            cpu_s: of the process and its children; what no stage used is the rest.
        """
        by_stage = _used(cpu_by_stage(), self._before_s)
        by_stage["start"] = round(self._before_cpu_s, 3)  # before there was an engine
        by_stage["rest"] = round(cpu_s - sum(by_stage.values()), 3)
        return {
            "cpu_by_stage_s": by_stage,
            "loop_lag_ms": _percentiles_ms(self._late_s, [50, 99]),
            "loop_lag_but_for_cores_ms": _percentiles_ms(self._late_but_for_cores_s, [50, 99]),
            "loop_stalls": [one.as_record() for one in sorted(self._stalls, reverse=True)],
            "queue_wait_ms": {
                name.value: _percentiles_ms(waits_s, [50, 95])
                for name, waits_s in self._waits_s.items()
            },
        }


def _used(after_s: Mapping[Stage, float], before_s: Mapping[Stage, float]) -> dict[str, float]:
    return {stage.value: round(after_s[stage] - before_s[stage], 3) for stage in Stage}


def _percentiles_ms(values_s: array[float], ranks: Iterable[int]) -> dict[str, float | None]:
    names = [*(f"p{rank}" for rank in ranks), "max"]
    if not values_s:
        return dict.fromkeys(names)
    values_ms = 1e3 * np.percentile(values_s, [*ranks, 100])
    return {name: round(float(one), 1) for name, one in zip(names, values_ms, strict=True)}
