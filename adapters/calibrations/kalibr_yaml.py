"""Calibrations as Kalibr writes them: a camchain of ``cam0``, ``cam1``, ... in YAML.

Kalibr's pixels are OpenCV's: its principal points move by half a pixel. Models are those of
https://github.com/ethz-asl/kalibr/wiki/supported-models; one that COLMAP has not exactly is
refused.
"""

from __future__ import annotations

from adapters.calibrations.calibration import (
    OPENCV_PIXEL_OFFSET,
    Calibration,
    checked_calibration,
)
from adapters.calibrations.fields import Fields, first_of, numbers, sections_of, whole_number
from engine.errors import ConfigError

_NUM_INTRINSICS = {"pinhole": 4, "eucm": 6, "omni": 5, "ds": 6}
_PINHOLES = {  # by distortion model: COLMAP's model, and the number of coefficients
    "none": ("PINHOLE", 0),
    "radtan": ("OPENCV", 4),
    "equidistant": ("OPENCV_FISHEYE", 4),
    "fov": ("FOV", 1),
}


def looks_like_kalibr(fields: Fields) -> bool:
    """Whether the fields, or one of their sections, are a camera of Kalibr."""
    return any(
        "camera_model" in section and "intrinsics" in section
        for section in (fields, *sections_of(fields).values())
    )


def read_kalibr(fields: Fields, *, origin: str) -> list[Calibration]:
    """The cameras of a camchain, named as there.

    Raises:
        ConfigError: one of them has no equal in COLMAP, or is none.
    """
    if "camera_model" in fields:
        return [_camera(fields, name="", origin=origin)]
    return [
        _camera(section, name=name, origin=f"{origin}#{name}")
        for name, section in sections_of(fields).items()
        if "camera_model" in section
    ]


def _camera(fields: Fields, *, name: str, origin: str) -> Calibration:
    camera_model = str(fields["camera_model"])
    distortion_model = str(first_of(fields, ["distortion_model"]) or "none").lower()
    size = numbers(first_of(fields, ["resolution"]) or [], what="resolution", origin=origin)
    if len(size) != 2:
        raise ConfigError(f"{origin}: resolution is the width and the height of the images")
    width, height = (whole_number(edge, what="resolution", origin=origin) for edge in size)
    intrinsics = numbers(fields.get("intrinsics") or [], what="intrinsics", origin=origin)
    coeffs = numbers(
        first_of(fields, ["distortion_coeffs"]) or [], what="distortion_coeffs", origin=origin
    )
    if camera_model not in _NUM_INTRINSICS:
        raise ConfigError(f"{origin}: camera_model {camera_model} is not known")
    expected = _NUM_INTRINSICS[camera_model]
    if len(intrinsics) != expected:
        raise ConfigError(
            f"{origin}: {camera_model} has {expected} intrinsics, {len(intrinsics)} given"
        )
    if camera_model == "pinhole":
        model, params = _pinhole(intrinsics, coeffs, distortion_model, origin=origin)
    else:
        if distortion_model != "none" and any(coeffs):
            raise ConfigError(
                f"{origin}: COLMAP has no equal of {camera_model} with {distortion_model}"
            )
        model, params = "EUCM", _unified(camera_model, intrinsics, origin=origin)
    params[2] += OPENCV_PIXEL_OFFSET
    params[3] += OPENCV_PIXEL_OFFSET
    return checked_calibration(
        origin=origin, name=name, model=model, width=width, height=height, params=params
    )


def _pinhole(
    intrinsics: list[float], coeffs: list[float], distortion_model: str, *, origin: str
) -> tuple[str, list[float]]:
    """Model and parameters for intrinsics fu, fv, pu, pv."""
    if distortion_model not in _PINHOLES:
        raise ConfigError(f"{origin}: distortion_model {distortion_model} is not known")
    model, num_coeffs = _PINHOLES[distortion_model]
    if distortion_model == "none":
        coeffs = []
    if len(coeffs) != num_coeffs:
        raise ConfigError(
            f"{origin}: {distortion_model} has {num_coeffs} distortion_coeffs, {len(coeffs)} given"
        )
    return model, intrinsics + coeffs


def _unified(camera_model: str, intrinsics: list[float], *, origin: str) -> list[float]:
    """Parameters of EUCM, fx, fy, cx, cy, alpha, beta, of a camera that is one.

    Kalibr's eucm is COLMAP's in another order. Its omni (Mei, 2007) with mirror parameter xi is the
    EUCM of alpha = xi / (1 + xi), beta = 1 and focal lengths divided by 1 + xi. A double sphere is
    one only when its first sphere, xi, is a point.
    """
    if camera_model == "eucm":
        alpha, beta, *pinhole = intrinsics
        return [*pinhole, alpha, beta]
    xi, *rest = intrinsics
    if camera_model == "omni":
        if xi < 0.0:
            raise ConfigError(f"{origin}: omni has an xi of 0 or more, {xi:g} given")
        fu, fv, pu, pv = rest
        return [fu / (1.0 + xi), fv / (1.0 + xi), pu, pv, xi / (1.0 + xi), 1.0]
    if xi != 0.0:
        raise ConfigError(f"{origin}: COLMAP has no equal of camera_model ds (double sphere)")
    alpha, *pinhole = rest
    return [*pinhole, alpha, 1.0]
