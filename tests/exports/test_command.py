from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import laspy
import pytest
from typer.testing import CliRunner, Result

from adapters import cli
from tests.support.placed_runs import dense_points, make_placed_run


def livesfm_export(run: Path, to: Path, *options: str) -> Result:
    return CliRunner().invoke(cli.app, ["export", str(run), "--to", str(to), *options])


def test_a_mapper_gets_all_at_once(tmp_path: Path) -> None:
    make_placed_run(tmp_path / "run")
    options = ["--las", "--laz", "--ply", "--geojson", "--kml", "--odm", "--bundler", "--metashape"]
    done = livesfm_export(tmp_path / "run", tmp_path / "out", *options, "--crs", "EPSG:32616")
    assert done.exit_code == 0, done.stderr
    assert "6 images" in done.stdout and "--skip-report" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("points.las", "points.laz", "dense.las", "dense.laz", "points.ply", "origin.json"),
        *("cameras.geojson", "cameras.kml", "odm", "bundler", "metashape"),
    }
    crs = laspy.read(tmp_path / "out" / "dense.laz").header.parse_crs()
    assert crs is not None and crs.to_epsg() == 32616


def test_a_map_that_is_not_good_is_exported_with_the_verdict_said(tmp_path: Path) -> None:
    make_placed_run(tmp_path / "run")
    said = {}
    for level in ("good", "doubtful"):
        reason = {"kind": "unconfirmed", "level": level, "sentence": "two pairs confirm nothing"}
        summary = {"verdict": {"level": level, "reasons": [reason]}}
        (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
        done = livesfm_export(tmp_path / "run", tmp_path / level, "--tum")
        assert done.exit_code == 0, done.stderr
        said[level] = [line for line in done.stdout.splitlines() if "the map is" in line]
    assert said == {"good": [], "doubtful": ["the map is doubtful: two pairs confirm nothing"]}


def test_dense_points_are_counted_beside_those_of_the_map(tmp_path: Path) -> None:
    make_placed_run(tmp_path / "run")
    num_dense = len(dense_points()[0])
    for options, is_counted in ((["--laz"], True), (["--ply"], False)):
        done = livesfm_export(tmp_path / "run", tmp_path / options[0].strip("-"), *options)
        assert (f" points, {num_dense} dense points\n" in done.stdout) == is_counted


def test_dense_points_of_an_unfinished_dense_map_come_with_the_command_that_finishes_it(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    make_placed_run(run)

    def notes(name: str, option: str, keyframes_without: dict[str, int]) -> list[str]:
        summary = {"dense": {"keyframes_without": keyframes_without}}
        (run / "summary.json").write_text(json.dumps(summary))
        done = livesfm_export(run, tmp_path / name, option)
        assert done.exit_code == 0, done.stderr
        return [line for line in done.stdout.splitlines() if "unfinished" in line]

    (note,) = notes("a", "--laz", {"budget": 3, "end_of_run": 1, "nothing_agrees": 2})
    assert "without the depth of 4 keyframes" in note
    assert note.endswith(f": livesfm resume {run} --set dense.max_cpu_share=0.9")
    assert notes("b", "--laz", {"nothing_agrees": 2}) == []
    assert notes("c", "--ply", {"budget": 3}) == []


def test_who_names_no_format_learns_which_trainers_of_splats_take(tmp_path: Path) -> None:
    make_placed_run(tmp_path / "run")
    refused = livesfm_export(tmp_path / "run", tmp_path / "out")
    assert refused.exit_code == cli.REFUSED
    assert "for trainers of splats: --undistort --nerfstudio" in refused.stderr


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--kml"], "--kml needs a map with a place on the globe: livesfm georeference"),
        (["--las", "--crs", "EPSG:32615"], "livesfm georeference"),
        (["--ply", "--crs", "EPSG:32615"], "livesfm georeference"),
        (["--tum", "--crs", "EPSG:32615"], "--crs is for --las"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    tmp_path: Path, options: list[str], why: str
) -> None:
    make_placed_run(tmp_path / "run", origin=None)
    refused = livesfm_export(tmp_path / "run", tmp_path / "out", *options)
    assert refused.exit_code == cli.REFUSED
    assert why in refused.stderr and refused.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_ctrl_c_says_that_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_placed_run(tmp_path / "run")
    copyfile = shutil.copyfile

    def copy_and_interrupt(path: Path, to: Path) -> None:
        copyfile(path, to)
        if path.name == "000001.png":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(shutil, "copyfile", copy_and_interrupt)
    cancelled = livesfm_export(tmp_path / "run", tmp_path / "out", "--bundler")
    assert cancelled.exit_code == cli.INTERRUPTED
    assert "cancelled; nothing is left of it" in cancelled.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
