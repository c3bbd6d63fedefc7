"""Runs that a program feeds: frames in; poses, events and a reconstruction out."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import livesfm
import numpy as np
import pytest
from livesfm import async_run
from livesfm.frames import HandedFrame, LiveFrames, WaitingFrames
from livesfm.poses import CollectingView
from typer.testing import CliRunner

from adapters.cli import app
from adapters.evaluate import score_poses
from adapters.town.source import SyntheticTown, parse_town_spec
from engine.config import SourcesConfig
from engine.run.engine import Engine, RunOutcome
from engine.types import Float64Array, FrameId, RunCommand, Uint8Array
from tests.support.waiting import HANG_S

FRAMES = tuple(range(0, 48, 3))
LEAN = {"sift.max_features_in_video": 500}


@functools.cache
def town_frames() -> list[tuple[Uint8Array, Float64Array]]:
    """Small images of a flight, and where they were taken."""
    town = SyntheticTown(
        parse_town_spec("synthetic:town"),
        next_frame_id=lambda: FrameId(1),
        config=SourcesConfig(),
    )
    frames = []
    for index in FRAMES:
        rendered = town.render(index)
        small = cv2.resize(rendered.pixels, (320, 240), interpolation=cv2.INTER_AREA)
        frames.append((np.asarray(small, np.uint8), rendered.cam_from_world))
    return frames


def error_percent(cam_from_world: Mapping[int, Float64Array]) -> float:
    """How far cameras by index are from the truth, of the flight's extent."""
    indices = sorted(cam_from_world)
    score = score_poses(
        np.array([cam_from_world[index] for index in indices]),
        np.array([town_frames()[index][1] for index in indices]),
    )
    assert score.absolute is not None
    return score.absolute.rmse_percent_of_extent


def test_frames_become_poses_and_a_reconstruction_that_agree_with_the_truth(tmp_path: Path) -> None:
    poses: list[livesfm.Pose] = []
    with livesfm.open_run(tmp_path / "run", config="phone", overrides=LEAN, lossless=True) as run:
        assert run.verdict is None
        for number, (rgb, _) in enumerate(town_frames()):
            assert run.add_frame(rgb, captured_at_s=number / 5, camera="front") == number
            poses += run.new_poses(repeated=True)
        result = run.finish()
        poses += run.new_poses(repeated=True)
        model = run.reconstruction()
    assert run.verdict == result.verdict
    assert result.summary["frames_received"] == len(FRAMES)
    assert result.summary["frames_dropped"] == {}
    assert model is not None
    assert model.num_reg_images() == result.num_registered >= 4
    first = {pose.index: pose for pose in poses if pose.is_first}
    assert len(first) >= len(FRAMES) - 2
    assert {pose.camera for pose in poses} == {"front"}
    assert all(pose.captured_at_s == pose.index / 5 for pose in poses)
    assert 0 < error_percent({index: first[index].cam_from_world for index in first}) < 5.0
    final = {
        int(Path(image.name).stem): image.cam_from_world().matrix()
        for image in model.images.values()
    }
    assert 0 < error_percent(final) < 0.5


def test_each_frame_has_one_new_pose_unless_repeated_ones_are_wanted() -> None:
    def posed(frame_id: int, *, is_first: bool) -> livesfm.events.FramePosed:
        return livesfm.events.FramePosed(
            frame_id=FrameId(frame_id),
            camera_key="front",
            captured_at_s=0.0,
            cam_center_in_world=(0.0, 0.0, 0.0),
            world_from_cam_quat_xyzw=(0.0, 0.0, 0.0, 1.0),
            is_keyframe=not is_first,
            is_first=is_first,
            latency_s=0.0,
        )

    view = CollectingView(origin_of=lambda frame_id: ("front", frame_id), listen=None)
    for repeated, expected in ((False, [1, 2]), (True, [1, 1, 2])):
        for frame_id, is_first in ((1, True), (1, False), (2, True)):
            view.show_event(posed(frame_id, is_first=is_first))
        assert [pose.index for pose in view.take_poses(repeated=repeated)] == expected
        assert view.take_poses(repeated=True) == []


