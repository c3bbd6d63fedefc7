"""VGGSfM windows: problems converted to upstream's conventions, and solutions back.

Upstream sees every image in a square of 1024 px with the principal point in its middle, the frame
that shares most tracks first, world-to-camera poses (OpenCV's axes) relative to that frame, and
lengths about 1. Its gates on lengths are absolute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from engine.geometry import (
    compose_poses,
    image_scale,
    invert_pose,
    pose_in_other_world,
    similarity_between_poses,
    transform_points,
)
from engine.types import BoolArray, Float64Array, Int64Array
from engine.window_types import WindowProblem, WindowStatus

SQUARE_PX: Final = 1024.0
UNSEEN_PX: Final = -1e4  # finite, as NaN breaks eigenvectors; far from any image
FOCAL_RATIOS: Final = (0.2, 5.0)  # of the longer edge; upstream clamps what is beyond
MIN_TRACK_LENGTH: Final = 3  # of a track that upstream triangulates
MIN_FRAMES: Final = 3
MIN_POINTS: Final = 15  # of a window
MAX_ERROR_PX: Final = 4.0  # of an observation that agrees, at an image edge of 1000 px
_MIN_SCORE: Final = 0.5
_MIN_FRAME_INLIERS: Final = 15  # of a frame that is valid
_MIN_FRAME_INLIER_RATIO: Final = 0.25  # of what it sees
_MIN_DEPTH: Final = 1e-9
_NEWTON_STEPS: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a window is not solved."""

    status: WindowStatus
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InitialCameras:
    """Cameras to begin with."""

    cam_from_world: Float64Array  # (S, 3, 4), NaN where unknown
    focal_px: Float64Array  # (C,)
    has_own_gauge: bool  # the frame of reference is not that of poses that came with the problem


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SquareWindow:
    """A window in upstream's terms: F of its S frames, the hub first, and T of its N tracks."""

    frames: Int64Array  # (F,)
    tracks: Int64Array  # (T,)
    tracks_xy: Float64Array  # (F, T, 2) px of the square, UNSEEN_PX where not seen
    is_seen: BoolArray  # (F, T)
    cam_from_hub: Float64Array  # (F, 3, 4)
    focal: Float64Array  # (F,) px of the square
    keeps_focal: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """Cameras and points in a frame of reference and pixels of the problem's choice."""

    cam_from_world: Float64Array  # (S, 3, 4), NaN: none
    focal_px: Float64Array  # (S,) NaN: none
    points3D_in_world: Float64Array  # (N, 3), NaN: none


# -- there ----------------------------------------------------------------------------------------


def usable_observations(problem: WindowProblem) -> BoolArray:
    """(S, N) visible observations that are finite and trusted."""
    is_finite = np.isfinite(problem.tracks_xy).all(axis=2)
    return np.asarray(problem.is_visible & is_finite & (problem.score >= _MIN_SCORE))


def refusal_of_input(problem: WindowProblem, is_used: BoolArray) -> Refusal | None:
    """Why a problem cannot be solved, by any solver or by upstream; None when it can.

    Args:
        problem: the window.
        is_used: (S, N) usable observations of tracks that have enough of them.
    """
    wrong = problem.wrong_intrinsics(focal_ratios=FOCAL_RATIOS)
    if wrong is None and ((problem.distortion != 0.0) & (problem.focal_px == 0.0)).any():
        wrong = "a camera distorts, but has no focal length"
    if wrong is not None:
        return Refusal(status=WindowStatus.BAD_INTRINSICS, reason=wrong)
    if (problem.is_held & ~problem.has_pose).any():
        reason = "a held pose is missing, or no rotation and translation"
        return Refusal(status=WindowStatus.BAD_POSES, reason=reason)
    num_seeing = int(usable_observations(problem).any(axis=1).sum())
    if num_seeing < MIN_FRAMES:
        reason = f"{num_seeing} of {problem.num_frames} frames see tracks, VGGSfM needs three"
        return Refusal(status=WindowStatus.TOO_FEW_FRAMES, reason=reason)
    num_tracks = int(is_used.any(axis=0).sum())
    if num_tracks < MIN_POINTS:
        reason = f"{num_tracks} tracks are seen three times"
        return Refusal(status=WindowStatus.TOO_FEW_TRACKS, reason=reason)
    return None


