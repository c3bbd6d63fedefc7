"""A finished run that is laid onto ground control points, or scaled by a scale bar."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from adapters import cli
from adapters.georeference import Control, _with_frames, georeference, survey
from adapters.launch import LaunchOptions, write_report
from adapters.run_files import read_model
from adapters.views.view_mode import ViewMode
from engine.errors import ConfigError
from engine.geo.georeference import places_on_globe, positions_in_enu
from engine.geometry import camera_center
from engine.output import georeferencing_later
from engine.output.laid_onto import command_to_lay_again
from engine.output.recovery import recover_run
from engine.output.run_lock import RunLock
from engine.output.stored_run import read_stored_run
from engine.run.engine import RunOutcome, StoppedBy
from engine.types import ControlPoint, Float64Array, GpsFix, ImageMark
from tests.support.fake_runs import (
    FakeSource,
    WorldMatcher,
    engine_of,
    frames_of,
    trajectory_lines,
)
from tests.support.synthetic import SyntheticWorld, round_path

METRES_PER_UNIT = 4.0
NUM_FRAMES = 16
NOISE_PX = 0.5
ORIGIN = GpsFix(latitude_deg=47.0, longitude_deg=8.0, altitude_m=430.0)
NAMES = ("G1", "G2", "G3", "G4", "G5", "G6", "CHK1", "CHK2")


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(round_path(NUM_FRAMES, turns=0.8))


@pytest.fixture(scope="module")
def finished(world: SyntheticWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    source = FakeSource(happenings=frames_of(world), num_frames=NUM_FRAMES)
    asyncio.run(engine_of(path, matcher=WorldMatcher(world=world), sources=[source]).run())
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


@cache
def ground(world: SyntheticWorld) -> dict[str, Float64Array]:
    """Places of the world that its cameras see, spread over it, by names."""
    rng = np.random.default_rng(3)
    found: list[Float64Array] = []
    for place in world.points[rng.permutation(len(world.points))]:
        if len(found) == len(NAMES):
            break
        is_apart = all(np.linalg.norm(place - other) > 0.1 * world.extent for other in found)
        if is_apart and len(marks(world, place)) >= 4:
            found.append(np.asarray(place))
    return dict(zip(NAMES, found, strict=False))


def marks(world: SyntheticWorld, place: Float64Array) -> dict[str, Float64Array]:
    """Where the images show a place, by their names."""
    seen = {}
    for frame_id in world.frame_ids:
        pose, camera = world.pose(frame_id), world.camera(frame_id)
        in_cam = pose[:, :3] @ place + pose[:, 3]
        xy = np.asarray(camera.as_colmap().img_from_cam(in_cam[None]))[0]
        if (
            in_cam[2] > 0.5
            and (xy > 5.0).all()
            and (xy < (camera.width - 5, camera.height - 5)).all()
        ):
            seen[f"{frame_id - 1:06d}.jpg"] = xy
    return seen


def surveyed(world: SyntheticWorld) -> dict[str, GpsFix]:
    """Where the places are on the globe."""
    places = ground(world)
    on_globe = places_on_globe(METRES_PER_UNIT * np.array(list(places.values())), origin=ORIGIN)
    return {
        name: GpsFix(latitude_deg=latitude, longitude_deg=longitude, altitude_m=height)
        for name, (latitude, longitude, height) in zip(places, on_globe.tolist(), strict=True)
    }


def write_gcp(
    path: Path,
    world: SyntheticWorld,
    *,
    wrong_m: Mapping[str, float] | None = None,
    names: Sequence[str] = NAMES,
    folder: str = "",
) -> Path:
    """ODM's file; points in ``wrong_m`` are surveyed too far up."""
    rng = np.random.default_rng(0)
    rows = ["EPSG:4326"]
    fixes = surveyed(world)
    for name, place in ground(world).items():
        fix = fixes[name]
        height_m = (fix.altitude_m or 0.0) + (wrong_m or {}).get(name, 0.0)
        for image, xy in marks(world, place).items():
            x, y = xy + rng.normal(scale=NOISE_PX, size=2)
            geo = f"{fix.longitude_deg:.10f} {fix.latitude_deg:.10f} {height_m:.4f}"
            if name in names:
                rows.append(f"{geo} {x:.3f} {y:.3f} {folder}{image.upper()} {name}")
    path.write_text("\n".join(rows))
    return path


