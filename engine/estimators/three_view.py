"""Three views that agree: whether the matches of three images come from one rigid scene.

Matches of two images that share nothing can agree on an epipolar geometry, and with enough of them
on any. Three relative poses do not agree by chance: turning from the first view to the second, the
third and back must end where it began (rotation cycles: Zach et al., CVPR 2010), and a third view
that is posed against the points of the other two must have its own matches on the epipolar lines.
Stateless and deterministic; works on viewing rays, so for cameras of any model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pycolmap

from engine.config import RegistrationConfig
from engine.estimators.absolute_pose import estimate_absolute_pose
from engine.estimators.lenses import camera_focal_px, unit_rays
from engine.estimators.two_view_geometry import epipolar_angles_rad
from engine.geometry import compose_poses, image_scale, invert_pose, rotation_angle_rad
from engine.types import BoolArray, Float64Array, Int64Array

MAX_CYCLE_RAD = math.radians(15.0)  # twice what relative poses of few matches are off
MIN_POINTS = 8  # that the third view must see of the base pair to be posed
MIN_INLIERS = 12  # of its pose
MIN_SHARE = 0.8  # of the matches of each pair with the third view, on their epipolar lines
_MAX_ERROR_PX = 6.0  # from an epipolar line or a point, at an image edge of 1000 px
_POSING = RegistrationConfig(max_error_px=8.0)
_MAX_TRIALS = 500
_MAX_ROWS = 400  # matches of a pair that are examined, spread over all of them
_MIN_SINE = 1e-5  # between two rays: parallel ones meet nowhere


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class View:
    """The keypoints of an image and its camera."""

    camera: pycolmap.Camera  # read only
    points_xy: Float64Array  # (N, 2) px
    rays: Float64Array  # (N, 3) unit, NaN where there is none

    @classmethod
    def of(cls, camera: pycolmap.Camera, points_xy: Float64Array) -> View:
        """The view of a camera; px become rays by its present calibration."""
        return cls(camera=camera, points_xy=points_xy, rays=unit_rays(camera, points_xy))

    @property
    def max_error_rad(self) -> float:
        """How far a match may be off."""
        scale = image_scale(self.camera.width, self.camera.height)
        return _MAX_ERROR_PX * scale / camera_focal_px(self.camera)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreeViewAgreement:
    """How well three views agree."""

    num_inliers: int  # points of the base pair that agree on the pose of the third view
    share: float  # of the matches with the third view, on their epipolar lines; the lower of two

    @property
    def holds(self) -> bool:
        """Whether they show one scene."""
        return self.num_inliers >= MIN_INLIERS and self.share >= MIN_SHARE


def cycle_angle_rad(
    b_from_a: Float64Array, c_from_b: Float64Array, c_from_a: Float64Array
) -> float:
    """How far three relative poses (3, 4) are from turning back to where they began, rad."""
    return rotation_angle_rad(c_from_a[:, :3], c_from_b[:, :3] @ b_from_a[:, :3])


def three_view_agreement(
    views: tuple[View, View, View],
    *,
    matches_ab: Int64Array,
    matches_ac: Int64Array,
    matches_bc: Int64Array,
    b_from_a: Float64Array,
    seed: int,
) -> ThreeViewAgreement:
    """Poses view c against the points of views a and b, and looks where its matches end.

    Args:
        views: a, b and c.
        matches_ab: rows (M, 2) of keypoints.
        matches_ac: rows (K, 2).
        matches_bc: rows (L, 2).
        b_from_a: relative pose (3, 4); the length of its translation does not matter.
        seed: of the sampling.

    Returns:
        No inliers where c sees fewer than `MIN_POINTS` points of a and b, or has no pose.
    """
    view_a, view_b, view_c = views
    none = ThreeViewAgreement(num_inliers=0, share=0.0)
    rows_ab, rows_c = _through(views, matches_ab, matches_ac=matches_ac, matches_bc=matches_bc)
    if len(rows_c) < MIN_POINTS:
        return none
    points_in_a, is_sound = _triangulated(view_a, view_b, rows_ab, b_from_a=b_from_a)
    points_in_a, rows_c = points_in_a[is_sound], rows_c[is_sound]
    if len(rows_c) < MIN_POINTS:
        return none
    pose = estimate_absolute_pose(
        view_c.points_xy[rows_c],
        points_in_a,
        camera=view_c.camera,
        config=_POSING,
        seed=seed,
        max_num_trials=_MAX_TRIALS,
    )
    if pose is None or pose.num_inliers < MIN_POINTS:
        return none
    c_from_a = pose.cam_from_world
    c_from_b = compose_poses(c_from_a, invert_pose(b_from_a))
    share = min(
        _share_on_lines(view_a, view_c, matches_ac, c_from_a),
        _share_on_lines(view_b, view_c, matches_bc, c_from_b),
    )
    return ThreeViewAgreement(num_inliers=len(np.unique(rows_c[pose.inlier_mask])), share=share)


def _through(
    views: tuple[View, View, View],
    matches_ab: Int64Array,
    *,
    matches_ac: Int64Array,
    matches_bc: Int64Array,
) -> tuple[Int64Array, Int64Array]:
    """Matches (K, 2) of a and b that c sees, and where (K,); not those that lead to two places."""
    c_of_a = np.full(len(views[0].points_xy), -1)
    c_of_b = np.full(len(views[1].points_xy), -1)
    c_of_a[matches_ac[:, 0]] = matches_ac[:, 1]
    c_of_b[matches_bc[:, 0]] = matches_bc[:, 1]
    by_a, by_b = c_of_a[matches_ab[:, 0]], c_of_b[matches_ab[:, 1]]
    rows_c = np.maximum(by_a, by_b)
    seen = np.flatnonzero((rows_c >= 0) & ((by_a < 0) | (by_b < 0) | (by_a == by_b)))
    seen = _spread(seen)
    return matches_ab[seen], rows_c[seen]


def _triangulated(
    view_a: View, view_b: View, rows: Int64Array, *, b_from_a: Float64Array
) -> tuple[Float64Array, BoolArray]:
    """Points (K, 3) in a's frame half way between their rays, and which of them are sound (K,)."""
    rays_b = view_b.rays[rows[:, 1]]
    turned = view_a.rays[rows[:, 0]] @ b_from_a[:, :3].T
    translation = b_from_a[:, 3]
    normals = np.cross(turned, rays_b)
    sines2 = (normals**2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        depth_a = (np.cross(rays_b, translation) * normals).sum(axis=1) / sines2
        depth_b = (np.cross(turned, translation) * normals).sum(axis=1) / sines2
        points_in_b = (depth_a[:, None] * turned + translation + depth_b[:, None] * rays_b) / 2.0
        points_in_a = (points_in_b - translation) @ b_from_a[:, :3]
        is_sound = (
            (sines2 > _MIN_SINE**2)
            & (depth_a > 0.0)
            & (depth_b > 0.0)
            & (_angles_rad(points_in_b, rays_b) <= view_b.max_error_rad)
            & (_angles_rad(points_in_b - translation, turned) <= view_a.max_error_rad)
        )
    return points_in_a, np.asarray(is_sound & np.isfinite(points_in_a).all(axis=1))


def _angles_rad(vectors: Float64Array, rays: Float64Array) -> Float64Array:
    """Angles (K,) between vectors (K, 3) and unit rays (K, 3)."""
    sines = np.linalg.norm(np.cross(vectors, rays), axis=1)
    return np.asarray(np.arctan2(sines, (vectors * rays).sum(axis=1)))


def _share_on_lines(
    view1: View, view2: View, matches: Int64Array, cam2_from_cam1: Float64Array
) -> float:
    """Share of matches (M, 2) that both views see on their epipolar lines, 0..1."""
    rows = _spread(np.arange(len(matches)))
    rays1, rays2 = view1.rays[matches[rows, 0]], view2.rays[matches[rows, 1]]
    is_seen = np.isfinite(rays1).all(axis=1) & np.isfinite(rays2).all(axis=1)
    rays1, rays2 = rays1[is_seen], rays2[is_seen]
    if not len(rays1):
        return 0.0
    there = epipolar_angles_rad(rays1, rays2, cam2_from_cam1=cam2_from_cam1)
    back = epipolar_angles_rad(rays2, rays1, cam2_from_cam1=invert_pose(cam2_from_cam1))
    is_near = (there <= view2.max_error_rad) & (back <= view1.max_error_rad)
    return float(is_near.mean())


def _spread(rows: Int64Array) -> Int64Array:
    """Some of many rows, evenly."""
    if len(rows) <= _MAX_ROWS:
        return rows
    return rows[np.linspace(0, len(rows) - 1, _MAX_ROWS).astype(np.int64)]
