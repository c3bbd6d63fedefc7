"""Canvas: shapes, random tones and fractal noise painted on a texture in metres."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapters.town.world import Rect
from engine.types import Float32Array, Uint8Array

Colour = tuple[float, float, float]  # RGB, 0..255

_STRIP_ROWS = 256  # float work happens on strips, so that large canvases stay small in memory
_SUBPIXEL_BITS = 4


def fractal_noise(
    rng: np.random.Generator, shape: tuple[int, int], *, coarsest_px: float, finest_px: float = 1.0
) -> Float32Array:
    """Octaves of noise of equal strength, (H, W), mean about 0 and deviation below 1."""
    import cv2

    num_octaves = max(1, round(math.log2(max(coarsest_px, 1.0) / finest_px)) + 1)
    field: Float32Array = np.zeros((2, 2), np.float32)
    for octave in range(num_octaves):
        cell = max(coarsest_px, finest_px) / 2**octave
        size = (math.ceil(shape[1] / cell) + 1, math.ceil(shape[0] / cell) + 1)
        field = np.asarray(cv2.resize(field, size, interpolation=cv2.INTER_CUBIC), np.float32)
        field += rng.standard_normal((size[1], size[0]), dtype=np.float32)
    size = (shape[1], shape[0])
    whole = np.asarray(cv2.resize(field, size, interpolation=cv2.INTER_LINEAR), np.float32)
    whole /= np.float32(math.sqrt(num_octaves))
    return whole


def mixed(one: Colour, other: Colour, share: float) -> Colour:
    """``one`` with a share (0..1) of ``other``."""
    red, green, blue = ((1 - share) * a + share * b for a, b in zip(one, other, strict=True))
    return red, green, blue


def scaled(colour: Colour, gain: float) -> Colour:
    """A darker or lighter tone of a colour."""
    red, green, blue = (min(255.0, gain * channel) for channel in colour)
    return red, green, blue


class Canvas:
    """An image of a rectangle in metres, x right and y up.

    Attributes:
        area: what the canvas covers.
        pixels: (H, W, 3) uint8 RGB, the first row at the top of ``area``.
        rng: the source of everything random that is painted on it.
    """

    def __init__(
        self, rng: np.random.Generator, *, area: Rect, texel_m: float, colour: Colour
    ) -> None:
        self.rng = rng
        self.area = area
        width = max(2, round((area.x_max - area.x_min) / texel_m))
        height = max(2, round((area.y_max - area.y_min) / texel_m))
        self.pixels: Uint8Array = np.empty((height, width, 3), np.uint8)
        self.pixels[:] = np.round(colour)
        self._texels_per_m = (
            width / (area.x_max - area.x_min),
            height / (area.y_max - area.y_min),
        )

    def varied(self, colour: Colour, amount: float = 0.12) -> Colour:
        """A random neighbour of a colour: lighter or darker, a little warmer or colder."""
        gain = 1.0 + amount * float(self.rng.uniform(-1, 1))
        tint = amount * 0.3 * float(self.rng.uniform(-1, 1))
        red, green, blue = scaled(colour, gain)
        return min(255.0, red * (1 + tint)), green, min(255.0, blue * (1 - tint))

    def rect(self, rect: Rect, colour: Colour) -> None:
        """Fills a rectangle."""
        rows, columns = self._slices(rect)
        self.pixels[rows, columns] = [round(channel) for channel in colour]

    def polygon(self, points: ArrayLike, colour: Colour) -> None:
        """Fills a polygon (N, 2)."""
        import cv2

        cv2.fillPoly(self.pixels, [self._fixed_point(points)], colour, cv2.LINE_AA, _SUBPIXEL_BITS)

    def line(self, points: ArrayLike, colour: Colour, *, width_m: float) -> None:
        """Draws an open line through points (N, 2)."""
        import cv2

        thickness = max(1, round(width_m * self._texels_per_m[0]))
        fixed = [self._fixed_point(points)]
        cv2.polylines(self.pixels, fixed, False, colour, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)

    def disc(self, center: tuple[float, float], radius_m: float, colour: Colour) -> None:
        """Fills a disc."""
        import cv2

        column, row = self._fixed_point(center)
        radius = round(radius_m * self._texels_per_m[0] * 2**_SUBPIXEL_BITS)
        cv2.circle(
            self.pixels, (int(column), int(row)), radius, colour, -1, cv2.LINE_AA, _SUBPIXEL_BITS
        )

    def tones(self, rect: Rect, *, cell_m: tuple[float, float], amount: float) -> None:
        """Gives every cell of a grid its own brightness: tiles, slabs, bricks, no two alike."""
        import cv2

        rows, columns = self._slices(rect)
        patch = self.pixels[rows, columns]
        if patch.size == 0:
            return
        across = max(1, round((rect.x_max - rect.x_min) / cell_m[0]))
        down = max(1, round((rect.y_max - rect.y_min) / cell_m[1]))
        gains = 1.0 + amount * self.rng.uniform(-1, 1, (down, across)).astype(np.float32)
        size = patch.shape[1::-1]
        gain = np.asarray(cv2.resize(gains, size, interpolation=cv2.INTER_NEAREST), np.float32)
        patch[:] = cv2.multiply(np.ascontiguousarray(patch), _three(gain), dtype=cv2.CV_8U)

    def grain(self, *, coarsest_m: float, amount: float, finest_m: float = 0.0) -> None:
        """Multiplies everything by fractal noise."""
        noise = self._noise(coarsest_m, finest_m)
        np.clip(noise, -2.2, 2.2, out=noise)
        self.shade(1.0 + np.float32(amount) * noise)

    def blotches(
        self,
        colour: Colour,
        *,
        size_m: float,
        cover_ratio: float,
        strength: float,
        softness: float = 0.2,
    ) -> None:
        """Covers random patches with a colour: moss, ivy, dirt, dry grass, clouds."""
        noise = self._noise(size_m, size_m / 16)
        threshold = float(np.quantile(noise[::4, ::4], 1.0 - cover_ratio))
        alpha = np.clip((noise - threshold) / np.float32(softness), 0.0, 1.0) * np.float32(strength)
        self.blend(colour, alpha)

    def blend(self, colour: Colour, alpha: Float32Array) -> None:
        """Moves every pixel towards a colour by ``alpha`` (H, W) in 0..1."""
        import cv2

        target = np.empty_like(self.pixels[:_STRIP_ROWS])
        target[:] = np.round(colour)
        for start in range(0, len(self.pixels), _STRIP_ROWS):
            rows = slice(start, start + _STRIP_ROWS)
            strip, share = self.pixels[rows], alpha[rows]
            strip[:] = cv2.blendLinear(strip, target[: len(strip)], 1.0 - share, share)

    def shade(self, gain: Float32Array) -> None:
        """Multiplies every pixel by ``gain`` (H, W)."""
        import cv2

        for start in range(0, len(self.pixels), _STRIP_ROWS):
            rows = slice(start, start + _STRIP_ROWS)
            self.pixels[rows] = cv2.multiply(self.pixels[rows], _three(gain[rows]), dtype=cv2.CV_8U)

    def light(self, colour_gain: Colour) -> None:
        """Multiplies the three channels by constants: how a face is lit."""
        levels = np.arange(256)[:, None] * np.asarray(colour_gain)
        table = np.clip(np.round(levels), 0, 255).astype(np.uint8)
        for channel in range(3):
            self.pixels[..., channel] = table[self.pixels[..., channel], channel]

    def shadow_mask(self, outlines: Sequence[ArrayLike], *, softness_m: float) -> Float32Array:
        """How much of each pixel lies inside any convex outline (N, 2): (H, W) in 0..1."""
        import cv2

        mask = np.zeros(self.pixels.shape[:2], np.uint8)
        for outline in outlines:
            hull = cv2.convexHull(self._fixed_point(outline))
            cv2.fillConvexPoly(mask, hull, 255, cv2.LINE_AA, _SUBPIXEL_BITS)
        reach = 2 * round(softness_m * self._texels_per_m[0] / 2) + 1
        blurred = cv2.blur(mask, (reach, reach))
        return np.asarray(blurred, np.float32) / np.float32(255.0)

    def _noise(self, coarsest_m: float, finest_m: float) -> Float32Array:
        per_m = self._texels_per_m[0]
        height, width = self.pixels.shape[:2]
        return fractal_noise(
            self.rng,
            (height, width),
            coarsest_px=coarsest_m * per_m,
            finest_px=max(1.0, finest_m * per_m),
        )

    def _slices(self, rect: Rect) -> tuple[slice, slice]:
        height, width = self.pixels.shape[:2]
        per_x, per_y = self._texels_per_m
        left, right = (
            min(max(round((x - self.area.x_min) * per_x), 0), width)
            for x in (rect.x_min, rect.x_max)
        )
        top, bottom = (
            min(max(round((self.area.y_max - y) * per_y), 0), height)
            for y in (rect.y_max, rect.y_min)
        )
        return slice(top, bottom), slice(left, right)

    def _fixed_point(self, points: ArrayLike) -> NDArray[np.int32]:
        per_x, per_y = self._texels_per_m
        texels = np.asarray(points, np.float64) - (self.area.x_min, self.area.y_max)
        texels = texels * (per_x, -per_y) - 0.5
        fixed: NDArray[np.int32] = np.rint(texels * 2**_SUBPIXEL_BITS).astype(np.int32)
        return fixed


def _three(gain: Float32Array) -> Float32Array:
    import cv2

    return np.asarray(cv2.merge([gain, gain, gain]), np.float32)
