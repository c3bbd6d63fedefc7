from __future__ import annotations

import dataclasses
import os
import resource
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pycolmap
import pytest

from engine.errors import JournalError
from engine.geometry import rotation_from_vector, skew
from engine.output.files import write_atomically
from engine.output.journal import Journal, Moment, NewKeyframe, encode_keyframe_image, encode_mask
from engine.types import (
    DescriptorKind,
    Features,
    Frame,
    FrameId,
    GpsFix,
    ImagePair,
    Keyframe,
    PairReason,
    Uint8Array,
    VerifiedPair,
)
from tests.support.paths import ROOT
from tests.support.waiting import HANG_S

TABLES = (
    "cameras",
    "rigs",
    "rig_sensors",
    "frames",
    "frame_data",
    "images",
    "pose_priors",
    "keypoints",
    "descriptors",
    "matches",
    "two_view_geometries",
)
JPEG = b"\xff\xd8 as received \xff\xd9"


def camera(camera_id: int = 1, *, has_prior: bool = True) -> pycolmap.Camera:
    made = pycolmap.Camera.create_from_model_name(camera_id, "SIMPLE_RADIAL", 500.0, 640, 480)
    made.has_prior_focal_length = has_prior
    return made


def features(number: int, *, num: int = 40, dimensions: int = 128) -> Features:
    rng = np.random.default_rng(number)
    return Features(
        frame_id=FrameId(number),
        keypoints_xy=rng.uniform(0, 480, (num, 2)),
        descriptors=rng.integers(0, 128, (num, dimensions), dtype=np.uint8),
        scales=rng.uniform(2, 30, num).astype(np.float32),
        colors=np.zeros((num, 3), np.uint8),
        descriptor_kind=DescriptorKind.ROOT_SIFT,
    )


def keyframe(
    number: int, *, name: str | None = None, gps: GpsFix | None = None, of: Features | None = None
) -> Keyframe:
    return Keyframe(
        frame_id=FrameId(number),
        camera_key="camera",
        index=number - 1,
        name=name or f"{number:06d}.jpg",
        width=640,
        height=480,
        captured_at_s=float(number),
        received_at_s=0.0,
        features=of or features(number),
        gps=gps,
    )


def add_keyframe(
    journal: Journal,
    keyframe: Keyframe,
    *,
    camera: pycolmap.Camera,
    image_bytes: bytes,
    mask_bytes: bytes | None = None,
) -> None:
    journal.add_keyframe(
        NewKeyframe(
            keyframe=keyframe,
            camera=camera,
            source="photos",
            image_bytes=image_bytes,
            mask_bytes=mask_bytes,
        )
    )


def verified_pair(first: int, second: int, *, matches: np.ndarray | None = None) -> VerifiedPair:
    if matches is None:
        matches = np.array([[0, 3], [1, 2], [7, 5]], np.uint32)
    return VerifiedPair(
        pair=ImagePair(FrameId(first), FrameId(second)),
        reason=PairReason.TEMPORAL,
        inlier_matches_idx=matches,
        num_matches=len(matches) + 2,
        fundamental=np.arange(9.0).reshape(3, 3),
        homography_inlier_ratio=0.1,
    )


def image_names(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run / "images")) for path in (run / "images").rglob("*.*"))


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal.open(tmp_path)
    yield opened
    opened.close()


@contextmanager
def reading(run: Path) -> Iterator[pycolmap.Database]:
    database = pycolmap.Database.open(run / "database.db")
    yield database
    database.close()


def test_a_keyframe_is_read_back_by_pycolmap(journal: Journal, tmp_path: Path) -> None:
    written = keyframe(7)
    add_keyframe(journal, written, camera=camera(3), image_bytes=JPEG)
    with reading(tmp_path) as database:
        image = database.read_image(7)
        assert (image.image_id, image.name, image.camera_id) == (7, "000007.jpg", 3)
        assert image.frame_id == 7
        frame = database.read_frame(7)
        assert [(data.sensor_id.id, data.id) for data in frame.data_ids] == [(3, 7)]
        assert database.read_rig(frame.rig_id).is_ref_sensor(camera(3).sensor_id)
        keypoints = database.read_keypoints(7)
        np.testing.assert_allclose(keypoints[:, :2], written.features.keypoints_xy, atol=1e-4)
        np.testing.assert_array_equal(2 * keypoints[:, 2], written.features.scales)
        descriptors = database.read_descriptors(7)
        assert descriptors.type == pycolmap.FeatureExtractorType.SIFT
        # COLMAP's bytes are RootSIFT times 512, half of that is the matcher's.
        np.testing.assert_array_equal(descriptors.data, 2 * written.features.descriptors)
    assert (tmp_path / "images" / "000007.jpg").read_bytes() == JPEG


