"""Lenses: viewing rays of any camera model, and which lenses need them.

A camera that is close to a pinhole is handled in px and on the plane z = 1, which is fast. A wide
lens (a fisheye, a spherical image, strong known distortion) sees what has no place on that plane,
and its epipolar curves are no lines: such cameras are handled by their viewing rays.
"""

from __future__ import annotations

import math

import numpy as np
import pycolmap

from engine.camera_models import CAMERA_MODELS, LensKind
from engine.geometry import image_scale
from engine.types import Float64Array, Intrinsics

_WIDE_KINDS = (LensKind.FISHEYE, LensKind.SPHERICAL)
_MODELS_OF_LARGE_PARAMETERS = frozenset(
    {"FULL_OPENCV", "FOV", "SIMPLE_DIVISION", "DIVISION", "EUCM"}
)
_MAX_ROUND_TRIP_PX = 0.1
_MAX_DISPLACEMENT_PX = 3.0  # at an image edge of 1000 px: as far as a match from its line
_FISHEYE_EDGE_RAD = math.radians(118.0)  # of view along the longer edge: an action camera's "wide"
_STEPS_TO_CENTER = 41
_GRID_PER_EDGE = 9  # places in the image at which distortion is looked up


def fisheye_focal_px(width: int, height: int) -> float:
    """The focal length in px that a fisheye image of a size most likely has, knowing no more."""
    return max(width, height) / _FISHEYE_EDGE_RAD


def lens_kind(camera: pycolmap.Camera) -> LensKind:
    """What kind of lens a camera's model is for."""
    return CAMERA_MODELS[camera.model_name].kind


def is_wide(camera: pycolmap.Camera) -> bool:
    """Whether a camera's model is of a kind that a pinhole never comes close to."""
    return lens_kind(camera) in _WIDE_KINDS


def uses_rays(camera: pycolmap.Camera) -> bool:
    """Whether a camera's model can see what has no place on the plane z = 1, or hardly has one."""
    return lens_kind(camera) is not LensKind.PERSPECTIVE


def has_small_parameters(camera: pycolmap.Camera) -> bool:
    """Whether distortion parameters above 1 can only be an error in a camera's model.

    Those of a rational or unified model may well be larger.
    """
    return camera.model_name not in _MODELS_OF_LARGE_PARAMETERS


def is_far_from_pinhole(camera: pycolmap.Camera) -> bool:
    """Whether no fundamental matrix describes the pairs of a camera.

    It describes none of a fisheye or a spherical image, nor of a lens that displaces some pixel
    beyond what verification allows from where a pinhole of the same focal length would see it.

    Args:
        camera: with a calibration that is known, not one being searched for.
    """
    if is_wide(camera):
        return True
    bound_px = _MAX_DISPLACEMENT_PX * image_scale(camera.width, camera.height)
    points_xy = image_grid(camera.width, camera.height, per_edge=_GRID_PER_EDGE)
    plane_xy = np.asarray(camera.cam_from_img(points_xy))
    straight_xy = plane_xy * _focal_lengths_px(camera) + principal_point(camera)
    displacement_px = np.linalg.norm(straight_xy - points_xy, axis=1)
    return not bool((displacement_px <= bound_px).all())  # no place on z = 1 is far, too


def camera_focal_px(camera: pycolmap.Camera) -> float:
    """A camera's scale: px per unit of tangent, or of angle, about its optical axis."""
    if lens_kind(camera) is LensKind.SPHERICAL:
        return float(camera.width) / (2.0 * math.pi)
    return float(camera.mean_focal_length())


def principal_point(camera: pycolmap.Camera) -> tuple[float, float]:
    """Where a camera's optical axis meets the image, px."""
    if lens_kind(camera) is LensKind.SPHERICAL:
        return camera.width / 2.0, camera.height / 2.0
    return float(camera.principal_point_x), float(camera.principal_point_y)


