"""Points from tracks over many views at once: batched, robust, differentiable.

Locally optimised RANSAC (Chum, Matas and Kittler, 2003) runs on all tracks of a window together.
Every track draws pairs of the views that see it and takes the midpoints of their rays as
hypotheses; the truncated error over the views that see it (MSAC, Torr and Zisserman, 2000) chooses
one, and least squares on the rays that agree refine it. Views that do not see a track have no say
in it: neither in its hypotheses, nor its angle, nor on which side of them it lies.

As in VGGSfM (Wang, Karaev, Rupprecht and Novotny, CVPR 2024), points are differentiable functions
of tracks and cameras: which views agree is decided by numbers, the point follows from them by
smooth operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.windows.model import WindowModel, WindowSolverConfig

if TYPE_CHECKING:
    from torch import Tensor

_FAR = 1e12  # a squared tangent for rays that point away
_TINY = 1e-18
_LENGTHS = (3, 5, 8, 12, 20, 40, 80, 10**9)  # tracks of alike length are padded together


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

    points3D_in_world: Tensor  # (N, 3) float64
    is_inlier: Tensor  # (S, N) bool, false for tracks that are not valid
    is_valid: Tensor  # (N,) bool: two observations at least agree, with enough parallax


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rays:
    """Viewing rays of tracks of alike length, the views that see them moved to the front."""

    centers: Tensor  # (N, L, 3) camera centres
    directions: Tensor  # (N, L, 3) unit
    is_visible: Tensor  # (N, L)


def triangulate_tracks(
    image_plane_xy: Tensor,
    is_visible: Tensor,
    cam_from_world: Tensor,
    *,
    options: TriangulationOptions,
    guess_in_world: Tensor | None = None,
) -> TrackPoints:
    """Triangulates N tracks through S views, on the device and in the dtype of the tensors.

    Gradients of the points with respect to ``image_plane_xy`` and ``cam_from_world`` are those of
    the refinement by the observations that agree::

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
    import torch

    points = image_plane_xy.new_zeros((image_plane_xy.shape[1], 3))
    is_inlier = torch.zeros_like(is_visible)
    is_valid = torch.zeros(is_visible.shape[1], dtype=torch.bool, device=is_visible.device)
    counts = is_visible.sum(dim=0)
    shorter = 1  # one view makes no point
    for longest in _LENGTHS:
        tracks = torch.nonzero((counts > shorter) & (counts <= longest))[:, 0]
        shorter = longest
        if not len(tracks):
            continue
        views = _views_that_see(is_visible[:, tracks], num=int(counts[tracks].max()))
        rays = _rays(image_plane_xy, is_visible, cam_from_world, tracks=tracks, views=views)
        guess = None if guess_in_world is None else guess_in_world[tracks]
        found, agrees = _triangulate(rays, guess, options=options)
        enough = _has_parallax(found, rays, agrees, min_parallax_rad=options.min_parallax_rad)
        points = points.index_copy(0, tracks, found)
        is_valid[tracks] = enough
        is_inlier[views, tracks[:, None].expand_as(views)] = agrees & enough[:, None]
    return TrackPoints(points3D_in_world=points, is_inlier=is_inlier, is_valid=is_valid)


def triangulate_window(
    model: WindowModel, *, max_angle_rad: float, config: WindowSolverConfig
) -> None:
    """Gives tracks of a window points through the frames that are posed, in place.

    Points that already agree with all that sees them stay; the others compete with new ones.
    """
    import torch

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
    with torch.no_grad():
        found = triangulate_tracks(
            torch.from_numpy(dense_xy).to(config.device),
            torch.from_numpy(is_visible).to(config.device),
            torch.from_numpy(model.cam_from_world[frames]).to(config.device),
            options=options,
            guess_in_world=torch.from_numpy(model.points3D_in_world[tracks]).to(config.device),
        )
    is_valid = found.is_valid.cpu().numpy()
    points = np.where(is_valid[:, None], found.points3D_in_world.cpu().numpy(), np.nan)
    model.points3D_in_world[tracks] = points


