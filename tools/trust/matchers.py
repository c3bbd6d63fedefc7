"""Matchers that are not of the product: recorded matches, and an oracle that is deceived."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.errors import InferenceError
from engine.geometry import rotation_from_vector
from engine.ports import PairMatcher, PlaceIndex
from engine.types import (
    NO_ROW,
    Features,
    Float64Array,
    Frame,
    FrameId,
    ImagePair,
    Int64Array,
    MatchRequest,
    PairMatches,
)

_SCALE_PX = 4.0  # of recorded keypoints, which have none
_CONFIDENCE = 0.9
_LEAST_TRUE_MATCHES = 8  # with fewer, a pair of the oracle counts as sharing nothing
_NUM_FALSE_MATCHES = 150
_FALSE_NOISE_PX = 1.0
_FALSE_SCORE = 0.5  # of a place that only seems to be the same
_MAX_TURN_RAD, _DEPTHS, _BASELINES = 0.5, (3.0, 12.0), (0.3, 1.5)
_NUM_TRIALS = 200


class RecordedMatcher:
    """Keypoints and matches of a learned matcher, read from a file by the images' names.

    The file is NumPy's, with ``keypoints_NAME`` (N, 2) px and ``matches_NAME1_NAME2`` (M, 2).
    """

    def __init__(self, path: Path) -> None:
        with np.load(path) as archive:
            self._arrays = {name: archive[name] for name in archive.files}
        self._name_of: dict[FrameId, str] = {}

    @property
    def name(self) -> str:
        """Short name for logs and summaries."""
        return "recorded"

    @property
    def peak_gpu_mb(self) -> float:
        """0: nothing is computed."""
        return 0.0

    @property
    def matches_everything(self) -> bool:
        """Whether images that share nothing match, too: they do."""
        return True

    def describe(self, frame: Frame) -> Features:
        """The recorded keypoints of an image.

        Raises:
            InferenceError: there are none of that name.
        """
        name = Path(frame.name).name
        points_xy = self._arrays.get(f"keypoints_{name}")
        if points_xy is None:
            raise InferenceError(f"{frame.name}: not recorded")
        self._name_of[frame.frame_id] = name
        height, width = frame.pixels.shape[:2]
        column, row = np.floor(points_xy).astype(np.intp).T
        return Features(
            frame_id=frame.frame_id,
            keypoints_xy=points_xy,
            descriptors=np.zeros((len(points_xy), 0), np.uint8),
            scales=np.full(len(points_xy), _SCALE_PX, np.float32),
            colors=frame.pixels[row.clip(0, height - 1), column.clip(0, width - 1)],
        )

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        """The recorded matches of each pair."""
        return [
            PairMatches.of_rows(
                request,
                matches_idx=(rows := self.rows(request.pair.first, request.pair.second)),
                confidence=np.full(len(rows), _CONFIDENCE, np.float32),
            )
            for request in requests
        ]

    def rows(self, first: FrameId, second: FrameId) -> Int64Array:
        """Rows (M, 2) of two described images; none where no matches were recorded."""
        names = self._name_of[first], self._name_of[second]
        forward = self._arrays.get(f"matches_{names[0]}_{names[1]}")
        if forward is not None:
            return np.asarray(forward, np.int64)
        backward = self._arrays.get(f"matches_{names[1]}_{names[0]}")
        if backward is not None:
            return np.asarray(backward[:, ::-1], np.int64)
        return np.zeros((0, 2), np.int64)


class RecordedSecond:
    """``SecondMatcher`` of recorded matches: where they end, beside the other matcher's keypoints.

    Args:
        matcher: has the matches.
    """

    def __init__(self, matcher: RecordedMatcher) -> None:
        self._matcher = matcher
        self._points_xy: dict[FrameId, Float64Array] = {}

    @property
    def name(self) -> str:
        """Short name for logs and summaries."""
        return self._matcher.name

    @property
    def peak_gpu_mb(self) -> float:
        """0: nothing is computed."""
        return 0.0

    def keep(self, frame: Frame) -> None:
        """Finds the recorded keypoints of an image, if there are some."""
        try:
            self._points_xy[frame.frame_id] = self._matcher.describe(frame).keypoints_xy
        except InferenceError:
            return

    def holds(self, frame_id: FrameId) -> bool:
        """Whether an image was recorded."""
        return frame_id in self._points_xy

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        """The recorded matches of each pair, as points."""
        return [self._match(request.pair) for request in requests]

    def _match(self, pair: ImagePair) -> PairMatches:
        rows = self._matcher.rows(pair.first, pair.second)
        return PairMatches(
            pair=pair,
            matches_idx=np.full(rows.shape, NO_ROW),
            points1_xy=self._points_xy[pair.first][rows[:, 0]],
            points2_xy=self._points_xy[pair.second][rows[:, 1]],
            confidence=np.full(len(rows), _CONFIDENCE, np.float32),
        )


class RecordedPlaces:
    """``PlaceIndex`` by the number of recorded matches."""

    def __init__(self, matcher: RecordedMatcher) -> None:
        self._matcher = matcher
        self._num_keypoints: dict[FrameId, int] = {}

    def add(self, features: Features) -> None:
        """Adds a described keyframe.

        Raises:
            ValueError: it was added before.
        """
        if features.frame_id in self._num_keypoints:
            raise ValueError(f"keyframe {features.frame_id} was added before")
        self._num_keypoints[features.frame_id] = max(len(features), 1)

    def query(
        self, frame_id: FrameId, *, exclude: Collection[FrameId], limit: int
    ) -> list[tuple[FrameId, float]]:
        """The keyframes with most matches, by the share of keypoints that is matched.

        Raises:
            KeyError: the keyframe was never added.
        """
        num_keypoints = self._num_keypoints[frame_id]
        scores = [
            (other, len(self._matcher.rows(frame_id, other)) / num_keypoints)
            for other in self._num_keypoints
            if other != frame_id and other not in exclude
        ]
        return sorted(scores, key=lambda item: -item[1])[:limit]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deception:
    """Which pairs that share nothing get matches all the same."""

    ratio: float  # of such pairs
    seed: int
    is_admitted: bool  # the matcher says that it matches everything

    def concerns(self, one: FrameId, other: FrameId) -> bool:
        """Whether a pair, if it shares nothing, gets matches."""
        return bool(self._rng(one, other).random() < self.ratio)

    def matches(
        self,
        request: MatchRequest,
        *,
        intrinsics: tuple[float, float, float, float],
        size: tuple[int, int],
    ) -> PairMatches | None:
        """Matches that agree on one relative pose, with noise; None: too few keypoints for that.

        Keypoints of the first image get depths at random; a pose drawn at random projects them.

        Args:
            request: the pair.
            intrinsics: fx, fy, cx, cy in px, of both images.
            size: width and height of both, px.
        """
        rng = self._rng(request.pair.first, request.pair.second)
        rng.random()
        focal, center = np.array(intrinsics[:2]), np.array(intrinsics[2:])
        rows = request.query_rows1 if len(request.query_rows1) else request.first.fixed_rows
        points1_xy = request.first.keypoints_xy[rows]
        rays = np.column_stack([(points1_xy - center) / focal, np.ones(len(rows))])
        for _ in range(_NUM_TRIALS):
            points2_xy, depths = _seen_elsewhere(rays, rng, focal=focal, center=center)
            inside = (points2_xy >= 0) & (points2_xy < size)
            seen = np.flatnonzero(inside.all(axis=1) & (depths > 0))
            if len(seen) < _NUM_FALSE_MATCHES:
                continue
            kept = rng.choice(seen, _NUM_FALSE_MATCHES, replace=False)
            noise = rng.normal(scale=_FALSE_NOISE_PX, size=(len(kept), 2))
            return PairMatches(
                pair=request.pair,
                matches_idx=np.column_stack([rows[kept], np.full(len(kept), NO_ROW)]),
                points1_xy=points1_xy[kept],
                points2_xy=points2_xy[kept] + noise,
                confidence=np.full(len(kept), _CONFIDENCE, np.float32),
            )
        return None

    def _rng(self, one: FrameId, other: FrameId) -> np.random.Generator:
        return np.random.default_rng((self.seed, min(one, other), max(one, other)))


def _seen_elsewhere(
    rays: Float64Array, rng: np.random.Generator, *, focal: Float64Array, center: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Points on rays (N, 3) at random depths in a second camera at random: px and depths there."""
    points = rays * rng.uniform(*_DEPTHS, size=(len(rays), 1))
    rotation = rotation_from_vector(rng.uniform(-_MAX_TURN_RAD, _MAX_TURN_RAD, size=3))
    direction = rng.normal(size=3)
    translation = direction / np.linalg.norm(direction) * rng.uniform(*_BASELINES)
    in_cam = points @ rotation.T + translation
    depths = np.where(in_cam[:, 2] > 0, in_cam[:, 2], np.inf)
    return in_cam[:, :2] / depths[:, None] * focal + center, in_cam[:, 2]


