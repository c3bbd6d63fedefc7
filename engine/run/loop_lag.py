"""How late the event loop wakes up, and what it waited for then."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Self

from engine.cpu_time import Account, Stage, accounts, charge_thread_to
from engine.output.load import Lateness

_PERIOD_S = 0.1
_LEAST_STALL_S = 0.01  # of which it is found out who held the interpreter lock
_LEAST_HELD_RATIO = 0.2  # of the stall, that who held the lock computed; the cores may be busy
_TRIAL_S = 0.0005  # for which the lock is kept to find out who computes without it
_COMPUTING_RATIO = 0.2  # of that time
_SCHEDULER_FIGURES = "/proc/thread-self/schedstat"  # Linux: ns on a core, ns waiting for one
_MAX_FIGURES_BYTES = 128


@asynccontextmanager
async def lag_measured(
    report: Callable[[Lateness], None], *, clock: Callable[[], float]
) -> AsyncIterator[None]:
    """Reports, several times a second, how late the event loop woke up.

    The thread of the loop is charged to its stage while the context is open.

    Args:
        report: takes each measurement.
        clock: seconds since the start of the run.
    """

    async def measure() -> None:
        with _SchedulerFigures() as scheduler:
            before = _Clocks.now(scheduler)
            while True:
                lateness, before = await _measure_once(before, scheduler, clock=clock)
                report(lateness)

    charge_thread_to(Stage.EVENT_LOOP)
    measuring = asyncio.create_task(measure(), name="loop lag")
    try:
        yield
    finally:
        measuring.cancel()
        charge_thread_to(None)


class _SchedulerFigures:
    """How long the thread that opens this waited for cores; 0 where the system does not say."""

    def __enter__(self) -> Self:
        try:
            self._file: int | None = os.open(_SCHEDULER_FIGURES, os.O_RDONLY)
        except OSError:
            self._file = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)

    def waited_s(self) -> float:
        if self._file is None:
            return 0.0
        return 1e-9 * int(os.pread(self._file, _MAX_FIGURES_BYTES, 0).split()[1])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Clocks:
    """What was used and waited for up to a moment."""

    waited_s: float  # for cores, by the event loop
    own_s: float  # CPU seconds of the event loop
    cpu_s: dict[Account, float]  # of the run's other threads

    @classmethod
    def now(cls, scheduler: _SchedulerFigures) -> _Clocks:
        cpu_s = _cpu_s()
        return cls(waited_s=scheduler.waited_s(), own_s=time.thread_time(), cpu_s=cpu_s)


async def _measure_once(
    before: _Clocks, scheduler: _SchedulerFigures, *, clock: Callable[[], float]
) -> tuple[Lateness, _Clocks]:
    due_s = time.monotonic() + _PERIOD_S
    await asyncio.sleep(_PERIOD_S)
    late_s = max(0.0, time.monotonic() - due_s)
    # Before anything here gives the interpreter lock away, and who held it goes on.
    holder = _holder(before.cpu_s, late_s=late_s) if late_s >= _LEAST_STALL_S else None
    after = _Clocks.now(scheduler)
    own_s = min(late_s, after.own_s - before.own_s)
    core_s = min(late_s - own_s, after.waited_s - before.waited_s)
    lock_s = late_s - own_s - core_s
    if lock_s < _LEAST_STALL_S:
        holder = None
    lateness = Lateness(
        late_s=late_s,
        own_s=own_s,
        core_s=core_s,
        lock_s=lock_s,
        at_s=clock(),
        thread="" if holder is None else holder.thread_name,
        stage="" if holder is None or holder.stage is None else holder.stage.value,
    )
    return lateness, after


def _cpu_s() -> dict[Account, float]:
    """CPU seconds of the run's other threads."""
    own = threading.get_ident()
    return {one: one.used_s() for one in accounts() if one.thread_ident != own}


def _holder(before_s: dict[Account, float], *, late_s: float) -> Account | None:
    """The thread that held the interpreter lock until the event loop got it just now.

    It computed most, and waits now for the lock: while that is kept, only threads go on that
    compute without it.
    """
    after_s = _cpu_s()
    until_s = time.perf_counter() + _TRIAL_S
    while time.perf_counter() < until_s:
        pass
    later_s = _cpu_s()
    used_s = {
        account: cpu_s - before_s.get(account, 0.0)
        for account, cpu_s in after_s.items()
        if later_s.get(account, 0.0) - cpu_s < _COMPUTING_RATIO * _TRIAL_S
    }
    holder = max(used_s, key=lambda one: used_s[one], default=None)
    return holder if holder and used_s[holder] >= _LEAST_HELD_RATIO * late_s else None
