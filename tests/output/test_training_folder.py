from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pycolmap
import pytest

from engine.errors import ConfigError, JournalError, SnapshotError
from engine.output import training_folder
from engine.output.training_folder import TrainingFigures, TrainingFolder
from engine.output.undistortion import PinholeWarp
from engine.types import Uint8Array
from tests.support.trainer_readers import READERS, TrainerScene, read_as_gaussian_splatting

WIDTH, HEIGHT = 320, 240
NUM_UPDATES = 14


def nothing() -> None:
    pass


def make_model(
    *, num_images: int = 5, num_cameras: int = 1, model: str = "SIMPLE_RADIAL"
) -> pycolmap.Reconstruction:
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs = num_cameras
    options.num_frames_per_rig = num_images
    options.num_points3D = 60
    options.camera_width, options.camera_height = WIDTH, HEIGHT
    options.camera_model_id = getattr(pycolmap.CameraModelId, model)
    options.camera_params = {
        "SIMPLE_RADIAL": [300.0, WIDTH / 2 + 3, HEIGHT / 2 - 2, 0.05],
        "EQUIRECTANGULAR": [float(WIDTH), float(HEIGHT)],
    }[model]
    made = pycolmap.synthesize_dataset(options)
    for number, image in enumerate(sorted(made.images.values(), key=lambda one: one.image_id)):
        image.name = f"cam {number % 2}/IMG.{number // 2}.JPG"
    return made


