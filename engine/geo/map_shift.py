"""How far a map moved on the globe between two places that it was given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.geo.georeference import places_on_globe
from engine.types import Float64Array, GpsFix

_EARTH_RADIUS_M = 6_371_008.8  # mean radius; distances on a sphere are right to 0.5 %
_FAR_M = 100.0  # horizontally; receivers are off by metres
_FAR_UP_M = 20.0  # altitudes of receivers are worse
_FAR_TIMES = 10.0  # the distance of positions to the map


@dataclass(frozen=True, slots=True, kw_only=True)
class MapShift:
    """The median move of a map's cameras."""

    horizontal_m: float
    up_m: float | None  # None: one of the places has no altitude
    rmse_m: float  # of the positions that placed the map before

    @property
    def is_far(self) -> bool:
        """Whether positions cannot be that wrong horizontally."""
        return self.horizontal_m > max(_FAR_M, _FAR_TIMES * self.rmse_m)

    @property
    def is_far_up(self) -> bool:
        """Whether altitudes can hardly be that wrong."""
        limit_m = max(_FAR_UP_M, _FAR_TIMES * self.rmse_m)
        return self.up_m is not None and abs(self.up_m) > limit_m

    @property
    def words(self) -> str:
        """Both in words, such as "466.1 km horizontally and 2.1 m down"."""
        horizontal = f"{_length(self.horizontal_m)} horizontally"
        if self.up_m is None:
            return horizontal
        return f"{horizontal} and {_length(abs(self.up_m))} {'down' if self.up_m < 0.0 else 'up'}"


def map_shift(
    before_in_enu: Float64Array,
    after_in_enu: Float64Array,
    *,
    origin_before: GpsFix,
    origin_after: GpsFix,
    rmse_m: float,
) -> MapShift:
    """The median move of the cameras, along the surface of the Earth and in height.

    Args:
        before_in_enu: (N, 3) camera centres, metres east, north, up of the origin before; N >= 1.
        after_in_enu: (N, 3) likewise, of the origin after.
        origin_before: where the map lay.
        origin_after: where it lies.
        rmse_m: root mean square distance of the positions to the map before.
    """
    before = places_on_globe(before_in_enu, origin=origin_before)
    after = places_on_globe(after_in_enu, origin=origin_after)
    up_m = None
    if origin_before.altitude_m is not None and origin_after.altitude_m is not None:
        up_m = float(np.median(after[:, 2] - before[:, 2]))
    return MapShift(
        horizontal_m=float(np.median(_surface_distances_m(before, after))),
        up_m=up_m,
        rmse_m=rmse_m,
    )


def _surface_distances_m(first: Float64Array, second: Float64Array) -> Float64Array:
    """Great-circle distances (N,) of latitudes and longitudes (N, 2+) in degrees, by haversines."""
    (lat1, lon1), (lat2, lon2) = np.radians(first[:, :2]).T, np.radians(second[:, :2]).T
    haversine = (
        np.sin((lat2 - lat1) / 2.0) ** 2
        + np.cos(lat1) * np.cos(lat2) * np.sin((lon2 - lon1) / 2.0) ** 2
    )
    return np.asarray(2.0 * _EARTH_RADIUS_M * np.arcsin(np.sqrt(np.clip(haversine, 0.0, 1.0))))


def _length(length_m: float) -> str:
    return f"{length_m / 1000.0:,.1f} km" if length_m >= 1000.0 else f"{length_m:.1f} m"
