"""The command line from end to end: a town, real photos, signals, and input that is no good."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pycolmap
import pytest
from typer.testing import CliRunner, Result

from adapters import cli
from adapters.launch import LaunchOptions
from adapters.town.source import SyntheticTown, TownOptions
from engine.config import Config, load_config
from engine.run.engine import RunOutcome, StoppedBy
from engine.types import FrameId, Uint8Array
from tests.support.fake_runs import Written, trajectory_lines
from tests.support.paths import ROOT
from tests.support.textured_images import random_texture, similarity_about
from tests.support.waiting import HANG_S, block_until

NUM_PHOTOS = 10
# A map, good or doubted: views of one plane say nothing of the focal length that nobody gave.
FINISHED = (0, cli.DOUBTED)

WITHOUT_TORCH = """
import sys


class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"{name} is not there", name=name)


sys.meta_path.insert(0, NoTorch())
from adapters.cli import main

main()
"""

TOWN = "synthetic:town?path=lawnmower&width=320&height=240"
FLIGHT, NUM_FRAMES = f"{TOWN}&frames=40", 24  # the first of them
LEAN = ("--set", "dense.enabled=false", "--set", "report.enabled=false")

pytestmark = pytest.mark.usefixtures("towns_painted_once")


def livesfm(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def reconstruct(source: str | Path, out: Path, *more: str | Path) -> Result:
    """A run without views."""
    return livesfm("run", source, "--out", out, "--view", "none", "--quiet", *more)


def model_of(path: Path) -> pycolmap.Reconstruction:
    return pycolmap.Reconstruction(path / "latest" / "sparse" / "0")


def assert_valid(path: Path) -> Written:
    """The folder holds what every run leaves, and its parts agree."""
    assert load_config([path / "config.yaml"])
    written = Written.read(path)
    assert written.events[0]["event"] == "RunStarted"
    assert written.events[-1]["event"] == "RunFinished"
    dropped = written.of_kind("FrameDropped")
    assert len(dropped) == sum(status.startswith("dropped:") for status in written.statuses)
    assert sum(written.summary["frames_dropped"].values()) == len(dropped)
    assert written.summary["keyframes"] == written.statuses.count("keyframe")
    assert_poses_agree(path, written)
    if written.summary["components"]:
        model = model_of(path)
        assert model.is_valid()
        assert model.num_reg_images() == written.summary["registered_keyframes"]
        for image in model.images.values():
            assert (path / "latest" / "images" / image.name).is_file()
    return written


def assert_poses_agree(path: Path, written: Written) -> None:
    """The table of frames, the trajectories and the summary speak of the same poses and maps."""
    rows = written.rows
    assert {row["pose"] for row in rows} <= {"keyframe", "tracked", "interpolated", "none"}
    for row in rows:
        assert (row["pose"] == "none") == (row["map"] == "")
        assert row["pose"] == "none" or not row["status"].startswith("dropped:")
    for map_idx, figures in enumerate(written.summary["maps"]):
        of_map = [row for row in rows if row["map"] == str(map_idx)]
        name = f"trajectory_{map_idx}.txt" if map_idx else "trajectory.txt"
        assert len(trajectory_lines(path / name)) == len(of_map) == figures["frames_with_pose"]
        num_keyframes = sum(row["pose"] == "keyframe" for row in of_map)
        assert num_keyframes == figures["registered_keyframes"]
    num_posed = sum(row["pose"] != "none" for row in rows)
    num_dropped = sum(row["status"].startswith("dropped:") for row in rows)
    assert written.summary["frames_without_pose"] == len(rows) - num_dropped - num_posed
    if not written.summary["maps"]:
        assert trajectory_lines(path / "trajectory.txt") == []


# -- a town ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def town_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over the town; tests only read it."""
    path = tmp_path_factory.mktemp("town") / "run"
    part = f"sources.max_frames={NUM_FRAMES}"
    result = livesfm("run", FLIGHT, "--out", path, "--quiet", "--set", part)
    assert result.exit_code == 0, result.output
    return path