def dotted(image: pycolmap.Image) -> Uint8Array:
    """Dark with a soft white dot at every keypoint that has a point."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    canvas = np.full((HEIGHT, WIDTH), 20.0)
    for point2D in image.get_observation_points2D():
        x, y = point2D.xy
        canvas += 220 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 1.5**2))
    return np.asarray(np.clip(canvas, 0, 255), np.uint8)


def write_images(run: Path, model: pycolmap.Reconstruction) -> None:
    for image in model.images.values():
        path = run / "images" / image.name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path.with_suffix(".jpg")), dotted(image), [cv2.IMWRITE_JPEG_QUALITY, 98])
        path.with_suffix(".jpg").rename(path)


def write_snapshot(run: Path, model: pycolmap.Reconstruction, *, number: int = 1) -> Path:
    snapshot = run / "snapshots" / f"{number:06d}"
    (snapshot / "sparse" / "0").mkdir(parents=True)
    model.write_binary(snapshot / "sparse" / "0")
    return snapshot


@pytest.fixture
def model() -> pycolmap.Reconstruction:
    return make_model()


@pytest.fixture
def run(tmp_path: Path, model: pycolmap.Reconstruction) -> Path:
    write_images(tmp_path, model)
    write_snapshot(tmp_path, model)
    return tmp_path


def update(
    run: Path,
    *,
    number: int = 1,
    between: Callable[[], None] = nothing,
    keep_bytes: int = 10**9,
) -> TrainingFigures | None:
    folder = TrainingFolder(run, jpeg_quality=95, keep_bytes=keep_bytes)
    return folder.update(run / "snapshots" / f"{number:06d}", between=between)


def calibrated(model: pycolmap.Reconstruction, **changes: float) -> pycolmap.Reconstruction:
    """The same keypoints under another calibration, whose points project onto them."""
    other = pycolmap.Reconstruction(model)
    names = ("f", "cx", "cy", "k")
    for camera in other.cameras.values():
        params = dict(zip(names, camera.params, strict=True)) | changes
        camera.params = [float(params[name]) for name in names]
    for point3D in other.points3D.values():
        for element in point3D.track.elements:
            image = other.image(element.image_id)
            projected = image.project_point(point3D.xyz)
            assert projected is not None
            image.points2D[element.point2D_idx].xy = projected
    return other


def assert_dots_lie_on_points(scene: TrainerScene) -> None:
    """By pixels: where a point projects, the picture is bright, and most of it is dark."""
    for camera in scene.cameras.values():
        picture = cv2.imread(str(camera.image), cv2.IMREAD_GRAYSCALE)
        assert picture is not None and picture.shape == camera.size[::-1]
        in_cam = scene.points @ camera.cam_from_world[:, :3].T + camera.cam_from_world[:, 3]
        places = in_cam[in_cam[:, 2] > 0] @ camera.intrinsics.T
        xy = np.floor(places[:, :2] / places[:, 2:]).astype(int)
        inside = ((xy >= 2) & (xy < np.array(camera.size) - 2)).all(axis=1)
        bright = picture[xy[inside, 1], xy[inside, 0]]
        assert inside.sum() > 20 and (bright > 150).mean() > 0.95
        assert np.median(picture) < 60


def test_every_trainer_reads_the_same_cameras_from_it(run: Path) -> None:
    figures = update(run)
    assert figures is not None and (figures.num_images, figures.num_written) == (5, 5)
    scenes = [read(run / "train") for read in READERS]
    assert set(scenes[0].cameras) == {
        *("cam_0-IMG_0.jpg", "cam_1-IMG_0.jpg", "cam_0-IMG_1.jpg"),
        *("cam_1-IMG_1.jpg", "cam_0-IMG_2.jpg"),
    }
    for scene in scenes[1:]:
        assert scene.cameras.keys() == scenes[0].cameras.keys()
        for name, camera in scene.cameras.items():
            first = scenes[0].cameras[name]
            assert camera.size == first.size
            np.testing.assert_allclose(camera.intrinsics, first.intrinsics)
            np.testing.assert_allclose(camera.cam_from_world, first.cam_from_world, atol=1e-9)
    assert_dots_lie_on_points(scenes[0])


def test_an_image_is_written_once_whatever_follows(
    run: Path, model: pycolmap.Reconstruction
) -> None:
    update(run)
    images = run / "training" / "images"
    before = {one.name: (one.stat().st_ino, one.read_bytes()) for one in images.iterdir()}
    for number in range(2, 6):
        write_snapshot(run, model, number=number)
        figures = update(run, number=number)
        assert figures is not None and (figures.version, figures.num_written) == (number, 0)
    assert {o.name: (o.stat().st_ino, o.read_bytes()) for o in images.iterdir()} == before


def test_another_focal_length_moves_the_camera_and_not_its_images(tmp_path: Path) -> None:
    model = make_model()
    for camera in model.cameras.values():
        camera.params = [300.0, WIDTH / 2, HEIGHT / 2, 0.002]
    model = calibrated(model)
    write_images(tmp_path, model)
    write_snapshot(tmp_path, model)
    update(tmp_path)
    before = read_as_gaussian_splatting(tmp_path / "train")
    other = pycolmap.Reconstruction(model)  # keypoints stay: what the lens shows is the same
    for camera in other.cameras.values():
        camera.params = [330.0, WIDTH / 2 + 4, HEIGHT / 2, 0.0024]
    write_snapshot(tmp_path, other, number=2)
    figures = update(tmp_path, number=2)
    assert figures is not None and (figures.num_written, figures.num_generations) == (0, 1)
    after = read_as_gaussian_splatting(tmp_path / "train")
    for name, camera in after.cameras.items():
        moved = camera.intrinsics - before.cameras[name].intrinsics
        assert moved[0, 0] == pytest.approx(30.0, abs=0.5)
        assert moved[0, 2] == pytest.approx(4.0, abs=0.2)
        assert camera.size == before.cameras[name].size


def test_pixels_may_be_off_their_camera_by_no_more_than_one() -> None:
    for width, limit_px in ((320, 0.16), (4000, 1.0)):
        camera = pycolmap.Camera.create_from_model_name(1, "PINHOLE", 300.0, width, 200)
        assert training_folder._max_shift_px(camera) == pytest.approx(limit_px)


def test_another_lens_begins_a_generation_under_new_names(
    run: Path, model: pycolmap.Reconstruction
) -> None:
    update(run)
    before = read_as_gaussian_splatting((run / "train").resolve())
    bytes_before = {name: one.image.read_bytes() for name, one in before.cameras.items()}
    other = calibrated(model, k=-0.1)
    write_images(run, other)  # what that lens shows
    write_snapshot(run, other, number=2)
    figures = update(run, number=2)
    assert figures is not None and (figures.num_written, figures.num_generations) == (5, 2)
    after = read_as_gaussian_splatting(run / "train")
    assert after.cameras.keys().isdisjoint(before.cameras)
    assert_dots_lie_on_points(after)
    assert bytes_before == {name: o.image.read_bytes() for name, o in before.cameras.items()}


def test_a_reader_at_any_moment_sees_one_version_whole(
    run: Path, model: pycolmap.Reconstruction
) -> None:
    """Each version has its own focal length and number of images: a mixture would show."""
    update(run)
    for number in range(2, 2 + NUM_UPDATES):
        other = pycolmap.Reconstruction(model)
        for camera in other.cameras.values():
            camera.params = [300.0 + number, *list(camera.params)[1:]]
        if number % 2:
            other.deregister_frame(other.image(other.reg_image_ids()[0]).frame_id)
        write_snapshot(run, other, number=number)
    is_over, num_read = threading.Event(), threading.Semaphore(0)
    seen: list[tuple[int, set[float]]] = []

    def read() -> None:
        try:
            while not is_over.is_set():
                seen.append(read_whole((run / "train").resolve()))
                num_read.release()
        finally:
            num_read.release(NUM_UPDATES)  # of a reader that broke nobody waits for more

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        for number in range(2, 2 + NUM_UPDATES):
            num_read.acquire()
            assert update(run, number=number) is not None
        is_over.set()
        reading.result()
    assert len(seen) >= NUM_UPDATES and all(len(focals) == 1 for _, focals in seen)
    assert {number for number, _ in seen} <= {4, 5}


def read_whole(folder: Path) -> tuple[int, set[float]]:
    """The number of images and the focal lengths that all trainers read alike."""
    scenes = [reader(folder) for reader in READERS]
    assert len({frozenset(scene.cameras) for scene in scenes}) == 1
    cameras = scenes[0].cameras.values()
    assert all(one.image.read_bytes()[-2:] == b"\xff\xd9" for one in cameras)
    focals = {
        round(float(one.intrinsics[0, 0]), 9) for scene in scenes for one in scene.cameras.values()
    }
    return len(cameras), focals


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_versions_stay_as_long_as_they_take_no_more_space_than_they_may(run: Path) -> None:
    for _ in range(12):
        update(run)
    everything = {"images", "state.json", *(f"{number:06d}" for number in range(1, 13))}
    assert names_in(run / "training") == everything
    model = run / "training" / "000001"
    num_bytes = sum(
        path.stat().st_size
        for path in model.rglob("*")
        if path.is_file() and path.parent.name != "images"
    )
    update(run, keep_bytes=int(10.5 * num_bytes))  # beside the newest one
    assert names_in(run / "training") == {
        *("images", "state.json"),
        *(f"{number:06d}" for number in range(3, 14)),
    }
    update(run, keep_bytes=0)
    newest = {f"{number:06d}" for number in range(7, 15)}
    assert names_in(run / "training") == {"images", "state.json", *newest}
    assert (run / "train").resolve().name == "000014"


def test_without_links_a_version_has_copies_and_they_count(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSYS, "no links", str(target))

    monkeypatch.setattr(os, "link", refused)
    for _ in range(9):
        update(run)
    assert len(names_in(run / "train" / "images")) == 5
    num_bytes = sum(one.stat().st_size for one in (run / "training" / "images").iterdir())
    update(run, keep_bytes=8 * num_bytes)  # models come on top of them
    assert names_in(run / "training").isdisjoint({"000001", "000002"})
    assert names_in(run / "training") >= {"000003", "000010", "images"}


def test_images_that_no_version_has_are_deleted(run: Path, model: pycolmap.Reconstruction) -> None:
    update(run)
    former = names_in(run / "training" / "images")
    write_snapshot(run, calibrated(model, k=-0.1), number=2)
    update(run, number=2)
    assert former < names_in(run / "training" / "images")  # the first version has them
    for _ in range(7):
        update(run, number=2, keep_bytes=0)
    assert names_in(run / "training" / "images") == names_in(run / "train" / "images")
    assert former.isdisjoint(names_in(run / "training" / "images"))


def test_an_update_is_made_though_what_is_old_cannot_be_deleted(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(8):
        update(run)

    def refused(path: Path, *, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.EIO, "broken", str(path))

    monkeypatch.setattr(shutil, "rmtree", refused)
    figures = update(run, keep_bytes=0)
    assert figures is not None and (run / "train").resolve().name == "000009"
    assert "what is old cannot be deleted: broken" in caplog.text


def test_images_that_are_not_in_the_run_yet_are_left_out(
    run: Path, model: pycolmap.Reconstruction
) -> None:
    first = min(model.images.values(), key=lambda one: one.image_id)
    (run / "images" / first.name).unlink()
    figures = update(run)
    assert figures is not None and (figures.num_images, figures.num_missing) == (4, 1)
    assert all(len(read(run / "train").cameras) == 4 for read in READERS)
    for image in model.images.values():
        (run / "images" / image.name).unlink(missing_ok=True)
    write_snapshot(run, model, number=2)
    assert update(run, number=2) is None
    assert len(read_as_gaussian_splatting(run / "train").cameras) == 4


def test_an_image_that_is_cut_short_is_an_error_and_no_grey(run: Path) -> None:
    path = run / "images" / "cam 1" / "IMG.1.JPG"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(SnapshotError, match=r"IMG\.1\.JPG is cut short"):
        update(run)
    assert not (run / "train").exists()


def test_all_images_have_masks_as_soon_as_one_has_and_changed_ones_follow(
    run: Path, model: pycolmap.Reconstruction
) -> None:
    first = min(model.images.values(), key=lambda one: one.image_id)
    mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
    mask[:, : WIDTH // 2] = 0
    path = run / "masks" / f"{first.name}.png"
    path.parent.mkdir(parents=True)
    cv2.imwrite(str(path), mask)
    update(run)
    shares = {one.name: read_share(one) for one in (run / "train" / "masks").iterdir()}
    assert shares.pop("cam_0-IMG_0.jpg.png") == pytest.approx(0.5, abs=0.05)
    assert set(shares.values()) == {1.0}
    assert "mask_path" in (run / "train" / "transforms.json").read_text()
    cv2.imwrite(str(path), np.zeros((HEIGHT, WIDTH), np.uint8))
    write_snapshot(run, model, number=2)
    former = (run / "train").resolve()
    update(run, number=2)
    name = "cam_0-IMG_0.jpg.png"
    assert read_share(run / "train" / "masks" / name) == 0.0
    assert read_share(former / "masks" / name) > 0.4


def read_share(path: Path) -> float:
    mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    assert mask is not None
    return float((mask > 0).mean())


def test_a_full_disk_leaves_the_version_before_and_the_next_one_is_made(
    run: Path, model: pycolmap.Reconstruction
) -> None:
    update(run)
    write_snapshot(run, model, number=2)
    before = (run / "train").resolve()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(JournalError, match="cannot be written"):
            update(run, number=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run / "train").resolve() == before
    assert len(read_as_gaussian_splatting(run / "train").cameras) == 5
    figures = update(run, number=2)
    assert figures is not None and figures.num_written == 0
    assert not list((run / "training").glob(".tmp*"))


def test_an_update_that_is_broken_off_leaves_the_version_before(
    run: Path, model: pycolmap.Reconstruction
) -> None:
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:  # before an image is read, and before it is written
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update(run, between=stop)
    assert not (run / "train").exists()
    assert len(list((run / "training" / "images").iterdir())) == 2
    figures = update(run)
    assert figures is not None and figures.num_images == 5


def test_an_update_can_be_broken_off_until_the_last_step(run: Path) -> None:
    training = run / "training"
    seen: list[tuple[bool, bool, bool]] = []

    def look() -> None:
        prepared = any((one / "transforms.json").exists() for one in training.glob(".tmp-*"))
        seen.append((prepared, (training / "000001").exists(), (run / "train").exists()))

    update(run, between=look)
    assert seen[0] == (False, False, False)
    assert seen[-2:] == [(True, False, False), (False, True, False)]


def test_an_update_of_a_map_whose_images_are_all_written_shows_that_it_goes_on(run: Path) -> None:
    update(run)
    num_calls = 0

    def count() -> None:
        nonlocal num_calls
        num_calls += 1

    figures = update(run, between=count)
    assert figures is not None and figures.num_written == 0
    assert num_calls > 2 * figures.num_images  # keypoints are moved and files are linked


def test_where_pixels_come_from_is_known_only_while_images_of_a_camera_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(num_cameras=2)
    write_images(tmp_path, model)
    write_snapshot(tmp_path, model)
    held: weakref.WeakSet[PinholeWarp] = weakref.WeakSet()
    most = num_made = 0

    class CountedWarp(PinholeWarp):
        def __init__(self, original: pycolmap.Camera, pinhole: pycolmap.Camera) -> None:
            nonlocal most, num_made
            super().__init__(original, pinhole)
            held.add(self)
            most, num_made = max(most, len(held)), num_made + 1

    monkeypatch.setattr(training_folder, "PinholeWarp", CountedWarp)
    folder = TrainingFolder(tmp_path, jpeg_quality=95, keep_bytes=0)
    snapshot = tmp_path / "snapshots" / "000001"
    assert folder.update(snapshot, between=nothing) is not None
    assert (num_made, most, len(held)) == (2, 1, 0)
    assert folder.update(snapshot, between=nothing) is not None
    assert num_made == 2


def test_sizes_in_a_state_that_cannot_be_take_no_memory(run: Path) -> None:
    update(run)
    path = run / "training" / "state.json"
    record = json.loads(path.read_text())
    for camera in record["cameras"].values():
        camera["pinhole"]["width"] = 10**9
    path.write_text(json.dumps(record))
    figures = update(run)
    assert figures is not None and figures.num_written == 5
    assert_dots_lie_on_points(read_as_gaussian_splatting(run / "train"))


def test_what_a_crash_left_and_nobody_can_delete_is_an_error_of_writing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update(run)
    (run / "training" / ".tmp-000009-1").write_text("left")

    def refused(path: Path, **options: bool) -> None:
        raise OSError(errno.EROFS, "read-only", str(path))

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(JournalError, match="read-only"):
        update(run)


@pytest.mark.parametrize("state", [b"nothing", b"{}", b'{"names": {"a": "../../x"}}', b"[" * 9999])
def test_a_state_that_cannot_be_read_begins_anew_and_rewrites_nothing(
    run: Path, model: pycolmap.Reconstruction, state: bytes
) -> None:
    update(run)
    images = run / "training" / "images"
    before = {one.name: one.stat().st_ino for one in images.iterdir()}
    (run / "training" / "state.json").write_bytes(state)
    write_snapshot(run, model, number=2)
    figures = update(run, number=2)
    assert figures is not None and (figures.version, figures.num_written) == (2, 5)
    after = {one.name: one.stat().st_ino for one in images.iterdir()}
    assert before.items() <= after.items() and len(after) == 10
    assert_dots_lie_on_points(read_as_gaussian_splatting(run / "train"))


def test_names_in_a_state_are_no_paths(run: Path, model: pycolmap.Reconstruction) -> None:
    update(run)
    path = run / "training" / "state.json"
    record = json.loads(path.read_text())
    record["names"] = {key: f"../../{name}" for key, name in record["names"].items()}
    path.write_text(json.dumps(record))
    write_snapshot(run, model, number=2)
    update(run, number=2)
    assert {one.name for one in run.iterdir()} == {"images", "snapshots", "train", "training"}


def test_cameras_that_see_all_around_are_refused_with_the_way_out(tmp_path: Path) -> None:
    model = make_model(model="EQUIRECTANGULAR")
    write_snapshot(tmp_path, model)
    with pytest.raises(ConfigError, match="export --undistort"):
        update(tmp_path)
