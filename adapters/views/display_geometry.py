"""Display geometry: where and how large a map is drawn; numpy only.

A map has no unit, no origin and no upright until it is georeferenced, and a sparse map always holds
a few points far away from everything. So all sizes on the screen follow the map itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.types import Float32Array, Float64Array, Int64Array

OUTLIER_RATIO = 3.0  # points beyond this many extents from the centre are not drawn
VISIBLE_RATIO = 1e-3  # of the extent: about half a pixel when the map fills a view

# One stroke along a pyramid's eight edges; 0 is the apex. The edge 2-3 is drawn twice.
_FRUSTUM_STROKE = np.array([1, 2, 3, 4, 1, 0, 2, 3, 0, 4])
# A level and an upright square about the centre, in camera axes; the last point is drawn twice.
_SPHERE_STROKE = np.array(
    [(1, 0, 0), (0, 0, 1), (-1, 0, 0), (0, 0, -1), (1, 0, 0)]
    + [(0, 1, 0), (-1, 0, 0), (0, -1, 0), (1, 0, 0), (1, 0, 0)]
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DisplayScale:
    """The sizes of a map on the screen; steady while the map grows slowly."""

    center_in_world: Float64Array  # (3,) componentwise median of points and cameras
    extent_map: float  # 95 % of points and cameras lie within this distance of the centre
    frustum_depth_map: float  # of a keyframe's pyramid

    @property
    def tolerance_map(self) -> float:
        """Motions below this length are not visible."""
        return VISIBLE_RATIO * self.extent_map

    def shows(self, points3D_in_world: Float32Array) -> NDArray[np.bool_]:
        """A mask (N,) of the points (N, 3) that are near enough to be drawn.

        The rest are outliers: with them in the view, its automatic camera would be so far away
        that the map shrinks to a dot.
        """
        distances = np.linalg.norm(points3D_in_world - self.center_in_world, axis=1)
        mask: NDArray[np.bool_] = distances <= OUTLIER_RATIO * self.extent_map
        return mask


def display_scale(
    points3D_in_world: Float32Array,
    cam_centers_in_world: Float64Array,
    *,
    previous: DisplayScale | None = None,
) -> DisplayScale | None:
    """Sizes that fit a map of points (N, 3) and cameras (K, 3); None while it is empty.

    A pyramid is half as deep as the median camera is far from its nearest neighbour, but between
    1 % and 4 % of the extent. ``previous`` is returned again while it still fits, because new
    sizes mean that everything is drawn anew.
    """
    placed = np.concatenate([points3D_in_world, cam_centers_in_world])
    if not len(placed):
        return None
    center = np.median(placed, axis=0)
    extent = float(np.percentile(np.linalg.norm(placed - center, axis=1), 95)) or 1.0
    spacing = median_spacing(cam_centers_in_world)
    depth = float(np.clip(0.5 * spacing, 0.01 * extent, 0.04 * extent))
    scale = DisplayScale(center_in_world=center, extent_map=extent, frustum_depth_map=depth)
    return previous if previous is not None and _still_fits(previous, scale) else scale


def _still_fits(old: DisplayScale, new: DisplayScale) -> bool:
    moved = float(np.linalg.norm(old.center_in_world - new.center_in_world))
    return (
        moved < 0.2 * old.extent_map
        and 0.8 < new.extent_map / old.extent_map < 1.25
        and 0.7 < new.frustum_depth_map / old.frustum_depth_map < 1.4
    )


def median_spacing(positions: Float64Array, *, max_samples: int = 200) -> float:
    """Median distance of positions (K, D) to their nearest neighbour; 0.0 with fewer than two."""
    if len(positions) < 2:
        return 0.0
    samples = np.linspace(0, len(positions) - 1, min(len(positions), max_samples)).astype(int)
    distances = np.linalg.norm(positions[samples, None] - positions[None], axis=2)
    distances[np.arange(len(samples)), samples] = np.inf
    return float(np.median(distances.min(axis=1)))


def cam_centers(cam_from_world: Float64Array) -> Float64Array:
    """Centres (K, 3) of cameras (K, 3, 4)."""
    rotations, translations = cam_from_world[:, :, :3], cam_from_world[:, :, 3]
    centers: Float64Array = -np.einsum("kji,kj->ki", rotations, translations)
    return centers


def frustum_strokes(
    cam_from_world: Float64Array,
    *,
    focal_px: Float64Array,
    image_sizes: Int64Array,
    depth_map: float,
    corner_rays: Float64Array | None = None,
) -> Float32Array:
    """One stroke (K, 10, 3) in the world for the viewing pyramid of each of K cameras.

    The pyramid of a wide lens ends at one distance instead of one depth, and a camera that sees
    all around is drawn as two squares around it, one level and one upright.

    Args:
        cam_from_world: (K, 3, 4).
        focal_px: (K,).
        image_sizes: (K, 2) width, height.
        depth_map: of the pyramids.
        corner_rays: (K, 4, 3) as in ``MapView``; None: all cameras are pinholes.
    """
    half = 0.5 * image_sizes / focal_px[:, None] * depth_map
    signs = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    corners = np.zeros((len(cam_from_world), 5, 3))
    corners[:, 1:, :2] = signs[None] * half[:, None]
    corners[:, 1:, 2] = depth_map
    in_cam = corners[:, _FRUSTUM_STROKE]
    if corner_rays is not None:
        is_wide = np.isfinite(corner_rays).all(axis=(1, 2))
        corners[is_wide, 1:] = depth_map * corner_rays[is_wide]
        in_cam = corners[:, _FRUSTUM_STROKE]
        sees_all_around = is_wide & ~corner_rays.any(axis=(1, 2))
        in_cam[sees_all_around] = 0.5 * depth_map * _SPHERE_STROKE
    offsets = np.einsum("kji,kcj->kci", cam_from_world[:, :, :3], in_cam)
    world = offsets + cam_centers(cam_from_world)[:, None]
    strokes: Float32Array = world.astype(np.float32)
    return strokes


def plan_positions(
    ids: Int64Array, positions_in_world: Float64Array, *, previous: Mapping[int, Float64Array]
) -> dict[int, Float64Array]:
    """Lays positions (K, 3) out on the plane that fits them best, nearest neighbours about 1 apart.

    Turned and mirrored to lie as ``previous`` did, so that a growing plan stays where it is.
    """
    if not len(ids):
        return {}
    centered = positions_in_world - positions_in_world.mean(axis=0)
    _, _, axes = np.linalg.svd(centered, full_matrices=False)
    plan = centered @ np.vstack([axes, np.zeros((2, 3))])[:2].T
    plan /= median_spacing(plan) or float(np.abs(plan).max()) or 1.0
    known = [row for row, frame_id in enumerate(ids.tolist()) if frame_id in previous]
    if len(known) >= 2:
        old = np.array([previous[int(ids[row])] for row in known])
        left, _, right = np.linalg.svd((plan[known] - plan[known].mean(axis=0)).T @ old)
        plan = plan @ (left @ right)
    return dict(zip(ids.tolist(), plan, strict=True))