def test_a_view_has_the_last_verdict_on_the_growing_map() -> None:
    view = CollectingView(origin_of=lambda frame_id: ("front", frame_id), listen=None)
    assert view.verdict is None
    for level in (livesfm.VerdictLevel.DOUBTFUL, livesfm.VerdictLevel.GOOD):
        view.show_event(livesfm.events.VerdictChanged(verdict=livesfm.Verdict(level=level)))
        assert view.verdict == livesfm.Verdict(level=level)


def test_photos_each_become_a_keyframe_and_none_is_dropped(tmp_path: Path) -> None:
    overrides = {"sift.max_features": 500}
    with livesfm.open_run(tmp_path / "run", overrides=overrides, photos=True) as run:
        for rgb, _ in town_frames()[:6]:
            run.add_frame(rgb)
        result = run.finish()
    assert (result.num_keyframes, result.summary["frames_dropped"]) == (6, {})
    assert result.num_registered >= 4
    assert len({pose.index for pose in run.new_poses()}) == result.num_registered


def test_a_live_run_never_waits_and_counts_what_it_drops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_added_all = threading.Event()
    decode = LiveFrames._decode

    def decode_later(frames: LiveFrames, handed: HandedFrame, **about: Any) -> Any:
        assert has_added_all.wait(HANG_S)
        return decode(frames, handed, **about)

    monkeypatch.setattr(LiveFrames, "_decode", decode_later)
    with livesfm.open_run(tmp_path / "run", config="phone", overrides=LEAN) as run:
        for number, (rgb, _) in enumerate(town_frames()):
            run.add_frame(rgb, captured_at_s=number / 5)
        has_added_all.set()
        result = run.finish()
        events = run.new_events()
    dropped = [event for event in events if isinstance(event, livesfm.events.FrameDropped)]
    assert {event.reason for event in dropped} == {livesfm.DropReason.OVERLOAD}
    num_dropped = sum(event.num_frames for event in dropped)
    assert len(FRAMES) > num_dropped >= len(FRAMES) // 2
    assert result.summary["frames_dropped"] == {"overload": num_dropped}
    assert result.summary["frames_received"] == len(FRAMES)
    assert run.new_events() == []


def test_what_is_no_image_is_refused_and_costs_nothing(tmp_path: Path) -> None:
    with livesfm.open_run(tmp_path / "run", config="phone", lossless=True) as run:
        grey = np.zeros((240, 320), np.uint8)
        with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8, got \(240, 320\) uint8"):
            run.add_frame(grey)
        with pytest.raises(ValueError, match="got .* float64"):
            run.add_frame(np.zeros((240, 320, 3)))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="mask"):
            run.add_frame(town_frames()[0][0], mask=np.ones((2, 2), np.bool_))
        assert run.add_frame(town_frames()[0][0]) == 0
        assert run.add_frame(b"no image") == 1
        result = run.finish()
    assert result.summary["frames_received"] == 2
    assert result.summary["frames_dropped"] == {"unreadable": 1}
    assert run.reconstruction() is None


def test_a_frame_of_a_video_is_later_than_the_one_before_it(tmp_path: Path) -> None:
    rgb = town_frames()[0][0]
    with livesfm.open_run(tmp_path / "run", overrides=LEAN, lossless=True) as run:
        run.add_frame(rgb, captured_at_s=5.0)
        for earlier_s in (5.0, 4.9):
            with pytest.raises(ValueError, match=r"captured_at_s: .* is not later than 5\.0"):
                run.add_frame(rgb, captured_at_s=earlier_s)
        assert run.add_frame(rgb, captured_at_s=4.9, camera="other") == 1
        assert run.add_frame(rgb) == 2  # now
        assert run.add_frame(rgb) == 3
        assert run.finish().summary["frames_received"] == 4
    with livesfm.open_run(tmp_path / "photos", overrides=LEAN, photos=True) as run:
        for index in range(2):
            assert run.add_frame(rgb, captured_at_s=5.0 - index) == index


