"""A benchmark in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from adapters.benchmark.figures import Spread
from adapters.benchmark.results import BenchmarkResult, DatasetResult, PipelineResult, cpu_ratio
from adapters.benchmark.scoring import RIGHT_RATIO

_LEAST_STAGE = 0.01  # of all CPU; stages of less are not listed

Cells = Callable[[dict[str, Spread]], str]


def report(result: BenchmarkResult, *, plots: Sequence[str] = ()) -> str:
    """The whole page.

    Args:
        result: what was measured.
        plots: names of pictures beside the page.
    """
    lines = ["# LiveSfM benchmark", "", *_how_it_ran(result)]
    if len(result.datasets) > 1:
        lines += ["", *_overview(result.datasets)]
    for dataset in result.datasets:
        lines += ["", *_section(dataset)]
    for plot in plots:
        lines += ["", f"![{plot.removesuffix('.png').replace('_', ' ')}]({plot})"]
    lines += ["", *_explanations()]
    return "\n".join(lines) + "\n"


def _how_it_ran(result: BenchmarkResult) -> list[str]:
    machine = result.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    memory = "" if machine.memory_gb is None else f", {machine.memory_gb:g} GB"
    loads = [
        run.load_average
        for dataset in result.datasets
        for pipeline in dataset.pipelines
        for run in pipeline.runs
    ]
    load = f"{min(loads):.1f} to {max(loads):.1f}" if loads else "-"
    environment = " ".join(f"{key}={value}" for key, value in machine.environment.items())
    lines = [
        f"    {result.command}",
        "",
        f"- {result.began_at}; each pipeline run {_times(result.num_runs)}, by turns, in"
        f" processes of their own, on {result.num_threads} processors",
        f"- {machine.processor}, {machine.num_processors} processors{memory}, {machine.system}",
        f"- load average before the runs: {load}",
        f"- Python {machine.python}, {versions}" + (f"; {environment}" if environment else ""),
    ]
    if not result.is_complete:
        lines += ["", "**Interrupted: not all runs were made.**"]
    return lines


def _times(num: int) -> str:
    return "once" if num == 1 else f"{num} times"


def _overview(datasets: Sequence[DatasetResult]) -> list[str]:
    """LiveSfM's pipelines beside the peer that they are compared with, a row each."""
    lines = [
        "| dataset | pipeline | CPU s | right | ATE | peer | CPU s | right | ATE | ratio |",
        f"|---|---|{'---:|' * 3}---|{'---:|' * 4}",
    ]
    for dataset in datasets:
        reference_pipeline = dataset.reference_pipeline()
        for pipeline in dataset.pipelines:
            if pipeline.is_peer:
                continue
            peer = ["-"] * 5
            if reference_pipeline is not None:
                ratio = _ratio(cpu_ratio(pipeline, reference_pipeline))
                peer = [reference_pipeline.name, *_in_short(reference_pipeline), ratio]
            cells = [dataset.name, _name(pipeline, None), *_in_short(pipeline), *peer]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _in_short(pipeline: PipelineResult) -> list[str]:
    """CPU, cameras in their right place (without a reference: registered), error."""
    figures = pipeline.spreads()
    is_compared = "num_right" in figures
    right = _MAIN_COLUMNS["right" if is_compared else "registered"](figures)
    return [
        _figure("cpu_s", ".1f")(figures),
        right if is_compared else f"{right} registered",
        _error("ate")(figures),
    ]


def _section(dataset: DatasetResult) -> list[str]:
    reference_pipeline = dataset.reference_pipeline()
    reference = f"{dataset.reference} ({dataset.reference_kind})" if dataset.reference else "none"
    lines = [f"## {dataset.name}", "", f"`{dataset.source}`; reference: {reference}"]
    if dataset.peer_images:
        lines[-1] += f"; peers get {dataset.peer_images}"
    lines += ["", *_table(_MAIN_COLUMNS, dataset.pipelines, reference_pipeline)]
    live = [each for each in dataset.pipelines if each.median("first_map_s") is not None]
    if live:
        lines += ["", *_table(_LIVE_COLUMNS, live, None)]
    stages = list(_stage_lines(dataset.pipelines))
    failures = list(_failure_lines(dataset.pipelines))
    return [*lines, *([""] if stages or failures else []), *stages, *failures]


def _table(
    columns: dict[str, Cells],
    pipelines: Sequence[PipelineResult],
    reference_pipeline: PipelineResult | None,
) -> list[str]:
    has_ratio = reference_pipeline is not None
    names = list(columns)
    head = ["pipeline", names[0], *(["ratio"] if has_ratio else []), *names[1:]]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for pipeline in pipelines:
        figures = pipeline.spreads()
        cells = [of(figures) for of in columns.values()]
        if reference_pipeline is not None:
            cells.insert(1, _ratio(cpu_ratio(pipeline, reference_pipeline)))
        lines.append(f"| {_name(pipeline, reference_pipeline)} | {' | '.join(cells)} |")
    return lines


