"""UTM zones and the grid around an origin."""

from __future__ import annotations

import numpy as np
import pycolmap
import pytest

from engine.geo.georeference import places_on_globe
from engine.geo.utm import utm_epsg, utm_grid
from engine.types import GpsFix

pytest.importorskip("pyproj", reason="needs the extra survey")


@pytest.mark.parametrize(
    ("latitude_deg", "longitude_deg", "epsg"),
    [
        (50.8, -0.1, 32630),  # Brighton
        (42.6, -76.8, 32618),  # Seneca Lake
        (-33.9, 151.2, 32756),  # Sydney
        (0.0, 0.0, 32631),
        (-0.001, -180.0, 32701),
        (10.0, 179.999, 32660),
        (10.0, 180.0, 32601),
    ],
)
def test_the_zone_is_that_of_the_longitude(
    latitude_deg: float, longitude_deg: float, epsg: int
) -> None:
    assert utm_epsg(latitude_deg, longitude_deg) == epsg


@pytest.mark.parametrize(("latitude_deg", "longitude_deg"), [(50.8, -0.1), (-33.9, 151.2)])
def test_the_grid_agrees_with_the_projection_far_from_the_origin(
    latitude_deg: float, longitude_deg: float
) -> None:
    from pyproj import Transformer

    origin = GpsFix(latitude_deg=latitude_deg, longitude_deg=longitude_deg, altitude_m=80.0)
    grid = utm_grid(origin)
    enu = np.array([[1500.0, -900.0, 20.0], [-40.0, 2000.0, -5.0], [0.0, 0.0, 0.0]])
    wgs84 = pycolmap.GPSTransform(pycolmap.GPSTransformEllipsoid.WGS84)
    places = np.asarray(wgs84.enu_to_ellipsoid(enu, latitude_deg, longitude_deg, 80.0))
    to_utm = Transformer.from_crs("EPSG:4979", f"EPSG:{grid.epsg}")
    expected = np.stack(to_utm.transform(places[:, 0], places[:, 1]), axis=1)
    in_grid = enu @ grid.grid_from_enu[:, :3].T + grid.grid_from_enu[:, 3]
    assert np.abs(in_grid[:, :2] + grid.origin[:2] - expected).max() < 0.03
    heights = in_grid[:, 2] + grid.origin[2] + grid.drop_m(in_grid[:, 0], in_grid[:, 1])
    assert np.abs(heights - places[:, 2]).max() < 0.01
    assert grid.drop_m(np.array(2000.0), np.array(0.0)) > 0.3


@pytest.mark.parametrize(
    ("distance_m", "height_m", "max_off_m"),
    [(1000.0, 0.0, 0.003), (3000.0, 0.0, 0.025), (1000.0, 100.0, 0.019), (3000.0, 100.0, 0.072)],
)
def test_the_grid_is_off_by_no_more_than_it_says(
    distance_m: float, height_m: float, max_off_m: float
) -> None:
    from pyproj import Transformer

    origin = GpsFix(latitude_deg=50.8, longitude_deg=-0.1, altitude_m=80.0)
    grid = utm_grid(origin)
    turns = np.linspace(0.0, 2.0 * np.pi, 24)
    around = [distance_m * np.cos(turns), distance_m * np.sin(turns), np.full(24, height_m)]
    enu = np.stack(around, axis=1)
    places = places_on_globe(enu, origin=origin)
    to_utm = Transformer.from_crs("EPSG:4979", f"EPSG:{grid.epsg}")
    expected = np.stack(to_utm.transform(places[:, 0], places[:, 1]), axis=1)
    in_grid = enu @ grid.grid_from_enu[:, :3].T + grid.grid_from_enu[:, 3]
    off = np.linalg.norm(in_grid[:, :2] + grid.origin[:2] - expected, axis=1)
    assert off.max() <= max_off_m
