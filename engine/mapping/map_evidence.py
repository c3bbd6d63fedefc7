"""What a map's verdict rests on: how much of its keyframes, pairs and points speaks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.mapping.sparse_map import SparseMap
from engine.matching.scene_graph import SceneGraph
from engine.types import FrameId


@dataclass(frozen=True, slots=True, kw_only=True)
class MapEvidence:
    """What is known of a map, and of what stands beside it."""

    num_registered: int
    unplaced_ids: tuple[FrameId, ...]  # keyframes in no map
    separate_sizes: tuple[int, ...]  # keyframes of each map beside this one


def gather(
    sparse_map: SparseMap, graph: SceneGraph, separate_maps: Sequence[SparseMap] = ()
) -> MapEvidence:
    """Collects the evidence about a map."""
    placed = set(sparse_map.registered_ids).union(*(one.registered_ids for one in separate_maps))
    return MapEvidence(
        num_registered=sparse_map.num_registered,
        unplaced_ids=tuple(i for i in graph.keyframe_ids if i not in placed),
        separate_sizes=tuple(one.num_registered for one in separate_maps),
    )
