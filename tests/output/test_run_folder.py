from __future__ import annotations

import csv
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.errors import ConfigError, JournalError
from engine.events import FrameDropped, FramePosed, RunStarted
from engine.geometry import camera_center, rotation_from_quat_xyzw, rotation_from_vector
from engine.output.run_folder import (
    KEYFRAME_STATUS,
    TRACKED_STATUS,
    RunFolder,
    dropped_status,
    format_timestamp,
    trajectory_name,
    unique_run_path,
)
from engine.output.run_format import FORMAT_VERSION, format_line, read_format_version
from engine.output.run_lock import RunLock
from engine.types import DropReason, Frame, FrameId, FramePose, PoseKind, RejectedFrame


def frame(number: int, *, captured_at_s: float | None = None, name: str | None = None) -> Frame:
    return Frame(
        frame_id=FrameId(number),
        camera_key="camera",
        source="clip.mp4",
        index=number - 1,
        name=name or f"{number:06d}.jpg",
        captured_at_s=number / 30 if captured_at_s is None else captured_at_s,
        received_at_s=0.0,
        pixels=np.zeros((2, 2, 3), np.uint8),
    )


def rejected(index: int) -> RejectedFrame:
    return RejectedFrame(
        source="photos",
        index=index,
        name="notes.jpg",
        captured_at_s=float(index),
        reason=DropReason.UNREADABLE,
        detail="not an image",
    )


def pose(number: int, *, captured_at_s: float, seed: int = 0) -> FramePose:
    rng = np.random.default_rng(seed + number)
    rotation = rotation_from_vector(rng.normal(size=3))
    return FramePose(
        frame_id=FrameId(number),
        index=number - 1,
        captured_at_s=captured_at_s,
        cam_from_world=np.column_stack([rotation, rng.normal(size=3)]),
        is_keyframe=True,
    )


def rows_of(run: RunFolder) -> list[dict[str, str]]:
    with (run.path / "frames.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def tum_of(path: Path) -> list[list[float]]:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("#")
    return [[float(value) for value in line.split()] for line in lines[1:]]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", config_text="sift:\n  max_features: 7\n")


def test_a_new_run_has_its_configuration_and_empty_tables(run: RunFolder) -> None:
    assert (run.path / "config.yaml").read_text() == format_line() + "sift:\n  max_features: 7\n"
    assert read_format_version(run.path) == FORMAT_VERSION
    assert (run.path / "images").is_dir()
    assert (run.path / "snapshots").is_dir()
    assert (run.path / "events.jsonl").read_text() == ""
    assert rows_of(run) == []
    assert tum_of(run.path / "trajectory_live.txt") == []
    header = (run.path / "frames.csv").read_text()
    assert header == "frame_id,source,index,name,captured_at_s,status,pose,map\n"


def test_an_empty_folder_may_become_a_run(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, config_text="")
    assert (tmp_path / "frames.csv").is_file()


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not empty"):
        RunFolder.create(tmp_path, config_text="")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_foreign_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "wedding.jpg").write_bytes(b"precious")
    (tmp_path / "config.yaml").write_text("a: 1\n")
    (tmp_path / "frames.csv").write_text("time,name\n")
    with pytest.raises(ConfigError, match="not the folder of a run"):
        RunFolder.create(tmp_path, config_text="", overwrite=True)
    assert (tmp_path / "images" / "wedding.jpg").read_bytes() == b"precious"


def test_overwriting_a_run_deletes_what_runs_write_and_nothing_else(run: RunFolder) -> None:
    run.frame_arrived(rejected(0))
    run.write_summary({"keyframes": 3})
    run.close()
    path = run.path
    (path / "images" / "old.jpg").write_bytes(b"old")
    (path / "masks").mkdir()
    (path / "masks" / "old.jpg.png").write_bytes(b"old")
    (path / "profile").mkdir()
    (path / "profile" / "MainThread.prof").write_bytes(b"old")
    (path / "snapshots" / "000001").mkdir()
    (path / "latest").symlink_to("snapshots/000001")
    (path / ".tmp-summary.json-7").write_text("half")
    for name in ("trajectory.txt", "trajectory_1.txt", "trajectory_12.txt"):
        (path / name).write_text("old")
    (path / "notes.md").write_text("mine")
    (path / "export").mkdir()
    again = RunFolder.create(path, config_text="b: 2\n", overwrite=True)
    assert rows_of(again) == []
    assert sorted(entry.name for entry in path.iterdir()) == [
        ".lock",
        "config.yaml",
        "events.jsonl",
        "export",
        "frames.csv",
        "images",
        "notes.md",
        "snapshots",
        "trajectory_live.txt",
    ]
    assert not any((path / "images").iterdir())
    assert not any((path / "snapshots").iterdir())


