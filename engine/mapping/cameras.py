"""The cameras of a run: what calibration each starts with, and what matched pairs add to it.

The parameters themselves live in the map; this module keeps where they come from.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass

import numpy as np
import pycolmap

from engine.config import CamerasConfig
from engine.errors import MapError
from engine.estimators.two_view_geometry import estimate_focal_length
from engine.events import CameraCalibrated
from engine.mapping.camera_priors import (
    POINTMAPS_SIGMA_RATIO,
    TWO_VIEW_SIGMA_RATIO,
    CameraPrior,
)
from engine.mapping.sparse_map import SparseMap
from engine.matching.scene_graph import SceneGraph
from engine.ports import EventSink
from engine.types import CalibrationOrigin, Keyframe, VerifiedPair

_MAX_PAIRS = 200  # the strongest ones that estimate a focal length
_MAX_SEEN = 500  # the latest focal lengths that a matcher saw


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InitialCamera:
    """A camera as it enters the map."""

    camera: pycolmap.Camera
    prior: CameraPrior


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
        camera_key = keyframe.camera_key
        if camera_key in self._initial:
            return
        initial = initial_camera(keyframe, self._config)
        self._initial[camera_key] = initial
        sparse_map.add_camera(camera_key, copy.deepcopy(initial.camera), prior=initial.prior)
        self._emit_calibrated(camera_key, initial.camera, prior=initial.prior)

    def copies(self, sparse_map: SparseMap) -> list[pycolmap.Camera]:
        """Copies of all cameras as calibrated in a map, in the order in which they came."""
        return [copy.deepcopy(sparse_map.camera(camera_key)) for camera_key in self._initial]

    def add_all(self, sparse_map: SparseMap, *, like: SparseMap) -> None:
        """Gives a new map all cameras, calibrated as in another one."""
        for camera_key, camera in zip(self._initial, self.copies(like), strict=True):
            sparse_map.add_camera(camera_key, camera, prior=like.camera_prior(camera_key))

    def add_all_anew(self, sparse_map: SparseMap) -> None:
        """Gives a new map all cameras as they were before any map."""
        for camera_key, initial in self._initial.items():
            sparse_map.add_camera(camera_key, copy.deepcopy(initial.camera), prior=initial.prior)

    def add_focal_length(self, camera_key: str, focal_px: float) -> None:
        """Adds a focal length that a matcher saw in an image of a camera."""
        self._seen_focal_px.setdefault(camera_key, deque(maxlen=_MAX_SEEN)).append(focal_px)

    def is_unknown(self, camera_key: str, sparse_map: SparseMap) -> bool:
        """Whether a camera's focal length is only assumed, and the map has not refined it yet."""
        is_assumed = self._initial[camera_key].prior.origin is CalibrationOrigin.ASSUMED
        return is_assumed and camera_key not in _cameras_in(sparse_map)

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
            origin, sigma_ratio = CalibrationOrigin.POINTMAPS, POINTMAPS_SIGMA_RATIO
        else:
            pairs = sorted(_pairs_of(camera_key, graph), key=lambda pair: -pair.num_inliers)
            focal_px = estimate_focal_length(
                pairs[:_MAX_PAIRS], width=camera.width, height=camera.height
            )
            origin, sigma_ratio = CalibrationOrigin.TWO_VIEW_GEOMETRIES, TWO_VIEW_SIGMA_RATIO
        if focal_px is not None and focal_px != camera.mean_focal_length():
            sparse_map.set_camera_params(camera_key, with_focal_length(camera, focal_px))
            prior = CameraPrior.of(
                camera,
                origin=origin,
                focal_sigma_ratio=sigma_ratio,
                is_constant=sparse_map.camera_prior(camera_key).is_constant,
            )
            sparse_map.set_camera_prior(camera_key, prior)
            self._emit_calibrated(camera_key, camera, prior=prior)

    def _emit_calibrated(
        self, camera_key: str, camera: pycolmap.Camera, *, prior: CameraPrior
    ) -> None:
        self._emit(
            CameraCalibrated(
                camera_key=camera_key,
                model=camera.model_name,
                focal_px=camera.mean_focal_length(),
                how=prior.origin.value,
                focal_sigma_ratio=prior.focal_sigma_ratio,
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


def initial_camera(keyframe: Keyframe, config: CamerasConfig) -> InitialCamera:
    """The camera of a keyframe, from the first of these that gives one.

    The configuration's whole calibration, the source's, the configured focal length, the source's
    (EXIF), an assumption.

    Raises:
        MapError: the whole calibration does not fit its camera model.
    """
    known = keyframe.intrinsics_prior
    is_fixed = config.intrinsics == "fixed"
    if config.params:
        camera = _camera(keyframe, config.model, params=config.params)
        return _configured(camera, config)
    if known is not None and known.params is not None and known.camera_model is not None:
        camera = _camera(keyframe, known.camera_model, params=known.params)
        is_file = known.origin is CalibrationOrigin.FILE
        prior = CameraPrior.of(
            camera,
            origin=CalibrationOrigin.FILE if is_file else CalibrationOrigin.KNOWN,
            focal_sigma_ratio=known.focal_sigma_ratio,
            is_constant=is_fixed or not config.refine_known_intrinsics,
        )
        return InitialCamera(camera=camera, prior=prior)
    if config.focal_px:
        return _configured(_of_focal_length(keyframe, config, config.focal_px), config)
    if known is not None:
        camera = _of_focal_length(keyframe, config, known.focal_px)
        prior = CameraPrior.of(
            camera,
            origin=known.origin,
            focal_sigma_ratio=known.focal_sigma_ratio,
            is_constant=is_fixed,
        )
        return InitialCamera(camera=camera, prior=prior)
    edge_px = max(keyframe.width, keyframe.height)
    camera = _of_focal_length(keyframe, config, config.default_focal_ratio * edge_px)
    camera.has_prior_focal_length = False
    return InitialCamera(camera=camera, prior=CameraPrior.assumed(camera, is_constant=is_fixed))


def _configured(camera: pycolmap.Camera, config: CamerasConfig) -> InitialCamera:
    """A camera of whose focal length the configuration says something."""
    prior = CameraPrior.of(
        camera,
        origin=CalibrationOrigin.CONFIGURED,
        focal_sigma_ratio=config.max_focal_change_ratio / 2.0,
        max_change_ratio=config.max_focal_change_ratio,
        is_constant=config.intrinsics == "fixed",
    )
    return InitialCamera(camera=camera, prior=prior)


def _of_focal_length(keyframe: Keyframe, config: CamerasConfig, focal_px: float) -> pycolmap.Camera:
    """A camera of the configured model, without distortion, that has a prior focal length."""
    camera = pycolmap.Camera.create_from_model_name(
        1, config.model, focal_px, keyframe.width, keyframe.height
    )
    camera.has_prior_focal_length = True
    return camera


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
