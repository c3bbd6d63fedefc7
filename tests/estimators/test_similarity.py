"""The similarity between two maps is found from matched points, whatever is wrong among them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engine.estimators.similarity import (
    MatchedPoints,
    compose_similarities,
    estimate_map_similarity,
    estimate_rival,
    invert_similarity,
    similarity_scale,
)
from engine.geometry import rotation_from_vector, transform_points
from engine.types import Float64Array

NUM = 60
BOUND = 0.01


def a_from_b(scale: float = 1.7) -> Float64Array:
    rotation = rotation_from_vector(np.array([0.2, -0.5, 0.3]))
    return np.column_stack([scale * rotation, (4.0, -2.0, 1.0)])


def matched(*, noise: float = 0.0, wrong_ratio: float = 0.0, num: int = NUM) -> MatchedPoints:
    """Points before two cameras, those of map a in its world, those of map b in the other."""
    rng = np.random.default_rng(3)
    in_a = rng.uniform((-3, -3, 8), (3, 3, 14), (num, 3))
    center1, center2 = np.zeros(3), np.array([1.5, 0.0, 0.0])
    rays1 = in_a - center1 + rng.normal(scale=noise * 10.0, size=in_a.shape)
    rays2 = in_a - center2 + rng.normal(scale=noise * 10.0, size=in_a.shape)
    b_from_a = invert_similarity(a_from_b())
    in_b = transform_points(b_from_a, in_a + rng.normal(scale=noise * 10.0, size=in_a.shape))
    turn = b_from_a[:, :3] / similarity_scale(b_from_a)
    rays2 = rays2 @ turn.T
    wrong = rng.permutation(num)[: int(wrong_ratio * num)]
    in_b[wrong] = np.roll(in_b[wrong], 1, axis=0)
    rays2[wrong] = np.roll(rays2[wrong], 1, axis=0)
    return MatchedPoints(
        points_in_a=in_a,
        points_in_b=in_b,
        centers_in_a=np.tile(center1, (num, 1)),
        centers_in_b=np.tile(transform_points(b_from_a, center2[None])[0], (num, 1)),
        rays_in_a=rays1 / np.linalg.norm(rays1, axis=1, keepdims=True),
        rays_in_b=rays2 / np.linalg.norm(rays2, axis=1, keepdims=True),
        bounds=np.full((num, 2), BOUND),
        pair_idx=np.zeros(num, np.int64),
    )


def test_exact_matches_give_the_exact_similarity() -> None:
    found = estimate_map_similarity(matched(), seed=0)
    assert found is not None
    assert np.allclose(found.a_from_b, a_from_b(), atol=1e-9)
    assert found.num_inliers == NUM


@pytest.mark.parametrize("wrong_ratio", [0.0, 0.3, 0.6])
def test_noise_and_wrong_matches_leave_it_close(wrong_ratio: float) -> None:
    found = estimate_map_similarity(matched(noise=2e-3, wrong_ratio=wrong_ratio), seed=0)
    assert found is not None
    off = np.abs(found.a_from_b - a_from_b()).max()
    assert 1e-6 < off < 0.15
    assert 0.9 * (1.0 - wrong_ratio) * NUM <= found.num_inliers <= (1.0 - wrong_ratio) * NUM + 2


def test_matches_that_agree_on_nothing_give_few_inliers() -> None:
    found = estimate_map_similarity(matched(wrong_ratio=1.0), seed=0)
    assert found is None or found.num_inliers < 12


def shifted(matches: MatchedPoints, rows: slice, *, shift: float) -> MatchedPoints:
    """Matches of which some end in map b, and its camera, beside where they should."""
    points, centers = matches.points_in_b.copy(), matches.centers_in_b.copy()
    points[rows] += (shift, 0.0, 0.0)
    centers[rows] += (shift, 0.0, 0.0)
    return dataclasses.replace(matches, points_in_b=points, centers_in_b=centers)


def test_matches_of_repeated_structure_agree_on_a_rival() -> None:
    """A third of all matches says that the maps lie one period of the wallpaper apart."""
    both = shifted(matched(noise=1e-3, num=90), slice(0, 30), shift=1.0)
    found = estimate_map_similarity(both, seed=0)
    assert found is not None
    assert np.abs(found.a_from_b - a_from_b()).max() < 0.15
    rival = estimate_rival(both, found, seed=0)
    assert rival is not None
    assert 25 <= rival.num_inliers <= 30
    assert rival.is_inlier[:30].sum() >= 25


@pytest.mark.parametrize("wrong_ratio", [0.0, 0.4])
def test_wrong_matches_alone_make_no_rival(wrong_ratio: float) -> None:
    matches = matched(noise=1e-3, wrong_ratio=wrong_ratio, num=90)
    found = estimate_map_similarity(matches, seed=0)
    assert found is not None
    rival = estimate_rival(matches, found, seed=0)
    assert rival is None or rival.num_inliers < 0.2 * found.num_inliers


def test_what_lies_near_a_similarity_speaks_for_no_rival() -> None:
    """A bent map: a third of the matches lie a little beyond what is allowed."""
    bent = shifted(matched(noise=1e-3, num=90), slice(0, 30), shift=0.16)
    found = estimate_map_similarity(bent, seed=0)
    assert found is not None
    assert found.num_inliers < 75
    rival = estimate_rival(bent, found, seed=0)
    assert rival is None or rival.num_inliers < 0.2 * found.num_inliers


def test_two_matches_fix_nothing() -> None:
    assert estimate_map_similarity(matched(num=2), seed=0) is None


def test_a_similarity_and_its_inverse_undo_each_other() -> None:
    both = compose_similarities(a_from_b(), invert_similarity(a_from_b()))
    assert np.allclose(both, np.eye(4)[:3])
    assert similarity_scale(a_from_b()) == pytest.approx(1.7)
