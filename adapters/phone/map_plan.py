"""The map from above, small enough for a phone: where cameras were, and what was seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adapters.phone.messages import Direction
from engine.dense_types import DenseCloud
from engine.geometry import transform_points
from engine.types import Float32Array, Float64Array, Int64Array, MapView, Uint8Array, freeze_field

_MAX_CELLS = 60  # along the longer edge
_MARGIN_CELLS = 1.5
_INNER_PERCENT = 4.0  # of points on each side that do not stretch the plan
_MAX_REACH = 3.0  # of the plan beyond the path, in extents of the path
_NEIGHBOUR_SHARE = 0.5  # of a neighbour's points that count for a cell; diagonally its square
_MIN_COUNT = 0.5  # points that make a cell seen
_FULL_COUNT = 5.0  # points that make it well seen
_FAINT, _FULL = 60.0, 245.0  # opacity of cells just seen and well seen
_HOLE_COLOR = (232, 72, 60, 255)
_MAX_DENSE_POINTS = 20_000  # that are drawn
_FLAT_RATIO = 8.0  # of variances: a path that spreads so much more sideways than upwards is level


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """A picture of the map from above.

    Places on the plan are in cells from its upper left corner, x to the right, y down.
    """

    version: int
    plan_from_world: Float64Array  # (2, 4): the rows turn and scale, the last column shifts
    cells: Uint8Array  # (H, W, 4) RGBA: mean colour of the points, opacity by their number
    keyframe_ids: Int64Array  # (K,) in order of arrival
    path_xy: Float64Array  # (K, 2) cells, where the keyframes' cameras were

    def __post_init__(self) -> None:
        freeze_field(self, "plan_from_world", (2, 4), np.float64)
        freeze_field(self, "cells", (None, None, 4), np.uint8)
        freeze_field(self, "keyframe_ids", (None,), np.int64)
        freeze_field(self, "path_xy", (len(self.keyframe_ids), 2), np.float64)

    def place(self, point_in_world: Direction) -> tuple[float, float]:
        """Where a point of the world lies on the plan."""
        x, y = (self.plan_from_world @ (*point_in_world, 1.0)).tolist()
        return x, y

    def direction(self, vector_in_world: Direction) -> tuple[float, float]:
        """A direction on the plan, of length 1; straight up on the plan where it has none."""
        x, y = (self.plan_from_world[:, :3] @ vector_in_world).tolist()
        length = float(np.hypot(x, y))
        return (x / length, y / length) if length > 0.0 else (0.0, -1.0)


def draw_plan(
    view: MapView,
    *,
    up_in_world: Direction | None,
    dense: DenseCloud | None = None,
    holes_in_world: Float32Array | None = None,
) -> Plan | None:
    """Draws the map from above; None while no camera is in it.

    Args:
        view: the map.
        up_in_world: away from the ground, where it is known; else estimated from them.
        dense: the dense map in the same world, whose points fill what is between the map's.
        holes_in_world: places (N, 3) of the ground that are still to be filmed, drawn in red.
    """
    if not len(view.keyframe_ids):
        return None
    axes = plan_axes(view.cam_from_world, up_in_world=up_in_world)
    path = _centers(view.cam_from_world) @ axes.T
    points = view.points3D_in_world.astype(np.float64) @ axes.T
    low, high = _bounds(path, points)
    cell_map = float((high - low).max()) / (_MAX_CELLS - 2 * _MARGIN_CELLS)
    low = low - _MARGIN_CELLS * cell_map
    width, height = np.ceil((high - low) / cell_map + _MARGIN_CELLS).astype(int).tolist()
    shift = -low / cell_map
    colors = view.colors
    if dense is not None:
        dense_points, dense_colors = _sampled(dense)
        points = np.concatenate([points, dense_points @ axes.T])
        colors = np.concatenate([colors, dense_colors])
    cells = _cells(points / cell_map + shift, colors, width=width, height=height)
    if holes_in_world is not None:
        _mark(cells, holes_in_world.astype(np.float64) @ axes.T / cell_map + shift)
    return Plan(
        version=view.version,
        plan_from_world=np.column_stack([axes / cell_map, shift]),
        cells=cells,
        keyframe_ids=view.keyframe_ids,
        path_xy=path / cell_map + shift,
    )


def _sampled(dense: DenseCloud) -> tuple[Float64Array, Uint8Array]:
    """Some points (P, 3) of each chunk of the dense map in the world, and their colours (P, 3)."""
    if not dense.chunks:
        return np.zeros((0, 3)), np.zeros((0, 3), np.uint8)
    num = max(_MAX_DENSE_POINTS // len(dense.chunks), 1)  # chunks are in random order
    points = [
        transform_points(world_from_chunk, chunk.xyz_in_cam[:num].astype(np.float64))
        for chunk, world_from_chunk in zip(dense.chunks, dense.world_from_chunk, strict=True)
    ]
    return np.concatenate(points), np.concatenate([one.colors[:num] for one in dense.chunks])


def plan_axes(cam_from_world: Float64Array, *, up_in_world: Direction | None) -> Float64Array:
    """The plan's x (right) and y (down) axes (2, 3) in the world, for cameras (K, 3, 4).

    The first camera heads to the upper edge of the plan, so it stays as it is while it grows.
    """
    up = _up(cam_from_world) if up_in_world is None else np.array(up_in_world, np.float64)
    up = _unit(up)
    heading = cam_from_world[0, 2, :3] - cam_from_world[0, 1, :3]
    ahead = heading - (heading @ up) * up
    if np.linalg.norm(ahead) < 1e-6:
        ahead = cam_from_world[0, 0, :3] - (cam_from_world[0, 0, :3] @ up) * up
    ahead = _unit(ahead)
    return np.stack([np.cross(ahead, up), -ahead])


def _up(cam_from_world: Float64Array) -> Float64Array:
    """Away from the ground, as far as it follows from cameras (K, 3, 4).

    People and drones move sideways more than up and down: a level path gives it exactly, a straight
    one only that up is square to it. The rest is that pictures are taken upright: a path over the
    ground with the camera straight down looks like one along a wall, and is taken for that.
    """
    upright = _unit(-cam_from_world[:, 1, :3].mean(axis=0))
    backward = _unit(-cam_from_world[:, 2, :3].mean(axis=0))
    centers = _centers(cam_from_world)
    _, spreads, directions = np.linalg.svd(centers - centers.mean(axis=0), full_matrices=False)
    if len(centers) < 6 or spreads[0] <= 0.0:
        return upright
    variances = spreads**2
    if variances[1] > _FLAT_RATIO * variances[2] and variances[1] > 0.02 * variances[0]:
        level_up = directions[2]
        # A path up a wall or along a slope is level, too, but not square to how cameras stand.
        if abs(level_up @ _unit(upright + 0.5 * backward)) > 0.5:
            upward: Float64Array = level_up * np.sign(level_up @ (upright + 0.5 * backward))
            return upward
    if variances[0] > _FLAT_RATIO * variances[1]:
        square = upright - (upright @ directions[0]) * directions[0]
        if np.linalg.norm(square) > 0.5:
            return _unit(square)
    return upright


def _bounds(path: Float64Array, points: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Corners (2,) of what the plan shows: the path, and most of the points around it."""
    low, high = path.min(axis=0), path.max(axis=0)
    if len(points):
        inner = np.percentile(points, [_INNER_PERCENT, 100.0 - _INNER_PERCENT], axis=0)
        reach = float((high - low).max())
        reach = _MAX_REACH * reach if reach > 0.0 else np.inf
        low = np.minimum(low, np.maximum(inner[0], low - reach))
        high = np.maximum(high, np.minimum(inner[1], high + reach))
    if not (high > low).any():
        high = low + 1.0
    return low, high


