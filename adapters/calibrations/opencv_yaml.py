"""Calibrations in the YAML of OpenCV's FileStorage, and in that of ROS (``camera_info``).

OpenCV counts pixels from the first one's centre: its principal points move by half a pixel.
"""

from __future__ import annotations

import re

import numpy as np

from adapters.calibrations.calibration import (
    OPENCV_PIXEL_OFFSET,
    Calibration,
    checked_calibration,
)
from adapters.calibrations.fields import Fields, first_of, numbers, sections_of, whole_number
from engine.errors import ConfigError

_FULL_MATRIX_NAMES = ("camera_matrix", "intrinsic_matrix", "intrinsics_matrix", "mtx")
_SHORT_MATRIX_NAMES = ("K",)
_FULL_COEFFS_NAMES = (
    *("distortion_coefficients", "distortion_coeffs", "dist_coefficients", "dist_coeffs"),
    *("distortion", "dist"),
)
_SHORT_COEFFS_NAMES = ("D",)
_WIDTH_NAMES, _HEIGHT_NAMES = ("image_width", "width"), ("image_height", "height")
_SIZE_NAMES = ("image_size", "img_size", "resolution", "size")
_MODEL_NAMES = (
    *("distortion_model", "camera_model", "projection_model", "lens_model"),
    *("model", "model_type", "camera_type", "calibration_type", "type"),
)
_FISHEYE_NAMES = ("fisheye", "fisheye_model", "is_fisheye", "use_fisheye")
_FISHEYE = re.compile(r"fish-?_?eye|equidistant|kannala", re.IGNORECASE)
_PERSPECTIVE = re.compile(
    r"plumb|brown|rad_?tan|rational|pinhole|perspective|polynomial|opencv|none", re.IGNORECASE
)
_NUM_POLYNOMIAL = 8  # k1 k2 p1 p2 k3 k4 k5 k6; thin prism and tilt come behind them
_MAX_SKEW_RATIO = 1e-9


def looks_like_opencv(fields: Fields) -> bool:
    """Whether the fields, or one of their sections, hold a camera matrix."""
    return any(_has_matrix(section) for section in (fields, *sections_of(fields).values()))


def read_opencv(fields: Fields, text: str, *, origin: str) -> list[Calibration]:
    """The camera of the fields, or the cameras of their sections, named as there.

    Args:
        fields: what the file holds.
        text: the same, with its comments.
        origin: the file, for messages.

    Raises:
        ConfigError: something is missing, of the wrong size, or has no equal in COLMAP.
    """
    if _has_matrix(fields):
        name = str(first_of(fields, ["camera_name", "name"]) or "")
        comments = " ".join(re.findall(r"(?m)#(.*)$", text))
        return [_camera(fields, comments, name=name, origin=origin)]
    return [
        _camera(section, name, name=name, origin=f"{origin}#{name}", size_from=fields)
        for name, section in sections_of(fields).items()
        if _has_matrix(section)
    ]


def _has_matrix(fields: Fields) -> bool:
    return first_of(fields, (*_FULL_MATRIX_NAMES, *_SHORT_MATRIX_NAMES)) is not None


def _camera(
    fields: Fields, comments: str, *, name: str, origin: str, size_from: Fields | None = None
) -> Calibration:
    width, height = _image_size(fields, size_from or {}, origin=origin)
    pinhole = _pinhole_params(fields, origin=origin)
    coeffs = numbers(
        first_of(fields, (*_FULL_COEFFS_NAMES, *_SHORT_COEFFS_NAMES)) or [],
        what="the distortion",
        origin=origin,
    )
    if _is_fisheye(fields, comments, num_coeffs=len(coeffs), origin=origin):
        if len(coeffs) != 4:
            raise ConfigError(
                f"{origin}: a fisheye calibration has 4 distortion coefficients,"
                f" {len(coeffs)} given"
            )
        model, distortion = "OPENCV_FISHEYE", coeffs
    else:
        model, distortion = _perspective_distortion(coeffs, origin=origin)
    return checked_calibration(
        origin=origin,
        name=name,
        model=model,
        width=width,
        height=height,
        params=pinhole + distortion,
    )


