"""Masks that leave out what overlays cover, for the images of a camera."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from engine.estimators.stationary_matches import MotionEvidence
from engine.tracking.overlay_grid import OverlayGrid
from engine.types import NO_ROW, FrameId, ImagePair, PairMatches

BOX = (40.0, 20.0, 120.0, 60.0)  # left, top, right, bottom in px


def grid_with_logo(size: tuple[int, int]) -> OverlayGrid:
    """A camera whose six keyframes all agree that matches in a box stay."""
    grid = OverlayGrid(size)
    x, y = np.meshgrid(np.arange(BOX[0], BOX[2], 4.0), np.arange(BOX[1], BOX[3], 4.0))
    points_xy = np.column_stack([x.ravel(), y.ravel()])
    fixed = np.ones(len(points_xy), np.bool_)
    for first, second in combinations(range(1, 7), 2):
        pair = ImagePair(FrameId(first), FrameId(second))
        matches = PairMatches(
            pair=pair,
            matches_idx=np.full((len(points_xy), 2), NO_ROW),
            points1_xy=points_xy,
            points2_xy=points_xy,
            confidence=np.ones(len(points_xy), np.float32),
        )
        grid.add(pair, matches, MotionEvidence(is_fixed=fixed, is_moving=~fixed))
    assert grid.update_cover()
    return grid


@pytest.mark.parametrize("size", [(640, 480), (333, 250), (1000, 750)])
def test_the_mask_leaves_out_the_pixels_whose_centres_are_covered(size: tuple[int, int]) -> None:
    grid = grid_with_logo(size)
    x, y = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    covered = grid.covers(np.column_stack([x.ravel(), y.ravel()])).reshape(x.shape)
    assert np.array_equal(grid.mask(), ~covered)
    assert not grid.mask()[20:60, 40:120].any()
    assert covered.mean() < 0.3


def test_without_an_overlay_the_whole_image_may_be_used() -> None:
    assert OverlayGrid((64, 48)).mask().all()
