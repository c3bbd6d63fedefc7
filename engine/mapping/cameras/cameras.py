"""The cameras of a run: what calibration each starts with, and what matched pairs add to it.

The parameters themselves live in the map; this module keeps where they come from.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pycolmap

from engine.camera_models import CAMERA_MODELS, LensKind
from engine.config import CamerasConfig
from engine.errors import MapError
from engine.estimators.camera_limits import FOCAL_RATIOS, lens_flaw
from engine.estimators.lenses import (
    fisheye_focal_px,
    intrinsics_of,
    is_far_from_pinhole,
    is_wide,
)
from engine.estimators.two_view_geometry import estimate_focal_length
from engine.mapping.cameras.camera_reports import CameraReports
from engine.mapping.cameras.focal_votes import FocalVotes
from engine.mapping.model.camera_priors import (
    POINTMAPS_SIGMA_RATIO,
    TWO_VIEW_SIGMA_RATIO,
    CameraPrior,
)
from engine.mapping.model.sparse_map import SparseMap
from engine.matching.scene_graph import SceneGraph
from engine.ports import EventSink
from engine.types import (
    EXIF_FOCAL_SIGMA_RATIO,
    CalibrationOrigin,
    CameraFigures,
    FrameId,
    Intrinsics,
    IntrinsicsPrior,
    Keyframe,
)

_MAX_PAIRS = 200  # the strongest ones that estimate a focal length
_MAX_SEEN = 500  # the latest focal lengths that a matcher saw
_ORDINARY_MODELS = frozenset({"SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV"})
_FISHEYE_MODEL = "RADIAL_FISHEYE"  # of cameras that are fisheyes by their name


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InitialCamera:
    """A camera as it enters the map."""

    camera: pycolmap.Camera
    prior: CameraPrior


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CameraChange:
    """Cameras of a map that become others, and the keyframes that change theirs."""

    cameras: Mapping[str, InitialCamera]  # by calibration key; new ones, and those that change
    calibration_keys: Mapping[FrameId, str] = field(default_factory=dict)


class CameraCalibration:
    """Adds cameras to maps and calibrates those of unknown focal length.

    Args:
        config: camera models and how far their calibration is trusted.
        emit: takes the events.
    """

    def __init__(self, config: CamerasConfig, *, emit: EventSink) -> None:
        self._config = config
        self._reports = CameraReports(emit=emit)
        self._initial: dict[str, InitialCamera] = {}
        self._seen_focal_px: dict[str, deque[float]] = {}
        self._given_keys: set[str] = set()  # cameras that came with a whole calibration

    def add(self, keyframe: Keyframe, sparse_map: SparseMap) -> None:
        """Adds a keyframe's camera to the map when it is the first keyframe of that camera.

        Raises:
            MapError: what the source says of the camera does not fit its model.
        """
        camera_key = keyframe.calibration_key
        if camera_key in self._initial:
            return
        initial = initial_camera(keyframe, self._config)
        sparse_map.add_camera(camera_key, copy.deepcopy(initial.camera), prior=initial.prior)
        self._take(camera_key, initial, keyframe)

    def _take(self, camera_key: str, initial: InitialCamera, keyframe: Keyframe) -> None:
        """Takes a camera, and reports it with what is odd about its first keyframe."""
        self._initial[camera_key] = initial
        if self._config.params or _is_whole(keyframe.intrinsics_prior):
            self._given_keys.add(camera_key)
        self._reports.add(camera_key, initial.camera, initial.prior)
        doubt = _doubt_about(keyframe) or _doubt_about_given(initial)
        if doubt:
            self._reports.add_doubt(camera_key, doubt)

    @property
    def initial(self) -> Mapping[str, InitialCamera]:
        """All cameras as they enter maps, by key, in the order in which they came."""
        return self._initial

    def facts(self) -> dict[str, list[float]]:
        """The focal lengths that a matcher saw, by camera."""
        return {camera_key: list(seen) for camera_key, seen in self._seen_focal_px.items()}

    def restore(
        self,
        facts: Mapping[str, Sequence[float]],
        initial: Mapping[str, InitialCamera],
        first_keyframes: Mapping[str, Keyframe],
    ) -> None:
        """Goes on with the cameras of a run before; no map gets them here.

        Args:
            facts: as `facts` gave them.
            initial: the cameras, by key, in the order in which they came.
            first_keyframes: the first keyframe of each; cameras without any are left out.
        """
        for camera_key, one in initial.items():
            if camera_key in first_keyframes:
                self._take(camera_key, one, first_keyframes[camera_key])
        for camera_key, seen in facts.items():
            self._seen_focal_px[camera_key] = deque(seen, maxlen=_MAX_SEEN)

    def add_zoom_doubt(self, camera_key: str, reason: str) -> None:
        """Emits that keyframes of a camera contradict one focal length, and no map says more."""
        self._reports.add_doubt(camera_key, reason, kind="zoom")

    def remove_zoom_doubt(self, camera_key: str) -> None:
        """Forgets that keyframes contradict one focal length, when they no longer share one."""
        self._reports.remove_doubt(camera_key, kind="zoom")

    def add_missing_doubt(self, camera_key: str, reason: str) -> None:
        """Emits that keyframes of a camera that zooms stay out of the map."""
        self._reports.add_doubt(camera_key, reason, kind="missing")

    def report(self, sparse_map: SparseMap, *, is_final: bool = False) -> None:
        """Emits calibrations that the map changed, and cameras to doubt.

        Args:
            sparse_map: the map.
            is_final: whether no more keyframes will come; else those of few are not reported yet.
        """
        self._reports.update(self._initial, sparse_map, is_final=is_final)

    def figures(self, sparse_map: SparseMap) -> tuple[CameraFigures, ...]:
        """All cameras as calibrated in a map, in the order in which they came."""
        return self._reports.figures(self._initial, sparse_map)

    def copies(self, sparse_map: SparseMap) -> list[pycolmap.Camera]:
        """Copies of all cameras as calibrated in a map, in the order in which they came."""
        return [copy.deepcopy(sparse_map.camera(camera_key)) for camera_key in self._initial]

    def wide_intrinsics(
        self, sparse_map: SparseMap, *, change: CameraChange | None = None
    ) -> dict[str, Intrinsics]:
        """Frozen calibrations of all cameras by key, when one of them is wide; else none.

        Wide are lenses of a wide model, and those with distortion that is strong and known.

        Args:
            sparse_map: holds the cameras.
            change: those that are others by now.
        """
        cameras = {key: sparse_map.camera(key) for key in self._initial}
        cameras.update({} if change is None else {k: c.camera for k, c in change.cameras.items()})
        wide_keys = {key for key, camera in cameras.items() if self._is_wide(key, camera)}
        if not wide_keys:
            return {}
        return {
            key: intrinsics_of(camera, is_wide=key in wide_keys) for key, camera in cameras.items()
        }

    def _is_wide(self, camera_key: str, camera: pycolmap.Camera) -> bool:
        if camera_key not in self._given_keys and camera.model_name in _ORDINARY_MODELS:
            return False  # distortion that is being searched for is no reason
        return is_far_from_pinhole(camera)

    def add_all(
        self, sparse_map: SparseMap, *, like: SparseMap, change: CameraChange | None = None
    ) -> None:
        """Gives a new map all cameras, calibrated as in another one but for what changes."""
        changed = {} if change is None else change.cameras
        present = {
            key: InitialCamera(camera=camera, prior=like.camera_prior(key))
            for key, camera in zip(self._initial, self.copies(like), strict=True)
        }
        for camera_key, one in {**present, **changed}.items():
            sparse_map.add_camera(camera_key, copy.deepcopy(one.camera), prior=one.prior)

    def complete(self, sparse_map: SparseMap, *, like: SparseMap) -> None:
        """Gives a map the cameras that it lacks, calibrated as in another one."""
        for camera_key in like.camera_keys:
            if camera_key not in sparse_map.camera_keys:
                camera = copy.deepcopy(like.camera(camera_key))
                prior = like.camera_prior(camera_key)
                sparse_map.add_camera(camera_key, camera, prior=prior)

    def adopt(self, change: CameraChange) -> None:
        """Takes changed cameras as those of all maps to come, in the order of `add_all`."""
        for camera_key, initial in change.cameras.items():
            self._reports.remove_doubt(camera_key, kind="zoom")
            self._initial[camera_key] = initial
            self._reports.add(camera_key, initial.camera, initial.prior)

    def add_all_anew(self, sparse_map: SparseMap) -> None:
        """Gives a new map all cameras as they were before any map."""
        for camera_key, initial in self._initial.items():
            sparse_map.add_camera(camera_key, copy.deepcopy(initial.camera), prior=initial.prior)

    def add_focal_length(self, camera_key: str, focal_px: float) -> None:
        """Adds a focal length that a matcher saw in an image of a camera."""
        self._seen_focal_px.setdefault(camera_key, deque(maxlen=_MAX_SEEN)).append(focal_px)

    def is_unknown(self, camera_key: str, sparse_map: SparseMap) -> bool:
        """Whether a pinhole's focal length is only assumed, and the map has not refined it yet."""
        return (
            self._initial[camera_key].prior.origin is CalibrationOrigin.ASSUMED
            and not is_wide(sparse_map.camera(camera_key))
            and camera_key not in cameras_in(sparse_map)
        )

    def unknown_keys(self, sparse_map: SparseMap) -> list[str]:
        """Cameras whose focal length is only assumed, and not refined by the map yet.

        Not among them are fisheyes, whose pairs and pointmaps show no pinhole's focal length.
        """
        return [key for key in self._initial if self.is_unknown(key, sparse_map)]

    def calibrate_from_pairs(
        self,
        sparse_map: SparseMap,
        graph: SceneGraph,
        *,
        votes: FocalVotes | None = None,
        is_trial: bool = False,
    ) -> None:
        """Gives cameras of unknown focal length an estimate of it.

        What a matcher saw counts, else how many pairs agree by votes, where they are given, else
        the cameras' fundamental matrices. Once a keyframe of a camera is in the map, bundle
        adjustment refines it better.

        Args:
            sparse_map: gets them.
            graph: holds the pairs.
            votes: lets pairs vote.
            is_trial: the map is not the run's, so nothing is reported.
        """
        for camera_key in self.unknown_keys(sparse_map):
            self._calibrate(camera_key, sparse_map, graph, votes=votes, is_trial=is_trial)

    def _calibrate(
        self,
        camera_key: str,
        sparse_map: SparseMap,
        graph: SceneGraph,
        *,
        votes: FocalVotes | None,
        is_trial: bool,
    ) -> None:
        camera = sparse_map.camera(camera_key)
        seen = self._seen_focal_px.get(camera_key)
        if seen:
            focal_px: float | None = float(np.median(seen))
            origin, sigma_ratio = CalibrationOrigin.POINTMAPS, POINTMAPS_SIGMA_RATIO
        elif votes is not None:
            focal_px = votes.focal_px(camera_key, sparse_map.camera)
            origin, sigma_ratio = CalibrationOrigin.TWO_VIEW_GEOMETRIES, TWO_VIEW_SIGMA_RATIO
        else:
            pairs = sorted(graph.edges_of(camera_key), key=lambda pair: -pair.num_inliers)
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
            if not is_trial:
                self._reports.add(camera_key, camera, prior)


