"""The cameras of a run: what calibration each starts with, and what matched pairs add to it.

Parameters live in the map; here is remembered where they come from.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable

import numpy as np
import pycolmap

from engine.config import CamerasConfig
from engine.estimators.two_view_geometry import estimate_focal_length
from engine.events import CameraCalibrated
from engine.mapping.initial_camera import (
    CalibrationOrigin,
    InitialCamera,
    initial_camera,
    with_focal_length,
)
from engine.mapping.sparse_map import SparseMap
from engine.matching.scene_graph import SceneGraph
from engine.ports import EventSink
from engine.types import Keyframe, VerifiedPair

_MAX_PAIRS = 200  # a focal length is voted on by at most so many, the strongest
_MAX_SEEN = 500  # the latest focal lengths that a matcher saw


class CameraCalibration:
    """Adds cameras to maps and calibrates those nobody knows.

    Args:
        config: camera models and how far their calibration is trusted.
        emit: takes facts.
        clock: seconds since the start of the run.
    """

    def __init__(
        self, config: CamerasConfig, *, emit: EventSink, clock: Callable[[], float]
    ) -> None:
        self._config = config
        self._emit = emit
        self._clock = clock
        self._initial: dict[str, InitialCamera] = {}
        self._seen_focal_px: dict[str, deque[float]] = {}

    def meet(self, keyframe: Keyframe, sparse_map: SparseMap) -> None:
        """Adds a keyframe's camera to the map when it is the first of that camera.

        Raises:
            MapError: what the source says of the camera does not fit its model.
        """
        camera_key = keyframe.camera_key
        if camera_key in self._initial:
            return
        initial = initial_camera(keyframe, self._config)
        self._initial[camera_key] = initial
        sparse_map.add_camera(camera_key, copy.deepcopy(initial.camera))
        self._tell(camera_key, initial.camera, origin=initial.origin)

    def copies(self, sparse_map: SparseMap) -> list[pycolmap.Camera]:
        """Copies of all cameras as calibrated in a map, in the order in which they were met."""
        return [copy.deepcopy(sparse_map.camera(camera_key)) for camera_key in self._initial]

    def add_all(self, sparse_map: SparseMap, *, like: SparseMap) -> None:
        """Gives a new map all cameras, calibrated as in another one."""
        for camera_key, camera in zip(self._initial, self.copies(like), strict=True):
            sparse_map.add_camera(camera_key, camera)

    def constant_ids(self, sparse_map: SparseMap) -> frozenset[int]:
        """COLMAP's ids of the cameras that bundle adjustment must not change."""
        return frozenset(
            sparse_map.camera_id(camera_key)
            for camera_key, initial in self._initial.items()
            if initial.is_constant
        )

    def note_seen(self, camera_key: str, focal_px: float) -> None:
        """Takes a focal length that a matcher saw in an image of a camera."""
        self._seen_focal_px.setdefault(camera_key, deque(maxlen=_MAX_SEEN)).append(focal_px)

    def is_unknown(self, camera_key: str, sparse_map: SparseMap) -> bool:
        """Whether nobody knows a camera's focal length, nor does the map yet."""
        return self._initial[
            camera_key
        ].origin is CalibrationOrigin.ASSUMED and camera_key not in _cameras_in(sparse_map)

    def unknown_keys(self, sparse_map: SparseMap) -> list[str]:
        """Cameras whose focal length nobody knows, nor does the map yet."""
        return [key for key in self._initial if self.is_unknown(key, sparse_map)]

    def calibrate_from_pairs(self, sparse_map: SparseMap, graph: SceneGraph) -> None:
        """Gives cameras that nobody knows a focal length.

        What a matcher saw counts, else the cameras' fundamental matrices. Once a keyframe of a
        camera is in the map, bundle adjustment knows better.
        """
        for camera_key in self.unknown_keys(sparse_map):
            self._calibrate(camera_key, sparse_map, graph)

    def _calibrate(self, camera_key: str, sparse_map: SparseMap, graph: SceneGraph) -> None:
        camera = sparse_map.camera(camera_key)
        seen = self._seen_focal_px.get(camera_key)
        if seen:
            focal_px: float | None = float(np.median(seen))
            origin = CalibrationOrigin.POINTMAPS
        else:
            pairs = sorted(_pairs_of(camera_key, graph), key=lambda pair: -pair.num_inliers)
            focal_px = estimate_focal_length(
                pairs[:_MAX_PAIRS], width=camera.width, height=camera.height
            )
            origin = CalibrationOrigin.TWO_VIEW_GEOMETRIES
        if focal_px is not None and focal_px != camera.mean_focal_length():
            sparse_map.set_camera_params(camera_key, with_focal_length(camera, focal_px))
            self._tell(camera_key, camera, origin=origin)

    def _tell(self, camera_key: str, camera: pycolmap.Camera, *, origin: CalibrationOrigin) -> None:
        self._emit(
            CameraCalibrated(
                at_s=self._clock(),
                camera_key=camera_key,
                focal_px=camera.mean_focal_length(),
                how=origin.value,
            )
        )


def _cameras_in(sparse_map: SparseMap) -> set[str]:
    return {sparse_map.keyframe(i).camera_key for i in sparse_map.registered_ids}


def _pairs_of(camera_key: str, graph: SceneGraph) -> list[VerifiedPair]:
    """Pairs whose both images are of one camera."""
    return [
        pair
        for pair in graph.edges()
        if all(
            graph.keyframe(frame_id).camera_key == camera_key
            for frame_id in (pair.pair.first, pair.pair.second)
        )
    ]
