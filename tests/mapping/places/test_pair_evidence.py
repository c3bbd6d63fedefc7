"""A run shows by itself that many of its pairs are wrong."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import AgreementConfig
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.places.pair_evidence import PairEvidence
from engine.matching.pair_agreement import PairAgreement
from engine.types import FrameId, VerifiedPair
from tests.support.false_pairs import false_pair
from tests.support.synthetic import (
    DENSITY,
    SyntheticWorld,
    add_unused_pair,
    grown_map,
    poses_of,
    round_path,
    scene_graph,
)

WORLD = SyntheticWorld(round_path(16), noise_px=0.4, density=3.0 * DENSITY)
APART = [(1, 8), (2, 9), (3, 10), (4, 11)]


def evidence_of(
    more: Sequence[VerifiedPair], *, mode: str = "auto", says_so: bool = False
) -> tuple[PairEvidence, SparseMap]:
    """A map of the first keyframes, and pairs of which it has made no use."""
    sparse_map = grown_map(WORLD, frame_ids=range(1, 12), max_gap=2)
    graph = scene_graph()
    for frame_id in sparse_map.keyframe_ids:
        graph.add_keyframe(sparse_map.keyframe(frame_id))
        for other, verified in sparse_map.neighbors(frame_id).items():
            if other < frame_id:
                graph.record_pair(verified)
    for verified in more:
        add_unused_pair(sparse_map, verified)
        graph.record_pair(verified)
    agreement = PairAgreement(
        AgreementConfig(mode=mode),  # type: ignore[arg-type]
        graph=graph,
        camera_of=sparse_map.camera,
        matches_everything=says_so,
        seed=0,
    )
    return PairEvidence(agreement), sparse_map


def false_pairs(num: int) -> list[VerifiedPair]:
    return [false_pair(WORLD, one, other) for one, other in APART[:num]]


def test_pairs_that_contradict_the_map_and_nothing_confirms_show_it() -> None:
    assert all(one.num_inliers >= 40 for one in false_pairs(4))
    evidence, sparse_map = evidence_of(false_pairs(4))

    assert evidence.examine(sparse_map)
    assert evidence.num_wrong == 4


def test_a_map_whose_pairs_agree_with_it_shows_nothing() -> None:
    evidence, sparse_map = evidence_of([])

    assert not evidence.examine(sparse_map)
    assert evidence.num_wrong == 0


def test_a_few_wrong_pairs_are_repeated_structure() -> None:
    evidence, sparse_map = evidence_of(false_pairs(2))

    assert not evidence.examine(sparse_map)
    assert evidence.num_wrong == 2


def test_pairs_count_against_the_present_map_only() -> None:
    evidence, sparse_map = evidence_of(false_pairs(4))
    poses = poses_of(sparse_map)
    sparse_map.deregister([FrameId(10), FrameId(11)])
    assert not evidence.examine(sparse_map)
    assert evidence.num_wrong == 2
    sparse_map.deregister([FrameId(8), FrameId(9)])
    sparse_map.place({i: poses[i] for i in (FrameId(10), FrameId(11))})

    assert not evidence.examine(sparse_map)
    assert evidence.num_wrong == 2


def test_nothing_is_examined_where_agreement_is_off_or_required_anyway() -> None:
    for mode, says_so in (("off", False), ("auto", True)):
        evidence, sparse_map = evidence_of(false_pairs(4), mode=mode, says_so=says_so)

        assert not evidence.examine(sparse_map)
