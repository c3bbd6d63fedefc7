"""The trust bench: inputs are what their truth says, and scores say how far a map is from it."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pycolmap
import pytest
import yaml

from adapters.images.exif import intrinsics_prior, read_exif
from engine.geometry import quat_xyzw_from_rotation
from engine.types import Float64Array, Uint8Array
from tests.support.paths import TOOLS

MODULES = (
    "bench",
    "grounds",
    "inputs",
    "map_rows",
    "overlays",
    "rooms",
    "rows",
    "running",
    "scoring",
    "sets",
    "table",
    "variation",
    "zooms",
)
NUM_IMAGES = 10
TRUE_FOCAL_PX = 1280.0  # of pycolmap's synthetic cameras


@pytest.fixture(scope="module")
def trust() -> Iterator[Any]:
    """The tool as ``trust.tool`` and the modules of its package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        modules = {name: importlib.import_module(f"trust.{name}") for name in MODULES}
        yield SimpleNamespace(tool=importlib.import_module("trust_bench"), **modules)


@pytest.fixture(scope="module")
def photo() -> Uint8Array:
    rng = np.random.default_rng(5)
    noise = rng.integers(0, 256, (12, 16, 3)).astype(np.uint8)
    return np.asarray(cv2.resize(noise, (160, 120), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)


# Lenses of the room and their calibration files


@pytest.mark.parametrize(
    "lens",
    [
        lambda rooms: rooms.pinhole_lens(84.0),
        lambda rooms: rooms.fisheye_lens(110.0),
        lambda rooms: rooms.fisheye_lens(165.0, (0.03, -0.002, 0.001, 0.0)),
        lambda rooms: rooms.panorama_lens(),
    ],
)
def test_rays_of_a_lens_project_to_their_pixels_in_the_model_of_colmap(
    trust: Any, lens: Any
) -> None:
    lens = lens(trust.rooms)
    camera = pycolmap.Camera(
        model=lens.model, width=lens.width, height=lens.height, params=lens.params
    )
    rays = lens.rays()[::16, ::16].reshape(-1, 3)
    x, y = np.meshgrid(np.arange(0, lens.width, 16) + 0.5, np.arange(0, lens.height, 16) + 0.5)
    is_in_front = rays[:, 2] > 0 if lens.focal_px else np.ones(len(rays), dtype=bool)
    projected = np.asarray(camera.img_from_cam(rays))[is_in_front]
    pixels = np.column_stack([x.ravel(), y.ravel()])[is_in_front]
    assert len(pixels) > 0.5 * len(rays)
    np.testing.assert_allclose(projected, pixels, atol=1e-6)


@pytest.mark.parametrize("field_deg", [110.0, 150.0, 165.0])
def test_a_fisheye_spans_its_field_of_view_and_sees_behind_its_plane(
    trust: Any, field_deg: float
) -> None:
    rays = trust.rooms.fisheye_lens(field_deg, (0.02, 0.0, 0.0, 0.0)).rays()
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    middle = rays[rays.shape[0] // 2]
    spanned = np.degrees(np.arccos(middle[0] @ middle[-1]))
    assert spanned == pytest.approx(field_deg, abs=0.4)  # between the centres of the last pixels
    assert (rays[0, 0, 2] < 0) == (field_deg > 140)


def test_calibration_files_hold_the_lens_in_the_conventions_of_their_tools(
    trust: Any, tmp_path: Path
) -> None:
    lens = trust.rooms.fisheye_lens(120.0, (0.01, -0.02, 0.003, 0.0))
    words = trust.rooms.write_colmap_line(lens, tmp_path).read_text().splitlines()[-1].split()
    assert words[1:4] == ["OPENCV_FISHEYE", "960", "720"]
    assert [float(word) for word in words[4:]] == pytest.approx(lens.params, rel=1e-8)
    opencv = cv2.FileStorage(
        str(trust.rooms.write_opencv_yaml(lens, tmp_path)), cv2.FILE_STORAGE_READ
    )
    matrix = np.asarray(opencv.getNode("camera_matrix").mat())
    expected = [[lens.focal_px, 0, 479.5], [0, lens.focal_px, 359.5], [0, 0, 1]]
    np.testing.assert_allclose(matrix, expected, rtol=1e-8)
    distortion = np.asarray(opencv.getNode("distortion_coefficients").mat())
    assert distortion.ravel().tolist() == pytest.approx(lens.distortion)
    kalibr = yaml.safe_load(trust.rooms.write_kalibr_yaml(lens, tmp_path).read_text())["cam0"]
    assert kalibr["intrinsics"] == pytest.approx([lens.focal_px, lens.focal_px, 479.5, 359.5])
    assert kalibr["distortion_coeffs"] == pytest.approx(list(lens.distortion))
    assert kalibr["distortion_model"] == "equidistant"


# Overlays


def test_an_overlay_stays_at_its_place_and_only_its_clock_changes(
    trust: Any, photo: Uint8Array
) -> None:
    size = (640, 480)
    for seed in range(4):
        overlay = trust.overlays.draw_overlay(size, seed=seed)
        backgrounds = [np.full((480, 640, 3), level, np.uint8) for level in (0, 90)]
        first, second = (
            trust.overlays.burned_in(pixels, overlay, time_s=time_s)
            for pixels, time_s in zip(backgrounds, (0.0, 71.3), strict=True)
        )
        is_drawn = [
            (image != pixels).any(axis=2)
            for image, pixels in zip((first, second), backgrounds, strict=True)
        ]
        assert 500 < is_drawn[0].sum() < 0.1 * is_drawn[0].size
        x, y = overlay.clock.left_bottom_xy
        is_clock = np.zeros_like(is_drawn[0])
        is_clock[y - 25 : y + 10, max(x - 5, 0) : x + 300] = True
        changed = is_drawn[0] ^ is_drawn[1]
        assert (changed & is_clock).sum() > 20
        assert (changed & ~is_clock).sum() < 0.02 * is_drawn[0].sum()


def test_overlays_of_other_seeds_are_elsewhere(trust: Any) -> None:
    overlays = [trust.overlays.draw_overlay((640, 480), seed=seed) for seed in range(5)]
    assert len({overlay.logo_center_xy for overlay in overlays}) > 3
    assert len({overlay.lines[0].left_bottom_xy for overlay in overlays}) > 1
    assert overlays[0] == trust.overlays.draw_overlay((640, 480), seed=0)


# Zooms, crops and EXIF


def blob(center_xy: tuple[float, float]) -> Uint8Array:
    """A soft white spot, (120, 160, 3); pixel centres are at halves."""
    x, y = np.meshgrid(np.arange(160) + 0.5, np.arange(120) + 0.5)
    spot = np.exp(-((x - center_xy[0]) ** 2 + (y - center_xy[1]) ** 2) / (2 * 4.0**2))
    return np.repeat((255 * spot).round().astype(np.uint8)[..., None], 3, axis=2)


def spot_xy(image: Uint8Array) -> Float64Array:
    x, y = np.meshgrid(np.arange(image.shape[1]) + 0.5, np.arange(image.shape[0]) + 0.5)
    weights = image[..., 0].astype(np.float64)
    return np.array([np.average(x, weights=weights), np.average(y, weights=weights)])


@pytest.mark.parametrize("ratio", [1.3, 1.5, 2.0])
def test_a_zoomed_image_has_the_focal_length_times_the_ratio(trust: Any, ratio: float) -> None:
    center = np.array([80.0, 60.0])
    moved = spot_xy(trust.zooms.zoomed(blob((92.0, 49.0)), ratio)) - center
    np.testing.assert_allclose(moved, ratio * np.array([12.0, -11.0]), atol=0.05)


def test_crops_keep_the_other_side(trust: Any, photo: Uint8Array) -> None:
    assert (trust.zooms.cropped(photo, "right", 0.2) == photo[:, :128]).all()
    assert (trust.zooms.cropped(photo, "left", 0.25) == photo[:, 40:]).all()
    assert (trust.zooms.cropped(photo, "top", 0.1) == photo[12:]).all()
    assert (trust.zooms.cropped(photo, "bottom", 0.1) == photo[:108]).all()


def test_exif_of_a_survey_is_a_little_wrong_and_read_by_the_engine(trust: Any) -> None:
    prior = intrinsics_prior(read_exif(trust.grounds._exif(720.0).block()), width=960, height=720)
    assert prior is not None
    assert prior.focal_px is not None
    assert 1.0 < 100 * (prior.focal_px / 720.0 - 1) < 3.0


def test_masks_cover_half_of_the_image(trust: Any) -> None:
    for side in trust.variation.SIDES:
        assert (trust.sets.half_mask((160, 120), side) == 0).mean() == 0.5
    assert (trust.sets.half_mask((160, 120), "left")[:, :80] == 0).all()


def test_painting_over_changes_the_box_alone(trust: Any, photo: Uint8Array) -> None:
    painted = trust.sets.painted_over(photo, (40.0, 30.0, 70.0, 50.0))
    changed = (painted != photo).any(axis=2)
    assert changed[30:51, 40:71].mean() > 0.9
    changed[30:51, 40:71] = False
    assert not changed.any()


# Flat ground


def test_a_point_on_the_ground_is_seen_where_its_projection_is(trust: Any) -> None:
    grounds = trust.grounds
    photo = next(iter(grounds.survey(focal_px=720.0, jitter_deg=1.0, seed=3)))
    texture = np.zeros((1400, 1400, 3), np.uint8)
    cv2.circle(texture, (700, 500), 12, (255, 255, 255), -1, cv2.LINE_AA)
    seen = spot_xy(grounds.ground_seen(texture, photo, focal_px=720.0))
    low = np.array([-edge * grounds.PIXEL_M / 2 - grounds.MARGIN_M for edge in grounds.SIZE])
    point = np.append(low + (np.array([700.0, 500.0]) + 0.5) * grounds.TEXEL_M, 0.0)
    in_cam = photo.world_from_cam.T @ (point - photo.center)
    expected = 720.0 * in_cam[:2] / in_cam[2] + np.array(grounds.SIZE) / 2
    np.testing.assert_allclose(seen, expected, atol=0.1)


def test_a_survey_looks_down_from_one_height_in_turning_lines(trust: Any) -> None:
    photos = list(trust.grounds.survey(focal_px=720.0, jitter_deg=1.0, seed=0))
    assert 40 <= len(photos) <= 60
    tilts_deg = [np.degrees(np.arccos(-each.world_from_cam[2, 2])) for each in photos]
    assert 0.5 < np.mean(tilts_deg) < 2.0
    assert {float(each.center[2]) for each in photos} == {36.0}
    rotations = [each.world_from_cam for each in photos]
    assert all(np.linalg.det(rotation) == pytest.approx(1.0) for rotation in rotations)
    ups = [float(-rotation[1, 1]) for rotation in rotations]  # of the image's top, along the lines
    assert {round(up) for up in ups[:8]} == {1}
    assert {round(up) for up in ups[8:16]} == {-1}


# Scores


def write_run(
    folder: Path, *, noise_ratio: float = 0.0, num_registered: int = NUM_IMAGES
) -> pycolmap.Reconstruction:
    """A run whose map has centres off by a share of the extent, and truth.txt beside it."""
    pycolmap.set_random_seed(0)
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs, options.num_cameras_per_rig = 1, 1
    options.num_frames_per_rig, options.num_points3D = NUM_IMAGES, 50
    true_map = pycolmap.synthesize_dataset(options)
    images = sorted(true_map.images.values(), key=lambda image: image.name)
    centers = np.array([image.projection_center() for image in images])
    with (folder / "truth.txt").open("w") as file:
        for index, image in enumerate(images):
            rotation = image.cam_from_world().rotation.matrix().T
            values = (*centers[index], *quat_xyzw_from_rotation(rotation))
            file.write(f"{index} {' '.join(map(str, values))}\n")
    run = folder / "run"
    run.mkdir()
    with (run / "frames.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("frame_id", "source", "index", "name", "captured_at_s", "status"))
        for index, image in enumerate(images):
            writer.writerow((index + 1, "images", index, image.name, index, "keyframe"))
    (run / "events.jsonl").write_text("")
    move(true_map, images, sigma=noise_ratio * float(np.linalg.norm(np.ptp(centers, axis=0))))
    for image in images[num_registered:]:
        true_map.deregister_frame(image.frame_id)
    true_map.transform(pycolmap.Sim3d(0.3, pycolmap.Rotation3d(), np.array([5.0, -2.0, 1.0])))
    (run / "latest" / "sparse" / "0").mkdir(parents=True)
    true_map.write(run / "latest" / "sparse" / "0")
    return true_map


def move(reconstruction: pycolmap.Reconstruction, images: list[Any], *, sigma: float) -> None:
    rng = np.random.default_rng(1)
    for image in images:
        pose = image.cam_from_world()
        rotation = pose.rotation.matrix()
        offset = rotation @ rng.normal(scale=sigma / np.sqrt(3), size=3)
        reconstruction.frame(image.frame_id).set_cam_from_world(
            image.camera_id, pycolmap.Rigid3d(pose.rotation, pose.translation - offset)
        )


def score(trust: Any, folder: Path, **known: Any) -> Any:
    source = trust.inputs.Input(source="images", truth="truth.txt", **known)
    return trust.scoring.score_run(source, folder, folder / "run")


def test_a_map_that_is_the_truth_but_for_a_similarity_has_no_error(
    trust: Any, tmp_path: Path
) -> None:
    write_run(tmp_path)
    found = score(trust, tmp_path, focal_px=TRUE_FOCAL_PX)
    assert found.ate_percent < 1e-6
    assert found.focal_error_percent < 1e-6
    assert (found.num_registered, found.num_keyframes, found.num_maps) == (NUM_IMAGES,) * 2 + (1,)
    assert found.is_enough


def test_noise_on_the_centres_is_the_error_in_percent_of_the_extent(
    trust: Any, tmp_path: Path
) -> None:
    write_run(tmp_path, noise_ratio=0.01)
    assert 0.4 < score(trust, tmp_path).ate_percent < 1.3


def test_a_map_of_few_keyframes_is_not_enough_however_good(trust: Any, tmp_path: Path) -> None:
    write_run(tmp_path, num_registered=5)
    found = score(trust, tmp_path)
    assert found.ate_percent < 1e-6
    assert not found.is_enough
    outcome = SimpleNamespace(score=found, case=SimpleNamespace(name="a"))
    assert not trust.bench.percent_check(outcome, found.ate_percent, bar=1.0).is_ok


def test_a_run_without_a_map_has_no_score(trust: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert score(trust, tmp_path) is None


def test_observations_in_a_box_and_under_masks_are_counted(trust: Any, tmp_path: Path) -> None:
    true_map = write_run(tmp_path)
    seen = [
        (image.name, point.xy)
        for image in true_map.images.values()
        for point in image.points2D
        if point.has_point3D()
    ]
    left = sum(xy[0] < 512 for _, xy in seen)
    assert 0 < left < len(seen)
    mask = np.full((768, 1024), 255, np.uint8)
    mask[:, :512] = 0
    for name in {name for name, _ in seen}:
        path = tmp_path / "masks" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), mask)
    found = score(trust, tmp_path, masks="masks", overlay_box_px=(0.0, 0.0, 511.999, 768.0))
    assert found.num_masked_observations == left
    assert found.num_overlay_observations == left
    assert found.num_overlay_points == 0  # all of them move


def test_points_that_stay_in_a_box_are_of_the_overlay(trust: Any, tmp_path: Path) -> None:
    true_map = write_run(tmp_path)
    box_px = (500.0, 300.0, 520.0, 320.0)
    count = trust.scoring.count_points_of_overlay
    num_before = count(true_map, box_px)
    for number, point in enumerate(list(true_map.points3D.values())[:7]):
        for element in point.track.elements:
            stays = np.array([502.0 + 2 * number, 310.0 + 0.3 * (element.image_id % 2)])
            true_map.image(element.image_id).points2D[element.point2D_idx].xy = stays
    assert num_before == 0
    assert count(true_map, box_px) == 7


def test_cameras_are_held_where_the_summary_says_so_of_all(trust: Any, tmp_path: Path) -> None:
    assert not trust.scoring.held_cameras(tmp_path)
    free, held, constant = (
        {"is_held": is_held, "is_constant": is_constant}
        for is_held, is_constant in ((False, False), (True, False), (False, True))
    )
    for cameras, expected in (([], False), ([held, free], False), ([held, constant], True)):
        (tmp_path / "summary.json").write_text(json.dumps({"cameras": cameras}))
        assert trust.scoring.held_cameras(tmp_path) == expected


def test_the_difference_of_two_runs_is_that_of_their_shared_centres(
    trust: Any, tmp_path: Path
) -> None:
    for name, noise in (("one", 0.0), ("other", 0.01)):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, noise_ratio=noise)
    one, other = tmp_path / "one" / "run", tmp_path / "other" / "run"
    assert trust.scoring.difference_percent(one, one) == pytest.approx((0.0, NUM_IMAGES), abs=1e-6)
    percent, shared = trust.scoring.difference_percent(other, one)
    assert 0.4 < percent < 1.3
    assert shared == NUM_IMAGES
    assert trust.scoring.difference_percent(one, tmp_path) is None


def test_keyframes_are_timely_from_when_the_map_has_them_for_good(trust: Any) -> None:
    def added(frame_id: int) -> dict[str, Any]:
        return {"event": "KeyframeAdded", "frame_id": frame_id}

    def posed(frame_id: int) -> dict[str, Any]:
        return {"event": "FramePosed", "frame_id": frame_id, "is_keyframe": True}

    def registered(frame_id: int) -> dict[str, Any]:
        return {"event": "FrameRegistered", "frame_id": frame_id}

    share = trust.scoring.timely_percent_of
    start = [*map(added, range(4)), *map(posed, range(4))]
    assert share(start) == 100.0
    assert share([added(9), *start]) == 80.0  # one that no map has
    late = [*start, *map(added, range(4, 10)), registered(4), registered(9)]
    assert share(late) == pytest.approx(60.0)
    lost = [*start, *map(added, range(4, 10)), *map(registered, range(4))]
    assert share(lost) == 0.0


# Runs and the table


def test_a_reference_run_is_kept_and_other_runs_are_made_again(trust: Any, tmp_path: Path) -> None:
    program = tmp_path / "livesfm"
    program.write_text(
        '#!/bin/sh\necho run >> "$0.calls"\nmkdir -p "$4" && touch "$4/summary.json"\n'
    )
    program.chmod(0o755)

    def bench() -> Any:
        kit = trust.inputs.Kit(data=tmp_path, cases=tmp_path, variation=trust.variation.Variation())
        return trust.bench.Bench(
            kit=kit,
            inputs=tmp_path / "inputs",
            runs=tmp_path / "runs" / "this",
            livesfm=str(program),
            baseline=str(program),
        )

    def make(kit: Any, folder: Path) -> Any:
        return trust.inputs.Input(source="images")

    cases = [trust.bench.Case(name="a", make=make, is_reference=each) for each in (True, False)]
    for _ in range(2):
        for case in cases:
            outcome = bench().outcome(case)
            assert outcome.finished.exit_code == 0
            assert outcome.score is None
    assert (tmp_path / "livesfm.calls").read_text().splitlines() == ["run"] * 3
    assert (tmp_path / "runs" / "baseline" / "a").is_dir()


def test_runs_of_one_name_are_of_one_input_with_one_command(trust: Any) -> None:
    rows = trust.rows.all_rows(num_seeds=5)
    assert {"lady", "osd-town", "zoom-exif", "room-panorama", "temple", "masks"} < rows.keys()
    runs = [
        (case.name, case.input_folder, case.arguments, case.settings)
        for row in rows.values()
        for case in row.cases
    ]
    assert len({name for name, *_ in runs}) == len(set(runs))
    assert sum(name.startswith("osd-fox") for name, *_ in runs) == 10


def test_a_setting_that_a_version_does_not_know_is_left_out(trust: Any, tmp_path: Path) -> None:
    program = tmp_path / "livesfm"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *loops.correct*) echo "unknown section: loops"; exit 2;; esac\n'
    )
    program.chmod(0o755)
    kit = trust.inputs.Kit(data=tmp_path, cases=tmp_path, variation=trust.variation.Variation())
    bench = trust.bench.Bench(
        kit=kit, inputs=tmp_path / "inputs", runs=tmp_path / "runs" / "a", livesfm=str(program)
    )
    settings = ("loops.correct=false",)

    def make(kit: Any, folder: Path) -> Any:
        return trust.inputs.Input(source="images")

    outcome = bench.outcome(trust.bench.Case(name="a", make=make, settings=settings))
    assert outcome.finished.exit_code == 0
    assert outcome.unknown_settings == settings


