"""What verified pairs say of the places of keyframes: which agree, which contradict, how strongly.

A verified pair is a hypothesis. It agrees with two places where its matches lie on the epipolar
lines of these poses, and contradicts them where most of its matches lie far away. Its strength is
how much of both images its matches cover, not how many they are: a logo, or one poster on a wall,
gives many matches in few cells of a grid.
"""

from __future__ import annotations

import numpy as np

from engine.estimators.lenses import camera_focal_px, unit_rays, uses_rays
from engine.estimators.two_view_geometry import epipolar_angles_rad
from engine.geometry import compose_poses, image_scale, invert_pose, skew
from engine.mapping.model.sparse_map import SparseMap
from engine.types import Float64Array, FrameId, ImagePair, Uint32Array, VerifiedPair

AGREEMENT_PX = 8.0  # median distance to the epipolar line, at an image edge of 1000 px
CONTRADICTION_PX = 20.0  # likewise
_MIN_INLIERS = 30  # of a strong pair
_MIN_INLIER_RATIO = 0.6
_MIN_STRENGTH = 16.0  # independent inliers
_CLEARLY_STRONGER = 1.2  # times as strong
_NUM_LOOKED_AT = 48  # matches that tell whether most of all lie near their epipolar lines
_FEW_FAR_RATIO = 0.25  # of them: with half of all that far, so few are once in 3000 times


class PairErrors:
    """How far pairs are from a map that stays as it is, each measured once.

    Args:
        sparse_map: the map.
    """

    def __init__(self, sparse_map: SparseMap) -> None:
        self._sparse_map = sparse_map
        self._contradicting: dict[ImagePair, bool] = {}

    def contradicts(self, verified: VerifiedPair) -> bool:
        """Whether the map's poses put a pair's matches far from their epipolar lines."""
        pair = verified.pair
        if pair not in self._contradicting:
            self._contradicting[pair] = not self._surely_agrees(verified) and (
                epipolar_error_px(self._sparse_map, verified) > CONTRADICTION_PX
            )
        return self._contradicting[pair]

    def _surely_agrees(self, verified: VerifiedPair) -> bool:
        """A look at some matches, spread over all: most pairs agree, and a few of them tell it."""
        num = verified.num_inliers
        if num <= 2 * _NUM_LOOKED_AT:
            return False
        chosen = np.linspace(0, num - 1, _NUM_LOOKED_AT).astype(np.int64)
        errors_px = _errors_px(self._sparse_map, verified, verified.inlier_matches_idx[chosen])
        far = np.count_nonzero(errors_px > CONTRADICTION_PX)
        return bool(len(errors_px) and far <= _FEW_FAR_RATIO * len(errors_px))


def contradicting_neighbors(
    sparse_map: SparseMap, frame_id: FrameId, cam_from_world: Float64Array
) -> dict[FrameId, VerifiedPair]:
    """Pairs that contradict a pose of a keyframe and are clearly stronger than all that agree.

    The strongest pair is tested first, and usually the only one.

    Args:
        sparse_map: the map.
        frame_id: the keyframe.
        cam_from_world: (3, 4) a pose that it may get.

    Returns:
        The pairs by the other keyframe; empty where the pose is credible.
    """
    ranked = sorted(
        (
            (-sparse_map.pair_strength(verified), other)
            for other, verified in sparse_map.neighbors(frame_id).items()
            if sparse_map.is_registered(other)
        ),
    )
    found: dict[FrameId, VerifiedPair] = {}
    strongest = 0.0
    for negative_strength, other in ranked:
        verified = sparse_map.neighbors(frame_id)[other]
        is_weaker = -_CLEARLY_STRONGER * negative_strength <= strongest
        if not is_strong(sparse_map, verified):
            break
        poses = cam_from_world, sparse_map.cam_from_world(other)
        first, second = poses if verified.pair.first == frame_id else poses[::-1]
        error_px = epipolar_error_px(sparse_map, verified, poses=(first, second))
        if error_px > CONTRADICTION_PX:
            found[other] = verified
            strongest = max(strongest, -negative_strength)
        elif error_px <= AGREEMENT_PX and not is_weaker:
            return {}
    return found


def is_strong(sparse_map: SparseMap, pair: VerifiedPair) -> bool:
    """Whether a pair counts as evidence: by inliers, their share, and how they are spread."""
    return (
        pair.num_inliers >= max(_MIN_INLIERS, _MIN_INLIER_RATIO * pair.num_matches)
        and sparse_map.pair_strength(pair) >= _MIN_STRENGTH
    )


def epipolar_error_px(
    sparse_map: SparseMap,
    verified: VerifiedPair,
    *,
    poses: tuple[Float64Array, Float64Array] | None = None,
) -> float:
    """Median distance of a pair's matches to their epipolar lines, at an image edge of 1000 px.

    Args:
        sparse_map: holds both keyframes and their cameras.
        verified: the pair.
        poses: ``cam_from_world`` (3, 4) of both; by default those of the map.

    Returns:
        0 where no match has a viewing ray: what cannot be undistorted contradicts nothing.
    """
    errors_px = _errors_px(sparse_map, verified, verified.inlier_matches_idx, poses=poses)
    return float(np.median(errors_px)) if len(errors_px) else 0.0


def _errors_px(
    sparse_map: SparseMap,
    verified: VerifiedPair,
    matches_idx: Uint32Array,
    *,
    poses: tuple[Float64Array, Float64Array] | None = None,
) -> Float64Array:
    """Distances of some of a pair's matches (M, 2), those that have rays, to epipolar lines."""
    first = sparse_map.keyframe(verified.pair.first)
    second = sparse_map.keyframe(verified.pair.second)
    if poses is None:
        poses = (
            sparse_map.cam_from_world(first.frame_id),
            sparse_map.cam_from_world(second.frame_id),
        )
    camera1 = sparse_map.camera(first.calibration_key)
    camera2 = sparse_map.camera(second.calibration_key)
    rows1, rows2 = matches_idx.T
    cam2_from_cam1 = compose_poses(poses[1], invert_pose(poses[0]))
    points1_xy = first.features.keypoints_xy[rows1]
    points2_xy = second.features.keypoints_xy[rows2]
    if uses_rays(camera1) or uses_rays(camera2):
        rays1, rays2 = unit_rays(camera1, points1_xy), unit_rays(camera2, points2_xy)
        distances = epipolar_angles_rad(rays1, rays2, cam2_from_cam1=cam2_from_cam1)
    else:
        distances = _epipolar_distances(
            np.asarray(camera1.cam_from_img(points1_xy)),
            np.asarray(camera2.cam_from_img(points2_xy)),
            cam2_from_cam1=cam2_from_cam1,
        )
    distances = distances[np.isfinite(distances)]  # some distortion cannot be undone
    scale = image_scale(camera2.width, camera2.height)
    return np.asarray(distances * camera_focal_px(camera2) / scale)


def _epipolar_distances(
    points1_xy: Float64Array, points2_xy: Float64Array, *, cam2_from_cam1: Float64Array
) -> Float64Array:
    """Distances (N,) of second points to the epipolar lines of the first, both on z = 1."""
    translation = cam2_from_cam1[:, 3]
    essential = skew(translation / max(float(np.linalg.norm(translation)), 1e-12))
    ones = np.ones((len(points1_xy), 1))
    lines = np.hstack([points1_xy, ones]) @ (essential @ cam2_from_cam1[:, :3]).T
    offsets = np.abs((lines * np.hstack([points2_xy, ones])).sum(axis=1))
    return np.asarray(offsets / np.maximum(np.linalg.norm(lines[:, :2], axis=1), 1e-12))
