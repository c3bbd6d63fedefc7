"""Cameras, footprints and ways as KML (OGC KML 2.2, OGC 07-147r2).

Cameras and ways are at their altitudes, which KML takes for ones above sea level; where altitudes
are unknown they lie on the ground, as footprints do.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np

from adapters.exports.globe_shapes import CameraShape, Way, camera_shapes, rounded, ways
from adapters.exports.job import ExportJob
from adapters.exports.place import MapPlace
from engine.types import Float64Array

_NAME = "cameras.kml"
_NAMESPACE = "http://www.opengis.net/kml/2.2"
# What XML 1.0 can hold (its section 2.2); names of sources may have anything.
_NOT_IN_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_STYLES = {"camera": "ff00a5ff", "footprint": "6000a5ff", "way": "ff00ffff"}  # aabbggrr


def write_kml(job: ExportJob, place: MapPlace) -> None:
    """Writes the map's cameras as points, their footprints as polygons and their ways as lines.

    Raises:
        ConfigError: the table of the run's frames cannot be read.
        OSError: the file cannot be written.
        ExportCancelledError: the export was cancelled.
    """
    has_heights = place.altitude_m is not None
    shapes = camera_shapes(job, place)
    root = ET.Element("kml", xmlns=_NAMESPACE)
    document = ET.SubElement(root, "Document")
    ET.SubElement(document, "name").text = _in_xml(job.run.resolve().name)
    ET.SubElement(document, "description").text = f"origin: {place.words}; {place.height_words}"
    for name, color in _STYLES.items():
        _add_style(document, name, color)
    folders = {name: _add_folder(document, name) for name in ("Cameras", "Footprints", "Ways")}
    for shape in shapes:
        _add_camera(folders["Cameras"], shape, has_heights=has_heights)
        if shape.footprint:
            _add_footprint(folders["Footprints"], shape)
    for way in ways(job, place):
        _add_way(folders["Ways"], way, has_heights=has_heights)
    ET.indent(root)
    ET.ElementTree(root).write(job.to / _NAME, encoding="utf-8", xml_declaration=True)


def _add_style(document: ET.Element, name: str, color: str) -> None:
    style = ET.SubElement(document, "Style", id=name)
    for part in ("IconStyle", "LineStyle", "PolyStyle"):
        ET.SubElement(ET.SubElement(style, part), "color").text = color


def _add_folder(document: ET.Element, name: str) -> ET.Element:
    folder = ET.SubElement(document, "Folder")
    ET.SubElement(folder, "name").text = name
    return folder


def _add_placemark(folder: ET.Element, name: str, style: str) -> ET.Element:
    placemark = ET.SubElement(folder, "Placemark")
    ET.SubElement(placemark, "name").text = _in_xml(name)
    ET.SubElement(placemark, "styleUrl").text = f"#{style}"
    return placemark


def _add_camera(folder: ET.Element, shape: CameraShape, *, has_heights: bool) -> None:
    point = ET.SubElement(_add_placemark(folder, shape.name, "camera"), "Point")
    _add_places(point, shape.position[None], has_heights=has_heights)


def _add_footprint(folder: ET.Element, shape: CameraShape) -> None:
    parent = _add_placemark(folder, shape.name, "footprint")
    if len(shape.footprint) > 1:
        parent = ET.SubElement(parent, "MultiGeometry")
    for ring in shape.footprint:
        polygon = ET.SubElement(parent, "Polygon")
        ET.SubElement(polygon, "altitudeMode").text = "clampToGround"
        boundary = ET.SubElement(ET.SubElement(polygon, "outerBoundaryIs"), "LinearRing")
        _add_coordinates(boundary, np.vstack([ring, ring[:1]]), has_heights=False)


def _add_way(folder: ET.Element, way: Way, *, has_heights: bool) -> None:
    parent = _add_placemark(folder, way.source, "way")
    if len(way.parts) > 1:
        parent = ET.SubElement(parent, "MultiGeometry")
    for part in way.parts:
        _add_places(ET.SubElement(parent, "LineString"), part, has_heights=has_heights)


def _add_places(geometry: ET.Element, places: Float64Array, *, has_heights: bool) -> None:
    mode = "absolute" if has_heights else "clampToGround"
    ET.SubElement(geometry, "altitudeMode").text = mode
    _add_coordinates(geometry, places, has_heights=has_heights)


def _add_coordinates(geometry: ET.Element, places: Float64Array, *, has_heights: bool) -> None:
    rows = rounded(places, has_heights=has_heights)
    text = " ".join(
        ",".join(f"{value:.9f}".rstrip("0").rstrip(".") for value in row) for row in rows
    )
    ET.SubElement(geometry, "coordinates").text = text


def _in_xml(text: str) -> str:
    return _NOT_IN_XML.sub("\ufffd", text)
