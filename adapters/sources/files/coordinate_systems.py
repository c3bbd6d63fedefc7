"""Coordinate systems that files name in their first line, as ODM's do: EPSG, UTM in words, PROJ."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.install_advice import missing_package
from engine.errors import ConfigError

if TYPE_CHECKING:
    from pyproj import CRS

logger = logging.getLogger(__name__)

# Nothing else may stand in a string of PROJ: another meridian, shifts to WGS84, units of heights.
_WGS84 = re.compile(
    r"epsg:\s*4326|wgs[\s-]?84|"
    r"\+proj=(?:longlat|latlong)(?:\s+\+(?:datum=wgs84|ellps=wgs84|no_defs|type=crs))*",
    re.IGNORECASE,
)
_UTM = re.compile(
    r"wgs[\s-]?84[\s/]+utm\s*(?:zone\s*)?(\d{1,2})\s*([ns])(?:orth|outh)?\b.*", re.IGNORECASE
)
_LIKELY = re.compile(r"\b(?:utm|epsg|esri|wgs[\s-]?84|crs)\b|\+proj", re.IGNORECASE)
_CODE = re.compile(r"epsg:\s*\d+|\+(?:proj|init)=", re.IGNORECASE)
_UTM_NORTH, _UTM_SOUTH = 32600, 32700  # EPSG codes of zone 0
_NUM_UTM_ZONES = 60
_MAX_OFF_AREA_DEG = 6.0  # a zone of UTM
_NUM_HORIZONTAL = 2  # axes of a coordinate system; a third one is that of heights


def is_wgs84(header: str) -> bool:
    """Whether a line names longitudes and latitudes on WGS84."""
    return _WGS84.fullmatch(header) is not None


def names_coordinate_system(header: str) -> bool:
    """Whether a line names a coordinate system: ``EPSG:n``, ``WGS84 UTM zN``, one of PROJ."""
    return is_wgs84(header) or _UTM.fullmatch(header) is not None or bool(_CODE.match(header))


def may_be_coordinate_system(header: str) -> bool:
    """Whether a line seems to be meant as a coordinate system, be it one that is read or not."""
    return _LIKELY.search(header) is not None


def to_wgs84(
    path: Path, header: str, places: Sequence[tuple[float, float, float]]
) -> list[tuple[float, float, float]]:
    """Longitudes, latitudes and heights in metres of places in a coordinate system.

    Args:
        path: of the file, for errors.
        header: its first line, which names the system.
        places: east, or the longitude, north, or the latitude, and the height, NaN where there is
            none. Heights are in the unit of the system's vertical axis; where it has none, in that
            of east and north, or in metres beside degrees.

    Returns:
        As many; infinite where a place is none in the system.

    Raises:
        AdapterUnavailableError: pyproj is missing.
        ConfigError: the line names no coordinate system, or none with east and north, or places are
            degrees where it has metres.
    """
    try:
        from pyproj import Transformer
        from pyproj.exceptions import ProjError
    except ImportError as error:
        raise missing_package(
            f"coordinates in {header[:40]}", package="pyproj", extra="survey"
        ) from error
    crs = _crs_of(path, header)
    if not places:
        return []
    is_projected = crs.is_projected and not header.startswith("+")  # of PROJ: maybe a local one
    if is_projected and all(abs(x) <= 180.0 and abs(y) <= 90.0 for x, y, _ in places):
        raise ConfigError(
            f"{path}: its places are degrees, it seems, and not east and north of {header[:60]}:"
            " the first line of degrees on WGS84 is EPSG:4326"
        )
    east, north, heights = zip(*places, strict=True)
    try:
        transformer = Transformer.from_crs(crs, 4326, always_xy=True)
        longitudes, latitudes = transformer.transform(list(east), list(north))
    except ProjError as error:
        words = str(error).partition("\n")[0][:100]
        raise ConfigError(f"{path}: {header[:60]} is no coordinate system: {words}") from error
    _warn_of_places_outside(path, header, crs, longitudes, latitudes)
    metres = _metres_per_height(path, crs) if not all(map(math.isnan, heights)) else 1.0
    in_metres = (metres * height for height in heights)
    return list(zip(longitudes, latitudes, in_metres, strict=True))


def _crs_of(path: Path, header: str) -> CRS:
    """The coordinate system of the first line.

    Raises:
        ConfigError: it is none, or none with east and north.
    """
    from pyproj import CRS
    from pyproj.exceptions import ProjError

    code = header
    utm = _UTM.fullmatch(header)
    if utm is not None:
        zone = int(utm[1])
        if not 1 <= zone <= _NUM_UTM_ZONES:
            raise ConfigError(f"{path}: {header[:60]}: UTM has zones 1 to {_NUM_UTM_ZONES}")
        code = f"EPSG:{zone + (_UTM_NORTH if utm[2] in 'nN' else _UTM_SOUTH)}"
    if not _CODE.match(code):
        raise ConfigError(
            f"{path}: its first line is no coordinate system: EPSG:n, WGS84 UTM zN or +proj=...,"
            f" not {header[:60]!r}"
        )
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of +init
            crs = CRS.from_user_input(code)
    except ProjError as error:
        words = str(error).partition("\n")[0][:100]
        raise ConfigError(f"{path}: {header[:60]} is no coordinate system: {words}") from error
    if not (crs.is_geographic or crs.is_projected):
        raise ConfigError(
            f"{path}: {header[:60]} is a {crs.type_name}: a projected system, with east and north,"
            " or one with longitude and latitude is needed"
        )
    return crs


def _warn_of_places_outside(
    path: Path, header: str, crs: CRS, longitudes: Sequence[float], latitudes: Sequence[float]
) -> None:
    area = crs.area_of_use
    if area is None or area.west > area.east:
        return
    num_outside = sum(
        not (
            area.west - _MAX_OFF_AREA_DEG <= longitude <= area.east + _MAX_OFF_AREA_DEG
            and area.south - _MAX_OFF_AREA_DEG <= latitude <= area.north + _MAX_OFF_AREA_DEG
        )
        for longitude, latitude in zip(longitudes, latitudes, strict=True)
    )
    if num_outside:
        logger.warning(
            "%s: %d of %d places lie outside of where %s is for (%s)",
            path,
            num_outside,
            len(longitudes),
            header[:60],
            area.name[:80],
        )


def _metres_per_height(path: Path, crs: CRS) -> float:
    """The length of the unit of heights, in metres, below zero where they count downwards.

    A system without heights has those of east and north: a line says so where it is no metre.
    """
    if len(crs.axis_info) > _NUM_HORIZONTAL:
        vertical = crs.axis_info[_NUM_HORIZONTAL]
        sign = -1.0 if vertical.direction == "down" else 1.0
        return sign * vertical.unit_conversion_factor
    east = crs.axis_info[0]
    if crs.is_geographic or east.unit_conversion_factor == 1.0:
        return 1.0
    logger.warning("%s: heights are read in the unit of east and north, %s", path, east.unit_name)
    return float(east.unit_conversion_factor)
