"""A walk through a textured room, seen by cameras of known models, and their calibration files."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.types import Float64Array
from trust.inputs import INPUT_FOLDER, ExifTags, Input, Kit, Maker, write_jpeg

NUM_PHOTOS = 15
SIZE = (960, 720)
PANORAMA_SIZE = (1600, 800)
ACTION_CAMERA = ExifTags(make="GoPro", model="HERO11 Black")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lens:
    """A camera of the room."""

    model: str  # PINHOLE, OPENCV_FISHEYE or EQUIRECTANGULAR
    width: int
    height: int
    focal_px: float | None = None  # None: equirectangular

    def rays(self, room: Any) -> Float64Array:
        """Directions in the camera of all pixel centres, (H, W, 3)."""
        if self.model == "EQUIRECTANGULAR":
            return np.asarray(room.equirect(self.width, self.height))
        shape = room.fisheye if self.model == "OPENCV_FISHEYE" else room.pinhole
        return np.asarray(shape(self.width, self.height, self.focal_px))

    @property
    def params(self) -> tuple[float, ...]:
        """In COLMAP's order for the model."""
        if self.focal_px is None:
            return float(self.width), float(self.height)
        focal, center = self.focal_px, (self.width / 2, self.height / 2)
        distortion = (0.0,) * 4 if self.model == "OPENCV_FISHEYE" else ()
        return (focal, focal, *center, *distortion)


def pinhole_lens(field_deg: float) -> Lens:
    """A lens without distortion, by its horizontal field of view."""
    width, height = SIZE
    focal_px = width / 2 / math.tan(math.radians(field_deg / 2))
    return Lens(model="PINHOLE", width=width, height=height, focal_px=focal_px)


def fisheye_lens(field_deg: float) -> Lens:
    """An equidistant lens, by its horizontal field of view."""
    width, height = SIZE
    focal_px = width / math.radians(field_deg)
    return Lens(model="OPENCV_FISHEYE", width=width, height=height, focal_px=focal_px)


def panorama_lens() -> Lens:
    """All directions, twice as wide as high."""
    width, height = PANORAMA_SIZE
    return Lens(model="EQUIRECTANGULAR", width=width, height=height)


def room_seen_by(
    lens_of: Callable[[Kit], Lens],
    *,
    exif: ExifTags | None = None,
    calibration: Callable[[Lens, Path], Path] | None = None,
) -> Maker:
    """A maker of photos of the walk.

    Args:
        lens_of: the camera, which depends on the variation.
        exif: tags of all photos.
        calibration: writes the lens into a file of the folder, which the run is given.
    """
    return partial(_make, lens_of=lens_of, exif=exif, calibration=calibration)


def _make(
    kit: Kit,
    folder: Path,
    *,
    lens_of: Callable[[Kit], Lens],
    exif: ExifTags | None,
    calibration: Callable[[Lens, Path], Path] | None,
) -> Input:
    room, lens = kit.room(), lens_of(kit)
    textures = room.textures(kit.variation.texture_seed)
    rays = lens.rays(room)
    poses = []
    for number, (eye, target) in enumerate(room.walk(NUM_PHOTOS, kit.variation.turn)):
        rotation = room.pose(eye, target)
        poses.append((rotation, eye))
        pixels = room.cast(rays, rotation, eye, textures)
        write_jpeg(folder / "images" / f"{number:03d}.jpg", pixels, exif=exif)
    room.tum(folder / "truth.txt", poses)
    given: tuple[str, ...] = ()
    if calibration is not None:
        given = ("--calibration", f"{INPUT_FOLDER}/{calibration(lens, folder).name}")
    return Input(source="images", arguments=given, truth="truth.txt", focal_px=lens.focal_px)


def write_colmap_line(lens: Lens, folder: Path) -> Path:
    """A line of COLMAP's ``cameras.txt``."""
    path = folder / "cameras.txt"
    params = " ".join(f"{value:.9g}" for value in lens.params)
    path.write_text(
        "# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]\n"
        f"1 {lens.model} {lens.width} {lens.height} {params}\n",
        encoding="utf-8",
    )
    return path


def write_opencv_yaml(lens: Lens, folder: Path) -> Path:
    """The file of OpenCV's calibration sample; centres of pixels are integers there."""
    path = folder / "opencv.yaml"
    focal_x, focal_y, center_x, center_y, *distortion = lens.params
    matrix = [focal_x, 0, center_x - 0.5, 0, focal_y, center_y - 0.5, 0, 0, 1]
    path.write_text(
        "%YAML:1.0\n---\n"
        f"image_width: {lens.width}\nimage_height: {lens.height}\n"
        f"fisheye_model: {int(lens.model == 'OPENCV_FISHEYE')}\n"
        + _opencv_matrix("camera_matrix", matrix, rows=3, columns=3)
        + _opencv_matrix("distortion_coefficients", distortion, rows=len(distortion), columns=1),
        encoding="utf-8",
    )
    return path


def write_kalibr_yaml(lens: Lens, folder: Path) -> Path:
    """Kalibr's camera chain of one camera; centres of pixels are integers there."""
    path = folder / "camchain.yaml"
    focal_x, focal_y, center_x, center_y, *distortion = lens.params
    is_fisheye = lens.model == "OPENCV_FISHEYE"
    path.write_text(
        "cam0:\n"
        "  camera_model: pinhole\n"
        f"  distortion_coeffs: {distortion or [0.0] * 4}\n"
        f"  distortion_model: {'equidistant' if is_fisheye else 'radtan'}\n"
        f"  intrinsics: [{focal_x:.9g}, {focal_y:.9g}, {center_x - 0.5}, {center_y - 0.5}]\n"
        f"  resolution: [{lens.width}, {lens.height}]\n",
        encoding="utf-8",
    )
    return path


def _opencv_matrix(name: str, values: list[float], *, rows: int, columns: int) -> str:
    data = ", ".join(f"{value:.9g}" for value in values)
    return (
        f"{name}: !!opencv-matrix\n   rows: {rows}\n   cols: {columns}\n   dt: d\n"
        f"   data: [ {data} ]\n"
    )
