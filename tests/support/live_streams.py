"""Opens streams as sources and collects what comes of them, for tests."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from adapters.sources.streams.live_stream import LiveStream
from adapters.sources.streams.push_listener import EarlyListening
from engine.config import LiveSourcesConfig, SourcesConfig
from engine.types import Frame, FrameId, RejectedFrame, SourceNotice, SourceState
from tests.support.received import Decoded as Item
from tests.support.received import items_of
from tests.support.waiting import LeapingLoop

Kind = TypeVar("Kind")
QUICK: dict[str, float] = {
    "open_timeout_s": 60.0,
    "read_timeout_s": 60.0,
    "retry_first_s": 0.05,
    "retry_max_s": 0.1,
}


def open_stream(
    spec: str,
    *,
    live: dict[str, Any] | None = None,
    early: EarlyListening | None = None,
    **limits: Any,
) -> LiveStream:
    ids = itertools.count(1)
    return LiveStream(
        spec,
        sources=SourcesConfig(**limits),
        live_sources=LiveSourcesConfig(**{**QUICK, **(live or {})}),
        next_frame_id=lambda: FrameId(next(ids)),
        early=early,
    )


async def is_never_needed() -> None:
    pass


def read(
    stream: LiveStream,
    *,
    until: Callable[[list[Item]], bool] = lambda items: False,
    after: Callable[[Item], None] = lambda item: None,
    beside: Callable[[], Coroutine[Any, Any, None]] = is_never_needed,
) -> list[Item]:
    """What comes until the end, or until enough has come.

    ``after`` is called for each item, and ``beside`` runs from the beginning.
    """

    async def collect() -> list[Item]:
        items: list[Item] = []
        async with aclosing(items_of(stream)) as arriving, asyncio.TaskGroup() as group:
            group.create_task(beside())
            async for item in arriving:
                items.append(item)
                after(item)
                if until(items):
                    break
        return items

    with asyncio.Runner(loop_factory=LeapingLoop) as runner:
        return runner.run(collect())


def of_kind(items: Sequence[Item], kind: type[Kind]) -> list[Kind]:
    return [item for item in items if isinstance(item, kind)]


def frames_of(items: Sequence[Item]) -> list[Frame]:
    return of_kind(items, Frame)


def states_of(items: Sequence[Item]) -> list[SourceState]:
    return [notice.state for notice in of_kind(items, SourceNotice)]


def num_frames(num: int) -> Callable[[list[Item]], bool]:
    return lambda items: len(frames_of(items)) >= num


def reported(state: SourceState, times: int = 1) -> Callable[[list[Item]], bool]:
    return lambda items: states_of(items).count(state) >= times


def assert_all_counted(items: Sequence[Item]) -> None:
    indices = [item.index for item in items if isinstance(item, Frame | RejectedFrame)]
    assert indices == list(range(len(indices)))


def assert_in_order_of_capture(items: Sequence[Item]) -> None:
    times_s = [frame.captured_at_s for frame in frames_of(items)]
    assert all(before < after for before, after in itertools.pairwise(times_s))
    assert all(abs(time_s - time.time()) < 60.0 for time_s in times_s)


def details_of(items: Sequence[Item], state: SourceState) -> list[str]:
    return [notice.detail for notice in of_kind(items, SourceNotice) if notice.state is state]
