"""LiveSfM from Python: frames in; poses, events and a COLMAP reconstruction out.

A run lives on threads of its own; `Run` is used from any thread, `AsyncRun` from an event loop.
Nothing here is global: several runs may go on at a time, and no signal is taken.
"""

from engine import events
from engine.errors import (
    AdapterUnavailableError,
    ConfigError,
    EngineError,
    JournalError,
    SnapshotError,
)
from engine.events import Event
from engine.types import (
    DropReason,
    FrameId,
    GpsFix,
    IntrinsicsPrior,
    MapCounts,
    MapView,
    Verdict,
    VerdictLevel,
)
from livesfm.async_run import AsyncRun
from livesfm.frames import RunEndedError
from livesfm.poses import Pose
from livesfm.run import Run, RunResult, open_run

__all__ = [
    "AdapterUnavailableError",
    "AsyncRun",
    "ConfigError",
    "DropReason",
    "EngineError",
    "Event",
    "FrameId",
    "GpsFix",
    "IntrinsicsPrior",
    "JournalError",
    "MapCounts",
    "MapView",
    "Pose",
    "Run",
    "RunEndedError",
    "RunResult",
    "SnapshotError",
    "Verdict",
    "VerdictLevel",
    "events",
    "open_run",
]
