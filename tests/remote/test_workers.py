"""Which worker gets a call, whose turn it is there, and what is matched ahead."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adapters.remote import worker as worker_module
from adapters.remote.fair_turns import FairTurns
from adapters.remote.hosted import HostedSift, States
from adapters.remote.prepared import Prepared
from adapters.remote.worker import MatcherWorker
from adapters.remote.workers import Worker, Workers
from engine.config import Config


def workers_up(num: int, *, max_calls: int = 2) -> Workers:
    workers = Workers(num, max_calls=max_calls)
    for worker in workers.all:
        worker.is_up = True
    return workers


def test_a_call_goes_where_its_states_are_unless_there_is_no_room() -> None:
    async def numbers() -> list[int]:
        workers = workers_up(2)
        workers.all[1].held.update("ab")
        taken = [await workers.take(["a", "b"]) for _ in range(6)]
        return [worker.number for worker in taken if worker is not None]

    assert asyncio.run(numbers()) == [1, 1, 1, 1, 0, 0]  # twice the calls that may wait


def test_calls_ahead_wait_while_one_waits_that_cannot() -> None:
    async def order() -> list[str]:
        workers = workers_up(1, max_calls=1)
        done: list[str] = []

        async def take(name: str, *, is_ahead: bool) -> None:
            worker = await workers.take([], is_ahead=lambda: is_ahead)
            assert worker is not None
            done.append(name)
            await asyncio.sleep(0)
            await workers.give_back(worker)

        first = await workers.take([])
        second = await workers.take([])
        assert first is second is workers.all[0]
        tasks = [
            asyncio.create_task(take("ahead", is_ahead=True)),
            asyncio.create_task(take("now", is_ahead=False)),
        ]
        await asyncio.sleep(0)
        for worker in (first, second):
            await workers.give_back(worker)
        await asyncio.gather(*tasks)
        return done

    assert asyncio.run(order()) == ["now", "ahead"]


def test_a_call_ahead_that_is_not_needed_any_more_takes_no_worker() -> None:
    async def taken() -> Worker | None:
        workers = workers_up(1, max_calls=1)
        await workers.take([])
        needed = [True]
        waiting = asyncio.create_task(
            workers.take([], is_ahead=lambda: True, is_needed=lambda: needed[0])
        )
        await asyncio.sleep(0)
        needed[0] = False
        await workers.notify()
        return await waiting

    assert asyncio.run(taken()) is None


def test_a_call_is_tried_elsewhere_and_again_there_when_no_other_is_up() -> None:
    async def numbers() -> list[int]:
        workers = workers_up(2)
        one, other = workers.all
        again = await workers.take([], tried=[one])
        await workers.set_up(other, False)
        last = await workers.take([], tried=[one])
        assert again is not None
        assert last is not None
        return [again.number, last.number]

    assert asyncio.run(numbers()) == [1, 0]


def test_a_worker_that_went_away_holds_nothing() -> None:
    async def held() -> set[str]:
        workers = workers_up(1)
        workers.all[0].held.add("a")
        await workers.set_up(workers.all[0], False)
        return workers.all[0].held

    assert asyncio.run(held()) == set()


def turns_of(waiting: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """The order in which threads pass that wait while another has its turn."""
    turns = FairTurns()
    passed: list[tuple[str, bool]] = []

    def pass_once(run: str, is_ahead: bool) -> None:
        with turns.turn(run, is_ahead=is_ahead):
            passed.append((run, is_ahead))

    threads = []
    with turns.turn("first"):
        for run, is_ahead in waiting:
            thread = threading.Thread(target=pass_once, args=(run, is_ahead))
            before = sum(len(q) for queues in turns._waiting.values() for q in queues)
            thread.start()
            threads.append(thread)
            while sum(len(q) for queues in turns._waiting.values() for q in queues) == before:
                threading.Event().wait(0.001)
    for thread in threads:
        thread.join()
    return passed


def test_a_run_with_many_calls_gets_no_more_turns_than_one_with_few() -> None:
    passed = turns_of([("a", False)] * 4 + [("b", False)] * 2 + [("c", False)])
    assert [run for run, _ in passed] == ["a", "b", "c", "a", "b", "a", "a"]


def test_what_is_needed_now_comes_before_what_can_wait_of_the_same_run() -> None:
    passed = turns_of([("a", True), ("a", True), ("a", False), ("b", True)])
    assert passed == [("a", False), ("b", True), ("a", True), ("a", True)]


def test_states_beyond_the_limit_of_memory_are_evicted_those_used_last_stay() -> None:
    states = States(max_bytes=40)
    for key in "abcd":
        states.put(key, np.zeros(10, np.uint8))
    assert states["a"].nbytes == 10  # used now
    states.put("e", np.zeros(10, np.uint8))
    assert [key for key in "abcde" if key in states] == ["a", "c", "d", "e"]


def test_states_that_a_call_uses_are_not_evicted_for_others_that_it_fetches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    descriptors = {
        key: np.random.default_rng(number).integers(0, 255, (40, 128), np.uint8)
        for number, key in enumerate("abcd")
    }
    states = States(max_bytes=2 * descriptors["a"].nbytes)
    matcher = HostedSift(Config(), states=states)
    worker = MatcherWorker(json.dumps({"matcher": "sift", "config": {}}))
    monkeypatch.setattr(worker, "_open", lambda: matcher)
    monkeypatch.setattr(worker_module, "_fetch", lambda place: place)

    def reply_to(*pairs: str) -> tuple[dict[str, Any], dict[str, Any]]:
        keys = dict.fromkeys("".join(pairs))
        fields = {"pairs": [[*pair, {}] for pair in pairs]}
        return worker.match("run", fields, {}, [(key, [descriptors[key]]) for key in keys])

    reply_to("ab")
    fields, arrays = reply_to("ac", "cd", "ad")  # "a" was used longest ago
    assert "failed" not in fields
    assert {name.partition(".")[0] for name in arrays} == {"0", "1", "2"}
    assert [key for key, _ in fields["fetched"]] == ["c", "d"]
    fields, _ = reply_to("ab")
    assert [key for key, _ in fields["fetched"]] == ["b"]  # once more, and it is counted


def test_a_run_that_calls_no_more_is_forgotten_and_those_used_last_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(worker_module, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    monkeypatch.setattr(worker_module, "_MAX_RUNS", 3)
    worker = MatcherWorker(json.dumps({"matcher": "sift", "config": {}}))
    for run in ("a", "b", "c", "a", "d"):
        worker._matcher(run)
    assert list(worker._runs) == ["c", "a", "d"]
    clock.now_s = worker_module._RUN_IDLE_S - 1.0
    worker._matcher("a")
    clock.now_s += 2.0
    worker._matcher("a")
    assert list(worker._runs) == ["a"]


def test_a_pair_that_was_matched_before_its_preparation_had_its_turn_is_not_prepared() -> None:
    prepared: Prepared[int] = Prepared(max_pairs=2)
    for number, keys in enumerate((("a", "b"), ("a", "c"), ("b", "c")), start=1):
        assert not prepared.is_late(keys)
        prepared.put(keys, number)
    assert prepared.put(("a", "d"), 4) == 1  # "a" and "c" are evicted
    assert prepared.take(("a", "b")) is None  # the oldest of three
    assert prepared.take(("b", "c")) == 3
    assert prepared.take(("b", "c")) is None
    assert prepared.is_late(("b", "c"))
    assert not prepared.is_late(("a", "c"))
