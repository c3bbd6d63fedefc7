"""Reads a run's database without trusting it: types, sizes and the sum of them are checked."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engine.errors import JournalError

_BUSY_TIMEOUT_S = 5.0  # for which another program may hold the database
_MAX_VALUE_BYTES = 256_000_000  # of one text or array; a keyframe has some 150 kB
_MAX_STEPS = 2_000_000_000  # of SQLite's machine, in all: a row takes some 50
_STEPS_PER_CHECK = 1_000_000
_NAMED_WRONG = "holds values that no run writes"

Columns = Mapping[str, type | tuple[type, ...]]  # names, and which types their values may have


class DatabaseReader:
    """A database of a run at one moment, read-only.

    Whatever is in the file, reading ends, and takes no more memory than a few times its size.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, *, max_bytes: int) -> None:
        """Wraps an open database; use `reading`."""
        self._path = path
        self._connection = connection
        self._num_bytes_left = max_bytes  # that all values together may have
        self._num_steps = 0
        connection.set_progress_handler(self._has_too_many_steps, _STEPS_PER_CHECK)

    @classmethod
    @contextmanager
    def reading(cls, path: Path) -> Iterator[Self]:
        """Opens a database for the block, in which it stays as it is at the beginning.

        Raises:
            JournalError: it is none, is locked or broken, or the block finds values in it that
                raise KeyError, TypeError, ValueError or OverflowError.
        """
        connection = None
        try:
            if not path.is_file():
                raise JournalError(
                    f"{path}: is missing: it held the keyframes and pairs of the run, which cannot"
                    " go on without them; evaluate and export still read its snapshots"
                )
            log = path.with_name(f"{path.name}-wal")
            max_bytes = path.stat().st_size + (log.stat().st_size if log.is_file() else 0)
            connection = sqlite3.connect(
                f"file:{quote(str(path.resolve()))}?mode=ro",
                uri=True,
                isolation_level=None,
                timeout=_BUSY_TIMEOUT_S,
            )
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("BEGIN")
            yield cls(path, connection, max_bytes=max_bytes)
        except OSError as error:
            raise JournalError(f"{path}: cannot be read: {error.strerror or error}") from error
        except sqlite3.Error as error:
            raise JournalError(
                f"{path}: cannot be read: {error}; evaluate and export still read the snapshots of"
                " the run"
            ) from error
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise JournalError(f"{path}: {_NAMED_WRONG}: {_line(error)}") from error
        finally:
            if connection is not None:
                connection.close()

    def has_table(self, name: str) -> bool:
        """Whether there is a table of that name; a view is none."""
        found = self._connection.execute(
            "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (name,)
        )
        return found.fetchone() is not None

    def require(self, tables: Sequence[str]) -> None:
        """Refuses a database that lacks some tables.

        Raises:
            JournalError: it does.
        """
        missing = [name for name in tables if not self.has_table(name)]
        if missing:
            raise JournalError(f"{self._path}: has no table {', '.join(missing)}")

    def rows(self, table: str, columns: Columns, *, order: str) -> Iterator[tuple[Any, ...]]:
        """Values of some columns, row by row.

        Args:
            table: a table of the database.
            columns: names, and which Python types their values may have.
            order: the column to sort by.

        Raises:
            ValueError: a value is of another type, or all together are larger than the file.
        """
        names = ", ".join(columns)
        allowed = tuple(columns.values())
        for row in self._connection.execute(f"SELECT {names} FROM {table} ORDER BY {order}"):
            for name, value, kinds in zip(columns, row, allowed, strict=True):
                if not isinstance(value, kinds):
                    raise ValueError(f"{table}.{name}")
                if isinstance(value, (bytes, str)):
                    self._num_bytes_left -= len(value)
            if self._num_bytes_left < 0:
                raise ValueError(f"{table} is larger than the file")
            yield row

    def _has_too_many_steps(self) -> bool:
        self._num_steps += _STEPS_PER_CHECK
        return self._num_steps > _MAX_STEPS


def array_of(
    data: bytes, dtype: DTypeLike, shape: tuple[int, ...], *, name: str = "array"
) -> NDArray[Any]:
    """An array from its bytes, read-only; row by row.

    Raises:
        ValueError: there are more or fewer bytes than the shape needs.
    """
    kind = np.dtype(dtype)
    if any(length < 0 for length in shape) or len(data) != kind.itemsize * _product(shape):
        raise ValueError(f"{name}: {len(data)} bytes for the shape {shape}")
    return np.frombuffer(data, kind).reshape(shape)


def json_object(text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the text is none.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("JSON that is no object")
    return value


def _product(shape: tuple[int, ...]) -> int:
    """Without overflow, as of Python's numbers."""
    product = 1
    for length in shape:
        product *= length
    return product


def _line(error: Exception) -> str:
    """An error's first words."""
    return " ".join(str(error).split())[:200] or type(error).__name__
