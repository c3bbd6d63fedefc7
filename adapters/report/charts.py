"""Charts of a report: histograms, bars, courses over keyframes or time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from adapters.report import svg
from engine.types import Float64Array

WIDTH, HEIGHT = 360.0, 200.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 10.0, 20.0, 34.0
_BAR_HEIGHT, _BAR_NAME_WIDTH = 19.0, 104.0
_MAX_POINTS = 400  # of a course


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Where values lie in a chart."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    height: float = HEIGHT

    def x(self, value: float) -> float:
        """The place of a value across."""
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """The place of a value upwards."""
        low, high = self.y_range
        inner = self.height - _TOP - _BOTTOM
        return self.height - _BOTTOM - (value - low) / (high - low) * inner

    def drawn(self, *, x_words: str, y_words: str) -> list[Markup]:
        """Lines and numbers of both axes."""
        base = self.height - _BOTTOM
        parts = [
            svg.text(_LEFT - 6, 10, y_words, anchor="start", class_="dim name"),
            svg.text(WIDTH - _RIGHT, self.height - 3, x_words, anchor="end", class_="dim name"),
        ]
        for value, words in svg.ticks(*self.y_range, at_most=5):
            y = self.y(value)
            parts.append(svg.line(_LEFT, y, WIDTH - _RIGHT, y, class_="grid"))
            parts.append(svg.text(_LEFT - 6, y + 4, words, anchor="end"))
        for value, words in svg.ticks(*self.x_range):
            x = self.x(value)
            parts.append(svg.line(x, base, x, base + 4, class_="axis"))
            at = min(x, WIDTH - 4.0 * len(words))
            parts.append(svg.text(at, base + 16, words, anchor="middle"))
        parts.append(svg.line(_LEFT, base, WIDTH - _RIGHT, base, class_="axis"))
        return parts


def histogram(
    values: Float64Array, *, x_words: str, y_words: str, label: str, num_bins: int = 24
) -> Markup:
    """How many values lie where; whole numbers get a bar each as long as there is room."""
    low, high = float(values.min()), float(values.max())
    if not high > low:
        low, high = low - 0.5, high + 0.5
    edges: Float64Array = np.linspace(low, high, num_bins + 1)
    counts = np.histogram(values, bins=edges)[0].astype(np.float64)
    axes = Axes(x_range=(low, high), y_range=(0.0, max(1.0, float(counts.max()))))
    return _bars(counts, edges, axes, x_words=x_words, y_words=y_words, label=label)


def count_histogram(
    counts: Mapping[int, int], *, x_words: str, y_words: str, label: str, at_most: int
) -> Markup:
    """How often whole numbers occur; those above ``at_most`` share the last bar."""
    low, top = min(*counts, at_most), min(max(counts), at_most)
    heights = np.array([counts.get(i, 0) for i in range(low, top + 1)], np.float64)
    heights[-1] += sum(num for i, num in counts.items() if i > top)
    edges: Float64Array = np.arange(low, top + 2, dtype=np.float64) - 0.5
    axes = Axes(x_range=(low - 0.5, top + 0.5), y_range=(0.0, max(1.0, heights.max())))
    return _bars(heights, edges, axes, x_words=x_words, y_words=y_words, label=label)


def _bars(
    heights: Float64Array,
    edges: Float64Array,
    axes: Axes,
    *,
    x_words: str,
    y_words: str,
    label: str,
) -> Markup:
    base = axes.y(0.0)
    bars = [
        svg.element(
            "rect",
            x=axes.x(left) + 0.5,
            y=axes.y(height),
            width=max(axes.x(right) - axes.x(left) - 1.0, 0.6),
            height=base - axes.y(height),
            class_="bar",
        )
        for left, right, height in zip(
            edges[:-1].tolist(), edges[1:].tolist(), heights.tolist(), strict=True
        )
        if height > 0
    ]
    drawn = axes.drawn(x_words=x_words, y_words=y_words)
    return svg.drawing(*drawn, *bars, width=WIDTH, height=HEIGHT, label=label)


def bars(values: Sequence[tuple[str, float, str]], *, label: str) -> Markup:
    """Named bars, one below the other: name, length, and the value in words."""
    longest = max((value for _, value, _ in values), default=0.0) or 1.0
    room = WIDTH - _BAR_NAME_WIDTH - 76.0
    parts = []
    for row, (name, value, words) in enumerate(values):
        y = row * _BAR_HEIGHT
        length = max(room * value / longest, 1.0)
        parts.append(svg.text(_BAR_NAME_WIDTH - 6, y + 14, name, anchor="end", class_="ink"))
        parts.append(
            svg.element(
                "rect", x=_BAR_NAME_WIDTH, y=y + 4, width=length, height=12, rx=2, class_="bar"
            )
        )
        parts.append(svg.text(_BAR_NAME_WIDTH + length + 6, y + 14, words))
    height = len(values) * _BAR_HEIGHT + 4
    return svg.drawing(*parts, width=WIDTH, height=height, label=label)


def course(
    x: Float64Array,
    lines: Sequence[tuple[str, Float64Array]],
    *,
    x_words: str,
    y_words: str,
    label: str,
    marks: Float64Array | None = None,
) -> Markup:
    """Values over an order or a time.

    Args:
        x: (N,), rising.
        lines: a CSS class and values (N,) each; not finite: no value.
        x_words: what ``x`` is.
        y_words: what the values are, with their unit.
        label: the chart in words.
        marks: (M,) places at the bottom that are marked.
    """
    tops = [float(np.nanmax(values, initial=0.0)) for _, values in lines]
    top = max([top for top in tops if math.isfinite(top)], default=0.0) or 1.0
    low, high = float(x.min()), float(x.max())
    if marks is not None and len(marks):
        low, high = min(low, float(marks.min())), max(high, float(marks.max()))
    if not high > low:
        low, high = low - 0.5, high + 0.5
    axes = Axes(x_range=(low, high), y_range=(0.0, 1.05 * top))
    parts = axes.drawn(x_words=x_words, y_words=y_words)
    step = max(1, -(-len(x) // _MAX_POINTS))
    for class_, values in lines:
        points = zip(x[::step].tolist(), values[::step].tolist(), strict=True)
        placed = [(axes.x(at), axes.y(value)) for at, value in points]
        if len(placed) <= 60:
            parts += [
                svg.circle(at, y, 2.2, class_=f"dot {class_}")
                for at, y in placed
                if math.isfinite(y)
            ]
        parts.append(svg.polyline(placed, class_=f"curve {class_}"))
    base = axes.y(0.0)
    for at in [] if marks is None else marks[:: max(1, -(-len(marks) // _MAX_POINTS))].tolist():
        parts.append(svg.line(axes.x(at), base - 7, axes.x(at), base, class_="mark wrong"))
    return svg.drawing(*parts, width=WIDTH, height=HEIGHT, label=label)