def square_window(
    problem: WindowProblem, initial: InitialCameras, is_used: BoolArray
) -> SquareWindow | Refusal:
    """A problem in upstream's terms; frames without an initial camera or tracks are left out.

    Args:
        problem: the window.
        initial: cameras to begin with.
        is_used: (S, N) usable observations of tracks that have enough of them.
    """
    is_posed = np.asarray(np.isfinite(initial.cam_from_world).all(axis=(1, 2)))
    frames, tracks = _frames_and_tracks(is_used, is_posed)
    if len(frames) < MIN_FRAMES or len(tracks) < MIN_POINTS:
        reason = f"{len(frames)} frames with an initial camera, {len(tracks)} tracks through them"
        return Refusal(status=WindowStatus.NO_INITIAL_PAIR, reason=reason)
    is_seen = is_used[np.ix_(frames, tracks)]
    poses = initial.cam_from_world[frames]
    cam_from_hub = compose_poses(poses, invert_pose(poses[0]))
    lengths = np.linalg.norm(cam_from_hub[1:, :, 3], axis=1)
    if not lengths.mean() > 0.0:
        reason = "all initial cameras stand in one place"
        return Refusal(status=WindowStatus.NO_PARALLAX, reason=reason)
    cam_from_hub[:, :, 3] /= lengths.mean()
    camera_idx = problem.camera_idx[frames]
    scale = square_scale(problem)[camera_idx]
    from_center_xy = _without_distortion(problem)[np.ix_(frames, tracks)]
    tracks_xy = scale[:, None, None] * from_center_xy + SQUARE_PX / 2.0
    return SquareWindow(
        frames=frames,
        tracks=tracks,
        tracks_xy=np.where(is_seen[..., None], tracks_xy, UNSEEN_PX),
        is_seen=is_seen,
        cam_from_hub=cam_from_hub,
        focal=scale * initial.focal_px[camera_idx],
        keeps_focal=bool(problem.is_calibrated[camera_idx].all()),
    )


def square_scale(problem: WindowProblem) -> Float64Array:
    """(C,) px of the square for one px of each camera's images."""
    return np.asarray(SQUARE_PX / problem.image_sizes.max(axis=1))


def _frames_and_tracks(is_used: BoolArray, is_posed: BoolArray) -> tuple[Int64Array, Int64Array]:
    """Posed frames that see tracks of them that are long enough, the hub first; these tracks."""
    is_used = is_used & is_posed[:, None]
    is_used &= is_used.sum(axis=0) >= MIN_TRACK_LENGTH
    order = hub_first(is_used)
    return order[is_used[order].any(axis=1)], np.flatnonzero(is_used.any(axis=0))


def hub_first(is_used: BoolArray) -> Int64Array:
    """(S,) all frames, the one that shares most tracks first: upstream relates all others to it."""
    num_others = np.maximum(is_used.sum(axis=0) - 1, 0)
    hub = int((is_used * num_others).sum(axis=1).argmax())
    return np.concatenate([[hub], np.delete(np.arange(len(is_used)), hub)])


def _without_distortion(problem: WindowProblem) -> Float64Array:
    """(S, N, 2) px from the principal point, where cameras without distortion would see tracks."""
    camera_idx = problem.camera_idx
    from_center_xy = problem.tracks_xy - problem.principal_points_xy[camera_idx, None]
    k, focal_px = problem.distortion[camera_idx], problem.focal_px[camera_idx]
    for frame in np.flatnonzero(k):
        distorted_xy = from_center_xy[frame] / focal_px[frame]
        radius = np.linalg.norm(distorted_xy, axis=1)
        wanted = radius.copy()
        for _ in range(_NEWTON_STEPS):
            slope = 1.0 + 3.0 * k[frame] * radius**2
            radius = radius - (radius * (1.0 + k[frame] * radius**2) - wanted) / slope
        # Where the slope vanishes no radius may fit: what remains shows as a large error.
        from_center_xy[frame] *= (radius / np.maximum(wanted, _MIN_DEPTH))[:, None]
    return np.asarray(from_center_xy)


# -- back -----------------------------------------------------------------------------------------


