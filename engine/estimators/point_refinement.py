"""Points refined where poses and calibrations are known, each on its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.types import Float64Array, Int64Array

_MAX_STEPS = 6
_SETTLED_RATIO = 1e-3  # of the cost: a step that gains less is the last
_RELATIVE_STEP = 1e-6  # of numeric derivatives, of the depth
_LEAST_DAMPING = 1e-9
_FAR_PX = 1e4  # the error of a point that a camera cannot see

Project = Callable[[Float64Array], Float64Array]


def refine_points(
    points3D: Float64Array,
    first_rows: Int64Array,
    *,
    cams_from_world: Float64Array,
    points_xy: Float64Array,
    project: Project,
) -> Float64Array:
    """Moves points to where their observations have them, by Levenberg and Marquardt's method.

    The loss is soft L1, at a scale of a pixel, as in bundle adjustment.

    Args:
        points3D: positions (P, 3) to begin with.
        first_rows: (P,) where in the observations those of each point begin; it has one at least.
        cams_from_world: (M, 3, 4), the pose of each observation; those of a point are together.
        points_xy: (M, 2) px, where it is.
        project: from points (M, 3) in the cameras of the observations to pixels (M, 2).

    Returns:
        Positions (P, 3), none of which fits worse than before.
    """
    lengths = np.diff(np.append(first_rows, len(points_xy)))
    of_point = np.repeat(np.arange(len(points3D)), lengths)
    rotations = np.ascontiguousarray(cams_from_world[:, :, :3].transpose(2, 0, 1))  # columns

    def in_cams(points: Float64Array) -> Float64Array:
        rows = points[of_point]
        turned = sum(rotations[axis] * rows[:, axis, None] for axis in range(3))
        return np.asarray(turned + cams_from_world[:, :, 3])

    def errors_px(points_in_cams: Float64Array) -> Float64Array:
        errors = project(points_in_cams) - points_xy
        is_seen = np.isfinite(errors).all(axis=1) & (points_in_cams[:, 2] > 0.0)
        return np.where(is_seen[:, None], errors, _FAR_PX)

    def costs(errors: Float64Array) -> Float64Array:
        return np.add.reduceat(np.sqrt(1.0 + (errors**2).sum(axis=1)) - 1.0, first_rows)

    points = points3D.copy()
    damping = np.full(len(points), 1e-4)
    seen_from = in_cams(points)
    errors = errors_px(seen_from)
    cost = costs(errors)
    for _ in range(_MAX_STEPS):
        jacobian = _jacobian(seen_from, rotations, errors=errors, errors_px=errors_px)
        step = _steps(jacobian, errors, first_rows, damping=damping)
        tried = points + step
        seen_then = in_cams(tried)
        errors_then = errors_px(seen_then)
        cost_then = costs(errors_then)
        is_better = cost_then < cost
        gain = float((cost - cost_then)[is_better].sum())
        is_settled = gain <= _SETTLED_RATIO * float(cost.sum())
        points[is_better], cost[is_better] = tried[is_better], cost_then[is_better]
        if is_settled:
            break
        rows = is_better[of_point]
        seen_from[rows], errors[rows] = seen_then[rows], errors_then[rows]
        damping = np.where(is_better, 0.2 * damping, 10.0 * damping)
    return points


def _jacobian(
    seen_from: Float64Array,
    rotations: Float64Array,
    *,
    errors: Float64Array,
    errors_px: Callable[[Float64Array], Float64Array],
) -> Float64Array:
    """(3, M, 2) derivatives of errors by the positions of points in the world."""
    steps = _RELATIVE_STEP * np.abs(seen_from[:, 2:])
    moved = [errors_px(seen_from + steps * rotations[axis]) for axis in range(3)]
    return np.asarray((np.array(moved) - errors) / np.maximum(steps, np.finfo(float).tiny))


def _steps(
    jacobian: Float64Array,
    errors: Float64Array,
    first_rows: Int64Array,
    *,
    damping: Float64Array,
) -> Float64Array:
    """(P, 3) damped steps of Gauss and Newton."""
    weights = 1.0 / np.sqrt(1.0 + (errors**2).sum(axis=1))
    weighted = weights[:, None] * jacobian
    hessian = np.empty((len(first_rows), 3, 3))
    gradient = np.empty((len(first_rows), 3))
    for row in range(3):
        gradient[:, row] = np.add.reduceat((weighted[row] * errors).sum(axis=1), first_rows)
        for column in range(row + 1):
            products = (weighted[row] * jacobian[column]).sum(axis=1)
            hessian[:, row, column] = np.add.reduceat(products, first_rows)
            hessian[:, column, row] = hessian[:, row, column]
    diagonal = np.einsum("pii->pi", hessian)  # a view
    largest = diagonal.max(axis=1, initial=0.0, keepdims=True)
    diagonal += damping[:, None] * diagonal + _LEAST_DAMPING * np.maximum(largest, 1e-12)
    return np.asarray(-np.linalg.solve(hessian, gradient[..., None])[..., 0])
