"""Sources that repeat a recorded run: ``livesfm run replay:DIR``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from adapters.images.decoding import RefusedImage, decode_image
from adapters.recordings.records import (
    CONFIG_NAME,
    DECISIONS_NAME,
    FORMAT_VERSION,
    HEADER_NAME,
    INPUT_NAME,
    DecisionRecord,
    FrameRecord,
    InputRecord,
    Record,
    RecordingHeader,
    from_text,
    image_path,
    mask_path,
)
from engine.config import SourcesConfig
from engine.errors import SourceError
from engine.regular_files import read_regular_file
from engine.types import (
    Arrival,
    BoolArray,
    DropReason,
    Frame,
    FrameId,
    GpsReading,
    Received,
    RejectedFrame,
    SourceInfo,
    TimingDecision,
)

SCHEME = "replay"
_MAX_TEXT_BYTES = 2**31
_MAX_IMAGE_BYTES = 2**30


def replayed_folder(spec: str) -> Path | None:
    """The folder of ``replay:DIR``; None where a source is something else."""
    scheme, colon, name = spec.partition(":")
    return Path(name) if colon and scheme.lower() == SCHEME else None


def recorded_config(folder: Path) -> Path:
    """The configuration of the recorded run, as an overlay.

    Raises:
        SourceError: the folder holds no recording.
    """
    path = folder / CONFIG_NAME
    if not (folder / HEADER_NAME).is_file() or not path.is_file():
        raise SourceError(f"{folder}: holds no recording of a run's input")
    return path


def open_replay(folder: Path, *, config: SourcesConfig) -> list[RepeatedSource]:
    """The sources of the recorded run, which give what they gave, in the order of that run.

    Args:
        folder: that ``--record-input`` named.
        config: limits on images.

    Raises:
        SourceError: it holds no recording, or a damaged one. A last line that was not written whole
            is left out: the run was killed.
    """
    header = _header(folder)
    records = _records(folder / INPUT_NAME, InputRecord)
    decisions = tuple(
        decision
        for record in _records(folder / DECISIONS_NAME, DecisionRecord)
        for decision in (record.tracking, record.mapping)
        if decision is not None
    )
    num_sources = len(header.sources)
    if any(not 0 <= record.source_idx < num_sources for record in records):
        raise SourceError(f"{folder / INPUT_NAME}: names a source that {HEADER_NAME} has not")
    turns = _Turns([record.source_idx for record in records])
    return [
        RepeatedSource(
            folder,
            source_idx=source_idx,
            recorded=info,
            records=records,
            decisions=decisions,
            turns=turns,
            config=config,
        )
        for source_idx, info in enumerate(header.sources)
    ]


def read_recorded(folder: Path, *, config: SourcesConfig) -> Iterator[tuple[str, Arrival]]:
    """The frames of a recording, each with the label of its source, source by source.

    Args:
        folder: that ``--record-input`` named.
        config: limits on images.

    Raises:
        SourceError: as `open_replay`.
    """
    for source in open_replay(folder, config=config):
        for arrival in source.arrivals():
            yield source.info.label, arrival


class RepeatedSource:
    """A source of a recorded run, live or not, as one that can wait; see ``RepeatsRun``."""

    def __init__(
        self,
        folder: Path,
        *,
        source_idx: int,
        recorded: SourceInfo,
        records: Sequence[InputRecord],
        decisions: Sequence[TimingDecision],
        turns: _Turns,
        config: SourcesConfig,
    ) -> None:
        self._folder = folder
        self._records = [
            (place, one) for place, one in enumerate(records) if one.source_idx == source_idx
        ]
        self._decisions = decisions
        self._turns = turns
        self._source_idx = source_idx
        self._config = config
        self._mask: tuple[FrameId, BoolArray] | None = None  # the last one
        frames = [one for _, one in self._records if one.frame is not None or one.rejected]
        self._info = replace(
            recorded,
            is_live=False,
            num_frames=len(frames),
            has_many_cameras=recorded.is_live or recorded.has_many_cameras,
        )

    @property
    def info(self) -> SourceInfo:
        """What the recorded source was, but that it waits."""
        return self._info

    def decisions(self) -> Sequence[TimingDecision]:
        """What the recorded run did because of its timing."""
        return self._decisions

    def arrivals(self) -> Iterator[Arrival]:
        """The frames of this source, at once; a run takes them by turns, see `frames`."""
        return (self._arrival(one.frame) for _, one in self._records if one.frame is not None)

    def readings(self) -> Sequence[tuple[int, GpsReading]]:
        """The positions of this source, each with its place in the whole input."""
        return [(place, one.reading) for place, one in self._records if one.reading is not None]

    async def frames(self) -> AsyncGenerator[Received, None]:
        """Yields each item when all that came before it, from any source, has been taken."""
        try:
            for place, record in self._records:
                await self._turns.come(place)
                item = self._item(record)
                if item is not None:
                    yield item
                self._turns.end(place)
        finally:
            self._turns.leave(self._source_idx)

    def _item(self, record: InputRecord) -> Received | None:
        if record.frame is not None:
            return self._arrival(record.frame)
        return record.rejected or record.reading or record.notice

    def _arrival(self, record: FrameRecord) -> Arrival:
        received_at_s = time.monotonic()

        def decode() -> Frame | RejectedFrame:
            return self._decoded(record, received_at_s=received_at_s)

        return Arrival(
            source=record.source,
            index=record.index,
            name=record.name,
            captured_at_s=record.captured_at_s,
            num_bytes=0,  # its file is read when it is decoded
            decode=decode,
        )

    def _decoded(self, record: FrameRecord, *, received_at_s: float) -> Frame | RejectedFrame:
        path = image_path(self._folder, record.frame_id, is_as_received=record.is_as_received)
        try:
            data = read_regular_file(path, max_bytes=_MAX_IMAGE_BYTES)
            mask = None if record.mask_of is None else self._read_mask(record.mask_of)
        except OSError as error:
            return _rejected(record, f"{path.name}: {error.strerror or error}")
        image = decode_image(data, config=self._config)
        if isinstance(image, RefusedImage):
            return _rejected(record, f"{path.name}: {image.detail}")
        return Frame(
            frame_id=record.frame_id,
            camera_key=record.camera_key,
            source=record.source,
            index=record.index,
            name=record.name,
            captured_at_s=record.captured_at_s,
            received_at_s=received_at_s,
            pixels=image.pixels,
            jpeg=data if record.is_as_received else None,
            gps=record.gps,
            gps_problem=record.gps_problem,
            intrinsics_prior=record.intrinsics_prior,
            quarter_turns=record.quarter_turns,
            mask=mask,
        )

    def _read_mask(self, frame_id: FrameId) -> BoolArray:
        if self._mask is None or self._mask[0] != frame_id:
            path = mask_path(self._folder, frame_id)
            image = decode_image(
                read_regular_file(path, max_bytes=_MAX_IMAGE_BYTES), config=self._config
            )
            if isinstance(image, RefusedImage):
                raise OSError(f"{path.name}: {image.detail}")
            self._mask = frame_id, np.ascontiguousarray(image.pixels[:, :, 0] > 0)
        return self._mask[1]


@dataclass(slots=True)
class _Turn:
    source_idx: int
    is_over: bool = False


class _Turns:
    """Whose turn it is among the sources of a run, one item after the other. For one event loop."""

    def __init__(self, source_idx: Sequence[int]) -> None:
        self._turns = [_Turn(one) for one in source_idx]
        self._next = 0
        self._changed: asyncio.Event | None = None

    async def come(self, place: int) -> None:
        """Waits until all items before one have had their turn, or will never have one."""
        while self._next < place:
            if self._changed is None:
                self._changed = asyncio.Event()
            await self._changed.wait()

    def end(self, place: int) -> None:
        """Says that an item had its turn."""
        self._turns[place].is_over = True
        self._go_on()

    def leave(self, source_idx: int) -> None:
        """Says that a source gives nothing more."""
        for turn in self._turns:
            turn.is_over |= turn.source_idx == source_idx
        self._go_on()

    def _go_on(self) -> None:
        while self._next < len(self._turns) and self._turns[self._next].is_over:
            self._next += 1
        if self._changed is not None:
            self._changed.set()
            self._changed = None


def _header(folder: Path) -> RecordingHeader:
    path = folder / HEADER_NAME
    try:
        header = from_text(_text(path), RecordingHeader)
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from error
    if header.format_version != FORMAT_VERSION:
        raise SourceError(
            f"{path}: has format {header.format_version}; this version reads {FORMAT_VERSION}"
        )
    return header


def _records(path: Path, kind: type[Record]) -> list[Record]:
    lines = _text(path).split("\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last end is not whole
        try:
            records.append(from_text(line, kind))
        except ValueError as error:
            raise SourceError(f"{path}: line {number}: {error}") from error
    return records


def _text(path: Path) -> str:
    try:
        return read_regular_file(path, max_bytes=_MAX_TEXT_BYTES).decode()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: is no text") from error


def _rejected(record: FrameRecord, detail: str) -> RejectedFrame:
    return RejectedFrame(
        source=record.source,
        index=record.index,
        name=record.name,
        captured_at_s=record.captured_at_s,
        reason=DropReason.UNREADABLE,
        detail=detail,
    )
