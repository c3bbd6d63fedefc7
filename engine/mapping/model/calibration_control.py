"""Calibration control: bundle adjustment that leaves calibrations where priors and lenses allow.

COLMAP's adjusters take no residuals of a caller's, so a prior is weighed before and after a solve:
a camera of whose calibration the observations say less than is known beforehand is held; one that
was refined is moved to the best compromise with its prior, or back to what a lens can be, held
there, and the rest is solved again. Where the observations are far surer than the prior, which is
the usual case, nothing of this is noticed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

import numpy as np
import pycolmap

from engine.estimators.camera_limits import (
    corner_displacement,
    lens_flaw,
    nearest_possible_distortion,
)
from engine.estimators.intrinsics_evidence import (
    IntrinsicsEvidence,
    distortion_sigmas,
    measure_evidence,
    params_of,
    refined_params,
    sigma_of,
)
from engine.mapping.model.camera_priors import CameraPrior
from engine.types import Float64Array

MIN_KEYFRAMES_FOR_DISTORTION = 6  # fewer views bend distortion to fit noise

_MOST_UNCERTAIN = 0.35  # of a focal length: observations that say less decide nothing
_HOLD_RATIO = 3.0  # of the prior's standard deviation: less sure observations are not tried
_SETTLED_RATIO = 0.3  # of the prior's standard deviation
_SETTLED_SIGMA_RATIO = 0.03  # and of the focal length
_SETTLED_KEYFRAMES = 10
_CONTRADICTION_SIGMAS = 3.0
_GROWTH = 1.25  # times the keyframes at the last measurement make another worth it
_LEAST_SHIFT_SIGMAS = 0.5  # of the compromise, which is not worth another solve below
_LEAST_SHIFT = 2e-3
_DISPLACEMENT_SIGMA = 0.06  # of the image's corner by the distortion of lenses
_TELLING_RATIO = 1.0  # of that, at most: an observed distortion
_ASPECT_SIGMA = 0.02
_ROUNDING = 1e-9
_MAX_SOLVES = 3  # that refine calibrations; after as many objections they are held


class Hold(StrEnum):
    """Why a calibration is held."""

    UNCERTAIN = "uncertain"  # the observations say less than the prior
    BOUND = "bound"  # the focal length would leave its bounds
    LENS = "lens"  # no lens is like what the observations want


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationState:
    """What adjustments found out about the calibration of one camera."""

    num_keyframes: int  # of the camera in the map, when it was last measured
    focal_sigma_ratio: float  # by the observations alone; inf: they say nothing
    is_settled: bool = False  # the observations are far surer than the prior
    hold: Hold | None = None  # of the focal length
    holds_distortion: bool = False  # too
    reason: str = ""  # of the hold, with what the images want and the bound

    def is_due(self, num_keyframes: int) -> bool:
        """Whether there are so many more keyframes that measuring again can change anything."""
        return not self.is_settled and num_keyframes >= _GROWTH * self.num_keyframes


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedFocal:
    """The focal length that the observations of a camera ask for."""

    change: float  # from the present one, as a logarithm
    sigma: float  # one standard deviation of it, of a lens like others

    @property
    def num_sigmas(self) -> float:
        """How surely they ask for another one."""
        return abs(self.change) / self.sigma


class Solve(Protocol):
    """An adjustment in place, from where the reconstruction is."""

    def __call__(self, constant_camera_ids: frozenset[int], *, refine_focal_length: bool) -> None:
        """Adjusts everything but the calibrations of some cameras.

        Args:
            constant_camera_ids: cameras whose calibration must not change.
            refine_focal_length: whether that of the others may change, beside their distortion.
        """
        ...


class CalibrationControl:
    """The priors of a map's cameras and what adjustments of the map found out; one thread's own.

    Args:
        is_bounded: whether priors and lenses have a say; else calibrations that are not constant
            are refined freely.
    """

    def __init__(self, *, is_bounded: bool = True) -> None:
        self._is_bounded = is_bounded
        self._priors: dict[int, CameraPrior] = {}
        self._states: dict[int, CalibrationState] = {}

    @property
    def is_bounded(self) -> bool:
        """Whether priors and lenses have a say."""
        return self._is_bounded

    @property
    def priors(self) -> Mapping[int, CameraPrior]:
        """What is known of each camera beforehand, by COLMAP's id."""
        return self._priors

    @property
    def states(self) -> Mapping[int, CalibrationState]:
        """What was found out about cameras that were adjusted, by COLMAP's id."""
        return self._states

    @property
    def constant_camera_ids(self) -> frozenset[int]:
        """Cameras whose calibration bundle adjustment must never change."""
        return frozenset(i for i, prior in self._priors.items() if prior.is_constant)

    @property
    def held_camera_ids(self) -> frozenset[int]:
        """Those and the ones whose focal length is held for now."""
        held = {i for i, state in self._states.items() if state.hold is not None}
        return self.constant_camera_ids | held

    @property
    def uncertain_camera_ids(self) -> frozenset[int]:
        """Cameras that are held because the images alone say too little of them."""
        uncertain = {i for i, state in self._states.items() if state.hold is Hold.UNCERTAIN}
        return frozenset(uncertain) - self.constant_camera_ids

    def release(self, camera_id: int, *, focal_sigma_ratio: float) -> None:
        """Takes note that something beside the images told the focal length of a camera.

        Args:
            camera_id: a camera that was held.
            focal_sigma_ratio: how surely that told it.
        """
        state = self._states[camera_id]
        sigma = (state.focal_sigma_ratio**-2 + focal_sigma_ratio**-2) ** -0.5
        self._states[camera_id] = replace(
            state, hold=None, holds_distortion=False, reason="", focal_sigma_ratio=sigma
        )

    def set_prior(self, camera_id: int, prior: CameraPrior) -> None:
        """Sets what is known of a camera; what was found out with another prior is forgotten."""
        self._priors[camera_id] = prior
        self._states.pop(camera_id, None)

    def set_state(self, camera_id: int, state: CalibrationState) -> None:
        """Sets what was found out about a camera, for a map that goes on."""
        self._states[camera_id] = state

    def copy(self) -> CalibrationControl:
        """A control of its own, for a copy of the map."""
        twin = CalibrationControl(is_bounded=self._is_bounded)
        twin._priors, twin._states = dict(self._priors), dict(self._states)
        return twin

    def take_states(self, other: CalibrationControl) -> None:
        """Takes over what was found out about an adjusted copy of the map."""
        for camera_id, state in other.states.items():
            if self._priors.get(camera_id) == other.priors.get(camera_id):
                self._states[camera_id] = state

    def adjust(self, reconstruction: pycolmap.Reconstruction, solve: Solve) -> None:
        """Adjusts a reconstruction in place, calibrations within what priors and lenses allow.

        Args:
            reconstruction: the map or a copy; the calling thread owns it.
            solve: adjusts it; called again after objections.
        """
        counts = _num_keyframes(reconstruction)
        present = sorted(counts)
        refined = [i for i in present if i not in self.constant_camera_ids and self._is_weighed(i)]
        weighed = {i for i in refined if self._weigh(reconstruction, i, num_keyframes=counts[i])}
        is_sure = all(self._is_sure(i) for i in refined)
        before = None if is_sure else pycolmap.Reconstruction(reconstruction)
        former = {i: list(reconstruction.camera(i).params) for i in refined}
        for _ in range(_MAX_SOLVES):
            self._solve(refined, solve)
            objections = self._objections(reconstruction, refined, former, weighed=weighed)
            if not objections:
                return
            weighed.clear()
            if before is not None:
                restore(reconstruction, before)
            former |= objections
            for camera_id, params in former.items():
                reconstruction.camera(camera_id).params = params
        # Each solve was objected to: the next would be, too.
        solve(self.held_camera_ids.union(refined), refine_focal_length=False)

    def _is_sure(self, camera_id: int) -> bool:
        """Whether the next solve can hardly be objected to."""
        state = self._states[camera_id]
        return state.is_settled or (state.hold is not None and state.holds_distortion)

    def flaw(self, reconstruction: pycolmap.Reconstruction) -> str:
        """What priors and lenses do not allow about cameras that were refined; "" for nothing."""
        for camera_id in sorted(_num_keyframes(reconstruction)):
            if camera_id in self.constant_camera_ids or not self._is_weighed(camera_id):
                continue
            camera = reconstruction.camera(camera_id)
            found = self._beyond_bound(camera_id, camera) or lens_flaw(camera)
            if found:
                return found
        return ""

    def _is_weighed(self, camera_id: int) -> bool:
        """Whether a camera is weighed: it has a focal length, and something is known of it."""
        prior = self._priors.get(camera_id)
        return self._is_bounded and prior is not None and prior.focal_px > 0.0

    def _solve(self, refined: Sequence[int], solve: Solve) -> None:
        """Solves with what is held constant; distortion may be free where the focal length is not.

        COLMAP frees focal lengths of all cameras or of none: beside a free one it is held whole.
        """
        constant, refine_focal_length = self.constants(refined)
        solve(constant, refine_focal_length=refine_focal_length)

    def constants(self, camera_ids: Iterable[int]) -> tuple[frozenset[int], bool]:
        """Cameras to hold whole in an adjustment of some, and whether focal lengths may change."""
        states = {i: self._states[i] for i in camera_ids if i in self._states}
        bends = {i for i, state in states.items() if state.hold and not state.holds_distortion}
        if bends and all(state.hold is not None for state in states.values()):
            return self.held_camera_ids - bends, False
        return self.held_camera_ids, True

    # -- before a solve ---------------------------------------------------------------------------

    def _weigh(
        self, reconstruction: pycolmap.Reconstruction, camera_id: int, *, num_keyframes: int
    ) -> bool:
        """Decides whether a camera is free from now on; False: nothing new decides that."""
        state = self._states.get(camera_id)
        if state is not None and not state.is_due(num_keyframes):
            return False
        prior, camera = self._priors[camera_id], reconstruction.camera(camera_id)
        evidence = measure_evidence(reconstruction, camera_id)
        sigma = math.inf if evidence is None else _focal_sigma(camera, evidence)
        state = CalibrationState(num_keyframes=num_keyframes, focal_sigma_ratio=sigma)
        wanted = 0.0 if evidence is None else abs(_wanted_change(camera, prior, evidence))
        too_unsure = min(_HOLD_RATIO * prior.focal_sigma_ratio, _MOST_UNCERTAIN)
        if sigma > too_unsure and wanted <= _CONTRADICTION_SIGMAS * sigma:
            if abs(_change(camera, prior)) > max(prior.focal_sigma_ratio, sigma):
                camera.params = _with_focal_px(camera, prior.focal_px)
            state = replace(
                state,
                hold=Hold.UNCERTAIN,
                holds_distortion=evidence is None or not _tells_distortion(camera, evidence),
                reason=_uncertain(sigma),
            )
        self._states[camera_id] = state
        return True

    # -- after a solve ----------------------------------------------------------------------------

    def _objections(
        self,
        reconstruction: pycolmap.Reconstruction,
        refined: Sequence[int],
        former: Mapping[int, list[float]],
        *,
        weighed: Collection[int],
    ) -> dict[int, list[float]]:
        """Parameters that cameras must have instead of the solved ones; holds those cameras."""
        objections = {}
        for camera_id in refined:
            state = self._states[camera_id]
            if state.hold is not None and state.holds_distortion:
                continue
            camera = reconstruction.camera(camera_id)
            better = self._possible(camera_id, camera, former[camera_id])
            is_free = self._states[camera_id].hold is None
            if better is None and is_free and camera_id in weighed:
                better = self._compromise(reconstruction, camera_id)
            if better is not None:
                objections[camera_id] = better
        return objections

    def _possible(
        self, camera_id: int, camera: pycolmap.Camera, former: list[float]
    ) -> list[float] | None:
        """The nearest possible parameters where the solved ones are none."""
        prior, state = self._priors[camera_id], self._states[camera_id]
        beyond = self._beyond_bound(camera_id, camera)
        if beyond:
            self._states[camera_id] = replace(
                state, hold=Hold.BOUND, reason=beyond, is_settled=False
            )
            focal_px = float(camera.mean_focal_length())
            bound_px = min(max(focal_px, prior.min_focal_px), prior.max_focal_px)
            return _with_focal_px(_camera_like(camera, former), bound_px)
        flaw = lens_flaw(camera)
        if not flaw:
            return None
        self._states[camera_id] = replace(
            state, hold=Hold.LENS, holds_distortion=True, reason=flaw, is_settled=False
        )
        if not np.isfinite(camera.params).all() or corner_displacement(camera) >= 0.0:
            return former
        # Barrel beyond the model is that of a lens wider than it can follow: as much as it can.
        return nearest_possible_distortion(_camera_like(camera, former, distortion_of=camera))

    def _beyond_bound(self, camera_id: int, camera: pycolmap.Camera) -> str:
        """In words that the focal length left its bounds; "" where it did not, or is no number."""
        prior, focal_px = self._priors[camera_id], float(camera.mean_focal_length())
        bound_px = min(max(focal_px, prior.min_focal_px), prior.max_focal_px)
        if not abs(focal_px - bound_px) > _ROUNDING * bound_px:  # False for NaN too
            return ""
        return (
            f"the map wants a focal length of {focal_px:.0f} px, beyond the bound of"
            f" {bound_px:.0f} px for {prior.focal_px:.0f} px ({prior.words})"
        )

    def _compromise(
        self, reconstruction: pycolmap.Reconstruction, camera_id: int
    ) -> list[float] | None:
        """Parameters between prior and observations, unless those refined freely are near them."""
        prior, state = self._priors[camera_id], self._states[camera_id]
        camera = reconstruction.camera(camera_id)
        evidence = measure_evidence(reconstruction, camera_id)
        if evidence is None:
            return None
        sigma = _focal_sigma(camera, evidence)
        is_settled = (
            state.num_keyframes >= _SETTLED_KEYFRAMES
            and sigma < _SETTLED_SIGMA_RATIO
            and sigma < _SETTLED_RATIO * prior.focal_sigma_ratio
        )
        self._states[camera_id] = replace(state, focal_sigma_ratio=sigma, is_settled=is_settled)
        may_bend = reconstruction.num_reg_frames() >= MIN_KEYFRAMES_FOR_DISTORTION
        best = _between(camera, prior, evidence, may_bend=may_bend)
        if best is None:
            return None
        focal_px = float(camera.mean_focal_length())
        reason = f"the images alone say {focal_px:.0f} px, give or take {sigma:.0%}"
        self._states[camera_id] = replace(
            self._states[camera_id],
            hold=Hold.UNCERTAIN,
            holds_distortion=True,
            reason=reason,
            is_settled=False,
        )
        return params_of(camera, best)


