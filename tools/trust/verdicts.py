"""What a run says of its map: the verdict, and the words on the terminal."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NO_VERDICT = "none"  # of a version that gives none
GOOD = "good"
MIN_IN_MAP = 2  # images of a map


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """The verdict of ``summary.json`` and what the terminal printed."""

    level: str
    sentences: tuple[str, ...]
    terminal: str
    num_registered: int | None  # of ``summary.json``

    @property
    def words(self) -> str:
        """All sentences and the terminal's text."""
        return " ".join([*self.sentences, self.terminal])

    @property
    def num_registered_at_last(self) -> int | None:
        """How many keyframes the terminal's line about the map names."""
        found = re.findall(r"(\d+) of (\d+) keyframes registered", self.terminal)
        return int(found[-1][0]) if found else None

    def names(self, *patterns: str) -> bool:
        """Whether a sentence of the verdict holds one of the patterns."""
        return any(re.search(each, " ".join(self.sentences), re.I) for each in patterns)

    def shown(self, *, at_most: int = 3) -> str:
        """The level and the first sentences, for the table."""
        sentences = " / ".join(self.sentences[:at_most])
        return self.level + (f": {sentences}" if sentences else "")


def said_by(run: Path, output: str) -> Said:
    """Reads what a run says; level `NO_VERDICT` where ``summary.json`` has no verdict."""
    path = run / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    verdict = summary.get("verdict") or {}
    return Said(
        level=verdict.get("level", NO_VERDICT),
        sentences=tuple(reason["sentence"] for reason in verdict.get("reasons", ())),
        terminal=output.replace(str(run), "RUN"),  # a folder's name is no word of the run
        num_registered=summary.get("registered_keyframes"),
    )


def seconds_named(text: str) -> list[float]:
    """Lengths of time that a text names, in seconds."""
    return [float(value) for value in re.findall(r"(\d+(?:\.\d+)?) ?s(?:ec(?:onds?)?)?\b", text)]


def ranges_named(text: str) -> list[tuple[int, int]]:
    """Ranges of frames or keyframes that a text names."""
    found = re.findall(r"(\d+)(?:\.jpg)? ?(?:to|-|\u2013|and|until) ?(\d+)(?:\.jpg)?", text)
    return [(int(first), int(last)) for first, last in found]
