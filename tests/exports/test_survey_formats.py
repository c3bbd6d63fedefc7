from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import laspy
import numpy as np
import pycolmap
import pyproj
import pytest

import adapters.exports.export as export_module
from adapters.exports.export import ExportFormat, export
from adapters.run_files import read_model
from engine.errors import AdapterUnavailableError, ConfigError
from engine.output.files import link_atomically
from engine.types import Float64Array
from tests.support.globe_readers import (
    KML,
    enu_of,
    kml_coordinates,
    read_features,
    read_placemarks,
)
from tests.support.placed_runs import DULUTH, Origin, dense_points, make_placed_run

ON_GLOBE = [
    ExportFormat.GEOJSON,
    ExportFormat.KML,
    ExportFormat.ODM,
    ExportFormat.METASHAPE,
]
SUVA = Origin(latitude_deg=-17.8, longitude_deg=179.9999, altitude_m=20.0)
NO_HEIGHT = Origin(latitude_deg=46.8428, longitude_deg=-91.9942, altitude_m=None)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_placed_run(tmp_path / "run")
    return tmp_path / "run"


def model_of(run: Path) -> pycolmap.Reconstruction:
    return pycolmap.Reconstruction(run / "latest" / "sparse" / "0")


def points_of(run: Path) -> tuple[Float64Array, Float64Array]:
    points = [point for _, point in sorted(model_of(run).points3D.items())]
    return np.array([point.xyz for point in points]), np.array([point.color for point in points])


def centers_of(run: Path) -> dict[str, Float64Array]:
    return {image.name: image.projection_center() for image in model_of(run).images.values()}


def from_crs(crs: pyproj.CRS, coordinates: Float64Array, origin: Origin = DULUTH) -> Float64Array:
    """East, north, up (P, 3) of coordinates in a CRS."""
    to_globe = pyproj.Transformer.from_crs(crs, "EPSG:4979", always_xy=True)
    return enu_of(origin, np.stack(to_globe.transform(*coordinates.T), axis=1))


# -- LAS ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ExportFormat.LAS, ExportFormat.LAZ])
def test_laspy_reads_points_where_they_are_to_a_millimetre(
    run: Path, tmp_path: Path, kind: ExportFormat
) -> None:
    done = export(run, tmp_path / "out", formats=[kind])
    las = laspy.read(done.path / f"points.{kind}")
    crs = las.header.parse_crs()
    assert crs is not None and crs.to_epsg() == 32615
    assert (str(las.header.version), las.header.point_format.id) == ("1.4", 7)
    assert las.header.global_encoding.wkt
    assert max(las.header.scales) <= 0.001
    xyz, colors = points_of(run)
    np.testing.assert_allclose(from_crs(crs, las.xyz), xyz, atol=0.0015)
    rgb = np.stack([las.red, las.green, las.blue], axis=1)
    np.testing.assert_array_equal(rgb, colors.astype(np.uint16) * 257)
    assert set(np.asarray(las.return_number)) == set(np.asarray(las.number_of_returns)) == {1}
    np.testing.assert_allclose(las.header.mins, las.xyz.min(axis=0), atol=1e-6)


def spoil_a_point(run: Path, distance_m: float) -> int:
    """Puts a point in line with the images that see it; returns how many points there are."""
    model = model_of(run)
    point = model.point3D(min(model.points3D))
    images = [model.image(element.image_id) for element in point.track.elements[:2]]
    first, second = (image.projection_center() for image in images)
    point.xyz = first + distance_m * (first - second) / np.linalg.norm(first - second)
    model.write_binary(run / "latest" / "sparse" / "0")
    return model.num_points3D()


def test_points_known_far_worse_than_the_others_are_noise_and_counted(
    run: Path, tmp_path: Path
) -> None:
    num = spoil_a_point(run, 100.0)
    done = export(run, tmp_path / "out", formats=[ExportFormat.LAS])
    classes = np.asarray(laspy.read(done.path / "points.las").classification)
    assert classes.tolist() == [7, *[0] * (num - 1)]
    assert any(f"1 of {num} points in points.las" in note for note in done.notes)


