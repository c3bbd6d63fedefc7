from __future__ import annotations

import csv
import errno
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycolmap
import pytest

from engine.config import RuntimeConfig, SnapshotsConfig
from engine.errors import SnapshotError
from engine.events import Event, SnapshotWritten, Warned
from engine.mapping.steps import KeyframeRecord, MapCopy, MappingStep
from engine.matching.overlays import OverlayMask
from engine.output import recorder as recorder_module
from engine.output import snapshots as snapshots_module
from engine.output.files import LineFile
from engine.output.journal import Journal, encode_mask
from engine.output.recorder import Recorder
from engine.output.run_folder import RunFolder
from engine.output.run_lock import RunLock
from engine.types import (
    BoolArray,
    DropReason,
    Features,
    Frame,
    FrameId,
    FramePose,
    MapCounts,
    VerifiedPair,
)
from tests.support.fake_runs import JPEG, frame_of, rejected, trajectory_lines, world_of
from tests.support.synthetic import grown_map

WORLD = world_of(4)


class EmittedEvents(list[Event]):
    """Events in order."""

    def __call__(self, event: Event) -> None:
        self.append(event)


@dataclass(frozen=True, kw_only=True)
class Recording:
    recorder: Recorder
    events: EmittedEvents

    @property
    def path(self) -> Path:
        return self.recorder.path

    def rows(self) -> list[str]:
        """Statuses in frames.csv, in order."""
        with (self.path / "frames.csv").open(newline="") as file:
            return [row["status"] for row in csv.DictReader(file)]

    def warnings(self) -> list[str]:
        return [event.message for event in self.events if isinstance(event, Warned)]

    def add_keyframe(
        self,
        frame_id: int,
        frame: Frame | None = None,
        *,
        moved: Sequence[Features] = (),
        changed_pairs: tuple[VerifiedPair, ...] = (),
    ) -> None:
        frame = frame or frame_of(frame_id, world=WORLD)
        self.recorder.frame_arrived(frame)
        camera = WORLD.camera(frame_id).as_colmap()
        camera.camera_id = 1
        record = KeyframeRecord(
            keyframe=replace(WORLD.keyframe(frame_id), name=frame.name),
            camera=camera,
            pairs=tuple(WORLD.verified_pair(other, frame_id) for other in range(1, frame_id)),
            moved=tuple(moved),
            changed_pairs=changed_pairs,
        )
        self.recorder.step_taken(step_of(record), frame)


def step_of(record: KeyframeRecord | None = None) -> MappingStep:
    return MappingStep(record=record, new_poses=(), jobs=(), due=(), counts=MapCounts(), view=None)


def record(path: Path) -> Recording:
    emitted = EmittedEvents()
    folder = RunFolder.create(path, config_text="{}")
    recorder = Recorder(
        folder,
        snapshots=SnapshotsConfig(),
        runtime=RuntimeConfig(),
        emit=emitted,
    )
    return Recording(recorder=recorder, events=emitted)


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[Recording]:
    made = record(tmp_path / "run")
    yield made
    made.recorder.close()


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def model() -> MapCopy:
    return MapCopy(reconstruction=grown_map(WORLD).copy_reconstruction(), is_in_metres=False)


# -- what is written ------------------------------------------------------------------------------


def test_a_keyframe_is_journalled_with_its_image_and_pairs(recording: Recording) -> None:
    recording.add_keyframe(1)
    recording.add_keyframe(2)
    assert recording.rows() == ["keyframe", "keyframe"]
    assert (recording.path / "images" / "000001.jpg").read_bytes() == JPEG
    database = pycolmap.Database.open(recording.path / "database.db")
    assert (database.num_images(), database.num_cameras()) == (2, 1)
    matches = database.read_two_view_geometry(1, 2).inlier_matches
    np.testing.assert_array_equal(matches, WORLD.verified_pair(1, 2).inlier_matches_idx)
    database.close()
    assert recording.recorder.num_failed_writes == 0


