"""A second matcher that breaks or hangs costs its own pairs, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from engine.errors import InferenceError
from engine.events import RunPart
from engine.run.guarded import GuardedSecond
from engine.types import Features, Frame, FrameId, ImagePair, MatchRequest, PairMatches
from tests.support.faults import FaultsSeen, Hanging, guard_of
from tests.support.textured_images import frame_of


def features(frame_id: int) -> Features:
    return Features(
        frame_id=FrameId(frame_id),
        keypoints_xy=np.zeros((3, 2)),
        descriptors=np.zeros((3, 0), np.uint8),
        scales=np.ones(3, np.float32),
        colors=np.zeros((3, 3), np.uint8),
    )


def request(first: int, second: int) -> MatchRequest:
    return MatchRequest(
        pair=ImagePair(FrameId(first), FrameId(second)),
        first=features(first),
        second=features(second),
        query_rows1=np.arange(3),
        query_rows2=np.arange(3),
    )


class Second:
    """Finds three matches in every pair, unless it breaks."""

    def __init__(self, breaks: Callable[[ImagePair], None] = lambda pair: None) -> None:
        self._breaks = breaks
        self.batches: list[int] = []

    @property
    def name(self) -> str:
        return "second"

    @property
    def peak_gpu_mb(self) -> float:
        return 5.0

    def keep(self, frame: Frame) -> None:
        if frame.frame_id == 13:
            raise ValueError("it cannot be packed")

    def holds(self, frame_id: FrameId) -> bool:
        return True

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        self.batches.append(len(requests))
        rows = np.column_stack([np.arange(3)] * 2)
        for one in requests:
            self._breaks(one.pair)
        return [
            PairMatches.of_rows(one, matches_idx=rows, confidence=np.ones(3, np.float32))
            for one in requests
        ]


def guarded(second: Second, hanging: Hanging | None = None) -> tuple[GuardedSecond, FaultsSeen]:
    faults = FaultsSeen()
    guard = guard_of(RunPart.SECOND_MATCHING, hanging=hanging)  # two may hang
    return GuardedSecond(second, guard=guard, faults=faults), faults


@pytest.mark.parametrize("error", [InferenceError("no room"), RuntimeError("a bug")])
def test_a_pair_that_cannot_be_matched_has_no_matches_and_others_have_theirs(
    error: Exception,
) -> None:
    def breaks(pair: ImagePair) -> None:
        if pair.second == 3:
            raise error

    second = Second(breaks)
    matcher, faults = guarded(second)
    matched = matcher.match([request(1, 2), request(1, 3), request(2, 4)])
    assert [len(one) for one in matched] == [3, 0, 3]
    assert second.batches == [1, 1, 1]  # a card with little memory has room for one
    (fault,) = faults.seen
    assert (fault.part, fault.frame_id) == (RunPart.SECOND_MATCHING, 3)
    assert faults.ends == []


def test_a_matcher_that_hangs_is_asked_no_more_and_the_run_goes_on() -> None:
    hanging = Hanging()
    try:
        matcher, faults = guarded(Second(lambda pair: hanging.hang()), hanging)
        assert matcher.holds(FrameId(1))
        matched = matcher.match([request(1, 2), request(1, 3), request(2, 3)])
        assert [len(one) for one in matched] == [0, 0, 0]
        assert not matcher.holds(FrameId(1))
        assert len(faults.seen) == 2  # the third one is not asked
        assert faults.ends == []
    finally:
        hanging.release()


def test_an_image_that_cannot_be_kept_costs_no_keyframe() -> None:
    matcher, faults = guarded(Second())
    pixels = np.zeros((8, 8, 3), np.uint8)
    matcher.keep(frame_of(pixels, frame_id=12))
    matcher.keep(frame_of(pixels, frame_id=13))
    (fault,) = faults.seen
    assert "000013.jpg" in fault.consequence
    assert matcher.peak_gpu_mb == 5.0
