"""Which keypoints of two images may match when the epipolar geometry of the pair is known.

The epipolar planes of a pair all hold the baseline, so one angle identifies each. Keypoints of the
first image are sorted by it and cut into blocks; those of the second that lie between the outer two
planes of a block, or near one of them, are all that its keypoints can match.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine.types import EpipolarGuide, Float64Array, Int64Array


def epipolar_blocks(
    guide: EpipolarGuide, *, num_rows: int
) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Yields keypoints of the first image (R,), and those of the second (C,) near their planes.

    Each keypoint of the first is in one block; one that has no ray is in none.

    Args:
        guide: the epipolar geometry.
        num_rows: keypoints of the first image in a block at most.
    """
    # The normals of all epipolar planes are combinations of two, at right angles to the baseline.
    axes, _, _ = np.linalg.svd(guide.essential)
    pencil, baseline = axes[:, :2], axes[:, 2]
    angles1 = _plane_angles(guide.rays1 @ guide.essential.T @ pencil)
    angles2 = _plane_angles(np.cross(baseline, guide.rays2) @ pencil)
    in_order = np.argsort(angles1, kind="stable")
    in_order = in_order[: np.isfinite(angles1).sum()]
    blocks = [in_order[start : start + num_rows] for start in range(0, len(in_order), num_rows)]
    if not blocks:
        return
    limits = np.array([angles1[rows[[0, -1]]] for rows in blocks])  # (B, 2)
    normals = np.stack([np.cos(limits), np.sin(limits)], axis=-1) @ pencil.T  # (B, 2, 3), units
    distances = np.abs(normals @ guide.rays2.T)  # (B, 2, M), sines
    is_near = (distances <= np.sin(guide.max_angle_rad)).any(axis=1)
    is_near |= (angles2 >= limits[:, :1]) & (angles2 <= limits[:, 1:])
    for rows, near in zip(blocks, is_near, strict=True):
        yield rows, np.flatnonzero(near)


def _plane_angles(normals: Float64Array) -> Float64Array:
    """The angle of planes around the baseline by their normals (N, 2), (N,), 0 to pi."""
    return np.asarray(np.arctan2(normals[:, 1], normals[:, 0]) % np.pi)
