"""Joining maps: what a former map holds moves into a new one, all at once.

A new map that starts from better pairs may see too little of each keyframe of the former one to
register it alone. The former map knows how its keyframes lie to each other, though, and a keyframe
in both maps fixes all but the scale between them. A single scale has to explain what the keyframes
to be moved see of the new map: far fewer matches prove one number than a pose of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.config import RegistrationConfig
from engine.estimators.lenses import camera_focal_px, unit_rays
from engine.geometry import compose_poses, image_scale, invert_pose
from engine.mapping.model.growth import GrowthConfig, adjust_in_place, grow_fully
from engine.mapping.model.sparse_map import SparseMap
from engine.types import BoolArray, Float64Array, FrameId, Int64Array

_MAX_SCALES = 200  # tried, spread over those that single matches ask for
_OTHER_SCALES = (1.0 / 1.5, 1.5)  # that must explain less
_LEFT_RATIO = 0.5  # of the inliers, that other scales may explain
_NUM_ADJUSTMENTS = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sights:
    """Matches of keyframes to be moved with points of the new map, in cameras at scale s.

    A point is seen at ``offsets + s * baselines``, in the direction of ``rays``.
    """

    frame_ids: Int64Array  # (N,)
    rows: Int64Array  # (N,) of keypoints
    rays: Float64Array  # (N, 3) unit
    offsets: Float64Array  # (N, 3)
    baselines: Float64Array  # (N, 3)
    bounds_rad: Float64Array  # (N,)

    def agreeing(self, scale: float) -> BoolArray:
        """Which matches (N,) a scale explains."""
        points = self.offsets + scale * self.baselines
        off = np.linalg.norm(np.cross(self.rays, points), axis=1)
        along = (self.rays * points).sum(axis=1)
        with np.errstate(invalid="ignore"):
            return np.asarray(np.arctan2(off, along) < self.bounds_rad)

    def num_keypoints(self, mask: BoolArray) -> int:
        """Keypoints among some matches (N,); a keypoint may match several points."""
        return len(np.unique(np.column_stack([self.frame_ids[mask], self.rows[mask]]), axis=0))


def join_former(
    sparse_map: SparseMap,
    former: SparseMap,
    *,
    registration: RegistrationConfig,
    config: GrowthConfig,
) -> list[FrameId]:
    """Moves keyframes into a map that only a former map holds, and adjusts and grows the map.

    Args:
        sparse_map: gets them.
        former: holds at least one keyframe that the map holds, too.
        registration: how many keypoints of all of them must agree with points of the map, and how
            well.
        config: thresholds of growing; its share of inliers counts here, too.

    Returns:
        The keyframes moved, none when the maps share too little.
    """
    anchor = _anchor(sparse_map, former)
    missing = [i for i in former.registered_ids if not sparse_map.is_registered(i)]
    if anchor is None or not missing:
        return []
    sights = _sights(
        sparse_map, former, missing, anchor=anchor, max_error_px=registration.max_error_px
    )
    min_inliers = registration.min_inliers
    scale = _scale(sights, min_inliers=min_inliers, min_inlier_ratio=config.min_inlier_ratio)
    if scale is None:
        return []
    anchor_from_world = sparse_map.cam_from_world(anchor)
    poses = {}
    for frame_id in missing:
        cam_from_anchor = _relative(former, frame_id, anchor=anchor)
        cam_from_anchor[:, 3] *= scale
        poses[frame_id] = compose_poses(cam_from_anchor, anchor_from_world)
    sparse_map.place(poses)
    for frame_id in missing:
        sparse_map.triangulate(frame_id)
    for _ in range(_NUM_ADJUSTMENTS):
        adjust_in_place(sparse_map, config=config)
        sparse_map.retriangulate()
    adrift = [i for i in missing if np.count_nonzero(sparse_map.point3D_ids(i) >= 0) < min_inliers]
    sparse_map.deregister(adrift)
    grow_fully(sparse_map, config=config)
    adjust_in_place(sparse_map, config=config)
    return [i for i in missing if sparse_map.is_registered(i)]


def _anchor(sparse_map: SparseMap, former: SparseMap) -> FrameId | None:
    """The keyframe of both maps that is tied best to both."""
    common = [i for i in sparse_map.registered_ids if former.is_registered(i)]

    def num_tied(frame_id: FrameId) -> int:
        return min(
            int(np.count_nonzero(one.point3D_ids(frame_id) >= 0)) for one in (sparse_map, former)
        )

    return max(common, key=lambda i: (num_tied(i), -i), default=None)


def _relative(former: SparseMap, frame_id: FrameId, *, anchor: FrameId) -> Float64Array:
    """cam_from_anchor (3, 4), in the former map's unit."""
    anchor_from_world = former.cam_from_world(anchor)
    return compose_poses(former.cam_from_world(frame_id), invert_pose(anchor_from_world))


def _sights(
    sparse_map: SparseMap,
    former: SparseMap,
    missing: list[FrameId],
    *,
    anchor: FrameId,
    max_error_px: float,
) -> _Sights:
    anchor_from_world = sparse_map.cam_from_world(anchor)
    parts = []
    for frame_id in missing:
        rows, point3D_ids = sparse_map.visible_points(frame_id)
        keyframe = sparse_map.keyframe(frame_id)
        camera = sparse_map.camera(keyframe.calibration_key)
        cam_from_anchor = _relative(former, frame_id, anchor=anchor)
        rotated = compose_poses(
            np.column_stack([cam_from_anchor[:, :3], np.zeros(3)]), anchor_from_world
        )
        points = sparse_map.points3D_in_world(point3D_ids)
        bound_px = max_error_px * image_scale(camera.width, camera.height)
        parts.append(
            (
                np.full(len(rows), frame_id, np.int64),
                rows,
                unit_rays(camera, keyframe.features.keypoints_xy[rows]),
                points @ rotated[:, :3].T + rotated[:, 3],
                np.tile(cam_from_anchor[:, 3], (len(rows), 1)),
                np.full(len(rows), bound_px / camera_focal_px(camera)),
            )
        )
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return _Sights(
        frame_ids=columns[0],
        rows=columns[1],
        rays=columns[2],
        offsets=columns[3],
        baselines=columns[4],
        bounds_rad=columns[5],
    )


def _scale(sights: _Sights, *, min_inliers: int, min_inlier_ratio: float) -> float | None:
    """The scale that explains most matches; None when none explains enough, or many do."""
    num_all = sights.num_keypoints(np.ones(len(sights.rows), np.bool_))
    if num_all < min_inliers:
        return None
    # Where each match alone would have the camera: ray x (offset + s baseline) = 0.
    across = np.cross(sights.rays, sights.baselines)
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = -(np.cross(sights.rays, sights.offsets) * across).sum(axis=1) / (across**2).sum(
            axis=1
        )
    scales = np.sort(scales[np.isfinite(scales) & (scales > 0.0)])
    if not len(scales):
        return None
    tried = scales[np.linspace(0, len(scales) - 1, min(len(scales), _MAX_SCALES)).astype(int)]
    votes = [sights.num_keypoints(sights.agreeing(scale)) for scale in tried.tolist()]
    most = max(votes)
    if most < max(min_inliers, min_inlier_ratio * num_all):
        return None
    best = float(np.median(tried[np.array(votes) == most]))
    others = [sights.num_keypoints(sights.agreeing(best * ratio)) for ratio in _OTHER_SCALES]
    return best if max(others) <= _LEFT_RATIO * most else None
