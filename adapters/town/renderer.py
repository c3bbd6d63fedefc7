"""Renderer of the synthetic town: exact visibility and depth per pixel, filtered textures.

Every surface is a rectangle. In the image, 1/depth and texture coordinates over depth are affine
in the pixel, so a face is tested on the whole of its bounding box at once; the nearest face wins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adapters.town.atlas import NUM_TAPS, Atlas
from adapters.town.ground import (
    HAZE,
    LANDSCAPE_HALF_WIDTH_M,
    paint_ground,
    paint_landscape,
    paint_sky,
)
from adapters.town.paint import Side, paint_box
from adapters.town.world import GROUND_HALF_WIDTH_M, TownLayout
from engine.types import Float32Array, Float64Array, Int64Array, Uint8Array

_NEAR_M = 0.1
_SEAM_M = 1e-3  # faces reach so far over their edges, so that no gap opens between two
_STRIP_ROWS = 32  # texture coordinates are worked out on strips that fit the cache
_SKY_HEIGHT_M, _SKY_HALF_WIDTH_M = 3000.0, 30_000.0
_LANDSCAPE_DROP_M = 0.05  # below the town's ground, so that the ground wins
_REFERENCE_WIDTH_PX = 640  # at this width texels have the sizes below
_FACE_TEXEL_M, _GROUND_TEXEL_M, _FINEST_SCALE = 0.055, 0.06, 0.6
_NOISE_MARGIN_PX = 64

# Right and down on a face as seen from outside, by side; and the corner it starts at, where 0 is
# the lower and 1 the upper bound of x, y, z.
_SIDE_AXES: dict[Side, tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]] = {
    Side.SOUTH: ((1, 0, 0), (0, 0, -1), (0, 0, 1)),
    Side.EAST: ((0, 1, 0), (0, 0, -1), (1, 0, 1)),
    Side.NORTH: ((-1, 0, 0), (0, 0, -1), (1, 1, 1)),
    Side.WEST: ((0, -1, 0), (0, 0, -1), (0, 1, 1)),
    Side.TOP: ((1, 0, 0), (0, -1, 0), (0, 1, 1)),
    Side.BOTTOM: ((1, 0, 0), (0, 1, 0), (0, 0, 0)),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Faces:
    """Textured rectangles; rows of the arrays belong together."""

    origins: Float64Array  # (F, 3) world, the texture's top left corner
    right: Float64Array  # (F, 3) unit, along the texture's rows
    down: Float64Array  # (F, 3) unit, along its columns
    sizes_m: Float64Array  # (F, 2) along right and down


class TownRenderer:
    """Paints the town once, then draws it from any pose."""

    def __init__(
        self,
        layout: TownLayout,
        *,
        seed: int,
        size: tuple[int, int],
        intrinsics: tuple[float, float, float, float],
        noise_sigma: float,
    ) -> None:
        self._seed = seed
        self._width, self._height = size
        self._intrinsics = intrinsics
        self._faces = _collect_faces(layout)
        self._sky_idx = len(self._faces.origins) - 1
        textures = _paint_textures(layout, seed=seed, width=size[0])
        self._texels_per_m = (
            np.array([texture.shape[1::-1] for texture in textures[:-1]]) / self._faces.sizes_m
        )
        self._atlas = Atlas(textures)
        focal_x, focal_y, center_x, center_y = intrinsics
        self._rays_x = ((np.arange(size[0]) + 0.5 - center_x) / focal_x).astype(np.float32)
        self._rays_y = ((np.arange(size[1]) + 0.5 - center_y) / focal_y).astype(np.float32)
        self._noise = self._noise_tile(noise_sigma)

    def draw(self, cam_from_world: Float64Array, *, index: int) -> tuple[Uint8Array, Float32Array]:
        """Pixels (H, W, 3) RGB and depth (H, W) along the optical axis, inf in the sky.

        Args:
            cam_from_world: (3, 4), metres.
            index: picks the sensor noise.
        """
        to_plane = self._planes(cam_from_world)
        label, inverse_depth = self._rasterize(cam_from_world, to_plane)
        pixels = self._shade(to_plane, label)
        pixels = self._finish(pixels, label, index=index)
        with np.errstate(divide="ignore"):
            depth = 1.0 / inverse_depth
        depth[label == self._sky_idx] = np.inf
        return pixels, depth

    def _planes(self, cam_from_world: Float64Array) -> Float64Array:
        """Rows s/z, t/z and 1/z of every face as affine functions of a ray, (F, 3, 3)."""
        rotation, translation = cam_from_world[:, :3], cam_from_world[:, 3]
        columns = np.stack(
            [
                self._faces.right @ rotation.T,
                self._faces.down @ rotation.T,
                self._faces.origins @ rotation.T + translation,
            ],
            axis=2,
        )
        facing = np.linalg.det(columns)
        edge_on = np.abs(facing) < 1e-9
        columns[edge_on] = np.eye(3)
        planes = np.linalg.inv(columns).astype(np.float64)
        planes[edge_on | (facing < 0)] = 0.0
        return planes

    def _rasterize(
        self, cam_from_world: Float64Array, planes: Float64Array
    ) -> tuple[Int64Array, Float32Array]:
        """Which face each pixel centre sees (H, W), the last index for none, and 1/depth."""
        tests = self._inside_tests(planes)
        boxes = self._bounding_boxes(cam_from_world)
        label = np.full((self._height, self._width), len(planes), np.int64)
        nearest = np.zeros((self._height, self._width), np.float32)
        is_seen = (planes[:, 2] != 0).any(axis=1) & (boxes[:, :2] < boxes[:, 2:]).all(axis=1)
        for face in np.flatnonzero(is_seen):
            x_min, y_min, x_max, y_max = boxes[face]
            along_x = tests[face, :, 0, None] * self._rays_x[x_min:x_max]
            along_y = tests[face, :, 1, None] * self._rays_y[y_min:y_max] + tests[face, :, 2, None]
            values = along_y[:, :, None] + along_x[:, None, :]
            window = (slice(y_min, y_max), slice(x_min, x_max))
            wins = values[4] > nearest[window]
            for edge in values[:4]:
                wins &= edge >= 0
            np.copyto(nearest[window], values[4], where=wins)
            np.copyto(label[window], face, where=wins)
        return label, nearest

    def _inside_tests(self, planes: Float64Array) -> Float32Array:
        """Four affine functions that are >= 0 inside a face, then 1/depth, (F, 5, 3)."""
        s, t, inverse = planes[:, 0], planes[:, 1], planes[:, 2]
        width, height = (self._faces.sizes_m[:, axis, None] for axis in range(2))
        return np.stack(
            [
                s + _SEAM_M * inverse,
                (width + _SEAM_M) * inverse - s,
                t + _SEAM_M * inverse,
                (height + _SEAM_M) * inverse - t,
                inverse,
            ],
            axis=1,
        ).astype(np.float32)

    def _bounding_boxes(self, cam_from_world: Float64Array) -> Int64Array:
        """Pixel ranges x_min, y_min, x_max, y_max that hold each face, (F, 4), maybe empty."""
        faces = self._faces
        across = faces.right * faces.sizes_m[:, :1]
        along = faces.down * faces.sizes_m[:, 1:]
        corners = faces.origins[:, None] + np.stack(
            [np.zeros_like(across), across, across + along, along], axis=1
        )
        corners = corners @ cam_from_world[:, :3].T + cam_from_world[:, 3]  # (F, 4, 3)
        following = np.roll(corners, -1, axis=1)
        rise = following[..., 2] - corners[..., 2]
        share = (_NEAR_M - corners[..., 2]) / np.where(rise == 0, 1.0, rise)
        crossing = corners + share[..., None] * (following - corners)
        points = np.concatenate([corners, crossing], axis=1)
        is_valid = np.concatenate(
            [corners[..., 2] >= _NEAR_M, (share > 0) & (share < 1) & (rise != 0)], axis=1
        )
        focal = np.array(self._intrinsics[:2])
        center = np.array(self._intrinsics[2:])
        points_xy = focal * points[..., :2] / np.where(is_valid, points[..., 2], 1.0)[..., None]
        points_xy += center
        low = np.where(is_valid[..., None], points_xy, np.inf).min(axis=1)
        high = np.where(is_valid[..., None], points_xy, -np.inf).max(axis=1)
        limit = (self._width, self._height)
        low = np.clip(np.floor(low - 1.0), 0, limit)
        high = np.clip(np.ceil(high + 1.0), 0, limit)
        return np.concatenate([low, high], axis=1).astype(np.int64)

    def _shade(self, planes: Float64Array, label: Int64Array) -> Uint8Array:
        coefficients = self._texture_coefficients(planes)
        shape = (self._height, NUM_TAPS, self._width)
        map_x, map_y = np.empty(shape, np.float32), np.empty(shape, np.float32)
        ray_x = self._rays_x[None, :]
        step_x, step_y = (np.float32(1.0 / focal) for focal in self._intrinsics[:2])
        for start in range(0, self._height, _STRIP_ROWS):
            rows = slice(start, start + _STRIP_ROWS)
            ray_y = self._rays_y[rows, None]
            terms = [np.take(column, label[rows]) for column in coefficients]
            x_over_z, y_over_z, one_over_z = (
                a * ray_x + b * ray_y + c for a, b, c in (terms[0:3], terms[3:6], terms[6:9])
            )
            depth = 1.0 / one_over_z
            x, y = x_over_z * depth, y_over_z * depth
            right, below = depth * step_x, depth * step_y
            self._atlas.tap_maps(
                (x, y),
                per_column=((terms[0] - x * terms[6]) * right, (terms[3] - y * terms[6]) * right),
                per_row=((terms[1] - x * terms[7]) * below, (terms[4] - y * terms[7]) * below),
                out=(map_x[rows], map_y[rows]),
            )
        return self._atlas.sample(map_x, map_y)

    def _texture_coefficients(self, planes: Float64Array) -> Float32Array:
        """Atlas x/z, atlas y/z and 1/z as affine functions of a ray, (9, F + 1).

        The last column is what pixels that see nothing get: one texel of haze.
        """
        coefficients = np.zeros((9, len(planes) + 1))
        corners = self._atlas.corners_xy
        for axis in range(2):
            rows = planes[:, axis] * self._texels_per_m[:, axis, None]
            rows = rows + corners[:-1, axis, None] * planes[:, 2]
            coefficients[3 * axis : 3 * axis + 3, :-1] = rows.T
            coefficients[3 * axis + 2, -1] = corners[-1, axis] + 1.0
        coefficients[6:9, :-1] = planes[:, 2].T
        coefficients[8, -1] = 1.0
        return coefficients.astype(np.float32)

    def _finish(self, pixels: Uint8Array, label: Int64Array, *, index: int) -> Uint8Array:
        """Softens outlines, which pixel centres alone would draw as stairs, and adds noise."""
        import cv2

        outline = np.zeros(label.shape, np.uint8)
        beside = label[:, 1:] != label[:, :-1]
        above = label[1:] != label[:-1]
        outline[:, 1:] |= beside
        outline[:, :-1] |= beside
        outline[1:] |= above
        outline[:-1] |= above
        cv2.copyTo(cv2.GaussianBlur(pixels, (3, 3), 0), outline, pixels)
        if self._noise is not None:
            rng = np.random.default_rng([self._seed, 7, index])
            row, column = rng.integers(0, _NOISE_MARGIN_PX, 2)
            tile = self._noise[row : row + self._height, column : column + self._width]
            pixels = np.asarray(cv2.add(pixels, tile, dtype=cv2.CV_8U), np.uint8)
        return pixels

    def _noise_tile(self, sigma: float) -> np.ndarray[tuple[int, ...], np.dtype[np.int16]] | None:
        if sigma == 0:
            return None
        rng = np.random.default_rng([self._seed, 8])
        shape = (self._height + _NOISE_MARGIN_PX, self._width + _NOISE_MARGIN_PX, 3)
        noise = sigma * rng.standard_normal(shape, dtype=np.float32)
        return np.round(noise).astype(np.int16)


def _collect_faces(layout: TownLayout) -> Faces:
    """Six faces of each box, then ground, landscape and sky."""
    bounds = list(layout.bounds)
    sides = [(bound, side) for bound in bounds for side in Side]
    for half, z, side in (
        (GROUND_HALF_WIDTH_M, 0.0, Side.TOP),
        (LANDSCAPE_HALF_WIDTH_M, -_LANDSCAPE_DROP_M, Side.TOP),
        (_SKY_HALF_WIDTH_M, _SKY_HEIGHT_M, Side.BOTTOM),
    ):
        sides.append((np.array([(-half, -half, z), (half, half, z)]), side))
    axes = np.array([_SIDE_AXES[side] for _, side in sides], dtype=np.float64)  # (F, 3, 3)
    both = np.array([bound for bound, _ in sides])  # (F, 2, 3)
    origins = np.where(axes[:, 2] > 0, both[:, 1], both[:, 0])
    extents = both[:, 1] - both[:, 0]
    sizes = np.stack([np.abs(axes[:, axis] * extents).sum(axis=1) for axis in range(2)], axis=1)
    return Faces(origins=origins, right=axes[:, 0], down=axes[:, 1], sizes_m=sizes)


def _paint_textures(layout: TownLayout, *, seed: int, width: int) -> list[Uint8Array]:
    """Textures in the order of the faces, and last a scrap of haze."""
    scale = max(_REFERENCE_WIDTH_PX / width, _FINEST_SCALE)
    textures: list[Uint8Array] = []
    for index, box in enumerate(layout.boxes):
        textures += paint_box(box, seed=seed, index=index, texel_m=scale * _FACE_TEXEL_M)
    textures.append(paint_ground(layout, seed=seed, texel_m=scale * _GROUND_TEXEL_M))
    textures.append(paint_landscape(seed=seed, texel_m=scale * 0.8))
    textures.append(paint_sky(seed=seed, half_width_m=_SKY_HALF_WIDTH_M, texel_m=scale * 60.0))
    textures.append(np.full((2, 2, 3), np.round(HAZE), np.uint8))
    return textures
