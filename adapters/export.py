"""Export: copies of one of a run's latest maps in the formats of other tools.

All formats of one export share a folder:

    images/  sparse/0/*.bin     undistort: PINHOLE images and model, as splatting trainers read
                                them; of a fisheye the middle of the view, of a sphere six views
    transforms.json             nerfstudio: of the undistorted images, or of copies of the originals
    masks/                      where the run has masks: one for each image, white where it had none
    points.ply                  ply, nerfstudio
    dense.ply                   dense: the run's products/dense.ply in the world of the latest
                                snapshot; with undistort it is sparse/0/points3D.ply, which
                                trainers begin with, instead
    trajectory.txt              tum: frames in the map; trajectory_keyframes.txt: its keyframes
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters.dense_ply import read_dense_ply_header, similarity_onto, write_moved_dense_ply
from adapters.images.decoding import read_image_header
from adapters.perspective_views import has_spherical_images, split_spherical_images
from adapters.run_files import read_frame_rows, read_model
from engine.errors import ConfigError, SnapshotError
from engine.geometry import invert_pose, quat_xyzw_from_rotation
from engine.regular_files import read_regular_file
from engine.types import Float64Array, Int64Array, Uint8Array

if TYPE_CHECKING:
    import pycolmap

# Where nerfstudio's names stand in COLMAP's parameters of each model; the rest are zero.
_NERFSTUDIO_PARAMS = {
    "SIMPLE_PINHOLE": {"fl_x": 0, "fl_y": 0, "cx": 1, "cy": 2},
    "PINHOLE": {"fl_x": 0, "fl_y": 1, "cx": 2, "cy": 3},
    "SIMPLE_RADIAL": {"fl_x": 0, "fl_y": 0, "cx": 1, "cy": 2, "k1": 3},
    "RADIAL": {"fl_x": 0, "fl_y": 0, "cx": 1, "cy": 2, "k1": 3, "k2": 4},
    "OPENCV": {"fl_x": 0, "fl_y": 1, "cx": 2, "cy": 3, "k1": 4, "k2": 5, "p1": 6, "p2": 7},
    "SIMPLE_FISHEYE": {"fl_x": 0, "fl_y": 0, "cx": 1, "cy": 2},
    "FISHEYE": {"fl_x": 0, "fl_y": 1, "cx": 2, "cy": 3},
    "SIMPLE_RADIAL_FISHEYE": {"fl_x": 0, "fl_y": 0, "cx": 1, "cy": 2, "k1": 3},
    "RADIAL_FISHEYE": {"fl_x": 0, "fl_y": 0, "cx": 1, "cy": 2, "k1": 3, "k2": 4},
    "OPENCV_FISHEYE": {
        **{"fl_x": 0, "fl_y": 1, "cx": 2, "cy": 3},
        **{"k1": 4, "k2": 5, "k3": 6, "k4": 7},
    },
}
# COLMAP copies images of a model whose distortion is below 1e-8, fisheyes too.
_LEAST_DISTORTION = 1e-7
_OPENCV_FISHEYE_POSITIONS = {  # of fx, fy, cx, cy
    "SIMPLE_FISHEYE": (0, 0, 1, 2),
    "FISHEYE": (0, 1, 2, 3),
}
_OPENCV_FROM_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # camera axes: y up, z backward
_POINTS_NAME = "points.ply"
_DENSE_PLY = Path("products", "dense.ply")  # in a run
_TRAJECTORY_NAME = "trajectory.txt"
_VIEWS, _DISTORTED = "views", "distorted"  # folders that stand in an export while it is written
_MASKS = "masks"  # folder in a run and in an export; a mask has its image's name with .png added
_MAX_IMAGE_BYTES = 2**30
_WHITE = 255  # of a pixel that may be used


class ExportFormat(StrEnum):
    """A format of an export."""

    UNDISTORT = "undistort"
    PLY = "ply"
    NERFSTUDIO = "nerfstudio"
    TUM = "tum"
    DENSE = "dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Figures of a written export."""

    path: Path
    num_images: int
    num_points3D: int
    left_out: Mapping[int, int]  # keyframes of the snapshot's other maps, by their N of sparse/N


