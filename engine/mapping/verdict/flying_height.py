"""How high a camera flew that looked down on nearly flat ground.

There the images hardly tell its focal length, and positions do not either: a longer one puts the
ground farther below the cameras, by as large a share of their height.
"""

from __future__ import annotations

import numpy as np

from engine.geometry import camera_center, transform_points
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.positions.georeferencing import Placement
from engine.mapping.verdict.part_evidence import spread
from engine.types import Float64Array, FrameId

_MAX_ASKED = 20  # keyframes, spread over the map
_MAX_POINTS = 200  # of each
_DOWN_RAD = np.radians(30.0)  # from straight down
_DOWN_RATIO = 0.8  # of the cameras
_FLAT_RATIO = 0.25  # of the flying height: most of the ground's relief
_RELIEF_PERCENTILES = (10.0, 90.0)


def flying_height_m(sparse_map: SparseMap, placement: Placement | None) -> float | None:
    """The median height of the cameras above the ground, metres.

    None: positions do not place the map, its cameras do not look down, or the ground is not flat.
    """
    ids = sparse_map.registered_ids
    if placement is None or not ids:
        return None
    enu_from_map = placement.georeference.enu_from_map
    asked = [ids[k] for k in spread(len(ids), min(len(ids), _MAX_ASKED)).tolist()]
    poses = np.array([sparse_map.cam_from_world(i) for i in asked])
    axes = poses[:, 2, :3] @ enu_from_map[:, :3].T
    looks_down = -axes[:, 2] > np.cos(_DOWN_RAD) * np.linalg.norm(axes, axis=1)
    if looks_down.mean() < _DOWN_RATIO:
        return None
    grounds = [_ground_heights(sparse_map, i, enu_from_map) for i in asked]
    if not all(len(one) for one in grounds):
        return None
    centers_up = transform_points(enu_from_map, camera_center(poses))[:, 2]
    height_m = float(np.median(centers_up - [np.median(one) for one in grounds]))
    low, high = np.percentile(np.concatenate(grounds), _RELIEF_PERCENTILES)
    return height_m if 0.0 <= high - low < _FLAT_RATIO * height_m else None


def _ground_heights(
    sparse_map: SparseMap, frame_id: FrameId, enu_from_map: Float64Array
) -> Float64Array:
    """Heights (P,) of points that a keyframe observes."""
    point3D_ids = sparse_map.point3D_ids(frame_id)
    point3D_ids = point3D_ids[point3D_ids >= 0]
    step = max(1, len(point3D_ids) // _MAX_POINTS)
    points = sparse_map.points3D_in_world(point3D_ids[::step])
    return transform_points(enu_from_map, points)[:, 2]
