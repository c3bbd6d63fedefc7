"""The points of a keyframe, in its camera's frame, and which of them other keyframes show.

Points are those pixels of its depth map that enough neighbours agree on. Those that an earlier
keyframe shows about as finely are left to that one, as long as it has them. When a keyframe moves,
its points only need its new pose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np

from engine.dense.consistency import OtherDepth
from engine.dense.pinholes import plane_xy, projected
from engine.dense_types import DensePoints, DepthMap
from engine.types import (
    BoolArray,
    Float32Array,
    Int32Array,
    Int64Array,
    Uint8Array,
)

_STEEPEST = 8.0  # tangent of the angle between a surface's normal and the ray to the camera
_LEAST_COSINE = 1.0 / _STEEPEST
_STEP_PX = 2  # between the pixels that become points: depth is matched by windows of several pixels
_SLOPE_PX = 1  # to either side, of those pixels
_SMOOTHING_PX = 5  # window in which slopes are averaged, of those pixels
_SAME_SURFACE_STDS = 4.0
_MIN_AGREEING = 2  # neighbours on a depth
_FINER_RATIO = 0.7  # of an earlier keyframe's sampling: twice as many points on the same area


def keyframe_points(depth_map: DepthMap, *, min_agreeing: int = _MIN_AGREEING) -> DensePoints:
    """The points of a depth map.

    Args:
        depth_map: of the keyframe.
        min_agreeing: neighbours that have to agree on a depth, or all where it has fewer.

    Returns:
        Points in the keyframe's camera frame, of every second pixel each way, in their order.
        Depth steps and surfaces seen almost along themselves have none.
    """
    depth_map = _thinned(depth_map)
    normals, cosines = surface_normals(depth_map)
    pixels = np.flatnonzero(_is_agreed(depth_map, min_agreeing) & (cosines >= _LEAST_COSINE))
    return DensePoints(
        xyz=_in_camera(pixels, depth_map).T,
        colors=depth_map.colors.reshape(-1, 3)[pixels],
        normals=normals[:, pixels].T,
        sampling=_sampling(pixels, depth_map, cosines),
        num_views=_num_views(depth_map.num_agreeing.ravel()[pixels]),
    )


def shown_by(points: DensePoints, depth_map: DepthMap, earlier: Sequence[OtherDepth]) -> Int64Array:
    """Which earlier keyframe shows each point of a depth map on the same surface, as finely.

    Args:
        points: of the depth map.
        depth_map: of the keyframe.
        earlier: depth maps of other keyframes, in order; each costs a projection of the points that
            those before do not show.

    Returns:
        (P,) 0: none of them; 1: the first one, and so on.
    """
    shown = np.zeros(len(points.xyz), np.int64)
    xyz, normals = np.ascontiguousarray(points.xyz.T), np.ascontiguousarray(points.normals.T)
    pinhole = depth_map.pinhole.astype(np.float32)
    left, pixels = _pixels_of(xyz, pinhole, depth_map.depth.shape)
    error = depth_map.relative_error.ravel()[pixels]
    for number, other in enumerate(earlier, start=1):
        is_shown = _is_shown(
            xyz[:, left], normals[:, left], sampling=points.sampling[left], error=error, other=other
        )
        shown[left[is_shown]] = number
        left, error = left[~is_shown], error[~is_shown]
    return shown


def surface_normals(depth_map: DepthMap) -> tuple[Float32Array, Float32Array]:
    """Normals (3, H * W) in the camera's frame, towards it, and cosines (H, W) of viewing angles.

    On a plane inverse depth is affine in the pixel, so its slope gives the normal. Where there is
    no depth, and at depth steps, normal and cosine are 0.
    """
    pinhole = depth_map.pinhole.astype(np.float32)
    height, width = depth_map.depth.shape
    known = depth_map.depth > 0
    inverse = np.divide(1.0, depth_map.depth, where=known, out=np.zeros_like(depth_map.depth))
    slope_x, slope_y, is_smooth = _slopes(inverse, known, focal=(pinhole[0], pinhole[1]))
    x, y = _plane_xy(pinhole, width=width, height=height)
    y = y[:, None]
    slope_z = inverse - slope_x * x - slope_y * y
    # The plane is slope . point = 1; the slope points away from the camera.
    length = np.sqrt(slope_x * slope_x + slope_y * slope_y + slope_z * slope_z)
    scale = np.divide(-1.0, length, where=is_smooth, out=np.zeros_like(length))
    normals = np.stack([slope_x * scale, slope_y * scale, slope_z * scale])
    cosines = -inverse * scale / np.sqrt(np.float32(1.0) + x * x + y * y)
    return normals.reshape(3, -1), cosines


def _slopes(
    inverse: Float32Array, known: BoolArray, *, focal: tuple[np.float32, np.float32]
) -> tuple[Float32Array, Float32Array, BoolArray]:
    """Change of inverse depth per unit of x / z and of y / z, (H, W) each, and where it has one.

    Averaged over a small window, steps left out of it.
    """
    span, edge = 2 * _SLOPE_PX, slice(_SLOPE_PX, -_SLOPE_PX)
    slope_x, slope_y = np.zeros_like(inverse), np.zeros_like(inverse)
    is_smooth = np.zeros_like(known)
    if min(inverse.shape) <= span:
        return slope_x, slope_y, is_smooth
    slope_x[:, edge] = (inverse[:, span:] - inverse[:, :-span]) * (focal[0] / span)
    slope_y[edge] = (inverse[span:] - inverse[:-span]) * (focal[1] / span)
    is_smooth[edge, edge] = (
        known[edge, edge]
        & known[edge, span:]
        & known[edge, :-span]
        & known[span:, edge]
        & known[:-span, edge]
    )
    is_smooth &= slope_x * slope_x + slope_y * slope_y <= (_STEEPEST * inverse) ** 2
    weights = is_smooth.astype(np.float32)
    total = np.maximum(_box_sum(weights), np.float32(1.0))
    mean_x = _box_sum(slope_x * weights) / total
    mean_y = _box_sum(slope_y * weights) / total
    return np.asarray(mean_x), np.asarray(mean_y), is_smooth


def _box_sum(values: Float32Array) -> Float32Array:
    window = (_SMOOTHING_PX, _SMOOTHING_PX)
    summed = cv2.boxFilter(values, -1, window, normalize=False, borderType=cv2.BORDER_CONSTANT)
    return np.asarray(summed, np.float32)


def _is_shown(
    xyz: Float32Array,
    normals: Float32Array,
    *,
    sampling: Float32Array,
    error: Float32Array,
    other: OtherDepth,
) -> BoolArray:
    """Which points (3, P) of a depth map another one shows on the same surface, as finely.

    ``sampling`` and relative ``error`` (P,) are those of the points.
    """
    pinhole, shape = other.depth_map.pinhole.astype(np.float32), other.depth_map.depth.shape
    other_from_keyframe = other.other_from_keyframe.astype(np.float32)
    xyz = other_from_keyframe[:, :3] @ xyz
    xyz += other_from_keyframe[:, 3:]
    seen, their_pixels = _pixels_of(xyz, pinhole, shape)
    xyz = xyz[:, seen]
    depth = xyz[2]
    cosine = -_dot(other_from_keyframe[:, :3] @ normals[:, seen], xyz) / np.sqrt(_dot(xyz, xyz))
    has_points = cosine >= np.float32(_LEAST_COSINE)
    np.maximum(cosine, np.float32(_LEAST_COSINE), out=cosine)
    their_depth = other.depth_map.depth.ravel()[their_pixels]
    their_sampling = depth * _STEP_PX / (_focal(other.depth_map) * np.sqrt(cosine))
    their_error = other.depth_map.relative_error.ravel()[their_pixels]
    std = depth * np.sqrt(np.square(error[seen]) + np.square(their_error))
    # On a slope depth changes inside a pixel.
    slack = their_sampling / cosine + np.float32(_SAME_SURFACE_STDS) * std
    is_shown = np.zeros(len(sampling), bool)
    is_shown[seen] = (
        has_points
        & _is_agreed(other.depth_map, _MIN_AGREEING).ravel()[their_pixels]
        & (np.abs(their_depth - depth) <= slack)
        & (sampling[seen] >= np.float32(_FINER_RATIO) * their_sampling)
    )
    return is_shown


def _pixels_of(
    xyz: Float32Array, pinhole: Float32Array, shape: tuple[int, int]
) -> tuple[Int64Array, Int32Array]:
    """Columns of points (3, P) that an image of (H, W) shows, and their pixels by place in it."""
    height, width = shape
    x, y = projected(pinhole, xyz)
    seen = np.flatnonzero((xyz[2] > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height))
    return seen, y[seen].astype(np.int32) * np.int32(width) + x[seen].astype(np.int32)


def _dot(first: Float32Array, second: Float32Array) -> Float32Array:
    """Products (P,) of vectors (3, P)."""
    return np.asarray(first[0] * second[0] + first[1] * second[1] + first[2] * second[2])


def _thinned(depth_map: DepthMap) -> DepthMap:
    """A depth map of every second line and column."""
    focal_x, focal_y, center_x, center_y = depth_map.pinhole
    step = slice(None, None, _STEP_PX)
    center = (np.array([center_x, center_y]) - 0.5) / _STEP_PX + 0.5
    return replace(
        depth_map,
        pinhole=np.array([focal_x / _STEP_PX, focal_y / _STEP_PX, *center]),
        depth=depth_map.depth[step, step],
        relative_error=depth_map.relative_error[step, step],
        num_agreeing=depth_map.num_agreeing[step, step],
        colors=depth_map.colors[step, step],
        agreeing_bits=None,
    )


def _is_agreed(depth_map: DepthMap, min_agreeing: int) -> BoolArray:
    least = _least_agreeing(depth_map, min_agreeing)
    return np.asarray((depth_map.depth > 0) & (depth_map.num_agreeing >= least))


def _least_agreeing(depth_map: DepthMap, min_agreeing: int) -> int:
    return max(1, min(min_agreeing, len(depth_map.neighbour_ids)))


def _in_camera(pixels: Int64Array, depth_map: DepthMap) -> Float32Array:
    """Points (3, P) in the camera's frame of pixels (P,) by their place in the depth map."""
    height, width = depth_map.depth.shape
    x, y = _plane_xy(depth_map.pinhole.astype(np.float32), width=width, height=height)
    line, column = np.divmod(pixels.astype(np.int32), np.int32(width))
    depth = depth_map.depth.ravel()[pixels]
    xyz = np.empty((3, len(pixels)), np.float32)
    np.multiply(x[column], depth, out=xyz[0])
    np.multiply(y[line], depth, out=xyz[1])
    xyz[2] = depth
    return xyz


def _plane_xy(
    pinhole: Float32Array, *, width: int, height: int
) -> tuple[Float32Array, Float32Array]:
    """Of all columns (W,) and all lines (H,)."""
    return plane_xy(
        pinhole, np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
    )


def _sampling(pixels: Int64Array, depth_map: DepthMap, cosines: Float32Array) -> Float32Array:
    """How far apart two pixels are on the surface, (P,): the mean of its two directions."""
    cosine = cosines.ravel()[pixels]
    return np.asarray(depth_map.depth.ravel()[pixels] / (_focal(depth_map) * np.sqrt(cosine)))


def _focal(depth_map: DepthMap) -> np.float32:
    return np.float32(np.sqrt(depth_map.pinhole[0] * depth_map.pinhole[1]))


def _num_views(num_agreeing: Uint8Array) -> Uint8Array:
    """Of the neighbours that agree and the keyframe itself."""
    return np.minimum(num_agreeing, 254) + np.uint8(1)
