"""Names of cameras, as users write them to say which one they mean."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import PurePath

from engine.types import Frame


def names_of(frame: Frame) -> list[str]:
    """What a pattern may name: the camera's key and its parts, the source and its last part."""
    label = frame.source.rstrip("/")
    names = [frame.camera_key, *frame.camera_key.split("|"), frame.source, PurePath(label).name]
    return list(dict.fromkeys(name for name in names if name))


def is_named(pattern: str, names: Collection[str]) -> bool:
    """Whether a pattern, as ``fnmatch`` has them, matches a name; letters' case does not matter."""
    return any(fnmatchcase(name.casefold(), pattern.casefold()) for name in names)
