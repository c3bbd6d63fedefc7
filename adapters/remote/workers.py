"""The workers of a cluster as a cluster process sees them: which are up, and what they hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True, eq=False)
class Worker:
    """A worker."""

    number: int
    handle: Any = None  # of the actor
    is_up: bool = False
    num_calls: int = 0  # on their way
    held: set[str] = field(default_factory=set)  # keys of states that it was given or made


class Workers:
    """Gives calls to workers: to those that hold what a call needs, else to those with least to do.

    For one event loop.

    Args:
        num: how many there are.
        max_calls: on their way to one of them; of calls that cannot wait as many besides.
    """

    def __init__(self, num: int, *, max_calls: int) -> None:
        self.all = [Worker(number=number) for number in range(num)]
        self._max_calls = max_calls
        self._changed = asyncio.Condition()
        self._urgent: set[object] = set()  # calls that wait and cannot

    @property
    def num_up(self) -> int:
        """Workers that answer."""
        return sum(worker.is_up for worker in self.all)

    async def take(
        self,
        keys: Collection[str],
        *,
        preferred: Worker | None = None,
        tried: Sequence[Worker] = (),
        is_ahead: Callable[[], bool] = lambda: False,
        is_needed: Callable[[], bool] = lambda: True,
        may_take: Callable[[Worker], bool] = lambda worker: True,
    ) -> Worker | None:
        """A worker for a call, as soon as one has room; `give_back` has to follow.

        Args:
            keys: of states that the call needs.
            preferred: the worker that has begun with it.
            tried: workers on which it failed; they are asked again where there are no others.
            is_ahead: whether it can wait, until none waits that cannot.
            is_needed: whether it still is.
            may_take: whether a worker has room for what the call leaves there.

        Returns:
            None when the call is not needed any more.
        """
        found: Worker | None = None
        waiting = object()

        def find() -> bool:
            nonlocal found
            if not is_needed():
                return True
            (self._urgent.discard if is_ahead() else self._urgent.add)(waiting)
            found = self._find(
                keys, preferred=preferred, tried=tried, is_ahead=is_ahead(), may_take=may_take
            )
            return found is not None

        async with self._changed:
            try:
                await self._changed.wait_for(find)
            finally:
                self._urgent.discard(waiting)
            if found is not None:
                found.num_calls += 1
            self._changed.notify_all()  # those that can wait may have their turn
        return found

    async def give_back(self, worker: Worker) -> None:
        """Says that a call has ended."""
        async with self._changed:
            worker.num_calls -= 1
            self._changed.notify_all()

    async def set_up(self, worker: Worker, is_up: bool) -> None:
        """Says whether a worker answers; one that does not holds nothing any more."""
        async with self._changed:
            worker.is_up = is_up
            if not is_up:
                worker.held.clear()
            self._changed.notify_all()

    async def notify(self) -> None:
        """Lets calls see that they are not needed any more."""
        async with self._changed:
            self._changed.notify_all()

    def _find(
        self,
        keys: Collection[str],
        *,
        preferred: Worker | None,
        tried: Sequence[Worker],
        is_ahead: bool,
        may_take: Callable[[Worker], bool],
    ) -> Worker | None:
        if is_ahead and self._urgent:
            return None
        limit = self._max_calls * (1 if is_ahead else 2)
        up = [worker for worker in self.all if worker.is_up]
        fresh = [worker for worker in up if worker not in tried] or up
        if preferred is not None and preferred in fresh:
            return preferred  # what it has done already takes no time
        free = [worker for worker in fresh if worker.num_calls < limit and may_take(worker)]
        return min(
            free,
            key=lambda one: (-sum(key in one.held for key in keys), one.num_calls, one.number),
            default=None,
        )
