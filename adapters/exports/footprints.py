"""What cameras see of the ground: the outline of each image on a plane through the points it sees.

A plane for each image follows slopes; roofs and trees hardly move it, because it minimises the sum
of distances, not of squares. Rays that would reach the ground farther off than anything that the
image shows end there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.geometry import invert_pose
from engine.types import Float64Array

if TYPE_CHECKING:
    import pycolmap

_PER_EDGE = 4  # places along each edge of an image
_LEAST_POINTS = 10
_MAX_SLOPE = 0.6  # of the ground; steeper planes are walls, and a level one replaces them
_NUM_WEIGHTINGS = 15
_LEAST_OFF = 1e-3  # of the extent of the points, below which all count alike
_FARTHEST = 1.5  # times the distance of the farthest points that an image shows


def footprint_on_ground(
    image: pycolmap.Image, reconstruction: pycolmap.Reconstruction
) -> Float64Array | None:
    """The outline (P, 3) of an image on the ground, in the world: z is up.

    Args:
        image: of the reconstruction.
        reconstruction: in a world that is level.

    Returns:
        None where the image shows too few points, is a sphere, or does not look at the ground.
    """
    camera = reconstruction.camera(image.camera_id)
    seen = np.array(
        [reconstruction.point3D(point.point3D_id).xyz for point in image.get_observation_points2D()]
    ).reshape(-1, 3)
    if camera.is_spherical() or len(seen) < _LEAST_POINTS:
        return None
    world_from_cam = invert_pose(image.cam_from_world().matrix())
    center = world_from_cam[:, 3]
    rays = np.asarray(camera.cam_ray_from_img(_outline_xy(camera))) @ world_from_cam[:, :3].T
    if not np.isfinite(rays).all():
        return None
    slope_x, slope_y, height = _ground_plane(seen)
    normal = np.array([-slope_x, -slope_y, 1.0])
    above = float(normal @ center) - height
    falling = -(rays @ normal)  # how fast a ray comes nearer to the plane
    if above <= 0.0 or (falling > 0.0).sum() * 2 < len(rays):
        return None
    farthest = _FARTHEST * float(np.percentile(np.linalg.norm(seen - center, axis=1), 95))
    lengths = np.where(falling > 0.0, above / np.maximum(falling, 1e-12), np.inf)
    is_far = lengths > farthest
    outline: Float64Array = center + np.minimum(lengths, farthest)[:, None] * np.where(
        (falling > 0.0)[:, None], rays, _level(rays)
    )
    if is_far.any():  # where rays end early the outline may cross itself
        outline = _convex_hull(outline, around=center)
    outline[:, 2] = outline[:, 0] * slope_x + outline[:, 1] * slope_y + height
    return outline


def _level(rays: Float64Array) -> Float64Array:
    """The level directions (R, 3) below rays; that of a vertical one is zero."""
    level = rays * [1.0, 1.0, 0.0]
    return np.asarray(level / np.maximum(np.linalg.norm(level, axis=1, keepdims=True), 1e-12))


def _convex_hull(outline: Float64Array, *, around: Float64Array) -> Float64Array:
    """The places of an outline (P, 3) that are its convex hull, seen from above."""
    import cv2

    flat = (outline - around)[:, :2].astype(np.float32)
    return np.asarray(outline[cv2.convexHull(flat, returnPoints=False).ravel()])


def _outline_xy(camera: pycolmap.Camera) -> Float64Array:
    """Places (16, 2) along the border of an image, from its first corner on."""
    steps = np.arange(_PER_EDGE) / _PER_EDGE
    zeros, ones = np.zeros(_PER_EDGE), np.ones(_PER_EDGE)
    x = np.concatenate([steps, ones, 1.0 - steps, zeros])
    y = np.concatenate([zeros, steps, ones, 1.0 - steps])
    return np.column_stack([x * camera.width, y * camera.height])


def _ground_plane(points: Float64Array) -> tuple[float, float, float]:
    """The plane ``z = a x + b y + c`` with the least sum of distances, weighted anew in turns."""
    middle = np.median(points, axis=0)
    local = points - middle
    least = _LEAST_OFF * max(float(np.abs(local).max()), 1e-9)
    design = np.column_stack([local[:, :2], np.ones(len(local))])
    weights = np.ones(len(local))
    plane = np.zeros(3)
    for _ in range(_NUM_WEIGHTINGS):
        root = np.sqrt(weights)
        plane = np.linalg.lstsq(design * root[:, None], local[:, 2] * root, rcond=None)[0]
        weights = 1.0 / np.maximum(np.abs(local[:, 2] - design @ plane), least)
    slope_x, slope_y, height = plane.tolist()
    if np.hypot(slope_x, slope_y) > _MAX_SLOPE:
        slope_x, slope_y, height = 0.0, 0.0, 0.0
    x, y, z = middle.tolist()
    return slope_x, slope_y, height + z - slope_x * x - slope_y * y
