"""Window adjustment: bundle adjustment of a window by COLMAP, and filtering of observations."""

from __future__ import annotations

import functools

import numpy as np
import pycolmap

from engine.estimators.adjustment_options import adjustment_options
from engine.estimators.intrinsics_evidence import measure_evidence
from engine.types import BoolArray, Float64Array, Int64Array
from engine.windows.model import WindowModel, WindowSolverConfig

_FUNCTION_TOLERANCE = 1e-5
_MOST_UNCERTAIN = 0.35  # of a focal length
_MIN_OBSERVATIONS_OF_POSE = 6  # fewer do not hold a pose


def adjust_window(
    model: WindowModel,
    *,
    config: WindowSolverConfig,
    max_iterations: int,
    which: BoolArray | None = None,
    doubts_calibration: bool = False,
) -> None:
    """Refines poses, points and intrinsics of a window in place by its inliers.

    Errors beyond a pixel or so count linearly (soft L1). Held poses and calibrated cameras stay;
    without held poses, two cameras fix the gauge. A focal length that the observations hardly tell
    is held, and the rest solved again. Does nothing with too little to refine. The
    interpreter lock is released, unless poses are held, or some cameras change and others do not:
    only COLMAP's configurable adjuster, which holds it, does that.

    Args:
        model: the window.
        config: loss and what may be refined.
        max_iterations: at most so many steps.
        which: (N,) tracks that take part; all by default.
        doubts_calibration: calibrated cameras are refined like the others.
    """
    uses = _used_observations(model, which)
    frames = np.unique(model.frame_idx[uses])
    if len(frames) < 2:
        return
    reconstruction, tracks = _reconstruction_of(model, uses)
    cameras = np.unique(model.problem.camera_idx[frames])
    is_constant = model.problem.is_calibrated[cameras] & (not doubts_calibration)
    is_constant |= len(frames) < config.min_frames_for_focal
    solve = functools.partial(
        _solve, model, frames=frames, config=config, max_iterations=max_iterations
    )
    solve(reconstruction, is_constant=is_constant)
    is_vague = _is_vague(reconstruction, cameras, is_constant=is_constant)
    if is_vague.any():
        reconstruction, tracks = _reconstruction_of(model, uses)
        solve(reconstruction, is_constant=is_constant | is_vague)
    _take_back(model, reconstruction, tracks)


def _solve(
    model: WindowModel,
    reconstruction: pycolmap.Reconstruction,
    *,
    frames: Int64Array,
    is_constant: BoolArray,
    config: WindowSolverConfig,
    max_iterations: int,
) -> None:
    """Adjusts a reconstruction of a window in place; ``is_constant`` (C,) of its cameras."""
    cameras = np.unique(model.problem.camera_idx[frames])
    options = adjustment_options(
        max_iterations=max_iterations,
        function_tolerance=_FUNCTION_TOLERANCE,
        loss_scale_px=config.loss_scale_px * model.scale,
    )
    options.refine_focal_length = not is_constant.all()
    options.refine_extra_params = (
        options.refine_focal_length
        and config.refine_distortion
        and len(frames) >= config.min_frames_for_distortion
    )
    if model.problem.is_held[frames].any() or is_constant.any() != is_constant.all():
        problem = _problem(model, reconstruction, constant_cameras=cameras[is_constant].tolist())
        pycolmap.create_default_bundle_adjuster(options, problem, reconstruction).solve()
    else:
        pycolmap.bundle_adjustment(reconstruction, options)


def _is_vague(
    reconstruction: pycolmap.Reconstruction, cameras: Int64Array, *, is_constant: BoolArray
) -> BoolArray:
    """(C,) refined cameras whose focal length the observations hardly tell, as before a plane."""
    vague = np.zeros(len(cameras), np.bool_)
    for place in np.flatnonzero(~is_constant).tolist():
        evidence = measure_evidence(reconstruction, int(cameras[place]) + 1)
        vague[place] = evidence is None or evidence.focal_sigma_ratio > _MOST_UNCERTAIN
    return vague


def _used_observations(model: WindowModel, which: BoolArray | None) -> BoolArray:
    """(M,) inliers of points seen twice or more, in frames that enough of them hold."""
    chosen = model.has_point if which is None else model.has_point & which
    uses = model.is_inlier & chosen[model.track_idx]
    num_frames, num_tracks = model.problem.num_frames, model.problem.num_tracks
    for _ in range(2):
        per_frame = np.bincount(model.frame_idx[uses], minlength=num_frames)
        uses &= per_frame[model.frame_idx] >= _MIN_OBSERVATIONS_OF_POSE
        per_track = np.bincount(model.track_idx[uses], minlength=num_tracks)
        uses &= per_track[model.track_idx] >= 2
    return np.asarray(uses)


