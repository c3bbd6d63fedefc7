"""What the person with the phone sees: events in, advice out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from adapters.phone.feedback import (
    LOST_AFTER_S,
    Advice,
    ArrivedPicture,
    DecodedPicture,
    PhoneState,
    RunFeedback,
)
from adapters.phone.motion_blur import MotionBlur
from engine.events import (
    BundleAdjusted,
    CommandTaken,
    FrameDropped,
    FramePosed,
    FrameReceived,
    FrameRegistered,
    Georeferenced,
    KeyframeAdded,
    MainMapChanged,
    MapInitialized,
    RegistrationFailed,
    RunFinished,
    RunStarted,
    VerdictChanged,
)
from engine.types import (
    DropReason,
    FrameId,
    RegistrationStatus,
    RunCommand,
    Verdict,
    VerdictLevel,
)
from tests.support.verdicts import verdict_of

PERIOD_S = 0.1
SHARP = MotionBlur(sharpness=500.0, shift_ratio=0.01)
BLURRED = MotionBlur(sharpness=60.0, shift_ratio=0.01)
FAST = MotionBlur(sharpness=500.0, shift_ratio=0.2)
STRAIGHT = (0.0, 0.0, 0.0, 1.0)


class Story:
    """A run event by event; every frame takes a period."""

    def __init__(self) -> None:
        self.feedback = RunFeedback(source="phone")
        self.at_s = 0.0
        self.last_id = 0
        self.feedback.take(RunStarted(at_s=0.0, sources=("phone",), matcher="sift"))

    def arrived(self, index: int, *, phone: int = 1) -> None:
        self.feedback.add_arrived(ArrivedPicture(index=index, phone=phone))

    def frame(self, *, phone: int = 1, blur: MotionBlur | None = SHARP, **options: Any) -> FrameId:
        self.last_id += 1
        self.at_s += PERIOD_S
        frame_id = FrameId(self.last_id)
        up = options.get("up")
        self.arrived(self.last_id, phone=phone)
        self.feedback.add_decoded(
            DecodedPicture(
                index=self.last_id, phone=phone, frame_id=frame_id, blur=blur, up_in_camera=up
            )
        )
        self.feedback.take(
            FrameReceived(
                at_s=self.at_s, frame_id=frame_id, index=self.last_id, captured_at_s=self.at_s
            )
        )
        return frame_id

    def posed(self, frame_id: FrameId, *, latency_s: float = 0.05, **options: Any) -> None:
        x = float(frame_id)
        self.feedback.take(
            FramePosed(
                camera_key="camera",
                at_s=self.at_s,
                frame_id=frame_id,
                captured_at_s=self.at_s,
                cam_center_in_world=(x, 0.0, 0.0),
                world_from_cam_quat_xyzw=options.get("quat_xyzw", STRAIGHT),
                is_keyframe=False,
                is_first=True,
                latency_s=latency_s,
            )
        )

    def posed_frames(self, num: int, *, phone: int = 1, **options: Any) -> None:
        for _ in range(num):
            self.posed(self.frame(phone=phone, blur=options.get("blur", SHARP)), **options)

    def keyframe(self, frame_id: FrameId) -> None:
        self.feedback.take(
            KeyframeAdded(
                camera_key="camera",
                at_s=self.at_s,
                frame_id=frame_id,
                index=0,
                is_photo=False,
                name="k",
                captured_at_s=0.0,
                num_keypoints=9,
            )
        )

    def map_begins(self) -> None:
        first, second = FrameId(1), FrameId(2)
        self.feedback.take(
            MapInitialized(at_s=self.at_s, first=first, second=second, num_points3D=500, attempt=1)
        )

    def registered(self, frame_id: FrameId, *, num_inliers: int = 200) -> None:
        self.feedback.take(
            FrameRegistered(
                at_s=self.at_s,
                frame_id=frame_id,
                num_inliers=num_inliers,
                num_correspondences=300,
                num_registered=17,
                num_points3D=2345,
                is_retry=False,
                elapsed_s=0.1,
            )
        )

    def failed(self, frame_id: FrameId) -> None:
        self.feedback.take(
            RegistrationFailed(
                at_s=self.at_s,
                frame_id=frame_id,
                status=RegistrationStatus.TOO_FEW_INLIERS,
                num_inliers=3,
                num_correspondences=40,
            )
        )

    def dropped(self, *, index: int, source: str = "phone") -> None:
        self.feedback.take(
            FrameDropped(
                at_s=self.at_s,
                frame_id=None,
                source=source,
                index=index,
                name="f",
                captured_at_s=self.at_s,
                reason=DropReason.OVERLOAD,
                detail="",
            )
        )

    def command(self, command: RunCommand) -> None:
        self.feedback.take(CommandTaken(at_s=self.at_s, command=command))

    def state(self, phone: int = 1) -> PhoneState:
        return self.feedback.state_of(phone)

    def advice(self) -> Advice:
        return self.state().advice


@pytest.fixture
def mapping() -> Story:
    """A run that goes well."""
    story = Story()
    for _ in range(2):
        story.keyframe(story.frame())
    story.map_begins()
    story.posed_frames(20)
    return story


def test_before_the_first_picture_the_phone_waits() -> None:
    assert Story().advice() is Advice.WAITING


def test_until_there_is_a_keyframe_the_person_holds_still_then_moves_sideways() -> None:
    story = Story()
    frame_id = story.frame()
    assert story.advice() is Advice.HOLD_STILL
    story.keyframe(frame_id)
    assert story.advice() is Advice.BEGIN
    for _ in range(100):
        story.frame()
    assert story.advice() is Advice.BEGIN


def test_frames_with_poses_are_mapping(mapping: Story) -> None:
    state = mapping.state()
    assert state.advice is Advice.MAPPING
    assert (state.num_frames, state.num_keyframes, state.num_points3D) == (22, 2, 500)
    assert state.position_in_world == (22.0, 0.0, 0.0)
    assert state.lost_at_in_world is None


def test_counters_follow_the_map(mapping: Story) -> None:
    mapping.registered(FrameId(2))
    assert (mapping.state().num_registered, mapping.state().num_points3D) == (17, 2345)
    adjusted = BundleAdjusted(
        at_s=1.0,
        num_keyframes=17,
        num_points3D=2300,
        reprojection_error_before_px=1.0,
        reprojection_error_after_px=0.5,
        keyframes_added_meanwhile=0,
        elapsed_s=0.2,
    )
    before = mapping.feedback.version
    mapping.feedback.take(adjusted)
    assert mapping.state().num_points3D == 2300
    assert mapping.feedback.version > before


# -- lost -----------------------------------------------------------------------------------------


def test_frames_without_poses_are_lost_where_the_last_pose_was(mapping: Story) -> None:
    last = mapping.last_id
    for _ in range(int(LOST_AFTER_S / PERIOD_S)):
        mapping.frame()
        assert mapping.advice() is Advice.MAPPING
    for _ in range(2):
        mapping.frame()
    state = mapping.state()
    assert state.advice is Advice.LOST
    assert state.lost_at_in_world == (float(last), 0.0, 0.0)


def test_a_pose_ends_the_loss(mapping: Story) -> None:
    for _ in range(40):
        mapping.frame()
    assert mapping.advice() is Advice.LOST
    mapping.posed_frames(1)
    assert mapping.advice() is Advice.MAPPING
    assert mapping.state().lost_at_in_world is None


def test_late_poses_of_old_frames_do_not_end_the_loss(mapping: Story) -> None:
    missed = [mapping.frame() for _ in range(40)]
    mapping.posed(missed[2])
    assert mapping.advice() is Advice.LOST
    mapping.posed(missed[1])
    assert mapping.state().lost_at_in_world == (float(missed[2]), 0.0, 0.0)


def test_a_phone_that_sends_nothing_is_not_lost(mapping: Story) -> None:
    mapping.at_s += 60.0  # the person paused
    mapping.frame()
    assert mapping.advice() is Advice.MAPPING
    mapping.posed_frames(3)
    assert mapping.advice() is Advice.MAPPING


def test_an_engine_that_takes_its_time_loses_nobody_sooner() -> None:
    story = Story()
    story.keyframe(story.frame())
    story.map_begins()
    story.posed_frames(20, latency_s=1.4)
    for _ in range(30):
        story.frame()
    assert story.advice() is not Advice.LOST
    for _ in range(10):
        story.frame()
    assert story.advice() is Advice.LOST


def test_who_was_never_on_the_map_is_asked_to_join_it(mapping: Story) -> None:
    for _ in range(30):
        mapping.frame(phone=2)
    assert mapping.state(phone=2).advice is Advice.JOIN
    assert mapping.state(phone=2).lost_at_in_world is None


def test_one_lost_phone_leaves_the_other_alone(mapping: Story) -> None:
    mapping.posed_frames(5, phone=2)
    for _ in range(30):
        mapping.frame(phone=1)
        mapping.posed_frames(1, phone=2)
    assert mapping.state(phone=1).advice is Advice.LOST
    assert mapping.state(phone=2).advice is Advice.MAPPING
    assert mapping.state(phone=2).num_frames == 35


def test_a_new_frame_of_reference_voids_the_places(mapping: Story) -> None:
    mapping.feedback.take(
        Georeferenced(
            at_s=mapping.at_s,
            origin_latitude_deg=47.0,
            origin_longitude_deg=8.0,
            origin_altitude_m=400.0,
            metres_per_map_unit=2.0,
            num_fixes=9,
            rmse_m=0.4,
            rejected_ids=(),
        )
    )
    assert mapping.state().position_in_world is None


# -- slower ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blur", "word"), [(BLURRED, "blurred"), (FAST, "quickly")])
def test_pictures_that_suffer_ask_for_less_speed(
    mapping: Story, blur: MotionBlur, word: str
) -> None:
    mapping.posed_frames(1, blur=blur)
    assert mapping.advice() is Advice.MAPPING, "one picture may be bad"
    mapping.posed_frames(4, blur=blur)
    assert mapping.advice() is Advice.SLOWER
    assert word in mapping.state().hint
    mapping.posed_frames(6, blur=SHARP)
    assert mapping.advice() is Advice.MAPPING


def test_a_scene_that_was_never_sharp_is_not_called_blurred() -> None:
    story = Story()
    story.keyframe(story.frame(blur=BLURRED))
    story.map_begins()
    story.posed_frames(40, blur=BLURRED)
    assert story.advice() is Advice.MAPPING


def test_motion_that_is_unknown_is_no_reason(mapping: Story) -> None:
    mapping.posed_frames(10, blur=MotionBlur(sharpness=500.0, shift_ratio=None))
    mapping.posed_frames(10, blur=None)
    assert mapping.advice() is Advice.MAPPING


@pytest.mark.parametrize(
    "tell",
    [
        lambda story, frame_id: story.failed(frame_id),
        lambda story, frame_id: story.registered(frame_id, num_inliers=20),
    ],
    ids=["not registered", "few inliers"],
)
def test_keyframes_that_hardly_hold_ask_for_less_speed(
    mapping: Story, tell: Callable[[Story, FrameId], None]
) -> None:
    for _ in range(5):
        frame_id = mapping.frame()
        tell(mapping, frame_id)
        mapping.posed(frame_id)
    assert mapping.advice() is Advice.SLOWER
    for _ in range(5):
        frame_id = mapping.frame()
        mapping.registered(frame_id)
        mapping.posed(frame_id)
    assert mapping.advice() is Advice.MAPPING


# -- the computer, the run ------------------------------------------------------------------------


def test_a_computer_that_falls_behind_asks_to_hold_still(mapping: Story) -> None:
    mapping.posed_frames(15, latency_s=1.8)
    assert mapping.advice() is Advice.HOLD_STILL
    mapping.posed_frames(15)
    assert mapping.advice() is Advice.MAPPING


def test_most_frames_dropped_asks_to_hold_still(mapping: Story) -> None:
    for number in range(60):
        if number % 6:
            mapping.arrived(1000 + number)
            mapping.dropped(index=1000 + number)
        else:
            mapping.posed(mapping.frame())
    assert mapping.advice() is Advice.HOLD_STILL


def test_a_paused_run_says_so_and_resumes_without_a_loss(mapping: Story) -> None:
    mapping.command(RunCommand.PAUSE)
    for _ in range(50):
        mapping.frame()
    assert mapping.advice() is Advice.PAUSED
    mapping.command(RunCommand.RESUME)
    mapping.frame()
    assert mapping.advice() is Advice.MAPPING


def test_what_is_doubted_of_the_map_is_shown_with_the_gravest_reason(mapping: Story) -> None:
    assert (mapping.state().verdict, mapping.state().doubt) == (VerdictLevel.GOOD, "")
    verdict = verdict_of(VerdictLevel.WRONG, VerdictLevel.DOUBTFUL)
    version = mapping.feedback.version
    mapping.feedback.take(VerdictChanged(at_s=mapping.at_s, verdict=verdict))
    assert mapping.feedback.version > version
    assert mapping.state().verdict is VerdictLevel.WRONG
    assert mapping.state().doubt == verdict.reasons[0].sentence
    assert mapping.advice() is Advice.MAPPING
    mapping.feedback.take(VerdictChanged(at_s=mapping.at_s, verdict=Verdict()))
    assert mapping.state().doubt == ""


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "misplaced",
            "a part may lie in the wrong place: go back and film that part again, more slowly and"
            " with more overlap",
        ),
        (
            "small_patch",
            "a picture hangs on one small patch that it shows: go back and film that part again,"
            " more slowly and with more overlap, with what is around the patch in view",
        ),
    ],
)
def test_a_doubt_says_what_to_do_and_names_no_frames(mapping: Story, kind: str, words: str) -> None:
    (reason,) = verdict_of(VerdictLevel.DOUBTFUL).reasons
    doubt = replace(reason, kind=kind, sentence="frame 59 may be elsewhere: leave it out")
    mapping.feedback.take(
        VerdictChanged(verdict=Verdict(level=VerdictLevel.DOUBTFUL, reasons=(doubt,)))
    )
    assert mapping.state().doubt == words


def test_a_doubt_says_how_long_ago_its_frames_were_filmed(mapping: Story) -> None:
    verdict = verdict_of(VerdictLevel.DOUBTFUL)
    (reason,) = verdict.reasons
    filmed = replace(reason, frame_ids=(FrameId(3), FrameId(5)))
    mapping.feedback.take(VerdictChanged(verdict=replace(verdict, reasons=(filmed,))))
    num_since = mapping.last_id - 5
    assert mapping.state().doubt_age_s == pytest.approx(PERIOD_S * num_since)
    assert mapping.state(2).doubt_age_s is None, "another phone filmed them"
    strange = replace(reason, frame_ids=(FrameId(9999),))
    mapping.feedback.take(VerdictChanged(verdict=replace(verdict, reasons=(strange,))))
    assert mapping.state().doubt_age_s is None


def test_a_map_that_takes_over_voids_the_places(mapping: Story) -> None:
    mapping.feedback.take(
        MainMapChanged(
            at_s=mapping.at_s, former_map_number=1, num_registered=46, num_registered_in_former=19
        )
    )
    assert mapping.state().position_in_world is None
    assert mapping.state().num_registered == 46


def test_the_end_is_final(mapping: Story) -> None:
    mapping.feedback.take(
        RunFinished(at_s=9.0, stopped_by="signal", num_keyframes=20, num_registered=19)
    )
    assert mapping.state().num_registered == 19
    mapping.posed_frames(3)
    assert mapping.advice() is Advice.ENDED


def test_events_about_frames_of_other_sources_change_no_phone(mapping: Story) -> None:
    before = mapping.state()
    stranger = FrameId(9999)
    mapping.posed(stranger)
    mapping.arrived(9999)
    mapping.dropped(index=9999, source="other")
    mapping.dropped(index=77)
    mapping.failed(stranger)
    assert mapping.state() == before


def test_what_is_remembered_of_frames_is_bounded(mapping: Story) -> None:
    mapping.posed_frames(9000)
    feedback = mapping.feedback
    assert len(feedback._phone_of) <= 4000
    assert len(feedback._phones[1].received_at_s) <= 4000


# -- up -------------------------------------------------------------------------------------------


def test_phones_that_tell_their_tilt_give_the_direction_up(mapping: Story) -> None:
    half = 0.5**0.5
    for _ in range(12):
        frame_id = mapping.frame(up=(0.0, -1.0, 0.0))
        assert mapping.feedback.up_in_world is None or frame_id > 10
        # Turned by 90 degrees around x: the camera's -y is the world's -z.
        mapping.posed(frame_id, quat_xyzw=(half, 0.0, 0.0, half))
    up = mapping.feedback.up_in_world
    assert up == pytest.approx((0.0, 0.0, -12.0), abs=1e-9)


def test_the_heading_is_level_with_the_view_or_the_upright_of_the_picture(mapping: Story) -> None:
    assert mapping.state().heading_in_world == pytest.approx((0.0, -1.0, 1.0))


def test_keyframes_are_known_by_phone(mapping: Story) -> None:
    own, other = mapping.frame(phone=2), FrameId(5000)
    mapping.keyframe(own)
    mapping.keyframe(other)
    assert mapping.feedback.phone_of_keyframe(own) == 2
    assert mapping.feedback.phone_of_keyframe(other) == 0
