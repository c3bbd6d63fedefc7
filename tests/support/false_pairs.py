"""A matcher that matches everything: images that share nothing agree on a geometry, too."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engine.geometry import rotation_from_vector, skew
from engine.types import (
    Float64Array,
    FrameId,
    ImagePair,
    MatchRequest,
    PairMatches,
    PairReason,
    Uint32Array,
    VerifiedPair,
)
from tests.support.synthetic import FakeMatcher, SyntheticCamera, SyntheticWorld

_FEWEST_SHARED = 5  # points that two views of one place have in common
_NUM_GEOMETRIES = 6  # tried: by many, one image shows nothing of the other
_MAX_DISTANCE_PX = 1.2  # from the epipolar line


def random_geometry_matches(
    first_xy: Float64Array,
    second_xy: Float64Array,
    *,
    camera: SyntheticCamera,
    num: int,
    rng: np.random.Generator,
) -> Uint32Array:
    """Rows (M, 2) of keypoints that lie on each other's epipolar lines by a random geometry.

    Args:
        first_xy: keypoints (N, 2) px of one image.
        second_xy: keypoints (K, 2) px of another one.
        camera: that took both.
        num: matches wanted; there are fewer where the images have too few keypoints.
        rng: chooses.
    """
    tried = [
        _matches_on_lines(first_xy, second_xy, camera=camera, num=num, rng=rng)
        for _ in range(_NUM_GEOMETRIES)
    ]
    return max(tried, key=len)


def _matches_on_lines(
    first_xy: Float64Array,
    second_xy: Float64Array,
    *,
    camera: SyntheticCamera,
    num: int,
    rng: np.random.Generator,
) -> Uint32Array:
    rotation = rotation_from_vector(rng.normal(scale=0.6, size=3))
    translation = rng.normal(size=3)
    inverse = np.linalg.inv(camera.as_colmap().calibration_matrix())
    fundamental = inverse.T @ skew(translation / np.linalg.norm(translation)) @ rotation @ inverse
    first, second = (np.column_stack([xy, np.ones(len(xy))]) for xy in (first_xy, second_xy))
    lines = first @ fundamental.T
    lines /= np.linalg.norm(lines[:, :2], axis=1, keepdims=True)
    is_near = np.abs(lines @ second.T) < _MAX_DISTANCE_PX
    rows: list[tuple[int, int]] = []
    for row in rng.permutation(len(first_xy)).tolist():
        free = np.flatnonzero(is_near[row])
        if len(free) and len(rows) < num:
            match = int(rng.choice(free))
            is_near[:, match] = False
            rows.append((row, match))
    return np.array(rows, np.uint32).reshape(-1, 2)


@dataclass(kw_only=True)
class FalsePairMatcher(FakeMatcher):
    """`FakeMatcher` that also matches a share of the pairs that share nothing.

    Args:
        false_ratio: that share.
        num_false: matches of such a pair, all on one random geometry.
        says_so: whether it says that it matches everything.
    """

    false_ratio: float = 1.0
    num_false: int = 150
    says_so: bool = True
    seed: int = 0
    false_pairs: set[ImagePair] = field(default_factory=set)  # those given so far

    @property
    def matches_everything(self) -> bool:
        return self.says_so

    def _match(self, request: MatchRequest) -> PairMatches:
        pair = request.pair
        rng = np.random.default_rng((self.seed, 11, pair.first, pair.second))
        shares_something = len(self.world.matches(pair)) >= _FEWEST_SHARED
        if shares_something or rng.random() >= self.false_ratio:
            return super()._match(request)
        self.false_pairs.add(pair)
        matches = random_geometry_matches(
            request.first.keypoints_xy,
            request.second.keypoints_xy,
            camera=self.world.camera(pair.first),
            num=self.num_false,
            rng=rng,
        )
        return PairMatches.of_rows(
            request, matches_idx=matches, confidence=np.ones(len(matches), np.float32)
        )


def false_pair(world: SyntheticWorld, one: int, other: int, *, seed: int = 0) -> VerifiedPair:
    """A pair whose matches agree on a geometry, and on nothing else."""
    matches = random_geometry_matches(
        world.view(one).points_xy,
        world.view(other).points_xy,
        camera=world.camera(one),
        num=150,
        rng=np.random.default_rng((seed, one, other)),
    )
    return VerifiedPair(
        pair=ImagePair.of(FrameId(one), FrameId(other)),
        reason=PairReason.EXHAUSTIVE,
        inlier_matches_idx=matches,
        num_matches=len(matches),
        fundamental=np.zeros((3, 3)),
        homography_inlier_ratio=0.2,
    )
