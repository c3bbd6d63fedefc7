"""Bundle adjustment in which GPS positions pull on the cameras, where the images agree."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pycolmap

from engine.config import GeoreferenceConfig
from engine.cpu_time import Stage, charged_to
from engine.estimators.adjustment_options import adjustment_options
from engine.geo.georeference import Georeference, positions_in_enu, sim3d_of, stds_m, to_enu
from engine.geo.similarity_fit import UNKNOWN_STD_M
from engine.geometry import camera_center
from engine.mapping.model.calibration_control import (
    MIN_KEYFRAMES_FOR_DISTORTION,
    CalibrationControl,
    restore,
)
from engine.types import BoolArray, Float64Array, FrameId, GpsFix

_MIN_WEIGHT = 0.05  # of fixes that pull; less is an outlier by another name
_MIN_PULLING = 4
_MAX_ERROR_GROWTH_RATIO = 0.02  # of the mean reprojection error
_TELLING_CHI2 = 9.0  # by which heights must fit better, to tell a focal length
_TELLING_RMSE_RATIO = 0.95  # and less than this of their error must stay: errors of GPS are alike
_EQUAL_ERROR_RATIO = 1.002  # of the mean reprojection error, then
_FUNCTION_TOLERANCE = 1e-6
_SLICE_ITERATIONS = 6  # solved without a pause
_BREATH_S = 0.02  # in which other threads run
_MAX_SOLVING_S = 30.0  # what is reached by then is judged
_FREEDOM_OF_HEIGHTS = 3  # height and tilts of a map whose scale the other coordinates give
_LEAST_FREEDOM = 8  # of heights: fewer may fit better by chance
_TINY_M = 1e-9
_TINY = 1e-6
_PRIOR_LOSS_SCALE = 2.795  # standard deviations: 95 % of three normal components lie within


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionAdjustment:
    """What pulling on the map did; ``is_accepted`` says whether it is any better for it."""

    is_accepted: bool
    reason: str  # why not; "" when accepted
    num_positions: int  # that pulled
    error_before_px: float  # mean reprojection error
    error_after_px: float
    rmse_before_m: float  # of the positions that pulled, by their weights
    rmse_after_m: float
    told_camera_ids: frozenset[int] = frozenset()  # whose held focal length heights gave


@charged_to(Stage.GLOBAL_ADJUSTMENT)
def adjust_with_positions(
    reconstruction: pycolmap.Reconstruction,
    frame_ids: Sequence[FrameId],
    fixes: Sequence[GpsFix],
    georeference: Georeference,
    *,
    config: GeoreferenceConfig,
    calibration: CalibrationControl,
    max_iterations: int,
    num_threads: int = 1,
) -> PositionAdjustment:
    """Adjusts a private copy of the map with positions as measurements beside the images.

    Fixes pull by their accuracy, as far as the map bears it out, and by their weight in the
    georeference, with Cauchy's loss on top.
    Focal lengths that are held because the images say too little of them are freed when positions
    fit clearly better then and the images no worse: their heights tell a focal length from a bend.
    The copy stays in the frame and unit of the map, so it can be merged back like any global
    adjustment, and ``georeference.enu_from_map`` goes on to hold. COLMAP's adjuster keeps the
    interpreter lock while it solves: a few iterations at a time, half a minute at most.

    Args:
        reconstruction: a private copy in the map's frame; adjusted in place, useless when refused.
        frame_ids: N keyframes, each registered there.
        fixes: their N positions.
        georeference: of these keyframes and fixes, in the same order.
        config: accuracies.
        calibration: the priors of the cameras, and which of them are held; takes note of those that
            the positions told.
        max_iterations: of the solver.
        num_threads: of the solver.

    Returns:
        What came of it. It is refused when it makes the images fit worse, or the positions no
        better; when too few positions pull; and after a straight path, whose positions leave the
        turn about it open.
    """
    pulling: list[int] = np.flatnonzero(georeference.weights >= _MIN_WEIGHT).tolist()
    weights = georeference.weights[pulling]
    pulling_fixes = [fixes[i] for i in pulling]
    measured_m, roots = stds_m(pulling_fixes, config=config), np.sqrt(weights)[:, None]
    positions = _Positions(
        frame_ids=[frame_ids[i] for i in pulling],
        enu_m=positions_in_enu(pulling_fixes, origin=georeference.origin),
        stds_m=np.where(measured_m < UNKNOWN_STD_M, measured_m / roots, measured_m),
        weights=weights,
    )
    to_enu(reconstruction, georeference)
    positions = positions.believed(_centers(reconstruction, positions.frame_ids))
    before = after = _State.of(reconstruction, positions)
    told_camera_ids: frozenset[int] = frozenset()
    reason = _reason_to_leave_it(georeference, num_pulling=len(pulling))
    if not reason:
        solve = functools.partial(
            _solve,
            reconstruction,
            positions,
            adjustment_options(
                max_iterations=_SLICE_ITERATIONS,
                function_tolerance=_FUNCTION_TOLERANCE,
                num_threads=num_threads,
            ),
            calibration=calibration,
            max_iterations=max_iterations,
        )
        reason = solve()
        after = _State.of(reconstruction, positions)
        if not reason and calibration.uncertain_camera_ids:
            uncertain_ids = calibration.uncertain_camera_ids
            after = _with_uncertain_cameras(reconstruction, positions, after, solve, calibration)
            told_camera_ids = uncertain_ids - calibration.uncertain_camera_ids
    reconstruction.transform(sim3d_of(georeference.enu_from_map).inverse())
    outcome = _outcome(positions, before, after, reason=reason or _reason_against(before, after))
    return replace(outcome, told_camera_ids=told_camera_ids)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Positions:
    """Where keyframes should be."""

    frame_ids: list[FrameId]
    enu_m: Float64Array  # (M, 3); heights that were not measured are those of the map
    stds_m: Float64Array  # (M, 3)
    weights: Float64Array  # (M,) 0..1

    @property
    def is_known(self) -> BoolArray:
        """(M, 3) whether a coordinate was measured."""
        return self.stds_m < UNKNOWN_STD_M

    def believed(self, centers_m: Float64Array) -> _Positions:
        """With standard deviations as large as what they differ from the map, at least.

        Receivers that claim too much accuracy would pull a good map apart, or to one half of
        themselves.
        """
        known = self.is_known
        normalized = ((centers_m - self.enu_m) / self.stds_m)[known]
        excess = math.sqrt(float(np.mean(normalized**2))) if normalized.size else 1.0
        return replace(
            self,
            enu_m=np.where(known, self.enu_m, centers_m),
            stds_m=np.where(known, self.stds_m * max(excess, 1.0), self.stds_m),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _State:
    """How well a map in metres fits its images and positions at one time."""

    error_px: float
    rmse_m: float
    heights_rmse_m: float  # of heights that were measured

    @classmethod
    def of(cls, reconstruction: pycolmap.Reconstruction, positions: _Positions) -> _State:
        reconstruction.update_point_3d_errors()
        offsets_m = _centers(reconstruction, positions.frame_ids) - positions.enu_m
        offsets_m[~positions.is_known] = 0.0
        squares_m2 = positions.weights[:, None] * offsets_m**2
        total = float(positions.weights.sum()) or 1.0
        of_heights = float(positions.weights[positions.is_known[:, 2]].sum()) or 1.0
        return cls(
            error_px=float(reconstruction.compute_mean_reprojection_error()),
            rmse_m=math.sqrt(float(squares_m2.sum()) / total),
            heights_rmse_m=math.sqrt(float(squares_m2[:, 2].sum()) / of_heights),
        )


def _with_uncertain_cameras(
    reconstruction: pycolmap.Reconstruction,
    positions: _Positions,
    held: _State,
    solve: Callable[..., str],
    calibration: CalibrationControl,
) -> _State:
    """Frees cameras of which the images alone say too little, where heights tell them.

    A wrong focal length bends a map, which heights show; along the ground it changes little more
    than errors of receivers do, which are alike. Where images and positions fit as they should,
    the sum of squares falls by (change / sigma)^2, which gives the sigma that the heights leave.
    """
    uncertain = sorted(
        i for i in calibration.uncertain_camera_ids if reconstruction.exists_camera(i)
    )
    freedom = int(positions.is_known[:, 2].sum()) - _FREEDOM_OF_HEIGHTS - len(uncertain)
    if freedom < _LEAST_FREEDOM:
        return held
    before = pycolmap.Reconstruction(reconstruction)
    reason = solve(freed=frozenset(uncertain))
    free = _State.of(reconstruction, positions)
    fall = (held.heights_rmse_m / max(free.heights_rmse_m, _TINY_M)) ** 2 - 1.0
    chi2 = fall * freedom
    if (
        reason
        or chi2 < _TELLING_CHI2
        or free.heights_rmse_m >= _TELLING_RMSE_RATIO * held.heights_rmse_m
        or free.rmse_m > held.rmse_m
        or free.error_px > _EQUAL_ERROR_RATIO * held.error_px
    ):
        restore(reconstruction, before)
        return held
    for camera_id in uncertain:
        focal_px = reconstruction.camera(camera_id).mean_focal_length()
        change = abs(math.log(focal_px / before.camera(camera_id).mean_focal_length()))
        calibration.release(camera_id, focal_sigma_ratio=max(change, _TINY) / math.sqrt(chi2))
    return free


def _centers(reconstruction: pycolmap.Reconstruction, image_ids: Sequence[int]) -> Float64Array:
    poses = [reconstruction.image(i).cam_from_world().matrix() for i in image_ids]
    return camera_center(np.array(poses).reshape(-1, 3, 4))


def _reason_to_leave_it(georeference: Georeference, *, num_pulling: int) -> str:
    if num_pulling < _MIN_PULLING:
        return f"only {num_pulling} positions count"
    if georeference.is_levelled_by_cameras:
        return "the path is straight"
    return ""


def _reason_against(before: _State, after: _State) -> str:
    growth_ratio = after.error_px / before.error_px - 1.0 if before.error_px else 0.0
    if growth_ratio > _MAX_ERROR_GROWTH_RATIO:
        return f"the images would fit worse by {100.0 * growth_ratio:.0f} %"
    return "" if after.rmse_m < before.rmse_m else "the positions would fit no better"


def _outcome(
    positions: _Positions, before: _State, after: _State, *, reason: str
) -> PositionAdjustment:
    return PositionAdjustment(
        is_accepted=not reason,
        reason=reason,
        num_positions=len(positions.frame_ids),
        error_before_px=before.error_px,
        error_after_px=after.error_px,
        rmse_before_m=before.rmse_m,
        rmse_after_m=after.rmse_m,
    )


def _solve(
    reconstruction: pycolmap.Reconstruction,
    positions: _Positions,
    options: pycolmap.BundleAdjustmentOptions,
    *,
    calibration: CalibrationControl,
    max_iterations: int,
    freed: frozenset[int] = frozenset(),
) -> str:
    """Adjusts in metres, some held cameras freed; the reason where it cannot be done.

    In slices: COLMAP's adjuster holds the interpreter lock, and others need it now and then. Each
    begins with the map laid onto the positions anew, so that none converges by itself: they end
    with the first that leads no lower than the one before.
    """
    problem = pycolmap.BundleAdjustmentConfig()
    for image_id in sorted(reconstruction.reg_image_ids()):
        problem.add_image(image_id)
    has_few_views = reconstruction.num_reg_frames() < MIN_KEYFRAMES_FOR_DISTORTION
    options.refine_extra_params = not has_few_views
    constant, options.refine_focal_length = calibration.constants(reconstruction.cameras)
    options.refine_focal_length |= bool(freed)
    for camera_id in sorted(constant - freed):
        if reconstruction.exists_camera(camera_id):
            problem.set_constant_cam_intrinsics(camera_id)
    priors = _priors(reconstruction, positions)
    num_left, least_cost = max_iterations, math.inf
    deadline_s = time.monotonic() + _MAX_SOLVING_S
    while num_left > 0 and time.monotonic() < deadline_s:
        adjuster = pycolmap.create_pose_prior_bundle_adjuster(
            options, _prior_options(), problem, priors, reconstruction
        )
        summary = adjuster.solve()
        if not summary.is_solution_usable():
            return "it cannot be solved"
        if summary.termination_type == pycolmap.BundleAdjustmentTerminationType.CONVERGENCE:
            break
        assert isinstance(summary, pycolmap.CeresBundleAdjustmentSummary)
        cost = float(summary.ceres_summary.final_cost)
        if cost > (1.0 - _FUNCTION_TOLERANCE) * least_cost:
            break
        least_cost = cost
        num_left -= _SLICE_ITERATIONS
        time.sleep(_BREATH_S)
    return calibration.flaw(reconstruction)


def _priors(
    reconstruction: pycolmap.Reconstruction, positions: _Positions
) -> list[pycolmap.PosePrior]:
    priors = []
    rows = zip(positions.frame_ids, positions.enu_m, positions.stds_m, strict=True)
    for number, (frame_id, position_m, std_m) in enumerate(rows, start=1):
        prior = pycolmap.PosePrior()
        prior.pose_prior_id = number
        prior.corr_data_id = reconstruction.image(frame_id).data_id
        prior.position = position_m
        prior.position_covariance = np.diag(std_m**2)
        prior.coordinate_system = pycolmap.PosePriorCoordinateSystem.CARTESIAN
        priors.append(prior)
    return priors


def _prior_options() -> pycolmap.PosePriorBundleAdjustmentOptions:
    options = pycolmap.PosePriorBundleAdjustmentOptions()
    options.ceres.prior_position_loss_function_type = pycolmap.LossFunctionType.CAUCHY
    options.ceres.prior_position_loss_scale = _PRIOR_LOSS_SCALE
    options.alignment_ransac.random_seed = 0
    return options
