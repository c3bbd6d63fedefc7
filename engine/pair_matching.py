"""From chosen pairs to verified ones: a keyframe's place in the scene graph."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import TwoViewConfig
from engine.estimators import verify_pair
from engine.ports import PairMatcher
from engine.scene_graph import SceneGraph
from engine.types import FrameId, PairCandidate, VerifiedPair


def match_keyframe(
    frame_id: FrameId, *, graph: SceneGraph, matcher: PairMatcher, config: TwoViewConfig
) -> list[VerifiedPair]:
    """Matches a new keyframe against the keyframes its graph chooses, and around those that fit.

    Every pair tried is recorded in the graph, so none is tried twice.

    Raises:
        InferenceError: the matcher failed.
    """
    verified = match_pairs(
        graph.choose_pairs(frame_id), graph=graph, matcher=matcher, config=config
    )
    expanded = graph.expand_pairs(frame_id, verified)
    return verified + match_pairs(expanded, graph=graph, matcher=matcher, config=config)


def match_pairs(
    candidates: Sequence[PairCandidate],
    *,
    graph: SceneGraph,
    matcher: PairMatcher,
    config: TwoViewConfig,
) -> list[VerifiedPair]:
    """Matches and verifies candidates; returns those that hold, in order.

    Raises:
        InferenceError: the matcher failed.
    """
    keyframes = [
        (graph.keyframe(candidate.pair.first), graph.keyframe(candidate.pair.second))
        for candidate in candidates
    ]
    matched = matcher.match(
        [
            (candidate.pair, first.features, second.features)
            for candidate, (first, second) in zip(candidates, keyframes, strict=True)
        ]
    )
    held = []
    for candidate, (first, second), matches in zip(candidates, keyframes, matched, strict=True):
        rows1, rows2 = matches.matches_idx.T
        verified = verify_pair(
            matches,
            first.features.keypoints_xy[rows1],
            second.features.keypoints_xy[rows2],
            reason=candidate.reason,
            image_size=(max(first.width, second.width), max(first.height, second.height)),
            config=config,
        )
        if verified is None:
            graph.record_tried(candidate.pair)
        else:
            graph.record_pair(verified)
            held.append(verified)
    return held
