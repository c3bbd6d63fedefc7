"""Progress in the terminal, the counters behind it and the words for events."""

from __future__ import annotations

import io
import logging
from typing import TYPE_CHECKING

import pytest

from adapters.live.run_counters import RunCounters
from adapters.views.console import ConsoleView, build_panel, format_elapsed
from adapters.views.log_lines import DROPS_LOGGED_EACH, LogLevel, log_line_of
from engine.events import (
    ALSO_AN_EVENT,
    BundleAdjusted,
    CameraDoubted,
    CameraSplit,
    ComponentJoined,
    ComponentStarted,
    CropFound,
    Event,
    FrameDropped,
    FramePosed,
    FrameReceived,
    FrameRegistered,
    Georeferenced,
    KeyframeAdded,
    LoopClosed,
    MainMapChanged,
    MapInitialized,
    MetricScaleEstimated,
    OverlayFound,
    PairVerified,
    RegistrationFailed,
    RunFinished,
    RunResumed,
    SnapshotWritten,
    SourceOpened,
    VerdictChanged,
    Warned,
    WindowPurpose,
    WindowSolved,
    WindowVerdict,
)
from engine.types import DropReason, FrameId, PairReason, RegistrationStatus, VerdictLevel
from tests.support.verdicts import verdict_of

if TYPE_CHECKING:
    from rich.console import Console


def dropped(reason: DropReason, detail: str = "") -> FrameDropped:
    return FrameDropped(
        at_s=1.0,
        frame_id=None,
        source="folder",
        index=6,
        name="7.jpg",
        captured_at_s=7.0,
        reason=reason,
        detail=detail,
    )


def registration_failed(status: RegistrationStatus) -> RegistrationFailed:
    return RegistrationFailed(
        at_s=1.0, frame_id=FrameId(5), status=status, num_inliers=7, num_correspondences=40
    )


def posed(frame_id: int, latency_s: float) -> FramePosed:
    return FramePosed(
        camera_key="camera",
        at_s=1.0,
        frame_id=FrameId(frame_id),
        captured_at_s=0.0,
        cam_center_in_world=(0.0, 0.0, 0.0),
        world_from_cam_quat_xyzw=(0.0, 0.0, 0.0, 1.0),
        is_first=True,
        is_keyframe=False,
        latency_s=latency_s,
    )


def opened(*, is_live: bool) -> SourceOpened:
    return SourceOpened(source="a", address="a", prefix="", is_live=is_live, fingerprint="")


def registered(frame_id: int, num_registered: int, num_points3D: int) -> FrameRegistered:
    return FrameRegistered(
        at_s=1.0,
        frame_id=FrameId(frame_id),
        num_inliers=90,
        num_correspondences=100,
        num_registered=num_registered,
        num_points3D=num_points3D,
        is_retry=False,
        elapsed_s=0.1,
    )


def a_short_run(*, is_live: bool = True) -> list[Event]:
    first, third = FrameId(1), FrameId(3)
    received = [
        FrameReceived(at_s=0.1 * i, frame_id=FrameId(i), index=i - 1, captured_at_s=0.1 * i)
        for i in range(1, 5)
    ]
    keyframes = [
        KeyframeAdded(
            camera_key="camera",
            at_s=0.5,
            frame_id=frame_id,
            index=0,
            is_photo=False,
            name="k.jpg",
            captured_at_s=0.1,
            num_keypoints=9,
        )
        for frame_id in (first, third)
    ]
    return [
        opened(is_live=is_live),
        *received,
        *keyframes,
        MapInitialized(at_s=0.6, first=first, second=third, num_points3D=120, attempt=1),
        registered(4, 3, 1234),
        *(posed(i, latency_s=0.01 * i) for i in range(1, 5)),
        dropped(DropReason.UNREADABLE, "the JPEG ends early"),
        LoopClosed(at_s=0.8, first=first, second=third, num_inliers=55),
        BundleAdjusted(
            at_s=0.9,
            num_keyframes=3,
            num_points3D=1230,
            reprojection_error_before_px=0.9,
            reprojection_error_after_px=0.6,
            keyframes_added_meanwhile=0,
            elapsed_s=0.2,
        ),
        SnapshotWritten(
            at_s=1.0,
            sequence=1,
            path="runs/x/snapshots/000001",
            num_keyframes=3,
            num_points3D=1230,
            elapsed_s=0.1,
        ),
        Warned(at_s=1.1, message="the loop stalled"),
        RunFinished(at_s=1.2, stopped_by="end_of_sources", num_keyframes=3, num_registered=3),
    ]


