"""A run that an event loop feeds."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, ParamSpec, Self

from engine.events import Event
from engine.types import (
    BoolArray,
    GpsFix,
    IntrinsicsPrior,
    MapCounts,
    MapView,
    Uint8Array,
    Verdict,
)
from livesfm.frames import HandedFrame, HandedPosition, RunEndedError
from livesfm.poses import Pose
from livesfm.run import DEFAULT_CAMERA, Run, RunResult, handed_frame, handed_position, open_run

if TYPE_CHECKING:
    from pathlib import Path

    import pycolmap

Params = ParamSpec("Params")

_MAX_WAITING = 100_000  # events that nobody takes; then the oldest are forgotten


class AsyncRun:
    """`Run` for asyncio: ``async with AsyncRun("runs/walk", config="phone") as run``.

    The run has an event loop and threads of its own; what would block here is awaited on a thread.
    Cancelling a call is safe: a frame is either added and its index returned, or not added.
    An object is for one block; entering it again raises `RunEndedError`.

    Args:
        path: of the run folder.
        config: as for `open_run`, like all that follow.
        overrides: settings by ``section.key``.
        lossless: `add_frame` waits while the engine is behind, and no frame is dropped.
        photos: each frame is a photo and becomes a keyframe; the run is lossless.
        overwrite: a former run in the folder is replaced.
        record: a Rerun recording is written into the folder.
        keep_map: the run copies its map now and then, for `map`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
        overrides: Mapping[str, object] | None = None,
        lossless: bool = False,
        photos: bool = False,
        overwrite: bool = False,
        record: bool = False,
        keep_map: bool = False,
    ) -> None:
        def open_it(on_event: Callable[[Event], None], on_end: Callable[[], None]) -> Run:
            return open_run(
                path,
                config=config,
                overrides=overrides,
                lossless=lossless,
                photos=photos,
                overwrite=overwrite,
                record=record,
                keep_map=keep_map,
                on_event=on_event,
                on_end=on_end,
            )

        self._open = open_it
        self._is_entered = False
        self._run: Run | None = None
        self._events: deque[Event] = deque(maxlen=_MAX_WAITING)
        self._something = asyncio.Event()
        self._is_over = False
        self._result: RunResult | None = None

    # -- in -------------------------------------------------------------------------------------

    async def add_frame(
        self,
        image: Uint8Array | bytes | bytearray | memoryview,
        *,
        captured_at_s: float | None = None,
        camera: str = DEFAULT_CAMERA,
        gps: GpsFix | None = None,
        intrinsics: IntrinsicsPrior | None = None,
        mask: BoolArray | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """As `Run.add_frame`; of a lossless run it is awaited until there is room."""
        handed = await asyncio.to_thread(
            handed_frame,
            image,
            captured_at_s=captured_at_s,
            camera=camera,
            gps=gps,
            intrinsics=intrinsics,
            mask=mask,
        )
        return await self._add(handed, timeout_s=timeout_s)

    async def add_position(
        self, fix: GpsFix, *, captured_at_s: float, camera: str | None = None
    ) -> None:
        """As `Run.add_position`; it waits like a frame."""
        await self._add(handed_position(fix, captured_at_s=captured_at_s, camera=camera))

    # -- out ------------------------------------------------------------------------------------

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
    def path(self) -> Path:
        """The run folder."""
        return self.run.path

    @property
    def counts(self) -> MapCounts:
        """How large the map is."""
        return self.run.counts

    @property
    def verdict(self) -> Verdict | None:
        """As `Run.verdict`."""
        return self.run.verdict

    @property
    def map(self) -> MapView | None:
        """The newest map for `keep_map` runs; None before there is one."""
        return self.run.map

    @property
    def result(self) -> RunResult | None:
        """How the run ended; None until `finish` has returned."""
        return self._result

    def new_poses(self, *, repeated: bool = False) -> list[Pose]:
        """As `Run.new_poses`."""
        return self.run.new_poses(repeated=repeated)

    def new_events(self) -> list[Event]:
        """As `Run.new_events`; those of `events` among them."""
        return self.run.new_events()

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yields events as they come, until the run has ended, by itself or not."""
        while True:
            while self._events:
                yield self._events.popleft()
            if self._is_over:
                return
            self._something.clear()
            await self._something.wait()

    def request_snapshot(self) -> None:
        """As `Run.request_snapshot`."""
        self.run.request_snapshot()

    async def reconstruction(self, number: int = 0) -> pycolmap.Reconstruction | None:
        """As `Run.reconstruction`."""
        return await asyncio.to_thread(self.run.reconstruction, number)

    # -- the end --------------------------------------------------------------------------------

    async def finish(self) -> RunResult:
        """As `Run.finish`. Cancelling gives up the waiting only."""
        if self._result is None:
            self._result = await asyncio.to_thread(self.run.finish)
        return self._result

    async def stop(self) -> None:
        """As `Run.stop`. Cancelling gives up the waiting only."""
        await asyncio.to_thread(self.run.stop)

    async def __aenter__(self) -> Self:
        if self._is_entered:  # opening the folder again would replace the run that is in it
            raise RunEndedError("an AsyncRun is for one `async with` block; open another")
        self._is_entered = True
        loop = asyncio.get_running_loop()
        given_up = threading.Event()

        def open_it() -> Run:
            run = self._open(_in_loop(loop, self._take), _in_loop(loop, self._end_events))
            if given_up.is_set():
                run.stop()
            return run

        opening = asyncio.create_task(asyncio.to_thread(open_it), name="opening the run")
        try:
            self._run = await asyncio.shield(opening)
        except asyncio.CancelledError:
            given_up.set()
            await asyncio.wait((opening,))
            if not opening.cancelled() and opening.exception() is None:
                await asyncio.to_thread(opening.result().stop)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            await self.finish()
        else:
            await asyncio.shield(self.stop())

    # -- helpers --------------------------------------------------------------------------------

    async def _add(
        self, handed: HandedFrame | HandedPosition, *, timeout_s: float | None = None
    ) -> int:
        """Adds in one step of the loop, so that cancelling finds it either done or not begun."""
        frames = self.run._frames
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        while (index := frames.add_if_room(handed)) is None:
            left_s = None if until_s is None else until_s - time.monotonic()
            given_up = threading.Event()
            try:
                has_room = await asyncio.to_thread(
                    frames.wait_for_room, timeout_s=left_s, given_up=given_up
                )
            finally:
                given_up.set()
                frames.stop_waiting()
            if not has_room:
                raise TimeoutError(f"the run took no frame for {timeout_s:g} s")
        return index

    def _take(self, event: Event) -> None:
        self._events.append(event)
        self._something.set()

    def _end_events(self) -> None:
        self._is_over = True
        self._something.set()


def _in_loop(
    loop: asyncio.AbstractEventLoop, call: Callable[Params, None]
) -> Callable[Params, None]:
    """A call that any thread may make, and that is made on the loop; none once it has closed."""

    def make(*args: Params.args, **kwargs: Params.kwargs) -> None:
        with suppress(RuntimeError):  # the loop has closed: nobody takes events any more
            loop.call_soon_threadsafe(lambda: call(*args, **kwargs))

    return make
