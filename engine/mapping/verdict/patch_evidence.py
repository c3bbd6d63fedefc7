"""Keyframes that a small patch of their image alone holds in a map.

Wallpaper, a poster or a sign that hangs in two places registers a photo in the wrong one, and
whatever is asked agrees: all its matches are of that patch. The rest of the image says nothing of
the place, so something else has to: the keyframe's own position, or the places of the keyframes of
a video just before and after it. So may a part of several keyframes be held, however well they hold
each other: what counts is what they share with all others.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import networkx
import numpy as np

from engine.estimators.lenses import camera_focal_px
from engine.geometry import camera_center
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.positions.georeferencing import Placement
from engine.mapping.verdict.part_evidence import spread
from engine.types import (
    BoolArray,
    Contradiction,
    Float64Array,
    FrameId,
    Int64Array,
    Keyframe,
    PackedMask,
    VerifiedPair,
)

# Of an image. Wallpaper that held a photo in the wrong place had 3.7 % of it. The least keyframe of
# 40 good maps has 10.8 %, but for one of 2.4 % that its position confirms.
_PATCH_RATIO = 0.06
# Of the middle keyframe's share. A small thing before an empty background has little of any image,
# and all keyframes hold each other around it.
_OF_MIDDLE_RATIO = 1.0 / 3.0
# Likewise, of the side of a joint that sees more of what joins it: one that came close to a thing
# has as much as others. Two parts in wrong places had 3.7 and 4.3 % of the images of one side and
# 14 and 17 % of those of the other; parts of 30 good maps have 14 % at least of either side's.
_NOT_CLOSE_RATIO = 2.0 / 3.0
_INNER_RATIO = 0.9  # of the observations, nearest their median: a few stray ones span an image
_MAX_OBSERVATIONS = 256  # that are looked at, spread over all
_LEAST_OBSERVATIONS = 6  # fewer, wherever they are, may span little by chance
# Steradians that an image of a lens of 21 mm on 36 x 24 mm film has. Shares of images of wider
# lenses are of so much: what fills an ordinary image is a small part of a panorama.
_WIDEST = 2.0
_NUM_CUTS = 16  # joints between parts of a map that are looked at, the weakest
_LEAST_USABLE = 0.25  # of an image: a patch in a smaller window of a mask is small all the same
_NEAR_RATIO = 0.05  # of the extent of a map, from where something else has a keyframe


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldByPatch:
    """Keyframes whose place rests on a patch of their images, and that nothing else confirms."""

    frame_ids: tuple[FrameId, ...]  # one, or a part that holds together
    patch_ratio: float  # of the images of one side, that has what they share with all others


def find_held_by_patch(
    sparse_map: SparseMap,
    keyframes: Sequence[Keyframe],
    pairs: Iterable[VerifiedPair],
    placement: Placement | None,
) -> tuple[HeldByPatch, ...]:
    """Looks for keyframes, and parts of a map, that a small patch of their images alone holds.

    It is small by itself, and beside what other keyframes observe. Where positions or neighbours
    in time confirm where the map has them, they are not found.

    Args:
        sparse_map: the map.
        keyframes: all, in order of arrival, registered or not.
        pairs: of registered keyframes; where they hold the map together least, it has parts.
        placement: where the map lies on the globe; None: nowhere.
    """
    ids = sparse_map.registered_ids
    observed = [_Observed.of(sparse_map, i) for i in ids]
    ratios = np.array([one.patch_ratio() for one in observed])
    if np.isnan(ratios).all():
        return ()
    middle = float(np.nanmedian(ratios))
    limit = _limit(middle)
    held = [
        HeldByPatch(frame_ids=(i,), patch_ratio=float(ratio))
        for i, ratio in zip(ids, ratios, strict=True)
        if ratio < limit
    ]
    shared = _Shared.of(observed)
    for part in _weakest_parts(pairs, ids):
        ratio = shared.joint_ratio(part, limit=_NOT_CLOSE_RATIO * middle)
        if ratio < limit:
            held.append(HeldByPatch(frame_ids=part, patch_ratio=ratio))
    if not held:
        return ()
    places = _Places.of(sparse_map, frozenset(i for one in held for i in one.frame_ids))
    return tuple(
        one
        for one in held
        if not places.confirms_by_position(one.frame_ids, placement)
        and not any(places.confirms_by_time(i, keyframes) for i in one.frame_ids)
    )


def beyond_patches(
    sparse_map: SparseMap, contradictions: Sequence[tuple[VerifiedPair, Contradiction]]
) -> tuple[Contradiction, ...]:
    """What contradicts a map, but for pairs whose matches are all of a small patch.

    What looks the same elsewhere makes such pairs, as it holds keyframes in a wrong place.

    Args:
        sparse_map: the map.
        contradictions: pairs of registered keyframes.
    """
    if not contradictions:
        return ()
    observed = [_Observed.of(sparse_map, i) for i in sparse_map.registered_ids]
    middle = float(np.nanmedian([one.patch_ratio() for one in observed]))
    return tuple(
        contradiction
        for verified, contradiction in contradictions
        if not _is_of_patch(sparse_map, verified, middle=middle)
    )


def _is_of_patch(sparse_map: SparseMap, verified: VerifiedPair, *, middle: float) -> bool:
    """Whether the inliers of a pair span little of one image, and not much of the other."""
    ends = (verified.pair.first, verified.pair.second)
    ratios = []
    for frame_id, rows in zip(ends, verified.inlier_matches_idx.T, strict=True):
        keyframe = sparse_map.keyframe(frame_id)
        ratio = patch_ratio(
            keyframe.features.keypoints_xy[rows],
            usable_px=_usable_px(keyframe),
            focal_px=camera_focal_px(sparse_map.camera(keyframe.calibration_key)),
        )
        ratios.append(ratio)
    return min(ratios) < _limit(middle) and max(ratios) < _NOT_CLOSE_RATIO * middle


def _limit(middle: float) -> float:
    """The share of an image below which a patch is small, by that of a map's middle keyframe."""
    return min(_PATCH_RATIO, _OF_MIDDLE_RATIO * middle)


