"""The records of a recording, a line of JSON each, and where its files lie.

DIR/recording.json      format version, and what the sources were
    config.yaml         of the run, without masks and calibrations: frames have theirs
    input.jsonl         in the order in which the run took it in: `InputRecord`
    decisions.jsonl     what depended on timing: `DecisionRecord`
    frames/ID.jpg       a frame as received, where its bytes decode to its pixels; else ID.png
    masks/ID.png        of a frame whose mask is another one than that of the frame before
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from engine.types import (
    FrameId,
    GpsFix,
    GpsReading,
    IntrinsicsPrior,
    MappingDecision,
    RejectedFrame,
    SourceInfo,
    SourceNotice,
    TrackingDecision,
)

FORMAT_VERSION = 1
HEADER_NAME = "recording.json"
CONFIG_NAME = "config.yaml"
INPUT_NAME = "input.jsonl"
DECISIONS_NAME = "decisions.jsonl"
FRAMES_FOLDER = "frames"
MASKS_FOLDER = "masks"

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingHeader:
    """What a recording is of."""

    format_version: int
    sources: tuple[SourceInfo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameRecord:
    """A frame that was decoded, under the names of its source; its image is a file."""

    frame_id: FrameId
    camera_key: str
    source: str
    index: int
    name: str
    captured_at_s: float
    is_as_received: bool  # the file has the bytes that were received
    quarter_turns: int
    mask_of: FrameId | None  # the frame under whose id its mask lies; None: it has none
    gps: GpsFix | None
    intrinsics_prior: IntrinsicsPrior | None
    gps_problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRecord:
    """One thing that a source gave; all but one of the last four are None."""

    source_idx: int
    frame: FrameRecord | None = None
    rejected: RejectedFrame | None = None
    reading: GpsReading | None = None
    notice: SourceNotice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionRecord:
    """One decision; the other one is None."""

    tracking: TrackingDecision | None = None
    mapping: MappingDecision | None = None


def as_line(record: RecordingHeader | InputRecord | DecisionRecord) -> str:
    """A record as a line of JSON, without its end; floats keep every bit."""
    fields = _adapter(cast("Hashable", type(record))).dump_python(
        record, mode="json", exclude_defaults=True
    )
    return json.dumps(fields, ensure_ascii=True)


def from_text(text: str, kind: type[Record]) -> Record:
    """The record of a kind that JSON stands for.

    Raises:
        ValueError: it stands for none, in one line.
    """
    try:
        record: Record = _adapter(cast("Hashable", kind)).validate_python(json.loads(text))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{place}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON: {error}") from error
    return record


def image_path(folder: Path, frame_id: FrameId, *, is_as_received: bool) -> Path:
    """Where the image of a frame lies."""
    return folder / FRAMES_FOLDER / f"{frame_id:06d}.{'jpg' if is_as_received else 'png'}"


def mask_path(folder: Path, frame_id: FrameId) -> Path:
    """Where a mask lies."""
    return folder / MASKS_FOLDER / f"{frame_id:06d}.png"


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
