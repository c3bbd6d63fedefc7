"""Frames of a run, read once more from where the run had them.

Files, ROS recordings and ``synthetic:town`` are opened as the run opened them. Of live sources only
what ``livesfm run --record-input`` kept can be read again; it is, as long as it lies where it was.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import AsyncGenerator, Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.open_source import open_source
from adapters.recordings.replay import read_recorded, replayed_folder
from engine.config import Config, load_config
from engine.errors import ConfigError
from engine.events import SourceOpened, event_of_record
from engine.ports import LiveSource
from engine.regular_files import regular_file_size
from engine.types import Arrival, Frame, FrameId, Received, RejectedFrame

_MAX_LINE_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameSource:
    """Where some frames of a run can be read again."""

    label: str  # as the run names it
    prefix: str  # of its frames' names; "": none
    address: str

    def name_of(self, name: str) -> str:
        """What the run calls a frame that its source calls otherwise."""
        return f"{self.prefix}/{name}" if self.prefix else name


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SourceFrame:
    """A frame under its name in the run."""

    name: str
    frame: Frame


def find_sources(run: Path, labels: Collection[str], *, instead: str | None) -> list[FrameSource]:
    """The sources that have the frames of some labels.

    Args:
        run: the run folder.
        labels: of the sources that are needed.
        instead: where the user says that the frames are: the source under another path, or the
            folder of a recording; None: where the run had them.

    Raises:
        ConfigError: one of them cannot be read again.
    """
    opened = [one for one in _opened_sources(run) if one.source in labels]
    missing = set(labels) - {one.source for one in opened}
    if missing:
        raise ConfigError(f"{run}: events.jsonl does not say what its source {min(missing)} was")
    if instead is not None:
        return _replaced(opened, instead)
    return [
        FrameSource(label=one.source, prefix=one.prefix, address=_address_of(one)) for one in opened
    ]


def read_frames(
    sources: Sequence[FrameSource], names: Collection[str], *, config: Config
) -> Iterator[SourceFrame]:
    """Reads the frames of some names, each source in its order; those that are gone are missing.

    Args:
        sources: of the run.
        names: of the frames, in the run.
        config: of the run.

    Raises:
        SourceError: a source cannot be opened or read.
        ConfigError: likewise.
    """
    wanted = frozenset(names)
    recordings = {source.address: source for source in sources if _is_recording(source.address)}
    for address in recordings:
        yield from _read_recording(address, sources, wanted, config=config)
    for source in sources:
        if source.address not in recordings:
            yield from _read_source(source, sources, wanted, config=config)


def config_of(run: Path) -> Config:
    """The configuration of a run.

    Raises:
        ConfigError: it cannot be read.
    """
    return load_config(former=run / "config.yaml")


def _opened_sources(run: Path) -> list[SourceOpened]:
    """The sources of a run, each as it was opened last, with the recording of any part."""
    path = run / "events.jsonl"
    opened: dict[tuple[str, str], SourceOpened] = {}
    try:
        regular_file_size(path)  # refuses what is no file
        with path.open("rb") as file:
            while line := file.readline(_MAX_LINE_BYTES):
                event = _opened_source(line)
                if event is not None:
                    before = opened.get((event.source, event.prefix), event)
                    recording = event.recording or before.recording
                    opened[event.source, event.prefix] = replace(event, recording=recording)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    return list(opened.values())


def _opened_source(line: bytes) -> SourceOpened | None:
    """The event in a line, where it is one of a source; lines that are damaged are none."""
    if b'"SourceOpened"' not in line:
        return None
    try:
        record = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    event = event_of_record(record) if isinstance(record, dict) else None
    return event if isinstance(event, SourceOpened) else None


def _address_of(opened: SourceOpened) -> str:
    """What opens a source again.

    Raises:
        ConfigError: nothing does.
    """
    if replayed_folder(opened.address) is not None:
        return opened.address
    if opened.is_live and opened.recording:
        if not _is_recording(opened.recording):
            raise ConfigError(
                f"{opened.source}: was live, and what it sent between keyframes was kept in"
                f" {opened.recording}, where no recording is now: --source DIR says where it lies;"
                " --frames keyframes needs none"
            )
        return opened.recording
    if opened.is_live:
        raise ConfigError(
            f"{opened.source}: was live, and what it sent between keyframes is gone; a run with"
            " --record-input DIR keeps it: --source DIR reads it from there; --frames keyframes"
            " needs none"
        )
    if not opened.address:
        raise ConfigError(
            f"{opened.source}: its address held a secret, which no file keeps; name it again:"
            " --source ADDRESS"
        )
    return opened.address


def _replaced(opened: Sequence[SourceOpened], instead: str) -> list[FrameSource]:
    is_recording = _is_recording(instead)
    if len(opened) > 1 and not is_recording:
        labels = ", ".join(one.source for one in opened)
        raise ConfigError(f"--source {instead}: stands for one source, and frames are of {labels}")
    return [FrameSource(label=one.source, prefix=one.prefix, address=instead) for one in opened]


def _is_recording(address: str) -> bool:
    return replayed_folder(address) is not None or os.path.isfile(f"{address}/recording.json")


def _read_recording(
    address: str, sources: Sequence[FrameSource], wanted: frozenset[str], *, config: Config
) -> Iterator[SourceFrame]:
    folder = replayed_folder(address) or Path(address)
    prefixes = {source.label: source for source in sources if source.address == address}
    for label, arrival in read_recorded(folder, config=config.sources):
        source = prefixes.get(label)
        if source is not None and source.name_of(arrival.name) in wanted:
            yield from _decoded(source, arrival)


def _read_source(
    source: FrameSource,
    sources: Sequence[FrameSource],
    wanted: frozenset[str],
    *,
    config: Config,
) -> Iterator[SourceFrame]:
    ids = itertools.count(1)
    opened = open_source(
        source.address,
        config=config,
        next_frame_id=lambda: FrameId(next(ids)),
        beside=[one.address for one in sources],
    )
    if isinstance(opened, LiveSource):
        raise ConfigError(f"{source.address}: is live, and has not the frames of a former run")
    with closing(_items(opened.frames())) as items:
        for item in items:
            if isinstance(item, Arrival) and source.name_of(item.name) in wanted:
                yield from _decoded(source, item)


def _items(arriving: AsyncGenerator[Received, None]) -> Generator[Received, None, None]:
    """The items of an asynchronous iterator, for who has no event loop."""

    async def step() -> Received | None:
        return await anext(arriving, None)

    async def end() -> None:
        await arriving.aclose()

    with asyncio.Runner() as runner:
        try:
            while (item := runner.run(step())) is not None:
                yield item
        finally:
            runner.run(end())


def _decoded(source: FrameSource, arrival: Arrival) -> Iterator[SourceFrame]:
    frame = arrival.decode()
    if not isinstance(frame, RejectedFrame):
        yield SourceFrame(name=source.name_of(arrival.name), frame=frame)
