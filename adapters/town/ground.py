"""Ground textures: the ground of the synthetic town, the fields around it and the sky."""

from __future__ import annotations

import numpy as np

from adapters.town.canvas import Canvas, Colour, fractal_noise, scaled
from adapters.town.paint import SUN_DIRECTION
from adapters.town.world import (
    BLOCK_SPANS_M,
    GROUND_HALF_WIDTH_M,
    PARK,
    PLAZA,
    ROAD_CENTERS_M,
    SIDEWALK_M,
    TOWN_HALF_WIDTH_M,
    Box,
    Rect,
    TownLayout,
    block_rect,
)
from engine.types import Float32Array, Float64Array, Uint8Array

HAZE: Colour = (205, 216, 226)
LANDSCAPE_HALF_WIDTH_M = 800.0
_GRASS: Colour = (104, 132, 70)
_ASPHALT: Colour = (122, 121, 123)
_PAVING: Colour = (176, 168, 152)
_PAINT: Colour = (226, 224, 214)
_SKY: Colour = (108, 158, 214)
_FIELDS: tuple[Colour, ...] = (
    (120, 146, 78),
    (158, 158, 88),
    (92, 124, 66),
    (186, 172, 106),
    (136, 112, 80),
    (112, 140, 92),
)


def paint_ground(layout: TownLayout, *, seed: int, texel_m: float) -> Uint8Array:
    """The town's ground with streets, lawns, paving and the shadows of all boxes, north up."""
    rng = np.random.default_rng([seed, 4])
    half = GROUND_HALF_WIDTH_M
    canvas = Canvas(rng, area=Rect(-half, -half, half, half), texel_m=texel_m, colour=_GRASS)
    canvas.blotches((138, 146, 84), size_m=14.0, cover_ratio=0.35, strength=0.6)
    canvas.blotches((72, 106, 52), size_m=5.0, cover_ratio=0.25, strength=0.6)
    town = TOWN_HALF_WIDTH_M
    canvas.rect(Rect(-town, -town, town, town), _ASPHALT)
    _paint_asphalt(canvas)
    for column in range(len(BLOCK_SPANS_M)):
        for row in range(len(BLOCK_SPANS_M)):
            _paint_block(canvas, (column, row))
    _paint_road_marks(canvas)
    canvas.grain(coarsest_m=10.0, amount=0.13)
    _paint_shadows(canvas, layout)
    return canvas.pixels


def paint_landscape(*, seed: int, texel_m: float) -> Uint8Array:
    """Fields around the town that fade into haze, north up."""
    rng = np.random.default_rng([seed, 5])
    half = LANDSCAPE_HALF_WIDTH_M
    canvas = Canvas(rng, area=Rect(-half, -half, half, half), texel_m=texel_m, colour=_GRASS)
    canvas.pixels = _patchwork(rng, len(canvas.pixels))
    canvas.blotches((58, 88, 52), size_m=120.0, cover_ratio=0.16, strength=0.95)
    distance = _distance_from_middle(len(canvas.pixels), half)
    canvas.blend(_GRASS, np.clip(1.6 - distance / 130.0, 0.0, 1.0))
    canvas.grain(coarsest_m=60.0, amount=0.16)
    canvas.blend(HAZE, np.clip((distance - 130.0) / (half - 150.0), 0.0, 1.0) ** 0.8)
    return canvas.pixels


def paint_sky(*, seed: int, half_width_m: float, texel_m: float) -> Uint8Array:
    """Soft clouds on a high ceiling, hazy towards the horizon."""
    rng = np.random.default_rng([seed, 6])
    half = half_width_m
    canvas = Canvas(rng, area=Rect(-half, -half, half, half), texel_m=texel_m, colour=_SKY)
    canvas.blotches((244, 246, 250), size_m=half / 6, cover_ratio=0.6, strength=0.85, softness=2.2)
    distance = _distance_from_middle(len(canvas.pixels), half)
    canvas.blend(HAZE, np.clip(distance / (0.9 * half), 0.0, 1.0) ** 0.7)
    return canvas.pixels


def _distance_from_middle(num_texels: int, half_width_m: float) -> Float32Array:
    along = np.linspace(-half_width_m, half_width_m, num_texels, dtype=np.float32)
    return np.hypot(along[:, None], along[None, :])


