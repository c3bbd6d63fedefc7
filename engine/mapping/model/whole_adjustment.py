"""Adjusting a whole map on the calling thread: once, or at the end until it settles."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from engine.estimators.lenses import camera_focal_px
from engine.events import BundleAdjusted
from engine.mapping.model.growth import GrowthConfig, adjust_in_place
from engine.mapping.model.sparse_map import SparseMap
from engine.types import Float64Array

_MAX_FURTHER_PASSES = 5  # beyond those wanted
_CONVERGED_RATIO = 0.002  # of a focal length: an adjustment that moves it less is the last


def adjust_whole(sparse_map: SparseMap, *, config: GrowthConfig) -> BundleAdjusted:
    """Adjusts and filters a map; returns the event to be emitted."""
    started_s = time.monotonic()
    before_px = sparse_map.mean_reprojection_error_px()
    adjust_in_place(sparse_map, config=config)
    return BundleAdjusted(
        num_keyframes=sparse_map.num_registered,
        num_points3D=sparse_map.num_points3D,
        reprojection_error_before_px=before_px,
        reprojection_error_after_px=sparse_map.mean_reprojection_error_px(),
        keyframes_added_meanwhile=0,
        elapsed_s=time.monotonic() - started_s,
    )


def adjust_until_settled(
    sparse_map: SparseMap, *, config: GrowthConfig, num_passes: int
) -> Iterator[BundleAdjusted]:
    """Retriangulates and adjusts a map some times; with several cameras on while one still moves.

    They leave a narrow valley, in which the solver takes small steps.

    Args:
        sparse_map: the map.
        config: thresholds of the end.
        num_passes: adjustments, at least.

    Yields:
        What each adjustment did, when it is done.
    """
    num_more = _MAX_FURTHER_PASSES if len(_focal_lengths_px(sparse_map)) > 1 else 0
    for number in range(num_passes + num_more):
        before_px = _focal_lengths_px(sparse_map)
        sparse_map.retriangulate()
        yield adjust_whole(sparse_map, config=config)
        moved_ratio = np.abs(_focal_lengths_px(sparse_map) / before_px - 1.0).max(initial=0.0)
        if number + 1 >= num_passes and moved_ratio < _CONVERGED_RATIO:
            return


def _focal_lengths_px(sparse_map: SparseMap) -> Float64Array:
    """Focal lengths (C,) of the cameras of registered keyframes, px."""
    keys = sorted({sparse_map.keyframe(i).calibration_key for i in sparse_map.registered_ids})
    return np.array([camera_focal_px(sparse_map.camera(key)) for key in keys])