def test_a_mask_that_frames_share_is_encoded_once_and_written_for_each(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(mask: BoolArray) -> bytes:
        calls.append(mask)
        return encode_mask(mask)

    monkeypatch.setattr(recorder_module, "encode_mask", counted)
    frame = frame_of(1)
    shared = np.ones((frame.height, frame.width), np.bool_)
    shared.flags.writeable = False
    for frame_id in (1, 2):
        recording.add_keyframe(frame_id, replace(frame_of(frame_id), mask=shared))
    recording.add_keyframe(3)
    files = sorted((recording.path / "masks").iterdir())
    assert [path.name for path in files] == ["000000.jpg.png", "000001.jpg.png"]
    assert files[0].read_bytes() == files[1].read_bytes() == encode_mask(shared)
    assert len(calls) == 1


def test_what_overlays_cover_is_taken_out_of_masks_and_masks_are_made_where_there_are_none(
    recording: Recording,
) -> None:
    frame = frame_of(1)
    given, beside_logo = (np.ones((frame.height, frame.width), np.bool_) for _ in range(2))
    given[:100] = False
    beside_logo[:, :70] = False
    recording.add_keyframe(1, replace(frame, mask=given))
    recording.add_keyframe(2)
    recording.add_keyframe(3)
    names = ("000000.jpg", "000001.jpg")
    recording.recorder.overlays_masked([OverlayMask(mask=beside_logo, image_names=names)])
    stored = {
        path.name: np.asarray(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)) > 0
        for path in (recording.path / "masks").iterdir()
    }
    assert sorted(stored) == ["000000.jpg.png", "000001.jpg.png"]
    assert np.array_equal(stored["000000.jpg.png"], given & beside_logo)
    assert np.array_equal(stored["000001.jpg.png"], beside_logo)
    assert recording.recorder.num_failed_writes == 0


def test_keypoints_that_a_keyframe_moved_elsewhere_are_journalled_with_it(
    recording: Recording,
) -> None:
    recording.add_keyframe(1)
    features = WORLD.keyframe(1).features
    moved = replace(features, keypoints_xy=features.keypoints_xy + 1.0)
    recording.add_keyframe(2, moved=[moved])
    database = pycolmap.Database.open(recording.path / "database.db")
    keypoints_xy = database.read_keypoints(1)[:, :2]
    database.close()
    np.testing.assert_array_equal(keypoints_xy, moved.keypoints_xy.astype(np.float32))
    # Of a keyframe that the journal does not have nothing can move; the others are journalled.
    recording.add_keyframe(3, moved=[replace(moved, frame_id=FrameId(4))])
    assert recording.recorder.num_failed_writes == 0
    assert recording.rows() == ["keyframe"] * 3


def test_a_frame_without_a_jpeg_of_its_own_is_encoded(recording: Recording) -> None:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    pixels = np.asarray(cv2.resize(coarse, (1000, 750)), np.uint8)
    recording.add_keyframe(1, replace(frame_of(1), pixels=pixels, jpeg=None))
    stored = cv2.imread(str(recording.path / "images" / "000000.jpg"))
    assert stored is not None
    error = np.abs(stored[:, :, ::-1].astype(int) - pixels)
    assert 0.0 < error.mean() < 2.0


def test_rows_wait_for_the_status_of_earlier_frames(recording: Recording) -> None:
    recorder = recording.recorder
    for frame_id in (1, 2, 3):
        recorder.frame_arrived(frame_of(frame_id))
    recorder.frame_arrived(rejected(3))
    recorder.frame_tracked(FrameId(2))
    assert recording.rows() == []
    recorder.frame_dropped(FrameId(1), DropReason.OVERLOAD)
    assert recording.rows() == ["dropped:overload", "tracked"]
    recorder.frame_tracked(FrameId(3))
    assert recording.rows() == ["dropped:overload", "tracked", "tracked", "dropped:unreadable"]


def test_closing_settles_what_is_left_as_stopped(tmp_path: Path) -> None:
    recording = record(tmp_path / "run")
    recording.recorder.frame_arrived(frame_of(1))
    recording.recorder.close()
    assert recording.rows() == ["dropped:stopped"]


def test_documents_are_readable_at_once(recording: Recording) -> None:
    recorder = recording.recorder
    pose = FramePose(
        frame_id=FrameId(1),
        index=0,
        captured_at_s=0.5,
        cam_from_world=np.eye(3, 4),
        is_keyframe=True,
    )
    recorder.events([Warned(at_s=0.5, message="careful")])
    recorder.live_poses([pose, pose])
    recorder.trajectories([[pose]])
    recorder.groundtruth([(0.0, np.eye(3, 4)), (0.1, np.eye(3, 4))])
    recorder.summary({"keyframes": 1, "ratio": float("nan")})
    (line,) = (recording.path / "events.jsonl").read_text().splitlines()
    assert json.loads(line) == {"event": "Warned", "at_s": 0.5, "message": "careful"}
    summary = json.loads((recording.path / "summary.json").read_text())
    assert summary == {"keyframes": 1, "ratio": None, "not_saved": []}
    for name, num in (("trajectory_live.txt", 2), ("trajectory.txt", 1), ("groundtruth.txt", 2)):
        assert len(trajectory_lines(recording.path / name)) == num