def _usable_px(keyframe: Keyframe) -> float:
    """How many pixels of an image may be used, but at least a part of all."""
    num_px = keyframe.width * keyframe.height
    num_usable = num_px if keyframe.mask is None else _num_usable(keyframe.mask)
    return max(float(num_usable), _LEAST_USABLE * num_px)


@functools.lru_cache(maxsize=64)  # many keyframes share one
def _num_usable(mask: PackedMask) -> int:
    return mask.num_usable()


def patch_ratio(keypoints_xy: Float64Array, *, usable_px: float, focal_px: float) -> float:
    """The share of an image that most of some keypoints (N, 2) px span; NaN for very few.

    It is the area of the convex hull of those nearest their median. Of a masked image, what may be
    used counts; of a wide lens's, as much as an ordinary wide-angle lens sees.
    """
    if len(keypoints_xy) < _LEAST_OBSERVATIONS:
        return math.nan
    num_looked_at = min(len(keypoints_xy), _MAX_OBSERVATIONS)
    looked_at = keypoints_xy[spread(len(keypoints_xy), num_looked_at)]
    offsets = looked_at - np.median(looked_at, axis=0)
    num_inner = math.ceil(_INNER_RATIO * num_looked_at)
    nearest = np.argsort((offsets**2).sum(axis=1))[:num_inner]
    hull = cv2.convexHull(offsets[nearest].astype(np.float32))
    return cv2.contourArea(hull) / min(usable_px, _WIDEST * focal_px**2)