def test_noise_far_from_all_other_points_is_left_out_and_counted(run: Path, tmp_path: Path) -> None:
    num = spoil_a_point(run, 3000.0)
    done = export(run, tmp_path / "out", formats=[ExportFormat.LAS])
    las = laspy.read(done.path / "points.las")
    assert np.asarray(las.classification).tolist() == [0] * (num - 1)
    assert np.ptp(las.xyz, axis=0).max() < 200.0
    assert done.notes == ("1 point too far off is not in .las files",)


def test_no_point_of_a_usual_map_is_noise(run: Path, tmp_path: Path) -> None:
    done = export(run, tmp_path / "out", formats=[ExportFormat.LAS])
    assert set(np.asarray(laspy.read(done.path / "points.las").classification)) == {0}
    assert set(np.asarray(laspy.read(done.path / "dense.las").classification)) == {0}
    assert done.notes == ()


def test_a_map_has_the_place_of_its_own_snapshot_whatever_the_run_writes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    make_placed_run(run, origin=None)
    make_placed_run(tmp_path / "placed")

    def read_and_go_on(folder: Path) -> pycolmap.Reconstruction:
        model = read_model(folder)
        shutil.copytree(tmp_path / "placed" / "latest", run / "snapshots" / "000002")
        link_atomically(run / "latest", "snapshots/000002")
        return model

    monkeypatch.setattr(export_module, "read_model", read_and_go_on)
    with pytest.raises(ConfigError, match="needs a map with a place on the globe"):
        export(run, tmp_path / "out", formats=[ExportFormat.KML])
    assert (run / "latest").resolve().name == "000002"


@pytest.mark.parametrize("kind", [ExportFormat.LAS, ExportFormat.LAZ])
@pytest.mark.parametrize("unit", [1.0, 1e-3, 50.0])
def test_a_map_without_a_place_is_in_its_own_axes_and_unit_without_a_crs(
    tmp_path: Path, kind: ExportFormat, unit: float
) -> None:
    run = tmp_path / "run"
    make_placed_run(run, origin=None)
    model = model_of(run)
    model.transform(pycolmap.Sim3d(unit, pycolmap.Rotation3d(), np.zeros(3)))
    model.write_binary(run / "latest" / "sparse" / "0")
    done = export(run, tmp_path / "out", formats=[kind])
    las = laspy.read(done.path / f"points.{kind}")
    assert las.header.parse_crs() is None
    xyz, _ = points_of(run)
    extent = np.ptp(xyz, axis=0).max()
    assert max(las.header.scales) <= min(1e-6 * extent, 0.001)
    np.testing.assert_allclose(las.xyz, xyz, atol=min(1e-6 * extent, 0.001))
    dense = laspy.read(done.path / f"dense.{kind}")
    np.testing.assert_allclose(dense.xyz, unit * dense_points()[0], atol=2e-6 * extent)
    (note,) = [note for note in done.notes if "without a CRS" in note]
    assert note.startswith(f"coordinates in .{kind} files are in map units along the map's own")
    assert not (done.path / "origin.json").exists()


def test_a_crs_is_still_refused_for_a_map_without_a_place(tmp_path: Path) -> None:
    make_placed_run(tmp_path / "run", origin=None)
    with pytest.raises(ConfigError, match="--crs needs a map with a place"):
        export(tmp_path / "run", tmp_path / "out", formats=[ExportFormat.LAS], crs="EPSG:32615")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_dense_points_are_written_beside_the_others(run: Path, tmp_path: Path) -> None:
    done = export(run, tmp_path / "out", formats=[ExportFormat.LAZ])
    las = laspy.read(done.path / "dense.laz")
    crs = las.header.parse_crs()
    assert crs is not None
    xyz, colors = dense_points()
    np.testing.assert_allclose(from_crs(crs, las.xyz), xyz, atol=0.002)
    np.testing.assert_array_equal(np.asarray(las.red), colors[:, 0].astype(np.uint16) * 257)


def test_dense_points_of_another_map_are_left_out_with_a_sentence(
    run: Path, tmp_path: Path
) -> None:
    ply = run / "products" / "dense.ply"
    kept = [line for line in ply.read_bytes().split(b"\n") if b"cam_from_world" not in line]
    ply.write_bytes(b"\n".join(kept))
    done = export(run, tmp_path / "out", formats=[ExportFormat.LAS])
    assert not (done.path / "dense.las").exists()
    assert any("dense points are left out" in note for note in done.notes)


