"""Correspondences of a decoded pair by the published scheme, seeded in both images and merged.

Positions are whole network pixels (x, y), the first one (0, 0): not COLMAP's convention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adapters.matchers.mast3r.reciprocal import fast_reciprocal_matches, grid_xy
from engine.types import Float32Array, Int64Array, freeze_field


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Correspondences:
    """Pixels matched one to one, with the network's confidence in their descriptors."""

    first_xy: Int64Array  # (M, 2) whole px
    second_xy: Int64Array  # (M, 2) whole px
    confidence: Float32Array  # (M,) > 0, unbounded

    def __post_init__(self) -> None:
        num = len(self.first_xy)
        for name, shape, dtype in (
            ("first_xy", (num, 2), np.int64),
            ("second_xy", (num, 2), np.int64),
            ("confidence", (num,), np.float32),
        ):
            freeze_field(self, name, shape, dtype)


def correspondences_of_decode(
    descriptors: tuple[torch.Tensor, torch.Tensor],
    confidences: tuple[torch.Tensor, torch.Tensor],
    *,
    subsample: int = 8,
    pixel_tolerance: float = 0.0,
    max_block_scores: int | None = None,
) -> Correspondences:
    """Matches from one decoding of a pair, seeded in both images.

    Args:
        descriptors: (H1, W1, D) and (H2, W2, D).
        confidences: (H1, W1) and (H2, W2) of the descriptors.
        subsample: spacing of the seeds, px.
        pixel_tolerance: px; above 0 the grids' pixels themselves are matched, one trip each.
        max_block_scores: as in ``nearest_rows``.

    Returns:
        the matches, each with the smaller confidence of its two ends.
    """
    matches = _from_both_sides(
        *descriptors,
        subsample=subsample,
        pixel_tolerance=pixel_tolerance,
        max_block_scores=max_block_scores,
    )
    ends = _confidence_at_ends(matches, confidences)
    return _merged(matches, np.minimum(*ends))


def correspondences_of_both_decodes(
    descriptors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    confidences: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    subsample: int = 8,
    max_block_scores: int | None = None,
) -> Correspondences:
    """Matches from a pair decoded in both orders, as MASt3R-SfM takes them.

    Duisterhof et al., "MASt3R-SfM" (2024), section 4.2.

    Args:
        descriptors: for each decoding the maps of the pair's first and second image, in that
            order whichever image the decoding had as its reference.
        confidences: likewise.
        subsample: spacing of the seeds, px.
        max_block_scores: as in ``nearest_rows``.

    Returns:
        the matches; confidence is the geometric mean of the two ends, from the first decoding that
        has the match.
    """
    matches: list[tuple[Int64Array, Int64Array]] = []
    confidence: list[Float32Array] = []
    for maps, confidence_maps in zip(descriptors, confidences, strict=True):
        found = _from_both_sides(
            *maps, subsample=subsample, pixel_tolerance=0.0, max_block_scores=max_block_scores
        )
        matches.append(found)
        confidence.append(np.sqrt(np.multiply(*_confidence_at_ends(found, confidence_maps))))
    both = (
        np.concatenate([first_xy for first_xy, _ in matches]),
        np.concatenate([second_xy for _, second_xy in matches]),
    )
    return _merged(both, np.concatenate(confidence))


def _from_both_sides(
    descriptors1: torch.Tensor,
    descriptors2: torch.Tensor,
    *,
    subsample: int,
    pixel_tolerance: float,
    max_block_scores: int | None,
) -> tuple[Int64Array, Int64Array]:
    """Matches seeded in the first image, then those seeded in the second; (M, 2) px each."""
    found = []
    for seeded, other in ((descriptors1, descriptors2), (descriptors2, descriptors1)):
        height, width = seeded.shape[:2]
        seeds_xy = grid_xy(width, height, spacing=subsample) if pixel_tolerance > 0 else None
        found.append(
            fast_reciprocal_matches(
                seeded,
                other,
                subsample=subsample,
                seeds_xy=seeds_xy,
                pixel_tolerance=pixel_tolerance,
                max_block_scores=max_block_scores,
            )
        )
    forward, backward = found
    return (
        np.concatenate([forward.first_xy, backward.second_xy]),
        np.concatenate([forward.second_xy, backward.first_xy]),
    )


def _confidence_at_ends(
    matches: tuple[Int64Array, Int64Array], confidences: tuple[torch.Tensor, torch.Tensor]
) -> tuple[Float32Array, Float32Array]:
    first, second = (
        confidence.cpu().numpy()[xy[:, 1], xy[:, 0]]
        for xy, confidence in zip(matches, confidences, strict=True)
    )
    return first, second


def _merged(matches: tuple[Int64Array, Int64Array], confidence: Float32Array) -> Correspondences:
    """Each match once, sorted by row-major position; of equal ones the first one's confidence."""
    first_xy, second_xy = matches
    rows = np.column_stack([first_xy[:, ::-1], second_xy[:, ::-1]])  # y before x: row-major
    _, kept = np.unique(rows, axis=0, return_index=True)
    return Correspondences(
        first_xy=first_xy[kept], second_xy=second_xy[kept], confidence=confidence[kept]
    )
