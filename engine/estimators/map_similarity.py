"""The similarity between two maps, from what the keyframes of each see of the other one.

A keypoint of one map's keyframe that matches a keypoint of the other map sees the other map's point
there. Keyframes that see enough of them are posed against the other map; together with the depths
that both maps give the matched points, each of them proposes how the maps lie to each other. That
is counted over the rays of all keyframes of both maps, so that a proposal holds only where other
pairs agree with it. Depths of points seen from few places are uncertain, hence the count is of
angles between rays and points, never of distances in space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.geometry import rotation_from_vector
from engine.types import BoolArray, Float64Array, Int64Array

_MAX_STEPS = 10  # of the refinement
_STEP = 1e-6  # of numeric derivatives, radians and shares of the extent
_CONVERGED = 1e-6
_OTHER_SCALES = (1.0 / 1.5, 1.5)  # that must explain less
_LEFT_RATIO = 0.6  # of the inliers, that other scales may explain


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sights:
    """What keyframes of one map see of another map."""

    keyframe_ids: Int64Array  # (N,)
    rows: Int64Array  # (N,) of keypoints
    seen_ids: Int64Array  # (N,) keyframes of the other map whose keypoints match them
    centers: Float64Array  # (N, 3) of the keyframes, in their own map
    rays: Float64Array  # (N, 3) unit, in their own map
    bounds_rad: Float64Array  # (N,) how far off a point may be
    points: Float64Array  # (N, 3) in the other map

    @classmethod
    def together(cls, parts: Sequence[Sights]) -> Sights:
        """Several as one."""

        def joined(name: str) -> Float64Array:
            return np.concatenate([getattr(part, name) for part in parts])

        return cls(
            keyframe_ids=joined("keyframe_ids").astype(np.int64),
            rows=joined("rows").astype(np.int64),
            seen_ids=joined("seen_ids").astype(np.int64),
            centers=joined("centers"),
            rays=joined("rays"),
            bounds_rad=joined("bounds_rad"),
            points=joined("points"),
        )

    def agreeing(self, own_from_other: Float64Array) -> BoolArray:
        """Which of them (N,) a similarity (3, 4) explains."""
        offsets = self.points @ own_from_other[:, :3].T + own_from_other[:, 3] - self.centers
        off = np.linalg.norm(np.cross(self.rays, offsets), axis=1)
        along = (self.rays * offsets).sum(axis=1)
        return np.asarray(np.arctan2(off, along) < self.bounds_rad)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MapSimilarity:
    """How one map lies to another, and what agrees with it."""

    a_from_b: Float64Array  # (3, 4), [s R | t]
    num_inliers: int  # keypoints
    num_all: int  # keypoints that see a point of the other map
    num_keyframes: tuple[int, int]  # of either map that have a part in it
    has_scale: bool  # whether other scales explain clearly less


def estimate_map_similarity(
    proposals: Sequence[Float64Array],
    *,
    sights_in_a: Sights,
    sights_in_b: Sights,
    min_per_keyframe: int,
) -> MapSimilarity | None:
    """The proposed similarity that explains most, refined; None without any proposal.

    Args:
        proposals: similarities (3, 4), a_from_b.
        sights_in_a: what keyframes of map a see of map b.
        sights_in_b: what keyframes of map b see of map a.
        min_per_keyframe: keypoints of a keyframe that have to agree for it to have a part.
    """
    if not len(proposals):
        return None
    both = (sights_in_a, sights_in_b)
    counts = [_num_inliers(proposal, *both) for proposal in proposals]
    best = proposals[int(np.argmax(counts))]
    refined = _refined(best, *both)
    if _num_inliers(refined, *both) >= max(counts):
        best = refined
    agreeing = sights_in_a.agreeing(best), sights_in_b.agreeing(invert_similarity(best))
    num_inliers = _num_inliers(best, *both)
    scaled = [_num_inliers(_rescaled(best, ratio, sights_in_b), *both) for ratio in _OTHER_SCALES]
    return MapSimilarity(
        a_from_b=best,
        num_inliers=num_inliers,
        num_all=_num_keypoints(sights_in_a) + _num_keypoints(sights_in_b),
        num_keyframes=_num_keyframes(both, agreeing, min_per_keyframe=min_per_keyframe),
        has_scale=max(scaled) <= _LEFT_RATIO * num_inliers,
    )


def invert_similarity(b_from_a: Float64Array) -> Float64Array:
    """The inverse of a similarity (3, 4), [s R | t]."""
    inverse = np.linalg.inv(b_from_a[:, :3])
    return np.column_stack([inverse, -inverse @ b_from_a[:, 3]])


def _num_inliers(a_from_b: Float64Array, sights_in_a: Sights, sights_in_b: Sights) -> int:
    return _num_keypoints(sights_in_a, sights_in_a.agreeing(a_from_b)) + _num_keypoints(
        sights_in_b, sights_in_b.agreeing(invert_similarity(a_from_b))
    )


def _num_keypoints(sights: Sights, mask: BoolArray | None = None) -> int:
    """Keypoints among some sights (N,); one may match several points."""
    chosen = np.ones(len(sights.rows), np.bool_) if mask is None else mask
    return len(np.unique(np.column_stack([sights.keyframe_ids, sights.rows])[chosen], axis=0))


def _num_keyframes(
    both: tuple[Sights, Sights], agreeing: tuple[BoolArray, BoolArray], *, min_per_keyframe: int
) -> tuple[int, int]:
    """Keyframes of map a, and of map b, that enough of what agrees is seen by, or seen in."""
    (in_a, in_b), (mask_a, mask_b) = both, agreeing
    of_a = (in_a.keyframe_ids[mask_a], in_b.seen_ids[mask_b])
    of_b = (in_b.keyframe_ids[mask_b], in_a.seen_ids[mask_a])
    numbers = []
    for sides in (of_a, of_b):
        counts = np.unique(np.concatenate(sides), return_counts=True)[1]
        numbers.append(int(np.count_nonzero(counts >= 2 * min_per_keyframe)))
    return numbers[0], numbers[1]


def _rescaled(a_from_b: Float64Array, ratio: float, sights_in_b: Sights) -> Float64Array:
    """Another scale that leaves the middle of map b's seeing keyframes where it is."""
    centers = sights_in_b.centers
    middle = np.median(centers, axis=0) if len(centers) else np.zeros(3)
    onto = a_from_b[:, :3] @ middle + a_from_b[:, 3]
    linear = ratio * a_from_b[:, :3]
    return np.column_stack([linear, onto - linear @ middle])


