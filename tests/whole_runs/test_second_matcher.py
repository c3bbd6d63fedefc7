"""Whole runs by SIFT with MASt3R as the second matcher: weights that match, and random ones."""

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
from adapters.matchers.mast3r.second import Mast3rSecond
from engine.config import DenseMatchingConfig, Mast3rConfig, SecondMatcherConfig
from tests.support.fake_runs import Written
from tests.support.mast3r_weights import unpacked_mini_checkpoint
from tests.support.patch_network import PatchNetwork

TOWN = "synthetic:town?path=lawnmower&width=240&height=180&frames=90"
SECOND = (
    "matching.second=mast3r",
    "mast3r.image_edge_px=192",
    "dense_matching.max_query_points=400",
    "second.free_keypoints=600",
    "second.pairs_per_s=1000",
)
LEAN = ("dense.enabled=false", "report.enabled=false")
# SIFT finds next to nothing, as where there is no texture.
BLIND = ("sift.contrast_threshold=0.12", "frame_tracking.mode=photos")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("towns_painted_once")]


@pytest.fixture(autouse=True)
def _library_threads_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Launching limits the whole process; other tests must not notice."""
    monkeypatch.setattr(open_matcher, "_num_cores", lambda: 1)
    former = cv2.getNumThreads(), torch.get_num_threads()
    with threadpoolctl.threadpool_limits():
        yield
    cv2.setNumThreads(former[0])
    torch.set_num_threads(former[1])


@pytest.fixture
def _matching_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that matches stands where the real one would be loaded."""

    def opened(
        config: Mast3rConfig, *, second: SecondMatcherConfig, dense: DenseMatchingConfig
    ) -> Mast3rSecond:
        matcher = Mast3rMatcher(
            config,
            dense=dense,
            network=PatchNetwork(),
            device=Device(name="cpu", dtype=torch.float32),
            places=None,
            is_metric=False,
        )
        return Mast3rSecond(
            matcher,
            image_edge_px=config.image_edge_px,
            max_kept_images=second.max_kept_images,
        )

    monkeypatch.setattr(open_matcher, "open_mast3r_second", opened)


def reconstruct(out: Path, *settings: str, source: str = TOWN) -> Result:
    arguments = ["run", source, "--out", str(out), "--view", "none", "--quiet"]
    for setting in (*LEAN, *settings):
        arguments += ["--set", setting]
    return CliRunner().invoke(cli.app, arguments)


def evaluated(out: Path) -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, ["evaluate", str(out), "--json"])
    assert result.exit_code == 0, result.output
    figures: dict[str, Any] = json.loads(result.stdout)
    return figures


def second_pairs(written: Written) -> list[dict[str, Any]]:
    return [one for one in written.of_kind("PairVerified") if one["reason"] == "second"]


@pytest.mark.usefixtures("_matching_weights")
def test_where_sift_finds_nothing_the_second_matcher_makes_the_map(tmp_path: Path) -> None:
    few = (*BLIND, "sources.max_frames=12")
    alone = reconstruct(tmp_path / "alone", *few)
    assert alone.exit_code == cli.NOTHING_MADE, alone.output
    result = reconstruct(tmp_path / "both", *few, *SECOND)
    assert result.exit_code in (0, cli.DOUBTED), result.output
    written = Written.read(tmp_path / "both")
    assert written.summary["registered_keyframes"] >= 10
    assert 0.0 < evaluated(tmp_path / "both")["final"]["absolute"]["rmse_percent_of_extent"] < 2.0
    assert len(second_pairs(written)) == written.summary["second_matcher"]["pairs_verified"] > 10
    assert written.summary["second_matcher"]["pairs"] >= len(second_pairs(written))


@pytest.mark.usefixtures("_matching_weights")
def test_the_same_frames_give_the_same_map(tmp_path: Path) -> None:
    trajectories = []
    for name in ("one", "other"):
        result = reconstruct(tmp_path / name, *BLIND, "sources.max_frames=8", *SECOND)
        assert result.exit_code in (0, cli.DOUBTED), result.output
        trajectories.append((tmp_path / name / "trajectory.txt").read_bytes())
    assert trajectories[0] == trajectories[1]


def test_where_sift_matches_random_weights_change_nothing(tmp_path: Path) -> None:
    checkpoint = unpacked_mini_checkpoint(tmp_path)
    settings = ("sources.max_frames=16", "sift.max_features_in_video=600")
    random = (*SECOND, f"mast3r.checkpoint={checkpoint}", "second.strong_inliers=1000")
    figures = []
    for name, more in (("alone", ()), ("both", random)):
        result = reconstruct(tmp_path / name, *settings, *more)
        assert result.exit_code in (0, cli.DOUBTED), result.output
        figures.append((Written.read(tmp_path / name).summary, evaluated(tmp_path / name)))
    (alone, alone_scored), (both, both_scored) = figures
    assert both["registered_keyframes"] == alone["registered_keyframes"] >= 5
    assert both["second_matcher"]["pairs"] > 4  # all keyframes were weak, and got their pairs
    assert both["second_matcher"]["pairs_verified"] == 0
    assert both["faults"] == {}
    assert both["peak_gpu_mb"] == 0.0
    alone_percent, both_percent = (
        one["final"]["absolute"]["rmse_percent_of_extent"] for one in (alone_scored, both_scored)
    )
    assert both_percent == pytest.approx(alone_percent, rel=1e-6)


@pytest.mark.usefixtures("_matching_weights")
def test_a_run_that_goes_on_keeps_the_second_matcher_s_pairs(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = reconstruct(out, *BLIND, "sources.max_frames=9", *SECOND)
    assert result.exit_code in (0, cli.DOUBTED), result.output
    before = Written.read(out)
    arguments = ["resume", str(out), "--view", "none", "--quiet", "--set", "sources.max_frames=12"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code in (0, cli.DOUBTED), result.output
    after = Written.read(out)
    assert after.summary["registered_keyframes"] >= before.summary["registered_keyframes"] >= 6
    told_before = {(one["first"], one["second"]) for one in second_pairs(before)}
    again = [one for one in second_pairs(after)[len(second_pairs(before)) :]]
    assert not told_before & {(one["first"], one["second"]) for one in again}
    assert np.isfinite(evaluated(out)["final"]["absolute"]["rmse_percent_of_extent"])


def test_without_weights_the_run_is_refused_and_says_how_to_get_them(tmp_path: Path) -> None:
    result = reconstruct(tmp_path / "run", "matching.second=mast3r")
    assert result.exit_code == cli.REFUSED
    for said in ("matching.second=mast3r", "--set mast3r.checkpoint=PATH", "CC BY-NC-SA"):
        assert said in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("matching.matcher=oracle",), "helps sift, not oracle"),
        (("agreement.mode=off",), "agreement.mode=auto or required"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, settings: tuple[str, ...], said: str
) -> None:
    result = reconstruct(tmp_path / "run", "matching.second=mast3r", *settings)
    assert result.exit_code == cli.REFUSED
    assert said in result.stderr