def _name(pipeline: PipelineResult, reference_pipeline: PipelineResult | None) -> str:
    verdicts = sorted({run.verdict for run in pipeline.runs} - {"", "good"})
    said = f" ({', '.join(verdicts)})" if verdicts else ""
    is_reference = reference_pipeline is not None and pipeline.name == reference_pipeline.name
    return f"**{pipeline.name}**" if is_reference else f"{pipeline.name}{said}"


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"1/{1 / ratio:.2f}" if ratio < 1 else f"{ratio:.2f}"


def _figure(name: str, form: str = ".3g") -> Cells:
    """The median, and smallest and largest where they differ from it."""

    def cell(figures: dict[str, Spread]) -> str:
        spread = figures.get(name)
        if spread is None:
            return "-"
        values = [format(value, form) for value in (spread.smallest, spread.largest)]
        median = format(spread.median, form)
        return median if values == [median, median] else f"{median} ({' to '.join(values)})"

    return cell


def _of(name: str, whole: str) -> Cells:
    def cell(figures: dict[str, Spread]) -> str:
        text = _figure(name, ".0f")(figures)
        return text if whole not in figures else f"{text} of {figures[whole].median:.0f}"

    return cell


def _several(names: Sequence[str], form: str) -> Cells:
    """Medians of several figures, with slashes between them."""

    def cell(figures: dict[str, Spread]) -> str:
        if not any(name in figures for name in names):
            return "-"
        parts = (figures.get(name) for name in names)
        return " / ".join("-" if part is None else format(part.median, form) for part in parts)

    return cell


def _error(name: str) -> Cells:
    def cell(figures: dict[str, Spread]) -> str:
        if name not in figures:
            return "-"
        return f"{_figure(f'{name}_percent', '.3f')(figures)} % = {figures[name].median:.3g}"

    return cell


def _latencies(kind: str) -> Cells:
    return _several([f"{kind}_{label}_ms" for label in ("p50", "p95", "p99", "max")], ".0f")


_MAIN_COLUMNS: dict[str, Cells] = {
    "CPU s": _figure("cpu_s", ".1f"),
    "wall s": _figure("wall_s", ".1f"),
    "peak MB": _figure("peak_rss_mb", ".0f"),
    "registered": _of("num_registered", "num_given"),
    "right": _of("num_right", "num_referenced"),
    "ATE": _error("ate"),
    "ATE causal": _error("ate_causal"),
    "AUC@5/10/30": _several(["auc_5_deg", "auc_10_deg", "auc_30_deg"], ".3f"),
    "points": _figure("num_points3D", ".0f"),
    "track": _figure("mean_track_length", ".2f"),
    "px": _figure("mean_reprojection_error_px", ".3f"),
}
_LIVE_COLUMNS: dict[str, Cells] = {
    "first map s": _figure("first_map_s", ".2f"),
    "arrival to pose, ms": _latencies("latency"),
    "the same after the first map": _latencies("mapped_latency"),
    "arrival to registered keyframe, ms": _latencies("keyframe_latency"),
}


def _stage_lines(pipelines: Sequence[PipelineResult]) -> Iterator[str]:
    for pipeline in pipelines:
        stages = pipeline.whole_runs[-1].stages_cpu_s if pipeline.whole_runs else {}
        least_s = _LEAST_STAGE * sum(stages.values())
        named = {name: cpu_s for name, cpu_s in stages.items() if cpu_s >= least_s}
        if named:
            parts = ", ".join(f"{name} {cpu_s:.2g}" for name, cpu_s in named.items())
            yield f"- {pipeline.name}, CPU s of its last run: {parts}"


def _failure_lines(pipelines: Sequence[PipelineResult]) -> Iterator[str]:
    for pipeline in pipelines:
        for run in pipeline.runs:
            if run.failure:
                yield f"- {pipeline.name}, round {run.round_number}: **{run.failure}**"


def _explanations() -> list[str]:
    return [
        "CPU is user and system time of the process and its children, peak the resident memory of"
        " its largest process, both measured from outside. A ratio is CPU over that of the"
        " pipeline in bold, the cheapest of the peers with most cameras in their right place"
        " (without a reference: registered); it is the median over rounds. Other figures are"
        " medians, with the smallest and the largest where they differ. Registered: of LiveSfM's"
        f" keyframes, or of the images that a peer got. Right: within {RIGHT_RATIO:.0%} of the"
        " extent of the reference after the similarity that most cameras agree on, of frames with"
        " a reference. ATE: RMSE of camera centres after the best similarity, in percent of the"
        " extent and in units of the reference; causal: of poses as they were first reported."
        " AUC: of relative poses, missing ones counted. Latencies: p50 / p95 / p99 / max; frames"
        " of files wait for the engine."
    ]
