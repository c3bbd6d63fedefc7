"""Keyframes that no agreed pair joins to the map: posed where several things say the same place.

A pair that no third view confirms may be right. The map itself is a better witness than a third
view, though: the matches of one pair see its points, and pose the keyframe. Two pairs that pose it
at one place, each for itself, do not do so by chance; nor does one with many points all over the
image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from engine.config import RegistrationConfig
from engine.estimators.absolute_pose import estimate_absolute_pose
from engine.geometry import camera_center, rotation_angle_rad
from engine.mapping.model.growth import GrowthConfig, register_and_refine
from engine.mapping.model.sparse_map import Registration, SparseMap
from engine.matching.pair_strength import num_cells
from engine.matching.scene_graph import SceneGraph
from engine.types import (
    Float64Array,
    FrameId,
    ImagePair,
    Int64Array,
    Keyframe,
    RegistrationStatus,
    VerifiedPair,
)

_MAX_TURN_RAD = math.radians(5.0)  # between the poses that two pairs give
_MAX_SHIFT_RATIO = 0.05  # of the map's extent, likewise
_MIN_OF_TWO, _MIN_RATIO_OF_TWO = 15, 0.8  # inliers, and their share of a pair's matches
_MIN_OF_ONE, _MIN_RATIO_OF_ONE = 20, 0.65
_MIN_CELLS = 8  # of 8 x 8, in which the inliers of all lie together
_MIN_REGISTERED = 3  # keyframes of the map: fewer have no extent


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _PairPose:
    """A keyframe as one pair poses it against the map."""

    verified: VerifiedPair
    cam_from_world: Float64Array  # (3, 4)
    num_inliers: int  # keypoints
    inlier_ratio: float  # of those that see a point
    rows: Int64Array  # of the keyframe's keypoints that are inliers
    num_cells: int  # of the image, with inliers

    @property
    def is_one_of_several(self) -> bool:
        """Whether the pair counts beside others."""
        return self.num_inliers >= _MIN_OF_TWO and self.inlier_ratio >= _MIN_RATIO_OF_TWO

    @property
    def is_enough(self) -> bool:
        """Whether the pair counts alone."""
        return (
            self.num_inliers >= _MIN_OF_ONE
            and self.inlier_ratio >= _MIN_RATIO_OF_ONE
            and self.num_cells >= _MIN_CELLS
        )

    def agrees_with(self, other: _PairPose, *, extent: float) -> bool:
        """Whether two pairs pose the keyframe at one place."""
        turn_rad = rotation_angle_rad(self.cam_from_world[:, :3], other.cam_from_world[:, :3])
        shift = camera_center(self.cam_from_world) - camera_center(other.cam_from_world)
        shift_ratio = float(np.linalg.norm(shift)) / max(extent, 1e-12)
        return turn_rad < _MAX_TURN_RAD and shift_ratio < _MAX_SHIFT_RATIO


class StrictPosing:
    """Registers keyframes by pairs that are held back.

    A keyframe that came in so is no witness for others.

    Args:
        graph: holds the pairs.
        registration: thresholds of posing.
        growth: thresholds of registering and refining.
        seed: of everything random.
    """

    def __init__(
        self,
        *,
        graph: SceneGraph,
        registration: RegistrationConfig,
        growth: GrowthConfig,
        seed: int,
    ) -> None:
        self._graph = graph
        self._registration = registration
        self._growth = growth
        self._seed = seed
        self._posed: set[FrameId] = set()
        self._tried_with: dict[FrameId, set[FrameId]] = {}  # witnesses of the last try

    def facts(self) -> list[FrameId]:
        """The keyframes that came in so, which are no witnesses."""
        return sorted(self._posed)

    def restore(self, facts: Iterable[FrameId]) -> None:
        """Goes on with `facts`; keyframes that wait are tried again."""
        self._posed = set(facts)

    def register_waiting(
        self, sparse_map: SparseMap, *, again: bool = False
    ) -> dict[FrameId, Registration]:
        """Registers keyframes that no agreed pair joins to a map.

        Args:
            sparse_map: the map.
            again: whether to try keyframes again whose witnesses are the same as before.

        Returns:
            The keyframes registered, in order.
        """
        if sparse_map.num_registered < _MIN_REGISTERED:
            return {}
        registered = {}
        for frame_id in sparse_map.keyframe_ids:
            if sparse_map.is_registered(frame_id) or self._graph.map_number(frame_id) is not None:
                continue  # it has a place, in this map or another one
            witnesses = self._witnesses(sparse_map, frame_id)
            others = {one.pair.other(frame_id) for one in witnesses}
            if not others or (not again and others == self._tried_with.get(frame_id)):
                continue
            self._tried_with[frame_id] = others
            registration = self._register(sparse_map, frame_id, witnesses)
            if registration is not None:
                self._posed.add(frame_id)
                registered[frame_id] = registration
        return registered

    def _register(
        self, sparse_map: SparseMap, frame_id: FrameId, witnesses: list[VerifiedPair]
    ) -> Registration | None:
        found = [
            pose
            for verified in witnesses
            if (pose := self._pose(sparse_map, frame_id, verified)) is not None
        ]
        keyframe = sparse_map.keyframe(frame_id)
        supporting = _supporting(found, keyframe=keyframe, extent=_extent(sparse_map))
        if not supporting:
            return None
        added = [one for one in supporting if not self._is_known(sparse_map, one.pair)]
        sparse_map.add_pairs(added)
        registration = register_and_refine(sparse_map, frame_id, config=self._growth)
        if registration.status is RegistrationStatus.REGISTERED:
            return registration
        for verified in added:
            sparse_map.distrust_pair(verified.pair)
        return None

    def _witnesses(self, sparse_map: SparseMap, frame_id: FrameId) -> list[VerifiedPair]:
        """Pairs held back that join a keyframe to the map; none where agreed ones do."""
        if any(sparse_map.is_registered(other) for other in sparse_map.neighbors(frame_id)):
            return []
        witnesses = []
        for verified in self._graph.verified_pairs(frame_id):
            other = verified.pair.other(frame_id)
            if other not in self._posed and sparse_map.is_registered(other):
                witnesses.append(verified)
        return witnesses

    def _pose(
        self, sparse_map: SparseMap, frame_id: FrameId, verified: VerifiedPair
    ) -> _PairPose | None:
        other = verified.pair.other(frame_id)
        rows, point3D_ids = sparse_map.visible_points(frame_id, neighbors={other: verified})
        keyframe = sparse_map.keyframe(frame_id)
        pose = estimate_absolute_pose(
            keyframe.features.keypoints_xy[rows],
            sparse_map.points3D_in_world(point3D_ids),
            camera=sparse_map.camera(keyframe.calibration_key),
            config=self._registration,
            seed=self._seed,
        )
        if pose is None:
            return None
        inlying = np.unique(rows[pose.inlier_mask])
        return _PairPose(
            verified=verified,
            cam_from_world=pose.cam_from_world,
            num_inliers=len(inlying),
            inlier_ratio=len(inlying) / len(np.unique(rows)),
            rows=inlying,
            num_cells=num_cells(keyframe, inlying),
        )

    def _is_known(self, sparse_map: SparseMap, pair: ImagePair) -> bool:
        return pair.second in sparse_map.neighbors(pair.first)


def _supporting(poses: list[_PairPose], *, keyframe: Keyframe, extent: float) -> list[VerifiedPair]:
    """The pairs that prove a place together or alone; empty where none do, or two places are.

    What fills a small part of the image only may be a pattern that is there twice.
    """
    groups = [
        [
            other
            for other in poses
            if other.is_one_of_several and one.agrees_with(other, extent=extent)
        ]
        for one in poses
        if one.is_one_of_several
    ]
    several = max(groups, key=len, default=[])
    rows = np.concatenate([one.rows for one in several]) if several else np.empty(0, np.int64)
    if len(several) == 1 or num_cells(keyframe, rows) < _MIN_CELLS:
        several = []
    alone = [one for one in poses if one.is_enough]
    proven = several or alone
    if not proven:
        return []
    best = max(proven, key=lambda one: (one.num_inliers, one.verified.pair))
    if not all(one.agrees_with(best, extent=extent) for one in [*several, *alone]):
        return []
    return [one.verified for one in poses if one in several or one in alone]


def _extent(sparse_map: SparseMap) -> float:
    """The diagonal of the box around a map's cameras."""
    centers = np.array(
        [camera_center(sparse_map.cam_from_world(i)) for i in sparse_map.registered_ids]
    )
    return float(np.linalg.norm(np.ptp(centers, axis=0)))
