"""Which neighbours a keyframe is matched with for its depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.dense_types import DenseView, DepthProblem
from engine.geometry import camera_center, transform_points
from engine.types import Float64Array

MIN_SHARED_POINTS = 15  # of the map
_ANGLES_RAD = (math.radians(1.0), math.radians(40.0))  # useful at the median shared point
_BEST_ANGLE_RAD = math.radians(8.0)  # more helps no further
_LARGE_ANGLE_RAD = math.radians(16.0)  # from here on surfaces appear different and hide more
_MAX_DISTANCE_RATIO = 1.6  # of the two cameras to what they share
_SAME_SIDE_SHARE = 0.6  # of its score a neighbour loses where another one lies in its direction


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
    """A neighbour that is of use."""

    view: DenseView
    score: float
    direction: Float64Array  # (3,) unit, from the keyframe to it, in the world


def rank_neighbours(problem: DepthProblem) -> list[DenseView]:
    """Neighbours of use, the best first: many shared points, a good angle, in other directions."""
    candidates = [
        candidate
        for neighbour in problem.neighbours
        if (candidate := _candidate(problem.view, neighbour)) is not None
    ]
    ranked: list[Candidate] = []
    while candidates:
        best = max(candidates, key=lambda candidate: _score_beside(candidate, ranked))
        ranked.append(best)
        candidates = [candidate for candidate in candidates if candidate is not best]
    return [candidate.view for candidate in ranked]


def _score_beside(candidate: Candidate, ranked: Sequence[Candidate]) -> float:
    same = max((float(candidate.direction @ other.direction) for other in ranked), default=0.0)
    return candidate.score * (1.0 - _SAME_SIDE_SHARE * max(0.0, same))


def _candidate(view: DenseView, neighbour: DenseView) -> Candidate | None:
    rows = np.flatnonzero(np.isin(view.points3D_ids, neighbour.points3D_ids))
    if len(rows) < MIN_SHARED_POINTS:
        return None
    points = view.points3D_in_world[rows]
    center, other = camera_center(view.cam_from_world), camera_center(neighbour.cam_from_world)
    rays, other_rays = points - center, points - other
    lengths, other_lengths = (
        np.sqrt(np.einsum("ij,ij->i", one, one)) for one in (rays, other_rays)
    )
    baseline = np.linalg.norm(other - center)
    if not (baseline > 0 and lengths.min() > 0 and other_lengths.min() > 0):
        return None
    cosines = np.einsum("ij,ij->i", rays, other_rays) / (lengths * other_lengths)
    angle = math.acos(max(-1.0, min(1.0, _middle(cosines))))
    ratio = _middle(other_lengths / lengths)
    if not (_ANGLES_RAD[0] <= angle <= _ANGLES_RAD[1]):
        return None
    if max(ratio, 1.0 / ratio) > _MAX_DISTANCE_RATIO:
        return None
    return Candidate(
        view=neighbour,
        score=len(rows) * min(angle, _BEST_ANGLE_RAD) * min(1.0, _LARGE_ANGLE_RAD / angle),
        direction=(other - center) / baseline,
    )


def _lengths(vectors: Float64Array) -> Float64Array:
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", vectors, vectors)))


def _middle(values: Float64Array) -> float:
    """The median of values (P,), the upper one of an even number."""
    half = len(values) // 2
    return float(np.partition(values, half)[half])


def points_before(view: DenseView) -> Float64Array:
    """The sparse points before a keyframe, (P, 3) in its frame."""
    points = transform_points(view.cam_from_world, view.points3D_in_world)
    return np.asarray(points[points[:, 2] > 0])
