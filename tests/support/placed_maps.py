"""Maps on the globe, as positions place them."""

from __future__ import annotations

import numpy as np

from engine.geo.georeference import Georeference
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.positions.georeferencing import Placement
from engine.types import Float64Array, GpsFix

_INLIER_M = 10.0


def placed(
    sparse_map: SparseMap, enu_from_map: Float64Array, residuals_m: Float64Array | None = None
) -> Placement:
    """A map whose keyframes all have positions.

    Args:
        sparse_map: the map.
        enu_from_map: (3, 4) the similarity to metres east, north, up.
        residuals_m: (N,) of the registered keyframes; None: nothing.
    """
    ids = sparse_map.registered_ids
    residuals_m = np.zeros(len(ids)) if residuals_m is None else residuals_m
    found = Georeference(
        origin=GpsFix(latitude_deg=50.0, longitude_deg=8.0, altitude_m=100.0),
        enu_from_map=enu_from_map,
        residuals_m=residuals_m,
        weights=np.ones(len(ids)),
        is_inlier=residuals_m < _INLIER_M,
        offsets_enu_m=np.zeros((len(ids), 3)),
        rmse_m=0.1,
        rotation_std_deg=1.0,
        scale_std_ratio=0.01,
        is_levelled_by_cameras=False,
    )
    return Placement(georeference=found, frame_ids=tuple(ids), names=tuple(map(str, ids)))
