"""Coverage: by how many keyframes, and from how far apart, each part of the ground is seen.

So holes and thin places are known while somebody still flies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import cv2
import numpy as np

from engine.date_line import cut_ring
from engine.dense.orthophoto import OrthoView
from engine.dense.pinholes import projected
from engine.dense.surface import GroundGrid, Surface, round_cell
from engine.types import (
    BoolArray,
    Float32Array,
    Float64Array,
    Int64Array,
    Uint8Array,
    freeze_field,
)

_HALF_TURN_DEG = 180.0
_MAX_EDGE_CELLS = 96  # of the grid
_LEAST_CELLS = 4  # of the surface, along a cell of the grid
_MIN_KEYFRAMES = 3
_MIN_ANGLE_DEG = 5.0
_LEAST_MEASURED = 0.2  # of a cell's surface
_REACH = 2.0  # how far from below a camera it is said to see, in its heights above the ground
_NUM_DIRECTIONS = 8  # in which the spread of viewing rays is measured


class CoverageStatus(IntEnum):
    """How well a cell of the ground is covered."""

    OUTSIDE = 0  # of what was flown over
    HOLE = 1  # seen by no keyframe or by one, between cells that are seen
    THIN = 2  # seen by too few, from too near to each other, or without a surface
    GOOD = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Coverage:
    """The coverage of the ground by cell."""

    grid: GroundGrid
    num_keyframes: Int64Array  # (H, W) that see the cell
    best_angle_deg: Float32Array  # (H, W) the largest between two of them
    status: Uint8Array  # (H, W) of CoverageStatus

    def __post_init__(self) -> None:
        shape = (self.grid.num_lines, self.grid.num_columns)
        freeze_field(self, "num_keyframes", shape, np.int64)
        freeze_field(self, "best_angle_deg", shape, np.float32)
        freeze_field(self, "status", shape, np.uint8)

    def share_of(self, status: CoverageStatus) -> float:
        """The share of a status in what was flown over; 0 where nothing was."""
        num_flown = int(np.count_nonzero(self.status))
        return int(np.count_nonzero(self.status == status)) / max(num_flown, 1)


def coverage_of(surface: Surface, views: Sequence[OrthoView]) -> Coverage | None:
    """The coverage of the ground by views in its frame; None where none sees it.

    What hides a part of the ground from a view is not looked at: cells are coarse.
    """
    level = _level(surface)
    footprints = [_footprint(view, level) for view in views]
    seen = [corners for corners in footprints if corners is not None]
    if not seen:
        return None
    grid = _grid_over(np.concatenate(seen), surface.grid)
    heights, measured = _heights_of(surface, grid, level)
    x, y = np.meshgrid(*grid.centers())
    places = np.stack([x, y, heights]).reshape(3, -1)
    num = np.zeros(places.shape[1], np.int64)
    lowest = np.full((_NUM_DIRECTIONS, places.shape[1]), np.inf, np.float32)
    highest = -lowest
    for view in views:
        rows = np.flatnonzero(_is_seen(view, places))
        tangents = _tangents(view.center, places[:, rows])
        num[rows] += 1
        lowest[:, rows] = np.minimum(lowest[:, rows], tangents)
        highest[:, rows] = np.maximum(highest[:, rows], tangents)
    spread = np.arctan(np.where(num > 0, highest, 0.0)) - np.arctan(np.where(num > 0, lowest, 0.0))
    angle = np.rad2deg(spread.max(axis=0)).astype(np.float32).reshape(x.shape)
    num = num.reshape(x.shape)
    return Coverage(
        grid=grid,
        num_keyframes=num,
        best_angle_deg=angle,
        status=_status(num, angle, measured),
    )


def coverage_geojson(
    coverage: Coverage, coordinates_of: Callable[[Float64Array], Float64Array]
) -> dict[str, Any]:
    """A GeoJSON FeatureCollection (RFC 7946): an area for holes, thin and good places each.

    Args:
        coverage: in the ground's frame.
        coordinates_of: longitudes and latitudes (P, 2) in degrees of places (P, 2) of that frame.
    """
    features = []
    for status in (CoverageStatus.HOLE, CoverageStatus.THIN, CoverageStatus.GOOD):
        rectangles = _rectangles(coverage.status == status)
        if not len(rectangles):
            continue
        corners = _corners(rectangles, coverage.grid)
        closed = coordinates_of(corners.reshape(-1, 2)).reshape(-1, 5, 2)
        crosses = np.ptp(closed[:, :, 0], axis=1) > _HALF_TURN_DEG  # the date line
        rings = [*closed[~crosses, :-1]]
        rings += [part for ring in closed[crosses] for part in cut_ring(ring[:-1])]
        of_status = coverage.status == status
        features.append(
            {
                "type": "Feature",
                "properties": {
                    "status": status.name.lower(),
                    "share": round(coverage.share_of(status), 4),
                    "min_keyframes": int(coverage.num_keyframes[of_status].min()),
                    "median_angle_deg": round(
                        float(np.median(coverage.best_angle_deg[of_status])), 2
                    ),
                },
                "geometry": {
                    "type": "MultiPolygon",
                    "coordinates": [[_closed(np.round(ring, 8))] for ring in rings],
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}


def _closed(ring: Float64Array) -> list[list[float]]:
    """A ring whose last place is its first."""
    places: list[list[float]] = ring.tolist()
    return [*places, places[0]]


def _level(surface: Surface) -> float:
    known = surface.heights[~np.isnan(surface.heights)]
    return float(np.median(known)) if len(known) else 0.0


def _footprint(view: OrthoView, level: float) -> Float64Array | None:
    """Corners (4, 2) of what a view shows of level ground, cut off where it nears the horizon."""
    width, height = view.size
    corners = np.array([[0.0, 0.0], [width, 0.0], [width, height], [0.0, height]])
    rays = np.column_stack([(corners - view.pinhole[2:]) / view.pinhole[:2], np.ones(4)])
    directions = np.linalg.solve(view.cam_from_ground[:, :3], rays.T).T
    above = float(view.center[2]) - level
    if above <= 0.0:
        return None
    across = np.linalg.norm(directions[:, :2], axis=1)
    down = np.maximum(-directions[:, 2], across / _REACH)
    if not (down > 0.0).all() or not (directions[:, 2] < 0.0).any():
        return None
    return np.asarray(view.center[:2] + directions[:, :2] / down[:, None] * above)


def _grid_over(places: Float64Array, surface_grid: GroundGrid) -> GroundGrid:
    low, high = places.min(axis=0), places.max(axis=0)
    cell = round_cell(
        max(float((high - low).max()) / (_MAX_EDGE_CELLS - 1), _LEAST_CELLS * surface_grid.cell)
    )
    west, south = np.floor(low / cell).astype(int)
    east, north = np.ceil(high / cell).astype(int)
    return GroundGrid(
        cell=cell,
        west=int(west),
        north=int(north),
        num_columns=max(int(east - west), 1),
        num_lines=max(int(north - south), 1),
    )


def _heights_of(
    surface: Surface, grid: GroundGrid, level: float
) -> tuple[Float32Array, Float32Array]:
    """Mean height (H, W) of each cell, or the level, and the share of it that was measured."""
    x, y = surface.grid.centers()
    columns = np.floor(x / grid.cell).astype(np.int64) - grid.west
    lines = grid.north - 1 - np.floor(y / grid.cell).astype(np.int64)
    cell = lines[:, None] * grid.num_columns + columns
    inside = ((lines >= 0) & (lines < grid.num_lines))[:, None]
    inside = inside & (columns >= 0) & (columns < grid.num_columns)
    known = inside & ~np.isnan(surface.heights)
    size = grid.num_lines * grid.num_columns
    num = np.bincount(cell[known], minlength=size)
    total = np.bincount(cell[known], weights=surface.heights[known], minlength=size)
    measured = np.bincount(cell[inside & surface.is_measured], minlength=size)
    heights = np.where(num > 0, total / np.maximum(num, 1), level)
    share = measured * (surface.grid.cell / grid.cell) ** 2
    shape = grid.num_lines, grid.num_columns
    return heights.reshape(shape).astype(np.float32), share.reshape(shape).astype(np.float32)


def _is_seen(view: OrthoView, places: Float64Array) -> BoolArray:
    """Whether a view shows places (3, N), not too flat."""
    in_cam = view.cam_from_ground[:, :3] @ places + view.cam_from_ground[:, 3:]
    width, height = view.size
    x, y = projected(view.pinhole, in_cam)
    ray = view.center[:, None] - places
    is_steep = np.hypot(ray[0], ray[1]) <= _REACH * ray[2]
    is_inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return np.asarray((in_cam[2] > 0) & is_inside & is_steep)


def _tangents(center: Float64Array, places: Float64Array) -> Float32Array:
    """How far to each direction of the plan rays from places (3, N) to a camera lean, (D, N)."""
    ray = center[:, None] - places
    angle = np.arange(_NUM_DIRECTIONS) * np.pi / _NUM_DIRECTIONS
    across = np.cos(angle)[:, None] * ray[0] + np.sin(angle)[:, None] * ray[1]
    return np.asarray(across / ray[2], np.float32)


def _status(num: Int64Array, angle_deg: Float32Array, measured: Float32Array) -> Uint8Array:
    """The status (H, W) of cells."""
    is_seen = num >= 2
    # Cells that no path over unseen ones leads to from outside.
    outside = np.pad((~is_seen).astype(np.uint8), 1, constant_values=1)
    _, parts = cv2.connectedComponents(outside, connectivity=4)
    is_enclosed = ~is_seen & (parts != parts[0, 0])[1:-1, 1:-1]
    is_good = (num >= _MIN_KEYFRAMES) & (angle_deg >= _MIN_ANGLE_DEG)
    is_good &= measured >= _LEAST_MEASURED
    status = np.full(num.shape, CoverageStatus.OUTSIDE, np.uint8)
    status[num > 0] = CoverageStatus.THIN
    status[is_enclosed] = CoverageStatus.HOLE
    status[is_good] = CoverageStatus.GOOD
    return status


def _rectangles(is_wanted: BoolArray) -> Int64Array:
    """Rectangles that cover wanted cells (H, W) once: left, top, right, bottom, (R, 4)."""
    done: list[tuple[int, int, int, int]] = []
    open_runs: dict[tuple[int, int], int] = {}  # left and right, and the line they began on
    for line in range(len(is_wanted) + 1):
        runs: set[tuple[int, int]] = set()
        if line < len(is_wanted):
            edges = np.flatnonzero(np.diff(is_wanted[line].astype(np.int8), prepend=0, append=0))
            runs = set(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
        for run in [run for run in open_runs if run not in runs]:
            done.append((run[0], open_runs.pop(run), run[1], line))
        for run in runs:
            open_runs.setdefault(run, line)
    return np.array(sorted(done), np.int64).reshape(-1, 4)


def _corners(rectangles: Int64Array, grid: GroundGrid) -> Float64Array:
    """Closed rings (R, 5, 2), counterclockwise, in the ground's frame."""
    left, right = (grid.west + rectangles[:, i] for i in (0, 2))
    upper, lower = (grid.north - rectangles[:, i] for i in (1, 3))
    x = np.stack([left, right, right, left, left], axis=1)
    y = np.stack([lower, lower, upper, upper, lower], axis=1)
    return np.asarray(np.stack([x, y], axis=-1) * grid.cell, np.float64)
