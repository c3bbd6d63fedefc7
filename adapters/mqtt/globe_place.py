"""Where the map lies on the globe, for poses that are published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.events import Georeferenced
from engine.types import Float64Array, freeze_field


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GlobePlace:
    """The place of the main map, from an event."""

    enu_from_map: Float64Array  # (3, 4) similarity, m
    latitude_deg: float  # of the origin
    longitude_deg: float
    altitude_m: float | None  # None: heights are those of the map

    def __post_init__(self) -> None:
        freeze_field(self, "enu_from_map", (3, 4), np.float64)

    @classmethod
    def of(cls, event: Georeferenced) -> GlobePlace | None:
        """The place that an event holds; None: it holds none."""
        if len(event.enu_from_map) != 12:
            return None
        return cls(
            enu_from_map=np.array(event.enu_from_map).reshape(3, 4),
            latitude_deg=event.origin_latitude_deg,
            longitude_deg=event.origin_longitude_deg,
            altitude_m=event.origin_altitude_m,
        )

    def on_globe(self, place_in_map: Sequence[float]) -> dict[str, float]:
        """Latitude, longitude and, where altitudes are known, the altitude of a place."""
        import pycolmap

        east_north_up = self.enu_from_map[:, :3] @ np.array(place_in_map) + self.enu_from_map[:, 3]
        wgs84 = pycolmap.GPSTransform(pycolmap.GPSTransformEllipsoid.WGS84)
        ((latitude, longitude, altitude),) = np.asarray(
            wgs84.enu_to_ellipsoid(
                east_north_up[None], self.latitude_deg, self.longitude_deg, self.altitude_m or 0.0
            )
        ).tolist()
        place = {"latitude_deg": latitude, "longitude_deg": longitude}
        return place if self.altitude_m is None else {**place, "altitude_m": altitude}
