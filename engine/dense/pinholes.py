"""Pinhole cameras of depth maps, by their parameters fx, fy, cx, cy (4,), px."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from engine.types import Float32Array, Float64Array, Int64Array

Array = TypeVar("Array", Float32Array, Float64Array)


def plane_xy(
    pinhole: Array, columns: Array | Int64Array, lines: Array | Int64Array
) -> tuple[Array, Array]:
    """Where the rays of pixels' centres meet the plane z = 1: x and y, shaped as the pixels.

    Args:
        pinhole: (4,) of the wanted type.
        columns: of any shape, 0 the first one.
        lines: likewise.
    """
    focal_x, focal_y, center_x, center_y = pinhole
    # Pixel centres are at (0.5, 0.5).
    half = pinhole.dtype.type(0.5)
    return (columns + half - center_x) / focal_x, (lines + half - center_y) / focal_y


def projected(pinhole: Array, points_in_cam: Array | Sequence[Array]) -> tuple[Array, Array]:
    """Where points (3, ...) are seen: x and y (...), px; not finite, or void, where z <= 0."""
    focal_x, focal_y, center_x, center_y = pinhole
    x, y, z = points_in_cam
    with np.errstate(divide="ignore", invalid="ignore"):
        return x / z * focal_x + center_x, y / z * focal_y + center_y
