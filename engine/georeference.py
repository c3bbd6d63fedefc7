"""The map against GPS: how well camera centres and fixes agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pycolmap

from engine.geometry import enu_from_wgs84
from engine.types import Float64Array, GpsFix

_MIN_FIXES = 4  # three points fit any similarity


def gps_rmse_m(centers_in_world: Float64Array, fixes: Sequence[GpsFix]) -> float | None:
    """Root mean square distance in metres of camera centres to their GPS fixes.

    The map is placed by the best similarity (Umeyama, 1991) in local east, north, up coordinates.

    Args:
        centers_in_world: (N, 3) camera centres in the map.
        fixes: N positions.

    Returns:
        None with too few fixes to tell, or when the centres do not determine a similarity.
    """
    if len(fixes) < _MIN_FIXES:
        return None
    positions_m = np.array([enu_from_wgs84(fix, origin=fixes[0]) for fix in fixes])
    enu_from_map = pycolmap.estimate_sim3d(centers_in_world, positions_m)
    if enu_from_map is None:
        return None
    matrix = np.asarray(enu_from_map.matrix())
    placed_m = centers_in_world @ matrix[:, :3].T + matrix[:, 3]
    return float(np.sqrt(((placed_m - positions_m) ** 2).sum(axis=1).mean()))
