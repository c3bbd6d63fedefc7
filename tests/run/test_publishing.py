"""What leaves a run while it goes on: what is written, shown and counted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest

from engine.config import RuntimeConfig, SnapshotsConfig, ViewsConfig
from engine.events import Event, LoopClosed, Warned
from engine.mapping.steps import KeyframeRecord, MappingStep
from engine.output.recorder import Recorder
from engine.output.run_folder import RunFolder
from engine.output.statistics import RunStatistics
from engine.run.publishing import Publisher
from engine.run.queues import EventQueue, Writer
from engine.run.views import ViewDispatcher
from engine.types import Frame, FrameId, FramePose, MapCounts, MapView
from tests.support.fake_runs import frame_of, trajectory_lines, world_of
from tests.support.faults import FaultsSeen

HANG_S = 300.0  # a guard, no measure
NOTHING = MappingStep(record=None, new_poses=(), jobs=(), due=(), counts=MapCounts(), view=None)
MAP = MapView(
    version=3,
    keyframe_ids=np.empty(0, np.int64),
    cam_from_world=np.empty((0, 3, 4)),
    focal_px=np.empty(0),
    image_sizes=np.empty((0, 2), np.int64),
    points3D_in_world=np.empty((0, 3), np.float32),
    colors=np.empty((0, 3), np.uint8),
    chunk_ids=np.empty(0, np.int64),
    edges=np.empty((0, 2), np.int64),
    edge_reasons=(),
)


class OfferedViews(ViewDispatcher):
    """Keeps what it is offered."""

    def __init__(self) -> None:
        super().__init__([], ViewsConfig(), faults=FaultsSeen(), max_call_s=60.0)
        self.frames: list[tuple[int, FramePose | None]] = []
        self.maps: list[MapView] = []
        self.events: list[Event] = []
        self.is_map_wanted = False

    def wants_map(self) -> bool:
        """As the test says."""
        return self.is_map_wanted

    def offer_frame(self, frame: Frame, pose: FramePose | None) -> None:
        """Keeps a frame and its pose."""
        self.frames.append((frame.frame_id, pose))

    def offer_map(self, view: MapView) -> None:
        """Keeps a map."""
        self.maps.append(view)

    def offer_event(self, event: Event) -> None:
        """Keeps an event."""
        self.events.append(event)


class Published:
    """A publisher and what it published."""

    def __init__(self, path: Path) -> None:
        self.events = EventQueue()
        self.statistics = RunStatistics()
        self.views = OfferedViews()
        self.recorder = Recorder(
            RunFolder.create(path, config_text="{}"),
            snapshots=SnapshotsConfig(),
            runtime=RuntimeConfig(),
            emit=self.events,
        )

    async def run(self, test: Callable[[Publisher], Awaitable[None]]) -> None:
        """Runs a test; everything is written at its end."""
        failures: list[Exception] = []
        with ThreadPoolExecutor(1) as thread:
            writer = Writer(thread, failed=failures.append)
            publisher = Publisher(
                events=self.events,
                statistics=self.statistics,
                views=self.views,
                recorder=self.recorder,
                writer=writer,
            )
            async with writer.running():
                await test(publisher)
        self.recorder.close()
        assert failures == []

    def written_events(self) -> list[dict[str, Any]]:
        """The lines of events.jsonl."""
        lines = (self.recorder.path / "events.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def published(tmp_path: Path) -> Published:
    return Published(tmp_path / "run")


def run(published: Published, test: Callable[[Publisher], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(published.run(test), HANG_S), debug=True)


def pose_of(frame_id: int) -> FramePose:
    return FramePose(
        frame_id=FrameId(frame_id),
        index=frame_id - 1,
        captured_at_s=0.1 * frame_id,
        cam_from_world=np.eye(4)[:3],
        is_keyframe=True,
    )


def test_pairs_that_changed_after_the_last_keyframe_are_journaled(published: Published) -> None:
    world = world_of(2)
    camera = world.camera(2).as_colmap()
    camera.camera_id = 1
    pair = world.verified_pair(1, 2)
    for frame_id in world.frame_ids:
        record = KeyframeRecord(
            keyframe=replace(world.keyframe(frame_id), name=f"{frame_id}.jpg"),
            camera=camera,
            pairs=(pair,) if frame_id == 2 else (),
            moved=(),
        )
        published.recorder.frame_arrived(frame_of(frame_id))
        published.recorder.step_taken(replace(NOTHING, record=record), frame_of(frame_id))
    changed = replace(pair, inlier_matches_idx=pair.inlier_matches_idx[:7])

    async def test(publisher: Publisher) -> None:
        await publisher.publish_step(replace(NOTHING, changed_pairs=(changed,)))

    run(published, test)
    with pycolmap.Database.open(published.recorder.path / "database.db") as database:
        np.testing.assert_array_equal(database.read_matches(1, 2), changed.inlier_matches_idx)
    assert pair.num_inliers > 7


def test_new_poses_are_written_and_the_frame_is_shown_with_its_own(published: Published) -> None:
    own, earlier = pose_of(5), pose_of(3)

    async def test(publisher: Publisher) -> None:
        await publisher.publish_step(replace(NOTHING, new_poses=(earlier, own)), frame_of(5))
        await publisher.publish_step(NOTHING, frame_of(6))  # has no pose yet
        await publisher.publish_step(replace(NOTHING, new_poses=(pose_of(6),)))

    run(published, test)
    assert published.views.frames == [(5, own), (6, None)]
    lines = trajectory_lines(published.recorder.path / "trajectory_live.txt")
    assert [float(line.split()[0]) for line in lines] == pytest.approx([0.3, 0.5, 0.6])


def test_a_map_is_shown_where_a_step_holds_one(published: Published) -> None:
    async def test(publisher: Publisher) -> None:
        for is_wanted in (False, True):
            published.views.is_map_wanted = is_wanted
            assert publisher.wants_view is is_wanted
        await publisher.publish_step(NOTHING)
        assert published.views.maps == []
        await publisher.publish_step(replace(NOTHING, view=MAP))
        assert published.views.maps == [MAP]

    run(published, test)


def test_events_are_counted_shown_and_written_once_in_order(published: Published) -> None:
    async def test(publisher: Publisher) -> None:
        published.events.warn("one")
        published.events(LoopClosed(first=FrameId(1), second=FrameId(9), num_inliers=40))
        await publisher.publish_events()
        await publisher.publish_events()  # nothing is left
        published.events.warn("three")
        await publisher.publish_step(NOTHING)

    run(published, test)
    assert [type(event) for event in published.views.events] == [Warned, LoopClosed, Warned]
    written = published.written_events()
    assert [record["event"] for record in written] == ["Warned", "LoopClosed", "Warned"]
    assert [record["at_s"] for record in written] == [
        event.at_s for event in published.views.events
    ]
    assert published.statistics.figures()["loops_closed"] == 1


def test_the_last_events_are_returned_to_be_written_by_the_caller(published: Published) -> None:
    async def test(publisher: Publisher) -> None:
        published.events.warn("last")
        (event,) = publisher.take_events()
        assert published.views.events == [event]
        assert publisher.take_events() == []

    run(published, test)
    assert published.written_events() == []