def test_a_clock_that_is_set_back_leaves_frames_of_now_in_order() -> None:
    frames = WaitingFrames(SourcesConfig(), next_frame_id=lambda: FrameId(1))
    image = town_frames()[0][0]
    handed = [
        HandedFrame(image=image, camera="front", captured_at_s=None, handed_at_s=now_s)
        for now_s in (100.0, 40.0, 200.0)
    ]
    times_s = [frames._time_of(one) for one in handed]
    assert times_s[0] == 100.0
    assert 100.0 < times_s[1] < 100.001
    assert times_s[2] == 200.0


def test_a_run_that_a_program_fed_goes_on_without_a_source_and_gets_the_depth_that_was_left_out(
    tmp_path: Path,
) -> None:
    path, fix = tmp_path / "run", livesfm.GpsFix(latitude_deg=47.0, longitude_deg=8.0)
    overrides = {**LEAN, "dense.max_cpu_share": 1e-6}
    with livesfm.open_run(path, config="phone", overrides=overrides, lossless=True) as run:
        for number, (rgb, _) in enumerate(town_frames()[:8]):
            run.add_frame(rgb, captured_at_s=number / 5, gps=fix)
        run.add_position(fix, captured_at_s=1.0)
        before = run.finish().summary
    num_left_out = before["dense"]["keyframes_without"]["budget"]
    assert num_left_out >= 2
    for _ in range(2):
        words = ["resume", str(path), "--set", "dense.max_cpu_share=0.9", "--quiet"]
        done = CliRunner().invoke(app, [*words, "--view", "none"])
        assert done.exit_code in (0, 3), done.output
        assert "secret" not in done.output
        after = json.loads((path / "summary.json").read_text())
        for figure in ("frames_received", "frames_dropped", "keyframes"):
            assert after[figure] == before[figure]
        assert after["dense"]["keyframes_without"] == {}
        assert after["dense"]["keyframes_with_depth"] == num_left_out


def test_a_run_to_which_nothing_came_has_no_map_that_is_good(tmp_path: Path) -> None:
    with livesfm.open_run(tmp_path / "run", overrides=LEAN) as run:
        verdict = run.finish().verdict
    assert verdict.level == livesfm.VerdictLevel.WRONG
    assert [reason.sentence for reason in verdict.reasons] == [
        "no map: no frame came that could be used"
    ]


def test_frames_that_were_dropped_are_said_once_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with livesfm.open_run(tmp_path / "run", overrides=LEAN, lossless=True) as run:
        run.add_frame(town_frames()[0][0], captured_at_s=1.0)
        run.add_frame(b"no image", captured_at_s=2.0)
        result = run.finish()
    assert "unreadable" in repr(result)
    assert "summary" not in repr(result)
    assert run.finish().frames_dropped == result.frames_dropped == {"unreadable": 1}
    said = [one for one in caplog.messages if "frames were dropped" in one]
    assert said == [f"{run.path}: 1 of 2 frames were dropped: unreadable 1"]


def test_encoded_images_are_kept_as_they_came(tmp_path: Path) -> None:
    bgr = cv2.cvtColor(town_frames()[0][0], cv2.COLOR_RGB2BGR)
    jpeg = cv2.imencode(".jpg", bgr)[1].tobytes()
    with livesfm.open_run(tmp_path / "run", config="phone", lossless=True) as run:
        run.add_frame(jpeg)
    (kept,) = (tmp_path / "run" / "images").rglob("*.jpg")
    assert kept.read_bytes() == jpeg


def test_an_array_may_be_used_again_once_it_was_added(tmp_path: Path) -> None:
    image = town_frames()[0][0].copy()
    expected = image.copy()
    with livesfm.open_run(tmp_path / "run", config="phone", lossless=True) as run:
        run.add_frame(image)
        image[:] = 0
    (kept,) = (tmp_path / "run" / "images").rglob("*.*")
    stored = cv2.cvtColor(np.asarray(cv2.imread(str(kept))), cv2.COLOR_BGR2RGB)
    assert np.abs(stored.astype(int) - expected).mean() < 3.0


