"""Map points in frames between keyframes: where they are, and the pose that they give.

The points of the keyframes before and after a frame are followed straight into it, by pyramidal
optical flow (Lucas and Kanade, 1981; Bouguet, 2001) that begins where the frame's pose puts them,
and back; what does not come back to its keypoint is left out. Nothing adds up along the video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.geometry import image_scale, spread_over_image, transform_points
from engine.types import BoolArray, Float32Array, Float64Array, Int64Array, Uint8Array

if TYPE_CHECKING:
    import pycolmap

_EDGE_PX = 1600  # of the images that flow runs on, at most
_WINDOW_PX = 15
_DEVIATION = 45.0  # of grey levels from 128, for all images: flow takes brightness as constant
_LEVELS = 3
_MAX_POINTS = 500  # of a keyframe
_MAX_RETURN_PX = 1.0  # at an image edge of 1000 px
_MAX_ERROR_PX = 4.0  # of an inlier, at an image edge of 1000 px: what maps keep, too


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeyframePoints:
    """A keyframe's image as flow needs it, and where its map points are in it."""

    grey: Uint8Array  # (h, w) at most `_EDGE_PX` wide
    point3D_ids: Int64Array  # (N,)
    points_xy: Float64Array  # (N, 2) px of the original image
    points3D_in_world: Float64Array  # (N, 3)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrameTracks:
    """Map points found in a frame, each once."""

    point3D_ids: Int64Array  # (N,)
    points_xy: Float64Array  # (N, 2) px
    points3D_in_world: Float64Array  # (N, 3)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrameFit:
    """How well a pose fits the map points found in a frame."""

    cam_from_world: Float64Array  # (3, 4)
    is_inlier: BoolArray  # (N,) of the tracks
    error_px: float  # mean of the inliers; inf: there are none

    @property
    def inlier_ratio(self) -> float:
        """0..1."""
        return float(self.is_inlier.mean()) if len(self.is_inlier) else 0.0


def keyframe_points(
    model: pycolmap.Reconstruction, image: pycolmap.Image, pixels: Uint8Array
) -> KeyframePoints:
    """What flow needs of a keyframe.

    Args:
        model: of the map.
        image: of the keyframe.
        pixels: (H, W, 3) RGB.
    """
    camera = model.camera(image.camera_id)
    ids = np.array([p.point3D_id for p in image.points2D if p.has_point3D()], np.int64)
    xyz = np.array([model.point3D(i).xyz for i in ids.tolist()]).reshape(-1, 3)
    in_cam = transform_points(np.asarray(image.cam_from_world().matrix()), xyz)
    points_xy = np.asarray(camera.img_from_cam(in_cam)).reshape(-1, 2)
    size = (camera.width, camera.height)
    inside = np.isfinite(points_xy).all(axis=1) & (points_xy >= 0).all(axis=1)
    inside = np.flatnonzero(inside & (points_xy < size).all(axis=1))
    chosen = inside[spread_over_image(points_xy[inside], size=size, limit=_MAX_POINTS)]
    return KeyframePoints(
        grey=flow_image(pixels),
        point3D_ids=ids[chosen],
        points_xy=points_xy[chosen],
        points3D_in_world=xyz[chosen],
    )


def flow_image(pixels: Uint8Array) -> Uint8Array:
    """The grey image (h, w) that flow runs on, of an image (H, W, 3) RGB; exposure is taken out."""
    import cv2

    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    ratio = _EDGE_PX / max(grey.shape)
    if ratio < 1.0:
        grey = cv2.resize(grey, None, fx=ratio, fy=ratio, interpolation=cv2.INTER_AREA)
    mean, deviation = (float(value[0, 0]) for value in cv2.meanStdDev(grey))
    gain = _DEVIATION / max(deviation, 1.0)
    return np.asarray(cv2.convertScaleAbs(grey, alpha=gain, beta=128.0 - gain * mean), np.uint8)


