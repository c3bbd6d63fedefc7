"""VGGSfM solver: upstream's VGGSfM as a solver of windows.

All of upstream's stages after the tracks run (its ``Triangulator``): initial pair, resection,
triangulation, bundle adjustment, and that again. Its own decision on which frames are valid is not
used: agreement is measured here, in px of the images.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from adapters.windows.vggsfm_final_adjustment import (
    adjust_finally,
    focal_of_cameras,
    needs_final_adjustment,
)
from adapters.windows.vggsfm_package import (
    VGGSFM_LICENCE,
    SquareSolution,
    VggsfmPackage,
    load_vggsfm,
)
from adapters.windows.vggsfm_predictor import ImageReader, PredictedCameras, load_predictor
from adapters.windows.vggsfm_window import (
    MIN_POINTS,
    MIN_TRACK_LENGTH,
    InitialCameras,
    Refusal,
    Solution,
    SquareWindow,
    agreeing_observations,
    distortion_at_focal,
    errors_px,
    in_frame_of_problem,
    refusal_of_input,
    square_scale,
    square_window,
    usable_observations,
)
from engine.config import WindowConfig
from engine.errors import ConfigError
from engine.geometry import pose_in_other_world, similarity_between_poses
from engine.ports import WindowSolver
from engine.types import BoolArray, Float64Array
from engine.window_types import (
    ASSUMED_FOCAL_RATIO,
    WindowEstimate,
    WindowProblem,
    WindowStatus,
)

logger = logging.getLogger(__name__)

CameraInitializer = Callable[[WindowProblem], InitialCameras | Refusal]

# What code that does not expect its data to be bad raises on bad data.
_UPSTREAM_ERRORS = (
    ArithmeticError,
    AssertionError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
_MIN_INLIER_RATIO = 0.5  # of what the posed frames see, else the window fails


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Accepted:
    """A solution in the problem's frame of reference, and the observations that agree with it."""

    solution: Solution
    camera_focal_px: Float64Array  # (C,)
    errors_px: Float64Array  # (S, N)
    is_inlier: BoolArray  # (S, N)
    is_valid: BoolArray  # (S,)
    is_bootstrapped: bool

    def support(self, is_used: BoolArray) -> float:
        """Share of what the posed frames see that agrees."""
        is_posed = np.isfinite(self.solution.cam_from_world).all(axis=(1, 2))
        return float(self.is_inlier.sum() / max(1, is_used[is_posed].sum()))

    def figures(self, is_used: BoolArray) -> str:
        """A sentence with the figures."""
        num_posed = int(np.isfinite(self.solution.cam_from_world).all(axis=(1, 2)).sum())
        return f"{num_posed} frames posed, {self.support(is_used):.0%} of what they see agrees"


