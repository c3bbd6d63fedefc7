"""Points from tracks over many views at once: batched, robust, differentiable.

Locally optimised RANSAC (Chum, Matas and Kittler, 2003) runs on all tracks of a window together.
Every track draws pairs of the views that see it and takes the midpoints of their rays as
hypotheses; the truncated error over the views that see it (MSAC, Torr and Zisserman, 2000) chooses
one, and least squares on the rays that agree refine it. Views that do not see a track have no say
in it: neither in its hypotheses, nor its angle, nor on which side of them it lies.

Arrays are NumPy's or PyTorch's, by the array API standard. As in VGGSfM (Wang, Karaev, Rupprecht
and Novotny, CVPR 2024), points are differentiable functions of tracks and cameras where these are
tensors that require gradients: which views agree is decided by numbers, the point follows from them
by smooth operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from array_api_compat import array_namespace, device, is_torch_array

from engine.types import Float64Array
from engine.windows.model import WindowModel, WindowSolverConfig

Array: TypeAlias = Any  # of NumPy or PyTorch; those of one call are of one kind, on one device

_FAR = 1e12  # a squared tangent for rays that point away
_TINY = 1e-18
_LENGTHS = (3, 5, 8, 12, 20, 40, 80, 10**9)  # tracks of alike length are padded together


def _namespace(*arrays: Array) -> Any:
    """The functions of the arrays' library, as the standard has them; NumPy's own are.

    The module that stands for them otherwise would load all of NumPy, with its tools for tests.
    """
    return np if isinstance(arrays[0], np.ndarray) else array_namespace(*arrays)


@dataclass(frozen=True, slots=True, kw_only=True)
class TriangulationOptions:
    """How tracks become points."""

    max_angle_rad: float  # between the ray and the point, for an observation to agree
    min_parallax_rad: float  # between some two of the rays that agree
    num_hypotheses: int = 12  # pairs of views drawn per track, if it has more
    num_refinements: int = 2
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrackPoints:
    """The points of tracks; rows that are not valid hold the best guess there was."""

    points3D_in_world: Array  # (N, 3) float64
    is_inlier: Array  # (S, N) bool, false for tracks that are not valid
    is_valid: Array  # (N,) bool: two observations at least agree, with enough parallax


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rays:
    """Viewing rays of tracks of alike length, the views that see them moved to the front."""

    centers: Array  # (N, L, 3) camera centres
    directions: Array  # (N, L, 3) unit
    is_visible: Array  # (N, L)

    def values(self) -> _Rays:
        """The same rays, constant: gradients do not flow through what is made of them."""
        return _Rays(
            centers=_values(self.centers),
            directions=_values(self.directions),
            is_visible=self.is_visible,
        )


def triangulate_tracks(
    image_plane_xy: Array,
    is_visible: Array,
    cam_from_world: Array,
    *,
    options: TriangulationOptions,
    guess_in_world: Array | None = None,
) -> TrackPoints:
    """Triangulates N tracks through S views, on the device and in the dtype of the arrays.

    Gradients of the points with respect to ``image_plane_xy`` and ``cam_from_world`` are those of
    the refinement by the observations that agree; with PyTorch::

        plane_xy = ((tracks_xy - principal_point_xy) / focal_px).requires_grad_()
        found = triangulate_tracks(plane_xy, is_visible, cam_from_world, options=options)
        loss = (found.points3D_in_world - truth)[found.is_valid].square().sum()
        loss.backward()  # plane_xy.grad: (S, N, 2)

    Args:
        image_plane_xy: (S, N, 2) float64, undistorted, on the plane z = 1 of each camera; any
            finite value where not visible.
        is_visible: (S, N) bool.
        cam_from_world: (S, 3, 4) float64.
        options: gates and effort.
        guess_in_world: (N, 3) points to be tried first; rows that are not finite are not.
    """
    xp = _namespace(image_plane_xy, is_visible, cam_from_world)
    num_tracks = image_plane_xy.shape[1]
    points = xp.zeros((num_tracks, 3), dtype=image_plane_xy.dtype, device=device(image_plane_xy))
    is_inlier = xp.zeros_like(is_visible)
    is_valid = xp.zeros_like(is_visible[0])
    counts = _count(is_visible, axis=0)
    shorter = 1  # one view makes no point
    for longest in _LENGTHS:
        (tracks,) = xp.nonzero((counts > shorter) & (counts <= longest))
        shorter = longest
        if not len(tracks):
            continue
        views = _views_that_see(is_visible[:, tracks], num=int(xp.max(counts[tracks])))
        rays = _rays(image_plane_xy, is_visible, cam_from_world, tracks=tracks, views=views)
        guess = None if guess_in_world is None else guess_in_world[tracks]
        found, agrees = _triangulate(rays, guess, options=options)
        enough = _has_parallax(found, rays, agrees, min_parallax_rad=options.min_parallax_rad)
        points[tracks] = found
        is_valid[tracks] = enough
        is_inlier[views, tracks[:, None]] = agrees & enough[:, None]
    return TrackPoints(points3D_in_world=points, is_inlier=is_inlier, is_valid=is_valid)


def triangulate_window(
    model: WindowModel, *, max_angle_rad: float, config: WindowSolverConfig
) -> None:
    """Gives tracks of a window points through the frames that are posed, in place.

    Points that already agree with all that sees them stay; the others compete with new ones.
    """
    plane_xy = model.plane_xy()
    is_usable = model.is_posed[model.frame_idx] & np.isfinite(plane_xy).all(axis=1)
    misses = is_usable & (model.errors_px() > config.max_error_px * model.scale)
    num_misses = np.bincount(model.track_idx[misses], minlength=model.problem.num_tracks)
    tracks = np.flatnonzero(num_misses)
    if not len(tracks):
        return
    frames = np.flatnonzero(model.is_posed)
    rows = np.flatnonzero(is_usable & (num_misses[model.track_idx] > 0))
    frame = np.searchsorted(frames, model.frame_idx[rows])
    column = np.searchsorted(tracks, model.track_idx[rows])
    dense_xy = np.zeros((len(frames), len(tracks), 2))
    dense_xy[frame, column] = plane_xy[rows]
    is_visible = np.zeros((len(frames), len(tracks)), np.bool_)
    is_visible[frame, column] = True
    options = TriangulationOptions(
        max_angle_rad=max_angle_rad,
        min_parallax_rad=float(np.radians(config.min_parallax_deg)),
        num_hypotheses=config.num_hypotheses,
        seed=config.seed,
    )
    found = triangulate_tracks(
        dense_xy,
        is_visible,
        model.cam_from_world[frames],
        options=options,
        guess_in_world=model.points3D_in_world[tracks],
    )
    points = np.where(found.is_valid[:, None], found.points3D_in_world, np.nan)
    model.points3D_in_world[tracks] = points


def _values(array: Array) -> Array:
    """The array as a constant: PyTorch records no operations on it."""
    return array.detach() if is_torch_array(array) else array


def _count(mask: Array, *, axis: int) -> Array:
    """How many are true along an axis, int64."""
    xp = _namespace(mask)
    return xp.sum(mask, axis=axis, dtype=xp.int64)


def _views_that_see(is_visible: Array, *, num: int) -> Array:
    """(N, num) views, those that see the track first, in order."""
    xp = _namespace(is_visible)
    hidden_last = xp.argsort(xp.astype(~is_visible.T, xp.uint8), axis=1, stable=True)
    return hidden_last[:, :num]


def _rays(
    image_plane_xy: Array,
    is_visible: Array,
    cam_from_world: Array,
    *,
    tracks: Array,
    views: Array,
) -> _Rays:
    """The viewing rays in the world of some tracks (N,) in their views (N, L)."""
    xp = _namespace(image_plane_xy)
    world_from_cam = xp.matrix_transpose(cam_from_world[:, :, :3])
    centers = -(world_from_cam @ cam_from_world[:, :, 3:])[:, :, 0]
    plane_xy = image_plane_xy[views, tracks[:, None]]
    in_cam = xp.concat([plane_xy, xp.ones_like(plane_xy[..., :1])], axis=-1)
    directions = xp.sum(world_from_cam[views] * in_cam[..., None, :], axis=-1)
    return _Rays(
        centers=centers[views],
        directions=directions / xp.linalg.vector_norm(directions, axis=-1, keepdims=True),
        is_visible=is_visible[views, tracks[:, None]],
    )


def _triangulate(
    rays: _Rays, guess: Array | None, *, options: TriangulationOptions
) -> tuple[Array, Array]:
    """The best point of each track, (N, 3), and which of its views agree, (N, L)."""
    xp = _namespace(rays.centers)
    hypotheses, is_possible = _midpoints(rays, options=options)
    if guess is not None:
        is_given = xp.all(xp.isfinite(guess), axis=1, keepdims=True)
        finite_guess = xp.where(is_given, guess, 0.0)
        hypotheses = xp.concat([hypotheses, finite_guess[:, None]], axis=1)
        is_possible = xp.concat([is_possible, is_given], axis=1)
    fixed = rays.values()
    costs = _costs(_squared_tangents(_values(hypotheses), fixed), fixed, options=options)
    costs = xp.where(is_possible, costs, math.inf)
    best = xp.argmin(costs, axis=1)
    row = xp.arange(len(best), device=device(best))
    points, cost = hypotheses[row, best], costs[row, best]
    for _ in range(options.num_refinements):
        agrees = _agrees(points, fixed, options=options)
        refined = _nearest_to_rays(points, rays, agrees)
        tangents = _squared_tangents(_values(refined)[:, None], fixed)
        refined_cost = _costs(tangents, fixed, options=options)[:, 0]
        is_better = refined_cost <= cost
        points = xp.where(is_better[:, None], refined, points)
        cost = xp.where(is_better, refined_cost, cost)
    return points, _agrees(points, fixed, options=options)


def _midpoints(rays: _Rays, *, options: TriangulationOptions) -> tuple[Array, Array]:
    """Midpoints (N, K, 3) of pairs of rays, and which (N, K) are in front and determined."""
    xp = _namespace(rays.centers)
    one, other, is_pair = _pairs(rays.is_visible, options=options)
    row = xp.arange(len(one), device=device(one))[:, None]
    center1, center2 = rays.centers[row, one], rays.centers[row, other]
    ray1, ray2 = rays.directions[row, one], rays.directions[row, other]
    between = center2 - center1
    cosine = xp.sum(ray1 * ray2, axis=-1)
    along1, along2 = xp.sum(between * ray1, axis=-1), xp.sum(between * ray2, axis=-1)
    # The squared sine from the cross product is exact for rays that are nearly parallel.
    squared_sine = _squared_length(xp.linalg.cross(ray1, ray2, axis=-1))
    is_determined = squared_sine > math.sin(options.min_parallax_rad) ** 2
    divisor = xp.where(is_determined, squared_sine, 1.0)
    depth1 = (along1 - cosine * along2) / divisor
    depth2 = (cosine * along1 - along2) / divisor
    midpoints = 0.5 * (center1 + depth1[..., None] * ray1 + center2 + depth2[..., None] * ray2)
    return midpoints, is_pair & is_determined & (depth1 > 0) & (depth2 > 0)


def _pairs(is_visible: Array, *, options: TriangulationOptions) -> tuple[Array, Array, Array]:
    """Positions of two views that see the track, (N, K) each, and whether there are two."""
    xp = _namespace(is_visible)
    num_tracks, length = is_visible.shape
    counts = _count(is_visible, axis=1)[:, None]
    if length * (length - 1) // 2 <= options.num_hypotheses:
        one, other = (
            xp.broadcast_to(
                xp.asarray(positions, device=device(is_visible)), (num_tracks, len(positions))
            )
            for positions in np.triu_indices(length, 1)
        )
        return one, other, other < counts
    draws = _draws((2, num_tracks, options.num_hypotheses), seed=options.seed)
    draws = xp.asarray(draws, device=device(is_visible))
    one = xp.astype(draws[0] * counts, xp.int64)
    other = xp.astype(draws[1] * (counts - 1), xp.int64)
    other = other + xp.astype(other >= one, xp.int64)
    return one, other, xp.ones_like(one, dtype=xp.bool)


def _draws(shape: tuple[int, ...], *, seed: int) -> Float64Array:
    """Numbers from 0 to below 1 that depend on the seed alone, not on versions or devices.

    53 bits each of the Mersenne Twister, taken as ``torch.rand`` takes them.
    """
    twister = np.random.RandomState(seed)
    words = twister.randint(2**32, size=(*shape, 2), dtype=np.uint32).astype(np.uint64)
    bits = (words[..., 0] << np.uint64(32)) | words[..., 1]
    return (bits & np.uint64(2**53 - 1)).astype(np.float64) * 2.0**-53


def _squared_length(vectors: Array) -> Array:
    """The sum of squares along the last axis."""
    xp = _namespace(vectors)
    return xp.sum(vectors * vectors, axis=-1)


def _squared_tangents(points: Array, rays: _Rays) -> Array:
    """(N, K, L) squared tangent of the angle between each ray and K points (N, K, 3) per track."""
    xp = _namespace(points)
    origin = rays.centers[:, :1]  # close to the rays, which keeps the differences exact
    centers, points = rays.centers - origin, points - origin
    offset = xp.sum(centers * rays.directions, axis=-1)[:, None]
    along = points @ xp.matrix_transpose(rays.directions) - offset
    squared_distance = (
        _squared_length(points)[:, :, None]
        - 2.0 * points @ xp.matrix_transpose(centers)
        + _squared_length(centers)[:, None]
    )
    squared_along = along * along
    across = xp.clip(squared_distance - squared_along, 0.0, None)
    return xp.where(along > 0, across / xp.clip(squared_along, _TINY, None), _FAR)


def _costs(squared_tangents: Array, rays: _Rays, *, options: TriangulationOptions) -> Array:
    """(N, K) truncated squared errors over the views that see the track, each 0..1."""
    xp = _namespace(squared_tangents)
    gate = options.max_angle_rad**2
    errors = xp.clip(squared_tangents / gate, None, 1.0)
    return xp.sum(xp.where(rays.is_visible[:, None], errors, 0.0), axis=-1)


def _agrees(points: Array, rays: _Rays, *, options: TriangulationOptions) -> Array:
    """(N, L) which views see the track and agree with its point (N, 3)."""
    tangents = _squared_tangents(_values(points)[:, None], rays)[:, 0]
    return (tangents < options.max_angle_rad**2) & rays.is_visible


def _nearest_to_rays(points: Array, rays: _Rays, agrees: Array) -> Array:
    """Points (N, 3) nearest to the rays that agree, errors weighted to be angles.

    The distance to a ray over the distance from its camera is about the angle; the latter is that
    of the point before. Points that two rays or more do not determine stay as they are.
    """
    xp = _namespace(points)
    offset = points[:, None] - rays.centers
    weights = xp.where(agrees, 1.0 / xp.clip(_squared_length(offset), _TINY, None), 0.0)
    weights = weights / xp.clip(xp.sum(weights, axis=1, keepdims=True), _TINY, None)
    eye = xp.eye(3, dtype=points.dtype, device=device(points))
    weighted = weights[..., None] * rays.directions
    outer = xp.matrix_transpose(weighted) @ rays.directions
    normal = xp.sum(weights, axis=1)[:, None, None] * eye - outer
    along = xp.sum(offset * rays.directions, axis=-1, keepdims=True)
    missed = offset - along * rays.directions
    gradient = xp.sum(weights[..., None] * missed, axis=1)
    is_determined = xp.linalg.det(_values(normal)) > 1e-10
    solvable = xp.where(is_determined[:, None, None], normal, eye)
    step = xp.linalg.solve(solvable, gradient[..., None])[..., 0]
    return xp.where(is_determined[:, None], points - step, points)


def _has_parallax(points: Array, rays: _Rays, agrees: Array, *, min_parallax_rad: float) -> Array:
    """(N,) whether some two of the views that agree see the point under a sufficient angle."""
    xp = _namespace(points)
    towards = _values(points)[:, None] - _values(rays.centers)
    norms = xp.linalg.vector_norm(towards, axis=-1, keepdims=True)
    towards = towards / xp.clip(norms, _TINY, None)
    cosines = towards @ xp.matrix_transpose(towards)
    both = agrees[:, :, None] & agrees[:, None]
    widest = xp.min(xp.where(both, cosines, 1.0), axis=(1, 2))
    return (widest < math.cos(min_parallax_rad)) & (_count(agrees, axis=1) >= 2)