@pytest.mark.parametrize(
    ("asked", "epsg"),
    [("EPSG:32615", 32615), ("EPSG:4326", 4326), ("EPSG:26850", 26850), ("EPSG:3857", 3857)],
)
def test_points_lie_in_the_crs_that_was_asked_for(
    run: Path, tmp_path: Path, asked: str, epsg: int
) -> None:
    formats = [ExportFormat.LAS, ExportFormat.PLY]
    done = export(run, tmp_path / "out", formats=formats, crs=asked)
    las = laspy.read(done.path / "points.las")
    crs = las.header.parse_crs()
    assert crs is not None and crs.to_epsg() == epsg
    xyz, _ = points_of(run)
    np.testing.assert_allclose(from_crs(crs, las.xyz), xyz, atol=0.005)
    comments, places = read_ply(done.path / "points.ply")
    assert comments["crs"] == asked
    offset = np.array([float(word) for word in comments["offset"].split()])
    np.testing.assert_allclose(from_crs(crs, places + offset), xyz, atol=0.005)
    is_outside = any(note.startswith("WARNING: ") for note in done.notes)
    assert is_outside == (epsg == 26850)  # of a part of Minnesota
    origin = json.loads((done.path / "origin.json").read_text())
    assert origin["crs"]["name"] == asked
    assert pyproj.CRS.from_wkt(origin["crs"]["wkt"]).to_epsg() == epsg


