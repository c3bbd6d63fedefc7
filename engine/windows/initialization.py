"""Window initialization: the first poses from tracks alone, and those of frames without one.

The pair of frames with the most evidence of depth is related by two-view geometry; then every frame
that sees enough of the points so far is posed against them, and the points grow with the frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.config import RegistrationConfig, TwoViewConfig
from engine.estimators.absolute_pose import estimate_absolute_pose
from engine.estimators.two_view_geometry import (
    RelativePose,
    VerifiedMatches,
    estimate_focal_length,
    estimate_relative_pose,
    verify_matches,
)
from engine.geometry import rotation_between
from engine.types import (
    BoolArray,
    Float64Array,
    FrameId,
    ImagePair,
    Int64Array,
    PairMatches,
    PairReason,
    VerifiedPair,
)
from engine.window_types import ASSUMED_FOCAL_RATIO, WindowStatus
from engine.windows.adjustment import adjust_window, filter_observations
from engine.windows.model import WindowModel, WindowSolverConfig
from engine.windows.triangulation import triangulate_window

_NUM_PAIRS_VERIFIED = 30
_MAX_RESIDUAL_RATIO = 0.02  # of the image edge: deviation from a plane's motion beyond is as good
_WIDE_RAD = 0.15  # a median triangulation angle beyond is as good
_SEARCHED_FOCAL_RATIOS = np.geomspace(0.5, 2.0, 15)  # of a focal length that is not calibrated
_GROWTH_UNTIL_ADJUSTMENT = 1.3
_ALIKE = 0.6  # frames that see this share of what the best one sees are posed with it


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pair:
    """Two frames and their verified matches."""

    first: int
    second: int
    verified: VerifiedMatches

    @property
    def num_inliers(self) -> int:
        return len(self.verified.inliers)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _InitialPair:
    pair: _Pair
    pose: RelativePose

    @property
    def score(self) -> float:
        angle = self.pose.median_triangulation_angle_rad
        return self.pose.num_inliers * min(angle / _WIDE_RAD, 1.0)


def initialize_window(
    model: WindowModel, config: WindowSolverConfig
) -> tuple[WindowStatus, str] | None:
    """Poses as many frames as possible from the tracks alone, in place, and makes their points.

    Unknown focal lengths are estimated first. The first frame of the initial pair is the origin,
    the distance to the second the unit.

    Returns:
        None on success, else the status and the reason why there is no initial pair.
    """
    model.reset()
    pairs = verified_pairs(model, config)
    if not pairs:
        return WindowStatus.NO_INITIAL_PAIR, "no two frames are related by enough tracks"
    best = _best_initial_pair(model, pairs, config)
    if best is None:
        return (
            WindowStatus.NO_PARALLAX,
            f"none of {len(pairs)} pairs shows more than a turn on the spot",
        )
    angle_deg = float(np.degrees(best.pose.median_triangulation_angle_rad))
    if angle_deg < config.min_parallax_deg:
        return (
            WindowStatus.NO_PARALLAX,
            f"the widest pair sees its points under {angle_deg:.2f} deg",
        )
    _start_from(model, best)
    grow_window(model, config)
    return None


# -- pairs ----------------------------------------------------------------------------------------


def verified_pairs(model: WindowModel, config: WindowSolverConfig) -> list[_Pair]:
    """The pairs with most depth that one epipolar geometry explains, in order of their score."""
    num_frames, num_tracks = model.problem.num_frames, model.problem.num_tracks
    row_of = np.full((num_frames, num_tracks), -1)
    row_of[model.frame_idx, model.track_idx] = np.arange(len(model.frame_idx))
    sees = (row_of >= 0).astype(np.float32)
    shared = np.triu(sees @ sees.T, k=1)
    scored = []
    for first, second in np.argwhere(shared >= config.min_pair_tracks).tolist():
        both = np.flatnonzero((row_of[first] >= 0) & (row_of[second] >= 0))
        points1_xy = model.points_xy[row_of[first, both]]
        points2_xy = model.points_xy[row_of[second, both]]
        scored.append((_depth_score(model, points1_xy, points2_xy), first, second, both))
    scored.sort(key=lambda row: row[:3], reverse=True)
    verification = TwoViewConfig(min_inliers=config.min_pair_tracks)
    pairs = []
    for _, first, second, both in scored[:_NUM_PAIRS_VERIFIED]:
        width, height = model.problem.image_sizes[model.problem.camera_idx[first]].tolist()
        verified = verify_matches(
            _matches(model, first, second, row_of[[first, second]][:, both]),
            image_size=(width, height),
            config=verification,
        )
        if verified is not None:
            pairs.append(_Pair(first=first, second=second, verified=verified))
    return pairs


def _depth_score(model: WindowModel, points1_xy: Float64Array, points2_xy: Float64Array) -> float:
    """How much depth a pair is likely to show: the residual of an affine motion, times points."""
    design = np.column_stack([points1_xy / (1000.0 * model.scale), np.ones(len(points1_xy))])
    try:
        motion, *_ = np.linalg.lstsq(design, points2_xy, rcond=None)
    except np.linalg.LinAlgError:
        return 0.0
    residual_px = float(np.median(np.linalg.norm(design @ motion - points2_xy, axis=1)))
    residual_ratio = residual_px / (1000.0 * model.scale)
    return len(points1_xy) * min(residual_ratio, _MAX_RESIDUAL_RATIO)


def _matches(model: WindowModel, first: int, second: int, rows: Int64Array) -> PairMatches:
    """The matches of two frames from observations (2, M)."""
    num = rows.shape[1]
    return PairMatches(
        pair=ImagePair(FrameId(first + 1), FrameId(second + 1)),
        matches_idx=np.repeat(np.arange(num)[:, None], 2, axis=1),
        points1_xy=model.points_xy[rows[0]],
        points2_xy=model.points_xy[rows[1]],
        confidence=np.ones(num, np.float32),
    )


def guess_focal_lengths(
    model: WindowModel, pairs: list[_Pair], *, doubts_given: bool = False
) -> None:
    """Guesses focal lengths from fundamental matrices; cameras of one image size share the guess.

    Args:
        model: the window.
        pairs: verified pairs.
        doubts_given: whether cameras that come with a focal length get another one, too, where
            the pairs determine one; calibrated ones never do.
    """
    sizes, focal_px = model.problem.image_sizes, model.focal_px.copy()
    may_change = (focal_px <= 0) | (doubts_given & ~model.problem.is_calibrated)
    for size in np.unique(sizes[may_change], axis=0):
        cameras = may_change & (sizes == size).all(axis=1)
        own = cameras[model.problem.camera_idx]
        views = [_as_verified(pair) for pair in pairs if own[pair.first] and own[pair.second]]
        width, height = size.tolist()
        found = estimate_focal_length(views, width=width, height=height)
        if found is not None:
            focal_px[cameras] = found
        else:
            focal_px[cameras & (focal_px <= 0)] = ASSUMED_FOCAL_RATIO * max(width, height)
    model.set_intrinsics(focal_px, model.distortion)


def _best_initial_pair(
    model: WindowModel, pairs: list[_Pair], config: WindowSolverConfig
) -> _InitialPair | None:
    """The pair with most depth, under the given focal lengths or those the pairs determine."""
    guess_focal_lengths(model, pairs)
    given_px = model.focal_px
    best = _widest_pair(model, pairs, config)
    guess_focal_lengths(model, pairs, doubts_given=True)
    if (model.focal_px == given_px).all():
        return best
    other = _widest_pair(model, pairs, config)
    if other is not None and (best is None or other.score > best.score):
        return other
    model.set_intrinsics(given_px, model.distortion)
    return best


def _as_verified(pair: _Pair) -> VerifiedPair:
    inliers = pair.verified.inliers
    return VerifiedPair(
        pair=inliers.pair,
        reason=PairReason.EXHAUSTIVE,
        inlier_matches_idx=inliers.matches_idx.astype(np.uint32),
        num_matches=len(inliers),
        fundamental=pair.verified.fundamental,
        homography_inlier_ratio=pair.verified.homography_inlier_ratio,
    )


def _widest_pair(
    model: WindowModel, pairs: list[_Pair], config: WindowSolverConfig
) -> _InitialPair | None:
    """The pair of the best initial score among those likely to show most depth."""

    def evidence(pair: _Pair) -> float:
        return pair.num_inliers * (1.05 - pair.verified.homography_inlier_ratio)

    found = []
    for pair in sorted(pairs, key=evidence, reverse=True)[: config.num_initial_pairs]:
        camera1, camera2 = (
            model.camera(int(model.problem.camera_idx[idx])) for idx in (pair.first, pair.second)
        )
        pose = estimate_relative_pose(
            pair.verified.inliers.points1_xy,
            pair.verified.inliers.points2_xy,
            camera1=camera1,
            camera2=camera2,
            max_error_px=config.max_error_px * model.scale,
            seed=config.seed,
        )
        if (
            pose is not None
            and pose.num_inliers >= config.min_pair_tracks
            and _rotation_residual_px(model, pair) > config.min_rotation_residual_px * model.scale
        ):
            found.append(_InitialPair(pair=pair, pose=pose))
    return max(found, key=lambda initial: initial.score, default=None)


def _rotation_residual_px(model: WindowModel, pair: _Pair) -> float:
    """The median residual in px of a pair's matches under a pure rotation.

    Under a wrong focal length a rotation resembles a translation in a scene with depth, so other
    ones are tried for cameras that are not calibrated.
    """
    inliers, idx = pair.verified.inliers, model.problem.camera_idx[[pair.first, pair.second]]
    centers_xy, focal_px = model.problem.principal_points_xy[idx], model.focal_px[idx]
    is_known = model.problem.is_calibrated[idx].all()
    residuals_px: list[float] = []
    for ratio in (1.0,) if is_known else _SEARCHED_FOCAL_RATIOS:
        rays1, rays2 = (
            _unit_rays((points_xy - center_xy) / (ratio * focal))
            for points_xy, center_xy, focal in zip(
                (inliers.points1_xy, inliers.points2_xy), centers_xy, focal_px, strict=True
            )
        )
        rotation = rotation_between(rays1, rays2)
        if rotation is None:
            continue
        angles = np.linalg.norm(rays2 - rays1 @ rotation.T, axis=1)
        residuals_px.append(float(np.median(angles) * ratio * focal_px[1]))
    return min(residuals_px, default=0.0)


def _unit_rays(plane_xy: Float64Array) -> Float64Array:
    rays = np.column_stack([plane_xy, np.ones(len(plane_xy))])
    return np.asarray(rays / np.linalg.norm(rays, axis=1, keepdims=True))


def _start_from(model: WindowModel, initial: _InitialPair) -> None:
    for idx, pose in (
        (initial.pair.first, np.eye(3, 4)),
        (initial.pair.second, initial.pose.cam2_from_cam1),
    ):
        model.cam_from_world[idx] = pose
        model.is_posed[idx] = True


# -- growth ---------------------------------------------------------------------------------------


def grow_window(model: WindowModel, config: WindowSolverConfig) -> None:
    """Poses frames against the points of those that are posed, as long as that succeeds."""
    num_adjusted = 0
    while True:
        find_points(model, config)
        num_posed = int(model.is_posed.sum())
        if num_posed >= _GROWTH_UNTIL_ADJUSTMENT * num_adjusted:
            adjust_coarsely(model, config)
            find_points(model, config)
            num_adjusted = num_posed
        if model.is_posed.all() or not _pose_more(model, config):
            break
    if num_posed > num_adjusted:
        adjust_coarsely(model, config)
        find_points(model, config)


def find_points(model: WindowModel, config: WindowSolverConfig) -> None:
    """Triangulates with poses that are close, and filters observations by twice the final gate."""
    max_error_px = 2.0 * config.max_error_px
    triangulate_window(model, max_angle_rad=angle_of(model, max_error_px), config=config)
    filter_observations(model, max_error_px=max_error_px, config=config, min_length=2)


def angle_of(model: WindowModel, error_px: float) -> float:
    """The angle that pixels of a 1000 px image make in the middle of the images, in radians."""
    return float(np.arctan(error_px * model.scale / np.median(model.focal_px)))


def adjust_coarsely(model: WindowModel, config: WindowSolverConfig) -> None:
    """Refines poses and points by the longest tracks only."""
    adjust_window(
        model,
        config=config,
        max_iterations=config.max_coarse_iterations,
        which=longest_tracks(model, per_frame=config.tracks_per_frame),
    )


def longest_tracks(model: WindowModel, *, per_frame: int) -> BoolArray:
    """(N,) whether a track is among the longest ``per_frame`` of one of its frames."""
    rows = np.flatnonzero(model.is_inlier)
    lengths = model.track_lengths()[model.track_idx[rows]]
    frame = model.frame_idx[rows]
    order = np.lexsort((model.track_idx[rows], -lengths, frame))
    _, starts, counts = np.unique(frame[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(starts, counts)
    chosen = np.zeros(model.problem.num_tracks, np.bool_)
    chosen[model.track_idx[rows[order[rank < per_frame]]]] = True
    return chosen


def _pose_more(model: WindowModel, config: WindowSolverConfig) -> bool:
    """Poses those frames that see most of the points; returns whether there was one."""
    sees_point = model.has_point[model.track_idx]
    num_points = np.bincount(model.frame_idx[sees_point], minlength=model.problem.num_frames)
    num_points[model.is_posed] = 0
    best = num_points.max()
    found = False
    for idx in np.argsort(-num_points, kind="stable").tolist():
        if num_points[idx] < config.min_frame_inliers or (
            found and num_points[idx] < _ALIKE * best
        ):
            break
        found |= pose_frame(model, idx, config)
    return found


def pose_frame(model: WindowModel, idx: int, config: WindowSolverConfig) -> bool:
    """Poses one frame against the points it sees; returns whether enough of them agree."""
    rows = np.flatnonzero((model.frame_idx == idx) & model.has_point[model.track_idx])
    pose = estimate_absolute_pose(
        model.points_xy[rows],
        model.points3D_in_world[model.track_idx[rows]],
        camera=model.camera(int(model.problem.camera_idx[idx])),
        config=RegistrationConfig(
            max_error_px=2.0 * config.max_error_px, min_inlier_ratio=config.min_frame_inlier_ratio
        ),
        seed=config.seed,
    )
    if pose is None or pose.num_inliers < max(
        config.min_frame_inliers, config.min_frame_inlier_ratio * len(rows)
    ):
        return False
    model.cam_from_world[idx] = pose.cam_from_world
    model.is_posed[idx] = True
    return True