def write_positions(path: Path, world: SyntheticWorld, *, noise_m: float = 0.0) -> str:
    """Positions of the cameras, in a CSV."""
    centers = np.array([camera_center(world.pose(i)) for i in world.frame_ids])
    noise = np.random.default_rng(1).normal(scale=max(noise_m, 1e-12), size=centers.shape)
    on_globe = places_on_globe(METRES_PER_UNIT * centers + noise, origin=ORIGIN)
    rows = [
        f"{i - 1:06d}.jpg,{latitude:.9f},{longitude:.9f},{altitude:.4f}"
        for i, (latitude, longitude, altitude) in zip(
            world.frame_ids, on_globe.tolist(), strict=True
        )
    ]
    path.write_text("\n".join(["name,latitude,longitude,altitude", *rows]))
    return str(path)


def errors_m(run: Path, world: SyntheticWorld) -> Float64Array:
    """Distances of the newest model's cameras from where they were."""
    origin = summary_of(run)["georeference"]["origin"]
    model = read_model(run / "latest" / "sparse" / "0")
    images = [model.image(i) for i in model.reg_image_ids()]
    poses = np.array([world.pose(int(image.name[:6]) + 1) for image in images])
    true_m = METRES_PER_UNIT * -np.einsum("nji,nj->ni", poses[:, :, :3], poses[:, :, 3])
    on_globe = places_on_globe(true_m, origin=ORIGIN)
    fixes = [
        GpsFix(latitude_deg=latitude, longitude_deg=longitude, altitude_m=height)
        for latitude, longitude, height in on_globe.tolist()
    ]
    centers_m = np.array([image.projection_center() for image in images])
    there_m = positions_in_enu(fixes, origin=GpsFix(**origin))
    return np.asarray(np.linalg.norm(centers_m - there_m, axis=1))


def summary_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "summary.json").read_text()))


def gcp_of(run: Path) -> dict[str, Any]:
    return {one["name"]: one for one in summary_of(run)["georeference"]["gcp"]}


