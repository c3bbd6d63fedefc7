"""How well relative poses explain matches, and how much better the best ones near them would.

A map gives two images a relative pose. The pair's own matches say which one they prefer at the same
calibration: where that is another direction of motion, or another turn, and fits clearly better,
the pair contradicts the map. Many pairs are fitted at once, by Gauss-Newton steps on the Sampson
error of viewing rays (Sampson, 1982; Terekhov and Larsson, ICCV 2023), so that any lens will do,
under Cauchy's loss. A rotation alone, which is fitted as well (Kabsch, 1976), says how much
parallax a pair has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.types import BoolArray, Float64Array, freeze_field

_STEPS = 6
_LOSS_PX = 1.0  # of the Cauchy loss while fitting, at an image edge of 1000 px
_LEAST_NOISE_PX = 0.15  # of matches, likewise
_NOISE_OF_MEDIAN = 1.4826  # standard deviation of Gaussian noise, by the median of its size
_MAX_STEP_RAD = 0.3
_TINY = 1e-12
_NO_BASELINE = 1e-9  # shorter ones have no direction; any will do to begin with


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairSamples:
    """Matches of B pairs, N of each at most, and the relative poses to examine."""

    rays1: Float64Array  # (B, N, 3) unit viewing rays in the first image
    rays2: Float64Array  # (B, N, 3) likewise in the second
    is_used: BoolArray  # (B, N); what is not is any finite unit vector
    cam2_from_cam1: Float64Array  # (B, 3, 4), of any length
    focal_px: Float64Array  # (B,) px per radian about the axis, at an image edge of 1000 px

    def __post_init__(self) -> None:
        freeze_field(self, "rays1", (None, None, 3), np.float64)
        num, width = self.rays1.shape[:2]
        freeze_field(self, "rays2", (num, width, 3), np.float64)
        freeze_field(self, "is_used", (num, width), np.bool_)
        freeze_field(self, "cam2_from_cam1", (num, 3, 4), np.float64)
        freeze_field(self, "focal_px", (num,), np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairFits:
    """What the matches of each pair (B,) say of its relative pose; px at an image edge of 1000."""

    errors_px: Float64Array  # (B, N) Sampson errors
    best_error_px: Float64Array  # (B,) likewise under the best pose nearby
    turned_rad: Float64Array  # (B,) between the two poses: their rotations
    swung_rad: Float64Array  # (B,) and the directions of their baselines
    gain: Float64Array  # (B,) how much likelier the best pose is, the logarithm of a ratio
    parallax_px: Float64Array  # (B,) median of what the best rotation alone leaves


def fit_pairs(samples: PairSamples) -> PairFits:
    """Fits the relative pose of every pair, and a rotation alone."""
    if not len(samples.rays1):
        none = np.zeros(0)
        return PairFits(
            errors_px=np.zeros(samples.is_used.shape),
            best_error_px=none,
            turned_rad=none,
            swung_rad=none,
            gain=none,
            parallax_px=none,
        )
    rotations, baselines = _poses(samples)
    errors = _errors(samples, rotations, baselines)
    best_rotations, best_baselines = _refined(samples, rotations, baselines)
    best_errors = _errors(samples, best_rotations, best_baselines)
    noise_px = np.maximum(
        _LEAST_NOISE_PX, _NOISE_OF_MEDIAN * _medians(best_errors, samples.is_used)
    )[:, None]
    cosines = (np.trace(best_rotations @ np.swapaxes(rotations, 1, 2), axis1=1, axis2=2) - 1) / 2
    return PairFits(
        errors_px=np.abs(errors),
        best_error_px=_medians(best_errors, samples.is_used),
        turned_rad=np.arccos(np.clip(cosines, -1.0, 1.0)),
        swung_rad=np.arccos(np.clip((best_baselines * baselines).sum(axis=1), -1.0, 1.0)),
        gain=_cost(errors / noise_px, samples.is_used)
        - _cost(best_errors / noise_px, samples.is_used),
        parallax_px=_parallax_px(samples),
    )


def epipolar_errors_px(samples: PairSamples) -> Float64Array:
    """Sampson errors (B, N) of matches under the relative poses given, without any fit."""
    return np.abs(_errors(samples, *_poses(samples)))


def _poses(samples: PairSamples) -> tuple[Float64Array, Float64Array]:
    """The rotations (B, 3, 3) and unit baselines (B, 3) to examine."""
    baselines = samples.cam2_from_cam1[:, :, 3]
    lengths = np.linalg.norm(baselines, axis=1, keepdims=True)
    baselines = np.where(lengths > _NO_BASELINE, baselines, (1.0, 0.0, 0.0))
    baselines /= np.linalg.norm(baselines, axis=1, keepdims=True)
    return samples.cam2_from_cam1[:, :, :3], baselines


def _refined(
    samples: PairSamples, rotations: Float64Array, baselines: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Relative poses near those given, (B, 3, 3) and unit (B, 3), that fit their matches best."""
    errors, turned, sizes = _examined(samples, rotations, baselines)
    costs = _cost(errors / _LOSS_PX, samples.is_used)
    damping = np.full(len(rotations), 1e-4)
    for _ in range(_STEPS):
        across = _across(baselines)
        slopes = _slopes(samples, baselines, across, turned, sizes)
        weights = samples.is_used / (1.0 + (errors / _LOSS_PX) ** 2)
        weighted = slopes * weights[..., None]
        normal = np.swapaxes(weighted, 1, 2) @ slopes
        gradients = (np.swapaxes(weighted, 1, 2) @ errors[..., None])[..., 0]
        diagonals = np.einsum("bkk->bk", normal)
        damped = normal + (damping[:, None] * diagonals + 1e-9)[..., None] * np.eye(5)
        steps = -np.linalg.solve(damped, gradients[..., None])[..., 0]
        steps = np.clip(steps, -_MAX_STEP_RAD, _MAX_STEP_RAD)
        tried_rotations = _rotations(steps[:, :3]) @ rotations
        tried_baselines = baselines + np.einsum("bk,bkj->bj", steps[:, 3:], across)
        tried_baselines /= np.linalg.norm(tried_baselines, axis=1, keepdims=True)
        tried_errors, tried_turned, tried_sizes = _examined(
            samples, tried_rotations, tried_baselines
        )
        tried_costs = _cost(tried_errors / _LOSS_PX, samples.is_used)
        is_better = tried_costs < costs
        rotations = np.where(is_better[:, None, None], tried_rotations, rotations)
        baselines = np.where(is_better[:, None], tried_baselines, baselines)
        errors = np.where(is_better[:, None], tried_errors, errors)
        turned = np.where(is_better[:, None, None], tried_turned, turned)
        sizes = np.where(is_better[:, None], tried_sizes, sizes)
        costs = np.where(is_better, tried_costs, costs)
        damping = np.where(is_better, damping / 5.0, damping * 20.0)
    return rotations, baselines


