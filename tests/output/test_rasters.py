"""Rasters of the ground as files that others read."""

from __future__ import annotations

import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from engine.dense.surface import GroundGrid
from engine.geo.utm import UtmGrid
from engine.output.rasters import RasterPlace, write_heights, write_orthophoto
from engine.types import Float32Array, GpsFix, Uint8Array

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


def test_a_png_says_what_it_is_without_the_files_beside_it(tmp_path: Path) -> None:
    origin = GpsFix(latitude_deg=50.8, longitude_deg=-0.1)
    place = RasterPlace(grid=_GRID, utm=None, origin=origin, description="verdict: doubtful")
    path = write_heights(tmp_path / "dsm", _heights(), place)
    texts = _texts(path)
    assert texts["Description"] == "verdict: doubtful"
    assert "latitude 50.8" in texts["Coordinates"]
    assert texts["World file"] == (tmp_path / "dsm.pgw").read_text().replace("\n", " ").strip()
    assert texts["Heights"] == (tmp_path / "dsm.txt").read_text().splitlines()[0]
    assert "altitude is unknown" in texts["Heights"]
    assert cv2.imread(str(path), cv2.IMREAD_UNCHANGED) is not None


def test_heights_over_an_unknown_altitude_are_not_called_ellipsoidal(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio", reason="needs the extra survey")
    for altitude_m, words in ((None, "altitude is unknown"), (80.0, "above the ellipsoid")):
        origin = GpsFix(latitude_deg=50.8, longitude_deg=-0.1, altitude_m=altitude_m)
        place = RasterPlace(grid=_GRID, utm=_UTM, origin=origin, description="verdict: good")
        with rasterio.open(write_heights(tmp_path / "dsm", _heights(), place)) as raster:
            described = raster.tags()["TIFFTAG_IMAGEDESCRIPTION"]
        assert described.startswith("verdict: good; ")
        assert words in described


def test_a_raster_takes_the_place_of_one_of_the_other_kind(tmp_path: Path) -> None:
    pytest.importorskip("rasterio", reason="needs the extra survey")
    in_map, in_utm = RasterPlace(grid=_GRID, utm=None), RasterPlace(grid=_GRID, utm=_UTM)
    for place, names in (
        (in_map, {"dsm.png", "dsm.pgw", "dsm.txt"}),
        (in_utm, {"dsm.tif"}),
        (in_map, {"dsm.png", "dsm.pgw", "dsm.txt"}),
    ):
        write_heights(tmp_path / "dsm", _heights(), place)
        assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("utm", [None, _UTM])
def test_a_failure_leaves_the_former_file(
    tmp_path: Path, utm: UtmGrid | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if utm is not None:
        pytest.importorskip("rasterio", reason="needs the extra survey")
    place = RasterPlace(grid=_GRID, utm=utm)
    path = write_orthophoto(tmp_path / "orthophoto", _rgba(), place)
    former = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr("os.fsync", full)
        write_orthophoto(tmp_path / "orthophoto", np.zeros_like(_rgba()), place)
    assert path.read_bytes() == former[path]
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_folder_that_is_missing_is_an_error_of_the_system(tmp_path: Path) -> None:
    pytest.importorskip("rasterio", reason="needs the extra survey")
    with pytest.raises(OSError, match="No such file"):
        write_orthophoto(tmp_path / "missing" / "x", _rgba(), RasterPlace(grid=_GRID, utm=_UTM))


def _texts(path: Path) -> dict[str, str]:
    """The texts of a PNG, by keyword; its chunks are whole."""
    data, at, texts = path.read_bytes(), 8, {}
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : at + 8 + length]
        assert zlib.crc32(body) == int.from_bytes(data[at + 8 + length : at + 12 + length], "big")
        if body.startswith(b"tEXt"):
            keyword, _, text = body[4:].decode("latin-1").partition("\0")
            texts[keyword] = text
        at += 12 + length
    return texts
