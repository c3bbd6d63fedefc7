"""Stands for a worker of a Ray cluster: replies on the event loop, holds nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Reply = tuple[dict[str, Any], dict[str, Any]]


class FakeMethod:
    """A method of an actor.

    Args:
        begin: takes the arguments, and the options that were given by `options`.
    """

    def __init__(self, begin: Callable[..., Any], **options: Any) -> None:
        self._begin = begin
        self._options = options

    def options(self, **options: Any) -> FakeMethod:
        """The method with options."""
        return FakeMethod(self._begin, **options)

    def remote(self, *arguments: Any) -> Any:
        """Calls it."""
        return self._begin(*arguments, **self._options)


class FakeActor:
    """The handle of a `MatcherWorker`.

    Attributes:
        lost: places of states that it cannot get.
        num_encoded: how many states it made.
        prepared: the pairs that it prepared.
        pinged_by: the concurrency groups of its pings.
    """

    def __init__(self) -> None:
        self.lost: set[object] = set()
        self.num_encoded = 0
        self.prepared: list[tuple[str, str]] = []
        self.pinged_by: list[object] = []
        self.was_pinged = asyncio.Event()
        self.encode = FakeMethod(self._encode)
        self.match = FakeMethod(self._match)
        self.prepare = FakeMethod(self._prepare)
        self.ping = FakeMethod(self._ping)

    def _encode(self, run: str, key: str, image: Sequence[Any], **_: Any) -> tuple[Any, object]:
        self.num_encoded += 1
        return _later(({}, {"vector": np.ones(1, np.float32)})), f"{key} {self.num_encoded}"

    def _match(self, run: str, fields: Any, arrays: Any, places: Sequence[Any]) -> Any:
        missing = [key for key, (place,) in places if isinstance(place, str) and place in self.lost]
        return _later(({"missing": missing} if missing else {"pairs": []}, {}))

    def _prepare(self, run: str, keys: tuple[str, str], places: Sequence[Any]) -> Any:
        self.prepared.append(keys)
        return _later(({}, {}))

    def _ping(self, *, concurrency_group: str | None = None) -> Any:
        self.pinged_by.append(concurrency_group)
        self.was_pinged.set()
        return _later(None)


async def _later(result: Any) -> Any:
    await asyncio.sleep(0)
    return result