def _registered(reconstruction: pycolmap.Reconstruction) -> list[int]:
    return [int(i) for i in reconstruction.reg_image_ids()]


def _num_keyframes(reconstruction: pycolmap.Reconstruction) -> Counter[int]:
    """How many registered keyframes the cameras have, by COLMAP's id."""
    images = (reconstruction.image(i) for i in _registered(reconstruction))
    return Counter(int(image.camera_id) for image in images)


def restore(reconstruction: pycolmap.Reconstruction, before: pycolmap.Reconstruction) -> None:
    """Puts poses, points and calibrations back; both hold the same ones."""
    for image_id in _registered(before):
        image = reconstruction.image(image_id)
        pose = before.image(image_id).cam_from_world()
        reconstruction.frame(image.frame_id).set_cam_from_world(image.camera_id, pose)
    for point3D_id, point in reconstruction.points3D.items():
        point.xyz = before.point3D(point3D_id).xyz
    for camera_id, camera in reconstruction.cameras.items():
        camera.params = before.camera(camera_id).params


def wanted_focal(reconstruction: pycolmap.Reconstruction, camera_id: int) -> WantedFocal | None:
    """The focal length that the images want, whatever is held or given; None: they say nothing.

    It is a step of Gauss-Newton from where the map is, and holds for small changes.
    """
    camera = reconstruction.camera(camera_id)
    if not camera.focal_length_idxs():
        return None
    evidence = measure_evidence(reconstruction, camera_id)
    sigma = math.inf if evidence is None else _focal_sigma(camera, evidence)
    if evidence is None or not math.isfinite(sigma):
        return None
    total = evidence.information + np.diag(_lens_precision(camera))
    pull = evidence.information @ evidence.step
    change = float((np.linalg.pinv(total, hermitian=True) @ pull)[0])
    return WantedFocal(change=change, sigma=sigma)


