"""CPU time by stage of a run: each thread charges what it uses to the stage that it is in.

A thread of the run belongs to a stage (`charge_thread_to`); parts of its work are stages of their
own (`charged_to`). What a stage costs is read from the threads' CPU clocks at these boundaries,
which takes microseconds and is always on. Like `time.process_time`, it is of the whole process: of
two runs at a time, each is charged with both.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ContextDecorator
from enum import StrEnum
from types import TracebackType
from typing import Self


class Stage(StrEnum):
    """What CPU time is spent on."""

    DECODE = "decode"  # with what reading sources on threads of their own costs
    TRACK = "track"
    DESCRIBE = "describe"
    MATCH = "match"
    VERIFY = "verify"  # and what else the matching thread does, but for matching and places
    PLACES = "places"  # recognition of them
    POSE_FRAMES = "pose_frames"
    REGISTER = "register"
    TRIANGULATE = "triangulate"  # and extend, merge and filter tracks
    LOCAL_ADJUSTMENT = "local_ba"
    GLOBAL_ADJUSTMENT = "global_ba"
    WINDOWS = "windows"  # with all that trying them costs
    LENS_SEARCH = "lens_search"  # with all that the small maps cost
    VERDICT = "verdict"  # with all that judging costs
    DENSE_DEPTH = "dense_depth"  # depth maps, with what handing out their inputs costs
    DENSE_FUSION = "dense_fusion"  # dense points and what is made of them
    MAPPING = "mapping_rest"  # what else the mapper's thread does
    JOURNAL = "journal"
    SNAPSHOTS = "snapshots"  # with copies of the map
    TRAINING_FOLDER = "training_folder"  # images and models for trainers
    TABLES = "tables"  # what else the I/O thread does: events, frames, trajectories
    VIEWS = "views"  # with pictures of the map
    EVENT_LOOP = "event_loop"


# Stages that hold whatever other stages are entered in them.
_WHOLE = frozenset({Stage.WINDOWS, Stage.LENS_SEARCH, Stage.VERDICT, Stage.SNAPSHOTS, Stage.VIEWS})


class Account:
    """What one thread has used, by stage. The thread alone changes it; others read."""

    def __init__(self) -> None:
        thread = threading.current_thread()
        self.thread_ident = threading.get_ident()
        self.thread_native_id = threading.get_native_id()
        self.thread_name = thread.name
        self.stage: Stage | None = None  # what the thread is in
        self._spent_s: dict[Stage, float] = defaultdict(float)
        self._since_s = time.thread_time()
        self._clock = _clock_of_this_thread()

    def enter(self, stage: Stage | None) -> None:
        """Charges what was used until now, and the rest to another stage; for the own thread."""
        now_s = time.thread_time()
        if self.stage is not None:
            self._spent_s[self.stage] += now_s - self._since_s
        self._since_s = now_s
        self.stage = stage

    def used_s(self) -> float:
        """CPU seconds of the thread up to now; of one that ends just now, or cannot be read, 0."""
        if self._clock is None:
            return 0.0
        try:
            return time.clock_gettime(self._clock)
        except OSError:  # the thread has ended
            return 0.0

    def spent_s(self) -> dict[Stage, float]:
        """CPU seconds by stage, with what the stage that the thread is in has used by now."""
        stage, since_s, spent_s = self.stage, self._since_s, dict(self._spent_s)
        if stage is not None:
            spent_s[stage] = spent_s.get(stage, 0.0) + max(0.0, self.used_s() - since_s)
        return spent_s


def _clock_of_this_thread() -> int | None:
    """The CPU clock of the thread, by which others may read it."""
    try:
        return time.pthread_getcpuclockid(threading.get_ident())
    except AttributeError:  # not on this system
        return None


class _Ledger:
    """The accounts of all threads that go on, and what those used that have ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._accounts: list[Account] = []
        self._ended_s = dict.fromkeys(Stage, 0.0)

    def open(self) -> Account:
        """An account of the calling thread."""
        account = Account()
        with self._lock:
            self._accounts.append(account)
        return account

    def close(self, account: Account) -> None:
        """Keeps what the calling thread, which ends, has used, and not its account."""
        account.enter(None)
        with self._lock:
            self._accounts.remove(account)
            for stage, spent_s in account.spent_s().items():
                self._ended_s[stage] += spent_s

    def accounts(self) -> list[Account]:
        with self._lock:
            return list(self._accounts)

    def by_stage(self) -> dict[Stage, float]:
        with self._lock:
            total = dict(self._ended_s)
            for account in self._accounts:
                for stage, spent_s in account.spent_s().items():
                    total[stage] += spent_s
        return total


class _OwnAccount:
    """Has the account of one thread; the interpreter deletes it on that thread when it ends."""

    def __init__(self, ledger: _Ledger) -> None:
        self._ledger = ledger
        self.account = ledger.open()

    def __del__(self, _is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not _is_finalizing():
            self._ledger.close(self.account)


class _Thread(threading.local):
    """What is known of the calling thread."""

    own: _OwnAccount | None = None


_ledger = _Ledger()
_thread = _Thread()


def _own_account() -> Account:
    """The account of the calling thread, opened when it is first asked for."""
    if _thread.own is None:
        _thread.own = _OwnAccount(_ledger)
    return _thread.own.account


def charge_thread_to(stage: Stage | None) -> None:
    """Charges the calling thread to a stage from now on; None: to none."""
    _own_account().enter(stage)


class charged_to(ContextDecorator):  # noqa: N801 - read as a phrase, like contextlib's
    """Charges what is done in the context, or in the function, to a stage.

    In windows, verdicts, snapshots and views it stays charged to these.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._former: list[Stage | None] = []

    def _recreate_cm(self) -> Self:
        return type(self)(self._stage)

    def __enter__(self) -> Self:
        account = _own_account()
        self._former.append(account.stage)
        if account.stage not in _WHOLE:
            account.enter(self._stage)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        former, account = self._former.pop(), _own_account()
        if former is not account.stage:
            account.enter(former)


def accounts() -> list[Account]:
    """Of all threads that entered a stage and have not ended."""
    return _ledger.accounts()


def cpu_by_stage() -> dict[Stage, float]:
    """CPU seconds of the process by stage, up to now, also of threads that have ended."""
    return _ledger.by_stage()
