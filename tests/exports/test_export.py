from __future__ import annotations

import csv
import errno
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pycolmap
import pytest

import adapters.exports.dense as dense_module
from adapters.exports.export import ExportFormat, export
from adapters.exports.job import Progress
from engine.dense_types import DensePoints, KeyframePoses
from engine.errors import ConfigError, SnapshotError
from engine.geometry import pose_in_other_world, rotation_from_quat_xyzw
from engine.output.dense_ply import camera_comments, write_dense_ply
from engine.types import Float64Array, Uint8Array
from tests.support.placed_runs import make_placed_run

WIDTH, HEIGHT = 320, 240
# Formats of any map, whatever its cameras and its place.
FORMATS = [
    ExportFormat.UNDISTORT,
    ExportFormat.PLY,
    ExportFormat.NERFSTUDIO,
    ExportFormat.TUM,
    ExportFormat.DENSE,
]
NERFSTUDIO_KEYS = {"fl_x", "fl_y", "cx", "cy", "w", "h", "k1", "k2", "p1", "p2"}


def make_model(
    *, model: str = "SIMPLE_RADIAL", k: float = 0.08, height: int = HEIGHT
) -> pycolmap.Reconstruction:
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs = 1
    options.num_frames_per_rig = 4
    options.num_points3D = 40
    options.num_points2D_without_point3D = 3
    options.camera_width, options.camera_height = WIDTH, height
    options.camera_model_id = getattr(pycolmap.CameraModelId, model)
    centre = [WIDTH / 2 + 3, HEIGHT / 2 - 2]
    options.camera_params = {
        "SIMPLE_RADIAL": [300.0, *centre, k],
        "PINHOLE": [300.0, 310.0, *centre],
        "OPENCV": [300.0, 310.0, *centre, 0.05, -0.01, 0.002, -0.003],
        "FOV": [300.0, 310.0, *centre, 0.4],
        "SIMPLE_FISHEYE": [300.0, *centre],
        "SIMPLE_RADIAL_FISHEYE": [300.0, *centre, 0.01],
        "OPENCV_FISHEYE": [300.0, 310.0, *centre, 0.05, -0.01, 0.002, -0.003],
        "EQUIRECTANGULAR": [float(WIDTH), float(height)],
    }[model]
    return pycolmap.synthesize_dataset(options)


def dotted_image(image: pycolmap.Image) -> Uint8Array:
    """A black image with a soft white dot at every keypoint that has a point."""
    columns, rows = np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5
    canvas = np.zeros((HEIGHT, WIDTH))
    for point2D in image.get_observation_points2D():
        along_x, along_y = (
            np.exp(-((at - center) ** 2) / (2 * 1.5**2))
            for at, center in zip((columns, rows), point2D.xy, strict=True)
        )
        canvas += 250 * np.outer(along_y, along_x)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def make_run(run: Path, model: pycolmap.Reconstruction) -> Path:
    """A run folder as the engine leaves it, frames one second apart from 100 s."""
    sparse = run / "snapshots" / "000001" / "sparse" / "0"
    sparse.mkdir(parents=True)
    rows = ["frame_id,source,index,name,captured_at_s,status"]
    for number, image in enumerate(sorted(model.images.values(), key=lambda im: im.image_id)):
        image.name = f"left/{number:06d}.png"
        path = run / "images" / image.name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), dotted_image(image))
        rows.append(f"{image.image_id},folder,{number},{image.name},{100 + number}.5,keyframe")
    model.write_binary(sparse)
    (run / "latest").symlink_to("snapshots/000001")
    (run / "frames.csv").write_text("\n".join(rows) + "\n")
    (run / "trajectory.txt").write_text("# all\n100.5 0 0 0 0 0 0 1\n")
    (run / "products").mkdir()
    write_dense(run, model, np.eye(4)[:3])
    return run


def dense_xyz() -> Float64Array:
    return np.random.default_rng(5).normal(size=(7, 3))


def write_dense(run: Path, model: pycolmap.Reconstruction, world_from_model: Float64Array) -> None:
    """The dense points of a run whose world is apart from that of its cameras."""
    images = [model.image(i) for i in model.reg_image_ids()]
    cam_from_model = np.array([image.cam_from_world().matrix() for image in images])
    poses = KeyframePoses(
        frame_ids=np.array([image.image_id for image in images]),
        cam_from_world=pose_in_other_world(cam_from_model, world_from_model),
        focal_px=np.ones(len(images)),
        border_rays=np.full((len(images), 8, 3), np.nan),
    )
    xyz = dense_xyz() @ world_from_model[:, :3].T + world_from_model[:, 3]
    normal = world_from_model[:, :3] @ [0.0, 1.0, 0.0]
    points = DensePoints(
        xyz=xyz.astype(np.float32),
        colors=np.zeros(xyz.shape, np.uint8),
        normals=np.tile(normal / np.linalg.norm(normal), (len(xyz), 1)).astype(np.float32),
        sampling=np.ones(len(xyz), np.float32),
        num_views=np.full(len(xyz), 2, np.uint8),
    )
    comments = ["frame: map units", *camera_comments(poses)]
    write_dense_ply(run / "products" / "dense.ply", [points], comments=comments)


