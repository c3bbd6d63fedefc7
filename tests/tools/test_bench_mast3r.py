"""The bench of MASt3R on a small network: its figures are there and agree with each other."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from tests.support.paths import TOOLS
from tests.support.waiting import HANG_S

SMALL = ("--tiny", "--device", "cpu", "--size", "128x96", "--threads", "1", "--queries", "256")
ROOT_VARIABLE = "LIVESFM_MAST3R_ROOT"
QUICK = ("--seconds", "0.1", "--repeats", "1")
Bench = Callable[..., str]  # options to what is printed


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    """The tool in this process: loading PyTorch once more takes longer than what it does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        tool = importlib.import_module("bench_mast3r")

        def run(*options: str) -> str:
            with redirect_stdout(io.StringIO()) as printed:
                tool.main([*SMALL, *QUICK, *options])
            return printed.getvalue()

        yield run


@pytest.fixture(scope="module")
def report(bench: Bench) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(
        bench("--batches", "1,2", "--precision", "float32", "--json")
    )
    return figures


@pytest.mark.slow
def test_every_batch_is_measured_without_and_with_points(report: dict[str, Any]) -> None:
    measured = [(pairs["batch"], pairs["with_points"]) for pairs in report["pairs"]]
    assert measured == [(1, False), (1, True), (2, False), (2, True)]
    assert [pairs["decoded_together"] for pairs in report["pairs"]] == [1, 1, 2, 2]
    assert [encode["batch"] for encode in report["encodes"]] == [1, 2]
    assert all(pairs["num_matches"] > 0 for pairs in report["pairs"])


@pytest.mark.slow
def test_rates_follow_from_times(report: dict[str, Any]) -> None:
    for pairs in report["pairs"]:
        timing = pairs["per_pair"]
        assert 0 < timing["least_s"] <= timing["median_s"] <= timing["most_s"]
        assert timing["cpu_s"] > 0
        assert pairs["pairs_per_s"] * timing["median_s"] == pytest.approx(1.0)
        assert 0 < pairs["pairs_per_s_with_encoding"] < pairs["pairs_per_s"]
    for timing in [report["describe"], *(each["per_keyframe"] for each in report["encodes"])]:
        assert timing["median_s"] > 0


@pytest.mark.slow
def test_shares_are_of_one_whole_and_points_cost_only_where_they_are_wanted(
    report: dict[str, Any],
) -> None:
    for pairs in report["pairs"]:
        shares = pairs["shares"]
        assert sum(shares.values()) == pytest.approx(1.0)
        assert min(shares.values()) >= 0.0
        assert min(shares[part] for part in ("decoder", "descriptors_head", "matching")) > 0.0
        assert (shares["points_head"] > 0.0) == pairs["with_points"]


@pytest.mark.slow
def test_the_share_of_the_hardware_s_rate_follows_from_the_work(report: dict[str, Any]) -> None:
    assert report["matrix_tflops"] > 0
    assert 0 < report["pair_gflop"] < report["pair_with_points_gflop"]
    for pairs in report["pairs"]:
        gflop = report["pair_with_points_gflop" if pairs["with_points"] else "pair_gflop"]
        assert pairs["network_tflops"] == pytest.approx(gflop / pairs["per_pair"]["cpu_s"] / 1e3)
        achieved = pairs["network_tflops"] / report["matrix_tflops"]
        assert pairs["matrix_rate_share"] == pytest.approx(achieved)


@pytest.mark.slow
def test_what_was_measured_is_told(report: dict[str, Any]) -> None:
    assert (report["width"], report["height"], report["queries"]) == (128, 96, 256)
    assert report["precision"] == "float32"
    assert report["num_threads"] == 1
    assert report["weights"] == "random weights, tiny"
    assert report["pairs"][-1]["memory"]["peak_rss_mb"] > 100
    assert report["upstream"] == []
    assert report["agreement"] is None


@pytest.mark.slow
def test_random_weights_are_the_same_in_every_type_and_nothing_overflows(bench: Bench) -> None:
    inputs = importlib.import_module("mast3r_bench.inputs")
    shape = replace(inputs.TINY, dpt_layer_dims=(6, 8, 10, 12), dpt_feature_dim=16, dpt_last_dim=8)
    network = inputs.random_network(shape, device="cpu", dtype=torch.float16)
    exact = inputs.random_network(shape, device="cpu", dtype=torch.float32)
    for name, weight in exact.state_dict().items():
        rounded = network.state_dict()[name].float()
        torch.testing.assert_close(rounded, weight, atol=1e-7, rtol=1e-3)
    images = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    tokens = network.encode(images)
    views = network.decode(tokens[:1], tokens[1:], grid1=(3, 4), grid2=(3, 4), with_points=True)
    for view in views:
        for maps in (view.descriptors, view.descriptor_confidence, view.points3D, view.confidence):
            assert maps.isfinite().all()


@pytest.mark.slow
def test_photos_can_be_matched_and_the_table_is_one(bench: Bench, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name, size in (("a.png", (200, 160)), ("b.png", (96, 300))):
        assert cv2.imwrite(str(tmp_path / name), random.integers(0, 255, (*size, 3), np.uint8))
    (tmp_path / "c.txt").write_text("no image")
    printed = bench("--batches", "1", "--images", str(tmp_path))
    rows = [line.split("│")[1].strip() for line in printed.splitlines() if "│" in line]
    assert rows == ["describe", "encode", "pair", "pair with points"]
    with pytest.raises(SystemExit, match="has 2 images, 3 are needed"):
        bench("--batches", "2", "--images", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("batches", ["1,none", "0", "", "-1"])
def test_batches_are_numbers(
    bench: Bench, batches: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench(f"--batches={batches}")
    assert "expected numbers like 1,8,32" in capsys.readouterr().err


@pytest.mark.slow
def test_it_starts_as_a_command_and_refuses_images_of_broken_patches() -> None:
    result = subprocess.run(
        [sys.executable, str(TOOLS / "bench_mast3r.py"), "--size", "100x96"],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )
    assert result.returncode != 0
    assert "expected multiples of 16" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_upstream_s_own_code_is_measured_beside_and_finds_the_same(bench: Bench) -> None:
    root = os.environ.get(ROOT_VARIABLE)
    if not root:
        pytest.skip(f"{ROOT_VARIABLE} names no checkout of upstream's MASt3R")
    printed = bench("--batches", "1,2", "--precision", "float32", "--json", "--upstream", root)
    report = json.loads(printed)
    assert [each["batch"] for each in report["upstream"]] == [1, 2]
    for each, pairs in zip(report["upstream"], report["pairs"][::2], strict=True):
        assert each["ratio"] == pytest.approx(pairs["pairs_per_s"] / each["pairs_per_s"])
        assert 0 < each["matching_share"] < 1
    assert report["agreement"]["num_upstream"] > 0
    assert report["agreement"]["share"] >= 0.99