def test_the_counters_add_up_over_a_run() -> None:
    counters = RunCounters()
    for event in a_short_run():
        counters.update(event)

    assert counters.frames_received == 4 + 1, "one was never decoded"
    assert counters.frames_posed == 4
    assert counters.keyframes == 3
    assert counters.registered == 3
    assert counters.points3D == 1230
    assert counters.reprojection_error_px == 0.6
    assert counters.dropped == 1
    assert counters.dropped_by_reason == {DropReason.UNREADABLE: 1}
    assert counters.loops == 1
    assert counters.snapshots == 1
    assert counters.finished is not None


def test_a_new_start_of_the_map_resets_what_is_registered() -> None:
    counters = RunCounters()
    counters.update(registered(9, 8, 900))
    counters.update(
        MapInitialized(at_s=1.0, first=FrameId(2), second=FrameId(5), num_points3D=80, attempt=2)
    )

    assert (counters.registered, counters.points3D) == (2, 80)


def test_latency_percentiles_are_of_the_latest_frames_only() -> None:
    counters = RunCounters()
    counters.update(opened(is_live=True))
    assert counters.latency_percentiles_s() is None
    for frame_id in range(1, 1001):
        counters.update(posed(frame_id, latency_s=10.0 if frame_id <= 500 else 0.1))

    percentiles_s = counters.latency_percentiles_s()
    assert percentiles_s is not None
    assert percentiles_s == pytest.approx((0.1, 0.1))
    assert counters.latest_latency_s == 0.1


def test_routine_events_are_not_worth_a_line() -> None:
    counters = RunCounters()
    pair = PairVerified(
        at_s=1.0,
        first=FrameId(1),
        second=FrameId(2),
        reason=PairReason.TEMPORAL,
        num_matches=99,
        num_inliers=60,
    )

    for event in (pair, registered(3, 3, 90), posed(3, 0.1)):
        assert log_line_of(event, counters) is None


def test_a_failed_registration_and_a_warning_are_logged_with_their_level() -> None:
    failed = registration_failed(RegistrationStatus.TOO_FEW_INLIERS)
    log_line = log_line_of(failed, RunCounters())
    warning = log_line_of(Warned(at_s=1.0, message="disk nearly full"), RunCounters())

    assert log_line is not None
    assert (log_line.level, log_line.text) == (
        LogLevel.INFO,
        "keyframe 5 waits for more keyframes around it: 7 of 40 matches agree",
    )
    assert warning is not None
    assert (warning.level, warning.text) == (LogLevel.WARNING, "disk nearly full")


def added(frame_id: int, index: int, *, name: str = "", camera_key: str = "left") -> KeyframeAdded:
    return KeyframeAdded(
        frame_id=FrameId(frame_id),
        camera_key=camera_key,
        index=index,
        name=name,
        is_photo=bool(name),
        captured_at_s=0.0,
        num_keypoints=9,
    )


@pytest.mark.parametrize(
    ("status", "ending"),
    [
        (
            RegistrationStatus.CONTRADICTED,
            "7 of 40 matches agree, and stronger pairs contradict them",
        ),
        (
            RegistrationStatus.AMBIGUOUS,
            "7 of 40 matches agree, and pairs show another place as well",
        ),
    ],
)
def test_a_log_line_says_why_a_keyframe_waits_with_which_many_matches_agree(
    status: RegistrationStatus, ending: str
) -> None:
    line = log_line_of(registration_failed(status), RunCounters())
    assert line is not None
    assert line.text.endswith(ending)


def test_log_lines_name_keyframes_as_the_verdict_does() -> None:
    counters = RunCounters()
    for event in (added(4, 3), added(5, 4)):
        counters.update(event)
    failed = log_line_of(registration_failed(RegistrationStatus.TOO_FEW_INLIERS), counters)
    assert failed is not None
    assert failed.text.startswith("frame 4 waits")

    counters.update(added(6, 0, name="IMG_7.jpg", camera_key="right"))
    loop = LoopClosed(first=FrameId(4), second=FrameId(6), num_inliers=55)
    line = log_line_of(loop, counters)
    assert line is not None
    assert line.text == "loop closed: frame 3 of left and photo IMG_7.jpg of right, 55 inliers"


def test_a_doubted_camera_is_a_warning_that_names_it() -> None:
    doubted = CameraDoubted(at_s=1.0, camera_key="phone", reason="k is 14.3; held", is_held=True)
    log_line = log_line_of(doubted, RunCounters())
    assert log_line is not None
    assert (log_line.level, log_line.text) == (LogLevel.WARNING, "camera phone: k is 14.3; held")


