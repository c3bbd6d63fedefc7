"""Whether cameras of a map are where they were, and whether those it joins saw the same."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.geometry import invert_pose, nearest_rotation, transform_points
from engine.types import Float64Array

if TYPE_CHECKING:
    import pycolmap

RIGHT_RATIO = 0.02  # of the reference's extent: a camera this close is right
_MAX_SAMPLES = 4000
_NUM_REFINEMENTS = 3
_JOINED_BY = 18  # points that two keyframes share at least, to be joined: as many verify a pair
_SAME_PLACE_RATIO = 0.3  # of the distance to a point, within which two views see the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Cameras of a map that have a true place."""

    num_right: int
    num_wrong: int
    wrong: tuple[str, ...]  # names
    worst_percent: float  # distance from the true place, of the extent

    @property
    def num_judged(self) -> int:
        """How many cameras have a true place."""
        return self.num_right + self.num_wrong


def placement(
    centers: Mapping[str, Float64Array], true_centers: Mapping[str, Float64Array]
) -> Placement | None:
    """Which cameras are right after the similarity by which most are.

    So cameras at wrong places do not bend the fit. Three cameras fit almost anything: a count of
    three right ones says little.

    Args:
        centers: in the map, (3,), by name.
        true_centers: of all cameras of the input; they set the extent.

    Returns:
        None for fewer than three cameras with a true place.
    """
    names = sorted(centers.keys() & true_centers.keys())
    if len(names) < 3:
        return None
    found = np.array([centers[name] for name in names])
    true = np.array([true_centers[name] for name in names])
    everywhere = np.array(list(true_centers.values()))
    extent = float(np.linalg.norm(np.ptp(everywhere, axis=0)))
    distances = _robust_distances(found, true, bound=RIGHT_RATIO * extent)
    is_right = distances <= RIGHT_RATIO * extent
    return Placement(
        num_right=int(is_right.sum()),
        num_wrong=int((~is_right).sum()),
        wrong=tuple(name for name, right in zip(names, is_right, strict=True) if not right),
        worst_percent=100 * float(distances.max()) / extent,
    )


def _robust_distances(found: Float64Array, true: Float64Array, *, bound: float) -> Float64Array:
    """Distances (N,) after the similarity of all cameras near the best one of three cameras."""
    triples = list(itertools.islice(_triples(len(found)), _MAX_SAMPLES))
    best = np.full(len(found), np.inf)
    for rows in triples:
        distances = _distances_after(found, true, rows=np.array(rows))
        if _rank(distances, bound) > _rank(best, bound):
            best = distances
    for _ in range(_NUM_REFINEMENTS):
        near = np.flatnonzero(best <= bound)
        if len(near) < 3:
            break
        best = _distances_after(found, true, rows=near)
    return best


def _rank(distances: Float64Array, bound: float) -> tuple[int, float]:
    """More cameras within the bound, then closer ones."""
    is_near = distances <= bound
    return int(is_near.sum()), -float(distances[is_near].sum())


def _triples(number: int) -> itertools.chain[tuple[int, int, int]]:
    """All triples of few cameras, triples at random of many."""
    if number**3 / 6 <= _MAX_SAMPLES:
        return itertools.chain(itertools.combinations(range(number), 3))
    rng = np.random.default_rng(0)
    drawn = (rng.choice(number, 3, replace=False) for _ in range(_MAX_SAMPLES))
    return itertools.chain((int(a), int(b), int(c)) for a, b, c in drawn)


def _distances_after(
    found: Float64Array, true: Float64Array, *, rows: np.ndarray[tuple[int], np.dtype[np.intp]]
) -> Float64Array:
    """Distances (N,) of all after the similarity that fits some best (Umeyama, 1991)."""
    middle, true_middle = found[rows].mean(axis=0), true[rows].mean(axis=0)
    one, other = found[rows] - middle, true[rows] - true_middle
    spread = float(np.sum(one**2))
    rotation = nearest_rotation(other.T @ one)
    if rotation is None or spread == 0:
        return np.full(len(found), np.inf)
    scale = float(np.sum(other * (one @ rotation.T))) / spread
    moved = scale * (found - middle) @ rotation.T + true_middle
    return np.asarray(np.linalg.norm(moved - true, axis=1))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrueViews:
    """What every frame of a source truly sees: depths on a grid, and poses."""

    depths_m: Float64Array  # (F, rows, columns) along the optical axis; inf in the sky
    cam_from_world: Float64Array  # (F, 3, 4)
    intrinsics: Float64Array  # (4,) fx, fy, cx, cy in px
    size: Float64Array  # (2,) width, height in px

    @staticmethod
    def load(path: Path) -> TrueViews:
        """Reads the arrays that `flights` writes."""
        with np.load(path) as arrays:
            return TrueViews(
                depths_m=arrays["depths_m"].astype(np.float64),
                cam_from_world=arrays["cam_from_world"],
                intrinsics=arrays["intrinsics"],
                size=arrays["size"].astype(np.float64),
            )

    def points_seen(self, index: int, points_xy: Float64Array) -> tuple[Float64Array, Float64Array]:
        """The points (N, 3) of the world that a frame sees at (N, 2) px, and their depths (N,).

        By the depth in the middle of the grid's cell, so roughly; NaN in the sky.
        """
        depths_m = self.depths_m[index]
        shape = np.array(depths_m.shape)
        row, column = (
            (points_xy[:, ::-1] / self.size[::-1] * shape).astype(np.intp).clip(0, shape - 1).T
        )
        depths = np.where(np.isfinite(depths_m), depths_m, np.nan)[row, column]
        rays = (points_xy - self.intrinsics[2:]) / self.intrinsics[:2]
        in_cam = np.column_stack([rays, np.ones(len(rays))]) * depths[:, None]
        world_from_cam = invert_pose(self.cam_from_world[index])
        return transform_points(world_from_cam, in_cam), depths


def false_loops(
    reconstruction: pycolmap.Reconstruction, index_of: Mapping[str, int], views: TrueViews
) -> list[tuple[str, str]]:
    """Keyframes that share points of a map which are truly in different places.

    Half of the points that two keyframes share may be wrong before they count: what a map holds of
    single wrong matches is no loop.

    Args:
        reconstruction: the map.
        index_of: positions in the source, by image name.
        views: what the source's frames truly see.
    """
    seen: dict[int, list[tuple[str, Float64Array, float]]] = {}
    for image in reconstruction.images.values():
        rows = [row for row, point in enumerate(image.points2D) if point.has_point3D()]
        if not image.has_pose or not rows:
            continue
        points_xy = np.array([image.points2D[row].xy for row in rows])
        points, depths = views.points_seen(index_of[image.name], points_xy)
        for row, point, depth in zip(rows, points, depths, strict=True):
            point3D_id = image.points2D[row].point3D_id
            seen.setdefault(point3D_id, []).append((image.name, point, float(depth)))
    apart: dict[tuple[str, str], list[float]] = {}
    for views_of_point in seen.values():
        by_name = sorted(views_of_point, key=lambda view: view[0])
        for (first, one, depth), (second, other, _) in itertools.combinations(by_name, 2):
            distance = float(np.linalg.norm(one - other)) / depth
            if np.isfinite(distance):
                apart.setdefault((first, second), []).append(distance)
    return [
        pair
        for pair, distances in sorted(apart.items())
        if len(distances) >= _JOINED_BY and np.median(distances) > _SAME_PLACE_RATIO
    ]
