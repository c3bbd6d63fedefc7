"""Views of points all around from cameras that turn or move, and pairs of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pycolmap

from engine.estimators.turning import ImageShape, TurningPair, centred_points
from engine.geometry import rotation_from_vector, transform_points
from engine.types import Float64Array, Int64Array

WIDTH, HEIGHT = 1000, 750
SHAPE = ImageShape.of(WIDTH, HEIGHT)
MIN_COMMON = 20  # points of a pair


def camera(focal_ratio: float = 0.8, *, model: str = "SIMPLE_PINHOLE") -> pycolmap.Camera:
    """A centred camera without distortion; the focal length is of the longer edge."""
    return pycolmap.Camera.create_from_model_name(1, model, focal_ratio * WIDTH, WIDTH, HEIGHT)


def points_around(num: int = 6000, *, seed: int = 0) -> Float64Array:
    """Points (num, 3) in all directions, 3 to 9 units away."""
    rng = np.random.default_rng((seed, 20))
    directions = rng.normal(size=(num, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return directions * rng.uniform(3.0, 9.0, (num, 1))


def wall(num: int = 4000, *, seed: int = 0, distance: float = 5.0) -> Float64Array:
    """Points (num, 3) of a wall that faces a camera at the origin."""
    rng = np.random.default_rng((seed, 21))
    across = rng.uniform(-6.0, 6.0, (num, 2))
    return np.column_stack([across, np.full(num, distance)])


def turned(angles_deg: Sequence[float], *, radius: float = 0.0) -> Float64Array:
    """Poses (F, 3, 4) of a camera that turns to the side and nods, ``radius`` off the axis."""
    poses = []
    for number, angle_deg in enumerate(angles_deg):
        yaw, pitch = np.radians(angle_deg), 0.1 * np.sin(number)
        rotation = rotation_from_vector(np.array([pitch, 0.0, 0.0])) @ rotation_from_vector(
            np.array([0.0, -yaw, 0.0])
        )
        center = radius * np.array([np.sin(yaw), 0.0, np.cos(yaw)])
        poses.append(np.column_stack([rotation, -rotation @ center]))
    return np.array(poses)


def moved(centers: Float64Array, *, shake_rad: float = 0.0, seed: int = 0) -> Float64Array:
    """Poses (F, 3, 4) at centres (F, 3), looking along z but for some shake."""
    rng = np.random.default_rng((seed, 22))
    rotations = [rotation_from_vector(rng.normal(scale=shake_rad, size=3)) for _ in centers]
    return np.array(
        [
            np.column_stack([rotation, -rotation @ center])
            for rotation, center in zip(rotations, centers, strict=True)
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Matched:
    """Two views' common points in px; rows belong together."""

    view1: int
    view2: int
    points1_xy: Float64Array  # (M, 2)
    points2_xy: Float64Array  # (M, 2)

    def as_turning_pair(self, *, zooms: bool = False, noise_px: float = 0.0) -> TurningPair:
        """The pair as the estimator takes it; with zooms each view has its own lens."""
        return TurningPair(
            points1=centred_points(self.points1_xy, width=WIDTH, height=HEIGHT),
            points2=centred_points(self.points2_xy, width=WIDTH, height=HEIGHT),
            lens1=self.view1 if zooms else 0,
            lens2=self.view2 if zooms else 0,
            noise=noise_px / (np.hypot(WIDTH, HEIGHT) / 2.0),
        )


def matched_pairs(
    poses: Float64Array,
    points: Float64Array,
    cameras: pycolmap.Camera | Sequence[pycolmap.Camera],
    *,
    noise_px: float = 0.3,
    max_gap: int = 3,
    seed: int = 0,
) -> list[Matched]:
    """All pairs of views at most ``max_gap`` apart that have enough in common."""
    if isinstance(cameras, pycolmap.Camera):
        cameras = [cameras] * len(poses)
    rng = np.random.default_rng((seed, 23))
    views = [_seen(pose, points, one) for pose, one in zip(poses, cameras, strict=True)]
    views = [(ids, xy + rng.normal(scale=noise_px, size=xy.shape)) for ids, xy in views]
    pairs = []
    for one in range(len(views)):
        for other in range(one + 1, min(len(views), one + max_gap + 1)):
            (ids1, xy1), (ids2, xy2) = views[one], views[other]
            _, rows1, rows2 = np.intersect1d(ids1, ids2, return_indices=True)
            if len(rows1) >= MIN_COMMON:
                order = rng.permutation(len(rows1))
                pairs.append(
                    Matched(
                        view1=one,
                        view2=other,
                        points1_xy=xy1[rows1[order]],
                        points2_xy=xy2[rows2[order]],
                    )
                )
    return pairs


def _seen(
    pose: Float64Array, points: Float64Array, one: pycolmap.Camera
) -> tuple[Int64Array, Float64Array]:
    """Which points a view sees, and where, (M,) and (M, 2) px."""
    in_cam = transform_points(pose, points)
    ahead = np.flatnonzero(in_cam[:, 2] > 0.2 * np.linalg.norm(in_cam, axis=1))
    xy = np.asarray(one.img_from_cam(in_cam[ahead]))
    inside = ((xy >= 0.0) & (xy <= (WIDTH, HEIGHT))).all(axis=1)
    return ahead[inside].astype(np.int64), xy[inside]
