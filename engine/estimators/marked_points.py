"""Points that people marked in images, triangulated where poses and calibrations are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pycolmap

from engine.estimators.point_refinement import refine_points
from engine.geometry import camera_center, image_scale
from engine.types import BoolArray, Float64Array, Int64Array, freeze_field

_MAX_ERROR_PX = 6.0  # of a mark against the others, at an edge of 1000 px
_MARK_STD_PX = 0.5  # of a mark at best
_MIN_ANGLE_DEG = 0.5  # between the rays that are farthest apart
_RELATIVE_STEP = 1e-6  # of numeric derivatives, of the distance to the nearest camera


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MarkedPoint:
    """Where a marked point lies in the map. M: its marks."""

    place: Float64Array  # (3,)
    covariance: Float64Array  # (3, 3), of the noise that the marks show
    residuals_px: Float64Array  # (M,) inf: its camera cannot see the point
    agrees: BoolArray  # (M,) marks that agree on the place

    def __post_init__(self) -> None:
        freeze_field(self, "place", (3,), np.float64)
        freeze_field(self, "covariance", (3, 3), np.float64)
        freeze_field(self, "residuals_px", (None,), np.float64, finite=False)
        freeze_field(self, "agrees", (len(self.residuals_px),), np.bool_)

    @property
    def residual_px(self) -> float:
        """Root mean square over the marks that agree."""
        return float(np.sqrt(np.mean(self.residuals_px[self.agrees] ** 2)))


def locate_marked_point(
    marks_xy: Float64Array,
    cameras: Sequence[pycolmap.Camera],
    cam_from_map: Float64Array,
    *,
    seed: int = 0,
) -> MarkedPoint | str:
    """Triangulates a point from its marks; marks that contradict the most of them do not count.

    LO-RANSAC over pairs of marks, then least squares of what agrees.

    Args:
        marks_xy: (M, 2) px.
        cameras: M, of the marks.
        cam_from_map: (M, 3, 4), of the marks.
        seed: of the samples.

    Returns:
        The point, or in words why there is none.
    """
    if len(marks_xy) < 2:
        return "it is marked in fewer than two images of the map"
    limits_px = _MAX_ERROR_PX * np.array([image_scale(one.width, one.height) for one in cameras])
    options = pycolmap.EstimateTriangulationOptions(
        residual_type=pycolmap.TriangulationResidualType.REPROJECTION_ERROR
    )
    options.ransac.max_error = float(limits_px.max())
    options.ransac.random_seed = seed
    found = pycolmap.estimate_triangulation(
        marks_xy, [pycolmap.Rigid3d(pose) for pose in cam_from_map], list(cameras), options
    )
    if found is None:
        return "its marks contradict each other"
    place, agrees = found["xyz"], np.asarray(found["inliers"], np.bool_)
    for _ in range(2):  # the second time with the marks that agree with the first place
        place = _refined(place, np.flatnonzero(agrees), marks_xy, cameras, cam_from_map)
        residuals_px = _residuals_px(place, marks_xy, cameras, cam_from_map)
        agrees = residuals_px <= limits_px
        if agrees.sum() < 2:
            return "its marks contradict each other"
    rows = np.flatnonzero(agrees)
    centers = camera_center(cam_from_map[rows])
    if _widest_angle_deg(place - centers) < _MIN_ANGLE_DEG:
        return "its images see it from the same direction"
    return MarkedPoint(
        place=place,
        covariance=_covariance(place, rows, marks_xy, cameras, cam_from_map),
        residuals_px=residuals_px,
        agrees=agrees,
    )


def _refined(
    place: Float64Array,
    rows: Int64Array,
    marks_xy: Float64Array,
    cameras: Sequence[pycolmap.Camera],
    cam_from_map: Float64Array,
) -> Float64Array:
    def project(points_in_cams: Float64Array) -> Float64Array:
        return _projected(points_in_cams, [cameras[row] for row in rows.tolist()])

    refined = refine_points(
        np.array(place, np.float64)[None],
        np.zeros(1, np.int64),
        cams_from_world=cam_from_map[rows],
        points_xy=marks_xy[rows],
        project=project,
    )
    return np.asarray(refined[0])


def _projected(points_in_cams: Float64Array, cameras: Sequence[pycolmap.Camera]) -> Float64Array:
    """Pixels (M, 2) of points (M, 3), each in its camera; NaN: it cannot see the point."""
    return np.array(
        [
            camera.img_from_cam(point[None])[0]
            for point, camera in zip(points_in_cams, cameras, strict=True)
        ]
    )


def _residuals_px(
    place: Float64Array,
    marks_xy: Float64Array,
    cameras: Sequence[pycolmap.Camera],
    cam_from_map: Float64Array,
) -> Float64Array:
    in_cams = cam_from_map[:, :, :3] @ place + cam_from_map[:, :, 3]
    errors = np.linalg.norm(_projected(in_cams, cameras) - marks_xy, axis=1)
    return np.where(np.isfinite(errors), errors, math.inf)


def _widest_angle_deg(rays: Float64Array) -> float:
    directions = rays / np.linalg.norm(rays, axis=1, keepdims=True)
    return math.degrees(math.acos(float(np.clip((directions @ directions.T).min(), -1.0, 1.0))))


def _covariance(
    place: Float64Array,
    rows: Int64Array,
    marks_xy: Float64Array,
    cameras: Sequence[pycolmap.Camera],
    cam_from_map: Float64Array,
) -> Float64Array:
    """The covariance (3, 3) of a place, by the noise of its marks."""
    own = [cameras[row] for row in rows.tolist()]
    poses = cam_from_map[rows]

    def errors_px(point: Float64Array) -> Float64Array:
        in_cams = poses[:, :, :3] @ point + poses[:, :, 3]
        return np.asarray((_projected(in_cams, own) - marks_xy[rows]).ravel())

    step = _RELATIVE_STEP * float(np.linalg.norm(place - camera_center(poses), axis=1).min())
    jacobian = np.column_stack(
        [(errors_px(place + step * axis) - errors_px(place - step * axis)) for axis in np.eye(3)]
    ) / (2.0 * step)
    freedom = max(2 * len(rows) - 3, 1)
    noise_px = max(float(np.linalg.norm(errors_px(place))) / math.sqrt(freedom), _MARK_STD_PX)
    return np.asarray(noise_px**2 * np.linalg.pinv(jacobian.T @ jacobian))