def read_dense(path: Path) -> tuple[Float64Array, Float64Array]:
    """Points and normals (N, 3)."""
    _, _, body = path.read_bytes().partition(b"end_header\n")
    layout = np.dtype([("xyz", "<f4", 3), ("normal", "<f4", 3), ("rgb", "u1", 3)])
    read = np.frombuffer(body, layout)
    return read["xyz"].astype(np.float64), read["normal"].astype(np.float64)


@pytest.fixture(scope="module")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests only copy it."""
    return make_run(tmp_path_factory.mktemp("made") / "run", make_model())


@pytest.fixture
def run(tmp_path: Path, made_run: Path) -> Path:
    return shutil.copytree(made_run, tmp_path / "run", symlinks=True)


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def read_ply(path: Path) -> Float64Array:
    """Points (N, 3) of a binary PLY with float coordinates and byte colours."""
    header, _, body = path.read_bytes().partition(b"end_header\n")
    assert b"format binary_little_endian 1.0" in header
    layout = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)])
    return np.array(np.frombuffer(body, layout)["xyz"], dtype=np.float64)


def project_as_nerfstudio(frame: dict[str, object], points: Float64Array) -> Float64Array:
    """Pixels (N, 2) of points by the convention of transforms.json: y up, looking along -z."""
    value = {name: float(str(frame[name])) for name in NERFSTUDIO_KEYS}
    world_from_cam = np.array(frame["transform_matrix"])
    in_cam = (np.column_stack([points, np.ones(len(points))]) @ np.linalg.inv(world_from_cam).T).T
    x, y = in_cam[0] / -in_cam[2], -in_cam[1] / -in_cam[2]
    assert (in_cam[2] < 0).all()
    r2 = x**2 + y**2
    radial = 1 + value["k1"] * r2 + value["k2"] * r2**2
    p1, p2 = value["p1"], value["p2"]
    x_bent = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x**2)
    y_bent = y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y**2)
    return np.column_stack(
        [value["fl_x"] * x_bent + value["cx"], value["fl_y"] * y_bent + value["cy"]]
    )


def brightest_near(picture: Uint8Array, at: Float64Array) -> Float64Array:
    """The centre of the light within 6 px of a pixel position."""
    rows, columns = np.mgrid[0 : picture.shape[0], 0 : picture.shape[1]] + 0.5
    near = np.hypot(columns - at[0], rows - at[1]) < 6
    weight = np.where(near, picture.astype(np.float64), 0)
    moments = np.array([(columns * weight).sum(), (rows * weight).sum()])
    return np.asarray(moments / weight.sum())


def test_undistorted_images_and_model_lie_as_trainers_read_them(run: Path, tmp_path: Path) -> None:
    done = export(run, tmp_path / "out", formats=[ExportFormat.UNDISTORT])
    model_files = {f"sparse/0/{name}.bin" for name in ("cameras", "images", "points3D")}
    extra_files = {f"sparse/0/{name}.bin" for name in ("rigs", "frames")}
    image_files = {f"images/left-{number:06d}.png" for number in range(4)}
    tables = {"image_names.csv", "sparse/0/points3D.ply"}
    assert entries(done.path) == model_files | extra_files | image_files | tables
    assert (done.num_images, done.num_points3D) == (4, 40)
    model = pycolmap.Reconstruction(done.path / "sparse" / "0")
    assert model.is_valid()
    assert {camera.model_name for camera in model.cameras.values()} == {"PINHOLE"}


def test_undistorted_pixels_lie_where_the_pinhole_model_says(run: Path, tmp_path: Path) -> None:
    original = pycolmap.Reconstruction(run / "latest" / "sparse" / "0")
    done = export(run, tmp_path / "out", formats=[ExportFormat.UNDISTORT])
    model = pycolmap.Reconstruction(done.path / "sparse" / "0")
    num_checked, moved_px = 0, []
    for image in model.images.values():
        picture = cv2.imread(str(done.path / "images" / image.name), cv2.IMREAD_GRAYSCALE)
        assert picture is not None
        assert picture.shape == (image.camera.height, image.camera.width)
        projected = {
            point.point3D_id: image.project_point(model.point3D(point.point3D_id).xyz)
            for point in image.get_observation_points2D()
        }
        for point3D_id, xy in projected.items():
            alone = all(
                np.hypot(*(xy - other)) > 14
                for key, other in projected.items()
                if key != point3D_id
            )
            inside = (xy > 8).all() and (xy < np.array(picture.shape[::-1]) - 8).all()
            if not (alone and inside):
                continue
            num_checked += 1
            assert np.hypot(*(brightest_near(np.asarray(picture, np.uint8), xy) - xy)) < 0.25
            before = original.image(image.image_id).project_point(original.point3D(point3D_id).xyz)
            moved_px.append(np.hypot(*(before - xy)))
    assert num_checked >= 10
    assert max(moved_px) > 1  # the distortion was worth removing


@pytest.mark.parametrize("model", ["SIMPLE_RADIAL", "PINHOLE", "OPENCV"])
def test_transforms_json_projects_points_onto_their_keypoints(tmp_path: Path, model: str) -> None:
    run = make_run(tmp_path / "run", make_model(model=model))
    done = export(run, tmp_path / "out", formats=[ExportFormat.NERFSTUDIO])
    record = json.loads((done.path / "transforms.json").read_text())
    truth = pycolmap.Reconstruction(run / "latest" / "sparse" / "0")
    points = read_ply(done.path / record["ply_file_path"])
    point3D_ids = list(truth.points3D)
    xyz = np.array([truth.point3D(point3D_id).xyz for point3D_id in point3D_ids])
    assert len(record["frames"]) == 4
    for frame in record["frames"]:
        assert (done.path / frame["file_path"]).is_file()
        assert (frame["w"], frame["h"]) == (WIDTH, HEIGHT)
        image = truth.image(frame["colmap_im_id"])
        assert frame["file_path"] == f"images/{image.name.replace('/', '-')}"
        projected = project_as_nerfstudio(frame, points)
        for observed in image.get_observation_points2D():
            target = truth.point3D(observed.point3D_id).xyz
            nearest = int(np.linalg.norm(points - target, axis=1).argmin())
            np.testing.assert_allclose(projected[nearest], observed.xy, atol=2e-3)
    assert len(points) == len(xyz)


def test_the_applied_transform_maps_the_world_of_the_map_to_that_of_the_frames(
    run: Path, tmp_path: Path
) -> None:
    done = export(run, tmp_path / "out", formats=[ExportFormat.NERFSTUDIO])
    record = json.loads((done.path / "transforms.json").read_text())
    truth = pycolmap.Reconstruction(run / "latest" / "sparse" / "0")
    applied = np.array(record["applied_transform"])
    assert applied.shape == (3, 4)
    for frame in record["frames"]:
        center = truth.image(frame["colmap_im_id"]).projection_center()
        in_frames_world = applied @ np.append(center, 1)
        position = np.array(frame["transform_matrix"])[:3, 3]
        np.testing.assert_allclose(in_frames_world, position, atol=1e-9)


def test_transforms_json_follows_the_undistorted_images(run: Path, tmp_path: Path) -> None:
    formats = [ExportFormat.UNDISTORT, ExportFormat.NERFSTUDIO]
    done = export(run, tmp_path / "out", formats=formats)
    model = pycolmap.Reconstruction(done.path / "sparse" / "0")
    for frame in json.loads((done.path / "transforms.json").read_text())["frames"]:
        image = model.image(frame["colmap_im_id"])
        assert frame["k1"] == frame["k2"] == frame["p1"] == frame["p2"] == 0
        params = model.camera(image.camera_id).params.tolist()
        assert [frame["fl_x"], frame["fl_y"], frame["cx"], frame["cy"]] == params
        picture = cv2.imread(str(done.path / frame["file_path"]))
        assert picture is not None
        assert picture.shape[:2] == (frame["h"], frame["w"])


def test_a_camera_nerfstudio_does_not_know_is_refused_unless_undistorted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_model(model="FOV"))
    copied: list[Progress] = []
    with pytest.raises(ConfigError, match="FOV"):
        export(run, tmp_path / "out", formats=[ExportFormat.NERFSTUDIO], progress=copied.append)
    assert not copied
    assert not (tmp_path / "out").exists()
    formats = [ExportFormat.NERFSTUDIO, ExportFormat.UNDISTORT]
    assert export(run, tmp_path / "out", formats=formats).num_images == 4


@pytest.mark.parametrize("model", ["SIMPLE_FISHEYE", "SIMPLE_RADIAL_FISHEYE", "OPENCV_FISHEYE"])
def test_a_fisheye_becomes_a_pinhole_with_its_points_where_they_belong(
    tmp_path: Path, model: str
) -> None:
    run = make_run(tmp_path / "run", make_model(model=model))
    done = export(run, tmp_path / "out", formats=[ExportFormat.UNDISTORT])
    undistorted = pycolmap.Reconstruction(done.path / "sparse" / "0")
    assert {camera.model_name for camera in undistorted.cameras.values()} == {"PINHOLE"}
    assert not (done.path / "distorted").exists()
    for image in undistorted.images.values():
        for point in image.get_observation_points2D():
            projected = image.project_point(undistorted.point3D(point.point3D_id).xyz)
            assert projected == pytest.approx(point.xy, abs=0.01)


@pytest.mark.parametrize("model", ["SIMPLE_FISHEYE", "SIMPLE_RADIAL_FISHEYE", "OPENCV_FISHEYE"])
def test_transforms_json_has_fisheyes_as_they_are(tmp_path: Path, model: str) -> None:
    truth = make_model(model=model)
    run = make_run(tmp_path / "run", truth)
    done = export(run, tmp_path / "out", formats=[ExportFormat.NERFSTUDIO])
    record = json.loads((done.path / "transforms.json").read_text())
    assert record["camera_model"] == "OPENCV_FISHEYE"
    for frame in record["frames"]:
        world_from_cam = np.array(frame["transform_matrix"])
        for point in truth.image(frame["colmap_im_id"]).get_observation_points2D():
            xyz = truth.point3D(point.point3D_id).xyz
            x, y, z = (np.linalg.inv(world_from_cam) @ [*xyz, 1.0])[:3] * (1, -1, -1)
            angle, height = np.arctan2(np.hypot(x, y), z), np.hypot(x, y)
            powers = [frame[f"k{i}"] * angle ** (2 * i) for i in (1, 2, 3, 4)]
            bent = angle * (1 + sum(powers)) / height
            expected = (
                frame["fl_x"] * x * bent + frame["cx"],
                frame["fl_y"] * y * bent + frame["cy"],
            )
            assert expected == pytest.approx(tuple(point.xy), abs=0.01)


def test_spherical_images_go_to_nerfstudio_as_they_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_model(model="EQUIRECTANGULAR"))
    done = export(run, tmp_path / "out", formats=[ExportFormat.NERFSTUDIO])
    record = json.loads((done.path / "transforms.json").read_text())
    assert record["camera_model"] == "EQUIRECTANGULAR"
    assert {(frame["w"], frame["h"]) for frame in record["frames"]} == {(WIDTH, HEIGHT)}


def colored_sphere(cam_from_world: Float64Array) -> Uint8Array:
    """What a spherical image sees at infinity: the colour of a direction is the direction."""
    longitude = ((np.arange(WIDTH) + 0.5) / WIDTH - 0.5) * 2 * np.pi
    latitude = (0.5 - (np.arange(WIDTH // 2) + 0.5) / (WIDTH // 2)) * np.pi
    longitude, latitude = np.meshgrid(longitude, latitude)
    rays = np.stack(
        [np.cos(latitude) * np.sin(longitude), -np.sin(latitude)]
        + [np.cos(latitude) * np.cos(longitude)],
        axis=-1,
    )
    return np.asarray(np.round(127.5 + 127.5 * rays @ cam_from_world[:, :3]).astype(np.uint8))


def test_a_spherical_image_becomes_six_pinhole_views_of_the_same_world(tmp_path: Path) -> None:
    truth = make_model(model="EQUIRECTANGULAR", height=WIDTH // 2)
    run = make_run(tmp_path / "run", truth)
    for image in truth.images.values():
        pixels = colored_sphere(np.asarray(image.cam_from_world().matrix()))
        cv2.imwrite(str(run / "images" / image.name), pixels)
    (run / "masks" / "left").mkdir(parents=True)
    upper = np.zeros((WIDTH // 2, WIDTH), np.uint8)
    upper[: WIDTH // 4] = 255
    first = min(truth.images.values(), key=lambda image: image.image_id)
    cv2.imwrite(str(run / "masks" / f"{first.name}.png"), upper)
    formats = [ExportFormat.UNDISTORT, ExportFormat.NERFSTUDIO, ExportFormat.TUM]
    done = export(run, tmp_path / "out", formats=formats)

    assert done.num_images == 6 * 4
    assert {path.name for path in done.path.iterdir() if path.is_dir()} == {
        *("images", "masks", "sparse")
    }
    views = pycolmap.Reconstruction(done.path / "sparse" / "0")
    assert {camera.model_name for camera in views.cameras.values()} == {"PINHOLE"}
    assert views.compute_num_observations() == truth.compute_num_observations()
    for image in views.images.values():
        for point in image.get_observation_points2D():
            projected = image.project_point(views.point3D(point.point3D_id).xyz)
            assert projected == pytest.approx(point.xy, abs=1e-3)
        picture = cv2.imread(str(done.path / "images" / image.name))
        assert picture is not None
        rows, columns = np.mgrid[0 : picture.shape[0], 0 : picture.shape[1]] + 0.5
        places_xy = np.column_stack([columns.ravel(), rows.ravel()])
        rays = np.asarray(image.camera.cam_ray_from_img(places_xy))
        world = rays @ np.asarray(image.cam_from_world().matrix())[:, :3]
        assert np.abs(picture.reshape(-1, 3) - (127.5 + 127.5 * world)).max() < 6.0
    share = {}
    for view in ("up", "down", "front", "back"):
        path = done.path / "masks" / f"left-{Path(first.name).stem}_{view}.png.png"
        mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        assert mask is not None
        share[view] = float(mask.mean()) / 255.0
    assert share["up"] == 1.0
    assert share["down"] == 0.0
    assert share["front"] == share["back"] == pytest.approx(0.5, abs=0.03)
    assert len((done.path / "trajectory_keyframes.txt").read_text().splitlines()) == 1 + 4
    assert json.loads((done.path / "transforms.json").read_text())["camera_model"] == "OPENCV"


def rename_image(run: Path, name: str, to: str) -> None:
    sparse = run / "latest" / "sparse" / "0"
    model = pycolmap.Reconstruction(sparse)
    image = model.find_image_with_name(name)
    assert image is not None
    image.name = to
    model.write_binary(sparse)
    (run / "images" / to).parent.mkdir(parents=True, exist_ok=True)
    (run / "images" / name).rename(run / "images" / to)


def test_views_of_spherical_images_are_named_in_the_table_and_never_as_other_images(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    make_placed_run(run, models=["EQUIRECTANGULAR", "PINHOLE"], num_images=4)
    by_camera: dict[int, list[str]] = {}
    for image in pycolmap.Reconstruction(run / "latest" / "sparse" / "0").images.values():
        by_camera.setdefault(image.camera_id, []).append(image.name)
    sphere, other = Path(min(by_camera[1])), min(by_camera[2])
    renamed = str(sphere.with_name(f"{sphere.stem}_front{sphere.suffix}"))
    rename_image(run, other, renamed)
    done = export(run, tmp_path / "out", formats=[ExportFormat.UNDISTORT])
    with (done.path / "image_names.csv").open() as file:
        rows = list(csv.DictReader(file))
    files = {path.name for path in (done.path / "images").iterdir()}
    assert len(rows) == len(files) == done.num_images == 2 * 6 + 2
    assert {row["image"] for row in rows} == files
    assert [row["frame"] for row in rows].count(str(sphere)) == 6
    assert [row["frame"] for row in rows].count(renamed) == 1


def test_points_are_written_as_ply(run: Path, tmp_path: Path) -> None:
    done = export(run, tmp_path / "out", formats=[ExportFormat.PLY])
    assert entries(done.path) == {"points.ply"}
    truth = pycolmap.Reconstruction(run / "latest" / "sparse" / "0")
    points = read_ply(done.path / "points.ply")
    expected = np.array([point.xyz for point in truth.points3D.values()])
    gaps = np.linalg.norm(points[:, None] - expected, axis=2)
    assert len(points) == len(expected)
    assert gaps.min(axis=0).max() < 1e-5
    assert gaps.min(axis=1).max() < 1e-5


def test_dense_points_are_what_trainers_begin_with(run: Path, tmp_path: Path) -> None:
    alone = export(run, tmp_path / "alone", formats=[ExportFormat.DENSE])
    assert entries(alone.path) == {"dense.ply"}
    formats = [ExportFormat.DENSE, ExportFormat.UNDISTORT]
    trained = export(run, tmp_path / "trained", formats=formats)
    xyz, normals = read_dense(trained.path / "sparse" / "0" / "points3D.ply")
    np.testing.assert_allclose(xyz, dense_xyz(), atol=1e-5)
    np.testing.assert_allclose(normals, np.tile([0.0, 1.0, 0.0], (len(xyz), 1)), atol=1e-6)
    assert not (trained.path / "dense.ply").exists()


def test_dense_points_of_a_former_world_are_laid_beside_the_latest_cameras(
    run: Path, tmp_path: Path
) -> None:
    turn = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    former_from_latest = np.column_stack([0.1 * turn, [5.0, -3.0, 2.0]])
    model = pycolmap.Reconstruction(run / "latest" / "sparse" / "0")
    write_dense(run, model, former_from_latest)
    done = export(run, tmp_path / "out", formats=[ExportFormat.DENSE])
    xyz, normals = read_dense(done.path / "dense.ply")
    np.testing.assert_allclose(xyz, dense_xyz(), atol=1e-4)
    np.testing.assert_allclose(normals, np.tile([0.0, 1.0, 0.0], (len(xyz), 1)), atol=1e-5)
    assert b"comment frame: map units" not in (done.path / "dense.ply").read_bytes()


@pytest.mark.parametrize("has_cameras", [True, False])
def test_dense_points_of_another_map_or_of_no_known_world_are_refused(
    run: Path, tmp_path: Path, *, has_cameras: bool
) -> None:
    poses = np.random.default_rng(0).normal(size=(4, 3, 4))
    poses[:, :, :3] = np.eye(3)
    other = KeyframePoses(
        frame_ids=np.arange(1, 5),
        cam_from_world=poses,
        focal_px=np.full(4, 100.0),
        border_rays=np.full((4, 8, 3), np.nan),
    )
    comments = camera_comments(other) if has_cameras else []
    write_dense_ply(run / "products" / "dense.ply", [], comments=comments)
    with pytest.raises(ConfigError, match="another map" if has_cameras else "does not say"):
        export(run, tmp_path / "out", formats=[ExportFormat.DENSE, ExportFormat.UNDISTORT])
    assert not (tmp_path / "out").exists()


def test_a_run_without_dense_points_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "products" / "dense.ply").unlink()
    with pytest.raises(ConfigError, match=r"dense\.enabled"):
        export(run, tmp_path / "out", formats=[ExportFormat.DENSE])
    assert not (tmp_path / "out").exists()


def test_tum_has_all_frames_and_the_keyframes_at_their_capture_times(
    run: Path, tmp_path: Path
) -> None:
    done = export(run, tmp_path / "out", formats=[ExportFormat.TUM])
    assert (done.path / "trajectory.txt").read_text() == (run / "trajectory.txt").read_text()
    lines = (done.path / "trajectory_keyframes.txt").read_text().splitlines()
    rows = np.array([[float(word) for word in line.split()] for line in lines[1:]])
    np.testing.assert_array_equal(rows[:, 0], [100.5, 101.5, 102.5, 103.5])
    truth = pycolmap.Reconstruction(run / "latest" / "sparse" / "0")
    for row in rows:
        image = truth.find_image_with_name(f"left/{int(row[0] - 100):06d}.png")
        np.testing.assert_allclose(row[1:4], image.projection_center(), atol=1e-9)
        cam_from_world = rotation_from_quat_xyzw(row[4:]).T
        np.testing.assert_allclose(
            cam_from_world, image.cam_from_world().matrix()[:, :3], atol=1e-9
        )


def test_a_crashed_run_without_trajectory_still_has_its_keyframes(
    run: Path, tmp_path: Path
) -> None:
    (run / "trajectory.txt").unlink()
    done = export(run, tmp_path / "out", formats=[ExportFormat.TUM])
    assert entries(done.path) == {"trajectory_keyframes.txt"}


def test_another_map_is_written_when_asked_for_and_named_when_left_out(
    run: Path, tmp_path: Path
) -> None:
    other = run / "latest" / "sparse" / "1"
    other.mkdir()
    smaller = pycolmap.Reconstruction(run / "latest" / "sparse" / "0")
    left_out = min(smaller.images.values(), key=lambda image: image.name)
    smaller.deregister_frame(left_out.frame_id)
    smaller.write_binary(other)
    (run / "trajectory_1.txt").write_text("# other\n101.5 0 0 0 0 0 0 1\n")

    done = export(run, tmp_path / "all", formats=[ExportFormat.TUM])
    assert (done.num_images, done.left_out) == (4, {1: 3})
    assert (done.path / "trajectory.txt").read_text() == (run / "trajectory.txt").read_text()

    formats = [ExportFormat.TUM, ExportFormat.UNDISTORT]
    done = export(run, tmp_path / "other", formats=formats, map_number=1)
    assert (done.num_images, done.left_out) == (3, {0: 4})
    assert (done.path / "trajectory.txt").read_text() == (run / "trajectory_1.txt").read_text()
    lines = (done.path / "trajectory_keyframes.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["101.5", "102.5", "103.5"]
    assert left_out.name not in {path.removeprefix("images/") for path in entries(done.path)}

    with pytest.raises(ConfigError, match="has no map 2, only 0 to 1"):
        export(run, tmp_path / "none", formats=formats, map_number=2)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("has_record", [True, False])
def test_another_map_that_is_damaged_costs_no_export(
    run: Path, tmp_path: Path, has_record: bool
) -> None:
    (run / "latest" / "sparse" / "1").mkdir()
    (run / "latest" / "sparse" / "1" / "images.bin").write_bytes(b"junk")
    if has_record:
        models = [{"is_georeferenced": False, "num_registered": number} for number in (4, 3)]
        (run / "latest" / "snapshot.json").write_text(json.dumps({"models": models}))
    done = export(run, tmp_path / "out", formats=[ExportFormat.PLY])
    assert done.left_out == ({1: 3} if has_record else {})
    assert has_record or any("not a whole COLMAP model" in note for note in done.notes)


def test_a_target_that_holds_something_is_refused_and_left_alone(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export(run, target, formats=FORMATS)
    assert entries(target) == {"mine.txt"}


def test_an_empty_target_is_filled(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert export(run, tmp_path / "out", formats=FORMATS).num_images == 4
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_a_run_without_a_snapshot_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "latest").unlink()
    with pytest.raises(ConfigError, match="no snapshot"):
        export(run, tmp_path / "out", formats=[ExportFormat.PLY])


def test_an_export_of_nothing_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one format"):
        export(run, tmp_path / "out", formats=[])


@pytest.mark.parametrize("format_", [ExportFormat.UNDISTORT, ExportFormat.NERFSTUDIO])
def test_a_missing_image_is_an_error_and_leaves_nothing(
    run: Path, tmp_path: Path, format_: ExportFormat
) -> None:
    (run / "images" / "left" / "000002.png").unlink()
    with pytest.raises(SnapshotError, match=r"1 of 4 images .* left/000002\.png"):
        export(run, tmp_path / "out", formats=[format_])
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_what_fails_leaves_no_folders_that_it_made(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (run / "images" / "left" / "000002.png").unlink()
    with pytest.raises(SnapshotError):
        export(run, tmp_path / "mine" / "a" / "b" / "out", formats=[ExportFormat.UNDISTORT])
    assert list((tmp_path / "mine").iterdir()) == []


def test_an_error_of_reading_names_the_file_of_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: Path, target: Path) -> None:
        raise OSError(errno.EIO, "broken", str(source))

    monkeypatch.setattr(shutil, "copyfile", refused)
    with pytest.raises(SnapshotError, match=r"trajectory\.txt: cannot be read: broken"):
        export(run, tmp_path / "out", formats=[ExportFormat.TUM])


def test_dense_points_that_cannot_be_read_are_an_error_in_a_sentence(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> None:
        raise OSError(errno.EIO, "broken", str(path))

    monkeypatch.setattr(dense_module, "read_dense_ply_header", refused)
    with pytest.raises(ConfigError, match=r"dense\.ply: cannot be read: broken"):
        export(run, tmp_path / "out", formats=[ExportFormat.DENSE])


def test_an_unreadable_image_is_an_error_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    (run / "images" / "left" / "000002.png").write_bytes(b"no image")
    with pytest.raises(SnapshotError, match=r"the image left/000002\.png cannot be read"):
        export(run, tmp_path / "out", formats=[ExportFormat.UNDISTORT])
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_what_is_beside_an_image_shows_nowhere_in_the_undistorted_one(
    run: Path, tmp_path: Path
) -> None:
    for path in (run / "images" / "left").iterdir():
        cv2.imwrite(str(path), np.full((HEIGHT, WIDTH, 3), 200, np.uint8))
    done = export(run, tmp_path / "out", formats=[ExportFormat.UNDISTORT])
    for path in (done.path / "images").iterdir():
        picture = cv2.imread(str(path))
        assert picture is not None and (picture == 200).all()


@pytest.mark.parametrize("format_", [ExportFormat.UNDISTORT, ExportFormat.NERFSTUDIO])
def test_an_image_that_is_cut_short_is_an_error_and_no_grey(
    tmp_path: Path, format_: ExportFormat
) -> None:
    run = tmp_path / "run"
    make_placed_run(run, suffix=".jpg")
    path = min((run / "images").rglob("*.jpg"))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(SnapshotError, match=f"{path.name} is cut short"):
        export(run, tmp_path / "out", formats=[format_])
    assert not (tmp_path / "out").exists()


def test_a_damaged_model_is_an_error(run: Path, tmp_path: Path) -> None:
    images = run / "latest" / "sparse" / "0" / "images.bin"
    images.write_bytes(images.read_bytes()[:500])
    with pytest.raises(SnapshotError, match="not a whole COLMAP model"):
        export(run, tmp_path / "out", formats=[ExportFormat.PLY])


def test_a_run_that_was_moved_exports_all_the_same(run: Path, tmp_path: Path) -> None:
    moved = Path(shutil.move(run, tmp_path / "elsewhere"))
    assert export(moved, tmp_path / "out", formats=[ExportFormat.UNDISTORT]).num_images == 4


# -- models of strangers --------------------------------------------------------------------------


def rename_first_image(run: Path, name: str) -> None:
    """Gives the first image of a model another name, by rewriting the file."""
    images = run / "latest" / "sparse" / "0" / "images.bin"
    data = images.read_bytes()
    assert data.count(b"left/000000.png\0") == 1
    images.write_bytes(data.replace(b"left/000000.png\0", name.encode() + b"\0"))


@pytest.mark.parametrize("format_", list(ExportFormat))
@pytest.mark.parametrize(
    "name",
    [
        "../../escaped.png",
        "left/../../escaped.png",
        "{absolute}/images/left/000000.png",
        "..\\..\\escaped.png",
        "left//000000.png",
        "./left/000000.png",
        "left/",
        ".",
        "..",
        "",
        "left/\x1b[2J.png",
        "left/000001.png",
    ],
)
def test_a_name_that_leads_elsewhere_is_refused_and_nothing_is_written(
    run: Path, tmp_path: Path, format_: ExportFormat, name: str
) -> None:
    shutil.copy(run / "images" / "left" / "000000.png", tmp_path / "escaped.png")
    rename_first_image(run, name.format(absolute=run))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SnapshotError, match="not a whole COLMAP model: images.bin: holds"):
        export(run, tmp_path / "a" / "b" / "out", formats=[format_])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_image_that_is_no_file_or_of_another_size_than_its_camera_is_refused(
    run: Path, tmp_path: Path
) -> None:
    image = run / "images" / "left" / "000001.png"
    image.unlink()
    image.symlink_to("/dev/zero")
    with pytest.raises(SnapshotError, match="images cannot be read"):
        export(run, tmp_path / "out", formats=[ExportFormat.UNDISTORT])
    image.unlink()
    bomb = bytearray((run / "images" / "left" / "000000.png").read_bytes())
    bomb[16:24] = (50_000).to_bytes(4, "big") * 2  # the size in a PNG's header
    image.write_bytes(bomb)
    with pytest.raises(SnapshotError, match="not of its camera's size, 320 x 240 px"):
        export(run, tmp_path / "out", formats=[ExportFormat.UNDISTORT])


def test_a_table_of_frames_without_its_columns_is_no_empty_trajectory(
    run: Path, tmp_path: Path
) -> None:
    (run / "frames.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="it has no column captured_at_s"):
        export(run, tmp_path / "out", formats=[ExportFormat.TUM])
    assert not (tmp_path / "out").exists()


# -- masks ----------------------------------------------------------------------------------------


def add_masks(run: Path, *, numbers: tuple[int, ...] = (0, 1, 2, 3)) -> Uint8Array:
    """Masks for some images: a disk beside the middle is left out."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    mask = np.where(np.hypot(columns - 40, rows - 60) < 35, 0, 255).astype(np.uint8)
    (run / "masks" / "left").mkdir(parents=True)
    for number in numbers:
        cv2.imwrite(str(run / "masks" / "left" / f"{number:06d}.png.png"), mask)
    return mask


