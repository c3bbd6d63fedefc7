"""Which dense matches are worth verifying."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.config import DenseMatchingConfig
from engine.matching.dense_matches import Size, select_matches
from engine.types import NO_ROW, Float64Array, FrameId, ImagePair, PairMatches

SIZE = (1000, 750)
CONFIG = DenseMatchingConfig(min_confidence=0.5, border_px=6.0, max_matches_per_pair=2000)


def matches_at(points1_xy: Any, *, points2_xy: Any = None, confidence: Any = None) -> PairMatches:
    """Matches of row k of the first image; by default to the middle of the second one."""
    first_xy = np.asarray(points1_xy, np.float64).reshape(-1, 2)
    num = len(first_xy)
    return PairMatches(
        pair=ImagePair(FrameId(1), FrameId(2)),
        matches_idx=np.column_stack([np.arange(num), np.full(num, NO_ROW)]),
        points1_xy=first_xy,
        points2_xy=np.full((num, 2), 300.0) if points2_xy is None else points2_xy,
        confidence=np.asarray(np.ones(num) if confidence is None else confidence, np.float32),
        depths_m=np.column_stack([np.arange(num), np.arange(num) + 0.5]).astype(np.float32),
    )


def rows_kept(
    matches: PairMatches, *, sizes: tuple[Size, Size] = (SIZE, SIZE), **settings: Any
) -> list[int]:
    config = CONFIG.model_copy(update=settings)
    kept = select_matches(matches, sizes=sizes, config=config)
    rows: list[int] = kept.matches_idx[:, 0].tolist()
    return rows


def scattered(num: int, *, seed: int = 0) -> Float64Array:
    return np.random.default_rng(seed).uniform((20.0, 20.0), (980.0, 730.0), (num, 2))


def test_matches_are_kept_from_the_least_confidence_on() -> None:
    matches = matches_at(scattered(4), confidence=[0.5, 0.49, 1.0, 0.0])
    assert sorted(rows_kept(matches)) == [0, 2]
    assert sorted(rows_kept(matches, min_confidence=0.0)) == [0, 1, 2, 3]


INSIDE = [(6.0, 6.0), (994.0, 6.0), (6.0, 744.0), (994.0, 744.0), (500.0, 375.0)]
AT_THE_EDGE = [(5.9, 300.0), (300.0, 5.9), (994.1, 300.0), (300.0, 744.1), (-3.0, 300.0)]


@pytest.mark.parametrize("side", [1, 2])
def test_matches_at_the_edge_of_either_image_are_left_out(side: int) -> None:
    points_xy = np.array([*INSIDE, *AT_THE_EDGE])
    if side == 1:
        matches = matches_at(points_xy)
    else:
        matches = matches_at(np.full((10, 2), 300.0), points2_xy=points_xy)
    assert sorted(rows_kept(matches)) == [0, 1, 2, 3, 4]


def test_the_border_grows_with_each_image() -> None:
    matches = matches_at([(10.0, 300.0), (30.0, 300.0)], points2_xy=np.full((2, 2), 4.0))
    small = (500, 375)
    assert rows_kept(matches, sizes=((1000, 750), small)) == [0, 1]
    assert rows_kept(matches, sizes=((2000, 1500), small)) == [1]
    assert rows_kept(matches, sizes=((1000, 750), (1000, 750))) == []


def test_without_a_border_everything_inside_is_kept() -> None:
    matches = matches_at([(0.0, 0.0), (1000.0, 750.0), (1000.1, 3.0)])
    assert rows_kept(matches, border_px=0.0) == [0, 1]


def test_of_too_many_the_most_confident_of_each_part_of_the_image_are_kept() -> None:
    confidence = np.random.default_rng(1).uniform(0.5, 1.0, 3000).astype(np.float32)
    matches = matches_at(scattered(3000), confidence=confidence)
    rows = rows_kept(matches, max_matches_per_pair=288)
    assert len(rows) == 288
    columns, lines = (matches.points1_xy * 12 / SIZE).astype(int).T
    cells = 12 * lines + columns
    for cell in range(144):
        own = np.flatnonzero(cells == cell)
        best = own[np.argsort(-confidence[own])]
        kept = [row for row in rows if cells[row] == cell]
        assert set(kept) == set(best[: len(kept)].tolist())
        assert 1 <= len(kept) <= 3


def test_few_are_all_kept_the_most_confident_first() -> None:
    confidence = [0.6, 0.9, 0.5, 0.8]
    assert rows_kept(matches_at(scattered(4), confidence=confidence)) == [1, 3, 0, 2]


def test_what_belongs_to_a_match_stays_with_it() -> None:
    matches = matches_at(
        scattered(50), points2_xy=scattered(50, seed=2), confidence=np.linspace(0.0, 1.0, 50)
    )
    kept = select_matches(matches, sizes=(SIZE, SIZE), config=CONFIG)
    rows = kept.matches_idx[:, 0]
    assert 20 <= len(rows) <= 25
    for name in ("points1_xy", "points2_xy", "confidence", "depths_m"):
        assert np.array_equal(getattr(kept, name), getattr(matches, name)[rows])


def test_nothing_gives_nothing() -> None:
    assert rows_kept(matches_at([])) == []
    assert rows_kept(matches_at(scattered(3), confidence=np.zeros(3))) == []