def export(
    run: Path, to: Path, *, formats: Collection[ExportFormat], map_number: int = 0
) -> Export:
    """Writes a map of a run's latest snapshot to a new folder.

    The folder appears whole or not at all.

    Args:
        run: a run folder.
        to: a folder that does not exist, or is empty.
        formats: at least one.
        map_number: N of the snapshot's sparse/N; 0 is the fullest map.

    Raises:
        ConfigError: the run has no snapshot, or no such map, the target holds something, a camera
            model does not fit the format, or dense points are of another map.
        SnapshotError: the files cannot be written, or images of the map are missing.
    """
    to = to.resolve()
    models = _models(run)
    if not formats:
        raise ConfigError("an export needs at least one format")
    if 0 not in models:
        raise ConfigError(f"{run}: has no snapshot to export")
    if map_number not in models:
        raise ConfigError(f"{run}: has no map {map_number}, only 0 to {max(models)}")
    if ExportFormat.DENSE in formats:
        _check_dense(run, map_number)
    model = models.pop(map_number)
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise ConfigError(f"{to}: exists and is not an empty folder")
    temporary = to.with_name(f".tmp-{to.name}-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        if ExportFormat.TUM in formats:
            _copy_trajectory(run, temporary, map_number=map_number)
        reconstruction = _write(run, model, temporary, formats=set(formats))
        temporary.replace(to)
    except OSError as error:
        raise SnapshotError(f"{to}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Export(
        path=to,
        num_images=reconstruction.num_reg_images(),
        num_points3D=reconstruction.num_points3D(),
        left_out={number: read_model(other).num_reg_images() for number, other in models.items()},
    )


def _check_dense(run: Path, map_number: int) -> None:
    """Raises ConfigError unless the run has dense points of a map."""
    if map_number:
        raise ConfigError(f"{run}: dense points are of map 0 only")
    if not (run / _DENSE_PLY).is_file():
        raise ConfigError(f"{run}: has no {_DENSE_PLY}; dense.enabled=true makes it")


def _models(run: Path) -> dict[int, Path]:
    """The folders of the latest snapshot's maps, by number."""
    folders = (run / "latest" / "sparse").glob("[0-9]*")
    return {int(folder.name): folder for folder in sorted(folders) if folder.name.isdecimal()}


def _write(
    run: Path, model: Path, to: Path, *, formats: set[ExportFormat]
) -> pycolmap.Reconstruction:
    reconstruction = read_model(model)
    dense_onto = _dense_onto(run, reconstruction) if ExportFormat.DENSE in formats else None
    if formats & {ExportFormat.UNDISTORT, ExportFormat.NERFSTUDIO}:
        _check_images(reconstruction, run / "images")
        _check_sizes(reconstruction, run / "images")
    if ExportFormat.TUM in formats:
        _write_tum(reconstruction, run, to)
    if ExportFormat.UNDISTORT in formats:
        reconstruction = _write_undistorted(run, model, to, reconstruction=reconstruction)
    if dense_onto is not None:
        is_model = ExportFormat.UNDISTORT in formats
        name = "sparse/0/points3D.ply" if is_model else _DENSE_PLY.name
        frame = "as sparse/0 of the run's latest snapshot"
        write_moved_dense_ply(run / _DENSE_PLY, to / name, dense_onto, frame)
    if formats & {ExportFormat.PLY, ExportFormat.NERFSTUDIO}:
        _write_points(reconstruction, to / _POINTS_NAME)
    if ExportFormat.NERFSTUDIO in formats:
        if ExportFormat.UNDISTORT not in formats:
            _copy_images(reconstruction, run / "images", to / "images")
            _write_masks(reconstruction, run, to)
        _write_nerfstudio(reconstruction, to)
    return reconstruction


def _dense_onto(run: Path, reconstruction: pycolmap.Reconstruction) -> Float64Array:
    """The similarity (3, 4) from the world of the dense points to that of a map of the run.

    They are of a former snapshot where the run was placed on the globe later, or broke off.

    Raises:
        ConfigError: it is not known, or the points are of another map.
    """
    path = run / _DENSE_PLY
    try:
        header = read_dense_ply_header(path)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not header.cam_from_world:
        raise ConfigError(
            f"{path}: does not say where cameras are in its world, so that it cannot be laid beside"
            " those of the latest snapshot"
        )
    poses = {
        image_id: reconstruction.image(image_id).cam_from_world().matrix()
        for image_id in reconstruction.reg_image_ids()
    }
    onto = similarity_onto(header, poses)
    if onto is None:
        raise ConfigError(f"{path}: is of another map than the latest snapshot's sparse/0")
    return onto


def _check_images(reconstruction: pycolmap.Reconstruction, folder: Path) -> None:
    """Raises SnapshotError unless every image of the model is a file.

    pycolmap passes over an image it cannot read or write, and trainers then fail far from here.
    """
    missing = sorted(
        image.name
        for image in reconstruction.images.values()
        if not (folder / image.name).is_file()
    )
    if missing:
        raise SnapshotError(
            f"{len(missing)} of {reconstruction.num_images()} images cannot be read or written, "
            f"first {missing[0]}"
        )


def _check_sizes(reconstruction: pycolmap.Reconstruction, folder: Path) -> None:
    """Raises SnapshotError unless every image of a run is an image of its camera's size.

    Whoever decodes them asks for the memory that they say.
    """
    for image in reconstruction.images.values():
        camera = reconstruction.camera(image.camera_id)
        try:
            data = read_regular_file(folder / image.name, max_bytes=_MAX_IMAGE_BYTES)
        except OSError as error:
            raise SnapshotError(
                f"the image {image.name} cannot be read: {error.strerror or error}"
            ) from error
        header = read_image_header(data)
        if header is None or (header.width, header.height) != (camera.width, camera.height):
            raise SnapshotError(
                f"the image {image.name} cannot be read, or is not of its camera's size, "
                f"{camera.width} x {camera.height} px"
            )


def _write_undistorted(
    run: Path, model: Path, to: Path, *, reconstruction: pycolmap.Reconstruction
) -> pycolmap.Reconstruction:
    """Writes undistorted images, their masks and their model; returns the model."""
    distorted = reconstruction
    if has_spherical_images(reconstruction):
        distorted = split_spherical_images(reconstruction, run, to / _VIEWS)
        run = to / _VIEWS
    changes = [_make_undistortable(camera) for camera in distorted.cameras.values()]
    if distorted is not reconstruction or any(changes):
        model = to / _DISTORTED
        model.mkdir()
        distorted.write_binary(model)
        read_model(model)  # pycolmap does not notice a full disk
    _undistort_images(run, model, to)
    undistorted = read_model(to / "sparse" / "0")
    _check_images(undistorted, to / "images")
    _write_masks(distorted, run, to, undistorted=undistorted)
    for folder in (_DISTORTED, _VIEWS):
        shutil.rmtree(to / folder, ignore_errors=True)
    return undistorted


def _undistort_images(run: Path, model: Path, to: Path) -> None:
    import pycolmap

    pycolmap.undistort_images(to, model, run / "images")
    # Beside images and model pycolmap leaves a workspace for dense stereo; and it puts the model
    # itself where trainers expect folders of models.
    shutil.rmtree(to / "stereo")
    for script in to.glob("run-colmap-*.sh"):
        script.unlink()
    (to / "sparse").rename(to / "model")
    (to / "sparse").mkdir()
    (to / "model").rename(to / "sparse" / "0")


def _make_undistortable(camera: pycolmap.Camera) -> bool:
    """Gives a fisheye that COLMAP takes for undistorted a distortion too small to move anything.

    Returns:
        Whether the camera was changed.
    """
    import pycolmap

    params = [float(value) for value in camera.params]
    extra = list(camera.extra_params_idxs())
    is_distorted = any(abs(params[idx]) >= _LEAST_DISTORTION for idx in extra)
    if is_distorted or not camera.is_perspective_fisheye():
        return False
    if extra:
        params[extra[0]] = _LEAST_DISTORTION
    else:
        params = [params[position] for position in _OPENCV_FISHEYE_POSITIONS[camera.model_name]]
        params += [_LEAST_DISTORTION, 0.0, 0.0, 0.0]
        camera.model = pycolmap.CameraModelId.OPENCV_FISHEYE
    camera.params = params
    return True


def _write_masks(
    reconstruction: pycolmap.Reconstruction,
    run: Path,
    to: Path,
    *,
    undistorted: pycolmap.Reconstruction | None = None,
) -> None:
    """Writes the masks of a run's images, where it has any; all or none have one, as trainers want.

    Args:
        reconstruction: the run's model.
        run: the run folder.
        to: the export's folder.
        undistorted: the model of undistorted images, when the masks are to be undistorted like
            them; what lies outside the original image is left out, too.
    """
    names = [image.name for image in reconstruction.images.values()]
    if not any((run / _MASKS / f"{name}.png").is_file() for name in names):
        return
    places: dict[int, Int64Array] = {}  # of the last camera alone: it takes a number for each pixel
    for image in sorted(reconstruction.images.values(), key=lambda image: image.camera_id):
        camera = reconstruction.camera(image.camera_id)
        mask = _read_mask(run / _MASKS / f"{image.name}.png", camera)
        if undistorted is not None:
            if camera.camera_id not in places:
                target = undistorted.camera(undistorted.image(image.image_id).camera_id)
                places = {camera.camera_id: _original_places(target, original=camera)}
            mask = _at_places(mask, places[camera.camera_id])
        _write_mask(mask, to / _MASKS / f"{image.name}.png")


def _read_mask(path: Path, camera: pycolmap.Camera) -> Uint8Array:
    """The grey mask (H, W) in a file; white of the camera's size where there is none."""
    import pycolmap

    if not path.is_file():
        return np.full((camera.height, camera.width), _WHITE, np.uint8)
    mask = pycolmap.Bitmap.read(path, as_rgb=False)
    if mask is None or (mask.width, mask.height) != (camera.width, camera.height):
        raise SnapshotError(f"mask {path.name} cannot be read, or is not of its image's size")
    return np.asarray(mask.to_array(), np.uint8)


def _write_mask(mask: Uint8Array, path: Path) -> None:
    import pycolmap

    path.parent.mkdir(parents=True, exist_ok=True)
    if not pycolmap.Bitmap.from_array(mask).write(path):
        raise SnapshotError(f"mask {path.name} cannot be written")


def _original_places(undistorted: pycolmap.Camera, *, original: pycolmap.Camera) -> Int64Array:
    """Which pixel of the original image each pixel (H, W) of the undistorted one shows.

    Counted line by line; the number of pixels stands for none.
    """
    size = np.array([original.width, original.height])
    places = np.full((undistorted.height, undistorted.width), size.prod())
    x = np.arange(undistorted.width) + 0.5
    for line in range(undistorted.height):  # all at once takes ten times the memory of an image
        rays = undistorted.cam_from_img(np.column_stack([x, np.full(len(x), line + 0.5)]))
        points_xy = original.img_from_cam(np.column_stack([rays, np.ones(len(rays))]))
        inside = ((points_xy >= 0) & (points_xy < size)).all(axis=1)
        columns, lines = points_xy[inside].astype(np.int64).T
        places[line, inside] = lines * original.width + columns
    return places


def _at_places(mask: Uint8Array, places: Int64Array) -> Uint8Array:
    """A mask with its pixels at other places (H, W); black where a place is none."""
    return np.append(mask.ravel(), np.uint8(0))[places]


def _write_points(reconstruction: pycolmap.Reconstruction, path: Path) -> None:
    reconstruction.export_PLY(path)
    # pycolmap does not notice a full disk; a point takes three floats and three bytes.
    if path.stat().st_size < 15 * reconstruction.num_points3D():
        raise SnapshotError(f"{path.name} is cut short; the disk may be full")


def _copy_images(reconstruction: pycolmap.Reconstruction, source: Path, to: Path) -> None:
    for image in reconstruction.images.values():
        (to / image.name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / image.name, to / image.name)


def _write_nerfstudio(reconstruction: pycolmap.Reconstruction, to: Path) -> None:
    """Writes ``transforms.json``: OpenGL world_from_cam, intrinsics with each frame.

    The world is the map's own, for the poses and for the points, hence ``applied_transform`` is
    the identity.
    """
    images = sorted(reconstruction.images.values(), key=lambda image: image.image_id)
    has_masks = (to / _MASKS).is_dir()
    record = {
        "camera_model": _nerfstudio_model(reconstruction),
        "applied_transform": np.eye(4)[:3].tolist(),
        "ply_file_path": _POINTS_NAME,
        "frames": [
            _nerfstudio_frame(image, reconstruction.camera(image.camera_id), has_mask=has_masks)
            for image in images
        ],
    }
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    (to / "transforms.json").write_text(text, encoding="utf-8")


def _nerfstudio_frame(
    image: pycolmap.Image, camera: pycolmap.Camera, *, has_mask: bool
) -> dict[str, Any]:
    mask = {"mask_path": f"{_MASKS}/{image.name}.png"} if has_mask else {}
    world_from_cam = np.vstack([invert_pose(image.cam_from_world().matrix()), [0, 0, 0, 1]])
    return {
        "file_path": f"images/{image.name}",
        **mask,
        "colmap_im_id": image.image_id,
        "transform_matrix": (world_from_cam @ _OPENCV_FROM_OPENGL).tolist(),
        **_nerfstudio_intrinsics(camera),
    }


def _nerfstudio_model(reconstruction: pycolmap.Reconstruction) -> str:
    """The kind of all cameras in nerfstudio's words."""
    kinds = {_nerfstudio_kind(camera) for camera in reconstruction.cameras.values()}
    if len(kinds) > 1:
        raise ConfigError("nerfstudio takes lenses of one kind; export undistorted images with it")
    return kinds.pop() if kinds else "OPENCV"


def _nerfstudio_kind(camera: pycolmap.Camera) -> str:
    if camera.is_spherical():
        return "EQUIRECTANGULAR"
    return "OPENCV_FISHEYE" if camera.is_perspective_fisheye() else "OPENCV"


def _nerfstudio_intrinsics(camera: pycolmap.Camera) -> dict[str, float]:
    if camera.is_spherical():  # nerfstudio wants a focal length, and makes no use of it
        middle = {"cx": camera.width / 2.0, "cy": camera.height / 2.0}
        focal = {"fl_x": float(camera.width), "fl_y": float(camera.height)}
        return {"w": camera.width, "h": camera.height, **focal, **middle}
    try:
        positions = _NERFSTUDIO_PARAMS[camera.model_name]
    except KeyError:
        raise ConfigError(
            f"nerfstudio has no camera like {camera.model_name}; export undistorted images with it"
        ) from None
    is_fisheye = camera.is_perspective_fisheye()
    names = ("k1", "k2", "k3", "k4") if is_fisheye else ("k1", "k2", "p1", "p2")
    distortion = dict.fromkeys(names, 0.0)
    params = {name: float(camera.params[position]) for name, position in positions.items()}
    return {"w": camera.width, "h": camera.height, **distortion, **params}


def _copy_trajectory(run: Path, to: Path, *, map_number: int) -> None:
    """Copies the poses of all frames of a map, where the run came so far."""
    source = run / (f"trajectory_{map_number}.txt" if map_number else _TRAJECTORY_NAME)
    if source.is_file():
        shutil.copyfile(source, to / _TRAJECTORY_NAME)


def _write_tum(reconstruction: pycolmap.Reconstruction, run: Path, to: Path) -> None:
    """Writes the poses of the map's keyframes."""
    times_s = {row.name: row.captured_at_s for row in read_frame_rows(run)}
    lines = [
        (times_s[image.name], _tum_pose(image))
        for image in reconstruction.images.values()
        if image.name in times_s
    ]
    lines.sort()
    text = "".join(f"{_timestamp(time_s)} {pose}\n" for time_s, pose in lines)
    header = "# timestamp tx ty tz qx qy qz qw (world_from_cam)\n"
    (to / "trajectory_keyframes.txt").write_text(header + text, encoding="utf-8")


def _timestamp(captured_at_s: float) -> str:
    """As in the other files of a run: to the nanosecond, no trailing zeros."""
    return f"{captured_at_s:.9f}".rstrip("0").rstrip(".")


def _tum_pose(image: pycolmap.Image) -> str:
    world_from_cam = invert_pose(image.cam_from_world().matrix())
    quat_xyzw = quat_xyzw_from_rotation(world_from_cam[:, :3])
    return " ".join(f"{value:.12g}" for value in (*world_from_cam[:, 3], *quat_xyzw))