def test_a_run_that_has_ended_takes_no_more(tmp_path: Path) -> None:
    for is_lossless in (True, False):
        run = livesfm.open_run(tmp_path / f"run{is_lossless}", lossless=is_lossless)
        run.finish()
        with pytest.raises(livesfm.RunEndedError):
            run.add_frame(town_frames()[0][0])
        with pytest.raises(livesfm.RunEndedError):
            run.add_position(
                livesfm.GpsFix(latitude_deg=1.0, longitude_deg=2.0, altitude_m=3.0),
                captured_at_s=0.0,
            )


def test_what_raises_in_the_block_ends_the_run_and_what_arrived_is_saved(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        livesfm.open_run(tmp_path / "run", config="phone", overrides=LEAN, lossless=True) as run,
    ):
        for number, (rgb, _) in enumerate(town_frames()[:8]):
            run.add_frame(rgb, captured_at_s=number / 5)
        raise ZeroDivisionError
    assert (tmp_path / "run" / "report.html").is_file()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["frames_received"], summary["frames_dropped"]) == (8, {})
    assert {pose.index for pose in run.new_poses()} >= set(range(2, 8))
    model = run.reconstruction()
    assert model is not None
    assert model.num_reg_images() == run.finish().num_registered >= 2
    with pytest.raises(livesfm.RunEndedError):
        run.add_frame(town_frames()[0][0])


def test_stopping_a_lossless_run_maps_what_it_has_accepted(tmp_path: Path) -> None:
    run = livesfm.open_run(tmp_path / "run", config="phone", overrides=LEAN, lossless=True)
    for number, (rgb, _) in enumerate(town_frames()[:6]):
        run.add_frame(rgb, captured_at_s=number / 5)
    run.stop()
    result = run.finish()
    assert result.summary["frames_received"] == 6
    assert result.summary["frames_dropped"] == {}


def test_a_command_that_stops_a_lossless_run_loses_no_frame_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_read = threading.Event()
    run_it = Engine.run

    async def run_later(engine: Engine) -> RunOutcome:
        await asyncio.to_thread(may_read.wait)
        return await run_it(engine)

    monkeypatch.setattr(Engine, "run", run_later)
    run = livesfm.open_run(tmp_path / "run", lossless=True)
    for number in range(4):
        run.add_frame(town_frames()[0][0], captured_at_s=float(number))
    run._requests(RunCommand.STOP)
    may_read.set()
    result = run.finish()
    assert result.stopped_by == "command"
    assert result.summary["frames_received"] == 4


@pytest.mark.parametrize("is_lossless", [True, False])
def test_a_run_that_ends_by_itself_takes_no_more_and_counts_what_it_had_accepted(
    tmp_path: Path, is_lossless: bool
) -> None:
    overrides = {"sources.max_frames": 2}
    run = livesfm.open_run(tmp_path / "run", overrides=overrides, lossless=is_lossless)
    num_accepted = 0
    with pytest.raises(livesfm.RunEndedError):
        while True:
            run.add_frame(town_frames()[0][0], captured_at_s=num_accepted / 5)
            num_accepted += 1
    result = run.finish()
    assert num_accepted >= 2
    if is_lossless:
        assert result.summary["frames_received"] == num_accepted
        assert result.summary["frames_dropped"].get("stopped", 0) == num_accepted - 2


PROGRAM = """
import sys, threading
import numpy as np
import livesfm

frames = np.load(sys.argv[1])
is_finishing = threading.Event()
"""


def run_program(tmp_path: Path, program: str) -> tuple[subprocess.CompletedProcess[str], Any]:
    """Runs a program that feeds six frames; returns how it ended, and the summary of its run."""
    np.save(tmp_path / "frames.npy", np.array([rgb for rgb, _ in town_frames()[:6]]))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + textwrap.dedent(program), "frames.npy"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    return done, json.loads((tmp_path / "run" / "summary.json").read_text())


