"""The check of a GPU, tried on a CPU: what it says, what it needs, and when it says no."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.paths import ROOT, TOOLS
from tests.support.waiting import HANG_S

SMALL = ("--device", "cpu", "--small", "--queries", "32", "--seconds", "0.01", "--batches", "1")
# Runs the command where nothing can be imported but the standard library, the packages named, and
# what these need themselves.
ALONE = """
import re, runpy, sys
from importlib import metadata

def needs(name, known):
    if name in known:
        return known
    try:
        required = metadata.requires(name) or ()
    except metadata.PackageNotFoundError:
        return known
    known.add(name)
    for one in required:
        if "extra ==" not in one:
            needs(re.match(r"[\\w.-]+", one)[0].lower().replace("_", "-"), known)
    return known

allowed = set().union(*(needs(name, set()) for name in ("numpy", "torch", "safetensors")))
of_module = metadata.packages_distributions()

class Refusal:
    def find_spec(self, name, path=None, target=None):
        owners = {one.lower().replace("_", "-") for one in of_module.get(name.split(".")[0], ())}
        if owners and not owners & allowed and not owners <= {"livesfm"}:
            raise ModuleNotFoundError(f"{name} is not allowed here", name=name)

sys.meta_path.insert(0, Refusal())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def checking() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        yield importlib.import_module("gpu_checks.checking")


@pytest.mark.slow
def test_it_needs_nothing_but_numpy_and_torch_and_says_what_is_left_out() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(TOOLS / "gpu_check"), *SMALL, "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "source to pose: left out, LiveSfM is not installed here (pydantic" in done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["source_to_pose"] is None
    assert report["is_right"]
    assert all(one["is_right"] for one in report["golden"])
    stages = {one["what"].partition(":")[0].split()[-1] for one in report["golden"]}
    assert {"enc", "dec", "pts3d", "conf", "desc", "desc_conf"} <= stages
    precisions = {one["what"].split()[1] for one in report["golden"]} & {"float32", "bfloat16"}
    assert precisions == {"float32", "bfloat16"}
    assert all(one["per_s"] > 0 for one in report["speed"])
    assert {one["precision"] for one in report["speed"]} == precisions


def test_a_device_that_is_not_there_is_said_in_a_line(
    checking: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert checking.main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gpu_check: cuda is not usable here")
    assert "Traceback" not in said


@pytest.mark.slow
def test_networks_that_are_wrong_are_found(checking: ModuleType) -> None:
    golden = importlib.import_module("gpu_checks.golden")
    tiny = golden.formula_network(golden.TINY)
    tiny.dec_norm.weight.mul_(1.01)
    checks = {one.what: one for one in golden._check_stages(tiny, "tiny_LL")}
    assert checks["tiny_LL float32 enc: RMS difference"].is_right
    assert not checks["tiny_LL float32 desc: RMS difference"].is_right
    tiny.dec_norm.weight.mul_(float("nan"))
    checks = {one.what: one for one in golden._check_stages(tiny, "tiny_LL")}
    assert not checks["tiny_LL float32 desc: RMS difference"].is_right


def test_matches_of_a_device_are_compared_with_upstream_s(checking: ModuleType) -> None:
    golden = importlib.import_module("gpu_checks.golden")
    checks = list(golden.check_matching("cpu"))
    assert len(checks) == 6
    assert all(one.is_right for one in checks)
    assert golden._shared({1, 2, 3}, {2, 3, 4}) == pytest.approx(0.5)


@pytest.mark.slow
def test_a_batch_without_room_has_no_rate_and_others_go_on(
    checking: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = importlib.import_module("gpu_checks.speed")

    def measure(self: Any, work: Any, *, items: int = 1) -> Any:
        if items > 1:
            raise torch.OutOfMemoryError("no memory left")
        work()
        return type("Timing", (), {"median_s": 0.5})

    monkeypatch.setattr(speed.Stage, "measure", measure)
    monkeypatch.setattr(speed, "matrix_rate_tflops", lambda stage, tiny: 1.0)
    options = speed.SpeedOptions(
        size=(64, 48), queries=8, batches=(1, 2), seconds=0.0, is_small=True
    )
    device = speed.Device(name="cpu", dtype=torch.float32)
    _, figures = speed.measure_speed(device, options)
    assert [(one.batch, one.per_s) for one in figures] == [(1, 2.0)] * 3 + [(2, None)] * 3


@pytest.mark.parametrize(("of_stated", "is_right"), [(0.5, True), (1.5, False)])
def test_memory_is_compared_with_what_is_stated(
    checking: ModuleType, monkeypatch: pytest.MonkeyPatch, of_stated: float, is_right: bool
) -> None:
    speed = importlib.import_module("gpu_checks.speed")
    arguments = checking.parse_arguments(["--small"])
    stated = speed.stated_mb(checking._speed_options(arguments))
    assert 100 < stated < 1000
    monkeypatch.setattr(checking, "taken_mb", lambda device, options: of_stated * stated)
    assert checking._check_memory(arguments).is_right == is_right


def test_memory_of_a_processor_is_not_counted(checking: ModuleType) -> None:
    speed = importlib.import_module("gpu_checks.speed")
    options = checking._speed_options(checking.parse_arguments(["--small", "--queries", "8"]))
    assert speed.taken_mb("cpu", options) == 0.0


@pytest.mark.slow
@pytest.mark.usefixtures("towns_painted_once")
def test_a_run_poses_frames_at_the_network_s_cost(checking: ModuleType) -> None:
    poses = importlib.import_module("gpu_checks.source_to_pose")
    assert poses.missing_packages() == []
    figures = poses.measure_poses(
        poses.Device(name="cpu", dtype=torch.float32),
        size=(128, 96),
        num_frames=10,
        num_pairs=4,
        is_small=True,
    )
    assert figures.num_frames == 10
    assert figures.num_registered >= 3
    assert 0 < figures.keyframes_per_s <= figures.frames_per_s
    assert np.isfinite(figures.frames_per_s)
