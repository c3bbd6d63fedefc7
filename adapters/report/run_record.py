"""What a run left, read as a stranger's: each part that is missing or damaged is named instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from adapters.report.events import EventDigest, read_events
from adapters.report.map_figures import MapFigures, measure_map
from adapters.report.summary import Summary, VerdictRecord, read_snapshot, read_summary
from adapters.run_files import FrameRow, read_frame_rows, read_model
from engine.errors import ConfigError, SnapshotError
from engine.plain_yaml import load_plain_yaml
from engine.regular_files import read_regular_file, regular_file_size
from engine.types import MAP_UNITS, METRES, VerdictLevel

if TYPE_CHECKING:
    import pycolmap

_MAX_SUMMARY_BYTES = 2**26
_MAX_CONFIG_BYTES = 2**20
_MAX_MODEL_BYTES = 2**30  # of a model that is read besides; larger ones take seconds and memory
_MODEL_FILES = ("images.bin", "points3D.bin")
_MAX_CHARS = 160  # of an error, which may quote a file

Read = TypeVar("Read")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What the folder of a run holds."""

    path: Path
    summary: Summary
    events: EventDigest
    frames: tuple[FrameRow, ...]
    config: dict[str, Any]  # as it was written
    map: MapFigures | None
    missing: dict[str, str] = field(default_factory=dict)  # why, by the file

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end; else it goes on, or was killed."""
        return "summary.json" not in self.missing and (
            self.events.is_finished or "events.jsonl" in self.missing
        )

    @property
    def verdict(self) -> VerdictRecord | None:
        """The verdict on the map; of an unfinished run the last one; None: nothing was said."""
        return self.summary.verdict if self.is_finished else self.events.verdict

    @property
    def has_map(self) -> bool:
        """Whether there is a map of at least two keyframes."""
        return self.summary.registered_keyframes >= 2 or (
            self.map is not None and len(self.map.frame_ids) >= 2
        )

    @property
    def doubt(self) -> VerdictLevel | None:
        """The level of the verdict where it is not good."""
        verdict = self.verdict
        return None if verdict is None or verdict.level is VerdictLevel.GOOD else verdict.level

    @property
    def is_georeferenced(self) -> bool:
        """Whether the map is in metres east, north, up."""
        return self.summary.georeference is not None

    @property
    def unit(self) -> str:
        """The unit of lengths in the map."""
        is_metric = self.is_georeferenced or self.summary.unit == METRES
        return "m" if is_metric else MAP_UNITS

    def name_of(self, frame_id: int) -> str:
        """How a keyframe is called: photos by their file, frames of videos by their number."""
        line = self.events.keyframes.get(frame_id)
        if line is None:
            return f"keyframe {frame_id}"
        return line.name if line.is_photo else f"frame {line.index}"


def read_run(run: Path) -> RunRecord:
    """Reads a run that ended, goes on, or was killed.

    Raises:
        ConfigError: the folder is not that of a run.
    """
    missing: dict[str, str] = {}

    def read(name: str, reader: Callable[[Path], Read], default: Read) -> Read:
        try:
            return reader(run / name)
        except FileNotFoundError:
            missing[name] = "is not there"
        except OSError as error:
            missing[name] = f"cannot be read: {error.strerror or error}"
        except (ConfigError, SnapshotError, ValueError) as error:
            words = str(error).replace(f"{run}/", "")
            missing[name] = f"cannot be used: {words[:_MAX_CHARS]}"
        return default

    frames = tuple(read_frame_rows(run))
    summary = read("summary.json", _summary, Summary())
    if "summary.json" in missing:
        summary = read("latest/snapshot.json", _snapshot, summary)
    return RunRecord(
        path=run,
        summary=summary,
        events=read("events.jsonl", read_events, EventDigest()),
        frames=frames,
        config=read("config.yaml", _config, {}),
        map=read("latest/sparse/0", _map, None),
        missing=missing,
    )


def _summary(path: Path) -> Summary:
    return read_summary(read_regular_file(path, max_bytes=_MAX_SUMMARY_BYTES))


def _snapshot(path: Path) -> Summary:
    return read_snapshot(read_regular_file(path, max_bytes=_MAX_SUMMARY_BYTES))


def _config(path: Path) -> dict[str, Any]:
    config = load_plain_yaml(read_regular_file(path, max_bytes=_MAX_CONFIG_BYTES).decode())
    if not isinstance(config, dict):
        raise ValueError("it holds no settings")
    return config


def _map(path: Path) -> MapFigures | None:
    size = sum(regular_file_size(path / name) for name in _MODEL_FILES)
    if size > _MAX_MODEL_BYTES:
        raise ValueError(f"{size / 1e9:.1f} GB are too much to read for a report")
    reconstruction: pycolmap.Reconstruction = read_model(path)
    return measure_map(reconstruction) if reconstruction.num_reg_images() else None
