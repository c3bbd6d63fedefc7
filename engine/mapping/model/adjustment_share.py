"""The share of a large map's points that global bundle adjustment needs, and the others after it.

Poses are held by far fewer observations than a large map has, and the solver's time and memory
grow with them. Each keyframe keeps the longest tracks of each part of its image, and each two
keyframes that see the same some of what they share, as in Theia's selection of tracks (Sweeney et
al., Theia: A Fast and Scalable Structure-from-Motion Library, 2015). Where tracks of two passes
over a place were merged, they are the longest, so loops stay closed. The other points follow their
keyframes, and are refined each on its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pycolmap

from engine.estimators.point_refinement import refine_points
from engine.geometry import invert_pose, transform_points
from engine.types import BoolArray, Float64Array, FrameId, Int32Array, Int64Array

_WHOLE_UNTIL = 100_000  # observations; a map of fewer is adjusted whole
_GRID = (8, 6)  # columns and rows of an image; each of its cells keeps a point, if it has one
_MIN_SHARED = 5  # points that two keyframes keep, or all that they share
_MIN_OF_KEYFRAME = 50  # observations that each keyframe keeps, or all that it has
_MIN_OF_MAP = 50_000  # the same of all keyframes: few of many points give their calibration, too
_CHUNK = 100_000  # observations whose points are refined at once


class AdjustmentShare:
    """Takes all points but those that an adjustment needs out of a copy of a map.

    Args:
        reconstruction: a private copy; loses the others.
        keypoints_xy: (N, 2) px, of each registered keyframe.
    """

    def __init__(
        self,
        reconstruction: pycolmap.Reconstruction,
        keypoints_xy: Mapping[FrameId, Float64Array],
    ) -> None:
        self._reconstruction = reconstruction
        frame_ids = sorted(FrameId(int(i)) for i in reconstruction.reg_image_ids())
        self._frame_ids = frame_ids
        self._cams_from_world = self._poses()
        points_xy = [_observed_xy(reconstruction.image(i), keypoints_xy[i]) for i in frame_ids]
        ids = [_observed_ids(reconstruction.image(i)) for i in frame_ids]
        cameras = (reconstruction.camera(reconstruction.image(i).camera_id) for i in frame_ids)
        cells = [_cells(camera, xy) for camera, xy in zip(cameras, points_xy, strict=True)]
        point3D_ids, points = np.unique(np.concatenate(ids), return_inverse=True)
        points = points.astype(np.int32)
        tracks = _Tracks(np.split(points, np.cumsum([len(i) for i in ids])[:-1]))
        is_kept = tracks.kept(cells)
        self._ids = point3D_ids[~is_kept]
        order = tracks.order[~is_kept[points[tracks.order]]]
        self._frame_idx = tracks.frame_idx[order]
        self._points_xy = np.concatenate(points_xy)[order]
        self._first_rows = np.flatnonzero(np.diff(points[order], prepend=-1))
        self._points3D = np.empty((len(self._ids), 3))
        for row, point3D_id in enumerate(self._ids.tolist()):
            self._points3D[row] = reconstruction.point3D(point3D_id).xyz
            reconstruction.delete_point3D(point3D_id)

    @staticmethod
    def is_worthwhile(reconstruction: pycolmap.Reconstruction) -> bool:
        """Whether a map is so large that a share of it is adjusted."""
        return bool(reconstruction.compute_num_observations() > _WHOLE_UNTIL)

    @property
    def others(self) -> Mapping[int, Float64Array]:
        """The points that were taken out, by COLMAP's id: where they are (3,)."""
        return dict(zip(self._ids.tolist(), self._points3D, strict=True))

    def follow(self) -> None:
        """Brings the points that were taken out to where the adjusted keyframes have them."""
        before, after = self._cams_from_world, self._poses()
        anchors = self._frame_idx[self._first_rows]
        for idx in np.unique(anchors).tolist():
            own = anchors == idx
            in_cam = transform_points(before[idx], self._points3D[own])
            self._points3D[own] = transform_points(invert_pose(after[idx]), in_cam)
        ends = np.append(self._first_rows, len(self._points_xy))[1:]
        begin = 0
        while begin < len(ends):
            limit = self._first_rows[begin] + _CHUNK
            end = max(begin + 1, int(np.searchsorted(ends, limit, side="right")))
            self._refine(slice(begin, end), slice(self._first_rows[begin], ends[end - 1]), after)
            begin = end

    def _refine(self, points: slice, rows: slice, cams_from_world: Float64Array) -> None:
        frame_idx = self._frame_idx[rows]
        images = [self._reconstruction.image(i) for i in self._frame_ids]
        camera_ids = np.array([image.camera_id for image in images])[frame_idx]

        def project(points_in_cams: Float64Array) -> Float64Array:
            projected = np.empty((len(points_in_cams), 2))
            for camera_id in np.unique(camera_ids).tolist():
                own = camera_ids == camera_id
                camera = self._reconstruction.camera(camera_id)
                projected[own] = camera.img_from_cam(points_in_cams[own])
            return projected

        self._points3D[points] = refine_points(
            self._points3D[points],
            self._first_rows[points] - self._first_rows[points.start],
            cams_from_world=cams_from_world[frame_idx],
            points_xy=self._points_xy[rows],
            project=project,
        )

    def _poses(self) -> Float64Array:
        """(K, 3, 4) of the keyframes."""
        images = (self._reconstruction.image(i) for i in self._frame_ids)
        return np.array([image.cam_from_world().matrix() for image in images])


