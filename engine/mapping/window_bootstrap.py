"""A first map from a window, where no pair of keyframes gives one.

Sparse photos and slow starts have pairs that are all too weak to begin with: too narrow, too flat,
or too few matches. Many of them together can be enough. (VGGSfM solves all frames of a window at
once: Wang, Karaev, Rupprecht and Novotny, CVPR 2024.)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from engine.config import InitializationConfig
from engine.events import WindowPurpose
from engine.mapping.growth import BuiltMap, GrowthConfig, adjust_in_place, grow_fully
from engine.mapping.initial_camera import with_focal_length
from engine.mapping.sparse_map import SparseMap
from engine.mapping.window_selection import Window, WindowJob, window_problem
from engine.matching.scene_graph import SceneGraph
from engine.ports import WindowSolver
from engine.types import FrameId, VerifiedPair
from engine.window_types import WindowEstimate, WindowStatus

_MIN_VALID = 5  # keyframes that the window poses: with fewer a pair does as well
_POINTS_PER_INLIER = 3  # of those that a first pair needs: a window sees more


def bootstrap_map(
    graph: SceneGraph,
    pairs: Sequence[VerifiedPair],
    *,
    new_map: Callable[[], SparseMap],
    unknown_cameras: Collection[str],
    size: int,
    solve: WindowSolver,
    config: GrowthConfig,
) -> BuiltMap | None:
    """Builds a map from a window of the best connected keyframes.

    Args:
        graph: knows keyframes.
        pairs: verified pairs that may be used.
        new_map: makes a map with all keyframes and pairs, none registered.
        unknown_cameras: keys of cameras whose focal length the window has to find.
        size: keyframes of the window at most.
        solve: solves windows.
        config: thresholds.

    Returns:
        None when the window cannot be solved, or what grows from it is no sound map.
    """
    frame_ids = _best_connected(pairs, size=size)
    if len(frame_ids) < _MIN_VALID:
        return None
    sparse_map = new_map()
    window = Window(
        frame_ids=tuple(i for i in graph.keyframe_ids if i in frame_ids),
        free_ids=frozenset(frame_ids),
        purpose=WindowPurpose.BOOTSTRAP,
    )
    problem = window_problem(graph, sparse_map, window, unknown_cameras=unknown_cameras)
    if problem is None:
        return None
    job = WindowJob(window=window, problem=problem, started_s=time.monotonic())
    estimate = solve(problem)
    if estimate.status is not WindowStatus.SOLVED or estimate.is_valid.sum() < _MIN_VALID:
        return None
    _begin(sparse_map, graph, job, estimate, unknown_cameras=unknown_cameras)
    grow_fully(sparse_map, config=config)
    adjust_in_place(sparse_map, config=config)
    if not _is_sound(sparse_map, config.initialization):
        return None
    strongest = max(_among(pairs, frame_ids), key=lambda pair: (pair.num_inliers, pair.pair))
    return BuiltMap(sparse_map=sparse_map, pair=strongest.pair, initial=None)


def _begin(
    sparse_map: SparseMap,
    graph: SceneGraph,
    job: WindowJob,
    estimate: WindowEstimate,
    *,
    unknown_cameras: Collection[str],
) -> None:
    """Takes over what the window found: focal lengths and poses; then triangulates."""
    frame_ids = job.window.frame_ids
    for frame_id, camera_idx in zip(frame_ids, job.problem.camera_idx, strict=True):
        camera_key = graph.keyframe(frame_id).camera_key
        if camera_key in unknown_cameras:
            focal_px = float(estimate.focal_px[camera_idx])
            params = with_focal_length(sparse_map.camera(camera_key), focal_px)
            sparse_map.set_camera_params(camera_key, params)
    valid = [idx for idx in range(len(frame_ids)) if estimate.is_valid[idx]]
    sparse_map.place({frame_ids[idx]: estimate.cam_from_world[idx] for idx in valid})
    for idx in valid:
        sparse_map.triangulate(frame_ids[idx])
    sparse_map.filter_all()


def _is_sound(sparse_map: SparseMap, settings: InitializationConfig) -> bool:
    return (
        sparse_map.num_registered >= _MIN_VALID
        and sparse_map.num_points3D >= _POINTS_PER_INLIER * settings.min_inliers
    )


def _best_connected(pairs: Sequence[VerifiedPair], *, size: int) -> set[FrameId]:
    """Keyframes joined one by one to the strongest pair, each by most inliers to those before."""
    if not pairs:
        return set()
    strongest = max(pairs, key=lambda pair: (pair.initial_pair_score, pair.pair)).pair
    chosen = {strongest.first, strongest.second}
    while len(chosen) < size:
        links: Counter[FrameId] = Counter()
        for pair in pairs:
            ends = {pair.pair.first, pair.pair.second}
            if len(ends & chosen) == 1:
                links[(ends - chosen).pop()] += pair.num_inliers
        if not links:
            break
        chosen.add(max(links, key=lambda i: (links[i], -i)))
    return chosen


def _among(pairs: Sequence[VerifiedPair], frame_ids: Collection[FrameId]) -> list[VerifiedPair]:
    return [pair for pair in pairs if {pair.pair.first, pair.pair.second} <= set(frame_ids)]
