"""Depth maps after the poses have changed that they were made with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from engine.dense.pinholes import plane_xy
from engine.dense_types import DepthMap
from engine.types import Float64Array, Int64Array

_NUM_SAMPLES = 400  # pixels that the change is worked out at


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthChange:
    """What new poses of the neighbours would do to a depth map that is made again."""

    depth_factor: float  # by which all depths are to be multiplied; the map's unit may change
    error_ratio: float  # median of what depths are off after that, in their standard deviations


def depth_change(depth_map: DepthMap, neighbour_from_keyframe: Float64Array) -> DepthChange | None:
    """How depth changes with the relative poses of the neighbours that it was made with.

    What was matched stays matched: each sample is triangulated again, from its own ray and the
    direction in which the neighbour saw it.

    Args:
        depth_map: with poses of then.
        neighbour_from_keyframe: (N, 3, 4) as they are now, in the order of ``neighbour_ids``; not
            a number for those that have no pose any more.

    Returns:
        None where no neighbour has a pose, or nothing can be triangulated.
    """
    is_posed = np.isfinite(neighbour_from_keyframe).all(axis=(1, 2))
    rows = _samples(depth_map)
    if not is_posed.any() or not len(rows):
        return None
    depth = depth_map.depth.reshape(-1)[rows].astype(np.float64)
    error = depth_map.relative_error.reshape(-1)[rows].astype(np.float64)
    rays = _rays(depth_map, rows)
    ratios = np.stack(
        [
            _triangulated_again(rays, depth, then, now) / depth
            for then, now in zip(
                depth_map.neighbour_from_keyframe[is_posed],
                neighbour_from_keyframe[is_posed],
                strict=True,
            )
        ]
    )
    usable = np.isfinite(ratios) & (ratios > 0)
    if not usable.any():
        return None
    factor = float(np.median(ratios[usable]))
    # A sample that can no longer be triangulated is off without bound.
    change = np.where(usable, np.abs(ratios / factor - 1.0), np.inf)
    return DepthChange(
        depth_factor=factor,
        error_ratio=float(np.median(change / np.maximum(error, 1e-6))),
    )


def scaled_depth_map(depth_map: DepthMap, factor: float) -> DepthMap:
    """The depth map in another unit: depths and the neighbours' distances times ``factor``."""
    poses = np.array(depth_map.neighbour_from_keyframe)
    poses[:, :, 3] *= factor
    return replace(
        depth_map,
        depth=depth_map.depth * np.float32(factor),
        neighbour_from_keyframe=poses,
    )


def _samples(depth_map: DepthMap) -> Int64Array:
    known = np.flatnonzero(depth_map.depth.reshape(-1) > 0)
    return known[:: max(1, len(known) // _NUM_SAMPLES)]


def _rays(depth_map: DepthMap, rows: Int64Array) -> Float64Array:
    """Rays (S, 3) of pixels, z = 1."""
    lines, columns = np.divmod(rows, depth_map.depth.shape[1])
    return np.column_stack([*plane_xy(depth_map.pinhole, columns, lines), np.ones(len(rows))])


def _triangulated_again(
    rays: Float64Array, depth: Float64Array, then: Float64Array, now: Float64Array
) -> Float64Array:
    """Depths (S,) by the pose ``now`` of a neighbour in which points lie as by that of ``then``."""
    directions = (rays * depth[:, None]) @ then[:, :3].T + then[:, 3]
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    # The depth at which the moved ray passes nearest to the direction's line.
    across = np.cross(rays @ now[:, :3].T, directions)
    offset = np.cross(now[:, 3], directions)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(
            -np.einsum("ij,ij->i", across, offset) / np.einsum("ij,ij->i", across, across)
        )
