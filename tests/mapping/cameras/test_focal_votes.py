"""Most pairs agree by the right focal length, whatever pairs that are wrong say."""

from __future__ import annotations

import pycolmap
import pytest

from engine.config import AgreementConfig
from engine.mapping.cameras.focal_votes import FocalVotes
from engine.matching.pair_agreement import PairAgreement
from engine.matching.scene_graph import SceneGraph
from tests.support.false_pairs import false_pair
from tests.support.synthetic import SyntheticWorld, round_path, scene_graph

FAR = SyntheticWorld(round_path(24), density=1.0, noise_px=0.4)
RIGHT_PX = FAR.camera(1).params[0]


def graph_of(num: int, *, num_false: int = 0) -> SceneGraph:
    graph = scene_graph()
    for frame_id in range(1, num + 1):
        graph.add_keyframe(FAR.keyframe(frame_id))
        for other in range(max(1, frame_id - 2), frame_id):
            graph.record_pair(FAR.verified_pair(other, frame_id))
    apart = [(one, other) for one in range(1, num + 1) for other in range(one + 3, num + 1)]
    for one, other in apart[:num_false]:
        graph.record_pair(false_pair(FAR, one, other))
    return graph


def voted_px(graph: SceneGraph, *, assumed_ratio: float) -> float | None:
    assumed = FAR.camera(1).as_colmap()
    assumed.params = [assumed_ratio * RIGHT_PX, *assumed.params[1:]]

    def camera_of(calibration_key: str) -> pycolmap.Camera:
        return assumed

    agreement = PairAgreement(
        AgreementConfig(),
        graph=graph,
        camera_of=camera_of,
        matches_everything=True,
        seed=0,
    )
    return FocalVotes(graph=graph, agreement=agreement).focal_px("camera", camera_of)


@pytest.mark.slow
@pytest.mark.parametrize(("assumed_ratio", "num_false"), [(0.7, 4), (1.4, 0)])
def test_most_pairs_agree_near_the_right_focal_length(assumed_ratio: float, num_false: int) -> None:
    found = voted_px(graph_of(6, num_false=num_false), assumed_ratio=assumed_ratio)

    assert found == pytest.approx(RIGHT_PX, rel=0.12)


def test_few_pairs_have_no_vote() -> None:
    assert voted_px(graph_of(3), assumed_ratio=1.2) is None


@pytest.mark.slow
def test_pairs_without_triplets_have_no_vote() -> None:
    graph = scene_graph()
    for frame_id in range(1, 8):
        graph.add_keyframe(FAR.keyframe(frame_id))
        if frame_id > 1:
            graph.record_pair(false_pair(FAR, frame_id - 1, frame_id))

    assert voted_px(graph, assumed_ratio=1.2) is None
