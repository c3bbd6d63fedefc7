"""Pure functions on poses and projections; numpy only.

A pose is a (3, 4) array [R | t] mapping world to camera coordinates (``cam_from_world``), camera
axes x right, y down, z forward. Pixels follow COLMAP: the centre of the first pixel is (0.5, 0.5).
"""

from __future__ import annotations

import math

import numpy as np

from engine.types import BoolArray, Float64Array, Int64Array

_SPREAD_CELLS = 12  # per image edge


def invert_pose(b_from_a: Float64Array) -> Float64Array:
    """The inverse of one pose (3, 4) or of many (..., 3, 4)."""
    rotation = np.swapaxes(b_from_a[..., :3], -1, -2)
    translation = -rotation @ b_from_a[..., 3:]
    return np.concatenate([rotation, translation], axis=-1)


def compose_poses(c_from_b: Float64Array, b_from_a: Float64Array) -> Float64Array:
    """``c_from_a`` of two poses (..., 3, 4)."""
    rotation = c_from_b[..., :3] @ b_from_a[..., :3]
    translation = c_from_b[..., :3] @ b_from_a[..., 3:] + c_from_b[..., 3:]
    return np.concatenate([rotation, translation], axis=-1)


def camera_center(cam_from_world: Float64Array) -> Float64Array:
    """The camera's centre in the world, (3,) of a pose (3, 4), or (..., 3) of many."""
    return invert_pose(cam_from_world)[..., 3]


def transform_points(b_from_a: Float64Array, points_in_a: Float64Array) -> Float64Array:
    """Points (N, 3) of frame a in frame b."""
    transformed: Float64Array = points_in_a @ b_from_a[:, :3].T + b_from_a[:, 3]
    return transformed


def rotation_from_quat_xyzw(quat_xyzw: Float64Array) -> Float64Array:
    """The rotation matrix (3, 3) of a unit quaternion (4,), x y z w."""
    x, y, z, w = quat_xyzw / np.linalg.norm(quat_xyzw)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def quat_xyzw_from_rotation(rotation: Float64Array) -> Float64Array:
    """The unit quaternion (4,), x y z w with w >= 0, of a rotation matrix (3, 3).

    Takes the largest of the four candidates, which is stable for every rotation (Shepperd, 1978).
    """
    m = rotation
    trace = float(np.trace(m))
    squares = np.array([m[0, 0], m[1, 1], m[2, 2], trace])
    largest = int(squares.argmax())
    if largest == 3:
        quat = np.array([m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1], 1.0 + trace])
    else:
        i, j, k = largest, (largest + 1) % 3, (largest + 2) % 3
        quat = np.empty(4)
        quat[i] = 1.0 + m[i, i] - m[j, j] - m[k, k]
        quat[j] = m[j, i] + m[i, j]
        quat[k] = m[k, i] + m[i, k]
        quat[3] = m[k, j] - m[j, k]
    quat /= np.linalg.norm(quat)
    return quat if quat[3] >= 0 else -quat


def rotation_from_vector(rotation_vector: Float64Array) -> Float64Array:
    """The rotation matrix (3, 3) of an axis times an angle in radians, (3,) (Rodrigues)."""
    x, y, z = rotation_vector.tolist()
    angle = math.sqrt(x * x + y * y + z * z)
    if angle < 1e-8:
        return np.array([[1.0, -z, y], [z, 1.0, -x], [-y, x, 1.0]])
    sine, cosine = math.sin(angle), math.cos(angle)
    x, y, z = x / angle, y / angle, z / angle
    rest = 1.0 - cosine
    return np.array(
        [
            [cosine + rest * x * x, rest * x * y - sine * z, rest * x * z + sine * y],
            [rest * x * y + sine * z, cosine + rest * y * y, rest * y * z - sine * x],
            [rest * x * z - sine * y, rest * y * z + sine * x, cosine + rest * z * z],
        ]
    )


def skew(vector: Float64Array) -> Float64Array:
    """The matrix (3, 3) whose product with x is the cross product of ``vector`` (3,) and x."""
    x, y, z = vector
    return np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])


def interpolate_poses(
    first: Float64Array, second: Float64Array, *, fraction: float
) -> Float64Array:
    """The pose between two ``cam_from_world`` (3, 4), the centre linear, the rotation on the arc.

    ``fraction`` 0 gives the first, 1 the second; values outside extrapolate.
    """
    delta = second[:, :3] @ first[:, :3].T
    vector = rotation_vector_from(delta)
    rotation = rotation_from_vector(fraction * vector) @ first[:, :3]
    center = (1.0 - fraction) * camera_center(first) + fraction * camera_center(second)
    return np.column_stack([rotation, -rotation @ center])


def rotation_vector_from(rotation: Float64Array) -> Float64Array:
    """Axis times angle in radians, (3,), of a rotation matrix (3, 3)."""
    quat = quat_xyzw_from_rotation(rotation)
    sine = float(np.linalg.norm(quat[:3]))
    if sine < 1e-12:
        return np.zeros(3)
    return np.asarray(quat[:3] / sine * (2.0 * np.arctan2(sine, quat[3])))


