"""The cluster as a run sees it: calls go to a process of ours, which is started again when it ends.

See `cluster_process` for why there is one. Nothing here blocks on the cluster for longer than it
answers: who waits for a result stops when the cluster counts as away, and does the work itself.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from adapters.remote.messages import Arrays, BrokenMessageError, Channel, Fields, Message
from engine.config import RemoteConfig
from engine.errors import InferenceError

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.5  # before the process is started again; it doubles
_LAST_PAUSE_S = 10.0
_SEND_TIMEOUT_S = 5  # a process that does not read for so long is ended
_SILENT_STALLS = 4  # times the stall after which a process that says nothing is ended
_POLL_PERIOD_S = 0.2
_MAX_RESENT = 3  # times that a call is sent with states that the process does not know

ProvideState = Callable[[str], Message | None]
Warn = Callable[[str], None]


class ClusterAwayError(Exception):
    """The cluster does not do it; in words."""


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """A call on its way."""

    message: Message
    keys: tuple[str, ...]  # of the states that it needs
    result: Future[Message]
    stage: str
    began_s: float
    num_resent: int = 0
    is_urgent: bool = False  # its turn has come since


class Cluster:
    """Sends calls to a cluster. For any thread.

    Args:
        config: where it is.
        spec: the matcher that its workers hold; see `open_hosted`.
        provide: the state of a keyframe, or what it is made from, by its key; None: nobody knows.
    """

    def __init__(
        self, config: RemoteConfig, *, spec: Mapping[str, Any], provide: ProvideState
    ) -> None:
        self._config = config
        self._provide = provide
        self._settings = {
            "remote": config.model_dump(mode="json"),
            "spec": dict(spec),
            "run": uuid.uuid4().hex,
        }
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._channel: Channel | None = None
        self._link: Channel | None = None  # the channel, also before calls may be sent over it
        self._known: set[str] = set()  # keys of states that the process has
        self._calls: dict[int, Call] = {}
        self._alive_at_s = 0.0  # from the process
        self._silent_s: float | None = None  # of the cluster then; None: it never answered
        self._num_up = 0
        self._trouble = ""
        self._is_closed = False
        self._was_usable: bool | None = None  # as reported last; None: not yet
        self._refused: set[str] = set()  # stages of work that the cluster refused
        self._warn: Warn = logger.warning
        self._figures: Counter[str] = Counter()
        self._of_process: Counter[str] = Counter()  # figures of the present process
        self._of_former: Counter[str] = Counter()  # and of those before
        self._bytes_sent: Counter[str] = Counter()  # by stage
        self._waited_s: defaultdict[str, float] = defaultdict(float)
        self._supervising = threading.Thread(target=self._supervise, name="cluster", daemon=True)

    # -- whether it is there ----------------------------------------------------------------------

    def start(self) -> bool:
        """Connects; returns whether the cluster answered in time."""
        self._supervising.start()
        ends_s = time.monotonic() + self._config.connect_timeout_s
        with self._changed:
            while not self._is_usable() and time.monotonic() < ends_s and not self._is_closed:
                self._changed.wait(_POLL_PERIOD_S)
            self._was_usable = is_usable = self._is_usable()
            self._figures["times_away"] += not is_usable
        return is_usable

    @property
    def trouble(self) -> str:
        """What went wrong last, in words."""
        return self._trouble

    def report_to(self, warn: Warn) -> None:
        """Gives warnings, in words, when the cluster is away, from the start, too, and when back.

        And once of each stage, when the cluster answers, but does not do work of it.
        """
        self._warn = warn
        with self._lock:
            is_away = self._was_usable is False
        if is_away:
            words = f"{self._trouble or 'it does not answer'}; work is done here until it answers"
            warn(f"the cluster at {self._config.address} is away: {words}")

    def is_usable(self) -> bool:
        """Whether the cluster answers."""
        with self._lock:
            return self._is_usable()

    def _is_usable(self) -> bool:
        if self._channel is None or self._silent_s is None or not self._num_up:
            return False
        silent_s = time.monotonic() - self._alive_at_s + self._silent_s
        return silent_s <= self._config.stall_s

    # -- calls ------------------------------------------------------------------------------------

    def call(
        self,
        method: str,
        fields: Fields,
        arrays: Arrays,
        *,
        stage: str,
        keys: Sequence[str] = (),
        is_ahead: bool = False,
    ) -> Call:
        """Begins a call; its states are sent first where the process does not know them.

        Args:
            method: of the worker.
            fields: of the call.
            arrays: of the call.
            stage: of the run, whose bytes and seconds it counts to.
            keys: of the states that it needs.
            is_ahead: whether others go first.
        """
        message = Message(
            kind="call",
            number=next(self._numbers),
            fields={
                "method": method,
                "call": dict(fields),
                "keys": list(keys),
                "is_ahead": is_ahead,
            },
            arrays=arrays,
        )
        call = Call(
            message=message,
            keys=tuple(keys),
            result=Future(),
            stage=stage,
            began_s=time.monotonic(),
        )
        self._submit(call)
        return call

    def make_state(self, key: str, state: Message) -> Call:
        """Has a state made from what it is made from; the result says how its place is known."""
        message = Message(
            kind="state",
            number=next(self._numbers),
            fields=dict(state.fields) | {"key": key},
            arrays=state.arrays,
        )
        call = Call(
            message=message, keys=(), result=Future(), stage="describe", began_s=time.monotonic()
        )
        with self._lock:
            self._known.add(key)
        self._submit(call)
        return call

    def know(self, key: str) -> None:
        """Says that the cluster made a state, which need not be sent."""
        with self._lock:
            self._known.add(key)

    def prepare(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Says which pairs will probably be asked for."""
        self._send_states([key for pair in pairs for key in pair], stage="match")
        self._send(Message(kind="prepare", fields={"pairs": [list(pair) for pair in pairs]}))

    def drop(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Says which pairs will not be asked for."""
        if pairs:
            self._send(Message(kind="drop", fields={"pairs": [list(pair) for pair in pairs]}))

    def make_urgent(self, call: Call) -> None:
        """Says that a call's turn has come."""
        call.is_urgent = True
        if not call.result.done():
            self._send(Message(kind="urgent", number=call.message.number))

    def result(self, call: Call) -> Message:
        """Waits for the result of a call while the cluster answers.

        Several may wait for one call, one after the other; it is kept until its result comes.

        Raises:
            ClusterAwayError: it does not any more, or could not do it on any worker.
        """
        since_s = time.monotonic()
        try:
            while True:
                try:
                    return call.result.result(_POLL_PERIOD_S)
                except TimeoutError:
                    if call.result.done():
                        continue
                if not self.is_usable():
                    self._report_changes()
                    raise ClusterAwayError("the cluster does not answer")
        finally:
            with self._lock:
                self._waited_s[call.stage] += time.monotonic() - since_s

    def report_refusal(self, stage: str, words: str) -> None:
        """Counts work that the cluster did not do though it answers, and warns of the first.

        Args:
            stage: of the run.
            words: why.
        """
        with self._lock:
            self._figures["calls_refused"] += 1
            is_first = stage not in self._refused
            self._refused.add(stage)
        if is_first:
            self._warn(f"the cluster does not do all work ({stage}), which is done here: {words}")

    def count(self, name: str) -> None:
        """Counts work, for `summary.json`."""
        with self._lock:
            self._figures[name] += 1

    def figures(self) -> dict[str, Any]:
        """What was sent, awaited and counted, for `summary.json`."""
        with self._lock:
            counted = self._of_former + self._of_process + self._figures
            return {
                "bytes_sent": dict(self._bytes_sent),
                "waited_s": {name: round(value, 3) for name, value in self._waited_s.items()},
                **{name: int(counted[name]) for name in _COUNTED},
            }

    def close(self) -> None:
        """Ends the process, also one that is just being started."""
        with self._changed:
            self._is_closed = True
            link = self._link
            self._changed.notify_all()
        if link is not None:
            link.close()
        if self._supervising.is_alive():
            self._supervising.join(_END_TIMEOUT_S)

    # -- sending ----------------------------------------------------------------------------------

    def _submit(self, call: Call) -> None:
        with self._lock:
            if self._channel is None:
                call.result.set_exception(ClusterAwayError("the cluster is away"))
                return
            self._calls[call.message.number] = call
        self._send_states(call.keys, stage=call.stage)
        self._count_bytes(call.stage, call.message)
        self._send(call.message)

    def _send_states(self, keys: Sequence[str], *, stage: str) -> int:
        """Sends the states that the process does not know; returns how many."""
        num_sent = 0
        for key in keys:
            with self._lock:
                if key in self._known:
                    continue
                self._known.add(key)
            state = self._provide(key)
            if state is not None:
                fields = dict(state.fields) | {"key": key}
                message = Message(kind="state", fields=fields, arrays=state.arrays)
                self._count_bytes(stage, message)
                self._send(message)
                num_sent += 1
        return num_sent

    def _count_bytes(self, stage: str, message: Message) -> None:
        with self._lock:
            self._bytes_sent[stage] += message.num_bytes

    def _send(self, message: Message) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            channel.send(message)
        except (OSError, BrokenMessageError) as error:
            logger.debug("the cluster process does not take %s: %s", message.kind, error)
            channel.close()  # whoever receives starts another process

    # -- the process ------------------------------------------------------------------------------

    def _supervise(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._is_closed:
            began_s = time.monotonic()
            try:
                self._serve_one_process()
            except Exception as error:  # a task boundary: another process is started
                logger.exception("the cluster process is started again")
                self._trouble = f"{type(error).__name__}: {error}"
            if time.monotonic() - began_s > _LAST_PAUSE_S:
                pause_s = _FIRST_PAUSE_S
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed, pause_s)
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)

    def _serve_one_process(self) -> None:
        """Starts a process and takes what it sends, until it ends or says nothing any more."""
        ours, theirs = socket.socketpair()
        ours.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _SEND_TIMEOUT_S, 0)
        )
        silent_s = _SILENT_STALLS * self._config.stall_s + _START_S
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _duration(silent_s))
        channel = Channel(ours)
        with self._lock:
            self._link, is_closed = channel, self._is_closed
        try:
            if not is_closed:
                self._serve_process_at(theirs, channel)
        except (OSError, BrokenMessageError) as error:
            self._trouble = f"the cluster process broke: {error}"
        finally:
            theirs.close()
            channel.close()

    def _serve_process_at(self, theirs: socket.socket, channel: Channel) -> None:
        """Starts a process at the other end of a channel, and ends it.

        Raises:
            OSError: it cannot be started, or does not read.
            BrokenMessageError: it sent something else.
        """
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "adapters.remote.cluster_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the run, which ends it
                env=os.environ | {"RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"},
            )
            try:
                theirs.close()
                self._serve_process(channel)
            finally:
                _end(process)
                if not self._trouble:
                    self._trouble = _last_line(log)

    def _serve_process(self, channel: Channel) -> None:
        with self._lock:
            self._known = set()
            self._silent_s, self._num_up = None, 0
        try:
            channel.send(Message(kind="open", fields=self._settings))
            with self._lock:
                self._channel = None if self._is_closed else channel
            self._receive(channel)
        finally:
            channel.close()
            self._lose()

    def _receive(self, channel: Channel) -> None:
        while (message := channel.receive()) is not None:
            match message.kind:
                case "alive":
                    self._take_alive(message.fields)
                case "trouble":
                    self._trouble = str(message.fields["words"])
                    logger.debug("cluster: %s", self._trouble)
                case _:
                    self._answer(message)

    def _take_alive(self, fields: Fields) -> None:
        with self._changed:
            self._alive_at_s = time.monotonic()
            silent_s = fields["silent_s"]
            self._silent_s = None if silent_s is None else float(silent_s)
            self._num_up = int(fields["num_up"])
            self._of_process = Counter({str(k): int(v) for k, v in fields["figures"].items()})
            self._changed.notify_all()
        self._report_changes()

    def _report_changes(self) -> None:
        with self._lock:
            is_usable = self._is_usable()
            if self._was_usable in (None, is_usable) or self._is_closed:
                return
            self._was_usable = is_usable
            self._figures["times_away"] += not is_usable
        if is_usable:
            self._warn("the cluster is back")
        else:
            self._warn(f"the cluster is away: {self._trouble or 'it does not answer'}")

    def _answer(self, message: Message) -> None:
        with self._lock:
            call = self._calls.get(message.number)
        if call is None:
            return
        if message.kind == "unknown" and call.num_resent < _MAX_RESENT:
            call.num_resent += 1
            unknown = {str(key) for key in message.fields["keys"]}
            with self._lock:
                self._known -= unknown
            num_sent = self._send_states(call.keys, stage=call.stage)
            with self._lock:
                self._figures["states_sent_again"] += num_sent
            self._send(call.message)
            if call.is_urgent:
                self._send(Message(kind="urgent", number=message.number))
            return
        with self._lock:
            if self._calls.pop(message.number, None) is None:
                return  # the process was lost meanwhile
        if message.kind == "result":
            call.result.set_result(message)
        else:
            words = str(message.fields.get("words") or "its states are lost")
            self.report_refusal(call.stage, words.strip().splitlines()[-1])
            call.result.set_exception(ClusterAwayError(words))

    def _lose(self) -> None:
        with self._changed:
            self._channel = None
            self._silent_s, self._num_up = None, 0
            calls, self._calls = list(self._calls.values()), {}
            self._of_former += self._of_process
            self._of_process = Counter()
            self._figures["process_ends"] += not self._is_closed
            self._changed.notify_all()
        for call in calls:
            if not call.result.done():
                call.result.set_exception(ClusterAwayError("the cluster process ended"))
        self._report_changes()


_END_TIMEOUT_S = 5.0  # that closing waits until the process has ended
_START_S = 60.0  # connecting may take so long before the process says anything
_COUNTED = (
    "windows_there",
    "windows_here",
    "adjustments_there",
    "adjustments_here",
    "states_made",
    "states_lost",
    "states_dropped",
    "states_sent_again",
    "states_fetched_again",
    "tokens_sent",
    "token_bytes",
    "tokens_sent_again",
    "pairs_prepared",
    "prepared_evicted",
    "calls_again",
    "calls_refused",
    "times_away",
    "process_ends",
)


def inference_error(error: ClusterAwayError) -> InferenceError:
    """What the engine gets of it."""
    return InferenceError(f"the cluster does not do it: {error}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process, which does so by itself once its socket is closed."""
    try:
        process.wait(2.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _duration(seconds: float) -> bytes:
    """As a socket option."""
    return struct.pack("@ll", round(seconds), 0)


def _last_line(log: Any) -> str:
    log.seek(0)
    lines = log.read()[-4000:].decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
