from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import cv2
import numpy as np
import pycolmap
import pyproj
import pytest

from adapters.exports.export import ExportFormat, export
from engine.errors import ConfigError, SnapshotError
from engine.types import Float64Array
from tests.support.bundler_reader import read_bundler
from tests.support.globe_readers import enu_of
from tests.support.opensfm_reader import center_of, project, read_opensfm
from tests.support.placed_runs import DULUTH, Origin, make_placed_run

ODM_MODELS = [
    ("SIMPLE_PINHOLE",),
    ("SIMPLE_RADIAL",),
    ("OPENCV",),
    ("FULL_OPENCV",),
    ("SIMPLE_RADIAL_FISHEYE",),
    ("OPENCV_FISHEYE",),
    ("EQUIRECTANGULAR",),
    ("RADIAL", "OPENCV_FISHEYE"),
]


def flat(name: str) -> str:
    return name.replace("/", "-").replace(" ", "_")


def model_of(folder: Path) -> pycolmap.Reconstruction:
    return pycolmap.Reconstruction(folder / "sparse" / "0")


def size_of(path: Path) -> tuple[int, int]:
    pixels = cv2.imread(str(path))
    assert pixels is not None
    return pixels.shape[1], pixels.shape[0]


# -- OpenDroneMap ----------------------------------------------------------------------------------


def read_geo(path: Path) -> dict[str, Float64Array]:
    """Longitude, latitude and altitude by image, as OpenDroneMap's manual has ``geo.txt``."""
    projection, *lines = path.read_text().splitlines()
    assert projection == "EPSG:4326"
    rows = [line.split() for line in lines]
    assert all(len(row) == 4 for row in rows)
    return {name: np.array([float(x), float(y), float(z)]) for name, x, y, z in rows}


def test_geo_txt_has_every_image_where_its_camera_is_to_a_centimetre(tmp_path: Path) -> None:
    truth = make_placed_run(tmp_path / "run")
    done = export(tmp_path / "run", tmp_path / "out", formats=[ExportFormat.ODM])
    geo = read_geo(done.path / "odm" / "geo.txt")
    images = done.path / "odm" / "images"
    assert {path.name for path in images.iterdir()} == set(geo)
    for image in truth.images.values():
        name = flat(image.name)
        [found] = enu_of(DULUTH, geo[name][None])
        np.testing.assert_allclose(found, image.projection_center(), atol=0.01)
        assert (images / name).read_bytes() == (
            tmp_path / "run" / "images" / image.name
        ).read_bytes()


@pytest.mark.parametrize("models", ODM_MODELS)
def test_opensfm_projects_points_onto_their_keypoints(
    tmp_path: Path, models: tuple[str, ...]
) -> None:
    truth = make_placed_run(tmp_path / "run", models=models)
    done = export(tmp_path / "run", tmp_path / "out", formats=[ExportFormat.ODM])
    handed = read_opensfm(done.path / "odm" / "opensfm")
    record = handed.record
    assert len(record["shots"]) == truth.num_reg_images()
    assert len(record["points"]) == truth.num_points3D()
    assert len(handed.tracks) == truth.compute_num_observations()
    images = done.path / "odm" / "images"
    used = {shot["camera"] for shot in record["shots"].values()}
    assert used == set(record["cameras"])
    assert len(used) == len(models)
    for name, shot in record["shots"].items():
        camera = record["cameras"][shot["camera"]]
        size = (camera["width"], camera["height"])
        assert size_of(images / name) == size
        rows = [(point, x, y) for image, point, x, y in handed.tracks if image == name]
        assert len(rows) > 20
        xyz = np.array([record["points"][point]["coordinates"] for point, _, _ in rows])
        seen = np.array([[x, y] for _, x, y in rows])
        off_px = np.linalg.norm(project(shot, camera, xyz) - seen, axis=1) * max(size)
        assert off_px.max() < 0.1


def test_tracks_lie_where_keypoints_do(tmp_path: Path) -> None:
    truth = make_placed_run(tmp_path / "run", models=("OPENCV",))
    done = export(tmp_path / "run", tmp_path / "out", formats=[ExportFormat.ODM])
    tracks = {
        (shot, point): (x, y)
        for shot, point, x, y in read_opensfm(done.path / "odm" / "opensfm").tracks
    }
    for image in truth.images.values():
        name = flat(image.name)
        for point in image.get_observation_points2D():
            x, y = tracks[name, str(point.point3D_id)]
            pixel = np.array([x * 320 + 160, y * 320 + 120])  # 320 x 240 px
            np.testing.assert_allclose(pixel, point.xy, atol=1e-5)


