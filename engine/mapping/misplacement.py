"""Finding keyframes that repeated structure put in the wrong place, and taking them out again.

Wallpaper, facades and rows of chairs give a keyframe many small agreements with a wrong place.
Sooner or later a stronger pair contradicts the poses that the map gave to its two keyframes. Pairs
are then trusted in order of their strength: the maximum spanning tree of the verified pairs joins
every keyframe by the strongest evidence there is for it. Where a pair of the tree contradicts the
map, the map is wrong; where a pair outside the tree does, the map has drifted or the pair is wrong,
and nothing is done. (Spanning trees of pair evidence: Snavely et al., CVPR 2008; measurements that
contradict each other show which are wrong: Zach et al., CVPR 2010.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import networkx
import numpy as np

from engine.estimators.lenses import camera_focal_px, unit_rays, uses_rays
from engine.estimators.two_view_geometry import epipolar_angles_rad
from engine.geometry import compose_poses, image_scale, invert_pose, skew
from engine.mapping.sparse_map import SparseMap
from engine.types import Float64Array, FrameId, ImagePair, VerifiedPair

_STRONG_INLIERS = 60
_STRONG_INLIER_RATIO = 0.6
_MAX_SHARED_RATIO = 0.1  # of a pair's inliers seen as common points, else the pair is in use
_CONTRADICTION_PX = 20.0  # median distance to the epipolar line, at an image edge of 1000 px


@dataclass(frozen=True, slots=True, kw_only=True)
class Misplacement:
    """Keyframes in the wrong place, and the pairs that put them there."""

    keyframe_ids: tuple[FrameId, ...]
    misleading: tuple[ImagePair, ...]
    evidence: ImagePair  # the strong pair that contradicts them


def find_misplacement(sparse_map: SparseMap, frame_id: FrameId) -> Misplacement | None:
    """Looks for keyframes in the wrong place when a strong pair of a keyframe contradicts the map.

    Args:
        sparse_map: the map.
        frame_id: a registered keyframe, usually the newest; only when one of its strong pairs
            contradicts the map is the whole map examined.

    Returns:
        What to take out of the map, or None when the strongest evidence agrees with it.
    """
    if next(contradicted_pairs(sparse_map, frame_id), None) is None:
        return None
    tree = networkx.maximum_spanning_tree(_registered_graph(sparse_map), weight="num_inliers")
    contradicted = [
        data["pair"]
        for _, _, data in sorted(tree.edges(data=True), key=lambda edge: edge[2]["pair"].pair)
        if _is_strong(data["pair"]) and _contradicts(sparse_map, data["pair"])
    ]
    if not contradicted:
        return None
    tree.remove_edges_from([(pair.pair.first, pair.pair.second) for pair in contradicted])
    # The largest part stays; of equal ones the part with the oldest keyframe.
    parts = sorted(networkx.connected_components(tree), key=lambda part: (-len(part), min(part)))
    return Misplacement(
        keyframe_ids=tuple(sorted(set().union(*parts[1:]))),
        misleading=_misleading(sparse_map, parts),
        evidence=max(contradicted, key=lambda pair: pair.num_inliers).pair,
    )


def take_out(sparse_map: SparseMap, misplacement: Misplacement) -> None:
    """Takes misplaced keyframes out of the map and forgets the pairs that misled it."""
    for pair in misplacement.misleading:
        sparse_map.distrust_pair(pair)
    sparse_map.deregister(misplacement.keyframe_ids)


def strong_pairs(sparse_map: SparseMap, frame_id: FrameId) -> list[VerifiedPair]:
    """The strong pairs of a keyframe with registered ones."""
    return [
        pair
        for other, pair in sparse_map.neighbors(frame_id).items()
        if _is_strong(pair) and sparse_map.is_registered(other)
    ]


def contradicted_pairs(sparse_map: SparseMap, frame_id: FrameId) -> Iterator[VerifiedPair]:
    """The strong pairs of a registered keyframe that contradict the map."""
    shared = sparse_map.covisibility(frame_id)
    for pair in strong_pairs(sparse_map, frame_id):
        other = pair.pair.first if pair.pair.second == frame_id else pair.pair.second
        # A pair whose matches became common points is in use; this test is much the cheaper one.
        is_in_use = shared.get(other, 0) >= _MAX_SHARED_RATIO * pair.num_inliers
        if not is_in_use and _contradicts(sparse_map, pair):
            yield pair


def _is_strong(pair: VerifiedPair) -> bool:
    return pair.num_inliers >= max(_STRONG_INLIERS, _STRONG_INLIER_RATIO * pair.num_matches)


def _registered_graph(sparse_map: SparseMap) -> networkx.Graph[FrameId]:
    graph: networkx.Graph[FrameId] = networkx.Graph()
    for frame_id in sparse_map.registered_ids:
        graph.add_node(frame_id)
        for other, pair in sorted(sparse_map.neighbors(frame_id).items()):
            if other < frame_id and sparse_map.is_registered(other):
                graph.add_edge(other, frame_id, num_inliers=pair.num_inliers, pair=pair)
    return graph


def _misleading(sparse_map: SparseMap, parts: Sequence[set[FrameId]]) -> tuple[ImagePair, ...]:
    """Pairs that agree with the wrong places: between parts, weaker than what contradicts them."""
    part_of = {frame_id: number for number, part in enumerate(parts) for frame_id in part}
    return tuple(
        pair.pair
        for frame_id in sorted(part_of)
        for other, pair in sorted(sparse_map.neighbors(frame_id).items())
        if other < frame_id
        and other in part_of
        and part_of[other] != part_of[frame_id]
        and not _contradicts(sparse_map, pair)
    )


def _contradicts(sparse_map: SparseMap, verified: VerifiedPair) -> bool:
    """Whether the map's poses put a pair's matches far from their epipolar lines."""
    first = sparse_map.keyframe(verified.pair.first)
    second = sparse_map.keyframe(verified.pair.second)
    camera1 = sparse_map.camera(first.calibration_key)
    camera2 = sparse_map.camera(second.calibration_key)
    rows1, rows2 = verified.inlier_matches_idx.T
    cam2_from_cam1 = compose_poses(
        sparse_map.cam_from_world(second.frame_id),
        invert_pose(sparse_map.cam_from_world(first.frame_id)),
    )
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
    max_distance_px = _CONTRADICTION_PX * image_scale(camera2.width, camera2.height)
    distances = distances[np.isfinite(distances)]  # some distortion cannot be undone
    if not len(distances):
        return False
    return bool(np.median(distances) * camera_focal_px(camera2) > max_distance_px)


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
