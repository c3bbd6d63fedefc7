"""Windows of the growing map: which keyframes they hold, and the problem that the solver gets.

A window is solved on arrays of its own, on any thread. Its result changes the map only where that
makes it better: by keyframes it brings in, or by how well the window's keypoints agree with it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pycolmap

from engine.config import WindowConfig
from engine.estimators.lenses import camera_focal_px, principal_point, unit_rays, uses_rays
from engine.events import WindowPurpose
from engine.mapping.model.sparse_map import SparseMap
from engine.matching.scene_graph import SceneGraph
from engine.types import NO_ROW, Float64Array, FrameId, Int64Array, VerifiedPair
from engine.window_types import WindowEstimate, WindowProblem
from engine.windows.tracks import tracks_through

_MIN_TRACK_LENGTH = 3  # two views agree with anything on their epipolar line
_MAX_INTERVALS = 4  # between windows that change nothing
# Times the median error of the keyframes. By content and blur alone some have 1.4 times as much;
# solving those again changes hardly anything.
_WEAK_RATIO = 1.5
_NUM_COMPARED = 8  # keyframes all over the map, by which the newest ones fit well or badly
_MIN_HELD = 2  # one keyframe fixes no scale
_MIN_COSINE = 0.5  # of a wide lens's rays with its axis: errors in px grow by its inverse square


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Keyframes to be solved as a whole."""

    frame_ids: tuple[FrameId, ...]  # (S,) in order of arrival
    free_ids: frozenset[FrameId]  # those whose poses may change, or are wanted
    purpose: WindowPurpose


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowJob:
    """A window on its way through the solver; owned by one thread at a time."""

    window: Window
    problem: WindowProblem
    started_s: float  # monotonic


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SolvedWindow:
    """A window that came back from the solver."""

    job: WindowJob
    estimate: WindowEstimate


class WindowSchedule:
    """Decides when the newest keyframes are solved again.

    Windows of a map that they do not make better come less and less often.
    """

    def __init__(self, config: WindowConfig) -> None:
        self._config = config
        self._num_keyframes_at_last = 0
        self._interval = config.interval

    def should(self, num_keyframes: int) -> bool:
        """Whether enough keyframes came since the last window."""
        return (
            self._config.enabled
            and num_keyframes >= self._config.min_keyframes
            and num_keyframes - self._num_keyframes_at_last >= self._interval
        )

    def done(self, num_keyframes: int) -> None:
        """Takes this number of keyframes as that of the latest window."""
        self._num_keyframes_at_last = num_keyframes

    def adapt(self, *, made_better: bool) -> None:
        """Makes the next window come sooner when the latest one made the map better, else later."""
        config = self._config
        longest = _MAX_INTERVALS * config.interval
        self._interval = config.interval if made_better else min(2 * self._interval, longest)


def newest_window(graph: SceneGraph, sparse_map: SparseMap, *, config: WindowConfig) -> Window:
    """The last keyframes, and the older registered ones that share most with them.

    Those of other maps than this one are left out.
    """
    newest = [i for i in graph.keyframe_ids if not graph.map_number(i)][-config.size :]
    return _with_older(
        graph, sparse_map, newest, limit=config.num_older, purpose=WindowPurpose.RESOLVE
    )