# -- prior and evidence ---------------------------------------------------------------------------


def _focal_sigma(camera: pycolmap.Camera, evidence: IntrinsicsEvidence) -> float:
    """How surely the observations give the focal length, of a lens like others."""
    precision = np.diag(_lens_precision(camera))
    return sigma_of(evidence.information + precision, 0)


def _tells_distortion(camera: pycolmap.Camera, evidence: IntrinsicsEvidence) -> bool:
    """Whether the observations are surer of the distortion, the focal length given, than none."""
    num_focal = len(camera.focal_length_idxs())
    given = evidence.information[num_focal:, num_focal:]
    known = distortion_sigmas(camera, _DISPLACEMENT_SIGMA)
    return all(sigma_of(given, idx) < _TELLING_RATIO * known[idx] for idx in range(len(known)))


def _lens_precision(camera: pycolmap.Camera) -> Float64Array:
    """(P,) what is known of any lens: square pixels, moderate distortion; nothing of the focal."""
    num_focal = len(camera.focal_length_idxs())
    aspect = [_ASPECT_SIGMA**-2] * (num_focal - 1)
    distortion = distortion_sigmas(camera, _DISPLACEMENT_SIGMA) ** -2
    return np.array([0.0, *aspect, *distortion])


def _prior_precision(camera: pycolmap.Camera, prior: CameraPrior, *, change: float) -> Float64Array:
    """(P, P) of the prior; the farther the map leads away, the wider (Cauchy's weight)."""
    diagonal = _lens_precision(camera)
    diagonal[0] = 1.0 / (prior.focal_sigma_ratio**2 + change**2)
    return np.diag(diagonal)


