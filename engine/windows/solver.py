"""Window solver: structure from motion of a few frames from their tracks.

The stages are those of VGGSfM's downstream half (Wang, Karaev, Rupprecht and Novotny, CVPR 2024),
which has nothing learned in it: two-view geometry, an initial pair, all other frames posed against
its points, robust triangulation of all tracks, bundle adjustment under gates that tighten, and a
last filtering of observations. Poses that are given are tried first, and dropped when the tracks
contradict them.
"""

from __future__ import annotations

import logging
import time

import numpy as np

from engine.estimators.camera_limits import WIDE_FOCAL_RATIOS
from engine.geometry import compose_poses, invert_pose, transform_points
from engine.types import BoolArray
from engine.window_types import WindowEstimate, WindowProblem, WindowStatus
from engine.windows.adjustment import adjust_window, filter_observations
from engine.windows.initialization import (
    adjust_coarsely,
    angle_of,
    find_points,
    grow_window,
    guess_focal_lengths,
    initialize_window,
    verified_pairs,
)
from engine.windows.model import WindowModel, WindowSolverConfig
from engine.windows.triangulation import triangulate_window

logger = logging.getLogger(__name__)

_Refusal = tuple[WindowStatus, str]

_MIN_POINTS = 15  # of a window
_WEAK = 0.5  # a frame with less than this share of the median frame's support is posed anew
_SETTLED_RATIO = 0.01  # of the inliers: fewer that change are not worth another round
_MAX_ROUNDS = 4
_WRONG_FOCAL_FACTOR = 1.1  # smaller differences cost less than a percent of the extent
_MUCH_BETTER = 0.9  # of the mean error: what is less is noise that another focal length fits


def solve_window(problem: WindowProblem, config: WindowSolverConfig) -> WindowEstimate:
    """Solves a window for cameras, points and inliers.

    Every outcome is a value: for a window that cannot be solved, or whose solution too few of the
    tracks agree with, ``status`` and ``reason`` say why. The same problem gives the same
    estimate. The frame of reference is that of the held poses, else that of the given poses, else
    that of the initial pair (``is_bootstrapped``).
    """
    started_s, started_cpu_s = time.monotonic(), time.thread_time()
    model = WindowModel.of(problem, min_score=config.min_score)
    is_bootstrapped = False
    refusal = _refusal_of_input(model)
    if refusal is None:
        refusal, is_bootstrapped = _find_poses(model, config)
    if refusal is None:
        _adjust_all(model, config)
        refusal = _refusal_of_result(model, config)
    status, reason = refusal or (WindowStatus.SOLVED, _figures(model))
    logger.debug("window of %d frames: %s, %s", problem.num_frames, status, reason)
    return _estimate(
        model,
        config,
        status=status,
        reason=reason,
        is_bootstrapped=is_bootstrapped,
        elapsed_s=time.monotonic() - started_s,
        cpu_s=time.thread_time() - started_cpu_s,
    )


# -- refusals -------------------------------------------------------------------------------------


def _refusal_of_input(model: WindowModel) -> _Refusal | None:
    problem = model.problem
    wrong = problem.wrong_intrinsics(focal_ratios=WIDE_FOCAL_RATIOS)
    if wrong is not None:
        return WindowStatus.BAD_INTRINSICS, wrong
    if (problem.is_held & ~problem.has_pose).any():
        return WindowStatus.BAD_POSES, "a held pose is missing, or no rotation and translation"
    num_seeing = int((model.num_seen() > 0).sum())
    if num_seeing < 2:
        return (
            WindowStatus.TOO_FEW_FRAMES,
            f"{num_seeing} of {problem.num_frames} frames see tracks",
        )
    num_shared = int((np.bincount(model.track_idx) >= 2).sum())
    if num_shared < _MIN_POINTS:
        return WindowStatus.TOO_FEW_TRACKS, f"{num_shared} tracks are seen twice"
    return None


def _refusal_of_result(model: WindowModel, config: WindowSolverConfig) -> _Refusal | None:
    num_valid, num_points = int(_valid_frames(model, config).sum()), int(model.has_point.sum())
    if num_points < _MIN_POINTS:
        return WindowStatus.NO_PARALLAX, f"{num_points} tracks have a point with enough parallax"
    if num_valid < 2 or model.support() < config.min_inlier_ratio:
        return WindowStatus.INCONSISTENT, f"{num_valid} valid frames, {_figures(model)}"
    wrong = _wrong_calibration(model, config)
    return None if wrong is None else (WindowStatus.BAD_INTRINSICS, wrong)


