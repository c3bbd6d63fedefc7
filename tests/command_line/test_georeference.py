"""A finished run that is laid onto positions afterwards."""

from __future__ import annotations

import asyncio
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from adapters import cli
from adapters.georeference import georeference
from adapters.run_files import read_model
from engine.errors import ConfigError
from engine.geo.georeference import positions_in_enu
from engine.types import Float64Array
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
    for line in trajectory_lines(run / "trajectory.txt"):
        index = round(10.0 * float(line.split()[0]))
        fix = world.gps(index + 1, metres_per_unit=METRES_PER_UNIT)
        origin = laid_out.placement.georeference.origin
        (true_m,) = positions_in_enu([fix], origin=origin)
        position_m = np.array([float(cell) for cell in line.split()[1:4]])
        assert float(np.linalg.norm(position_m - true_m)) < 0.3


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
def test_the_command_says_where_the_map_lies_or_why_it_does_not(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    positions = write_csv(tmp_path / "p.csv", world)
    laid = CliRunner().invoke(cli.app, ["georeference", str(run), "--positions", positions])
    assert laid.exit_code == 0, laid.output
    assert "map laid onto 16 positions" in laid.output
    missing = str(tmp_path / "none.csv")
    refused = CliRunner().invoke(cli.app, ["georeference", str(run), "--positions", missing])
    assert refused.exit_code == 2
    assert "none.csv: cannot be read" in refused.output.replace("\n", "")
