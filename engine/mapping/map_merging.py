"""Merging maps: the smaller of two is moved into the larger one by a similarity.

What pairs across the maps show is asked of every keyframe that sees the other map (see
``estimators.map_similarity``). The similarity has to be supported by several keyframes on either
side, so that one wrong pair joins nothing. Everything is tried on a copy of the larger map: the
smaller one's keyframes are placed, their matches are triangulated anew, and the copy stays only if
most of them hold in their place and no keyframe there before lost its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.config import RegistrationConfig
from engine.estimators.absolute_pose import estimate_absolute_pose
from engine.estimators.lenses import camera_focal_px, unit_rays
from engine.estimators.map_similarity import (
    MapSimilarity,
    Sights,
    estimate_map_similarity,
    invert_similarity,
)
from engine.geometry import (
    camera_center,
    image_scale,
    pose_in_other_world,
    transform_points,
)
from engine.mapping.growth import GrowthConfig, adjust_in_place, register_and_refine
from engine.mapping.sparse_map import SparseMap
from engine.types import Float64Array, FrameId, Int64Array, RegistrationStatus

_MAX_PROPOSING = 8  # keyframes of either map that propose a similarity
_MIN_PER_KEYFRAME = 8  # keypoints that agree, for a keyframe to support a similarity
_MIN_KEYFRAMES = 2  # of either map that support it
_MIN_INLIERS_PER_REGISTRATION = 1.5  # times the inliers that a single keyframe needs
_INLIER_RATIO_SHARE = 0.6  # of the share of inliers that a single keyframe needs
_ADJUSTED_UP_TO = 80  # keyframes of a merged map that is adjusted at once
_NUM_ADJUSTMENTS = 2
_HELD_RATIO = 0.8  # of the keyframes moved must hold in their place
_KEPT_RATIO = 0.9  # of what the larger map's keyframes observed must remain
_TAKEN_RATIO = 0.5  # of a map's keyframes that must register alone for it to be taken apart
_BETTER_RATIO = 0.8  # of what they observed in it they must observe elsewhere
_MIN_DEPTHS = 4  # that give a keyframe's scale


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MergedMap:
    """A map that holds another one as well, and how it came to."""

    sparse_map: SparseMap
    moved_ids: tuple[FrameId, ...]
    num_inliers: int  # keypoints that agree on how the maps lie; 0: each keyframe came alone


def merge_maps(
    larger: SparseMap,
    smaller: SparseMap,
    *,
    registration: RegistrationConfig,
    config: GrowthConfig,
) -> MergedMap | None:
    """Moves a map into a copy of another one, by what pairs across both show.

    Args:
        larger: holds all keyframes of the smaller map, unregistered, with the pairs across.
        smaller: stays as it is.
        registration: how many keypoints must agree, and how well.
        config: thresholds of growing; its share of inliers counts here, too.

    Returns:
        None when too little agrees on a similarity, or what is moved does not hold.
    """
    similarity = find_similarity(larger, smaller, registration=registration)
    if similarity is None or not _is_sure(similarity, registration=registration, config=config):
        return None
    moved_ids = smaller.registered_ids
    before_ids = larger.registered_ids
    num_before = _num_observations(larger, before_ids)
    merged = larger.copy()
    poses = np.array([smaller.cam_from_world(i) for i in moved_ids])
    placed = pose_in_other_world(poses, similarity.a_from_b)
    merged.place(dict(zip(moved_ids, placed, strict=True)))
    for frame_id in moved_ids:
        merged.triangulate(frame_id)
    if merged.num_registered <= _ADJUSTED_UP_TO:
        for _ in range(_NUM_ADJUSTMENTS):
            adjust_in_place(merged, config=config)
            merged.retriangulate()
        adjust_in_place(merged, config=config)
    else:
        merged.filter_all()
    held = [i for i in moved_ids if _num_points(merged, i) >= registration.min_inliers]
    if (
        len(held) < _HELD_RATIO * len(moved_ids)
        or _num_observations(merged, before_ids) < _KEPT_RATIO * num_before
        or _num_shared(merged, before_ids, held) < registration.min_inliers
    ):
        return None
    merged.deregister([i for i in moved_ids if i not in held])
    return MergedMap(sparse_map=merged, moved_ids=tuple(held), num_inliers=similarity.num_inliers)


def take_apart(larger: SparseMap, smaller: SparseMap, *, config: GrowthConfig) -> MergedMap | None:
    """Registers the keyframes of a map in a copy of another one, each by itself.

    So a map that is wrong, or too weak to be moved as a whole, gives its keyframes up.

    Args:
        larger: holds all keyframes of the smaller map, unregistered, with the pairs across.
        smaller: stays as it is.
        config: thresholds of growing.

    Returns:
        None when few of them find a place, or they see less from there.
    """
    missing = {i: larger.num_visible_points(i) for i in smaller.registered_ids}
    if not any(missing.values()):
        return None
    enough = _TAKEN_RATIO * len(missing)
    merged = larger.copy()
    taken: list[FrameId] = []
    while missing:
        frame_id = max(missing, key=lambda i: (missing[i], -i))
        if missing.pop(frame_id) == 0:
            break
        registration = register_and_refine(merged, frame_id, config=config)
        if registration.status is RegistrationStatus.REGISTERED:
            taken.append(frame_id)
            near = merged.neighbors(frame_id).keys() & missing.keys()
            missing.update({i: merged.num_visible_points(i) for i in sorted(near)})
        elif len(taken) + len(missing) < enough:
            return None
    if len(taken) < enough or (
        _num_observations(merged, taken) < _BETTER_RATIO * _num_observations(smaller, taken)
    ):
        return None
    return MergedMap(sparse_map=merged, moved_ids=tuple(sorted(taken)), num_inliers=0)


def find_similarity(
    larger: SparseMap, smaller: SparseMap, *, registration: RegistrationConfig
) -> MapSimilarity | None:
    """How two maps lie to each other by what pairs across them show, sure or not.

    Args:
        larger: holds all keyframes of the smaller map, unregistered, with the pairs across.
        smaller: the other map.
        registration: how far off a point may be.

    Returns:
        ``a_from_b`` leads from the smaller map to the larger one; None where nothing proposes one.
    """
    pairs = _rows_across(larger, smaller)
    in_larger = _sights(larger, smaller, pairs, registration=registration)
    flipped = {(b, a): rows[:, ::-1] for (a, b), rows in pairs.items()}
    in_smaller = _sights(smaller, larger, flipped, registration=registration)
    if in_larger is None or in_smaller is None:
        return None
    proposals = [
        *_proposals(smaller, larger, flipped, registration=registration),
        *(
            invert_similarity(one)
            for one in _proposals(larger, smaller, pairs, registration=registration)
        ),
    ]
    return estimate_map_similarity(
        proposals,
        sights_in_a=in_larger,
        sights_in_b=in_smaller,
        min_per_keyframe=_MIN_PER_KEYFRAME,
    )


def _is_sure(
    similarity: MapSimilarity, *, registration: RegistrationConfig, config: GrowthConfig
) -> bool:
    min_ratio = _INLIER_RATIO_SHARE * config.min_inlier_ratio
    return (
        similarity.has_scale
        and min(similarity.num_keyframes) >= _MIN_KEYFRAMES
        and similarity.num_inliers >= _MIN_INLIERS_PER_REGISTRATION * registration.min_inliers
        and similarity.num_inliers >= min_ratio * similarity.num_all
    )


Rows = dict[tuple[FrameId, FrameId], Int64Array]  # of keypoints (M, 2), by keyframes


def _rows_across(larger: SparseMap, smaller: SparseMap) -> Rows:
    """Matched keypoints of pairs across, those of the larger map first."""
    rows: Rows = {}
    for frame_id in smaller.registered_ids:
        for other, verified in sorted(larger.neighbors(frame_id).items()):
            if larger.is_registered(other):
                matches = verified.inlier_matches_idx.astype(np.int64)
                is_first = verified.pair.first == other
                rows[other, frame_id] = matches if is_first else matches[:, ::-1]
    return rows


def _sights(
    own: SparseMap, other: SparseMap, pairs: Rows, *, registration: RegistrationConfig
) -> Sights | None:
    """What keyframes of a map see of another map; None: nothing."""
    parts = []
    for (own_id, other_id), rows in pairs.items():
        point3D_ids = other.point3D_ids(other_id)[rows[:, 1]]
        seen = point3D_ids >= 0
        if not seen.any():
            continue
        keyframe = own.keyframe(own_id)
        camera = own.camera(keyframe.calibration_key)
        cam_from_world = own.cam_from_world(own_id)
        rays = unit_rays(camera, keyframe.features.keypoints_xy[rows[seen, 0]])
        num = int(seen.sum())
        bound_px = registration.max_error_px * image_scale(camera.width, camera.height)
        usable = np.isfinite(rays).all(axis=1)
        parts.append(
            Sights(
                keyframe_ids=np.full(num, own_id, np.int64)[usable],
                rows=rows[seen, 0][usable],
                seen_ids=np.full(num, other_id, np.int64)[usable],
                centers=np.tile(camera_center(cam_from_world), (num, 1))[usable],
                rays=(rays @ cam_from_world[:, :3])[usable],
                bounds_rad=np.full(num, bound_px / camera_focal_px(camera))[usable],
                points=other.points3D_in_world(point3D_ids[seen].tolist())[usable],
            )
        )
    return Sights.together(parts) if parts else None


def _proposals(
    own: SparseMap, other: SparseMap, pairs: Rows, *, registration: RegistrationConfig
) -> list[Float64Array]:
    """Similarities other_from_own (3, 4), one of each keyframe that sees enough of the other map.

    The keyframe is posed against the other map; depths of the points that both maps have of its
    keypoints give the scale.
    """
    seen: dict[FrameId, list[tuple[Int64Array, Int64Array]]] = {}
    for (own_id, other_id), rows in pairs.items():
        point3D_ids = other.point3D_ids(other_id)[rows[:, 1]]
        has_point = point3D_ids >= 0
        seen.setdefault(own_id, []).append((rows[has_point, 0], point3D_ids[has_point]))
    counts = {i: sum(len(rows) for rows, _ in parts) for i, parts in seen.items()}
    proposals = []
    for own_id in sorted(counts, key=lambda i: (-counts[i], i))[:_MAX_PROPOSING]:
        rows = np.concatenate([part[0] for part in seen[own_id]])
        point3D_ids = np.concatenate([part[1] for part in seen[own_id]])
        found = _proposal(own, other, own_id, rows, point3D_ids, registration=registration)
        if found is not None:
            proposals.append(found)
    return proposals


def _proposal(
    own: SparseMap,
    other: SparseMap,
    own_id: FrameId,
    rows: Int64Array,
    point3D_ids: Int64Array,
    *,
    registration: RegistrationConfig,
) -> Float64Array | None:
    keyframe = own.keyframe(own_id)
    points = other.points3D_in_world(point3D_ids.tolist())
    pose = estimate_absolute_pose(
        keyframe.features.keypoints_xy[rows],
        points,
        camera=own.camera(keyframe.calibration_key),
        config=registration,
        seed=0,
    )
    if pose is None or pose.num_inliers < _MIN_PER_KEYFRAME:
        return None
    own_ids = own.point3D_ids(own_id)[rows]
    both = pose.inlier_mask & (own_ids >= 0)
    if np.count_nonzero(both) < _MIN_DEPTHS:
        return None
    cam_from_own = own.cam_from_world(own_id)
    own_points = own.points3D_in_world(own_ids[both].tolist())
    distances = np.linalg.norm(transform_points(cam_from_own, own_points), axis=1)
    other_distances = np.linalg.norm(transform_points(pose.cam_from_world, points[both]), axis=1)
    scale = float(np.median(other_distances / np.maximum(distances, 1e-12)))
    if not 0.0 < scale < np.inf:
        return None
    # The camera, and how it is turned, are the same in both worlds.
    linear = scale * pose.cam_from_world[:, :3].T @ cam_from_own[:, :3]
    shift = camera_center(pose.cam_from_world) - linear @ camera_center(cam_from_own)
    return np.column_stack([linear, shift])


def _num_points(sparse_map: SparseMap, frame_id: FrameId) -> int:
    return int(np.count_nonzero(sparse_map.point3D_ids(frame_id) >= 0))


def _num_observations(sparse_map: SparseMap, frame_ids: Sequence[FrameId]) -> int:
    return sum(_num_points(sparse_map, i) for i in frame_ids)


def _num_shared(
    sparse_map: SparseMap, frame_ids: Sequence[FrameId], moved_ids: Sequence[FrameId]
) -> int:
    """Points that keyframes of both sides observe."""

    def seen(ids: Sequence[FrameId]) -> Int64Array:
        observed = [sparse_map.point3D_ids(i) for i in ids]
        return np.unique(np.concatenate(observed)) if observed else np.empty(0, np.int64)

    shared = np.intersect1d(seen(frame_ids), seen(moved_ids))
    return int(np.count_nonzero(shared >= 0))