@pytest.mark.parametrize("is_lossless", [True, False])
def test_a_program_that_ends_with_a_run_open_saves_it(tmp_path: Path, is_lossless: bool) -> None:
    program = f"""
        run = livesfm.open_run("run", config="phone", lossless={is_lossless})
        for number, rgb in enumerate(frames):
            run.add_frame(rgb, captured_at_s=number / 5)
        import os
        if not os.fork():
            sys.exit()  # a child has no run to wait for
        os.wait()
    """
    done, summary = run_program(tmp_path, program)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert summary["frames_received"] == 6
    if is_lossless:
        assert summary["frames_dropped"] == {}
        assert (tmp_path / "run" / "latest" / "sparse" / "0" / "images.bin").exists()


def test_ctrl_c_while_a_run_is_finished_still_saves_the_map(tmp_path: Path) -> None:
    program = """
        import os, signal

        def interrupt(event):
            if isinstance(event, livesfm.events.FramePosed):
                is_finishing.wait()
                os.kill(os.getpid(), signal.SIGINT)

        run = livesfm.open_run("run", config="phone", lossless=True, on_event=interrupt)
        for number, rgb in enumerate(frames):
            run.add_frame(rgb, captured_at_s=number / 5)
        try:
            is_finishing.set()
            run.finish()
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            print("interrupted")
    """
    done, summary = run_program(tmp_path, program)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
    assert "Traceback" not in done.stderr
    assert (summary["frames_received"], summary["frames_dropped"]) == (6, {})
    assert (tmp_path / "run" / "latest" / "sparse" / "0" / "images.bin").exists()


def test_a_listener_that_raises_costs_neither_poses_nor_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: livesfm.Event) -> None:
        raise ZeroDivisionError(event)

    with livesfm.open_run(
        tmp_path / "run", config="phone", overrides=LEAN, lossless=True, on_event=fail
    ) as run:
        for number, (rgb, _) in enumerate(town_frames()[:6]):
            run.add_frame(rgb, captured_at_s=number / 5)
        result = run.finish()
    assert {pose.index for pose in run.new_poses()} >= set(range(2, 6))
    assert result.summary["faults"] == {}
    assert any("on_event failed with RunStarted" in one.message for one in caplog.records)


def test_what_ends_a_run_is_raised_and_named_to_who_adds_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(engine: Engine) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Engine, "run", fail)
    has_ended = threading.Event()
    run = livesfm.open_run(tmp_path / "run", on_end=has_ended.set)
    assert has_ended.wait(HANG_S)
    with pytest.raises(livesfm.RunEndedError) as raised:
        run.add_frame(town_frames()[0][0])
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    run.stop()
    assert "the run broke" in caplog.text
    with pytest.raises(ZeroDivisionError):
        run.finish()


def test_stderr_stays_the_programs_own_while_a_run_lasts(tmp_path: Path) -> None:
    former, own = sys.stderr, io.StringIO()
    run = livesfm.open_run(tmp_path / "run", config="phone")
    run.add_frame(town_frames()[0][0])
    with contextlib.redirect_stderr(own):
        run.finish()
        print("mine", file=sys.stderr)  # noqa: T201 - what is tested
    assert sys.stderr is former
    assert own.getvalue() == "mine\n"
    assert not former.closed


