"""How a map that was laid onto something is tilted, turned and scaled against a place before.

A common shift is left aside: datums and receivers are off by one. What the measurements behind the
two places leave open is a covariance of turn and scale by least squares: a measurement with an
error ``e`` at an arm ``a`` from the middle tells the scale to ``e / |a|``, and turns about the axes
that ``a`` is not along.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from engine.geometry import rotation_vector_from
from engine.types import Float64Array, freeze_field

_SIGMAS = 4.0
_LEAST_RAD = math.radians(0.5)  # of tilt and turn; less of it maps that are bent show by themselves
_LEAST_SCALE_RATIO = 0.01  # likewise
_MIN_ERROR_M = 1e-3
_MIN_INFORMATION = 1e-9  # of a turn that nothing tells: its deviation is large, not endless


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Anchors:
    """Where measurements hold a map, and how exact they are."""

    places_m: Float64Array  # (N, 3) metres east, north, up of any origin
    error_m: float  # one standard deviation of a measurement, along each axis
    num_independent: float  # of the measurements
    level_std_rad: float = 0.0  # more of tilt, where the heights were not measured

    def __post_init__(self) -> None:
        freeze_field(self, "places_m", (None, 3), np.float64)

    def turn_covariance(self) -> Float64Array:
        """Of a rotation vector (3, 3), rad squared."""
        moments = self._moments()
        of_turn = float(np.trace(moments)) * np.eye(3) - moments
        per_m2 = self.num_independent / max(self.error_m, _MIN_ERROR_M) ** 2
        covariance = np.linalg.inv(per_m2 * of_turn + _MIN_INFORMATION * np.eye(3))
        return np.asarray(covariance + self.level_std_rad**2 * np.diag([1.0, 1.0, 0.0]))

    def scale_variance(self) -> float:
        """Of the scale, as a ratio."""
        spread_m2 = self.num_independent * float(np.trace(self._moments()))
        return max(self.error_m, _MIN_ERROR_M) ** 2 / max(spread_m2, _MIN_INFORMATION)

    def _moments(self) -> Float64Array:
        arms_m = self.places_m - self.places_m.mean(axis=0)
        return np.asarray(arms_m.T @ arms_m / len(arms_m))


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change, and one standard deviation of what is known of it."""

    value: float
    std: float
    least: float  # smaller ones do not count

    @property
    def is_clear(self) -> bool:
        """Whether it is larger than errors of measurements make it."""
        return abs(self.value) > max(_SIGMAS * self.std, self.least)


@dataclass(frozen=True, slots=True, kw_only=True)
class MapChange:
    """How a map lies now against a place before."""

    tilt_rad: Change  # of the vertical, >= 0
    turn_rad: Change  # about the vertical, to the left
    scale_ratio: Change  # 0.01: it is larger by 1 %

    @property
    def is_clear(self) -> bool:
        """Whether what held the map before contradicts what holds it now."""
        return any(one.is_clear for one in (self.tilt_rad, self.turn_rad, self.scale_ratio))


def map_change(
    before_from_map: Float64Array, now_from_map: Float64Array, *, before: Anchors, now: Anchors
) -> MapChange:
    """The tilt, turn and scale of a map against a place before.

    Args:
        before_from_map: (3, 4) similarity, onto metres east, north, up.
        now_from_map: (3, 4) likewise, of an origin less than some kilometres away.
        before: what held it there.
        now: what holds it now.
    """
    now_from_before = now_from_map[:, :3] @ np.linalg.inv(before_from_map[:, :3])
    scale = float(np.cbrt(np.linalg.det(now_from_before)))
    rotation = now_from_before / scale
    vector = rotation_vector_from(rotation)
    covariance = before.turn_covariance() + now.turn_covariance()
    tilt_rad = math.acos(float(np.clip(rotation[2, 2], -1.0, 1.0)))
    about = vector[:2] / max(float(np.linalg.norm(vector[:2])), 1e-12)
    return MapChange(
        tilt_rad=Change(
            value=tilt_rad,
            std=math.sqrt(float(about @ covariance[:2, :2] @ about)),
            least=_LEAST_RAD,
        ),
        turn_rad=Change(
            value=float(vector[2]), std=math.sqrt(float(covariance[2, 2])), least=_LEAST_RAD
        ),
        scale_ratio=Change(
            value=scale - 1.0,
            std=math.sqrt(before.scale_variance() + now.scale_variance()),
            least=_LEAST_SCALE_RATIO,
        ),
    )
