"""The ground from above, small enough for views: a grid of vertices with a texture, and holes."""

from __future__ import annotations

import numpy as np

from engine.dense.coverage import Coverage, CoverageStatus
from engine.dense.surface import Surface
from engine.dense_types import GroundPicture
from engine.geometry import transform_points
from engine.types import Float32Array, Float64Array, Int64Array, Uint8Array

_MAX_VERTICES = 200  # along the longer edge
_MAX_TEXTURE_PX = 1024  # likewise


def ground_picture(
    surface: Surface,
    pixels: Uint8Array,
    coverage: Coverage | None,
    *,
    world_from_ground: Float64Array,
    geojson: str,
) -> GroundPicture:
    """What views show of the ground.

    Args:
        surface: in the ground's frame.
        pixels: of the orthophoto over the same cells, (H, W, 4) RGBA.
        coverage: in the same frame; None: nothing is said of it.
        world_from_ground: (3, 4) affine.
        geojson: of the coverage; "" without it.
    """
    x, y = surface.grid.centers()
    step = -(-max(surface.heights.shape) // (_MAX_VERTICES - 1))
    lines, columns = (_every(step, num) for num in surface.heights.shape)
    heights = surface.heights[np.ix_(lines, columns)]
    vertices = np.stack([*np.meshgrid(x[columns], y[lines]), heights], axis=-1).reshape(-1, 3)
    in_world = transform_points(world_from_ground, vertices).reshape(*heights.shape, 3)
    holes, thin = (
        _cells(surface, coverage, status, world_from_ground)
        for status in (CoverageStatus.HOLE, CoverageStatus.THIN)
    )
    return GroundPicture(
        vertices_in_world=in_world.astype(np.float32),
        texture=_texture(pixels),
        u_in_texture=(columns + 0.5) / len(x),
        v_in_texture=(lines + 0.5) / len(y),
        holes_in_world=holes,
        thin_in_world=thin,
        coverage=geojson,
    )


def _every(step: int, num: int) -> Int64Array:
    """Every ``step``-th of cells, and the last one."""
    return np.unique(np.append(np.arange(0, num, step), num - 1))


def _texture(pixels: Uint8Array) -> Uint8Array:
    import cv2

    height, width = pixels.shape[:2]
    ratio = min(_MAX_TEXTURE_PX / max(height, width, 1), 1.0)
    size = max(round(ratio * width), 1), max(round(ratio * height), 1)
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def _cells(
    surface: Surface,
    coverage: Coverage | None,
    status: CoverageStatus,
    world_from_ground: Float64Array,
) -> Float32Array:
    """Middles (N, 3) in the world of cells of a status, at the usual height of the surface."""
    if coverage is None:
        return np.zeros((0, 3), np.float32)
    known = surface.heights[np.isfinite(surface.heights)]
    level = float(np.median(known)) if len(known) else 0.0
    x, y = coverage.grid.centers()
    lines, columns = np.nonzero(coverage.status == status)
    places = np.column_stack([x[columns], y[lines], np.full(len(lines), level)])
    return transform_points(world_from_ground, places).astype(np.float32)