def test_a_run_that_was_killed_while_its_folder_was_made_may_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(ConfigError, match="not the folder of a run"):
        RunFolder.create(tmp_path, config_text="", overwrite=True)
    (tmp_path / ".lock").write_text("")
    RunFolder.create(tmp_path, config_text="", overwrite=True).close()
    (tmp_path / "frames.csv").unlink()
    (tmp_path / ".lock").write_text("")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not the folder of a run"):
        RunFolder.create(tmp_path, config_text="", overwrite=True)


def test_overwriting_does_not_follow_links_out_of_the_run(run: RunFolder, tmp_path: Path) -> None:
    run.close()
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"a")
    (run.path / "images").rmdir()
    (run.path / "images").symlink_to(photos)
    RunFolder.create(run.path, config_text="", overwrite=True)
    assert (photos / "a.jpg").exists()
    assert not (run.path / "images").is_symlink()


def test_a_run_whose_table_had_no_columns_of_poses_may_be_overwritten(run: RunFolder) -> None:
    run.close()
    (run.path / "frames.csv").write_text("frame_id,source,index,name,captured_at_s,status\n")
    RunFolder.create(run.path, config_text="", overwrite=True)
    assert (run.path / "frames.csv").read_text().startswith("frame_id,")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder.create(tmp_path / "run", config_text="", overwrite=True)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        RunFolder.create(tmp_path / "file" / "run", config_text="")


def test_rows_follow_the_order_of_arrival_whatever_settles_first(run: RunFolder) -> None:
    run.frame_arrived(frame(1))
    run.frame_arrived(rejected(1))
    run.frame_arrived(frame(2))
    run.frame_arrived(frame(3))
    run.frame_settled(FrameId(3), status=dropped_status(DropReason.OVERLOAD))
    run.frame_settled(FrameId(2), status=TRACKED_STATUS)
    assert rows_of(run) == []
    run.frame_settled(FrameId(1), status=KEYFRAME_STATUS)
    assert [(row["frame_id"], row["status"]) for row in rows_of(run)] == [
        ("1", "keyframe"),
        ("", "dropped:unreadable"),
        ("2", "tracked"),
        ("3", "dropped:overload"),
    ]
    assert rows_of(run)[1]["name"] == "notes.jpg"


def test_frames_whose_turn_never_came_are_counted_as_stopped(run: RunFolder) -> None:
    run.frame_arrived(frame(1))
    run.frame_arrived(frame(2))
    run.frame_settled(FrameId(2), status=TRACKED_STATUS)
    run.close()
    assert [row["status"] for row in rows_of(run)] == ["dropped:stopped", "tracked"]


def test_a_status_is_given_once(run: RunFolder) -> None:
    run.frame_arrived(frame(1))
    run.frame_settled(FrameId(1), status=KEYFRAME_STATUS)
    with pytest.raises(KeyError):
        run.frame_settled(FrameId(1), status=TRACKED_STATUS)


def of_map(poses: list[FramePose], *kinds: PoseKind) -> list[FramePose]:
    return [replace(one, kind=kind) for one, kind in zip(poses, kinds, strict=True)]


