"""Reciprocal matching of two dense descriptor maps: the scheme published with MASt3R.

Leroy et al., "Grounding Image Matching in 3D with MASt3R" (2024), section 3.3: sparse seeds hop to
their nearest descriptor in the other image and back until they stop moving; the pairs where they
stop are reciprocal nearest neighbours. Written to give the very matches of the reference
implementation; ``query_matching`` is what the engine uses by default.

Positions here are whole network pixels (x, y), the first one (0, 0): not COLMAP's convention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike

from adapters.matchers.mast3r.nearest import nearest_rows
from engine.types import Int64Array, frozen_array

Distance = Literal["dot", "l2"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReciprocalMatches:
    """Pixels matched one to one, without repeats, in the order of the first image's rows.

    ``basin_idx`` gives, for every pixel of the first image that a seed visited, the pixel where its
    trip to the other image and back lands, as row-major positions; -1 elsewhere. Followed until it
    is constant it gives the seeds of each match.
    """

    first_xy: Int64Array  # (M, 2) whole px
    second_xy: Int64Array  # (M, 2) whole px
    basin_idx: Int64Array  # (H1 * W1,)

    def __post_init__(self) -> None:
        first_xy = frozen_array("first_xy", self.first_xy, (None, 2), np.int64)
        second_xy = frozen_array("second_xy", self.second_xy, (len(first_xy), 2), np.int64)
        basin_idx = frozen_array("basin_idx", self.basin_idx, (None,), np.int64)
        object.__setattr__(self, "first_xy", first_xy)
        object.__setattr__(self, "second_xy", second_xy)
        object.__setattr__(self, "basin_idx", basin_idx)


def fast_reciprocal_matches(
    descriptors1: torch.Tensor,
    descriptors2: torch.Tensor,
    *,
    subsample: int = 8,
    seeds_xy: ArrayLike | None = None,
    max_iterations: int = 10,
    pixel_tolerance: float = 0.0,
    distance: Distance = "dot",
    with_basin: bool = False,
    max_block_scores: int | None = None,
) -> ReciprocalMatches:
    """Reciprocal nearest neighbours found from sparse seeds in the first image.

    A seed that keeps moving for ``max_iterations`` rounds gives nothing. Explicit seeds make one
    round trip only; with a tolerance the match is the seed itself and its nearest neighbour, kept
    when the trip ends less than ``pixel_tolerance`` from the seed.

    Args:
        descriptors1: (H1, W1, D) of the first image.
        descriptors2: (H2, W2, D) of the second image, on the same device.
        subsample: spacing of the grid of seeds, px.
        seeds_xy: (N, 2) whole px of the first image, instead of the grid.
        max_iterations: rounds that the grid's seeds may take.
        pixel_tolerance: px; needs ``seeds_xy``.
        distance: "dot" takes the largest inner product, "l2" the smallest distance.
        with_basin: fill ``basin_idx``; trips then end in the first image alone.
        max_block_scores: as in ``nearest_rows``.

    Raises:
        ValueError: a tolerance without seeds, or a seed outside the image.
    """
    if seeds_xy is None and pixel_tolerance > 0:
        raise ValueError("pixel_tolerance: needs explicit seeds")
    height, width = descriptors1.shape[:2]
    search = _Search(descriptors1, descriptors2, distance, max_block_scores)
    if seeds_xy is None:
        seeds_xy = grid_xy(width, height, spacing=subsample)
    else:
        max_iterations = 1
    seeds = _idx_of(seeds_xy, height=height, width=width).to(descriptors1.device)
    if pixel_tolerance > 0:
        first, second = _one_trip(search, seeds, width=width, tolerance_px=pixel_tolerance)
        basin = torch.full((height * width,), -1)
    else:
        first, second, basin = _iterate(
            search, seeds, max_iterations=max_iterations, with_basin=with_basin
        )
    pairs_idx = np.unique(torch.stack([first, second], dim=1).cpu().numpy(), axis=0)
    return ReciprocalMatches(
        first_xy=_xy_of(pairs_idx[:, 0], width=width),
        second_xy=_xy_of(pairs_idx[:, 1], width=descriptors2.shape[1]),
        basin_idx=basin.cpu().numpy(),
    )


def grid_xy(width: int, height: int, *, spacing: int) -> Int64Array:
    """Whole px (N, 2) every ``spacing`` px, beginning at half of it."""
    x = np.arange(spacing // 2, width, spacing)
    y = np.arange(spacing // 2, height, spacing)
    return np.stack(np.meshgrid(x, y), axis=2).reshape(-1, 2)


class _Search:
    """Nearest pixel in the other image, as row-major positions."""

    def __init__(
        self,
        descriptors1: torch.Tensor,
        descriptors2: torch.Tensor,
        distance: Distance,
        max_block_scores: int | None,
    ) -> None:
        self._maps = (descriptors1.flatten(0, 1), descriptors2.flatten(0, 1))
        self._distance = distance
        self._max_block_scores = max_block_scores

    @property
    def num_first(self) -> int:
        return len(self._maps[0])

    def in_second(self, first_idx: torch.Tensor) -> torch.Tensor:
        return self._nearest(self._maps[0][first_idx], self._maps[1])

    def in_first(self, second_idx: torch.Tensor) -> torch.Tensor:
        return self._nearest(self._maps[1][second_idx], self._maps[0])

    def _nearest(self, queries: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self._distance == "l2":
            # The smallest |q - t|^2 is the largest q.t - |t|^2 / 2: one more component.
            half_square = 0.5 * targets.square().sum(dim=1, keepdim=True)
            targets = torch.cat([targets, -half_square], dim=1)
            queries = torch.cat([queries, torch.ones_like(queries[:, :1])], dim=1)
        return nearest_rows(queries, targets, max_block_scores=self._max_block_scores)[0]


def _iterate(
    search: _Search, seeds: torch.Tensor, *, max_iterations: int, with_basin: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the seeds that stop moving end, (M,) in each image, and the basin map (H1 * W1,)."""
    first, second = seeds.clone(), torch.full_like(seeds, -1)
    moving = torch.ones_like(seeds, dtype=torch.bool)
    basin = torch.full((search.num_first,), -1, device=seeds.device)
    for _ in range(max_iterations):
        previous_first, previous_second = first.clone(), second.clone()
        second[moving] = search.in_second(first[moving])
        if not with_basin:
            moving = moving & (second != previous_second)
        first[moving] = search.in_first(second[moving])
        if with_basin:
            basin[previous_first[moving]] = first[moving]
        moving = moving & (first != previous_first)
        if not bool(moving.any()):
            break
    return first[~moving], second[~moving], basin


def _one_trip(
    search: _Search, seeds: torch.Tensor, *, width: int, tolerance_px: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The seeds whose way there and back ends near them, and their nearest neighbours."""
    second = search.in_second(seeds)
    back = search.in_first(second)
    rows, columns = seeds // width - back // width, seeds % width - back % width
    kept = rows**2 + columns**2 < tolerance_px**2
    return seeds[kept], second[kept]


def _idx_of(points_xy: ArrayLike, *, height: int, width: int) -> torch.Tensor:
    """Row-major positions (N,) without repeats."""
    given_xy = frozen_array("seeds_xy", points_xy, (None, 2), np.int64)
    if ((given_xy < 0) | (given_xy >= (width, height))).any():
        raise ValueError(f"seeds_xy: outside the image of {width} x {height} px")
    return torch.from_numpy(np.unique(given_xy[:, 1] * width + given_xy[:, 0]))


def _xy_of(idx: Int64Array, *, width: int) -> Int64Array:
    return np.column_stack([idx % width, idx // width])
