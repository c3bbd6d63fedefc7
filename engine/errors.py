"""Exceptions of the engine; expected outcomes are values, see the status types.

EngineError
├── ConfigError               a configuration file or --set value is refused
│   └── FolderTakenError      a run folder holds something and is not to be replaced
├── SourceError               a source cannot be opened or read at all
├── AdapterUnavailableError   an optional package is missing; names the command that installs it
├── InferenceError            one description, pair or window failed; the run goes on
├── HangError                 a call did not return in time and was given up
│   └── PartOffError          no call is made: too many did not return
├── MapError                  an invariant of the map is broken
├── JournalError              the durable journal cannot be written or read
└── SnapshotError             a snapshot cannot be written
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of every error the engine raises on purpose."""


class ConfigError(EngineError):
    """A configuration value, key or file is refused."""


class FolderTakenError(ConfigError):
    """A run folder holds something and is not to be replaced.

    Args:
        reason: what it holds, and what to do but replacing it; the command line's option follows.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}, or --overwrite")
        self.reason = reason


class SourceError(EngineError):
    """A source cannot be opened or read at all."""


class AdapterUnavailableError(EngineError):
    """An optional package is missing."""

    def __init__(self, adapter: str, *, package: str, extra: str, how_to_install: str) -> None:
        super().__init__(f"{adapter} needs the package {package}: {how_to_install}")
        self.package = package
        self.extra = extra


class InferenceError(EngineError):
    """Describing one keyframe or matching one pair failed; the run goes on without it."""


class HangError(EngineError):
    """A call into a part of the run did not return in time; its thread was left behind."""


class PartOffError(HangError):
    """Calls into a part of the run hung so often that none is made any more."""


class MapError(EngineError):
    """An invariant of the map is broken."""


class JournalError(EngineError):
    """The durable journal of a run cannot be written or read."""


class SnapshotError(EngineError):
    """A snapshot cannot be written."""