def window(verdict: WindowVerdict) -> WindowSolved:
    return WindowSolved(
        at_s=1.0,
        purpose=WindowPurpose.RESCUE,
        verdict=verdict,
        reason="fits by +2.0%, 3 keyframes more",
        keyframe_ids=(FrameId(1), FrameId(2), FrameId(3)),
        num_registered=3,
        num_observations_before=10,
        num_observations_after=20,
        error_before_px=0.5,
        error_after_px=0.4,
        moved_map=0.0,
        elapsed_s=0.3,
        cpu_s=0.2,
    )


def test_a_window_is_logged_when_it_changed_the_map() -> None:
    log_line = log_line_of(window(WindowVerdict.MERGED), RunCounters())
    assert log_line is not None
    assert log_line.text == "window of 3 keyframes (rescue): fits by +2.0%, 3 keyframes more"
    for verdict in set(WindowVerdict) - {WindowVerdict.MERGED}:
        assert log_line_of(window(verdict), RunCounters()) is None


@pytest.mark.parametrize(("is_applied", "ending"), [(False, ""), (True, "; it is in metres now")])
def test_the_length_of_the_map_s_unit_is_logged(is_applied: bool, ending: str) -> None:
    event = MetricScaleEstimated(
        at_s=1.0,
        metres_per_map_unit=25.322,
        num_depths=900,
        spread_ratio=0.1,
        is_applied=is_applied,
    )
    log_line = log_line_of(event, RunCounters())
    assert log_line is not None
    assert log_line.text == f"a unit of the map is 25.32 m by depths seen{ending}"


def test_the_line_of_a_georeference_says_which_unit_is_meant() -> None:
    event = Georeferenced(
        origin_latitude_deg=46.8,
        origin_longitude_deg=-92.0,
        origin_altitude_m=198.0,
        metres_per_map_unit=13.44,
        num_fixes=18,
        rmse_m=0.42,
        rejected_ids=(),
    )
    log_line = log_line_of(event, RunCounters())
    assert log_line is not None
    assert log_line.text == (
        "map laid onto 18 GPS positions: 0.42 m rms; snapshots are in metres (a map unit is"
        " 13.44 m)"
    )


def test_thousands_of_drops_are_logged_a_few_times_with_their_number() -> None:
    counters = RunCounters()
    logged = []
    for _ in range(2000):
        event = dropped(DropReason.OVERLOAD)
        counters.update(event)
        if log_line := log_line_of(event, counters):
            logged.append(log_line.text)

    assert DROPS_LOGGED_EACH < len(logged) <= DROPS_LOGGED_EACH + 8
    assert logged[0] == "dropped 7.jpg as overload"
    assert logged[-1] == "dropped 7.jpg as overload (1,024 so far)"


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_stream_that_is_no_terminal_gets_plain_lines_without_control_codes() -> None:
    stream, clock = io.StringIO(), FakeClock()
    view = ConsoleView(10, stream=stream, clock=clock)
    for event in a_short_run():
        clock.now_s += 0.1
        view.show_event(event)
    view.close()
    lines = stream.getvalue().splitlines()

    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()
    assert "00:01  warning: dropped 7.jpg as unreadable: the JPEG ends early" in lines
    assert "00:01  snapshot 000001: 3 keyframes, 1,230 points" in lines
    assert lines[-1] == (
        "00:01  received 5/10 frames  keyframes 3  registered 3  points 1230  error 0.60 px  "
        "latency 25 ms (p95 38 ms)  dropped 1 (1 unreadable)  loops 1  snapshots 1  "
        "verdict good"
    )


def test_files_wait_so_nothing_is_said_of_their_latency() -> None:
    stream = io.StringIO()
    view = ConsoleView(10, stream=stream, clock=FakeClock())
    counters = RunCounters()
    for event in a_short_run(is_live=False):
        view.show_event(event)
        counters.update(event)
    view.close()
    panel = io.StringIO()
    from rich.console import Console

    Console(file=panel, width=80).print(build_panel(counters, total_frames=10, elapsed="00:01"))

    assert counters.frames_posed == 4
    assert counters.latency_percentiles_s() is None
    assert "registered 3" in stream.getvalue()
    assert "registered" in panel.getvalue()
    for word in ("latency", "p95"):
        assert word not in stream.getvalue()
        assert word not in panel.getvalue()


def test_a_line_that_is_an_event_too_is_not_shown_twice_while_the_view_is_open() -> None:
    def record(**extra: bool) -> logging.LogRecord:
        return logging.makeLogRecord({"msg": "the disk is slow", **extra})

    view = ConsoleView(10, stream=io.StringIO(), clock=FakeClock())
    assert view.shows_as_event(record(**ALSO_AN_EVENT))
    assert not view.shows_as_event(record())
    view.close()
    assert not view.shows_as_event(record(**ALSO_AN_EVENT))