def cameras_in(sparse_map: SparseMap) -> set[str]:
    """Keys of the cameras of which a map holds registered keyframes."""
    return {sparse_map.keyframe(i).calibration_key for i in sparse_map.registered_ids}


def initial_camera(keyframe: Keyframe, config: CamerasConfig) -> InitialCamera:
    """The camera of a keyframe, from the first of these that gives one.

    A calibration file, the configuration's whole calibration, the source's, the configured focal
    length, the source's (EXIF), an assumption.

    Raises:
        MapError: the whole calibration does not fit its camera model.
    """
    known = keyframe.intrinsics_prior
    model = _first_model(known, config)
    is_fixed = config.intrinsics == "fixed"
    is_file = known is not None and known.origin is CalibrationOrigin.FILE
    if config.params and not is_file:
        camera = _camera(keyframe, config.model, params=config.params)
        return _configured(camera, config)
    if known is not None and known.params is not None and known.camera_model is not None:
        camera = _camera(keyframe, known.camera_model, params=known.params)
        prior = CameraPrior.of(
            camera,
            origin=CalibrationOrigin.FILE if is_file else CalibrationOrigin.KNOWN,
            focal_sigma_ratio=known.focal_sigma_ratio,
            max_change_ratio=config.max_focal_change_ratio if is_file else None,
            is_constant=is_fixed or not config.refine_known_intrinsics,
        )
        return InitialCamera(camera=camera, prior=prior)
    if CAMERA_MODELS[model].kind is LensKind.SPHERICAL:
        camera = _of_focal_length(keyframe, model, 1.0)  # has none; its size is all there is
        prior = CameraPrior.of(
            camera,
            origin=CalibrationOrigin.CONFIGURED,
            focal_sigma_ratio=EXIF_FOCAL_SIGMA_RATIO,
            is_constant=True,
        )
        return InitialCamera(camera=camera, prior=prior)
    if config.focal_px:
        return _configured(_of_focal_length(keyframe, model, config.focal_px), config)
    if known is not None and _is_plausible(known, keyframe):
        camera = _of_focal_length(keyframe, model, known.focal_px)
        prior = CameraPrior.of(
            camera,
            origin=known.origin,
            focal_sigma_ratio=known.focal_sigma_ratio,
            is_constant=is_fixed,
        )
        return InitialCamera(camera=camera, prior=prior)
    camera = _of_focal_length(keyframe, model, _assumed_focal_px(keyframe, model, config))
    camera.has_prior_focal_length = False
    return InitialCamera(camera=camera, prior=CameraPrior.assumed(camera, is_constant=is_fixed))


