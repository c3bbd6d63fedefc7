"""Each frame's pose is emitted once, and a keyframe's again when another map has it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engine.events import Event, FramePosed
from engine.geometry import camera_center
from engine.mapping import pose_reports
from engine.mapping.pose_reports import PoseReports
from engine.types import FrameId, FramePose
from tests.support.synthetic import SyntheticWorld, grow, map_of_keyframes, straight_path

WORLD = SyntheticWorld(straight_path(5))
TRACKED = FrameId(4)
KEYFRAMES = [FrameId(i) for i in (1, 2, 3, 5)]


class Reports:
    """Reports of poses over a map of the first three frames."""

    def __init__(self) -> None:
        self.posed: list[FramePosed] = []
        self.reports = PoseReports(emit=self._emit)
        for frame_id in KEYFRAMES:
            self.reports.add_keyframe(WORLD.keyframe(frame_id))
        self.sparse_map = map_of_keyframes(WORLD)
        grow(self.sparse_map, WORLD, KEYFRAMES[:3])

    def report(self, *, map_number: int = 0) -> list[int]:
        """Reports the map's keyframes; returns those emitted."""
        before = len(self.posed)
        self.reports.report_keyframes(
            self.sparse_map, map_number=map_number, world_number=map_number
        )
        return [event.frame_id for event in self.posed[before:]]

    def report_tracked(self) -> None:
        pose = FramePose(
            frame_id=TRACKED,
            index=TRACKED - 1,
            captured_at_s=0.1,
            cam_from_world=WORLD.pose(TRACKED),
            is_keyframe=False,
        )
        tracked = WORLD.tracked(TRACKED, keyframe_id=KEYFRAMES[2])
        self.reports.report_tracked([(tracked, pose)], map_number=2, world_number=2)

    def _emit(self, event: Event) -> None:
        assert isinstance(event, FramePosed)
        self.posed.append(event)


def test_keyframes_are_reported_when_they_are_new_in_a_map() -> None:
    one = Reports()
    assert one.report() == KEYFRAMES[:3]
    assert one.report() == []
    assert [pose.frame_id for pose in one.reports.take_new()] == KEYFRAMES[:3]
    assert one.reports.take_new() == ()
    assert one.reports.num_keyframes == len(KEYFRAMES)


def test_keyframes_that_another_map_has_are_reported_again_but_not_as_new() -> None:
    one = Reports()
    one.report()
    one.reports.take_new()
    assert one.report(map_number=1) == KEYFRAMES[:3]
    assert one.reports.take_new() == ()
    assert [event.is_first for event in one.posed] == [True] * 3 + [False] * 3
    assert [event.map_number for event in one.posed] == [0] * 3 + [1] * 3


def test_a_frame_between_keyframes_is_reported_once_with_its_camera_and_map() -> None:
    one = Reports()
    one.report_tracked()
    one.report_tracked()
    (event,) = one.posed
    assert event.camera_key == WORLD.keyframe(KEYFRAMES[0]).camera_key
    assert event.map_number == 2
    assert event.cam_center_in_world == pytest.approx(camera_center(WORLD.pose(TRACKED)))
    assert np.linalg.norm(event.world_from_cam_quat_xyzw) == pytest.approx(1.0)
    assert [pose.map_number for pose in one.reports.take_new()] == [2]


def test_cameras_that_gave_no_frame_lately_are_not_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pose_reports, "_NUM_RECENT", 3)
    reports = PoseReports(emit=lambda _: None)
    first, second, *_ = KEYFRAMES
    for frame_id, camera_key in ((first, "one"), (second, "other")):
        keyframe = dataclasses.replace(WORLD.keyframe(frame_id), camera_key=camera_key)
        reports.add_keyframe(keyframe)
    assert set(reports.latest_keyframes) == {("one", first), ("other", second)}
    of_first, of_second = (WORLD.tracked(TRACKED, keyframe_id=i) for i in (first, second))
    for _ in range(2):  # it stands still: no keyframe, but frames
        reports.add_frame(of_first)
    assert set(reports.latest_keyframes) == {("one", first), ("other", second)}
    reports.add_frame(of_first)
    assert reports.latest_keyframes == [("one", first)]
    reports.add_frame(of_second)
    assert reports.latest_keyframes == [("other", second), ("one", first)]


def test_no_frame_is_tracked_from_a_photo() -> None:
    reports = PoseReports(emit=lambda _: None)
    reports.add_keyframe(dataclasses.replace(WORLD.keyframe(KEYFRAMES[0]), is_photo=True))
    assert reports.latest_keyframes == []


def test_only_some_cameras_are_in_use_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pose_reports, "MAX_POSED_CAMERAS", 2)
    reports = PoseReports(emit=lambda _: None)
    for frame_id in KEYFRAMES:
        keyframe = dataclasses.replace(WORLD.keyframe(frame_id), camera_key=f"camera {frame_id}")
        reports.add_keyframe(keyframe)
    assert [frame_id for _, frame_id in reports.latest_keyframes] == KEYFRAMES[:1:-1]
