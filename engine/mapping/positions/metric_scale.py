"""How long a map's unit is, from depths that a matcher sees in metres."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from engine.events import MetricScaleEstimated
from engine.geometry import transform_points
from engine.mapping.model.sparse_map import SparseMap
from engine.ports import EventSink
from engine.types import Float32Array, Float64Array, FrameId

_MIN_DEPTHS = 50
_NORMAL_PER_MAD = 1.4826  # standard deviations of a normal distribution per median deviation
_SAME_SCALE = 1.1  # a metric map whose unit is within this factor of a metre stays as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricScale:
    """The length of a map's unit."""

    metres_per_map_unit: float
    num_depths: int
    spread_ratio: float  # robust standard deviation of what single depths say, relative


class MetricUnit:
    """Keeps the unit of the main map known, and a metre where that is wanted.

    Args:
        mode: of the configuration: whether the scale is estimated, and whether it is applied.
        depths_m: for each keyframe the depths of its keypoints, (N,); 0: unknown.
        emit: takes the events.
    """

    def __init__(
        self,
        mode: Literal["report", "apply", "off"],
        *,
        depths_m: Callable[[FrameId], Float32Array],
        emit: EventSink,
    ) -> None:
        self._is_wanted = mode != "off"
        self._is_applied = mode == "apply"
        self._depths_m = depths_m
        self._emit = emit
        self._is_known = False

    @property
    def is_known(self) -> bool:
        """Whether the unit was emitted."""
        return self._is_known

    def restore(self, *, is_known: bool) -> None:
        """Goes on where the unit was emitted before, or was not."""
        self._is_known = is_known

    def metres_per_map_unit(self, sparse_map: SparseMap) -> float | None:
        """How long a map's unit is by the matcher's depths; None when they do not say."""
        scale = self._estimate(sparse_map)
        return None if scale is None else scale.metres_per_map_unit

    def update(self, sparse_map: SparseMap) -> None:
        """Emits, once it is known, how long the map's unit is, and makes it a metre when asked to.

        Later maps are placed onto the one before, and so have its scale, unless they share too
        little with it.
        """
        if self._is_known and not self._is_applied:
            return
        scale = self._estimate(sparse_map)
        if scale is None:
            return
        if self._is_known and _is_about_a_metre(scale):
            return
        self._is_known = True
        if self._is_applied:
            sparse_map.scale(scale.metres_per_map_unit)
        self._emit(
            MetricScaleEstimated(
                metres_per_map_unit=scale.metres_per_map_unit,
                num_depths=scale.num_depths,
                spread_ratio=scale.spread_ratio,
                is_applied=self._is_applied,
            )
        )

    def make_metric(self, sparse_map: SparseMap) -> bool:
        """Makes a metre the unit of a map that is shown before the run's; nothing is emitted.

        Returns:
            Whether it may be shown: not where the unit has to be a metre and depths do not say how
            long it is.
        """
        if not self._is_applied:
            return True
        scale = self._estimate(sparse_map)
        if scale is None:
            return False
        sparse_map.scale(scale.metres_per_map_unit)
        return True

    def is_metric(self, sparse_map: SparseMap) -> bool:
        """Whether a map's unit is about a metre, or need not be, or depths do not say."""
        scale = self._estimate(sparse_map) if self._is_applied else None
        return scale is None or _is_about_a_metre(scale)

    def _estimate(self, sparse_map: SparseMap) -> MetricScale | None:
        return estimate_metric_scale(sparse_map, self._depths_m) if self._is_wanted else None


def _is_about_a_metre(scale: MetricScale) -> bool:
    return 1 / _SAME_SCALE < scale.metres_per_map_unit < _SAME_SCALE


def estimate_metric_scale(
    sparse_map: SparseMap, depths_m: Callable[[FrameId], Float32Array]
) -> MetricScale | None:
    """Compares seen depths of keypoints with the depths of their points in the map.

    The median of the ratios is taken on a logarithmic scale, where twice and half weigh alike.

    Args:
        sparse_map: a map of any scale.
        depths_m: for each keyframe the depths of its keypoints, (N,); 0: unknown.

    Returns:
        None with too few depths.
    """
    ratios = [_log_ratios(sparse_map, i, depths_m(i)) for i in sparse_map.registered_ids]
    log_ratios = np.concatenate(ratios) if ratios else np.empty(0)
    if len(log_ratios) < _MIN_DEPTHS:
        return None
    middle = float(np.median(log_ratios))
    deviation = _NORMAL_PER_MAD * float(np.median(np.abs(log_ratios - middle)))
    return MetricScale(
        metres_per_map_unit=float(np.exp(middle)),
        num_depths=len(log_ratios),
        spread_ratio=float(np.expm1(deviation)),
    )


def _log_ratios(sparse_map: SparseMap, frame_id: FrameId, depths_m: Float32Array) -> Float64Array:
    """Logarithms of metres per map unit, one for each observation with a seen depth."""
    point3D_ids = sparse_map.point3D_ids(frame_id)
    known = np.flatnonzero((point3D_ids >= 0) & (depths_m > 0) & np.isfinite(depths_m))
    points = sparse_map.points3D_in_world(point3D_ids[known])
    depths_map = transform_points(sparse_map.cam_from_world(frame_id), points)[:, 2]
    in_front = (depths_map > 0) & np.isfinite(depths_map)
    return np.asarray(np.log(depths_m[known][in_front]) - np.log(depths_map[in_front]))
