"""What the journal gives back of a run."""

from __future__ import annotations

import dataclasses
import shutil
import sqlite3
import tracemalloc
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest

from engine.errors import JournalError
from engine.mapping.model.camera_priors import CameraPrior
from engine.mapping.stored_state import (
    StoredCalibration,
    StoredFrame,
    StoredRelativePose,
)
from engine.output.journal import Journal, Moment, NewKeyframe
from engine.output.own_tables import OWN_TABLES
from engine.output.run_format import format_line
from engine.output.stored_run import read_stored_run
from engine.types import (
    CalibrationOrigin,
    DescriptorKind,
    Features,
    FrameId,
    GpsFix,
    GpsReading,
    ImagePair,
    IntrinsicsPrior,
    Keyframe,
    PackedMask,
    PairReason,
    VerifiedPair,
)

JPEG = b"\xff\xd8 as received \xff\xd9"


def camera(camera_id: int = 1, *, focal_px: float = 500.0) -> pycolmap.Camera:
    made = pycolmap.Camera.create_from_model_name(camera_id, "SIMPLE_RADIAL", focal_px, 64, 48)
    made.has_prior_focal_length = True
    return made


def features(number: int, *, num: int = 40, kind: DescriptorKind) -> Features:
    rng = np.random.default_rng(number)
    return Features(
        frame_id=FrameId(number),
        keypoints_xy=rng.uniform(0, 48, (num, 2)),
        descriptors=rng.integers(0, 128, (num, 128), dtype=np.uint8),
        scales=rng.uniform(2, 30, num).astype(np.float32),
        colors=rng.integers(0, 256, (num, 3), dtype=np.uint8),
        is_free=rng.integers(0, 2, num).astype(np.bool_),
        descriptor_kind=kind,
    )


def keyframe(number: int, **changes: Any) -> Keyframe:
    values: dict[str, Any] = {
        "frame_id": FrameId(number),
        "camera_key": "left",
        "index": number * 3,
        "name": f"left/{number:06d}.jpg",
        "width": 64,
        "height": 48,
        "captured_at_s": 1.7e9 + number / 3,
        "received_at_s": 0.0,
        "features": features(number, kind=DescriptorKind.ROOT_SIFT),
    }
    return Keyframe(**{**values, **changes})


def new(of: Keyframe, *, camera_id: int = 1) -> NewKeyframe:
    return NewKeyframe(keyframe=of, camera=camera(camera_id), source="video.mp4", image_bytes=JPEG)


def pair(first: int, second: int, **changes: Any) -> VerifiedPair:
    rng = np.random.default_rng(100 * first + second)
    values: dict[str, Any] = {
        "pair": ImagePair(FrameId(first), FrameId(second)),
        "reason": PairReason.RETRIEVED,
        "inlier_matches_idx": rng.integers(0, 40, (9, 2), dtype=np.uint32),
        "num_matches": 17,
        "fundamental": rng.normal(size=(3, 3)),
        "homography_inlier_ratio": 1 / 3,
    }
    return VerifiedPair(**{**values, **changes})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(format_line() + "sift:\n  max_features: 2000\n")
    return tmp_path


def write(run: Path, *moments: Moment) -> None:
    journal = Journal.open(run)
    for moment in moments:
        journal.write(moment)
    journal.close()


