"""Dense maps of whole runs of the town against its true surfaces: loops, resumes, pointmaps."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from adapters import cli
from adapters.exports.dense_ply import read_dense_ply_header, similarity_onto
from adapters.town.source import SyntheticTown, parse_town_spec
from engine.geometry import transform_points
from engine.output.depth_store import DepthStore
from engine.types import FrameId
from tests.support.fake_runs import Written
from tests.support.paths import ROOT
from tests.support.waiting import block_until

TOWN = "synthetic:town?path=orbit&width=320&height=240&frames=52"
SETTINGS = ("dense.max_cpu_share=0.9", "dense.orthophoto=false")
_VERTEX = np.dtype([("xyz", "<f4", 3), ("normal", "<f4", 3), ("rgb", "u1", 3)])

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("towns_painted_once")]


def livesfm(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def run_arguments(out: Path, *settings: str) -> list[str]:
    sets = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    places = ["--out", str(out), "--view", "none", "--quiet"]
    return ["run", TOWN, "--config", "drone_video", *places, *sets]


def share_on_surfaces(path: Path, *, num_voxels: float) -> float:
    """The share of a run's dense points that lie so near to the town's true surfaces."""
    town = SyntheticTown(
        parse_town_spec(TOWN), next_frame_id=(FrameId(i) for i in itertools.count(1)).__next__
    )
    every = [pose for _, pose in town.ground_truth()]
    rows = Written.read(path).rows  # what a kill lost has come again under another id
    true_poses = {int(row["frame_id"]): every[int(row["index"])] for row in rows}
    ply = path / "products" / "dense.ply"
    header = read_dense_ply_header(ply)
    onto = similarity_onto(header, true_poses)
    assert onto is not None
    store = DepthStore(lambda: path)
    stored = [points for i in store.frame_ids() if (points := store.points(i)) is not None]
    scale = float(np.cbrt(np.linalg.det(onto[:, :3])))
    voxel_m = scale * float(np.median(np.concatenate([one.sampling for one in stored])))
    xyz = np.fromfile(ply, _VERTEX, offset=header.num_bytes)["xyz"].astype(np.float64)
    off_m = town.layout.distances_m(transform_points(onto, xyz))
    assert len(off_m) > 5000
    return float(np.mean(off_m <= num_voxels * voxel_m))


def num_stored(path: Path) -> int:
    return len(list((path / "dense").glob("*.npz")))


@contextmanager
def started(arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "adapters.cli", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_run_that_is_killed_goes_on_with_its_depth_and_closes_its_loop(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with started(run_arguments(path)) as process:
        block_until(
            lambda: num_stored(path) >= 6 or process.poll() is not None, what="depth of keyframes"
        )
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    stored = {name: name.stat().st_mtime_ns for name in (path / "dense").glob("*.npz")}
    assert len(stored) >= 6
    assert not (path / "summary.json").exists()

    resumed = livesfm("resume", path, "--view", "none", "--quiet")
    assert resumed.exit_code == 0, resumed.output
    written = Written.read(path)
    assert written.of_kind("LoopClosed")
    figures = written.summary["dense"]
    num_registered = written.summary["registered_keyframes"]
    assert num_registered > 15
    # The end of a run waits for depth for some seconds only, which a busy machine may take.
    assert figures["keyframes_with_depth"] >= 0.8 * num_registered
    assert figures["keyframes_without"].keys() <= {"end_of_run"}
    kept = [name for name, time_ns in stored.items() if name.stat().st_mtime_ns == time_ns]
    assert len(kept) > len(stored) / 2, "depth of before the kill is used again"
    assert share_on_surfaces(path, num_voxels=2.0) >= 0.98
    assert share_on_surfaces(path, num_voxels=0.05) < 0.9  # the truth is no copy


def test_the_depth_that_a_matcher_sees_is_that_of_the_dense_map(tmp_path: Path) -> None:
    path = tmp_path / "run"
    matcher = ("matching.matcher=oracle", "oracle.noise_px=0.5", "oracle.depth_noise_ratio=0.01")
    result = livesfm(*run_arguments(path, *matcher, "sources.max_frames=24"))
    assert result.exit_code in (0, cli.DOUBTED), result.output
    estimated = Written.read(path).of_kind("DepthEstimated")
    assert len(estimated) >= 8
    seen = [one for one in estimated if "as the matcher sees it" in one["reason"]]
    assert len(seen) == len(estimated)
    assert share_on_surfaces(path, num_voxels=2.0) >= 0.98