@pytest.mark.parametrize(
    "origin", [DULUTH, Origin(latitude_deg=-33.9, longitude_deg=18.4, altitude_m=5.0)]
)
def test_the_handed_over_map_lies_where_opendronemap_puts_its_reference(
    tmp_path: Path, origin: Origin
) -> None:
    truth = make_placed_run(tmp_path / "run", origin=origin)
    done = export(tmp_path / "run", tmp_path / "out", formats=[ExportFormat.ODM])
    odm = done.path / "odm"
    geo = np.array(list(read_geo(odm / "geo.txt").values()))
    zone = math.floor((origin.longitude_deg + 180) / 6) + 1
    south = " +south" if origin.latitude_deg < 0 else ""
    utm = pyproj.Proj(f"+proj=utm +zone={zone} +datum=WGS84{south}")
    east, north = utm(geo[:, 0], geo[:, 1])
    longitude, latitude = utm(math.floor(east.mean()), math.floor(north.mean()), inverse=True)
    handed = read_opensfm(odm / "opensfm")
    assert handed.reference["altitude"] == 0.0
    assert handed.reference["latitude"] == pytest.approx(latitude, abs=1e-9)
    assert handed.reference["longitude"] == pytest.approx(longitude, abs=1e-9)
    assert handed.record["reference_lla"] == handed.reference
    reference = Origin(latitude_deg=latitude, longitude_deg=longitude, altitude_m=0.0)
    positions = dict(zip(read_geo(odm / "geo.txt"), enu_of(reference, geo), strict=True))
    for name, shot in handed.record["shots"].items():
        np.testing.assert_allclose(center_of(shot), positions[name], atol=0.01)
        np.testing.assert_allclose(shot["gps_position"], positions[name], atol=0.01)
    points = handed.record["points"]
    corners = np.array([points[str(key)]["coordinates"] for key in sorted(truth.points3D)])
    own = np.array([truth.point3D(key).xyz for key in sorted(truth.points3D)])
    lengths = np.linalg.norm(np.diff(corners, axis=0), axis=1)
    np.testing.assert_allclose(lengths, np.linalg.norm(np.diff(own, axis=0), axis=1), atol=1e-6)


def test_stages_of_opendronemap_that_are_done_have_their_folders(tmp_path: Path) -> None:
    make_placed_run(tmp_path / "run")
    done = export(tmp_path / "run", tmp_path / "out", formats=[ExportFormat.ODM])
    opensfm = done.path / "odm" / "opensfm"
    assert (opensfm / "features").is_dir() and (opensfm / "matches").is_dir()
    overrides = json.loads((opensfm / "camera_models_overrides.json").read_text())
    assert overrides == read_opensfm(opensfm).record["cameras"]
    assert all(len(key.split()) >= 6 for key in overrides)  # or it refuses them
    assert any("--skip-report" in note for note in done.notes)


def test_masks_have_the_names_that_opendronemap_looks_for(tmp_path: Path) -> None:
    make_placed_run(tmp_path / "run")
    mask = np.zeros((240, 320), np.uint8)
    mask[:, 100:] = 255
    (tmp_path / "run" / "masks" / "left").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "run" / "masks" / "left" / "000001.png.png"), mask)
    done = export(tmp_path / "run", tmp_path / "out", formats=[ExportFormat.ODM])
    images = done.path / "odm" / "images"
    found = cv2.imread(str(images / "left-000001_mask.png"), cv2.IMREAD_UNCHANGED)
    assert found is not None
    np.testing.assert_array_equal(found, mask)
    assert len(list(images.iterdir())) == 6 + 1


def test_an_image_that_looks_like_a_mask_is_called_otherwise(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_placed_run(run)
    sparse = run / "latest" / "sparse" / "0" / "images.bin"
    data = sparse.read_bytes()
    sparse.write_bytes(data.replace(b"left/000001.png\0", b"left/1_mask.png\0"))
    shutil.move(run / "images" / "left" / "000001.png", run / "images" / "left" / "1_mask.png")
    done = export(run, tmp_path / "out", formats=[ExportFormat.ODM])
    names = {path.stem for path in (done.path / "odm" / "images").iterdir()}
    assert len(names) == 6
    assert not any(name.endswith("_mask") for name in names)
    assert set(read_geo(done.path / "odm" / "geo.txt")) == {f"{name}.png" for name in names}


@pytest.mark.parametrize("model", ["FOV"])
def test_a_camera_that_opensfm_lacks_is_refused(tmp_path: Path, model: str) -> None:
    make_placed_run(tmp_path / "run", models=(model,))
    with pytest.raises(ConfigError, match=f"--odm: OpenSfM has no camera like {model}"):
        export(tmp_path / "run", tmp_path / "out", formats=[ExportFormat.ODM])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["odm", "bundler", "metashape"])
