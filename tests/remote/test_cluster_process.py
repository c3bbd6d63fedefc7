"""The process that talks with Ray: states that are lost or dropped, and who waits for them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, cast

import numpy as np
import pytest

from adapters.remote import cluster_process as process_module
from adapters.remote.cluster_process import ClusterProcess
from adapters.remote.messages import Channel, Message
from adapters.remote.worker import HEALTH
from engine.config import load_config
from tests.support.fake_actors import FakeActor


class Sent:
    """A channel whose messages are kept."""

    def __init__(self) -> None:
        self.messages: deque[Message] = deque()

    def send(self, message: Message) -> None:
        self.messages.append(message)

    def of(self, number: int) -> list[Message]:
        return [one for one in self.messages if one.number == number]


@pytest.fixture
def sent() -> Sent:
    return Sent()


@pytest.fixture
def process(sent: Sent, monkeypatch: pytest.MonkeyPatch) -> ClusterProcess:
    """With one worker, which is up; what is put is where it is."""
    monkeypatch.setattr(process_module, "_put", lambda value: value)
    remote = load_config(settings=["remote.address=nowhere:1"]).remote
    settings = {"remote": remote.model_dump(mode="json"), "spec": {}, "run": "run"}
    process = ClusterProcess(cast(Channel, sent), settings)
    (worker,) = process._workers.all
    worker.handle, worker.is_up = FakeActor(), True
    return process


def actor_of(process: ClusterProcess) -> FakeActor:
    return cast(FakeActor, process._workers.all[0].handle)


def run(work: Callable[[], Awaitable[Any]], process: ClusterProcess) -> None:
    """Does work, and what it has begun."""

    async def all_of_it() -> None:
        await work()
        while process._tasks:
            await asyncio.wait(list(process._tasks))

    asyncio.run(all_of_it())


def state(key: str) -> Message:
    return Message(kind="state", fields={"key": key}, arrays={"state": np.zeros(4, np.uint8)})


def image(key: str, *, number: int = 0) -> Message:
    arrays = {"image": np.zeros(4, np.uint8)}
    return Message(kind="state", number=number, fields={"key": key}, arrays=arrays)


def match(number: int, *keys: str) -> Message:
    fields = {
        "method": "match",
        "call": {"pairs": [[*keys, {}]]},
        "keys": list(keys),
        "is_ahead": False,
    }
    return Message(kind="call", number=number, fields=fields)


def test_states_used_longest_ago_are_dropped_and_asked_of_the_run_when_a_call_needs_them(
    process: ClusterProcess, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "_MAX_STATES", 3)

    async def work() -> None:
        for key in "abc":
            await process._take(state(key))
        await process._serve(match(1, "a", "b"))
        await process._take(state("d"))  # "c" was used longest ago
        await process._serve(match(2, "c", "d"))
        await process._serve(match(3, "a", "d"))

    run(work, process)
    assert [one.kind for one in sent.messages] == ["result", "unknown", "result"]
    assert sent.messages[1].fields["keys"] == ["c"]
    assert process._figures["states_dropped"] == 1
    assert "c" not in process._workers.all[0].held


def test_a_state_that_is_dropped_while_a_call_waits_for_a_worker_costs_no_worker(
    process: ClusterProcess, sent: Sent
) -> None:
    async def work() -> None:
        for key in "ab":
            await process._take(state(key))
        (worker,) = process._workers.all
        worker.num_calls = 100  # no room
        serving = asyncio.ensure_future(process._serve(match(1, "a", "b")))
        await asyncio.sleep(0)
        del process._states["a"]
        worker.num_calls = 0
        await process._workers.notify()
        await serving

    run(work, process)
    (reply,) = sent.messages
    assert (reply.kind, reply.fields["keys"]) == ("unknown", ["a"])
    (worker,) = process._workers.all
    assert (worker.is_up, worker.num_calls) == (True, 0)


def test_two_calls_that_miss_the_same_state_have_it_made_again_once(
    process: ClusterProcess, sent: Sent
) -> None:
    actor = actor_of(process)

    async def work() -> None:
        await process._take(image("a"))
        await process._take(state("b"))
        actor.lost = {process._states["a"].place}
        await asyncio.gather(process._serve(match(1, "a", "b")), process._serve(match(2, "a", "b")))

    run(work, process)
    assert [one.kind for one in sent.messages] == ["result", "result"]
    assert actor.num_encoded == 2
    assert process._figures["states_lost"] == 1


def test_who_asks_for_the_vector_of_a_state_that_is_known_gets_it(
    process: ClusterProcess, sent: Sent
) -> None:
    async def work() -> None:
        await process._take(image("a"))  # for a call
        await process._take(image("a", number=7))  # before it is made
        while process._tasks:
            await asyncio.wait(list(process._tasks))
        await process._take(image("a", number=8))

    run(work, process)
    assert actor_of(process).num_encoded == 1
    for number in (7, 8):
        (reply,) = sent.of(number)
        assert reply.kind == "result"
        assert reply.arrays["vector"].tolist() == [1.0]


def test_who_asks_for_a_vector_while_no_worker_is_up_gets_a_refusal(
    process: ClusterProcess, sent: Sent
) -> None:
    process._workers.all[0].is_up = False
    run(lambda: process._take(image("a", number=7)), process)
    (reply,) = sent.of(7)
    assert (reply.kind, reply.fields) == ("failed", {"words": "no worker answers"})


def test_no_more_pairs_are_prepared_than_a_worker_keeps_until_some_are_matched_or_dropped(
    process: ClusterProcess, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "_MAX_PREPARED", 2)
    actor, num_prepared = actor_of(process), []

    async def settle() -> None:
        for _ in range(50):  # turns of the loop: many more than it takes
            await asyncio.sleep(0)
        num_prepared.append(len(actor.prepared))

    async def work() -> None:
        for key in "abcde":
            await process._take(state(key))
        pairs = [["a", key] for key in "bcde"]
        await process._take(Message(kind="prepare", fields={"pairs": pairs}))
        await settle()
        await process._serve(match(1, "a", "b"))
        await settle()
        await process._take(Message(kind="drop", fields={"pairs": [["a", "c"]]}))
        await settle()

    run(work, process)
    assert num_prepared[1:] == [num_prepared[0] + 1, num_prepared[0] + 2]
    assert len(actor.prepared) == 4
    assert [one.kind for one in sent.messages] == ["result"]


def test_a_worker_is_pinged_on_threads_that_no_call_uses(process: ClusterProcess) -> None:
    actor = actor_of(process)

    async def work() -> None:
        keeping = asyncio.ensure_future(process._keep_up(process._workers.all[0]))
        await actor.was_pinged.wait()
        keeping.cancel()
        await asyncio.wait([keeping])

    run(work, process)
    assert actor.pinged_by == [HEALTH]