def _errors(samples: PairSamples, rotations: Float64Array, baselines: Float64Array) -> Float64Array:
    """Signed Sampson errors (B, N) in px."""
    return _examined(samples, rotations, baselines)[0]


def _examined(
    samples: PairSamples, rotations: Float64Array, baselines: Float64Array
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Signed Sampson errors (B, N) in px, and what their slopes need.

    Returns:
        The errors: of every match r2 E r1, by the size of its slope along both image planes; the
        first rays (B, N, 3), turned; and these sizes (B, N).
    """
    turned = samples.rays1 @ np.swapaxes(rotations, 1, 2)
    normals2 = np.cross(baselines[:, None], turned)
    normals1 = np.cross(samples.rays2, baselines[:, None]) @ rotations
    products = (normals2 * samples.rays2).sum(axis=-1)
    squared = (normals1**2).sum(axis=-1) + (normals2**2).sum(axis=-1) - 2.0 * products**2
    sizes = np.sqrt(np.maximum(squared, _TINY))
    return np.asarray(products / sizes * samples.focal_px[:, None]), turned, sizes


def _slopes(
    samples: PairSamples,
    baselines: Float64Array,
    across: Float64Array,
    turned: Float64Array,
    sizes: Float64Array,
) -> Float64Array:
    """How the errors change (B, N, 5) with a turn of the second camera and a swung baseline.

    The size of the slope in the image, which changes little, is held.
    """
    by_turn = np.cross(turned, np.cross(samples.rays2, baselines[:, None]))
    by_swing = np.cross(turned, samples.rays2) @ np.swapaxes(across, 1, 2)
    scales = (samples.focal_px[:, None] / sizes)[..., None]
    return np.asarray(np.concatenate([by_turn, by_swing], axis=-1) * scales)


def _across(baselines: Float64Array) -> Float64Array:
    """Two unit vectors (B, 2, 3) across each baseline."""
    helpers = np.where(np.abs(baselines[:, :1]) < 0.7, [[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]])
    first = np.cross(baselines, helpers)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    return np.stack([first, np.cross(baselines, first)], axis=1)


def _rotations(vectors: Float64Array) -> Float64Array:
    """Rotations (B, 3, 3) by rotation vectors (B, 3) (Rodrigues' formula)."""
    angles = np.linalg.norm(vectors, axis=1)[:, None, None]
    x, y, z = (vectors / np.maximum(angles[:, 0], _TINY)).T
    zero = np.zeros_like(x)
    axes = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(-1, 3, 3)
    return np.asarray(np.eye(3) + np.sin(angles) * axes + (1.0 - np.cos(angles)) * (axes @ axes))


def _cost(errors: Float64Array, is_used: BoolArray) -> Float64Array:
    """Cauchy's loss of errors (B, N) in units of its scale, (B,)."""
    return np.asarray((np.log1p(errors**2) * is_used).sum(axis=1))


def _medians(errors: Float64Array, is_used: BoolArray) -> Float64Array:
    """The medians (B,) of the sizes of errors (B, N); 0 where none is used."""
    ordered = np.sort(np.where(is_used, np.abs(errors), np.inf), axis=1)
    middle = np.maximum(is_used.sum(axis=1) - 1, 0) // 2
    medians = np.take_along_axis(ordered, middle[:, None], axis=1)[:, 0]
    return np.asarray(np.where(np.isfinite(medians), medians, 0.0))


def _parallax_px(samples: PairSamples) -> Float64Array:
    """What the rotation that fits best leaves of the matches' motion, (B,) medians in px."""
    used = samples.is_used[..., None]
    moments = np.swapaxes(samples.rays2 * used, 1, 2) @ samples.rays1
    left, _, right = np.linalg.svd(moments)
    signs = np.ones((len(left), 3))
    signs[:, 2] = np.sign(np.linalg.det(left @ right))
    rotations = (left * signs[:, None]) @ right
    turned = samples.rays1 @ np.swapaxes(rotations, 1, 2)
    sines = np.linalg.norm(np.cross(turned, samples.rays2), axis=-1)
    angles = np.arctan2(sines, (turned * samples.rays2).sum(axis=-1))
    return _medians(angles * samples.focal_px[:, None], samples.is_used)
