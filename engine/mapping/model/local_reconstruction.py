"""A small reconstruction of its own around some keyframes of a map, for local bundle adjustment.

COLMAP's adjuster passes over all points of the reconstruction that it gets, however few of them it
adjusts. So a large map gives it only what is around the keyframes to be adjusted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pycolmap

from engine.mapping.model.sparse_map import SparseMap
from engine.types import FrameId

_NO_POINT = -1
_ELSEWHERE = 2**31 - 2  # COLMAP's id of an image; no keyframe has it
_PASSES_PER_COPY = 7  # points that the adjuster passes over in the time that copying one takes


class LocalReconstruction:
    """Some keyframes with all points that they observe, and what else observes those of the first.

    What is adjusted in it is the same as in the map: the points of the first keyframe, with all of
    their observations, and those that no further keyframes observe. What further keyframes observe
    beside is of one image that stands for them all, so COLMAP holds those points.

    Args:
        sparse_map: the map; it stays as it is until `write_back`.
        local: registered keyframes; the points of the first one are adjusted.
    """

    def __init__(self, sparse_map: SparseMap, local: Sequence[FrameId]) -> None:
        self._map = sparse_map
        self._local = local
        self._id_in_map: dict[int, int] = {}  # of each point that is adjusted
        self.reconstruction = pycolmap.Reconstruction()
        self._add_keyframes()
        self.points = self._add_points_of_first()  # of the first keyframe
        self._add_points_of_others()

    @staticmethod
    def is_worthwhile(sparse_map: SparseMap, local: Sequence[FrameId]) -> bool:
        """Whether a map is so large that adjusting in it costs more than copying this part."""
        num_observed = sum(sparse_map.num_observations(frame_id) for frame_id in local)
        return sparse_map.num_points3D > _PASSES_PER_COPY * num_observed

    def write_back(self) -> None:
        """Gives the map the poses and positions that were adjusted."""
        part, whole = self.reconstruction, self._map.reconstruction
        for frame_id in self._local:
            image = whole.image(frame_id)
            pose = part.image(frame_id).cam_from_world()
            whole.frame(image.frame_id).set_cam_from_world(image.camera_id, pose)
        for own_id, point3D_id in self._id_in_map.items():
            whole.point3D(point3D_id).xyz = part.point3D(own_id).xyz

    def _add_keyframes(self) -> None:
        part, whole = self.reconstruction, self._map.reconstruction
        observing = self._map.covisibility(self._local[0])
        frame_ids = sorted({*self._local, *observing})
        for camera_id in sorted({whole.image(i).camera_id for i in frame_ids}):
            part.add_camera_with_trivial_rig(whole.camera(camera_id))
        for frame_id in frame_ids:
            image = pycolmap.Image(
                keypoints=self._map.keyframe(frame_id).features.keypoints_xy,
                camera_id=whole.image(frame_id).camera_id,
                image_id=frame_id,
            )
            part.add_image_with_trivial_frame(image, whole.image(frame_id).cam_from_world())

    def _add_points_of_first(self) -> list[int]:
        """Adds the points of the first keyframe; returns their ids."""
        ids = self._map.point3D_ids(self._local[0])
        for point3D_id in np.unique(ids[ids != _NO_POINT]).tolist():
            point = self._map.reconstruction.point3D(point3D_id)
            own_id = self.reconstruction.add_point3D(point.xyz, point.track)
            self._id_in_map[own_id] = point3D_id
        return list(self._id_in_map)

    def _add_points_of_others(self) -> None:
        """Adds the points that only others of the keyframes observe."""
        part, whole = self.reconstruction, self._map.reconstruction
        observed = self._observed_by_others()
        elsewhere = pycolmap.Image(
            keypoints=np.zeros((len(observed), 2)),
            camera_id=whole.image(self._local[0]).camera_id,
            image_id=_ELSEWHERE,
        )
        part.add_image_with_trivial_frame(elsewhere)
        for row, (point3D_id, elements) in enumerate(observed.items()):
            point = whole.point3D(point3D_id)
            is_adjusted = point.track.length() == len(elements)
            if not is_adjusted:
                elements.append(pycolmap.TrackElement(_ELSEWHERE, row))
            own_id = part.add_point3D(point.xyz, pycolmap.Track(elements))
            if is_adjusted:
                self._id_in_map[own_id] = point3D_id

    def _observed_by_others(self) -> dict[int, list[pycolmap.TrackElement]]:
        """The observations by all but the first keyframe of the points that it does not observe."""
        first = self._map.point3D_ids(self._local[0])
        observed: dict[int, list[pycolmap.TrackElement]] = {}
        for frame_id in self._local[1:]:
            ids = self._map.point3D_ids(frame_id)
            rows = np.flatnonzero((ids != _NO_POINT) & ~np.isin(ids, first))
            for row, point3D_id in zip(rows.tolist(), ids[rows].tolist(), strict=True):
                element = pycolmap.TrackElement(frame_id, row)
                observed.setdefault(point3D_id, []).append(element)
        return observed
