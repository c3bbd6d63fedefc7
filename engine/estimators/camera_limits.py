"""Camera limits: which calibrations a lens can have.

A lens keeps the order of rays: the farther a ray is from the axis, the farther from the principal
point it meets the image. Polynomials of distortion do so near the axis only, and adjustments that
lack evidence bend them until they fold. Calibrations are examined numerically, so any of COLMAP's
models can be.
"""

from __future__ import annotations

import numpy as np
import pycolmap

from engine.camera_models import LensKind
from engine.estimators.lenses import lens_kind
from engine.types import Float64Array

FOCAL_RATIOS = (0.2, 30.0)  # of the longer image edge: 136 to 2 degrees of view
WIDE_FOCAL_RATIOS = (0.1, 30.0)  # of models that see beyond 90 degrees from the axis

# Displacement at the image's corner, of the distance that a lens without distortion would give:
# next to nothing through a long lens, more the wider the view.
_LEAST_DISPLACEMENT = 0.02
_BARREL_DISPLACEMENT, _PINCUSHION_DISPLACEMENT = 0.40, 0.20  # more, at 45 degrees from the axis
_POLYNOMIAL_MODELS = ("SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV")

_MIN_SLOPE = 0.15  # of the image's radius over the ray's angle, of that at the centre
_DENSE, _SPARSE = np.linspace(0.0, 2.0, 65)[1:], np.geomspace(2.0, 40.0, 25)[1:]
_WIDEST_RAD = 3.1
_WIDE_ENOUGH_RAD = 1.4
_BISECTIONS = 12
_ROUNDING = 1e-6


def focal_limits_px(camera: pycolmap.Camera) -> tuple[float, float]:
    """Least and most focal length that a camera of this model and size can have, px."""
    low, high = WIDE_FOCAL_RATIOS if _may_be_wide(camera) else FOCAL_RATIOS
    edge_px = max(camera.width, camera.height)
    return low * edge_px, high * edge_px


def lens_flaw(camera: pycolmap.Camera) -> str:
    """What no lens can have about a calibration, in words with figures; "" where all is possible.

    Spherical images have no lens: nothing is wrong with them.
    """
    if camera.is_spherical() or not len(camera.focal_length_idxs()):
        return ""
    if not np.isfinite(camera.params).all():
        return "its calibration is not finite"
    low_px, high_px = focal_limits_px(camera)
    for idx in camera.focal_length_idxs():
        focal_px = float(camera.params[idx])
        if not (1.0 - _ROUNDING) * low_px <= focal_px <= (1.0 + _ROUNDING) * high_px:
            return (
                f"a focal length of {focal_px:.0f} px is not between {low_px:.0f} and"
                f" {high_px:.0f} px"
            )
    return _flaw_of_distortion(camera)


def nearest_possible_distortion(camera: pycolmap.Camera) -> list[float]:
    """Parameters of the camera with as much of its distortion as a lens can have."""
    none = undistorted_params(camera)
    flat = _with_params(camera, none)
    if lens_flaw(flat) or not lens_flaw(camera):
        return none if lens_flaw(camera) else [float(value) for value in camera.params]
    least, most = 0.0, 1.0
    bent = np.asarray(camera.params, np.float64)
    for _ in range(_BISECTIONS):
        share = (least + most) / 2.0
        params = [a + share * (b - a) for a, b in zip(none, bent.tolist(), strict=True)]
        if lens_flaw(_with_params(camera, params)):
            most = share
        else:
            least = share
    return [a + least * (b - a) for a, b in zip(none, bent.tolist(), strict=True)]


def undistorted_params(camera: pycolmap.Camera) -> list[float]:
    """Parameters of the camera as its model begins: without distortion; the rest as it is."""
    fresh = pycolmap.Camera.create_from_model_name(
        1, camera.model_name, 1.0, camera.width, camera.height
    )
    params = [float(value) for value in camera.params]
    for idx in camera.extra_params_idxs():
        params[idx] = float(fresh.params[idx])
    return params


def corner_displacement(camera: pycolmap.Camera) -> float:
    """How far distortion moves the image's corner, of its distance without; barrel is negative.

    0 for models of which a pinhole is no part.
    """
    if camera.model_name not in _POLYNOMIAL_MODELS:
        return 0.0
    displacements = [
        _displacement(camera, corner) for corner in _directions(camera) if np.linalg.norm(corner)
    ]
    return max(displacements, key=abs, default=0.0)


def _may_be_wide(camera: pycolmap.Camera) -> bool:
    """Whether the model can see beyond 90 degrees from the axis."""
    return lens_kind(camera) is not LensKind.PERSPECTIVE


