"""A graph of similarities spreads drift over the way, and lets go of edges that are wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.estimators.similarity import invert_similarity, similarity_scale
from engine.estimators.similarity_graph import GraphEdge, SolvedGraph, solve_similarity_graph
from engine.geometry import transform_points
from engine.types import Float64Array

NUM_PARTS = 40
SCALE = 0.9  # of the last part against the first


def middles() -> Float64Array:
    """Where the parts are in truth, around a circle."""
    angles = 2.0 * np.pi * np.arange(NUM_PARTS) / NUM_PARTS
    return 20.0 * np.column_stack([np.cos(angles), np.sin(angles), np.zeros(NUM_PARTS)])


def drifts() -> Float64Array:
    """map_from_truth (K, 3, 4) of each part: steps shrink on the way."""
    scales = SCALE ** (np.arange(NUM_PARTS) / (NUM_PARTS - 1))
    true = middles()
    steps = scales[:-1, None] * np.diff(true, axis=0)
    moved = np.concatenate([true[:1], true[0] + np.cumsum(steps, axis=0)])
    return np.array(
        [
            np.column_stack([scale * np.eye(3), there - scale * here])
            for scale, here, there in zip(scales, true, moved, strict=True)
        ]
    )


def edge(
    first: int, second: int, *, shift: tuple[float, float, float] = (0.0, 0.0, 0.0), num: int = 40
) -> GraphEdge:
    """Points between two parts, as each of them has them in the map that drifted."""
    rng = np.random.default_rng((first, second))
    true, of_part = middles(), drifts()
    points = (true[first] + true[second]) / 2.0 + rng.normal(scale=2.0, size=(num, 3))
    points1 = transform_points(of_part[first], points)
    points2 = transform_points(of_part[second], points + shift)
    back = np.column_stack([np.eye(3), -np.array(shift)])
    first_from_truth = np.vstack([of_part[first], (0, 0, 0, 1)])
    truth_from_second = np.vstack([invert_similarity(of_part[second]), (0, 0, 0, 1)])
    asked = first_from_truth @ np.vstack([back, (0, 0, 0, 1)]) @ truth_from_second
    return GraphEdge(
        first=first,
        second=second,
        points1=points1,
        points2=points2,
        strength=float(num),
        distance=5.0,
        first_from_second=asked[:3],
    )


def along() -> list[GraphEdge]:
    """Edges between parts near each other: their points are common ones, so nothing is asked."""
    edges = []
    for first in range(NUM_PARTS):
        for second in range(first + 1, min(first + 4, NUM_PARTS)):
            one = edge(first, second, num=200)
            edges.append(
                GraphEdge(
                    first=first,
                    second=second,
                    points1=one.points1,
                    points2=one.points1,
                    strength=one.strength,
                    distance=one.distance,
                    first_from_second=np.eye(4)[:3],
                )
            )
    return edges


def off(solved: SolvedGraph) -> float:
    """How far the middles of the parts are from the truth, on average."""
    placed = [
        transform_points(moved, transform_points(drift, middle[None]))[0]
        for moved, drift, middle in zip(solved.moved_from_map, drifts(), middles(), strict=True)
    ]
    return float(np.linalg.norm(np.array(placed) - middles(), axis=1).mean())


def solve(edges: Sequence[GraphEdge]) -> SolvedGraph:
    solved = solve_similarity_graph(NUM_PARTS, edges)
    assert solved is not None
    return solved


LOOPS = [(0, 39), (1, 39), (0, 38), (2, 38)]


def test_loops_undo_the_drift_of_the_way() -> None:
    chain = along()
    before = off(solve(chain))
    solved = solve([*chain, *(edge(*ends) for ends in LOOPS)])
    assert before > 1.0
    assert off(solved) < before / 4.0
    assert solved.holds.all()
    assert not solved.held_before[len(chain) :].any()
    assert 1.05 < similarity_scale(solved.moved_from_map[-1]) < 1.2


def test_loops_that_the_others_contradict_let_go() -> None:
    chain, loops = along(), [edge(*ends) for ends in LOOPS]
    wrong = [edge(5, 25, shift=(15.0, 9.0, 0.0), num=25), edge(6, 26, shift=(-9.0, 20.0, 3.0))]
    clean, solved = solve([*chain, *loops]), solve([*chain, *loops, *wrong])
    assert solved.holds[: -len(wrong)].all()
    assert not solved.holds[-len(wrong) :].any()
    assert abs(off(solved) - off(clean)) < 0.1


def test_a_part_that_slipped_is_put_back_by_the_strongest_edges() -> None:
    chain = along()
    slips = [number for number, one in enumerate(chain) if one.first < 20 <= one.second]
    for number in slips:
        one = chain[number]
        shift = np.array((0.0, 0.0, 4.0))
        is_strongest = (one.first, one.second) == (19, 20)
        chain[number] = GraphEdge(
            first=one.first,
            second=one.second,
            points1=one.points1,
            points2=one.points1 + shift if is_strongest else one.points1,
            strength=1000.0 if is_strongest else 40.0,
            distance=one.distance,
            first_from_second=np.column_stack([np.eye(3), -shift * is_strongest]),
        )
    solved = solve(chain)
    heights = solved.moved_from_map[:, 2, 3]
    assert np.abs(heights[:20]).max() < 0.2
    assert np.abs(heights[20:] + 4.0).max() < 0.2


def test_parts_that_nothing_joins_have_no_solution() -> None:
    edges = [one for one in along() if not one.first < 20 <= one.second]
    assert solve_similarity_graph(NUM_PARTS, edges) is None