def test_variations_differ_from_the_table_and_from_each_other(trust: Any) -> None:
    variation = trust.variation.Variation
    drawn = [variation.drawn(seed) for seed in range(4)]
    assert len(set(drawn)) == 4
    assert drawn[0] == variation.drawn(0)
    for each in drawn:
        assert each.photo_zoom != variation().photo_zoom
        assert each.fisheye_deg != variation().fisheye_deg


def check_of(trust: Any, *, is_ok: bool, case: str = "") -> Any:
    return trust.bench.Check(label="ATE %", figure="0.1", bar="<= 1", is_ok=is_ok, case=case)


def test_kept_rows_come_back_and_make_the_same_table(trust: Any, tmp_path: Path) -> None:
    table = trust.table
    run = table.RunRecord(
        name="a",
        command="livesfm run a",
        exit_code=0,
        cpu_s=3.0,
        last_line="",
        registered=9,
        keyframes=10,
        maps=1,
        points=100,
        ate_percent=0.1,
        cameras=("9 x PINHOLE f 500.0",),
    )
    good = table.RowRecord(name="a", checks=(check_of(trust, is_ok=True),), runs=(run,))
    bad = table.RowRecord(name="b", checks=(check_of(trust, is_ok=False),), runs=())
    kept = table.Kept(folder=tmp_path, order=["a", "b"])
    assert kept.read("x") == {}
    kept.write("x", {"b": bad, "a": good})
    records = kept.read("x")
    assert (tmp_path / "x.md").read_text().splitlines()[2:] == [
        table.table_of([record], with_head=False) for record in (good, bad)
    ]
    assert list(records.values()) == [good, bad]
    text = table.table_of(list(records.values()), beside={"a": bad}, beside_name="before")
    lines = text.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| a | ATE % | 0.1 | 0.1 | <= 1 | ok | 9/10 |" in lines[2]
    assert "| b | ATE % | 0.1 | - | <= 1 | NOT |" in lines[3]


