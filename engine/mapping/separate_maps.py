"""Separate maps: what cannot be joined to the map, but holds together.

A flight over two fields that nothing connects gives two maps, and not one with half of the frames
missing.
"""

from __future__ import annotations

import networkx

from engine.mapping.restarts import MapBuilder
from engine.mapping.sparse_map import SparseMap
from engine.matching.scene_graph import SceneGraph
from engine.types import FrameId

_MIN_SEPARATE = 5  # keyframes of a map of its own
_MAX_SEPARATE_MAPS = 8


def build_separate_maps(
    builder: MapBuilder, graph: SceneGraph, sparse_map: SparseMap
) -> list[SparseMap]:
    """Builds maps of the keyframes that a finished map does not hold, the fullest first."""
    maps: list[SparseMap] = []
    waiting = _components(graph, {i for i in graph.keyframe_ids if not sparse_map.is_registered(i)})
    while waiting and len(maps) < _MAX_SEPARATE_MAPS:
        component = waiting.pop(0)
        built = builder.separate(sparse_map, component)
        if built is None or built.sparse_map.num_registered < _MIN_SEPARATE:
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
    large = [component for component in components if len(component) >= _MIN_SEPARATE]
    return sorted(large, key=lambda component: (-len(component), min(component)))