def test_images_of_a_kind_that_runs_do_not_have_are_refused(tmp_path: Path, kind: str) -> None:
    make_placed_run(tmp_path / "run", suffix=".webp")
    with pytest.raises(ConfigError, match=f"--{kind}: takes JPEG and PNG images, not left/"):
        export(tmp_path / "run", tmp_path / "out", formats=[ExportFormat(kind)])


# -- Bundler ---------------------------------------------------------------------------------------


def check_bundler(folder: Path, truth: pycolmap.Reconstruction) -> None:
    cameras, points = read_bundler(folder)
    assert len(cameras) == truth.num_reg_images()
    assert len(points) == truth.num_points3D()
    images = sorted(truth.images.values(), key=lambda image: image.image_id)
    for camera, image in zip(cameras, images, strict=True):
        np.testing.assert_allclose(camera.center, image.projection_center(), atol=1e-6)
        size = (image.camera.width, image.camera.height)
        assert size_of(folder / camera.image) == size
    assert sum(len(point.views) for point in points) == truth.compute_num_observations()
    middle = np.array([images[0].camera.width, images[0].camera.height]) / 2
    seen_px = []
    for point in points:
        assert all(0 <= value <= 255 for value in point.color)
        for number, place in point.views:
            off_px = np.linalg.norm(cameras[number].project(point.xyz) - place)
            assert off_px < 0.1
            seen_px.append(middle + place * [1, -1])
    keypoints = np.array([p.xy for image in images for p in image.get_observation_points2D()])
    np.testing.assert_allclose(
        np.sort(np.array(seen_px), axis=0), np.sort(keypoints, axis=0), atol=1e-3
    )


@pytest.mark.parametrize(
    "models", [("SIMPLE_PINHOLE",), ("SIMPLE_RADIAL",), ("RADIAL",), ("RADIAL", "SIMPLE_PINHOLE")]
)
def test_bundler_projects_points_onto_their_keypoints(
    tmp_path: Path, models: tuple[str, ...]
) -> None:
    truth = make_placed_run(tmp_path / "run", models=models)
    done = export(tmp_path / "run", tmp_path / "out", formats=[ExportFormat.BUNDLER])
    check_bundler(done.path / "bundler", truth)


@pytest.mark.parametrize("model", ["SIMPLE_RADIAL_FISHEYE", "EQUIRECTANGULAR"])
def test_bundler_gets_wide_lenses_undistorted(tmp_path: Path, model: str) -> None:
    make_placed_run(tmp_path / "run", models=(model,))
    formats = [ExportFormat.BUNDLER, ExportFormat.UNDISTORT]
    done = export(tmp_path / "run", tmp_path / "out", formats=formats)
    check_bundler(done.path / "bundler", model_of(done.path))


@pytest.mark.parametrize("model", ["PINHOLE", "OPENCV", "FOV", "OPENCV_FISHEYE", "EQUIRECTANGULAR"])
def test_a_camera_that_bundler_lacks_is_refused(tmp_path: Path, model: str) -> None:
    make_placed_run(tmp_path / "run", models=("SIMPLE_RADIAL", model))
    with pytest.raises(ConfigError, match=f"--bundler: camera 2, {model}, is none of Bundler's"):
        export(tmp_path / "run", tmp_path / "out", formats=[ExportFormat.BUNDLER])
    assert not (tmp_path / "out").exists()


def test_bundler_needs_no_place_on_the_globe(tmp_path: Path) -> None:
    truth = make_placed_run(tmp_path / "run", origin=None)
    done = export(tmp_path / "run", tmp_path / "out", formats=[ExportFormat.BUNDLER])
    check_bundler(done.path / "bundler", truth)


# -- Metashape -------------------------------------------------------------------------------------


def rotation_of(omega_deg: float, phi_deg: float, kappa_deg: float) -> Float64Array:
    """From camera axes x right, y up, z backward to those of the CRS: Rx(o) Ry(p) Rz(k)."""
    angles = np.radians([omega_deg, phi_deg, kappa_deg])
    turns = [cv2.Rodrigues(axis * angle)[0] for axis, angle in zip(np.eye(3), angles, strict=True)]
    return np.asarray(turns[0] @ turns[1] @ turns[2])


