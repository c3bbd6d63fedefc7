"""Box textures: facades, roofs, leaves and cars of the synthetic town.

Every face is painted once, from its own random stream, so that no two places are alike.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from adapters.town.canvas import Canvas, Colour, mixed, scaled
from adapters.town.world import Box, BoxKind, Rect
from engine.types import Uint8Array

_WALLS: tuple[Colour, ...] = (
    (226, 205, 164),
    (214, 164, 108),
    (198, 120, 92),
    (170, 188, 198),
    (178, 190, 152),
    (222, 178, 166),
    (208, 204, 192),
    (168, 98, 78),
)
_SLATE: Colour = (104, 112, 128)  # on roofs that are flat
_ROOFS: tuple[Colour, ...] = (
    (186, 88, 58),
    (160, 72, 56),
    _SLATE,
    (110, 146, 130),
    (150, 130, 108),
    (196, 112, 66),
)
_BRIGHT: tuple[Colour, ...] = (
    (206, 60, 52),
    (236, 184, 56),
    (58, 110, 178),
    (70, 142, 90),
    (232, 228, 216),
    (126, 70, 134),
    (58, 62, 72),
)
_GLASS: Colour = (58, 76, 92)
_LEAVES: Colour = (84, 118, 56)


class Side(IntEnum):
    """The sides of a box."""

    SOUTH = 0
    EAST = 1
    NORTH = 2
    WEST = 3
    TOP = 4
    BOTTOM = 5


# The afternoon sun stands in the south-west; shaded walls are lit by the sky, a little blue.
SUN_DIRECTION = (-0.48, -0.55, 0.68)  # towards the sun
_LIGHT: dict[Side, Colour] = {
    Side.SOUTH: (1.0, 0.97, 0.92),
    Side.EAST: (0.68, 0.71, 0.78),
    Side.NORTH: (0.60, 0.64, 0.72),
    Side.WEST: (0.92, 0.88, 0.82),
    Side.TOP: (1.06, 1.04, 1.0),
    Side.BOTTOM: (0.42, 0.44, 0.48),
}


def paint_box(box: Box, *, seed: int, index: int, texel_m: float) -> list[Uint8Array]:
    """The six textures of a box, in the order of ``Side``, lit by the sun.

    Args:
        box: what to paint.
        seed: of the town.
        index: of the box, its own random stream.
        texel_m: size of a texel.
    """
    palette = np.random.default_rng([seed, 2, index])
    wall = _WALLS[palette.integers(len(_WALLS))]
    accent = _BRIGHT[palette.integers(len(_BRIGHT))]
    roof = _ROOFS[palette.integers(len(_ROOFS))]
    textures = []
    for side in Side:
        if side is Side.BOTTOM and box.z_min == 0.0:
            textures.append(np.zeros((2, 2, 3), np.uint8))
            continue
        canvas = Canvas(
            np.random.default_rng([seed, 3, index, side]),
            area=_face_area(box, side),
            texel_m=texel_m,
            colour=wall,
        )
        _paint_side(canvas, box.kind, side=side, accent=accent, roof=roof, wall=wall)
        canvas.light(_LIGHT[side])
        textures.append(canvas.pixels)
    return textures


def _face_area(box: Box, side: Side) -> Rect:
    size_x = box.footprint.x_max - box.footprint.x_min
    size_y = box.footprint.y_max - box.footprint.y_min
    height = box.z_max - box.z_min
    if side in (Side.TOP, Side.BOTTOM):
        return Rect(0.0, 0.0, size_x, size_y)
    return Rect(0.0, 0.0, size_x if side in (Side.SOUTH, Side.NORTH) else size_y, height)


def _paint_side(
    canvas: Canvas, kind: BoxKind, *, side: Side, accent: Colour, roof: Colour, wall: Colour
) -> None:
    if kind in (BoxKind.CROWN, BoxKind.HEDGE):
        _paint_leaves(canvas)
    elif kind is BoxKind.TRUNK:
        _paint_rough(canvas, (104, 82, 60))
    elif kind is BoxKind.STONE:
        _paint_rough(canvas, (178, 172, 158))
    elif kind is BoxKind.CAR:
        _paint_car(canvas, accent, seen_from_above=side is Side.TOP)
    elif side is Side.TOP:
        _paint_roof(canvas, roof, hipped=kind is not BoxKind.ROOFTOP and roof != _SLATE)
    elif kind is BoxKind.ROOFTOP:
        _paint_rough(canvas, wall)
    elif kind is BoxKind.KIOSK:
        _paint_kiosk(canvas, accent)
    else:
        _paint_facade(canvas, wall=wall, accent=accent)


def _paint_rough(canvas: Canvas, colour: Colour) -> None:
    canvas.rect(canvas.area, colour)
    canvas.tones(canvas.area, cell_m=(0.4, 0.25), amount=0.22)
    canvas.grain(coarsest_m=1.2, amount=0.2)


def _paint_leaves(canvas: Canvas) -> None:
    canvas.rect(canvas.area, canvas.varied(_LEAVES, 0.2))
    area, rng = canvas.area, canvas.rng
    num_tufts = int(10 * (area.x_max - area.x_min) * (area.y_max - area.y_min))
    for _ in range(num_tufts):
        center = (float(rng.uniform(0, area.x_max)), float(rng.uniform(0, area.y_max)))
        tone = scaled(_LEAVES, float(rng.uniform(0.45, 1.6)))
        canvas.disc(center, float(rng.uniform(0.08, 0.3)), tone)
    canvas.grain(coarsest_m=0.8, amount=0.3)


def _paint_car(canvas: Canvas, colour: Colour, *, seen_from_above: bool) -> None:
    area = canvas.area
    width, height = area.x_max, area.y_max
    canvas.rect(area, canvas.varied(colour))
    if seen_from_above:
        canvas.rect(area.inset(0.22 * min(width, height)), _GLASS)
        canvas.rect(area.inset(0.3 * min(width, height)), scaled(colour, 1.1))
    else:
        canvas.rect(Rect(0.08 * width, 0.55 * height, 0.92 * width, 0.92 * height), _GLASS)
        canvas.rect(Rect(0.47 * width, 0.5 * height, 0.53 * width, height), colour)
        canvas.rect(Rect(0, 0, width, 0.16 * height), (40, 40, 44))
        for share in (0.2, 0.8):
            canvas.disc((share * width, 0.16 * height), 0.3, (30, 30, 32))
            canvas.disc((share * width, 0.16 * height), 0.14, (150, 150, 154))
    canvas.grain(coarsest_m=0.8, amount=0.1)


def _paint_roof(canvas: Canvas, colour: Colour, *, hipped: bool) -> None:
    area, rng = canvas.area, canvas.rng
    width, height = area.x_max, area.y_max
    canvas.rect(area, colour)
    if hipped and min(width, height) > 4:
        _paint_hips(canvas, colour)
    canvas.tones(area, cell_m=(0.35, 0.5), amount=0.16)
    canvas.tones(area, cell_m=(1.7, 1.3), amount=0.1)
    canvas.blotches((96, 104, 72), size_m=4.0, cover_ratio=0.12, strength=0.5)
    for _ in range(int(width * height / 14)):
        x, y = rng.uniform((0.5, 0.5), (max(0.6, width - 2.0), max(0.6, height - 1.5)))
        size_x, size_y = rng.uniform(0.4, 1.5, 2)
        patch = Rect(float(x), float(y), float(x + size_x), float(y + size_y))
        canvas.rect(patch, (66, 60, 56))
        inner = (_GLASS, (40, 52, 92), scaled(colour, 1.25), (196, 198, 200))[rng.integers(4)]
        canvas.rect(patch.inset(0.08), canvas.varied(inner, 0.2))
    canvas.grain(coarsest_m=6.0, amount=0.11)
    for corners in _rim(area.inset(0.1)):
        canvas.line(corners, scaled(colour, 1.3), width_m=0.2)


def _paint_hips(canvas: Canvas, colour: Colour) -> None:
    """Four tones as if the roof fell away on four sides; from the air flat roofs seem built."""
    width, height = canvas.area.x_max, canvas.area.y_max
    rise = 0.5 * min(width, height)
    south_west, south_east = (0.0, 0.0), (width, 0.0)
    north_west, north_east = (0.0, height), (width, height)
    ridge_low, ridge_high = (rise, rise), (width - rise, height - rise)
    slopes = [
        ([south_west, south_east, ridge_high, ridge_low], 1.12),
        ([south_east, north_east, ridge_high], 0.8),
        ([north_east, north_west, ridge_low, ridge_high], 0.72),
        ([north_west, south_west, ridge_low], 1.02),
    ]
    if height > width:
        slopes[0] = ([south_west, south_east, ridge_low], 1.12)
        slopes[1] = ([south_east, north_east, ridge_high, ridge_low], 0.8)
        slopes[2] = ([north_east, north_west, ridge_high], 0.72)
        slopes[3] = ([north_west, south_west, ridge_low, ridge_high], 1.02)
    for outline, gain in slopes:
        canvas.polygon(outline, scaled(colour, gain))


def _rim(area: Rect) -> list[list[tuple[float, float]]]:
    corners = [
        (area.x_min, area.y_min),
        (area.x_max, area.y_min),
        (area.x_max, area.y_max),
        (area.x_min, area.y_max),
    ]
    return [[corners[i], corners[(i + 1) % 4]] for i in range(4)]


def _paint_kiosk(canvas: Canvas, accent: Colour) -> None:
    area, rng = canvas.area, canvas.rng
    canvas.rect(area, (190, 170, 140))
    canvas.tones(area, cell_m=(0.22, 3.0), amount=0.2)
    counter = Rect(0.35, 1.0, area.x_max - 0.35, area.y_max - 0.7)
    canvas.rect(counter, (60, 56, 52))
    for _ in range(40):
        x, y = rng.uniform((counter.x_min, counter.y_min), (counter.x_max, counter.y_max))
        size = float(rng.uniform(0.08, 0.25))
        goods = Rect(float(x), float(y), float(x) + size, float(y) + size)
        canvas.rect(goods, canvas.varied(_BRIGHT[rng.integers(len(_BRIGHT))], 0.3))
    _paint_awning(canvas, Rect(0.0, area.y_max - 0.7, area.x_max, area.y_max), accent)
    canvas.grain(coarsest_m=2.0, amount=0.12)


def _paint_awning(canvas: Canvas, rect: Rect, colour: Colour) -> None:
    canvas.rect(rect, colour)
    x = rect.x_min
    while x < rect.x_max:
        width = float(canvas.rng.uniform(0.2, 0.5))
        canvas.rect(
            Rect(x, rect.y_min, min(x + width / 2, rect.x_max), rect.y_max), (236, 230, 216)
        )
        x += width


def _paint_facade(canvas: Canvas, *, wall: Colour, accent: Colour) -> None:
    area, rng = canvas.area, canvas.rng
    width, height = area.x_max, area.y_max
    canvas.tones(area, cell_m=(0.5, 0.22), amount=0.09)
    canvas.tones(area, cell_m=(1.9, 1.1), amount=0.06)
    canvas.blotches(scaled(wall, 0.62), size_m=3.0, cover_ratio=0.14, strength=0.55)
    canvas.rect(Rect(0, 0, width, 0.5), scaled(wall, 0.6))
    canvas.tones(Rect(0, 0, width, 0.5), cell_m=(0.6, 0.25), amount=0.25)
    storeys = max(1, round((height - 1.2) / 3.0))
    storey_height = (height - 0.9) / storeys
    columns = max(1, round(width / float(rng.uniform(2.1, 2.9))))
    bay = width / columns
    for storey in range(storeys):
        base = storey * storey_height
        for column in range(columns):
            if storey == 0:
                _paint_ground_floor_bay(canvas, column * bay, bay=bay, accent=accent)
            elif rng.random() < 0.92:
                x = (column + 0.5) * bay + float(rng.uniform(-0.12, 0.12))
                _paint_window(canvas, (x, base + 0.95), accent=accent)
        if storey and rng.random() < 0.6:
            canvas.line([(0, base), (width, base)], scaled(wall, 0.78), width_m=0.12)
    canvas.rect(Rect(0, height - 0.45, width, height), scaled(wall, 1.12))
    canvas.tones(Rect(0, height - 0.45, width, height), cell_m=(0.3, 0.22), amount=0.22)
    _paint_wear(canvas, wall)
    canvas.grain(coarsest_m=5.0, amount=0.1)


def _paint_window(canvas: Canvas, sill: tuple[float, float], *, accent: Colour) -> None:
    rng = canvas.rng
    half, height = float(rng.uniform(0.42, 0.68)), float(rng.uniform(1.2, 1.65))
    x, y = sill
    opening = Rect(x - half, y, x + half, y + height)
    canvas.rect(opening.inset(-0.12), (232, 226, 214) if rng.random() < 0.7 else (92, 72, 58))
    _paint_glass(canvas, opening)
    canvas.line([(x, y), (x, y + height)], (222, 216, 204), width_m=0.07)
    bar = y + height * float(rng.uniform(0.5, 0.75))
    canvas.line([(x - half, bar), (x + half, bar)], (222, 216, 204), width_m=0.07)
    canvas.rect(Rect(x - half - 0.2, y - 0.2, x + half + 0.2, y - 0.06), (150, 144, 136))
    if rng.random() < 0.4:
        for middle in (x - half - 0.32, x + half + 0.32):
            shutter = Rect(middle - 0.2, y - 0.05, middle + 0.2, y + height + 0.05)
            canvas.rect(shutter, canvas.varied(accent, 0.15))
            canvas.tones(shutter, cell_m=(0.4, 0.12), amount=0.25)
    if rng.random() < 0.35:
        for _ in range(9):
            flower = (float(x + rng.uniform(-half, half)), float(y + rng.uniform(-0.1, 0.15)))
            colour = ((206, 60, 72), (236, 200, 70), (84, 132, 60))[rng.integers(3)]
            canvas.disc(flower, 0.09, colour)


def _paint_glass(canvas: Canvas, opening: Rect) -> None:
    """Dark glass with a blind, curtains or nothing behind it, and a glint of sky."""
    rng = canvas.rng
    x = (opening.x_min + opening.x_max) / 2
    half, height = (opening.x_max - opening.x_min) / 2, opening.y_max - opening.y_min
    canvas.rect(opening, canvas.varied(_GLASS, 0.45))
    behind = rng.integers(4)
    if behind == 0:
        drop = opening.y_min + height * float(rng.uniform(0.2, 0.8))
        blind = canvas.varied(_BRIGHT[rng.integers(len(_BRIGHT))], 0.3)
        canvas.rect(opening._replace(y_min=drop), mixed(blind, (230, 225, 215), 0.5))
    elif behind == 1:
        left, right = rng.uniform(0.3, 0.7, 2) * half
        canvas.rect(opening._replace(x_max=x - float(left)), (214, 206, 194))
        canvas.rect(opening._replace(x_min=x + float(right)), (214, 206, 194))
    low, high = x + rng.uniform(-half, half, 2)
    glint = [(low, opening.y_min), (high, opening.y_max), (low, opening.y_max)]
    canvas.polygon(glint, canvas.varied((150, 178, 200), 0.25))


def _paint_ground_floor_bay(canvas: Canvas, left: float, *, bay: float, accent: Colour) -> None:
    rng = canvas.rng
    kind = rng.integers(5)
    if kind == 0:
        door = Rect(left + bay / 2 - 0.55, 0.1, left + bay / 2 + 0.55, 2.2)
        canvas.rect(door.inset(-0.14), (206, 198, 182))
        canvas.rect(door, canvas.varied(accent, 0.25))
        canvas.tones(door, cell_m=(0.36, 0.5), amount=0.25)
        canvas.disc((door.x_max - 0.16, 1.1), 0.06, (230, 210, 120))
    elif kind in (1, 2):
        shop = Rect(left + 0.2, 0.55, left + bay - 0.2, 2.1)
        canvas.rect(shop.inset(-0.1), (70, 62, 56))
        canvas.rect(shop, canvas.varied(_GLASS, 0.4))
        for _ in range(7):
            x, y = rng.uniform((shop.x_min, shop.y_min), (shop.x_max - 0.3, shop.y_max - 0.3))
            size_x, size_y = rng.uniform(0.1, 0.5, 2)
            goods = Rect(float(x), float(y), float(x + size_x), float(y + size_y))
            canvas.rect(goods, canvas.varied(_BRIGHT[rng.integers(len(_BRIGHT))], 0.3))
        _paint_awning(canvas, Rect(left + 0.1, 2.1, left + bay - 0.1, 2.65), accent)
    else:
        _paint_window(canvas, (left + bay / 2, 0.95), accent=accent)


def _paint_wear(canvas: Canvas, wall: Colour) -> None:
    """Cracks, streaks, posters and ivy: what makes a wall different from its neighbours."""
    area, rng = canvas.area, canvas.rng
    for _ in range(int(area.x_max * area.y_max / 10)):
        start = rng.uniform((0, 0.5), (area.x_max, area.y_max))
        steps = np.cumsum(rng.normal(0, 0.3, (5, 2)) - (0, 0.18), axis=0)
        tone = scaled(wall, float(rng.choice((0.5, 0.65, 1.2))))
        canvas.line(start + steps, tone, width_m=float(rng.uniform(0.03, 0.09)))
    for _ in range(int(area.x_max / 4)):
        x, y = float(rng.uniform(0, area.x_max)), float(rng.uniform(0.6, 1.6))
        poster = Rect(x, y, x + float(rng.uniform(0.3, 0.7)), y + float(rng.uniform(0.4, 0.9)))
        canvas.rect(poster, canvas.varied(_BRIGHT[rng.integers(len(_BRIGHT))], 0.3))
        canvas.tones(poster.inset(0.06), cell_m=(0.12, 0.12), amount=0.5)
    if rng.random() < 0.35:
        canvas.blotches((74, 104, 52), size_m=3.5, cover_ratio=0.18, strength=0.95)
