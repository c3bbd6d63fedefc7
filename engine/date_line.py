"""Shapes on the globe that are cut at the date line, as GeoJSON wants them (RFC 7946, 3.1.9).

Places are (P, 2) or (P, 3), longitude and latitude in degrees first.
"""

from __future__ import annotations

import numpy as np

from engine.types import Float64Array

_DATE_LINE_DEG = 180.0


def _unwrapped(places: Float64Array) -> Float64Array:
    """Places whose longitudes go on past 180 degrees instead of starting again."""
    unwrapped = places.copy()
    unwrapped[:, 0] = np.unwrap(places[:, 0], period=360.0)
    return unwrapped


def cut_line(places: Float64Array) -> tuple[Float64Array, ...]:
    """A line, or its parts on either side of the date line."""
    line = _unwrapped(places)
    parts, part = [], [line[0]]
    for first, second in zip(line[:-1], line[1:], strict=True):
        for edge in (-_DATE_LINE_DEG, _DATE_LINE_DEG):
            if (first[0] < edge) != (second[0] < edge):
                share = (edge - first[0]) / (second[0] - first[0])
                crossing = first + share * (second - first)
                parts.append(part if first[0] == edge else [*part, crossing])
                part = [] if second[0] == edge else [crossing]
        part.append(second)
    if not parts:
        return (_on_one_side(line),)
    # Of a line that begins, turns or ends on the date line a part may be a single place.
    cut = [np.array(one) for one in [*parts, part]]
    return tuple(_on_one_side(one) for one in cut if len(one) > 1)


def cut_ring(places: Float64Array) -> tuple[Float64Array, ...]:
    """A ring, or its parts on either side of the date line, counterclockwise."""
    ring = _unwrapped(places)
    if _signed_area(ring) < 0.0:
        ring = ring[::-1]
    for edge in (-_DATE_LINE_DEG, _DATE_LINE_DEG):
        sides = [_clipped(ring, edge, sign) for sign in (1.0, -1.0)]
        if all(len(side) > 2 for side in sides):
            return tuple(_on_one_side(side) for side in sides)
    return (_on_one_side(ring),)


def _clipped(ring: Float64Array, edge_deg: float, sign: float) -> Float64Array:
    """The part of a ring on one side of a meridian (Sutherland and Hodgman, 1974)."""
    kept: list[Float64Array] = []
    for first, second in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        off, next_off = sign * (first[0] - edge_deg), sign * (second[0] - edge_deg)
        if off >= 0.0:
            kept.append(first)
        if off * next_off < 0.0:
            kept.append(first + off / (off - next_off) * (second - first))
    return np.array(kept).reshape(-1, ring.shape[1])


def _on_one_side(places: Float64Array) -> Float64Array:
    """Places on one side of the date line with longitudes from -180 to 180 degrees."""
    middle = float(places[:, 0].mean())
    turned = places.copy()
    turned[:, 0] -= 360.0 * np.floor((middle + 180.0) / 360.0)
    return turned


def _signed_area(ring: Float64Array) -> float:
    """Twice the area of a ring in square degrees, positive counterclockwise."""
    x, y = (ring - ring[0])[:, :2].T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))