def same(one: Any, other: Any) -> bool:
    """Whether two products are the same to the bit, arrays of arrays as well."""
    if isinstance(one, pycolmap.Camera):
        return repr(one) == repr(other) and same(one.params.tolist(), other.params.tolist())
    if dataclasses.is_dataclass(one):
        return type(one) is type(other) and all(
            same(getattr(one, item.name), getattr(other, item.name))
            for item in dataclasses.fields(one)
        )
    if isinstance(one, np.ndarray):
        return bool(one.dtype == other.dtype) and one.tobytes() == other.tobytes()
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def test_every_field_of_a_keyframe_comes_back_to_the_bit(run: Path) -> None:
    mask = np.random.default_rng(0).integers(0, 2, (48, 64)).astype(np.bool_)
    written = [
        keyframe(
            7,
            gps=GpsFix(
                latitude_deg=46.1 / 3, longitude_deg=-91.99, altitude_m=198.3, accuracy_m=0.1
            ),
            intrinsics_prior=IntrinsicsPrior(
                focal_px=1000 / 3,
                camera_model="OPENCV_FISHEYE",
                params=(500.1, 499.9, 32.0, 24.0, 0.1, 1e-17, 0.0, -0.3),
                origin=CalibrationOrigin.FILE,
                focal_sigma_ratio=0.1 / 3,
                is_fisheye=True,
                doubt='it says "7 mm", which no lens has',
            ),
            mask=PackedMask.of(mask),
            calibration_key="left#2",
        ),
        keyframe(3, is_photo=True, features=features(3, kind=DescriptorKind.OTHER)),
        keyframe(9, features=features(9, num=0, kind=DescriptorKind.ROOT_SIFT)),
    ]
    write(run, *(Moment(keyframe=new(one)) for one in written))
    stored = read_stored_run(run)
    assert len(stored.keyframes) == 3
    for one, other in zip(written, stored.keyframes, strict=True):
        assert same(one, other.keyframe)
        assert (other.camera_id, other.source, other.has_image) == (1, "video.mp4", True)
    assert stored.next_frame_id == 10


def test_a_stored_position_that_is_not_on_earth_is_left_out_when_a_run_goes_on(
    run: Path,
) -> None:
    fixes = [
        GpsFix(latitude_deg=46.0, longitude_deg=8.0, altitude_m=1e300),
        GpsFix(latitude_deg=1e160, longitude_deg=8.0),
    ]
    write(run, *(Moment(keyframe=new(keyframe(n, gps=fix))) for n, fix in enumerate(fixes, 1)))
    positions = [one.keyframe.gps for one in read_stored_run(run).keyframes]
    assert positions == [GpsFix(latitude_deg=46.0, longitude_deg=8.0), None]


def test_pairs_come_back_to_the_bit_in_the_order_in_which_they_became_edges(run: Path) -> None:
    pose = np.column_stack([np.eye(3), [0.6, 0.0, 0.8]])
    first, second = pair(2, 3), pair(1, 3, cam2_from_cam1=pose, fundamental=np.zeros((3, 3)))
    lost = pair(1, 2, inlier_matches_idx=np.empty((0, 2), np.uint32))
    changed = pair(2, 3, num_matches=12)
    write(
        run,
        *(Moment(keyframe=new(keyframe(number))) for number in (1, 2, 3, 4)),
        Moment(pairs=(pair(1, 2), first, second), tried=(ImagePair(FrameId(1), FrameId(4)),)),
        Moment(pairs=(lost, changed)),
    )
    stored = read_stored_run(run)
    assert len(stored.pairs) == 2
    assert same(stored.pairs, (changed, second))
    assert {(one.first, one.second) for one in stored.tried} == {(2, 3), (1, 3), (1, 2), (1, 4)}
    assert len(stored.tried) == 4


