"""What a benchmark measured, as ``benchmark.json`` holds it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from adapters.benchmark.figures import Figures, Spread, spreads
from adapters.benchmark.machine import Machine
from adapters.benchmark.scoring import CostPoint


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """One run of a pipeline."""

    round_number: int  # from 1; runs of a round were side by side
    command: str
    began_at: str  # ISO 8601
    load_average: float  # over the minute before it
    exit_code: int | None = None  # None: killed at the limit of time
    failure: str = ""  # in words; "": it came to its end
    figures: Figures | None = None  # None: killed
    stages_cpu_s: dict[str, float] = field(default_factory=dict)  # empty: the pipeline is silent
    verdict: str = ""  # of LiveSfM on its map; "": none
    costs: tuple[CostPoint, ...] = ()  # of LiveSfM


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineResult:
    """All runs of a pipeline on a dataset."""

    name: str
    is_peer: bool
    runs: tuple[MeasuredRun, ...] = ()

    @property
    def whole_runs(self) -> list[MeasuredRun]:
        """Runs that came to their end."""
        return [run for run in self.runs if not run.failure]

    def spreads(self) -> dict[str, Spread]:
        """Medians of its figures over the runs that came to their end, and their ends."""
        return spreads([run.figures for run in self.whole_runs if run.figures is not None])

    def median(self, name: str) -> float | None:
        """The median of a figure; None where no run has it."""
        spread = self.spreads().get(name)
        return None if spread is None else spread.median


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetResult:
    """All pipelines on a dataset."""

    name: str
    source: str
    reference: str  # its path; "": none
    reference_kind: str
    peer_images: str  # which frames peers get, in words; "": none do
    pipelines: tuple[PipelineResult, ...]

    def reference_pipeline(self) -> PipelineResult | None:
        """The peer that the others' CPU is divided by; None: no peer made a map.

        Of those with most cameras in their right place (without a reference: registered) the
        cheapest.
        """
        peers = [
            each
            for each in self.pipelines
            if each.is_peer and (each.median("num_registered") or 0.0) >= 2
        ]
        figure = "num_right" if self.reference else "num_registered"
        return max(
            peers,
            key=lambda each: (each.median(figure) or 0.0, -(each.median("cpu_s") or 0.0)),
            default=None,
        )

    def with_run(self, name: str, run: MeasuredRun) -> DatasetResult:
        """With one more run of a pipeline."""
        return replace(
            self,
            pipelines=tuple(
                replace(each, runs=(*each.runs, run)) if each.name == name else each
                for each in self.pipelines
            ),
        )


def cpu_ratio(result: PipelineResult, reference_pipeline: PipelineResult) -> float | None:
    """CPU over that of the reference pipeline: the median over rounds that both have ended."""
    own, theirs = _cpu_by_round(result), _cpu_by_round(reference_pipeline)
    ratios = [own[number] / theirs[number] for number in own.keys() & theirs.keys()]
    return statistics.median(ratios) if ratios else None


def _cpu_by_round(result: PipelineResult) -> dict[int, float]:
    return {
        run.round_number: run.figures.cpu_s
        for run in result.whole_runs
        if run.figures is not None and run.figures.cpu_s > 0.0
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkResult:
    """All that was measured."""

    command: str
    began_at: str  # ISO 8601
    machine: Machine
    num_runs: int  # asked for
    num_threads: int
    datasets: tuple[DatasetResult, ...]
    is_complete: bool = False

    def as_record(self) -> dict[str, Any]:
        """A JSON-able mapping: each run, and for each pipeline medians and ratios."""
        record = asdict(self)
        for dataset, dataset_record in zip(self.datasets, record["datasets"], strict=True):
            peer = dataset.reference_pipeline()
            dataset_record["reference_pipeline"] = None if peer is None else peer.name
            pairs: Sequence[tuple[PipelineResult, dict[str, Any]]] = list(
                zip(dataset.pipelines, dataset_record["pipelines"], strict=True)
            )
            for pipeline, pipeline_record in pairs:
                pipeline_record["figures"] = {
                    name: asdict(spread) for name, spread in pipeline.spreads().items()
                }
                pipeline_record["cpu_ratio"] = None if peer is None else cpu_ratio(pipeline, peer)
        return record