def is_needed(sparse_map: SparseMap, window: Window, *, config: WindowConfig) -> bool:
    """Whether a window may make the map better: it misses keyframes, or some fit it badly.

    The mean agreement of the window's free keyframes with the map (see `SparseMap.agreement`) is
    compared with the median of others, which stand all over the map and beside the window.

    Args:
        sparse_map: the map.
        window: of the newest keyframes.
        config: how much worse is badly.
    """
    missing = [i for i in window.free_ids if not sparse_map.is_registered(i)]
    if any(sparse_map.neighbors(i) for i in missing):
        return True
    own = [sparse_map.agreement(i) for i in window.free_ids.difference(missing)]
    beside = [i for i in window.frame_ids if i not in window.free_ids]
    all_over = sparse_map.registered_ids
    all_over = all_over[:: max(1, len(all_over) // _NUM_COMPARED)]
    others = [sparse_map.agreement(i) for i in {*beside, *all_over} - window.free_ids]
    if not (own and others):
        return True
    return float(np.mean(own)) < config.weak_fit_ratio * float(np.median(others))


def missing_windows(
    graph: SceneGraph, sparse_map: SparseMap, *, config: WindowConfig
) -> list[Window]:
    """Windows of the keyframes that all maps miss, each with those of the map that know them."""
    missing = [
        i for i in graph.connected_ids if not (sparse_map.is_registered(i) or graph.map_number(i))
    ]
    return [
        _with_older(
            graph,
            sparse_map,
            missing[k : k + config.size],
            limit=config.size,
            purpose=WindowPurpose.RESCUE,
        )
        for k in range(0, len(missing), config.size)
    ]


def worst_window(
    graph: SceneGraph,
    sparse_map: SparseMap,
    *,
    config: WindowConfig,
    tried: Collection[FrameId],
) -> Window | None:
    """A window around the keyframe that fits worst of those not tried; None when all fit well.

    One with a mean error of more than 1.5 times the median of the keyframes does not fit well. It
    stands in the middle of its free neighbours in order of arrival.

    Args:
        graph: chooses older keyframes.
        sparse_map: the map.
        config: sizes.
        tried: keyframes that stood in such a window before.
    """
    registered = sparse_map.registered_ids
    errors = {i: sparse_map.fit([i]).mean_error_px for i in registered}
    weak = _WEAK_RATIO * float(np.median(list(errors.values()))) if errors else 0.0
    candidates = [i for i in registered if i not in tried and errors[i] > weak]
    if not candidates:
        return None
    worst = registered.index(max(candidates, key=lambda i: (errors[i], i)))
    first = max(0, min(worst - config.size // 2, len(registered) - config.size))
    return _with_older(
        graph,
        sparse_map,
        registered[first : first + config.size],
        limit=config.num_older,
        purpose=WindowPurpose.FINAL,
    )


def make_job(graph: SceneGraph, sparse_map: SparseMap, window: Window) -> WindowJob | None:
    """The problem of a window; None when its result could not be placed in the map.

    Registered keyframes keep their poses, but for the free ones.
    """
    problem = window_problem(graph, sparse_map, window)
    if problem is None or problem.is_held.sum() < _MIN_HELD:
        return None
    return WindowJob(window=window, problem=problem, started_s=time.monotonic())


def window_problem(
    graph: SceneGraph,
    sparse_map: SparseMap,
    window: Window,
    *,
    unknown_cameras: Collection[str] = (),
) -> WindowProblem | None:
    """The problem that the solver gets for a window; None without tracks.

    Cameras are taken as the map has them, and keypoints without their lens distortion, so every
    camera model is solved alike. The solver finds the focal lengths of unknown cameras.
    """
    frame_ids = window.frame_ids
    rows = tracks_through(
        frame_ids, _pairs_among(sparse_map, frame_ids), min_length=_MIN_TRACK_LENGTH
    )
    if not len(rows):
        return None
    keys = [graph.keyframe(i).calibration_key for i in frame_ids]
    camera_keys = list(dict.fromkeys(keys))
    cameras = [sparse_map.camera(key) for key in camera_keys]
    is_known = np.array([key not in unknown_cameras for key in camera_keys])
    focal_px = np.array([camera_focal_px(camera) for camera in cameras])
    return WindowProblem(
        tracks_xy=_undistorted_tracks(graph, sparse_map, frame_ids, rows),
        is_visible=(rows != NO_ROW).T,
        image_sizes=np.array([(camera.width, camera.height) for camera in cameras]),
        camera_idx=np.array([camera_keys.index(key) for key in keys]),
        focal_px=np.where(is_known, focal_px, 0.0),
        principal_points_xy=np.array([principal_point(camera) for camera in cameras]),
        is_calibrated=is_known,
        cam_from_world=np.array([_pose_or_nan(sparse_map, i) for i in frame_ids]),
        is_held=np.array(
            [sparse_map.is_registered(i) and i not in window.free_ids for i in frame_ids]
        ),
        image_names=tuple(graph.keyframe(i).name for i in frame_ids),
    )


def _with_older(
    graph: SceneGraph,
    sparse_map: SparseMap,
    free_ids: Sequence[FrameId],
    *,
    limit: int,
    purpose: WindowPurpose,
) -> Window:
    """Keyframes, and up to ``limit`` others of the map with most matches to them."""
    free = frozenset(free_ids)
    totals: Counter[FrameId] = Counter()
    for frame_id in free_ids:
        for other, pair in sparse_map.neighbors(frame_id).items():
            if other not in free and sparse_map.is_registered(other):
                totals[other] += pair.num_inliers
    held = sorted(totals, key=lambda i: (-totals[i], i))[:limit]
    chosen = free.union(held)
    return Window(
        frame_ids=tuple(i for i in graph.keyframe_ids if i in chosen),
        free_ids=free,
        purpose=purpose,
    )


def _pairs_among(sparse_map: SparseMap, frame_ids: Sequence[FrameId]) -> list[VerifiedPair]:
    """The pairs of a window; those that misled the map before are not among its neighbours."""
    inside = set(frame_ids)
    return [
        pair
        for frame_id in frame_ids
        for other, pair in sparse_map.neighbors(frame_id).items()
        if frame_id < other and other in inside
    ]


def _undistorted_tracks(
    graph: SceneGraph, sparse_map: SparseMap, frame_ids: Sequence[FrameId], rows: Int64Array
) -> Float64Array:
    """Tracks (S, N, 2) in px of pinhole cameras; NaN where they are not seen."""
    tracks_xy = np.full((len(frame_ids), len(rows), 2), np.nan)
    for idx, frame_id in enumerate(frame_ids):
        keyframe = graph.keyframe(frame_id)
        camera = sparse_map.camera(keyframe.calibration_key)
        seen = rows[:, idx] != NO_ROW
        points_xy = keyframe.features.keypoints_xy[rows[seen, idx]]
        tracks_xy[idx, seen] = _without_distortion(camera, points_xy)
    return tracks_xy


def _without_distortion(camera: pycolmap.Camera, points_xy: Float64Array) -> Float64Array:
    """Where a pinhole camera of the same focal length would see points (M, 2), px.

    NaN where a wide lens sees so far from its axis that errors there have little to do with px.
    """
    if not uses_rays(camera):
        plane_xy = np.asarray(camera.cam_from_img(points_xy))
        return np.asarray(camera.mean_focal_length() * plane_xy + principal_point(camera))
    rays = unit_rays(camera, points_xy)
    rays[~(rays[:, 2] > _MIN_COSINE)] = np.nan
    plane_xy = rays[:, :2] / rays[:, 2:]
    return np.asarray(camera_focal_px(camera) * plane_xy + principal_point(camera))


def _pose_or_nan(sparse_map: SparseMap, frame_id: FrameId) -> Float64Array:
    if sparse_map.is_registered(frame_id):
        return sparse_map.cam_from_world(frame_id)
    return np.full((3, 4), np.nan)