def test_calibrations_frames_poses_readings_and_facts_come_back_to_the_bit(run: Path) -> None:
    prior = CameraPrior.of(
        camera(), origin=CalibrationOrigin.EXIF, focal_sigma_ratio=0.02, is_constant=True
    )
    calibration = StoredCalibration(camera=camera(focal_px=499.3), initial=camera(), prior=prior)
    frames = (
        frame(1, status="keyframe"),
        dataclasses.replace(frame(2, status="dropped:unreadable"), frame_id=None, camera_key=None),
        frame(3, status=None),
    )
    poses = (
        StoredRelativePose(
            frame_id=FrameId(5),
            keyframe_id=FrameId(1),
            index=4,
            captured_at_s=1.25,
            cam_from_keyframe=np.random.default_rng(1).normal(size=(3, 4)),
        ),
        StoredRelativePose(
            frame_id=FrameId(6),
            keyframe_id=FrameId(1),
            index=5,
            captured_at_s=1.5,
            cam_from_keyframe=None,
        ),
    )
    reading = GpsReading(
        source="flight.mp4",
        camera_key=None,
        captured_at_s=0.1,
        fix=GpsFix(latitude_deg=1 / 3, longitude_deg=2.0, altitude_m=3.0),
    )
    facts: dict[str, Any] = {
        "agreement": {"is_required": True, "ratios": [1 / 3, 1e-300]},
        "vocabulary": np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32),
        "words": "ä",
        "none": 0,
    }
    write(
        run,
        Moment(keyframe=new(keyframe(1)), frames=frames, facts={"gone": 1, "none": 5}),
        Moment(
            calibrations={"left": calibration},
            relative_poses=poses,
            gps_readings=(reading,),
            facts={**facts, "gone": None},
        ),
    )
    stored = read_stored_run(run)
    assert list(stored.calibrations) == ["left"]
    assert same(stored.calibrations["left"], calibration)
    assert same(stored.cameras[1], calibration.camera)
    assert stored.frames == frames
    assert same(stored.relative_poses, poses)
    assert stored.gps_readings == (reading,)
    assert stored.facts.keys() == facts.keys()
    assert all(same(stored.facts[name], fact) for name, fact in facts.items())
    assert stored.next_frame_id == 4


def frame(number: int, *, status: str | None) -> StoredFrame:
    return StoredFrame(
        frame_id=FrameId(number),
        camera_key="left",
        source="video.mp4",
        index=number,
        name=f"{number:06d}.jpg",
        captured_at_s=number / 3,
        status=status,
    )


def test_keypoints_that_moved_and_cameras_that_changed_come_back_as_they_were_last(
    run: Path,
) -> None:
    moved = features(11, kind=DescriptorKind.ROOT_SIFT)
    before = keyframe(1)
    moved = dataclasses.replace(moved, frame_id=FrameId(1), descriptors=before.features.descriptors)
    zoomed = StoredCalibration(
        camera=camera(2, focal_px=700.0),
        initial=camera(2),
        prior=CameraPrior.assumed(camera(2)),
    )
    write(
        run,
        Moment(keyframe=new(before)),
        Moment(
            moved=(moved,),
            calibrations={"left#1": zoomed},
            recalibrated={FrameId(1): camera(2, focal_px=710.0)},
        ),
    )
    (stored,) = read_stored_run(run).keyframes
    assert same(stored.keyframe.features, moved)
    assert (stored.camera_id, stored.keyframe.calibration_key) == (2, "left#1")
    assert read_stored_run(run).cameras[2].params[0] == 710.0


def test_an_image_that_is_gone_is_said_and_its_keyframe_comes_back(run: Path) -> None:
    write(run, *(Moment(keyframe=new(keyframe(number))) for number in (1, 2)))
    (run / "images" / "left" / "000001.jpg").unlink()
    stored = read_stored_run(run)
    assert [one.has_image for one in stored.keyframes] == [False, True]


def test_images_that_other_programs_added_or_deleted_are_left_out(run: Path) -> None:
    write(
        run,
        *(Moment(keyframe=new(keyframe(number))) for number in (1, 2, 3)),
        Moment(pairs=(pair(1, 2), pair(2, 3)), tried=(ImagePair(FrameId(1), FrameId(3)),)),
    )
    with closing(pycolmap.Database.open(run / "database.db")) as database:
        database.write_image(
            pycolmap.Image(name="theirs.jpg", camera_id=1, image_id=9), use_image_id=True
        )
    with closing(sqlite3.connect(run / "database.db")) as connection, connection:
        connection.execute("DELETE FROM images WHERE image_id = 1")
    stored = read_stored_run(run)
    assert [one.keyframe.frame_id for one in stored.keyframes] == [2, 3]
    assert [one.pair for one in stored.pairs] == [ImagePair(FrameId(2), FrameId(3))]
    assert stored.tried == (ImagePair(FrameId(2), FrameId(3)),)


# -- one moment -----------------------------------------------------------------------------------


