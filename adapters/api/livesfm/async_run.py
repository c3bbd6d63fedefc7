"""A run that an event loop feeds."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from engine.events import Event
from engine.types import MapCounts, Uint8Array
from livesfm.poses import Pose
from livesfm.run import Run, RunResult, open_run

if TYPE_CHECKING:
    import pycolmap

_MAX_WAITING = 100_000  # events that nobody takes; then the oldest are forgotten


class AsyncRun:
    """`Run` for asyncio: ``async with AsyncRun("runs/walk", config="phone") as run``.

    The run has an event loop and threads of its own; what would block here is awaited on a thread.

    Args:
        path: of the run folder.
        options: as for `open_run`, but for ``on_event``; see `events`.
    """

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        self._path = path
        self._options = options
        self._run: Run | None = None
        self._events: deque[Event] = deque(maxlen=_MAX_WAITING)
        self._something = asyncio.Event()
        self._is_over = False
        self._result: RunResult | None = None

    @property
    def run(self) -> Run:
        """The run.

        Raises:
            RuntimeError: it is used outside ``async with``.
        """
        if self._run is None:
            raise RuntimeError("the run begins with `async with`")
        return self._run

    @property
    def counts(self) -> MapCounts:
        """How large the map is."""
        return self.run.counts

    @property
    def result(self) -> RunResult | None:
        """How the run ended; None until it did."""
        return self._result

    async def add_frame(self, image: Uint8Array | bytes, **about: Any) -> int:
        """As `Run.add_frame`; of a lossless run it is awaited until there is room."""
        return await asyncio.to_thread(self.run.add_frame, image, **about)

    def new_poses(self) -> list[Pose]:
        """As `Run.new_poses`."""
        return self.run.new_poses()

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yields events as they come, until the run is over."""
        while True:
            while self._events:
                yield self._events.popleft()
            if self._is_over:
                return
            self._something.clear()
            await self._something.wait()

    async def reconstruction(self, number: int = 0) -> pycolmap.Reconstruction | None:
        """As `Run.reconstruction`."""
        return await asyncio.to_thread(self.run.reconstruction, number)

    async def finish(self) -> RunResult:
        """As `Run.finish`."""
        if self._result is None:
            try:
                self._result = await asyncio.to_thread(self.run.finish)
            finally:
                self._end_events()
        return self._result

    async def __aenter__(self) -> Self:
        listen = self._listener(asyncio.get_running_loop())
        self._run = await asyncio.to_thread(open_run, self._path, on_event=listen, **self._options)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            await self.finish()
            return
        await asyncio.shield(asyncio.to_thread(self.run.stop))
        self._end_events()

    def _listener(self, loop: asyncio.AbstractEventLoop) -> Callable[[Event], None]:
        def take(event: Event) -> None:
            self._events.append(event)
            self._something.set()

        def listen(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(take, event)

        return listen

    def _end_events(self) -> None:
        self._is_over = True
        self._something.set()