def test_the_pose_of_every_frame_is_in_the_table_once_the_run_ends(run: RunFolder) -> None:
    for number in range(1, 7):
        run.frame_arrived(frame(number, name=f'a,"{number}"\n.jpg'))
        if number != 5:
            run.frame_settled(FrameId(number), status=TRACKED_STATUS)
    run.frame_arrived(rejected(6))
    poses = [pose(number, captured_at_s=float(number)) for number in range(1, 5)]
    run.write_trajectories(
        [
            of_map(poses[:3], PoseKind.KEYFRAME, PoseKind.TRACKED, PoseKind.INTERPOLATED),
            of_map(poses[3:], PoseKind.TRACKED),
        ]
    )
    assert {(row["pose"], row["map"]) for row in rows_of(run)} == {("", "")}
    before = rows_of(run)
    run.close()
    rows = rows_of(run)
    assert [(row["frame_id"], row["pose"], row["map"]) for row in rows] == [
        ("1", "keyframe", "0"),
        ("2", "tracked", "0"),
        ("3", "interpolated", "0"),
        ("4", "tracked", "1"),
        ("5", "none", ""),
        ("6", "none", ""),
        ("", "none", ""),
    ]
    for row, former in zip(rows, before, strict=False):
        assert row | {"pose": "", "map": ""} == former


def test_a_run_that_ends_without_poses_leaves_their_columns_empty(run: RunFolder) -> None:
    run.frame_arrived(frame(1))
    run.close()
    assert [(row["status"], row["pose"], row["map"]) for row in rows_of(run)] == [
        ("dropped:stopped", "", "")
    ]


def test_without_a_map_no_frame_has_a_pose(run: RunFolder) -> None:
    run.frame_arrived(frame(1))
    run.frame_settled(FrameId(1), status=KEYFRAME_STATUS)
    run.write_trajectories([])
    run.close()
    assert [(row["pose"], row["map"]) for row in rows_of(run)] == [("none", "")]
    assert tum_of(run.path / "trajectory.txt") == []
    assert not (run.path / "trajectory_1.txt").exists()


