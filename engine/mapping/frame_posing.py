"""Poses of frames between keyframes, from the keypoints optical flow carried to them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycolmap

from engine.config import RegistrationConfig
from engine.cpu_time import Stage, charged_to
from engine.estimators.absolute_pose import (
    AbsolutePose,
    estimate_absolute_pose,
    refine_absolute_pose,
    refine_absolute_pose_on_rays,
)
from engine.estimators.lenses import camera_focal_px, unit_rays, uses_rays
from engine.geometry import compose_poses, image_scale, invert_pose, transform_points
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.stored_state import StoredRelativePose
from engine.tracking.trajectory import KeyframeState, Trajectory
from engine.types import (
    Float64Array,
    FrameId,
    FramePose,
    Int64Array,
    Keyframe,
    PoseGap,
    TrackedFrame,
)

_MIN_INLIERS = 12
_MIN_INLIER_RATIO = 0.4
_MAX_ERROR_PX = 4.0  # at an image edge of 1000 px; optical flow is exact to a pixel or so
_MAX_REFERENCE_POINTS = 64
_MIN_REFERENCE_POINTS = 8
_MAX_PENDING_FRAMES = 4000  # about 40 MB; beyond it the oldest get no pose of their own
_MAX_POSED_FRAMES = 2000  # that can be posed again, some 10 kB each
MAX_POSED_CAMERAS = 16  # that give frames at a time
NUM_LATEST_KEYFRAMES = 3  # of a camera: one that is mapped, one that waits, and one of the map
_MAX_POINT_TABLES = MAX_POSED_CAMERAS * NUM_LATEST_KEYFRAMES  # kept, some 100 kB each
_CHANGED_FOCAL_LOG = 0.03  # by which frames are posed again


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _KeyframePoints:
    """A keyframe's observed points, as tracked frames need them."""

    row_of_keypoint: Int64Array  # (N,) row in points3D_in_world, -1 for none
    points3D_in_world: Float64Array  # (P, 3)
    scale: float  # depths now per depth when the keyframe was first used


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _DepthReference:
    """Depths of some points of a keyframe when it was first used: the reference of its scale.

    Keypoints outlive points: tracks are merged and made anew, and whole maps are replaced.
    """

    keypoint_idx: Int64Array  # (S,) rows of the keyframe's keypoints that observed the points
    depths_map: Float64Array  # (S,)