def test_an_address_is_never_broken_in_two_above_the_panel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    stream = FakeTerminal()
    view = ConsoleView(10, stream=stream, clock=FakeClock())
    address = f"rtsp://camera.example:8554/{'a' * 70}"
    view.show_event(Warned(message=f"the camera is lost, connected to {address} before"))
    view.close()
    assert address in stream.getvalue()


def test_sentences_above_the_panel_go_on_below_their_own_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "dumb-no-colour")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = FakeTerminal()
    view = ConsoleView(10, stream=stream, clock=FakeClock())
    view.show_event(Warned(message="the loop stalled while a snapshot was written to the disk"))
    view.close()
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    first = next(i for i, line in enumerate(lines) if "the loop stalled" in line)
    assert lines[first].endswith("00:00  warning: the loop stalled while a")
    assert lines[first + 1] == "       snapshot was written to the disk"


def test_a_plain_status_line_comes_every_two_seconds_and_not_more_often() -> None:
    stream, clock = io.StringIO(), FakeClock()
    view = ConsoleView(None, stream=stream, clock=clock)
    view.show_event(opened(is_live=True))
    for frame_id in range(1, 101):  # ten seconds
        clock.now_s += 0.1
        view.show_event(posed(frame_id, latency_s=0.02))

    assert 4 <= len(stream.getvalue().splitlines()) <= 5
    view.close()


def test_a_resumed_run_to_which_nothing_comes_says_once_what_it_has() -> None:
    stream, clock = io.StringIO(), FakeClock()
    view = ConsoleView(0, stream=stream, clock=clock)
    clock.now_s += 60.0
    view.show_event(
        RunResumed(
            sources=("photos",),
            matcher="sift",
            num_keyframes=18,
            num_registered=17,
            num_frames_again=0,
        )
    )
    view.close()
    (line,) = (line for line in stream.getvalue().splitlines() if "keyframes" in line)
    assert line.startswith("01:00  received 0 frames  keyframes 18  registered 17  ")


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_panel_that_is_redrawn_below_the_notes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = FakeTerminal()
    view = ConsoleView(10, stream=stream, clock=FakeClock())
    for event in a_short_run():
        view.show_event(event)
    view.close()
    last_panel = stream.getvalue().rsplit("LiveSfM", maxsplit=1)[1]

    assert "\x1b" in stream.getvalue()
    assert "the loop stalled" in stream.getvalue()
    for figure in ("of 10", "1,230", "0.60 px", "25 ms", "38 ms", "1 unreadable"):
        assert figure in last_panel


@pytest.mark.parametrize("width", [72, 100])
def test_the_panel_shows_every_figure_in_full_at_common_widths(width: int) -> None:
    from rich.console import Console

    counters = RunCounters(
        frames_received=1000,
        keyframes=1234,
        registered=1230,
        points3D=1_234_567,
        reprojection_error_px=0.61,
        loops=12,
        snapshots=40,
        has_live_source=True,
    )
    for frame_id in range(20):
        counters.update(posed(frame_id, latency_s=1.234))
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    console.print(build_panel(counters, total_frames=2000, elapsed="01:00"))

    for figure in ("1,000 of 2,000", "1,234,567", "1234 ms", "snapshots 40", "loops     12"):
        assert figure in stream.getvalue()
    assert "…" not in stream.getvalue()


@pytest.mark.parametrize(
    ("elapsed_s", "text"), [(0.4, "00:00"), (61.0, "01:01"), (3600.0 + 125.0, "1:02:05")]
)
def test_elapsed_time_has_hours_only_when_it_has_hours(elapsed_s: float, text: str) -> None:
    assert format_elapsed(elapsed_s) == text


def test_an_overlay_is_named_with_its_camera_its_share_and_its_place() -> None:
    boxes = ((500, 10, 620, 50), (10, 12, 90, 30), (10, 40, 90, 60), (10, 70, 90, 90))
    found = OverlayFound(at_s=1.0, camera_key="drone", share=0.0314, boxes=boxes, num_keyframes=5)
    log_line = log_line_of(found, RunCounters())
    assert log_line is not None
    assert log_line.level is LogLevel.INFO
    assert log_line.text == (
        "camera drone: 3.1 % of its image is masked, which shows nothing of the world: "
        "120 x 40 px at 500, 10, 80 x 18 px at 10, 12, 80 x 20 px at 10, 40, ..."
    )


