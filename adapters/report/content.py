"""The parts of a report's page, before they are HTML."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A picture with its caption."""

    title: str
    picture: Markup  # an SVG or an image, with a text for those who do not see it
    caption: str = ""
    legend: tuple[tuple[str, str], ...] = ()  # CSS classes of marks, and what they mean
    needs_map: bool = True  # it is as right as the map is


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table; the first column names its rows."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    needs_map: bool = False
    is_text: bool = False  # its cells are words rather than numbers

    @property
    def is_wide(self) -> bool:
        """Whether it needs the width of the page."""
        return len(self.head) > 3 or (self.is_text and len(self.head) > 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A section of the page."""

    key: str
    title: str
    words: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    missing: tuple[str, ...] = ()  # what could not be shown, and why


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A key figure."""

    name: str
    value: str
    note: str = ""
    level: str = ""  # good, doubtful or wrong where it says something of the map


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """A reason of the verdict."""

    level: str
    sentence: str
    frames: str = ""  # which keyframes it is about


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """The verdict as the page begins with it."""

    level: str  # good, doubtful, wrong, none or unfinished
    title: str
    words: str
    reasons: tuple[Reason, ...] = ()
    next_steps: tuple[str, ...] = ()
    warning: str = ""  # beside each figure that depends on the map
