"""Oracle: a dense matcher from the ground truth of a synthetic scene, degraded by known amounts.

With it everything from dense matches to the map is tested against ground truth, without weights.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np

from adapters.images.dense_keypoints import dense_features
from adapters.town.source import SyntheticTown
from engine.config import Config, DenseMatchingConfig, OracleConfig
from engine.dense_types import SeenDepth
from engine.geometry import invert_pose, transform_points
from engine.types import (
    NO_ROW,
    BoolArray,
    Features,
    Float32Array,
    Float64Array,
    Frame,
    FrameId,
    Int64Array,
    MatchRequest,
    PairMatches,
    Uint8Array,
    freeze_field,
)

_SAME_SURFACE_RATIO = 0.01  # relative difference of inverse depths on one face, or of one point
_MAX_VIEWS_KEPT = 256  # 1.2 MB each at 640 x 480; others are rendered again
_DROPPED_GRID = 8  # cells per image edge that ``dropped_ratio`` counts
_PLACE_GRID = 16  # points per image edge that measure how much two frames overlap
_FOCAL_NOISE_RATIO = 0.02


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrueView:
    """The ground truth of one image."""

    depth_m: Float32Array  # (H, W) along the optical axis at pixel centres, inf in the sky
    cam_from_world: Float64Array  # (3, 4) metres
    intrinsics: tuple[float, float, float, float]  # fx, fy, cx, cy in px; no distortion

    def __post_init__(self) -> None:
        depth_m = self.depth_m.astype(np.float32)
        depth_m.flags.writeable = False
        object.__setattr__(self, "depth_m", depth_m)  # frozen_array would refuse the sky
        freeze_field(self, "cam_from_world", (3, 4), np.float64)

    def to_bytes(self) -> Uint8Array:
        """All of it, for another process on a machine like this."""
        numbers = np.array([*self.cam_from_world.ravel(), *self.intrinsics, *self.size], np.float64)
        return np.concatenate([numbers.view(np.uint8), self.depth_m.ravel().view(np.uint8)])

    @classmethod
    def from_bytes(cls, data: Uint8Array) -> TrueView:
        """What `to_bytes` made bytes of."""
        numbers = data[: 18 * 8].copy().view(np.float64)
        width, height = int(numbers[16]), int(numbers[17])
        return cls(
            depth_m=data[18 * 8 :].copy().view(np.float32).reshape(height, width),
            cam_from_world=numbers[:12].reshape(3, 4),
            intrinsics=(numbers[12], numbers[13], numbers[14], numbers[15]),
        )

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in px."""
        height, width = self.depth_m.shape
        return width, height

    def depths_at(self, points_xy: Float64Array) -> Float64Array:
        """Depths in metres at points (N, 2) of the image; inf in the sky and across edges.

        Inverse depth is affine in the pixel on a plane, so interpolating it is exact there.
        """
        height, width = self.depth_m.shape
        x, y = np.clip(points_xy - 0.5, 0.0, (width - 1.0, height - 1.0)).T
        left, top = (np.minimum(v.astype(np.int64), n - 2) for v, n in ((x, width), (y, height)))
        corners = np.stack([self.depth_m[top + j, left + i] for j in (0, 1) for i in (0, 1)])
        inverse = 1.0 / corners.astype(np.float64)
        x, y = x - left, y - top
        weights = np.stack([(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y])
        smooth = np.abs(inverse[0] + inverse[3] - inverse[1] - inverse[2]) <= (
            _SAME_SURFACE_RATIO * inverse.max(axis=0)
        )
        one_surface = smooth & (np.ptp(inverse, axis=0) <= 10 * _SAME_SURFACE_RATIO * inverse[0])
        mean = (weights * inverse).sum(axis=0)
        depths = np.full(len(mean), np.inf)
        np.divide(1.0, mean, out=depths, where=one_surface & (mean > 0))
        return depths

    def points_in_world(self, points_xy: Float64Array) -> tuple[Float64Array, Float64Array]:
        """The 3D points seen at points (N, 2): positions (N, 3) and depths (N,), metres."""
        focal_x, focal_y, center_x, center_y = self.intrinsics
        depths = self.depths_at(points_xy)
        finite = np.where(np.isfinite(depths), depths, 1.0)
        rays = (points_xy - (center_x, center_y)) / (focal_x, focal_y)
        in_cam = np.column_stack([rays, np.ones(len(rays))]) * finite[:, None]
        return transform_points(invert_pose(self.cam_from_world), in_cam), depths

    def project(self, points_in_world: Float64Array) -> tuple[Float64Array, Float64Array]:
        """Projects points (N, 3) into the image: (N, 2) px, and their depths (N,) in metres."""
        focal_x, focal_y, center_x, center_y = self.intrinsics
        in_cam = transform_points(self.cam_from_world, points_in_world)
        depths = np.where(in_cam[:, 2] > 0, in_cam[:, 2], np.inf)
        image_plane = in_cam[:, :2] / depths[:, None]
        return image_plane * (focal_x, focal_y) + (center_x, center_y), in_cam[:, 2]

    def is_inside(self, points_xy: Float64Array) -> BoolArray:
        """Whether points (N, 2) lie in the image."""
        return np.asarray(((points_xy >= 0) & (points_xy < self.size)).all(axis=1))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Correspondences:
    """Keypoints of one image's table in another image; rows of the arrays belong together."""

    rows: Int64Array  # (M,)
    points_xy: Float64Array  # (M, 2) px in the other image
    confidence: Float32Array  # (M,)
    depths_m: Float32Array  # (M, 2) in the own image and in the other one


class OracleMatcher:
    """``PairMatcher`` that computes matches from true depths and poses.

    Args:
        config: how much of the truth is returned, and how exactly.
        dense: the keypoint tables it makes.
        truth: returns the ground truth of the frame with an index.
        seed: of all noise; a pair is degraded in the same way at every request.
    """

    def __init__(
        self,
        config: OracleConfig,
        *,
        dense: DenseMatchingConfig,
        truth: Callable[[int], TrueView],
        seed: int,
    ) -> None:
        self._config = config
        self._dense = dense
        self._truth = truth
        self._seed = seed
        self._index_of: dict[FrameId, int] = {}
        self._views: OrderedDict[FrameId, TrueView] = OrderedDict()
        self._lock = Lock()  # one thread describes while another matches

    @property
    def name(self) -> str:
        """Short name for logs and summaries."""
        return "oracle"

    @property
    def peak_gpu_mb(self) -> float:
        """0: everything runs on the processor."""
        return 0.0

    @property
    def matches_everything(self) -> bool:
        """Whether images that share nothing match, too: they do not."""
        return False

    def describe(self, frame: Frame) -> Features:
        """Corners and a grid; the frame's ground truth is rendered when it is needed."""
        self.know(frame.frame_id, index=frame.index)
        return dense_features(frame, self._dense)

    def know(self, frame_id: FrameId, *, index: int) -> None:
        """Takes which frame of the scene one is; from then on it can be matched."""
        with self._lock:
            self._index_of[frame_id] = index

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        """Finds the queries of each pair in the other image, both ways."""
        return [self.match_pair(request) for request in requests]

    def match_pair(self, request: MatchRequest, *, is_prepared: bool = False) -> PairMatches:
        """Matches a pair; one that is prepared took its time before."""
        if not is_prepared:
            self.prepare()
        return self._match(request)

    def prepare(self) -> None:
        """Takes the time of a pair."""
        if self._config.pair_s:
            time.sleep(self._config.pair_s)

    def seen_depth(self, frame_id: FrameId, neighbour_id: FrameId) -> SeenDepth | None:
        """The true depth of a keyframe in metres, with noise; None where it reports no depths."""
        with self._lock:
            is_described = {frame_id, neighbour_id} <= self._index_of.keys()
        if not (self._config.reports_depths and is_described):
            return None
        depth = self.view(frame_id).depth_m
        rng = np.random.default_rng((self._seed, frame_id, neighbour_id))
        noise = rng.normal(scale=self._config.depth_noise_ratio, size=depth.shape)
        noisy = np.where(np.isfinite(depth), depth, 0.0) * (1.0 + noise)
        return SeenDepth(
            depth=np.maximum(noisy, 0.0).astype(np.float32),
            scale_xy=np.ones(2),
            offset_xy=np.zeros(2),
        )

    def view(self, frame_id: FrameId) -> TrueView:
        """The ground truth of a described frame."""
        with self._lock:
            if frame_id not in self._views:
                self._views[frame_id] = self._truth(self._index_of[frame_id])
            self._views.move_to_end(frame_id)
            while len(self._views) > _MAX_VIEWS_KEPT:
                self._views.popitem(last=False)
            return self._views[frame_id]

    def _match(self, request: MatchRequest) -> PairMatches:
        pair = request.pair
        rng = np.random.default_rng((self._seed, pair.first, pair.second))
        first, second = request.first, request.second
        there = self._correspondences(first, request.query_rows1, second.frame_id, rng=rng)
        back = self._correspondences(second, request.query_rows2, first.frame_id, rng=rng)
        none = np.full(max(len(there.rows), len(back.rows)), NO_ROW)
        return PairMatches(
            pair=pair,
            matches_idx=np.concatenate(
                [
                    np.column_stack([there.rows, none[: len(there.rows)]]),
                    np.column_stack([none[: len(back.rows)], back.rows]),
                ]
            ),
            points1_xy=np.concatenate([first.keypoints_xy[there.rows], back.points_xy]),
            points2_xy=np.concatenate([there.points_xy, second.keypoints_xy[back.rows]]),
            confidence=np.concatenate([there.confidence, back.confidence]),
            depths_m=np.concatenate([there.depths_m, back.depths_m[:, ::-1]]),
            focal_px=self._focal_lengths(request, rng),
        )

    def _correspondences(
        self,
        features: Features,
        query_rows: Int64Array,
        other_id: FrameId,
        *,
        rng: np.random.Generator,
    ) -> _Correspondences:
        own, other = self.view(features.frame_id), self.view(other_id)
        queries_xy = features.keypoints_xy[query_rows]
        points, depths = own.points_in_world(queries_xy)
        points_xy, other_depths = other.project(points)
        seen = np.isfinite(depths) & (other_depths > 0) & other.is_inside(points_xy)
        seen &= ~self._is_dropped(queries_xy, features.frame_id, size=own.size)
        seen &= ~self._is_dropped(points_xy, other_id, size=other.size)
        with np.errstate(invalid="ignore"):  # the sky, which the line before left out
            surface = other.depths_at(np.where(seen[:, None], points_xy, 0.0))
            seen &= np.abs(other_depths / surface - 1.0) <= _SAME_SURFACE_RATIO
        kept = np.flatnonzero(seen)
        points_xy, confidence = self._spoil(points_xy[kept], size=other.size, rng=rng)
        true_depths = np.column_stack([depths[kept], other_depths[kept]])
        noise = rng.normal(scale=self._config.depth_noise_ratio, size=true_depths.shape)
        return _Correspondences(
            rows=query_rows[kept],
            points_xy=points_xy,
            confidence=confidence,
            depths_m=np.maximum(true_depths * (1.0 + noise), 0.0).astype(np.float32)
            * self._config.reports_depths,
        )

    def _spoil(
        self, points_xy: Float64Array, *, size: tuple[int, int], rng: np.random.Generator
    ) -> tuple[Float64Array, Float32Array]:
        """Points (M, 2) with noise and outliers, and their confidence (M,)."""
        num = len(points_xy)
        is_outlier = rng.random(num) < self._config.outlier_ratio
        is_exposed = is_outlier & (rng.random(num) < self._config.exposed_outlier_ratio)
        noisy = points_xy + rng.normal(scale=self._config.noise_px, size=points_xy.shape)
        anywhere = rng.random((num, 2)) * size
        confidence = np.where(is_exposed, 0.0, 0.5) + 0.5 * rng.random(num)
        return np.where(is_outlier[:, None], anywhere, noisy), confidence.astype(np.float32)

    def _is_dropped(
        self, points_xy: Float64Array, frame_id: FrameId, *, size: tuple[int, int]
    ) -> BoolArray:
        """Whether points (N, 2) lie in a region of their image in which nothing is matched."""
        rng = np.random.default_rng((self._seed, frame_id))
        is_dropped = rng.random((_DROPPED_GRID, _DROPPED_GRID)) < self._config.dropped_ratio
        with np.errstate(invalid="ignore"):
            cells = np.clip(points_xy / size * _DROPPED_GRID, 0, _DROPPED_GRID - 1).astype(np.int64)
        return np.asarray(is_dropped[cells[:, 1], cells[:, 0]])

    def _focal_lengths(
        self, request: MatchRequest, rng: np.random.Generator
    ) -> tuple[float, float]:
        if not (self._config.reports_focal_length and request.wants_pointmaps):
            return 0.0, 0.0
        first, second = (
            self.view(i).intrinsics[0] for i in (request.pair.first, request.pair.second)
        )
        noise = 1.0 + rng.normal(scale=_FOCAL_NOISE_RATIO, size=2)
        return float(first * noise[0]), float(second * noise[1])


class OraclePlaces:
    """``PlaceIndex`` by the true share of one image that another one sees, without occlusion."""

    def __init__(self, oracle: OracleMatcher) -> None:
        self._oracle = oracle
        self._points: dict[FrameId, Float64Array] = {}  # (P, 3) in the world

    def add(self, features: Features) -> None:
        """Adds a described keyframe.

        Raises:
            ValueError: it was added before.
        """
        if features.frame_id in self._points:
            raise ValueError(f"keyframe {features.frame_id} was added before")
        view = self._oracle.view(features.frame_id)
        steps = (np.arange(_PLACE_GRID) + 0.5) / _PLACE_GRID
        grid_xy = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2) * view.size
        points, depths = view.points_in_world(grid_xy)
        self._points[features.frame_id] = points[np.isfinite(depths)]

    def query(
        self, frame_id: FrameId, *, exclude: Collection[FrameId], limit: int
    ) -> list[tuple[FrameId, float]]:
        """Added keyframes by the share of their points that this one sees, most first.

        Raises:
            KeyError: the keyframe was never added.
        """
        if frame_id not in self._points:
            raise KeyError(frame_id)
        view = self._oracle.view(frame_id)
        scores = {
            other: self._share_in(view, points)
            for other, points in self._points.items()
            if other != frame_id and other not in exclude
        }
        ranked = sorted(scores.items(), key=lambda item: -item[1])
        return [(other, score) for other, score in ranked[:limit] if score > 0]

    @staticmethod
    def _share_in(view: TrueView, points: Float64Array) -> float:
        if not len(points):
            return 0.0
        points_xy, depths = view.project(points)
        return float((view.is_inside(points_xy) & (depths > 0)).mean())


def open_oracle(config: Config, town: SyntheticTown) -> OracleMatcher:
    """The matcher that knows the truth of a town."""

    def truth(index: int) -> TrueView:
        rendered = town.render(index)
        return TrueView(
            depth_m=rendered.depth,
            cam_from_world=rendered.cam_from_world,
            intrinsics=town.intrinsics,
        )

    return OracleMatcher(
        config.oracle, dense=config.dense_matching, truth=truth, seed=config.runtime.seed
    )
