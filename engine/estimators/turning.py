"""Turning without moving: whether rotations explain the matches of many pairs at once.

A camera that turns about its centre maps image to image by K2 R K1^-1, whatever the depths (Hartley
and Zisserman, 2004, section 8.4). So does a moving camera before a plane, by another homography: a
single pair with an unknown focal length often fits both. All pairs of a camera have the same
calibration, though, and rotations determine it, while the pairs of a moving camera contradict one
another, or want an endless focal length.

Each pair gets its own rotation, all share a focal length (or several lenses, for zooms) and one
distortion. They are found by robust least squares from a grid; the distortion is that of the
division model (Fitzgibbon, CVPR 2001) with two coefficients, which holds for perspectives and
fisheyes. Lengths in images are in half diagonals, from the image's centre.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pycolmap

from engine.estimators.lenses import camera_focal_px, unit_rays
from engine.types import BoolArray, Float64Array, Int64Array, freeze_field

FOCAL_RATIOS = (0.2, 10.0)  # of the longer image edge: what is searched

_MAX_MATCHES = 64  # of a pair that are used, spread over all
_MIN_MATCHES = 8
_START_RATIOS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0)
_START_DISTORTIONS = (0.0, -0.35, -0.9)
_START_SWEEPS = 3
_COARSE_MATCHES, _COARSE_SWEEPS = 32, 2  # of a coarse look
_SURE_INFORMATION = 4.0  # on the logarithm of a focal length: a start is sought near it only
_PINCUSHION_LIMIT = 0.15  # of distortion, at the image's corner
# Barrel distortion is next to none through a long lens. Without this bound a long lens could make
# turns look like motions along a wall: its image would be linear in angles.
_BARREL_LIMIT, _BARREL_LIMIT_OF_WIDE = 0.003, 0.4  # the latter by the focal length to the fourth
_WIDEST_BARREL = 1.5
_SCALE_RATIO = 0.001  # of the image edge: the scale of the robust loss
_EXPLAINED_RATIO = 0.0025  # of the edge: a match farther off is not explained,
_EXPLAINED_NOISES = 3.5  # unless it is within so many medians of distances from epipolar lines
_MAX_STEPS = 10
_SOON = 3  # steps, after which turns are near what they explain: they are there after two
_HOPELESS_FACTORS = (12.0, 2.5)  # of the largest error explained, at the start and soon after it
_MAX_TRIALS = 3  # of a step, each time damped more
_MAX_STEP = 0.5  # rad, and logarithms of focal lengths
_CONVERGED_RATIO = 1e-5  # of the cost
_AT_LIMIT = 0.97  # of the shortest focal length
_LONGEST_RATIO = 6.0  # a longer focal length is that of a motion along a plane
_MAX_SIGMA_RATIO = 0.06  # of a focal length that is determined
_MAX_ERROR_RATIO = 0.0009  # of the edge: the median error of matches that turns explain
_MAX_ERROR_NOISES = 2.5  # the same in medians of distances from epipolar lines: 1.7 are due
_DISTORTION_SIGMAS = np.array([1.0, 0.2])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TurningPair:
    """Matches of two views, and whose focal length each has."""

    points1: Float64Array  # (M, 2) half diagonals from the image's centre
    points2: Float64Array  # (M, 2)
    lens1: int = 0  # numbers of the focal lengths, from 0
    lens2: int = 0
    noise: float = 0.0  # median distance of the matches from their epipolar lines, half diagonals

    def __post_init__(self) -> None:
        freeze_field(self, "points1", (None, 2), np.float64)
        freeze_field(self, "points2", (len(self.points1), 2), np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TurningFit:
    """The rotations and the calibration that explain pairs best."""

    explained: Float64Array  # (N,) share of each pair's matches
    rotations: Float64Array  # (N, 3, 3) second from first
    focal_ratios: Float64Array  # (F,) of the image's longer edge
    focal_sigma_ratio: float  # one standard deviation of the least certain one
    distortion: Float64Array  # (2,) of the squared and of the fourth power of the radius
    error_ratio: float  # median distance of matches from where they should be, of the edge
    noise_ratio: float  # the same from epipolar lines
    prior_sigmas: float  # how far a focal length is from what was known of it, at most

    @property
    def is_determined(self) -> bool:
        """Whether turns determine the focal lengths; before planes these are endless or open."""
        return (
            bool(self.focal_ratios.max() < _LONGEST_RATIO)
            and bool(self.focal_ratios.min() > FOCAL_RATIOS[0] / _AT_LIMIT)
            and self.focal_sigma_ratio < _MAX_SIGMA_RATIO
            and self.error_ratio < max(_MAX_ERROR_RATIO, _MAX_ERROR_NOISES * self.noise_ratio)
        )

    @property
    def angles_rad(self) -> Float64Array:
        """(N,) how far each pair's rotation turns."""
        cosines = (np.trace(self.rotations, axis1=1, axis2=2) - 1.0) / 2.0
        return np.asarray(np.arccos(np.clip(cosines, -1.0, 1.0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageShape:
    """Lengths of an image in half diagonals."""

    edge: float  # the longer one

    @classmethod
    def of(cls, width: int, height: int) -> ImageShape:
        """The shape of an image of a size in px."""
        return cls(edge=max(width, height) / _half_diagonal_px(width, height))


def centred_points(points_xy: Float64Array, *, width: int, height: int) -> Float64Array:
    """Points (N, 2) px as half diagonals from the image's centre, (N, 2)."""
    center = (width / 2.0, height / 2.0)
    return np.asarray((points_xy - center) / _half_diagonal_px(width, height))


def _half_diagonal_px(width: int, height: int) -> float:
    return math.hypot(width, height) / 2.0


# -- with a calibration that is known -------------------------------------------------------------


def share_explained_by_turning(
    points1_xy: Float64Array,
    points2_xy: Float64Array,
    *,
    camera1: pycolmap.Camera,
    camera2: pycolmap.Camera,
    noise_px: float = 0.0,
) -> tuple[float, Float64Array]:
    """Share of matches (N, 2), (N, 2) px of two calibrated views that one rotation explains.

    Args:
        points1_xy: px in the first view.
        points2_xy: px in the second one.
        camera1: of any model.
        camera2: likewise.
        noise_px: median distance of the matches from their epipolar lines.

    Returns:
        The share, 0 where too few have viewing rays, and the rotation (3, 3), second from first.
    """
    chosen = _spread(len(points1_xy))
    rays1, rays2 = unit_rays(camera1, points1_xy[chosen]), unit_rays(camera2, points2_xy[chosen])
    usable = np.isfinite(rays1).all(axis=1) & np.isfinite(rays2).all(axis=1)
    if usable.sum() < _MIN_MATCHES:
        return 0.0, np.eye(3)
    edge_px, focal_px = max(camera2.width, camera2.height), camera_focal_px(camera2)
    rotations, distances = _turned(
        rays1[usable], rays2[usable], np.ones(usable.sum()), _SCALE_RATIO * edge_px / focal_px
    )
    bound_px = max(_EXPLAINED_RATIO * edge_px, _EXPLAINED_NOISES * noise_px)
    return float((focal_px * distances < bound_px).mean()), rotations


def _spread(num: int, limit: int = _MAX_MATCHES) -> Int64Array:
    """Rows of at most so many matches, spread over all."""
    return np.linspace(0, num - 1, min(num, limit)).astype(np.int64)


def _turned(
    rays1: Float64Array,
    rays2: Float64Array,
    lengths: Float64Array,
    scale: float,
    *,
    num_sweeps: int = _START_SWEEPS,
) -> tuple[Float64Array, Float64Array]:
    """Rotations (..., 3, 3) that turn unit rays (..., M, 3) best, and distances (..., M) left.

    By reweighted closed forms. Distances are chords times ``lengths``; rays of no
    length do not count.
    """
    weights = np.broadcast_to((lengths > 0.0).astype(np.float64), rays1.shape[:-1])
    distances = np.zeros(rays1.shape[:-1])
    rotations = np.broadcast_to(np.eye(3), (*rays1.shape[:-2], 3, 3))
    for _ in range(num_sweeps):
        rotations = _rotations_between(rays1, rays2, weights)
        chords = rays1 @ np.swapaxes(rotations, -1, -2) - rays2
        distances = np.linalg.norm(chords, axis=-1) * lengths
        typical = np.maximum(np.median(distances, axis=-1, keepdims=True), scale)
        weights = (lengths > 0.0) / (1.0 + (distances / typical) ** 2)
    return np.asarray(rotations), distances


def _rotations_between(
    rays1: Float64Array, rays2: Float64Array, weights: Float64Array
) -> Float64Array:
    """Rotations (..., 3, 3) that turn rays (..., M, 3) best, in closed form (Kabsch, 1976)."""
    products = np.swapaxes(rays2 * weights[..., None], -1, -2) @ rays1
    left, _, right = np.linalg.svd(products)
    left[..., :, 2] *= np.linalg.det(left @ right)[..., None]
    return np.asarray(left @ right)


# -- with a calibration that is to be found -------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FocalPrior:
    """What is known of a focal length beforehand."""

    ratio: float  # of the longer image edge
    sigma_ratio: float  # one standard deviation; inf: nothing is known


UNKNOWN_FOCAL = FocalPrior(ratio=1.0, sigma_ratio=math.inf)


def nearest_turn_ratio(pair: TurningPair, shape: ImageShape) -> float:
    """How far a pair's matches are from the nearest of some turns, of the image's edge; a median.

    A coarse look, by calibrations of a grid: a pair that only turns is within a hundredth.

    Args:
        pair: the pair; where its lenses differ, one view may show things larger.
        shape: of the images.
    """
    batch = _Batch.of([pair], shape=shape, max_matches=_COARSE_MATCHES)
    grid = _grid(np.log(np.array(_START_RATIOS) * shape.edge))
    _, distances = batch.turned(
        grid[:, 0], batch.log_zooms(), grid[:, 1], num_sweeps=_COARSE_SWEEPS
    )
    return float(np.median(distances[:, 0], axis=-1).min() / shape.edge)


def fit_turning(
    pairs: Sequence[TurningPair],
    *,
    shape: ImageShape,
    priors: Sequence[FocalPrior] = (),
    max_matches: int = _MAX_MATCHES,
) -> TurningFit:
    """The rotations and the calibration that explain pairs best.

    Args:
        pairs: at least one, with at least 8 matches each.
        shape: of the images.
        priors: what is known of each focal length; empty: nothing of any.
        max_matches: of each pair that are used; more determine long focal lengths better.
    """
    batch = _Batch.of(pairs, shape=shape, max_matches=max_matches)
    known = _Prior.of(priors or [UNKNOWN_FOCAL] * batch.num_lenses, shape=shape)
    start = _best_start(batch, batch.log_zooms(), known)
    return _refined(batch, start, known)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prior:
    """What is known of focal lengths beforehand."""

    log_focals: Float64Array  # (F,) half diagonals
    information: Float64Array  # (F,) inverse variances

    @classmethod
    def of(cls, priors: Sequence[FocalPrior], *, shape: ImageShape) -> _Prior:
        return cls(
            log_focals=np.log([prior.ratio * shape.edge for prior in priors]),
            information=np.array([prior.sigma_ratio**-2 for prior in priors]),
        )

    def cost(self, log_focals: Float64Array) -> float:
        return float((self.information * (log_focals - self.log_focals) ** 2).sum())

    def deviation(self, log_focals: Float64Array) -> float:
        return float((np.sqrt(self.information) * np.abs(log_focals - self.log_focals)).max())

    def start_focals(self, shape: ImageShape) -> Float64Array:
        """(G,) logs of typical focal lengths to start from."""
        best = int(self.information.argmax())
        if self.information[best] < _SURE_INFORMATION:
            return np.log(np.array(_START_RATIOS) * shape.edge)
        sigma = self.information[best] ** -0.5
        middle = float(np.average(self.log_focals, weights=self.information))
        return np.asarray(middle + np.linspace(-2.0, 2.0, 5) * sigma)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _State:
    """What is estimated."""

    rotations: Float64Array  # (N, 3, 3)
    log_focals: Float64Array  # (F,) half diagonals
    distortion: Float64Array  # (2,)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Batch:
    """Pairs as arrays; those with fewer matches are padded with some of no weight."""

    shape: ImageShape
    points1: Float64Array  # (N, M, 2)
    points2: Float64Array  # (N, M, 2)
    counts: Int64Array  # (N,) matches
    lenses: Int64Array  # (N, 2)
    noises: Float64Array  # (N,)

    @classmethod
    def of(
        cls, pairs: Sequence[TurningPair], *, shape: ImageShape, max_matches: int = _MAX_MATCHES
    ) -> _Batch:
        chosen = [_spread(len(pair.points1), max_matches) for pair in pairs]
        num = max(len(rows) for rows in chosen)
        points1, points2 = np.zeros((2, len(pairs), num, 2))
        for idx, (pair, rows) in enumerate(zip(pairs, chosen, strict=True)):
            points1[idx, : len(rows)] = pair.points1[rows]
            points2[idx, : len(rows)] = pair.points2[rows]
        return cls(
            shape=shape,
            points1=points1,
            points2=points2,
            counts=np.array([len(rows) for rows in chosen]),
            lenses=np.array([(pair.lens1, pair.lens2) for pair in pairs]),
            noises=np.array([pair.noise for pair in pairs]),
        )

    @property
    def scale(self) -> float:
        return _SCALE_RATIO * self.shape.edge

    @property
    def is_match(self) -> BoolArray:
        """(N, M) whether a row is no padding."""
        return np.asarray(np.arange(self.points1.shape[1]) < self.counts[:, None])

    @property
    def num_lenses(self) -> int:
        return int(self.lenses.max()) + 1

    def log_zooms(self) -> Float64Array:
        """(F,) how much larger each lens shows things than the mean one, by all pairs; logs."""
        spreads = [_log_spread(points, self.is_match) for points in (self.points1, self.points2)]
        weights = np.exp(2.0 * (spreads[0] + spreads[1]))  # narrow overlaps say little
        number = np.arange(len(self.lenses))
        rows = np.zeros((len(number) + 1, self.num_lenses))
        rows[number, self.lenses[:, 1]] += weights
        rows[number, self.lenses[:, 0]] -= weights
        rows[-1] = 1.0  # the mean is 0
        differences = np.append(weights * (spreads[1] - spreads[0]), 0.0)
        found, *_ = np.linalg.lstsq(rows, differences, rcond=None)
        return np.asarray(found)

    def focals_of(self, log_focals: Float64Array) -> tuple[Float64Array, Float64Array]:
        """(..., N, 1) focal lengths of the first and second views, of logs (..., F)."""
        focals = np.exp(log_focals)
        return focals[..., self.lenses[:, 0], None], focals[..., self.lenses[:, 1], None]

    def turned(
        self,
        log_focals: Float64Array,
        log_zooms: Float64Array,
        distortions: Float64Array,
        *,
        num_sweeps: int = _START_SWEEPS,
    ) -> tuple[Float64Array, Float64Array]:
        """Best rotations (G, N, 3, 3) and distances (G, N, M) for each calibration of a grid."""
        first, second = self.focals_of(log_focals[:, None] + log_zooms)
        bends = np.stack([distortions, np.zeros_like(distortions)])[..., None, None]
        rays1, _ = _rays(self.points1, first, bends)
        rays2, lengths = _rays(self.points2, second, bends)
        return _turned(rays1, rays2, lengths * self.is_match, self.scale, num_sweeps=num_sweeps)


def _log_spread(points: Float64Array, is_match: BoolArray) -> Float64Array:
    """(N,) logs of how far the points (N, M, 2) of each pair are from their middle, on average."""
    shares = (is_match / is_match.sum(axis=1, keepdims=True))[..., None]
    middles = (points * shares).sum(axis=1, keepdims=True)
    distances = np.linalg.norm(points - middles, axis=2)
    return np.asarray(np.log((distances * shares[..., 0]).sum(axis=1) + 1e-9))


def _rays(
    points: Float64Array, focal: Float64Array, distortion: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Unit rays (..., M, 3) of points (..., M, 2), and their lengths (..., M) before."""
    along = focal * _bent(points, distortion)
    across = np.broadcast_to(points, (*along.shape, 2))
    lengths = np.sqrt((across**2).sum(axis=-1) + along**2)
    return np.concatenate([across, along[..., None]], axis=-1) / lengths[..., None], lengths


def _bent(points: Float64Array, distortion: Float64Array) -> Float64Array:
    """By how much distortion (2, ...) changes the parts along the axis of points (..., M, 2)."""
    squares = (points**2).sum(axis=-1)
    return np.asarray(1.0 + squares * (distortion[0] + squares * distortion[1]))


def _cost(distances: Float64Array, is_match: BoolArray, scale: float) -> Float64Array:
    """The robust cost (...) of distances (..., N, M)."""
    return np.asarray((np.log1p((distances / scale) ** 2) * is_match).sum(axis=(-1, -2)))


def _grid(log_focals: Float64Array) -> Float64Array:
    """(G, 2) logs of focal lengths with distortions to start from."""
    grid = np.array([(focal, bend) for bend in _START_DISTORTIONS for focal in log_focals])
    grid[:, 1] = np.maximum(grid[:, 1], -_barrel_limit(grid[:, 0]))
    return grid


def _barrel_limit(log_focals: Float64Array) -> Float64Array:
    """How much barrel distortion lenses of focal lengths (...) can have, at the image's corner."""
    limit = _BARREL_LIMIT + _BARREL_LIMIT_OF_WIDE * np.exp(-4.0 * log_focals)
    return np.asarray(np.minimum(limit, _WIDEST_BARREL))


def _best_start(batch: _Batch, log_zooms: Float64Array, prior: _Prior) -> _State:
    grid = _grid(prior.start_focals(batch.shape))
    rotations, distances = batch.turned(grid[:, 0], log_zooms, grid[:, 1])
    best = int(_cost(distances, batch.is_match, batch.scale).argmin())
    return _State(
        rotations=rotations[best],
        log_focals=grid[best, 0] + log_zooms,
        distortion=np.array([grid[best, 1], 0.0]),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Linearised:
    """The normal equations of a state: each pair's rotation, then what all pairs share."""

    own: Float64Array  # (N, 3, 3)
    mixed: Float64Array  # (N, 3, S)
    shared: Float64Array  # (S, S)
    own_gradient: Float64Array  # (N, 3)
    shared_gradient: Float64Array  # (S,)

    def reduced(self, damping: float) -> tuple[Float64Array, Float64Array]:
        """The equations (S, S), (S,) of what is shared, with the rotations following."""
        coupled = np.swapaxes(self.mixed, 1, 2) @ np.linalg.inv(self.own + 1e-9 * np.eye(3))
        matrix = self.shared - (coupled @ self.mixed).sum(axis=0)
        vector = self.shared_gradient - (coupled @ self.own_gradient[..., None]).sum(axis=0)[:, 0]
        diagonal = np.maximum(np.diag(matrix), 1e-9)
        return matrix + np.diag(damping * diagonal + 1e-9), vector

    def step(self, damping: float) -> Float64Array:
        """The step (S,) of what is shared."""
        step = -np.linalg.solve(*self.reduced(damping))
        return np.clip(step, -_MAX_STEP, _MAX_STEP)


def _refined(batch: _Batch, state: _State, prior: _Prior) -> TurningFit:
    """Levenberg and Marquardt's steps of the calibration from a start, on the robust cost.

    The rotations follow each step in closed form, by the weights before it: a longer focal length
    wants smaller turns.
    """
    damping = 1e-3
    distances, cost = _judged(batch, state, prior)
    for number in range(_MAX_STEPS):
        if number in (0, _SOON) and _is_hopeless(batch, distances, is_start=number == 0):
            break
        equations, weights = _linearised(batch, state, prior)
        better: tuple[_State, Float64Array, float] | None = None
        for _ in range(_MAX_TRIALS):
            moved = _moved(batch, state, equations.step(damping), weights=weights)
            moved_distances, moved_cost = _judged(batch, moved, prior)
            if moved_cost < cost:
                better = moved, moved_distances, moved_cost
                break
            damping *= 10.0
        if better is None:
            break
        gained = cost - better[2]
        state, distances, cost = better
        damping *= 0.1
        if gained < _CONVERGED_RATIO * cost:
            break
    return _fit(batch, state, prior, distances)


def _is_hopeless(batch: _Batch, distances: Float64Array, *, is_start: bool) -> bool:
    """Whether the errors left are far from what turns would leave."""
    error = float(np.median(distances[batch.is_match]))
    largest = _MAX_ERROR_NOISES * float(np.median(batch.noises))
    largest = max(_MAX_ERROR_RATIO * batch.shape.edge, largest)
    return error > _HOPELESS_FACTORS[0 if is_start else 1] * largest


def _judged(batch: _Batch, state: _State, prior: _Prior) -> tuple[Float64Array, float]:
    """Distances (N, M) of matches from where a state puts them, and the cost."""
    first, second = batch.focals_of(state.log_focals)
    rays1, _ = _rays(batch.points1, first, state.distortion)
    rays2, lengths = _rays(batch.points2, second, state.distortion)
    chords = rays1 @ np.swapaxes(state.rotations, 1, 2) - rays2
    distances = np.linalg.norm(chords, axis=2) * lengths
    cost = float(_cost(distances, batch.is_match, batch.scale))
    cost += float(((state.distortion / _DISTORTION_SIGMAS) ** 2).sum())
    return distances, cost + prior.cost(state.log_focals)


def _linearised(batch: _Batch, state: _State, prior: _Prior) -> tuple[_Linearised, Float64Array]:
    """The equations at a state, and the weights (N, M) of chords between rays."""
    first, second = batch.focals_of(state.log_focals)
    rays1, lengths1 = _rays(batch.points1, first, state.distortion)
    rays2, lengths2 = _rays(batch.points2, second, state.distortion)
    turned = rays1 @ np.swapaxes(state.rotations, 1, 2)
    offsets = (turned - rays2) * lengths2[..., None]
    weights = batch.is_match / (1.0 + ((offsets**2).sum(axis=2) / batch.scale**2))
    weights = weights / batch.scale**2
    by_rotation = -_skew(turned) * lengths2[..., None, None]
    # How offsets change with the parts of rays along the axis.
    axis = np.array([0.0, 0.0, 1.0])
    per_along1 = ((axis - rays1 * rays1[..., 2:]) / lengths1[..., None]) @ np.swapaxes(
        state.rotations, 1, 2
    )
    per_along1 = per_along1 * lengths2[..., None]
    # Chords are measured at the length of the second ray, which changes with it.
    per_along2 = (turned - rays2) * rays2[..., 2:] - (axis - rays2 * rays2[..., 2:])
    squares1, squares2 = ((points**2).sum(axis=2) for points in (batch.points1, batch.points2))
    by_focal1 = per_along1 * (first * _bent(batch.points1, state.distortion))[..., None]
    by_focal2 = per_along2 * (second * _bent(batch.points2, state.distortion))[..., None]
    by_distortion = np.stack(
        [
            per_along1 * (first * squares1**power)[..., None]
            + per_along2 * (second * squares2**power)[..., None]
            for power in (1, 2)
        ],
        axis=-1,
    )
    by_focals = np.zeros((*by_focal1.shape, len(state.log_focals)))
    number = np.arange(len(batch.lenses))
    by_focals[number, :, :, batch.lenses[:, 0]] += by_focal1
    by_focals[number, :, :, batch.lenses[:, 1]] += by_focal2
    by_shared = np.concatenate([by_focals, by_distortion], axis=-1)
    # Rows of residuals: three for each match.
    num_pairs, num_shared = len(offsets), by_shared.shape[-1]
    own_rows = by_rotation.reshape(num_pairs, -1, 3)
    shared_rows = by_shared.reshape(num_pairs, -1, num_shared)
    residuals = offsets.reshape(num_pairs, -1, 1)
    row_weights = np.repeat(weights, 3, axis=1)[..., None]
    own_weighted = np.swapaxes(own_rows * row_weights, 1, 2)
    all_weighted = (shared_rows * row_weights).reshape(-1, num_shared).T
    information = np.append(prior.information, _DISTORTION_SIGMAS**-2.0)
    away = np.append(state.log_focals - prior.log_focals, state.distortion)
    equations = _Linearised(
        own=own_weighted @ own_rows,
        mixed=own_weighted @ shared_rows,
        shared=all_weighted @ shared_rows.reshape(-1, num_shared) + np.diag(information),
        own_gradient=(own_weighted @ residuals)[..., 0],
        shared_gradient=all_weighted @ residuals.reshape(-1) + information * away,
    )
    return equations, weights * lengths2**2


def _skew(vectors: Float64Array) -> Float64Array:
    """(..., 3, 3) whose products with x are the cross products of vectors (..., 3) and x."""
    matrices = np.zeros((*vectors.shape, 3))
    x, y, z = (vectors[..., i] for i in range(3))
    matrices[..., 0, 1], matrices[..., 0, 2] = -z, y
    matrices[..., 1, 0], matrices[..., 1, 2] = z, -x
    matrices[..., 2, 0], matrices[..., 2, 1] = -y, x
    return matrices


def _moved(batch: _Batch, state: _State, step: Float64Array, *, weights: Float64Array) -> _State:
    """The state after a step of what is shared."""
    low, high = (math.log(ratio * batch.shape.edge) for ratio in FOCAL_RATIOS)
    log_focals = np.clip(state.log_focals + step[:-2], low, high)
    barrel = float(_barrel_limit(log_focals).min())
    distortion = np.clip(state.distortion + step[-2:], -barrel, _PINCUSHION_LIMIT)
    first, second = batch.focals_of(log_focals)
    rays1, _ = _rays(batch.points1, first, distortion)
    rays2, _ = _rays(batch.points2, second, distortion)
    return _State(
        rotations=_rotations_between(rays1, rays2, weights),
        log_focals=log_focals,
        distortion=distortion,
    )


def _fit(batch: _Batch, state: _State, prior: _Prior, distances: Float64Array) -> TurningFit:
    matrix, _ = _linearised(batch, state, prior)[0].reduced(0.0)
    error = float(np.median(distances[batch.is_match]))
    variances = np.diag(np.linalg.pinv(matrix))[:-2] * (error / batch.scale) ** 2
    bounds = np.maximum(_EXPLAINED_RATIO * batch.shape.edge, _EXPLAINED_NOISES * batch.noises)
    is_explained = (distances < bounds[:, None]) & batch.is_match
    focals = np.exp(state.log_focals) / batch.shape.edge
    return TurningFit(
        explained=is_explained.sum(axis=1) / batch.counts,
        rotations=state.rotations,
        focal_ratios=focals,
        focal_sigma_ratio=float(np.sqrt(np.maximum(variances, 0.0).max())),
        distortion=state.distortion,
        error_ratio=error / batch.shape.edge,
        noise_ratio=float(np.median(batch.noises)) / batch.shape.edge,
        prior_sigmas=prior.deviation(state.log_focals),
    )