def test_a_crs_of_the_next_zone_is_written_with_a_warning(run: Path, tmp_path: Path) -> None:
    done = export(run, tmp_path / "out", formats=[ExportFormat.LAS], crs="EPSG:32616")
    crs = laspy.read(done.path / "points.las").header.parse_crs()
    assert crs is not None and crs.to_epsg() == 32616
    (warning,) = [note for note in done.notes if note.startswith("WARNING: ")]
    assert re.search(r"lies \d+ km outside of the area that EPSG:32616 is made for \(Bet", warning)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("EPSG:27700", "is for United Kingdom"),
        ("EPSG:32715", r"southern hemisphere between 80°S and equator, onshore and offshore, and"),
        ("EPSG:4978", "neither a projected nor a geographic"),
        ("EPSG:99999999", "PROJ cannot use it"),
        ("nonsense", "PROJ cannot use it"),
        ("EPSG:32615+5773", r"PROJ lacks (us_nga_)?egm96_15\S+: `pyproj sync --file"),  # not here
        ("EPSG:32615+5703", r"5703: PROJ lacks \S+: `pyproj sync --file .* PROJ_NETWORK=ON"),
        ("EPSG:32661", "is for Northern hemisphere"),
    ],
)
def test_a_crs_that_will_not_do_is_refused_and_nothing_is_written(
    run: Path, tmp_path: Path, asked: str, why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        export(run, tmp_path / "out", formats=[ExportFormat.LAS], crs=asked)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize(
    ("formats", "why"),
    [
        ([ExportFormat.KML], "--crs is for --las, --laz, --ply and --metashape"),
        ([ExportFormat.PLY, ExportFormat.NERFSTUDIO], "folder of its own"),
    ],
)
def test_a_crs_is_refused_where_it_means_nothing(
    run: Path, tmp_path: Path, formats: list[ExportFormat], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        export(run, tmp_path / "out", formats=formats, crs="EPSG:32615")


def test_a_change_of_datum_says_how_well_it_is_known(run: Path, tmp_path: Path) -> None:
    done = export(run, tmp_path / "nad83", formats=[ExportFormat.LAS], crs="EPSG:26915")
    assert "coordinates in EPSG:26915: PROJ knows the change from WGS 84 to 4 m" in done.notes
    origin = json.loads((done.path / "origin.json").read_text())
    assert origin["crs"]["accuracy_m"] == 4.0
    done = export(run, tmp_path / "wgs84", formats=[ExportFormat.LAS], crs="EPSG:32615")
    assert not done.notes


def test_points_farther_off_than_a_file_can_say_are_left_out_and_counted(
    run: Path, tmp_path: Path
) -> None:
    model = model_of(run)
    far = sorted(model.points3D)[:4]
    for point3D_id, place in zip(
        far, ([0, 0, 3e6], [9e6, 0, 0], [0, -1e25, 0], [0, 0, -6.3e6]), strict=True
    ):
        model.point3D(point3D_id).xyz = np.array(place)
    model.write_binary(run / "latest" / "sparse" / "0")
    formats = [ExportFormat.LAS, ExportFormat.PLY]
    done = export(run, tmp_path / "out", formats=formats, crs="EPSG:32615")
    las = laspy.read(done.path / "points.las")
    assert len(las.points) == model.num_points3D() - 4
    assert "4 points too far off are not in .las files" in done.notes
    crs = las.header.parse_crs()
    assert crs is not None
    np.testing.assert_allclose(from_crs(crs, las.xyz), points_of(run)[0][4:], atol=0.002)
    _, places = read_ply(done.path / "points.ply")
    assert np.isfinite(places).all()


@pytest.mark.parametrize(
    ("kind", "package"),
    [
        (ExportFormat.LAS, "laspy"),
        (ExportFormat.LAS, "pyproj"),
        (ExportFormat.ODM, "pyproj"),
        (ExportFormat.METASHAPE, "pyproj"),
    ],
)
def test_a_missing_package_is_named_with_how_to_install_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: ExportFormat, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AdapterUnavailableError, match=f"--{kind} needs the package {package}"):
        export(run, tmp_path / "out", formats=[kind])
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_laz_without_its_backend_says_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(laspy.LazBackend, "detect_available", tuple)
    with pytest.raises(AdapterUnavailableError, match="--laz needs the package lazrs"):
        export(run, tmp_path / "out", formats=[ExportFormat.LAZ])
    assert export(run, tmp_path / "out", formats=[ExportFormat.LAS]).num_images == 6


@pytest.mark.parametrize("kind", [ExportFormat.GEOJSON, ExportFormat.KML, ExportFormat.PLY])
def test_shapes_and_ply_need_no_package_of_surveyors(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: ExportFormat
) -> None:
    for package in ("laspy", "lazrs", "pyproj"):
        monkeypatch.setitem(sys.modules, package, None)
    assert export(run, tmp_path / "out", formats=[kind]).num_images == 6


# -- PLY and the origin ----------------------------------------------------------------------------


def read_ply(path: Path) -> tuple[dict[str, str], Float64Array]:
    """Comments and points (P, 3)."""
    header, _, body = path.read_bytes().partition(b"end_header\n")
    lines = [line for line in header.decode().splitlines() if line.startswith("comment ")]
    comments = dict(line.removeprefix("comment ").split(": ", 1) for line in lines)
    layout = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)])
    return comments, np.frombuffer(body, layout)["xyz"].astype(np.float64)


def test_a_ply_says_where_its_origin_is(run: Path, tmp_path: Path) -> None:
    done = export(run, tmp_path / "out", formats=[ExportFormat.PLY])
    comments, places = read_ply(done.path / "points.ply")
    np.testing.assert_allclose(places, points_of(run)[0], atol=1e-5)
    assert comments["frame"] == "metres east, north, up of the origin"
    assert "46.8428" in comments["origin"] and "-91.9942" in comments["origin"]


@pytest.mark.parametrize("kind", [ExportFormat.PLY, ExportFormat.TUM, ExportFormat.KML])
def test_the_origin_lies_beside_every_export_of_a_placed_map(
    run: Path, tmp_path: Path, kind: ExportFormat
) -> None:
    done = export(run, tmp_path / "out", formats=[kind])
    origin = json.loads((done.path / "origin.json").read_text())
    found = [origin[key] for key in ("latitude_deg", "longitude_deg", "altitude_m")]
    assert found == [DULUTH.latitude_deg, DULUTH.longitude_deg, DULUTH.altitude_m]
    assert "east" in origin["axes"] and "ellipsoid" in origin["heights"]


