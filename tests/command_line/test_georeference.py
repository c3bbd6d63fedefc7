"""A finished run that is laid onto positions afterwards."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import re
import shutil
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from adapters import cli
from adapters.georeference import georeference, lay_again
from adapters.run_files import read_frame_rows, read_model
from engine.config import load_config
from engine.errors import ConfigError, SnapshotError
from engine.geo import gps_tracks
from engine.geo.georeference import positions_in_enu
from engine.output.recovery import recover_run
from engine.output.run_folder import RunFolder
from engine.output.run_lock import LOCK_NAME, RunLock, RunState, run_state
from engine.output.stored_run import read_stored_run
from engine.run.engine import Engine
from engine.run.ingestion import SourceRole
from engine.types import Float64Array, GpsFix
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
START_S = datetime(2026, 5, 1, 12, tzinfo=UTC).timestamp()


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(round_path(NUM_FRAMES, turns=0.8))


@pytest.fixture(scope="module")
def finished(world: SyntheticWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    source = FakeSource(happenings=frames_of(world), num_frames=NUM_FRAMES)
    engine = engine_of(path, matcher=WorldMatcher(world=world), sources=[source])
    asyncio.run(engine.run())
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def write_csv(path: Path, world: SyntheticWorld) -> str:
    rows = ["name,latitude,longitude,altitude"]
    for frame_id in world.frame_ids:
        fix = world.gps(frame_id, metres_per_unit=METRES_PER_UNIT)
        place = f"{fix.latitude_deg:.9f},{fix.longitude_deg:.9f},{fix.altitude_m:.4f}"
        rows.append(f"{frame_id - 1:06d}.jpg,{place}")
    path.write_text("\n".join(rows))
    return str(path)


def write_moved(path: Path, csv: str) -> str:
    """The same positions, 5.6 km further north."""
    header, *rows = Path(csv).read_text().splitlines()
    cells = [row.split(",") for row in rows]
    moved = [",".join([name, str(float(lat) + 0.05), *rest]) for name, lat, *rest in cells]
    path.write_text("\n".join([header, *moved]))
    return str(path)


def write_gpx(path: Path, world: SyntheticWorld) -> str:
    """The positions of the frames, by a clock that is 100 s ahead of theirs from START_S on."""
    points = []
    for frame_id in world.frame_ids:
        fix = world.gps(frame_id, metres_per_unit=METRES_PER_UNIT)
        time = datetime.fromtimestamp(START_S + 100.0 + 0.1 * (frame_id - 1), UTC).isoformat()
        points.append(
            f'<trkpt lat="{fix.latitude_deg:.9f}" lon="{fix.longitude_deg:.9f}">'
            f"<ele>{fix.altitude_m:.4f}</ele><time>{time}</time></trkpt>"
        )
    path.write_text(f"<gpx>{''.join(points)}</gpx>")
    return str(path)


def errors_m(run: Path, world: SyntheticWorld) -> Float64Array:
    """Distances of the newest model's cameras from where they were."""
    record = json.loads((run / "latest" / "snapshot.json").read_text())["georeference"]
    model = read_model(run / "latest" / "sparse" / "0")
    images = [model.image(i) for i in model.reg_image_ids()]
    centers_m = np.array([image.projection_center() for image in images])
    fixes = [
        world.gps(int(image.name[:6]) + 1, metres_per_unit=METRES_PER_UNIT) for image in images
    ]
    origin = type(fixes[0])(**record["origin"])
    return np.asarray(np.linalg.norm(centers_m - positions_in_enu(fixes, origin=origin), axis=1))


