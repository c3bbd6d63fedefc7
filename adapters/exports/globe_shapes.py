"""Cameras, their footprints and their way as shapes on the globe, for maps of the world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adapters.exports.footprints import footprint_on_ground
from adapters.exports.job import ExportJob
from adapters.exports.place import MapPlace
from adapters.run_files import read_frame_rows
from engine.date_line import cut_line, cut_ring
from engine.types import Float64Array


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
        ExportCancelledError: the export was cancelled.
    """
    times_s = {row.name: row.captured_at_s for row in read_frame_rows(job.run)}
    shapes = []
    for image in job.each("cameras", job.images()):
        outline = footprint_on_ground(image, job.reconstruction)
        rings = () if outline is None else cut_ring(_longitudes_first(outline, place))
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
        Way(source=source, parts=cut_line(_longitudes_first(np.array(own), place)))
        for source, own in by_source.items()
        if len(own) > 1
    ]


def _longitudes_first(places: Float64Array, place: MapPlace) -> Float64Array:
    return place.on_globe(places)[:, [1, 0, 2]]


def rounded(places: Float64Array, *, has_heights: bool) -> Sequence[list[float]]:
    """Longitudes and latitudes to a tenth of a millimetre, and altitudes where they are known."""
    rows = places if has_heights else places[:, :2]
    return [
        [round(value, 9 if column < 2 else 4) for column, value in enumerate(row)]
        for row in rows.tolist()
    ]
