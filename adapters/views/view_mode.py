"""Where a run is shown; light, for the command line."""

from __future__ import annotations

from enum import StrEnum


class ViewMode(StrEnum):
    """Where the Rerun view of a run is shown."""

    RECORD = "record"  # in a file only
    SPAWN = "spawn"  # also in a window that is opened
    SERVE = "serve"  # also to browsers
    NONE = "none"