def trajectory_errors_m(run: Path, world: SyntheticWorld) -> Float64Array:
    """Distances of the trajectory from where the cameras were, in the newest model's frame."""
    record = json.loads((run / "latest" / "snapshot.json").read_text())["georeference"]
    rows = [line.split() for line in trajectory_lines(run / "trajectory.txt")]
    fixes = [
        world.gps(round(10.0 * float(row[0])) + 1, metres_per_unit=METRES_PER_UNIT) for row in rows
    ]
    true_m = positions_in_enu(fixes, origin=GpsFix(**record["origin"]))
    positions_m = np.array([[float(cell) for cell in row[1:4]] for row in rows])
    return np.asarray(np.linalg.norm(positions_m - true_m, axis=1))


@pytest.mark.slow
def test_a_run_is_laid_onto_positions_by_the_names_of_its_keyframes(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    before = (run / "latest").resolve()
    laid_out = georeference(run, [write_csv(tmp_path / "p.csv", world)])
    assert laid_out.snapshot == (run / "latest").resolve() != before
    assert before.is_dir()
    errors = errors_m(run, world)
    assert len(errors) == NUM_FRAMES
    assert errors.max() < 0.3
    summary = json.loads((run / "summary.json").read_text())
    assert summary["georeferenced"]
    assert summary["gps_rmse_m"] < 0.3
    assert trajectory_errors_m(run, world).max() < 0.3
    (line,) = lay_again(run)  # once it went on
    assert line.startswith("map laid onto 16 positions")


def test_a_lost_newest_snapshot_is_told_from_no_map(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    command = f"livesfm resume {run}"
    shutil.rmtree((run / "latest").resolve())
    with pytest.raises(ConfigError, match=f"its newest snapshot is lost: {re.escape(command)}"):
        georeference(run, [write_csv(tmp_path / "p.csv", world)])
    export = ["export", str(run), "--to", str(tmp_path / "out"), "--ply"]
    said = CliRunner().invoke(cli.app, export)
    assert said.exit_code == cli.REFUSED
    assert command in said.output
    (run / "latest").unlink()  # by a copy to a disk without links
    (run / "snapshots" / "000001").mkdir(exist_ok=True)
    said = CliRunner().invoke(cli.app, export)
    assert command in said.output
    shutil.rmtree(run / "snapshots")
    with pytest.raises(ConfigError, match="the run has no map$"):
        georeference(run, [write_csv(tmp_path / "p.csv", world)])
    said = CliRunner().invoke(cli.app, ["export", str(tmp_path / "none"), *export[2:]])
    assert "none: no such run folder" in said.output
    said = CliRunner().invoke(cli.app, ["evaluate", str(tmp_path / "none")])
    assert "none: no such run folder" in said.output


@pytest.mark.slow
def test_positions_far_from_those_of_the_frames_make_a_map_doubtful_until_right_ones_come(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    right = write_csv(tmp_path / "p.csv", world)
    assert not georeference(run, [right]).doubts  # the map had no place before
    snapshot = run / "latest" / "snapshot.json"
    record = json.loads(snapshot.read_text())
    assert record["georeference"].pop("from_files")  # now they are as the frames' own
    snapshot.write_text(json.dumps(record))
    verdict = json.loads((run / "summary.json").read_text())["verdict"]
    other = write_moved(tmp_path / "other.csv", right)
    for _ in range(2):  # the same with the same positions again
        (doubt,) = georeference(run, [other]).doubts
        assert "5.6 km horizontally" in doubt.sentence
        record = json.loads((run / "summary.json").read_text())["verdict"]
        assert record["level"] == "doubtful"
    command = ["georeference", str(run), "--positions"]
    said = CliRunner().invoke(cli.app, [*command, other])
    assert said.exit_code == cli.DOUBTED
    assert "the map is doubtful: the positions of the file put the cameras" in said.output
    assert CliRunner().invoke(cli.app, [*command, right]).exit_code == 0
    assert json.loads((run / "summary.json").read_text())["verdict"] == verdict


@pytest.mark.slow
def test_positions_that_the_map_denies_are_named_and_bend_nothing(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    header, *rows = Path(write_csv(tmp_path / "p.csv", world)).read_text().splitlines()
    cells = [row.split(",") for row in rows]

    def words_with_wrong(numbers: range) -> str:
        moved = [
            ",".join([name, str(float(lat) + 0.001 * (row in numbers)), *rest])
            for row, (name, lat, *rest) in enumerate(cells)
        ]
        (tmp_path / "p.csv").write_text("\n".join([header, *moved]))
        return georeference(run, [str(tmp_path / "p.csv")]).words

    assert "not used" not in words_with_wrong(range(0))
    one = words_with_wrong(range(3, 4))
    assert "1 position disagrees with the map by up to 111 m, not used: 000003.jpg" in one
    assert errors_m(run, world).max() < 0.3
    several = words_with_wrong(range(3, 8))
    assert "5 positions disagree" in several
    assert several.endswith("not used: 000003.jpg, 000004.jpg, 000005.jpg and 2 more")


@pytest.mark.slow
def test_positions_that_mend_those_of_a_wrong_file_are_not_doubted(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    right = write_csv(tmp_path / "p.csv", world)
    georeference(run, [write_moved(tmp_path / "other.csv", right)])
    assert not georeference(run, [right]).doubts
    assert json.loads((run / "summary.json").read_text())["verdict"]["level"] == "good"


@pytest.mark.slow
def test_a_run_is_laid_onto_a_track_whose_clock_is_another(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    laid_out = georeference(run, [write_gpx(tmp_path / "p.gpx", world)])
    assert laid_out.clock_offset_s == pytest.approx(START_S + 100.0, abs=0.03)
    assert "clock offset" in laid_out.words
    assert errors_m(run, world).max() < 2.0  # 0.01 s of a camera at 170 m/s
    given = georeference(run, [str(tmp_path / "p.gpx")], clock_offset_s=START_S + 100.0)
    assert given.placement.georeference.metres_per_map_unit == pytest.approx(1.0, abs=0.01)
    assert errors_m(run, world).max() < 0.3
    (line,) = lay_again(run)
    assert f"clock offset {START_S + 100.0:.2f} s" in line


@pytest.mark.slow
def test_whatever_step_fails_another_call_lays_out_the_map_and_its_trajectory(
    finished: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    positions = write_csv(tmp_path / "p.csv", world)
    steps = itertools.count()
    num_failures = 0
    for step in steps:
        run = Path(shutil.copytree(finished, tmp_path / f"run{step}", symlinks=True))
        before = (run / "latest").resolve()
        if not is_broken_at(step, run, positions):
            break
        num_failures += 1
        assert (run / "latest").resolve() == before
        georeference(run, [positions])
        assert not list(run.rglob(".tmp-*"))
        assert errors_m(run, world).max() < 0.3
        assert trajectory_errors_m(run, world).max() < 0.3
        assert json.loads((run / "summary.json").read_text())["gps_rmse_m"] < 0.3
    assert num_failures >= 5  # model record, folder, trajectory, summary, link


@pytest.mark.slow
def test_a_damaged_trajectory_changes_nothing(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    snapshots = sorted((run / "snapshots").iterdir())
    with (run / "trajectory.txt").open("a") as file:
        file.write("0.5 north\n")
    with pytest.raises(SnapshotError, match="is damaged"):
        georeference(run, [write_csv(tmp_path / "p.csv", world)])
    assert sorted((run / "snapshots").iterdir()) == snapshots


def is_broken_at(step: int, run: Path, positions: str) -> bool:
    """Whether georeferencing renames so many files that one of that number could fail."""
    numbers = itertools.count()

    def failing(rename: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def renamed(path: Path, target: Path) -> Path:
            if run in path.parents and next(numbers) == step:
                raise OSError(errno.ENOSPC, "no space left")
            return rename(path, target)

        return renamed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", failing(Path.replace))
        patch.setattr(Path, "rename", failing(Path.rename))
        try:
            georeference(run, [positions])
        except SnapshotError as error:
            assert "no space left" in str(error)
            return True
    return False


@pytest.mark.slow
def test_maps_beside_the_first_move_along_with_the_origin(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    positions = tmp_path / "p.csv"
    georeference(run, [write_csv(positions, world)])
    latest = run / "latest"
    shutil.copytree(latest / "sparse" / "0", latest / "sparse" / "1")
    shutil.copy(run / "trajectory.txt", run / "trajectory_1.txt")
    record = json.loads((latest / "snapshot.json").read_text())
    record["maps"].append({**record["maps"][0], "number": 1})
    (latest / "snapshot.json").write_text(json.dumps(record))
    rows = positions.read_text().splitlines()
    positions.write_text("\n".join([rows[0], *rows[1:9]]))  # another median, another origin
    georeference(run, [str(positions)])
    first, beside = (read_model(latest / "sparse" / name) for name in ("0", "1"))
    for image_id in first.reg_image_ids():
        centers = [model.image(image_id).projection_center() for model in (first, beside)]
        assert np.linalg.norm(centers[0] - centers[1]) < 0.3
    after = json.loads((latest / "snapshot.json").read_text())
    assert after["georeference"]["origin"] != record["georeference"]["origin"]
    assert all(model["is_georeferenced"] for model in after["models"])
    last, last_beside = (
        np.array(trajectory_lines(run / name)[-1].split()[1:4], np.float64)
        for name in ("trajectory.txt", "trajectory_1.txt")
    )
    assert np.linalg.norm(last - last_beside) < 0.3


@pytest.mark.slow
def test_positions_that_do_not_fit_change_nothing_and_say_why(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    before = (run / "latest").resolve()
    few, two = tmp_path / "few.csv", tmp_path / "two.gpx"
    few.write_text("name,lat,lon\n000001.jpg,1,1\n")
    write_gpx(two, world)
    with pytest.raises(ConfigError, match="1 of 16 keyframes have a position, 6 are needed"):
        georeference(run, [str(few)])
    with pytest.raises(ConfigError, match="one track"):
        georeference(run, [str(two), str(few)])
    with pytest.raises(ConfigError, match="0 of 16 keyframes"):
        georeference(run, [str(two)], clock_offset_s=5.0)
    assert (run / "latest").resolve() == before


@pytest.mark.slow
def test_a_track_is_for_the_frames_of_the_video_of_its_name(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    other = add_source(run, "B.MP4")
    with pytest.raises(ConfigError, match="which of the run's 2 sources.*fake.gpx, B.gpx"):
        georeference(run, [write_gpx(tmp_path / "c.gpx", world)])
    with pytest.raises(ConfigError, match="0 of 0 keyframes"):  # not those of the other, by time
        georeference(run, [write_gpx(tmp_path / "b.GPX", world)], clock_offset_s=START_S + 100.0)
    georeference(run, [write_gpx(tmp_path / "fake.GPX", world)], clock_offset_s=START_S + 100.0)
    assert errors_m(run, world).max() < 0.3
    assert (
        other not in json.loads((run / "summary.json").read_text())["georeference"]["residuals_m"]
    )


def add_source(run: Path, source: str) -> str:
    """Adds frames of a video at the same times to a run's table; the name of the last of them."""
    table = run / "frames.csv"
    lines = table.read_text().splitlines()
    name = ""
    for row in read_frame_rows(run):
        name = f"source2/{row.name}"
        lines.append(f",{source},{row.index},{name},{row.captured_at_s},keyframe,,")
    table.write_text("\n".join(lines) + "\n")
    return name


@pytest.mark.slow
def test_a_track_is_refused_for_photos_whose_times_are_their_numbers(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    rows = read_frame_rows(run)
    lines = [f"{i + 1},photos,{i},{row.name},{i}.0,keyframe,," for i, row in enumerate(rows)]
    head = (run / "frames.csv").read_text().splitlines()[0]
    (run / "frames.csv").write_text("\n".join([head, *lines]) + "\n")
    with pytest.raises(ConfigError, match="photos of this run have no times"):
        georeference(run, [write_gpx(tmp_path / "p.gpx", world)])


@pytest.mark.slow
def test_a_long_track_counts_whole(
    run: Path, world: SyntheticWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gps_tracks, "MAX_READINGS", NUM_FRAMES)
    path = Path(write_gpx(tmp_path / "p.gpx", world))
    away = "".join(
        f'<trkpt lat="1.0" lon="1.0"><time>2026-05-01T13:00:{second:02d}Z</time></trkpt>'
        for second in range(NUM_FRAMES)
    )
    path.write_text(path.read_text().replace("</gpx>", f"{away}</gpx>"))
    georeference(run, [str(path)], clock_offset_s=START_S + 100.0)
    assert errors_m(run, world).max() < 0.3


@pytest.mark.slow
def test_a_run_that_goes_on_says_how_its_map_is_laid_again(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    positions = write_csv(tmp_path / "p.csv", world)
    georeference(run, [positions], settings=["georeference.min_fixes=7"])
    command = f"livesfm georeference {run} --positions {positions} --set georeference.min_fixes=7"
    for _ in range(2):  # a second resume still does
        lock = RunLock.acquire(run)
        former = recover_run(read_stored_run(run))
        source = FakeSource(happenings=[], num_frames=0)
        engine = Engine(
            load_config(),
            folder=RunFolder.reopen(run, former.frames, config_text="{}", lock=lock),
            sources=[source],
            matcher=WorldMatcher(world=world),
            roles=[SourceRole(label="fake", taken=former.sources[0].taken, part=former.part)],
            former=former,
        )
        asyncio.run(engine.run())
        summary = json.loads((run / "summary.json").read_text())
        assert not summary["georeferenced"]
        assert summary["not_georeferenced"].endswith(f"lays the map onto it: {command}")
        last = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        warned = [one["message"] for one in last if "message" in one]
        assert any(message.endswith(f"lays the map onto it: {command}") for message in warned)


def test_what_is_no_finished_run_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    positions = ["p.csv"]
    with pytest.raises(ConfigError, match="no such run folder"):
        georeference(tmp_path / "none", positions)
    with pytest.raises(ConfigError, match="there is no run here"):
        georeference(tmp_path, positions)


@pytest.mark.slow
def test_a_run_that_goes_on_or_was_cut_off_is_refused(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    positions = [write_csv(tmp_path / "p.csv", world)]
    lock = RunLock.acquire(run)
    with pytest.raises(ConfigError, match="a run is writing there"):
        georeference(run, positions)
    lock.release()
    holder = {"pid": 2**22 + 1, "host": socket.gethostname(), "started_at": "2026-05-01"}
    (run / LOCK_NAME).write_text(json.dumps(holder))
    with pytest.raises(ConfigError, match="was interrupted.*livesfm resume"):
        georeference(run, positions)
    assert run_state(run)[0] is RunState.INTERRUPTED
    (run / LOCK_NAME).unlink()
    (run / "latest").unlink()
    with pytest.raises(ConfigError, match="has no map"):
        georeference(run, positions)


@pytest.mark.slow
def test_the_command_says_where_the_map_lies_or_why_it_does_not(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    positions = write_csv(tmp_path / "p.csv", world)
    command = ["georeference", str(run), "--positions", positions]
    refused = CliRunner().invoke(cli.app, [*command, "--set", "georeference.min_fixes=17"])
    assert refused.exit_code == 2
    assert "16 of 16 keyframes have a position, 17 are needed" in refused.output.replace("\n", " ")
    laid = CliRunner().invoke(cli.app, command)
    assert laid.exit_code == 0, laid.output
    assert "map laid onto 16 positions" in laid.output
    missing = str(tmp_path / "none.csv")
    refused = CliRunner().invoke(cli.app, ["georeference", str(run), "--positions", missing])
    assert refused.exit_code == 2
    assert "none.csv: cannot be read" in refused.output.replace("\n", "")
