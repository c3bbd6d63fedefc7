from __future__ import annotations

import json
import os
import resource
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pycolmap
import pytest

from engine.config import SnapshotsConfig
from engine.errors import SnapshotError
from engine.mapping.steps import MapCopy
from engine.output import snapshots
from engine.output.snapshots import WrittenSnapshot, next_sequence, read_models, write_snapshot
from tests.support.waiting import HANG_S

KEEP_ALL = SnapshotsConfig(keep=0)


def synthetic_model(*, num_images: int = 5, num_points3D: int = 60) -> pycolmap.Reconstruction:
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs = 1
    options.num_frames_per_rig = num_images
    options.num_points3D = num_points3D
    return pycolmap.synthesize_dataset(options)


def in_own_frame(model: pycolmap.Reconstruction) -> MapCopy:
    return MapCopy(reconstruction=model, is_in_metres=False)


def write(
    run: Path,
    *models: pycolmap.Reconstruction,
    sequence: int | None = None,
    config: SnapshotsConfig = KEEP_ALL,
) -> WrittenSnapshot:
    return write_snapshot(
        run,
        [in_own_frame(model) for model in models or [synthetic_model()]],
        sequence=next_sequence(run) if sequence is None else sequence,
        entries={"at_s": 1.5},
        config=config,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path


@contextmanager
def full_disk(*, max_file_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond a size: the system's own short writes and errors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def read_classic_images(path: Path) -> tuple[dict[str, int], bytes]:
    """Keypoints by image name, and what is left of the file, as splatting loaders read it."""
    data, at = path.read_bytes(), 8
    keypoints = {}
    for _ in range(struct.unpack_from("<Q", data, 0)[0]):
        at += struct.calcsize("<idddddddi")
        end = data.index(b"\0", at)
        name, at = data[at:end].decode(), end + 1
        keypoints[name] = struct.unpack_from("<Q", data, at)[0]
        at += 8 + 24 * keypoints[name]
    return keypoints, data[at:]


def read_classic_points(path: Path) -> tuple[list[int], bytes]:
    """Track lengths, and what is left of the file."""
    data, at = path.read_bytes(), 8
    lengths = []
    for _ in range(struct.unpack_from("<Q", data, 0)[0]):
        at += struct.calcsize("<QdddBBBd")
        lengths.append(struct.unpack_from("<Q", data, at)[0])
        at += 8 + 8 * lengths[-1]
    return lengths, data[at:]


def read_classic_cameras(path: Path, *, num_params: int) -> tuple[list[tuple[int, int]], bytes]:
    """Image sizes, and what is left of the file."""
    data, at = path.read_bytes(), 8
    sizes = []
    for _ in range(struct.unpack_from("<Q", data, 0)[0]):
        _, _, width, height = struct.unpack_from("<iiQQ", data, at)
        sizes.append((width, height))
        at += 24 + 8 * num_params
    return sizes, data[at:]


def test_a_snapshot_is_read_back_by_pycolmap(run: Path) -> None:
    model = synthetic_model()
    written = write(run, pycolmap.Reconstruction(model))
    read = pycolmap.Reconstruction(run / "latest" / "sparse" / "0")
    assert read.is_valid()
    assert read.num_reg_images() == written.first.num_registered == 5
    assert read.num_points3D() == written.first.num_points3D == model.num_points3D()
    assert read.compute_num_observations() == written.first.num_observations
    assert names_in(written.path / "sparse" / "0") == {
        f"{name}.bin" for name in ("cameras", "images", "points3D", "rigs", "frames")
    }


def test_a_reader_of_the_classic_three_files_reads_to_the_last_byte(run: Path) -> None:
    model = synthetic_model()
    folder = write(run, pycolmap.Reconstruction(model)).path / "sparse" / "0"
    keypoints, images_rest = read_classic_images(folder / "images.bin")
    lengths, points_rest = read_classic_points(folder / "points3D.bin")
    sizes, cameras_rest = read_classic_cameras(folder / "cameras.bin", num_params=4)
    assert images_rest == points_rest == cameras_rest == b""
    assert keypoints == {image.name: image.num_points2D() for image in model.images.values()}
    assert sum(lengths) == model.compute_num_observations()
    assert sizes == [(1024, 768)]


def test_images_without_a_pose_stay_out(run: Path) -> None:
    model = synthetic_model()
    model.deregister_frame(3)
    waiting = model.image(3).name
    folder = write(run, model).path / "sparse" / "0"
    keypoints, rest = read_classic_images(folder / "images.bin")
    assert rest == b""
    assert len(keypoints) == 4
    assert waiting not in keypoints
    assert pycolmap.Reconstruction(folder).is_valid()


def test_points_with_short_tracks_stay_out_and_the_model_stays_valid(run: Path) -> None:
    model = synthetic_model(num_points3D=30)
    short = sorted(model.points3D)[:7]
    for point3D_id in short:
        track = [(e.image_id, e.point2D_idx) for e in model.point3D(point3D_id).track.elements]
        for image_id, point2D_idx in track[2:]:
            model.delete_observation(image_id, point2D_idx)
    written = write(run, model, config=SnapshotsConfig(min_track_length=3))
    read = pycolmap.Reconstruction(written.path / "sparse" / "0")
    assert read.is_valid()
    assert read.num_points3D() == 23
    assert not set(short) & set(read.points3D)


def test_reprojection_errors_in_the_files_are_those_of_the_poses_in_the_files(run: Path) -> None:
    model = synthetic_model()
    camera = model.camera(1)
    camera.params = [1.01 * camera.params[0], *camera.params[1:]]
    written = write(run, model)
    read = pycolmap.Reconstruction(written.path / "sparse" / "0")
    stored_px = read.compute_mean_reprojection_error()
    read.update_point_3d_errors()
    assert stored_px == pytest.approx(read.compute_mean_reprojection_error())
    assert stored_px == pytest.approx(written.first.mean_reprojection_error_px)
    assert 0.5 < stored_px < 10  # 1 % of a focal length of 1280 px, some 100 px off the centre


def test_models_keep_their_order(run: Path) -> None:
    numbers = (3, 6, 4)
    written = write(run, *(synthetic_model(num_images=number) for number in numbers))
    assert tuple(model.num_registered for model in written.models) == numbers
    assert written.first is written.models[0]
    for map_idx, number in enumerate(numbers):
        model = pycolmap.Reconstruction(written.path / "sparse" / str(map_idx))
        assert model.num_reg_images() == number


def test_snapshot_json_holds_the_figures_and_the_given_entries(run: Path) -> None:
    written = write(run)
    record = json.loads((written.path / "snapshot.json").read_text())
    assert record["sequence"] == 1
    assert record["at_s"] == 1.5
    (model,) = record["models"]
    assert model["num_registered"] == 5
    assert model["num_points3D"] == 60
    assert model["mean_track_length"] == pytest.approx(5.0)
    assert model["mean_reprojection_error_px"] == pytest.approx(0.0, abs=1e-6)


def test_images_and_latest_are_relative_links(run: Path) -> None:
    (run / "images" / "a.jpg").write_bytes(b"jpeg")
    write(run)
    moved = run.rename(run.with_name("moved"))
    assert os.readlink(moved / "latest") == "snapshots/000001"
    assert os.readlink(moved / "latest" / "images") == "../../images"
    assert (moved / "latest" / "images" / "a.jpg").read_bytes() == b"jpeg"


def test_masks_are_linked_like_images_where_there_are_any(run: Path) -> None:
    write(run)
    assert not (run / "latest" / "masks").is_symlink()
    (run / "masks").mkdir()
    (run / "masks" / "a.jpg.png").write_bytes(b"png")
    write(run)
    assert os.readlink(run / "latest" / "masks") == "../../masks"
    assert (run / "latest" / "masks" / "a.jpg.png").read_bytes() == b"png"


def test_numbering_goes_on_from_what_exists(run: Path) -> None:
    assert next_sequence(run) == 1
    write(run, sequence=41)
    (run / "snapshots" / ".tmp-000099-7").mkdir()
    (run / "snapshots" / "notes").mkdir()
    assert next_sequence(run) == 42


def test_the_newest_snapshots_are_kept(run: Path) -> None:
    for _ in range(5):
        write(run, config=SnapshotsConfig(keep=2))
    assert names_in(run / "snapshots") == {"000004", "000005"}
    assert (run / "latest").resolve().name == "000005"


def test_retention_never_deletes_what_latest_points_to(run: Path) -> None:
    for sequence in (7, 8, 9):
        write(run, sequence=sequence)
    write(run, sequence=3, config=SnapshotsConfig(keep=1))
    assert names_in(run / "snapshots") == {"000003", "000009"}
    assert pycolmap.Reconstruction(run / "latest" / "sparse" / "0").is_valid()


def test_an_old_snapshot_that_cannot_be_deleted_is_a_warning(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(run)

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    rename = Path.rename
    monkeypatch.setattr(
        Path,
        "rename",
        lambda path, to: refuse(path, to) if path.name == "000001" else rename(path, to),
    )
    write(run, config=SnapshotsConfig(keep=1))
    assert "old snapshot cannot be deleted" in caplog.text
    assert (run / "latest").resolve().name == "000002"


def test_leftovers_of_a_crash_are_removed(run: Path) -> None:
    leftover = run / "snapshots" / ".tmp-000001-4242" / "sparse" / "0"
    leftover.mkdir(parents=True)
    (leftover / "images.bin").write_bytes(b"half")
    write(run)
    assert names_in(run / "snapshots") == {"000001"}


@pytest.mark.parametrize("max_file_bytes", [10, 100, 1000, 5000])
def test_a_full_disk_leaves_nothing_half_written_and_latest_readable(
    run: Path, max_file_bytes: int
) -> None:
    write(run)
    before = names_in(run)
    with full_disk(max_file_bytes=max_file_bytes), pytest.raises(SnapshotError, match="cut short"):
        write(run)
    assert names_in(run / "snapshots") == {"000001"}
    assert names_in(run) == before
    assert pycolmap.Reconstruction(run / "latest" / "sparse" / "0").is_valid()
    assert write(run).sequence == 2


def test_latest_stays_when_it_cannot_be_moved(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(run)

    def refuse(path: Path, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshots, "link_atomically", refuse)
    with pytest.raises(SnapshotError, match="No space left"):
        write(run)
    assert (run / "latest").resolve().name == "000001"


def test_a_number_is_never_written_twice(run: Path) -> None:
    write(run, sequence=1)
    with pytest.raises(SnapshotError, match="exists"):
        write(run, sequence=1)


def test_no_model_is_no_snapshot(run: Path) -> None:
    with pytest.raises(SnapshotError, match="at least one model"):
        write_snapshot(run, [], sequence=1, entries={}, config=KEEP_ALL)


def test_a_folder_that_is_gone_is_a_snapshot_error(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError):
        write(tmp_path / "gone")


def test_latest_is_whole_for_a_reader_that_never_pauses(run: Path) -> None:
    """The reader opens `latest` while nine snapshots or more replace one another."""
    model = synthetic_model(num_images=3, num_points3D=20)
    write(run, pycolmap.Reconstruction(model))
    done, sequences = threading.Event(), []
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while not done.is_set():
                folder = (run / "latest").resolve(strict=True)
                record = json.loads((folder / "snapshot.json").read_text())
                lengths, rest = read_classic_points(folder / "sparse" / "0" / "points3D.bin")
                assert (len(lengths), rest) == (20, b"")
                sequences.append(record["sequence"])
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    num_written = 0
    while num_written < 9 or (len(set(sequences)) < 2 and reader.is_alive()):
        # All are kept: a snapshot outlives the moment in which a reader resolved it, however long.
        write(run, pycolmap.Reconstruction(model), config=KEEP_ALL)
        num_written += 1
    done.set()
    reader.join(timeout=HANG_S)
    assert not failures
    assert sequences == sorted(sequences)
    assert len(set(sequences)) > 1


def test_each_model_says_whether_it_is_georeferenced_in_the_order_of_the_folders(
    run: Path,
) -> None:
    copies = [
        MapCopy(reconstruction=synthetic_model(num_images=3), is_in_metres=True),
        MapCopy(reconstruction=synthetic_model(num_images=6), is_in_metres=False),
    ]
    write_snapshot(run, copies, sequence=1, entries={}, config=KEEP_ALL)
    record = json.loads((run / "latest" / "snapshot.json").read_text())
    models = [(model["num_registered"], model["is_georeferenced"]) for model in record["models"]]
    assert models == [(3, True), (6, False)]


def test_models_are_read_back_with_what_their_files_lack(run: Path) -> None:
    copies = [replace(in_own_frame(synthetic_model()), record={"number": n}) for n in (0, 3)]
    written = write_snapshot(run, copies, sequence=1, entries={}, config=KEEP_ALL)
    models = read_models(written.path)
    assert [model.record for model in models] == [{"number": 0}, {"number": 3}]
    assert all(model.reconstruction.num_reg_images() == 5 for model in models)


def test_models_of_snapshots_without_records_are_read_too(run: Path) -> None:
    written = write(run)
    entries = json.loads((written.path / "snapshot.json").read_text())
    del entries["maps"]
    (written.path / "snapshot.json").write_text(json.dumps(entries))
    (model,) = read_models(written.path)
    assert model.record == {}


def test_a_model_that_is_not_there_is_an_error(run: Path) -> None:
    with pytest.raises(SnapshotError, match="cannot be read"):
        read_models(run / "snapshots" / "000001")


@pytest.mark.parametrize("name", ["points3D.bin", "images.bin", "snapshot.json"])
def test_a_snapshot_with_flipped_or_missing_bytes_is_an_error_and_takes_no_memory(
    run: Path, name: str
) -> None:
    written = write(run)
    model = written.path / "sparse" / "0"
    path = written.path / name if name.endswith("json") else model / name
    whole = path.read_bytes()
    for damaged in (b"\xff" * 8 + whole[8:], whole[: len(whole) // 2], b"", b'{"maps": {"0": 1}}'):
        path.write_bytes(damaged)
        with pytest.raises(SnapshotError, match="cannot be read"):
            read_models(written.path)
