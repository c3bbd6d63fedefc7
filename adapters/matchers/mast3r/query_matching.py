"""Query matching: given points of one image matched in another's dense descriptors, to sub-pixels.

For each query point the nearest descriptor in the whole other image is found, and from there the
nearest in the whole first image; it is matched when the way back ends near where it began. The
engine's keypoints stay where they are, so that tracks grow through many pairs.

Pixels are the network's, in COLMAP's convention: the first pixel's centre is (0.5, 0.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from adapters.matchers.mast3r.nearest import nearest_rows
from engine.types import Float32Array, Float64Array, Int64Array, freeze_field, frozen_array

_MAX_OFFSET_PX = 0.5  # a peak further from the best pixel is not one that its scores show


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QueryMatches:
    """The queries that were found in the other image, in their order."""

    query_idx: Int64Array  # (M,) rows of the queries, rising
    points_xy: Float64Array  # (M, 2) network px of the other image
    confidence: Float32Array  # (M,) 0..1

    def __post_init__(self) -> None:
        num = len(self.query_idx)
        for name, shape, dtype in (
            ("query_idx", (num,), np.int64),
            ("points_xy", (num, 2), np.float64),
            ("confidence", (num,), np.float32),
        ):
            freeze_field(self, name, shape, dtype)


@torch.no_grad()
def match_query_batch(
    queries_xy: Sequence[ArrayLike],
    descriptors_from: torch.Tensor,
    confidence_from: torch.Tensor,
    descriptors_to: torch.Tensor,
    confidence_to: torch.Tensor,
    *,
    tolerance_px: float,
    max_block_scores: int | None = None,
) -> list[QueryMatches]:
    """Matches of a batch of pairs, in a number of kernels that hardly grows with the batch.

    Both searches go through every pixel. A found position is the peak of the quadratic that fits
    the scores of the 3 x 3 pixels around the best one by least squares, at most half a pixel from
    it on each axis; pixels on the image's border, and scores without a peak, stay unrefined. The
    way back starts and ends at refined positions too. Queries beyond the image (where the crop cut
    them off) find nothing.

    The confidence of a match is c / (1 + c), c the geometric mean of the descriptors' confidences
    at both ends (Duisterhof et al., "MASt3R-SfM", 2024, section 4.2).

    Args:
        queries_xy: for each of the B pairs (Q_b, 2) network px of its first image.
        descriptors_from: (B, H, W, D), unit length, of the first images.
        confidence_from: (B, H, W), >= 0.
        descriptors_to: (B, H2, W2, D), unit length, of the other images, on the same device.
        confidence_to: (B, H2, W2), >= 0.
        tolerance_px: how far from the query the way back may end, network px.
        max_block_scores: the most scores that exist at a time; None: a default for the device.

    Returns:
        the matches of each pair.
    """
    given = [frozen_array("queries_xy", xy, (None, 2), np.float64) for xy in queries_xy]
    padded_xy, is_query = _padded(given, device=descriptors_from.device)
    size = padded_xy.new_tensor([descriptors_from.shape[2], descriptors_from.shape[1]])
    is_query &= ((padded_xy >= 0) & (padded_xy <= size)).all(dim=2)
    there_xy, there_idx = _find(
        padded_xy, descriptors_from, descriptors_to, max_block_scores=max_block_scores
    )
    back_xy, _ = _find(
        there_xy, descriptors_to, descriptors_from, max_block_scores=max_block_scores
    )
    is_match = is_query & ((back_xy - padded_xy).norm(dim=2) <= tolerance_px)
    confidence = _match_confidence(
        _at(confidence_from[..., None], _pixel_idx(padded_xy, confidence_from))[..., 0],
        _at(confidence_to[..., None], there_idx)[..., 0],
    )
    is_match &= confidence.isfinite()
    # One transfer for the whole batch.
    table = torch.cat([is_match[..., None], there_xy, confidence[..., None]], dim=2).cpu().numpy()
    return [_matches_of(rows) for rows in table]


def _padded(
    queries_xy: Sequence[Float64Array], *, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The queries as one tensor (B, Q, 2) float32, and which of its rows are queries (B, Q)."""
    num = max((len(xy) for xy in queries_xy), default=0)
    padded_xy = np.zeros((len(queries_xy), num, 2), np.float32)
    is_query = np.zeros((len(queries_xy), num), bool)
    for pair, xy in enumerate(queries_xy):
        padded_xy[pair, : len(xy)] = xy
        is_query[pair, : len(xy)] = True
    return torch.from_numpy(padded_xy).to(device), torch.from_numpy(is_query).to(device)


