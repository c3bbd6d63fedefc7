"""Rerun limits: the size of the recording, and the memory of the live server."""

from __future__ import annotations

import logging
from pathlib import Path

logger = logging.getLogger(__name__)

_MB = 1_000_000
_REDRAW_RATIO = 0.4  # of the server's memory: what was sent before that is still in it


class RecordingLimit:
    """Watches the size of the recording on disk.

    Once it is full it stays full: images, graphs, redrawn maps and the dense map are left out from
    then on, the curves and the log go on, and the sparse map is drawn once more at the end.
    """

    def __init__(self, path: Path | None, *, max_mb: int) -> None:
        """Watches a file.

        Args:
            path: the recording; None: there is none, so nothing is ever full.
            max_mb: its size, in MB; 0: no limit.
        """
        self._path = path
        self._max_bytes = max_mb * _MB
        self._is_full = False

    @property
    def is_full(self) -> bool:
        """Whether the recording may take curves and lines of the log only."""
        if self._path is None or not self._max_bytes or self._is_full:
            return self._is_full
        try:
            size = self._path.stat().st_size
        except OSError:  # it does not exist yet; its writer reports errors
            return False
        if size >= self._max_bytes:
            self._is_full = True
            logger.warning(
                "%s holds %d MB: from now on without images; the sparse map follows at the end",
                self._path,
                size // _MB,
            )
        return self._is_full


class RedrawSchedule:
    """Decides when the whole map must be sent to a live server again.

    The server's memory is limited and drops the oldest data first, but parts of the map that do not
    change are sent only once. They are sent again before viewers that connect late would miss them.
    """

    def __init__(self, *, memory_limit_mb: int) -> None:
        self._redraw_after_bytes = _REDRAW_RATIO * memory_limit_mb * _MB
        self._bytes_since_redraw = 0

    def add_sent_bytes(self, num_bytes: int) -> None:
        """Counts bytes sent to the server."""
        self._bytes_since_redraw += num_bytes

    def take_due(self) -> bool:
        """Whether everything must be sent again; if so, counting starts anew."""
        is_due = self._bytes_since_redraw >= self._redraw_after_bytes
        if is_due:
            self._bytes_since_redraw = 0
        return is_due