def read_mask(folder: Path, number: int) -> Uint8Array:
    path = folder / "masks" / f"left-{number:06d}.png.png"
    mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert mask is not None and mask.ndim == 2
    return np.asarray(mask, np.uint8)


def test_masks_are_undistorted_with_their_images(run: Path, tmp_path: Path) -> None:
    mask = add_masks(run)
    done = export(run, tmp_path / "out", formats=[ExportFormat.UNDISTORT])
    distorted = pycolmap.Reconstruction(run / "latest" / "sparse" / "0").cameras
    for image in pycolmap.Reconstruction(done.path / "sparse" / "0").images.values():
        undistorted = read_mask(done.path, int(image.name[5:11]))
        camera = image.camera
        assert undistorted.shape == (camera.height, camera.width)
        y, x = np.mgrid[0 : camera.height, 0 : camera.width] + 0.5
        rays = camera.cam_from_img(np.column_stack([x.ravel(), y.ravel()]))
        original = distorted[image.camera_id]
        xy = original.img_from_cam(np.column_stack([rays, np.ones(len(rays))]))
        inside = ((xy >= 0.5) & (xy <= np.array([WIDTH, HEIGHT]) - 0.5)).all(axis=1)
        assert inside.mean() > 0.9
        columns, lines = xy[inside].astype(np.int64).T
        expected = mask[lines, columns]
        assert set(np.unique(undistorted)) == {0, 255}
        assert (undistorted.ravel()[inside] != expected).mean() < 1e-3
        assert (
            mask[: camera.height, : camera.width] != undistorted[:HEIGHT, :WIDTH]
        ).mean() > 0.005


