"""Where a map lay on the globe before its run was laid onto something after its end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.geo.georeference import sim3d_of
from engine.geo.map_change import Anchors, MapChange, map_change
from engine.geo.map_shift import MapShift, map_shift
from engine.geometry import compose_poses, transform_points
from engine.mapping.stored_state import StoredModel
from engine.types import Float64Array, GpsFix

BY_POSITIONS = "by_positions"  # in the `georeference` of snapshot.json: where positions had it
FROM_FILES = "from_files"  # likewise: those came after the run; else the frames had them
_NUM_POSITIONS = "num_positions"  # likewise: that agreed with the map
# Errors of a receiver change slowly: of many positions, so many count as independent.
_MAX_INDEPENDENT = 4
_FLAT_STD_RAD = math.radians(3.5)  # of the vertical where cameras and a flat path give it


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FormerPlace:
    """Where positions had a map before something else moved it; kept, however often it is."""

    origin: GpsFix
    enu_from_map: Float64Array  # (3, 4) from the map's own frame and unit
    now_from_map: Float64Array  # (3, 4) likewise, to where the newest snapshot has it
    rmse_m: float
    is_from_files: bool  # the positions came after the run; else the frames had them
    num_positions: int = _MAX_INDEPENDENT  # that placed it

    def shift_of(
        self, centers: Float64Array, onto_from_now: Float64Array, *, onto: GpsFix
    ) -> MapShift:
        """How far from there cameras (C, 3) of the newest snapshot are to lie."""
        return map_shift(
            transform_points(self._enu_from_now(), centers),
            transform_points(onto_from_now, centers),
            origin_before=self.origin,
            origin_after=onto,
            rmse_m=self.rmse_m,
        )

    def change_by(
        self, centers: Float64Array, onto_from_now: Float64Array, *, now: Anchors
    ) -> MapChange:
        """How cameras (C, 3) of the newest snapshot are to lie against there, but for a shift.

        Args:
            centers: of the cameras.
            onto_from_now: (3, 4) the similarity that moves the newest snapshot.
            now: what holds the map once it was moved.
        """
        enu_from_now = self._enu_from_now()
        before = Anchors(
            places_m=transform_points(enu_from_now, centers),
            error_m=self.rmse_m,
            num_independent=min(self.num_positions, _MAX_INDEPENDENT),
            level_std_rad=_FLAT_STD_RAD if self.origin.altitude_m is None else 0.0,
        )
        return map_change(enu_from_now, onto_from_now, before=before, now=now)

    def _enu_from_now(self) -> Float64Array:
        """The similarity (3, 4) from where the newest snapshot has the map to there."""
        map_from_now = np.asarray(sim3d_of(self.now_from_map).inverse().matrix())
        return compose_poses(self.enu_from_map, map_from_now)

    def as_record(self) -> dict[str, object]:
        """The record in ``snapshot.json``, from which it is read again."""
        return {
            "origin": origin_record(self.origin),
            "enu_from_map": self.enu_from_map.tolist(),
            "rmse_m": self.rmse_m,
            _NUM_POSITIONS: self.num_positions,
            FROM_FILES: self.is_from_files,
        }


def place_by_positions(
    model: StoredModel, georeference: Mapping[str, Any] | None
) -> FormerPlace | None:
    """Where positions had the first map, those of the frames before those of files; None: nowhere.

    Args:
        model: the first map as the newest snapshot has it.
        georeference: of that snapshot.
    """
    now = model.record.get("enu_from_map")
    if georeference is None or now is None:
        return None
    place = georeference.get(BY_POSITIONS)
    if place is None and "gcp" not in georeference:
        place = {**georeference, "enu_from_map": now}
    if place is None:
        return None
    return FormerPlace(
        origin=GpsFix(**place["origin"]),
        enu_from_map=np.array(place["enu_from_map"], np.float64),
        now_from_map=np.array(now, np.float64),
        rmse_m=float(place["rmse_m"]),
        num_positions=int(place.get(_NUM_POSITIONS, _MAX_INDEPENDENT)),
        is_from_files=bool(place.get(FROM_FILES, False)),
    )


def origin_record(origin: GpsFix) -> dict[str, float | None]:
    """The origin of east, north, up in JSON files."""
    return {
        "latitude_deg": origin.latitude_deg,
        "longitude_deg": origin.longitude_deg,
        "altitude_m": origin.altitude_m,
    }