@pytest.mark.slow
def test_a_run_is_laid_onto_control_points_and_check_points_show_how_well(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    before = (run / "latest").resolve()
    done = survey(run, Control(file=write_gcp(tmp_path / "gcp_list.txt", world)))
    assert done.snapshot == (run / "latest").resolve() != before
    errors = errors_m(run, world)
    assert len(errors) == NUM_FRAMES
    assert 0.0005 < errors.mean() < 0.2
    found = gcp_of(run)
    assert list(found) == list(NAMES)
    assert [one["is_check"] for one in found.values()] == [False] * 6 + [True] * 2
    assert [one["is_used"] for one in found.values()] == [True] * 6 + [False] * 2
    assert min(one["num_images"] for one in found.values()) >= 4
    residuals_px = np.array([one["residual_px"] for one in found.values()])
    assert 0.3 < residuals_px.mean() < 1.5
    off_m = np.array([one["error_m"] for one in found.values()])
    assert np.abs(off_m).max() < 0.3
    assert np.abs(off_m).max() > 0.001
    summary = summary_of(run)
    assert summary["georeferenced"]
    assert summary["not_georeferenced"] == ""
    assert (
        json.loads((run / "latest" / "snapshot.json").read_text())["georeference"]
        == (summary["georeference"])
    )
    last = json.loads((run / "events.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["num_control"], last["num_check"]) == ("ControlPointsUsed", 6, 2)
    assert len(trajectory_lines(run / "trajectory.txt")) == NUM_FRAMES
    assert done.lines[0].startswith("map laid onto 6 control points: 0.0")
    assert "a map unit was" in done.lines[0]
    assert done.lines[1].startswith("2 check points: 0.")
    assert "nothing checks the file's coordinate system" in done.lines[2]
    assert "at latitude 47.0" in done.lines[2]
    again = survey(run, Control(file=tmp_path / "gcp_list.txt"))
    assert "; scale changed by " in again.lines[0]


@pytest.mark.slow
def test_control_points_in_a_wrong_zone_are_far_from_the_positions_and_right_ones_are_not(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    georeference(run, [write_positions(tmp_path / "p.csv", world)])
    before = summary_of(run)["verdict"]
    right = write_gcp(tmp_path / "right.txt", world)
    header, *marked = right.read_text().splitlines()
    cells = [row.split() for row in marked]
    moved = [" ".join([str(float(x) + 6.0), *rest]) for x, *rest in cells]
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("\n".join([header, *moved]))
    (doubt,) = survey(run, Control(file=wrong)).doubts
    assert "UTM zone" in doubt.sentence
    survey(run, Control(bar=bar_of_marks(world)))  # is compared only, and moves nothing
    verdict = summary_of(run)["verdict"]
    assert (verdict["level"], verdict["reasons"][0]["sentence"]) == ("doubtful", doubt.sentence)
    assert "Parts of this map may be wrong" in write_report(run).read_text()
    record = summary_of(run)["georeference"]["moved_from_positions"]
    assert record["is_far"]
    assert record["horizontal_m"] > 1e5
    done = survey(run, Control(file=right))  # positions are still what it is compared with
    (line,) = [line for line in done.lines if "from where positions had them" in line]
    assert not done.doubts, line
    assert summary_of(run)["verdict"] == before
    assert not summary_of(run)["georeference"]["moved_from_positions"]["is_far"]


@pytest.mark.slow
def test_three_control_points_that_tilt_the_map_against_its_positions_make_it_doubtful(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    georeference(run, [write_positions(tmp_path / "p.csv", world, noise_m=0.3)])
    three = NAMES[:3]
    wrong = write_gcp(tmp_path / "wrong.txt", world, names=three, wrong_m={"G2": 5.0})
    command = ["georeference", str(run), "--gcp"]
    said = CliRunner().invoke(cli.app, [*command, str(wrong)])
    assert said.exit_code == cli.DOUBTED, said.output
    assert "the map is doubtful: the control points contradict the positions" in said.output
    assert "with five or more points the wrong one can be found" in said.output
    moved = summary_of(run)["georeference"]["moved_from_positions"]
    assert moved["tilt_deg"] > 4.0 * moved["tilt_std_deg"]
    reason = summary_of(run)["verdict"]["reasons"][0]
    assert f"tilt the map by {moved['tilt_deg']:.1f} degrees" in reason["sentence"]
    text = write_report(run).read_text()
    assert "contradict the positions of the cameras" in text
    assert "Check the survey and the marks of the control points" in text
    right = write_gcp(tmp_path / "right.txt", world, names=three)
    said = CliRunner().invoke(cli.app, [*command, str(right)])
    assert said.exit_code == 0, said.output
    assert "three control points leave nothing to check them by" in said.output.splitlines()[-1]
    assert "Three control points leave nothing" in write_report(run).read_text()
    verdict = summary_of(run)["verdict"]
    assert (verdict["level"], verdict["reasons"][0]["kind"]) == ("good", "control_unchecked")
    more = write_gcp(tmp_path / "more.txt", world)
    assert not survey(run, Control(file=more)).doubts
    assert "control_unchecked" not in str(summary_of(run)["verdict"])


@pytest.mark.slow
def test_a_point_with_a_wrong_survey_is_named_and_bends_nothing(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    file = write_gcp(tmp_path / "g.txt", world, wrong_m={"G4": 2.0})
    done = survey(run, Control(file=file))
    assert summary_of(run)["georeference"]["rejected"] == ["G4"]
    assert gcp_of(run)["G4"]["error_m"][2] == pytest.approx(-2.0, abs=0.3)
    assert errors_m(run, world).mean() < 0.2
    (line,) = [line for line in done.lines if "contradicts" in line]
    assert line.startswith("not used: control point G4 contradicts the others")


@pytest.mark.slow
def test_four_control_points_that_disagree_make_the_map_doubtful(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    four = NAMES[:4]
    file = write_gcp(tmp_path / "g.txt", world, names=four, wrong_m={"G4": 5.0})
    said = CliRunner().invoke(cli.app, ["georeference", str(run), "--gcp", str(file)])
    assert said.exit_code == cli.DOUBTED, said.output
    words = "the control points disagree by "
    assert said.output.count(words) == 1
    verdict = summary_of(run)["verdict"]
    assert verdict["level"] == "doubtful"
    assert verdict["reasons"][0]["sentence"].startswith(words)
    assert words[1:] in write_report(run).read_text()
    survey(run, Control(file=write_gcp(tmp_path / "right.txt", world, names=four)))
    assert summary_of(run)["verdict"]["level"] == "good"


@pytest.mark.slow
def test_what_helps_against_an_unsure_focal_length_follows_the_place_of_the_map(
    run: Path, world: SyntheticWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = summary_of(run)
    doubt = "the images leave doubt about the focal length"
    ratios = {"prior_sigma_ratio": 0.2, "observed_sigma_ratio": 0.1}
    summary["cameras"][0] |= {"doubts": [doubt], **ratios}
    sentence = f"the camera: {doubt}; to be sure, film longer"
    reason = {"kind": "camera_unsure", "level": "good", "sentence": sentence, "frame_ids": []}
    summary["verdict"] = {"level": "good", "reasons": [reason]}
    (run / "summary.json").write_text(json.dumps(summary))
    monkeypatch.setattr(georeferencing_later, "flying_height_of_model_m", lambda *_: 40.0)

    def words() -> str:
        (one,) = summary_of(run)["verdict"]["reasons"]
        return str(one["sentence"])

    survey(run, Control(bar=bar_of_marks(world)))
    assert words() == sentence  # a unit is no place
    georeference(run, [write_positions(tmp_path / "p.csv", world)])
    assert "unsure by about 4 m: ground control with heights settles them (--gcp)" in words()
    survey(run, Control(file=write_gcp(tmp_path / "g.txt", world)))
    assert "the control points settle the heights of the ground" in words()
    assert "--gcp" not in words()


@pytest.mark.slow
def test_a_mark_in_the_wrong_place_is_named(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    file = write_gcp(tmp_path / "g.txt", world)
    rows = file.read_text().splitlines()
    place = next(i for i, row in enumerate(rows) if row.endswith("G2"))
    cells = rows[place].split()
    x = float(cells[3])
    cells[3] = str(x + 60.0 if x < 100.0 else x - 60.0)
    rows[place] = " ".join(cells)
    file.write_text("\n".join(rows))
    done = survey(run, Control(file=file))
    (line,) = [line for line in done.lines if "the mark of" in line]
    assert line.startswith(f"not used: the mark of G2 in {cells[5].lower()}: it is ")
    assert gcp_of(run)["G2"]["is_used"]
    assert errors_m(run, world).mean() < 0.2


@pytest.mark.slow
def test_what_is_not_in_the_map_is_named(run: Path, world: SyntheticWorld, tmp_path: Path) -> None:
    file = write_gcp(tmp_path / "g.txt", world, names=NAMES[:4])
    with file.open("a") as rows:
        rows.write("\n8.0 47.0 1 5 5 DJI_9.JPG G9\n8.0 47.0 1 5 5 000002.jpg G9")
        rows.write("\n8.0 47.0 1 5 9999 000003.jpg G8\n8.0 47.0 1 5 5 000002.jpg G8")
    done = survey(run, Control(file=file, checks=("G1",)))
    assert "not used: G9: it is marked in fewer than two images of the map" in done.lines
    assert any("9999 is outside 000003.jpg" in line for line in done.lines)
    assert "marks in images that are not in the map: DJI_9.JPG" in done.lines
    assert set(summary_of(run)["georeference"]["gcp_left_out"]) == {"G8", "G9"}
    assert gcp_of(run)["G1"]["is_check"]


def marked(*images: str) -> ControlPoint:
    return ControlPoint(
        name="P", fix=None, marks=tuple(ImageMark(image_name=one, xy=(1.0, 1.0)) for one in images)
    )


@pytest.mark.parametrize(
    ("images", "frames", "expected"),
    [
        (("photos/DJI_1.JPG", "photos/DJI_2.JPG"), ("DJI_1.jpg", "DJI_2.jpg"), ...),
        (("C:\\job\\a\\DJI_1.JPG", "C:\\job\\b\\DJI_1.JPG"), ("a/DJI_1.jpg", "b/DJI_1.jpg"), ...),
        (("photos/DJI_1.JPG",), ("source1/DJI_1.jpg",), ...),
        (("DJI_1.JPG", "dji_2"), ("photos/DJI_1.jpg", "photos/DJI_2.jpg"), ...),
        (("a/1.jpg", "c/1.jpg"), ("a/1.jpg", "b/1.jpg"), ("a/1.jpg", "c/1.jpg")),
        (("/d/a/1.jpg", "/d/c/1.jpg"), ("a/1.jpg", "b/1.jpg"), ("a/1.jpg", "/d/c/1.jpg")),
        (("1.HEIC", "1.JPG"), ("1.HEIC.jpg", "1.JPG"), ...),
        (("x/1.heic", "x/2.jpg"), ("1.jpg", "3.jpg"), ("1.jpg", "x/2.jpg")),
    ],
)
def test_names_of_images_with_other_folders_are_matched_by_their_last_parts(
    images: tuple[str, ...], frames: tuple[str, ...], expected: Any
) -> None:
    (point,) = _with_frames([marked(*images)], frames)
    assert tuple(mark.image_name for mark in point.marks) == (
        frames if expected is ... else expected
    )


@pytest.mark.parametrize(
    ("images", "frames", "why"),
    [
        (("x/1.jpg",), ("a/1.jpg", "b/1.jpg"), "several images of the run, a/1.jpg and b/1.jpg"),
        (("1.jpg",), ("a/1.jpg", "b/1.jpg"), "several images of the run, a/1.jpg and b/1.jpg"),
        (("x/1.jpg", "y/1.jpg"), ("1.jpg", "2.jpg"), "x/1.jpg and y/1.jpg may both be 1.jpg"),
        (("x/8.jpg", "x/9.jpg"), ("1.jpg",), "^none of the 2 images that are marked is one of"),
    ],
)
def test_names_of_images_that_are_unclear_or_all_unknown_are_refused(
    images: tuple[str, ...], frames: tuple[str, ...], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        _with_frames([marked(*images)], frames)


@pytest.mark.slow
def test_images_of_no_point_in_the_map_are_the_first_words_of_the_error(
    run: Path, tmp_path: Path
) -> None:
    rows = [f"8.0 47.0 1 5 5 DJI_{i}.JPG G{i}" for i in range(9)]
    (tmp_path / "g.txt").write_text("\n".join(["EPSG:4326", *rows, "8.0 47.0 1 5 5 000002.jpg G1"]))
    with pytest.raises(ConfigError, match=r"^marks in images that are not in the map: DJI_0\.JPG"):
        survey(run, Control(file=tmp_path / "g.txt"))


@pytest.mark.slow
def test_points_that_do_not_fit_change_nothing_and_say_why(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    before = (run / "latest").resolve()
    file = write_gcp(tmp_path / "g.txt", world, names=NAMES[:2])
    with pytest.raises(ConfigError, match="2 control points with a height"):
        survey(run, Control(file=file))
    with pytest.raises(ConfigError, match="cannot be read"):
        survey(run, Control(file=tmp_path / "none.txt"))
    (tmp_path / "nan.txt").write_text("EPSG:4326\nNaN NaN NaN 5 5 000001.jpg P1\n")
    with pytest.raises(ConfigError, match="no point of the file is surveyed"):
        survey(run, Control(file=tmp_path / "nan.txt"))
    swapped = write_gcp(tmp_path / "g.txt", world).read_text().splitlines()
    rows = [" ".join([y, x, *rest]) for x, y, *rest in (row.split() for row in swapped[1:])]
    file.write_text("\n".join([swapped[0], *rows]))  # mirrored
    with pytest.raises(ConfigError, match="stand on their heads"):
        survey(run, Control(file=file))
    assert (run / "latest").resolve() == before
    assert command_to_lay_again(run) == ""


@pytest.mark.slow
def test_a_scale_bar_gives_a_map_without_a_place_its_unit(run: Path, world: SyntheticWorld) -> None:
    for _ in range(2):  # the second time it is metric already
        done = survey(run, Control(bar=bar_of_marks(world)))
        assert done.lines[0].startswith("map scaled by")
        model = read_model(run / "latest" / "sparse" / "0")
        images = sorted((model.image(i) for i in model.reg_image_ids()), key=lambda one: one.name)
        span_m = np.linalg.norm(images[0].projection_center() - images[8].projection_center())
        true = [-pose[:, :3].T @ pose[:, 3] for pose in (world.pose(1), world.pose(9))]
        true_m = METRES_PER_UNIT * np.linalg.norm(true[0] - true[1])
        assert span_m == pytest.approx(true_m, rel=0.01)
    summary = summary_of(run)
    assert not summary["georeferenced"]
    assert summary["metres_per_map_unit"] == 1.0
    assert summary["scale_bars"][0]["error_m"] == pytest.approx(0.0, abs=1e-3)
    record = json.loads((run / "latest" / "snapshot.json").read_text())
    assert record["georeference"] is None
    assert not record["models"][0]["is_georeferenced"]
    assert command_to_lay_again(run).startswith(f"livesfm georeference {run} --scale-bar ")


def bar_of_marks(world: SyntheticWorld, *, num_images: int = 6) -> tuple[str, str, float]:
    """From a place to another, by where images show them, and how long that is."""
    first, second = ("+".join(_mark_words(world, name)[:num_images]) for name in ("G1", "G5"))
    return first, second, length_of_bar_m(world)


def length_of_bar_m(world: SyntheticWorld) -> float:
    places = ground(world)
    return METRES_PER_UNIT * float(np.linalg.norm(places["G1"] - places["G5"]))


def _mark_words(world: SyntheticWorld, name: str) -> list[str]:
    seen = marks(world, ground(world)[name])
    return [f"{image}:{xy[0]:.2f},{xy[1]:.2f}" for image, xy in list(seen.items())[:6]]


@pytest.mark.slow
def test_a_scale_bar_beside_control_points_is_compared(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    file = write_gcp(tmp_path / "g.txt", world)
    survey(run, Control(file=file, bar=("G1", "G5", length_of_bar_m(world) + 1.0)))
    (bar,) = summary_of(run)["georeference"]["scale_bars"]
    assert bar["ends"] == ["G1", "G5"]
    assert bar["error_m"] == pytest.approx(-1.0, abs=0.2)
    assert 0.0 < bar["std_m"] < 0.2
    place = (run / "latest" / "snapshot.json").read_text()
    done = survey(run, Control(bar=bar_of_marks(world)))
    assert done.lines[0] == "the map has its unit from positions already"
    georeference = summary_of(run)["georeference"]
    assert abs(georeference["scale_bars"][0]["error_m"]) < 0.2
    std_m = georeference["scale_bars"][0]["std_m"]
    assert georeference["origin"] == json.loads(place)["georeference"]["origin"]
    assert errors_m(run, world).mean() < 0.2
    survey(run, Control(bar=bar_of_marks(world, num_images=2)))  # which know it less well
    assert summary_of(run)["georeference"]["scale_bars"][0]["std_m"] > std_m


@pytest.mark.slow
def test_a_run_that_was_laid_onto_control_points_can_go_on(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    file = write_gcp(tmp_path / "g.txt", world)
    survey(run, Control(file=file, checks=("G6",)), settings=["georeference.max_error_m=9"])
    assert command_to_lay_again(run) == (
        f"livesfm georeference {run} --gcp {file} --check G6 --set georeference.max_error_m=9"
    )
    lock = RunLock.acquire(run)
    former = recover_run(read_stored_run(run))
    lock.let_go()
    assert len(former.frames) == NUM_FRAMES


@pytest.mark.slow
def test_the_command_takes_positions_or_ground_control(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    file = str(write_gcp(tmp_path / "g.txt", world))
    command = ["georeference", str(run)]
    for wrong in ([], ["--gcp", file, "--positions", file]):
        refused = CliRunner().invoke(cli.app, [*command, *wrong])
        assert refused.exit_code == cli.REFUSED
        assert "either --positions" in refused.output
    refused = CliRunner().invoke(cli.app, [*command, "--check", "G1"])
    assert "--check: names points of the file of --gcp" in refused.output
    length_m = length_of_bar_m(world)
    command += ["--gcp", file, "--check", "G2", "--scale-bar", "G1", "G5"]
    laid = CliRunner().invoke(cli.app, [*command, f"{length_m:.3f}"])
    assert laid.exit_code == 0, laid.output
    assert "map laid onto 5 control points" in laid.output
    assert "3 check points" in laid.output
    assert "scale bar G1 to G5" in laid.output
    other = CliRunner().invoke(cli.app, [*command, f"{1.1 * length_m:.3f}"])
    assert other.exit_code == cli.DOUBTED
    assert "the map is doubtful: the scale bar from G1 to G5 is" in other.output


def test_a_clock_offset_is_refused_beside_ground_control(tmp_path: Path) -> None:
    command = ["georeference", str(tmp_path), "--gcp", "g.txt", "--clock-offset", "3"]
    refused = CliRunner().invoke(cli.app, command)
    assert refused.exit_code == cli.REFUSED
    assert "--clock-offset: goes with --positions" in refused.output


@pytest.mark.parametrize("command", ["run", "georeference"])
def test_a_second_scale_bar_is_refused(tmp_path: Path, command: str) -> None:
    bars = ["--scale-bar", "A", "B", "1", "--scale-bar", "C", "D", "2"]
    refused = CliRunner().invoke(cli.app, [command, str(tmp_path), *bars])
    assert refused.exit_code == cli.REFUSED
    assert "only one can be given" in refused.output


@pytest.mark.slow
def test_a_run_whose_control_points_do_not_fit_keeps_its_map_and_says_so(
    run: Path, world: SyntheticWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "latest").resolve()
    file = write_gcp(tmp_path / "g.txt", world, names=NAMES[:2])
    outcome = RunOutcome(
        path=run,
        stopped_by=StoppedBy.END_OF_SOURCES,
        num_keyframes=NUM_FRAMES,
        num_registered=NUM_FRAMES,
        summary=summary_of(run),
    )
    options = LaunchOptions(
        sources=("x",), path=run, overwrite=False, view_mode=ViewMode.NONE, show_progress=False
    )
    with pytest.raises(typer.Exit) as exit_:
        cli._finish(outcome, options, control=Control(file=file))
    assert exit_.value.exit_code == cli.DOUBTED
    assert "not laid onto ground control: 2 control points" in capsys.readouterr().out
    assert (run / "latest").resolve() == before
    with pytest.raises(typer.Exit) as exit_:
        cli._finish(outcome, options, control=Control(file=write_gcp(tmp_path / "g.txt", world)))
    assert exit_.value.exit_code == 0
    assert "map laid onto 6 control points" in capsys.readouterr().out


def test_a_run_that_is_killed_before_its_end_knows_what_its_map_is_to_be_laid_onto(
    world: SyntheticWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gcp(tmp_path / "g.txt", world)
    photos, run = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    for number in range(2):
        cv2.imwrite(str(photos / f"{number}.png"), np.full((48, 64, 3), 90, np.uint8))
    said: list[str] = []

    def is_killed(outcome: RunOutcome, *args: object, **kwargs: object) -> None:
        said.append(command_to_lay_again(outcome.path))

    monkeypatch.setattr(cli, "_finish", is_killed)
    command = ["run", str(photos), "--out", str(run), "--view", "none", "--quiet"]
    bar = ["--scale-bar", "G1", "G5", "4.5", "--check", "G6"]
    for given in ([], ["--gcp", str(file), *bar]):
        done = CliRunner().invoke(cli.app, [*command, "--overwrite", *given])
        assert done.exit_code == 0, done.output
    how = f"--gcp {file} --check G6 --scale-bar G1 G5 4.5"
    assert said == ["", f"livesfm georeference {run} {how}"]


def finish(run: Path) -> int:
    """The exit code of a run that went on and has ended, without ground control of its own."""
    outcome = RunOutcome(
        path=run,
        stopped_by=StoppedBy.END_OF_SOURCES,
        num_keyframes=NUM_FRAMES,
        num_registered=NUM_FRAMES,
        summary=summary_of(run),
    )
    options = LaunchOptions(
        sources=("x",), path=run, overwrite=False, view_mode=ViewMode.NONE, show_progress=False
    )
    with pytest.raises(typer.Exit) as exit_:
        cli._finish(outcome, options)
    return exit_.value.exit_code


@pytest.mark.slow
def test_a_run_that_went_on_is_laid_again_onto_what_it_was_laid_onto(
    run: Path,
    finished: Path,
    world: SyntheticWorld,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_gcp(tmp_path / "g.txt", world)
    assert finish(run) == 0  # laid onto nothing
    assert "laid" not in capsys.readouterr().out
    survey(run, Control(file=file, checks=("G6",)), settings=["georeference.max_error_m=9"])
    laid = (run / "laid_onto.json").read_bytes()
    ends = ["+".join(_mark_words(world, name)) for name in ("G1", "G5")]
    survey(run, Control(bar=(ends[0], ends[1], 9.0)))
    assert (run / "laid_onto.json").read_bytes() == laid  # a bar that is compared moves nothing
    again = Path(shutil.copytree(finished, tmp_path / "again", symlinks=True))  # as it went on
    shutil.copy(run / "laid_onto.json", again)
    assert finish(again) == 0
    assert "map laid onto 5 control points" in capsys.readouterr().out
    assert errors_m(again, world).mean() < 0.2
    assert gcp_of(again)["G6"]["is_check"]
    assert (again / "laid_onto.json").read_bytes() == laid
    file.unlink()
    assert finish(again) == cli.DOUBTED
    *_, why, command, last = capsys.readouterr().out.splitlines()
    assert why.startswith("NOT laid onto what the map is to be laid onto: ")
    assert command.endswith(command_to_lay_again(again))
    assert last.startswith(f"{again}: {NUM_FRAMES} of {NUM_FRAMES} keyframes registered")
    (again / "laid_onto.json").write_text('{"arguments": ["--gcp"]}')
    assert finish(again) == cli.DOUBTED
    assert "laid_onto.json: is damaged" in capsys.readouterr().out
