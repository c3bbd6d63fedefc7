"""Rasters of the ground as files that others read."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from engine.dense.surface import GroundGrid
from engine.geo.utm import UtmGrid
from engine.output.rasters import RasterPlace, write_heights, write_orthophoto
from engine.types import Float32Array, Uint8Array

_GRID = GroundGrid(cell=0.5, west=-300, north=200, num_columns=700, num_lines=400)
_UTM = UtmGrid(
    epsg=32630, origin=np.array([703_000.0, 5_633_000.0, 80.0]), grid_from_enu=np.eye(4)[:3]
)


def _rgba() -> Uint8Array:
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (400, 700, 4)).astype(np.uint8)
    rgba[..., 3] = np.where(rgba[..., 3] > 20, 255, 0)
    return rgba


def _heights() -> Float32Array:
    heights = np.linspace(-3.0, 30.0, 400 * 700, dtype=np.float32).reshape(400, 700)
    heights[10:20, 30:40] = np.nan
    return heights


def test_an_orthophoto_is_a_cloud_optimised_geotiff_in_its_zone(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio", reason="needs the extra survey")
    path = write_orthophoto(tmp_path / "orthophoto", _rgba(), RasterPlace(grid=_GRID, utm=_UTM))
    assert path.name == "orthophoto.tif"
    with rasterio.open(path) as raster:
        assert raster.crs.to_epsg() == 32630
        assert raster.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert raster.overviews(1)
        assert np.array_equal(np.moveaxis(raster.read(), 0, 2), _rgba())
        assert [interp.name for interp in raster.colorinterp] == ["red", "green", "blue", "alpha"]
        assert raster.xy(0, 0) == pytest.approx((703_000 - 149.75, 5_633_000 + 99.75))
        assert raster.res == (0.5, 0.5)
    assert [file.name for file in tmp_path.iterdir()] == ["orthophoto.tif"]


def test_heights_are_above_the_ellipsoid_and_unknown_ones_are_no_data(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio", reason="needs the extra survey")
    path = write_heights(tmp_path / "dsm", _heights(), RasterPlace(grid=_GRID, utm=_UTM))
    with rasterio.open(path) as raster:
        read = raster.read(1, masked=True)
        assert np.array_equal(read.mask, np.isnan(_heights()))
        assert np.abs(read - (_heights() + 80.0)).max() < 0.01  # the ellipsoid falls by 4 mm
        assert raster.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"


def test_outside_utm_there_is_a_png_with_a_world_file(tmp_path: Path) -> None:
    path = write_orthophoto(tmp_path / "orthophoto", _rgba(), RasterPlace(grid=_GRID, utm=None))
    read = np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
    assert path.name == "orthophoto.png"
    assert np.array_equal(cv2.cvtColor(read, cv2.COLOR_BGRA2RGBA), _rgba())
    lines = (tmp_path / "orthophoto.pgw").read_text().splitlines()
    assert [float(line) for line in lines] == [0.5, 0.0, 0.0, -0.5, -149.75, 99.75]


def test_a_png_of_heights_says_what_its_values_are(tmp_path: Path) -> None:
    path = write_heights(tmp_path / "dsm", _heights(), RasterPlace(grid=_GRID, utm=None))
    values = np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
    words = (tmp_path / "dsm.txt").read_text().split()
    read = np.where(values == 0, np.nan, float(words[2]) + float(words[4]) * values)
    assert np.array_equal(np.isnan(read), np.isnan(_heights()))
    assert np.nanmax(np.abs(read - _heights())) < 0.001


@pytest.mark.parametrize("utm", [None, _UTM])
def test_a_failure_leaves_the_former_file(tmp_path: Path, utm: UtmGrid | None) -> None:
    if utm is not None:
        pytest.importorskip("rasterio", reason="needs the extra survey")
    place = RasterPlace(grid=_GRID, utm=utm)
    former = write_orthophoto(tmp_path / "orthophoto", _rgba(), place).read_bytes()
    with pytest.raises(OSError, match=r"."):
        write_orthophoto(tmp_path / "missing" / "orthophoto", _rgba(), place)
    path = write_orthophoto(tmp_path / "orthophoto", np.zeros_like(_rgba()), place)
    assert path.read_bytes() != former
    assert not list(tmp_path.glob(".tmp-*"))