def _patchwork(rng: np.random.Generator, num_texels: int) -> Uint8Array:
    """Fields of different colours with crooked borders, (num_texels, num_texels, 3)."""
    import cv2

    num_fields = 18
    colours = np.array(_FIELDS)[rng.integers(len(_FIELDS), size=(num_fields, num_fields))]
    colours = colours * rng.uniform(0.85, 1.15, (num_fields, num_fields, 1))
    along = np.arange(num_texels, dtype=np.float32) * np.float32(num_fields / num_texels)
    shape = (num_texels, num_texels)
    bend_x = 0.35 * fractal_noise(rng, shape, coarsest_px=num_texels / 12, finest_px=8.0)
    bend_y = 0.35 * fractal_noise(rng, shape, coarsest_px=num_texels / 12, finest_px=8.0)
    fields = cv2.remap(
        np.clip(colours, 0, 255).astype(np.uint8),
        along[None, :] + bend_x,
        along[:, None] + bend_y,
        cv2.INTER_NEAREST,
        borderMode=cv2.BORDER_REFLECT,
    )
    return np.asarray(fields, dtype=np.uint8)


def _paint_asphalt(canvas: Canvas) -> None:
    """Repairs, cracks, stains and manholes, so that every metre of street is its own."""
    rng, half = canvas.rng, TOWN_HALF_WIDTH_M
    town = Rect(-half, -half, half, half)
    canvas.blotches((98, 98, 103), size_m=9.0, cover_ratio=0.3, strength=0.45)
    canvas.blotches((146, 142, 136), size_m=3.0, cover_ratio=0.14, strength=0.55)
    for _ in range(1300):
        x, y = rng.uniform(-half, half, 2)
        size_x, size_y = rng.uniform(0.4, 2.6, 2)
        tone = scaled(_ASPHALT, float(rng.uniform(0.76, 1.2)))
        canvas.rect(Rect(float(x), float(y), float(x + size_x), float(y + size_y)), tone)
    for _ in range(2600):
        heading = rng.normal(0, 0.5, 2)
        steps = np.cumsum(heading + rng.normal(0, 0.3, (6, 2)), axis=0)
        tone = scaled(_ASPHALT, float(rng.choice((0.62, 0.75, 1.2))))
        start = rng.uniform(-half, half, 2)
        canvas.line(start + steps, tone, width_m=float(rng.uniform(0.05, 0.11)))
    for _ in range(420):
        center = (float(rng.uniform(-half, half)), float(rng.uniform(-half, half)))
        canvas.disc(center, 0.42, (58, 56, 56))
        canvas.disc(center, float(rng.uniform(0.18, 0.34)), canvas.varied((132, 126, 118), 0.3))
    canvas.tones(town, cell_m=(0.6, 0.6), amount=0.07)


def _paint_block(canvas: Canvas, block: tuple[int, int]) -> None:
    rect = block_rect(*block)
    canvas.rect(rect.inset(-0.15), (148, 144, 138))
    canvas.rect(rect, _PAVING)
    canvas.tones(rect, cell_m=(0.8, 0.8), amount=0.2)
    inner = rect.inset(SIDEWALK_M)
    if block == PARK:
        _paint_lawn(canvas, inner)
        _paint_park_ways(canvas, inner)
    elif block == PLAZA:
        _paint_plaza(canvas, inner)
    elif canvas.rng.random() < 0.55:
        _paint_lawn(canvas, inner)
    else:
        canvas.rect(inner, canvas.varied((168, 146, 122)))
        canvas.tones(inner, cell_m=(0.5, 0.5), amount=0.24)
    _litter(canvas, rect)


def _paint_lawn(canvas: Canvas, rect: Rect) -> None:
    rng = canvas.rng
    canvas.rect(rect, canvas.varied(_GRASS))
    canvas.tones(rect, cell_m=(0.3, 0.3), amount=0.16)
    for _ in range(int(1.1 * (rect.x_max - rect.x_min) * (rect.y_max - rect.y_min))):
        center = _point_in(rng, rect.inset(0.3))
        tone = ((78, 108, 50), (138, 150, 82), (232, 226, 150), (216, 120, 130))[
            int(rng.choice(4, p=(0.5, 0.3, 0.12, 0.08)))
        ]
        canvas.disc(center, float(rng.uniform(0.06, 0.3)), canvas.varied(tone, 0.2))