def moments() -> list[Moment]:
    """Keyframes with their pairs, and states that say how many there are."""
    return [
        Moment(
            keyframe=new(keyframe(number)),
            pairs=tuple(pair(other, number) for other in range(1, number)),
            frames=(frame(number, status="keyframe"),),
            relative_poses=(
                StoredRelativePose(
                    frame_id=FrameId(number),
                    keyframe_id=FrameId(number),
                    index=number,
                    captured_at_s=0.0,
                    cam_from_keyframe=None,
                ),
            ),
            facts={"num_keyframes": number, f"keyframe/{number}": number},
        )
        for number in range(1, 6)
    ]


def test_at_every_write_what_lies_on_disk_is_one_whole_moment(
    run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The folder is copied before and after each statement, as a crash would leave it."""
    copies = tmp_path_factory.mktemp("copies")
    journal = Journal.open(run)
    num = 0

    def copy(statement: str) -> None:
        nonlocal num
        if statement.startswith(("INSERT", "UPDATE", "COMMIT", "BEGIN")):
            num += 1
            shutil.copytree(run, copies / str(num))

    journal._connection.set_trace_callback(copy)
    for moment in moments():
        journal.write(moment)
    journal.close()
    shutil.copytree(run, copies / str(num + 1))
    seen = []
    for number in range(1, num + 2):
        stored = read_stored_run(copies / str(number))
        num_keyframes = int(stored.facts.get("num_keyframes", 0))  # type: ignore[arg-type]
        assert len(stored.keyframes) == num_keyframes
        assert len(stored.pairs) == num_keyframes * (num_keyframes - 1) // 2
        assert len(stored.frames) == len(stored.relative_poses) == num_keyframes
        assert len(stored.facts) == (num_keyframes + 1 if num_keyframes else 0)
        assert all(one.has_image for one in stored.keyframes)
        seen.append(num_keyframes)
    assert num > 30
    assert seen == sorted(seen)
    assert set(seen) == set(range(6))


def test_a_log_that_is_cut_anywhere_leaves_an_earlier_moment(
    run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As after a power cut, when the end of the write-ahead log never reached the disk."""
    journal = Journal.open(run)
    for moment in moments():
        journal.write(moment)
    log = (run / "database.db-wal").read_bytes()
    rng = np.random.default_rng(0)
    seen = set()
    for number, length in enumerate([0, 40, *rng.integers(0, len(log), 12).tolist()]):
        copy = tmp_path_factory.mktemp("cut") / str(number)
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("*-shm"))
        (copy / "database.db-wal").write_bytes(log[:length])
        try:
            stored = read_stored_run(copy)
        except JournalError as error:  # so early that there are no tables yet
            assert "\n" not in str(error)
            continue
        assert len(stored.keyframes) == stored.facts.get("num_keyframes", 0)
        assert len(stored.pairs) == len(stored.keyframes) * (len(stored.keyframes) - 1) // 2
        seen.add(len(stored.keyframes))
    journal.close()
    assert len(seen) > 2


