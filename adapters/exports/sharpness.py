"""Sharpness of frames, compared by what they show alike.

A frame that shows a lawn has more gradients than one that shows a wall, however blurred. So frames
are compared by the same map points: around each point the energy of gradients (Tenengrad:
Krotkov, 1987) is taken relative to the contrast of what blur leaves, the means of squares of some
pixels, which cancels exposure. The logarithm is modelled as the sum of a part of the frame and a
part of the point; that of the frame is its sharpness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.types import Float64Array, Int64Array, Uint8Array

_SQUARE_PX = 4  # a motion blur of so many px hardly changes the means of such squares
_NUM_SQUARES = 5  # a side of a patch
_PATCH_PX = _SQUARE_PX * _NUM_SQUARES
_LEAST_VARIANCE = 4.0  # squared grey levels: less contrast shows nothing
_NUM_ROUNDS = 30


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PatchDetail:
    """How much detail a frame shows around some map points."""

    point3D_ids: Int64Array  # (N,)
    log_detail: Float64Array  # (N,)


def patch_detail(grey: Uint8Array, point3D_ids: Int64Array, points_xy: Float64Array) -> PatchDetail:
    """Measures a frame around map points.

    Args:
        grey: (H, W) the frame at full size.
        point3D_ids: (N,).
        points_xy: (N, 2) px.

    Returns:
        Those whose patch lies in the image and has contrast.
    """
    corner = np.floor(points_xy).astype(np.int64) - _PATCH_PX // 2
    height, width = grey.shape
    inside = (corner >= 1).all(axis=1) & (corner + _PATCH_PX < [width, height]).all(axis=1)
    corner, ids = corner[inside], point3D_ids[inside]
    offsets = np.arange(-1, _PATCH_PX + 1)  # with a border for the gradients
    rows = corner[:, 1, None, None] + offsets[None, :, None]
    columns = corner[:, 0, None, None] + offsets[None, None, :]
    patches = grey[np.minimum(rows, height - 1), np.minimum(columns, width - 1)].astype(np.float32)
    across = patches[:, 1:-1, 2:] - patches[:, 1:-1, :-2]
    down = patches[:, 2:, 1:-1] - patches[:, :-2, 1:-1]
    energy = (across**2 + down**2).mean(axis=(1, 2))
    squares = patches[:, 1:-1, 1:-1].reshape(-1, _NUM_SQUARES, _SQUARE_PX, _NUM_SQUARES, _SQUARE_PX)
    contrast = squares.mean(axis=(2, 4)).var(axis=(1, 2))
    shown = (contrast > _LEAST_VARIANCE) & (energy > 0)
    return PatchDetail(
        point3D_ids=ids[shown],
        log_detail=np.log(energy[shown].astype(np.float64) / contrast[shown]),
    )


def sharpness_of(details: Sequence[PatchDetail]) -> Float64Array:
    """The sharpness (F,) of frames, natural logarithms about 0; -inf: nothing is shown alike.

    Of frames that share points, directly or by way of others, differences are meant; the model is
    fitted by turns, with medians for the frames: a few points that moved count for little.
    """
    frame_idx = np.repeat(np.arange(len(details)), [len(one.point3D_ids) for one in details])
    if not len(frame_idx):
        return np.full(len(details), -np.inf)
    ids = np.concatenate([one.point3D_ids for one in details])
    logs = np.concatenate([one.log_detail for one in details])
    _, point_idx, counts = np.unique(ids, return_inverse=True, return_counts=True)
    shared = counts[point_idx] > 1
    frame_idx, point_idx, logs = frame_idx[shared], point_idx[shared], logs[shared]
    if not len(frame_idx):
        return np.full(len(details), -np.inf)
    frames, starts = np.unique(frame_idx, return_index=True)  # rows are in the frames' order
    sharpness = np.full(len(details), -np.inf)
    sharpness[frames] = 0.0
    num_observations = np.maximum(np.bincount(point_idx, minlength=len(counts)), 1)
    for _ in range(_NUM_ROUNDS):
        rest = logs - sharpness[frame_idx]
        of_point = np.bincount(point_idx, weights=rest, minlength=len(counts)) / num_observations
        own = np.split(logs - of_point[point_idx], starts[1:])
        sharpness[frames] = [np.median(one) for one in own]
        sharpness[frames] -= np.median(sharpness[frames])
    return sharpness