class DeceivedOracle:
    """An oracle whose pairs that share nothing have, some of them, matches that agree."""

    def __init__(
        self,
        oracle: PairMatcher,
        deception: Deception,
        *,
        intrinsics: tuple[float, float, float, float],
        size: tuple[int, int],
    ) -> None:
        self._oracle = oracle
        self._deception = deception
        self._intrinsics = intrinsics
        self._size = size

    @property
    def name(self) -> str:
        """Short name for logs and summaries."""
        return "deceived oracle"

    @property
    def peak_gpu_mb(self) -> float:
        """0: everything runs on the processor."""
        return 0.0

    @property
    def matches_everything(self) -> bool:
        """Whether it says that images that share nothing match, too."""
        return self._deception.is_admitted

    def describe(self, frame: Frame) -> Features:
        """As the oracle does.

        Raises:
            InferenceError: as the oracle.
        """
        return self._oracle.describe(frame)

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        """As the oracle does, but for some pairs that share nothing."""
        return [
            self._deceived(request, matches)
            for request, matches in zip(requests, self._oracle.match(requests), strict=True)
        ]

    def _deceived(self, request: MatchRequest, matches: PairMatches) -> PairMatches:
        pair = request.pair
        if len(matches) >= _LEAST_TRUE_MATCHES or not self._deception.concerns(
            pair.first, pair.second
        ):
            return matches
        return (
            self._deception.matches(request, intrinsics=self._intrinsics, size=self._size)
            or matches
        )


class DeceivedPlaces:
    """Places that the oracle knows, and those that only seem to be the same."""

    def __init__(self, places: PlaceIndex, deception: Deception) -> None:
        self._places = places
        self._deception = deception
        self._added: list[FrameId] = []

    def add(self, features: Features) -> None:
        """Adds a described keyframe.

        Raises:
            ValueError: it was added before.
        """
        self._places.add(features)
        self._added.append(features.frame_id)

    def query(
        self, frame_id: FrameId, *, exclude: Collection[FrameId], limit: int
    ) -> list[tuple[FrameId, float]]:
        """The oracle's places, then others that seem to be the same.

        Raises:
            KeyError: the keyframe was never added.
        """
        known = self._places.query(frame_id, exclude=exclude, limit=limit)
        taken = {frame_id, *exclude, *(other for other, _ in known)}
        seeming = [
            (other, _FALSE_SCORE)
            for other in self._added
            if other not in taken and self._deception.concerns(frame_id, other)
        ]
        return sorted([*known, *seeming], key=lambda item: -item[1])[:limit]


Opener = Callable[..., tuple[PairMatcher, PlaceIndex | None]]  # of the configuration and sources
