"""Dense points of several parts as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.dense_types import DensePoints


def concatenate(parts: Sequence[DensePoints]) -> DensePoints:
    """All points of several parts, in their order."""
    empty = DensePoints(
        xyz=np.empty((0, 3), np.float32),
        colors=np.empty((0, 3), np.uint8),
        normals=np.empty((0, 3), np.float32),
        sampling=np.empty(0, np.float32),
        num_views=np.empty(0, np.uint8),
    )
    parts = [empty, *parts]
    return DensePoints(
        xyz=np.concatenate([part.xyz for part in parts]),
        colors=np.concatenate([part.colors for part in parts]),
        normals=np.concatenate([part.normals for part in parts]),
        sampling=np.concatenate([part.sampling for part in parts]),
        num_views=np.concatenate([part.num_views for part in parts]),
    )