def test_rows_are_the_bytes_that_pycolmap_writes(journal: Journal, tmp_path: Path) -> None:
    fix = GpsFix(latitude_deg=46.84, longitude_deg=-91.99, altitude_m=198.3)
    journal.write(Moment(cameras=(camera(2, has_prior=True),)))
    for number in (1, 2):
        add_keyframe(journal, keyframe(number, gps=fix), camera=camera(2), image_bytes=JPEG)
    journal.add_pair(verified_pair(1, 2))
    write_with_pycolmap(tmp_path / "theirs.db", fix=fix)
    for table in TABLES:
        ours, theirs = (rows(tmp_path / name, table) for name in ("database.db", "theirs.db"))
        assert ours == theirs, table


def write_with_pycolmap(path: Path, *, fix: GpsFix) -> None:
    database = pycolmap.Database.open(path)
    made = camera(2, has_prior=True)
    database.write_camera(made, use_camera_id=True)
    rig = pycolmap.Rig(rig_id=2)
    rig.add_ref_sensor(made.sensor_id)
    database.write_rig(rig, use_rig_id=True)
    for number in (1, 2):
        of = features(number)
        image = pycolmap.Image(name=f"{number:06d}.jpg", camera_id=2, image_id=number)
        image.frame_id = number
        frame = pycolmap.Frame(frame_id=number, rig_id=2)
        frame.add_data_id(image.data_id)
        database.write_frame(frame, use_frame_id=True)
        database.write_image(image, use_image_id=True)
        columns = [of.keypoints_xy, of.scales / 2, np.zeros(len(of))]
        database.write_keypoints(number, np.column_stack(columns).astype(np.float32))
        database.write_descriptors(
            number,
            pycolmap.FeatureDescriptors(
                type=pycolmap.FeatureExtractorType.SIFT, data=2 * of.descriptors
            ),
        )
        database.write_pose_prior(
            pycolmap.PosePrior(
                corr_data_id=image.data_id,
                position=np.array([fix.latitude_deg, fix.longitude_deg, fix.altitude_m]),
                coordinate_system=pycolmap.PosePriorCoordinateSystem.WGS84,
            )
        )
    pair = verified_pair(1, 2)
    geometry = pycolmap.TwoViewGeometry()
    geometry.config = pycolmap.TwoViewGeometryConfiguration.UNCALIBRATED
    geometry.F = pair.fundamental
    geometry.inlier_matches = pair.inlier_matches_idx
    database.write_matches(1, 2, pair.inlier_matches_idx)
    database.write_two_view_geometry(1, 2, geometry)
    database.close()


def rows(path: Path, table: str) -> list[tuple[object, ...]]:
    with sqlite3.connect(path) as connection:
        found = connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()
    connection.close()
    return found


def test_cameras_keep_whether_their_focal_length_is_known(journal: Journal, tmp_path: Path) -> None:
    cameras = (camera(1, has_prior=True), camera(2, has_prior=False))
    journal.write(Moment(cameras=cameras))
    with reading(tmp_path) as database:
        assert database.read_camera(1).has_prior_focal_length
        assert not database.read_camera(2).has_prior_focal_length
        assert database.num_rigs() == 2


def test_a_refined_camera_is_updated_in_place(journal: Journal, tmp_path: Path) -> None:
    add_keyframe(journal, keyframe(1), camera=camera(), image_bytes=JPEG)
    refined = camera()
    refined.params = [512.5, 321.0, 243.0, -0.03]
    journal.write(Moment(cameras=(refined,)))
    with reading(tmp_path) as database:
        np.testing.assert_array_equal(database.read_camera(1).params, refined.params)
        assert database.num_cameras() == 1


def test_a_position_is_a_prior_in_wgs84(journal: Journal, tmp_path: Path) -> None:
    fix = GpsFix(latitude_deg=46.84, longitude_deg=-91.99, altitude_m=198.3)
    add_keyframe(journal, keyframe(4, gps=fix), camera=camera(), image_bytes=JPEG)
    add_keyframe(journal, keyframe(5), camera=camera(), image_bytes=JPEG)
    with reading(tmp_path) as database:
        (prior,) = database.read_all_pose_priors()
    assert prior.corr_data_id.id == 4
    assert prior.coordinate_system == pycolmap.PosePriorCoordinateSystem.WGS84
    np.testing.assert_array_equal(prior.position, [46.84, -91.99, 198.3])
    assert not prior.has_position_cov()