def follow(
    keyframes: Sequence[KeyframePoints],
    grey: Uint8Array,
    *,
    camera: pycolmap.Camera,
    cam_from_world: Float64Array,
) -> FrameTracks:
    """Finds map points of keyframes in a frame.

    Args:
        keyframes: the nearest first; of a point that several have, the first that finds it counts.
        grey: of the frame, see `flow_image`.
        camera: of the frame and of the keyframes.
        cam_from_world: (3, 4) about where the frame is.
    """
    found = [
        _followed(one, grey, camera=camera, cam_from_world=cam_from_world) for one in keyframes
    ]
    ids = np.concatenate([one.point3D_ids for one in found])
    _, first = np.unique(ids, return_index=True)
    first.sort()
    return FrameTracks(
        point3D_ids=ids[first],
        points_xy=np.concatenate([one.points_xy for one in found])[first],
        points3D_in_world=np.concatenate([one.points3D_in_world for one in found])[first],
    )


def _followed(
    keyframe: KeyframePoints,
    grey: Uint8Array,
    *,
    camera: pycolmap.Camera,
    cam_from_world: Float64Array,
) -> FrameTracks:
    in_cam = transform_points(cam_from_world, keyframe.points3D_in_world)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected_xy = np.asarray(camera.img_from_cam(in_cam)).reshape(-1, 2)
    size = np.array([camera.width, camera.height])
    seen = np.isfinite(expected_xy).all(axis=1) & (expected_xy >= 0).all(axis=1)
    seen &= (expected_xy < size).all(axis=1)
    scale = size / grey.shape[::-1]
    start_xy = (keyframe.points_xy[seen] / scale - 0.5).astype(np.float32).reshape(-1, 1, 2)
    first_xy = (expected_xy[seen] / scale - 0.5).astype(np.float32).reshape(-1, 1, 2)
    if not len(start_xy) or keyframe.grey.shape != grey.shape:
        return FrameTracks(
            point3D_ids=np.empty(0, np.int64),
            points_xy=np.empty((0, 2)),
            points3D_in_world=np.empty((0, 3)),
        )
    there_xy, is_there = _flow(keyframe.grey, grey, start_xy, first_xy)
    back_xy, is_back = _flow(grey, keyframe.grey, there_xy, start_xy)
    return_px = np.linalg.norm((back_xy - start_xy).reshape(-1, 2) * scale, axis=1)
    points_xy = (there_xy.reshape(-1, 2).astype(np.float64) + 0.5) * scale
    kept = is_there & is_back
    kept &= return_px < _MAX_RETURN_PX * image_scale(camera.width, camera.height)
    kept &= (points_xy >= 0).all(axis=1) & (points_xy < size).all(axis=1)
    rows = np.flatnonzero(seen)[kept]
    return FrameTracks(
        point3D_ids=keyframe.point3D_ids[rows],
        points_xy=points_xy[kept],
        points3D_in_world=keyframe.points3D_in_world[rows],
    )


def _flow(
    first: Uint8Array, second: Uint8Array, start_xy: Float32Array, guess_xy: Float32Array
) -> tuple[Float32Array, BoolArray]:
    """Where points (N, 1, 2) of one image are in another one, and which were found (N,)."""
    import cv2

    moved_xy, is_found, _ = cv2.calcOpticalFlowPyrLK(
        first,
        second,
        start_xy,
        guess_xy.copy(),
        winSize=(_WINDOW_PX, _WINDOW_PX),
        maxLevel=_LEVELS,
        criteria=(cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 20, 0.01),
        flags=cv2.OPTFLOW_USE_INITIAL_FLOW,
    )
    return np.asarray(moved_xy, np.float32), np.asarray(is_found).ravel() == 1


def fit_of(
    tracks: FrameTracks, cam_from_world: Float64Array, *, camera: pycolmap.Camera
) -> FrameFit:
    """How well a pose (3, 4) fits."""
    from engine.estimators.absolute_pose import reprojection_errors_px

    errors_px = reprojection_errors_px(
        cam_from_world, tracks.points3D_in_world, points_xy=tracks.points_xy, camera=camera
    )
    is_inlier = errors_px < _MAX_ERROR_PX * image_scale(camera.width, camera.height)
    error_px = float(errors_px[is_inlier].mean()) if is_inlier.any() else float("inf")
    return FrameFit(cam_from_world=cam_from_world, is_inlier=is_inlier, error_px=error_px)
