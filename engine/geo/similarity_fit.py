"""Robust similarity fit: map points onto measured positions of which some are wrong; numpy only.

A similarity is an array [s R | t] (3, 4) that maps points of the map to positions in metres, axes
east, north, up. Sizes of N are those of keyframes: a few to some ten thousand.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np

from engine.geometry import rotation_from_vector, transform_points
from engine.types import BoolArray, Float64Array, Int64Array, freeze_field

_MAX_SAMPLES = 2000
_MAX_SCORED = 400  # positions that hypotheses are compared on
_NUM_REFINED = 10  # the best hypotheses
_NUM_SCALES = 6  # from the largest error allowed downwards, each half of the one before
_NUM_STEPS = 30
_CONVERGED = 1e-9  # of turn and scale
_CUT_PER_MEDIAN = (
    5.0  # of distances; at 3.4 standard deviations if all noise is vertical, else more
)
_MIN_CUT_RATIO = 0.01  # of the largest error allowed; closer positions all count
_MIN_NOISE = 0.01  # of the positions' standard deviations; no noise is taken for smaller
_LEVEL_STD_RAD = math.radians(2.0)  # of cameras on a gimbal, on average
_FLAT_STD_RAD = math.radians(3.5)  # of the mean slope of a path
_MIN_WIDTH_RATIO = 0.1  # of a path's width to its length; a narrower one has no slope across
UNKNOWN_STD_M = 1e4  # of a coordinate that was not measured; it counts for nothing
_SCALE, _TURN, _SHIFT = 0, slice(1, 4), slice(4, 7)  # rows of the seven unknowns


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimilarityFit:
    """A similarity with residuals, weights and standard deviations."""

    onto_from_map: Float64Array  # (3, 4)
    residuals_m: Float64Array  # (N,) distances of placed points to their positions
    weights: Float64Array  # (N,) 0..1, how much each position counts; 0: an outlier
    rotation_std_rad: float  # about the axis that is known least
    scale_std_ratio: float

    def __post_init__(self) -> None:
        freeze_field(self, "onto_from_map", (3, 4), np.float64)
        freeze_field(self, "residuals_m", (None,), np.float64)
        freeze_field(self, "weights", (len(self.residuals_m),), np.float64)


def fit_similarity(
    points: Float64Array,
    positions_m: Float64Array,
    *,
    stds_m: Float64Array,
    max_error_m: float,
    seed: int = 0,
) -> SimilarityFit | None:
    """The similarity that fits the largest consistent group of positions.

    LO-RANSAC (Chum, Matas and Kittler, 2003) over three points at a time, all of them where they
    are few. Hypotheses are scored at several noise scales at once, after MAGSAC (Barath, Matas and
    Noskova, 2019): a tight group wins over a loose one, so positions that drift away slowly do not
    bend the fit to them. The best are refined by Gauss-Newton steps with Tukey's weights, whose
    scale follows the residuals. Where no height was measured, all the heights together count as one
    measurement of a path that is flat on average.

    Args:
        points: (N, 3) in the map.
        positions_m: (N, 3) where they should be, some of them wrong.
        stds_m: (N, 3) standard deviations of the positions along each axis; ``UNKNOWN_STD_M``:
            not measured.
        max_error_m: positions farther away than this do not count.
        seed: of the samples.

    Returns:
        None when no three points and positions form triangles, or one of them is not finite.
    """
    if not (np.isfinite(points).all() and np.isfinite(positions_m).all()):
        return None
    known = _known(stds_m)
    whole = np.flatnonzero(known.all(axis=1))
    if len(whole) < 3:  # as if all heights were the same
        whole = np.arange(len(points))
    hypotheses = _hypotheses(points[whole], positions_m[whole], seed=seed)
    if not len(hypotheses):
        return None
    scored = np.unique(np.linspace(0, len(points) - 1, _MAX_SCORED).astype(np.int64))
    scores = _scores(
        _distances(hypotheses, points[scored], positions_m[scored], known[scored]),
        max_error_m=max_error_m,
    )
    best = np.argsort(-scores, kind="stable")[:_NUM_REFINED]
    fits = [
        _refine(hypotheses[i], points, positions_m, stds_m, max_error_m=max_error_m) for i in best
    ]
    scores = _scores(np.array([fit.residuals_m for fit in fits]), max_error_m=max_error_m)
    return fits[int(scores.argmax())]


def least_squares_similarity(
    points: Float64Array, positions_m: Float64Array, *, stds_m: Float64Array
) -> SimilarityFit | None:
    """The similarity that fits all positions, each by its standard deviations; none is left out.

    Gauss-Newton steps from the closed form of Umeyama (1991).

    Args:
        points: (N, 3) in the map.
        positions_m: (N, 3).
        stds_m: (N, 3) along each axis; ``UNKNOWN_STD_M``: not measured.

    Returns:
        None when fewer than three positions were measured along all axes, or they or their points
        have no extent.
    """
    whole = _known(stds_m).all(axis=1)
    if whole.sum() < 3:
        return None
    start = _similarities(points[None, whole], positions_m[None, whole])
    if not len(start):
        return None
    return _refine(start[0], points, positions_m, stds_m, max_error_m=math.inf)


def level_cameras(
    fit: SimilarityFit,
    points: Float64Array,
    positions_m: Float64Array,
    rotations: Float64Array,
    *,
    stds_m: Float64Array,
    max_error_m: float,
) -> tuple[SimilarityFit, float]:
    """Determines the rotation about the line that the points lie on by cameras held level.

    Of all rotations about it the one is taken that makes the cameras' x axes most horizontal, with
    y or z axes downwards. Then all is refined once more, the mean level counting as one
    measurement.

    Args:
        fit: of the same points and positions, with any rotation about the line.
        points: (N, 3) camera centres in the map.
        positions_m: (N, 3).
        rotations: (N, 3, 3) of cameras from the map.
        stds_m: (N, 3).
        max_error_m: as for the fit.

    Returns:
        The refined fit, and how far from level the cameras are: root mean square in radians.
    """
    placed = transform_points(fit.onto_from_map, points)
    center = _weighted_mean(placed, fit.weights)
    line = np.linalg.svd(fit.weights[:, None] * (placed - center), full_matrices=False)[2][0]
    turned = _turn(fit.onto_from_map, _turn_to_level(fit.onto_from_map, rotations, line), center)
    settled = _refine(
        turned,
        points,
        positions_m,
        stds_m,
        max_error_m=max_error_m,
        level_axes=rotations[:, 0],
    )
    heights = _in_onto(settled.onto_from_map, rotations[:, 0])[:, 2]
    return settled, float(np.sqrt(np.mean(heights**2)))


def level_flat_path(
    fit: SimilarityFit,
    points: Float64Array,
    positions_m: Float64Array,
    level_axes: Float64Array,
    *,
    stds_m: Float64Array,
    max_error_m: float,
) -> tuple[SimilarityFit, float]:
    """Refines a fit without measured heights by axes that should be horizontal.

    They count as one measurement beside the flat path that is assumed.

    Args:
        fit: of the same points and positions.
        points: (N, 3) in the map.
        positions_m: (N, 3), all at one height.
        level_axes: (N, 3) in the map, the x axes of cameras.
        stds_m: (N, 3).
        max_error_m: as for the fit.

    Returns:
        The refined fit, and how far from level the axes are: root mean square in radians.
    """
    levelled = _refine(
        fit.onto_from_map,
        points,
        positions_m,
        stds_m,
        max_error_m=max_error_m,
        level_axes=level_axes,
    )
    heights = _in_onto(levelled.onto_from_map, level_axes)[:, 2]
    return levelled, float(np.sqrt(np.mean(heights**2)))


def mean_height(fit: SimilarityFit, directions: Float64Array) -> float:
    """The mean upward component of directions (N, 3) of the map."""
    return float(_in_onto(fit.onto_from_map, directions)[:, 2].mean())


def _known(stds_m: Float64Array) -> BoolArray:
    """Which coordinates (N, 3) were measured."""
    return np.asarray(stds_m < UNKNOWN_STD_M)


def _hypotheses(points: Float64Array, positions_m: Float64Array, *, seed: int) -> Float64Array:
    """Similarities (K, 3, 4) of three points each, those with a triangle."""
    samples = _samples(len(points), seed=seed)
    if not len(samples):
        return np.zeros((0, 3, 4))
    return _similarities(points[samples], positions_m[samples])


def _similarities(sampled: Float64Array, sampled_m: Float64Array) -> Float64Array:
    """Similarities (K, 3, 4) between sets of points (N, S, 3) of some extent (Umeyama, 1991)."""
    center, center_m = sampled.mean(axis=1, keepdims=True), sampled_m.mean(axis=1, keepdims=True)
    spread = np.linalg.norm(sampled - center, axis=(1, 2))
    spread_m = np.linalg.norm(sampled_m - center_m, axis=(1, 2))
    has_spread = (spread > 0.0) & (spread_m > 0.0)
    moments = np.swapaxes(sampled_m - center_m, 1, 2) @ (sampled - center)
    left, _, right = np.linalg.svd(moments[has_spread])
    left[:, :, 2] *= np.sign(np.linalg.det(left @ right))[:, None]
    scaled = (spread_m / np.where(has_spread, spread, 1.0))[has_spread, None, None] * (left @ right)
    shifts = center_m[has_spread] - center[has_spread] @ np.swapaxes(scaled, 1, 2)
    return np.concatenate([scaled, np.swapaxes(shifts, 1, 2)], axis=2)


def _samples(num: int, *, seed: int) -> Int64Array:
    """Rows of three different points each, (K, 3): all there are, or so many at random."""
    if math.comb(num, 3) <= _MAX_SAMPLES:
        every = list(itertools.combinations(range(num), 3))
        return np.array(every, np.int64).reshape(-1, 3)
    rows = np.sort(np.random.default_rng(seed).integers(0, num, (_MAX_SAMPLES, 3)), axis=1)
    return np.asarray(rows[(np.diff(rows, axis=1) > 0).all(axis=1)])


def _distances(
    onto_from_map: Float64Array,
    points: Float64Array,
    positions_m: Float64Array,
    known: BoolArray,
) -> Float64Array:
    """How far points (N, 3) are from their positions by each of some similarities (..., 3, 4).

    Along the coordinates that are ``known`` (N, 3): (..., N).
    """
    placed_m = points @ np.swapaxes(onto_from_map[..., :3], -1, -2)
    offsets_m = placed_m + onto_from_map[..., None, :, 3] - positions_m
    return np.asarray(np.linalg.norm(offsets_m * known, axis=-1))


def _scores(residuals_m: Float64Array, *, max_error_m: float) -> Float64Array:
    """The sums (K,) over positions (K, N) and noise scales of how close they are."""
    scales_m = max_error_m / 2.0 ** np.arange(_NUM_SCALES)
    gains = (np.maximum(1.0 - (residuals_m / scale_m) ** 2, 0.0) for scale_m in scales_m)
    return np.asarray(sum(gain.sum(axis=1) for gain in gains))


def _refine(
    onto_from_map: Float64Array,
    points: Float64Array,
    positions_m: Float64Array,
    stds_m: Float64Array,
    *,
    max_error_m: float,
    level_axes: Float64Array | None = None,
) -> SimilarityFit:
    """Gauss-Newton steps with weights from the residuals, until they change nothing."""
    for _ in range(_NUM_STEPS):
        problem = _Problem.at(onto_from_map, points, positions_m, stds_m, max_error_m=max_error_m)
        if level_axes is not None:
            problem = problem.with_level(_in_onto(onto_from_map, level_axes))
        step = problem.step()
        onto_from_map = problem.moved(onto_from_map, step)
        if np.abs(step[: _TURN.stop]).max() < _CONVERGED:
            break
    residuals_m = _distances(onto_from_map, points, positions_m, _known(stds_m))
    scale_std_ratio, rotation_std_rad = problem.stds()
    return SimilarityFit(
        onto_from_map=onto_from_map,
        residuals_m=residuals_m,
        weights=_weights(residuals_m, max_error_m=max_error_m),
        rotation_std_rad=rotation_std_rad,
        scale_std_ratio=scale_std_ratio,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Problem:
    """The normal equations of a small change: of scale, turn (3) and shift (3) about a centre.

    Distances from the centre are in units of ``reach_m``, and so is the shift.
    """

    center_m: Float64Array  # (3,)
    reach_m: float
    information: Float64Array  # (7, 7), in units of the noise that the residuals show
    gradient: Float64Array  # (7,)

    @classmethod
    def at(
        cls,
        onto_from_map: Float64Array,
        points: Float64Array,
        positions_m: Float64Array,
        stds_m: Float64Array,
        *,
        max_error_m: float,
    ) -> _Problem:
        placed_m = transform_points(onto_from_map, points)
        offsets_m = placed_m - positions_m
        known = _known(stds_m)
        distances_m = np.linalg.norm(offsets_m * known, axis=1)
        weights = _weights(distances_m, max_error_m=max_error_m)
        center_m = _weighted_mean(placed_m, weights)
        arms_m = placed_m - center_m
        total = max(float(weights.sum()), 1e-12)
        reach_m = max(math.sqrt(float(weights @ (arms_m**2).sum(axis=1)) / total), 1e-12)
        arms = arms_m / reach_m
        jacobian = np.zeros((len(points), 3, 7))
        jacobian[:, :, _SCALE] = arms
        for column, row, other in ((0, 2, 1), (1, 0, 2), (2, 1, 0)):  # -skew(arms)
            jacobian[:, row, 1 + column] = arms[:, other]
            jacobian[:, other, 1 + column] = -arms[:, row]
        jacobian[:, :, _SHIFT] = np.eye(3)
        per_axis = known * weights[:, None] / stds_m**2
        freedom = max(float((known * weights[:, None]).sum()) - 7.0, 1.0)
        noise_squared = max(float((per_axis * offsets_m**2).sum()) / freedom, _MIN_NOISE**2)
        weighted = jacobian * (reach_m**2 * per_axis / noise_squared)[:, :, None]
        problem = cls(
            center_m=center_m,
            reach_m=reach_m,
            information=np.einsum("nai,naj->ij", weighted, jacobian),
            gradient=np.einsum("nai,na->i", weighted, offsets_m / reach_m),
        )
        if known[:, 2].any():
            return problem
        of_path = _mean_and_slopes(arms[:, :2], weights / total)
        return problem.with_flat(of_path @ jacobian[:, 2], of_path @ (offsets_m[:, 2] / reach_m))

    def with_flat(self, rows: Float64Array, values: Float64Array) -> _Problem:
        """With the mean height and the slopes of a path, which should be 0: values (K,)."""
        information = 1.0 / _FLAT_STD_RAD**2
        return replace(
            self,
            information=self.information + information * rows.T @ rows,
            gradient=self.gradient + information * rows.T @ values,
        )

    def with_level(self, axes: Float64Array) -> _Problem:
        """With axes (N, 3) that should be horizontal; all together they count as one."""
        rows = np.zeros((len(axes), 7))
        rows[:, _TURN] = np.column_stack([axes[:, 1], -axes[:, 0], np.zeros(len(axes))])
        per_row = 1.0 / (len(axes) * _LEVEL_STD_RAD**2)
        return replace(
            self,
            information=self.information + per_row * rows.T @ rows,
            gradient=self.gradient + per_row * rows.T @ axes[:, 2],
        )

    def step(self) -> Float64Array:
        """The change (7,) that solves them; none in directions that nothing determines."""
        return -np.asarray(np.linalg.lstsq(self.information, self.gradient, rcond=1e-10)[0])

    def moved(self, onto_from_map: Float64Array, step: Float64Array) -> Float64Array:
        """The similarity after a change."""
        turned = _turn(onto_from_map, rotation_from_vector(step[_TURN]), self.center_m)
        scale = math.exp(float(np.clip(step[_SCALE], -1.0, 1.0)))
        moved = scale * turned
        moved[:, 3] += (1.0 - scale) * self.center_m + self.reach_m * step[_SHIFT]
        return moved

    def stds(self) -> tuple[float, float]:
        """Standard deviations of the scale, as a ratio, and of the least certain turn, in rad."""
        values, vectors = np.linalg.eigh(self.information)
        values = np.maximum(values, 1e-12 * max(float(values[-1]), 1e-12))
        covariance = (vectors / values) @ vectors.T
        largest_turn = float(np.linalg.eigvalsh(covariance[_TURN, _TURN])[-1])
        return math.sqrt(float(covariance[_SCALE, _SCALE])), math.sqrt(largest_turn)


def _mean_and_slopes(arms: Float64Array, weights: Float64Array) -> Float64Array:
    """What makes heights (N,) their mean and the slopes of the plane through them: (K, N).

    Args:
        arms: (N, 2) where they are, horizontally, from their mean.
        weights: (N,) with the sum 1.

    Returns:
        A row for the mean and one for each direction in which the places extend.
    """
    variances, axes = np.linalg.eigh((weights[:, None] * arms).T @ arms)
    extends = variances > _MIN_WIDTH_RATIO**2 * max(float(variances[-1]), 1e-12)
    slopes = (axes[:, extends] / variances[extends]).T @ (weights[:, None] * arms).T
    return np.vstack([weights, slopes])


def _weights(residuals_m: Float64Array, *, max_error_m: float) -> Float64Array:
    """Tukey's weights (N,), cut off where the noise of those that are near enough ends."""
    near: BoolArray = residuals_m <= max_error_m
    if not near.any():
        return np.zeros(len(residuals_m))
    cut_m = _CUT_PER_MEDIAN * float(np.median(residuals_m[near]))
    cut_m = min(max(cut_m, _MIN_CUT_RATIO * max_error_m), max_error_m)
    return np.asarray(np.maximum(1.0 - (residuals_m / cut_m) ** 2, 0.0) ** 2)


