"""Pictures of a benchmark: accuracy against CPU, and what a keyframe costs as the map grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adapters.benchmark.results import BenchmarkResult, DatasetResult, PipelineResult
from adapters.benchmark.scoring import CostPoint
from adapters.install_advice import missing_package
from engine.types import Float64Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCURACY_FILE, COST_FILE = "accuracy_against_cpu.png", "cost_per_keyframe.png"

_NUM_BINS = 20  # of keyframes, over a run
_MIN_PER_BIN = 5  # keyframes: fewer share a sample of the CPU with others
_PANEL_INCHES = (6.4, 4.2)
_MAX_COLUMNS = 2
_DPI = 110
_OURS, _THEIRS = "tab:blue", "tab:orange"
_MARKERS = "osD^vP*X<>"


def draw_plots(result: BenchmarkResult, out: Path) -> list[str]:
    """Writes the pictures that there are figures for, and returns their names.

    Raises:
        AdapterUnavailableError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        what = "plots of livesfm benchmark"
        raise missing_package(what, package="matplotlib", extra="benchmark") from error
    kinds: list[tuple[str, list[DatasetResult], Callable[[Axes, DatasetResult], None]]] = [
        (ACCURACY_FILE, [each for each in result.datasets if _points(each)], _draw_accuracy),
        (COST_FILE, [each for each in result.datasets if _curves(each)], _draw_costs),
    ]
    for name, datasets, draw in kinds:
        if datasets:
            figure, panels = _panels(len(datasets))
            for axes, dataset in zip(panels, datasets, strict=True):
                draw(axes, dataset)
            figure.savefig(out / name, dpi=_DPI)
    return [name for name, datasets, _ in kinds if datasets]


def cost_per_keyframe(costs: Sequence[CostPoint]) -> Float64Array:
    """CPU seconds a keyframe over a run: (B, 2) rows of keyframes so far and cost around there.

    Keyframes are binned; a run of few has no row.
    """
    if len(costs) < 2:
        return np.empty((0, 2))
    counts = np.array([point.num_keyframes for point in costs])
    cpu_s = np.array([point.cpu_s for point in costs])
    num_bins = min(_NUM_BINS, int(counts[-1] - counts[0]) // _MIN_PER_BIN)
    if num_bins < 2:
        return np.empty((0, 2))
    edges = np.linspace(counts[0], counts[-1], num_bins + 1)
    per_keyframe = np.diff(np.interp(edges, counts, cpu_s)) / np.diff(edges)
    return np.column_stack([(edges[:-1] + edges[1:]) / 2, per_keyframe])


def _panels(num: int) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels."""
    from matplotlib.figure import Figure

    num_columns = min(num, _MAX_COLUMNS)
    num_rows = -(-num // num_columns)
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * num_columns, height * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for unused in axes[num:]:
        unused.set_axis_off()
    return figure, list(axes[:num])


def _points(dataset: DatasetResult) -> list[tuple[PipelineResult, float, float]]:
    """Pipelines with their CPU seconds and their error in percent."""
    found = ((each, each.median("cpu_s"), each.median("ate_percent")) for each in dataset.pipelines)
    return [(each, cpu_s, ate) for each, cpu_s, ate in found if cpu_s and ate]


def _draw_accuracy(axes: Axes, dataset: DatasetResult) -> None:
    """A point for each pipeline, as large as its share of cameras in their right place."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for number, (pipeline, cpu_s, ate) in enumerate(_points(dataset)):
        right = pipeline.median("num_right") or 0.0
        referenced = pipeline.median("num_referenced") or 1.0
        axes.scatter(
            cpu_s,
            ate,
            s=20 + 80 * right / referenced,
            color=_THEIRS if pipeline.is_peer else _OURS,
            marker=_MARKERS[number % len(_MARKERS)],
            label=f"{pipeline.name}, {right:.0f} of {referenced:.0f} right",
        )
    axes.set(xscale="log", yscale="log", xlabel="CPU s", ylabel="ATE, % of the extent")
    axes.set_title(f"{dataset.name}: better is left and below")
    axes.margins(0.3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, alpha=0.25)
    axes.legend(fontsize="x-small")


def _curves(dataset: DatasetResult) -> list[tuple[str, Float64Array]]:
    """Cost curves of LiveSfM's pipelines, of their last run that has one."""
    curves = []
    for pipeline in dataset.pipelines:
        costs = [curve for run in pipeline.whole_runs if len(curve := cost_per_keyframe(run.costs))]
        if costs:
            curves.append((pipeline.name, costs[-1]))
    return curves


def _draw_costs(axes: Axes, dataset: DatasetResult) -> None:
    for name, curve in _curves(dataset):
        axes.plot(curve[:, 0], 1000.0 * curve[:, 1], marker=".", label=name)
    axes.set(xlabel="keyframes", ylabel="CPU ms a keyframe, all threads")
    axes.set_ylim(bottom=0.0)
    axes.set_title(f"{dataset.name}: cost against the size of the map")
    axes.grid(visible=True, alpha=0.25)
    axes.legend(fontsize="x-small")