def _views_that_see(is_visible: Tensor, *, num: int) -> Tensor:
    """(N, num) views, those that see the track first, in order."""
    import torch

    hidden_last = torch.argsort((~is_visible.T).to(torch.uint8), dim=1, stable=True)
    return hidden_last[:, :num]


def _rays(
    image_plane_xy: Tensor,
    is_visible: Tensor,
    cam_from_world: Tensor,
    *,
    tracks: Tensor,
    views: Tensor,
) -> _Rays:
    """The viewing rays in the world of some tracks (N,) in their views (N, L)."""
    import torch

    world_from_cam = cam_from_world[:, :, :3].transpose(1, 2)
    centers = -(world_from_cam @ cam_from_world[:, :, 3:])[:, :, 0]
    column = tracks[:, None].expand_as(views)
    plane_xy = image_plane_xy[views, column]
    in_cam = torch.cat([plane_xy, torch.ones_like(plane_xy[..., :1])], dim=-1)
    directions = (world_from_cam[views] * in_cam[..., None, :]).sum(dim=-1)
    return _Rays(
        centers=centers[views],
        directions=directions / directions.norm(dim=-1, keepdim=True),
        is_visible=is_visible[views, column],
    )


def _triangulate(
    rays: _Rays, guess: Tensor | None, *, options: TriangulationOptions
) -> tuple[Tensor, Tensor]:
    """The best point of each track, (N, 3), and which of its views agree, (N, L)."""
    import torch

    hypotheses, is_possible = _midpoints(rays, options=options)
    if guess is not None:
        is_given = torch.isfinite(guess).all(dim=1, keepdim=True)
        hypotheses = torch.cat([hypotheses, torch.nan_to_num(guess)[:, None]], dim=1)
        is_possible = torch.cat([is_possible, is_given], dim=1)
    with torch.no_grad():
        costs = _costs(_squared_tangents(hypotheses, rays), rays, options=options)
        costs = torch.where(is_possible, costs, torch.inf)
        best = costs.argmin(dim=1)
    row = torch.arange(len(best), device=best.device)
    points, cost = hypotheses[row, best], costs[row, best]
    for _ in range(options.num_refinements):
        agrees = _agrees(points, rays, options=options)
        refined = _nearest_to_rays(points, rays, agrees)
        with torch.no_grad():
            tangents = _squared_tangents(refined[:, None], rays)
            refined_cost = _costs(tangents, rays, options=options)[:, 0]
            is_better = refined_cost <= cost
        points = torch.where(is_better[:, None], refined, points)
        cost = torch.where(is_better, refined_cost, cost)
    return points, _agrees(points, rays, options=options)


def _midpoints(rays: _Rays, *, options: TriangulationOptions) -> tuple[Tensor, Tensor]:
    """Midpoints (N, K, 3) of pairs of rays, and which (N, K) are in front and determined."""
    import torch

    one, other, is_pair = _pairs(rays.is_visible, options=options)
    row = torch.arange(len(one), device=one.device)[:, None]
    center1, center2 = rays.centers[row, one], rays.centers[row, other]
    ray1, ray2 = rays.directions[row, one], rays.directions[row, other]
    between = center2 - center1
    cosine = (ray1 * ray2).sum(dim=-1)
    along1, along2 = (between * ray1).sum(dim=-1), (between * ray2).sum(dim=-1)
    # The squared sine from the cross product is exact for rays that are nearly parallel.
    squared_sine = torch.linalg.cross(ray1, ray2).square().sum(dim=-1)
    is_determined = squared_sine > torch.sin(torch.tensor(options.min_parallax_rad)) ** 2
    divisor = torch.where(is_determined, squared_sine, 1.0)
    depth1 = (along1 - cosine * along2) / divisor
    depth2 = (cosine * along1 - along2) / divisor
    midpoints = 0.5 * (center1 + depth1[..., None] * ray1 + center2 + depth2[..., None] * ray2)
    return midpoints, is_pair & is_determined & (depth1 > 0) & (depth2 > 0)