def _is_plausible(prior: IntrinsicsPrior, keyframe: Keyframe) -> bool:
    """Whether a lens can have the focal length that a source gives; 0 stands for none."""
    low, high = FOCAL_RATIOS
    edge_px = max(keyframe.width, keyframe.height)
    return low * edge_px <= prior.focal_px <= high * edge_px and prior.focal_sigma_ratio > 0.0


def _doubt_about(keyframe: Keyframe) -> str:
    """A sentence on what is odd about what the source says of a keyframe's camera, or ""."""
    prior = keyframe.intrinsics_prior
    if prior is None or _is_whole(prior):
        return ""
    if prior.focal_px != 0.0 and not _is_plausible(prior, keyframe):
        return (
            f"the source gives a focal length of {prior.focal_px:.4g} px for images of"
            f" {keyframe.width} x {keyframe.height}; no lens has it, and it is ignored"
        )
    return prior.doubt


def _doubt_about_given(initial: InitialCamera) -> str:
    """A sentence on what no lens has of a calibration that somebody gave, or ""."""
    camera = initial.camera
    if camera.is_spherical():
        if camera.width == 2 * camera.height:
            return ""
        size = f"{camera.width} x {camera.height}"
        return f"a spherical image is twice as wide as it is high, and this one is {size}"
    flaw = lens_flaw(camera) if initial.prior.origin.is_given else ""
    return f"no lens has the calibration that was given: {flaw}" if flaw else ""


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