def test_calibrations_are_updated_in_the_journal(recording: Recording) -> None:
    recording.add_keyframe(1)
    camera = pycolmap.Camera(
        camera_id=1, model="SIMPLE_RADIAL", width=1000, height=750, params=(810, 500, 375, 0.02)
    )
    recording.recorder.cameras_calibrated([camera])
    database = pycolmap.Database.open(recording.path / "database.db")
    np.testing.assert_array_equal(database.read_camera(1).params, (810, 500, 375, 0.02))
    database.close()


def test_snapshots_are_numbered_and_reported(recording: Recording) -> None:
    for _ in range(2):
        recording.recorder.snapshot([model()], entries={"is_final": False})
    written = [event for event in recording.events if isinstance(event, SnapshotWritten)]
    assert [(event.sequence, event.num_keyframes) for event in written] == [(1, 4), (2, 4)]
    assert written[0].num_points3D > 50
    facts = json.loads((recording.path / "latest" / "snapshot.json").read_text())
    assert (facts["sequence"], facts["is_final"]) == (2, False)


def test_numbering_goes_on_in_a_folder_with_snapshots(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", config_text="{}")
    (folder.path / "snapshots" / "000041").mkdir()
    emitted = EmittedEvents()
    recorder = Recorder(
        folder,
        snapshots=SnapshotsConfig(),
        runtime=RuntimeConfig(),
        emit=emitted,
    )
    recorder.snapshot([model()], entries={})
    assert (folder.path / "snapshots" / "000042").is_dir()
    recorder.close()


def test_the_room_that_a_map_needs_is_known_again_when_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run"
    recording = record(path)
    for frame_id in (1, 2, 3):
        recording.add_keyframe(frame_id)
    recording.recorder.abandon()
    num_keypoints = sum(len(WORLD.keyframe(frame_id).features) for frame_id in (1, 2, 3))
    journal = Journal.open(path)
    assert journal.num_keypoints() == num_keypoints > 0
    journal.close()
    asked: list[int] = []

    def reserve(*_: object, num_keypoints: int) -> int:
        asked.append(num_keypoints)
        return 0

    folder = RunFolder.reopen(path, (), config_text="{}", lock=RunLock.acquire(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder_module, "reserve_bytes", reserve)
        again = Recorder(
            folder, snapshots=SnapshotsConfig(), runtime=RuntimeConfig(), emit=EmittedEvents()
        )
        again.look()
        again.close()
    assert set(asked) == {num_keypoints}


# -- what cannot be written -----------------------------------------------------------------------


def test_each_kind_of_failed_write_is_reported_once_and_counted_always(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(os, "write", full_disk)
    recorder = recording.recorder
    for frame_id in (1, 2, 3):
        recorder.frame_arrived(frame_of(frame_id))
        recorder.frame_tracked(FrameId(frame_id))
        recorder.events([Warned(at_s=0.0, message="lost"), Warned(at_s=0.0, message="lost")])
    assert recorder.num_failed_writes == 3 + 6
    rows, events = recording.warnings()
    assert "frames.csv: cannot be written: No space left on device" in rows
    assert "events.jsonl: cannot be written: No space left on device" in events
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.message for record in errors] == [rows, events]
    monkeypatch.undo()
    recorder.frame_arrived(rejected(3))
    assert recording.rows() == ["tracked", "tracked", "tracked", "dropped:unreadable"]


def test_a_keyframe_that_cannot_be_journalled_now_is_journalled_with_the_next(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording.add_keyframe(1)
    with monkeypatch.context() as patch:
        patch.setattr("engine.output.journal.write_atomically", full_disk)
        recording.add_keyframe(2)
        recording.add_keyframe(3)
        assert recording.recorder.num_failed_writes == 2
        assert keyframes_and_pairs(recording.path) == ([1], 0)
    recording.add_keyframe(4)
    assert recording.recorder.num_failed_writes == 0
    assert len(recording.warnings()) == 1
    assert recording.rows() == ["keyframe"] * 4
    assert keyframes_and_pairs(recording.path) == ([1, 2, 3, 4], 6)


def test_a_keyframe_that_never_can_be_journalled_is_lost_alone_with_its_pairs(
    recording: Recording,
) -> None:
    for frame_id in (1, 2):
        recording.add_keyframe(frame_id)
    earlier = WORLD.verified_pair(1, 2)
    fewer = replace(earlier, inlier_matches_idx=earlier.inlier_matches_idx[:20])
    taken = frame_of(1).name
    recording.add_keyframe(3, replace(frame_of(3), name=taken), changed_pairs=(fewer,))
    recording.add_keyframe(4)
    assert recording.recorder.num_failed_writes == 1
    assert keyframes_and_pairs(recording.path) == ([1, 2, 4], 3)
    database = pycolmap.Database.open(recording.path / "database.db")
    assert len(database.read_two_view_geometry(1, 2).inlier_matches) == 20
    database.close()


@pytest.mark.parametrize("name", ["a" * 300 + ".jpg", "folder", f"{frame_of(1).name}/2.jpg"])
def test_an_image_that_the_disk_never_takes_does_not_hold_up_those_behind_it(
    recording: Recording, name: str
) -> None:
    (recording.path / "images" / "folder").mkdir()
    recording.add_keyframe(1)
    recording.add_keyframe(2, replace(frame_of(2), name=name))
    recording.add_keyframe(3)
    assert recording.recorder.num_failed_writes == 1
    assert keyframes_and_pairs(recording.path)[0] == [1, 3]


def keyframes_and_pairs(path: Path) -> tuple[list[int], int]:
    # COLMAP has an SQLite of its own: two in one process that is still writing break each other.
    with closing(sqlite3.connect(path / "database.db")) as connection:
        images = connection.execute("SELECT image_id FROM images ORDER BY image_id").fetchall()
        num_pairs = connection.execute("SELECT COUNT(*) FROM two_view_geometries").fetchone()[0]
    return [image_id for (image_id,) in images], num_pairs


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (lambda recorder: recorder.summary({}), "summary.json"),
        (lambda recorder: recorder.trajectories([]), "trajectory.txt"),
        (lambda recorder: recorder.groundtruth([]), "groundtruth.txt"),
    ],
    ids=["summary", "trajectory", "groundtruth"],
)
def test_documents_that_cannot_be_written_are_reported(
    recording: Recording,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Recorder], None],
    what: str,
) -> None:
    monkeypatch.setattr("engine.output.run_folder.write_atomically", full_disk)
    write(recording.recorder)
    (warning,) = recording.warnings()
    assert f"{what}: cannot be written: No space left on device" in warning
    assert recording.recorder.num_failed_writes == 1