def _wrong_calibration(model: WindowModel, config: WindowSolverConfig) -> str | None:
    """A sentence on a calibrated focal length that the tracks contradict; None: they do not.

    A window deforms under a wrong focal length and still agrees with it by and large. Where poses
    are held the map has confirmed the calibration, and the window deforms less.
    """
    problem = model.problem
    if not problem.is_calibrated.any() or problem.is_held.sum() >= 2:
        return None
    known, given_px = model.state(), model.focal_px.copy()
    before_px = float(model.errors_px()[known.is_inlier].mean())
    adjust_window(
        model, config=config, max_iterations=config.max_iterations, doubts_calibration=True
    )
    wanted_px, after_px = model.focal_px.copy(), model.errors_px()[known.is_inlier].mean()
    model.restore(known)
    factor = np.exp(np.abs(np.log(wanted_px / given_px)))
    worst = int(np.argmax(np.where(problem.is_calibrated, factor, 0.0)))
    if factor[worst] < _WRONG_FOCAL_FACTOR or after_px > _MUCH_BETTER * before_px:
        return None
    return (
        f"the tracks want a focal length of {wanted_px[worst]:.0f} px, not {given_px[worst]:.0f}: "
        f"{before_px:.2f} to {after_px:.2f} px"
    )


def _valid_frames(model: WindowModel, config: WindowSolverConfig) -> BoolArray:
    """(S,) frames that enough inliers hold."""
    num_inliers = model.num_inliers()
    enough = num_inliers >= config.min_frame_inliers
    enough &= num_inliers >= config.min_frame_inlier_ratio * model.num_seen()
    return np.asarray(model.is_posed & enough)


def _figures(model: WindowModel) -> str:
    return f"{model.is_posed.sum()} frames posed, {model.support():.0%} of what they see agrees"


# -- poses ----------------------------------------------------------------------------------------


def _find_poses(model: WindowModel, config: WindowSolverConfig) -> tuple[_Refusal | None, bool]:
    """Poses frames from the given poses or else from the tracks alone; whether it was the latter.

    Given poses that can be refined so that all frames agree are kept. Where some frames do not, the
    window may sit in a wrong optimum: other starts are tried.
    """
    is_given = model.problem.has_pose
    if is_given.sum() >= 2:
        _start_from_given(model, is_given, config)
        if _refine_given_poses(model, config):
            return None, False
        if model.problem.is_held.sum() >= 2:
            return _start_from_held(model, config), False
    refusal, is_bootstrapped = _start_anew(model, config)
    if is_bootstrapped and model.problem.is_held.any():
        _move_to_held(model)
    return refusal, is_bootstrapped


def _start_from_held(model: WindowModel, config: WindowSolverConfig) -> _Refusal | None:
    """Poses all others against the held ones, unless most of the tracks agree already."""
    if not _mostly_agrees(model, config):
        _start_from_given(model, model.problem.is_held, config)
        grow_window(model, config)
    if not _mostly_agrees(model, config):
        return WindowStatus.BAD_POSES, f"tracks contradict the held poses: {_figures(model)}"
    return None


def _start_anew(model: WindowModel, config: WindowSolverConfig) -> tuple[_Refusal | None, bool]:
    """Poses from the tracks alone where they explain more than refined ones, if there are any."""
    refined = model.state()
    refusal = initialize_window(model, config)
    if model.is_inlier.sum() > refined.is_inlier.sum() or not refined.is_posed.any():
        return refusal, refusal is None
    model.restore(refined)
    if _mostly_agrees(model, config):
        return None, False
    return refusal or (WindowStatus.INCONSISTENT, _figures(model)), False


def _move_to_held(model: WindowModel) -> None:
    """Moves a window that was posed from its tracks alone to where its one held frame is."""
    held = int(np.flatnonzero(model.problem.is_held)[0])
    if model.problem.cam_from_world is None or not model.is_posed[held]:
        return
    to_held = model.problem.cam_from_world[held]
    held_world_from_world = compose_poses(invert_pose(to_held), model.cam_from_world[held])
    model.points3D_in_world = transform_points(held_world_from_world, model.points3D_in_world)
    model.cam_from_world = compose_poses(model.cam_from_world, invert_pose(held_world_from_world))
    model.cam_from_world[held] = to_held