def test_an_image_without_a_mask_gets_a_white_one_where_others_have_one(
    run: Path, tmp_path: Path
) -> None:
    add_masks(run, numbers=(1,))
    done = export(run, tmp_path / "out", formats=[ExportFormat.NERFSTUDIO])
    assert (read_mask(done.path, 0) == 255).all()
    assert read_mask(done.path, 0).shape == (HEIGHT, WIDTH)
    assert (read_mask(done.path, 1) == 0).any()


@pytest.mark.parametrize("formats", [["nerfstudio"], ["nerfstudio", "undistort"]])
def test_transforms_json_names_the_mask_of_every_frame(
    run: Path, tmp_path: Path, formats: list[str]
) -> None:
    add_masks(run)
    done = export(run, tmp_path / "out", formats=[ExportFormat(name) for name in formats])
    for frame in json.loads((done.path / "transforms.json").read_text())["frames"]:
        mask = cv2.imread(str(done.path / frame["mask_path"]), cv2.IMREAD_UNCHANGED)
        assert mask is not None and mask.shape == (frame["h"], frame["w"])
        assert Path(frame["mask_path"]).name == f"{Path(frame['file_path']).name}.png"


def test_without_masks_an_export_has_none(run: Path, tmp_path: Path) -> None:
    done = export(run, tmp_path / "out", formats=FORMATS)
    assert not (done.path / "masks").exists()
    assert "mask_path" not in (done.path / "transforms.json").read_text()


def test_a_damaged_mask_is_an_error_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    add_masks(run)
    (run / "masks" / "left" / "000002.png.png").write_bytes(b"nothing")
    with pytest.raises(SnapshotError, match="mask left-000002.png.png cannot be read"):
        export(run, tmp_path / "out", formats=[ExportFormat.UNDISTORT])
    assert not (tmp_path / "out").exists()
