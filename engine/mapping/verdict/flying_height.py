"""How high a camera flew that looked down on nearly flat ground.

There the images hardly tell its focal length, and positions do not either: a longer one puts the
ground farther below the cameras, by as large a share of their height.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pycolmap

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
    asked = [ids[k] for k in _asked(len(ids))]
    return _height_m(
        np.array([sparse_map.cam_from_world(i) for i in asked]),
        lambda place: _points_of(sparse_map, asked[place]),
        placement.georeference.enu_from_map,
    )


def flying_height_of_model_m(
    reconstruction: pycolmap.Reconstruction, enu_from_map: Float64Array
) -> float | None:
    """The same of a stored map, by the similarity (3, 4) that lays it onto east, north, up."""
    ids = reconstruction.reg_image_ids()
    if not ids:
        return None
    images = [reconstruction.image(ids[k]) for k in _asked(len(ids))]

    def points_of(place: int) -> Float64Array:
        seen = [one.point3D_id for one in images[place].points2D if one.has_point3D()]
        some = seen[:: max(1, len(seen) // _MAX_POINTS)]
        return np.array([reconstruction.point3D(i).xyz for i in some]).reshape(-1, 3)

    poses = np.array([image.cam_from_world().matrix() for image in images])
    return _height_m(poses, points_of, enu_from_map)


def _asked(num: int) -> list[int]:
    """Which of so many cameras are asked."""
    return list(spread(num, min(num, _MAX_ASKED)).tolist())


def _height_m(
    poses: Float64Array, points_of: Callable[[int], Float64Array], enu_from_map: Float64Array
) -> float | None:
    """The median height of cameras above flat ground, metres.

    Args:
        poses: (N, 3, 4) of cameras from the map.
        points_of: the points (P, 3) in the map that the camera of a row observes, or some.
        enu_from_map: (3, 4) similarity.
    """
    axes = poses[:, 2, :3] @ enu_from_map[:, :3].T
    looks_down = -axes[:, 2] > np.cos(_DOWN_RAD) * np.linalg.norm(axes, axis=1)
    if looks_down.mean() < _DOWN_RATIO:
        return None
    grounds = [
        transform_points(enu_from_map, points_of(place))[:, 2] for place in range(len(poses))
    ]
    if not all(len(one) for one in grounds):
        return None
    centers_up = transform_points(enu_from_map, camera_center(poses))[:, 2]
    height_m = float(np.median(centers_up - [np.median(one) for one in grounds]))
    low, high = np.percentile(np.concatenate(grounds), _RELIEF_PERCENTILES)
    return height_m if 0.0 <= high - low < _FLAT_RATIO * height_m else None


def _points_of(sparse_map: SparseMap, frame_id: FrameId) -> Float64Array:
    """Some of the points (P, 3) that a keyframe observes."""
    point3D_ids = sparse_map.point3D_ids(frame_id)
    point3D_ids = point3D_ids[point3D_ids >= 0]
    step = max(1, len(point3D_ids) // _MAX_POINTS)
    return sparse_map.points3D_in_world(point3D_ids[::step])