def test_a_pair_is_read_back_with_its_geometry(journal: Journal, tmp_path: Path) -> None:
    for number in (1, 2):
        add_keyframe(journal, keyframe(number), camera=camera(), image_bytes=JPEG)
    pair = verified_pair(1, 2)
    journal.add_pair(pair)
    with reading(tmp_path) as database:
        np.testing.assert_array_equal(database.read_matches(1, 2), pair.inlier_matches_idx)
        geometry = database.read_two_view_geometry(1, 2)
    np.testing.assert_array_equal(geometry.inlier_matches, pair.inlier_matches_idx)
    np.testing.assert_array_equal(geometry.F, pair.fundamental)
    assert geometry.config == pycolmap.TwoViewGeometryConfiguration.UNCALIBRATED


def test_a_pair_verified_on_rays_is_read_back_as_a_calibrated_one(
    journal: Journal, tmp_path: Path
) -> None:
    for number in (1, 2):
        add_keyframe(journal, keyframe(number), camera=camera(), image_bytes=JPEG)
    rotation = rotation_from_vector(np.array([0.1, -0.4, 0.2]))
    pose = np.column_stack([rotation, [0.6, 0.0, 0.8]])
    pair = dataclasses.replace(
        verified_pair(1, 2), fundamental=np.zeros((3, 3)), cam2_from_cam1=pose
    )
    journal.add_pair(pair)
    with reading(tmp_path) as database:
        geometry = database.read_two_view_geometry(1, 2)
    assert geometry.config == pycolmap.TwoViewGeometryConfiguration.CALIBRATED
    assert geometry.cam2_from_cam1 is not None
    assert geometry.cam2_from_cam1.matrix() == pytest.approx(pose)
    assert pytest.approx(skew(pose[:, 3]) @ rotation) == geometry.E


def test_a_pair_written_again_is_replaced(journal: Journal, tmp_path: Path) -> None:
    for number in (1, 2):
        add_keyframe(journal, keyframe(number), camera=camera(), image_bytes=JPEG)
    journal.add_pair(verified_pair(1, 2))
    journal.add_pair(verified_pair(1, 2, matches=np.array([[9, 9]], np.uint32)))
    with reading(tmp_path) as database:
        assert database.num_matched_image_pairs() == 1
        np.testing.assert_array_equal(database.read_matches(1, 2), [[9, 9]])


def test_keypoints_that_moved_are_written_in_place(journal: Journal, tmp_path: Path) -> None:
    for number in (1, 2):
        written = keyframe(number, of=features(number, dimensions=0))
        add_keyframe(journal, written, camera=camera(), image_bytes=JPEG)
    former = written.features
    moved_xy = former.keypoints_xy.copy()
    moved_xy[[3, 7]] += (0.25, -1.5)
    moved = dataclasses.replace(former, keypoints_xy=moved_xy)
    journal.move_keypoints(moved)
    with reading(tmp_path) as database:
        keypoints = database.read_keypoints(2)
        untouched = database.read_keypoints(1)
        assert database.read_descriptors(2).data.shape == (40, 0)
    np.testing.assert_array_equal(keypoints[:, :2], moved_xy.astype(np.float32))
    np.testing.assert_array_equal(keypoints[:, 2], moved.scales / 2)
    np.testing.assert_array_equal(
        untouched[:, :2], features(1, dimensions=0).keypoints_xy.astype(np.float32)
    )


def test_keypoints_move_only_in_a_table_that_is_there_and_as_long(
    journal: Journal, tmp_path: Path
) -> None:
    add_keyframe(journal, keyframe(1), camera=camera(), image_bytes=JPEG)
    before = rows(tmp_path / "database.db", "keypoints")
    with pytest.raises(JournalError, match="keyframe 2 has no table of 40 rows"):
        journal.move_keypoints(features(2))
    with pytest.raises(JournalError, match="keyframe 1 has no table of 39 rows"):
        journal.move_keypoints(features(1, num=39))
    assert rows(tmp_path / "database.db", "keypoints") == before


def test_a_pair_needs_both_keyframes(journal: Journal, tmp_path: Path) -> None:
    add_keyframe(journal, keyframe(1), camera=camera(), image_bytes=JPEG)
    with pytest.raises(JournalError, match="both must be keyframes"):
        journal.add_pair(verified_pair(1, 2))
    with reading(tmp_path) as database:
        assert database.num_matches() == 0


