"""Reads descriptors of keyframes back from the database of a run that goes on."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine.output.colmap_tables import descriptors_of_row
from engine.types import FrameId, Uint8Array

_BUSY_TIMEOUT_S = 5.0


class StoredDescriptors:
    """The descriptors in a run's database, by a connection that only reads. One thread at a time.

    Args:
        folder: gives the run folder, which may move while the run goes on.
    """

    def __init__(self, folder: Callable[[], Path]) -> None:
        self._folder = folder
        self._path: Path | None = None
        self._connection: sqlite3.Connection | None = None

    def read(self, frame_id: FrameId) -> Uint8Array | None:
        """The descriptors (N, D) of a keyframe; None where they are not there, or not readable."""
        try:
            row = (
                self._connected()
                .execute(
                    "SELECT rows, cols, data, type FROM descriptors WHERE image_id = ?",
                    (int(frame_id),),
                )
                .fetchone()
            )
        except sqlite3.Error:
            self.close()
            return None
        if row is None or len(row[2]) != row[0] * row[1]:
            return None
        return descriptors_of_row(row[3], np.frombuffer(row[2], np.uint8).reshape(row[0], row[1]))

    def close(self) -> None:
        """Closes the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connected(self) -> sqlite3.Connection:
        path = self._folder() / "database.db"
        if self._connection is None or path != self._path:
            self.close()
            self._path = path
            self._connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=ro",
                uri=True,
                timeout=_BUSY_TIMEOUT_S,
                isolation_level=None,
                check_same_thread=False,
            )
        return self._connection
