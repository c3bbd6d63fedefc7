"""COLMAP's camera models by name: how many parameters each has, and what kind of lens it is.

The table stands here because the configuration is checked without COLMAP; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, get_args

CameraModelName = Literal[
    "SIMPLE_PINHOLE",
    "PINHOLE",
    "SIMPLE_RADIAL",
    "RADIAL",
    "OPENCV",
    "FULL_OPENCV",
    "FOV",
    "SIMPLE_DIVISION",
    "DIVISION",
    "EUCM",
    "SIMPLE_FISHEYE",
    "FISHEYE",
    "SIMPLE_RADIAL_FISHEYE",
    "RADIAL_FISHEYE",
    "OPENCV_FISHEYE",
    "THIN_PRISM_FISHEYE",
    "RAD_TAN_THIN_PRISM_FISHEYE",
    "EQUIRECTANGULAR",
]

CAMERA_MODEL_NAMES: tuple[CameraModelName, ...] = get_args(CameraModelName)


class LensKind(StrEnum):
    """How a model's image height grows with the angle from the optical axis."""

    PERSPECTIVE = "perspective"  # its tangent, bent by a distortion that is small for most lenses
    UNIFIED = "unified"  # one parameter leads from a perspective to wide lenses
    FISHEYE = "fisheye"  # the angle itself, and its powers
    SPHERICAL = "spherical"  # the image is the whole sphere, longitude by latitude


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraModel:
    """One of COLMAP's models."""

    num_params: int
    kind: LensKind
    num_positive: int = 1  # leading parameters above 0: focal lengths, or the size of a sphere


CAMERA_MODELS: Mapping[str, CameraModel] = {
    "SIMPLE_PINHOLE": CameraModel(num_params=3, kind=LensKind.PERSPECTIVE),
    "PINHOLE": CameraModel(num_params=4, kind=LensKind.PERSPECTIVE, num_positive=2),
    "SIMPLE_RADIAL": CameraModel(num_params=4, kind=LensKind.PERSPECTIVE),
    "RADIAL": CameraModel(num_params=5, kind=LensKind.PERSPECTIVE),
    "OPENCV": CameraModel(num_params=8, kind=LensKind.PERSPECTIVE, num_positive=2),
    "FULL_OPENCV": CameraModel(num_params=12, kind=LensKind.PERSPECTIVE, num_positive=2),
    "FOV": CameraModel(num_params=5, kind=LensKind.UNIFIED, num_positive=2),
    "SIMPLE_DIVISION": CameraModel(num_params=4, kind=LensKind.UNIFIED),
    "DIVISION": CameraModel(num_params=5, kind=LensKind.UNIFIED, num_positive=2),
    "EUCM": CameraModel(num_params=6, kind=LensKind.UNIFIED, num_positive=2),
    "SIMPLE_FISHEYE": CameraModel(num_params=3, kind=LensKind.FISHEYE),
    "FISHEYE": CameraModel(num_params=4, kind=LensKind.FISHEYE, num_positive=2),
    "SIMPLE_RADIAL_FISHEYE": CameraModel(num_params=4, kind=LensKind.FISHEYE),
    "RADIAL_FISHEYE": CameraModel(num_params=5, kind=LensKind.FISHEYE),
    "OPENCV_FISHEYE": CameraModel(num_params=8, kind=LensKind.FISHEYE, num_positive=2),
    "THIN_PRISM_FISHEYE": CameraModel(num_params=12, kind=LensKind.FISHEYE, num_positive=2),
    "RAD_TAN_THIN_PRISM_FISHEYE": CameraModel(num_params=16, kind=LensKind.FISHEYE, num_positive=2),
    "EQUIRECTANGULAR": CameraModel(num_params=2, kind=LensKind.SPHERICAL, num_positive=2),
}
