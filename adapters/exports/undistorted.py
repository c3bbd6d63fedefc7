"""PINHOLE images and their model, as trainers of splats read them.

Of a fisheye the middle of the view, of a sphere six views.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adapters.exports.images import IMAGES, copy_image
from adapters.exports.job import ExportJob
from adapters.exports.masks import write_masks
from adapters.exports.perspective_views import has_spherical_images, split_spherical_images
from adapters.run_files import read_model
from engine.errors import SnapshotError

if TYPE_CHECKING:
    import pycolmap

_VIEWS = "views"  # folder that stands in an export while it is written
_AT_ONCE = 4  # images; each takes the memory of two


def write_undistorted(job: ExportJob) -> pycolmap.Reconstruction:
    """Writes undistorted images, their masks and their model.

    Returns:
        The model.

    Raises:
        SnapshotError: an image or mask cannot be read or written.
        OSError: likewise.
        ExportCancelled: the export was cancelled.
    """
    views = job.to / _VIEWS
    if has_spherical_images(job.reconstruction):
        job = replace(job, reconstruction=split_spherical_images(job, views), run=views)
    undistorted = undistorted_model(job.reconstruction)
    _write_images(job)
    model = job.to / "sparse" / "0"
    model.mkdir(parents=True)
    undistorted.write_binary(model)
    undistorted = read_model(model)  # pycolmap does not notice a full disk
    write_masks(job, undistorted=undistorted)
    shutil.rmtree(views, ignore_errors=True)
    return undistorted


def undistorted_model(reconstruction: pycolmap.Reconstruction) -> pycolmap.Reconstruction:
    """A copy of a model with the PINHOLE cameras and keypoints of its undistorted images."""
    import pycolmap

    undistorted = pycolmap.Reconstruction(reconstruction)
    for camera_id, original in reconstruction.cameras.items():
        pinhole = undistorted_camera(original)
        camera = undistorted.camera(camera_id)
        camera.model = pinhole.model
        camera.params = [float(value) for value in pinhole.params]
        camera.width, camera.height = pinhole.width, pinhole.height
    for image in undistorted.images.values():
        original, points = reconstruction.camera(image.camera_id), image.points2D
        if is_pinhole(original) or not points:
            continue
        rays = original.cam_ray_from_img(np.array([point.xy for point in points]))
        for point, xy in zip(points, image.camera.img_from_cam(rays), strict=True):
            if np.isfinite(xy).all():
                point.xy = xy.tolist()
    return undistorted


def undistorted_camera(camera: pycolmap.Camera) -> pycolmap.Camera:
    """The PINHOLE camera of a camera's undistorted images; of one without distortion its own."""
    import pycolmap

    if not is_pinhole(camera):
        return pycolmap.undistort_camera(pycolmap.UndistortCameraOptions(), camera)
    fx, fy = camera.focal_length_x, camera.focal_length_y
    pinhole = pycolmap.Camera.create_from_model_name(
        camera.camera_id, "PINHOLE", fx, camera.width, camera.height
    )
    pinhole.params = [fx, fy, camera.principal_point_x, camera.principal_point_y]
    return pinhole


def is_pinhole(camera: pycolmap.Camera) -> bool:
    """Whether a camera's images are as a pinhole's."""
    return bool(camera.is_undistorted()) and not camera.is_perspective_fisheye()


def undistort_image(path: Path, camera: pycolmap.Camera, to: Path) -> None:
    """Writes an image undistorted; one without distortion is copied.

    Args:
        path: an image of the camera's size.
        camera: of the image as it is.
        to: its folder need not be there.

    Raises:
        SnapshotError: it cannot be read or written.
        OSError: likewise.
    """
    import pycolmap

    if is_pinhole(camera):
        return copy_image(path, to)
    bitmap = pycolmap.Bitmap.read(path, as_rgb=True)
    if bitmap is None:
        raise SnapshotError(f"the image {path.name} cannot be read")
    undistorted, _ = pycolmap.undistort_image(pycolmap.UndistortCameraOptions(), bitmap, camera)
    to.parent.mkdir(parents=True, exist_ok=True)
    if not undistorted.write(to):
        raise SnapshotError(f"the image {to.name} cannot be written")
    return None


def _write_images(job: ExportJob) -> None:
    """Writes the images, some at once."""

    def write(image: pycolmap.Image) -> None:
        camera = job.reconstruction.camera(image.camera_id)
        undistort_image(job.run / IMAGES / image.name, camera, job.to / IMAGES / image.name)

    images = job.images()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for rows in job.each_slice("images", len(images), size=_AT_ONCE):
            list(pool.map(write, images[rows]))
