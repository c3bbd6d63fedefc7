"""Cameras as Metashape imports them: positions with omega, phi, kappa, and OpenCV calibrations.

    metashape/images/        images in one folder; their names are the labels
    metashape/cameras.csv    label, x, y, z, omega, phi, kappa ("Load reference" of its manual)
    metashape/camera-N.xml   a calibration of each camera, as OpenCV's FileStorage keeps it

Angles are those of photogrammetry, in degrees: the rotation from camera axes (x right, y up, z
backward) to the axes of the CRS is Rx(omega) Ry(phi) Rz(kappa).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adapters.exports.images import IMAGES, copy_image, flat_names
from adapters.exports.job import ExportJob
from adapters.exports.lenses import brown_distortion
from adapters.exports.place import PlacedCrs
from engine.errors import ConfigError, SnapshotError
from engine.types import Float64Array

if TYPE_CHECKING:
    import pycolmap

_FOLDER = "metashape"
_BACKWARD = np.diag([1.0, -1.0, -1.0])  # from camera axes x right, y down, z forward
_OPENCV_CORNER = 0.5  # OpenCV counts pixels from the middle of the first one


def check_metashape(job: ExportJob) -> None:
    """Checks that the map's cameras have calibrations of this form.

    Raises:
        ConfigError: one has not.
    """
    flat_names(job, option="--metashape")
    for camera in job.reconstruction.cameras.values():
        if brown_distortion(camera) is None:
            raise ConfigError(
                f"--metashape: OpenCV's calibration of perspective lenses cannot hold camera"
                f" {camera.camera_id}, {camera.model_name}"
            )


def write_metashape(job: ExportJob, crs: PlacedCrs) -> None:
    """Writes images, cameras and calibrations.

    Raises:
        ConfigError: the CRS has no coordinates for the cameras.
        SnapshotError: a calibration cannot be written.
        OSError: a file cannot be read or written.
        ExportCancelledError: the export was cancelled.
    """
    names = flat_names(job, option="--metashape")
    folder = job.to / _FOLDER
    lines = [f"# {crs.name}; heights: {crs.height_words}", "#label,x,y,z,omega,phi,kappa"]
    for image in job.each("images for Metashape", job.images()):
        copy_image(job.run / IMAGES / image.name, folder / IMAGES / names[image.name])
        center = image.projection_center()
        [position] = crs.coordinates(center[None]).tolist()
        if not np.isfinite(position).all():
            raise ConfigError(f"--crs {crs.name}: has no coordinates where {image.name} lies")
        world_from_cam = image.cam_from_world().matrix()[:, :3].T
        angles = _angles_deg(crs.axes_at(center) @ world_from_cam @ _BACKWARD)
        num_digits = 9 if crs.crs.is_geographic else 4  # of degrees, or of lengths
        cells = [*(f"{value:.{num_digits}f}" for value in position[:2]), f"{position[2]:.4f}"]
        label = names[image.name]
        lines.append(",".join([label, *cells, *(f"{angle:.6f}" for angle in angles)]))
    (folder / "cameras.csv").write_text("\n".join([*lines, ""]), encoding="utf-8")
    for camera_id, camera in job.reconstruction.cameras.items():
        _write_calibration(folder / f"camera-{camera_id}.xml", camera)


def _angles_deg(rotation: Float64Array) -> tuple[float, float, float]:
    """Omega, phi and kappa of a rotation (3, 3)."""
    omega = math.atan2(-rotation[1, 2], rotation[2, 2])
    phi = math.asin(min(1.0, max(-1.0, float(rotation[0, 2]))))
    kappa = math.atan2(-rotation[0, 1], rotation[0, 0])
    return math.degrees(omega), math.degrees(phi), math.degrees(kappa)


def _write_calibration(path: Path, camera: pycolmap.Camera) -> None:
    """Writes a calibration by the names of OpenCV's own sample."""
    import cv2

    distortion = brown_distortion(camera)
    if distortion is None:
        raise ConfigError(f"{camera.model_name} has no distortion of Brown and Conrady")
    matrix = np.eye(3)
    matrix[0, 0], matrix[1, 1] = camera.focal_length_x, camera.focal_length_y
    matrix[0, 2] = camera.principal_point_x - _OPENCV_CORNER
    matrix[1, 2] = camera.principal_point_y - _OPENCV_CORNER
    storage = cv2.FileStorage(".xml", cv2.FILE_STORAGE_WRITE | cv2.FILE_STORAGE_MEMORY)
    if not storage.isOpened():
        raise SnapshotError(f"{path.name}: cannot be written")
    storage.write("image_Width", camera.width)
    storage.write("image_Height", camera.height)
    storage.write("Camera_Matrix", matrix)
    storage.write("Distortion_Coefficients", np.array([list(distortion.values())]).T)
    path.write_text(storage.releaseAndGetString(), encoding="utf-8")
