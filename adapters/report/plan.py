"""The map from above: cameras, their way, points, coverage, and what belongs to places."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from adapters.phone.map_plan import plan_axes
from adapters.report import svg
from adapters.report.map_figures import MapFigures
from adapters.report.pictures import data_uri, scale_bar
from adapters.report.run_record import RunRecord
from adapters.report.summary import OriginRecord
from engine.regular_files import read_regular_file
from engine.types import Float64Array, Uint8Array

WIDTH = 360.0
_MAX_HEIGHT, _MIN_HEIGHT = 420.0, 150.0
_MARGIN = 18.0
_FOOT = 30.0  # below the plan, for scale and north
_INNER_PERCENT = 3.0  # of points on each side that do not stretch the plan
_MAX_REACH = 1.0  # of points beyond the cameras, in extents of their way
_POINT_OPACITY = 190
_DENSITY_PX = 560  # the longer side of the picture of points
_MAX_CAMERAS = 500  # that are drawn as dots
_MAX_COVERAGE_BYTES = 2**26
_MAX_AREAS = 20_000
_MAX_COORDINATE = 1e6  # degrees, or units of the map
_STATUSES = ("good", "thin", "hole")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """A frame for drawing from above, x to the right and y down."""

    axes: Float64Array  # (2, 3) of the drawing in the world
    low: Float64Array  # (2,) of what is drawn, along these axes
    length_per_unit: float  # of the drawing
    height: float
    unit: str
    is_north_up: bool

    def places(self, points: Float64Array) -> Float64Array:
        """Points (N, 3) of the world on the drawing, (N, 2)."""
        return np.asarray((points @ self.axes.T - self.low) * self.length_per_unit + _MARGIN)

    def drawing(self, *parts: Markup, label: str) -> Markup:
        """The whole drawing with its scale, and north where it is known."""
        base = self.height - 10.0
        foot = [scale_bar(8.0, base, units_per_length=1.0 / self.length_per_unit, unit=self.unit)]
        if self.is_north_up:
            x = WIDTH - 16.0
            arrow = f"M{x} {base - 14}l5 14l-5 -4l-5 4z"
            foot += [
                svg.element("path", d=arrow, class_="north"),
                svg.text(x - 9, base, "N", anchor="end", class_="ink"),
            ]
        return svg.drawing(*parts, *foot, width=WIDTH, height=self.height, label=label)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """The ground that was flown over, by how well it is seen."""

    areas: dict[str, list[Float64Array]] = field(default_factory=dict)  # rings (N, 2) or (N, 3)
    shares: dict[str, float] = field(default_factory=dict)


def plan_of(record: RunRecord, figures: MapFigures, *, has_points: bool = True) -> Plan:
    """The plan of a map: north up where it is georeferenced, else as its cameras stood.

    Args:
        record: of the run.
        figures: the map.
        has_points: there is room for most of its points, too.
    """
    points = figures.points3D if has_points else figures.points3D[:0]
    return _fitted(
        _axes(record, figures), figures.centers, points, record, is_north_up=record.is_georeferenced
    )


def side_of(record: RunRecord, figures: MapFigures) -> Plan:
    """The same from the side, from where the plan has its lower edge."""
    right, down = _axes(record, figures)
    axes = np.stack([right, np.cross(right, down)])
    return _fitted(axes, figures.centers, figures.points3D, record, is_north_up=False)


def _axes(record: RunRecord, figures: MapFigures) -> Float64Array:
    if record.is_georeferenced:
        return np.array([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    return plan_axes(figures.cam_from_world, up_in_world=None)


def _fitted(
    axes: Float64Array,
    centers: Float64Array,
    points: Float64Array,
    record: RunRecord,
    *,
    is_north_up: bool,
) -> Plan:
    """A frame along axes (2, 3) with room for cameras and most of the points."""
    low, high = _bounds(centers @ axes.T, points @ axes.T)
    extent = np.maximum(high - low, 1e-3 * float((high - low).max()))
    inner = WIDTH - 2 * _MARGIN
    scale = min(inner / extent[0], (_MAX_HEIGHT - 2 * _MARGIN) / extent[1])
    height = max(extent[1] * scale + 2 * _MARGIN, _MIN_HEIGHT)
    room = np.array([inner, height - 2 * _MARGIN]) / scale
    return Plan(
        axes=axes,
        low=low - (room - extent) / 2,
        length_per_unit=float(scale),
        height=float(height + _FOOT),
        unit=record.unit,
        is_north_up=is_north_up,
    )


def _bounds(path: Float64Array, points: Float64Array) -> tuple[Float64Array, Float64Array]:
    low, high = path.min(axis=0), path.max(axis=0)
    if len(points):
        inner = np.percentile(points, [_INNER_PERCENT, 100.0 - _INNER_PERCENT], axis=0)
        reach = _MAX_REACH * float((high - low).max()) or math.inf
        low = np.minimum(low, np.maximum(inner[0], low - reach))
        high = np.maximum(high, np.minimum(inner[1], high + reach))
    if not (high > low).any():
        low, high = low - 0.5, high + 0.5
    return low, high


def points_picture(plan: Plan, figures: MapFigures) -> Markup:
    """The map's points, in their colours, as a picture that lies below the rest."""
    shrink = _DENSITY_PX / WIDTH
    height, width = math.ceil((plan.height - _FOOT) * shrink), _DENSITY_PX
    cells = np.floor(plan.places(figures.points3D) * shrink).astype(np.int64)
    inside = (cells >= 0).all(axis=1) & (cells[:, 0] < width) & (cells[:, 1] < height)
    if not inside.any():
        return Markup("")
    picture: Uint8Array = np.zeros((height, width, 4), np.uint8)
    order = np.argsort(figures.points3D[inside] @ np.cross(plan.axes[1], plan.axes[0]))
    column, row = cells[inside][order].T
    for down, right in ((1, 1), (0, 1), (1, 0), (0, 0)):
        place = np.minimum(row + down, height - 1), np.minimum(column + right, width - 1)
        picture[*place, :3] = figures.colors[inside][order]
        picture[*place, 3] = _POINT_OPACITY
    return svg.element(
        "image",
        href=data_uri(picture),
        x=0,
        y=0,
        width=WIDTH,
        height=height / shrink,
    )