def _cells(points_xy: Float64Array, colors: Uint8Array, *, width: int, height: int) -> Uint8Array:
    """Mean colours and numbers of points (P, 2), as a picture (height, width, 4)."""
    column, row = np.floor(points_xy).T.astype(np.int64).reshape(2, -1)
    is_inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    cell = (row * width + column)[is_inside]
    sums = np.empty((height, width, 4))  # of the three colours, and the number
    for channel in range(4):
        weights = colors[is_inside, channel].astype(float) if channel < 3 else np.ones(len(cell))
        binned = np.bincount(cell, weights=weights, minlength=width * height)
        sums[:, :, channel] = binned.reshape(height, width)
    around = _with_neighbours(sums)
    counts = around[:, :, 3:]
    opacity = _FAINT + (_FULL - _FAINT) * np.minimum(counts / _FULL_COUNT, 1.0)
    is_seen = counts >= _MIN_COUNT
    picture = np.concatenate([around[:, :, :3] / np.maximum(counts, 1e-9), opacity], axis=2)
    return np.rint(np.where(is_seen, picture, 0.0)).astype(np.uint8)


def _mark(cells: Uint8Array, places_xy: Float64Array) -> None:
    """Paints the cells (H, W, 4) at places (N, 2) red."""
    height, width = cells.shape[:2]
    column, row = np.floor(places_xy).astype(np.int64).T
    is_inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    cells[row[is_inside], column[is_inside]] = _HOLE_COLOR


def _with_neighbours(sums: Float64Array) -> Float64Array:
    """Each cell (H, W, C) with a share of the eight around it, so that gaps of a cell close."""
    kernel = np.array([_NEIGHBOUR_SHARE, 1.0, _NEIGHBOUR_SHARE])
    padded = np.pad(sums, ((1, 1), (1, 1), (0, 0)))
    rows = sum(kernel[k] * padded[k : k + sums.shape[0]] for k in range(3))
    around: Float64Array = sum(kernel[k] * rows[:, k : k + sums.shape[1]] for k in range(3))
    return around


def _centers(cam_from_world: Float64Array) -> Float64Array:
    """Centres (K, 3) of cameras (K, 3, 4)."""
    rotations, translations = cam_from_world[:, :, :3], cam_from_world[:, :, 3]
    centers: Float64Array = -np.einsum("kji,kj->ki", rotations, translations)
    return centers


def _unit(vector: Float64Array) -> Float64Array:
    length = float(np.linalg.norm(vector))
    unit: Float64Array = vector / length if length > 0.0 else np.array([0.0, -1.0, 0.0])
    return unit