class _Tracks:
    """Which keyframes observe which points, both by their place in a list.

    Args:
        points: of each keyframe the points of its observations.
    """

    def __init__(self, points: Sequence[Int32Array]) -> None:
        self.frame_idx = np.repeat(
            np.arange(len(points), dtype=np.int32), [len(one) for one in points]
        )
        all_points = np.concatenate(points)
        self.order = np.argsort(all_points, kind="stable")  # of observations: by points
        self._observing = self.frame_idx[self.order]
        self._lengths = np.bincount(all_points)
        self._begins = np.cumsum(self._lengths) - self._lengths
        self._points = points

    def kept(self, cells: Sequence[Int32Array]) -> BoolArray:
        """Whether each point is kept; the cells are those of each keyframe's observations."""
        is_kept = np.zeros(len(self._lengths), bool)
        for points, cell in zip(self._points, cells, strict=True):
            order = self._longest_first(points)
            present, longest = np.unique(cell[order], return_index=True)
            is_empty = ~np.isin(present, cell[is_kept[points]])
            is_kept[points[order[longest[is_empty]]]] = True
        for idx in range(len(self._points)):
            self._hold_neighbors(idx, is_kept)
        least = max(_MIN_OF_KEYFRAME, _MIN_OF_MAP // len(self._points))
        for points in self._points:
            num_more = least - int(is_kept[points].sum())
            if num_more > 0:
                others = points[~is_kept[points]]
                is_kept[others[self._longest_first(others)[:num_more]]] = True
        return is_kept

    def _longest_first(self, points: Int32Array) -> Int64Array:
        """The order (N,) of points by the lengths of their tracks."""
        return np.argsort(-self._lengths[points], kind="stable")

    def _hold_neighbors(self, idx: int, is_kept: BoolArray) -> None:
        """Keeps more of what a keyframe shares with later ones, where that is too few."""
        points = self._points[idx][self._longest_first(self._points[idx])]
        lengths = self._lengths[points]
        of_point = np.repeat(np.arange(len(points)), lengths)
        starts = self._begins[points] - (np.cumsum(lengths) - lengths)
        observing = self._observing[np.repeat(starts, lengths) + np.arange(len(of_point))]
        is_later = observing > idx
        observing, of_point = observing[is_later], of_point[is_later]
        is_held = is_kept[points][of_point]
        num_frames = len(self._points)
        num_more = _MIN_SHARED - np.bincount(observing[is_held], minlength=num_frames)
        is_wanted = ~is_held & (num_more[observing] > 0)
        observing, of_point = observing[is_wanted], of_point[is_wanted]
        order = np.argsort(observing, kind="stable")
        observing, of_point = observing[order], of_point[order]
        begins = np.flatnonzero(np.diff(observing, prepend=-1))
        rank = np.arange(len(observing)) - np.repeat(
            begins, np.diff(np.append(begins, len(observing)))
        )
        is_kept[points[of_point[rank < num_more[observing]]]] = True


def _observed_xy(image: pycolmap.Image, keypoints_xy: Float64Array) -> Float64Array:
    """Where the keypoints of a keyframe are that observe a point, (N, 2) px."""
    return np.asarray(keypoints_xy[np.array(image.get_observation_point2D_idxs(), np.int64)])


def _observed_ids(image: pycolmap.Image) -> Int64Array:
    """COLMAP's ids of the points (N,) that these observe."""
    observations = image.get_observation_points2D()
    return np.fromiter((one.point3D_id for one in observations), np.int64, len(observations))


def _cells(camera: pycolmap.Camera, points_xy: Float64Array) -> Int32Array:
    """In which cell of the image (N,) keypoints are."""
    share = points_xy / (camera.width, camera.height)
    column, row = np.clip((share * _GRID).astype(np.int64), 0, np.array(_GRID) - 1).T
    return np.asarray(row * _GRID[0] + column, np.int32)