def test_names_may_have_folders(journal: Journal, tmp_path: Path) -> None:
    name = "left camera/été/000001.jpg"
    add_keyframe(journal, keyframe(1, name=name), camera=camera(), image_bytes=JPEG)
    assert (tmp_path / "images" / "left camera" / "été" / "000001.jpg").read_bytes() == JPEG
    with reading(tmp_path) as database:
        assert database.read_image(1).name == name


@pytest.mark.parametrize(
    "name",
    ["../out.jpg", "a/../../out.jpg", "/tmp/out.jpg", "./a.jpg", "a//b.jpg", "a\nb", "\udce9"],
)
def test_names_that_lead_out_or_are_no_text_are_refused(
    journal: Journal, tmp_path: Path, name: str
) -> None:
    with pytest.raises(JournalError, match="not a name for an image"):
        add_keyframe(journal, keyframe(1, name=name), camera=camera(), image_bytes=JPEG)
    assert image_names(tmp_path) == []
    with reading(tmp_path) as database:
        assert database.num_images() == database.num_cameras() == 0


def test_a_name_that_is_taken_keeps_the_former_image(journal: Journal, tmp_path: Path) -> None:
    add_keyframe(journal, keyframe(1, name="a.jpg"), camera=camera(), image_bytes=b"first")
    with pytest.raises(JournalError, match=r"a\.jpg"):
        add_keyframe(journal, keyframe(2, name="a.jpg"), camera=camera(), image_bytes=b"second")
    assert (tmp_path / "images" / "a.jpg").read_bytes() == b"first"
    with reading(tmp_path) as database:
        assert database.num_images() == database.num_frames() == 1


