"""What is finished of a run that goes on, and what is to be read again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.events import (
    Event,
    FrameDropped,
    FrameReceived,
    KeyframeAdded,
    RunFinished,
    RunResumed,
    SourceOpened,
)
from engine.mapping.stored_state import StoredFrame, StoredKeyframe, StoredRelativePose, StoredRun
from engine.output.recovery import FormerRun, recover_run
from engine.types import PROGRAM_LABEL, DropReason, FrameId
from tests.support.fake_runs import world_of

WORLD = world_of(12)
VIDEO = SourceOpened(source="a.mp4", address="/a.mp4", prefix="", is_live=False, fingerprint="1 2")
CAMERA = SourceOpened(
    source="rtsp://c/s", address="rtsp://c/s", prefix="source2", is_live=True, fingerprint=""
)


def frame(
    number: int, status: str | None, *, source: str = "a.mp4", name: str = "", index: int = -1
) -> StoredFrame:
    """A frame whose index is one less than its id; without an id it was rejected."""
    index = number - 1 if index < 0 else index
    return StoredFrame(
        frame_id=FrameId(number) if number else None,
        camera_key="camera",
        source=source,
        index=index,
        name=name or f"{index:06d}.jpg",
        captured_at_s=0.1 * index,
        status=status,
    )


def stored(
    path: Path,
    frames: Sequence[StoredFrame],
    *,
    keyframes: Sequence[int],
    posed: Sequence[int] = (),
    waiting: Sequence[int] = (),
) -> StoredRun:
    """A run that holds these frames; keyframes are those of a world."""
    source_of = {one.frame_id: one.source for one in frames}
    return StoredRun(
        path=path,
        keyframes=tuple(
            StoredKeyframe(
                keyframe=WORLD.keyframe(FrameId(i)), camera_id=1, source=source_of[FrameId(i)]
            )
            for i in keyframes
        ),
        pairs=(),
        tried=(),
        cameras={},
        calibrations={},
        relative_poses=tuple(
            StoredRelativePose(
                frame_id=FrameId(i),
                keyframe_id=FrameId(1),
                index=i - 1,
                captured_at_s=0.0,
                cam_from_keyframe=np.eye(3, 4) if i in posed else None,
            )
            for i in (*posed, *waiting)
        ),
        snapshots=(),
        frames=tuple(frames),
        gps_readings=(),
        next_frame_id=FrameId(max(one.frame_id or 0 for one in frames) + 1),
    )


def write_events(path: Path, events: Sequence[Event], *, rest: str = "") -> None:
    lines = [json.dumps({**one.as_record(), "at_s": 0.5 * i}) for i, one in enumerate(events)]
    (path / "events.jsonl").write_text("".join(f"{line}\n" for line in lines) + rest)


def received(number: int) -> FrameReceived:
    return FrameReceived(frame_id=FrameId(number), index=number - 1, captured_at_s=0.0)


def added(number: int) -> KeyframeAdded:
    return KeyframeAdded(
        frame_id=FrameId(number),
        camera_key="",
        name="",
        index=number - 1,
        captured_at_s=0.0,
        num_keypoints=1,
        is_photo=False,
    )


def dropped(reason: DropReason, **values: Any) -> FrameDropped:
    return FrameDropped(
        frame_id=values.get("frame_id"),
        source=values.get("source", "a.mp4"),
        index=0,
        name=values.get("name", ""),
        captured_at_s=0.0,
        reason=reason,
        detail="",
        num_frames=values.get("num_frames", 1),
    )


def ids(former: FormerRun) -> list[int | None]:
    return [one.frame_id for one in former.frames]


def test_what_no_journal_holds_and_no_status_settles_is_read_again(tmp_path: Path) -> None:
    frames = [
        frame(1, "keyframe"),
        frame(2, "tracked"),
        frame(3, "keyframe"),  # its row came before the journal
        frame(4, None),
        frame(5, "dropped:failed"),
        frame(6, "dropped:stopped"),
        frame(7, "keyframe"),
    ]
    write_events(tmp_path, [VIDEO])
    former = recover_run(stored(tmp_path, frames, keyframes=(1, 7)))
    assert ids(former) == [1, 2, 5, 7]
    assert former.num_again == 3
    (source,) = former.sources
    assert source.taken.names == {
        0: "000000.jpg",
        1: "000001.jpg",
        4: "000004.jpg",
        6: "000006.jpg",
    }
    assert source.taken.fingerprint == "1 2"
    assert former.next_frame_id == 8


def test_frames_tracked_from_the_last_keyframe_are_read_again_unless_their_poses_are_kept(
    tmp_path: Path,
) -> None:
    frames = [frame(1, "keyframe"), frame(2, "tracked"), frame(3, "tracked")]
    write_events(tmp_path, [VIDEO])
    assert ids(recover_run(stored(tmp_path, frames, keyframes=(1,), posed=(2,)))) == [1, 2]


def test_tracked_frames_that_waited_for_a_pose_are_read_again(tmp_path: Path) -> None:
    frames = [frame(1, "keyframe"), frame(2, "tracked"), frame(3, "tracked"), frame(4, "keyframe")]
    write_events(tmp_path, [VIDEO])
    former = recover_run(stored(tmp_path, frames, keyframes=(1, 4), posed=(3,), waiting=(2,)))
    assert ids(former) == [1, 3, 4]
    assert [one.frame_id for one in former.stored.relative_poses] == [3]


def test_a_frame_that_arrived_in_several_parts_is_read_again_once_or_not_at_all(
    tmp_path: Path,
) -> None:
    frames = [
        *(frame(1, "keyframe"), frame(2, None), frame(3, None)),
        *(frame(4, "keyframe", index=1), frame(5, None, index=2)),
    ]
    write_events(tmp_path, [VIDEO])
    former = recover_run(stored(tmp_path, frames, keyframes=(1, 4)))
    assert (ids(former), former.num_again) == ([1, 4], 1)


def test_a_run_that_ended_by_itself_has_finished_all_that_it_tracked(tmp_path: Path) -> None:
    frames = [frame(1, "keyframe"), frame(2, "tracked")]
    finished = RunFinished(stopped_by="signal", num_keyframes=1, num_registered=0)
    write_events(tmp_path, [VIDEO, finished])
    assert ids(recover_run(stored(tmp_path, frames, keyframes=(1,)))) == [1, 2]


def test_frames_of_a_live_source_do_not_come_again(tmp_path: Path) -> None:
    frames = [
        frame(1, "keyframe", source="rtsp://c/s", name="source2/000000.jpg"),
        frame(2, "tracked", source="rtsp://c/s", name="source2/000001.jpg"),
        frame(0, "dropped:stopped", source="rtsp://c/s", name="source2/000002.jpg", index=2),
        frame(3, None, source="rtsp://c/s", name="source2/000003.jpg", index=3),
    ]
    write_events(tmp_path, [VIDEO, CAMERA])
    former = recover_run(stored(tmp_path, frames, keyframes=(1,)))
    assert ids(former) == [1, 2, None, 3]
    assert former.frames[-1].status == "dropped:stopped"
    assert ([one.frame_id for one in former.lost], former.num_again) == ([3], 0)
    video, camera = former.sources
    assert not video.taken.names
    assert (camera.prefix, camera.taken.next_index) == ("source2", 4)
    assert camera.taken.names[0] == "000000.jpg"
    assert former.next_source_number == 3


def test_frames_that_a_program_added_do_not_come_again_whether_it_waited_or_not(
    tmp_path: Path,
) -> None:
    frames = [
        frame(1, "keyframe", source=PROGRAM_LABEL),
        frame(2, "tracked", source=PROGRAM_LABEL),
        frame(3, None, source=PROGRAM_LABEL),
    ]
    program = replace(VIDEO, source=PROGRAM_LABEL, address="")
    for opened in ([program], []):
        write_events(tmp_path, opened)
        former = recover_run(stored(tmp_path, frames, keyframes=(1,)))
        assert [one.is_of_program for one in former.sources] == [True]
        assert [one.status for one in former.frames] == ["keyframe", "tracked", "dropped:stopped"]
        assert ([one.frame_id for one in former.lost], former.num_again) == ([3], 0)


def test_a_file_with_the_name_of_what_programs_add_is_read_again(tmp_path: Path) -> None:
    file = replace(VIDEO, source=PROGRAM_LABEL)
    write_events(tmp_path, [file])
    frames = [frame(1, "keyframe", source=PROGRAM_LABEL), frame(2, None, source=PROGRAM_LABEL)]
    former = recover_run(stored(tmp_path, frames, keyframes=(1,)))
    assert [one.is_of_program for one in former.sources] == [False]
    assert former.num_again == 1


def test_a_keyframe_of_a_live_source_that_the_journal_lost_is_dropped(tmp_path: Path) -> None:
    frames = [frame(i, "keyframe", source="rtsp://c/s") for i in (1, 2)]
    write_events(tmp_path, [CAMERA, received(1), added(1), received(2), added(2)])
    former = recover_run(stored(tmp_path, frames, keyframes=(1,)))
    assert [one.status for one in former.frames] == ["keyframe", "dropped:stopped"]
    assert ([one.frame_id for one in former.lost], former.num_again) == ([2], 0)
    figures = former.statistics.figures()
    assert (figures["frames_received"], figures["keyframes"]) == (2, 1)


def test_statistics_count_what_is_finished_once(tmp_path: Path) -> None:
    frames = [
        frame(1, "keyframe"),
        frame(2, "keyframe"),
        frame(0, "dropped:unreadable", name="2.jpg"),
        frame(4, "dropped:failed"),
    ]
    events = [
        VIDEO,
        *(received(1), added(1), received(2), added(2)),
        dropped(DropReason.STOPPED),
        dropped(DropReason.UNREADABLE, name="2.jpg", num_frames=3),
        dropped(DropReason.UNREADABLE, name="2.jpg", num_frames=3),  # it came again
        dropped(DropReason.UNREADABLE, name="3.jpg"),  # the journal has not got it
        *(received(4), dropped(DropReason.FAILED, frame_id=4)),
        *(received(5), dropped(DropReason.FAILED, frame_id=5)),  # nor this one
    ]
    write_events(tmp_path, events)
    figures = recover_run(stored(tmp_path, frames, keyframes=(1,))).statistics.figures()
    assert figures["frames_received"] == 1 + 3 + 1
    assert figures["frames_dropped"] == {"failed": 1, "unreadable": 3}
    assert figures["keyframes"] == 1


def test_the_clock_the_parts_and_the_ids_go_on_also_from_half_a_line(tmp_path: Path) -> None:
    resumed = RunResumed(
        sources=("a.mp4",), matcher="", num_keyframes=0, num_registered=0, num_frames_again=0
    )
    write_events(tmp_path, [VIDEO, resumed, received(40)], rest='{"event": "FrameRec')
    former = recover_run(stored(tmp_path, [frame(1, "keyframe")], keyframes=(1,)))
    assert (former.ended_at_s, former.part, former.next_frame_id) == (1.0, 3, 41)


@pytest.mark.parametrize("end", ["\u0085", "\u2028", "\u2029"])
def test_events_with_other_ends_of_lines_in_their_names_are_read(tmp_path: Path, end: str) -> None:
    source = replace(VIDEO, source=f"a{end}b")
    text = json.dumps(source.as_record(), ensure_ascii=False)
    (tmp_path / "events.jsonl").write_text(f"{text}\n", encoding="utf-8")
    former = recover_run(stored(tmp_path, [frame(1, "keyframe")], keyframes=(1,)))
    assert [one.label for one in former.sources] == [source.source]


def test_events_that_are_no_file_are_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "events.jsonl")
    former = recover_run(stored(tmp_path, [frame(1, "keyframe")], keyframes=(1,)))
    assert former.part == 2


def test_a_run_without_events_still_has_the_sources_of_its_journal(tmp_path: Path) -> None:
    former = recover_run(stored(tmp_path, [frame(1, "keyframe")], keyframes=(1,)))
    assert [(one.label, one.taken.next_index) for one in former.sources] == [("a.mp4", 1)]
    assert (former.part, former.ended_at_s) == (2, 0.0)


def test_keyframes_that_the_journal_has_count_though_their_events_are_lost(tmp_path: Path) -> None:
    frames = [frame(number, "keyframe") for number in (1, 2, 3)]
    write_events(tmp_path, [VIDEO, received(1), added(1), received(2)])
    former = recover_run(stored(tmp_path, frames, keyframes=(1, 2, 3)))
    figures = former.statistics.figures()
    assert (figures["frames_received"], figures["keyframes"]) == (3, 3)


def test_keyframes_whose_images_are_gone_or_empty_are_named(tmp_path: Path) -> None:
    run = stored(tmp_path, [frame(1, "keyframe"), frame(2, "keyframe")], keyframes=(1, 2))
    first, second = run.keyframes
    write_events(tmp_path, [VIDEO])
    former = recover_run(replace(run, keyframes=(first, replace(second, has_image=False))))
    assert former.without_image == (second.keyframe.name,)
