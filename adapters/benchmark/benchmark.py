"""Runs pipelines on datasets, by turns, and writes what was measured after each run."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from adapters.benchmark.colmap_pipeline import STAGES_FILE
from adapters.benchmark.datasets import Dataset, PeerImages, find_dataset, images_for_peers
from adapters.benchmark.figures import Figures
from adapters.benchmark.machine import load_average, this_machine
from adapters.benchmark.measuring import Usage, last_line, measure, usable_processors
from adapters.benchmark.pipelines import Colmap, LiveSfm, Pipeline, options_for, pipelines_for
from adapters.benchmark.report import report
from adapters.benchmark.results import (
    BenchmarkResult,
    DatasetResult,
    MeasuredRun,
    PipelineResult,
)
from adapters.benchmark.scoring import score_model, score_run
from engine.errors import ConfigError, EngineError

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
        ConfigError: a dataset, a reference, a configuration or a peer does not exist, nothing is
            to be run, or ``out`` holds a benchmark that may not be replaced.
    """
    if (out / JSON_FILE).exists() and not overwrite:
        raise ConfigError(f"{out}: holds a benchmark; --overwrite replaces it")
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


def run_benchmark(plan: Plan) -> Path:
    """Measures everything, round by round: every pipeline once on a dataset, then again.

    ``benchmark.json`` and ``benchmark.md`` are written anew after each run, so that those of a
    benchmark that is interrupted hold what was measured.

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
    for dataset, pipelines in plan.datasets:
        session = _Session(plan, dataset, pipelines)
        others = result.datasets
        for measured in session.results():
            result = replace(result, datasets=(*others, measured))
            write_reports(result, plan.out)
        session.close()
    result = replace(result, is_complete=True)
    write_reports(result, plan.out)
    return plan.out / MARKDOWN_FILE


def write_reports(result: BenchmarkResult, out: Path) -> None:
    """Writes the JSON and the Markdown file, each in one step."""
    _replace(out / JSON_FILE, json.dumps(result.as_record(), indent=1) + "\n")
    _replace(out / MARKDOWN_FILE, report(result))


class _Session:
    """All runs on a dataset."""

    def __init__(self, plan: Plan, dataset: Dataset, pipelines: Sequence[Pipeline]) -> None:
        self._plan = plan
        self._dataset = dataset
        self._pipelines = pipelines
        self._work = plan.out / "work" / dataset.name
        self._images: PeerImages | None = None
        if any(pipeline.is_peer for pipeline in pipelines):
            folder = self._work / "frames"
            self._images = images_for_peers(dataset, step=plan.peer_step, folder=folder)
            if dataset.reference is not None:  # refuse one that fits nothing before hours of work
                dataset.reference.of(self._images.frames)

    def results(self) -> Iterator[DatasetResult]:
        """The result after each run."""
        reference = self._dataset.reference
        result = DatasetResult(
            name=self._dataset.name,
            source=str(self._dataset.source),
            reference="" if reference is None else str(reference.path),
            reference_kind="" if reference is None else reference.kind.value,
            peer_images=_in_words(self._images),
            pipelines=tuple(
                PipelineResult(name=pipeline.name, is_peer=pipeline.is_peer)
                for pipeline in self._pipelines
            ),
        )
        for number in range(1, self._plan.num_runs + 1):
            for pipeline in self._pipelines:
                logger.warning(
                    "%s, round %d of %d: %s",
                    self._dataset.name,
                    number,
                    self._plan.num_runs,
                    pipeline.name,
                )
                result = result.with_run(pipeline.name, self._run(pipeline, number))
                yield result

    def close(self) -> None:
        """Deletes what need not be kept."""
        if not self._plan.keep:
            shutil.rmtree(self._work, ignore_errors=True)

    def _run(self, pipeline: Pipeline, number: int) -> MeasuredRun:
        """One run, measured and scored."""
        work = self._work / f"{pipeline.name}-{number}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        log = work / "log.txt"
        run = MeasuredRun(
            round_number=number,
            command=shlex.join(command := self._command(pipeline, work)),
            began_at=_now(),
            load_average=load_average(),
        )
        usage = measure(
            command,
            log=log,
            watched=work / pipeline.watched if pipeline.watched else None,
            num_threads=self._plan.num_threads,
            limit_s=self._plan.limit_s,
        )
        if usage is None:
            return replace(run, failure=f"killed after {self._plan.limit_s:.0f} s")
        run = replace(run, exit_code=usage.exit_code)
        if not _has_ended(pipeline, work, usage.exit_code):
            run = replace(run, failure=f"exit code {usage.exit_code}: {last_line(log)}")
            return replace(run, figures=_figures(usage, {}))
        try:
            run = self._scored(pipeline, work, usage, run)
        except EngineError as error:
            return replace(run, failure=f"not scored: {error}", figures=_figures(usage, {}))
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
            raise RuntimeError("no peer gets this dataset")
        return self._images

    def _scored(
        self, pipeline: Pipeline, work: Path, usage: Usage, run: MeasuredRun
    ) -> MeasuredRun:
        reference = self._dataset.reference
        if isinstance(pipeline, Colmap):
            frames = self._peer_images.frames
            figures = score_model(work, frames=frames, reference=reference)
            stages = json.loads((work / STAGES_FILE).read_text(encoding="utf-8"))
            return replace(
                run,
                figures=_figures(usage, figures),
                stages_cpu_s={name: seconds["cpu_s"] for name, seconds in stages.items()},
            )
        score = score_run(work / "run", reference=reference, samples=usage.samples)
        return replace(
            run,
            figures=_figures(usage, score.figures),
            verdict=score.verdict,
            costs=score.costs,
        )


def _has_ended(pipeline: Pipeline, work: Path, exit_code: int) -> bool:
    """Whether a pipeline came to its end, with or without a map."""
    if isinstance(pipeline, LiveSfm):
        return exit_code in _ENDED and (work / "run" / "summary.json").is_file()
    return exit_code == 0


def _figures(usage: Usage, scored: Mapping[str, float]) -> Figures:
    return Figures(cpu_s=usage.cpu_s, wall_s=usage.wall_s, peak_rss_mb=usage.peak_rss_mb, **scored)


def _in_words(images: PeerImages | None) -> str:
    if images is None:
        return ""
    which = "all" if images.step == 1 else f"every {images.step}th of the"
    return f"{which} frames, {len(images.frames)}, cameras {images.camera_mode}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _replace(path: Path, text: str) -> None:
    """Writes a file so that it is the former or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