@pytest.mark.parametrize("kind", ON_GLOBE)
def test_a_map_without_a_place_is_refused_with_the_command_that_gives_it_one(
    tmp_path: Path, kind: ExportFormat
) -> None:
    make_placed_run(tmp_path / "run", origin=None)
    with pytest.raises(ConfigError, match=rf"--{kind} needs a map with a place .* georeference"):
        export(tmp_path / "run", tmp_path / "out", formats=[kind])
    with pytest.raises(ConfigError, match="georeference"):
        export(tmp_path / "run", tmp_path / "out", formats=[ExportFormat.PLY], crs="EPSG:32615")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    done = export(tmp_path / "run", tmp_path / "out", formats=[ExportFormat.PLY])
    assert not (done.path / "origin.json").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: record["georeference"].clear(),
        lambda record: record["georeference"]["origin"].update(latitude_deg=91.0),
        lambda record: record["georeference"]["origin"].update(longitude_deg="east"),
        lambda record: record["georeference"]["origin"].update(altitude_m=float("nan")),
        lambda record: record["models"].clear(),
        lambda record: record.pop("models"),
    ],
)
def test_a_damaged_record_of_the_place_is_an_error(
    run: Path, tmp_path: Path, spoil: Callable[[dict[str, Any]], None]
) -> None:
    path = run / "latest" / "snapshot.json"
    record = json.loads(path.read_text())
    spoil(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="snapshot|no place on the globe"):
        export(run, tmp_path / "out", formats=[ExportFormat.GEOJSON])


# -- GeoJSON and KML -------------------------------------------------------------------------------


def test_geojson_has_cameras_where_they_are_to_a_centimetre(run: Path, tmp_path: Path) -> None:
    done = export(run, tmp_path / "out", formats=[ExportFormat.GEOJSON])
    features = read_features(done.path / "cameras.geojson")
    centers = centers_of(run)
    assert {one["properties"]["name"] for one in features["camera"]} == set(centers)
    for one in features["camera"]:
        [found] = enu_of(DULUTH, np.array([one["geometry"]["coordinates"]]))
        np.testing.assert_allclose(found, centers[one["properties"]["name"]], atol=0.01)


def test_footprints_are_where_the_borders_of_images_meet_the_ground(
    run: Path, tmp_path: Path
) -> None:
    done = export(run, tmp_path / "out", formats=[ExportFormat.GEOJSON])
    features = read_features(done.path / "cameras.geojson")
    model = model_of(run)
    assert len(features["footprint"]) == model.num_reg_images()
    for one in features["footprint"]:
        [ring] = one["geometry"]["coordinates"]
        outline = enu_of(DULUTH, np.array(ring))
        image = model.find_image_with_name(one["properties"]["name"])
        assert image is not None and image.camera is not None
        places = np.array([image.project_point(place) for place in outline])
        size = np.array([image.camera.width, image.camera.height])
        off = np.minimum(np.abs(places), np.abs(places - size)).min(axis=1)
        assert off.max() < 1.5  # px; houses stand on the ground that the plane is fitted to
        np.testing.assert_allclose(outline[:, 2], 0.08 * outline[:, 0], atol=0.5)


def test_the_way_leads_through_the_cameras_in_order_of_time(run: Path, tmp_path: Path) -> None:
    done = export(run, tmp_path / "out", formats=[ExportFormat.GEOJSON])
    [way] = read_features(done.path / "cameras.geojson")["way"]
    found = enu_of(DULUTH, np.array(way["geometry"]["coordinates"]))
    assert way["properties"]["source"] == "flight.mp4"
    assert (np.diff(found[:, 0]) > 10).all()
    np.testing.assert_allclose(found, sorted(map(list, centers_of(run).values())), atol=0.01)


def test_kml_has_the_same_shapes_as_geojson(run: Path, tmp_path: Path) -> None:
    done = export(run, tmp_path / "out", formats=[ExportFormat.GEOJSON, ExportFormat.KML])
    features = read_features(done.path / "cameras.geojson")
    path = done.path / "cameras.kml"
    for (name, placemark), one in zip(
        read_placemarks(path, "Cameras"), features["camera"], strict=True
    ):
        assert name == one["properties"]["name"]
        assert placemark.findtext(f"{KML}Point/{KML}altitudeMode") == "absolute"
        np.testing.assert_allclose(
            kml_coordinates(placemark), [one["geometry"]["coordinates"]], rtol=0, atol=1e-9
        )
    for (_, placemark), one in zip(
        read_placemarks(path, "Footprints"), features["footprint"], strict=True
    ):
        assert placemark.findtext(f"{KML}Polygon/{KML}altitudeMode") == "clampToGround"
        ring = np.array(one["geometry"]["coordinates"][0])
        np.testing.assert_allclose(kml_coordinates(placemark), ring[:, :2], rtol=0, atol=1e-9)
    [(_, way)] = read_placemarks(path, "Ways")
    np.testing.assert_allclose(
        kml_coordinates(way), features["way"][0]["geometry"]["coordinates"], rtol=0, atol=1e-9
    )


