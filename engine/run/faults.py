"""Faults: what raises or hangs is reported and counted, and the run goes on without it.

A part that hangs cannot be stopped, since threads cannot be cancelled. Every call into one is made
on a thread of its own (`Guard`), and the engine stops waiting for a call that takes longer than the
configured limit: the thread is left behind, and the next call gets a new one.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import ParamSpec, TypeVar

from engine.config import FaultsConfig
from engine.cpu_time import Stage, charge_thread_to
from engine.errors import EngineError, HangError, PartOffError
from engine.events import ALSO_AN_EVENT, FaultKind, FaultOccurred, RunPart
from engine.ports import EventSink
from engine.types import FrameId

logger = logging.getLogger(__name__)

_NUM_SLICES = 10  # of the time that a call has
_STAGE_OF_PART = {
    RunPart.DECODING: Stage.DECODE,
    RunPart.DESCRIBING: Stage.DESCRIBE,
    RunPart.MATCHING: Stage.MATCH,
    RunPart.SECOND_MATCHING: Stage.MATCH,
    RunPart.PLACES: Stage.PLACES,
    RunPart.ADJUSTMENT: Stage.GLOBAL_ADJUSTMENT,
    RunPart.WINDOW: Stage.WINDOWS,
    RunPart.LENS_SEARCH: Stage.LENS_SEARCH,
    RunPart.DENSE: Stage.DENSE_DEPTH,
    RunPart.TRAINING: Stage.TRAINING_FOLDER,
}

Params = ParamSpec("Params")
Result = TypeVar("Result")
Wait = Callable[["Future[object]", float], bool]


class StoppedError(Exception):
    """What a call makes is not wanted any more: no fault, and raised between its steps only."""


def wait_for_call(result: Future[object], limit_s: float) -> bool:
    """Blocks until a call has ended, for so long at most; 0: for ever.

    The time is waited for in parts: one in which the whole process stood still (a suspended
    computer, a stopped job) counts once, however long it was.

    Returns:
        Whether the call has ended.
    """
    if not limit_s:
        wait([result])
    return any(wait([result], limit_s / _NUM_SLICES).done for _ in range(_NUM_SLICES))


class Faults:
    """Reports faults as events, and some in words. For any thread.

    Of each part the first is reported, and one whenever their number has doubled.

    Args:
        config: whether a fault is the end of the run.
        emit: takes the events.
        end: is called with a strict run's fault, in a line.
    """

    def __init__(
        self, config: FaultsConfig, *, emit: EventSink, end: Callable[[str], None]
    ) -> None:
        self._is_strict = config.strict
        self._emit = emit
        self._end = end
        self._lock = threading.Lock()
        self._counts: Counter[RunPart] = Counter()
        self._num_hangs = 0

    @property
    def num_hangs(self) -> int:
        """Parts that were left behind in a call, and may be in it still."""
        return self._num_hangs

    def report(
        self,
        part: RunPart,
        error: Exception,
        *,
        consequence: str,
        frame_id: FrameId | None = None,
    ) -> None:
        """Reports that a part raised, or hung where the error is a `HangError`.

        A part that is off was reported when it was called last.

        Args:
            part: what broke.
            error: what it raised.
            consequence: what the run does about it, in words.
            frame_id: the frame that it concerns.
        """
        detail = cause_of(error)
        if isinstance(error, PartOffError):
            logger.debug("%s; %s", detail, consequence)
            return
        with self._lock:
            self._counts[part] += 1
            self._num_hangs += isinstance(error, HangError)
            num_faults = self._counts[part]
        # What the engine or an adapter raises on purpose says it all.
        trace = None if isinstance(error, EngineError) else error
        is_shown = num_faults & (num_faults - 1) == 0  # the first, and when it has doubled
        level = logging.ERROR if is_shown else logging.DEBUG
        words = f"{part.value} failed: {detail}; {consequence}"
        # A traceback is in no event.
        extra = ALSO_AN_EVENT if trace is None else None
        logger.log(level, "%s", words, exc_info=trace, extra=extra)
        self._emit(
            FaultOccurred(
                part=part,
                kind=FaultKind.HUNG if isinstance(error, HangError) else FaultKind.RAISED,
                detail=detail,
                consequence=consequence,
                num_faults=num_faults,
                frame_id=frame_id,
            )
        )
        self.end_if_strict(part, error)

    def end_if_strict(self, part: RunPart, error: Exception) -> None:
        """Ends a strict run for what a part could not do, a fault or not."""
        if self._is_strict:
            self._end(f"{part.value} failed, and the run is strict: {cause_of(error)}")


def cause_of(error: BaseException) -> str:
    """What broke first, in a line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    name, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, EngineError) and text:
        return text
    return f"{name}: {text}" if text else name


