"""Votes of fundamental matrices on calibrations that differ from image to image.

With square pixels, K2^T F K1 is an essential matrix only for the right calibrations: its two
singular values are equal (Mendonca and Cipolla, CVPR 1999). What calibrations have in common is
searched, and how they differ is a guess that the votes can compare with others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.types import Float64Array, FrameId, VerifiedPair

_FOCAL_RATIOS = np.geomspace(0.26, 4.0, 64)  # of the longer image edge
_MAX_GAP = 0.15  # what a pair that fits no focal length costs
_MAX_HOMOGRAPHY_INLIER_RATIO = 0.8  # pairs that one plane explains have no vote
_TINY = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class GuessedView:
    """What is guessed of the calibration of one image."""

    zoom: float  # focal length, in those of the run
    principal_point_xy: tuple[float, float]  # px


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationVote:
    """How well a guess fits the pairs, and the focal length with which it fits best."""

    focal_px: float  # at zoom 1
    cost: float  # mean gap of singular values, 0..0.15


def has_vote(pair: VerifiedPair) -> bool:
    """Whether a pair is evidence of calibrations: not one of a plane, or verified on rays."""
    has_depth = pair.homography_inlier_ratio < _MAX_HOMOGRAPHY_INLIER_RATIO
    return has_depth and bool(pair.fundamental.any())


def vote_on(
    pairs: Sequence[VerifiedPair], views: Mapping[FrameId, GuessedView], *, edge_px: float
) -> CalibrationVote | None:
    """The best common focal length for guessed views, and its cost.

    Args:
        pairs: of images in ``views``.
        views: the guess, for each image.
        edge_px: the longer edge of the largest image.

    Returns:
        None when no pair has a vote.
    """
    focal_px = _FOCAL_RATIOS * edge_px
    costs = _costs(pairs, views, focal_px)
    if costs is None:
        return None
    best = int(costs.argmin())
    return CalibrationVote(focal_px=float(focal_px[best]), cost=float(costs[best]))


def cost_of(
    pairs: Sequence[VerifiedPair], views: Mapping[FrameId, GuessedView], *, focal_px: float
) -> float | None:
    """What guessed views and a focal length cost; None when no pair has a vote."""
    costs = _costs(pairs, views, np.array([focal_px]))
    return None if costs is None else float(costs[0])


def _costs(
    pairs: Sequence[VerifiedPair], views: Mapping[FrameId, GuessedView], focal_px: Float64Array
) -> Float64Array | None:
    """The mean bounded gap for each focal length (F,)."""
    usable = [pair for pair in pairs if has_vote(pair)]
    if not usable:
        return None
    fundamentals = np.array([pair.fundamental for pair in usable])
    first, second = (
        _calibrations([views[pair_end] for pair_end in ends], focal_px)
        for ends in zip(*((pair.pair.first, pair.pair.second) for pair in usable), strict=True)
    )
    gaps = _singular_value_gaps(np.swapaxes(second, -1, -2) @ fundamentals[:, None] @ first)
    weights = np.sqrt([pair.num_inliers for pair in usable])
    # A bounded loss lets a wrong pair cost no more than a constant anywhere on the curve.
    return np.asarray((weights[:, None] * np.minimum(gaps, _MAX_GAP)).sum(axis=0) / weights.sum())


def _calibrations(views: Sequence[GuessedView], focal_px: Float64Array) -> Float64Array:
    """Calibration matrices (V, F, 3, 3)."""
    zooms = np.array([view.zoom for view in views])
    matrices = np.zeros((len(views), len(focal_px), 3, 3))
    matrices[..., 0, 0] = matrices[..., 1, 1] = zooms[:, None] * focal_px
    matrices[..., :2, 2] = np.array([view.principal_point_xy for view in views])[:, None]
    matrices[..., 2, 2] = 1.0
    return matrices


def _singular_value_gaps(matrices: Float64Array) -> Float64Array:
    """Relative gap of the two singular values of matrices (..., 3, 3) of rank 2.

    The sum of their squares is the trace of M M^T, and their product the root of the sum of its
    principal minors of order two.
    """
    gram = matrices @ np.swapaxes(matrices, -1, -2)
    total = np.trace(gram, axis1=-2, axis2=-1)
    minors = np.maximum(0.5 * (total**2 - (gram**2).sum(axis=(-2, -1))), 0.0)
    product = 2.0 * np.sqrt(minors)
    difference = np.sqrt(np.maximum(total - product, 0.0))
    larger = 0.5 * (np.sqrt(total + product) + difference)
    return np.asarray(difference / np.maximum(larger, _TINY))
