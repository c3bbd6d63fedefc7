"""Where a map lies on the globe, and its points in a coordinate reference system (CRS).

A georeferenced map is in metres east, north, up of an origin: a tangent plane of the WGS 84
ellipsoid. Everything else follows from the origin without approximation.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters.install_advice import missing_package
from engine.errors import ConfigError
from engine.geometry import nearest_rotation
from engine.regular_files import read_regular_file
from engine.types import Float64Array

if TYPE_CHECKING:
    import pyproj

ORIGIN_NAME = "origin.json"
_RECORD = "snapshot.json"  # in a snapshot
_MAX_SNAPSHOT_BYTES = 2**28
_WGS84 = "EPSG:4979"  # latitude, longitude, height above the ellipsoid
_MAX_OFF_AREA_DEG = 6.0  # a zone of UTM: neighbours of the right one are used
_LEAST_OFF_AREA_KM = 1.0  # of what is said; maps reach across borders
_MAX_AREA_CHARS = 200  # of its name
_KM_PER_DEG = 111.2  # on a great circle of the Earth
_FAR_M = 1000.0
_AXES = "x east, y north, z up, in metres from the origin"
_HEIGHTS = "metres above the WGS 84 ellipsoid if the positions' altitudes are, else above sea level"
_NO_HEIGHTS = "metres above the origin, whose altitude is unknown and taken for 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class MapPlace:
    """The origin of a map in metres east, north, up."""

    latitude_deg: float
    longitude_deg: float
    altitude_m: float | None  # None: positions had none; heights are above the origin

    @property
    def height_m(self) -> float:
        """The altitude, 0 where it is unknown."""
        return self.altitude_m or 0.0

    @property
    def words(self) -> str:
        """The origin in a line."""
        altitude = "unknown" if self.altitude_m is None else f"{self.altitude_m:.4f}"
        return (
            f"latitude {self.latitude_deg:.10f}, longitude {self.longitude_deg:.10f},"
            f" altitude {altitude}"
        )

    @property
    def height_words(self) -> str:
        """What heights are above."""
        return _NO_HEIGHTS if self.altitude_m is None else _HEIGHTS

    def on_globe(self, places_in_world: Float64Array) -> Float64Array:
        """Latitude, longitude (degrees) and altitude (P, 3) of places (P, 3) of the map."""
        import pycolmap

        wgs84 = pycolmap.GPSTransform(pycolmap.GPSTransformEllipsoid.WGS84)
        return np.asarray(
            wgs84.enu_to_ellipsoid(
                places_in_world, self.latitude_deg, self.longitude_deg, self.height_m
            )
        ).reshape(-1, 3)

    def from_globe(self, latitude_longitude_altitude: Float64Array) -> Float64Array:
        """The places (P, 3) of the map at latitudes, longitudes and altitudes (P, 3)."""
        import pycolmap

        wgs84 = pycolmap.GPSTransform(pycolmap.GPSTransformEllipsoid.WGS84)
        return np.asarray(
            wgs84.ellipsoid_to_enu(
                latitude_longitude_altitude, self.latitude_deg, self.longitude_deg, self.height_m
            )
        ).reshape(-1, 3)

    def pose_of(self, other: MapPlace) -> Float64Array:
        """The pose (3, 4) from metres east, north, up of another place to those of this one."""
        corners = np.vstack([np.zeros(3), _FAR_M * np.eye(3)])
        moved = self.from_globe(other.on_globe(corners))
        axes = nearest_rotation(((moved[1:] - moved[0]) / _FAR_M).T)
        if axes is None:
            raise ConfigError("the origin of the map is no place on the globe")
        return np.column_stack([axes, moved[0]])


def read_num_keyframes(snapshot: Path, map_number: int) -> int | None:
    """How many keyframes a map of a snapshot has; None: the snapshot's record does not say."""
    try:
        return int(_record_of(snapshot)["models"][map_number]["num_registered"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def read_place(snapshot: Path, map_number: int) -> MapPlace | None:
    """Where a map of a snapshot lies; None: in its own frame and unit.

    Args:
        snapshot: its own folder, not a link that may come to stand for another one.
        map_number: N of its sparse/N.

    Raises:
        ConfigError: the snapshot's record cannot be read.
    """
    path = snapshot / _RECORD
    try:
        record = _record_of(snapshot)
        if not record["models"][map_number]["is_georeferenced"]:
            return None
        origin = record["georeference"]["origin"]
        latitude, longitude = float(origin["latitude_deg"]), float(origin["longitude_deg"])
        altitude = origin.get("altitude_m")
        altitude = None if altitude is None else float(altitude)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: is not the record of a snapshot: {error!r:.100}") from error
    if not (abs(latitude) <= 90.0 and abs(longitude) <= 180.0 and math.isfinite(altitude or 0.0)):
        raise ConfigError(f"{path}: the origin of the map is no place on the globe")
    return MapPlace(latitude_deg=latitude, longitude_deg=longitude, altitude_m=altitude)


def _record_of(snapshot: Path) -> Any:
    return json.loads(read_regular_file(snapshot / _RECORD, max_bytes=_MAX_SNAPSHOT_BYTES))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacedCrs:
    """A CRS for the points of a map that lies on the globe."""

    place: MapPlace
    crs: pyproj.CRS
    to_crs: pyproj.Transformer  # from longitude, latitude, altitude; x is easting or longitude
    outside: str = ""  # where the place is outside of the area that the CRS is made for, that

    @property
    def name(self) -> str:
        """What it is called, such as EPSG:32615."""
        authority = self.crs.to_authority()
        return ":".join(authority) if authority else str(self.crs.name)

    @property
    def millimetre(self) -> float:
        """A millimetre in the horizontal unit, rounded down to a power of ten."""
        unit = self.crs.axis_info[0].unit_conversion_factor  # metres, or radians
        length_m = unit * 6_371_000.0 if self.crs.is_geographic else unit
        return float(10.0 ** math.floor(math.log10(0.001 / length_m) + 1e-9))

    @property
    def accuracy_m(self) -> float | None:
        """How well PROJ knows the change from WGS 84; None: it does not say."""
        accuracy_m = float(self.to_crs.accuracy)
        return accuracy_m if accuracy_m >= 0.0 else None

    @property
    def height_words(self) -> str:
        """What heights are above."""
        if self.crs.is_compound:
            return f"as {self.crs.sub_crs_list[-1].name}, if altitudes of positions are ellipsoidal"
        return self.place.height_words

    def coordinates(self, places_in_world: Float64Array) -> Float64Array:
        """x, y and height (P, 3) of places (P, 3) of the map, not finite where there are none."""
        latitude, longitude, altitude = self.place.on_globe(places_in_world).T
        return np.stack(self.to_crs.transform(longitude, latitude, altitude), axis=1)

    def axes_at(self, place_in_world: Float64Array) -> Float64Array:
        """The rotation (3, 3) from the map's axes to those of the CRS at a place (3,).

        Those of a geographic CRS are east, north, up there; the grid of a projected one is turned
        from them by its convergence.

        Raises:
            ConfigError: the CRS has no coordinates there.
        """
        if self.crs.is_geographic:
            [(latitude, longitude, altitude)] = self.place.on_globe(place_in_world[None]).tolist()
            here = MapPlace(latitude_deg=latitude, longitude_deg=longitude, altitude_m=altitude)
            return here.pose_of(self.place)[:, :3]
        steps = np.vstack([np.eye(3), -np.eye(3)])
        around = self.coordinates(place_in_world + steps)
        around[:, :2] *= self.crs.axis_info[0].unit_conversion_factor
        axes = nearest_rotation(((around[:3] - around[3:]) / 2.0).T)
        if axes is None:
            raise ConfigError(f"--crs {self.name}: has no axes where the map lies")
        return axes

    def as_record(self) -> dict[str, Any]:
        """For a file beside the export."""
        return {
            "name": self.name,
            "title": self.crs.name,
            "unit": self.crs.axis_info[0].unit_name,
            "heights": self.height_words,
            "accuracy_m": self.accuracy_m,
            "wkt": self.crs.to_wkt(),
        }


def open_crs(name: str | None, place: MapPlace, *, asked_by: str) -> PlacedCrs:
    """A CRS for a map.

    Args:
        name: as PROJ reads it: EPSG:32615, EPSG:32615+5773, WKT; None: the UTM zone of the origin.
        place: of the map.
        asked_by: the option that needs it, for the error that names the package.

    Raises:
        ConfigError: there is no such CRS, it is neither projected nor geographic, it is for another
            part of the world, or PROJ has no transformation there.
        AdapterUnavailableError: pyproj is not installed.
    """
    try:
        import pyproj
        from pyproj.exceptions import ProjError
    except ImportError as error:
        raise missing_package(asked_by, package="pyproj", extra="survey") from error
    asked = _utm_zone(place) if name is None else name
    try:
        crs = pyproj.CRS.from_user_input(asked)
        candidates = pyproj.Transformer.from_crs(
            _WGS84, crs, always_xy=True, allow_ballpark=False, only_best=True
        )
        at_origin = candidates.transform(place.longitude_deg, place.latitude_deg, place.height_m)
    except ProjError as error:
        words = _missing_grid(asked, place) or str(error).partition("\n")[0]
        raise ConfigError(f"--crs {asked}: PROJ cannot use it here: {words}") from error
    if not (crs.is_projected or crs.is_geographic):
        raise ConfigError(f"--crs {asked}: is neither a projected nor a geographic CRS")
    if crs.is_compound and place.altitude_m is None:
        raise ConfigError(f"--crs {asked}: has heights, and the altitude of the map is unknown")
    outside = _outside_area(asked, crs, place)
    if not np.isfinite(at_origin).all():
        words = _missing_grid(asked, place) or "it has no coordinates where the map lies"
        raise ConfigError(f"--crs {asked}: {words}")
    return PlacedCrs(place=place, crs=crs, to_crs=_last_used(candidates), outside=outside)


def _missing_grid(asked: str, place: MapPlace) -> str:
    """Which grid PROJ lacks for a CRS at a place, and how to get it; "" where it lacks none."""
    from pyproj.aoi import AreaOfInterest
    from pyproj.exceptions import ProjError
    from pyproj.transformer import TransformerGroup

    here = AreaOfInterest(
        place.longitude_deg, place.latitude_deg, place.longitude_deg, place.latitude_deg
    )
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            ways = TransformerGroup(
                _WGS84,
                asked,
                always_xy=True,
                area_of_interest=here,  # type: ignore[arg-type]  # pyproj's own has another name
            ).unavailable_operations
    except ProjError:  # it is no CRS
        return ""
    missing = [[grid.short_name for grid in way.grids if not grid.available] for way in ways]
    fewest = min(filter(None, missing), key=len, default=[])
    if not fewest:
        return ""
    files = " ".join(f"--file {name}" for name in fewest)
    return (
        f"PROJ lacks {' and '.join(fewest)}: `pyproj sync {files}` downloads it, or"
        " PROJ_NETWORK=ON has PROJ read it over the network"
    )


def _last_used(candidates: pyproj.Transformer) -> pyproj.Transformer:
    """The one operation for where it was used last, so that all points have the same."""
    from pyproj.exceptions import ProjError

    try:
        return candidates.get_last_used_operation()
    except ProjError:  # there is nothing to choose between
        return candidates


def _utm_zone(place: MapPlace) -> str:
    """WGS 84 / UTM in the zone of a place.

    Raises:
        ConfigError: there is none near the poles.
    """
    from pyproj.aoi import AreaOfInterest
    from pyproj.database import query_utm_crs_info

    here = AreaOfInterest(
        place.longitude_deg, place.latitude_deg, place.longitude_deg, place.latitude_deg
    )
    zones = query_utm_crs_info(datum_name="WGS 84", area_of_interest=here)
    if not zones:
        raise ConfigError("the map lies in no UTM zone; --crs says what to write")
    return f"EPSG:{zones[0].code}"


def _outside_area(asked: str, crs: pyproj.CRS, place: MapPlace) -> str:
    """Words on a place that is outside of the area that a CRS is made for; "" where it is inside.

    Raises:
        ConfigError: it is far outside.
    """
    area = crs.area_of_use
    if area is None:
        return ""
    width_deg = (area.east - area.west) % 360.0 or 360.0
    past_west_deg = (place.longitude_deg - area.west) % 360.0
    off_east_deg = (
        0.0 if past_west_deg <= width_deg else min(past_west_deg - width_deg, 360.0 - past_west_deg)
    )
    off_north_deg = max(0.0, area.south - place.latitude_deg, place.latitude_deg - area.north)
    where = _first_sentence(area.name)
    if max(off_east_deg, off_north_deg) > _MAX_OFF_AREA_DEG:
        raise ConfigError(
            f"--crs {asked}: is for {where}, and the map lies at {place.latitude_deg:.4f},"
            f" {place.longitude_deg:.4f}"
        )
    east_deg = off_east_deg * math.cos(math.radians(place.latitude_deg))
    off_km = _KM_PER_DEG * math.hypot(east_deg, off_north_deg)
    if off_km < _LEAST_OFF_AREA_KM:
        return ""
    return (
        f"WARNING: the map lies {off_km:,.0f} km outside of the area that {asked} is made for"
        f" ({where}): lengths and directions may be off"
    )


def _first_sentence(area: str) -> str:
    """What an area is; names of countries follow."""
    first = re.split(r"(?<=[a-z)]{3})\.(?: |$)", area)[0]  # not after "St." of a county
    return textwrap.shorten(first, _MAX_AREA_CHARS, placeholder=" ...")


def write_origin(to: Path, place: MapPlace, crs: PlacedCrs | None) -> None:
    """Writes where the map lies beside an export.

    Raises:
        OSError: it cannot be written.
    """
    record = {
        "latitude_deg": place.latitude_deg,
        "longitude_deg": place.longitude_deg,
        "altitude_m": place.altitude_m,
        "axes": _AXES,
        "heights": place.height_words,
        "crs": None if crs is None else crs.as_record(),
    }
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    (to / ORIGIN_NAME).write_text(text, encoding="utf-8")