def test_a_moment_that_fails_leaves_nothing_of_itself(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *_ = moments()
    journal = Journal.open(run)
    journal.write(first)
    with monkeypatch.context() as patch:
        patch.setattr("engine.output.own_tables.write_facts", no_room)
        with pytest.raises(JournalError, match="disk is full"):
            journal.write(second)
    assert len(read_stored_run(run).keyframes) == 1
    journal.write(second)
    stored = read_stored_run(run)
    assert (len(stored.keyframes), len(stored.pairs)) == (2, 1)
    assert stored.facts["num_keyframes"] == 2
    journal.close()


def test_what_belongs_to_keyframes_that_the_journal_lacks_is_left_out(run: Path) -> None:
    write(
        run,
        *moments()[:2],
        Moment(
            moved=(features(4, kind=DescriptorKind.OTHER),),
            pairs=(pair(1, 4), pair(1, 2, num_matches=11)),
            tried=(ImagePair(FrameId(2), FrameId(4)),),
            recalibrated={FrameId(4): camera(2), FrameId(2): camera(3)},
        ),
    )
    stored = read_stored_run(run)
    assert [one.camera_id for one in stored.keyframes] == [1, 3]
    assert [one.num_matches for one in stored.pairs] == [11]
    assert len(stored.tried) == 1


def no_room(*_: object) -> None:
    raise sqlite3.OperationalError("database or disk is full")


def test_what_another_program_is_writing_is_not_seen_and_a_lock_on_all_is_a_line(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run, *moments()[:2])
    monkeypatch.setattr("engine.output.database_reader._BUSY_TIMEOUT_S", 0.01)
    with closing(sqlite3.connect(run / "database.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("DELETE FROM livesfm_pairs")
        assert len(read_stored_run(run).pairs) == 1
        other.execute("ROLLBACK")
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        other.execute("DELETE FROM livesfm_pairs")
        with pytest.raises(JournalError, match="database is locked"):
            read_stored_run(run)
        other.execute("ROLLBACK")


# -- versions and foreign databases ---------------------------------------------------------------


def test_a_newer_version_is_refused_in_a_line_by_the_folder_and_by_the_database(run: Path) -> None:
    write(run, *moments()[:1])
    (run / "config.yaml").write_text("# LiveSfM run folder, format 99\n{}\n")
    with pytest.raises(JournalError, match=r"newer version of LiveSfM \(run format 99"):
        read_stored_run(run)
    (run / "config.yaml").write_text(format_line())
    with closing(sqlite3.connect(run / "database.db")) as connection, connection:
        connection.execute("UPDATE livesfm_format SET version = 99")
    for reads in (read_stored_run, Journal.open):
        with pytest.raises(JournalError, match=r"newer version of LiveSfM \(run format 99"):
            reads(run)


def test_a_run_without_our_tables_is_refused_in_a_line(run: Path) -> None:
    write(run, *moments()[:1])
    with closing(sqlite3.connect(run / "database.db")) as connection, connection:
        for name in OWN_TABLES:
            connection.execute(f"DROP TABLE {name}")
    for reads in (read_stored_run, Journal.open):
        with pytest.raises(JournalError, match="older version of LiveSfM"):
            reads(run)


HOSTILE = {
    "a count": "UPDATE livesfm_features SET rows = 1000000000000",
    "a negative count": "UPDATE livesfm_features SET rows = -40",
    "short keypoints": "UPDATE livesfm_features SET keypoints_xy = zeroblob(8)",
    "no numbers": "UPDATE livesfm_features SET keypoints_xy = CAST(x'ffffffffffffffff'"
    " || substr(keypoints_xy, 9) AS BLOB)",
    "text for bytes": "UPDATE livesfm_features SET scales = 'scales'",
    "a kind": "UPDATE livesfm_features SET descriptor_kind = 'nobody knows'",
    "descriptors": "UPDATE descriptors SET cols = 1000000000",
    "long descriptors": "UPDATE descriptors SET data = zeroblob(100000)",
    "matches": "UPDATE two_view_geometries SET rows = 4611686018427387904",
    "a fundamental matrix": "UPDATE livesfm_pairs SET fundamental = x''",
    "a reason": "UPDATE livesfm_pairs SET reason = ''",
    "a pair": "UPDATE livesfm_pairs SET pair_id = -7",
    "a size": "UPDATE livesfm_keyframes SET width = 9223372036854775807",
    "a position": "UPDATE livesfm_keyframes SET gps = '{\"latitude_deg\": 1}'",
    "a position of words": "UPDATE livesfm_keyframes SET gps = '[[[[['",
    "nested": f"UPDATE livesfm_keyframes SET gps = '{'[' * 100_000}'",
    "a prior": 'UPDATE livesfm_keyframes SET intrinsics_prior = \'{"params": 7, "origin": 1}\'',
    "a mask": "UPDATE livesfm_keyframes SET mask_key = 'of another run'",
    "a time": "UPDATE livesfm_keyframes SET captured_at_s = 9e999",
    "a camera model": "UPDATE cameras SET model = 4711",
    "camera parameters": "UPDATE cameras SET params = zeroblob(3)",
    "many parameters": "UPDATE cameras SET params = zeroblob(80000)",
    "a calibration": "INSERT INTO livesfm_calibrations (calibration_key, camera_id, initial, prior)"
    " VALUES ('a', 1, '{}', '{}')",
    "a fact": "INSERT INTO livesfm_facts (name, json) VALUES ('a', '{')",
    "an array": "INSERT INTO livesfm_facts (name, json, array) VALUES ('a', '{}', x'93')",
    "objects": "INSERT INTO livesfm_facts (name, json, array)"
    ' VALUES (\'a\', \'{"dtype": "|O", "shape": [1]}\', zeroblob(8))',
    "a pose": "UPDATE livesfm_relative_poses SET cam_from_keyframe = x'00'",
    "a frame id": "UPDATE livesfm_frames SET frame_id = -1 WHERE frame_id = 1",
    "a bomb": "INSERT INTO livesfm_masks VALUES ('a', 9, 9, CAST(zeroblob(9) AS BLOB))",
    "no table": "DROP TABLE livesfm_facts",
    "a view": "DROP TABLE livesfm_facts; CREATE VIEW livesfm_facts AS WITH RECURSIVE a(name, json,"
    " array) AS (SELECT 'a', 'a', NULL UNION ALL SELECT name || 'a', json, array FROM a)"
    " SELECT * FROM a",
    "no version": "DELETE FROM livesfm_format",
    "two versions": "INSERT INTO livesfm_format VALUES (2)",
    "a version of words": "UPDATE livesfm_format SET version = 'two'",
}


@pytest.mark.parametrize("statements", HOSTILE.values(), ids=HOSTILE.keys())
def test_whatever_the_database_holds_is_an_error_in_a_line(run: Path, statements: str) -> None:
    write(run, *moments()[:2])
    with closing(sqlite3.connect(run / "database.db")) as connection, connection:
        connection.executescript(statements)
    with pytest.raises(JournalError) as caught:
        read_stored_run(run)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_arrays_and_masks_that_would_take_more_memory_than_their_file_are_refused(
    run: Path,
) -> None:
    write(run, *moments()[:1])
    mask = zlib.compress(b"\xff" * 50_000_000)
    described = '{"dtype": "<f8", "shape": [1000000000000]}'
    for table, values in (
        ("livesfm_masks (mask_key, width, height, data)", ("a", 64, 48, mask)),
        ("livesfm_facts (name, json, array)", ("a", described, b"")),
    ):
        with closing(sqlite3.connect(run / "database.db")) as connection, connection:
            places = ", ".join("?" * len(values))
            connection.execute(f"INSERT INTO {table} VALUES ({places})", values)
        tracemalloc.start()
        with pytest.raises(JournalError):
            read_stored_run(run)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 20_000_000
        with closing(sqlite3.connect(run / "database.db")) as connection, connection:
            connection.execute(f"DELETE FROM {table.split()[0]}")


def test_broken_bytes_anywhere_in_the_file_never_raise_anything_else(run: Path) -> None:
    write(run, *moments()[:3])
    whole = (run / "database.db").read_bytes()
    rng = np.random.default_rng(0)
    num_refused = 0
    for _ in range(60):
        broken = bytearray(whole)
        for place in rng.integers(0, len(whole), 40).tolist():
            broken[place] = int(rng.integers(256))
        if rng.random() < 0.3:
            del broken[int(rng.integers(len(broken))) :]
        (run / "database.db").write_bytes(broken)
        try:
            read_stored_run(run)
        except JournalError as error:
            assert "\n" not in str(error)
            num_refused += 1
    assert num_refused > 10


def test_what_is_no_run_is_an_error_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="is missing"):
        read_stored_run(tmp_path)
    (tmp_path / "database.db").write_bytes(b"\x00" * 5000)
    with pytest.raises(JournalError):
        read_stored_run(tmp_path)
