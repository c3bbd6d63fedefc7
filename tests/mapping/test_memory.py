"""What keyframes keep in memory for as long as a run goes on."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.config import load_config
from engine.mapping.mapper import Mapper
from engine.matching.descriptor_store import DescriptorStore
from engine.matching.pair_matching import PairMatching
from engine.matching.place_recognition import PlaceRecognizer
from engine.matching.scene_graph import SceneGraph
from engine.types import Features, FrameId, Uint8Array, VerifiedPair
from tests.support.synthetic import FakeMatcher, SyntheticWorld, straight_path

NUM_KEYFRAMES = 8
_T = TypeVar("_T")


def all_of(kind: type[_T]) -> list[_T]:
    """The objects of a class that exist.

    By their type: `isinstance` asks everything for its ``__class__``, and some objects of other
    packages warn or raise when they are asked.
    """
    return [one for one in gc.get_objects() if type(one) is kind]


def num_bytes(arrays: Iterable[NDArray[Any]]) -> int:
    """Of arrays, those that share their memory once."""
    return sum(
        {id(one.base if one.base is not None else one): one.nbytes for one in arrays}.values()
    )


@pytest.mark.parametrize("max_bytes", [1, 10**9])
def test_a_map_keeps_each_table_and_each_pair_once_and_descriptors_up_to_a_limit(
    max_bytes: int,
) -> None:
    of_others = [*all_of(Features), *all_of(VerifiedPair)]  # that tests before this one left
    world = SyntheticWorld(straight_path(NUM_KEYFRAMES))  # no other test has its tables
    config = load_config((), ["window.enabled=false"])
    written: Mapping[FrameId, Uint8Array] = {
        FrameId(i): world.keyframe(i).features.descriptors for i in range(1, NUM_KEYFRAMES + 1)
    }
    graph = SceneGraph(config.scene_graph, recognizer=PlaceRecognizer(config.retrieval, seed=0))
    store = DescriptorStore(max_bytes=max_bytes, read=written.get)
    matching = PairMatching(
        graph,
        FakeMatcher(world=world),
        two_view=config.two_view,
        dense=config.dense_matching,
        coarse_to_fine=config.coarse_to_fine,
        descriptors=store,
    )
    mapper = Mapper(config, graph=graph, matching=matching, emit=lambda event: None)
    for number in range(1, NUM_KEYFRAMES + 1):
        mapper.begin_keyframe(world.keyframe(number))
        mapper.add_keyframe(matching.match_keyframe(FrameId(number)))
    assert mapper.figures().counts.num_registered == NUM_KEYFRAMES

    gc.collect()
    known = {id(one) for one in of_others}
    own = [one for one in all_of(Features) if one.frame_id in written and id(one) not in known]
    num_keypoints = sum(len(descriptors) for descriptors in written.values())
    descriptors = num_bytes(written.values())
    assert num_bytes(one.keypoints_xy for one in own) == 16 * num_keypoints
    assert num_bytes(one.colors for one in own) == 3 * num_keypoints
    assert num_bytes(one.scales for one in own) == 4 * num_keypoints
    assert num_bytes(one.descriptors for one in own) == (0 if max_bytes == 1 else descriptors)
    store.make_room()  # for the next one
    assert store.num_bytes == (0 if max_bytes == 1 else descriptors)

    edges = graph.all_edges()
    pairs = [one for one in all_of(VerifiedPair) if id(one) not in known]
    assert len(edges) > NUM_KEYFRAMES
    num_matches = sum(edge.num_inliers for edge in edges)
    assert num_bytes(one.inlier_matches_idx for one in pairs) == 8 * num_matches
    assert all(one.inlier_matches_idx.dtype == np.uint32 for one in pairs)
