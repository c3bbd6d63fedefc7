"""``points3D.ply`` of a sparse model, as trainers of splats begin with it.

The reader of 3D Gaussian Splatting asks for normals, which are zero here, as in what it writes
itself: https://github.com/graphdeco-inria/gaussian-splatting/blob/main/scene/dataset_readers.py
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.dense_types import DensePoints
from engine.output.dense_ply import write_dense_ply

if TYPE_CHECKING:
    import pycolmap


def write_sparse_ply(model: pycolmap.Reconstruction, path: Path) -> None:
    """Writes the points of a model, with their colours.

    Raises:
        OSError: they cannot be written.
    """
    points = model.points3D.values()
    xyz = np.array([point.xyz for point in points], np.float32).reshape(-1, 3)
    write_dense_ply(
        path,
        [
            DensePoints(
                xyz=xyz,
                colors=np.array([point.color for point in points], np.uint8).reshape(-1, 3),
                normals=np.zeros_like(xyz),
                sampling=np.ones(len(xyz), np.float32),
                num_views=np.array([min(p.track.length(), 255) for p in points], np.uint8),
            )
        ],
    )
