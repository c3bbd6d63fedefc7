"""Where a map lay on the globe before its run was laid onto something after its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.geo.georeference import sim3d_of
from engine.geo.map_shift import MapShift, map_shift
from engine.geometry import compose_poses, transform_points
from engine.mapping.stored_state import StoredModel
from engine.types import Float64Array, GpsFix

BEFORE_POSITIONS = "before_positions"  # where a map lay that positions moved far, in its record


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FormerPlace:
    """Where something had a map before something else moved it."""

    origin: GpsFix
    enu_from_map: Float64Array  # (3, 4) from the map's own frame and unit
    now_from_map: Float64Array  # (3, 4) likewise, to where the newest snapshot has it
    rmse_m: float

    def shift_of(
        self, centers: Float64Array, onto_from_now: Float64Array, *, onto: GpsFix
    ) -> MapShift:
        """How far from there cameras (C, 3) of the newest snapshot are to lie."""
        map_from_now = np.asarray(sim3d_of(self.now_from_map).inverse().matrix())
        return map_shift(
            transform_points(compose_poses(self.enu_from_map, map_from_now), centers),
            transform_points(onto_from_now, centers),
            origin_before=self.origin,
            origin_after=onto,
            rmse_m=self.rmse_m,
        )

    def as_record(self) -> dict[str, object]:
        """The record in ``snapshot.json``, from which it is read again."""
        return {
            "origin": origin_record(self.origin),
            "enu_from_map": self.enu_from_map.tolist(),
            "rmse_m": self.rmse_m,
        }


def place_by_positions(
    model: StoredModel, georeference: Mapping[str, Any] | None
) -> FormerPlace | None:
    """Where positions had the first map last, whatever control points made of it; None: nowhere.

    Args:
        model: the first map as the newest snapshot has it.
        georeference: of that snapshot.
    """
    if georeference is not None and "gcp" in georeference:
        return _placed(model, georeference.get("by_positions"))
    return _where_it_lies(model, georeference)


def place_before_positions(
    model: StoredModel, georeference: Mapping[str, Any] | None
) -> FormerPlace | None:
    """Where the first map lay before positions moved it far, or where it lies; None: nowhere.

    Args:
        model: the first map as the newest snapshot has it.
        georeference: of that snapshot.
    """
    before = None if georeference is None else georeference.get(BEFORE_POSITIONS)
    return _where_it_lies(model, georeference) if before is None else _placed(model, before)


def origin_record(origin: GpsFix) -> dict[str, float | None]:
    """The origin of east, north, up in JSON files."""
    return {
        "latitude_deg": origin.latitude_deg,
        "longitude_deg": origin.longitude_deg,
        "altitude_m": origin.altitude_m,
    }


def _where_it_lies(
    model: StoredModel, georeference: Mapping[str, Any] | None
) -> FormerPlace | None:
    if georeference is None:
        return None
    return _placed(model, {**georeference, "enu_from_map": model.record.get("enu_from_map")})


def _placed(model: StoredModel, place: Mapping[str, Any] | None) -> FormerPlace | None:
    now = model.record.get("enu_from_map")
    if place is None or now is None:
        return None
    return FormerPlace(
        origin=GpsFix(**place["origin"]),
        enu_from_map=np.array(place["enu_from_map"], np.float64),
        now_from_map=np.array(now, np.float64),
        rmse_m=float(place["rmse_m"]),
    )
