"""Cameras, their footprints and their way as shapes on the globe, for maps of the world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adapters.exports.footprints import footprint_on_ground
from adapters.exports.job import ExportJob
from adapters.exports.place import MapPlace
from adapters.run_files import read_frame_rows
from engine.types import Float64Array

_DATE_LINE_DEG = 180.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CameraShape:
    """A camera and what it sees of the ground."""

    name: str  # of its image
    captured_at_s: float | None  # on the clock of its source
    camera_id: int
    position: Float64Array  # (3,) longitude, latitude, altitude
    footprint: tuple[Float64Array, ...]  # rings (R, 3), open, counterclockwise; empty: none


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Way:
    """The keyframes of a source in order of time."""

    source: str
    parts: tuple[Float64Array, ...]  # lines (P, 3): longitude, latitude, altitude


def camera_shapes(job: ExportJob, place: MapPlace) -> list[CameraShape]:
    """The map's cameras, in order of their ids.

    Raises:
        ConfigError: the table of the run's frames cannot be read.
        ExportCancelled: the export was cancelled.
    """
    times_s = {row.name: row.captured_at_s for row in read_frame_rows(job.run)}
    shapes = []
    for image in job.each("cameras", job.images()):
        outline = footprint_on_ground(image, job.reconstruction)
        rings = () if outline is None else _cut_ring(_longitudes_first(outline, place))
        shapes.append(
            CameraShape(
                name=image.name,
                captured_at_s=times_s.get(image.name),
                camera_id=image.camera_id,
                position=_longitudes_first(image.projection_center()[None], place)[0],
                footprint=rings,
            )
        )
    return shapes


def ways(job: ExportJob, place: MapPlace) -> list[Way]:
    """The ways of the sources that have two keyframes and more in the map.

    Raises:
        ConfigError: the table of the run's frames cannot be read.
    """
    centers = {image.name: image.projection_center() for image in job.images()}
    rows = sorted(
        (row for row in read_frame_rows(job.run) if row.name in centers),
        key=lambda row: (row.captured_at_s, row.index),
    )
    by_source: dict[str, list[Float64Array]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(centers[row.name])
    return [
        Way(source=source, parts=_cut_line(_longitudes_first(np.array(own), place)))
        for source, own in by_source.items()
        if len(own) > 1
    ]


def _longitudes_first(places: Float64Array, place: MapPlace) -> Float64Array:
    return place.on_globe(places)[:, [1, 0, 2]]


# -- at the date line (RFC 7946, section 3.1.9: shapes are cut there) ------------------------------


def _unwrapped(places: Float64Array) -> Float64Array:
    """Places whose longitudes go on past 180 degrees instead of starting again."""
    unwrapped = places.copy()
    unwrapped[:, 0] = np.unwrap(places[:, 0], period=360.0)
    return unwrapped


def _cut_line(places: Float64Array) -> tuple[Float64Array, ...]:
    """A line, or its parts on either side of the date line."""
    line = _unwrapped(places)
    parts, part = [], [line[0]]
    for first, second in zip(line[:-1], line[1:], strict=True):
        for edge in (-_DATE_LINE_DEG, _DATE_LINE_DEG):
            if (first[0] - edge) * (second[0] - edge) < 0.0:
                share = (edge - first[0]) / (second[0] - first[0])
                crossing = first + share * (second - first)
                parts.append([*part, crossing])
                part = [crossing]
        part.append(second)
    return tuple(_on_one_side(np.array(one)) for one in [*parts, part])


def _cut_ring(places: Float64Array) -> tuple[Float64Array, ...]:
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
    return np.array(kept).reshape(-1, 3)


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


def rounded(places: Float64Array, *, has_heights: bool) -> Sequence[list[float]]:
    """Longitudes and latitudes to a tenth of a millimetre, and altitudes where they are known."""
    rows = places if has_heights else places[:, :2]
    return [
        [round(value, 9 if column < 2 else 4) for column, value in enumerate(row)]
        for row in rows.tolist()
    ]
