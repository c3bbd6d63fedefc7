"""What the dense map is made of: frozen depth problems of settled keyframes, and poses."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.cpu_time import Stage, charged_to
from engine.dense_types import DenseView, DepthProblem, KeyframePoses, first_param
from engine.estimators.lenses import border_rays, intrinsics_of, is_wide
from engine.mapping.model.sparse_map import SparseMap
from engine.types import Float64Array, FrameId, Int64Array

_NO_POINT = -1
_MAX_NEIGHBOURS = 12  # most covisible ones that a problem holds
_MAX_POINTS = 600  # of a keyframe: the mapper waits for their tracks, some milliseconds
_NUM_UNSETTLED = 3  # newest registered keyframes: the next ones still move them


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenseHandout:
    """What the mapper hands out to the dense map, frozen."""

    problem: DepthProblem | None  # None: none waits, or it was not asked for
    image_names: Mapping[FrameId, str]  # of the problem's views
    num_waiting: int  # settled keyframes that have not had their turn, the problem's among them
    poses: KeyframePoses | None  # of the whole map; None: not asked for


@charged_to(Stage.DENSE_DEPTH)
def hand_out(
    sparse_map: SparseMap,
    *,
    done: Collection[FrameId],
    again: Sequence[FrameId] = (),
    is_final: bool = False,
    wants_problem: bool = True,
    wants_new: bool = True,
    wants_poses: bool = False,
) -> DenseHandout:
    """The depth problem of the newest settled keyframe that waits for its turn.

    A keyframe is settled when a few others were registered after it: it was adjusted with them.

    Args:
        sparse_map: the main map.
        done: keyframes that have had their turn.
        again: those of them whose depth is to be made again, in their turn.
        is_final: whether no keyframe follows, so that all are settled.
        wants_problem: whether to hand out a problem, which takes milliseconds to make.
        wants_new: whether it may be of a keyframe that has not had its turn.
        wants_poses: whether to hand out where all keyframes are, which follows the map's size.
    """
    registered = sparse_map.registered_ids
    settled = registered if is_final else registered[:-_NUM_UNSETTLED]
    waiting = [frame_id for frame_id in reversed(settled) if frame_id not in done]
    new, moved = waiting[: int(wants_new)], [i for i in again if sparse_map.is_registered(i)]
    wanted = max([*new, *moved], default=None)
    problem = _problem(sparse_map, wanted) if wants_problem and wanted is not None else None
    views = () if problem is None else (problem.view, *problem.neighbours)
    return DenseHandout(
        problem=problem,
        image_names={one.frame_id: sparse_map.keyframe(one.frame_id).name for one in views},
        num_waiting=len(waiting),
        poses=poses_of(sparse_map) if wants_poses else None,
    )


def poses_of(sparse_map: SparseMap) -> KeyframePoses:
    """Where the registered keyframes of a map are."""
    ids = sparse_map.registered_ids
    keys = [sparse_map.keyframe(i).calibration_key for i in ids]
    cameras = {key: sparse_map.camera(key) for key in set(keys)}
    rays = {key: border_rays(camera) for key, camera in cameras.items()}
    return KeyframePoses(
        frame_ids=np.array(ids, np.int64),
        cam_from_world=np.array([sparse_map.cam_from_world(i) for i in ids]).reshape(-1, 3, 4),
        focal_px=np.array([first_param(cameras[key].params) for key in keys], np.float64),
        border_rays=np.array([rays[key] for key in keys]).reshape(-1, 8, 3),
    )


def _problem(sparse_map: SparseMap, frame_id: FrameId) -> DepthProblem:
    """The problem of a keyframe; its neighbours have those of their points that it sees, too."""
    all_ids = sparse_map.point3D_ids(frame_id)
    rows = np.flatnonzero(all_ids != _NO_POINT)
    rows = rows[:: -(-len(rows) // _MAX_POINTS) or 1]
    ids = all_ids[rows]
    points = sparse_map.points3D_in_world(ids)
    places, others, keypoints = sparse_map.observations(ids).T
    neighbours = []
    for other in _most_frequent(others[others != frame_id])[:_MAX_NEIGHBOURS]:
        seen = np.flatnonzero(others == other)
        shared = places[seen]
        neighbours.append(
            _view(sparse_map, FrameId(other), keypoints[seen], ids[shared], points[shared])
        )
    return DepthProblem(
        view=_view(sparse_map, frame_id, rows, ids, points), neighbours=tuple(neighbours)
    )


def _most_frequent(numbers: Int64Array) -> list[int]:
    """Each number once, the most frequent first, then the smaller one."""
    each, counts = np.unique(numbers, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [int(number) for number in each[order]]


def _view(
    sparse_map: SparseMap,
    frame_id: FrameId,
    rows: Int64Array,
    point3D_ids: Int64Array,
    points3D_in_world: Float64Array,
) -> DenseView:
    """A keyframe with some keypoints (M,) and the points that they observe, (M,) and (M, 3)."""
    keyframe = sparse_map.keyframe(frame_id)
    camera = sparse_map.camera(keyframe.calibration_key)
    return DenseView(
        frame_id=frame_id,
        intrinsics=intrinsics_of(camera, is_wide=is_wide(camera)),
        cam_from_world=sparse_map.cam_from_world(frame_id),
        points3D_ids=point3D_ids,
        keypoints_xy=keyframe.features.keypoints_xy[rows],
        points3D_in_world=points3D_in_world,
    )