def test_shapes_are_cut_at_the_date_line(tmp_path: Path) -> None:
    make_placed_run(tmp_path / "run", origin=SUVA)
    formats = [ExportFormat.GEOJSON, ExportFormat.KML]
    done = export(tmp_path / "run", tmp_path / "out", formats=formats)
    features = read_features(done.path / "cameras.geojson")  # checks that nothing crosses it
    [way] = features["way"]
    west, east = way["geometry"]["coordinates"]
    assert west[-1][0] == 180.0 and east[0][0] == -180.0 and west[-1][1] == east[0][1]
    cut = [one for one in features["footprint"] if one["geometry"]["type"] == "MultiPolygon"]
    assert cut
    for one in cut:
        sides = [np.array(part[0])[:, 0] for part in one["geometry"]["coordinates"]]
        assert {float(np.sign(side.mean())) for side in sides} == {-1.0, 1.0}
        assert all(np.isclose(np.abs(side), 180.0, atol=1e-8).sum() >= 2 for side in sides)
    [(_, placemark)] = read_placemarks(done.path / "cameras.kml", "Ways")
    assert len(placemark.findall(f"{KML}MultiGeometry/{KML}LineString")) == 2


def test_kml_is_whole_whatever_the_source_is_called(run: Path, tmp_path: Path) -> None:
    table = (run / "frames.csv").read_text()
    (run / "frames.csv").write_text(table.replace("flight.mp4", '<b>&"\x1b[2J\ud7ff'))
    done = export(run, tmp_path / "out", formats=[ExportFormat.KML])
    [(name, _)] = read_placemarks(done.path / "cameras.kml", "Ways")
    assert name == '<b>&"\ufffd[2J\ud7ff'


def test_heights_that_nobody_knows_are_not_made_up(tmp_path: Path) -> None:
    make_placed_run(tmp_path / "run", origin=NO_HEIGHT)
    formats = [ExportFormat.GEOJSON, ExportFormat.KML, ExportFormat.LAS, ExportFormat.ODM]
    done = export(tmp_path / "run", tmp_path / "out", formats=formats)
    for one in read_features(done.path / "cameras.geojson")["camera"]:
        assert len(one["geometry"]["coordinates"]) == 2
    for _, placemark in read_placemarks(done.path / "cameras.kml", "Cameras"):
        assert placemark.findtext(f"{KML}Point/{KML}altitudeMode") == "clampToGround"
        assert len(kml_coordinates(placemark)[0]) == 2
    origin = json.loads((done.path / "origin.json").read_text())
    assert origin["altitude_m"] is None
    assert "unknown" in origin["heights"] and "unknown" in origin["crs"]["heights"]
    lines = (done.path / "odm" / "geo.txt").read_text().splitlines()[1:]
    assert {len(line.split()) for line in lines} == {3}


@pytest.mark.parametrize("kind", [ExportFormat.GEOJSON, ExportFormat.KML])
def test_fisheyes_have_footprints_and_spheres_have_none(tmp_path: Path, kind: ExportFormat) -> None:
    models = ("OPENCV_FISHEYE", "EQUIRECTANGULAR")
    make_placed_run(tmp_path / "run", models=models)
    done = export(tmp_path / "run", tmp_path / "out", formats=[kind])
    if kind is ExportFormat.GEOJSON:
        features = read_features(done.path / "cameras.geojson")
        assert len(features["camera"]) == 6
        assert {one["properties"]["camera_id"] for one in features["footprint"]} == {1}
    else:
        assert len(read_placemarks(done.path / "cameras.kml", "Cameras")) == 6
        assert len(read_placemarks(done.path / "cameras.kml", "Footprints")) == 3
