"""Depth maps that see the same surfaces, compared: how many agree, and what others see through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from engine.dense.pinholes import plane_xy, projected
from engine.dense_types import DepthMap
from engine.types import BoolArray, Float32Array, Float64Array, FrameId, Uint8Array

_AGREE_SIGMAS = 3.0  # depths differ by so many standard deviations at most
_AGREE_RATIO = 0.006  # or by so much of the depth: pixels fall between those of the other map
_THROUGH_FACTOR = 2.0  # so much further before what another map sees a point is seen through
_STEP_PX = 2  # of the pixels that are compared; those between follow them


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OtherDepth:
    """Another keyframe's depth map, as it lies to the one that is checked."""

    depth_map: DepthMap  # in the same unit
    other_from_keyframe: Float64Array  # (3, 4) as the map has it now


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Agreement:
    """What other depth maps say about the pixels of one."""

    num_agreeing: Uint8Array  # (H, W) maps that have the same surface there, and a vote
    num_through: Uint8Array  # (H, W) maps that see something behind it


def compare_depths(depth_map: DepthMap, others: Sequence[OtherDepth]) -> Agreement:
    """Counts for each pixel the other maps that agree with its depth, and that see through it.

    A map in which the point is hidden, or that knows no depth there, says nothing. That of a
    neighbour whose image agreed may see through a pixel, but has no second vote: it may come from
    the same two images. Every second pixel each way is compared.
    """
    height, width = depth_map.depth.shape
    depth = depth_map.depth[::_STEP_PX, ::_STEP_PX]
    error = depth_map.relative_error[::_STEP_PX, ::_STEP_PX]
    agreeing, through = np.zeros(depth.shape, np.uint8), np.zeros(depth.shape, np.uint8)
    for other in others:
        agrees, is_through = _compare(depth, error, depth_map.pinhole, other)
        agreeing += agrees & ~_has_voted(depth_map, other.depth_map.frame_id)
        through += is_through
    full = [
        np.repeat(np.repeat(counts, _STEP_PX, axis=0), _STEP_PX, axis=1)[:height, :width]
        for counts in (agreeing, through)
    ]
    return Agreement(num_agreeing=full[0], num_through=full[1])


def with_agreement(depth_map: DepthMap, agreement: Agreement) -> DepthMap:
    """The depth map with the votes of others, without what more of them see through than confirm.

    The neighbours that a depth was made with count as they did, and which they were is not known
    any more.
    """
    votes = depth_map.num_agreeing.astype(np.int64) + agreement.num_agreeing
    is_known = (depth_map.num_agreeing > 0) & (agreement.num_through < votes)
    return replace(
        depth_map,
        depth=np.where(is_known, depth_map.depth, np.float32(0.0)),
        relative_error=np.where(is_known, depth_map.relative_error, np.float32(0.0)),
        num_agreeing=np.where(is_known, np.minimum(votes, 255), 0).astype(np.uint8),
        agreeing_bits=None,
    )


def _has_voted(depth_map: DepthMap, frame_id: FrameId) -> BoolArray:
    """Whether the image of a keyframe agreed with compared pixels (h, w) of a depth map."""
    compared = depth_map.num_agreeing[::_STEP_PX, ::_STEP_PX]
    index = np.flatnonzero(depth_map.neighbour_ids == frame_id)
    if not len(index):
        return np.zeros(compared.shape, np.bool_)
    if depth_map.agreeing_bits is None:
        return np.asarray(compared > 0)
    bits = depth_map.agreeing_bits[::_STEP_PX, ::_STEP_PX]
    return np.asarray(bits >> np.uint8(index[0]) & 1 > 0)


def _compare(
    depth: Float32Array, error: Float32Array, pinhole: Float64Array, other: OtherDepth
) -> tuple[BoolArray, BoolArray]:
    """Whether the other map agrees with the compared pixels (h, w), and sees through them."""
    height, width = depth.shape
    x, y = (
        slopes.astype(np.float32)
        for slopes in plane_xy(pinhole, np.arange(width) * _STEP_PX, np.arange(height) * _STEP_PX)
    )
    pose = other.other_from_keyframe.astype(np.float32)
    in_other: list[Float32Array] = [
        np.asarray(depth * (row[0] * x + (row[1] * y + row[2])[:, None]) + row[3]) for row in pose
    ]
    is_before = (depth > 0) & (in_other[2] > 0)
    columns, lines = (
        np.clip(np.where(is_before, place - np.float32(0.5), -10.0), -10.0, 1e5).astype(np.float32)
        for place in projected(other.depth_map.pinhole.astype(np.float32), in_other)
    )
    seen = cv2.remap(other.depth_map.depth, columns, lines, cv2.INTER_NEAREST)
    seen_error = cv2.remap(other.depth_map.relative_error, columns, lines, cv2.INTER_NEAREST)
    is_known = is_before & (seen > 0)
    tolerance = np.maximum(
        _AGREE_SIGMAS * np.sqrt(error * error + seen_error * seen_error), _AGREE_RATIO
    )
    agrees = is_known & (np.abs(in_other[2] - seen) < tolerance * seen)
    # Beside an edge the other map's neighbouring pixel may hold the surface.
    nearest = cv2.erode(np.where(seen > 0, seen, np.inf).astype(np.float32), np.ones((3, 3)))
    through = is_known & (in_other[2] < (1.0 - _THROUGH_FACTOR * tolerance) * nearest)
    return agrees, through
