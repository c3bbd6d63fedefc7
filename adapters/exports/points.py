"""The points of a map as arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.types import Float64Array, Uint8Array

if TYPE_CHECKING:
    import pycolmap


def points_of(reconstruction: pycolmap.Reconstruction) -> tuple[Float64Array, Uint8Array]:
    """Places in the world (P, 3) and colours (P, 3) of a map's points, in order of their ids."""
    points = [point for _, point in sorted(reconstruction.points3D.items())]
    xyz = np.array([point.xyz for point in points], np.float64).reshape(-1, 3)
    colors = np.array([point.color for point in points], np.uint8).reshape(-1, 3)
    return xyz, colors
