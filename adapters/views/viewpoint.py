"""Viewpoints from which a whole map can be seen; numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adapters.views.display_geometry import cam_centers
from engine.types import Float32Array, Float64Array

ELEVATION_RAD = 0.6  # above the horizon of the map
HALF_WIDTH_RATIO = 0.80  # of the distance; the viewer sees 55 degrees vertically, in a wide window
HALF_HEIGHT_RATIO = 0.46
POINTS_IN_SIGHT_RATIO = 0.8  # the rest of the points may lie outside the picture

_COHERENT = 0.5  # length of a mean of unit vectors, from which on it is a common direction
_FLAT = 0.3  # second to first extent of camera centres that fill a plane rather than a line


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Viewpoint:
    """A viewer's camera: its position, the point in the middle of its view, and its up axis."""

    position: Float64Array  # (3,) in the world
    target: Float64Array  # (3,) in the world
    up: Float64Array  # (3,) unit vector


def overview_viewpoint(cam_from_world: Float64Array, points3D_in_world: Float32Array) -> Viewpoint:
    """A viewpoint above and behind the cameras.

    Args:
        cam_from_world: (K, 3, 4), K > 0; all cameras are in sight.
        points3D_in_world: (P, 3); most of them are in sight.
    """
    up = up_direction(cam_from_world)
    backward = np.cos(ELEVATION_RAD) * _backward(cam_from_world, up) + np.sin(ELEVATION_RAD) * up
    right = np.cross(up, backward)
    right /= np.linalg.norm(right)
    world_from_view = np.stack([right, np.cross(backward, right), backward], axis=1)
    cameras = cam_centers(cam_from_world) @ world_from_view
    target, distance = _fit(np.concatenate([cameras, _bulk(points3D_in_world @ world_from_view)]))
    return Viewpoint(
        position=world_from_view @ (target + [0.0, 0.0, distance]),
        target=world_from_view @ target,
        up=up,
    )


def _bulk(points: Float64Array) -> Float64Array:
    """The points (P, 3) that are not among the outermost along any axis."""
    if not len(points):
        return points
    tail = 0.5 * (1.0 - POINTS_IN_SIGHT_RATIO)
    low, high = np.quantile(points, [tail, 1.0 - tail], axis=0)
    inner: Float64Array = points[((points >= low) & (points <= high)).all(axis=1)]
    return inner


def _fit(positions: Float64Array) -> tuple[Float64Array, float]:
    """Target (3,) and distance along +z from which positions (N, 3) just fill the picture.

    What is near appears larger, so the middle of the picture is not the middle of the positions:
    centring and measuring the distance are repeated a few times.
    """
    target = 0.5 * (positions.min(axis=0) + positions.max(axis=0))
    distance = 0.0
    for _ in range(5):
        offsets = positions - target
        needed = np.abs(offsets[:, :2]) / [HALF_WIDTH_RATIO, HALF_HEIGHT_RATIO]
        distance = float((offsets[:, 2] + needed.max(axis=1)).max()) or 1.0
        depths = np.maximum(distance - offsets[:, 2], 1e-3 * distance)
        projected = offsets[:, :2] / depths[:, None]
        target[:2] += 0.5 * distance * (projected.min(axis=0) + projected.max(axis=0))
    return target, distance


def up_direction(cam_from_world: Float64Array) -> Float64Array:
    """The direction (3,) that is up in the world, estimated from how cameras (K, 3, 4) are held.

    They are held upright on average, except where they face straight down: cameras that fill a
    plane and face across it, or that turn back and forth.
    """
    held = -cam_from_world[:, 1, :3].mean(axis=0)
    sight = cam_from_world[:, 2, :3].mean(axis=0)
    is_downward = np.linalg.norm(held) < _COHERENT or _faces_across(cam_from_world, sight)
    up = -sight if is_downward and np.linalg.norm(sight) >= _COHERENT else held
    length = np.linalg.norm(up)
    return up / length if length > 0.0 else np.array([0.0, -1.0, 0.0])


def _faces_across(cam_from_world: Float64Array, sight: Float64Array) -> bool:
    if len(cam_from_world) < 3 or np.linalg.norm(sight) < 0.9:
        return False
    centers = cam_centers(cam_from_world)
    _, extents, axes = np.linalg.svd(centers - centers.mean(axis=0), full_matrices=False)
    fills_plane = extents[1] > _FLAT * extents[0]
    return bool(fills_plane and abs(axes[2] @ sight) > 0.9 * np.linalg.norm(sight))


def _backward(cam_from_world: Float64Array, up: Float64Array) -> Float64Array:
    """Level unit vector (3,) against the common line of sight, else against the first one's."""
    candidates = [
        -cam_from_world[:, 2, :3].mean(axis=0),
        -cam_from_world[0, 2, :3],
        cam_from_world[0, 1, :3],  # for one that faces straight down: the lower edge of its image
    ]
    flat = [candidate - (candidate @ up) * up for candidate in candidates]
    clear = [vector for vector in flat if np.linalg.norm(vector) > 0.1]
    chosen = clear[0] if clear else np.eye(3)[np.abs(up).argmin()]
    level = chosen - (chosen @ up) * up
    backward: Float64Array = level / np.linalg.norm(level)
    return backward
