"""SVG by elements; texts and attributes are escaped, numbers are short."""

from __future__ import annotations

import math
from collections.abc import Iterable

from markupsafe import Markup, escape

from adapters.report.words import printable

Value = str | float | int


def element(name: str, *content: Markup | str, **attributes: Value) -> Markup:
    """An element; ``class_`` and ``text_anchor`` are written as ``class`` and ``text-anchor``."""
    start = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_shown(value))}"'
        for key, value in attributes.items()
    )
    inner = "".join(one if isinstance(one, Markup) else escape(printable(one)) for one in content)
    return Markup(f"<{name}{start}>{inner}</{name}>")  # noqa: S704 - all of it is escaped


def drawing(*content: Markup, width: float, height: float, label: str) -> Markup:
    """A whole SVG as wide as its place; ``label`` says what it shows to those who do not see it."""
    return element(
        "svg",
        *content,
        viewBox=f"0 0 {_shown(width)} {_shown(height)}",
        role="img",
        aria_label=label,
    )


def text(x: float, y: float, words: str, *, anchor: str = "start", class_: str = "dim") -> Markup:
    """A line of text; ``y`` is its base line."""
    return element("text", words, x=x, y=y, text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, *, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def circle(x: float, y: float, radius: float, *, class_: str, title: str = "") -> Markup:
    """A dot; its title appears below the pointer."""
    tip = [element("title", title)] if title else []
    return element("circle", *tip, cx=x, cy=y, r=radius, class_=class_)


def polyline(points: Iterable[tuple[float, float]], *, class_: str) -> Markup:
    """Lines from point to point; parts follow each other where a point is not finite."""
    words, is_open = [], False
    for x, y in points:
        is_finite = math.isfinite(x) and math.isfinite(y)
        if is_finite:
            words.append(f"{'L' if is_open else 'M'}{_shown(x)} {_shown(y)}")
        is_open = is_finite
    return element("path", d="".join(words), class_=class_)


def cross(x: float, y: float, radius: float, *, class_: str, title: str = "") -> Markup:
    """A cross of two strokes."""
    d = f"M{_shown(x - radius)} {_shown(y - radius)}L{_shown(x + radius)} {_shown(y + radius)}"
    d += f"M{_shown(x - radius)} {_shown(y + radius)}L{_shown(x + radius)} {_shown(y - radius)}"
    tip = [element("title", title)] if title else []
    return element("path", *tip, d=d, class_=class_)


def ticks(low: float, high: float, *, at_most: int = 6) -> list[tuple[float, str]]:
    """Round numbers from ``low`` to ``high``, multiples of 1, 2 or 5 times a power of ten.

    With their words: as many places as the step between them needs.
    """
    span = high - low
    if not (math.isfinite(span) and span > 0.0):
        return [(low, f"{low:g}")]
    step = round_number(span / max(at_most - 1, 1))
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    values = [i * step + 0.0 for i in range(first, last + 1)]
    return [(value, f"{value:,.{places}f}" if places < 7 else f"{value:.1e}") for value in values]


def round_number(value: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below a positive value."""
    power = 10.0 ** math.floor(math.log10(value))
    factor = next(one for one in (1.0, 2.0, 5.0, 10.0) if one * power >= value * (1 - 1e-9))
    return factor * power


def _shown(value: Value) -> str:
    if isinstance(value, str):
        return printable(value)
    return f"{value:.1f}".removesuffix(".0")