def test_a_full_disk_keeps_the_table_as_it_was(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.frame_arrived(frame(1))
    run.frame_settled(FrameId(1), status=KEYFRAME_STATUS)
    run.write_trajectories([[pose(1, captured_at_s=0.0)]])
    before = (run.path / "frames.csv").read_bytes()

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(JournalError, match="No space left"):
        run.close()
    assert (run.path / "frames.csv").read_bytes() == before
    assert not list(run.path.glob(".tmp-*"))


def test_each_map_has_a_trajectory_of_its_own(run: RunFolder) -> None:
    numbers = [(1, 2), (3,), (4, 5, 6)]
    run.write_trajectories([[pose(n, captured_at_s=float(n)) for n in own] for own in numbers])
    for map_idx, own in enumerate(numbers):
        rows = tum_of(run.path / trajectory_name(map_idx))
        assert [row[0] for row in rows] == [float(number) for number in own]
    assert [trajectory_name(map_idx) for map_idx in range(2)] == [
        "trajectory.txt",
        "trajectory_1.txt",
    ]


def test_names_with_commas_and_line_breaks_and_bad_unicode_stay_one_row(run: RunFolder) -> None:
    for number, name in enumerate(('a,"b".jpg', "two\nlines.jpg", "caf\udce9.jpg", "日本.jpg"), 1):
        run.frame_arrived(frame(number, name=name))
        run.frame_settled(FrameId(number), status=KEYFRAME_STATUS)
    names = [row["name"] for row in rows_of(run)]
    assert names == ['a,"b".jpg', "two\nlines.jpg", "caf\\udce9.jpg", "日本.jpg"]


@pytest.mark.parametrize("captured_at_s", [0.0, 12.0, 1 / 30, 1e-7, 1_763_800_000.123456])
def test_times_match_between_frames_and_trajectories(run: RunFolder, captured_at_s: float) -> None:
    run.frame_arrived(frame(1, captured_at_s=captured_at_s))
    run.frame_settled(FrameId(1), status=KEYFRAME_STATUS)
    poses = [pose(1, captured_at_s=captured_at_s)]
    run.write_trajectories([poses])
    run.append_live_pose(poses[0])
    in_table = rows_of(run)[0]["captured_at_s"]
    for name in ("trajectory.txt", "trajectory_live.txt"):
        assert (run.path / name).read_text().splitlines()[1].split()[0] == in_table
    assert float(in_table) == pytest.approx(captured_at_s, abs=1e-9)


def test_a_folder_without_times_has_plain_indices() -> None:
    assert [format_timestamp(value) for value in (0.0, 10.0, 0.5)] == ["0", "10", "0.5"]


def test_a_trajectory_is_world_from_cam_sorted_by_time(run: RunFolder) -> None:
    poses = [pose(number, captured_at_s=10.0 - number) for number in (1, 2, 3)]
    run.write_trajectories([poses])
    rows = tum_of(run.path / "trajectory.txt")
    assert [row[0] for row in rows] == [7.0, 8.0, 9.0]
    for row, expected in zip(rows, reversed(poses), strict=True):
        center = camera_center(expected.cam_from_world)
        world_from_cam = rotation_from_quat_xyzw(np.array(row[4:]))
        np.testing.assert_allclose(row[1:4], center, atol=1e-10)
        np.testing.assert_allclose(world_from_cam.T, expected.cam_from_world[:, :3], atol=1e-10)


def test_each_world_has_a_live_trajectory_of_its_own(run: RunFolder) -> None:
    for number, world_number in enumerate((0, 2, 0, 2)):
        run.append_live_pose(replace(pose(number, captured_at_s=number), world_number=world_number))
    for name, times in (("trajectory_live.txt", [0.0, 2.0]), ("trajectory_live_2.txt", [1.0, 3.0])):
        assert (run.path / name).read_text().startswith("# timestamp")
        assert [row[0] for row in tum_of(run.path / name)] == times
    run.close()
    RunFolder.create(run.path, config_text="", overwrite=True).close()
    assert not (run.path / "trajectory_live_2.txt").exists()


def test_the_live_trajectory_keeps_the_order_of_reports(run: RunFolder) -> None:
    for number, captured_at_s in ((1, 2.0), (2, 1.0)):
        run.append_live_pose(pose(number, captured_at_s=captured_at_s))
    assert [row[0] for row in tum_of(run.path / "trajectory_live.txt")] == [2.0, 1.0]


def test_ground_truth_is_written_in_order_of_time(run: RunFolder) -> None:
    truth = [(float(t), pose(t, captured_at_s=0).cam_from_world) for t in (3, 1, 2)]
    run.write_groundtruth(truth)
    rows = tum_of(run.path / "groundtruth.txt")
    assert [row[0] for row in rows] == [1.0, 2.0, 3.0]
    np.testing.assert_allclose(rows[2][1:4], camera_center(truth[0][1]), atol=1e-10)


def test_events_are_readable_line_by_line_at_once(run: RunFolder) -> None:
    run.append_event(RunStarted(at_s=0.0, sources=("a", "b"), matcher="sift"))
    run.append_event(
        FrameDropped(
            at_s=0.1,
            frame_id=None,
            source="a",
            index=4,
            name="x",
            captured_at_s=0.4,
            reason=DropReason.DUPLICATE,
            detail="same\nbytes",
        )
    )
    run.append_event(
        FramePosed(
            camera_key="camera",
            at_s=0.2,
            frame_id=FrameId(1),
            captured_at_s=0.5,
            cam_center_in_world=(float("nan"), 0.0, 1.0),
            world_from_cam_quat_xyzw=(0.0, 0.0, 0.0, 1.0),
            is_first=True,
            is_keyframe=True,
            latency_s=0.01,
        )
    )
    records = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [record["event"] for record in records] == ["RunStarted", "FrameDropped", "FramePosed"]
    assert records[0]["sources"] == ["a", "b"]
    assert records[1]["reason"] == "duplicate"
    assert records[2]["cam_center_in_world"] == [None, 0.0, 1.0]


def test_the_summary_is_strict_json(run: RunFolder) -> None:
    run.write_summary(
        {
            "mean_reprojection_error_px": float("nan"),
            "latency_ms": {"p50": np.float64(12.5), "max": float("inf")},
            "keyframes": np.int64(4),
            "georeferenced": False,
        }
    )
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary == {
        "mean_reprojection_error_px": None,
        "latency_ms": {"p50": 12.5, "max": None},
        "keyframes": 4,
        "georeferenced": False,
    }


def test_a_full_disk_leaves_whole_lines_and_loses_no_row(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.frame_arrived(frame(1))
    run.frame_settled(FrameId(1), status=KEYFRAME_STATUS)
    write = os.write

    def write_half(descriptor: int, data: bytes) -> int:
        if len(data) > 4:
            return write(descriptor, data[:4])
        raise OSError(28, "No space left on device")

    run.frame_arrived(frame(2))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_half)
        with pytest.raises(JournalError, match="No space left"):
            run.frame_settled(FrameId(2), status=TRACKED_STATUS)
        with pytest.raises(JournalError, match="No space left"):
            run.append_event(RunStarted(at_s=0.0, sources=(), matcher="sift"))
    assert [row["frame_id"] for row in rows_of(run)] == ["1"]
    assert (run.path / "events.jsonl").read_text() == ""
    run.frame_arrived(rejected(2))
    assert [row["status"] for row in rows_of(run)] == ["keyframe", "tracked", "dropped:unreadable"]


def test_a_full_disk_keeps_the_former_document(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.write_summary({"keyframes": 1})

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(JournalError, match="No space left"):
        run.write_summary({"keyframes": 2})
    with pytest.raises(JournalError, match="No space left"):
        run.write_trajectories([[pose(1, captured_at_s=0.0)]])
    assert json.loads((run.path / "summary.json").read_text()) == {"keyframes": 1}
    assert not (run.path / "trajectory.txt").exists()
    assert not list(run.path.glob(".tmp-*"))


def test_default_names_never_collide_with_a_former_run(tmp_path: Path) -> None:
    first = unique_run_path(tmp_path, "fox")
    first.mkdir()
    second = unique_run_path(tmp_path, "fox")
    second.write_text("")
    assert [first.name, second.name, unique_run_path(tmp_path, "fox").name] == [
        "fox",
        "fox-2",
        "fox-3",
    ]


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("rtsp://10.0.0.1/live?a=b", "rtsp-10.0.0.1-live-a-b"),
        ("../../etc", "etc"),
        ("Été 1", "Été-1"),
        ("..", "run"),
    ],
)
def test_default_names_stay_inside_their_folder(tmp_path: Path, stem: str, name: str) -> None:
    assert unique_run_path(tmp_path, stem) == tmp_path / name


