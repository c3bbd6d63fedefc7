from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pycolmap
import pytest
from engine.run.event_queue import EventQueue

from engine.config import Config, load_config
from engine.events import Event, SnapshotWritten, Warned, WindowSolved
from engine.mapping.mapper import MappingPipeline
from engine.matching.place_recognition import PlaceRecognizer
from engine.matching.scene_graph import SceneGraph
from engine.output.recorder import Recorder
from engine.output.run_folder import RunFolder
from engine.run import background
from engine.run.background import MapUpkeep
from engine.run.event_loop import Writer
from tests.support.fake_runs import world_of
from tests.support.synthetic import FakeMatcher

WAIT_S = 20.0
NUM_FRAMES = 16
WORLD = world_of(NUM_FRAMES)

WINDOWS = [
    "window.size=4",
    "window.num_older=4",
    "window.interval=3",
    "window.min_keyframes=8",
    "window.merge_after_keyframes=2",
]
BACKGROUND = [
    "global_bundle_adjustment.synchronous_until=0",
    "global_bundle_adjustment.merge_after_keyframes=2",
]


class Upkeep:
    """A growing map with its upkeep, the keyframes added by hand."""

    def __init__(self, path: Path, *settings: str, stack: ExitStack) -> None:
        config: Config = load_config((), settings)
        self.events = EventQueue()
        self.pipeline = MappingPipeline(
            config,
            matcher=FakeMatcher(world=WORLD),
            graph=SceneGraph(
                config.scene_graph, recognizer=PlaceRecognizer(config.retrieval, seed=0)
            ),
            emit=self.events,
            clock=self.events.clock,
        )
        recorder = Recorder(
            RunFolder.create(path, config_text="{}"),
            snapshots=config.snapshots,
            runtime=config.runtime,
            emit=self.events,
            clock=self.events.clock,
        )
        stack.callback(recorder.close)
        mapping, adjusting, writing = (stack.enter_context(ThreadPoolExecutor(1)) for _ in range(3))
        self.failures: list[Exception] = []
        self.writer = Writer(writing, failed=self.failures.append)
        self.upkeep = MapUpkeep(
            config,
            pipeline=self.pipeline,
            mapping_thread=mapping,
            adjusting_thread=adjusting,
            recorder=recorder,
            writer=self.writer,
            events=self.events,
        )

    def add(self, first: int, last: int) -> None:
        for frame_id in range(first, last + 1):
            self.pipeline.add_keyframe(WORLD.keyframe(frame_id))

    def told(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events.take() if isinstance(event, kind)]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """Runs a test of an upkeep with settings, everything written at its end."""

    def run_test(test: Callable[[Upkeep], Awaitable[None]], *settings: str) -> None:
        async def with_writer() -> None:
            with ExitStack() as stack:
                made = Upkeep(tmp_path / "run", *settings, stack=stack)
                async with made.writer.running():
                    await test(made)
                assert made.failures == []

        asyncio.run(asyncio.wait_for(with_writer(), WAIT_S), debug=True)

    return run_test


async def all_written(made: Upkeep) -> None:
    written = asyncio.Event()

    async def tell() -> None:
        written.set()

    await made.writer.schedule(lambda: None, then=tell)
    await written.wait()


def latest(path: Path) -> pycolmap.Reconstruction:
    return pycolmap.Reconstruction(path / "run" / "latest" / "sparse" / "0")


# -- snapshots ------------------------------------------------------------------------------------


def test_a_snapshot_is_due_after_so_many_new_keyframes(run: Callable[..., None]) -> None:
    async def test(made: Upkeep) -> None:
        for frame_id in range(1, NUM_FRAMES + 1):
            made.add(frame_id, frame_id)
            await made.upkeep.snapshot_if_due()
            await all_written(made)
        told = made.told(SnapshotWritten)
        nums = [event.num_keyframes for event in told if isinstance(event, SnapshotWritten)]
        assert nums == [5, 10, 15]

    run(test, "snapshots.every_keyframes=5", "snapshots.every_s=0")


def test_a_snapshot_is_due_after_so_long_when_something_is_new(run: Callable[..., None]) -> None:
    async def test(made: Upkeep) -> None:
        made.add(1, 6)
        await asyncio.sleep(0.02)
        for _ in range(3):
            await made.upkeep.snapshot_if_due()
            await all_written(made)
        assert len(made.told(SnapshotWritten)) == 1
        made.add(7, 7)
        await asyncio.sleep(0.02)
        await made.upkeep.snapshot_if_due()
        await all_written(made)
        assert len(made.told(SnapshotWritten)) == 1

    run(test, "snapshots.every_keyframes=0", "snapshots.every_s=0.01")


def test_a_small_map_is_not_written_yet(run: Callable[..., None], tmp_path: Path) -> None:
    async def test(made: Upkeep) -> None:
        made.add(1, 6)
        await made.upkeep.snapshot_if_due()

    run(test, "snapshots.every_keyframes=1", "snapshots.min_registered=7")
    assert not (tmp_path / "run" / "latest").exists()


