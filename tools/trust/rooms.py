"""A walk through a textured room, seen by cameras of known models, and their calibration files."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from engine.types import Float64Array
from trust.inputs import INPUT_FOLDER, ExifTags, Input, Kit, Maker, write_jpeg

NUM_PHOTOS = 15
SIZE = (960, 720)
PANORAMA_SIZE = (1600, 800)
TURNING_FIELD_DEG, TURNING_EYE_M = 70.0, (2.0, 1.5, 1.4)
_NUM_ANGLES = 200_000
ACTION_CAMERA = ExifTags(make="GoPro", model="HERO11 Black")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lens:
    """A camera of the room."""

    model: str  # PINHOLE, OPENCV_FISHEYE or EQUIRECTANGULAR
    width: int
    height: int
    focal_px: float | None = None  # None: equirectangular
    distortion: tuple[float, ...] = ()  # of the fisheye

    def rays(self) -> Float64Array:
        """Directions in the camera of all pixel centres, (H, W, 3), not of unit length."""
        x, y = np.meshgrid(np.arange(self.width) + 0.5, np.arange(self.height) + 0.5)
        if self.focal_px is None:
            longitude = (x / self.width - 0.5) * 2 * np.pi
            latitude = (0.5 - y / self.height) * np.pi
            return np.stack(
                [
                    np.cos(latitude) * np.sin(longitude),
                    -np.sin(latitude),
                    np.cos(latitude) * np.cos(longitude),
                ],
                axis=-1,
            )
        x, y = (x - self.width / 2) / self.focal_px, (y - self.height / 2) / self.focal_px
        if self.model == "PINHOLE":
            return np.stack([x, y, np.ones_like(x)], axis=-1)
        radius = np.hypot(x, y)
        angle = _undistorted_angle(radius, self.distortion)
        sideways = np.sin(angle) / np.maximum(radius, 1e-12)
        return np.stack([x * sideways, y * sideways, np.cos(angle)], axis=-1)

    @property
    def params(self) -> tuple[float, ...]:
        """In COLMAP's order for the model."""
        if self.focal_px is None:
            return float(self.width), float(self.height)
        focal, center = self.focal_px, (self.width / 2, self.height / 2)
        return (focal, focal, *center, *self.distortion)


def pinhole_lens(field_deg: float) -> Lens:
    """A lens without distortion, by its horizontal field of view."""
    width, height = SIZE
    focal_px = width / 2 / math.tan(math.radians(field_deg / 2))
    return Lens(model="PINHOLE", width=width, height=height, focal_px=focal_px)


def fisheye_lens(field_deg: float, distortion: tuple[float, ...] = (0.0,) * 4) -> Lens:
    """A fisheye, equidistant but for its distortion, by its horizontal field of view."""
    width, height = SIZE
    half = math.radians(field_deg / 2)
    focal_px = width / 2 / float(_distorted_angle(np.array(half), distortion))
    return Lens(
        model="OPENCV_FISHEYE",
        width=width,
        height=height,
        focal_px=focal_px,
        distortion=distortion,
    )


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
    rays = lens.rays()
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


def room_turned_in() -> Maker:
    """A maker of photos by a camera that turns on a point of the room."""
    return _make_turned


def _make_turned(kit: Kit, folder: Path) -> Input:
    room, lens = kit.room(), pinhole_lens(TURNING_FIELD_DEG)
    textures = room.textures(kit.variation.texture_seed)
    rays = lens.rays()
    eye = np.array(TURNING_EYE_M)
    poses = []
    for number in range(NUM_PHOTOS):
        angle = math.radians(kit.variation.room_turn_deg * number)
        rotation = room.pose(eye, eye + np.array([math.cos(angle), math.sin(angle), -0.1]))
        poses.append((rotation, eye))
        pixels = room.cast(rays, rotation, eye, textures)
        write_jpeg(folder / "images" / f"{number:03d}.jpg", pixels)
    room.tum(folder / "truth.txt", poses)
    return Input(source="images", truth="truth.txt", focal_px=lens.focal_px)


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


def _distorted_angle(angle: Float64Array, distortion: tuple[float, ...]) -> Float64Array:
    """Radius in the image over the focal length (Kannala and Brandt, 2006)."""
    powers = (factor * angle ** (2 * order) for order, factor in enumerate(distortion, start=1))
    return np.asarray(angle * (1.0 + sum(powers)))


def _undistorted_angle(radius: Float64Array, distortion: tuple[float, ...]) -> Float64Array:
    """The angle to the optical axis, up to half a turn; the inverse, from a fine table."""
    if not any(distortion):
        return radius
    angles = np.linspace(0.0, np.pi, _NUM_ANGLES)
    radii = _distorted_angle(angles, distortion)
    rising = int(np.argmax(np.diff(radii) <= 0)) or _NUM_ANGLES
    return np.asarray(np.interp(radius, radii[:rising], angles[:rising]))


def _opencv_matrix(name: str, values: list[float], *, rows: int, columns: int) -> str:
    data = ", ".join(f"{value:.9g}" for value in values)
    return (
        f"{name}: !!opencv-matrix\n   rows: {rows}\n   cols: {columns}\n   dt: d\n"
        f"   data: [ {data} ]\n"
    )
