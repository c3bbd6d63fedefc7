"""Absolute pose: a view posed against 3D points, by sampling or from a nearby pose.

Stateless and deterministic: COLMAP's sampler gets a seed. Pixels follow COLMAP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pycolmap
from numpy.typing import NDArray

from engine.config import RegistrationConfig
from engine.geometry import image_scale, rotation_from_vector, transform_points
from engine.types import Float64Array

_MIN_POINTS_FOR_POSE = 6
_MAX_TRIALS = 3000  # of the sampling
_MIN_DEPTH = 1e-9  # nearer points, and those behind, are not seen
# At a focal length of 500 px 0.05 px; a hundred points leave ten to twenty times that open.
_CONVERGED_RAD = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AbsolutePose:
    """The pose of a view and the points that agree with it."""

    cam_from_world: Float64Array  # (3, 4)
    inlier_mask: NDArray[np.bool_]  # (N,)

    @property
    def num_inliers(self) -> int:
        """Number of points that agree."""
        return int(self.inlier_mask.sum())


def estimate_absolute_pose(
    points_xy: Float64Array,
    points3D_in_world: Float64Array,
    *,
    camera: pycolmap.Camera,
    config: RegistrationConfig,
    seed: int,
    max_num_trials: int = _MAX_TRIALS,
) -> AbsolutePose | None:
    """Poses a view by LO-RANSAC over 2D-3D correspondences (N, 2), (N, 3), then refines it.

    Returns:
        The pose with its inliers, however few; None when there is no pose at all.
    """
    if len(points_xy) < _MIN_POINTS_FOR_POSE:
        return None
    options = pycolmap.AbsolutePoseEstimationOptions()
    options.ransac.max_error = config.max_error_px * image_scale(camera.width, camera.height)
    options.ransac.min_inlier_ratio = config.min_inlier_ratio
    options.ransac.random_seed = seed
    options.ransac.max_num_trials = max_num_trials
    estimate = pycolmap.estimate_and_refine_absolute_pose(
        points_xy, points3D_in_world, camera, options
    )
    if estimate is None:
        return None
    cam_from_world = np.asarray(estimate["cam_from_world"].matrix())
    if not np.isfinite(cam_from_world).all():
        return None
    return AbsolutePose(
        cam_from_world=cam_from_world,
        inlier_mask=np.asarray(estimate["inlier_mask"], dtype=bool),
    )


def reprojection_errors_px(
    cam_from_world: Float64Array,
    points3D_in_world: Float64Array,
    *,
    points_xy: Float64Array,
    camera: pycolmap.Camera,
) -> Float64Array:
    """How far points (N, 3) project from their keypoints (N, 2), (N,); inf where they do not."""
    points = transform_points(cam_from_world, points3D_in_world)
    projected_xy = np.asarray(camera.img_from_cam(points)).reshape(-1, 2)
    offsets = projected_xy - points_xy
    return np.asarray(np.linalg.norm(np.nan_to_num(offsets, nan=np.inf), axis=1))


def refine_absolute_pose(
    cam_from_world: Float64Array,
    *,
    image_plane_xy: Float64Array,
    points3D_in_world: Float64Array,
    max_error: float,
    num_iterations: int = 8,
) -> AbsolutePose | None:
    """Refines a nearby pose by Gauss-Newton on robustly weighted reprojection errors.

    Cheap enough for every video frame: the previous frame's pose is close, so no sampling is
    needed. Weights follow Cauchy's loss with scale ``max_error`` / 2.

    Args:
        cam_from_world: (3, 4) starting pose.
        image_plane_xy: (N, 2) undistorted points on the plane z = 1 of the camera.
        points3D_in_world: (N, 3).
        max_error: inlier bound on the plane z = 1, px divided by focal length.
        num_iterations: at most so many steps.

    Returns:
        The pose and which points agree with it, or None when the problem has no solution.
    """
    # Lens distortion cannot be undone everywhere: such points are not finite, and outliers.
    finite = np.isfinite(image_plane_xy).all(axis=1)
    observed, in_world = image_plane_xy[finite].T, points3D_in_world[finite].T
    pose = cam_from_world
    for _ in range(num_iterations):
        points, observed_xy = _transformed(pose, in_world), observed
        in_front = points[2] > _MIN_DEPTH
        num_in_front = int(np.count_nonzero(in_front))
        if num_in_front < _MIN_POINTS_FOR_POSE:
            return None
        if num_in_front < len(in_front):
            points, observed_xy = points[:, in_front], observed[:, in_front]
        residuals, jacobian = _image_plane_errors(points, observed_xy)
        step = _robust_step(residuals, jacobian, loss_scale=0.5 * max_error)
        if step is None:
            return None
        pose = _moved(pose, step)
        if _has_converged(step, distance=float(points[2].sum()) / num_in_front):
            break
    points = _transformed(pose, points3D_in_world.T)
    in_front = points[2] > _MIN_DEPTH
    with np.errstate(divide="ignore", invalid="ignore"):
        offsets = points[:2] / points[2] - image_plane_xy.T
    is_inlier = (offsets * offsets).sum(axis=0) < max_error**2
    return AbsolutePose(cam_from_world=pose, inlier_mask=is_inlier & in_front)


def refine_absolute_pose_on_rays(
    cam_from_world: Float64Array,
    *,
    rays_in_cam: Float64Array,
    points3D_in_world: Float64Array,
    max_error_rad: float,
    num_iterations: int = 8,
) -> AbsolutePose | None:
    """`refine_absolute_pose` for cameras that see beyond the plane z = 1.

    Errors are those of directions, in the tangent plane of each observed ray.

    Args:
        cam_from_world: (3, 4) starting pose.
        rays_in_cam: (N, 3) unit viewing rays; those that are not finite are outliers.
        points3D_in_world: (N, 3).
        max_error_rad: inlier bound.
        num_iterations: at most so many steps.

    Returns:
        The pose and which points agree with it, or None when the problem has no solution.
    """
    finite = np.isfinite(rays_in_cam).all(axis=1)
    rays = rays_in_cam[finite]
    if len(rays) < _MIN_POINTS_FOR_POSE:
        return None
    tangents, points3D_finite = _tangent_planes(rays), points3D_in_world[finite]
    pose = cam_from_world
    for _ in range(num_iterations):
        points = transform_points(pose, points3D_finite)
        distances = np.linalg.norm(points, axis=1)
        is_ahead = (distances > _MIN_DEPTH) & ((points * rays).sum(axis=1) > 0.0)
        if int(is_ahead.sum()) < _MIN_POINTS_FOR_POSE:
            return None
        residuals, jacobian = _ray_errors(points[is_ahead], tangents[is_ahead])
        step = _robust_step(residuals, jacobian, loss_scale=0.5 * max_error_rad)
        if step is None:
            return None
        pose = _moved(pose, step)
        if _has_converged(step, distance=float(distances[is_ahead].mean())):
            break
    points = transform_points(pose, points3D_in_world)
    sines = np.linalg.norm(np.cross(points, rays_in_cam), axis=1)
    angles = np.arctan2(sines, (points * rays_in_cam).sum(axis=1))
    return AbsolutePose(cam_from_world=pose, inlier_mask=angles < max_error_rad)


def _tangent_planes(rays: Float64Array) -> Float64Array:
    """Two directions (N, 2, 3) at right angles to each unit ray (N, 3) and to each other."""
    axes = np.eye(3)[np.abs(rays).argmin(axis=1)]  # the axis that is least along the ray
    first = np.cross(rays, axes)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    return np.stack([first, np.cross(rays, first)], axis=1)


def _ray_errors(
    points_in_cam: Float64Array, tangents: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Errors (2, N) of the directions of points (N, 3), and their Jacobian (6, 2, N)."""
    inverse = 1.0 / np.linalg.norm(points_in_cam, axis=1)
    directions = points_in_cam * inverse[:, None]
    residuals = np.einsum("nij,nj->ni", tangents, directions)
    # A direction changes by what of a small motion is at right angles to it.
    by_motion = tangents - residuals[:, :, None] * directions[:, None, :]
    by_rotation = np.cross(directions[:, None, :], by_motion)
    jacobian = np.concatenate([by_rotation, by_motion * inverse[:, None, None]], axis=2)
    return residuals.T, np.asarray(jacobian.T)


