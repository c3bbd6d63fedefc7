"""The surface seen from above: a grid of heights (a digital surface model) from dense points.

Its frame is that of the ground: x east, y north, z up where the map is georeferenced, else z away
from what most surfaces are parallel to. Grids are aligned to whole cells of that frame, so that
those of later moments fit onto former ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np

from engine.types import BoolArray, Float32Array, Float64Array, Int64Array, freeze_field

_TILE_CELLS = 256  # edge of what is held while points come
_LEAST_TILE_CELLS = 32  # known cells of a tile; fewer are points far out
_TOP_SHARE = 0.1  # of the points of a cell that may lie above its height
_SPIKE_CELLS = 3.0  # how far a cell stands out of all around it when it is none of the surface
_STEP_CELLS = 3.0  # between heights around a gap that are of different surfaces
_LEAST_NEIGHBOURS = 3  # known ones around a cell that is filled
_ROUND_SIZES = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
_SAME_SIZE_RATIO = 1.4
_SIDEWAYS_DEG = 40.0  # of normals that say nothing about the vertical
_VERTICAL_STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class GroundGrid:
    """Square cells of the ground, the first line in the north; aligned to multiples of the cell."""

    cell: float  # edge, units of the ground's frame
    west: int  # cells from the frame's origin to the left edge
    north: int  # cells from the frame's origin to the upper edge
    num_columns: int
    num_lines: int

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Left, lower, right and upper edge in the ground's frame."""
        right, lower = self.west + self.num_columns, self.north - self.num_lines
        return (
            self.west * self.cell,
            lower * self.cell,
            right * self.cell,
            self.north * self.cell,
        )

    def centers(self) -> tuple[Float64Array, Float64Array]:
        """East of the columns (W,) and north of the lines (H,), of their middles."""
        x = (self.west + np.arange(self.num_columns) + 0.5) * self.cell
        y = (self.north - np.arange(self.num_lines) - 0.5) * self.cell
        return np.asarray(x, np.float64), np.asarray(y, np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Surface:
    """Heights of the ground and of what stands on it."""

    grid: GroundGrid
    heights: Float32Array  # (H, W) NaN where unknown
    is_measured: BoolArray  # (H, W) the others are filled from around them

    def __post_init__(self) -> None:
        shape = (self.grid.num_lines, self.grid.num_columns)
        freeze_field(self, "heights", shape, np.float32, finite=False)
        freeze_field(self, "is_measured", shape, np.bool_)


class SurfaceBuilder:
    """Collects points by cell, of any extent, in tiles.

    Args:
        cell: edge of a cell, to begin with.
        max_cells: of all tiles: cells are doubled when there would be more. A grid around all has
            twice as many at most, and the outermost tiles are left out of it otherwise.
    """

    def __init__(self, cell: float, *, max_cells: int = 4_000_000) -> None:
        self._cell = cell
        self._max_cells = max_cells
        # By line from the south and column; of sure points, and of the others.
        self._tiles: dict[tuple[int, int], Float32Array] = {}

    def add(self, points_in_ground: Float64Array, *, is_sure: BoolArray | None = None) -> None:
        """Adds points of a part of space: of a cell's heights the highest part wins.

        The height of a cell is what a tenth of its sure points lie above, or of the others where it
        has no sure ones.

        Args:
            points_in_ground: (P, 3).
            is_sure: (P,), None: all.
        """
        if is_sure is None:
            is_sure = np.ones(len(points_in_ground), bool)
        for layer, chosen in enumerate((is_sure, ~is_sure)):
            self._add(points_in_ground[chosen], layer)

    def _add(self, points_in_ground: Float64Array, layer: int) -> None:
        if not len(points_in_ground):
            return
        if len(self._tiles) * _TILE_CELLS**2 > self._max_cells:
            self._coarsen()
        places = np.floor(points_in_ground[:, :2] / self._cell).astype(np.int64)
        columns, lines = places.T
        order = np.lexsort((points_in_ground[:, 2], columns, lines))
        columns, lines = columns[order], lines[order]
        is_last = np.append((np.diff(columns) != 0) | (np.diff(lines) != 0), True)
        ends = np.flatnonzero(is_last)
        counts = np.diff(ends, prepend=-1)
        tops = ends - (_TOP_SHARE * counts).astype(np.int64)
        heights = points_in_ground[order[tops], 2].astype(np.float32)
        self._put(columns[ends], lines[ends], heights, layer)

    def _put(
        self, columns: Int64Array, lines: Int64Array, heights: Float32Array, layer: int
    ) -> None:
        tiles = np.stack([lines // _TILE_CELLS, columns // _TILE_CELLS], axis=1)
        for tile in np.unique(tiles, axis=0):
            rows = np.flatnonzero((tiles == tile).all(axis=1))
            key = (int(tile[0]), int(tile[1]))
            held = self._tiles.get(key)
            if held is None:
                held = np.full((2, _TILE_CELLS, _TILE_CELLS), np.nan, np.float32)
                self._tiles[key] = held
            at = layer, lines[rows] % _TILE_CELLS, columns[rows] % _TILE_CELLS
            held[at] = np.fmax(held[at], heights[rows])

    def _coarsen(self) -> None:
        """Leaves out tiles of points far out, or doubles the cells where that is not enough."""
        self._tiles = _well_filled(self._tiles)
        if len(self._tiles) * _TILE_CELLS**2 <= self._max_cells:
            return
        self._cell *= 2.0
        finer, self._tiles = self._tiles, {}
        half = _TILE_CELLS // 2
        for (line, column), held in finer.items():
            key = (line // 2, column // 2)
            if key not in self._tiles:
                self._tiles[key] = np.full((2, _TILE_CELLS, _TILE_CELLS), np.nan, np.float32)
            top, left = line % 2 * half, column % 2 * half
            pairs = np.fmax(held[:, ::2], held[:, 1::2])
            part = np.fmax(pairs[..., ::2], pairs[..., 1::2])
            self._tiles[key][:, top : top + half, left : left + half] = part

    def surface(self, *, max_gap: int = 40) -> Surface | None:
        """The surface of the points so far; None where there is none.

        Args:
            max_gap: gaps up to so many cells wide are filled.
        """
        tiles = _bounded(_well_filled(self._tiles), 2 * self._max_cells)
        if not tiles:
            return None
        lines, columns = np.array(list(tiles)).T
        south, west = int(lines.min()), int(columns.min())
        shape = (int(lines.max()) + 1 - south, int(columns.max()) + 1 - west)
        heights = np.full((shape[0] * _TILE_CELLS, shape[1] * _TILE_CELLS), np.nan, np.float32)
        for (line, column), held in tiles.items():
            top, left = (line - south) * _TILE_CELLS, (column - west) * _TILE_CELLS
            heights[top : top + _TILE_CELLS, left : left + _TILE_CELLS] = _surest(held)
        grid = GroundGrid(
            cell=self._cell,
            west=west * _TILE_CELLS,
            north=(south + shape[0]) * _TILE_CELLS,
            num_columns=heights.shape[1],
            num_lines=heights.shape[0],
        )
        return _finished(grid, heights[::-1], max_gap=max_gap)


def vertical_of(normals: Float32Array, *, towards: Float64Array) -> Float64Array:
    """The direction (3,) that most surfaces face among those that face ``towards`` (3,).

    For maps that are not georeferenced: most of what flights see is level or stands upright.
    """
    up = towards / np.linalg.norm(towards)
    for _ in range(_VERTICAL_STEPS):
        facing = normals[normals @ up > math.cos(math.radians(_SIDEWAYS_DEG))].astype(np.float64)
        total = facing.sum(axis=0)
        if not np.linalg.norm(total) > 0.0:
            break
        up = total / np.linalg.norm(total)
    return np.asarray(up)


def ground_from_world(up: Float64Array) -> Float64Array:
    """The rotation, as a pose (3, 4), into a frame whose z axis is ``up`` (3,), a unit vector.

    Its y axis is the world's in the plan, or x where that is the vertical.
    """
    ahead = np.array([0.0, 1.0, 0.0]) if abs(up[1]) < 0.9 else np.array([1.0, 0.0, 0.0])
    right = np.cross(ahead, up)
    right /= np.linalg.norm(right)
    return np.column_stack([np.stack([right, np.cross(up, right), up]), np.zeros(3)])


def round_cell(wanted: float, *, former: float | None = None) -> float:
    """A round number of at least about ``wanted``; the former one while it still fits."""
    if former is not None and 1 / _SAME_SIZE_RATIO < wanted / former < _SAME_SIZE_RATIO:
        return former
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(size for size in _ROUND_SIZES if size * power >= 0.999 * wanted) * power


def completed(surface: Surface, *, reach: int = 128) -> Surface:
    """A surface with smooth ground in its large gaps, too, as far as ``reach`` cells from known.

    A place on it is off by the error of the height times how far a view leans: enough to lay
    images onto it, not to measure heights. By pull and push (Gortler et al., The Lumigraph, 1996,
    section 3.4.2).
    """
    unknown = np.isnan(surface.heights)
    if not unknown.any() or unknown.all():
        return surface
    distance = cv2.distanceTransform(unknown.astype(np.uint8), cv2.DIST_L2, 3)
    wanted = unknown & (distance <= reach)
    heights = np.where(wanted, _pulled_and_pushed(surface.heights), surface.heights)
    return replace(surface, heights=heights)


def _pulled_and_pushed(heights: Float32Array) -> Float32Array:
    """Heights (H, W) whose unknown cells follow from means of ever larger surroundings."""
    known = ~np.isnan(heights)
    if known.all() or max(heights.shape) == 1:
        return heights
    height, width = heights.shape
    half = (width + 1) // 2, (height + 1) // 2
    padded = np.pad(
        np.stack([np.where(known, heights, 0.0), known], axis=-1),
        ((0, height % 2), (0, width % 2), (0, 0)),
    ).astype(np.float32)
    sums = cv2.resize(padded, half, interpolation=cv2.INTER_AREA)
    coarse = np.divide(
        sums[..., 0],
        sums[..., 1],
        where=sums[..., 1] > 0,
        out=np.full(half[::-1], np.nan, np.float32),
    )
    fine = cv2.resize(_pulled_and_pushed(coarse), (width, height), interpolation=cv2.INTER_LINEAR)
    return np.where(known, heights, fine)


def _surest(held: Float32Array) -> Float32Array:
    """Heights (T, T) of a tile (2, T, T)."""
    return np.asarray(np.where(np.isnan(held[0]), held[1], held[0]), np.float32)


def _well_filled(
    tiles: dict[tuple[int, int], Float32Array],
) -> dict[tuple[int, int], Float32Array]:
    """Tiles with more than a few points."""
    return {
        key: held
        for key, held in tiles.items()
        if np.count_nonzero(~np.isnan(_surest(held))) >= _LEAST_TILE_CELLS
    }


def _bounded(
    tiles: dict[tuple[int, int], Float32Array], max_cells: int
) -> dict[tuple[int, int], Float32Array]:
    """Tiles without the outermost ones, as far as the grid around all would be too large."""
    while tiles:
        keys = np.array(list(tiles))
        spans = keys.max(axis=0) - keys.min(axis=0) + 1
        if int(spans.prod()) * _TILE_CELLS**2 <= max_cells:
            break
        axis = int(spans.argmax())
        middle = np.median(keys[:, axis])
        farthest = keys[np.abs(keys[:, axis] - middle).argmax(), axis]
        tiles = {key: held for key, held in tiles.items() if key[axis] != farthest}
    return tiles


def _finished(grid: GroundGrid, heights: Float32Array, *, max_gap: int) -> Surface:
    """Without spikes, with small gaps filled, smoothed by a median that keeps edges."""
    heights = np.where(_is_spike(heights, grid.cell), np.float32(np.nan), heights)
    is_measured = ~np.isnan(heights)
    heights = _filled(heights, cell=grid.cell, steps=(max_gap + 1) // 2)
    smooth = cv2.medianBlur(np.where(np.isnan(heights), np.float32(0.0), heights), 3)
    is_whole = cv2.erode((~np.isnan(heights)).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    heights = np.where(is_whole, smooth, heights)
    lines, columns = (
        np.flatnonzero(is_measured.any(axis=1)),
        np.flatnonzero(is_measured.any(axis=0)),
    )
    if not len(lines):
        lines = columns = np.array([0])
    inside = slice(lines[0], lines[-1] + 1), slice(columns[0], columns[-1] + 1)
    cut = GroundGrid(
        cell=grid.cell,
        west=grid.west + int(columns[0]),
        north=grid.north - int(lines[0]),
        num_columns=int(columns[-1] - columns[0]) + 1,
        num_lines=int(lines[-1] - lines[0]) + 1,
    )
    return Surface(grid=cut, heights=heights[inside], is_measured=is_measured[inside])


def _is_spike(heights: Float32Array, cell: float) -> BoolArray:
    """Cells that no more than one of the eight around them comes near to."""
    known = ~np.isnan(heights)
    near = np.zeros(heights.shape, np.uint8)
    padded = np.pad(heights, 1, constant_values=np.nan)
    height, width = heights.shape
    for line, column in _AROUND:
        other = padded[1 + line : 1 + line + height, 1 + column : 1 + column + width]
        near += np.abs(other - heights) < _SPIKE_CELLS * cell
    return np.asarray(known & (near < 2))


_AROUND = [(line, column) for line in (-1, 0, 1) for column in (-1, 0, 1) if line or column]


def _filled(heights: Float32Array, *, cell: float, steps: int) -> Float32Array:
    """Gaps filled from their edges inwards by medians, so that heights at steps are not mixed.

    Only gaps that are closed within ``steps`` cells from their edges; what lies outside stays. A
    gap between a lower and a higher surface is filled with the lower one, which the higher one hid.
    """
    unknown = np.isnan(heights).astype(np.uint8)
    window = np.ones((2 * steps + 1, 2 * steps + 1), np.uint8)
    large = cv2.morphologyEx(
        unknown, cv2.MORPH_OPEN, window, borderType=cv2.BORDER_CONSTANT, borderValue=1
    )
    wanted = np.pad((unknown > 0) & (large == 0), 1)
    padded = np.pad(heights, 1, constant_values=np.nan)
    offsets = np.array([line * padded.shape[1] + column for line, column in _AROUND])
    flat = padded.ravel()
    places = np.flatnonzero(wanted)
    _, gaps = cv2.connectedComponents(wanted.astype(np.uint8), connectivity=8)
    gap = gaps.ravel()[places].astype(np.int64)
    tops = _tops_of_lower_sides(gap, flat[places[:, None] + offsets], cell)
    for limits in (tops, np.full_like(tops, np.inf)):
        for _ in range(2 * steps + 1):
            places = _fill_edge(flat, places, offsets, limits[gaps.ravel()[places]])
    return flat.reshape(padded.shape)[1:-1, 1:-1]


def _tops_of_lower_sides(gap: Int64Array, around: Float32Array, cell: float) -> Float32Array:
    """The height by gap that parts the lower from the higher side around it, or infinity.

    Args:
        gap: number of the gap of each cell (N,), from 1.
        around: heights (N, 8) around each cell, NaN in the gap.
        cell: edge of a cell.
    """
    tops = np.full(int(gap.max(initial=0)) + 1, np.inf, np.float32)
    known = ~np.isnan(around)
    edge_gap, edge_heights = np.repeat(gap, known.sum(axis=1)), around[known]
    order = np.lexsort((edge_heights, edge_gap))
    edge_gap, edge_heights = edge_gap[order], edge_heights[order]
    if len(edge_gap) < 2:
        return tops
    step = np.where(np.diff(edge_gap) == 0, np.diff(edge_heights), np.float32(0.0))
    # The largest step of each gap comes last.
    by_size = np.lexsort((step, edge_gap[:-1]))
    last = by_size[np.append(np.diff(edge_gap[:-1][by_size]) != 0, True)]
    last = last[step[last] > _STEP_CELLS * cell]
    tops[edge_gap[last]] = edge_heights[last] + step[last] / 2
    return tops


def _fill_edge(
    flat: Float32Array, places: Int64Array, offsets: Int64Array, limits: Float32Array
) -> Int64Array:
    """Fills those of places (N,) that enough lies around, below their limits; the others."""
    around = flat[places[:, None] + offsets]
    around[around > limits[:, None]] = np.nan
    counts = np.count_nonzero(~np.isnan(around), axis=1)
    ready = counts >= _LEAST_NEIGHBOURS
    ranked = np.sort(around[ready], axis=1)  # NaN at the end
    flat[places[ready]] = ranked[np.arange(len(ranked)), (counts[ready] - 1) // 2]
    return np.asarray(places[~ready])