def rotation_angle_rad(first: Float64Array, second: Float64Array) -> float:
    """The angle between two rotations (3, 3), 0 to pi."""
    cosine = (float(np.sum(first * second)) - 1.0) / 2.0
    return math.acos(min(1.0, max(-1.0, cosine)))


def rotation_between(vectors_in_a: Float64Array, vectors_in_b: Float64Array) -> Float64Array | None:
    """The rotation ``b_from_a`` (3, 3) that best turns vectors (N, 3) to their matches.

    In closed form, by the singular values of the sum of their products (Kabsch, 1976).

    Returns:
        None where the vectors are not finite; any of the best rotations where they leave it open.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        products = vectors_in_b.T @ vectors_in_a
    return nearest_rotation(products)


def nearest_rotation(matrix: Float64Array) -> Float64Array | None:
    """The rotation (3, 3) nearest to a matrix (3, 3); None where that is not finite."""
    if not np.isfinite(matrix).all():
        return None
    left, _, right = np.linalg.svd(matrix)
    return np.asarray(left @ np.diag([1.0, 1.0, np.linalg.det(left @ right)]) @ right)


def similarity_between_poses(poses: Float64Array, onto_poses: Float64Array) -> Float64Array | None:
    """The similarity [s R | t] (3, 4) that moves cameras onto where others have them.

    Orientations count, too: the centres of a straight flight leave a turn about it open.

    Args:
        poses: cam_from_world (N, 3, 4).
        onto_poses: (N, 3, 4) of the same cameras in another world.

    Returns:
        ``onto_from_world``; None when the cameras of one side lie in one place, or are one only, or
        a pose is not finite.
    """
    # The rotation nearest to all that the cameras ask for.
    turns = np.swapaxes(onto_poses[:, :, :3], 1, 2) @ poses[:, :, :3]
    rotation = nearest_rotation(turns.sum(axis=0))
    centers, onto_centers = camera_center(poses), camera_center(onto_poses)
    middle, onto_middle = centers.mean(axis=0), onto_centers.mean(axis=0)
    spread = np.linalg.norm(centers - middle)
    onto_spread = np.linalg.norm(onto_centers - onto_middle)
    if rotation is None or not (0.0 < spread < np.inf and 0.0 < onto_spread < np.inf):
        return None
    scale = onto_spread / spread
    return np.column_stack([scale * rotation, onto_middle - scale * rotation @ middle])


def pose_in_other_world(
    cam_from_world: Float64Array, onto_from_world: Float64Array
) -> Float64Array:
    """Poses (..., 3, 4) after a similarity (3, 4) of their world."""
    scaled_rotation, translation = onto_from_world[:, :3], onto_from_world[:, 3]
    scale = np.cbrt(np.linalg.det(scaled_rotation))
    rotation = cam_from_world[..., :3] @ (scaled_rotation / scale).T
    moved = scale * cam_from_world[..., 3] - rotation @ translation
    return np.concatenate([rotation, moved[..., None]], axis=-1)


def image_scale(width: int, height: int) -> float:
    """How much larger an image is than the 1000 px edge that pixel thresholds are stated for."""
    return max(width, height) / 1000.0


def usable_at(mask: BoolArray, points_xy: Float64Array) -> BoolArray:
    """Whether points (N, 2) px lie on pixels that a mask (H, W) leaves to be used, (N,).

    A point beyond the image counts as lying on the nearest pixel.
    """
    height, width = mask.shape
    columns, lines = np.clip(points_xy, 0, (width - 1, height - 1)).astype(np.int64).T
    return np.asarray(mask[lines, columns])


def spread_over_image(points_xy: Float64Array, *, size: tuple[int, int], limit: int) -> Int64Array:
    """Rows of at most ``limit`` points, spread over the image, ascending.

    Args:
        points_xy: (N, 2) px, the most wanted first.
        size: width and height of the image.
        limit: all cells of a grid give their first points, then their second ones, up to so many.
    """
    if len(points_xy) <= limit:
        return np.arange(len(points_xy))
    cells_xy = np.clip((points_xy / size * _SPREAD_CELLS).astype(np.int64), 0, _SPREAD_CELLS - 1)
    cell = cells_xy[:, 1] * _SPREAD_CELLS + cells_xy[:, 0]
    by_cell = np.argsort(cell, kind="stable")
    _, starts = np.unique(cell[by_cell], return_index=True)
    rank_in_cell = np.empty(len(cell), np.int64)
    counts = np.diff([*starts, len(cell)])
    rank_in_cell[by_cell] = np.arange(len(cell)) - np.repeat(starts, counts)
    return np.sort(np.lexsort((np.arange(len(cell)), rank_in_cell))[:limit])


def grid_over_image(size: tuple[int, int], *, num: int) -> Float64Array:
    """Centres (M, 2) of at most ``num`` about square cells that cover an image, px.

    Args:
        size: width and height of the image.
        num: of cells; 0: none.
    """
    width, height = size
    if num < 1:
        return np.empty((0, 2))
    columns = min(max(1, round(np.sqrt(num * width / height))), num, width)
    lines = min(max(1, num // columns), height)
    x = (np.arange(columns) + 0.5) * width / columns
    y = (np.arange(lines) + 0.5) * height / lines
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
