"""Separate maps: what cannot be joined to the map, but holds together.

A flight over two fields that nothing connects gives two maps, and not one with half of the frames
missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import networkx

from engine.mapping.maps.restarts import MapBuilder
from engine.mapping.model.sparse_map import SparseMap
from engine.matching.scene_graph import SceneGraph
from engine.types import FrameId

MIN_SEPARATE = 5  # keyframes of a map of its own
_MAX_SEPARATE_MAPS = 8


def build_separate_maps(
    builder: MapBuilder, graph: SceneGraph, finished: Sequence[SparseMap]
) -> list[SparseMap]:
    """Builds maps of the keyframes that no finished map holds, the fullest first.

    The first of those holds all cameras.
    """
    maps: list[SparseMap] = []
    held = {frame_id for one in finished for frame_id in one.registered_ids}
    waiting = _components(graph, set(graph.keyframe_ids) - held)
    while waiting and len(maps) < _MAX_SEPARATE_MAPS:
        component = waiting.pop(0)
        built = builder.separate(finished[0], component)
        if built is None or built.sparse_map.num_registered < MIN_SEPARATE:
            continue
        maps.append(built.sparse_map)
        waiting += _components(graph, component - set(built.sparse_map.registered_ids))
    return sorted(maps, key=lambda one: -one.num_registered)


def _components(graph: SceneGraph, frame_ids: set[FrameId]) -> list[set[FrameId]]:
    """Keyframes that verified pairs among them join, the largest component first."""
    joined: networkx.Graph[FrameId] = networkx.Graph()
    joined.add_edges_from(
        (edge.pair.first, edge.pair.second)
        for edge in graph.edges()
        if edge.pair.first in frame_ids and edge.pair.second in frame_ids
    )
    components = [set(component) for component in networkx.connected_components(joined)]
    large = [component for component in components if len(component) >= MIN_SEPARATE]
    return sorted(large, key=lambda component: (-len(component), min(component)))
