"""Camera reports: what calibrations a map has, how far from where they began, what to doubt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import pycolmap

from engine.estimators.camera_limits import lens_flaw
from engine.estimators.lenses import camera_focal_px, principal_point, unit_rays
from engine.events import CameraCalibrated, CameraDoubted
from engine.mapping.model.calibration_control import Hold
from engine.mapping.model.camera_priors import CameraPrior
from engine.mapping.model.sparse_map import SparseMap
from engine.ports import EventSink
from engine.types import CalibrationOrigin, CameraFigures

_MIN_KEYFRAMES = 8  # of a camera: what a few say of it soon changes
_REPORTED_CHANGE_RATIO = 0.03  # of the focal length since it was reported last
_CONTRADICTION_SIGMAS = 3.0
_DOUBTED_SIGMA_RATIO = 0.1  # of a focal length that only the images tell
_UNVOUCHED = (CalibrationOrigin.ASSUMED, CalibrationOrigin.TWO_VIEW_GEOMETRIES)


class CameraReports:
    """Emits calibrations that changed and cameras to doubt, each once for each reason.

    Args:
        emit: takes the events.
    """

    def __init__(self, *, emit: EventSink) -> None:
        self._emit = emit
        self._reported_px: dict[str, float] = {}
        self._doubted: set[tuple[str, str]] = set()  # camera and kind of doubt
        self._given: dict[str, dict[str, str]] = {}  # doubts beside those of the map, by kind

    def add(self, camera_key: str, camera: pycolmap.Camera, prior: CameraPrior) -> None:
        """Emits a camera as it begins, or begins anew with another prior."""
        self._emit_calibrated(camera_key, camera, prior)

    def add_doubt(self, camera_key: str, reason: str, *, kind: str = "given") -> None:
        """Emits that something is odd about a camera: about what a source says, or its frames."""
        self._given.setdefault(camera_key, {})[kind] = reason
        self._emit_doubt(camera_key, kind, reason, is_held=False)

    def remove_doubt(self, camera_key: str, *, kind: str) -> None:
        """Forgets a doubt that proved to be none."""
        self._given.get(camera_key, {}).pop(kind, None)
        self._doubted.discard((camera_key, kind))

    def update(
        self, camera_keys: Iterable[str], sparse_map: SparseMap, *, is_final: bool = False
    ) -> None:
        """Emits what the map changed, after it changed; of few keyframes only at the end."""
        for camera_key in camera_keys:
            num_registered = sparse_map.num_registered_of(camera_key)
            if num_registered < (1 if is_final else _MIN_KEYFRAMES):
                continue
            camera, prior = sparse_map.camera(camera_key), sparse_map.camera_prior(camera_key)
            reported_px = self._reported_px.get(camera_key, 0.0)
            change_px = abs(camera_focal_px(camera) - reported_px)
            if change_px > _REPORTED_CHANGE_RATIO * reported_px:
                self._emit_calibrated(camera_key, camera, prior, is_refined=True)
            is_held = _is_held(camera_key, sparse_map)
            for kind, reason in _doubts(camera_key, sparse_map):
                self._emit_doubt(camera_key, kind, reason, is_held=is_held)

    def figures(
        self, camera_keys: Iterable[str], sparse_map: SparseMap
    ) -> tuple[CameraFigures, ...]:
        """The cameras as the map has them now."""
        return tuple(self._figures(key, sparse_map) for key in camera_keys)

    def _figures(self, camera_key: str, sparse_map: SparseMap) -> CameraFigures:
        camera, prior = sparse_map.camera(camera_key), sparse_map.camera_prior(camera_key)
        state = sparse_map.camera_state(camera_key)
        doubts = (*self._given.get(camera_key, {}).items(), *_doubts(camera_key, sparse_map))
        is_known = state is not None and math.isfinite(state.focal_sigma_ratio)
        return CameraFigures(
            camera_key=camera_key,
            model=camera.model_name,
            width=camera.width,
            height=camera.height,
            params=tuple(float(value) for value in camera.params),
            focal_px=camera_focal_px(camera),
            fov_deg=_fov_deg(camera),
            num_registered=sparse_map.num_registered_of(camera_key),
            origin=prior.origin,
            prior_focal_px=prior.focal_px,
            prior_sigma_ratio=prior.focal_sigma_ratio,
            observed_sigma_ratio=state.focal_sigma_ratio if state and is_known else None,
            is_constant=prior.is_constant,
            is_held=_is_held(camera_key, sparse_map),
            doubts=tuple(reason for _, reason in doubts),
            doubt_kinds=tuple(kind for kind, _ in doubts),
        )

    def _emit_calibrated(
        self,
        camera_key: str,
        camera: pycolmap.Camera,
        prior: CameraPrior,
        *,
        is_refined: bool = False,
    ) -> None:
        self._reported_px[camera_key] = camera_focal_px(camera)
        self._emit(
            CameraCalibrated(
                camera_key=camera_key,
                model=camera.model_name,
                focal_px=camera_focal_px(camera),
                how=prior.origin.value,
                focal_sigma_ratio=prior.focal_sigma_ratio,
                is_refined=is_refined,
            )
        )

    def _emit_doubt(self, camera_key: str, kind: str, reason: str, *, is_held: bool) -> None:
        if (camera_key, kind) in self._doubted:
            return
        self._doubted.add((camera_key, kind))
        self._emit(CameraDoubted(camera_key=camera_key, reason=reason, is_held=is_held))


def _is_held(camera_key: str, sparse_map: SparseMap) -> bool:
    state = sparse_map.camera_state(camera_key)
    return state is not None and state.hold is not None


def _doubts(camera_key: str, sparse_map: SparseMap) -> Iterator[tuple[str, str]]:
    """Kinds of doubt about a camera in a map, each with a sentence."""
    state = sparse_map.camera_state(camera_key)
    camera, prior = sparse_map.camera(camera_key), sparse_map.camera_prior(camera_key)
    if state is not None and state.hold is not None:
        # That little is told beside a prior that is surer is as it should be.
        if state.hold is not Hold.UNCERTAIN or state.focal_sigma_ratio > _DOUBTED_SIGMA_RATIO:
            focal_px = f"{camera_focal_px(camera):.0f} px"
            yield (
                state.hold.value,
                f"the map holds the focal length at {focal_px} ({prior.focal_px:.0f} px"
                f" {prior.words}): {state.reason}"
                if state.hold is Hold.UNCERTAIN
                else f"{state.reason}; the map holds the focal length at {focal_px}",
            )
    elif (flaw := lens_flaw(camera)) != "":
        yield "flaw", flaw
    if prior.is_constant or prior.focal_px <= 0.0 or state is None:
        return
    if prior.origin in _UNVOUCHED:
        if state.hold is None and state.focal_sigma_ratio > _DOUBTED_SIGMA_RATIO:
            yield (
                "unsure",
                f"the images leave {state.focal_sigma_ratio:.0%} of doubt about the focal length of"
                f" {camera_focal_px(camera):.0f} px, which nothing else tells",
            )
        return
    change = math.log(camera_focal_px(camera) / prior.focal_px)
    if abs(change) > _CONTRADICTION_SIGMAS * prior.focal_sigma_ratio:
        yield (
            "contradiction",
            f"the map says a focal length of {camera_focal_px(camera):.0f} px, and"
            f" {prior.focal_px:.0f} px is that {prior.words}",
        )


def _fov_deg(camera: pycolmap.Camera) -> float:
    """How wide the image is about the optical axis, degrees; 360 for a spherical one."""
    if camera.is_spherical():
        return 360.0
    middle_y = principal_point(camera)[1]
    ends = np.array([(0.0, middle_y), (float(camera.width), middle_y)])
    rays = unit_rays(camera, ends)
    angles = np.arctan2(np.linalg.norm(rays[:, :2], axis=1), rays[:, 2])
    return float(np.degrees(np.nan_to_num(angles, nan=np.pi / 2.0).sum()))