def _prior_mean(camera: pycolmap.Camera, prior: CameraPrior) -> Float64Array:
    """(P,) refined parameters of the camera as it began."""
    num_focal = len(camera.focal_length_idxs())
    mean = np.zeros(num_focal + len(camera.extra_params_idxs()))
    mean[0] = math.log(prior.focal_px)
    mean[num_focal:] = prior.distortion
    return mean


def _between(
    camera: pycolmap.Camera, prior: CameraPrior, evidence: IntrinsicsEvidence, *, may_bend: bool
) -> Float64Array | None:
    """The most likely refined parameters (P,) by prior and observations; None: about the present.

    Args:
        camera: as the observations alone want it.
        prior: what is known of it beforehand.
        evidence: how sure the observations are.
        may_bend: whether distortion may differ from that at the start.
    """
    taking = slice(None if may_bend else len(camera.focal_length_idxs()))
    precision = _prior_precision(camera, prior, change=_change(camera, prior))[taking, taking]
    total = evidence.information[taking, taking] + precision
    best = refined_params(camera)
    covariance = np.linalg.pinv(total, hermitian=True)
    shift = covariance @ precision @ (best - _prior_mean(camera, prior))[taking]
    sigmas = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    if (np.abs(shift) <= np.maximum(_LEAST_SHIFT_SIGMAS * sigmas, _LEAST_SHIFT)).all():
        return None
    best[taking] -= shift
    return best