def test_a_refused_option_is_not_possible_and_a_crash_is_not(trust: Any) -> None:
    finished = trust.running.Finished
    refused = "│ No such option: --calibration │\n╰───╯\n"
    unknown = finished(exit_code=2, cpu_s=0.1, output=refused)
    assert unknown.is_not_possible
    assert unknown.last_line == "No such option: --calibration"
    assert not replace(unknown, exit_code=1).is_not_possible
    assert not replace(unknown, output="images: no such folder").is_not_possible


def test_lines_of_accept_are_read(trust: Any) -> None:
    line = "ok   fox         track length                  6.894 >= 6.5"
    assert trust.bench.accept_line(line) == (True, "track length", "6.894", ">= 6.5")
    line = "NOT  seneca      the run failed: ['no map']"
    assert trust.bench.accept_line(line) == (
        False,
        "run",
        "seneca      the run failed: ['no map']",
        "scored",
    )
    assert trust.bench.accept_line("something else") is None


def test_an_input_is_made_once_and_says_how_it_is_run(
    trust: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = trust.inputs
    made = []

    def maker(kit: Any, folder: Path) -> Any:
        made.append(folder)
        return inputs.Input(
            source="images", arguments=("--calibration", "{input}/c.txt"), truth="truth.txt"
        )

    kit = inputs.Kit(data=tmp_path, cases=tmp_path, variation=trust.variation.Variation())
    folder = tmp_path / "inputs" / "a"
    for _ in range(2):
        known = inputs.make_once(maker, kit, folder)
    assert made == [folder]
    assert known.command(folder) == [
        str(folder / "images"),
        "--calibration",
        str(folder / "c.txt"),
    ]
    write_run(folder)
    trust.tool.main(["--score", str(folder), str(folder / "run")])
    figures = json.loads(capsys.readouterr().out)
    assert figures["ate_percent"] < 1e-6
    assert figures["cameras"][0]["num_images"] == NUM_IMAGES