class VggsfmWindowSolver:
    """Solves windows with upstream's VGGSfM.

    It needs tracks of three observations or more, and initial cameras: the poses that come with the
    problem, or else the initializer's.

    Args:
        package: upstream's code.
        initialize: finds initial cameras where a frame comes without a pose.
    """

    def __init__(self, package: VggsfmPackage, *, initialize: CameraInitializer) -> None:
        self._package = package
        self._initialize = initialize

    def __call__(self, problem: WindowProblem) -> WindowEstimate:
        """Solves a window; failures are values.

        The frame of reference is that of the held poses, else that of the given poses, else that of
        the initial cameras (``is_bootstrapped``). Held poses stay as they are.
        """
        started_s, started_cpu_s = time.monotonic(), time.thread_time()
        is_usable = usable_observations(problem)
        is_used = is_usable & (is_usable.sum(axis=0) >= MIN_TRACK_LENGTH)
        outcome = self._solve(problem, is_used)
        estimate = _estimate(
            problem,
            outcome,
            is_used=is_used,
            num_unusable=int(problem.is_visible.sum() - is_usable.sum()),
            elapsed_s=time.monotonic() - started_s,
            cpu_s=time.thread_time() - started_cpu_s,
        )
        logger.debug(
            "window of %d frames: %s, %s", problem.num_frames, estimate.status, estimate.reason
        )
        return estimate

    def _solve(self, problem: WindowProblem, is_used: BoolArray) -> _Accepted | Refusal:
        refusal = refusal_of_input(problem, is_used)
        if refusal is not None:
            return refusal
        initial = self._initial_cameras(problem, is_used)
        if isinstance(initial, Refusal):
            return initial
        window = square_window(problem, initial, is_used)
        if isinstance(window, Refusal):
            return window
        try:
            answer = self._package.solve(window)
        except _UPSTREAM_ERRORS as error:
            logger.warning("VGGSfM failed in a window of %d frames", len(window.frames))
            logger.debug("how it failed", exc_info=error)
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            return Refusal(status=WindowStatus.SOLVER_FAILED, reason=reason)
        return _found(problem, initial, is_used, solution=_in_pixels(problem, window, answer))

    def _initial_cameras(
        self, problem: WindowProblem, is_used: BoolArray
    ) -> InitialCameras | Refusal:
        is_given = problem.has_pose
        assumed_px = ASSUMED_FOCAL_RATIO * problem.image_sizes.max(axis=1)
        if problem.cam_from_world is not None and (is_given | ~is_used.any(axis=1)).all():
            return InitialCameras(
                cam_from_world=np.where(is_given[:, None, None], problem.cam_from_world, np.nan),
                focal_px=np.where(problem.focal_px > 0.0, problem.focal_px, assumed_px),
                has_own_gauge=False,
            )
        guess = self._initialize(problem)
        if isinstance(guess, Refusal):
            return guess
        focal_px = np.where(problem.focal_px > 0.0, problem.focal_px, guess.focal_px)
        return InitialCameras(
            cam_from_world=_guess_around_given(problem, guess, is_given),
            focal_px=np.where(focal_px > 0.0, focal_px, assumed_px),
            has_own_gauge=guess.has_own_gauge and is_given.sum() < 2,
        )


def _guess_around_given(
    problem: WindowProblem, guess: InitialCameras, is_given: BoolArray
) -> Float64Array:
    """(S, 3, 4) guessed poses in the frame of reference of two given ones or more."""
    poses, given = guess.cam_from_world, problem.cam_from_world
    if given is None or is_given.sum() < 2:
        return poses
    if guess.has_own_gauge:
        common = is_given & np.isfinite(poses).all(axis=(1, 2))
        similarity = (
            similarity_between_poses(poses[common], given[common]) if common.sum() >= 2 else None
        )
        known = np.full_like(poses, np.nan)
        poses = known if similarity is None else pose_in_other_world(poses, similarity)
    return np.where(is_given[:, None, None], given, poses)


def _in_pixels(problem: WindowProblem, window: SquareWindow, answer: SquareSolution) -> Solution:
    """Upstream's solution for all frames and tracks of a problem, in px of its images."""
    poses = np.full((problem.num_frames, 3, 4), np.nan)
    focal_px = np.full(problem.num_frames, np.nan)
    points = np.full((problem.num_tracks, 3), np.nan)
    scale = square_scale(problem)[problem.camera_idx[window.frames]]
    poses[window.frames] = answer.cam_from_world
    focal_px[window.frames] = answer.focal / scale
    points[window.tracks] = answer.points3D_in_world
    return Solution(cam_from_world=poses, focal_px=focal_px, points3D_in_world=points)


def _found(
    problem: WindowProblem, initial: InitialCameras, is_used: BoolArray, *, solution: Solution
) -> _Accepted | Refusal:
    """Moves a solution from upstream's gauge to the problem's and counts what agrees with it."""
    is_inlier, is_valid = agreeing_observations(problem, errors_px(problem, solution), is_used)
    moved = in_frame_of_problem(solution, problem, initial, is_valid)
    if isinstance(moved, Refusal):
        return moved
    if needs_final_adjustment(problem):
        moved = adjust_finally(problem, moved, is_inlier & is_valid[:, None])
    focal_px = focal_of_cameras(problem, moved.focal_px)
    moved = replace(moved, focal_px=focal_px[problem.camera_idx])
    errors = errors_px(problem, moved)
    is_inlier, is_valid = agreeing_observations(problem, errors, is_used)
    found = _Accepted(
        solution=moved,
        camera_focal_px=focal_px,
        errors_px=errors,
        is_inlier=is_inlier,
        is_valid=is_valid,
        is_bootstrapped=initial.has_own_gauge,
    )
    return _refusal_of_result(found, is_used) or found


