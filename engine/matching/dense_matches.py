"""Which matches of a dense matcher are worth verifying: confident ones, inside, spread out."""

from __future__ import annotations

import numpy as np

from engine.config import DenseMatchingConfig
from engine.geometry import image_scale, spread_over_image
from engine.types import BoolArray, Float64Array, PairMatches

Size = tuple[int, int]  # width and height in px


def select_matches(
    matches: PairMatches, *, sizes: tuple[Size, Size], config: DenseMatchingConfig
) -> PairMatches:
    """The matches that are confident and not at an image's edge, the best of each place.

    Dense matchers have opinions everywhere. At the edges they see half of what they compare; and
    verification samples better from matches that are spread over the image.

    Args:
        matches: all matches of a pair.
        sizes: of the first and of the second image.
        config: thresholds.
    """
    wanted = matches.confidence >= config.min_confidence
    for points_xy, size in zip((matches.points1_xy, matches.points2_xy), sizes, strict=True):
        wanted &= _is_inside(points_xy, size=size, border_px=config.border_px * image_scale(*size))
    order = np.flatnonzero(wanted)
    order = order[np.argsort(-matches.confidence[order], kind="stable")]
    chosen = spread_over_image(
        matches.points1_xy[order], size=sizes[0], limit=config.max_matches_per_pair
    )
    return matches.take(order[chosen])


def _is_inside(points_xy: Float64Array, *, size: Size, border_px: float) -> BoolArray:
    upper = np.asarray(size) - border_px
    return np.asarray(((points_xy >= border_px) & (points_xy <= upper)).all(axis=1))
