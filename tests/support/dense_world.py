"""A dense matcher over the synthetic world, shared by tests.

It looks up any keypoint that lies on a point of the world, as a network looks up any pixel. A
keyframe's table starts with some of the points that it sees, and a grid of free rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from engine.config import SceneGraphConfig
from engine.errors import InferenceError
from engine.geometry import transform_points
from engine.matching.scene_graph import SceneGraph
from engine.types import (
    NO_ROW,
    Features,
    Float32Array,
    Float64Array,
    Frame,
    FrameId,
    ImagePair,
    Int64Array,
    Keyframe,
    MatchRequest,
    PairMatches,
)
from tests.support.synthetic import SyntheticWorld

GRID = (40, 30)  # columns and lines of free rows
DETECTED_RATIO = 0.4  # of the points seen, those that a table starts with
DEPTH_NOISE_RATIO = 0.05
_ON_POINT_PX = 2.5  # a keypoint this close to a point shows it


def table_of(
    fixed_xy: Float64Array,
    *,
    size: tuple[int, int],
    grid: tuple[int, int],
    frame_id: int = 1,
) -> Features:
    """A dense matcher's table: keypoints (N, 2) that stay, then free rows at centres of a grid."""
    x, y = (edge_px * (np.arange(n) + 0.5) / n for edge_px, n in zip(size, grid, strict=True))
    free_xy = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    keypoints_xy = np.concatenate([np.asarray(fixed_xy, np.float64).reshape(-1, 2), free_xy])
    num = len(keypoints_xy)
    return Features(
        frame_id=FrameId(frame_id),
        keypoints_xy=keypoints_xy,
        descriptors=np.empty((num, 0), np.uint8),
        scales=np.ones(num, np.float32),
        colors=np.zeros((num, 3), np.uint8),
        is_free=np.arange(num) >= num - len(free_xy),
    )


