"""The cameras of a run: what calibration each starts with, and what matched pairs add to it.

The parameters themselves live in the map; this module keeps where they come from.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import pycolmap

from engine.config import CamerasConfig
from engine.errors import MapError
from engine.estimators.two_view_geometry import estimate_focal_length
from engine.events import CameraCalibrated
from engine.mapping.sparse_map import SparseMap
from engine.matching.scene_graph import SceneGraph
from engine.ports import EventSink
from engine.types import FrameId, Keyframe, VerifiedPair

_MAX_PAIRS = 200  # the strongest ones that estimate a focal length
_MAX_SEEN = 500  # the latest focal lengths that a matcher saw


class CalibrationOrigin(StrEnum):
    """The source of a camera's first calibration, most trusted first."""

    CONFIGURED = "configured"
    KNOWN = "known"  # given completely by the source
    EXIF = "exif"
    POINTMAPS = "pointmaps"  # of a dense matcher
    TWO_VIEW_GEOMETRIES = "two_view_geometries"
    ASSUMED = "assumed"
    SPLIT = "split"  # of a camera whose frames contradicted one calibration


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InitialCamera:
    """A camera as it enters the map."""

    camera: pycolmap.Camera
    origin: CalibrationOrigin
    is_constant: bool  # bundle adjustment must not change it


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CameraChange:
    """Cameras of a map that become others, and the keyframes that change theirs."""

    cameras: Mapping[str, pycolmap.Camera]  # by calibration key; new ones, and those that change
    calibration_keys: Mapping[FrameId, str] = field(default_factory=dict)


