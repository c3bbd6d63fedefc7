"""Where the parts of a map belong when pairs of them disagree: a graph of similarities.

Each part of the map gets a similarity of its own. Edges are matched points of two parts; those that
are one point already hold their parts together like springs, and those that should be one pull
their parts onto each other. Edges that the others contradict let go (line processes: Choi, Zhou and
Koltun, CVPR 2015, over graduated non-convexity: Zhou, Park and Koltun, ECCV 2016). Scale drifts in
a map from one moving camera, so parts are scaled, too (Strasdat, Montiel and Davison, RSS 2010).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx
import numpy as np

from engine.estimators.similarity import compose_similarities, invert_similarity, similarity_scale
from engine.geometry import rotation_from_vector
from engine.types import BoolArray, Float64Array, Int64Array, freeze_field

_NUM_POINTS = 24  # of an edge, drawn evenly
_SIGMA = 0.02  # of the distance to the camera: noise of a point
_DRIFT = 0.02  # of the distance to the camera for each edge of a way: what may have added up
_KEPT_SIGMAS = 3.0  # root mean square of an edge that holds
_STEPS_PER_LEVEL = 2
_MAX_LEVELS = 16
_FINAL_STEPS = 4
_DAMPING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GraphEdge:
    """Points of two parts of a map that matches say are the same; rows belong together."""

    first: int  # part
    second: int
    points1: Float64Array  # (N, 3) as the first part has them, N > 0
    points2: Float64Array  # (N, 3) as the second part has them
    strength: float  # in matches; how surely the parts are held to each other
    distance: float  # from the cameras to the points, in the middle
    first_from_second: Float64Array  # (3, 4) the similarity that the points ask for

    def __post_init__(self) -> None:
        freeze_field(self, "points1", (None, 3), np.float64)
        freeze_field(self, "points2", (len(self.points1), 3), np.float64)
        freeze_field(self, "first_from_second", (3, 4), np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SolvedGraph:
    """Where parts belong, and which edges hold."""

    moved_from_map: Float64Array  # (K, 3, 4) the similarity of each part
    errors_before: Float64Array  # (E,) root mean square, in units of the noise
    errors: Float64Array  # (E,) after the parts moved

    def __post_init__(self) -> None:
        freeze_field(self, "moved_from_map", (None, 3, 4), np.float64)
        freeze_field(self, "errors_before", (None,), np.float64)
        freeze_field(self, "errors", (len(self.errors_before),), np.float64)

    @property
    def holds(self) -> BoolArray:
        """Which edges (E,) agree with the places of their parts."""
        return np.asarray(self.errors < _KEPT_SIGMAS)

    @property
    def held_before(self) -> BoolArray:
        """Which edges (E,) agreed before the parts moved."""
        return np.asarray(self.errors_before < _KEPT_SIGMAS)


def solve_similarity_graph(num_parts: int, edges: Sequence[GraphEdge]) -> SolvedGraph | None:
    """The similarities of parts that most edges agree with, the strongest ones first.

    The parts begin where the maximum spanning tree of edges puts them, and the tree holds. An edge
    beside it may be off by what can have added up along its way through the tree at first, and by
    the noise in the end.

    Args:
        num_parts: parts of the map, 0, 1, ...; the first one of the largest tree stays.
        edges: between different parts.

    Returns:
        None when the edges do not join all parts.
    """
    tree = _spanning_tree(num_parts, edges)
    if not networkx.is_connected(tree):
        return None
    problem = _Problem(edges)
    identity = np.tile(np.eye(4)[:3], (num_parts, 1, 1))
    moved = _along(tree, edges, num_parts)
    level = np.maximum(_DRIFT * _way_lengths(tree, edges), _SIGMA) / _SIGMA
    in_tree = np.zeros(len(edges), np.bool_)
    in_tree[[data["number"] for _, _, data in tree.edges(data=True)]] = True
    for _ in range(_MAX_LEVELS):
        for _ in range(_STEPS_PER_LEVEL):
            moved = problem.step(moved, bounds=np.where(in_tree, np.inf, level))
        if (level <= 1.0).all():
            break
        level = np.maximum(level / 2.0, 1.0)
    for _ in range(_FINAL_STEPS):
        moved = problem.step(moved, bounds=np.where(in_tree, np.inf, level))
    if not np.isfinite(moved).all():
        return None
    return SolvedGraph(
        moved_from_map=moved,
        errors_before=problem.errors(identity),
        errors=problem.errors(moved),
    )


def _spanning_tree(num_parts: int, edges: Sequence[GraphEdge]) -> networkx.Graph[int]:
    """The maximum spanning tree; edge data are positions in ``edges``."""
    graph: networkx.Graph[int] = networkx.Graph()
    graph.add_nodes_from(range(num_parts))
    for number, edge in enumerate(edges):
        known = graph.get_edge_data(edge.first, edge.second)
        if known is None or known["strength"] < edge.strength:
            graph.add_edge(edge.first, edge.second, strength=edge.strength, number=number)
    return networkx.maximum_spanning_tree(graph, weight="strength")


def _along(tree: networkx.Graph[int], edges: Sequence[GraphEdge], num_parts: int) -> Float64Array:
    """The similarities (K, 3, 4) that the edges of the tree ask for."""
    moved = np.tile(np.eye(4)[:3], (num_parts, 1, 1))
    for known, new in networkx.bfs_edges(tree, 0):
        edge = edges[tree.edges[known, new]["number"]]
        known_from_new = edge.first_from_second
        if edge.first == new:
            known_from_new = invert_similarity(known_from_new)
        moved[new] = compose_similarities(moved[known], known_from_new)
    return moved


def _way_lengths(tree: networkx.Graph[int], edges: Sequence[GraphEdge]) -> Float64Array:
    """How many edges of the tree lead from one part of each edge to the other, (E,)."""
    depth = networkx.single_source_shortest_path_length(tree, 0)
    parent = {child: up for up, child in networkx.bfs_edges(tree, 0)}

    def length(one: int, other: int) -> int:
        num = 0
        while one != other:
            if depth[one] >= depth[other]:
                one = parent[one]
            else:
                other = parent[other]
            num += 1
        return num

    return np.array([length(edge.first, edge.second) for edge in edges], np.float64)


class _Problem:
    """The edges as arrays, so many points of each."""

    def __init__(self, edges: Sequence[GraphEdge]) -> None:
        self._first = np.array([edge.first for edge in edges], np.int64)
        self._second = np.array([edge.second for edge in edges], np.int64)
        drawn = [
            np.linspace(0, len(edge.points1) - 1, _NUM_POINTS).round().astype(np.int64)
            for edge in edges
        ]
        pairs = list(zip(edges, drawn, strict=True))
        self._points1 = np.array([edge.points1[rows] for edge, rows in pairs])  # (E, P, 3)
        self._points2 = np.array([edge.points2[rows] for edge, rows in pairs])
        self._distances = np.array([edge.distance for edge in edges])
        # Drift is not noise of single points: more of them do not make an edge any stiffer.
        strengths = np.array([edge.strength for edge in edges])
        self._strengths = np.minimum(strengths / _NUM_POINTS, 1.0)

    def errors(self, moved: Float64Array) -> Float64Array:
        """Root mean square of each edge (E,), in units of the noise."""
        first, second = self._placed(moved)
        squares = ((first - second) ** 2).sum(axis=2).mean(axis=1)
        return np.asarray(np.sqrt(squares) / self._noise(moved))

    def step(self, moved: Float64Array, *, bounds: Float64Array) -> Float64Array:
        """One Gauss-Newton step, edges counting less the more they exceed their bounds (E,)."""
        first, second = self._placed(moved)
        noise = self._noise(moved)
        weights = (1.0 / (1.0 + (self.errors(moved) / bounds) ** 2)) ** 2
        weights = weights * self._strengths / noise**2
        middles, reaches = self._middles(moved, first, second)
        # Offsets are measured from within either part, where moving both alike changes nothing;
        # derivatives at the points as placed would be smaller the more everything shrinks.
        between = (first + second) / 2.0
        jacobian1 = _jacobian(between, middles[self._first], reaches[self._first])
        jacobian2 = -_jacobian(between, middles[self._second], reaches[self._second])
        change = _solve(
            len(moved),
            ends=(self._first, self._second),
            jacobians=(jacobian1, jacobian2),
            offsets=first - second,
            weights=weights,
        )
        return np.array(
            [
                _moved(one, change[number], middle=middles[number], reach=float(reaches[number]))
                for number, one in enumerate(moved)
            ]
        )

    def _placed(self, moved: Float64Array) -> tuple[Float64Array, Float64Array]:
        return (
            _transform_all(moved[self._first], self._points1),
            _transform_all(moved[self._second], self._points2),
        )

    def _noise(self, moved: Float64Array) -> Float64Array:
        """The noise (E,) of points where the parts are now: it grows with their scale."""
        scales = np.array([similarity_scale(one) for one in moved])
        both = np.sqrt(np.abs(scales[self._first] * scales[self._second]))
        return np.asarray(_SIGMA * self._distances * both)

    def _middles(
        self, moved: Float64Array, first: Float64Array, second: Float64Array
    ) -> tuple[Float64Array, Float64Array]:
        """The middle (K, 3) of the points of each part, and how far they reach (K,)."""
        num = len(moved)
        sums, counts, squares = np.zeros((num, 3)), np.zeros(num), np.zeros(num)
        for part, points in ((self._first, first), (self._second, second)):
            np.add.at(sums, part, points.mean(axis=1))
            np.add.at(counts, part, 1.0)
        middles = sums / np.maximum(counts, 1.0)[:, None]
        for part, points in ((self._first, first), (self._second, second)):
            off = points - middles[part][:, None]
            np.add.at(squares, part, (off**2).sum(axis=2).mean(axis=1))
        return middles, np.sqrt(np.maximum(squares / np.maximum(counts, 1.0), 1e-18))


def _transform_all(similarities: Float64Array, points: Float64Array) -> Float64Array:
    """Points (E, P, 3) moved by similarities (E, 3, 4)."""
    turned = points @ np.swapaxes(similarities[:, :, :3], 1, 2)
    return np.asarray(turned + similarities[:, None, :, 3])


def _jacobian(points: Float64Array, middles: Float64Array, reaches: Float64Array) -> Float64Array:
    """How points (E, P, 3) move with scale, turn (3) and shift (3) of their part, (E, P, 3, 7)."""
    arms = points - middles[:, None]
    jacobian = np.zeros((*points.shape, 7))
    jacobian[..., 0] = arms
    jacobian[..., 1:4] = np.swapaxes(np.cross(np.eye(3), arms[..., None, :]), -1, -2)
    jacobian[..., 4:] = np.eye(3) * reaches[:, None, None, None]
    return jacobian


def _solve(
    num_parts: int,
    *,
    ends: tuple[Int64Array, Int64Array],
    jacobians: tuple[Float64Array, Float64Array],
    offsets: Float64Array,
    weights: Float64Array,
) -> Float64Array:
    """The change (K, 7) that solves the normal equations, none of the first part."""
    information = np.zeros((num_parts, num_parts, 7, 7))
    gradient = np.zeros((num_parts, 7))
    num_edges = len(weights)
    flat = [one.reshape(num_edges, -1, 7) for one in jacobians]
    residuals = offsets.reshape(num_edges, -1, 1)
    for rows, jacobian in zip(ends, flat, strict=True):
        weighted = np.swapaxes(jacobian, 1, 2) * weights[:, None, None]
        np.add.at(gradient, rows, (weighted @ residuals)[..., 0])
        for columns, other in zip(ends, flat, strict=True):
            np.add.at(information, (rows, columns), weighted @ other)
    matrix = information.transpose(0, 2, 1, 3).reshape(7 * num_parts, 7 * num_parts)[7:, 7:]
    diagonal = np.diag(matrix)
    matrix = matrix + np.diag(_DAMPING * diagonal + _DAMPING * max(float(diagonal.mean()), 1e-300))
    change = np.zeros((num_parts, 7))
    change[1:] = -np.linalg.solve(matrix, gradient.reshape(-1)[7:]).reshape(-1, 7)
    return change


def _moved(
    similarity: Float64Array, change: Float64Array, *, middle: Float64Array, reach: float
) -> Float64Array:
    """A similarity (3, 4) after a change (7,) about a point."""
    turn = float(np.exp(np.clip(change[0], -0.5, 0.5))) * rotation_from_vector(change[1:4])
    moved = turn @ similarity
    moved[:, 3] += middle - turn @ middle + reach * change[4:]
    return np.asarray(moved)