def _turn_to_level(
    onto_from_map: Float64Array, rotations: Float64Array, line: Float64Array
) -> Float64Array:
    """The rotation (3, 3) about a line (3,) that brings camera x axes nearest to level."""
    across = _in_onto(onto_from_map, rotations[:, 0])
    downwards = _in_onto(onto_from_map, rotations[:, 1] + rotations[:, 2])
    angles_rad = np.radians(np.arange(360.0))
    turns = np.array([rotation_from_vector(angle * line) for angle in angles_rad])
    tilts = np.mean((turns[:, 2] @ across.T) ** 2, axis=1)
    is_upside_down = np.mean(turns[:, 2] @ downwards.T, axis=1) > 0.0
    turn: Float64Array = turns[np.argmin(tilts + is_upside_down)]
    return turn


def _in_onto(onto_from_map: Float64Array, directions: Float64Array) -> Float64Array:
    """Directions (N, 3) of the map, turned but not scaled."""
    scaled = onto_from_map[:, :3]
    return np.asarray(directions @ (scaled / np.cbrt(np.linalg.det(scaled))).T)


def _turn(
    onto_from_map: Float64Array, rotation: Float64Array, center_m: Float64Array
) -> Float64Array:
    turned = rotation @ onto_from_map
    turned[:, 3] += center_m - rotation @ center_m
    return np.asarray(turned)


def _weighted_mean(points: Float64Array, weights: Float64Array) -> Float64Array:
    total = float(weights.sum())
    return np.asarray(weights @ points / total) if total else points.mean(axis=0)