def _paint_park_ways(canvas: Canvas, rect: Rect) -> None:
    middle_x, middle_y = (rect.x_min + rect.x_max) / 2, (rect.y_min + rect.y_max) / 2
    sand: Colour = (204, 186, 146)
    for start, end in (
        ((rect.x_min, rect.y_min), (middle_x, middle_y)),
        ((middle_x, middle_y), (rect.x_max, rect.y_max)),
        ((rect.x_min, rect.y_max), (rect.x_max, rect.y_min)),
    ):
        canvas.line([start, end], sand, width_m=1.8)
    canvas.disc((middle_x, middle_y), 5.2, sand)
    for _ in range(26):
        bed = _point_in(canvas.rng, rect.inset(1.5))
        canvas.disc(bed, 0.8, (92, 72, 54))
        for _ in range(14):
            flower = np.asarray(bed) + canvas.rng.normal(0, 0.35, 2)
            colour = ((206, 60, 72), (240, 204, 70), (236, 226, 232), (150, 84, 164))[
                canvas.rng.integers(4)
            ]
            canvas.disc((float(flower[0]), float(flower[1])), 0.13, colour)


def _paint_plaza(canvas: Canvas, rect: Rect) -> None:
    """A mosaic of coloured stone around the fountain."""
    rng = canvas.rng
    center = ((rect.x_min + rect.x_max) / 2, (rect.y_min + rect.y_max) / 2)
    canvas.rect(rect, (196, 180, 154))
    for radius in np.arange(11.0, 2.0, -1.5):
        stone = ((176, 132, 104), (206, 194, 170), (138, 140, 146), (186, 160, 120))[
            rng.integers(4)
        ]
        canvas.disc(center, float(radius), canvas.varied(stone))
    for _ in range(150):
        corner = _point_in(rng, rect.inset(0.8))
        size = float(rng.uniform(0.25, 0.8))
        tile = Rect(*corner, corner[0] + size, corner[1] + size)
        canvas.rect(tile, canvas.varied((150, 110, 90), 0.5))
    canvas.tones(rect, cell_m=(0.45, 0.45), amount=0.2)


def _litter(canvas: Canvas, rect: Rect) -> None:
    """Leaves, covers and stains on a block's pavement."""
    rng = canvas.rng
    for _ in range(130):
        center = _point_in(rng, rect.inset(0.2))
        tone = ((120, 96, 60), (92, 92, 88), (206, 150, 70), (216, 212, 200))[rng.integers(4)]
        canvas.disc(center, float(rng.uniform(0.06, 0.22)), canvas.varied(tone, 0.3))


def _paint_road_marks(canvas: Canvas) -> None:
    rng = canvas.rng
    for center in ROAD_CENTERS_M[1:-1]:
        for low, high in BLOCK_SPANS_M:
            for along in np.arange(low + 3.5, high - 3.0, 4.0):
                length = float(rng.uniform(1.5, 2.3))
                _mark(canvas, center=center, along=float(along), size=(0.18, length))
            for end in (low + 0.6, high - 2.0):
                for across in np.arange(-4.2, 4.3, 1.05):
                    offset = center + float(across) - 0.05
                    _mark(canvas, center=offset, along=end, size=(0.5, 1.4))


def _mark(canvas: Canvas, *, center: float, along: float, size: tuple[float, float]) -> None:
    """The same worn mark on the street to the north and on the one to the east."""
    width, length = size
    for runs_north in (True, False):
        tone = canvas.varied(_PAINT, 0.14)
        rect = Rect(center - width / 2, along, center + width / 2, along + length)
        if not runs_north:
            rect = Rect(rect.y_min, rect.x_min, rect.y_max, rect.x_max)
        canvas.rect(rect, tone)


def _paint_shadows(canvas: Canvas, layout: TownLayout) -> None:
    cast = canvas.shadow_mask([_shadow_outline(box) for box in layout.boxes], softness_m=0.3)
    canvas.blend((44, 50, 66), 0.56 * cast)
    standing = [box for box in layout.boxes if box.z_min == 0.0]
    feet = canvas.shadow_mask([_foot_outline(box.footprint) for box in standing], softness_m=1.4)
    canvas.shade(1.0 - np.float32(0.35) * feet)


def _shadow_outline(box: Box) -> Float64Array:
    """Where the corners' shadows fall, (8, 2)."""
    corners = box.corners_in_world
    sun = np.asarray(SUN_DIRECTION)
    ground: Float64Array = corners[:, :2] - corners[:, 2:] * sun[:2] / sun[2]
    return ground


def _foot_outline(rect: Rect) -> Float64Array:
    return np.array(
        [
            (rect.x_min, rect.y_min),
            (rect.x_max, rect.y_min),
            (rect.x_max, rect.y_max),
            (rect.x_min, rect.y_max),
        ]
    )


def _point_in(rng: np.random.Generator, rect: Rect) -> tuple[float, float]:
    x, y = rng.uniform((rect.x_min, rect.y_min), (rect.x_max, rect.y_max))
    return float(x), float(y)