def _refined(a_from_b: Float64Array, sights_in_a: Sights, sights_in_b: Sights) -> Float64Array:
    """Gauss-Newton over turn, shift and scale about the points' middle, robustly weighted."""
    seen = sights_in_a.points if len(sights_in_a.points) else sights_in_b.centers
    middle = np.median(seen @ a_from_b[:, :3].T + a_from_b[:, 3], axis=0)
    extent = float(np.linalg.norm(np.concatenate([sights_in_a.centers, middle[None]]) - middle))
    extent = max(extent / np.sqrt(len(sights_in_a.centers) + 1), 1e-9)

    def moved(params: Float64Array) -> Float64Array:
        """After a turn, a shift (of extents) and a change of scale (its logarithm), (7,)."""
        linear = np.exp(params[6]) * rotation_from_vector(params[:3])
        shift = middle - linear @ middle + extent * params[3:6]
        return np.column_stack([linear @ a_from_b[:, :3], linear @ a_from_b[:, 3] + shift])

    def residuals(params: Float64Array) -> Float64Array:
        now = moved(params)
        return np.concatenate(
            [_offsets(sights_in_a, now), _offsets(sights_in_b, invert_similarity(now))]
        )

    params = np.zeros(7)
    for _ in range(_MAX_STEPS):
        now = residuals(params)
        columns = [(residuals(params + _STEP * unit) - now) / _STEP for unit in np.eye(7)]
        jacobian = np.stack(columns, axis=-1).reshape(-1, 7)
        squares = (now**2).sum(axis=1, keepdims=True)
        weights = np.repeat(1.0 / (1.0 + 4.0 * squares), 3)
        normal = jacobian.T @ (weights[:, None] * jacobian) + 1e-9 * np.eye(7)
        step = np.linalg.solve(normal, -jacobian.T @ (weights * now.ravel()))
        if not np.isfinite(step).all():
            break
        params = params + step
        if np.abs(step).max() < _CONVERGED:
            break
    refined = moved(params)
    return refined if np.isfinite(refined).all() else a_from_b


def _offsets(sights: Sights, own_from_other: Float64Array) -> Float64Array:
    """Angles (N, 3) from rays to points about the axes, as shares of what is allowed."""
    offsets = sights.points @ own_from_other[:, :3].T + own_from_other[:, 3] - sights.centers
    offsets /= np.maximum(np.linalg.norm(offsets, axis=1, keepdims=True), 1e-12)
    return np.asarray(np.cross(sights.rays, offsets) / sights.bounds_rad[:, None])