@pytest.mark.parametrize("asked", [None, "EPSG:32616", "EPSG:26850"])
@pytest.mark.parametrize("model", ["SIMPLE_RADIAL", "OPENCV"])
def test_metashape_cameras_project_ground_coordinates_onto_their_keypoints(
    tmp_path: Path, model: str, asked: str | None
) -> None:
    truth = make_placed_run(tmp_path / "run", models=(model,))
    done = export(tmp_path / "run", tmp_path / "out", formats=[ExportFormat.METASHAPE], crs=asked)
    folder = done.path / "metashape"
    head, names, *lines = (folder / "cameras.csv").read_text().splitlines()
    crs = pyproj.CRS.from_user_input(asked or "EPSG:32615")
    assert head.startswith(f"# {asked or 'EPSG:32615'};")
    assert names == "#label,x,y,z,omega,phi,kappa"
    storage = cv2.FileStorage(str(folder / "camera-1.xml"), cv2.FILE_STORAGE_READ)
    matrix = storage.getNode("Camera_Matrix").mat()
    distortion = storage.getNode("Distortion_Coefficients").mat()
    unit_m = crs.axis_info[0].unit_conversion_factor
    to_crs = pyproj.Transformer.from_crs("EPSG:4979", crs, always_xy=True)
    images = {flat(image.name): image for image in truth.images.values()}
    assert {line.split(",")[0] for line in lines} == set(images)
    for line in lines:
        label, *cells = line.split(",")
        x, y, z, *angles = map(float, cells)
        image = images[label]
        assert size_of(folder / "images" / label) == (320, 240)
        points = list(image.get_observation_points2D())
        xyz = np.array([truth.point3D(p.point3D_id).xyz for p in points])
        places = np.stack(to_crs.transform(*globe_of(DULUTH, xyz).T), axis=1)
        offsets = (places - [x, y, z]) * [unit_m, unit_m, 1.0]
        flat_m = np.linalg.norm((xyz - image.projection_center())[:, :2], axis=1).sum()
        grid_scale = np.linalg.norm(offsets[:, :2], axis=1).sum() / flat_m
        assert 0.999 < grid_scale < 1.003
        offsets[:, :2] /= grid_scale
        in_cam = offsets @ rotation_of(*angles) @ np.diag([1.0, -1.0, -1.0])
        seen, _ = cv2.projectPoints(in_cam, np.zeros(3), np.zeros(3), matrix, distortion)
        keypoints = np.array([p.xy for p in points])
        assert np.abs(seen[:, 0] + 0.5 - keypoints).max() < 0.1


@pytest.mark.parametrize("longitude_deg", [-91.9942, 179.9])
@pytest.mark.parametrize("asked", ["EPSG:4326", None])
def test_metashape_cameras_lie_where_they_are_to_a_millimetre(
    tmp_path: Path, longitude_deg: float, asked: str | None
) -> None:
    origin = Origin(latitude_deg=-17.8, longitude_deg=longitude_deg, altitude_m=20.0)
    truth = make_placed_run(tmp_path / "run", origin=origin)
    done = export(tmp_path / "run", tmp_path / "out", formats=[ExportFormat.METASHAPE], crs=asked)
    head, _, *lines = (done.path / "metashape" / "cameras.csv").read_text().splitlines()
    to_globe = pyproj.Transformer.from_crs(head[2:].partition(";")[0], "EPSG:4979", always_xy=True)
    centers = {flat(one.name): one.projection_center() for one in truth.images.values()}
    for line in lines:
        label, x, y, z, *_ = line.split(",")
        [found] = enu_of(origin, np.array([to_globe.transform(float(x), float(y), float(z))]))
        np.testing.assert_allclose(found, centers[label], rtol=0, atol=0.001)


def globe_of(origin: Origin, places: Float64Array) -> Float64Array:
    """Longitude, latitude and altitude (P, 3) of places east, north, up of an origin."""
    pipeline = pyproj.Transformer.from_pipeline(
        "+proj=pipeline +step +inv +proj=topocentric +ellps=WGS84"
        f" +lon_0={origin.longitude_deg} +lat_0={origin.latitude_deg} +h_0={origin.altitude_m}"
        " +step +inv +proj=cart +ellps=WGS84 +step +proj=unitconvert +xy_in=rad +xy_out=deg"
    )
    return np.stack(pipeline.transform(*places.T), axis=1)


@pytest.mark.parametrize("model", ["FOV", "OPENCV_FISHEYE", "EQUIRECTANGULAR"])
def test_a_camera_without_such_a_calibration_is_refused(tmp_path: Path, model: str) -> None:
    make_placed_run(tmp_path / "run", models=("SIMPLE_RADIAL", model))
    with pytest.raises(ConfigError, match=f"--metashape: .* camera 2, {model}"):
        export(tmp_path / "run", tmp_path / "out", formats=[ExportFormat.METASHAPE])
    assert not (tmp_path / "out").exists()


# -- images ----------------------------------------------------------------------------------------


def test_a_missing_image_is_an_error_for_what_hands_images_over(tmp_path: Path) -> None:
    make_placed_run(tmp_path / "run")
    (tmp_path / "run" / "images" / "left" / "000002.png").unlink()
    for kind in (ExportFormat.ODM, ExportFormat.BUNDLER):
        with pytest.raises(SnapshotError, match=r"1 of 6 images .* left/000002\.png"):
            export(tmp_path / "run", tmp_path / "out", formats=[kind])
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