def _find(
    points_xy: torch.Tensor,
    descriptors_from: torch.Tensor,
    descriptors_to: torch.Tensor,
    *,
    max_block_scores: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where points (B, Q, 2) lie in the other images (B, Q, 2), and the best pixels' idx (B, Q)."""
    wanted = _sample(descriptors_from, points_xy)
    best_idx, _ = nearest_rows(
        wanted, descriptors_to.flatten(1, 2), max_block_scores=max_block_scores
    )
    return _refined(best_idx, wanted, descriptors_to), best_idx


def _sample(descriptors: torch.Tensor, points_xy: torch.Tensor) -> torch.Tensor:
    """Unit descriptors (B, Q, D) at points, bilinear; beyond the outer pixel centres theirs."""
    height, width = descriptors.shape[1:3]
    last = points_xy.new_tensor([width - 1, height - 1])
    place = torch.minimum((points_xy - 0.5).clamp(min=0), last)
    low = place.floor()
    high = torch.minimum(low + 1, last)
    (x0, y0), (x1, y1) = low.long().unbind(2), high.long().unbind(2)
    share_x, share_y = (place - low)[..., None].unbind(2)
    upper = torch.lerp(
        _at(descriptors, y0 * width + x0), _at(descriptors, y0 * width + x1), share_x
    )
    lower = torch.lerp(
        _at(descriptors, y1 * width + x0), _at(descriptors, y1 * width + x1), share_x
    )
    return torch.nn.functional.normalize(torch.lerp(upper, lower, share_y), dim=2)


def _refined(
    best_idx: torch.Tensor, wanted: torch.Tensor, descriptors: torch.Tensor
) -> torch.Tensor:
    """Sub-pixel positions (B, Q, 2) of the peaks around the best pixels (B, Q)."""
    height, width = descriptors.shape[1:3]
    x, y = best_idx % width, best_idx // width
    is_inner = (x > 0) & (x < width - 1) & (y > 0) & (y < height - 1)
    step = torch.arange(-1, 2, device=best_idx.device)
    around = (step[:, None] * width + step).flatten()
    # On the border the window takes pixels from elsewhere; its scores do not count.
    window_idx = (best_idx[..., None] + around).clamp_(0, height * width - 1)
    window = _at(descriptors, window_idx.flatten(1)).reshape(*window_idx.shape, wanted.shape[2])
    scores = torch.matmul(window, wanted[..., None]).reshape(*best_idx.shape, 3, 3)
    offset_xy = torch.where(is_inner[..., None], _peak_offset(scores), 0.0)
    return torch.stack([x, y], dim=2) + 0.5 + offset_xy


def _peak_offset(scores: torch.Tensor) -> torch.Tensor:
    """The peak (..., 2), x and y, of the quadratic fitted to 3 x 3 scores (..., y, x).

    All nine scores take part: with noisy descriptors that is more accurate than parabolas along
    the axes.
    """
    before, middle, after = scores.sum(dim=-2).unbind(-1)  # along x
    slope_x, curve_x = (after - before) / 6, (after + before - 2 * middle) / 3
    before, middle, after = scores.sum(dim=-1).unbind(-1)  # along y
    slope_y, curve_y = (after - before) / 6, (after + before - 2 * middle) / 3
    corners = scores[..., ::2, ::2]
    twist = (corners[..., 0, 0] + corners[..., 1, 1] - corners[..., 0, 1] - corners[..., 1, 0]) / 4
    determinant = curve_x * curve_y - twist**2
    has_peak = (curve_x < 0) & (determinant > 0)
    peak = torch.stack(
        [twist * slope_y - curve_y * slope_x, twist * slope_x - curve_x * slope_y], dim=-1
    )
    offset = (peak / determinant[..., None]).clamp(-_MAX_OFFSET_PX, _MAX_OFFSET_PX)
    return torch.where(has_peak[..., None], offset, 0.0)


def _pixel_idx(points_xy: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Row-major positions (B, Q) of the pixels that points lie in, of maps (B, H, W)."""
    height, width = maps.shape[1:3]
    x, y = points_xy.long().unbind(2)
    return y.clamp(0, height - 1) * width + x.clamp(0, width - 1)


def _at(maps: torch.Tensor, pixel_idx: torch.Tensor) -> torch.Tensor:
    """The values (B, Q, D) of maps (B, H, W, D) at row-major positions (B, Q)."""
    pair = torch.arange(len(maps), device=maps.device)[:, None]
    return maps.flatten(1, 2)[pair, pixel_idx]


def _match_confidence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    mean = first.float().sqrt() * second.float().sqrt()
    return 1.0 / (1.0 + 1.0 / mean)  # like this infinity gives 1 and zero gives 0


def _matches_of(table: Float32Array) -> QueryMatches:
    """One pair's matches from rows of is_match, x, y, confidence."""
    query_idx = np.flatnonzero(table[:, 0])
    return QueryMatches(
        query_idx=query_idx,
        points_xy=table[query_idx, 1:3].astype(np.float64),
        confidence=table[query_idx, 3],
    )