def _pairs(is_visible: Tensor, *, options: TriangulationOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of two views that see the track, (N, K) each, and whether there are two."""
    import torch

    num_tracks, length = is_visible.shape
    counts = is_visible.sum(dim=1, keepdim=True)
    if length * (length - 1) // 2 <= options.num_hypotheses:
        one, other = torch.triu_indices(length, length, offset=1, device=is_visible.device)
        is_pair = other[None] < counts
        return one.expand(num_tracks, -1), other.expand(num_tracks, -1), is_pair
    generator = torch.Generator().manual_seed(options.seed)  # the same draws on every device
    draws = torch.rand(
        (2, num_tracks, options.num_hypotheses), generator=generator, dtype=torch.float64
    ).to(is_visible.device)
    one = (draws[0] * counts).long()
    other = (draws[1] * (counts - 1)).long()
    other = other + (other >= one).long()
    return one, other, torch.ones_like(one, dtype=torch.bool)


def _squared_tangents(points: Tensor, rays: _Rays) -> Tensor:
    """(N, K, L) squared tangent of the angle between each ray and K points (N, K, 3) per track."""
    import torch

    origin = rays.centers[:, :1]  # close to the rays, which keeps the differences exact
    centers, points = rays.centers - origin, points - origin
    along = points @ rays.directions.transpose(1, 2) - (centers * rays.directions).sum(-1)[:, None]
    squared_distance = (
        points.square().sum(-1)[:, :, None]
        - 2.0 * points @ centers.transpose(1, 2)
        + centers.square().sum(-1)[:, None]
    )
    squared_along = along.square()
    across = (squared_distance - squared_along).clamp_min(0.0)
    return torch.where(along > 0, across / squared_along.clamp_min(_TINY), _FAR)


def _costs(squared_tangents: Tensor, rays: _Rays, *, options: TriangulationOptions) -> Tensor:
    """(N, K) truncated squared errors over the views that see the track, each 0..1."""
    gate = options.max_angle_rad**2
    errors = (squared_tangents / gate).clamp_max(1.0)
    return (errors * rays.is_visible[:, None]).sum(dim=-1)


def _agrees(points: Tensor, rays: _Rays, *, options: TriangulationOptions) -> Tensor:
    """(N, L) which views see the track and agree with its point (N, 3)."""
    import torch

    with torch.no_grad():
        tangents = _squared_tangents(points[:, None], rays)[:, 0]
        return (tangents < options.max_angle_rad**2) & rays.is_visible


def _nearest_to_rays(points: Tensor, rays: _Rays, agrees: Tensor) -> Tensor:
    """Points (N, 3) nearest to the rays that agree, errors weighted to be angles.

    The distance to a ray over the distance from its camera is about the angle; the latter is that
    of the point before. Points that two rays or more do not determine stay as they are.
    """
    import torch

    offset = points[:, None] - rays.centers
    weights = agrees / offset.square().sum(dim=-1).clamp_min(_TINY)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(_TINY)
    eye = torch.eye(3, dtype=points.dtype, device=points.device)
    outer = torch.einsum("nl,nli,nlj->nij", weights, rays.directions, rays.directions)
    normal = weights.sum(dim=1)[:, None, None] * eye - outer
    missed = offset - (offset * rays.directions).sum(dim=-1, keepdim=True) * rays.directions
    gradient = (weights[..., None] * missed).sum(dim=1)
    determinant = torch.linalg.det(normal)
    is_determined = determinant.detach() > 1e-10
    step = torch.linalg.solve(torch.where(is_determined[:, None, None], normal, eye), gradient)
    return torch.where(is_determined[:, None], points - step, points)


def _has_parallax(
    points: Tensor, rays: _Rays, agrees: Tensor, *, min_parallax_rad: float
) -> Tensor:
    """(N,) whether some two of the views that agree see the point under a sufficient angle."""
    import torch

    with torch.no_grad():
        towards = points[:, None] - rays.centers
        towards = towards / towards.norm(dim=-1, keepdim=True).clamp_min(_TINY)
        cosines = towards @ towards.transpose(1, 2)
        both = agrees[:, :, None] & agrees[:, None]
        widest = torch.where(both, cosines, 1.0).flatten(1).amin(dim=1)
        enough: Tensor = widest < torch.cos(torch.tensor(min_parallax_rad, dtype=points.dtype))
        return enough & (agrees.sum(dim=1) >= 2)
