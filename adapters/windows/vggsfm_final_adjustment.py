"""VGGSfM final adjustment: bundle adjustment under constraints that upstream does not support.

Upstream supports neither held poses nor calibrated cameras beside others. It supports one focal
length for all frames, but then all frames are posed with the first pair's estimate: with outliers
among the tracks that loses windows which one for each frame does not. So each frame has its own
there, and frames of one camera share one here.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from adapters.windows.vggsfm_colmap import (
    Image,
    Point2D,
    Reconstruction,
    Track,
    TrackElement,
    adjust_held,
)
from adapters.windows.vggsfm_window import Solution
from engine.geometry import image_scale
from engine.types import BoolArray, Float64Array
from engine.window_types import WindowProblem

_MAX_ITERATIONS: Final = 50
_LOSS_SCALE_PX: Final = 1.0  # at an image edge of 1000 px; larger errors count linearly
_FUNCTION_TOLERANCE: Final = 1e-5
_MIN_OBSERVATIONS_OF_POSE: Final = 6  # fewer do not hold a pose


def needs_final_adjustment(problem: WindowProblem) -> bool:
    """Whether a window has held poses, shared focal lengths or some calibrated cameras."""
    num_frames = np.bincount(problem.camera_idx, minlength=len(problem.is_calibrated))
    is_shared = (num_frames > 1) & ~problem.is_calibrated
    is_mixed = len(np.unique(problem.is_calibrated[num_frames > 0])) > 1
    return bool(problem.is_held.any() or is_shared.any() or is_mixed)


def adjust_finally(problem: WindowProblem, solution: Solution, is_inlier: BoolArray) -> Solution:
    """Refines a solution that is in the problem's frame of reference.

    Held poses and calibrated cameras stay. While there are such, the interpreter lock is held.

    Args:
        problem: the window.
        solution: to begin with.
        is_inlier: (S, N) observations that count.
    """
    uses = is_inlier & (is_inlier.sum(axis=1) >= _MIN_OBSERVATIONS_OF_POSE)[:, None]
    uses &= uses.sum(axis=0) >= 2
    frames, tracks = np.flatnonzero(uses.any(axis=1)), np.flatnonzero(uses.any(axis=0))
    if len(frames) < 2:
        return solution
    reconstruction = _reconstruction(problem, solution, uses)
    adjust_held(
        reconstruction,
        _options(problem),
        held_images=set(np.flatnonzero(problem.is_held).tolist()),
        constant_cameras=[idx for idx in reconstruction.cameras if problem.is_calibrated[idx]],
    )
    poses = solution.cam_from_world.copy()
    for frame in frames[~problem.is_held[frames]].tolist():
        poses[frame] = reconstruction.images[frame].cam_from_world.matrix()
    focal_px = solution.focal_px.copy()
    for camera_idx, camera in reconstruction.cameras.items():
        focal_px[problem.camera_idx == camera_idx] = camera.params[0]
    points = np.full_like(solution.points3D_in_world, np.nan)
    points[tracks] = [reconstruction.points3D[track + 1].xyz for track in tracks.tolist()]
    return Solution(cam_from_world=poses, focal_px=focal_px, points3D_in_world=points)


def focal_of_cameras(problem: WindowProblem, focal_px: Float64Array) -> Float64Array:
    """(C,) the median of each camera's frames (S,); calibrated and unseen ones as given."""
    values = problem.focal_px.copy()
    for idx in np.flatnonzero(~problem.is_calibrated).tolist():
        own = focal_px[(problem.camera_idx == idx) & np.isfinite(focal_px)]
        values[idx] = np.median(own) if len(own) else values[idx]
    return values


def _reconstruction(problem: WindowProblem, solution: Solution, uses: BoolArray) -> Reconstruction:
    """Observations in COLMAP's terms; ids of images and cameras are indices, of points one more."""
    import pycolmap

    reconstruction = Reconstruction()
    frames = np.flatnonzero(uses.any(axis=1))
    focal_px = focal_of_cameras(problem, solution.focal_px)
    for idx in np.unique(problem.camera_idx[frames]).tolist():
        reconstruction.add_camera(_camera(problem, idx, focal_px=float(focal_px[idx])))
    for frame in frames.tolist():
        image = Image(
            points2D=[Point2D(xy) for xy in problem.tracks_xy[frame, uses[frame]]],
            cam_from_world=pycolmap.Rigid3d(solution.cam_from_world[frame]),
            camera_id=int(problem.camera_idx[frame]),
            id=frame,
        )
        reconstruction.add_image(image)
    keypoint = np.cumsum(uses, axis=1) - 1  # of each observation in its image
    for track in np.flatnonzero(uses.any(axis=0)).tolist():
        elements = [
            TrackElement(frame, int(keypoint[frame, track]))
            for frame in np.flatnonzero(uses[:, track]).tolist()
        ]
        xyz = solution.points3D_in_world[track]
        reconstruction.add_point3D(xyz, Track(elements), point3D_id=track + 1)
    return reconstruction


def _camera(problem: WindowProblem, idx: int, *, focal_px: float) -> Any:
    import pycolmap

    width, height = problem.image_sizes[idx].tolist()
    ratio = focal_px / problem.focal_px[idx] if problem.focal_px[idx] > 0.0 else 1.0
    center_x, center_y = problem.principal_points_xy[idx].tolist()
    return pycolmap.Camera(
        camera_id=idx,
        model="SIMPLE_RADIAL",
        width=width,
        height=height,
        params=(focal_px, center_x, center_y, problem.distortion[idx] * ratio**2),
    )


def _options(problem: WindowProblem) -> Any:
    import pycolmap

    scale = float(np.median([image_scale(*size) for size in problem.image_sizes.tolist()]))
    options = pycolmap.BundleAdjustmentOptions(print_summary=False)
    options.refine_extra_params = False
    options.ceres.loss_function_type = pycolmap.LossFunctionType.SOFT_L1
    options.ceres.loss_function_scale = _LOSS_SCALE_PX * scale
    options.ceres.solver_options.max_num_iterations = _MAX_ITERATIONS
    options.ceres.solver_options.function_tolerance = _FUNCTION_TOLERANCE
    options.ceres.solver_options.num_threads = 1
    return options