class CameraCalibration:
    """Adds cameras to maps and calibrates those of unknown focal length.

    Args:
        config: camera models and how far their calibration is trusted.
        emit: takes the events.
    """

    def __init__(self, config: CamerasConfig, *, emit: EventSink) -> None:
        self._config = config
        self._emit = emit
        self._initial: dict[str, InitialCamera] = {}
        self._seen_focal_px: dict[str, deque[float]] = {}

    def add(self, keyframe: Keyframe, sparse_map: SparseMap) -> None:
        """Adds a keyframe's camera to the map when it is the first keyframe of that camera.

        Raises:
            MapError: what the source says of the camera does not fit its model.
        """
        camera_key = keyframe.calibration_key
        if camera_key in self._initial:
            return
        initial = initial_camera(keyframe, self._config)
        self._initial[camera_key] = initial
        sparse_map.add_camera(
            camera_key, copy.deepcopy(initial.camera), is_constant=initial.is_constant
        )
        self._emit_calibrated(camera_key, initial.camera, origin=initial.origin)

    def copies(self, sparse_map: SparseMap) -> list[pycolmap.Camera]:
        """Copies of all cameras as calibrated in a map, in the order in which they came."""
        return [copy.deepcopy(sparse_map.camera(camera_key)) for camera_key in self._initial]

    def add_all(
        self, sparse_map: SparseMap, *, like: SparseMap, change: CameraChange | None = None
    ) -> None:
        """Gives a new map all cameras, calibrated as in another one but for what changes."""
        changed = {} if change is None else change.cameras
        for (camera_key, initial), camera in zip(
            self._initial.items(), self.copies(like), strict=True
        ):
            sparse_map.add_camera(
                camera_key,
                copy.deepcopy(changed.get(camera_key, camera)),
                is_constant=initial.is_constant,
            )
        for camera_key in [key for key in changed if key not in self._initial]:
            sparse_map.add_camera(
                camera_key, copy.deepcopy(changed[camera_key]), is_constant=self._is_fixed
            )

    def adopt(self, change: CameraChange) -> None:
        """Takes changed cameras as those of all maps to come, in the order of `add_all`."""
        for camera_key, camera in change.cameras.items():
            former = self._initial.get(camera_key)
            self._initial[camera_key] = InitialCamera(
                camera=copy.deepcopy(camera),
                origin=CalibrationOrigin.SPLIT if former is None else former.origin,
                is_constant=self._is_fixed if former is None else former.is_constant,
            )

    def add_focal_length(self, camera_key: str, focal_px: float) -> None:
        """Adds a focal length that a matcher saw in an image of a camera."""
        self._seen_focal_px.setdefault(camera_key, deque(maxlen=_MAX_SEEN)).append(focal_px)

    def is_unknown(self, camera_key: str, sparse_map: SparseMap) -> bool:
        """Whether a camera's focal length is only assumed, and the map has not refined it yet."""
        return self._initial[
            camera_key
        ].origin is CalibrationOrigin.ASSUMED and camera_key not in _cameras_in(sparse_map)

    def unknown_keys(self, sparse_map: SparseMap) -> list[str]:
        """Cameras whose focal length is only assumed, and not refined by the map yet."""
        return [key for key in self._initial if self.is_unknown(key, sparse_map)]

    def calibrate_from_pairs(self, sparse_map: SparseMap, graph: SceneGraph) -> None:
        """Gives cameras of unknown focal length an estimate of it.

        What a matcher saw counts, else the cameras' fundamental matrices. Once a keyframe of a
        camera is in the map, bundle adjustment refines it better.
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
            self._emit_calibrated(camera_key, camera, origin=origin)

    @property
    def _is_fixed(self) -> bool:
        return self._config.intrinsics == "fixed"

    def _emit_calibrated(
        self, camera_key: str, camera: pycolmap.Camera, *, origin: CalibrationOrigin
    ) -> None:
        self._emit(
            CameraCalibrated(
                camera_key=camera_key,
                focal_px=camera.mean_focal_length(),
                how=origin.value,
            )
        )


def _cameras_in(sparse_map: SparseMap) -> set[str]:
    return {sparse_map.keyframe(i).calibration_key for i in sparse_map.registered_ids}


def _pairs_of(camera_key: str, graph: SceneGraph) -> list[VerifiedPair]:
    """Pairs whose both images are of one camera."""
    return [
        pair
        for pair in graph.edges()
        if all(
            graph.keyframe(frame_id).calibration_key == camera_key
            for frame_id in (pair.pair.first, pair.pair.second)
        )
    ]


def initial_camera(keyframe: Keyframe, config: CamerasConfig) -> InitialCamera:
    """The camera of a keyframe, from the first of these that gives one.

    The configuration's whole calibration, the source's, the configured focal length, the source's
    (EXIF), an assumption.

    Raises:
        MapError: the whole calibration does not fit its camera model.
    """
    prior = keyframe.intrinsics_prior
    fixed = config.intrinsics == "fixed"
    if config.params:
        camera = _camera(keyframe, config.model, params=config.params)
        return InitialCamera(camera=camera, origin=CalibrationOrigin.CONFIGURED, is_constant=fixed)
    if prior is not None and prior.params is not None and prior.camera_model is not None:
        camera = _camera(keyframe, prior.camera_model, params=prior.params)
        return InitialCamera(
            camera=camera,
            origin=CalibrationOrigin.KNOWN,
            is_constant=fixed or not config.refine_known_intrinsics,
        )
    if config.focal_px:
        focal_px, origin = config.focal_px, CalibrationOrigin.CONFIGURED
    elif prior is not None:
        focal_px, origin = prior.focal_px, CalibrationOrigin.EXIF
    else:
        edge = max(keyframe.width, keyframe.height)
        focal_px, origin = config.default_focal_ratio * edge, CalibrationOrigin.ASSUMED
    camera = pycolmap.Camera.create_from_model_name(
        1, config.model, focal_px, keyframe.width, keyframe.height
    )
    camera.has_prior_focal_length = origin is not CalibrationOrigin.ASSUMED
    return InitialCamera(camera=camera, origin=origin, is_constant=fixed)


def with_focal_length(camera: pycolmap.Camera, focal_px: float) -> list[float]:
    """Parameters for a camera's model and size: another focal length, no distortion, centred."""
    return list(
        pycolmap.Camera.create_from_model_name(
            1, camera.model_name, focal_px, camera.width, camera.height
        ).params
    )


def _camera(keyframe: Keyframe, model: str, *, params: tuple[float, ...]) -> pycolmap.Camera:
    try:
        camera = pycolmap.Camera.create_from_model_name(
            1, model, 1.0, keyframe.width, keyframe.height
        )
    except ValueError as error:
        raise MapError(f"{keyframe.name}: COLMAP knows no camera model {model}") from error
    # COLMAP takes any number of parameters without a word and reads beyond their end later.
    camera.params = list(params)
    if not camera.verify_params():
        raise MapError(f"{keyframe.name}: {model} does not have {len(params)} parameters")
    camera.has_prior_focal_length = True
    return camera