def _image_size(fields: Fields, outer: Fields, *, origin: str) -> tuple[int, int]:
    for place in (fields, outer):
        width, height = first_of(place, _WIDTH_NAMES), first_of(place, _HEIGHT_NAMES)
        size = first_of(place, _SIZE_NAMES)
        if isinstance(size, dict) and "data" not in size:
            sides = {str(key): value for key, value in size.items()}
            width, height = first_of(sides, _WIDTH_NAMES), first_of(sides, _HEIGHT_NAMES)
        elif size is not None:
            edges = numbers(size, what="the image size", origin=origin)
            width, height = edges if len(edges) == 2 else (None, None)
        if width is not None and height is not None:
            return (
                whole_number(width, what="image_width", origin=origin),
                whole_number(height, what="image_height", origin=origin),
            )
    raise ConfigError(
        f"{origin}: says not for what size of images; add image_width and image_height"
    )


def _pinhole_params(fields: Fields, *, origin: str) -> list[float]:
    """fx, fy, cx, cy in COLMAP's pixels."""
    values = numbers(
        first_of(fields, (*_FULL_MATRIX_NAMES, *_SHORT_MATRIX_NAMES)),
        what="the camera matrix",
        origin=origin,
    )
    if len(values) != 9:
        raise ConfigError(f"{origin}: the camera matrix has {len(values)} numbers, not 3 x 3")
    matrix = np.array(values).reshape(3, 3)
    if not np.isfinite(matrix).all():
        raise ConfigError(f"{origin}: the camera matrix holds what is no finite number")
    if matrix[1, 0] != 0.0 or not np.allclose(matrix[2], (0.0, 0.0, 1.0)):
        raise ConfigError(f"{origin}: the camera matrix is not [fx 0 cx; 0 fy cy; 0 0 1]")
    if abs(matrix[0, 1]) > _MAX_SKEW_RATIO * abs(matrix[0, 0]):
        raise ConfigError(f"{origin}: the camera matrix has a skew, which COLMAP's models lack")
    (fx, _, cx), (_, fy, cy), _ = matrix.tolist()
    return [fx, fy, cx + OPENCV_PIXEL_OFFSET, cy + OPENCV_PIXEL_OFFSET]


def _perspective_distortion(coeffs: list[float], *, origin: str) -> tuple[str, list[float]]:
    """Model and distortion parameters for OpenCV's coefficients."""
    if not coeffs:
        return "PINHOLE", []
    if len(coeffs) not in {4, 5, 8, 12, 14}:
        raise ConfigError(
            f"{origin}: {len(coeffs)} distortion coefficients; expected 4, 5, 8, 12 or 14"
        )
    if any(coeffs[_NUM_POLYNOMIAL:]):
        raise ConfigError(
            f"{origin}: thin prism or tilted coefficients (s1 to s4, tau), which COLMAP's models"
            " of perspective lenses lack; calibrate without them"
        )
    polynomial = (coeffs + [0.0] * 4)[:_NUM_POLYNOMIAL]
    if any(polynomial[4:]):
        return "FULL_OPENCV", polynomial
    return "OPENCV", polynomial[:4]


def _is_fisheye(fields: Fields, comments: str, *, num_coeffs: int, origin: str) -> bool:
    """Whether the file says that its lens is OpenCV's fisheye model.

    Raises:
        ConfigError: it says nothing, and could mean either.
    """
    words = first_of(fields, _MODEL_NAMES)
    if isinstance(words, str):
        if _FISHEYE.search(words):
            return True
        if not _PERSPECTIVE.search(words):
            raise ConfigError(f"{origin}: the lens model {words[:40]} is not known")
        return False
    mark = first_of(fields, _FISHEYE_NAMES)
    if mark is not None:
        return str(mark).strip().lower() not in {"", "0", "0.0", "false", "no", "off"}
    if num_coeffs == 4 and _FISHEYE.search(" ".join([*fields, comments])):
        return True
    if num_coeffs == 4 and first_of(fields, _FULL_MATRIX_NAMES) is None:
        raise ConfigError(
            f"{origin}: K and 4 coefficients may be of a fisheye or of a perspective lens;"
            " add distortion_model: fisheye, or plumb_bob"
        )
    return False