def _start_from_given(model: WindowModel, is_given: BoolArray, config: WindowSolverConfig) -> None:
    assert model.problem.cam_from_world is not None
    model.reset()
    model.cam_from_world[is_given] = model.problem.cam_from_world[is_given]
    model.is_posed[:] = is_given
    if (model.focal_px <= 0).any():
        guess_focal_lengths(model, verified_pairs(model, config))


def _refine_given_poses(model: WindowModel, config: WindowSolverConfig) -> bool:
    """Refines given poses under wide gates that tighten; returns whether all frames agree."""
    for gate_deg in config.coarse_gates_deg:
        gate_rad = float(np.radians(gate_deg))
        max_error_px = float(np.tan(gate_rad) * np.median(model.focal_px)) / model.scale
        triangulate_window(model, max_angle_rad=gate_rad, config=config)
        filter_observations(model, max_error_px=max_error_px, config=config, min_length=2)
        adjust_coarsely(model, config)
    find_points(model, config)
    weak = _weak_frames(model)
    if weak.any() or not model.is_posed.all():
        model.is_posed &= ~weak
        grow_window(model, config)
    can_be_posed = model.num_seen() >= config.min_frame_inliers
    return bool(
        _mostly_agrees(model, config)
        and not _weak_frames(model).any()
        and np.all(model.is_posed | ~can_be_posed)
    )


def _mostly_agrees(model: WindowModel, config: WindowSolverConfig) -> bool:
    return model.support() >= config.min_inlier_ratio


def _weak_frames(model: WindowModel) -> BoolArray:
    """(S,) posed frames with which far less agrees than with the others; never held ones."""
    support = model.num_inliers() / np.maximum(model.num_seen(), 1)
    usual = np.median(support[model.is_posed])
    return np.asarray(model.is_posed & ~model.problem.is_held & (support < _WEAK * usual))


# -- everything together --------------------------------------------------------------------------


def _adjust_all(model: WindowModel, config: WindowSolverConfig) -> None:
    """Adjusts all cameras and points until what agrees stays about the same."""
    num_agreed = 0
    for max_error_px in (1.5 * config.max_error_px, *_MAX_ROUNDS * [config.max_error_px]):
        triangulate_window(model, max_angle_rad=angle_of(model, max_error_px), config=config)
        _keep(model, config, max_error_px=max_error_px)
        num_before, num_agreed = num_agreed, int(model.is_inlier.sum())
        adjust_window(model, config=config, max_iterations=config.max_iterations)
        _keep(model, config, max_error_px=config.max_error_px)
        if abs(num_agreed - num_before) <= _SETTLED_RATIO * num_agreed:
            break


def _keep(model: WindowModel, config: WindowSolverConfig, *, max_error_px: float) -> None:
    filter_observations(
        model, max_error_px=max_error_px, config=config, min_length=config.min_track_length
    )


def _estimate(
    model: WindowModel,
    config: WindowSolverConfig,
    *,
    status: WindowStatus,
    reason: str,
    is_bootstrapped: bool,
    elapsed_s: float,
    cpu_s: float,
) -> WindowEstimate:
    problem = model.problem
    is_inlier = np.zeros((problem.num_frames, problem.num_tracks), np.bool_)
    is_posed, has_point, errors_px = model.is_posed, model.has_point, np.zeros(1)
    if status is WindowStatus.SOLVED:
        is_inlier[model.frame_idx[model.is_inlier], model.track_idx[model.is_inlier]] = True
        errors_px = model.errors_px()[model.is_inlier]
    else:
        is_posed, has_point = np.zeros_like(is_posed), np.zeros_like(has_point)
    return WindowEstimate(
        status=status,
        reason=reason,
        cam_from_world=np.where(is_posed[:, None, None], model.cam_from_world, 0.0),
        is_valid=_valid_frames(model, config) & is_posed,
        focal_px=np.nan_to_num(model.focal_px),
        distortion=np.nan_to_num(model.distortion),
        points3D_in_world=np.where(has_point[:, None], model.points3D_in_world, 0.0),
        is_point_valid=has_point,
        is_inlier=is_inlier,
        mean_reprojection_px=float(errors_px.mean()),
        num_unusable=model.num_unusable,
        is_bootstrapped=is_bootstrapped,
        elapsed_s=elapsed_s,
        cpu_s=cpu_s,
    )