def _change(camera: pycolmap.Camera, prior: CameraPrior) -> float:
    """How far the focal length is from its prior, as a logarithm."""
    return float(refined_params(camera)[0]) - math.log(prior.focal_px)


def _wanted_change(
    camera: pycolmap.Camera, prior: CameraPrior, evidence: IntrinsicsEvidence
) -> float:
    """How far from its prior the observations want the focal length, as a logarithm."""
    precision = np.diag(_lens_precision(camera))
    total = evidence.information + precision
    present = refined_params(camera)
    pull = evidence.information @ evidence.step - precision @ (present - _prior_mean(camera, prior))
    return _change(camera, prior) + float((np.linalg.pinv(total, hermitian=True) @ pull)[0])


# -- cameras --------------------------------------------------------------------------------------


def _with_focal_px(camera: pycolmap.Camera, focal_px: float) -> list[float]:
    """Parameters with another focal length, the rest as it is."""
    refined = refined_params(camera)
    refined[0] = math.log(focal_px)
    return params_of(camera, refined)


def _camera_like(
    camera: pycolmap.Camera,
    params: list[float],
    *,
    distortion_of: pycolmap.Camera | None = None,
) -> pycolmap.Camera:
    chosen = list(params)
    if distortion_of is not None:
        for idx in camera.extra_params_idxs():
            chosen[idx] = float(distortion_of.params[idx])
    return pycolmap.Camera(
        model=camera.model_name, width=camera.width, height=camera.height, params=chosen
    )


def _uncertain(sigma: float) -> str:
    how = "say nothing of" if sigma > 1.0 else f"leave {sigma:.0%} of doubt about"
    return f"the images alone {how} the focal length"