def test_an_image_that_cannot_be_written_leaves_no_row(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(JournalError, match="No space left"):
            add_keyframe(journal, keyframe(1), camera=camera(), image_bytes=JPEG)
    assert list((tmp_path / "images").iterdir()) == []
    with reading(tmp_path) as database:
        assert database.num_images() == database.num_keypoints() == 0
    add_keyframe(journal, keyframe(1), camera=camera(), image_bytes=JPEG)
    assert image_names(tmp_path) == ["000001.jpg"]


def test_a_full_disk_keeps_the_keyframes_before_it_and_the_process(
    journal: Journal, tmp_path: Path
) -> None:
    large = features(1, num=2000)
    added, refused = [], []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        for number in range(1, 9):
            try:
                add_keyframe(journal, keyframe(number, of=large), camera=camera(), image_bytes=JPEG)
                added.append(number)
            except JournalError:
                refused.append(number)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert added
    assert refused
    add_keyframe(journal, keyframe(20), camera=camera(), image_bytes=JPEG)
    with reading(tmp_path) as database:
        assert sorted(image.image_id for image in database.read_all_images()) == [*added, 20]
        assert database.num_keypoints() == 2000 * len(added) + 40


def test_what_was_added_survives_the_death_of_the_process(tmp_path: Path) -> None:
    script = f"""
        import os, sys
        sys.path[:0] = {[str(Path(__file__).parent), str(ROOT)]!r}
        from pathlib import Path
        from test_journal import JPEG, add_keyframe, camera, keyframe, verified_pair
        from engine.output.journal import Journal
        journal = Journal.open(Path({str(tmp_path)!r}))
        for number in (1, 2):
            add_keyframe(journal, keyframe(number), camera=camera(), image_bytes=JPEG)
        journal.add_pair(verified_pair(1, 2))
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], check=False, timeout=HANG_S
    )
    assert done.returncode == -9
    with reading(tmp_path) as database:
        assert database.num_keypoints() == 80
        assert database.num_verified_image_pairs() == 1
    assert image_names(tmp_path) == ["000001.jpg", "000002.jpg"]


def test_a_journal_is_opened_again_and_goes_on(tmp_path: Path) -> None:
    for number in (1, 2):
        journal = Journal.open(tmp_path)
        add_keyframe(journal, keyframe(number), camera=camera(), image_bytes=JPEG)
        journal.close()
    assert not list(tmp_path.glob("database.db-*"))
    with reading(tmp_path) as database:
        assert database.num_images() == 2
        assert database.num_cameras() == 1


def test_a_database_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "database.db").write_bytes(b"this is not a database" * 100)
    with pytest.raises(JournalError, match="cannot be opened"):
        Journal.open(tmp_path)


def test_colmap_maps_the_journal_of_a_synthetic_scene(tmp_path: Path) -> None:
    """COLMAP's own incremental mapper rebuilds the scene from what the journal wrote."""
    source, truth = synthetic_scene(tmp_path / "source.db")
    journal = Journal.open(tmp_path)
    for image in source.read_all_images():
        xy = source.read_keypoints(image.image_id)[:, :2].astype(np.float64)
        of = Features(
            frame_id=FrameId(image.image_id),
            keypoints_xy=xy,
            descriptors=source.read_descriptors(image.image_id).data,
            scales=np.ones(len(xy), np.float32),
            colors=np.zeros((len(xy), 3), np.uint8),
        )
        add_keyframe(
            journal,
            keyframe(image.image_id, name=image.name, of=of),
            camera=source.read_camera(image.camera_id),
            image_bytes=JPEG,
        )
    for pair_id, geometry in zip(*source.read_two_view_geometries(), strict=True):
        first, second = pycolmap.pair_id_to_image_pair(pair_id)
        journal.add_pair(verified_pair(first, second, matches=geometry.inlier_matches))
    journal.close()
    source.close()

    options = pycolmap.IncrementalPipelineOptions()
    options.num_threads = 1
    (tmp_path / "sparse").mkdir()
    maps = pycolmap.incremental_mapping(
        tmp_path / "database.db", tmp_path / "images", tmp_path / "sparse", options
    )
    assert maps[0].num_reg_images() == truth.num_images()
    assert maps[0].num_points3D() == pytest.approx(truth.num_points3D(), rel=0.05)
    errors = pycolmap.compare_reconstructions(maps[0], truth, alignment_error="proj_center")
    assert errors is not None
    assert max(error.proj_center_error for error in errors["errors"]) < 1e-3


def test_colmaps_own_matcher_reads_the_descriptors_of_sift(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    first = features(1, num=60)
    root_sift = sift_like(60)
    order = np.random.default_rng(0).permutation(60)
    for number, descriptors in ((1, root_sift), (2, root_sift[order])):
        of = dataclasses.replace(first, frame_id=FrameId(number), descriptors=descriptors)
        add_keyframe(journal, keyframe(number, of=of), camera=camera(), image_bytes=JPEG)
    journal.close()
    options = pycolmap.FeatureMatchingOptions(use_gpu=False, num_threads=1)
    pycolmap.match_exhaustive(tmp_path / "database.db", matching_options=options)
    with reading(tmp_path) as database:
        matches = database.read_matches(1, 2)
    np.testing.assert_array_equal(matches[:, 0], order[matches[:, 1]])
    assert len(matches) == 60


def sift_like(num: int) -> Uint8Array:
    """RootSIFT times 256 (num, 128): unit length, few large components, none beyond 127."""
    raw = np.random.default_rng(0).exponential(size=(num, 128)) ** 3
    scaled: Uint8Array = (
        np.rint(256 * raw / np.linalg.norm(raw, axis=1, keepdims=True))
        .clip(0, 127)
        .astype(np.uint8)
    )
    return scaled


@pytest.mark.parametrize(
    ("kind", "largest", "dimensions", "expected"),
    [
        (DescriptorKind.ROOT_SIFT, 127, 128, pycolmap.FeatureExtractorType.SIFT),
        (DescriptorKind.ROOT_SIFT, 128, 128, pycolmap.FeatureExtractorType.UNDEFINED),
        (DescriptorKind.OTHER, 127, 128, pycolmap.FeatureExtractorType.UNDEFINED),
        (DescriptorKind.ROOT_SIFT, 127, 64, pycolmap.FeatureExtractorType.UNDEFINED),
        (DescriptorKind.OTHER, 0, 0, pycolmap.FeatureExtractorType.UNDEFINED),
    ],
)
def test_only_what_is_sift_is_called_sift(
    journal: Journal,
    tmp_path: Path,
    *,
    kind: DescriptorKind,
    largest: int,
    dimensions: int,
    expected: pycolmap.FeatureExtractorType,
) -> None:
    of = dataclasses.replace(
        features(1),
        descriptors=np.full((40, dimensions), largest, np.uint8),
        descriptor_kind=kind,
    )
    add_keyframe(journal, keyframe(1, of=of), camera=camera(), image_bytes=JPEG)
    with reading(tmp_path) as database:
        assert database.read_descriptors(1).type == expected


def synthetic_scene(path: Path) -> tuple[pycolmap.Database, pycolmap.Reconstruction]:
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs = 1
    options.num_frames_per_rig = 6
    options.num_points3D = 120
    options.camera_has_prior_focal_length = True
    database = pycolmap.Database.open(path)
    return database, pycolmap.synthesize_dataset(options, database)


def frame(*, name: str = "a.jpg", jpeg: bytes | None = None) -> Frame:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    pixels = np.stack([np.tile(ramp, (48, 1)), np.full((48, 64), 30), np.full((48, 64), 200)], -1)
    return Frame(
        frame_id=FrameId(1),
        camera_key="camera",
        source="source",
        index=0,
        name=name,
        captured_at_s=0.0,
        received_at_s=0.0,
        pixels=pixels,
        jpeg=jpeg,
    )


def test_a_jpeg_as_received_is_left_untouched() -> None:
    assert encode_keyframe_image(frame(jpeg=JPEG), quality=50) is JPEG


@pytest.mark.parametrize(("name", "tolerance"), [("a.jpg", 6), ("a.PNG", 0), ("a.heic", 6)])
def test_a_frame_without_jpeg_is_encoded_in_rgb(name: str, tolerance: int) -> None:
    data = encode_keyframe_image(frame(name=name), quality=95)
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert bgr is not None
    difference = np.abs(bgr[..., ::-1].astype(int) - frame().pixels)
    assert difference.max() <= tolerance


def test_an_image_name_as_long_as_the_file_system_allows_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("図" * 83 + ".jpg")  # 253 bytes
    write_atomically(path, b"bytes")
    assert path.read_bytes() == b"bytes"
    assert list(tmp_path.iterdir()) == [path]


def test_a_keyframe_changes_its_camera_in_every_table(journal: Journal, tmp_path: Path) -> None:
    fix = GpsFix(latitude_deg=1.0, longitude_deg=2.0, altitude_m=3.0)
    for number in (1, 2):
        add_keyframe(journal, keyframe(number, gps=fix), camera=camera(), image_bytes=JPEG)

    journal.change_camera(FrameId(2), camera(2))

    with reading(tmp_path) as database:
        assert [image.camera_id for image in database.read_all_images()] == [1, 2]
        assert [frame.rig_id for frame in database.read_all_frames()] == [1, 2]
        assert [one.sensor_id.id for one in database.read_frame(2).data_ids] == [2]
        assert len(database.read_all_cameras()) == 2
        sensors = [prior.corr_data_id.sensor_id.id for prior in database.read_all_pose_priors()]
        assert sensors == [1, 2]


def test_the_camera_of_an_unknown_keyframe_is_not_written(journal: Journal, tmp_path: Path) -> None:
    with pytest.raises(JournalError):
        journal.change_camera(FrameId(7), camera(2))
    with reading(tmp_path) as database:
        assert database.num_cameras() == 0


def test_a_mask_lies_beside_its_image_by_colmaps_name(journal: Journal, tmp_path: Path) -> None:
    mask = np.ones((480, 640), np.bool_)
    mask[:, :200] = False
    of_left = keyframe(1, name="left/a.jpg")
    add_keyframe(journal, of_left, camera=camera(), image_bytes=JPEG, mask_bytes=encode_mask(mask))
    add_keyframe(journal, keyframe(2, name="b.jpg"), camera=camera(), image_bytes=JPEG)
    assert image_names(tmp_path) == ["b.jpg", "left/a.jpg"]
    (path,) = (tmp_path / "masks").rglob("*.*")
    assert path == tmp_path / "masks" / "left" / "a.jpg.png"
    stored = pycolmap.Bitmap.read(path, as_rgb=False)
    assert stored is not None
    assert np.array_equal(stored.to_array(), np.where(mask, 255, 0))


def test_without_masks_there_is_no_folder_for_them(journal: Journal, tmp_path: Path) -> None:
    add_keyframe(journal, keyframe(1), camera=camera(), image_bytes=JPEG)
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize("name", ["../a.jpg", "/a.jpg", "b/../../a.jpg"])
def test_a_mask_is_never_read_or_written_outside_the_run(
    journal: Journal, tmp_path: Path, name: str
) -> None:
    with pytest.raises(JournalError, match="not a name"):
        journal.write_mask(name, encode_mask(np.ones((4, 4), np.bool_)))
    with pytest.raises(JournalError, match="not a name"):
        journal.read_mask(name)
    assert not list(tmp_path.parent.glob("*.png"))