def test_wrong_settings_are_named_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(livesfm.ConfigError, match="max_features"):
        livesfm.open_run(tmp_path / "run", overrides={"sift.max_feature": 3})
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_taken_is_refused_in_words_of_python(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(livesfm.ConfigError, match="another folder, or overwrite=True$"):
        livesfm.open_run(tmp_path / "run")


def test_settings_of_another_type_are_named_and_numbers_of_numpy_taken(tmp_path: Path) -> None:
    for wrong in ({"x.y": object()}, {"x.y": np.ones(2)}, {5: 1}, ["x.y=3"]):
        overrides: Any = wrong
        with pytest.raises(TypeError, match="^overrides: "):
            livesfm.open_run(tmp_path / "run", overrides=overrides)
    config: Any
    for config in (5, [5], b"phone", {"phone"}, {"sift.max_features": 3}):
        with pytest.raises(TypeError, match="^config: "):
            livesfm.open_run(tmp_path / "run", config=config)
    with pytest.raises(livesfm.ConfigError, match=r"x\.y"):
        livesfm.open_run(tmp_path / "run", overrides={"x.y": np.int64(3)})
    with pytest.raises(livesfm.ConfigError, match="max_features"):
        livesfm.open_run(tmp_path / "run", overrides={"sift.max_features": np.float32(-1.0)})
    assert not (tmp_path / "run").exists()


def test_whatever_breaks_while_a_run_is_opened_gives_its_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(Engine, "__init__", fail)
        livesfm.open_run(tmp_path / "run")
    livesfm.open_run(tmp_path / "run", overwrite=True).finish()


def test_two_runs_go_on_at_a_time_and_no_signal_is_taken(tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    threads = set(threading.enumerate())
    with (
        livesfm.open_run(tmp_path / "one", config="phone", lossless=True) as one,
        livesfm.open_run(tmp_path / "other", config="phone", lossless=True) as other,
    ):
        one.add_frame(town_frames()[0][0])
        other.add_frame(town_frames()[1][0])
        assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for thread in set(threading.enumerate()) - threads:
        thread.join(0.0 if thread.daemon else HANG_S)  # those of executors end after the run
        assert thread.daemon or not thread.is_alive(), thread.name


def test_an_event_loop_feeds_a_run_and_gets_its_events(tmp_path: Path) -> None:
    async def feed() -> tuple[list[livesfm.Event], int]:
        events: list[livesfm.Event] = []
        async with livesfm.AsyncRun(
            tmp_path / "run", config="phone", overrides=LEAN, lossless=True
        ) as run:

            async def listen() -> None:
                events.extend([event async for event in run.events()])

            listening = asyncio.create_task(listen())
            for number, (rgb, _) in enumerate(town_frames()[:6]):
                await run.add_frame(rgb, captured_at_s=number / 5)
            result = await run.finish()
            await listening
            assert run.verdict == result.verdict
        return events, result.summary["frames_received"]

    events, num_received = asyncio.run(feed())
    assert num_received == 6
    assert isinstance(events[0], livesfm.events.RunStarted)
    assert any(isinstance(event, livesfm.events.RunFinished) for event in events)


def test_a_run_is_for_one_block_and_entering_it_again_leaves_its_folder_as_it_is(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run"

    def files() -> dict[Path, int]:
        return {one: one.stat().st_mtime_ns for one in path.rglob("*") if one.is_file()}

    async def enter_twice() -> None:
        run = livesfm.AsyncRun(path, overrides=LEAN, lossless=True, overwrite=True)
        async with run:
            await run.add_frame(town_frames()[0][0])
            with pytest.raises(livesfm.RunEndedError, match="one `async with` block; open another"):
                await run.__aenter__()
        before = files()
        with pytest.raises(livesfm.RunEndedError, match="open another"):
            async with run:
                pass
        assert files() == before

    asyncio.run(enter_twice())
    assert json.loads((path / "summary.json").read_text())["frames_received"] == 1


def test_entering_a_run_that_has_ended_changes_nothing_in_its_folder(tmp_path: Path) -> None:
    with livesfm.open_run(tmp_path / "run", overrides=LEAN, overwrite=True) as run:
        pass
    before = (tmp_path / "run" / "summary.json").stat().st_mtime_ns
    with run, pytest.raises(livesfm.RunEndedError):
        run.add_frame(town_frames()[0][0])
    assert (tmp_path / "run" / "summary.json").stat().st_mtime_ns == before


def test_a_frame_whose_waiting_is_cancelled_is_not_added_and_may_be_added_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_read = threading.Event()
    run_it = Engine.run

    async def run_later(engine: Engine) -> RunOutcome:
        await asyncio.to_thread(may_read.wait)
        return await run_it(engine)

    async def feed() -> Mapping[str, Any]:
        async with livesfm.AsyncRun(tmp_path / "run", config="phone", lossless=True) as run:
            rgb = town_frames()[0][0]
            assert [await run.add_frame(rgb, captured_at_s=at_s) for at_s in range(4)] == [
                *range(4)
            ]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(run.add_frame(rgb, captured_at_s=4.0), 0.1)
            with pytest.raises(TimeoutError, match="no frame"):
                await run.add_frame(rgb, captured_at_s=4.0, timeout_s=0.1)
            may_read.set()
            assert await run.add_frame(rgb, captured_at_s=4.0) == 4
            return (await run.finish()).summary

    monkeypatch.setattr(Engine, "run", run_later)
    assert asyncio.run(feed())["frames_received"] == 5


def test_cancelling_while_a_run_is_opened_leaves_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_opening, may_open = threading.Event(), threading.Event()
    runs: list[livesfm.Run] = []

    def open_later(path: Path, **options: Any) -> livesfm.Run:
        is_opening.set()
        may_open.wait()
        runs.append(livesfm.open_run(path, **options))
        return runs[-1]

    async def open_and_cancel() -> None:
        entering = asyncio.create_task(livesfm.AsyncRun(tmp_path / "run").__aenter__())
        await asyncio.to_thread(is_opening.wait)
        entering.cancel()
        await asyncio.sleep(0)
        may_open.set()
        with pytest.raises(asyncio.CancelledError):
            await entering
        assert [run.is_going_on for run in runs] == [False]

    monkeypatch.setattr(async_run, "open_run", open_later)
    asyncio.run(open_and_cancel())


def test_events_end_where_the_run_ends_by_itself(tmp_path: Path) -> None:
    async def feed() -> list[livesfm.Event]:
        overrides = {"sources.max_frames": 1}
        async with livesfm.AsyncRun(tmp_path / "run", overrides=overrides, lossless=True) as run:
            await run.add_frame(town_frames()[0][0])
            return [event async for event in run.events()]

    events = asyncio.run(asyncio.wait_for(feed(), HANG_S))
    assert any(isinstance(event, livesfm.events.RunFinished) for event in events)


def test_what_is_cancelled_in_the_block_ends_the_run_and_saves_it(tmp_path: Path) -> None:
    async def feed(has_added: asyncio.Event) -> None:
        async with livesfm.AsyncRun(tmp_path / "run", lossless=True) as run:
            await run.add_frame(town_frames()[0][0])
            has_added.set()
            await asyncio.Event().wait()

    async def cancel() -> None:
        has_added = asyncio.Event()
        feeding = asyncio.create_task(feed(has_added))
        await has_added.wait()
        feeding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await feeding

    asyncio.run(asyncio.wait_for(cancel(), HANG_S))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["frames_received"], summary["frames_dropped"]) == (1, {})


def test_the_twin_for_event_loops_has_all_that_a_run_has() -> None:
    missing = {
        name for name in vars(livesfm.Run) if not name.startswith("_") and name != "is_going_on"
    } - set(vars(livesfm.AsyncRun))
    assert missing == set()
    plain, twin = (
        inspect.signature(kind.add_frame).parameters for kind in (livesfm.Run, livesfm.AsyncRun)
    )
    assert dict(plain) == dict(twin)


def test_the_example_of_the_page_runs_and_prints_the_poses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(livesfm.__file__).parent.parent / "README.md").read_text()
    example = page.split("```python\n")[1].split("```")[0]
    frames = [(number / 10, rgb) for number, (rgb, _) in enumerate(town_frames())]
    monkeypatch.chdir(tmp_path)
    names = {"frames": frames}
    exec(compile(example, "README.md", "exec"), names)  # noqa: S102 - our own page
    assert names["model"].num_reg_images() >= 4  # type: ignore[attr-defined]
    printed = capsys.readouterr().out.splitlines()
    assert len({line.split()[0] for line in printed if "[" in line}) >= len(FRAMES) - 2
    assert len(example.strip().splitlines()) <= 15