def _with_params(camera: pycolmap.Camera, params: list[float]) -> pycolmap.Camera:
    return pycolmap.Camera(
        model=camera.model_name, width=camera.width, height=camera.height, params=params
    )


def _flaw_of_distortion(camera: pycolmap.Camera) -> str:
    if not len(camera.extra_params_idxs()):
        return ""
    words = _distortion_words(camera)
    if not all(_keeps_order(camera, corner) for corner in _directions(camera)):
        return f"{words} folds rays over before the image's corner"
    displacement = corner_displacement(camera)
    bound = _LEAST_DISPLACEMENT + _corner_slope(camera) * (
        _BARREL_DISPLACEMENT if displacement < 0.0 else _PINCUSHION_DISPLACEMENT
    )
    if abs(displacement) > bound:
        return (
            f"{words} moves the image's corner by {displacement:+.0%}, beyond the {bound:.0%} that"
            " a lens of this view can have"
        )
    return ""


def _distortion_words(camera: pycolmap.Camera) -> str:
    names = [name.strip() for name in camera.params_info.split(",")]
    values = [f"{names[idx]} {camera.params[idx]:.3g}" for idx in camera.extra_params_idxs()]
    return "distortion " + ", ".join(values)


def _center(camera: pycolmap.Camera) -> Float64Array:
    return np.array([camera.principal_point_x, camera.principal_point_y])


def _directions(camera: pycolmap.Camera) -> Float64Array:
    """(4, 2) px from the principal point to where order must hold.

    The corners; the middles of the edges for a fisheye, whose image need not fill the corners.
    """
    width, height = camera.width, camera.height
    if _may_be_wide(camera):
        ends = np.array([(0, height / 2), (width, height / 2), (width / 2, 0), (width / 2, height)])
        far = np.array([width, width, height, height]) >= max(width, height)
        return np.asarray((ends - _center(camera))[far])
    corners = np.array([(0, 0), (width, 0), (0, height), (width, height)], np.float64)
    return np.asarray(corners - _center(camera))


def _corner_slope(camera: pycolmap.Camera) -> float:
    """Tangent of the angle at which the corner is seen without distortion, 1 at most."""
    farthest_px = float(np.linalg.norm(_directions(camera), axis=1).max())
    return min(1.0, farthest_px / float(camera.mean_focal_length()))


def _along(
    camera: pycolmap.Camera, corner: Float64Array
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Rays towards a corner: their angles, tangents or angles without distortion, and radii in px.

    Radii are measured along the direction; NaN where the model sees nothing.
    """
    focal_px = float(camera.mean_focal_length())
    distance_px = float(np.linalg.norm(corner))
    direction = corner / distance_px
    steps = np.concatenate([_DENSE, _SPARSE]) * distance_px / focal_px
    if _may_be_wide(camera):
        angles = steps[steps < _WIDEST_RAD]
        without = angles
    else:
        angles, without = np.arctan(steps), steps
    rays = np.column_stack([np.sin(angles)[:, None] * direction, np.cos(angles)])
    radii = (np.asarray(camera.img_from_cam(rays)) - _center(camera)) @ direction
    return angles, without, radii


def _keeps_order(camera: pycolmap.Camera, corner: Float64Array) -> bool:
    distance_px = float(np.linalg.norm(corner))
    if distance_px == 0.0:
        return True
    angles, _, radii = _along(camera, corner)
    slopes = np.diff(radii, prepend=0.0) / np.diff(angles, prepend=0.0)
    is_rising = slopes >= _MIN_SLOPE * float(camera.mean_focal_length())  # False for NaN
    beyond = np.flatnonzero(radii >= distance_px)
    if len(beyond):
        return bool(is_rising[: beyond[0] + 1].all())
    # COLMAP's wide models end short of the image where they end at right angles to the axis.
    seen = int(np.isfinite(radii).argmin())
    return (
        _may_be_wide(camera)
        and seen > 0
        and bool(angles[seen - 1] > _WIDE_ENOUGH_RAD and is_rising[:seen].all())
    )


def _displacement(camera: pycolmap.Camera, corner: Float64Array) -> float:
    _, without, radii = _along(camera, corner)
    distance_px = float(np.linalg.norm(corner))
    beyond = np.flatnonzero(radii >= distance_px)
    if not len(beyond):
        return -1.0
    last = int(beyond[0])
    undistorted = np.interp(
        distance_px, np.append(0.0, radii[: last + 1]), np.append(0.0, without[: last + 1])
    )
    return float(distance_px / (undistorted * camera.mean_focal_length()) - 1.0)
