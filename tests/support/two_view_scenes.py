"""Points seen by two cameras, with the truth: for tests of geometry and its estimators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pycolmap
from numpy.typing import NDArray

from engine.geometry import rotation_from_vector, rotation_vector_from, transform_points
from engine.types import Float64Array, FrameId, ImagePair, PairMatches

WIDTH, HEIGHT = 1000, 750
FOCAL_PX = 800.0
IDENTITY_POSE = np.eye(4)[:3]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TwoViews:
    """Two views of the same points; rows belong together."""

    points3D_in_world: Float64Array  # (N, 3)
    cam1_from_world: Float64Array  # (3, 4)
    cam2_from_world: Float64Array  # (3, 4)
    points1_xy: Float64Array  # (N, 2) px
    points2_xy: Float64Array  # (N, 2) px, with noise and wrong ones
    is_true: NDArray[np.bool_]  # (N,) False where points2_xy is anywhere in the image


def pinhole(*, focal_px: float = FOCAL_PX) -> pycolmap.Camera:
    """The camera of the scenes: centred, without distortion."""
    return pycolmap.Camera.create_from_model_name(1, "SIMPLE_PINHOLE", focal_px, WIDTH, HEIGHT)


def pose_at(
    center: Sequence[float], *, rotation_vector: Sequence[float] = (0.0, 0.0, 0.0)
) -> Float64Array:
    """The cam_from_world (3, 4) of a camera at ``center``, turned from looking along z."""
    rotation = rotation_from_vector(np.array(rotation_vector, dtype=np.float64))
    return np.column_stack([rotation, -rotation @ np.array(center, dtype=np.float64)])


def box_of_points(num: int, *, seed: int = 0) -> Float64Array:
    """Points (num, 3) in front of a camera at the origin, of all depths from 4 to 9."""
    rng = np.random.default_rng((seed, 10))
    return rng.uniform((-2.0, -1.5, 4.0), (2.0, 1.5, 9.0), (num, 3))


def slanted_plane(num: int, *, seed: int = 0) -> Float64Array:
    """Points (num, 3) on a plane in front of a camera at the origin."""
    points = box_of_points(num, seed=seed)
    points[:, 2] = 6.0 + 0.3 * points[:, 0]
    return points


def project(
    cam_from_world: Float64Array, points3D_in_world: Float64Array, *, focal_px: float = FOCAL_PX
) -> Float64Array:
    """Points (N, 2) px of points (N, 3) in front of the camera."""
    points = transform_points(cam_from_world, points3D_in_world)
    projected: Float64Array = focal_px * points[:, :2] / points[:, 2:] + (WIDTH / 2, HEIGHT / 2)
    return projected


def two_views(
    points3D_in_world: Float64Array,
    *,
    cam2_from_world: Float64Array,
    focal_px: float = FOCAL_PX,
    noise_px: float = 0.0,
    wrong_ratio: float = 0.0,
    seed: int = 0,
) -> TwoViews:
    """Sees points (N, 3) from the origin and from a second camera.

    Args:
        points3D_in_world: what is seen.
        cam2_from_world: (3, 4).
        focal_px: of both cameras.
        noise_px: standard deviation in both images.
        wrong_ratio: share of points that are anywhere in the second image.
        seed: of noise and wrong points.
    """
    rng = np.random.default_rng((seed, 11))
    num = len(points3D_in_world)
    is_true = rng.permutation(num) >= round(wrong_ratio * num)
    points1_xy = project(IDENTITY_POSE, points3D_in_world, focal_px=focal_px)
    points2_xy = project(cam2_from_world, points3D_in_world, focal_px=focal_px)
    points2_xy[~is_true] = rng.uniform((0.0, 0.0), (WIDTH, HEIGHT), (int((~is_true).sum()), 2))
    return TwoViews(
        points3D_in_world=points3D_in_world,
        cam1_from_world=IDENTITY_POSE,
        cam2_from_world=cam2_from_world,
        points1_xy=points1_xy + rng.normal(scale=noise_px, size=(num, 2)),
        points2_xy=points2_xy + rng.normal(scale=noise_px, size=(num, 2)),
        is_true=is_true,
    )


def tentative_matches(
    points1_xy: Float64Array, points2_xy: Float64Array, *, rows: NDArray[np.int64] | None = None
) -> PairMatches:
    """Matches between keypoints; ``rows`` (N, 2) of the tables, by default k with k."""
    num = len(points1_xy)
    return PairMatches(
        pair=ImagePair(FrameId(1), FrameId(2)),
        matches_idx=np.column_stack([np.arange(num)] * 2) if rows is None else rows,
        points1_xy=points1_xy,
        points2_xy=points2_xy,
        confidence=np.ones(num, np.float32),
    )


def angle_between_rad(one: Float64Array, other: Float64Array) -> float:
    """The angle between two directions (3,)."""
    return float(np.arctan2(np.linalg.norm(np.cross(one, other)), one @ other))


def rotation_error_rad(one: Float64Array, other: Float64Array) -> float:
    """The angle between the rotations of two poses (3, 4)."""
    return float(np.linalg.norm(rotation_vector_from(one[:, :3] @ other[:, :3].T)))
