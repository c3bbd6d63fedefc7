"""The orthophoto: keyframes' images laid onto the surface, as if seen straight from above.

It is made in tiles, and a tile is made again when the surface in it or around it changed, or a
keyframe that shows it came, moved or went.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from engine.dense.pinholes import projected
from engine.dense.surface import GroundGrid, Surface, completed
from engine.dense_types import DepthMap
from engine.types import (
    BoolArray,
    Float32Array,
    Float64Array,
    FrameId,
    Uint8Array,
    freeze_field,
)

_TILE_PX = 256
_COARSE = 16  # px of the orthophoto between the places where views are compared
_HIDDEN_STEP = 2  # px between those that are tested for what hides them
_MAX_VIEWS = 8  # of a tile
_BEST_VIEWS = 3  # that each place of a tile may ask for
_CHOICE_POWER = 16.0  # of weights: the best view dominates, and seams are still blended
_BORDER_RATIO = 0.1  # of an image's shorter edge, over which its weight falls to 0
_LEAST_COSINE = 0.3  # of the angle between a view and the vertical
_BEHIND_CELLS = 1.5  # of the surface that a point may lie below what is before it
_MAX_STEPS = 192  # cells that are looked for what hides a point, towards a camera
_MOVED_PX = 0.3  # movements of a keyframe that leave its tiles as they are
_NEAR_DEPTH_PX = (17, 17)  # window in which a pixel has to have depth
_USE_WITHOUT_DEPTH = 32  # of 255
_BLACK = 16  # grey level
_NARROW_PX = 5  # wide, of gaps that are closed whatever hides them
_FEW = 0.8  # share of points that are followed on: taking out the others costs as much as steps
_FAR_PX = 1e5  # beyond any image
_MAX_IMAGES = 12  # in memory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OrthoView:
    """A keyframe's undistorted image and its place in the frame of the ground."""

    frame_id: FrameId
    version: int  # of its pixels
    pinhole: Float64Array  # (4,) fx, fy, cx, cy, px
    size: tuple[int, int]  # width and height
    cam_from_ground: Float64Array  # (3, 4) affine
    sharpness: float = 1.0  # of its image, compared to those of other keyframes

    def __post_init__(self) -> None:
        freeze_field(self, "pinhole", (4,), np.float64)
        freeze_field(self, "cam_from_ground", (3, 4), np.float64)

    @property
    def center(self) -> Float64Array:
        """The camera in the ground's frame, (3,)."""
        solved = np.linalg.solve(self.cam_from_ground[:, :3], -self.cam_from_ground[:, 3])
        return np.asarray(solved, np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Tile:
    """A finished tile."""

    fingerprint: int  # of all that it was made from
    pixels: Uint8Array  # (256, 256, 4) RGBA; alpha 0 where no keyframe shows the surface


class Orthophoto:
    """The tiles of an orthophoto, and what they were made from. One thread at a time.

    Args:
        px_per_cell: pixels of the orthophoto along a cell of the surface.
    """

    def __init__(self, *, px_per_cell: int = 2) -> None:
        self._px_per_cell = px_per_cell
        self._cell = 0.0  # of the surface that the tiles were made from
        self._tiles: dict[tuple[int, int], _Tile] = {}  # by line from the north and column

    def update(
        self,
        surface: Surface,
        views: Sequence[OrthoView],
        pixels_of: Callable[[OrthoView], Uint8Array | None],
    ) -> None:
        """Makes tiles that are missing or were made from something else.

        Args:
            surface: in the ground's frame.
            views: of all keyframes in that frame.
            pixels_of: reads the image of a view (H, W, 4): RGB and how far each pixel may be used,
                0 to 255; None where it cannot be read.
        """
        if surface.grid.cell != self._cell:
            self._tiles, self._cell = {}, surface.grid.cell
        grid, images = self._grid(surface.grid), _Images(pixels_of)
        wanted = list(_tile_places(grid))
        self._tiles = {place: self._tiles[place] for place in wanted if place in self._tiles}
        relief, sight = _Relief(surface), _Sight(views)
        for place in wanted:
            ground = relief.tile(_tile_grid(grid, place), self._px_per_cell)
            chosen = _chosen_views(ground, sight)
            fingerprint = _fingerprint(ground, chosen)
            held = self._tiles.get(place)
            if held is not None and held.fingerprint == fingerprint:
                continue
            pixels = _render(ground, chosen, relief, images)
            self._tiles[place] = _Tile(fingerprint=fingerprint, pixels=pixels)

    def image(self, surface_grid: GroundGrid) -> tuple[GroundGrid, Uint8Array]:
        """The grid of the orthophoto over that of its surface, and its pixels (H, W, 4) RGBA."""
        grid = self._grid(surface_grid)
        pixels = np.zeros((grid.num_lines, grid.num_columns, 4), np.uint8)
        for place, tile in self._tiles.items():
            part = _tile_grid(grid, place)
            top, left = grid.north - part.north, part.west - grid.west
            lines = slice(max(top, 0), min(top + _TILE_PX, grid.num_lines))
            columns = slice(max(left, 0), min(left + _TILE_PX, grid.num_columns))
            pixels[lines, columns] = tile.pixels[
                lines.start - top : lines.stop - top, columns.start - left : columns.stop - left
            ]
        return grid, pixels

    def _grid(self, grid: GroundGrid) -> GroundGrid:
        n = self._px_per_cell
        return GroundGrid(
            cell=grid.cell / n,
            west=grid.west * n,
            north=grid.north * n,
            num_columns=grid.num_columns * n,
            num_lines=grid.num_lines * n,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ground:
    """The surface at the pixels of a tile."""

    grid: GroundGrid
    heights: Float32Array  # (256, 256) NaN where unknown

    def places(self, step: int = 1) -> Float32Array:
        """Points (3, h, w) of every ``step``-th pixel."""
        x, y = self.grid.centers()
        x, y = np.meshgrid(x[step // 2 :: step], y[step // 2 :: step])
        heights = self.heights[step // 2 :: step, step // 2 :: step]
        return np.stack([x, y, heights]).astype(np.float32)


class _Relief:
    """The surface with what is asked of it by tiles.

    Images are laid onto all of it, but what is not known well hides nothing.
    """

    def __init__(self, surface: Surface) -> None:
        self._grid = surface.grid
        self._heights = completed(surface).heights
        known = ~np.isnan(surface.heights)
        self._highest = float(surface.heights[known].max()) if known.any() else 0.0
        self._lowest = np.where(known, surface.heights, np.float32(-np.inf))

    def tile(self, grid: GroundGrid, px_per_cell: int) -> _Ground:
        """The surface at a tile's pixels: smooth on slopes, sharp at steps."""
        x, y = grid.centers()
        columns = (x / self._grid.cell - self._grid.west - 0.5).astype(np.float32)
        lines = (self._grid.north - y / self._grid.cell - 0.5).astype(np.float32)
        map_x, map_y = np.meshgrid(columns, lines)
        linear, nearest = (
            cv2.remap(
                self._heights,
                map_x,
                map_y,
                interpolation,
                borderMode=cv2.BORDER_CONSTANT,
                borderValue=float("nan"),
            )
            for interpolation in (cv2.INTER_LINEAR, cv2.INTER_NEAREST)
        )
        is_smooth = np.abs(linear - nearest) < self._grid.cell
        heights = np.where(is_smooth, linear, nearest)
        return _Ground(grid=grid, heights=np.asarray(heights, np.float32))

    def is_hidden(self, places: Float32Array, center: Float64Array) -> BoolArray:
        """Whether the surface lies between points (3, N) of it and a camera (3,)."""
        cell = self._grid.cell
        ray = center.astype(np.float32)[:, None] - places
        across = np.maximum(np.hypot(ray[0], ray[1]), np.float32(1e-9))
        step = ray / across * np.float32(cell)
        num_steps = _steps_below(places[2], step[2], self._highest)
        num_steps = np.minimum(num_steps, across / np.float32(cell))
        is_hidden = np.zeros(places.shape[1], bool)
        rows = np.flatnonzero(num_steps >= 1.0)
        at, step, num_steps = places[:, rows], step[:, rows], num_steps[rows]
        at[2] += np.float32(_BEHIND_CELLS * cell)
        for number in range(1, _MAX_STEPS + 1):
            if not len(rows):
                break
            at += step
            hit = self._heights_at(at) > at[2]
            is_hidden[rows[hit]] = True
            going = ~hit & (num_steps >= number + 1)
            if np.count_nonzero(going) < _FEW * len(going):
                rows, at, step, num_steps = (
                    rows[going],
                    at[:, going],
                    step[:, going],
                    num_steps[going],
                )
        return is_hidden

    def _heights_at(self, places: Float32Array) -> Float32Array:
        """Heights below points (3, N), minus infinity where unknown."""
        height, width = self._lowest.shape
        column = places[0] / np.float32(self._grid.cell) - np.float32(self._grid.west)
        line = np.float32(self._grid.north) - places[1] / np.float32(self._grid.cell)
        inside = (column >= 0) & (column < width) & (line >= 0) & (line < height)
        at = line.astype(np.int32) * np.int32(width) + column.astype(np.int32)
        found = self._lowest.ravel()[np.clip(at, 0, self._lowest.size - 1)]
        return np.asarray(np.where(inside, found, np.float32(-np.inf)), np.float32)


def _steps_below(heights: Float32Array, rise: Float32Array, highest: float) -> Float32Array:
    """How many steps rays take until they are above everything."""
    rise = np.maximum(rise, np.float32(1e-6))
    steps = np.minimum((np.float32(highest) - heights) / rise, np.float32(_MAX_STEPS))
    return np.asarray(steps, np.float32)


def _tile_places(grid: GroundGrid) -> Iterator[tuple[int, int]]:
    """Tiles that cover a grid, numbered from the frame's origin, to and fro from line to line."""
    top, bottom = -grid.north // _TILE_PX, -(grid.north - grid.num_lines + 1) // _TILE_PX
    left, right = grid.west // _TILE_PX, (grid.west + grid.num_columns - 1) // _TILE_PX
    for line in range(top, bottom + 1):
        columns = range(left, right + 1)
        for column in columns if line % 2 else reversed(columns):
            yield line, column


def _tile_grid(grid: GroundGrid, place: tuple[int, int]) -> GroundGrid:
    return GroundGrid(
        cell=grid.cell,
        west=place[1] * _TILE_PX,
        north=-place[0] * _TILE_PX,
        num_columns=_TILE_PX,
        num_lines=_TILE_PX,
    )


def _chosen_views(ground: _Ground, sight: _Sight) -> list[OrthoView]:
    """The views that are best somewhere in a tile, the most wanted first."""
    places = ground.places(_COARSE).reshape(3, -1)
    places = places[:, ~np.isnan(places[2])]
    near = sight.near(places) if places.shape[1] else []
    if not near:
        return []
    scores = np.stack([_scores(view, places)[0] for view in near])
    best = np.argsort(-scores, axis=0, kind="stable")[:_BEST_VIEWS]
    wanted: Float64Array = np.zeros(len(near))
    for rank, rows in enumerate(best):
        is_seen = scores[rows, np.arange(scores.shape[1])] > 0
        np.add.at(wanted, rows[is_seen], 1.0 / (1 + rank))
    order = np.argsort(-wanted, kind="stable")[:_MAX_VIEWS]
    return [near[row] for row in order if wanted[row] > 0]


class _Sight:
    """Which of many views may see a box, asked of all of them at once."""

    def __init__(self, views: Sequence[OrthoView]) -> None:
        self._views = views
        cam_from_ground = np.array([view.cam_from_ground for view in views]).reshape(-1, 3, 4)
        self._linear = np.ascontiguousarray(cam_from_ground[:, :, :3]).reshape(-1, 3)
        self._shift = cam_from_ground[:, :, 3:]
        self._pinhole = np.array([view.pinhole for view in views]).reshape(-1, 4)
        self._size = np.array([view.size for view in views]).reshape(-1, 2)

    def near(self, places: Float32Array) -> list[OrthoView]:
        """Those before which the box around points (3, N) is not all beyond the same edge."""
        bounds = np.stack([places.min(axis=1), places.max(axis=1)])
        corners = np.array([[bounds[i, 0], bounds[j, 1], bounds[k, 2]] for i, j, k in _CORNERS])
        in_cam = (self._linear @ corners.T).reshape(-1, 3, len(corners)) + self._shift
        depth = in_cam[:, 2]
        is_beyond = (depth <= 0).all(axis=1)
        for axis in (0, 1):
            offset = in_cam[:, axis] * self._pinhole[:, axis, None]
            center, edge = self._pinhole[:, 2 + axis, None], self._size[:, axis, None]
            is_beyond |= (offset + center * depth < 0).all(axis=1)
            is_beyond |= (offset + (center - edge) * depth > 0).all(axis=1)
        return [self._views[row] for row in np.flatnonzero(~is_beyond).tolist()]


_CORNERS = [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)]


def _scores(
    view: OrthoView, places: Float32Array
) -> tuple[Float32Array, Float32Array, Float32Array]:
    """How well a view shows points (3, N), 0 where not at all, and where: x and y (N,), px.

    The number of its pixels on a unit of level ground, times the cosine of the angle to the
    vertical, times how sharp it is, less towards its border.
    """
    cam_from_ground = view.cam_from_ground.astype(np.float32)
    in_cam = cam_from_ground[:, :3] @ places + cam_from_ground[:, 3:]
    pinhole = view.pinhole.astype(np.float32)
    x, y = projected(pinhole, in_cam)
    with np.errstate(divide="ignore", invalid="ignore"):
        ray = view.center.astype(np.float32)[:, None] - places
        cosine = ray[2] / np.sqrt((ray * ray).sum(axis=0))
        width, height = view.size
        inside = np.minimum(np.minimum(x, width - x), np.minimum(y, height - y))
        border = np.clip(inside / np.float32(_BORDER_RATIO * min(width, height)), 0.0, 1.0)
        sampling = np.sqrt(pinhole[0] * pinhole[1]) / in_cam[2]
    is_seen = (in_cam[2] > 0) & (border > 0) & (cosine > _LEAST_COSINE)
    score = sampling * cosine * border * np.float32(view.sharpness)
    return np.where(is_seen, score, np.float32(0.0)), x, y


def _render(
    ground: _Ground, views: Sequence[OrthoView], relief: _Relief, images: _Images
) -> Uint8Array:
    """The pixels (256, 256, 4) of a tile."""
    places = ground.places().reshape(3, -1)
    total = np.zeros(_TILE_PX * _TILE_PX, np.float32)
    colors = np.zeros((_TILE_PX * _TILE_PX, 3), np.float32)
    seen = [(view, *_scores(view, places)) for view in views]
    best = np.maximum.reduce([score for _, score, _, _ in seen]) if seen else total
    for view, score, x, y in seen:
        is_wanted = score > np.maximum(_LEAST_SHARE * best, 0.0)
        is_wanted &= ~_hidden_pixels(ground, is_wanted, view, relief)
        rows = np.flatnonzero(is_wanted)
        image = images.of(view) if len(rows) else None
        if image is None:
            continue
        sampled = _sampled(image, x[rows], y[rows])
        weight = sampled[:, 3] / np.float32(255.0) * (score[rows] / best[rows]) ** _CHOICE_POWER
        colors[rows] += weight[:, None] * sampled[:, :3]
        total[rows] += weight
    # Where noise of the surface hides a place from all views, the best one shows it all the same.
    narrow = _narrow_parts((total == 0.0) & (best > 0.0))
    for view, score, x, y in seen:
        rows = np.flatnonzero(narrow & (score == best) & (total == 0.0))
        image = images.of(view) if len(rows) else None
        if image is not None:
            sampled = _sampled(image, x[rows], y[rows])
            total[rows] = sampled[:, 3]
            colors[rows] = sampled[:, :3] * sampled[:, 3:]
    rgba = np.zeros((_TILE_PX * _TILE_PX, 4), np.uint8)
    shown = np.flatnonzero(total > 0)
    rgba[shown, :3] = np.rint(colors[shown] / total[shown, None]).astype(np.uint8)
    rgba[shown, 3] = 255
    return rgba.reshape(_TILE_PX, _TILE_PX, 4)


def _narrow_parts(is_missing: BoolArray) -> BoolArray:
    """Those of missing pixels (N,) of a tile that lie in gaps a few pixels wide."""
    missing = is_missing.reshape(_TILE_PX, _TILE_PX).astype(np.uint8)
    window = np.ones((_NARROW_PX, _NARROW_PX), np.uint8)
    wide = cv2.morphologyEx(missing, cv2.MORPH_OPEN, window)
    return np.asarray((missing > 0) & (wide == 0)).ravel()


def _hidden_pixels(
    ground: _Ground, is_wanted: BoolArray, view: OrthoView, relief: _Relief
) -> BoolArray:
    """Which pixels (N,) the surface hides from a view, looked up for every second one each way."""
    step = slice(_HIDDEN_STEP // 2, None, _HIDDEN_STEP)
    places = ground.places(_HIDDEN_STEP).reshape(3, -1)
    rows = np.flatnonzero(is_wanted.reshape(_TILE_PX, _TILE_PX)[step, step])
    is_hidden = np.zeros(places.shape[1], bool)
    is_hidden[rows] = relief.is_hidden(places[:, rows], view.center)
    edge = _TILE_PX // _HIDDEN_STEP
    full = is_hidden.reshape(edge, edge).repeat(_HIDDEN_STEP, axis=0).repeat(_HIDDEN_STEP, axis=1)
    return full.ravel()


_LEAST_SHARE = 0.05  # of the best view's score


def _sampled(image: Uint8Array, x: Float32Array, y: Float32Array) -> Float32Array:
    """An image (H, W, 4) at places (N,) of COLMAP's convention, px; (N, 4)."""
    num = len(x)
    lines = -(-num // _TILE_PX)
    # OpenCV takes maps of at most 32,767 lines and columns.
    at = np.zeros((2, lines, _TILE_PX), np.float32)
    at.reshape(2, -1)[:, :num] = x - 0.5, y - 0.5
    border = cv2.BORDER_REPLICATE
    found = cv2.remap(image, at[0], at[1], cv2.INTER_LINEAR, borderMode=border)
    return np.asarray(found, np.float32).reshape(-1, 4)[:num]


def _fingerprint(ground: _Ground, views: Sequence[OrthoView]) -> int:
    """A number that changes with the surface of a tile and with the views it is made of."""
    step = np.float32(ground.grid.cell / 2)
    heights = np.nan_to_num(np.rint(ground.heights / step), nan=-(2**30)).astype(np.int32)
    fingerprint = zlib.crc32(heights.tobytes())
    middle = np.array([*(sum(axis) / len(axis) for axis in ground.grid.centers()), 0.0])
    known = ground.heights[~np.isnan(ground.heights)]
    middle[2] = float(np.median(known)) if len(known) else 0.0
    corners = middle + _TILE_PX / 2 * ground.grid.cell * np.array(_TILE_CORNERS)
    for view in views:
        places = _scores(view, corners.T.astype(np.float32))[1:]
        moved = np.rint(np.clip(np.nan_to_num(np.stack(places)), -_FAR_PX, _FAR_PX) / _MOVED_PX)
        fingerprint = zlib.crc32(moved.astype(np.int64).tobytes(), fingerprint)
        fingerprint = zlib.crc32(f"{view.frame_id} {view.version}".encode(), fingerprint)
    return fingerprint


_TILE_CORNERS = [(-1.0, -1.0, 0.0), (1.0, -1.0, 0.0), (0.0, 1.0, 0.0)]


class _Images:
    """The few images that were read last: neighbouring tiles show the same ones."""

    def __init__(self, pixels_of: Callable[[OrthoView], Uint8Array | None]) -> None:
        self._pixels_of = pixels_of
        self._held: dict[FrameId, Uint8Array | None] = {}

    def of(self, view: OrthoView) -> Uint8Array | None:
        """The image of a view."""
        if view.frame_id in self._held:
            image = self._held.pop(view.frame_id)
        else:
            image = self._pixels_of(view)
        self._held[view.frame_id] = image
        while len(self._held) > _MAX_IMAGES:
            del self._held[next(iter(self._held))]
        return image


def usable_image(depth_map: DepthMap) -> Uint8Array:
    """The colours of a depth map (H, W, 4), with how far each may be used as the last channel.

    What has no depth nearby may be masked, have moved or be hidden from others: other views go
    before it. Black without depth is what the lens does not show.
    """
    near = cv2.dilate((depth_map.depth > 0).astype(np.uint8), np.ones(_NEAR_DEPTH_PX, np.uint8))
    use = np.where(near > 0, np.uint8(255), np.uint8(_USE_WITHOUT_DEPTH))
    use[(near == 0) & (depth_map.colors.max(axis=2) < _BLACK)] = 0
    return np.dstack([depth_map.colors, use])


def sharpness_of(pixels: Uint8Array) -> float:
    """How much detail an image (H, W, 3) has, to compare those of a flight: blur lowers it.

    The mean size of the Laplacian over that of the brightness.
    """
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    detail = cv2.Laplacian(cv2.GaussianBlur(grey, (3, 3), 0), cv2.CV_16S)
    return float(np.abs(detail).mean() / max(float(grey.mean()), 1.0))
