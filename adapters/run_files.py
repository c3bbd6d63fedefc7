"""Files of a run folder, read as a stranger's: sizes, names and numbers are checked first."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ConfigError, SnapshotError
from engine.model_files import ModelFileError, check_model_files
from engine.regular_files import read_regular_file
from engine.types import MAP_UNITS, METRES

if TYPE_CHECKING:
    import pycolmap

_MAX_TABLE_BYTES = 2**30
_MAX_WORDS_CHARS = 100  # of an error, which may quote the file
_COLUMNS = ("source", "index", "name", "captured_at_s", "status")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameRow:
    """A row of ``frames.csv``."""

    source: str
    index: int
    name: str
    captured_at_s: float
    status: str
    pose: str  # empty: not known
    map_number: str  # empty: none

    @property
    def is_dropped(self) -> bool:
        """Whether the frame was not used."""
        return self.status.startswith("dropped")


def read_frame_rows(run: Path) -> list[FrameRow]:
    """The table of a run's frames.

    Raises:
        ConfigError: it cannot be read, or is not such a table.
    """
    path = run / "frames.csv"
    try:
        table = csv.DictReader(io.StringIO(read_text(path)))
        missing = set(_COLUMNS) - set(table.fieldnames or ())
        if missing:
            raise ValueError(f"it has no column {min(missing)}")
        return [_frame_row(row) for row in table]
    except OSError as error:
        raise ConfigError(f"{run}: is not the folder of a run: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        words = str(error)[:_MAX_WORDS_CHARS]
        raise ConfigError(f"{path}: is not the table of a run's frames: {words}") from error


def read_model(folder: Path) -> pycolmap.Reconstruction:
    """A COLMAP model of a run, or of an export.

    Raises:
        SnapshotError: it is not whole, or refers to what is not in it, or a name in it leads
            elsewhere.
    """
    import pycolmap

    try:
        check_model_files(folder)
        return pycolmap.Reconstruction(folder)
    except ModelFileError as error:
        raise SnapshotError(f"{folder}: is not a whole COLMAP model: {error}") from error
    except (LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        words = str(error).partition("\n")[0] or type(error).__name__
        raise SnapshotError(f"{folder}: is not a whole COLMAP model: {words}") from error


def unit_of_map(run: Path) -> str:
    """The unit of a run's map: metres, or its own where the run did not say."""
    try:
        summary = json.loads(read_text(run / "summary.json"))
    except (OSError, ValueError):  # the run did not come to its end
        return MAP_UNITS
    is_metric = isinstance(summary, dict) and summary.get("unit") == METRES
    return METRES if is_metric else MAP_UNITS


def read_text(path: Path) -> str:
    """A text file of a run.

    Raises:
        OSError: it cannot be read, or is no file.
        ValueError: it is no text.
    """
    return read_regular_file(path, max_bytes=_MAX_TABLE_BYTES).decode()


def _frame_row(row: dict[str, str | None]) -> FrameRow:
    source, index, name, captured_at_s, status = (row[column] for column in _COLUMNS)
    if source is None or index is None or name is None or captured_at_s is None or status is None:
        raise ValueError("a row is cut short")
    if not math.isfinite(float(captured_at_s)):
        raise ValueError(f"the time of {name} is {captured_at_s}")
    return FrameRow(
        source=source,
        index=int(index),
        name=name,
        captured_at_s=float(captured_at_s),
        status=status,
        pose=row.get("pose") or "",
        map_number=row.get("map") or "",
    )
