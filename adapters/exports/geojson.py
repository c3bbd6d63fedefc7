"""Cameras, footprints and ways as GeoJSON (RFC 7946): WGS 84, longitude first."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from adapters.exports.globe_shapes import CameraShape, Way, camera_shapes, rounded, ways
from adapters.exports.job import ExportJob
from adapters.exports.place import MapPlace
from engine.types import Float64Array

_NAME = "cameras.geojson"


def write_geojson(job: ExportJob, place: MapPlace) -> None:
    """Writes the map's cameras as points, their footprints as polygons and their ways as lines.

    Raises:
        ConfigError: the table of the run's frames cannot be read.
        OSError: the file cannot be written.
        ExportCancelledError: the export was cancelled.
    """
    writer = _Writer(has_heights=place.altitude_m is not None)
    shapes = camera_shapes(job, place)
    record = {
        "type": "FeatureCollection",
        "features": [
            *(writer.camera(shape) for shape in shapes),
            *(writer.footprint(shape) for shape in shapes if shape.footprint),
            *(writer.way(way) for way in ways(job, place)),
        ],
    }
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    (job.to / _NAME).write_text(text, encoding="utf-8")


class _Writer:
    def __init__(self, *, has_heights: bool) -> None:
        self._has_heights = has_heights

    def camera(self, shape: CameraShape) -> dict[str, Any]:
        coordinates = self._rows(shape.position[None])[0]
        return _feature("camera", shape, {"type": "Point", "coordinates": coordinates})

    def footprint(self, shape: CameraShape) -> dict[str, Any]:
        rings = [self._rows(np.vstack([ring, ring[:1]])) for ring in shape.footprint]
        geometry = (
            {"type": "Polygon", "coordinates": [rings[0]]}
            if len(rings) == 1
            else {"type": "MultiPolygon", "coordinates": [[ring] for ring in rings]}
        )
        return _feature("footprint", shape, geometry)

    def way(self, way: Way) -> dict[str, Any]:
        lines = [self._rows(part) for part in way.parts]
        geometry = (
            {"type": "LineString", "coordinates": lines[0]}
            if len(lines) == 1
            else {"type": "MultiLineString", "coordinates": lines}
        )
        properties = {"kind": "way", "source": way.source}
        return {"type": "Feature", "geometry": geometry, "properties": properties}

    def _rows(self, places: Float64Array) -> list[list[float]]:
        return list(rounded(places, has_heights=self._has_heights))


def _feature(kind: str, shape: CameraShape, geometry: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "Feature",
        "geometry": geometry,
        "properties": {
            "kind": kind,
            "name": shape.name,
            "captured_at_s": shape.captured_at_s,
            "camera_id": shape.camera_id,
        },
    }