def _refusal_of_result(found: _Accepted, is_used: BoolArray) -> Refusal | None:
    num_points, num_valid = int(found.is_inlier.any(axis=0).sum()), int(found.is_valid.sum())
    if num_points < MIN_POINTS:
        reason = f"{num_points} tracks have a point"
        return Refusal(status=WindowStatus.NO_PARALLAX, reason=reason)
    if num_valid < 2 or found.support(is_used) < _MIN_INLIER_RATIO:
        reason = f"{num_valid} valid frames, {found.figures(is_used)}"
        return Refusal(status=WindowStatus.INCONSISTENT, reason=reason)
    return None


def _estimate(
    problem: WindowProblem,
    outcome: _Accepted | Refusal,
    *,
    is_used: BoolArray,
    num_unusable: int,
    elapsed_s: float,
    cpu_s: float,
) -> WindowEstimate:
    if isinstance(outcome, Refusal):
        return WindowEstimate(
            status=outcome.status,
            reason=outcome.reason,
            cam_from_world=np.zeros((problem.num_frames, 3, 4)),
            is_valid=np.zeros(problem.num_frames, np.bool_),
            focal_px=np.nan_to_num(problem.focal_px),
            distortion=np.nan_to_num(problem.distortion),
            points3D_in_world=np.zeros((problem.num_tracks, 3)),
            is_point_valid=np.zeros(problem.num_tracks, np.bool_),
            is_inlier=np.zeros_like(is_used),
            mean_reprojection_px=0.0,
            num_unusable=num_unusable,
            is_bootstrapped=False,
            elapsed_s=elapsed_s,
            cpu_s=cpu_s,
        )
    is_point = np.asarray(outcome.is_inlier.any(axis=0))
    points = outcome.solution.points3D_in_world
    return WindowEstimate(
        status=WindowStatus.SOLVED,
        reason=outcome.figures(is_used),
        cam_from_world=np.nan_to_num(outcome.solution.cam_from_world),
        is_valid=outcome.is_valid,
        focal_px=outcome.camera_focal_px,
        distortion=distortion_at_focal(problem, outcome.camera_focal_px),
        points3D_in_world=np.where(is_point[:, None], points, 0.0),
        is_point_valid=is_point,
        is_inlier=outcome.is_inlier,
        mean_reprojection_px=float(outcome.errors_px[outcome.is_inlier].mean()),
        num_unusable=num_unusable,
        is_bootstrapped=outcome.is_bootstrapped,
        elapsed_s=elapsed_s,
        cpu_s=cpu_s,
    )


# -- opening --------------------------------------------------------------------------------------


def cameras_of(solver: WindowSolver) -> CameraInitializer:
    """Initial cameras from another solver of windows."""

    def initialize(problem: WindowProblem) -> InitialCameras | Refusal:
        estimate = solver(problem)
        if estimate.status is not WindowStatus.SOLVED:
            reason = f"no initial cameras: {estimate.reason}"
            return Refusal(status=estimate.status, reason=reason)
        return InitialCameras(
            cam_from_world=np.where(
                estimate.is_valid[:, None, None], estimate.cam_from_world, np.nan
            ),
            focal_px=estimate.focal_px,
            has_own_gauge=estimate.is_bootstrapped,
        )

    return initialize


def open_vggsfm(
    config: WindowConfig, *, first_solver: WindowSolver, read_image: ImageReader | None = None
) -> WindowSolver:
    """Loads upstream's package, and its camera predictor where its weights are configured.

    Args:
        config: where upstream and its weights are.
        first_solver: gives initial cameras to windows that come without, unless the predictor does.
        read_image: reads the images for the predictor.

    Raises:
        ConfigError: upstream's package or something it needs is missing, or the weights cannot be
            used; says what to install.
    """
    root = Path(config.vggsfm_root) if config.vggsfm_root else None
    package = load_vggsfm(root)
    logger.warning("windows are solved by VGGSfM: %s", VGGSFM_LICENCE)
    if not config.camera_predictor:
        return VggsfmWindowSolver(package, initialize=cameras_of(first_solver))
    if read_image is None:
        raise ConfigError("window.camera_predictor looks at images, and there are none here")
    network = load_predictor(
        Path(config.camera_predictor).expanduser(), make_network=package.camera_predictor
    )
    return VggsfmWindowSolver(package, initialize=PredictedCameras(network, read_image=read_image))
