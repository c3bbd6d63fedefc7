"""The command line with MASt3R as the matcher: random weights, none, and weights that match."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import threadpoolctl
import torch
from typer.testing import CliRunner, Result

from adapters import cli
from adapters.matchers.mast3r import open_matcher
from adapters.matchers.mast3r.matcher import Device, Mast3rMatcher
from adapters.matchers.mast3r.retrieval import PooledPlaceIndex
from engine.config import DenseMatchingConfig, Mast3rConfig
from tests.support.fake_runs import Written, trajectory_lines
from tests.support.mast3r_weights import unpacked_mini_checkpoint
from tests.support.patch_network import PatchNetwork
from tests.support.paths import CONFIGS

CONFIG = CONFIGS / "mast3r.yaml"
TOWN = "synthetic:town?path=lawnmower&width=240&height=180"

pytestmark = pytest.mark.usefixtures("towns_painted_once")


@pytest.fixture(autouse=True)
def _library_threads_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Launching limits the whole process; other tests must not notice."""
    # Threads that wait for each other on a busy machine would be all that is measured.
    monkeypatch.setattr(open_matcher, "_num_cores", lambda: 1)
    former = cv2.getNumThreads(), torch.get_num_threads()
    with threadpoolctl.threadpool_limits():
        yield
    cv2.setNumThreads(former[0])
    torch.set_num_threads(former[1])


def reconstruct(source: str | Path, out: Path, *settings: str) -> Result:
    arguments = ["run", str(source), "--out", str(out), "--view", "none", "--quiet"]
    arguments += ["--config", str(CONFIG)]
    for setting in settings:
        arguments += ["--set", setting]
    return CliRunner().invoke(cli.app, arguments)


def assert_no_traceback(result: Result) -> None:
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output


