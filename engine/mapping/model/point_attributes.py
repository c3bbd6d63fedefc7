"""Point attributes: the colour of each 3D point, and the keyframe that made it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pycolmap

from engine.types import Float32Array, FrameId, Int64Array, Keyframe, Uint8Array

_MAX_DELETED_POINTS = 1000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PointCloud:
    """The points of a map as arrays; rows belong together."""

    points3D_in_world: Float32Array  # (P, 3)
    colors: Uint8Array  # (P, 3) RGB
    first_keyframe_ids: Int64Array  # (P,) the keyframe that made the point


class PointAttributes:
    """The colours of points and the keyframes that made them.

    Memory: at most twice as many entries as there are points, and 1000 more.

    Args:
        reconstruction: holds the points.
        keyframes: every keyframe that observes one, by id; may grow.
    """

    def __init__(
        self, reconstruction: pycolmap.Reconstruction, keyframes: Mapping[FrameId, Keyframe]
    ) -> None:
        self._reconstruction = reconstruction
        self._keyframes = keyframes
        self._made_by: dict[int, FrameId] = {}  # point3D_id -> keyframe

    def __len__(self) -> int:
        return len(self._made_by)

    def copy_for(
        self, reconstruction: pycolmap.Reconstruction, keyframes: Mapping[FrameId, Keyframe]
    ) -> PointAttributes:
        """The same attributes for a copy of the reconstruction."""
        twin = PointAttributes(reconstruction, keyframes)
        twin._made_by = dict(self._made_by)
        return twin

    def assign(self, point3D_ids: Iterable[int], *, made_by: FrameId | None = None) -> None:
        """Gives points that have no attributes a colour and the keyframe that made them.

        Args:
            point3D_ids: points of which some have attributes, and some may be deleted again.
            made_by: the keyframe; None for the first of each point's track.
        """
        for point3D_id in point3D_ids:
            if point3D_id in self._made_by or not self._reconstruction.exists_point3D(point3D_id):
                continue
            point = self._reconstruction.point3D(point3D_id)
            element = point.track.element(0)
            first_of_track = FrameId(int(element.image_id))
            colors = self._keyframes[first_of_track].features.colors
            point.color = colors[element.point2D_idx]
            self._made_by[point3D_id] = first_of_track if made_by is None else made_by
        self._drop_deleted_points()

    def adopt(self, point3D_ids: Iterable[int]) -> None:
        """Takes points of a model as they are: made by the first keyframe of each one's track."""
        for point3D_id in point3D_ids:
            element = self._reconstruction.point3D(point3D_id).track.element(0)
            self._made_by[point3D_id] = FrameId(int(element.image_id))

    def cloud(self) -> PointCloud:
        """All points as arrays; each must have attributes."""
        points = self._reconstruction.points3D
        num = len(points)
        xyz = np.empty((num, 3), np.float32)
        colors = np.empty((num, 3), np.uint8)
        made_by = np.empty(num, np.int64)
        for row, (point3D_id, point) in enumerate(points.items()):
            xyz[row] = point.xyz
            colors[row] = point.color
            made_by[row] = self._made_by[point3D_id]
        return PointCloud(points3D_in_world=xyz, colors=colors, first_keyframe_ids=made_by)

    def _drop_deleted_points(self) -> None:
        num_points = self._reconstruction.num_points3D()
        if len(self._made_by) > 2 * num_points + _MAX_DELETED_POINTS:
            points = self._reconstruction.points3D
            self._made_by = {k: v for k, v in self._made_by.items() if k in points}