def test_a_split_camera_and_a_crop_are_logged_with_what_was_found() -> None:
    split = CameraSplit(
        camera_key="phone",
        calibration_keys=("phone", "phone#2"),
        focal_px=(694.2, 1041.4),
        frame_ids=(FrameId(1), FrameId(2), FrameId(3), FrameId(4)),
        calibration_idx=(0, 1, 0, 1),
    )
    crop = CropFound(
        camera_key="crop",
        whole_camera_key="phone",
        focal_px=694.2,
        principal_point_xy=(270.3, 480.1),
    )
    lines = [log_line_of(event, RunCounters()) for event in (split, crop)]
    assert [line.text for line in lines if line is not None] == [
        "camera phone has several focal lengths: 2 keyframes at 694 px, 2 keyframes at 1041 px",
        "camera crop is a crop of phone: centre at 270, 480 px",
    ]


# -- the verdict ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "log_level"),
    [
        (VerdictLevel.GOOD, LogLevel.INFO),
        (VerdictLevel.DOUBTFUL, LogLevel.WARNING),
        (VerdictLevel.WRONG, LogLevel.ERROR),
    ],
)
def test_a_verdict_that_changed_is_logged_as_grave_as_it_is(
    level: VerdictLevel, log_level: LogLevel
) -> None:
    verdict = verdict_of(*[] if level is VerdictLevel.GOOD else [level, VerdictLevel.DOUBTFUL])
    line = log_line_of(VerdictChanged(verdict=verdict, is_final=True), RunCounters())
    assert line is not None
    assert line.level is log_level
    sentences = [reason.sentence for reason in verdict.reasons]
    first, *below = line.text.splitlines()
    assert first == f"verdict {level}" + (f": {sentences[0]} (and 1 more)" if sentences else "")
    assert below == [f"  - {sentence}" for sentence in sentences[1:]]
    line_so_far = log_line_of(VerdictChanged(verdict=verdict), RunCounters())
    assert line_so_far is not None and line_so_far.level is log_level
    assert line_so_far.text == line.text.replace("verdict", "so far the map is", 1)


@pytest.mark.parametrize("width", [72, 80, 100])
def test_the_panel_shows_the_verdict_and_its_first_reason_in_one_line(width: int) -> None:
    from rich.console import Console

    counters = RunCounters()
    assert "verdict    -" in panel_text(Console(file=io.StringIO(), width=width), counters)
    counters.update(VerdictChanged(verdict=verdict_of(VerdictLevel.WRONG, VerdictLevel.DOUBTFUL)))
    text = panel_text(Console(file=io.StringIO(), width=width), counters)
    (line,) = [line for line in text.splitlines() if "verdict" in line]
    assert "verdict    wrong  frames 10 to 15 turn on the spot" in line
    assert len(text.splitlines()) == 6


def panel_text(console: Console, counters: RunCounters) -> str:
    with console.capture() as captured:
        console.print(build_panel(counters, total_frames=2000, elapsed="01:00"))
    return captured.get()


def test_a_terminal_has_one_line_for_a_verdict_and_counts_further_reasons() -> None:
    stream = io.StringIO()
    view = ConsoleView(10, stream=stream, clock=FakeClock())
    levels = [VerdictLevel.WRONG, VerdictLevel.DOUBTFUL, VerdictLevel.DOUBTFUL]
    view.show_event(VerdictChanged(verdict=verdict_of(*levels)))
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("00:00  error: so far the map is wrong: frames 10 to 15")
    assert line.endswith(" in view (and 2 more)")
    view.close()


def test_maps_apart_are_logged_as_they_start_join_and_take_over() -> None:
    events = [
        ComponentStarted(
            map_number=1, first=FrameId(4), second=FrameId(5), num_registered=3, num_points3D=90
        ),
        ComponentJoined(
            map_number=1,
            into_map_number=0,
            keyframe_ids=(FrameId(4), FrameId(5)),
            num_inliers=70,
            num_registered=20,
        ),
        MainMapChanged(former_map_number=1, num_registered=46, num_registered_in_former=19),
        RunFinished(
            stopped_by="end_of_sources",
            num_keyframes=65,
            num_registered=46,
            num_in_other_maps=(19,),
        ),
    ]
    lines = [log_line_of(event, RunCounters()) for event in events]
    assert [line.text for line in lines if line is not None] == [
        "a second map grows from keyframe 4 and keyframe 5, with 3 keyframes: it is joined where"
        " it comes to overlap with the first",
        "a second map with 2 keyframes was joined: 20 are in one map now",
        "another map holds more and is the map now: 46 keyframes instead of 19",
        "finished (end of sources): 46/65 registered, 19 in maps apart from it",
    ]
