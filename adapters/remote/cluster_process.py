"""The process of a run that talks with Ray: `python -m adapters.remote.cluster_process FD`.

Ray ends a process that is connected to a cluster whose head is gone. So the process with the map
never is: it starts this one, sends calls over a socket of this machine, and starts another one when
this one has ended. Everything that Ray unpickles is unpickled here; what goes on to the map is
plain arrays.

A state (see `hosted`) is in the cluster once, where it was made or put, and every worker gets it
from there at most once. A call is sent to a worker that has its states, if one has room; one that
breaks, or takes too long, is made again elsewhere.

The cluster keeps the states used last, `_MAX_STATES` of them. One that was dropped or lost is sent
again by the run, which learns from the reply to a call that it is unknown here; both are counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import hashlib
import json
import os
import signal
import socket
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adapters.remote.connecting import NAMESPACE, connect
from adapters.remote.messages import BrokenMessageError, Channel, Fields, Message
from adapters.remote.worker import HEALTH, TASKS, MatcherWorker, code_version, run_task
from adapters.remote.workers import Worker, Workers
from engine.config import RemoteConfig

_PING_PERIOD_S = 1.0
_RETRY_PERIOD_S = 2.0
_START_TIMEOUT_S = 120.0  # of a worker, which may load weights
_SILENT_STALLS = 3  # times the stall after which the connection is given up
_MAX_THREADS = 32  # of a worker: calls that wait in it for their turn; more wait in Ray's queue
_MAX_PREPARED = 16  # pairs of a run on a worker, which keeps no more of them; others wait
_HEALTH_THREADS = 2  # of a worker: a ping never waits behind calls
_MAX_STATES = 4096  # of keyframes; with what they are made from 1 to 2 MB each in the cluster
_PR_SET_PDEATHSIG = 1


@dataclass(slots=True, kw_only=True, eq=False)
class _State:
    """The state of a keyframe, or how it is made."""

    place: Any = None  # where the cluster has it; None: it is not made yet
    image: Any = None  # where the cluster has the image that it is made from
    maker: Worker | None = None  # which made it; None: the run sent it
    tried: tuple[Worker, ...] = ()  # on which it could not be made
    vector: Any = None  # (E,) that recognizes its place; None: it is not made yet
    asked: list[int] = field(default_factory=list)  # calls that wait for the vector


class ClusterProcess:
    """Serves one run.

    Args:
        channel: to the run.
        settings: of the section remote, what the matcher is, and what the run is called.
    """

    def __init__(self, channel: Channel, settings: Fields) -> None:
        self._channel = channel
        self._remote = RemoteConfig.model_validate(settings["remote"])
        self._spec = json.dumps(settings["spec"], sort_keys=True)
        self._run = str(settings["run"])
        self._workers = Workers(self._remote.matchers, max_calls=self._remote.calls_per_matcher)
        self._states: OrderedDict[str, _State] = OrderedDict()  # the one used last at the end
        self._prepared: dict[tuple[str, str], Worker | None] = {}  # None: its turn has not come
        self._can_wait: set[int] = set()  # calls ahead of their turn
        self._fetched: Counter[tuple[str, int]] = Counter()  # states, by key and worker
        self._figures: Counter[str] = Counter()
        self._answered_at_s: float | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, messages: asyncio.Queue[Message | None]) -> None:
        """Serves until the run ends, or closes its end."""
        for worker in self._workers.all:
            self._start(self._keep_up(worker))
        self._start(self._report_alive())
        while (message := await messages.get()) is not None:
            await self._take(message)
        for worker in self._workers.all:
            if worker.is_up:
                worker.handle.forget.remote(self._run)

    async def _take(self, message: Message) -> None:
        match message.kind:
            case "state":
                await self._take_state(message)
            case "call":
                if message.fields.get("is_ahead"):
                    self._can_wait.add(message.number)
                self._start(self._serve(message))
            case "prepare":
                for first, second in message.fields["pairs"]:
                    if (first, second) not in self._prepared:
                        self._prepared[first, second] = None
                        self._start(self._prepare((first, second)))
            case "urgent":
                self._can_wait.discard(message.number)
                await self._workers.notify()
            case "drop":
                for first, second in message.fields["pairs"]:
                    self._prepared.pop((first, second), None)
                await self._workers.notify()

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- workers ----------------------------------------------------------------------------------

    async def _keep_up(self, worker: Worker) -> None:
        """Finds or starts a worker, and notices when it does not answer any more."""
        while True:
            try:
                if worker.is_up:
                    ping = worker.handle.ping.options(concurrency_group=HEALTH)
                    await asyncio.wait_for(ping.remote(), self._remote.stall_s)
                    self._answered_at_s = asyncio.get_running_loop().time()
                else:
                    await self._connect(worker)
            except Exception as error:  # a task boundary: it is tried again
                await self._workers.set_up(worker, False)
                self._send(Message(kind="trouble", fields={"words": _first_line(error)}))
                await asyncio.sleep(_RETRY_PERIOD_S - _PING_PERIOD_S)
            await asyncio.sleep(_PING_PERIOD_S)

    async def _connect(self, worker: Worker) -> None:
        import ray

        remote = self._remote
        claims = [remote.matcher_cpus, remote.matcher_gpus, remote.matcher_resources]
        digest = hashlib.sha256(json.dumps([self._spec, code_version(), claims]).encode())
        groups = {HEALTH: _HEALTH_THREADS}
        actor = ray.remote(concurrency_groups=groups)  # type: ignore[call-overload]  # Ray's lack it
        worker.handle = (
            actor(MatcherWorker)
            .options(
                name=f"matcher-{digest.hexdigest()[:16]}-{worker.number}",
                namespace=NAMESPACE,
                get_if_exists=True,
                lifetime="detached",  # other runs go on with it
                max_restarts=-1,
                max_concurrency=_MAX_THREADS,
                num_cpus=remote.matcher_cpus,
                num_gpus=remote.matcher_gpus,
                resources=remote.matcher_resources,
                scheduling_strategy="SPREAD",
            )
            .remote(self._spec, remote.idle_s)
        )
        greet = worker.handle.hello.options(concurrency_group=HEALTH)
        hello = await asyncio.wait_for(greet.remote(), _START_TIMEOUT_S)
        if hello["version"] != code_version():
            raise RuntimeError(f"a node of the cluster has LiveSfM {hello['version']}")
        self._answered_at_s = asyncio.get_running_loop().time()
        await self._workers.set_up(worker, True)

    async def _report_alive(self) -> None:
        """Says whether the cluster answers, and what was counted."""
        began_s = asyncio.get_running_loop().time() + _START_TIMEOUT_S
        while True:
            now_s = asyncio.get_running_loop().time()
            silent_s = None if self._answered_at_s is None else now_s - self._answered_at_s
            fields = {
                "silent_s": silent_s,
                "num_up": self._workers.num_up,
                "figures": dict(self._figures),
            }
            self._send(Message(kind="alive", fields=fields))
            # A new process connects at once where Ray would look for a lost head for a minute.
            if now_s - (self._answered_at_s or began_s) > _SILENT_STALLS * self._remote.stall_s:
                os._exit(0)
            await asyncio.sleep(_PING_PERIOD_S / 2)

    # -- states -----------------------------------------------------------------------------------

    async def _take_state(self, message: Message) -> None:
        """Puts a state, or the image that it is made from, into the cluster.

        A message with a number gets a reply, also where the state is known already.
        """
        key = str(message.fields["key"])
        state = self._states.get(key)
        if state is None:
            state = await _put_state(message)
            self._add_state(key, state)
        if message.number:
            state.asked.append(message.number)
        if state.vector is not None:
            self._reply_vector(state)
        elif state.image is None:
            self._refuse_vector(state, "its state was sent without its image")
        elif state.maker is None:
            self._make(key, state)

    def _add_state(self, key: str, state: _State) -> None:
        """Adds a state, and drops those used longest ago where there are too many."""
        self._states[key] = state
        while len(self._states) > _MAX_STATES:
            dropped, old = self._states.popitem(last=False)
            self._refuse_vector(old, "its state was dropped")
            for worker in self._workers.all:
                worker.held.discard(dropped)
                self._fetched.pop((dropped, worker.number), None)
            self._figures["states_dropped"] += 1

    def _make(self, key: str, state: _State) -> None:
        """Begins to make a state, on the worker with least to do."""
        up = [one for one in self._workers.all if one.is_up]
        fresh = [one for one in up if one not in state.tried] or up
        maker = min(fresh, key=lambda one: (one.num_calls, len(one.held)), default=None)
        if maker is None:  # it is made when a call needs it
            self._refuse_vector(state, "no worker answers")
            return
        maker.held.add(key)
        reply, state.place = maker.handle.encode.options(num_returns=2).remote(
            self._run, key, [state.image]
        )
        state.maker = maker
        self._figures["states_made"] += 1
        self._start(self._made(key, state, reply, place=state.place))

    async def _made(self, key: str, state: _State, reply: Any, *, place: Any) -> None:
        """Waits until a state is made, and sends what recognizes its place."""
        try:
            fields, arrays = await asyncio.wait_for(reply, self._remote.call_timeout_s)
        except Exception as error:  # a task boundary: it is made again when it is needed
            if state.place is not place:
                return  # it is being made again already
            self._lose(key, state)
            self._refuse_vector(state, _first_line(error))
            return
        if "vector" in arrays:
            state.vector = np.array(arrays["vector"])
            self._reply_vector(state)
        else:
            self._refuse_vector(state, str(fields.get("failed")))

    def _reply_vector(self, state: _State) -> None:
        while state.asked:
            arrays = {"vector": state.vector}
            self._send(Message(kind="result", number=state.asked.pop(0), arrays=arrays))

    def _refuse_vector(self, state: _State, words: str) -> None:
        """Ends the calls that wait for a vector, which does not come for now."""
        while state.asked:
            number = state.asked.pop(0)
            self._send(Message(kind="failed", number=number, fields={"words": words}))

    def _lose(self, key: str, state: _State) -> None:
        if state.maker is not None:
            state.maker.held.discard(key)
            state.tried = (*state.tried, state.maker)[-8:]
        state.place = state.maker = None

    # -- calls ------------------------------------------------------------------------------------

    async def _serve(self, call: Message) -> None:
        """Makes a call, on several workers if need be, and sends its result."""
        try:
            result = await self._attempts(call)
        except Exception as error:  # a task boundary: the run does it itself
            result = Message(kind="failed", fields={"words": _first_line(error)})
        self._can_wait.discard(call.number)
        self._send(
            Message(
                kind=result.kind, number=call.number, fields=result.fields, arrays=result.arrays
            )
        )

    async def _run_task(self, call: Message) -> Message:
        """Has a task done, which Ray makes again elsewhere if its node is lost.

        Raises:
            RuntimeError: no node has a CPU for it now; the run has.
        """
        import ray

        asking = asyncio.to_thread(ray.available_resources)
        free = await asyncio.wait_for(asking, self._remote.stall_s)
        if free.get("CPU", 0.0) < self._remote.solver_cpus:
            raise RuntimeError("the cluster has no free CPU")
        arrays = {name: array.copy() for name, array in call.arrays.items()}
        reply = self._run_there.remote(
            call.fields["method"], code_version(), dict(call.fields["call"]), arrays
        )
        try:
            fields, arrays = await asyncio.wait_for(reply, self._remote.solver_timeout_s)
        except TimeoutError:
            ray.cancel(reply, force=True)
            raise
        return Message(kind="result", fields=fields, arrays=arrays)

    @functools.cached_property
    def _run_there(self) -> Any:
        """Runs a task wherever there is room, once the process is connected."""
        import ray

        remote = self._remote
        return ray.remote(run_task).options(
            num_cpus=remote.solver_cpus, max_retries=remote.max_tries
        )

    async def _attempts(self, call: Message) -> Message:
        if call.fields["method"] in TASKS:
            return await self._run_task(call)
        keys = [str(key) for key in call.fields["keys"]]
        words = ""
        tried: tuple[Worker, ...] = ()
        for _ in range(self._remote.max_tries):
            if unknown := self._unknown(keys):
                return unknown
            worker = await self._worker_for(call, keys, tried)
            try:
                if unknown := self._unknown(keys):  # lost or dropped while the call waited
                    return unknown
                reply, state, places = self._begin(worker, call, keys)
                fields, arrays = await asyncio.wait_for(reply, self._remote.call_timeout_s)
            except Exception as error:  # a task boundary: another worker has its turn
                words = _first_line(error)
                self._send(Message(kind="trouble", fields={"words": words}))
                tried = (*tried, worker)
                self._figures["calls_again"] += 1
                if not isinstance(error, TimeoutError):
                    await self._workers.set_up(worker, False)
                continue
            finally:
                await self._workers.give_back(worker)
            if missing := fields.get("missing"):
                words = "states that it needs were lost"
                self._figures["calls_again"] += 1
                self._forget_lost(missing, places)
                continue
            self._count_fetched(worker, fields.pop("fetched", ()))
            if "failed" in fields:
                return Message(kind="failed", fields={"words": fields["failed"]})
            if state is not None and fields["key"] not in self._states:
                self._add_state(fields["key"], _State(place=state))
            return Message(kind="result", fields=fields, arrays=arrays)
        return Message(kind="failed", fields={"words": words})

    def _unknown(self, keys: Sequence[str]) -> Message | None:
        """What asks the run for states that the cluster has not; None: it has all of them."""
        unknown = [key for key in keys if key not in self._states]
        return Message(kind="unknown", fields={"keys": unknown}) if unknown else None

    async def _worker_for(
        self, call: Message, keys: Sequence[str], tried: Sequence[Worker]
    ) -> Worker:
        preferred = None
        if call.fields["method"] == "match":
            for first, second, *_ in call.fields["call"]["pairs"]:
                preferred = self._prepared.pop((first, second), None) or preferred
        worker = await self._workers.take(
            keys,
            preferred=preferred,
            tried=tried,
            is_ahead=lambda: call.number in self._can_wait,
        )
        self._can_wait.discard(call.number)
        assert worker is not None, "a call is needed until it has its result"
        return worker

    def _begin(
        self, worker: Worker, call: Message, keys: Sequence[str]
    ) -> tuple[Any, Any, list[tuple[str, list[Any]]]]:
        """Makes a call on a worker.

        Returns:
            Where its reply is, where the state that it makes is, and where those are that it uses.
        """
        arrays = {name: array.copy() for name, array in call.arrays.items()}
        fields = dict(call.fields["call"])
        if call.fields["method"] == "describe":
            describe = worker.handle.describe.options(num_returns=2)
            reply, state = describe.remote(self._run, fields, arrays)
            return reply, state, []
        places = self._places(worker, keys)
        return worker.handle.match.remote(self._run, fields, arrays, places), None, places

    def _places(self, worker: Worker, keys: Sequence[str]) -> list[tuple[str, list[Any]]]:
        """Where a worker gets states from; those that are lost are made again."""
        places = []
        for key in keys:
            state = self._states[key]
            self._states.move_to_end(key)
            if state.place is None:
                self._make(key, state)
            worker.held.add(key)
            places.append((key, [state.place]))
        return places

    def _forget_lost(
        self, keys: Sequence[str], places: Sequence[tuple[str, Sequence[Any]]]
    ) -> None:
        """Has states made again that went with their workers; those put here have to come again.

        Args:
            keys: of those that a worker could not get.
            places: where it looked; one that is elsewhere by now was found lost before.
        """
        looked_at = dict(places)
        for key in keys:
            state = self._states.get(key)
            if state is None or state.place is not looked_at[key][0]:
                continue
            if state.image is None or state.tried:
                del self._states[key]
                self._refuse_vector(state, "its state was lost")
            else:
                self._lose(key, state)
            self._figures["states_lost"] += 1

    def _count_fetched(self, worker: Worker, fetched: Sequence[tuple[str, int]]) -> None:
        for key, num_bytes in fetched:
            state = self._states.get(key)
            if state is None:
                continue
            self._fetched[key, worker.number] += 1
            is_again = self._fetched[key, worker.number] > 1
            self._figures["states_fetched_again"] += is_again
            if state.maker is None:
                continue  # it was put, and comes from there
            self._figures["tokens_sent"] += 1
            self._figures["token_bytes"] += num_bytes
            self._figures["tokens_sent_again"] += is_again

    # -- ahead ------------------------------------------------------------------------------------

    async def _prepare(self, pair: tuple[str, str]) -> None:
        """Has a worker begin with a pair, unless its turn comes first."""
        if not all(key in self._states for key in pair):
            self._prepared.pop(pair, None)
            return
        worker = await self._workers.take(
            pair,
            is_ahead=lambda: True,
            is_needed=lambda: pair in self._prepared,
            may_take=lambda one: self._num_prepared(one) < _MAX_PREPARED,
        )
        if worker is None:
            return
        try:
            if self._unknown(pair):  # lost or dropped while the pair waited
                self._prepared.pop(pair, None)
                return
            if pair in self._prepared:
                self._prepared[pair] = worker
                self._figures["pairs_prepared"] += 1
            prepare = worker.handle.prepare.remote(self._run, pair, self._places(worker, pair))
            fields, _ = await asyncio.wait_for(prepare, self._remote.call_timeout_s)
            self._count_fetched(worker, fields.get("fetched", ()))
            self._figures["prepared_evicted"] += fields.get("evicted", 0)
        except Exception:  # a task boundary: it is matched when its turn comes
            self._prepared.pop(pair, None)
        finally:
            await self._workers.give_back(worker)

    def _num_prepared(self, worker: Worker) -> int:
        """Pairs that a worker prepared, or does, and that are not matched yet."""
        return sum(one is worker for one in self._prepared.values())

    def _send(self, message: Message) -> None:
        with contextlib.suppress(OSError):  # the run is gone: so is this process soon
            self._channel.send(message)


async def _put_state(message: Message) -> _State:
    """Puts a state, or the image that it is made from, into the cluster."""
    if "state" in message.arrays:
        return _State(place=await asyncio.to_thread(_put, message.arrays["state"].copy()))
    content = (dict(message.fields), {k: a.copy() for k, a in message.arrays.items()})
    return _State(image=await asyncio.to_thread(_put, content))


def _put(value: Any) -> Any:
    import ray

    return ray.put(value)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:200]}" if lines else type(error).__name__


def _receive(
    channel: Channel, messages: asyncio.Queue[Message | None], loop: asyncio.AbstractEventLoop
) -> None:
    """Hands what comes to the event loop, until the run closes its end."""
    with contextlib.suppress(BrokenMessageError):
        while (message := channel.receive()) is not None:
            loop.call_soon_threadsafe(messages.put_nowait, message)
    threading.Timer(5.0, os._exit, (0,)).start()  # a loop that Ray blocks would not see the end
    loop.call_soon_threadsafe(messages.put_nowait, None)


async def _serve(channel: Channel, settings: Fields) -> None:
    # Without a limit of its own: the run's queues and `remote.keyframes_ahead` bound what it sends.
    # Were reading to wait, both ends could wait for each other's.
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    threading.Thread(target=_receive, args=(channel, messages, loop), daemon=True).start()
    await ClusterProcess(channel, settings).run(messages)


def main(number: int) -> None:
    """Serves the run at the other end of a socket, until that is closed."""
    # The run may be killed: then this process ends, too.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    channel = Channel(socket.socket(fileno=number))
    opening = channel.receive()
    if opening is None:
        return
    try:
        connect(opening.fields["remote"]["address"])
    except Exception as error:  # a task boundary: the run tries again
        channel.send(Message(kind="trouble", fields={"words": _first_line(error)}))
        channel.close()
        return
    asyncio.run(_serve(channel, opening.fields))
    os._exit(0)  # Ray's own end waits for what may be gone


if __name__ == "__main__":
    main(int(sys.argv[1]))
