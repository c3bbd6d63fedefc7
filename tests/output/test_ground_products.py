"""Orthophoto and surface model of a run."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from engine.dense.coverage import CoverageStatus
from engine.dense.fusion import fuse
from engine.dense.keyframe_points import keyframe_points
from engine.dense_types import DensePoints, DepthMap, KeyframePoses
from engine.geometry import pose_in_other_world
from engine.output.ground_products import GroundProducts
from engine.types import Float64Array, GpsFix
from tests.support.boxed_ground import FOCAL, colour_at, depth_map, in_world, pose_above
from tests.support.dense_points import concatenate

_ORIGIN = GpsFix(latitude_deg=50.8, longitude_deg=-0.1, altitude_m=80.0)
_POSES = [pose_above(x, y, 15.0) for x in (-6.0, -2.0, 2.0, 6.0) for y in (-4.0, 0.0, 4.0)]


def test_a_georeferenced_map_gives_geotiffs_that_show_things_where_they_are(
    tmp_path: Path,
) -> None:
    rasterio = pytest.importorskip("rasterio", reason="needs the extra survey")
    pyproj = pytest.importorskip("pyproj", reason="needs the extra survey")
    assert _write(tmp_path, _POSES, origin=_ORIGIN).epsg == 32630
    with rasterio.open(tmp_path / "dsm.tif") as raster:
        heights = raster.read(1, masked=True)
        assert raster.crs.to_epsg() == 32630
        tops = np.ma.filled(np.abs(heights - 83.0) < 0.3, False)
        assert tops.sum() * raster.res[0] ** 2 == pytest.approx(16.0, rel=0.35)
        assert np.median(heights.compressed()) == pytest.approx(80.0, abs=0.1)
    with rasterio.open(tmp_path / "orthophoto.tif") as raster:
        assert raster.tags()["TIFFTAG_IMAGEDESCRIPTION"] == "verdict on the map: good"
        to_wgs84 = pyproj.Transformer.from_crs(raster.crs, "EPSG:4326")
        easting, northing = to_wgs84.transform(50.8, -0.1, direction="INVERSE")
        line, column = raster.index(easting, northing)  # the middle of the box
        pixels = raster.read()
        around = pixels[:3, line - 3 : line + 4, column - 3 : column + 4].reshape(3, -1)
        assert np.abs(np.median(around, axis=1) - colour_at(np.array(0.0), np.array(0.0))).max() < 8
        assert (pixels[3] == 255).mean() > 0.9


def test_a_map_in_its_own_unit_is_turned_upright(tmp_path: Path) -> None:
    turn = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    similarity = np.column_stack([0.1 * turn, [3.0, -2.0, 5.0]])
    _write(tmp_path, _POSES, origin=None, onto_from_world=similarity)
    values = np.asarray(cv2.imread(str(tmp_path / "dsm.png"), cv2.IMREAD_UNCHANGED))
    words = (tmp_path / "dsm.txt").read_text().split()
    heights = float(words[4]) * values[values > 0]
    ground = np.median(heights)
    is_top = np.abs(heights - ground - 0.3) < 0.03
    cell = float((tmp_path / "dsm.pgw").read_text().split()[0])
    assert is_top.sum() * cell**2 == pytest.approx(0.16, rel=0.35)
    assert np.mean(np.abs(heights - ground) < 0.02) > 0.85
    assert (tmp_path / "orthophoto.png").exists()


def test_without_the_extra_there_are_pngs_and_one_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find_spec = importlib.util.find_spec

    def without(name: str, *args: Any) -> Any:
        return None if name in ("pyproj", "rasterio") else find_spec(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with caplog.at_level(logging.WARNING):
        products = _write(tmp_path, _POSES, origin=_ORIGIN)
        _write(tmp_path, _POSES, origin=_ORIGIN, products=products)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "coverage.geojson",
        *("dsm.pgw", "dsm.png", "dsm.txt", "orthophoto.pgw", "orthophoto.png"),
    ]
    notices = [record.getMessage() for record in caplog.records]
    assert len(notices) == 1
    assert products.epsg is None
    assert "tools/setup survey" in notices[0]


def test_coverage_lies_on_the_globe_where_the_map_does(tmp_path: Path) -> None:
    products = _write(tmp_path, _POSES, origin=_ORIGIN)
    record = json.loads((tmp_path / "coverage.geojson").read_text())
    by_status = {one["properties"]["status"]: one for one in record["features"]}
    places = np.array(by_status["good"]["geometry"]["coordinates"]).reshape(-1, 2)
    assert np.abs(places - [-0.1, 50.8]).max() < 16 / 60_000  # degrees
    assert by_status["good"]["properties"]["min_keyframes"] >= 3
    assert products.coverage is not None
    assert products.coverage.share_of(CoverageStatus.GOOD) > 0.5
    assert record["description"] == "verdict on the map: good"
    assert "frame" not in record


def test_keyframes_without_depth_cover_the_ground_too(tmp_path: Path) -> None:
    of_all = _write(tmp_path, _POSES, origin=_ORIGIN).coverage
    of_half = _write(tmp_path, _POSES, origin=_ORIGIN, with_depth=slice(None, None, 2)).coverage
    assert of_all is not None
    assert of_half is not None
    assert of_half.grid == of_all.grid
    assert np.array_equal(of_half.num_keyframes, of_all.num_keyframes)


def test_points_are_passed_on_as_they_are() -> None:
    chunks = _chunks(_POSES[:2], _maps(_POSES[:2]))
    products = GroundProducts(lambda _: None)
    passed = products.collected(fuse(chunks), _keyframe_poses(_POSES[:2]), origin=_ORIGIN)
    assert concatenate(list(passed)).xyz.tobytes() == concatenate(list(fuse(chunks))).xyz.tobytes()


def test_without_points_nothing_is_written_and_nothing_of_a_former_world_stays(
    tmp_path: Path,
) -> None:
    products = _write(tmp_path, _POSES, origin=_ORIGIN)
    assert list(tmp_path.iterdir())
    assert not list(products.collected([], _keyframe_poses([]), origin=None))
    products.write(tmp_path, _keyframe_poses([]), {})
    assert not list(tmp_path.iterdir())
    assert products.picture is None


def test_coverage_of_a_map_without_positions_is_no_geojson(tmp_path: Path) -> None:
    products = _write(tmp_path, _POSES, origin=None)
    assert "not on the globe" in json.loads((tmp_path / "coverage.json").read_text())["frame"]
    assert not (tmp_path / "coverage.geojson").exists()
    assert products.picture is not None
    assert products.picture.coverage == ""
    products = _write(tmp_path, _POSES, origin=_ORIGIN, products=products)
    assert products.picture is not None
    assert json.loads(products.picture.coverage)["type"] == "FeatureCollection"
    assert not (tmp_path / "coverage.json").exists()


def _write(
    folder: Path,
    poses: Sequence[Float64Array],
    *,
    origin: GpsFix | None,
    onto_from_world: Float64Array | None = None,
    products: GroundProducts | None = None,
    with_depth: slice = slice(None),
) -> GroundProducts:
    maps = _maps(poses)
    by_id = {one.frame_id: one for one in maps[with_depth]}
    products = products or GroundProducts(by_id.get)
    chunks = _chunks(poses, maps)
    if onto_from_world is not None:
        poses = [pose_in_other_world(pose, onto_from_world) for pose in poses]
        chunks = [_moved(chunk, onto_from_world) for chunk in chunks]
    placed = _keyframe_poses(poses)
    for _ in products.collected(fuse(chunks), placed, origin=origin):
        pass
    products.write(folder, placed, dict.fromkeys(by_id, 1), comments=["verdict on the map: good"])
    return products


def _maps(poses: Sequence[Float64Array]) -> list[DepthMap]:
    return [depth_map(pose, frame_id=i + 1, noise=0.001) for i, pose in enumerate(poses)]


def _chunks(poses: Sequence[Float64Array], maps: Sequence[DepthMap]) -> list[DensePoints]:
    return [in_world(keyframe_points(one), pose) for one, pose in zip(maps, poses, strict=True)]


def _moved(points: DensePoints, onto_from_world: Float64Array) -> DensePoints:
    scale = np.cbrt(np.linalg.det(onto_from_world[:, :3]))
    return DensePoints(
        xyz=(points.xyz @ onto_from_world[:, :3].T + onto_from_world[:, 3]).astype(np.float32),
        colors=points.colors,
        normals=(points.normals @ (onto_from_world[:, :3] / scale).T).astype(np.float32),
        sampling=(points.sampling * scale).astype(np.float32),
        num_views=points.num_views,
    )


def _keyframe_poses(poses: Sequence[Float64Array]) -> KeyframePoses:
    return KeyframePoses(
        frame_ids=np.arange(len(poses)) + 1,
        cam_from_world=np.array(poses).reshape(-1, 3, 4),
        focal_px=np.full(len(poses), FOCAL),
        border_rays=np.full((len(poses), 8, 3), np.nan),
    )
