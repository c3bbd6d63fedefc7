"""Cameras and points as Bundler's files: ``bundle.out`` of version 0.3 and ``list.txt``.

By the section "Output format and scene representation" of its manual: a camera has one focal length
and two radial distortions about the middle of the image, and looks along its negative z, y up.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np

from adapters.exports.images import IMAGES, copy_image, flat_names
from adapters.exports.job import ExportJob
from engine.errors import ConfigError
from engine.geometry import grid_over_image
from engine.types import Float64Array

if TYPE_CHECKING:
    import pycolmap

_FOLDER = "bundler"
_HEADER = "# Bundle file v0.3"
_MAX_OFF_PX = 0.1  # of pixels by Bundler's camera from those by the map's
_NUM_COMPARED = 400  # places in an image
_RADIAL = {"SIMPLE_RADIAL": 1, "RADIAL": 2, "OPENCV": 2}  # how many k stand behind the middle
_BACKWARD = np.diag([1.0, -1.0, -1.0])  # from camera axes x right, y down, z forward
_AT_ONCE = 10_000  # points


def check_bundler(job: ExportJob, *, is_undistorted: bool) -> None:
    """Checks that Bundler has such cameras.

    Args:
        job: of the export.
        is_undistorted: whether the images will be.

    Raises:
        ConfigError: it has not.
    """
    from engine.output.undistortion import pinhole_of

    flat_names(job, option="--bundler")
    for camera in job.reconstruction.cameras.values():
        if is_undistorted and camera.is_spherical():
            continue  # its views are square pinholes
        off_px = _off_px(pinhole_of(camera) if is_undistorted else camera)
        if not off_px <= _MAX_OFF_PX:
            way = (
                "its middle or its pixels' shape is not Bundler's"
                if is_undistorted
                else "with --undistort it may be"
            )
            raise ConfigError(
                f"--bundler: camera {camera.camera_id}, {camera.model_name}, is none of Bundler's"
                f" ({way})"
            )


def write_bundler(job: ExportJob, *, images: Path) -> None:
    """Writes the map and its images.

    Args:
        job: of the export, of cameras that Bundler has.
        images: holds the folder ``images`` of the map's images.

    Raises:
        OSError: a file cannot be read or written.
        ExportCancelledError: the export was cancelled.
    """
    names = flat_names(job, option="--bundler")
    folder = job.to / _FOLDER
    lines = []
    for image in job.each("images for Bundler", job.images()):
        copy_image(images / IMAGES / image.name, folder / IMAGES / names[image.name])
        focal_px = _focal_and_radial(job.reconstruction.camera(image.camera_id))[0]
        lines.append(f"{IMAGES}/{names[image.name]} 0 {focal_px:.9g}\n")
    (folder / "list.txt").write_text("".join(lines), encoding="utf-8")
    with (folder / "bundle.out").open("w", encoding="ascii", newline="\n") as file:
        _write_bundle(job, file)


def _write_bundle(job: ExportJob, file: TextIO) -> None:
    images = job.images()
    points = [point for _, point in sorted(job.reconstruction.points3D.items())]
    file.write(f"{_HEADER}\n{len(images)} {len(points)}\n")
    for image in images:
        pose = _BACKWARD @ image.cam_from_world().matrix()
        camera = job.reconstruction.camera(image.camera_id)
        _write_rows(file, np.array(_focal_and_radial(camera))[None])
        _write_rows(file, pose[:, :3])
        _write_rows(file, pose[None, :, 3])
    numbers = {image.image_id: number for number, image in enumerate(images)}
    for rows in job.each_slice("points for Bundler", len(points), size=_AT_ONCE):
        for point in points[rows]:
            _write_rows(file, point.xyz[None])
            views = [
                f"{numbers[element.image_id]} {element.point2D_idx} {_view_xy(job, element)}"
                for element in point.track.elements
            ]
            color = " ".join(str(int(value)) for value in point.color)
            file.write(f"{color}\n{' '.join([str(len(views)), *views])}\n")


def _write_rows(file: TextIO, rows: Float64Array) -> None:
    for row in rows.tolist():
        file.write(" ".join(f"{value:.12g}" for value in row) + "\n")


def _view_xy(job: ExportJob, element: pycolmap.TrackElement) -> str:
    """Where a point is seen: from the middle of the image, y up."""
    image = job.reconstruction.image(element.image_id)
    camera = job.reconstruction.camera(image.camera_id)
    x, y = image.points2D[element.point2D_idx].xy
    return f"{x - camera.width / 2.0:.4f} {camera.height / 2.0 - y:.4f}"


def _focal_and_radial(camera: pycolmap.Camera) -> tuple[float, float, float]:
    """Focal length in pixels, k1 and k2 of a camera as Bundler has it."""
    num_radial = _RADIAL.get(camera.model_name, 0)
    extra = [float(camera.params[idx]) for idx in camera.extra_params_idxs()[:num_radial]]
    k1, k2 = [*extra, 0.0, 0.0][:2]
    return (camera.focal_length_x + camera.focal_length_y) / 2.0, k1, k2


def _off_px(camera: pycolmap.Camera) -> float:
    """How far Bundler's camera is off at most, in pixels; infinite or NaN: it has none."""
    if camera.is_spherical():
        return float("inf")
    size = (camera.width, camera.height)
    places_xy = grid_over_image(size, num=_NUM_COMPARED)
    rays = np.asarray(camera.cam_ray_from_img(places_xy))
    if not (rays[:, 2] > 0.0).all():
        return float("inf")
    focal_px, k1, k2 = _focal_and_radial(camera)
    p = rays[:, :2] / rays[:, 2:]
    r2 = (p**2).sum(axis=1, keepdims=True)
    found_xy = focal_px * (1.0 + k1 * r2 + k2 * r2**2) * p + np.array(size) / 2.0
    return float(np.linalg.norm(found_xy - places_xy, axis=1).max())