def _transformed(cam_from_world: Float64Array, points3D_in_world: Float64Array) -> Float64Array:
    """Points (3, N) of the world in the camera."""
    points: Float64Array = cam_from_world[:, :3] @ points3D_in_world
    points += cam_from_world[:, 3:]
    return points


def _image_plane_errors(
    points_in_cam: Float64Array, observed_xy: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Reprojection errors (2, N) of points (3, N), (2, N), and their Jacobian (6, 2, N)."""
    inverse = 1.0 / points_in_cam[2]
    xy = points_in_cam[:2] * inverse
    x, y = xy
    jacobian = np.empty((6, 2, len(x)))
    jacobian[0] = -y * xy
    jacobian[0, 1] -= 1.0
    jacobian[1] = x * xy
    jacobian[1, 0] += 1.0
    jacobian[2, 0], jacobian[2, 1] = -y, x
    jacobian[3, 0], jacobian[3, 1] = inverse, 0.0
    jacobian[4, 0], jacobian[4, 1] = 0.0, inverse
    jacobian[5] = -inverse * xy
    return xy - observed_xy, jacobian


def _robust_step(
    residuals: Float64Array, jacobian: Float64Array, *, loss_scale: float
) -> Float64Array | None:
    """The Gauss-Newton step (6,) on residuals (2, N) under Cauchy's loss.

    Args:
        residuals: (2, N).
        jacobian: (6, 2, N) by a rotation vector, then a translation, both on the camera's side.
        loss_scale: in units of the residuals.

    Returns:
        None when the residuals do not determine a step.
    """
    weights = 1.0 / (1.0 + (residuals * residuals).sum(axis=0) / loss_scale**2)
    weighted = (jacobian * weights).reshape(6, -1)
    try:
        step = np.linalg.solve(weighted @ jacobian.reshape(6, -1).T, weighted @ -residuals.ravel())
    except np.linalg.LinAlgError:
        return None
    return step if math.isfinite(step.sum()) else None


def _moved(cam_from_world: Float64Array, step: Float64Array) -> Float64Array:
    """A pose (3, 4) after a step (6,)."""
    moved: Float64Array = rotation_from_vector(step[:3]) @ cam_from_world
    moved[:, 3] += step[3:]
    return moved


def _has_converged(step: Float64Array, *, distance: float) -> bool:
    """Whether a step (6,) hardly moves the image of points so far away."""
    turned, moved = np.abs(step).reshape(2, 3).max(axis=1)
    return bool(max(turned, moved / distance) < _CONVERGED_RAD)
