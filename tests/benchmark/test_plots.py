from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from adapters.benchmark.plots import ACCURACY_FILE, COST_FILE, cost_per_keyframe, draw_plots
from adapters.benchmark.results import PipelineResult
from adapters.benchmark.scoring import CostPoint
from engine.errors import AdapterUnavailableError
from tests.support.benchmark_runs import measured, result_of


def costs(num: int, *, start_s: float, each_s: float, growth_s: float = 0.0) -> list[CostPoint]:
    """Of a run whose keyframes cost more and more."""
    cpu_s = start_s
    points = []
    for number in range(1, num + 1):
        cpu_s += each_s + growth_s * number
        points.append(CostPoint(num_keyframes=number, cpu_s=cpu_s))
    return points


def test_the_cost_of_keyframes_leaves_out_the_start() -> None:
    curve = cost_per_keyframe(costs(200, start_s=3.0, each_s=0.2))
    assert curve[:, 1] == pytest.approx(0.2)
    assert (np.diff(curve[:, 0]) > 0).all()
    assert 1 < curve[0, 0] < curve[-1, 0] < 200


def test_cost_that_grows_with_the_map_is_seen_to_grow() -> None:
    curve = cost_per_keyframe(costs(200, start_s=3.0, each_s=0.1, growth_s=0.001))
    expected = 0.1 + 0.001 * (curve[:, 0] + 0.5)
    assert curve[:, 1] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("num", [0, 1, 8])
def test_a_run_of_few_keyframes_has_no_curve(num: int) -> None:
    assert cost_per_keyframe(costs(num, start_s=1.0, each_s=0.1)).shape == (0, 2)


@pytest.mark.slow
def test_pictures_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = measured(cpu_s=12.0, ate_percent=0.1, num_right=9, num_referenced=9)
    ours = PipelineResult(
        name="livesfm-phone",
        is_peer=False,
        runs=(replace(run, costs=tuple(costs(100, start_s=1.0, each_s=0.1))),),
    )
    peer = PipelineResult(
        name="colmap", is_peer=True, runs=(measured(cpu_s=50.0, ate_percent=0.2),)
    )
    assert draw_plots(result_of(ours, peer), tmp_path) == [ACCURACY_FILE, COST_FILE]
    for name in (ACCURACY_FILE, COST_FILE):
        image = cv2.imread(str(tmp_path / name))
        assert image is not None
        assert image.std() > 5.0
    bare = PipelineResult(name="colmap", is_peer=True, runs=(measured(),))
    assert draw_plots(result_of(bare), tmp_path) == []


def test_without_matplotlib_it_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(AdapterUnavailableError, match=r"matplotlib.*benchmark"):
        draw_plots(result_of(), tmp_path)
