"""Tracking while photos after a frame are decoded and described: how it ends."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.config import load_config
from engine.errors import InferenceError
from engine.ports import WorksAhead
from engine.run.ingestion import DecodedFrame
from engine.run.stages import TrackingStage
from engine.types import Frame, FrameId

KEYFRAMES_AHEAD = 2
NUM_TURNS = 200  # of the event loop: many more than any of these endings takes


class Photos:
    """Stands for `Ingestion`: photos, endless or until the source breaks."""

    def __init__(self, *, breaks_after: int | None = None) -> None:
        self.num_decoded = 0
        self._breaks_after = breaks_after

    async def next_frame(self) -> DecodedFrame:
        if self.num_decoded == self._breaks_after:
            raise OSError("the disk is gone")
        self.num_decoded += 1
        await asyncio.sleep(0)
        return cast(DecodedFrame, SimpleNamespace(source_idx=0, frame=self.num_decoded))


class Elsewhere:
    """A matcher that works elsewhere; keeps which frames are forgotten."""

    keyframes_ahead = KEYFRAMES_AHEAD

    def __init__(self) -> None:
        self.forgotten: list[int] = []

    def describe_ahead(self, frame: Frame) -> None:
        """Begins with nothing."""

    def forget_ahead(self, frame_id: FrameId) -> None:
        self.forgotten.append(frame_id)


def stage_of(photos: Any, *, ahead: Elsewhere | None = None, frames: Any = None) -> TrackingStage:
    """A stage whose matcher works elsewhere; nothing but its photos is used."""
    config = load_config()
    info = SimpleNamespace(is_live=False, is_sequence=False)
    unused: Any = None
    return TrackingStage(
        config.frame_tracking,
        two_view=config.two_view,
        sources=cast(Any, [SimpleNamespace(info=info)]),
        describe=unused,
        thread=unused,
        describing_thread=unused,
        frames=frames,
        items=unused,
        has_map=unused,
        ingestion=cast(Any, photos),
        warn=unused,
        faults=unused,
        log=unused,
        ahead=cast(WorksAhead, ahead or Elsewhere()),
    )


async def turns_until(is_so: Any) -> bool:
    for _ in range(NUM_TURNS):
        if is_so():
            return True
        await asyncio.sleep(0)
    return False


async def ends(task: asyncio.Task[None]) -> bool:
    """Whether a task ends by itself; it is left behind if not."""
    return await turns_until(task.done)


def run(work: Any) -> Any:
    """Runs a coroutine, and gives up tasks that do not end."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(work)
    finally:
        for task in asyncio.all_tasks(loop):
            cast(Any, task)._log_destroy_pending = False
        loop.close()


def test_tracking_that_breaks_ends_though_the_queue_of_decoded_photos_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photos = Photos()
    stage = stage_of(photos)

    async def broken(decoded: DecodedFrame) -> None:
        await turns_until(lambda: photos.num_decoded == KEYFRAMES_AHEAD + 2)
        raise KeyError("a fault of tracking")

    monkeypatch.setattr(stage, "_take", broken)

    async def outcome() -> BaseException | None:
        tracking = asyncio.create_task(stage.run())
        assert await ends(tracking)
        return tracking.exception()

    assert isinstance(run(outcome()), KeyError)


def test_tracking_ends_when_another_stage_breaks_while_photos_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photos = Photos()
    stage = stage_of(photos)

    async def waits(decoded: DecodedFrame) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(stage, "_take", waits)

    async def other() -> None:
        await turns_until(lambda: photos.num_decoded == KEYFRAMES_AHEAD + 2)
        raise RuntimeError("another stage breaks")

    async def stages() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(stage.run())
            group.create_task(other())

    async def outcome() -> BaseException | None:
        running = asyncio.create_task(stages())
        assert await ends(running)
        return running.exception()

    failure = run(outcome())
    assert isinstance(failure, ExceptionGroup)
    assert "another stage breaks" in str(failure.exceptions[0])


def test_photos_before_a_source_breaks_are_tracked_and_then_it_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photos = Photos(breaks_after=5)
    stage = stage_of(photos)
    tracked: list[Any] = []

    async def take(decoded: DecodedFrame) -> None:
        tracked.append(decoded.frame)

    monkeypatch.setattr(stage, "_take", take)

    async def outcome() -> BaseException | None:
        tracking = asyncio.create_task(stage.run())
        assert await ends(tracking)
        return tracking.exception()

    assert isinstance(run(outcome()), OSError)
    assert tracked == [1, 2, 3, 4, 5]


def test_what_was_begun_of_a_photo_that_is_dropped_is_forgotten() -> None:
    async def take_nothing(*_: Any, **__: Any) -> None:
        pass

    ahead = Elsewhere()
    stage = stage_of(
        SimpleNamespace(drop=take_nothing),
        ahead=ahead,
        frames=SimpleNamespace(give_back=take_nothing),
    )
    photo = cast(Frame, SimpleNamespace(frame_id=FrameId(7)))
    run(stage._drop(photo, InferenceError("it cannot be described")))
    assert ahead.forgotten == [7]