def cameras(
    plan: Plan, record: RunRecord, figures: MapFigures, *, flagged: set[int]
) -> list[Markup]:
    """The way of the cameras in order of arrival, and a dot for each, or for some of many.

    Args:
        plan: of the map.
        record: names them.
        figures: the map.
        flagged: keyframes that a reason of the verdict names.
    """
    places = plan.places(figures.centers)
    parts = [svg.polyline(map(tuple, places.tolist()), class_="way")]
    step = max(1, -(-len(places) // _MAX_CAMERAS))
    radius = 3.0 if len(places) <= 150 else 2.0
    ids = figures.frame_ids.tolist()
    rows = [row for row, i in enumerate(ids) if row % step == 0 or i in flagged]
    for row in sorted(rows, key=lambda row: ids[row] in flagged):
        x, y = places[row].tolist()
        class_ = "camera flagged" if ids[row] in flagged else "camera"
        parts.append(svg.circle(x, y, radius, class_=class_, title=record.name_of(ids[row])))
    x, y = places[0].tolist()
    parts.append(svg.circle(x, y, radius + 3.0, class_="ring", title="the first keyframe"))
    return parts


def areas(plan: Plan, coverage: Coverage) -> list[Markup]:
    """Covered ground, well seen, thin, and holes."""
    parts = []
    for status in _STATUSES:
        d = []
        for ring in coverage.areas.get(status, []):
            places = plan.places(np.column_stack([ring[:, :2], np.zeros(len(ring))]))
            d.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places.tolist()) + "Z")
        if d:
            parts.append(svg.element("path", d="".join(d), class_=f"area {status}"))
    return parts


def links(
    plan: Plan, figures: MapFigures, inliers: dict[tuple[int, int], int], *, at_most: int
) -> list[Markup]:
    """Lines between keyframes that share verified matches, the strongest where there are many."""
    places = dict(
        zip(figures.frame_ids.tolist(), plan.places(figures.centers).tolist(), strict=True)
    )
    known = [
        (pair, num) for pair, num in inliers.items() if pair[0] in places and pair[1] in places
    ]
    strongest = sorted(known, key=lambda one: -one[1])[:at_most]
    levels: dict[int, list[str]] = {0: [], 1: [], 2: []}
    limits = np.percentile([num for _, num in strongest], [33, 67]) if strongest else [0, 0]
    for (first, second), num in strongest:
        (x1, y1), (x2, y2) = places[first], places[second]
        level = int(num > limits[0]) + int(num > limits[1])
        levels[level].append(f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}")
    return [
        svg.element("path", d="".join(d), class_=f"link strength{level}")
        for level, d in levels.items()
        if d
    ]


def read_coverage(run: Path, origin: OriginRecord | None) -> Coverage | None:
    """The coverage that a run wrote, in the plane of its map; None: there is none.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no coverage.
    """
    name = "coverage.geojson" if origin is not None else "coverage.json"
    try:
        data = read_regular_file(run / "products" / name, max_bytes=_MAX_COVERAGE_BYTES)
    except FileNotFoundError:
        return None
    try:
        features = json.loads(data)["features"]
        found = Coverage()
        for feature in features:
            status = feature["properties"]["status"]
            if status in _STATUSES:
                found.shares[status] = float(feature["properties"]["share"])
                found.areas[status] = _rings(feature["geometry"]["coordinates"], origin)
        return found
    except (KeyError, RecursionError, TypeError, IndexError) as error:
        raise ValueError("it is no coverage of a run") from error


def _rings(polygons: Sequence[Any], origin: OriginRecord | None) -> list[Float64Array]:
    rings = [np.array(polygon[0], np.float64) for polygon in polygons[:_MAX_AREAS]]
    if not all(ring.ndim == 2 and ring.shape[1] == 2 and len(ring) >= 3 for ring in rings):
        raise ValueError("it holds an area that is none")
    if not rings:
        return []
    if not (np.abs(np.concatenate(rings)) <= _MAX_COORDINATE).all():  # not true of NaN either
        raise ValueError("it holds a place that is none")
    if origin is None:
        return rings
    places = _in_enu(np.concatenate(rings), origin)
    return np.split(places, np.cumsum([len(ring) for ring in rings])[:-1])


def _in_enu(longitude_latitude: Float64Array, origin: OriginRecord) -> Float64Array:
    """Metres east and north (N, 2) of an origin."""
    import pycolmap

    height_m = origin.altitude_m or 0.0
    rows = np.column_stack(
        [longitude_latitude[:, ::-1], np.full(len(longitude_latitude), height_m)]
    )
    wgs84 = pycolmap.GPSTransform(pycolmap.GPSTransformEllipsoid.WGS84)
    enu = wgs84.ellipsoid_to_enu(rows, origin.latitude_deg, origin.longitude_deg, height_m)
    return np.asarray(enu)[:, :2]


def flagged_keyframes(reasons: Iterable[Any]) -> set[int]:
    """Keyframes that reasons of a verdict name."""
    return {int(frame_id) for reason in reasons for frame_id in reason.frame_ids}
