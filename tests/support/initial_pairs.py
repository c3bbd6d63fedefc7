"""Pairs of a synthetic world that a map may start from."""

from __future__ import annotations

from engine.config import InitializationConfig
from engine.mapping.model.initialization import InitialPair, rank_initial_pairs
from engine.mapping.model.sparse_map import SparseMap
from engine.types import VerifiedPair
from tests.support.synthetic import SyntheticWorld, map_of_keyframes

INITIALIZATION = InitializationConfig(min_inliers=60, min_triangulation_angle_deg=6.0)
SEED = 0


def pairs_of(sparse_map: SparseMap) -> list[VerifiedPair]:
    """All verified pairs of a map, each once."""
    return [
        pair
        for frame_id in sparse_map.keyframe_ids
        for other, pair in sparse_map.neighbors(frame_id).items()
        if other < frame_id
    ]


def initial_pair(world: SyntheticWorld, first: int, second: int) -> InitialPair:
    """A pair as ranked in a world where it is the only one."""
    sparse_map = map_of_keyframes(world, frame_ids=[first, second])
    (initial,) = rank_initial_pairs(
        sparse_map, pairs_of(sparse_map), config=INITIALIZATION, seed=SEED
    )
    return initial