# -- random weights -------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return unpacked_mini_checkpoint(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["queries", "fast_reciprocal"])
def test_random_weights_end_cleanly_without_a_map(
    checkpoint: Path, tmp_path: Path, scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    result = reconstruct(
        f"{TOWN}&frames=8",
        out,
        f"mast3r.checkpoint={checkpoint}",
        "mast3r.image_edge_px=128",
        f"mast3r.scheme={scheme}",
        "dense_matching.max_keypoints=512",
        "frame_tracking.mode=photos",
    )
    assert result.exit_code == cli.NOTHING_MADE, result.output
    assert_no_traceback(result)
    assert "no map could be made" in result.stdout
    assert [record.message for record in caplog.records if "CC BY-NC-SA" in record.message]
    written = Written.read(out)
    assert written.events[0]["matcher"] == "mast3r"
    assert written.events[-1]["event"] == "RunFinished"
    assert written.statuses == ["keyframe"] * 8
    assert len(written.of_kind("KeyframeAdded")) == 8
    summary = written.summary
    assert (summary["keyframes"], summary["registered_keyframes"]) == (8, 0)
    assert (summary["components"], summary["stopped_by"]) == (0, "end_of_sources")
    assert summary["peak_gpu_mb"] == 0.0
    assert not trajectory_lines(out / "trajectory.txt")


@pytest.mark.slow
def test_photos_of_any_shape_end_cleanly_too(checkpoint: Path, tmp_path: Path) -> None:
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    shapes = [(64, 64), (90, 360), (360, 90), (120, 160, 3), (120, 160, 4), (75, 111, 3)]
    for number, shape in enumerate(shapes):
        pixels = rng.integers(0, 256, shape, np.uint8)
        assert cv2.imwrite(str(folder / f"{number}.png"), pixels)
    assert cv2.imwrite(str(folder / "6.png"), rng.integers(0, 65536, (80, 100, 3), np.uint16))
    assert cv2.imwrite(str(folder / "7.png"), np.full((80, 100, 3), 128, np.uint8))
    out = tmp_path / "run"
    result = reconstruct(
        folder,
        out,
        f"mast3r.checkpoint={checkpoint}",
        "mast3r.image_edge_px=128",
        "mast3r.symmetric=true",
        "dense_matching.max_keypoints=512",
    )
    assert result.exit_code == cli.NOTHING_MADE, result.output
    assert_no_traceback(result)
    written = Written.read(out)
    assert written.statuses == ["keyframe"] * 8
    assert not written.warnings()


# -- what cannot be run ---------------------------------------------------------------------------


def test_without_weights_the_run_is_refused_and_told_how_to_get_them(tmp_path: Path) -> None:
    result = reconstruct(f"{TOWN}&frames=3", tmp_path / "run")
    assert result.exit_code == cli.REFUSED
    assert_no_traceback(result)
    assert result.stderr.startswith("livesfm: ")
    for told in ("--set mast3r.checkpoint=PATH", "hf download naver/MASt3R_", "CC BY-NC-SA"):
        assert told in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_refused_device_does_not_cost_a_former_run(checkpoint: Path, tmp_path: Path) -> None:
    result = reconstruct(
        f"{TOWN}&frames=3",
        tmp_path / "run",
        f"mast3r.checkpoint={checkpoint}",
        "mast3r.device=nonsense",
    )
    assert result.exit_code == cli.REFUSED
    assert "mast3r.device=nonsense: is not usable here" in result.stderr
    assert not (tmp_path / "run").exists()


# -- weights that match ---------------------------------------------------------------------------


def open_patch_network(
    config: Mast3rConfig, *, dense: DenseMatchingConfig
) -> tuple[Mast3rMatcher, PooledPlaceIndex]:
    places = PooledPlaceIndex()
    matcher = Mast3rMatcher(
        config,
        dense=dense,
        network=PatchNetwork(),
        device=Device(name="cpu", dtype=torch.float32),
        places=places,
        is_metric=False,
    )
    return matcher, places


@pytest.fixture
def matching_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that matches stands where the real one would be loaded."""
    monkeypatch.setattr(open_matcher, "open_mast3r", open_patch_network)


def evaluated(out: Path) -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, ["evaluate", str(out), "--json"])
    assert result.exit_code == 0, result.output
    figures: dict[str, Any] = json.loads(result.stdout)
    return figures


SMALL = (
    "mast3r.image_edge_px=192",
    "dense_matching.max_corners=300",
    "dense_matching.max_keypoints=800",
    "dense_matching.max_query_points=300",
    "scene_graph.pairs_per_keyframe=5",
    "scene_graph.exhaustive_below=4",
)


@pytest.mark.slow
@pytest.mark.usefixtures("matching_weights")
def test_a_flight_is_reconstructed_from_dense_matches(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = reconstruct(f"{TOWN}&frames=90", out, *SMALL, "sources.max_frames=45")
    assert result.exit_code == 0, result.output
    written, figures = Written.read(out), evaluated(out)
    assert written.summary["registered_keyframes"] == written.summary["keyframes"] >= 12
    assert written.summary["components"] == 1
    assert written.summary["mean_track_length"] > 3.5
    assert written.summary["mean_reprojection_error_px"] < 0.5
    assert figures["final"]["posed_ratio"] == 1.0
    assert 0.0 < figures["final"]["absolute"]["rmse_percent_of_extent"] < 0.6


@pytest.mark.slow
@pytest.mark.usefixtures("matching_weights")
def test_a_flight_is_reconstructed_by_the_published_scheme_too(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = reconstruct(
        f"{TOWN}&frames=90",
        out,
        *SMALL,
        "sources.max_frames=24",
        "mast3r.scheme=fast_reciprocal",
        # Whole px of this small network are three times as wide as thresholds are made for.
        "dense_matching.merge_radius_px=6",
        "two_view.max_error_px=10",
        "triangulation.max_reprojection_error_px=10",
    )
    assert result.exit_code == 0, result.output
    written, figures = Written.read(out), evaluated(out)
    assert written.summary["registered_keyframes"] == written.summary["keyframes"] >= 6
    assert 0.0 < figures["final"]["absolute"]["rmse_percent_of_extent"] < 1.5