def test_a_snapshot_that_cannot_be_written_is_reported_and_its_number_used_again(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise SnapshotError("snapshots/000001: cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(recorder_module, "write_snapshot", fail)
        recording.recorder.snapshot([model()], entries={})
        recording.recorder.snapshot([model()], entries={})
    assert len(recording.warnings()) == 1
    assert recording.recorder.num_failed_writes == 2
    recording.recorder.snapshot([model()], entries={})
    assert (recording.path / "latest" / "snapshot.json").is_file()
    assert [event.sequence for event in recording.events if isinstance(event, SnapshotWritten)] == [
        1
    ]


def test_closing_reports_what_cannot_be_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = record(tmp_path / "run")
    recording.recorder.frame_arrived(frame_of(1))
    closed: list[bool] = []
    original = Journal.close

    def close(self: Journal) -> None:
        closed.append(True)
        original(self)

    monkeypatch.setattr(LineFile, "append", full_disk)
    monkeypatch.setattr(Journal, "close", close)
    recording.recorder.close()
    assert len(recording.warnings()) == 1
    assert closed == [True]


def test_a_snapshot_whose_link_could_not_be_moved_does_not_block_the_next(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(snapshots_module, "link_atomically", full_disk)
        recording.recorder.snapshot([model()], entries={})
    assert not (recording.path / "latest").exists()

    recording.recorder.snapshot([model()], entries={})
    assert (recording.path / "latest").resolve().name == "000002"
    assert recording.recorder.num_failed_writes == 1