def _reconstruction_of(
    model: WindowModel, uses: BoolArray
) -> tuple[pycolmap.Reconstruction, list[int]]:
    """A reconstruction of some observations, and the tracks that its points 1, 2, 3, ... are.

    Ids of images and cameras are indices + 1.
    """
    reconstruction = pycolmap.Reconstruction()
    frame_idx, track_idx = model.frame_idx[uses], model.track_idx[uses]
    points_xy = model.points_xy[uses]
    frames = np.unique(frame_idx)
    for camera_idx in np.unique(model.problem.camera_idx[frames]).tolist():
        reconstruction.add_camera_with_trivial_rig(model.camera(camera_idx))
    keypoint_idx = np.empty(len(frame_idx), np.int64)
    for idx in frames.tolist():
        own = frame_idx == idx
        keypoint_idx[own] = np.arange(own.sum())
        image = pycolmap.Image(
            name=str(idx),
            keypoints=points_xy[own],
            camera_id=int(model.problem.camera_idx[idx]) + 1,
            image_id=idx + 1,
        )
        pose = pycolmap.Rigid3d(model.cam_from_world[idx])
        reconstruction.add_image_with_trivial_frame(image, pose)
    tracks, starts = np.unique(track_idx, return_index=True)
    image_ids, keypoints = (frame_idx + 1).tolist(), keypoint_idx.tolist()
    ends = [*starts[1:].tolist(), len(image_ids)]
    element, track_of = pycolmap.TrackElement, pycolmap.Track
    xyz = model.points3D_in_world[tracks]
    for row, (start, end) in enumerate(zip(starts.tolist(), ends, strict=True)):
        elements = [element(image_ids[place], keypoints[place]) for place in range(start, end)]
        reconstruction.add_point3D(xyz[row], track_of(elements))
    return reconstruction, tracks.tolist()


def _problem(
    model: WindowModel, reconstruction: pycolmap.Reconstruction, *, constant_cameras: list[int]
) -> pycolmap.BundleAdjustmentConfig:
    """The bundle adjustment problem; without held poses two cameras fix the gauge."""
    problem = pycolmap.BundleAdjustmentConfig()
    is_any_held = False
    for image_id in sorted(reconstruction.reg_image_ids()):
        problem.add_image(image_id)
        if model.problem.is_held[image_id - 1]:
            problem.set_constant_rig_from_world_pose(reconstruction.image(image_id).frame_id)
            is_any_held = True
    if not is_any_held:
        problem.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
    for camera_idx in constant_cameras:
        problem.set_constant_cam_intrinsics(camera_idx + 1)
    return problem


def _take_back(
    model: WindowModel, reconstruction: pycolmap.Reconstruction, tracks: list[int]
) -> None:
    for image_id, image in reconstruction.images.items():
        if not model.problem.is_held[image_id - 1]:
            model.cam_from_world[image_id - 1] = image.cam_from_world().matrix()
    focal_px, distortion = model.focal_px.copy(), model.distortion.copy()
    for camera_id, camera in reconstruction.cameras.items():
        focal_px[camera_id - 1], distortion[camera_id - 1] = camera.params[[0, 3]]
    model.set_intrinsics(focal_px, distortion)
    points = reconstruction.points3D
    model.points3D_in_world[tracks] = [points[number].xyz for number in range(1, len(tracks) + 1)]


def filter_observations(
    model: WindowModel, *, max_error_px: float, config: WindowSolverConfig, min_length: int
) -> None:
    """Decides anew which observations agree; drops points with too few or without parallax.

    Args:
        model: the window.
        max_error_px: an observation that agrees is closer, in px of an image of 1000 px.
        config: parallax.
        min_length: observations that a point needs.
    """
    model.is_inlier = model.errors_px() <= max_error_px * model.scale
    is_kept = model.has_point & (model.track_lengths() >= min_length)
    is_kept &= widest_parallax_rad(model) >= np.radians(config.min_parallax_deg)
    model.points3D_in_world[~is_kept] = np.nan
    model.is_inlier &= is_kept[model.track_idx]


def widest_parallax_rad(model: WindowModel) -> Float64Array:
    """(N,) the largest angle between rays that agree on a point; 0 for tracks without one."""
    widest = np.zeros(model.problem.num_tracks)
    rows = np.flatnonzero(model.is_inlier)
    if not len(rows):
        return widest
    pose = model.cam_from_world[model.frame_idx[rows]]
    track = model.track_idx[rows]
    towards = model.points3D_in_world[track] + np.einsum(
        "mji,mj->mi", pose[:, :, :3], pose[:, :, 3]
    )
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    # Observations are ordered by track: those of one lie at distances 1, 2, 3, ... in the list.
    for gap in range(1, int(np.bincount(track).max())):
        both = track[gap:] == track[:-gap]
        if not both.any():
            break
        first, second = towards[:-gap][both], towards[gap:][both]
        sine = np.linalg.norm(np.cross(first, second), axis=1)
        angle = np.arctan2(sine, (first * second).sum(axis=1))
        np.maximum.at(widest, track[:-gap][both], angle)
    return widest
