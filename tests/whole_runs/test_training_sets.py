"""Training sets from the command line: while a run goes on, and of frames between keyframes."""

from __future__ import annotations

import csv
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pycolmap
import pytest
from typer.testing import CliRunner

from adapters import cli
from engine.output.training_folder import TrainingFigures, TrainingFolder
from engine.types import Float64Array
from tests.support.trainer_readers import READERS, TrainerScene, read_as_gaussian_splatting

TOWN = "synthetic:town?width=320&height=240&frames=40"
PART = ["--set", "sources.max_frames=24"]
LEAN = ["--view", "none", "--quiet"]
LEAN += ["--set", "dense.enabled=false", "--set", "report.enabled=false"]
DENSE_TOWN = "synthetic:town?width=320&height=240&frames=60"  # half of its frames are no keyframes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("towns_painted_once")]


def livesfm(*arguments: str | Path) -> None:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code in (0, cli.DOUBTED), result.output


def assert_whole(folder: Path) -> TrainerScene:
    """All trainers read the same cameras, and each of their images."""
    scenes = [read(folder) for read in READERS]
    for scene in scenes[1:]:
        assert scene.cameras.keys() == scenes[0].cameras.keys()
        for name, camera in scene.cameras.items():
            first = scenes[0].cameras[name]
            np.testing.assert_allclose(camera.intrinsics, first.intrinsics)
            np.testing.assert_allclose(camera.cam_from_world, first.cam_from_world, atol=1e-9)
    for camera in scenes[0].cameras.values():
        picture = cv2.imread(str(camera.image))
        assert picture is not None and picture.shape[1::-1] == camera.size
    return scenes[0]


def test_a_trainer_that_reads_while_a_run_goes_on_never_sees_half_a_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, is_over, has_read = tmp_path / "run", threading.Event(), threading.Condition()
    seen: list[int] = []
    update, num_updates = TrainingFolder.update, 0

    def read() -> None:
        """Reads again and again, whatever the run does meanwhile."""
        try:
            while not is_over.is_set():
                if (run / "train").exists():
                    seen.append(len(assert_whole((run / "train").resolve()).cameras))
                else:
                    is_over.wait(0.01)
                with has_read:
                    has_read.notify_all()
        finally:
            is_over.set()

    def update_and_be_read(
        folder: TrainingFolder, snapshot: Path, *, between: Callable[[], None]
    ) -> TrainingFigures | None:
        nonlocal num_updates
        figures, num_seen = update(folder, snapshot, between=between), len(seen)
        num_updates += figures is not None
        with has_read:
            while figures is not None and len(seen) == num_seen and not is_over.is_set():
                has_read.wait(1.0)
                between()  # the update has not hung
        return figures

    monkeypatch.setattr(TrainingFolder, "update", update_and_be_read)
    settings = ["train=true", "every_keyframes=3", "growth_ratio=0", "min_registered=2"]
    sets = [word for one in settings for word in ("--set", f"snapshots.{one}")]
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        try:
            livesfm("run", TOWN, "--out", run, *LEAN, *PART, *sets)
        finally:
            is_over.set()
        reading.result()
    assert len(seen) >= num_updates >= 1
    seen.append(len(assert_whole(run / "train").cameras))
    assert seen == sorted(seen) and seen[-1] >= 10


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("town") / "run"
    livesfm("run", DENSE_TOWN, "--out", run, *LEAN)
    return run


def truth_of(run: Path) -> dict[str, Float64Array]:
    """True camera centres (3,) by frame."""
    with (run / "frames.csv").open() as file:
        names = {row["captured_at_s"]: row["name"] for row in csv.DictReader(file)}
    centers = {}
    for line in (run / "groundtruth.txt").read_text().splitlines():
        if not line.startswith("#"):
            time_s, *rest = line.split()
            centers[names[time_s]] = np.array([float(value) for value in rest[:3]])
    return centers


def test_all_frames_of_a_town_lie_on_the_true_path_as_well_as_its_keyframes(
    town: Path, tmp_path: Path
) -> None:
    livesfm(
        *("export", town, "--to", tmp_path / "out"),
        *("--undistort", "--nerfstudio", "--frames", "all"),
    )
    assert_whole(tmp_path / "out")
    model = pycolmap.Reconstruction(tmp_path / "out" / "sparse" / "0")
    with (tmp_path / "out" / "image_names.csv").open() as file:
        rows = list(csv.DictReader(file))
    truth = truth_of(town)
    assert len(rows) >= 0.9 * len(truth)
    kinds = np.array([row["kind"] for row in rows])
    assert (kinds != "keyframe").sum() >= 20
    found = np.array([_center(model, row["image"]) for row in rows])
    true = np.array([truth[row["frame"]] for row in rows])
    aligned = pycolmap.estimate_sim3d(found[kinds == "keyframe"], true[kinds == "keyframe"])
    placed = np.array([aligned * one for one in found])
    errors = np.linalg.norm(placed - true, axis=1)
    extent = np.linalg.norm(np.ptp(true, axis=0))
    of_keyframes = np.sqrt((errors[kinds == "keyframe"] ** 2).mean())
    of_others = np.sqrt((errors[kinds != "keyframe"] ** 2).mean())
    assert of_others < max(2.0 * of_keyframes, 2e-3 * extent)


def _center(model: pycolmap.Reconstruction, name: str) -> Float64Array:
    image = model.find_image_with_name(name)
    assert image is not None
    return np.asarray(image.projection_center())


def test_frames_of_a_run_come_from_its_recording_alike(tmp_path: Path) -> None:
    recorded = tmp_path / "recorded"
    livesfm("run", TOWN, "--out", tmp_path / "run", "--record-input", recorded, *LEAN, *PART)
    sources: dict[str, list[str | Path]] = {"again": [], "recorded": ["--source", recorded]}
    for to, more in sources.items():
        livesfm(
            *("export", tmp_path / "run", "--to", tmp_path / f"{to}-out"),
            *("--undistort", "--frames", "sharpest:12", *more),
        )
    first, second = (read_as_gaussian_splatting(tmp_path / f"{to}-out") for to in sources)
    assert len(first.cameras) == 12 and first.cameras.keys() == second.cameras.keys()
    for name, camera in first.cameras.items():
        other = second.cameras[name]
        np.testing.assert_allclose(camera.cam_from_world, other.cam_from_world, atol=1e-9)
        assert camera.image.read_bytes() == other.image.read_bytes()


@pytest.mark.parametrize("name", ["fox"])
def test_the_sharpest_of_real_photos_are_no_worse_than_all(
    name: str, real_set: Callable[[str], Path], tmp_path: Path
) -> None:
    photos = sorted((real_set(name) / "images").iterdir())[:14]
    folder = tmp_path / "photos"
    folder.mkdir()
    for photo in photos:
        (folder / photo.name).symlink_to(photo)
    livesfm("run", folder, "--out", tmp_path / "run", *LEAN)
    livesfm(
        *("export", tmp_path / "run", "--to", tmp_path / "out"),
        *("--undistort", "--nerfstudio", "--frames", "sharpest:7"),
    )
    assert len(assert_whole(tmp_path / "out").cameras) == 7
    with (tmp_path / "out" / "image_names.csv").open() as file:
        rows = list(csv.DictReader(file))
    errors = [float(row["reprojection_error_px"]) for row in rows]
    model = pycolmap.Reconstruction(tmp_path / "run" / "latest" / "sparse" / "0")
    assert np.mean(errors) < 1.5 * model.compute_mean_reprojection_error()
