"""Products of a finished run follow its map where it is laid out later."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine.output.products_again as again_module
import engine.run.dense as dense_module
from adapters.exports.dense_ply import read_dense_ply_header
from adapters.georeference import georeference
from adapters.launch import write_report
from adapters.run_files import read_model
from engine.config import dump_config, load_config
from engine.errors import JournalError
from engine.run.dense import CpuBudget
from tests.command_line.test_georeference import write_csv
from tests.support.fake_runs import FakeSource, WorldMatcher, engine_of, frames_of
from tests.support.flat_depth import made
from tests.support.synthetic import SyntheticWorld, round_path

NUM_FRAMES = 14
MADE = {"dense.ply", "coverage.geojson"}


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(round_path(NUM_FRAMES, turns=0.8))


@pytest.fixture(scope="module")
def finished(world: SyntheticWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without positions whose products are in the map's own unit."""
    path = tmp_path_factory.mktemp("runs") / "run"
    settings = ["dense.orthophoto=true"]
    source = FakeSource(happenings=frames_of(world), num_frames=NUM_FRAMES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense_module, "estimate_depth", made)
        patch.setattr(CpuBudget, "has_room_for", lambda self, cpu_s: True)
        engine = engine_of(
            path, matcher=WorldMatcher(world=world), sources=[source], settings=settings
        )
        asyncio.run(engine.run())
    (path / "config.yaml").write_text(dump_config(load_config((), settings)))
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def dense_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "summary.json").read_text())["dense"])


def is_in_frame_of_latest(run: Path) -> bool:
    """Whether the dense points were written where the newest model has its cameras."""
    cameras = read_dense_ply_header(run / "products" / "dense.ply").cam_from_world
    model = read_model(run / "latest" / "sparse" / "0")
    return all(
        np.allclose(model.image(i).cam_from_world().matrix(), pose, atol=1e-4)
        for i, pose in cameras.items()
    )


@pytest.mark.slow
def test_products_are_made_again_where_the_map_lies_now(
    run: Path, world: SyntheticWorld, tmp_path: Path
) -> None:
    assert (run / "products" / "coverage.json").exists()
    assert is_in_frame_of_latest(run)
    laid_out = georeference(run, [write_csv(tmp_path / "p.csv", world)])
    assert f"products/ made again there, of the depth of {NUM_FRAMES} keyframes" in laid_out.words
    assert is_in_frame_of_latest(run)
    names = {path.name for path in (run / "products").iterdir()}
    assert names >= MADE
    assert not names & {"coverage.json"}  # of the former frame
    assert {path.split(".")[0] for path in names} == {"dense", "orthophoto", "dsm", "coverage"}
    assert "products_in_former_frame" not in dense_of(run)
    assert dense_of(run)["written"]["points"] > 500
    is_geotiff = (run / "products" / "orthophoto.tif").exists()  # with the extra survey
    assert (dense_of(run)["written"]["epsg"] is not None) is is_geotiff
    assert not list(run.glob(".tmp-*"))


@pytest.mark.slow
def test_products_that_cannot_be_made_again_stay_and_the_report_says_so(
    run: Path, world: SyntheticWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in (run / "products").iterdir()}

    def is_full(*args: Any, **kwargs: Any) -> None:
        raise JournalError("no space left")

    monkeypatch.setattr(again_module, "write_ground", is_full)
    laid_out = georeference(run, [write_csv(tmp_path / "p.csv", world)])
    assert "products/ stay in the former frame" in laid_out.words
    assert laid_out.words.endswith("no space left")
    assert {path.name: path.read_bytes() for path in (run / "products").iterdir()} == before
    assert dense_of(run)["products_in_former_frame"] is True
    assert "lie in the former frame of the map" in write_report(run).read_text()
    assert not list(run.glob(".tmp-*"))
    monkeypatch.undo()
    shutil.rmtree(run / "dense")
    laid_out = georeference(run, [str(tmp_path / "p.csv")])
    assert "no stored depth of its keyframes can be read" in laid_out.words
    assert {path.name: path.read_bytes() for path in (run / "products").iterdir()} == before
