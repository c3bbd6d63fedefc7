"""Which keypoints may match when the epipolar geometry of two images is known."""

from __future__ import annotations

import numpy as np
import pytest

from adapters.matchers.epipolar_blocks import epipolar_blocks
from engine.geometry import rotation_from_vector, skew
from engine.types import EpipolarGuide, Float64Array

NUM = 1000
SIDEWAYS, FORWARD, BOTH = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.5, -0.3, 0.6)


def unit(vectors: Float64Array) -> Float64Array:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def guide_of(
    translation: tuple[float, float, float], *, max_angle_rad: float, noise_rad: float = 0.0
) -> EpipolarGuide:
    """Points in front of two cameras, row k of one image being row k of the other."""
    rng = np.random.default_rng(3)
    points = rng.uniform((-3.0, -3.0, 4.0), (3.0, 3.0, 12.0), (NUM, 3))
    rotation = rotation_from_vector(np.array([0.1, -0.2, 0.05]))
    baseline = np.array(translation)
    rays2 = unit(points @ rotation.T + baseline) + rng.normal(scale=noise_rad, size=(NUM, 3))
    return EpipolarGuide(
        rays1=unit(points),
        rays2=unit(rays2),
        essential=skew(baseline) @ rotation,
        max_angle_rad=max_angle_rad,
    )


@pytest.mark.parametrize("translation", [SIDEWAYS, FORWARD, BOTH])
def test_what_matches_is_among_the_candidates_and_most_others_are_not(
    translation: tuple[float, float, float],
) -> None:
    guide = guide_of(translation, max_angle_rad=0.004, noise_rad=0.001)
    blocks = list(epipolar_blocks(guide, num_rows=50))
    assert all(len(rows) <= 50 for rows, _ in blocks)
    assert sorted(np.concatenate([rows for rows, _ in blocks]).tolist()) == list(range(NUM))
    is_found = np.concatenate([np.isin(rows, columns) for rows, columns in blocks])
    assert is_found.mean() >= 0.99
    products = sum(len(rows) * len(columns) for rows, columns in blocks)
    assert products <= 0.15 * NUM**2


def test_a_keypoint_without_a_ray_matches_nothing() -> None:
    guide = guide_of(SIDEWAYS, max_angle_rad=0.004)
    rays1, rays2 = guide.rays1.copy(), guide.rays2.copy()
    rays1[7] = rays2[9] = np.nan
    without = EpipolarGuide(
        rays1=rays1, rays2=rays2, essential=guide.essential, max_angle_rad=guide.max_angle_rad
    )
    blocks = list(epipolar_blocks(without, num_rows=100))
    rows, columns = (np.concatenate(part) for part in zip(*blocks, strict=True))
    assert 7 not in rows
    assert 9 not in columns
    assert len(rows) == NUM - 1


def test_keypoints_that_all_lack_a_ray_make_no_block() -> None:
    nothing = np.full((5, 3), np.nan)
    guide = EpipolarGuide(
        rays1=nothing, rays2=nothing, essential=skew(np.ones(3)), max_angle_rad=0.1
    )
    assert list(epipolar_blocks(guide, num_rows=2)) == []