def test_a_slow_disk_gets_no_second_snapshot_before_the_first_is_written(
    run: Callable[..., None], tmp_path: Path
) -> None:
    disk_is_slow = threading.Event()

    def hold() -> None:
        assert disk_is_slow.wait(WAIT_S)

    async def test(made: Upkeep) -> None:
        await made.writer.schedule(hold)
        for frame_id in range(1, 13):
            made.add(frame_id, frame_id)
            await made.upkeep.snapshot_if_due()
        disk_is_slow.set()

    run(test, "snapshots.every_keyframes=1", "snapshots.every_s=0")
    (snapshot,) = (tmp_path / "run" / "snapshots").iterdir()
    assert latest(tmp_path).num_reg_images() == 4
    assert snapshot.name == "000001"


def test_a_snapshot_is_of_the_map_as_it_was_when_it_was_taken(
    run: Callable[..., None], tmp_path: Path
) -> None:
    async def test(made: Upkeep) -> None:
        made.add(1, 8)
        await made.upkeep.snapshot(is_final=True)
        made.add(9, 12)

    run(test)
    assert latest(tmp_path).num_reg_images() == 8


# -- global adjustment ----------------------------------------------------------------------------


def test_an_adjustment_is_merged_a_fixed_number_of_keyframes_after_its_start(
    run: Callable[..., None],
) -> None:
    async def test(made: Upkeep) -> None:
        made.add(1, 8)
        await made.upkeep.start_adjustment_if_due()
        merged_at = []
        for frame_id in range(9, 13):
            before = made.pipeline.merge_is_due
            await made.upkeep.merge_adjustment_if_due(wait=True)
            if before:
                merged_at.append(frame_id)
            made.add(frame_id, frame_id)
        assert merged_at == [11]

    run(test, *BACKGROUND)


def test_a_live_run_does_not_wait_for_an_adjustment_that_takes_longer(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()

    def slow(*_: Any, **__: Any) -> None:
        assert may_end.wait(WAIT_S)

    monkeypatch.setattr(background, "solve_globally", slow)

    async def test(made: Upkeep) -> None:
        made.add(1, 8)
        await made.upkeep.start_adjustment_if_due()
        made.add(9, 12)
        await made.upkeep.merge_adjustment_if_due(wait=False)
        assert made.pipeline.merge_is_due
        may_end.set()
        await made.upkeep.merge_adjustment()
        assert not made.pipeline.merge_is_due

    run(test, *BACKGROUND)


def test_an_adjustment_that_fails_is_told_and_forgotten(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no solution")

    monkeypatch.setattr(background, "solve_globally", fail)

    async def test(made: Upkeep) -> None:
        made.add(1, 8)
        await made.upkeep.start_adjustment_if_due()
        await made.upkeep.merge_adjustment()
        (warning,) = made.told(Warned)
        assert isinstance(warning, Warned)
        assert warning.message == "global bundle adjustment failed: no solution"
        made.add(9, 12)
        assert not made.pipeline.merge_is_due
        monkeypatch.undo()
        await made.upkeep.start_adjustment_if_due()
        await made.upkeep.merge_adjustment()
        assert made.told(Warned) == []

    run(test, *BACKGROUND)


def test_an_abandoned_adjustment_is_not_waited_for(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()

    def slow(*_: Any, **__: Any) -> None:
        assert may_end.wait(WAIT_S)

    monkeypatch.setattr(background, "solve_globally", slow)

    async def test(made: Upkeep) -> None:
        await made.upkeep.abandon_adjustment()  # there is none yet
        made.add(1, 8)
        await made.upkeep.start_adjustment_if_due()
        await made.upkeep.abandon_adjustment()
        assert not may_end.is_set()
        may_end.set()

    run(test, *BACKGROUND)


# -- windows --------------------------------------------------------------------------------------


def test_a_window_is_solved_beside_the_map_and_merged_keyframes_later(
    run: Callable[..., None],
) -> None:
    async def test(made: Upkeep) -> None:
        made.add(1, 9)
        await made.upkeep.start_window_if_due()
        await made.upkeep.merge_window_if_due(wait=True)
        assert made.told(WindowSolved) == []  # its time has not come
        made.add(10, 11)
        assert made.pipeline.window_merge_is_due
        await made.upkeep.merge_window_if_due(wait=True)
        (event,) = made.told(WindowSolved)
        assert isinstance(event, WindowSolved)
        assert event.keyframe_ids == tuple(range(2, 10))
        assert not made.pipeline.window_merge_is_due

    run(test, *WINDOWS)


def test_a_window_in_flight_is_waited_for_at_the_end_or_given_up(
    run: Callable[..., None],
) -> None:
    async def test(made: Upkeep) -> None:
        made.add(1, 9)
        await made.upkeep.start_window_if_due()
        await made.upkeep.merge_window()
        assert len(made.told(WindowSolved)) == 1
        made.add(10, 16)
        await made.upkeep.start_window_if_due()
        await made.upkeep.abandon_all()
        assert made.told(WindowSolved) == []

    run(test, *WINDOWS)
