"""Pair matches: from the network's output for a batch of pairs to matches in original px."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.matchers.mast3r.architecture import Grid
from adapters.matchers.mast3r.correspondences import (
    correspondences_of_both_decodes,
    correspondences_of_decode,
)
from adapters.matchers.mast3r.heads import ViewOutput
from adapters.matchers.mast3r.images import PixelMapping
from adapters.matchers.mast3r.pointmaps import depths_at, focal_from_pointmap
from adapters.matchers.mast3r.query_matching import QueryMatches, match_query_batch
from engine.types import (
    NO_ROW,
    Features,
    Float32Array,
    Float64Array,
    Int64Array,
    MatchRequest,
    PairMatches,
)

if TYPE_CHECKING:
    from engine.config import Mast3rConfig

_LEAST_CONFIDENCE = 1.5  # of points that are used; the network's least is 1
_MAX_CONFIDENCE = 1e9  # 1 when squeezed into 0..1, and its square is finite

Views = tuple[ViewOutput, ViewOutput]  # a decode's outputs for the first and for the second images


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageFrame:
    """The relation of an image's pixels to the network's."""

    mapping: PixelMapping
    grid: Grid  # rows and columns of tokens
    original_size: tuple[int, int]  # width and height in px

    def principal_point_xy(self) -> Float64Array:
        """Where the middle of the original image is, (2,) network px."""
        return self.mapping.to_network(np.array(self.original_size) / 2.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodedPairs:
    """The network's output for a batch of pairs whose images have the same two sizes."""

    images1: Sequence[ImageFrame]
    images2: Sequence[ImageFrame]
    first_leads: Views  # points, if any, in the cameras of the first images
    second_leads: Views | None  # in those of the second ones; None: not decoded
    is_metric: bool  # whether points are in metres

    @property
    def decodes(self) -> list[Views]:
        """All decodes."""
        return [self.first_leads] + ([self.second_leads] if self.second_leads else [])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ends:
    """Matches in network px; rows of the arrays belong together."""

    rows: Int64Array  # (M, 2)
    points1_xy: Float64Array  # (M, 2)
    points2_xy: Float64Array  # (M, 2)
    confidence: Float32Array  # (M,)


def no_matches(request: MatchRequest) -> PairMatches:
    """The result for a pair without matches."""
    return PairMatches.of_rows(
        request, matches_idx=np.empty((0, 2), np.int64), confidence=np.empty(0, np.float32)
    )


def match_pairs(
    requests: Sequence[MatchRequest], decoded: DecodedPairs, *, config: Mast3rConfig
) -> list[PairMatches]:
    """Matches of each pair of a decoded batch, in order."""
    if config.scheme == "queries":
        ends = _by_queries(requests, decoded, tolerance_px=config.reciprocal_tolerance_px)
    else:
        ends = [
            _by_seeds(decoded, pair, subsample=config.subsample) for pair in range(len(requests))
        ]
    return [
        _in_original_px(request, found, decoded, pair)
        for pair, (request, found) in enumerate(zip(requests, ends, strict=True))
    ]


def _by_queries(
    requests: Sequence[MatchRequest], decoded: DecodedPairs, *, tolerance_px: float
) -> list[_Ends]:
    """Finds the queries of both images in the other one, in every decode."""
    queries1_xy = [
        image.mapping.to_network(request.first.keypoints_xy[request.query_rows1])
        for request, image in zip(requests, decoded.images1, strict=True)
    ]
    queries2_xy = [
        image.mapping.to_network(request.second.keypoints_xy[request.query_rows2])
        for request, image in zip(requests, decoded.images2, strict=True)
    ]
    found: list[list[_Ends]] = [[] for _ in requests]
    for view1, view2 in decoded.decodes:
        there, back = look_up_both_ways(
            queries1_xy, queries2_xy, view1, view2, tolerance_px=tolerance_px
        )
        for pair, request in enumerate(requests):
            found[pair] += [
                _ends_of(there[pair], request.query_rows1, queries1_xy[pair]),
                _swapped(_ends_of(back[pair], request.query_rows2, queries2_xy[pair])),
            ]
    return [_joined(parts) for parts in found]