def _of_focal_length(keyframe: Keyframe, model: str, focal_px: float) -> pycolmap.Camera:
    """A camera of a model, without distortion, that has a prior focal length."""
    camera = pycolmap.Camera.create_from_model_name(
        1, model, focal_px, keyframe.width, keyframe.height
    )
    camera.has_prior_focal_length = True
    return camera


def _is_whole(prior: IntrinsicsPrior | None) -> bool:
    return prior is not None and prior.params is not None and prior.camera_model is not None


def _first_model(prior: IntrinsicsPrior | None, config: CamerasConfig) -> str:
    """The model of a camera that is not completely known: configured, or by the kind of lens."""
    if config.model not in _ORDINARY_MODELS or prior is None:
        return config.model
    if prior.camera_model is not None:
        return prior.camera_model
    return _FISHEYE_MODEL if prior.is_fisheye else config.model


def _assumed_focal_px(keyframe: Keyframe, model: str, config: CamerasConfig) -> float:
    if CAMERA_MODELS[model].kind is LensKind.FISHEYE:
        return fisheye_focal_px(keyframe.width, keyframe.height)
    return config.default_focal_ratio * max(keyframe.width, keyframe.height)


def with_focal_length(camera: pycolmap.Camera, focal_px: float) -> list[float]:
    """Parameters for a camera's model and size: another focal length, no distortion, centred."""
    return list(
        pycolmap.Camera.create_from_model_name(
            1, camera.model_name, focal_px, camera.width, camera.height
        ).params
    )


def recognised_camera(fitted: pycolmap.Camera) -> pycolmap.Camera:
    """The camera of a lens that small maps found: fisheyes get the model of all such cameras."""
    camera = copy.deepcopy(fitted)
    if CAMERA_MODELS[fitted.model_name].kind is LensKind.FISHEYE:
        camera = pycolmap.Camera.create_from_model_name(
            1, _FISHEYE_MODEL, 1.0, fitted.width, fitted.height
        )
        params = [float(value) for value in fitted.params]
        camera.params = params + [0.0] * (len(camera.params) - len(params))
    camera.has_prior_focal_length = True
    return camera


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
