"""What is emitted of keyframes that come, fail, or have nothing to match."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.events import Event, FrameRegistered, KeyframeAdded, RegistrationFailed, Warned
from engine.mapping.keyframe_reports import KeyframeReports
from engine.mapping.model.sparse_map import Registration
from engine.types import FrameId, Keyframe, RegistrationStatus
from tests.support.synthetic import SyntheticWorld, grown_map, straight_path

WORLD = SyntheticWorld(straight_path(3))


def blank(frame_id: int) -> Keyframe:
    keyframe = WORLD.keyframe(1)
    nothing = replace(keyframe.features.take(np.empty(0, np.int64)), frame_id=FrameId(frame_id))
    return replace(keyframe, frame_id=FrameId(frame_id), name=f"{frame_id}.jpg", features=nothing)


def reporting() -> tuple[KeyframeReports, list[Event]]:
    """Reports, and the events that they emit."""
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)

    return KeyframeReports(emit=emit), events


@pytest.mark.parametrize(("num", "last"), [(1, None), (3, "3.jpg)"), (5, "3.jpg, ...)")])
def test_keyframes_without_keypoints_are_warned_of_once_and_at_the_end(
    num: int, last: str | None
) -> None:
    reports, events = reporting()
    for number in range(1, num + 1):
        reports.report_added(blank(number))
    reports.report_blank()
    assert sum(isinstance(event, KeyframeAdded) for event in events) == num
    first, *more = [event.message for event in events if isinstance(event, Warned)]
    assert first.startswith("1.jpg: nothing to match")
    assert len(more) == (0 if last is None else 1)
    assert all(f"{num} keyframes (1.jpg" in one and str(last) in one for one in more)


def test_a_registration_is_reported_with_the_map_and_a_failure_with_its_reason() -> None:
    reports, events = reporting()
    sparse_map = grown_map(WORLD)
    for status in (RegistrationStatus.REGISTERED, RegistrationStatus.TOO_FEW_INLIERS):
        registration = Registration(status=status, num_inliers=20, num_correspondences=50)
        reports.report_registration(
            FrameId(3), registration, sparse_map=sparse_map, started_s=0.0, is_retry=True
        )
    registered, failed = events
    assert isinstance(registered, FrameRegistered)
    assert registered.num_registered == sparse_map.num_registered
    assert registered.num_points3D == sparse_map.num_points3D
    assert registered.is_retry
    assert isinstance(failed, RegistrationFailed)
    assert failed.status is RegistrationStatus.TOO_FEW_INLIERS
