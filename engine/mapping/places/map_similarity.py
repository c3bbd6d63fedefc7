"""The matches between two maps, or two parts of one, as points on both sides.

Pairs of keyframes whose matches did not become common points still say where the two parts should
be: each keypoint is an observation of a point of its own side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.estimators.lenses import camera_focal_px, unit_rays
from engine.estimators.similarity import MatchedPoints
from engine.geometry import camera_center, image_scale
from engine.mapping.model.sparse_map import SparseMap
from engine.types import Float64Array, FrameId, Int64Array, VerifiedPair

MAX_ERROR_PX = 8.0  # at an image edge of 1000 px: of a match that agrees with a similarity
MIN_AGREEING = 12  # matches that make a similarity believable
_NO_POINT = -1


class MapMatches:
    """Looks up what verified pairs match between two maps, which may be one and the same.

    It keeps the points of keyframes that were asked for, so it serves as long as the maps stay as
    they are.

    Args:
        map_a: a map.
        map_b: another, or the same.
        max_error_px: px at an edge of 1000 px; how far a point may lie from its keypoint.
    """

    def __init__(self, map_a: SparseMap, map_b: SparseMap, *, max_error_px: float) -> None:
        self._map_a = map_a
        self._map_b = map_b
        self._max_error_px = max_error_px
        self._point3D_ids: dict[tuple[int, FrameId], Int64Array] = {}

    def point3D_ids(self, verified: VerifiedPair) -> tuple[Int64Array, Int64Array]:
        """The points that the keypoints of each match observe in a and in b, (M,) each, -1: none.

        Of a pair within one map the first keyframe is the one in a.
        """
        frame_a, frame_b, rows_a, rows_b = self._sides(verified)
        return self._ids(self._map_a, frame_a)[rows_a], self._ids(self._map_b, frame_b)[rows_b]

    def matched_points(self, pairs: Sequence[VerifiedPair]) -> MatchedPoints:
        """The matches of pairs that have a point on both sides.

        Args:
            pairs: each with one keyframe registered in a, and the other one in b.
        """
        parts = [self._matched(number, verified) for number, verified in enumerate(pairs)]
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        if not columns:
            columns = [np.zeros((0, 3))] * 6 + [np.zeros((0, 2)), np.zeros(0, np.int64)]
        return MatchedPoints(
            points_in_a=columns[0],
            points_in_b=columns[1],
            centers_in_a=columns[2],
            centers_in_b=columns[3],
            rays_in_a=columns[4],
            rays_in_b=columns[5],
            bounds=columns[6],
            pair_idx=columns[7],
        )

    def _matched(
        self, number: int, verified: VerifiedPair
    ) -> tuple[Float64Array | Int64Array, ...]:
        frame_a, frame_b, rows_a, rows_b = self._sides(verified)
        ids_a = self._ids(self._map_a, frame_a)[rows_a]
        ids_b = self._ids(self._map_b, frame_b)[rows_b]
        has_both = (ids_a != _NO_POINT) & (ids_b != _NO_POINT)
        center_a, rays_a, bound_a = self._view(self._map_a, frame_a, rows_a[has_both])
        center_b, rays_b, bound_b = self._view(self._map_b, frame_b, rows_b[has_both])
        num = int(np.count_nonzero(has_both))
        return (
            self._map_a.points3D_in_world(ids_a[has_both].tolist()),
            self._map_b.points3D_in_world(ids_b[has_both].tolist()),
            np.tile(center_a, (num, 1)),
            np.tile(center_b, (num, 1)),
            rays_a,
            rays_b,
            np.tile((bound_a, bound_b), (num, 1)),
            np.full(num, number, np.int64),
        )

    def _sides(self, verified: VerifiedPair) -> tuple[FrameId, FrameId, Int64Array, Int64Array]:
        """The keyframes in a and in b, and the keypoints (M,) that are matched."""
        first, second = verified.pair.first, verified.pair.second
        rows1, rows2 = verified.inlier_matches_idx.astype(np.int64).T
        if self._map_a.is_registered(first) and self._map_b.is_registered(second):
            return first, second, rows1, rows2
        return second, first, rows2, rows1

    def _ids(self, sparse_map: SparseMap, frame_id: FrameId) -> Int64Array:
        key = (id(sparse_map), frame_id)
        if key not in self._point3D_ids:
            self._point3D_ids[key] = sparse_map.point3D_ids(frame_id)
        return self._point3D_ids[key]

    def _view(
        self, sparse_map: SparseMap, frame_id: FrameId, rows: Int64Array
    ) -> tuple[Float64Array, Float64Array, float]:
        """Centre (3,), rays (N, 3) of keypoints in the world, tangent of the angle allowed."""
        keyframe = sparse_map.keyframe(frame_id)
        camera = sparse_map.camera(keyframe.calibration_key)
        cam_from_world = sparse_map.cam_from_world(frame_id)
        rays = unit_rays(camera, keyframe.features.keypoints_xy[rows]) @ cam_from_world[:, :3]
        bound_px = self._max_error_px * image_scale(camera.width, camera.height)
        return camera_center(cam_from_world), rays, bound_px / camera_focal_px(camera)
