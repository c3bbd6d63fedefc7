"""Readers of GeoJSON (RFC 7946) and KML (OGC KML 2.2), and WGS 84 by PROJ's own formulas."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pyproj

from engine.types import Float64Array
from tests.support.placed_runs import Origin

KML = "{http://www.opengis.net/kml/2.2}"


def enu_of(origin: Origin, longitude_latitude_altitude: Float64Array) -> Float64Array:
    """East, north, up (P, 3) of an origin: PROJ's topocentric conversion."""
    height = origin.altitude_m or 0.0
    pipeline = pyproj.Transformer.from_pipeline(
        "+proj=pipeline +step +proj=unitconvert +xy_in=deg +xy_out=rad"
        " +step +proj=cart +ellps=WGS84 +step +proj=topocentric +ellps=WGS84"
        f" +lon_0={origin.longitude_deg!r} +lat_0={origin.latitude_deg!r} +h_0={height!r}"
    )
    return np.stack(pipeline.transform(*longitude_latitude_altitude.T), axis=1)


def read_features(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The features of a GeoJSON file by their ``kind``; fails where it breaks the RFC."""
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["type"] == "FeatureCollection"
    assert "crs" not in record  # removed by the RFC
    features: dict[str, list[dict[str, Any]]] = {}
    for feature in record["features"]:
        assert feature["type"] == "Feature"
        assert isinstance(feature["properties"], dict)
        _check_geometry(feature["geometry"])
        features.setdefault(feature["properties"]["kind"], []).append(feature)
    return features


def _check_geometry(geometry: dict[str, Any]) -> None:
    kind, coordinates = geometry["type"], geometry["coordinates"]
    match kind:
        case "Point":
            _check_positions([coordinates])
        case "LineString":
            assert len(coordinates) >= 2
            _check_positions(coordinates)
        case "Polygon":
            for ring in coordinates:
                assert len(ring) >= 4 and ring[0] == ring[-1]
                _check_positions(ring)
            assert _area(coordinates[0]) > 0  # the exterior is counterclockwise
        case "MultiLineString" | "MultiPolygon":
            assert len(coordinates) > 1
            for part in coordinates:
                _check_geometry({"type": kind.removeprefix("Multi"), "coordinates": part})
        case _:
            raise AssertionError(kind)


def _check_positions(positions: list[list[float]]) -> None:
    for longitude, latitude, *altitude in positions:
        assert -180 <= longitude <= 180 and -90 <= latitude <= 90 and len(altitude) <= 1
    longitudes = [position[0] for position in positions]
    assert max(longitudes) - min(longitudes) < 180  # what crosses the date line is cut


def _area(ring: list[list[float]]) -> float:
    x, y = (np.array(ring) - ring[0])[:, :2].T
    return float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]))


def read_placemarks(path: Path, folder: str) -> list[tuple[str, ET.Element]]:
    """Name and element of the placemarks in a folder of a KML file."""
    root = ET.parse(path).getroot()
    assert root.tag == f"{KML}kml"
    styles = {f"#{style.get('id')}" for style in root.iter(f"{KML}Style")}
    for element in root.iter(f"{KML}Folder"):
        if element.findtext(f"{KML}name") == folder:
            found = element.findall(f"{KML}Placemark")
            assert all(one.findtext(f"{KML}styleUrl") in styles for one in found)
            return [(one.findtext(f"{KML}name") or "", one) for one in found]
    raise AssertionError(folder)


def kml_coordinates(element: ET.Element) -> list[list[float]]:
    """The tuples of the only ``coordinates`` in an element."""
    [found] = element.iter(f"{KML}coordinates")
    return [[float(word) for word in row.split(",")] for row in (found.text or "").split()]