def test_a_link_to_nothing_is_refused_by_where_it_leads(tmp_path: Path) -> None:
    link = tmp_path / "out"
    link.symlink_to("/nowhere/card")
    with pytest.raises(ConfigError, match="out: is a link to /nowhere/card, which is not there"):
        RunFolder.create(link, config_text="")
    assert not link.exists()


def test_what_dead_processes_left_unfinished_is_deleted_when_a_folder_is_reopened(
    run: RunFolder, tmp_path: Path
) -> None:
    run.close()
    path = run.path
    process = subprocess.Popen(["true"])
    process.wait()
    dead, living = process.pid, os.getppid()
    for folder in ("products", "dense", "masks"):
        (path / folder).mkdir()
    photos = tmp_path / "photos"
    photos.mkdir()
    (path / "profile").symlink_to(photos)
    left = [
        path / f".tmp-frames.csv-{dead}",
        path / "products" / f".tmp-dense.ply-{dead}",
        path / "products" / f".tmp-{dead}-orthophoto.tif",
        path / "dense" / f".tmp-000004.npz-{dead}",
        path / "masks" / f".tmp-a.jpg.png-{os.getpid()}",  # of a former process of this number
    ]
    kept = [
        path / "products" / "dense.ply",
        path / "products" / f".tmp-dense.ply-{living}",
        path / "dense" / "000003.npz",
        photos / f".tmp-mine-{dead}",
    ]
    for file in left + kept:
        file.write_bytes(b"half")
    unfinished = path / "snapshots" / f".tmp-000002-{dead}"
    (unfinished / "sparse").mkdir(parents=True)
    lock = RunLock.acquire(path)
    RunFolder.reopen(path, (), config_text="{}", lock=lock).close()
    assert [file.name for file in [*left, unfinished] if file.exists()] == []
    assert [file.name for file in kept if not file.exists()] == []
