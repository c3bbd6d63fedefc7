"""Runs pipelines on datasets, by turns, and writes what was measured after each run."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from adapters.benchmark.colmap_pipeline import STAGES_FILE
from adapters.benchmark.datasets import Dataset, PeerImages, find_dataset, images_for_peers
from adapters.benchmark.figures import Figures
from adapters.benchmark.machine import load_average, this_machine
from adapters.benchmark.measuring import Usage, last_line, measure, usable_processors
from adapters.benchmark.pipelines import Colmap, LiveSfm, Pipeline, options_for, pipelines_for
from adapters.benchmark.plots import draw_plots
from adapters.benchmark.report import report
from adapters.benchmark.results import (
    BenchmarkResult,
    DatasetResult,
    MeasuredRun,
    PipelineResult,
)
from adapters.benchmark.scoring import score_model, score_run
from engine.errors import AdapterUnavailableError, ConfigError, EngineError

logger = logging.getLogger(__name__)

JSON_FILE, MARKDOWN_FILE = "benchmark.json", "benchmark.md"

_ENDED = (0, 1, 3)  # exit codes of runs of LiveSfM: a map, none, one that is doubted


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be measured."""

    datasets: tuple[tuple[Dataset, tuple[Pipeline, ...]], ...]
    out: Path
    num_runs: int
    num_threads: int
    peer_step: int | None  # every so many frames of a video; None: about three a second
    limit_s: float  # a run that takes longer is killed
    keep: bool  # run folders and models of peers


def plan_of(
    paths: Sequence[Path],
    *,
    configs: Sequence[str],
    settings: Sequence[str],
    peers: Sequence[str],
    baseline: Path | None,
    only: Sequence[str],
    references: Sequence[str],
    num_runs: int,
    num_threads: int | None,
    peer_step: int | None,
    out: Path,
    overwrite: bool,
    keep: bool,
    limit_s: float,
) -> Plan:
    """What the command line asks for; see the options of ``livesfm benchmark``.

    Raises:
        ConfigError: a dataset, a configuration or a peer does not exist, a reference has none of
            the images, nothing is to be run, or ``out`` holds a benchmark that may not be replaced,
            or something else.
    """
    _refuse_unusable(out, overwrite=overwrite)
    if baseline is not None and not baseline.is_file():
        raise ConfigError(f"{baseline}: no such program")
    planned = []
    for path in paths:
        dataset = find_dataset(path)
        if asked := options_for(dataset.name, references):
            dataset = find_dataset(path, reference=Path(asked[-1]))
        pipelines = pipelines_for(
            dataset,
            configs=configs,
            settings=settings,
            peers=peers,
            baseline=None if baseline is None else baseline.absolute(),
            only=only,
        )
        if dataset.reference is not None and not dataset.is_video:
            dataset.reference.of(dataset.frames)  # raises if it has none of them
        if not pipelines:
            raise ConfigError(f"{dataset.name}: --only leaves no pipeline")
        planned.append((dataset, tuple(pipelines)))
    names = [dataset.name for dataset, _ in planned]
    if len(set(names)) < len(names):
        raise ConfigError(f"two datasets have one name: {', '.join(names)}")
    return Plan(
        datasets=tuple(planned),
        out=out.absolute(),
        num_runs=num_runs,
        num_threads=num_threads or usable_processors(),
        peer_step=peer_step,
        limit_s=limit_s,
        keep=keep,
    )


def _refuse_unusable(out: Path, *, overwrite: bool) -> None:
    """Refuses a folder with something in it, unless it is a benchmark to be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out}: is a file; a benchmark needs a folder of its own")
    if (out / JSON_FILE).exists():
        if not overwrite:
            raise ConfigError(f"{out}: holds a benchmark; --overwrite replaces it")
    elif any(out.iterdir()):
        raise ConfigError(f"{out}: is not empty and holds no benchmark; choose another folder")


def run_benchmark(plan: Plan) -> Path:
    """Measures everything, round by round: every pipeline once on a dataset, then again.

    ``benchmark.json`` and ``benchmark.md`` are written at the beginning and anew after each run, so
    that those of a benchmark that is interrupted hold what was measured.

    Raises:
        ConfigError: a dataset cannot be read, or its reference has none of its frames.
        KeyboardInterrupt: the user stopped it; what was measured is on disk.

    Returns:
        The path of the report.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    result = BenchmarkResult(
        command=shlex.join(["livesfm", *sys.argv[1:]]),
        began_at=_now(),
        machine=this_machine(),
        num_runs=plan.num_runs,
        num_threads=plan.num_threads,
        datasets=(),
    )
    write_reports(result, plan.out)
    try:
        for dataset, pipelines in plan.datasets:
            others = result.datasets
            for measured in _measure(plan, dataset, pipelines):
                result = replace(result, datasets=(*others, measured))
                write_reports(result, plan.out)
        result = replace(result, is_complete=True)
    finally:
        write_reports(result, plan.out, plots=_plots(result, plan.out))
    return plan.out / MARKDOWN_FILE


def write_reports(result: BenchmarkResult, out: Path, *, plots: Sequence[str] = ()) -> None:
    """Writes the JSON and the Markdown file, each in one step."""
    _replace(out / JSON_FILE, json.dumps(result.as_record(), indent=1) + "\n")
    _replace(out / MARKDOWN_FILE, report(result, plots=plots))


