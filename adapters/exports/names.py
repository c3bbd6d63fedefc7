"""Names of images in one folder, for formats without subfolders."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath


def flat_names(names: Iterable[str]) -> dict[str, str]:
    """A name without folders, white space and # for each name, unique whatever the case of letters.

    Names that are so already stay as they are, if no other one before took them.
    """
    flat: dict[str, str] = {}
    taken: set[str] = set()
    for name in sorted(names, key=lambda name: (_flattened(name) != name, name)):
        path = PurePosixPath(_flattened(name))
        candidate, number = path.name, 2
        while candidate.lower() in taken:
            candidate, number = f"{path.stem}_{number}{path.suffix}", number + 1
        taken.add(candidate.lower())
        flat[name] = candidate
    return flat


def _flattened(name: str) -> str:
    return re.sub(r"[\s/\\#]+", "_", name)