@dataclass(kw_only=True)
class DenseFakeMatcher:
    """Matches keyframes of a world without noise by looking the queries' points up.

    Args:
        world: what the keyframes see; its own noise must be 0.
        noise_px: standard deviation of where tables start and matches end.
        wrong_ratio: share of matches that end anywhere.
        metres_per_unit: of the world, for depths; 0: without depths.
        tells_focal_length: of both cameras, where pointmaps are wanted.
        fails: on which calls (0, 1, ...) matching raises.
    """

    world: SyntheticWorld
    noise_px: float = 0.5
    wrong_ratio: float = 0.0
    metres_per_unit: float = 0.0
    tells_focal_length: bool = False
    fails: Collection[int] = ()
    requests: list[list[MatchRequest]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "dense fake"

    @property
    def peak_gpu_mb(self) -> float:
        return 123.0

    @property
    def matches_everything(self) -> bool:
        """Whether images that share nothing match, too: they do not."""
        return False

    def describe(self, frame: Frame) -> Features:
        return self.keyframe(frame.frame_id).features

    def keyframe(self, frame_id: int) -> Keyframe:
        """A frame of the world with a dense matcher's table."""
        sparse = self.world.keyframe(frame_id)
        rng = np.random.default_rng((21, frame_id))
        seen_xy = self.world.view(frame_id).points_xy
        detected_xy = seen_xy[rng.random(len(seen_xy)) < DETECTED_RATIO]
        detected_xy = detected_xy + rng.normal(scale=self.noise_px, size=detected_xy.shape)
        table = table_of(
            detected_xy, size=(sparse.width, sparse.height), grid=GRID, frame_id=frame_id
        )
        return replace(sparse, features=table)

    def point_ids(self, frame_id: int, points_xy: Float64Array) -> Int64Array:
        """Which points of the world places (N, 2) of a frame show, -1 for none."""
        view = self.world.view(frame_id)
        if not len(view.point_ids):
            return np.full(len(points_xy), -1)
        # |a - b|^2 without |a|^2, which does not matter for which b is nearest.
        squares = (view.points_xy**2).sum(axis=1) - 2.0 * points_xy @ view.points_xy.T
        nearest = squares.argmin(axis=1)
        distances_px = np.linalg.norm(points_xy - view.points_xy[nearest], axis=1)
        is_on_point = distances_px <= _ON_POINT_PX
        return np.where(is_on_point, view.point_ids[nearest], -1)

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        self.requests.append(list(requests))
        if len(self.requests) - 1 in self.fails:
            raise InferenceError("out of memory")
        return [self._match(request) for request in requests]

    def _match(self, request: MatchRequest) -> PairMatches:
        first, second = request.first, request.second
        rng = np.random.default_rng((22, first.frame_id, second.frame_id))
        rows1, ends2_xy, ids1 = self._look_up(first, request.query_rows1, second.frame_id, rng)
        rows2, ends1_xy, ids2 = self._look_up(second, request.query_rows2, first.frame_id, rng)
        num1, num = len(rows1), len(rows1) + len(rows2)
        matches_idx = np.full((num, 2), NO_ROW)
        matches_idx[:num1, 0], matches_idx[num1:, 1] = rows1, rows2
        return PairMatches(
            pair=request.pair,
            matches_idx=matches_idx,
            points1_xy=np.concatenate([first.keypoints_xy[rows1], ends1_xy]),
            points2_xy=np.concatenate([ends2_xy, second.keypoints_xy[rows2]]),
            confidence=(0.5 + 0.5 * rng.random(num)).astype(np.float32),
            depths_m=self._depths_m(request.pair, np.concatenate([ids1, ids2]), rng),
            focal_px=self._focal_lengths(request),
        )

    def _look_up(
        self, own: Features, query_rows: Int64Array, other_id: FrameId, rng: np.random.Generator
    ) -> tuple[Int64Array, Float64Array, Int64Array]:
        """Rows (M,) that the other frame shows, where they end in it (M, 2), and their points."""
        ids = self.point_ids(own.frame_id, own.keypoints_xy[query_rows])
        other, size = self.world.view(other_id), self._size(other_id)
        place_of = np.full(len(self.world.points) + 1, -1)  # the last entry is for no point
        place_of[other.point_ids] = np.arange(len(other.point_ids))
        is_seen = place_of[ids] >= 0
        ends_xy = other.points_xy[place_of[ids[is_seen]]]
        ends_xy = ends_xy + rng.normal(scale=self.noise_px, size=ends_xy.shape)
        is_wrong = rng.random(len(ends_xy)) < self.wrong_ratio
        ends_xy[is_wrong] = rng.random((int(is_wrong.sum()), 2)) * size
        return query_rows[is_seen], ends_xy, ids[is_seen]

    def _size(self, frame_id: int) -> tuple[int, int]:
        camera = self.world.camera(frame_id)
        return camera.width, camera.height

    def _depths_m(self, pair: ImagePair, ids: Int64Array, rng: np.random.Generator) -> Float32Array:
        points = self.world.points[ids]
        depths = np.column_stack(
            [transform_points(self.world.pose(i), points)[:, 2] for i in (pair.first, pair.second)]
        )
        noise = 1.0 + rng.normal(scale=DEPTH_NOISE_RATIO, size=depths.shape)
        return np.asarray(self.metres_per_unit * depths * noise).astype(np.float32)

    def _focal_lengths(self, request: MatchRequest) -> tuple[float, float]:
        if not (self.tells_focal_length and request.wants_pointmaps):
            return 0.0, 0.0
        cameras = (self.world.camera(i) for i in (request.pair.first, request.pair.second))
        first, second = (camera.params[0] for camera in cameras)
        return first, second


class NoPlaces:
    """A place index that finds nothing; dense tables have no descriptors to learn places from."""

    def add(self, features: Features) -> None:
        pass

    def query(
        self, frame_id: FrameId, *, exclude: Collection[FrameId], limit: int
    ) -> list[tuple[FrameId, float]]:
        return []


def dense_graph(**settings: Any) -> SceneGraph:
    """A scene graph without place recognition; ``settings`` of its section."""
    return SceneGraph(SceneGraphConfig(**settings), recognizer=NoPlaces())