def in_frame_of_problem(
    solution: Solution, problem: WindowProblem, initial: InitialCameras, is_good: BoolArray
) -> Solution | Refusal:
    """Moves a solution by the similarity that brings its cameras onto the known ones.

    Those are the held ones, where two or more are, else all the initial ones. Held poses are then
    exactly as they were. One held pose determines no scale, only where the window lies.

    Args:
        solution: in any gauge.
        problem: knows held poses.
        initial: what the solution began with.
        is_good: (S,) frames whose poses can be relied on.
    """
    is_initial = np.isfinite(initial.cam_from_world).all(axis=(1, 2)) & is_good
    is_held = problem.is_held & is_good
    anchors = is_held if is_held.sum() >= 2 else is_initial
    if anchors.sum() < 2:
        reason = f"{int(anchors.sum())} frames agree with their tracks"
        return Refusal(status=WindowStatus.INCONSISTENT, reason=reason)
    similarity = similarity_between_poses(
        solution.cam_from_world[anchors], initial.cam_from_world[anchors]
    )
    if similarity is None:
        reason = "all cameras stand in one place"
        return Refusal(status=WindowStatus.NO_PARALLAX, reason=reason)
    moved = pose_in_other_world(solution.cam_from_world, similarity)
    points = transform_points(similarity, solution.points3D_in_world)
    if problem.cam_from_world is not None and problem.is_held.any():
        held_poses = problem.cam_from_world[problem.is_held]
        if problem.is_held.sum() == 1 and is_held.any():
            held_from_moved = compose_poses(invert_pose(held_poses[0]), moved[is_held][0])
            moved = compose_poses(moved, invert_pose(held_from_moved))
            points = transform_points(held_from_moved, points)
        moved[problem.is_held] = held_poses
    return Solution(cam_from_world=moved, focal_px=solution.focal_px, points3D_in_world=points)


def errors_px(problem: WindowProblem, solution: Solution) -> Float64Array:
    """(S, N) reprojection errors in px of the images; infinite where something is missing."""
    camera_idx, focal_px = problem.camera_idx, solution.focal_px
    pose, points = solution.cam_from_world, solution.points3D_in_world
    in_cam = np.einsum("sij,nj->sni", pose[:, :, :3], points) + pose[:, None, :, 3]
    is_known = in_cam[..., 2] > _MIN_DEPTH
    plane_xy = in_cam[..., :2] / np.where(is_known, in_cam[..., 2], 1.0)[..., None]
    given_px = np.where(problem.focal_px > 0.0, problem.focal_px, 1.0)[camera_idx]
    distortion = problem.distortion[camera_idx] * (focal_px / given_px) ** 2
    bend = distortion[:, None] * (plane_xy**2).sum(axis=-1)
    center_xy = problem.principal_points_xy[camera_idx, None]
    projected_xy = (focal_px[:, None] * (1.0 + bend))[..., None] * plane_xy + center_xy
    errors = np.linalg.norm(projected_xy - problem.tracks_xy, axis=-1)
    return np.where(is_known & np.isfinite(errors), errors, np.inf)


def distortion_at_focal(problem: WindowProblem, focal_px: Float64Array) -> Float64Array:
    """(C,) k of each camera at another focal length (C,), for the same distortion in px.

    Tracks are solved without their distortion, which is then the given one wherever they fall.
    """
    ratio = focal_px / np.where(problem.focal_px > 0.0, problem.focal_px, 1.0)
    return np.asarray(problem.distortion * ratio**2)


def agreeing_observations(
    problem: WindowProblem, errors: Float64Array, is_used: BoolArray
) -> tuple[BoolArray, BoolArray]:
    """Observations (S, N) close to their points that have enough of them, and valid frames (S,)."""
    sizes = problem.image_sizes[problem.camera_idx]
    gate_px = MAX_ERROR_PX * np.array([image_scale(*size) for size in sizes.tolist()])
    is_inlier = is_used & (errors <= gate_px[:, None])
    is_inlier &= is_inlier.sum(axis=0) >= MIN_TRACK_LENGTH
    num_inliers = is_inlier.sum(axis=1)
    is_valid = num_inliers >= _MIN_FRAME_INLIERS
    is_valid &= num_inliers >= _MIN_FRAME_INLIER_RATIO * is_used.sum(axis=1)
    return is_inlier, np.asarray(is_valid)
