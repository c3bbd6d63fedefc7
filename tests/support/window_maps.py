"""A scene graph and a map of one synthetic world, for tests of windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.mapping.model.bundle_adjustment import solve_globally
from engine.mapping.model.sparse_map import SparseMap
from engine.matching.scene_graph import SceneGraph
from engine.types import ImagePair
from tests.support.synthetic import (
    MIN_PAIR_MATCHES,
    SyntheticWorld,
    grow,
    map_of_keyframes,
    scene_graph,
)

MAX_GAP = 5


def graph_and_map(
    world: SyntheticWorld,
    *,
    registered: Sequence[int],
    skips: Callable[[ImagePair], bool] = lambda pair: False,
) -> tuple[SceneGraph, SparseMap]:
    """The same keyframes and pairs in both; the map holds the registered ones."""
    graph = scene_graph()
    sparse_map = map_of_keyframes(world, max_gap=MAX_GAP, skips=skips)
    for frame_id in world.frame_ids:
        graph.add_keyframe(world.keyframe(frame_id))
        for other in graph.keyframe_ids[:-1]:
            pair = ImagePair.of(other, frame_id)
            is_near = frame_id - other <= MAX_GAP and not skips(pair)
            if is_near and len(world.matches(pair)) >= MIN_PAIR_MATCHES:
                graph.record_pair(world.verified_pair(other, frame_id))
    if registered:
        grow(sparse_map, world, registered)
        solve_globally(
            sparse_map.reconstruction, constant_camera_ids={1}, max_iterations=20, num_threads=1
        )
        sparse_map.filter_all()
    for registered_id in sparse_map.registered_ids:
        graph.set_registered(registered_id, True)
    return graph, sparse_map


def new_map_like(world: SyntheticWorld, *, focal_factor: float = 1.0) -> SparseMap:
    """A map with all keyframes and pairs, none registered; the focal length wrong by a factor."""
    sparse_map = map_of_keyframes(world, max_gap=MAX_GAP, is_constant=False)
    focal_px, *others = sparse_map.camera("camera").params
    sparse_map.set_camera_params("camera", [focal_factor * focal_px, *others])
    return sparse_map
