"""What a solved window does to the map: nothing, unless the map is better for it.

The result is tried on a copy. A copy that holds more keyframes, or that the window's keypoints fit
better, takes the place of the map; any other is forgotten.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from engine.config import LocalBundleAdjustmentConfig, RegistrationConfig, WindowConfig
from engine.events import WindowVerdict
from engine.geometry import camera_center, pose_in_other_world, similarity_between_poses
from engine.mapping.model.bundle_adjustment import adjust_locally
from engine.mapping.model.sparse_map import Fit, SparseMap
from engine.mapping.windows.window_selection import WindowJob
from engine.types import Float64Array, FrameId
from engine.window_types import WindowEstimate, WindowStatus

_MIN_COMMON = 2  # keyframes; one fixes no scale
_MAX_ERROR_RATIO = 1.01  # of the mean error: more observations must not be worse ones
_MAX_DISAGREEMENT_RATIO = 0.02  # of held cameras with the map, of the window's extent


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowMergeConfig:
    """The settings merging needs."""

    window: WindowConfig
    registration: RegistrationConfig
    local_bundle_adjustment: LocalBundleAdjustmentConfig


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowMerge:
    """What became of a window."""

    verdict: WindowVerdict
    reason: str
    before: Fit
    after: Fit
    registered: tuple[FrameId, ...] = ()  # keyframes it brings into the map
    moved_map: float = 0.0  # the farthest that a camera moved
    better_map: SparseMap | None = None  # takes the place of the map, where there is one


def try_window(
    sparse_map: SparseMap, job: WindowJob, estimate: WindowEstimate, *, config: WindowMergeConfig
) -> WindowMerge:
    """Tries a window's result on a copy of the map.

    Args:
        sparse_map: the map as it is now; it stays as it is.
        job: what was asked of the solver.
        estimate: its answer.
        config: thresholds.
    """
    before = sparse_map.fit(job.window.frame_ids)
    if estimate.status is not WindowStatus.SOLVED:
        reason = f"{estimate.status}: {estimate.reason}"
        return _unchanged(WindowVerdict.NOT_SOLVED, reason, before)
    poses = _poses_in_map(sparse_map, job, estimate)
    if poses is None:
        reason = "the map no longer has the keyframes that held it, or has moved them apart"
        return _unchanged(WindowVerdict.STALE, reason, before)
    if not _may_be_better(before, estimate, poses, sparse_map):
        return _unchanged(WindowVerdict.NOT_BETTER, "fewer keypoints agree with it", before)
    return _try_poses(sparse_map, job, poses, before=before, config=config)


def _unchanged(verdict: WindowVerdict, reason: str, fit: Fit) -> WindowMerge:
    return WindowMerge(verdict=verdict, reason=reason, before=fit, after=fit)


def _poses_in_map(
    sparse_map: SparseMap, job: WindowJob, estimate: WindowEstimate
) -> dict[FrameId, Float64Array] | None:
    """The poses of the window's free keyframes in the map; None without held ones.

    The map may have been adjusted since: the window follows the held keyframes.
    """
    is_held = job.problem.is_held
    common = [
        idx
        for idx, frame_id in enumerate(job.window.frame_ids)
        if is_held[idx] and estimate.is_valid[idx] and sparse_map.is_registered(frame_id)
    ]
    if len(common) < _MIN_COMMON:
        return None
    window_poses = estimate.cam_from_world[common]
    map_poses = np.array([sparse_map.cam_from_world(job.window.frame_ids[idx]) for idx in common])
    map_from_window = similarity_between_poses(window_poses, map_poses)
    if map_from_window is None:
        return None
    placed = pose_in_other_world(estimate.cam_from_world, map_from_window)
    offsets = camera_center(placed[common]) - camera_center(map_poses)
    extent = np.linalg.norm(np.ptp(camera_center(placed[estimate.is_valid]), axis=0))
    if np.linalg.norm(offsets, axis=1).max() > _MAX_DISAGREEMENT_RATIO * extent:
        return None
    return {
        frame_id: placed[idx]
        for idx, frame_id in enumerate(job.window.frame_ids)
        if estimate.is_valid[idx] and not is_held[idx]
    }


def _may_be_better(
    before: Fit,
    estimate: WindowEstimate,
    poses: Mapping[FrameId, Float64Array],
    sparse_map: SparseMap,
) -> bool:
    """Whether trying the result can be worth a copy of the map."""
    brings_in = any(not sparse_map.is_registered(frame_id) for frame_id in poses)
    is_closer = estimate.mean_reprojection_px < before.mean_error_px
    return brings_in or is_closer or estimate.num_observations > before.num_observations


def _try_poses(
    sparse_map: SparseMap,
    job: WindowJob,
    poses: Mapping[FrameId, Float64Array],
    *,
    before: Fit,
    config: WindowMergeConfig,
) -> WindowMerge:
    candidate = sparse_map.copy()
    candidate.place(poses)
    candidate.filter_touched(list(poses))
    for frame_id in poses:
        candidate.triangulate(frame_id)
    _take_out_unsupported(candidate, sparse_map, poses, config=config)
    kept = [i for i in poses if candidate.is_registered(i)]
    if not kept:
        return _unchanged(WindowVerdict.NOT_BETTER, "no keyframe of it finds support", before)
    adjust_locally(candidate, kept[-1], config=config.local_bundle_adjustment)
    after = candidate.fit(job.window.frame_ids)
    registered = tuple(i for i in kept if not sparse_map.is_registered(i))
    is_better = bool(registered) or (
        after.gain >= (1.0 + config.window.min_gain_ratio) * before.gain
        and after.mean_error_px <= _MAX_ERROR_RATIO * before.mean_error_px
    )
    return WindowMerge(
        verdict=WindowVerdict.MERGED if is_better else WindowVerdict.NOT_BETTER,
        reason=_figures(before, after, num_registered=len(registered)),
        before=before,
        after=after,
        registered=registered if is_better else (),
        moved_map=_farthest_move(sparse_map, candidate, kept) if is_better else 0.0,
        better_map=candidate if is_better else None,
    )


def _figures(before: Fit, after: Fit, *, num_registered: int) -> str:
    gain = f"{after.gain / before.gain - 1.0:+.1%}" if before.gain else "from nothing"
    more = f", {num_registered} keyframes more" if num_registered else ""
    return f"fit {gain}, {before.mean_error_px:.2f} to {after.mean_error_px:.2f} px{more}"


def _take_out_unsupported(
    candidate: SparseMap,
    sparse_map: SparseMap,
    poses: Collection[FrameId],
    *,
    config: WindowMergeConfig,
) -> None:
    """Takes out keyframes, new to the map, whose matches with it do not agree with their place.

    What is asked of them is what registration asks.
    """
    settings = config.registration
    weak = []
    for frame_id in poses:
        if sparse_map.is_registered(frame_id):
            continue
        num_visible = candidate.num_visible_points(frame_id)
        num_seen = candidate.fit([frame_id]).num_observations
        if num_seen < max(settings.min_inliers, settings.min_inlier_ratio * num_visible):
            weak.append(frame_id)
    candidate.deregister(weak)


def _farthest_move(
    sparse_map: SparseMap, candidate: SparseMap, frame_ids: Collection[FrameId]
) -> float:
    moves = [
        camera_center(candidate.cam_from_world(i)) - camera_center(sparse_map.cam_from_world(i))
        for i in frame_ids
        if sparse_map.is_registered(i)
    ]
    return float(np.linalg.norm(moves, axis=1).max()) if moves else 0.0
