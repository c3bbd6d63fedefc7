"""Writes what a run receives into a folder: ``livesfm run --record-input DIR``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from adapters.recordings.records import (
    CONFIG_NAME,
    DECISIONS_NAME,
    FORMAT_VERSION,
    FRAMES_FOLDER,
    HEADER_NAME,
    INPUT_NAME,
    MASKS_FOLDER,
    DecisionRecord,
    FrameRecord,
    InputRecord,
    RecordingHeader,
    as_line,
    image_path,
    mask_path,
)
from engine.config import Config, dump_config
from engine.errors import ConfigError, JournalError
from engine.types import (
    BoolArray,
    Frame,
    FrameId,
    GpsReading,
    MappingDecision,
    RejectedFrame,
    SourceInfo,
    SourceNotice,
    TimingDecision,
    Uint8Array,
)

_PNG_COMPRESSION = 1  # of 9: pictures of a stream come several times a second


class FolderRecording:
    """An ``InputRecording`` in a folder of its own; each line is readable once it is written."""

    def __init__(self, path: Path) -> None:
        """Opens the files of a folder that `create` made."""
        self._path = path
        self._input = (path / INPUT_NAME).open("x", encoding="utf-8")
        self._decisions = (path / DECISIONS_NAME).open("x", encoding="utf-8")
        self._mask: tuple[FrameId, BoolArray] | None = None  # the last one, and whose file it is

    @classmethod
    def create(
        cls, path: Path, *, config: Config, sources: Sequence[SourceInfo]
    ) -> FolderRecording:
        """Makes the folder of a recording.

        Args:
            path: a folder that does not exist, or is empty.
            config: of the run.
            sources: what they are, in their order.

        Raises:
            ConfigError: the folder holds something, or cannot be made.
        """
        cameras = config.cameras.model_copy(update={"masks": {}, "calibrations": ()})
        header = RecordingHeader(format_version=FORMAT_VERSION, sources=tuple(sources))
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise ConfigError(f"{path}: exists and is not empty; choose another folder")
            for folder in (FRAMES_FOLDER, MASKS_FOLDER):
                (path / folder).mkdir()
            text = dump_config(config.model_copy(update={"cameras": cameras}))
            (path / CONFIG_NAME).write_text(text, encoding="utf-8")
            (path / HEADER_NAME).write_text(as_line(header) + "\n", encoding="utf-8")
            return cls(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error

    def add_frame(self, frame: Frame, *, source_idx: int) -> None:
        """Writes the image, a mask that is new, and the record that names them.

        A picture that was decoded from a stream or a video is kept as PNG, without loss.

        Raises:
            JournalError: something cannot be written.
        """
        is_as_received = frame.jpeg is not None
        record = FrameRecord(
            frame_id=frame.frame_id,
            camera_key=frame.camera_key,
            source=frame.source,
            index=frame.index,
            name=frame.name,
            captured_at_s=frame.captured_at_s,
            is_as_received=is_as_received,
            quarter_turns=frame.quarter_turns,
            mask_of=self._mask_of(frame),
            gps=frame.gps,
            gps_problem=frame.gps_problem,
            intrinsics_prior=frame.intrinsics_prior,
        )
        path = image_path(self._path, frame.frame_id, is_as_received=is_as_received)
        data = frame.jpeg if frame.jpeg is not None else _png(frame.pixels[:, :, ::-1])
        with self._writing():
            path.write_bytes(data)
        self._add(InputRecord(source_idx=source_idx, frame=record))

    def add_report(
        self, report: RejectedFrame | GpsReading | SourceNotice, *, source_idx: int
    ) -> None:
        """Writes its record.

        Raises:
            JournalError: it cannot be written.
        """
        match report:
            case RejectedFrame():
                self._add(InputRecord(source_idx=source_idx, rejected=report))
            case GpsReading():
                self._add(InputRecord(source_idx=source_idx, reading=report))
            case SourceNotice():
                self._add(InputRecord(source_idx=source_idx, notice=report))

    def add_decision(self, decision: TimingDecision) -> None:
        """Writes its record.

        Raises:
            JournalError: it cannot be written.
        """
        with self._writing():
            record = (
                DecisionRecord(mapping=decision)
                if isinstance(decision, MappingDecision)
                else DecisionRecord(tracking=decision)
            )
            self._decisions.write(as_line(record) + "\n")
            self._decisions.flush()

    def flush(self) -> None:
        """Waits until all lines are on the disk.

        Raises:
            JournalError: they cannot be written.
        """
        with self._writing():
            for file in (self._input, self._decisions):
                os.fsync(file.fileno())

    def close(self) -> None:
        """Closes the files."""
        for file in (self._input, self._decisions):
            with suppress(OSError):  # each line was flushed, or reported
                file.close()

    def discard(self) -> None:
        """Deletes what `create` wrote: no run received anything."""
        self.close()
        with suppress(OSError):
            for name in (INPUT_NAME, DECISIONS_NAME, CONFIG_NAME, HEADER_NAME):
                (self._path / name).unlink()
            for folder in (FRAMES_FOLDER, MASKS_FOLDER):
                (self._path / folder).rmdir()
            self._path.rmdir()

    def _add(self, record: InputRecord) -> None:
        with self._writing():
            self._input.write(as_line(record) + "\n")
            self._input.flush()

    def _mask_of(self, frame: Frame) -> FrameId | None:
        if frame.mask is None:
            return None
        is_same = self._mask is not None and (
            self._mask[1] is frame.mask or np.array_equal(self._mask[1], frame.mask)
        )
        if self._mask is None or not is_same:
            with self._writing():
                data = _png(frame.mask.view(np.uint8) * np.uint8(255))
                mask_path(self._path, frame.frame_id).write_bytes(data)
            self._mask = frame.frame_id, frame.mask
        return self._mask[0]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise JournalError(f"{self._path}: cannot be written: {error.strerror}") from error


def _png(image: Uint8Array) -> bytes:
    import cv2

    is_encoded, data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, _PNG_COMPRESSION])
    if not is_encoded:
        raise JournalError("a picture cannot be encoded")
    return bytes(data)