def look_up_both_ways(
    queries1_xy: Sequence[Float64Array],
    queries2_xy: Sequence[Float64Array],
    view1: ViewOutput,
    view2: ViewOutput,
    *,
    tolerance_px: float,
) -> tuple[list[QueryMatches], list[QueryMatches]]:
    """Matches of the first images' queries in the second ones, and the other way round.

    Args:
        queries1_xy: for each pair (Q, 2) network px of its first image.
        queries2_xy: of its second image.
        view1: what a decode says of the first images.
        view2: of the second images.
        tolerance_px: as in `match_query_batch`.
    """
    ways = (view1, view2), (view2, view1)
    if view1.descriptors.shape != view2.descriptors.shape:
        there, back = (
            _look_up(queries_xy, *way, tolerance_px=tolerance_px)
            for queries_xy, way in zip((queries1_xy, queries2_xy), ways, strict=True)
        )
        return there, back
    # Both ways at once: of one pair a GPU searches faster than a processor starts its kernels.
    stacked = [_stacked(*views) for views in zip(*ways, strict=True)]
    found = _look_up([*queries1_xy, *queries2_xy], *stacked, tolerance_px=tolerance_px)
    return found[: len(queries1_xy)], found[len(queries1_xy) :]


def _stacked(first: ViewOutput, second: ViewOutput) -> ViewOutput:
    """Descriptors of two batches of views as one batch."""
    return ViewOutput(
        descriptors=torch.cat([first.descriptors, second.descriptors]),
        descriptor_confidence=torch.cat(
            [first.descriptor_confidence, second.descriptor_confidence]
        ),
        points3D=None,
        confidence=None,
    )


def _look_up(
    queries_xy: Sequence[Float64Array],
    view_from: ViewOutput,
    view_to: ViewOutput,
    *,
    tolerance_px: float,
) -> list[QueryMatches]:
    return match_query_batch(
        queries_xy,
        view_from.descriptors,
        view_from.descriptor_confidence,
        view_to.descriptors,
        view_to.descriptor_confidence,
        tolerance_px=tolerance_px,
    )


def _ends_of(matches: QueryMatches, query_rows: Int64Array, queries_xy: Float64Array) -> _Ends:
    """Matches whose queries are keypoints of the first image."""
    rows = np.full((len(matches.query_idx), 2), NO_ROW)
    rows[:, 0] = query_rows[matches.query_idx]
    return _Ends(
        rows=rows,
        points1_xy=queries_xy[matches.query_idx],
        points2_xy=matches.points_xy,
        confidence=matches.confidence,
    )


def _swapped(ends: _Ends) -> _Ends:
    return _Ends(
        rows=ends.rows[:, ::-1],
        points1_xy=ends.points2_xy,
        points2_xy=ends.points1_xy,
        confidence=ends.confidence,
    )


def _joined(parts: Sequence[_Ends]) -> _Ends:
    return _Ends(
        rows=np.concatenate([part.rows for part in parts]),
        points1_xy=np.concatenate([part.points1_xy for part in parts]),
        points2_xy=np.concatenate([part.points2_xy for part in parts]),
        confidence=np.concatenate([part.confidence for part in parts]),
    )


def _by_seeds(decoded: DecodedPairs, pair: int, *, subsample: int) -> _Ends:
    """The published scheme; both ends lie anywhere."""
    if decoded.second_leads is None:
        found = correspondences_of_decode(*_maps_of(decoded.first_leads, pair), subsample=subsample)
    else:
        first, second = (_maps_of(views, pair) for views in decoded.decodes)
        found = correspondences_of_both_decodes(
            (first[0], second[0]), (first[1], second[1]), subsample=subsample
        )
    return _Ends(
        rows=np.full((len(found.first_xy), 2), NO_ROW),
        points1_xy=found.first_xy.astype(np.float64) + 0.5,
        points2_xy=found.second_xy.astype(np.float64) + 0.5,
        confidence=found.confidence / (1.0 + found.confidence),
    )


