"""Numbers that no estimator can use: not finite, too few, all alike, far too large; and cameras."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pycolmap

from engine.types import Float64Array

WIDTH, HEIGHT = 1000, 750

# SIMPLE_RADIAL calibrations that bent adjustments end with, and such that can be undone nowhere.
HOPELESS_PARAMS = (
    (8000.0, 500.0, 375.0, -15.0),
    (9327.0, 500.0, 375.0, -19.7),
    (3000.0, 500.0, 375.0, -15.0),  # most of the image has no ray
    (800.0, 500.0, 375.0, -0.9),  # its corners have none
    (300.0, 500.0, 375.0, 14.0),
    (800.0, 500.0, 375.0, 1e9),
    (1e-9, 500.0, 375.0, 0.0),
    (1e9, 500.0, 375.0, 0.0),
)
NOT_FINITE = ((np.nan,) * 4, (800.0, 500.0, 375.0, np.inf))


def camera_of(params: tuple[float, ...]) -> pycolmap.Camera:
    """A SIMPLE_RADIAL camera."""
    return pycolmap.Camera(model="SIMPLE_RADIAL", width=WIDTH, height=HEIGHT, params=params)


def degenerate(num: int, dimensions: int, *, scale: float = 1.0) -> Iterator[Float64Array]:
    """Arrays (N, dimensions) of at most ``num`` rows that hold something an estimator fails on."""
    rng = np.random.default_rng((num, dimensions))
    good = scale * rng.normal(size=(num, dimensions))
    yield np.empty((0, dimensions))
    yield good[:1]
    yield np.full((num, dimensions), np.nan)
    yield np.tile(good[:1], (num, 1))
    yield np.zeros((num, dimensions))
    yield np.outer(np.arange(num), good[0])
    yield good * 1e200
    yield good * 1e-200
    for value in (np.nan, np.inf, -np.inf):
        spoiled = good.copy()
        spoiled[::3] = value
        yield spoiled
        spoiled = good.copy()
        spoiled[num // 2, 0] = value
        yield spoiled
    yield good


def degenerate_pairs(
    num: int, first: int, second: int, *, scale: float = 1.0
) -> Iterator[tuple[Float64Array, Float64Array]]:
    """Two of them that have equally many rows, of so many dimensions each; all combinations."""
    for one in degenerate(num, first, scale=scale):
        for other in degenerate(num, second, scale=scale):
            if len(one) == len(other):
                yield one, other