class FramePoser:
    """Gives tracked frames their poses and keeps the trajectory of the run.

    A frame whose keyframe is not registered yet waits and is posed when it is.

    Args:
        registration: of the search for a pose.
        seed: of that search.
        max_interpolation_s: how far the keyframes around a frame without a pose of its own may be
            apart for a pose between them.
    """

    def __init__(
        self, *, registration: RegistrationConfig, seed: int, max_interpolation_s: float
    ) -> None:
        self._registration = registration
        self._seed = seed
        self._trajectory = Trajectory(max_interpolation_s=max_interpolation_s)
        self._pending: deque[TrackedFrame] = deque(maxlen=_MAX_PENDING_FRAMES)
        self._posed: deque[tuple[TrackedFrame, float]] = deque(maxlen=_MAX_POSED_FRAMES)
        self._points: dict[FrameId, _KeyframePoints] = {}  # used last at the end
        self._references: dict[FrameId, _DepthReference] = {}
        self._last: tuple[FrameId, Float64Array] | None = None  # keyframe, cam_from_keyframe
        self._changed: dict[FrameId, TrackedFrame] = {}  # frames that came, or have another pose
        self._new_references: set[FrameId] = set()

    # -- what a run that goes on needs ------------------------------------------------------------

    def take_relative_poses(self) -> tuple[StoredRelativePose, ...]:
        """The frames that came or have another pose since the last call."""
        changed, self._changed = self._changed, {}
        poses = []
        for tracked in changed.values():
            known = self._trajectory.relative_pose(tracked.frame_id)
            poses.append(
                StoredRelativePose(
                    frame_id=tracked.frame_id,
                    keyframe_id=tracked.keyframe_id if known is None else known[0],
                    index=tracked.index,
                    captured_at_s=tracked.captured_at_s,
                    cam_from_keyframe=None if known is None else known[1],
                )
            )
        return tuple(poses)

    def take_facts(self) -> dict[str, Float64Array]:
        """The scales of keyframes that frames were posed from first since the last call.

        For each the rows of some keypoints and the depths that they had, (2, S).
        """
        new, self._new_references = sorted(self._new_references), set()
        found = ((i, self._references[i]) for i in new)
        return {f"scale/{i}": np.stack([one.keypoint_idx, one.depths_map]) for i, one in found}

    def restore(
        self, facts: Mapping[str, Any], relative_poses: Sequence[StoredRelativePose]
    ) -> None:
        """Goes on with the frames of a run before, whose keyframes were added.

        Frames that waited for their keyframe get no pose of their own any more.

        Args:
            facts: as `take_facts` gave them.
            relative_poses: of all frames, as last taken.
        """
        for stored in relative_poses:
            if not self._trajectory.holds(stored.keyframe_id):
                continue
            reference = facts.get(f"scale/{stored.keyframe_id}")
            if reference is not None:
                self._references[stored.keyframe_id] = _DepthReference(
                    keypoint_idx=reference[0].astype(np.int64), depths_map=reference[1]
                )
            tracked = TrackedFrame(
                frame_id=stored.frame_id,
                keyframe_id=stored.keyframe_id,
                index=stored.index,
                captured_at_s=stored.captured_at_s,
                received_at_s=0.0,
                keypoint_idx=np.empty(0, np.int64),
                points_xy=np.empty((0, 2)),
            )
            if not self._trajectory.holds(stored.frame_id):  # else it became a keyframe later
                self._trajectory.add_tracked(tracked)
            if stored.cam_from_keyframe is not None:
                self._trajectory.set_relative_pose(
                    tracked, cam_from_keyframe=stored.cam_from_keyframe, scale=1.0
                )

    # -- frames ---------------------------------------------------------------------------------

    def add_keyframe(self, keyframe: Keyframe) -> None:
        """Adds a keyframe to the trajectory."""
        self._trajectory.add_keyframe(keyframe)

    @charged_to(Stage.POSE_FRAMES)
    def add_tracked(
        self,
        tracked: TrackedFrame,
        sparse_map: SparseMap | None,
        *,
        fallback: TrackedFrame | None = None,
    ) -> FramePose | None:
        """Poses a frame now when its keyframe is registered, else keeps it waiting.

        A frame that waits still gets a first pose from its fallback, the same frame as followed
        from an earlier keyframe, when the map has that one.
        """
        self._trajectory.add_tracked(tracked)
        self._changed[tracked.frame_id] = tracked
        if sparse_map is None:
            self._pending.append(tracked)
            return None
        if sparse_map.is_registered(tracked.keyframe_id):
            return self._pose(tracked, sparse_map)
        self._pending.append(tracked)
        if fallback is None or not sparse_map.is_registered(fallback.keyframe_id):
            return None
        return self._pose(fallback, sparse_map)

    @charged_to(Stage.POSE_FRAMES)
    def pose_pending(self, sparse_map: SparseMap) -> list[tuple[TrackedFrame, FramePose]]:
        """Poses the waiting frames whose keyframe was registered meanwhile."""
        posed = []
        waiting: list[TrackedFrame] = []
        for tracked in self._pending:
            if not sparse_map.is_registered(tracked.keyframe_id):
                waiting.append(tracked)
            elif (pose := self._pose(tracked, sparse_map)) is not None:
                posed.append((tracked, pose))
        self._pending = deque(waiting, maxlen=_MAX_PENDING_FRAMES)
        return posed

    @charged_to(Stage.POSE_FRAMES)
    def pose_again(self, maps: Sequence[SparseMap]) -> None:
        """Poses frames anew whose keyframe had another focal length then; the latest ones only."""
        self.forget_points()
        posed = sorted(self._posed, key=lambda one: (one[0].keyframe_id, one[0].index))
        self._posed.clear()
        for tracked, focal_px in posed:
            holding = (one for one in maps if one.is_registered(tracked.keyframe_id))
            if (sparse_map := next(holding, None)) is None:
                continue
            now_px = self._focal_px(tracked.keyframe_id, sparse_map)
            if abs(math.log(now_px / focal_px)) > _CHANGED_FOCAL_LOG:
                self._pose(tracked, sparse_map)

    def pose_anew(self, sparse_map: SparseMap) -> None:
        """Poses the frames of a former map by the one that takes its place, where that can."""
        self.forget_points()
        self._last = None
        posed = list(self._posed)
        self._posed.clear()
        for frame_id in sparse_map.registered_ids:
            self._references.pop(frame_id, None)
            self._new_references.discard(frame_id)
        for tracked, focal_px in posed:
            if sparse_map.is_registered(tracked.keyframe_id):
                self._pose(tracked, sparse_map)
            else:
                self._posed.append((tracked, focal_px))

    def points(self, frame_id: FrameId, sparse_map: SparseMap) -> tuple[Int64Array, Float64Array]:
        """Rows (N,) of a registered keyframe's keypoints, -1 for none, in its points (P, 3)."""
        points = self._points_of(frame_id, sparse_map)
        return points.row_of_keypoint, points.points3D_in_world

    def forget_points(self) -> None:
        """Forgets the positions of the map's points; to be called when they moved."""
        self._points.clear()

    @charged_to(Stage.POSE_FRAMES)
    def trajectories(self, maps: Sequence[SparseMap]) -> list[list[FramePose]]:
        """The present poses of the frames of each map, in order of arrival."""
        return self._trajectory.poses(
            [{i: self._keyframe_state(one, i) for i in one.registered_ids} for one in maps]
        )

    def gaps(
        self, maps: Sequence[SparseMap], *, overload_at_s: Mapping[str, Float64Array] | None
    ) -> tuple[PoseGap, ...]:
        """Times of videos of which no frame has an estimated pose in any of the maps."""
        registered = [i for one in maps for i in one.registered_ids]
        return tuple(self._trajectory.gaps(registered, overload_at_s=overload_at_s))

    @property
    def num_frames(self) -> int:
        """Keyframes and frames between them, with a pose or without."""
        return len(self._trajectory)

    def _pose(self, tracked: TrackedFrame, sparse_map: SparseMap) -> FramePose | None:
        points = self._points_of(tracked.keyframe_id, sparse_map)
        rows = points.row_of_keypoint[tracked.keypoint_idx]
        seen = rows >= 0
        pose = self._estimate(
            tracked,
            tracked.points_xy[seen],
            points3D_in_world=points.points3D_in_world[rows[seen]],
            sparse_map=sparse_map,
        )
        if pose is None:
            return None
        keyframe_from_world = sparse_map.cam_from_world(tracked.keyframe_id)
        cam_from_keyframe = compose_poses(pose.cam_from_world, invert_pose(keyframe_from_world))
        self._last = tracked.keyframe_id, cam_from_keyframe
        self._posed.append((tracked, self._focal_px(tracked.keyframe_id, sparse_map)))
        self._trajectory.set_relative_pose(
            tracked, cam_from_keyframe=cam_from_keyframe, scale=points.scale
        )
        self._changed[tracked.frame_id] = tracked
        return FramePose(
            frame_id=tracked.frame_id,
            index=tracked.index,
            captured_at_s=tracked.captured_at_s,
            cam_from_world=pose.cam_from_world,
            is_keyframe=False,
        )

    def _estimate(
        self,
        tracked: TrackedFrame,
        points_xy: Float64Array,
        *,
        points3D_in_world: Float64Array,
        sparse_map: SparseMap,
    ) -> AbsolutePose | None:
        """The pose of a frame, from that of the frame before where both have one keyframe."""
        keyframe = sparse_map.keyframe(tracked.keyframe_id)
        start = sparse_map.cam_from_world(tracked.keyframe_id)
        if self._last is not None and self._last[0] == tracked.keyframe_id:
            start = compose_poses(self._last[1], start)
        return estimate_frame_pose(
            points_xy,
            points3D_in_world,
            camera=sparse_map.camera(keyframe.calibration_key),
            start=start,
            registration=self._registration,
            seed=self._seed,
        )

    @staticmethod
    def _focal_px(frame_id: FrameId, sparse_map: SparseMap) -> float:
        return camera_focal_px(sparse_map.camera(sparse_map.keyframe(frame_id).calibration_key))

    def _points_of(self, frame_id: FrameId, sparse_map: SparseMap) -> _KeyframePoints:
        points = self._points.pop(frame_id, None)
        if points is None:
            points = self._read_points(frame_id, sparse_map)
        self._points[frame_id] = points
        if len(self._points) > _MAX_POINT_TABLES:
            del self._points[next(iter(self._points))]
        return points

    def _read_points(self, frame_id: FrameId, sparse_map: SparseMap) -> _KeyframePoints:
        ids = sparse_map.point3D_ids(frame_id)
        seen = np.flatnonzero(ids >= 0)
        points = sparse_map.points3D_in_world(ids[seen])
        row_of_keypoint = np.full(len(ids), -1, np.int64)
        row_of_keypoint[seen] = np.arange(len(seen))
        if frame_id not in self._references:
            self._new_references.add(frame_id)
            self._references[frame_id] = _depth_reference(
                sparse_map.cam_from_world(frame_id), points, keypoint_idx=seen
            )
        return _KeyframePoints(
            row_of_keypoint=row_of_keypoint,
            points3D_in_world=points,
            scale=self._scale(sparse_map, frame_id),
        )

    def _scale(self, sparse_map: SparseMap, frame_id: FrameId) -> float:
        """Median ratio of depths now to depths then, over reference keypoints with a point now.

        Where few of them have one, as in another map, the ratio of the median depths.
        """
        reference = self._references.get(frame_id)
        if reference is None:
            return 1.0
        ids = sparse_map.point3D_ids(frame_id)
        of_reference = ids[reference.keypoint_idx]
        kept = of_reference >= 0
        if np.count_nonzero(kept) >= _MIN_REFERENCE_POINTS:
            depths = _depths(sparse_map, frame_id, of_reference[kept])
            ratio = float(np.median(depths / reference.depths_map[kept]))
        elif np.count_nonzero(ids >= 0) >= _MIN_REFERENCE_POINTS and len(reference.depths_map):
            depths = _depths(sparse_map, frame_id, ids[ids >= 0])
            ratio = float(np.median(depths) / np.median(reference.depths_map))
        else:
            return 1.0
        return ratio if ratio > 0 else 1.0

    def _keyframe_state(self, sparse_map: SparseMap, frame_id: FrameId) -> KeyframeState:
        return KeyframeState(
            cam_from_world=sparse_map.cam_from_world(frame_id),
            scale=self._scale(sparse_map, frame_id),
        )


