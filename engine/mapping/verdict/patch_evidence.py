"""Keyframes that a small patch of their image alone holds in a map.

Wallpaper, a poster or a sign that hangs in two places registers a photo in the wrong one, and
whatever is asked agrees: all its matches are of that patch. The rest of the image says nothing of
the place, so something else has to: the keyframe's own position, or the places of the keyframes of
a video just before and after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import cv2
import numpy as np

from engine.estimators.lenses import camera_focal_px
from engine.geometry import camera_center
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.positions.georeferencing import Placement
from engine.mapping.verdict.part_evidence import spread
from engine.types import Float64Array, FrameId, Keyframe

# Of an image. Wallpaper that held a photo in the wrong place had 3.7 % of it. The least keyframe of
# 40 good maps has 10.8 %, but for one of 2.4 % that its position confirms.
_PATCH_RATIO = 0.06
# Of the middle keyframe's share. A small thing before an empty background has little of any image,
# and all keyframes hold each other around it.
_OF_MIDDLE_RATIO = 1.0 / 3.0
_INNER_RATIO = 0.9  # of the observations, nearest their median: a few stray ones span an image
_MAX_OBSERVATIONS = 256  # that are looked at, spread over all
_LEAST_OBSERVATIONS = 6  # fewer, wherever they are, may span little by chance
# Steradians around the axis that an image of a lens of 21 mm has, by 36 x 24 mm of film. Shares of
# images of wider lenses are of so much of them: a panorama is small wherever it is looked at.
_WIDEST = 2.0
_NEAR_RATIO = 0.05  # of the extent of a map, from where something else has a keyframe


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldByPatch:
    """A keyframe whose place rests on a patch of its image, and that nothing else confirms."""

    frame_id: FrameId
    patch_ratio: float  # of its image, that has its observations


def find_held_by_patch(
    sparse_map: SparseMap, keyframes: Sequence[Keyframe], placement: Placement | None
) -> tuple[HeldByPatch, ...]:
    """Looks for keyframes whose observations are all in a small patch of their image.

    Those that have much less of their image than others are found, unless their own position or
    their neighbours in time confirm where the map has them.

    Args:
        sparse_map: the map.
        keyframes: all, in order of arrival, registered or not.
        placement: where the map lies on the globe; None: nowhere.
    """
    ids = sparse_map.registered_ids
    ratios = np.array([_patch_ratio_of(sparse_map, i) for i in ids])
    if np.isnan(ratios).all():
        return ()
    limit = min(_PATCH_RATIO, _OF_MIDDLE_RATIO * float(np.nanmedian(ratios)))
    small = {i: float(ratio) for i, ratio in zip(ids, ratios, strict=True) if ratio < limit}
    if not small:
        return ()
    places = _Places.of(sparse_map, small.keys())
    return tuple(
        HeldByPatch(frame_id=frame_id, patch_ratio=ratio)
        for frame_id, ratio in small.items()
        if not places.confirms_by_position(frame_id, placement)
        and not places.confirms_by_time(frame_id, keyframes)
    )


def patch_ratio(keypoints_xy: Float64Array, *, width: int, height: int, focal_px: float) -> float:
    """The share of an image that most of some keypoints (N, 2) px span; NaN for very few.

    It is the area of the convex hull of those nearest their median. An image of a wide lens counts
    as one of so much as an ordinary wide-angle lens sees.
    """
    if len(keypoints_xy) < _LEAST_OBSERVATIONS:
        return math.nan
    num_looked_at = min(len(keypoints_xy), _MAX_OBSERVATIONS)
    looked_at = keypoints_xy[spread(len(keypoints_xy), num_looked_at)]
    offsets = looked_at - np.median(looked_at, axis=0)
    num_inner = math.ceil(_INNER_RATIO * num_looked_at)
    nearest = np.argsort((offsets**2).sum(axis=1))[:num_inner]
    hull = cv2.convexHull(offsets[nearest].astype(np.float32))
    return cv2.contourArea(hull) / min(width * height, _WIDEST * focal_px**2)


def _patch_ratio_of(sparse_map: SparseMap, frame_id: FrameId) -> float:
    keyframe = sparse_map.keyframe(frame_id)
    observes = sparse_map.point3D_ids(frame_id) >= 0
    return patch_ratio(
        keyframe.features.keypoints_xy[observes],
        width=keyframe.width,
        height=keyframe.height,
        focal_px=camera_focal_px(sparse_map.camera(keyframe.calibration_key)),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Places:
    """Where a map has its keyframes, and which of them are asked about."""

    centers: dict[FrameId, Float64Array]  # (3,) of registered keyframes
    asked: frozenset[FrameId]
    extent_map: float  # of the others

    @classmethod
    def of(cls, sparse_map: SparseMap, asked: Set[FrameId]) -> _Places:
        ids = sparse_map.registered_ids
        centers = camera_center(np.array([sparse_map.cam_from_world(i) for i in ids]))
        others = centers[[i not in asked for i in ids]]
        return cls(
            centers=dict(zip(ids, centers, strict=True)),
            asked=frozenset(asked),
            extent_map=float(np.linalg.norm(np.ptp(others, axis=0))),
        )

    def confirms_by_position(self, frame_id: FrameId, placement: Placement | None) -> bool:
        """Whether a keyframe's own position is where the map has it.

        Positions can be wrong by metres: in a small map they tell nothing.
        """
        if placement is None or frame_id not in placement.frame_ids:
            return False
        found, row = placement.georeference, placement.frame_ids.index(frame_id)
        near_m = _NEAR_RATIO * self.extent_map * found.metres_per_map_unit
        return bool(found.is_inlier[row] and found.residuals_m[row] <= near_m)

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
