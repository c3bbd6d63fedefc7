"""The similarity between two maps, or two parts of one, that matches say show the same points.

Both maps are right in themselves, and wrong about where the other one is: the one thing unknown is
how to scale, turn and shift one onto the other. Distances in a map mean little, because depths are
far less certain than directions; so a point counts as agreeing when, moved into the other map, it
lies where the camera there sees its match, in both directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.geometry import nearest_rotation, transform_points
from engine.types import BoolArray, Float64Array, Int64Array, freeze_field

_NUM_HYPOTHESES = 96  # of three matches: half of them right fails once in 400,000 times
_MAX_SCORED = 150  # matches that hypotheses are compared on
_NUM_REFINEMENTS = 4
FAR = 3.0  # times what is allowed, from which a match speaks for another place
_MIN_SPREAD = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MatchedPoints:
    """Points of maps a and b that are matched, and the cameras that see them; rows are matches.

    Rays are unit vectors in their map's world, from the camera's centre through the keypoint.
    """

    points_in_a: Float64Array  # (N, 3)
    points_in_b: Float64Array  # (N, 3)
    centers_in_a: Float64Array  # (N, 3) of the camera of map a in which the match ends
    centers_in_b: Float64Array  # (N, 3)
    rays_in_a: Float64Array  # (N, 3)
    rays_in_b: Float64Array  # (N, 3)
    bounds: Float64Array  # (N, 2) tangent of the angle allowed, in a and in b
    pair_idx: Int64Array  # (N,) which of several pairs of keyframes each match belongs to

    def __post_init__(self) -> None:
        freeze_field(self, "points_in_a", (None, 3), np.float64)
        num = len(self.points_in_a)
        for name in ("points_in_b", "centers_in_a", "centers_in_b", "rays_in_a", "rays_in_b"):
            freeze_field(self, name, (num, 3), np.float64)
        freeze_field(self, "bounds", (num, 2), np.float64)
        freeze_field(self, "pair_idx", (num,), np.int64)

    def __len__(self) -> int:
        return len(self.points_in_a)

    def errors(self, a_from_b: Float64Array) -> Float64Array:
        """How far off matches are under similarities, in units of what is allowed.

        Args:
            a_from_b: (K, 3, 4).

        Returns:
            (K, N), the larger error of the two directions; inf behind a camera.
        """
        return self._errors(a_from_b, slice(None))

    def thinned(self, limit: int) -> MatchedPoints:
        """At most so many matches, spread evenly over all."""
        if len(self) <= limit:
            return self
        return self.rows(np.linspace(0, len(self) - 1, limit).astype(np.int64))

    def rows(self, rows: Int64Array) -> MatchedPoints:
        """Some of them, by their positions (K,)."""
        return MatchedPoints(
            points_in_a=self.points_in_a[rows],
            points_in_b=self.points_in_b[rows],
            centers_in_a=self.centers_in_a[rows],
            centers_in_b=self.centers_in_b[rows],
            rays_in_a=self.rays_in_a[rows],
            rays_in_b=self.rays_in_b[rows],
            bounds=self.bounds[rows],
            pair_idx=self.pair_idx[rows],
        )

    def _errors(self, a_from_b: Float64Array, rows: slice) -> Float64Array:
        scaled, shift = a_from_b[:, :, :3], a_from_b[:, None, :, 3]
        turn = np.swapaxes(scaled, 1, 2)
        scale = np.cbrt(np.linalg.det(scaled))[:, None, None]
        in_a = _tangents(
            self.points_in_b[rows] @ turn + shift - self.centers_in_a[rows], self.rays_in_a[rows]
        )
        in_b = _tangents(
            self.points_in_a[rows] - (self.centers_in_b[rows] @ turn + shift),
            self.rays_in_b[rows] @ turn / scale,
        )
        bounds = self.bounds[rows]
        return np.asarray(np.maximum(in_a / bounds[:, 0], in_b / bounds[:, 1]))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MapSimilarity:
    """A similarity between maps, and how well each match agrees with it."""

    a_from_b: Float64Array  # (3, 4) [s R | t]
    errors: Float64Array  # (N,) in units of what is allowed; below 1 a match agrees

    def __post_init__(self) -> None:
        freeze_field(self, "a_from_b", (3, 4), np.float64)
        freeze_field(self, "errors", (None,), np.float64, finite=False)

    @property
    def is_inlier(self) -> BoolArray:
        """Which matches (N,) agree."""
        return np.asarray(self.errors < 1.0)

    @property
    def num_inliers(self) -> int:
        """How many matches agree."""
        return int(np.count_nonzero(self.errors < 1.0))


def estimate_map_similarity(matched: MatchedPoints, *, seed: int) -> MapSimilarity | None:
    """The similarity that most matches agree with.

    MSAC (Torr and Zisserman, 2000) over three matches at a time (Umeyama, 1991), with the error in
    both images in place of distances in space; refined on the matches that agree.

    Args:
        matched: the matches; any share of them may be wrong up to about two thirds.
        seed: of the samples.

    Returns:
        None when no three matches fix a similarity.
    """
    if len(matched) < 3:
        return None
    scored = matched.thinned(_MAX_SCORED)
    hypotheses = _hypotheses(scored, seed=seed)
    if not len(hypotheses):
        return None
    best = hypotheses[int(np.argmax(_scores(scored.errors(hypotheses))))]
    errors = matched.errors(best[None])[0]
    for _ in range(_NUM_REFINEMENTS):
        refined = _fit(matched, np.maximum(1.0 - errors**2, 0.0))
        if refined is None:
            break
        refined_errors = matched.errors(refined[None])[0]
        if _scores(refined_errors[None])[0] <= _scores(errors[None])[0]:
            break
        best, errors = refined, refined_errors
    return MapSimilarity(a_from_b=best, errors=errors)


def estimate_rival(
    matched: MatchedPoints, found: MapSimilarity, *, seed: int
) -> MapSimilarity | None:
    """The similarity that most matches agree with of those that are far from one that was found.

    Repeated structure gives several: each shift by a period has matches of its own. What lies near
    the similarity found speaks for it, or for a map that is bent.

    Args:
        matched: the matches.
        found: what most of them agree with.
        seed: of the samples.

    Returns:
        None when no three matches fix another one.
    """
    far = matched.rows(np.flatnonzero(found.errors > FAR))
    rival = estimate_map_similarity(far, seed=seed)
    if rival is None:
        return None
    return MapSimilarity(a_from_b=rival.a_from_b, errors=matched.errors(rival.a_from_b[None])[0])


def _tangents(offsets: Float64Array, rays: Float64Array) -> Float64Array:
    """Tangents (...) of the angles between offsets (..., 3) and unit rays (..., 3)."""
    along = (offsets * rays).sum(axis=-1)
    off = np.sqrt(np.maximum((offsets**2).sum(axis=-1) - along**2, 0.0))
    return np.asarray(np.where(along > 0.0, off / np.maximum(along, 1e-300), np.inf))


def _scores(errors: Float64Array) -> Float64Array:
    """How well hypotheses do, (K,), by errors (K, N)."""
    bounded = np.minimum(errors, 1.0)
    return np.asarray((1.0 - bounded**2).sum(axis=1))


def _hypotheses(matched: MatchedPoints, *, seed: int) -> Float64Array:
    """Similarities (K, 3, 4) of three different matches each, those that span a triangle."""
    rows = np.random.default_rng(seed).integers(0, len(matched), (_NUM_HYPOTHESES, 3))
    rows = np.sort(rows, axis=1)
    rows = rows[(np.diff(rows, axis=1) > 0).all(axis=1)]
    in_a, in_b = matched.points_in_a[rows], matched.points_in_b[rows]
    middle_a, middle_b = in_a.mean(axis=1, keepdims=True), in_b.mean(axis=1, keepdims=True)
    spread_a = np.linalg.norm(in_a - middle_a, axis=(1, 2))
    spread_b = np.linalg.norm(in_b - middle_b, axis=(1, 2))
    usable = (spread_a > _MIN_SPREAD) & (spread_b > _MIN_SPREAD)
    left, _, right = np.linalg.svd((np.swapaxes(in_a - middle_a, 1, 2) @ (in_b - middle_b))[usable])
    left[:, :, 2] *= np.sign(np.linalg.det(left @ right))[:, None]
    scaled = (spread_a[usable] / spread_b[usable])[:, None, None] * (left @ right)
    shifts = middle_a[usable] - middle_b[usable] @ np.swapaxes(scaled, 1, 2)
    return np.concatenate([scaled, np.swapaxes(shifts, 1, 2)], axis=2)


def _fit(matched: MatchedPoints, weights: Float64Array) -> Float64Array | None:
    """The similarity (3, 4) of weighted matches (N,) with the least squares of distances."""
    if np.count_nonzero(weights) < 3:
        return None
    shares = weights / weights.sum()
    middle_a, middle_b = shares @ matched.points_in_a, shares @ matched.points_in_b
    off_a, off_b = matched.points_in_a - middle_a, matched.points_in_b - middle_b
    rotation = nearest_rotation((shares[:, None] * off_a).T @ off_b)
    spread_a = float(shares @ (off_a**2).sum(axis=1))
    spread_b = float(shares @ (off_b**2).sum(axis=1))
    if rotation is None or min(spread_a, spread_b) < _MIN_SPREAD**2:
        return None
    scaled = np.sqrt(spread_a / spread_b) * rotation
    return np.column_stack([scaled, middle_a - scaled @ middle_b])


def compose_similarities(c_from_b: Float64Array, b_from_a: Float64Array) -> Float64Array:
    """``c_from_a`` of two similarities (3, 4)."""
    moved = transform_points(c_from_b, b_from_a[:, 3][None])[0]
    return np.column_stack([c_from_b[:, :3] @ b_from_a[:, :3], moved])


def invert_similarity(b_from_a: Float64Array) -> Float64Array:
    """The inverse of a similarity (3, 4)."""
    inverse = np.linalg.inv(b_from_a[:, :3])
    return np.column_stack([inverse, -inverse @ b_from_a[:, 3]])


def similarity_scale(b_from_a: Float64Array) -> float:
    """How much longer a similarity (3, 4) makes lengths."""
    return float(np.cbrt(np.linalg.det(b_from_a[:, :3])))