@pytest.mark.slow
def test_a_flight_over_the_town_is_reconstructed(town_run: Path) -> None:
    written = assert_valid(town_run)
    assert len(written.rows) == NUM_FRAMES
    assert set(written.statuses) == {"keyframe", "tracked"}
    assert written.summary["registered_keyframes"] == written.summary["keyframes"]
    assert written.summary["snapshots_written"] >= 2
    assert (town_run / "recording.rrd").stat().st_size > 10_000
    assert len(trajectory_lines(town_run / "trajectory_live.txt")) >= 0.9 * NUM_FRAMES


@pytest.mark.slow
def test_its_accuracy_is_told_as_figures(town_run: Path) -> None:
    result = livesfm("evaluate", town_run, "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["registered_ratio"] == 1.0
    for name, max_percent in (("final", 0.3), ("live", 1.0)):
        score = figures[name]
        assert 0.0 < score["absolute"]["rmse_percent_of_extent"] < max_percent, name
        assert 0.9 < score["auc_5_deg"] < 1.0, name
    assert figures["final"]["posed_ratio"] == 1.0


@pytest.mark.slow
def test_its_accuracy_is_told_as_a_table(town_run: Path) -> None:
    result = livesfm("evaluate", town_run)
    assert result.exit_code == 0
    assert "% of the extent" in result.stdout


@pytest.mark.slow
def test_the_demo_tells_its_accuracy(town_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def finished(_: Config, options: LaunchOptions) -> RunOutcome:
        return RunOutcome(
            path=options.path,
            stopped_by=StoppedBy.END_OF_SOURCES,
            num_keyframes=20,
            num_registered=20,
            summary={},
        )

    monkeypatch.setattr(cli, "_launch", finished)
    result = livesfm("demo", "--out", town_run)
    assert result.exit_code == 0
    assert "% of the extent" in result.stdout
    assert f"{town_run}: 20 of 20 keyframes registered\n" in result.stdout


@pytest.mark.slow
def test_it_is_exported_for_other_tools(town_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    formats = ("--undistort", "--ply", "--nerfstudio", "--tum")
    result = livesfm("export", town_run, "--to", out, *formats)
    assert result.exit_code == 0, result.output
    num_images = model_of(town_run).num_reg_images()
    (undistorted,) = {path.parent for path in out.rglob("images.bin")}
    model = pycolmap.Reconstruction(undistorted)
    assert model.num_reg_images() == num_images
    assert {camera.model.name for camera in model.cameras.values()} == {"PINHOLE"}
    (transforms,) = out.rglob("transforms.json")
    assert len(json.loads(transforms.read_text())["frames"]) == num_images
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.ply")} == {
        "points.ply",
        "sparse/0/points3D.ply",  # what trainers of splats begin with
    }
    assert all(path.read_bytes().startswith(b"ply") for path in out.rglob("*.ply"))
    lines = {path.name: len(trajectory_lines(path)) for path in out.rglob("*.txt")}
    assert NUM_FRAMES in lines.values()


@pytest.mark.slow
def test_the_same_flight_gives_the_same_map_to_the_last_bit(town_run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    part = f"sources.max_frames={NUM_FRAMES}"
    assert reconstruct(FLIGHT, again, "--set", part).exit_code == 0
    for name in ("cameras.bin", "images.bin", "points3D.bin"):
        one, other = (path / "latest" / "sparse" / "0" / name for path in (town_run, again))
        assert one.read_bytes() == other.read_bytes(), name
    one, other = (path / "trajectory.txt" for path in (town_run, again))
    assert one.read_text() == other.read_text()


# -- dense matches of the town --------------------------------------------------------------------


def reconstruct_densely(out: Path, *settings: str) -> Result:
    """A part of the flight by true matches, with an error of a pixel and a tenth of outliers."""
    given = ("oracle.noise_px=1.0", "oracle.outlier_ratio=0.1", "dense_matching.max_keypoints=2048")
    sets = [part for setting in (*given, *settings) for part in ("--set", setting)]
    source = "synthetic:town?path=lawnmower&width=480&height=360&frames=60"
    return reconstruct(source, out, "--config", ROOT / "configs" / "oracle.yaml", *LEAN, *sets)


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests only read it."""
    path = tmp_path_factory.mktemp("dense") / "run"
    result = reconstruct_densely(path, "sources.max_frames=38", "matching.metric_scale=apply")
    assert result.exit_code == 0, result.output
    return path


def accuracy_of(run: Path) -> dict[str, Any]:
    result = livesfm("evaluate", run, "--json")
    assert result.exit_code == 0, result.output
    figures: dict[str, Any] = json.loads(result.stdout)
    return figures


@pytest.mark.slow
def test_noisy_dense_matches_make_an_accurate_map_of_long_tracks(dense_run: Path) -> None:
    written = assert_valid(dense_run)
    assert written.events[0]["matcher"] == "oracle"
    assert written.summary["registered_keyframes"] == written.summary["keyframes"] >= 15
    assert written.summary["mean_track_length"] >= 5.0
    assert 0.3 < written.summary["mean_reprojection_error_px"] < 1.2
    figures = accuracy_of(dense_run)
    assert figures["registered_ratio"] == 1.0
    for name in ("final", "live"):
        assert 0.01 < figures[name]["absolute"]["rmse_percent_of_extent"] <= 0.3, name


@pytest.mark.slow
def test_the_map_of_a_matcher_that_sees_metres_is_in_metres(dense_run: Path) -> None:
    written = Written.read(dense_run)
    (told,) = written.of_kind("MetricScaleEstimated")
    assert told["is_applied"]
    assert 0.03 < told["spread_ratio"] < 0.1
    for name in ("final", "live"):
        assert abs(accuracy_of(dense_run)[name]["absolute"]["scale"] - 1.0) < 0.02, name
    assert abs(written.summary["metres_per_map_unit"] - 1.0) < 0.02


@pytest.mark.slow
def test_the_database_has_the_keypoints_of_the_snapshot_row_by_row(dense_run: Path) -> None:
    model = model_of(dense_run)
    database = pycolmap.Database.open(dense_run / "database.db")
    num_moved = 0
    for image in model.images.values():
        stored_xy = database.read_keypoints(image.image_id)[:, :2]
        keypoints_xy = np.array([point.xy for point in image.points2D])
        assert stored_xy.shape == keypoints_xy.shape
        assert np.abs(stored_xy - keypoints_xy).max() < 1e-3
        # Free rows start at centres of cells; matches end elsewhere.
        num_moved += int((np.abs(keypoints_xy % 1.0 - 0.5) > 1e-3).any(axis=1).sum())
    assert num_moved > 100 * model.num_images()
    for pair_id, geometry in zip(*database.read_two_view_geometries(), strict=True):
        first, second = pycolmap.pair_id_to_image_pair(pair_id)
        rows = geometry.inlier_matches
        points1, points2 = (
            np.column_stack([database.read_keypoints(i)[rows[:, side], :2], np.ones(len(rows))])
            for side, i in enumerate((first, second))
        )
        assert geometry.F is not None
        lines = points1 @ geometry.F.T
        distances_px = np.abs((lines * points2).sum(axis=1)) / np.linalg.norm(lines[:, :2], axis=1)
        assert np.quantile(distances_px, 0.9) < 4.0, (first, second)
    database.close()


@pytest.mark.slow
def test_images_with_holes_are_reconstructed_from_what_is_left(
    dense_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = reconstruct_densely(out, "sources.max_frames=16", "oracle.dropped_ratio=0.4")
    assert result.exit_code == 0, result.output
    summary = assert_valid(out).summary
    assert summary["registered_keyframes"] == summary["keyframes"] >= 6
    assert 0.01 < accuracy_of(out)["final"]["absolute"]["rmse_percent_of_extent"] < 0.6
    num_seen, num_seen_without_holes = (
        each["num_observations"] / each["keyframes"]
        for each in (summary, Written.read(dense_run).summary)
    )
    assert 0.2 < num_seen / num_seen_without_holes < 0.8


# -- signals --------------------------------------------------------------------------------------


MANY_FRAMES = 200
EVERY_SIGNAL_COUNTS = """
import sys
from pathlib import Path
from adapters.cli import main
from engine.run import event_loop
from tests.support.painted_towns import paint_once_in_this_process
paint_once_in_this_process(Path(sys.argv.pop(1)))
event_loop._SAME_REQUEST_S = 0.0  # however soon it follows
main()
"""


@contextmanager
def started(out: Path, *, painted_in: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of its own process over more frames than anyone waits for."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", EVERY_SIGNAL_COUNTS, str(painted_in)),
            *(
                "run",
                f"{TOWN}&frames={MANY_FRAMES}",
                "--out",
                str(out),
                "--view",
                "none",
                "--quiet",
            ),
            *("--set", "sources.mapping_queue_size=4"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_event(out: Path, event: str, process: subprocess.Popen[str]) -> None:
    events = out / "events.jsonl"

    def has_happened() -> bool:
        assert process.poll() is None, process.communicate()
        return events.exists() and f'"{event}"' in events.read_text()

    block_until(has_happened, what=event)


@pytest.mark.slow
def test_an_interrupted_run_saves_its_map(tmp_path: Path, painted_towns_folder: Path) -> None:
    out = tmp_path / "run"
    with started(out, painted_in=painted_towns_folder) as process:
        wait_for_event(out, "MapInitialized", process)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, stderr
    assert "press Ctrl-C again to drop what waits, a third time to leave at once" in stderr
    assert "keyframes registered" in stdout
    written = assert_valid(out)
    assert written.summary["stopped_by"] == written.events[-1]["stopped_by"] == "signal"
    assert 0 < len(written.rows) < MANY_FRAMES
    assert set(written.statuses) == {"keyframe", "tracked"}, "what had arrived is mapped"


@pytest.mark.slow
def test_a_third_signal_leaves_at_once(tmp_path: Path, painted_towns_folder: Path) -> None:
    out = tmp_path / "run"
    with started(out, painted_in=painted_towns_folder) as process:
        wait_for_event(out, "MapInitialized", process)
        assert process.stderr is not None
        for reaction in ("stopping", "dropping"):
            process.send_signal(signal.SIGTERM)
            assert any(reaction in line for line in process.stderr), reaction
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=HANG_S)
    assert process.returncode == 130, stderr
    assert "stopped at once" in stderr
    assert not (out / "summary.json").exists()
    # What was written until then is whole.
    assert all(json.loads(line) for line in (out / "events.jsonl").read_text().splitlines())


# -- photos, good and bad -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def town() -> SyntheticTown:
    ids = itertools.count(1)
    options = TownOptions(path="lawnmower", num_frames=60, width=320, height=240)
    return SyntheticTown(options, next_frame_id=lambda: FrameId(next(ids)))


@pytest.fixture(scope="module")
def plain_pictures() -> list[Uint8Array]:
    """Two pictures full of structure, quickly made, that share nothing."""
    still = similarity_about((0.0, 0.0))
    return [random_texture(seed).image(400, 300, image_from_texture=still) for seed in range(2)]


@pytest.fixture(scope="module")
def pictures(town: SyntheticTown) -> list[Uint8Array]:
    """Overlapping views of the town."""
    return [town.render(index).pixels for index in range(NUM_PHOTOS)]


def save(path: Path, pixels: Uint8Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded, data = cv2.imencode(path.suffix, pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    assert encoded
    path.write_bytes(data.tobytes())  # OpenCV itself takes no name that the system's locale lacks
    return path


def save_all(folder: Path, pictures: Sequence[Uint8Array]) -> Path:
    for number, pixels in enumerate(pictures):
        save(folder / f"{number:03d}.jpg", pixels)
    return folder


@pytest.fixture
def photos(tmp_path: Path, pictures: Sequence[Uint8Array]) -> Path:
    return save_all(tmp_path / "photos", pictures)


def assert_reconstructed(result: Result, out: Path, *, num: int = NUM_PHOTOS) -> Written:
    assert result.exit_code in FINISHED, result.output
    written = assert_valid(out)
    assert written.summary["registered_keyframes"] == num
    assert f"{num} of {num} keyframes registered" in result.stdout
    return written


def assert_nothing_made(result: Result, out: Path) -> Written:
    assert result.exit_code == cli.NOTHING_MADE, result.output
    assert "no map could be made" in result.stdout
    assert result.exception is None or isinstance(result.exception, SystemExit)
    written = assert_valid(out)
    assert written.summary["stopped_by"] == "end_of_sources"
    assert written.summary["components"] == 0
    return written


@pytest.mark.slow
def test_overlapping_photos_are_reconstructed(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    written = assert_reconstructed(reconstruct(photos, out), out)
    assert written.statuses == ["keyframe"] * NUM_PHOTOS
    assert (out / "images" / "003.jpg").read_bytes() == (photos / "003.jpg").read_bytes()


@pytest.mark.slow
def test_photos_are_reconstructed_with_windows_and_views_where_there_is_no_torch(
    photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    often = (
        "interval=1",
        "min_keyframes=4",
        "size=3",
        "merge_after_keyframes=1",
        "weak_fit_ratio=10",
    )
    settings = itertools.chain.from_iterable(("--set", f"window.{setting}") for setting in often)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "run", photos, "--out", out, *settings],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in FINISHED, done.stderr
    written = assert_valid(out)
    assert written.summary["registered_keyframes"] == NUM_PHOTOS
    assert written.summary["window_solves"] >= 1
    assert (out / "recording.rrd").stat().st_size > 10_000


def test_an_empty_folder_is_refused_in_one_line_and_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    refused = reconstruct(tmp_path / "photos", tmp_path / "run")
    assert refused.exit_code == cli.REFUSED
    (line,) = refused.output.splitlines()
    assert line.startswith(f"livesfm: {tmp_path / 'photos'}: no image in this folder")
    assert os.listdir(tmp_path) == ["photos"]


def test_a_run_to_which_no_frame_came_leaves_no_folder(tmp_path: Path) -> None:
    nothing = reconstruct(
        f"watch:{tmp_path}", tmp_path / "runs" / "a", "--set", "live_sources.give_up_after_s=0.1"
    )
    assert nothing.exit_code == cli.NOTHING_MADE, nothing.output
    assert nothing.stdout.splitlines()[-1].startswith("no frame came, see above")
    assert os.listdir(tmp_path / "runs") == []


def test_one_photo_makes_no_map(tmp_path: Path, plain_pictures: Sequence[Uint8Array]) -> None:
    out = tmp_path / "run"
    photo = save(tmp_path / "photo.jpg", plain_pictures[0])
    result = reconstruct(photo, out)
    written = assert_nothing_made(result, out)
    assert written.statuses == ["keyframe"]
    assert "there is one keyframe only, and a map needs several" in result.stdout.splitlines()[-1]


def test_the_same_file_twice_is_a_counted_drop(
    tmp_path: Path, plain_pictures: Sequence[Uint8Array]
) -> None:
    out = tmp_path / "run"
    folder = save_all(tmp_path / "photos", [plain_pictures[0]] * 2)
    written = assert_nothing_made(reconstruct(folder, out), out)
    assert written.statuses == ["keyframe", "dropped:duplicate"]


def test_two_photos_from_one_place_make_no_map(
    tmp_path: Path, plain_pictures: Sequence[Uint8Array]
) -> None:
    out = tmp_path / "run"
    save(tmp_path / "photos" / "a.png", plain_pictures[0])
    save(tmp_path / "photos" / "b.jpg", plain_pictures[0])
    written = assert_nothing_made(reconstruct(tmp_path / "photos", out), out)
    assert written.statuses == ["keyframe"] * 2


@pytest.mark.slow
def test_a_tripod_makes_no_map_out_of_noise(tmp_path: Path, town: SyntheticTown) -> None:
    out, rng, view = tmp_path / "run", np.random.default_rng(0), town.render(0).pixels
    noisy = [
        np.clip(view + rng.normal(0.0, 3.0, view.shape), 0, 255).astype(np.uint8) for _ in range(8)
    ]
    result = reconstruct(save_all(tmp_path / "photos", noisy), out)
    written = assert_nothing_made(result, out)
    assert written.statuses == ["keyframe"] * 8
    assert len(written.of_kind("PairVerified")) > 8, "they do match"
    assert "no two show the same things from clearly different places" in result.stdout


@pytest.mark.slow
def test_copies_of_photos_lie_where_their_originals_do(
    tmp_path: Path, pictures: Sequence[Uint8Array]
) -> None:
    folder, out, num = tmp_path / "photos", tmp_path / "run", 5
    folder.mkdir()
    for number, pixels in enumerate(pictures[:num]):
        bgr = np.ascontiguousarray(pixels[:, :, ::-1])
        for quality in (95, 70):  # neighbours that differ in their bytes
            path = folder / f"{number}_{quality}.jpg"
            assert cv2.imwrite(str(path), bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
        shutil.copy(folder / f"{number}_95.jpg", folder / f"copy_{number}.jpg")  # far from it
    written = assert_reconstructed(reconstruct(folder, out, *LEAN), out, num=3 * num)
    assert written.statuses == ["keyframe"] * (3 * num)
    model = model_of(out)
    centers = {image.name: image.projection_center() for image in model.images.values()}
    originals = np.array([centers[f"{number}_95.jpg"] for number in range(num)])
    extent = float(np.linalg.norm(np.ptp(originals, axis=0)))
    for name in ("{}_70.jpg", "copy_{}.jpg"):
        copies = np.array([centers[name.format(number)] for number in range(num)])
        assert np.linalg.norm(copies - originals, axis=1).max() < 0.01 * extent


def turned(pixels: Uint8Array, *, num: int) -> list[Uint8Array]:
    """What a camera sees of a picture when it only turns."""
    height, width = pixels.shape[:2]
    focal_px = 0.5 * width  # of the middle half: as of most phones
    calibration = np.array([[focal_px, 0, width / 2], [0, focal_px, height / 2], [0, 0, 1]])
    views = []
    for pan in np.linspace(-0.15, 0.15, num):
        tilt = 0.1 * np.sin(9.0 * pan)
        rotation, _ = cv2.Rodrigues(np.array([tilt, pan, 0.2 * pan]))
        homography = calibration @ rotation @ np.linalg.inv(calibration)
        view = np.asarray(cv2.warpPerspective(pixels, homography, (width, height)), np.uint8)
        views.append(
            np.ascontiguousarray(view[height // 4 : -height // 4, width // 4 : -width // 4])
        )
    return views


@pytest.mark.slow
def test_a_camera_that_only_turns_makes_no_map(tmp_path: Path, town: SyntheticTown) -> None:
    out = tmp_path / "run"
    wide = cv2.resize(town.render(0).pixels, (1200, 900), interpolation=cv2.INTER_CUBIC)
    folder = save_all(tmp_path / "photos", turned(np.asarray(wide, np.uint8), num=8))
    written = assert_nothing_made(reconstruct(folder, out), out)
    assert written.statuses == ["keyframe"] * 8
    assert len(written.of_kind("PairVerified")) > 8, "they do match"


def test_photos_without_texture_make_no_map(tmp_path: Path) -> None:
    out = tmp_path / "run"
    walls = [np.full((300, 400, 3), 100 + shade, np.uint8) for shade in range(5)]
    written = assert_nothing_made(reconstruct(save_all(tmp_path / "photos", walls), out), out)
    assert written.statuses == ["keyframe"] * 5
    assert {record["num_keypoints"] for record in written.of_kind("KeyframeAdded")} == {0}


@pytest.mark.slow
def test_other_cameras_in_the_folder_have_calibrations_of_their_own(
    tmp_path: Path, photos: Path, town: SyntheticTown
) -> None:
    out = tmp_path / "run"
    for number in range(3):
        larger = cv2.resize(
            town.render(2 * number + 1).pixels, (600, 450), interpolation=cv2.INTER_CUBIC
        )
        # A window of another shape has its principal point elsewhere, so its centre is kept.
        save(photos / f"other{number}.png", np.asarray(larger, np.uint8)[45:-45])
    written = assert_reconstructed(reconstruct(photos, out, *LEAN), out, num=NUM_PHOTOS + 3)
    model = model_of(out)
    sizes = {(camera.width, camera.height) for camera in model.cameras.values()}
    assert sizes == {(320, 240), (600, 360)}
    assert written.summary["mean_reprojection_error_px"] < 1.0


@pytest.mark.slow
def test_a_truncated_photo_is_dropped_and_the_others_are_reconstructed(
    photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    data = (photos / "004.jpg").read_bytes()
    (photos / "004.jpg").write_bytes(data[: len(data) // 2])
    written = assert_reconstructed(reconstruct(photos, out, *LEAN), out, num=NUM_PHOTOS - 1)
    assert written.statuses[4] == "dropped:unreadable"
    (dropped,) = written.of_kind("FrameDropped")
    assert (dropped["name"], dropped["detail"]) == (
        "004.jpg",
        "truncated: the JPEG has no end marker",
    )


@pytest.mark.slow
def test_files_that_are_no_photos_are_dropped_each_for_its_reason(
    photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    (photos / "005a.jpg").write_text("these are only words")
    (photos / "005b.jpg").write_bytes(b"")
    save(photos / "005c.jpg", np.zeros((1, 1, 3), np.uint8))
    written = assert_reconstructed(reconstruct(photos, out, *LEAN), out)
    assert written.summary["frames_dropped"] == {"too_small": 1, "unreadable": 2}
    assert written.statuses[6:9] == ["dropped:unreadable"] * 2 + ["dropped:too_small"]


@pytest.mark.slow
def test_names_in_any_language_and_with_spaces_are_kept(
    tmp_path: Path, pictures: Sequence[Uint8Array]
) -> None:
    folder, out = tmp_path / "Fjäll räven 山", tmp_path / "läuft schon 走"
    for number, pixels in enumerate(pictures):
        save(folder / f"Bild ñ {number}.jpg", pixels)
    assert_reconstructed(reconstruct(folder, out), out)
    names = {image.name for image in model_of(out).images.values()}
    assert names == {f"Bild ñ {number}.jpg" for number in range(NUM_PHOTOS)}


@pytest.mark.slow
def test_a_photo_of_100_megapixels_among_others_takes_a_few_gigabytes_at_most(
    photos: Path, tmp_path: Path, pictures: Sequence[Uint8Array]
) -> None:
    out = tmp_path / "run"
    size = (11600, 8700)
    huge = cv2.resize(pictures[4], size, interpolation=cv2.INTER_LINEAR)
    (photos / "004.jpg").unlink()
    save(photos / "004.jpg", np.asarray(huge, np.uint8))
    program = "from adapters.cli import main; main()"  # memory is measured by process
    done = subprocess.run(
        [
            *(sys.executable, "-c", program, "run", str(photos), "--out", str(out)),
            *("--view", "none", "--quiet"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert done.returncode in FINISHED, done.stderr
    written = assert_valid(out)
    assert written.summary["registered_keyframes"] == NUM_PHOTOS
    assert size[0] * size[1] >= 100_000_000
    assert 300 < written.summary["peak_rss_mb"] < 4096


def write_video(path: Path, pictures: Sequence[Uint8Array]) -> Path:
    """H.264 in a container whose index stands in front, a key frame every fifth frame."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "5", "crf": "12"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        for number, pixels in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.slow
def test_a_truncated_video_is_reconstructed_up_to_where_it_ends(
    tmp_path: Path, town: SyntheticTown
) -> None:
    out = tmp_path / "run"
    num_frames = 24
    video = write_video(
        tmp_path / "clip.mp4", [town.render(index).pixels for index in range(num_frames)]
    )
    data = video.read_bytes()
    video.write_bytes(data[: int(0.6 * len(data))])
    result = reconstruct(video, out, *LEAN)
    assert result.exit_code in FINISHED, result.output
    written = assert_valid(out)
    num_used = sum(status in {"keyframe", "tracked"} for status in written.statuses)
    assert 10 <= num_used < num_frames
    assert written.summary["frames_dropped"]["unreadable"] >= 1
    assert written.statuses[-1] == "dropped:unreadable"
    assert "file ends" in written.of_kind("FrameDropped")[-1]["detail"]


def test_a_video_cut_to_nothing_is_refused_and_leaves_no_folder(
    tmp_path: Path, plain_pictures: Sequence[Uint8Array]
) -> None:
    video = write_video(tmp_path / "clip.mp4", plain_pictures[:2])
    video.write_bytes(video.read_bytes()[:40])
    refused = reconstruct(video, tmp_path / "run")
    assert refused.exit_code == cli.REFUSED
    assert "holds no video that can be decoded" in refused.output
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_a_folder_that_exists_is_refused_until_it_may_be_replaced(
    tmp_path: Path, plain_pictures: Sequence[Uint8Array]
) -> None:
    out = tmp_path / "run"
    photo = save(tmp_path / "photo.jpg", plain_pictures[0])
    assert reconstruct(photo, out).exit_code == cli.NOTHING_MADE
    refused = reconstruct(photo, out)
    assert refused.exit_code == cli.REFUSED
    assert refused.stderr.startswith("livesfm: ")
    assert "exists and is not empty" in refused.stderr
    assert reconstruct(photo, out, "--overwrite").exit_code == cli.NOTHING_MADE
    own_input = reconstruct(out / "images", out, "--overwrite")
    assert own_input.exit_code == cli.REFUSED
    assert "lies in the run folder that would be replaced" in own_input.stderr
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    foreign = reconstruct(photo, tmp_path / "thesis", "--overwrite")
    assert foreign.exit_code == cli.REFUSED
    assert "is not the folder of a run" in foreign.stderr
    assert os.listdir(tmp_path / "thesis") == ["thesis.tex"]


def test_a_source_that_does_not_exist_makes_no_folder(tmp_path: Path) -> None:
    result = reconstruct(tmp_path / "none", tmp_path / "run")
    assert result.exit_code == cli.REFUSED
    assert "no such file or folder" in result.stderr
    assert os.listdir(tmp_path) == []


# -- real photos ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_fox_is_reconstructed_from_a_phone(
    real_set: Callable[[str], Path], tmp_path: Path
) -> None:
    fox, out = real_set("fox"), tmp_path / "run"
    config = ROOT / "configs" / "phone.yaml"
    result = reconstruct(fox / "images", out, "--config", config, *LEAN)
    written = assert_reconstructed(result, out, num=50)
    assert 0.0 < written.summary["mean_reprojection_error_px"] <= 0.60
    assert written.summary["mean_track_length"] >= 6.5
    result = livesfm("evaluate", out, "--reference", fox / "groundtruth.txt", "--json")
    figures: dict[str, Any] = json.loads(result.stdout)
    assert 0.0 < figures["final"]["absolute"]["rmse_percent_of_extent"] <= 0.13


@pytest.mark.slow
def test_the_castle_of_sceaux_is_reconstructed(
    real_set: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    written = assert_reconstructed(reconstruct(real_set("sceaux") / "images", out), out, num=11)
    assert written.summary["mean_reprojection_error_px"] < 1.0
    shutil.rmtree(out)
