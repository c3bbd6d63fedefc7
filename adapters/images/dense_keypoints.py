"""Dense keypoints: the keypoint table that a dense matcher's keyframe starts with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.geometry import grid_over_image, usable_at
from engine.types import Features, Float64Array, Frame

if TYPE_CHECKING:
    from engine.config import DenseMatchingConfig

_WORKING_EDGE_PX = 1024  # corners are found on an image of at most this longer edge
_CORNER_QUALITY = 1e-3  # of the strongest corner's response
_CORNER_DISTANCE_PX = 8.0  # between corners, on the working image
_CORNER_WINDOW_PX = 5


def dense_features(frame: Frame, config: DenseMatchingConfig) -> Features:
    """Corners (Shi and Tomasi, 1994), and a grid of free rows that matches may claim.

    A dense matcher could start from any pixel. Corners are what optical flow can follow, and what
    other images' corners match again. There are none under the frame's mask; the grid is whole,
    because a cell may be masked in part.
    """
    corners_xy = _corners(frame, limit=min(config.max_corners, config.max_keypoints))
    grid_xy = grid_over_image(
        (frame.width, frame.height), num=config.max_keypoints - len(corners_xy)
    )
    keypoints_xy = np.concatenate([corners_xy, grid_xy])
    columns, lines = keypoints_xy.astype(np.int64).T
    return Features(
        frame_id=frame.frame_id,
        keypoints_xy=keypoints_xy,
        descriptors=np.empty((len(keypoints_xy), 0), np.uint8),
        scales=np.ones(len(keypoints_xy), np.float32),
        colors=frame.pixels[lines, columns],
        is_free=np.arange(len(keypoints_xy)) >= len(corners_xy),
    )


def _corners(frame: Frame, *, limit: int) -> Float64Array:
    """Corners (N, 2) in px of the original image, strongest first."""
    import cv2

    if limit == 0:
        return np.empty((0, 2))
    grey = cv2.cvtColor(frame.pixels, cv2.COLOR_RGB2GRAY)
    height, width = grey.shape
    ratio = min(1.0, _WORKING_EDGE_PX / max(height, width))
    size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
    if ratio < 1.0:
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    area = None
    if frame.mask is not None:
        area = cv2.resize(frame.mask.view(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    found = cv2.goodFeaturesToTrack(
        grey, limit, _CORNER_QUALITY, _CORNER_DISTANCE_PX, area, blockSize=_CORNER_WINDOW_PX
    )
    if found is None:
        return np.empty((0, 2))
    # cv2 puts (0, 0) at the centre of the first pixel, COLMAP at its corner.
    corners_xy = np.asarray((found.reshape(-1, 2) + 0.5) * (np.array([width, height]) / size))
    return corners_xy if frame.mask is None else corners_xy[usable_at(frame.mask, corners_xy)]
