"""Town layout: the streets, blocks and boxes of the synthetic town, from a seed.

World frame: metres, x east, y north, z up, the ground at z = 0, the main crossing at the origin.
Streets are the same for every seed, so that the flights fit; what stands between them is not.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from engine.types import Float64Array

TOWN_HALF_WIDTH_M = 79.0  # the paved square
GROUND_HALF_WIDTH_M = 96.0  # ground in full detail
BLOCK_SPANS_M = ((-69.0, -42.0), (-32.0, -5.0), (5.0, 32.0), (42.0, 69.0))
ROAD_CENTERS_M = (-74.0, -37.0, 0.0, 37.0, 74.0)
SIDEWALK_M = 2.0
PLAZA = (2, 1)  # column from the west, row from the south
PARK = (1, 2)
_STOREY_M = 3.0


class Rect(NamedTuple):
    """An axis-aligned rectangle on the ground, metres."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float

    def inset(self, margin: float) -> Rect:
        """The rectangle without a margin; a negative one grows it."""
        return Rect(
            self.x_min + margin, self.y_min + margin, self.x_max - margin, self.y_max - margin
        )


class BoxKind(StrEnum):
    """What a box stands for, and so how it is painted."""

    HOUSE = "house"
    TOWER = "tower"
    ROOFTOP = "rooftop"
    KIOSK = "kiosk"
    STONE = "stone"
    HEDGE = "hedge"
    TRUNK = "trunk"
    CROWN = "crown"
    CAR = "car"


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """An axis-aligned box."""

    kind: BoxKind
    footprint: Rect
    z_min: float
    z_max: float

    @property
    def corners_in_world(self) -> Float64Array:
        """The eight corners, (8, 3) metres."""
        rect = self.footprint
        return np.array(
            [
                (x, y, z)
                for x in (rect.x_min, rect.x_max)
                for y in (rect.y_min, rect.y_max)
                for z in (self.z_min, self.z_max)
            ]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TownLayout:
    """All boxes of a town."""

    boxes: tuple[Box, ...]

    @property
    def bounds(self) -> Float64Array:
        """Lower and upper corner of every box, (B, 2, 3) metres."""
        return np.array(
            [
                (
                    (box.footprint.x_min, box.footprint.y_min, box.z_min),
                    (box.footprint.x_max, box.footprint.y_max, box.z_max),
                )
                for box in self.boxes
            ]
        )

    def distances_m(self, points_in_world: Float64Array) -> Float64Array:
        """How far points (N, 3) are from the nearest surface, of a box or of the ground, (N,)."""
        nearest = np.abs(points_in_world[:, 2])
        for low, high in self.bounds:
            beyond = np.maximum(np.maximum(low - points_in_world, points_in_world - high), 0.0)
            outside = np.linalg.norm(beyond, axis=1)
            inside = np.minimum(points_in_world - low, high - points_in_world).min(axis=1)
            nearest = np.minimum(nearest, np.where(outside > 0, outside, np.abs(inside)))
        return np.asarray(nearest)


def block_rect(column: int, row: int) -> Rect:
    """The block between the streets, sidewalk included."""
    (x_min, x_max), (y_min, y_max) = BLOCK_SPANS_M[column], BLOCK_SPANS_M[row]
    return Rect(x_min, y_min, x_max, y_max)


def lay_out_town(seed: int) -> TownLayout:
    """Places houses, trees, hedges and cars; no two boxes overlap."""
    rng = np.random.default_rng([seed, 1])
    boxes: list[Box] = []
    for column in range(len(BLOCK_SPANS_M)):
        for row in range(len(BLOCK_SPANS_M)):
            if (column, row) == PLAZA:
                boxes += _plaza(rng)
            elif (column, row) == PARK:
                boxes += _park(rng)
            else:
                boxes += _houses(rng, block_rect(column, row).inset(SIDEWALK_M))
    boxes += _town_hall()
    boxes += _edge_trees(rng)
    boxes += _parked_cars(rng)
    return TownLayout(boxes=tuple(boxes))


def _box(kind: BoxKind, footprint: Rect, *, z_max: float, z_min: float = 0.0) -> Box:
    return Box(kind=kind, footprint=footprint, z_min=float(z_min), z_max=float(z_max))


def _centered(center: tuple[float, float], size: tuple[float, float]) -> Rect:
    (x, y), (size_x, size_y) = center, size
    return Rect(
        float(x - size_x / 2), float(y - size_y / 2), float(x + size_x / 2), float(y + size_y / 2)
    )


def _houses(rng: np.random.Generator, block: Rect) -> list[Box]:
    """One house, sometimes with something on its roof, on each lot of a block."""
    columns, rows = ((2, 2), (3, 1), (1, 3), (2, 2), (3, 2), (2, 3))[rng.integers(6)]
    x_edges = np.linspace(block.x_min, block.x_max, columns + 1)
    y_edges = np.linspace(block.y_min, block.y_max, rows + 1)
    boxes: list[Box] = []
    for column in range(columns):
        for row in range(rows):
            west, south, east, north = rng.uniform(0.2, 1.4, 4)
            footprint = Rect(
                float(x_edges[column] + west),
                float(y_edges[row] + south),
                float(x_edges[column + 1] - east),
                float(y_edges[row + 1] - north),
            )
            storeys = int(rng.choice((1, 2, 3, 4, 5), p=(0.1, 0.3, 0.3, 0.2, 0.1)))
            height = storeys * _STOREY_M + float(rng.uniform(0.6, 1.8))
            boxes.append(_box(BoxKind.HOUSE, footprint, z_max=height))
            boxes += _roof_boxes(rng, boxes[-1])
    return boxes


def _roof_boxes(rng: np.random.Generator, house: Box) -> list[Box]:
    free = house.footprint.inset(1.4)
    if rng.random() < 0.35 or free.x_max - free.x_min < 2 or free.y_max - free.y_min < 2:
        return []
    size_x, size_y, height = rng.uniform((0.9, 0.9, 1.0), (2.0, 2.0, 2.4))
    x = rng.uniform(free.x_min + size_x / 2, free.x_max - size_x / 2)
    y = rng.uniform(free.y_min + size_y / 2, free.y_max - size_y / 2)
    rect = _centered((x, y), (size_x, size_y))
    return [_box(BoxKind.ROOFTOP, rect, z_min=house.z_max, z_max=house.z_max + height)]


def _tree(rng: np.random.Generator, center: tuple[float, float]) -> list[Box]:
    width, bottom, crown = rng.uniform((2.0, 1.6, 2.0), (3.4, 2.2, 3.6))
    leaves = _centered(center, (width, width))
    return [
        _box(BoxKind.TRUNK, _centered(center, (0.45, 0.45)), z_max=bottom),
        _box(BoxKind.CROWN, leaves, z_min=bottom, z_max=bottom + crown),
    ]


def _plaza(rng: np.random.Generator) -> list[Box]:
    """A fountain, kiosks and trees around the middle of an open square."""
    rect = block_rect(*PLAZA)
    x, y = (rect.x_min + rect.x_max) / 2, (rect.y_min + rect.y_max) / 2
    boxes = [
        _box(BoxKind.STONE, _centered((x, y), (5.0, 5.0)), z_max=0.7),
        _box(BoxKind.STONE, _centered((x, y), (1.2, 1.2)), z_min=0.7, z_max=2.6),
    ]
    for dx, dy in ((-9.0, 6.5), (9.0, 6.5), (8.5, -9.0)):
        size_x, size_y, height = rng.uniform((2.4, 2.4, 2.5), (4.0, 3.6, 3.4))
        footprint = _centered((x + dx, y + dy), (size_x, size_y))
        boxes.append(_box(BoxKind.KIOSK, footprint, z_max=height))
    for dx, dy in ((-10.0, -9.5), (-4.0, -10.0), (2.5, -10.0), (0.0, 9.5)):
        boxes += _tree(rng, (x + dx, y + dy))
    return boxes


def _park(rng: np.random.Generator) -> list[Box]:
    """Hedges at the rim, a pavilion, trees on a jittered grid."""
    rect = block_rect(*PARK)
    x, y = (rect.x_min + rect.x_max) / 2, (rect.y_min + rect.y_max) / 2
    boxes = [_box(BoxKind.KIOSK, _centered((x + 0.5, y + 1.0), (6.0, 5.0)), z_max=3.9)]
    half = (rect.x_max - rect.x_min) / 2 - SIDEWALK_M - 0.6
    for side in (-half, half):
        for along in (-0.54 * half, 0.54 * half):
            length, height = rng.uniform((7.0, 1.0), (9.0, 1.5))
            runs_east = _centered((x + along, y + side), (length, 0.9))
            runs_north = _centered((x + side, y + along), (0.9, length))
            boxes.append(_box(BoxKind.HEDGE, runs_east, z_max=height))
            boxes.append(_box(BoxKind.HEDGE, runs_north, z_max=height + 0.1))
    for dx in (-7.5, -1.5, 6.0):
        for dy in (-7.5, 7.5):
            boxes += _tree(rng, (x + dx + rng.uniform(-1, 1), y + dy + rng.uniform(-1, 1)))
    return boxes


def _town_hall() -> list[Box]:
    """A landmark at the northern end of the main street."""
    return [
        _box(BoxKind.HOUSE, Rect(-14.0, 82.0, -3.2, 91.0), z_max=11.3),
        _box(BoxKind.TOWER, Rect(-3.2, 81.0, 3.2, 88.0), z_max=25.0),
        _box(BoxKind.HOUSE, Rect(3.2, 82.0, 14.0, 91.0), z_max=11.9),
    ]


def _edge_trees(rng: np.random.Generator) -> list[Box]:
    boxes = []
    distance = TOWN_HALF_WIDTH_M + 5.0
    for along in np.arange(-66.0, 67.0, 22.0):
        for x, y in ((distance, along), (-distance, along), (along, -distance)):
            jitter_x, jitter_y = rng.uniform(-2.5, 2.5, 2)
            boxes += _tree(rng, (x + jitter_x, y + jitter_y))
    return boxes


def _parked_cars(rng: np.random.Generator) -> list[Box]:
    """Cars at the kerbs, well clear of the middle of the street."""
    slots = np.concatenate([np.arange(low + 5.0, high - 4.0, 5.7) for low, high in BLOCK_SPANS_M])
    boxes = []
    for road, slot, lane in itertools.product(ROAD_CENTERS_M[1:-1], slots, (-3.8, 3.8)):
        for runs_north in (True, False):
            if rng.random() > 0.16:
                continue
            length, width, height = rng.uniform((3.7, 1.6, 1.3), (4.7, 1.9, 1.9))
            along, across = slot + rng.uniform(-0.3, 0.3), road + lane
            if runs_north:
                footprint = _centered((across, along), (width, length))
            else:
                footprint = _centered((along, across), (length, width))
            boxes.append(_box(BoxKind.CAR, footprint, z_max=height))
    return boxes
