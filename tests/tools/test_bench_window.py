"""The window bench: its one JSON object, and its tracks and error figures."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from engine.errors import ConfigError
from engine.geometry import compose_poses
from engine.types import Features, Float64Array, FrameId
from engine.windows.model import WindowSolverConfig
from engine.windows.solver import solve_window
from tests.support.paths import TOOLS
from tests.support.window_scenes import FOCAL_PX, arc_scene

TOOL = TOOLS / "bench_window.py"
REPORTED = {
    "mean_reprojection_px": (0.4, 0.526),
    "num_observations": (15_680, 16_502),
    "num_points": (2_537, 2_647),
    "centre_error_median_pct_shared_focal": (0.02, 0.11),
    "centre_error_median_pct_per_frame_focal": (0.1, 0.41),
    "cpu_s": (0.01, 60.0),  # how fast the machine is today is no test's business
}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_window", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_window"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_json_is_one_object_with_the_figures_of_the_recorded_window(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    once = functools.partial(bench.measure_golden, num_timed=1)  # how fast is not asked
    monkeypatch.setattr(bench, "measure_golden", once)
    monkeypatch.setattr(bench, "upstream_solver", lambda root: bench.native_solver)
    bench.main(["--json"])
    figures: dict[str, Any] = json.loads(capsys.readouterr().out)
    for name, (low, high) in REPORTED.items():
        assert low < figures[name] <= high, name
    assert figures["upstream"].keys() == figures.keys() - {"upstream"}


def test_upstream_takes_part_where_it_is_installed_only(bench: ModuleType, tmp_path: Path) -> None:
    assert bench.upstream_solver(None) is None
    with pytest.raises(ConfigError, match="no checkout"):
        bench.upstream_solver(tmp_path)


def test_a_window_that_is_not_solved_has_no_centre_error(bench: ModuleType) -> None:
    scene = arc_scene()
    blind = scene.problem(is_visible=np.zeros_like(scene.is_visible))
    assert bench.median_error_pct(bench.native_solver(blind), scene.poses) is None


def test_centre_errors_do_not_see_a_similarity_and_frames_that_are_wrong_stay_alone(
    bench: ModuleType,
) -> None:
    poses = arc_scene().poses
    turn = np.column_stack([np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]]), [1.0, 2.0, 3.0]])
    moved = compose_poses(poses, turn)
    moved[:, :, 3] *= 7.0
    assert bench.centre_errors_pct(moved, poses).max() < 1e-9
    moved[3, :, 3] += 20.0
    errors_pct = bench.centre_errors_pct(moved, poses, num_reweightings=50)
    assert errors_pct[3] > 20.0
    assert np.delete(errors_pct, 3).max() < 0.5


def features(num: int, *, frame_id: int) -> Features:
    return Features(
        frame_id=FrameId(frame_id),
        keypoints_xy=100.0 * frame_id + np.arange(2.0 * num).reshape(num, 2),
        descriptors=np.zeros((num, 0), np.uint8),
        scales=np.ones(num, np.float32),
        colors=np.zeros((num, 3), np.uint8),
    )


def rows(*pairs: tuple[int, int]) -> Any:
    return np.array(pairs)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_tracks_join_matches_and_leave_out_those_with_two_places_in_a_frame(
    bench: ModuleType, order: Sequence[int]
) -> None:
    described = [features(4, frame_id=number) for number in (1, 2, 3)]
    matches = [
        ((0, 1), rows((0, 0), (1, 1), (2, 2))),
        ((1, 2), rows((0, 0), (1, 1))),
        ((0, 2), rows((3, 1))),  # frame 0 meets itself: rows 1 and 3
    ]
    tracks = bench.tracks_of(described, dict(matches[idx] for idx in order), num_frames=3)
    seen = {tuple(column) for column in tracks.is_visible.T.tolist()}
    assert seen == {(True, True, True), (True, True, False)}
    long = int(tracks.is_visible.all(axis=0).argmax())
    expected = [described[idx].keypoints_xy[0] for idx in range(3)]
    assert tracks.tracks_xy[:, long].tolist() == np.array(expected).tolist()


def test_a_row_tells_what_became_of_a_window(bench: ModuleType) -> None:
    scene = arc_scene()
    problem = scene.problem(focal_px=np.array([FOCAL_PX]))
    poses: dict[int, Float64Array] = dict(enumerate(scene.poses))
    row = bench.folder_row(problem, solve_window(problem, WindowSolverConfig()), poses)
    assert row["status"] == "solved"
    assert row["num_within_2_pct"] == row["num_compared"] == row["num_valid_frames"] == 8
    blind = scene.problem(is_visible=np.zeros_like(scene.is_visible))
    row = bench.folder_row(blind, solve_window(blind, WindowSolverConfig()), poses)
    assert row["status"] == "too_few_frames"
    assert "centre_error_median_pct" not in row
    json.dumps(row)


def test_tum_poses_are_read_as_cam_from_world(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "poses.txt"
    path.write_text("# a comment\n3 1 2 3 0 0 0 1\n5 0 0 0 0 0 0.70710678 0.70710678\n")
    poses = bench.read_poses(path)
    assert sorted(poses) == [3, 5]
    assert poses[3][:, 3].tolist() == [-1.0, -2.0, -3.0]
    assert poses[5][:, :3] == pytest.approx(
        np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1.0]]), abs=1e-7
    )
