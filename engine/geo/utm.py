"""Universal Transverse Mercator: the zone of a place, and east, north, up laid onto its grid.

It needs pyproj, of the extra ``survey``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.geo.georeference import places_on_globe
from engine.types import Float64Array, GpsFix, freeze_field

_EARTH_RADIUS_M = 6_371_000.0
_REACH_M = 500.0  # from the origin, of the points that the grid is fitted to
_WGS84 = "EPSG:4979"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UtmGrid:
    """The UTM grid around an origin.

    It is a similarity of the tangent plane: off by up to 3 mm at 1 km from the origin and 2.5 cm at
    3 km, most far from the middle of a zone. What stands above the plane is off by its height times
    the distance over the earth's radius besides: 1.6 cm for 100 m at 1 km, 4.7 cm at 3 km. The
    height of the ellipsoid falls away from that plane with the square of the distance.
    """

    epsg: int  # WGS 84 / UTM zone
    origin: Float64Array  # (3,) easting, northing, m; height above the ellipsoid, m, 0: unknown
    grid_from_enu: Float64Array  # (3, 4) from east, north, up to the grid about its origin

    def __post_init__(self) -> None:
        freeze_field(self, "origin", (3,), np.float64)
        freeze_field(self, "grid_from_enu", (3, 4), np.float64)

    def drop_m(self, x: Float64Array, y: Float64Array) -> Float64Array:
        """How far the ellipsoid lies below the tangent plane at places of the grid, m."""
        return np.asarray((x * x + y * y) / (2.0 * _EARTH_RADIUS_M))


def utm_epsg(latitude_deg: float, longitude_deg: float) -> int:
    """The EPSG code of WGS 84 / UTM in the zone of a place; the plain zones of 6 degrees."""
    zone = int((longitude_deg + 180.0) // 6.0) % 60 + 1
    return (32600 if latitude_deg >= 0.0 else 32700) + zone


def utm_grid(origin: GpsFix) -> UtmGrid:
    """The grid around an origin.

    Raises:
        ImportError: pyproj is not installed.
    """
    from pyproj import Transformer

    epsg = utm_epsg(origin.latitude_deg, origin.longitude_deg)
    around = _REACH_M * np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0]])
    places = places_on_globe(around, origin=origin)
    to_utm = Transformer.from_crs(_WGS84, f"EPSG:{epsg}")
    utm = np.stack(to_utm.transform(places[:, 0], places[:, 1]), axis=1)
    # The similarity as a complex factor: grid = factor * (east + i north).
    offsets = (utm - utm[0]) @ np.array([1.0, 1.0j])
    plane = around[:, :2] @ np.array([1.0, 1.0j])
    factor = np.vdot(plane, offsets) / np.vdot(plane, plane)
    linear = [
        [factor.real, -factor.imag, 0.0],
        [factor.imag, factor.real, 0.0],
        [0.0, 0.0, 1.0],
    ]
    return UtmGrid(
        epsg=epsg,
        origin=np.array([*utm[0], origin.altitude_m or 0.0]),
        grid_from_enu=np.column_stack([linear, np.zeros(3)]),
    )