def estimate_frame_pose(
    points_xy: Float64Array,
    points3D_in_world: Float64Array,
    *,
    camera: pycolmap.Camera,
    start: Float64Array,
    registration: RegistrationConfig,
    seed: int,
) -> AbsolutePose | None:
    """Refines a pose near that of a frame; searches anew only when that does not fit.

    Args:
        points_xy: where points are in the frame (N, 2) px.
        points3D_in_world: the points (N, 3).
        camera: of the frame.
        start: cam_from_world (3, 4) to begin with.
        registration: of the search.
        seed: of the search.
    """
    if len(points_xy) < _MIN_INLIERS:
        return None
    enough = max(_MIN_INLIERS, _MIN_INLIER_RATIO * len(points_xy))
    max_error_px = _MAX_ERROR_PX * image_scale(camera.width, camera.height)
    max_error = max_error_px / camera_focal_px(camera)
    if uses_rays(camera):
        pose = refine_absolute_pose_on_rays(
            start,
            rays_in_cam=unit_rays(camera, points_xy),
            points3D_in_world=points3D_in_world,
            max_error_rad=max_error,
        )
    else:
        pose = refine_absolute_pose(
            start,
            image_plane_xy=np.asarray(camera.cam_from_img(points_xy)),
            points3D_in_world=points3D_in_world,
            max_error=max_error,
        )
    if pose is not None and pose.num_inliers >= enough:
        return pose
    pose = estimate_absolute_pose(
        points_xy, points3D_in_world, camera=camera, config=registration, seed=seed
    )
    return pose if pose is not None and pose.num_inliers >= enough else None


def _depths(sparse_map: SparseMap, frame_id: FrameId, point3D_ids: Int64Array) -> Float64Array:
    """Depths (P,) of points in a keyframe."""
    points = sparse_map.points3D_in_world(point3D_ids.tolist())
    return np.asarray(transform_points(sparse_map.cam_from_world(frame_id), points)[:, 2])


def _depth_reference(
    cam_from_world: Float64Array, points3D_in_world: Float64Array, *, keypoint_idx: Int64Array
) -> _DepthReference:
    """Points evenly taken from a keyframe's, those in front of it."""
    step = max(1, math.ceil(len(keypoint_idx) / _MAX_REFERENCE_POINTS))
    depths = transform_points(cam_from_world, points3D_in_world[::step])[:, 2]
    in_front = depths > 0
    return _DepthReference(keypoint_idx=keypoint_idx[::step][in_front], depths_map=depths[in_front])
