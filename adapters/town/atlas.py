"""Texture atlas: one image of all textures at all resolutions, and filtered samples from it.

Level 0 lies at the left; each next level is half as large and lies in a column at its right
(Williams, "Pyramidal parametrics", 1983). Samples average four taps along the longer axis of a
pixel's footprint, which keeps streets seen at a flat angle sharp without shimmer (after McCormack
et al., "Feline", 1999); neighbouring levels are mixed tap by tap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from engine.types import Float32Array, Float64Array, Int64Array, Uint8Array

NUM_LEVELS = 7
NUM_TAPS = 4
_ALIGNMENT = 1 << (NUM_LEVELS - 1)
_GUTTER_TEXELS = (8, 64)  # least and most; each texture's rim goes on so far, for taps over it
_SHARPNESS_LEVELS = 0.25  # levels finer than the footprint; above about 0.5 textures shimmer
_MAX_ANISOTROPY = 2.0 * NUM_TAPS


class Atlas:
    """Packed textures with their mip levels.

    Attributes:
        corners_xy: (F, 2) where each texture's top left corner lies on level 0, texels.
    """

    def __init__(self, textures: Sequence[Uint8Array]) -> None:
        gutters = [_gutter(texture) for texture in textures]
        sizes = np.array([texture.shape[1::-1] for texture in textures])
        tops, (width, height) = _pack(sizes + 2 * np.array(gutters)[:, None])
        self.corners_xy = tops + np.array(gutters, dtype=np.float64)[:, None]
        self._image = np.empty((height, width + width // 2, 3), np.uint8)
        self._image[:] = 128
        for texture, top, gutter in zip(textures, tops, gutters, strict=True):
            self._place(texture, top, gutter=gutter)
        self._level_scale = np.float32(0.5) ** np.arange(NUM_LEVELS, dtype=np.float32)
        self._level_x = np.where(np.arange(NUM_LEVELS) > 0, width, 0).astype(np.float32) - 0.5
        self._level_y = height * (1.0 - 2.0 * self._level_scale)
        self._level_y[0] = 0.0
        self._level_y -= np.float32(0.5)
        self._build_levels(width, height)

    def sample(self, map_x: Float32Array, map_y: Float32Array) -> Uint8Array:
        """The mean of each pixel's taps.

        Args:
            map_x: (H, T, W) from ``tap_maps``.
            map_y: likewise.

        Returns:
            (H, W, 3) RGB.
        """
        import cv2

        height, num_taps, width = map_x.shape
        size = (height * num_taps, width)
        taps = cv2.remap(
            self._image, map_x.reshape(size), map_y.reshape(size), interpolation=cv2.INTER_LINEAR
        )
        mean = cv2.resize(taps, (width, height), interpolation=cv2.INTER_AREA)
        return np.asarray(mean, dtype=np.uint8)

    def tap_maps(
        self,
        texture_xy: tuple[Float32Array, Float32Array],
        *,
        per_column: tuple[Float32Array, Float32Array],
        per_row: tuple[Float32Array, Float32Array],
        out: tuple[Float32Array, Float32Array],
    ) -> None:
        """Atlas coordinates of the taps of a block of pixels.

        Args:
            texture_xy: level 0 coordinates of the pixels' centres, each (H, W).
            per_column: how they change from a pixel to its right neighbour.
            per_row: how they change to the neighbour below.
            out: filled with coordinates in the atlas image, each (H, NUM_TAPS, W).
        """
        right = per_column[0] ** 2 + per_column[1] ** 2
        below = per_row[0] ** 2 + per_row[1] ** 2
        is_right = right > below
        major = np.where(is_right, right, below)
        area = per_column[0] * per_row[1] - per_column[1] * per_row[0]
        minor = area**2 / np.maximum(major, np.float32(1e-12))
        footprint = np.maximum(minor, major * np.float32(1.0 / _MAX_ANISOTROPY**2))
        level = 0.5 * np.log2(np.maximum(footprint, np.float32(1e-6))) - _SHARPNESS_LEVELS
        major_x = np.where(is_right, per_column[0], per_row[0])
        major_y = np.where(is_right, per_column[1], per_row[1])
        for tap in range(NUM_TAPS):
            shift = np.float32((tap + 0.5) / NUM_TAPS - 0.5)
            rounded = (level + np.float32((tap + 0.5) / NUM_TAPS)).clip(0, NUM_LEVELS - 1)
            level_idx = rounded.astype(np.intp)
            scale = self._level_scale[level_idx]
            out[0][:, tap] = (texture_xy[0] + shift * major_x) * scale + self._level_x[level_idx]
            out[1][:, tap] = (texture_xy[1] + shift * major_y) * scale + self._level_y[level_idx]

    def _place(self, texture: Uint8Array, top_left: Float64Array, *, gutter: int) -> None:
        import cv2

        padded = cv2.copyMakeBorder(texture, gutter, gutter, gutter, gutter, cv2.BORDER_REPLICATE)
        column, row = (int(value) for value in top_left)
        self._image[row : row + padded.shape[0], column : column + padded.shape[1]] = padded

    def _build_levels(self, width: int, height: int) -> None:
        import cv2

        finer = self._image[:height, :width]
        row = 0
        for level in range(1, NUM_LEVELS):
            size = (width >> level, height >> level)
            coarser = self._image[row : row + size[1], width : width + size[0]]
            coarser[:] = cv2.resize(finer, size, interpolation=cv2.INTER_AREA)
            finer, row = coarser, row + size[1]


def _gutter(texture: Uint8Array) -> int:
    """Large textures are seen at coarse levels, where a tap reaches far."""
    least, most = _GUTTER_TEXELS
    return max(least, min(most, int(min(texture.shape[:2])) // 16))


def _pack(sizes: Int64Array) -> tuple[Float64Array, tuple[int, int]]:
    """Shelf packing, tallest first, of sizes (F, 2): corners (F, 2), and the whole's size."""
    roomy = 1.2 * math.sqrt(float(sizes.prod(axis=1).sum()))
    width = _aligned(max(float(sizes[:, 0].max()), roomy))
    corners = np.zeros((len(sizes), 2))
    x = y = shelf_height = 0
    for index in np.argsort(-sizes[:, 1], kind="stable"):
        if x + sizes[index, 0] > width:
            x, y, shelf_height = 0, y + shelf_height, 0
        corners[index] = (x, y)
        x += sizes[index, 0]
        shelf_height = max(shelf_height, sizes[index, 1])
    return corners, (width, _aligned(y + shelf_height))


def _aligned(length: float) -> int:
    return _ALIGNMENT * math.ceil(length / _ALIGNMENT)
