"""A keyframe that the first matcher cannot match comes into the map by a second one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from engine.config import SecondMatcherConfig
from engine.events import PairVerified, WeakPairsMatched
from engine.geometry import grid_over_image
from engine.mapping.jobs import JobKind
from engine.matching.second_matching import SecondMatching
from engine.types import (
    NO_ROW,
    Frame,
    FrameId,
    ImagePair,
    Keyframe,
    MatchRequest,
    PairMatches,
    PairReason,
)
from tests.support.mapper_runs import WITHOUT_WINDOWS, MapperRun
from tests.support.synthetic import FakeMatcher, SyntheticWorld, scene_graph, straight_path

LOST = 7  # the keyframe whose pairs the first matcher does not find
NUM_KEYFRAMES = 12


class PointsOfTheWorld:
    """A second matcher that knows the world; it says where matches end, not at which keypoints."""

    def __init__(self, world: SyntheticWorld) -> None:
        self._world = world
        self.asked: list[ImagePair] = []

    @property
    def name(self) -> str:
        return "points"

    @property
    def peak_gpu_mb(self) -> float:
        return 0.0

    def keep(self, frame: Frame) -> None:
        pass

    def holds(self, frame_id: FrameId) -> bool:
        return True

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        self.asked += [one.pair for one in requests]
        return [self._match(one.pair) for one in requests]

    def _match(self, pair: ImagePair) -> PairMatches:
        rows = self._world.matches(pair)
        first, second = (self._world.keyframe(i).features for i in (pair.first, pair.second))
        return PairMatches(
            pair=pair,
            matches_idx=np.full(rows.shape, NO_ROW),
            points1_xy=first.keypoints_xy[rows[:, 0]],
            points2_xy=second.keypoints_xy[rows[:, 1]],
            confidence=np.ones(len(rows), np.float32),
        )


class Run:
    """A mapper with both matchers."""

    def __init__(self) -> None:
        self.world = SyntheticWorld(straight_path(NUM_KEYFRAMES), noise_px=0.3)
        self.second = PointsOfTheWorld(self.world)
        graph = scene_graph()
        self.run = MapperRun(
            WITHOUT_WINDOWS,
            matcher=FakeMatcher(
                world=self.world, dropped=lambda pair: LOST in (pair.first, pair.second)
            ),
            graph=graph,
            second=SecondMatching(
                SecondMatcherConfig(pairs_per_s=1000.0), graph=graph, matcher=self.second
            ),
        )

    def add(self, frame_id: int) -> None:
        self.run.add_keyframe(with_room(self.world.keyframe(frame_id)))


def with_room(keyframe: Keyframe) -> Keyframe:
    points_xy = grid_over_image((keyframe.width, keyframe.height), num=300)
    colors = np.zeros((len(points_xy), 3), np.uint8)
    features = keyframe.features.with_free_rows(points_xy, colors)
    return dataclasses.replace(keyframe, features=features)


def test_a_keyframe_that_the_first_matcher_cannot_match_gets_its_place() -> None:
    run = Run()
    for frame_id in range(1, NUM_KEYFRAMES + 1):
        run.add(frame_id)
    sparse_map = run.run.mapper._map
    assert sparse_map.is_registered(FrameId(LOST))
    assert sparse_map.num_registered == NUM_KEYFRAMES
    of_second = [one for one in run.run.emitted(PairVerified) if one.reason is PairReason.SECOND]
    assert of_second
    assert all(LOST in (one.first, one.second) for one in of_second)
    matched = run.run.emitted(WeakPairsMatched)
    assert sum(one.num_pairs for one in matched) == len(run.second.asked)
    assert len(run.second.asked) == len(set(run.second.asked))


def test_the_last_keyframe_gets_its_place_after_the_last_frame() -> None:
    run = Run()
    for frame_id in range(1, LOST + 1):
        run.add(frame_id)
    mapper = run.run.mapper
    assert not mapper._map.is_registered(FrameId(LOST))
    finished = [run.run.run_job(job) for job in run.run._running.copy().values()]
    while (step := mapper.match_last(finished)).jobs:
        finished = [run.run.run_job(job) for job in step.jobs]
    assert mapper._map.is_registered(FrameId(LOST))


def test_a_map_that_is_built_anew_waits_for_no_matches_that_nobody_brings() -> None:
    run = Run()
    for frame_id in range(1, LOST + 1):
        run.add(frame_id)
    assert any(job.kind is JobKind.SECOND_MATCHING for job in run.run.jobs)
    run.run.mapper.rebuild()
    run.run._running.clear()
    run.run.due = ()
    num_jobs = len(run.run.jobs)
    run.add(LOST + 1)
    assert [job.kind for job in run.run.jobs[num_jobs:]] == [JobKind.SECOND_MATCHING]
