"""Runs without cameras, shared by tests: sources that play a synthetic world, and what runs leave.

The frames of a world hold no picture worth looking at; the matcher knows what they see.
"""

from __future__ import annotations

import asyncio
import csv
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import Config, load_config
from engine.errors import InferenceError
from engine.output.run_folder import RunFolder
from engine.ports import ArrivalSink, PairMatcher, Source, View
from engine.run.engine import Engine, RunOutcome
from engine.types import (
    Arrival,
    DropReason,
    Features,
    Frame,
    FrameId,
    GpsReading,
    Received,
    RejectedFrame,
    SourceInfo,
    SourceNotice,
    Uint8Array,
)
from tests.support.synthetic import HEIGHT, WIDTH, FakeMatcher, SyntheticWorld, straight_path

JPEG = b"\xff\xd8\xff\xda\x00\x02 as received \xff\xd9"  # a scan and the end
_BLANK = np.zeros((HEIGHT, WIDTH, 3), np.uint8)

Happening = Frame | Received | Exception | Callable[[], Awaitable[None]]


@lru_cache
def world_of(num_frames: int) -> SyntheticWorld:
    """A straight flight; made once, since worlds never change."""
    return SyntheticWorld(straight_path(num_frames))


def frame_of(
    frame_id: int,
    *,
    index: int | None = None,
    camera_key: str = "camera",
    pixels: Uint8Array = _BLANK,
    world: SyntheticWorld | None = None,
) -> Frame:
    """A frame of a world, with the calibration its source would give."""
    index = frame_id - 1 if index is None else index
    return Frame(
        frame_id=FrameId(frame_id),
        camera_key=camera_key,
        source="fake",
        index=index,
        name=f"{index:06d}.jpg",
        captured_at_s=0.1 * index,
        received_at_s=time.monotonic(),
        pixels=pixels,
        jpeg=JPEG,
        intrinsics_prior=world.camera(frame_id).prior if world is not None else None,
    )


def frames_of(world: SyntheticWorld) -> list[Frame]:
    """All frames of a world in order."""
    return [frame_of(frame_id, world=world) for frame_id in world.frame_ids]


def rejected(index: int) -> RejectedFrame:
    """A frame that its source could not read."""
    return RejectedFrame(
        source="fake",
        index=index,
        name=f"{index:06d}.jpg",
        captured_at_s=0.1 * index,
        reason=DropReason.UNREADABLE,
        detail="damaged",
    )


@dataclass(kw_only=True)
class FakeSource:
    """Plays happenings: what is received is yielded, exceptions raised, functions awaited.

    Frames arrive with the pixels they have; their camera is their lane.
    """

    happenings: Iterable[Happening]
    label: str = "fake"
    is_sequence: bool = False
    num_frames: int | None = None
    num_given: int = 0
    is_closed: bool = False

    @property
    def info(self) -> SourceInfo:
        """What it is made to be."""
        return SourceInfo(
            label=self.label,
            is_live=False,
            is_sequence=self.is_sequence,
            num_frames=self.num_frames,
        )

    async def frames(self) -> AsyncGenerator[Received, None]:
        try:
            for happening in self.happenings:
                if isinstance(happening, Exception):
                    raise happening
                if isinstance(happening, Frame):
                    self.num_given += 1
                    yield Arrival.of(happening, lane=happening.camera_key)
                elif isinstance(happening, Arrival | RejectedFrame | GpsReading | SourceNotice):
                    self.num_given += isinstance(happening, Arrival | RejectedFrame)
                    yield happening
                else:
                    await happening()
        finally:
            self.is_closed = True


@dataclass(kw_only=True)
class FakeLiveSource:
    """Plays happenings as `FakeSource` does, and waits for nobody."""

    happenings: Iterable[Happening]
    label: str = "fake"
    is_sequence: bool = False
    is_closed: bool = False

    @property
    def info(self) -> SourceInfo:
        """A live camera."""
        return SourceInfo(
            label=self.label, is_live=True, is_sequence=self.is_sequence, num_frames=None
        )

    async def receive(self, sink: ArrivalSink) -> None:
        played = FakeSource(happenings=self.happenings)
        async with aclosing(played.frames()) as items:
            async for item in items:
                sink(item)
                await asyncio.sleep(0)
        self.is_closed = True


@dataclass(kw_only=True)
class WorldMatcher(FakeMatcher):
    """Describes frames by what they see in the world.

    ``before_describing`` is called first, on the describing thread, and may block or raise;
    ``undescribed`` frames cannot be described.
    """

    undescribed: Collection[int] = ()
    before_describing: Callable[[Frame], None] = lambda frame: None
    described: list[FrameId] = field(default_factory=list)

    def describe(self, frame: Frame) -> Features:
        self.before_describing(frame)
        if frame.frame_id in self.undescribed:
            raise InferenceError(f"{frame.name}: too dark")
        self.described.append(frame.frame_id)
        return self.world.keyframe(frame.frame_id).features


def engine_of(
    path: Path,
    *,
    matcher: PairMatcher,
    sources: Sequence[Source],
    settings: Sequence[str] = (),
    views: Sequence[View] = (),
    **options: Any,
) -> Engine:
    """An engine whose run folder is ``path``; ``options`` of `Engine`."""
    config: Config = load_config((), settings)
    folder = RunFolder.create(path, config_text="{}")
    return Engine(config, folder=folder, sources=sources, matcher=matcher, views=views, **options)


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a run left on disk."""

    rows: list[dict[str, str]]  # of frames.csv
    events: list[dict[str, Any]]
    summary: dict[str, Any]

    @classmethod
    def by(cls, outcome: RunOutcome) -> Written:
        """Of a run that ended."""
        return cls.read(outcome.path)

    @classmethod
    def read(cls, path: Path) -> Written:
        """Of a run folder."""
        with (path / "frames.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        lines = (path / "events.jsonl").read_text().splitlines()
        return cls(
            rows=rows,
            events=[json.loads(line) for line in lines],
            summary=json.loads((path / "summary.json").read_text()),
        )

    @property
    def statuses(self) -> list[str]:
        """Of all frames, in order of arrival."""
        return [row["status"] for row in self.rows]

    def of_kind(self, event: str) -> list[dict[str, Any]]:
        """The events of one kind, in order."""
        return [record for record in self.events if record["event"] == event]

    def warnings(self) -> list[str]:
        """Messages of all warnings, in order."""
        return [record["message"] for record in self.of_kind("Warned")]


def trajectory_lines(path: Path) -> list[str]:
    """The poses of a TUM file."""
    return [line for line in path.read_text().splitlines() if not line.startswith("#")]