def _plots(result: BenchmarkResult, out: Path) -> list[str]:
    try:
        return draw_plots(result, out)
    except AdapterUnavailableError as error:
        logger.warning("%s", error)
        return []


def _measure(
    plan: Plan, dataset: Dataset, pipelines: Sequence[Pipeline]
) -> Iterator[DatasetResult]:
    """All runs on a dataset; yields what was measured so far after each."""
    work = plan.out / "work" / dataset.name
    images: PeerImages | None = None
    if any(isinstance(pipeline, Colmap) for pipeline in pipelines):
        images = images_for_peers(dataset, step=plan.peer_step, folder=work / "frames")
    runner = _Runner(plan, dataset, images)
    result = _result_of(dataset, pipelines, images)
    try:
        for number in range(1, plan.num_runs + 1):
            for pipeline in pipelines:
                logger.info(
                    "%s, round %d of %d: %s", dataset.name, number, plan.num_runs, pipeline.name
                )
                run = runner.run(pipeline, number, work=work / f"{pipeline.name}-{number}")
                result = result.with_run(pipeline.name, run)
                yield result
    finally:
        if not plan.keep:
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):  # it holds something else
                work.parent.rmdir()


def _result_of(
    dataset: Dataset, pipelines: Sequence[Pipeline], images: PeerImages | None
) -> DatasetResult:
    """The result before the first run."""
    reference = dataset.reference
    return DatasetResult(
        name=dataset.name,
        source=str(dataset.source),
        reference="" if reference is None else str(reference.path),
        reference_kind="" if reference is None else reference.kind.value,
        peer_images="" if images is None else images.in_words(),
        pipelines=tuple(
            PipelineResult(name=each.name, is_peer=isinstance(each, Colmap)) for each in pipelines
        ),
    )


class _Runner:
    """Runs pipelines on a dataset."""

    def __init__(self, plan: Plan, dataset: Dataset, images: PeerImages | None) -> None:
        self._plan = plan
        self._dataset = dataset
        self._images = images

    def run(self, pipeline: Pipeline, number: int, *, work: Path) -> MeasuredRun:
        """One run, measured and scored; ``work`` becomes its folder."""
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        log = self._plan.out / "logs" / f"{self._dataset.name}-{work.name}.txt"
        log.parent.mkdir(exist_ok=True)
        command = self._command(pipeline, work)
        run = MeasuredRun(
            round_number=number,
            command=shlex.join(command),
            began_at=_now(),
            load_average=load_average(),
        )
        usage = measure(
            command,
            result=work / "usage.json",
            log=log,
            watched=work / pipeline.watched if pipeline.watched else None,
            num_threads=self._plan.num_threads,
            limit_s=self._plan.limit_s,
        )
        if usage is None:
            run = replace(run, failure=f"killed after {self._plan.limit_s:.0f} s")
        else:
            run = self._scored(pipeline, work, usage, replace(run, exit_code=usage.exit_code), log)
        if not self._plan.keep:
            shutil.rmtree(work)
        return run

    def _command(self, pipeline: Pipeline, work: Path) -> list[str]:
        if isinstance(pipeline, LiveSfm):
            return pipeline.command(self._dataset, work)
        return pipeline.command(self._peer_images, work, num_threads=self._plan.num_threads)

    @property
    def _peer_images(self) -> PeerImages:
        if self._images is None:
            raise RuntimeError("peers get no images")
        return self._images

    def _scored(
        self, pipeline: Pipeline, work: Path, usage: Usage, run: MeasuredRun, log: Path
    ) -> MeasuredRun:
        """With its figures, or why it has none."""
        run = replace(run, figures=_figures(usage, {}))
        try:
            if not _has_ended(pipeline, work, usage.exit_code):
                said = last_line(log)
                return replace(run, failure=f"exit code {usage.exit_code}: {said}")
            if isinstance(pipeline, Colmap):
                return self._with_models(work, usage, run)
            score = score_run(work / "run", dataset=self._dataset, samples=usage.samples)
        except EngineError as error:
            return replace(run, failure=f"cannot be scored: {error}")
        return replace(
            run,
            figures=_figures(usage, score.figures),
            verdict=score.verdict,
            stages_cpu_s=score.stages_cpu_s,
            costs=score.costs,
        )

    def _with_models(self, work: Path, usage: Usage, run: MeasuredRun) -> MeasuredRun:
        frames, reference = self._peer_images.frames, self._dataset.reference
        stages = json.loads((work / STAGES_FILE).read_text(encoding="utf-8"))
        return replace(
            run,
            figures=_figures(usage, score_model(work, frames=frames, reference=reference)),
            stages_cpu_s={name: seconds["cpu_s"] for name, seconds in stages.items()},
        )


def _has_ended(pipeline: Pipeline, work: Path, exit_code: int) -> bool:
    """Whether a pipeline came to its end, with or without a map."""
    if isinstance(pipeline, LiveSfm):
        return exit_code in _ENDED and (work / "run" / "summary.json").is_file()
    return exit_code == 0


def _figures(usage: Usage, scored: Mapping[str, float]) -> Figures:
    return Figures(cpu_s=usage.cpu_s, wall_s=usage.wall_s, peak_rss_mb=usage.peak_rss_mb, **scored)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _replace(path: Path, text: str) -> None:
    """Writes a file so that it is the former or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