def viewing_rays(camera: pycolmap.Camera, points_xy: Float64Array) -> Float64Array:
    """Viewing rays (N, 3) of points (N, 2) px in the camera's frame; NaN where there is none.

    They have unit length where the model needs rays, and else end on the plane z = 1.
    """
    if uses_rays(camera):
        return unit_rays(camera, points_xy)
    plane_xy = np.asarray(camera.cam_from_img(points_xy)).reshape(-1, 2)
    return np.hstack([plane_xy, np.ones((len(plane_xy), 1))])


def unit_rays(camera: pycolmap.Camera, points_xy: Float64Array) -> Float64Array:
    """Viewing rays (N, 3) of unit length of points (N, 2) px; NaN where there is none.

    Beyond 90 degrees COLMAP's fisheyes give a ray that is not projected back to its point.
    """
    points_xy = np.asarray(points_xy, np.float64)
    rays: Float64Array = np.array(camera.cam_ray_from_img(points_xy)).reshape(-1, 3)
    if lens_kind(camera) is LensKind.FISHEYE and len(rays):
        back_px = np.linalg.norm(np.asarray(camera.img_from_cam(rays)) - points_xy, axis=1)
        rays[~(back_px < _MAX_ROUND_TRIP_PX)] = np.nan
    return rays


def corner_rays(camera: pycolmap.Camera) -> Float64Array:
    """What a viewer draws of a wide lens: unit rays (4, 3) to the image corners, clockwise.

    Where the lens sees nothing in a corner, the ray is the last one on the way there. NaN for a
    lens like a pinhole, 0 for an image of everything around.
    """
    kind = lens_kind(camera)
    if kind is LensKind.PERSPECTIVE:
        return np.full((4, 3), np.nan)
    if kind is LensKind.SPHERICAL:
        return np.zeros((4, 3))
    center = np.array(principal_point(camera))
    corners_xy = np.array([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
    corners_xy *= (camera.width, camera.height)
    ways = np.linspace(1.0, 0.0, _STEPS_TO_CENTER)
    points_xy = center + ways[:, None, None] * (corners_xy - center)
    rays = unit_rays(camera, points_xy.reshape(-1, 2)).reshape(_STEPS_TO_CENTER, 4, 3)
    first_seen = np.isfinite(rays).all(axis=2).argmax(axis=0)
    return np.asarray(rays[first_seen, np.arange(4)])


def border_rays(camera: pycolmap.Camera) -> Float64Array:
    """Unit rays (8, 3) to the image's corners and the middles of its edges, line by line.

    NaN where the lens sees nothing.
    """
    grid = image_grid(camera.width, camera.height, per_edge=3)
    return unit_rays(camera, np.delete(grid, 4, axis=0))


def image_grid(width: int, height: int, *, per_edge: int) -> Float64Array:
    """Points (per_edge ** 2, 2) px that cover an image evenly, borders included."""
    x, y = np.meshgrid(np.linspace(0.0, width, per_edge), np.linspace(0.0, height, per_edge))
    return np.column_stack([x.ravel(), y.ravel()])


def camera_of(intrinsics: Intrinsics) -> pycolmap.Camera:
    """COLMAP's camera of frozen intrinsics."""
    return pycolmap.Camera(
        model=intrinsics.model,
        width=intrinsics.width,
        height=intrinsics.height,
        params=intrinsics.params,
    )


def intrinsics_of(camera: pycolmap.Camera, *, is_wide: bool) -> Intrinsics:
    """A frozen copy of a camera's calibration, and whether its pairs are verified on rays."""
    return Intrinsics(
        model=camera.model_name,
        width=camera.width,
        height=camera.height,
        params=tuple(float(value) for value in camera.params),
        is_wide=is_wide,
    )


def _focal_lengths_px(camera: pycolmap.Camera) -> tuple[float, float]:
    return float(camera.focal_length_x), float(camera.focal_length_y)
