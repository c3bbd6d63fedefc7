"""Maps of matchers that match everything: as right as without the pairs that share nothing."""

from __future__ import annotations

import functools

import pytest

from engine.config import AgreementConfig
from engine.events import LoopClosed, Warned
from engine.types import FrameId
from tests.support.false_pairs import FalsePairMatcher
from tests.support.mapper_runs import WITHOUT_WINDOWS, MapperRun
from tests.support.synthetic import (
    DENSITY,
    SyntheticWorld,
    pose_errors,
    poses_of,
    round_path,
    scene_graph,
)

# Photos around a place: each shares something with two neighbours on either side.
PHOTOS = SyntheticWorld(round_path(16, radius=14.0), noise_px=0.3, density=2.0 * DENSITY)


@functools.cache
def run(mode: str, *, says_so: bool, false_ratio: float) -> tuple[MapperRun, FalsePairMatcher]:
    """All photos mapped, with false pairs among them."""
    matcher = FalsePairMatcher(
        world=PHOTOS, false_ratio=false_ratio, num_false=150, says_so=says_so
    )
    config = WITHOUT_WINDOWS.model_copy(
        update={"agreement": AgreementConfig(mode=mode)}  # type: ignore[arg-type]
    )
    mapped = MapperRun(config, matcher=matcher, graph=scene_graph())
    for frame_id in PHOTOS.frame_ids:
        mapped.add_keyframe(PHOTOS.keyframe(frame_id))
    mapped.end()
    return mapped, matcher


def is_whole_and_right(mapped: MapperRun) -> bool:
    poses = poses_of(mapped.sparse_map)
    return len(poses) == len(PHOTOS.frame_ids) and pose_errors(poses, PHOTOS).max_ratio < 0.005


@pytest.mark.slow
@pytest.mark.parametrize("false_ratio", [0.3, 1.0])
def test_false_pairs_spoil_a_map_that_uses_them(false_ratio: float) -> None:
    mapped, matcher = run("off", says_so=True, false_ratio=false_ratio)

    assert len(matcher.false_pairs) >= 20
    assert not is_whole_and_right(mapped)


@pytest.mark.slow
@pytest.mark.parametrize("false_ratio", [0.0, 0.3, 1.0])
def test_a_map_of_agreed_pairs_is_whole_and_right(false_ratio: float) -> None:
    mapped, matcher = run("auto", says_so=True, false_ratio=false_ratio)

    assert is_whole_and_right(mapped)
    used = {
        pair
        for pair in matcher.false_pairs
        if pair.second in mapped.sparse_map.neighbors(pair.first)
    }
    assert not used


@pytest.mark.slow
def test_false_pairs_close_no_loops() -> None:
    mapped, matcher = run("auto", says_so=True, false_ratio=1.0)

    loops = {(loop.first, loop.second) for loop in mapped.emitted(LoopClosed)}
    assert loops  # the ring is closed
    assert not loops & {(pair.first, pair.second) for pair in matcher.false_pairs}


@pytest.mark.slow
def test_pairs_that_are_held_back_are_journalled_and_shown() -> None:
    mapped, matcher = run("auto", says_so=True, false_ratio=1.0)
    verified = {one.pair for one in mapped.graph.all_edges()}
    journalled = {one.pair for record in mapped.records for one in record.pairs}
    edges = mapped.mapper.view().edges

    assert verified & matcher.false_pairs
    assert journalled == verified
    assert {(FrameId(a), FrameId(b)) for a, b in edges.tolist()} == {
        (pair.first, pair.second) for pair in verified
    }


@pytest.mark.slow
def test_a_matcher_that_matches_what_belongs_together_may_use_all_its_pairs() -> None:
    mapped, _ = run("auto", says_so=False, false_ratio=0.0)

    assert not any("third view confirms" in one.message for one in mapped.emitted(Warned))
    assert is_whole_and_right(mapped)
    assert len(mapped.graph.edges()) == len(mapped.graph.all_edges())