class Guard:
    """Calls that may hang, each on a thread that is left behind if it does. For any thread.

    Args:
        part: of the run, for messages.
        limit_s: a call that takes longer has hung; 0: none has.
        max_hangs: after which no call is made any more.
        wait: waits for a call.
        on_off: is called, by the thread whose call hung, when no more are made.
    """

    def __init__(
        self,
        part: RunPart,
        *,
        limit_s: float,
        max_hangs: int,
        wait: Wait = wait_for_call,
        on_off: Callable[[], None] = lambda: None,
    ) -> None:
        self._part = part
        self._limit_s = limit_s
        self._max_hangs = max_hangs
        self._wait = wait
        self._on_off = on_off
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._num_hangs = 0

    @property
    def num_hangs(self) -> int:
        """Calls that were given up; their threads may still be there."""
        return self._num_hangs

    @property
    def is_off(self) -> bool:
        """Whether so many calls hung that none is made any more."""
        return self._num_hangs >= self._max_hangs

    def call(self, use: Callable[[], Result], *, times: int = 1) -> Result:
        """Calls ``use`` on another thread and blocks until it returns or raises.

        Args:
            use: what may hang.
            times: the limit of time is for one of so many equal parts of the work.

        Raises:
            HangError: it did not return in time.
            PartOffError: no call is made any more.
            Whatever ``use`` raises.
        """
        if self.is_off:
            raise PartOffError(f"{self._part.value} hung {self._num_hangs} times and is off")
        with self._lock:
            worker = self._idle.pop() if self._idle else _Worker(self._part)
        limit_s = self._limit_s * max(times, 1)
        result = worker.submit(use)
        if not self._wait(result, limit_s):  # type: ignore[arg-type]  # a future is read only
            worker.end()
            with self._lock:
                self._num_hangs += 1
                is_last = self._num_hangs == self._max_hangs
            if is_last:
                self._on_off()
            off = " and is off from now on" * is_last
            raise HangError(f"{self._part.value} has not ended after {limit_s:g} s{off}")
        with self._lock:
            self._idle.append(worker)
        return result.result()

    def close(self) -> None:
        """Ends the threads that wait for calls."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.end()


class _Worker:
    """A thread that runs one call after the other; the interpreter does not wait for it."""

    def __init__(self, part: RunPart) -> None:
        self._stage = _STAGE_OF_PART.get(part)
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=part.value, daemon=True).start()

    def submit(self, use: Callable[[], Result]) -> Future[Result]:
        result: Future[Result] = Future()
        self._calls.put(functools.partial(_run, use, result))
        return result

    def end(self) -> None:
        """Ends the thread after the call that it runs."""
        self._calls.put(None)

    def _work(self) -> None:
        charge_thread_to(self._stage)
        while (call := self._calls.get()) is not None:
            call()
            del call  # holds what was called with


def _run(use: Callable[[], Result], result: Future[Result]) -> None:
    try:
        result.set_result(use())
    except BaseException as error:  # noqa: BLE001 - it is raised where the call was made
        result.set_exception(error)