def _in_original_px(
    request: MatchRequest, ends: _Ends, decoded: DecodedPairs, pair: int
) -> PairMatches:
    image1, image2 = decoded.images1[pair], decoded.images2[pair]
    own_view1 = PointMap.of(decoded.first_leads[0], pair)
    own_view2 = PointMap.of(decoded.second_leads[1], pair) if decoded.second_leads else None
    depths_m = np.zeros((len(ends.rows), 2), np.float32)
    if decoded.is_metric:
        depths_m[:, 0] = _depths_m(own_view1, ends.points1_xy)
        depths_m[:, 1] = _depths_m(own_view2, ends.points2_xy)
    return PairMatches(
        pair=request.pair,
        matches_idx=ends.rows,
        points1_xy=_exact(
            request.first, ends.rows[:, 0], image1.mapping.to_original(ends.points1_xy)
        ),
        points2_xy=_exact(
            request.second, ends.rows[:, 1], image2.mapping.to_original(ends.points2_xy)
        ),
        confidence=ends.confidence,
        depths_m=depths_m,
        focal_px=(_focal_px(own_view1, image1), _focal_px(own_view2, image2)),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PointMap:
    """Points of one image in its own camera, and their confidence."""

    points3D: NDArray[np.float32]  # (H, W, 3)
    confidence: Float32Array  # (H, W)

    @classmethod
    def of(cls, view: ViewOutput, pair: int) -> PointMap | None:
        """One image of a decoded batch; None when points were not wanted."""
        if view.points3D is None or view.confidence is None:
            return None
        return cls(
            points3D=view.points3D[pair].cpu().numpy(),
            confidence=view.confidence[pair].cpu().numpy(),
        )

    def confident_depth(self) -> Float32Array:
        """Depths (H, W) along the optical axis; 0: unknown."""
        depth = self.points3D[..., 2]
        with np.errstate(invalid="ignore"):
            known = np.isfinite(depth) & (depth > 0) & (self.confidence >= _LEAST_CONFIDENCE)
        return np.where(known, depth, np.float32(0.0))


def _depths_m(points: PointMap | None, points_xy: Float64Array) -> Float32Array:
    """Depths (M,) at network px; 0: unknown."""
    if points is None:
        return np.zeros(len(points_xy), np.float32)
    depths = depths_at(points.points3D, points_xy)
    known = np.isfinite(depths) & (depths > 0)
    return np.where(known, depths, 0.0).astype(np.float32)


def _focal_px(points: PointMap | None, image: ImageFrame) -> float:
    """The focal length in px of the original image; 0: unknown."""
    if points is None:
        return 0.0
    focal_px = focal_from_pointmap(
        points.points3D, points.confidence, principal_point_xy=image.principal_point_xy()
    )
    return float(focal_px * image.mapping.scale_xy.mean()) if focal_px is not None else 0.0


def _exact(features: Features, rows: Int64Array, points_xy: Float64Array) -> Float64Array:
    """Points (M, 2) in original px; the keypoints themselves where there are rows."""
    exact_xy, is_keypoint = points_xy.copy(), rows != NO_ROW
    exact_xy[is_keypoint] = features.keypoints_xy[rows[is_keypoint]]
    return exact_xy


def _maps_of(views: Views, pair: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Descriptors (H, W, D) and their confidences (H, W) of both images of one pair."""
    first, second = views
    return (
        (first.descriptors[pair], second.descriptors[pair]),
        (_finite(first.descriptor_confidence[pair]), _finite(second.descriptor_confidence[pair])),
    )


def _finite(confidence: Tensor) -> Tensor:
    """Confidence without overflow: what is not a number counts for nothing."""
    return confidence.nan_to_num(nan=0.0).clamp(max=_MAX_CONFIDENCE)