def _weakest_parts(
    pairs: Iterable[VerifiedPair], frame_ids: Sequence[FrameId]
) -> list[tuple[FrameId, ...]]:
    """Parts of several keyframes, the smaller side of each cut where pairs hold a map least.

    Cut are the weakest edges of the maximum spanning tree of pairs.
    """
    graph: networkx.Graph[FrameId] = networkx.Graph()
    graph.add_nodes_from(frame_ids)
    for one in pairs:
        graph.add_edge(one.pair.first, one.pair.second, weight=one.num_inliers)
    tree = networkx.maximum_spanning_tree(graph)
    edges = [
        (data["weight"], first, second)
        for first, second, data in tree.edges(data=True)
        if tree.degree(first) > 1 and tree.degree(second) > 1
    ]
    parts = []
    for weight, first, second in sorted(edges)[:_NUM_CUTS]:
        tree.remove_edge(first, second)
        sides: list[list[FrameId]] = [
            sorted(networkx.node_connected_component(tree, end)) for end in (first, second)
        ]
        tree.add_edge(first, second, weight=weight)
        smaller = min(sides, key=len)
        parts.append(tuple(smaller))
    return parts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Observed:
    """What one keyframe observes of a map."""

    frame_id: FrameId
    point3D_ids: Int64Array  # (N,)
    keypoints_xy: Float64Array  # (N, 2) px
    usable_px: float
    focal_px: float

    @classmethod
    def of(cls, sparse_map: SparseMap, frame_id: FrameId) -> _Observed:
        keyframe, point3D_ids = sparse_map.keyframe(frame_id), sparse_map.point3D_ids(frame_id)
        observes = point3D_ids >= 0
        return cls(
            frame_id=frame_id,
            point3D_ids=point3D_ids[observes],
            keypoints_xy=keyframe.features.keypoints_xy[observes],
            usable_px=_usable_px(keyframe),
            focal_px=camera_focal_px(sparse_map.camera(keyframe.calibration_key)),
        )

    def patch_ratio(self, which: BoolArray | slice = slice(None)) -> float:
        """The share of the image that some of the observations (N,) span; NaN for very few."""
        return patch_ratio(
            self.keypoints_xy[which], usable_px=self.usable_px, focal_px=self.focal_px
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Shared:
    """All observations (M,) of a map, those of each keyframe together."""

    observed: dict[FrameId, _Observed]
    slices: dict[FrameId, slice]  # of the observations
    points_idx: Int64Array  # (M,)

    @classmethod
    def of(cls, observed: Sequence[_Observed]) -> _Shared:
        _, points_idx = np.unique(
            np.concatenate([one.point3D_ids for one in observed]), return_inverse=True
        )
        ends = np.cumsum([len(one.point3D_ids) for one in observed]).tolist()
        return cls(
            observed={one.frame_id: one for one in observed},
            slices={
                one.frame_id: slice(begin, end)
                for one, begin, end in zip(observed, [0, *ends], ends, strict=False)
            },
            points_idx=points_idx.astype(np.int64),
        )

    def joint_ratio(self, part: Sequence[FrameId], *, limit: float) -> float:
        """The share of the images of a part, or of all others, that has what both observe.

        Of the two the smaller one, and NaN where the larger one is at least ``limit``.
        """
        own = self._patch_ratio(part, limit=limit)
        if not own < limit:
            return math.nan
        members = set(part)
        others = [frame_id for frame_id in self.observed if frame_id not in members]
        of_others = self._patch_ratio(others, limit=limit)
        return min(own, of_others) if of_others < limit else math.nan

    def _patch_ratio(self, part: Sequence[FrameId], *, limit: float) -> float:
        """The largest share of an image of a part that has points which others observe, too.

        One of at least ``limit`` may be not the largest. NaN where very few points are shared.
        """
        is_of_part = np.zeros(len(self.points_idx), np.bool_)
        for frame_id in part:
            is_of_part[self.slices[frame_id]] = True
        is_of_others = np.zeros(int(self.points_idx.max(initial=-1)) + 1, np.bool_)
        is_of_others[self.points_idx[~is_of_part]] = True
        shared = {i: is_of_others[self.points_idx[self.slices[i]]] for i in part}
        largest = math.nan
        for frame_id in sorted(part, key=lambda i: -int(shared[i].sum())):
            largest = np.fmax(largest, self.observed[frame_id].patch_ratio(shared[frame_id]))
            if largest >= limit:
                break
        return float(largest)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Places:
    """Where a map has its keyframes, and which of them are asked about."""

    centers: dict[FrameId, Float64Array]  # (3,) of registered keyframes
    asked: frozenset[FrameId]
    extent_map: float

    @classmethod
    def of(cls, sparse_map: SparseMap, asked: frozenset[FrameId]) -> _Places:
        ids = sparse_map.registered_ids
        centers = camera_center(np.array([sparse_map.cam_from_world(i) for i in ids]))
        return cls(
            centers=dict(zip(ids, centers, strict=True)),
            asked=asked,
            extent_map=float(np.linalg.norm(np.ptp(centers, axis=0))),
        )

    def confirms_by_position(
        self, frame_ids: Sequence[FrameId], placement: Placement | None
    ) -> bool:
        """Whether most of the keyframes' own positions are where the map has them.

        Positions can be wrong by metres: in a small map they tell nothing.
        """
        if placement is None:
            return False
        found = placement.georeference
        near_m = _NEAR_RATIO * self.extent_map * found.metres_per_map_unit
        rows = [row for row, i in enumerate(placement.frame_ids) if i in frame_ids]
        is_near = found.is_inlier[rows] & (found.residuals_m[rows] <= near_m)
        return bool(2 * np.count_nonzero(is_near) > len(rows))

    def confirms_by_time(self, frame_id: FrameId, keyframes: Sequence[Keyframe]) -> bool:
        """Whether a keyframe of a video is where those just before and after it have the camera.

        They do not tell where one of them has no place: the camera was lost there. At an end of a
        video there is one.
        """
        keyframe = next(one for one in keyframes if one.frame_id == frame_id)
        if keyframe.is_photo:
            return False
        own = [one for one in keyframes if one.camera_key == keyframe.camera_key]
        row = own.index(keyframe)
        nearest = [self._first_other(own[:row][::-1]), self._first_other(own[row + 1 :])]
        beside = [one for one in nearest if one is not None]
        if not beside or any(one.frame_id not in self.centers for one in beside):
            return False
        offset = self._center_at(keyframe.captured_at_s, beside) - self.centers[frame_id]
        return float(np.linalg.norm(offset)) <= _NEAR_RATIO * self.extent_map

    def _first_other(self, keyframes: Iterable[Keyframe]) -> Keyframe | None:
        """The first keyframe that is not asked about itself."""
        return next((one for one in keyframes if one.frame_id not in self.asked), None)

    def _center_at(self, captured_at_s: float, beside: Sequence[Keyframe]) -> Float64Array:
        """Where the camera (3,) is at a time, by one keyframe or between two, in their order."""
        first, last = beside[0], beside[-1]
        span_s = last.captured_at_s - first.captured_at_s
        share = (captured_at_s - first.captured_at_s) / span_s if span_s > 0.0 else 0.0
        first_center, last_center = self.centers[first.frame_id], self.centers[last.frame_id]
        center: Float64Array = first_center + share * (last_center - first_center)
        return center
