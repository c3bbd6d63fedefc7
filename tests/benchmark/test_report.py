from __future__ import annotations

import json
from dataclasses import replace

import pytest

from adapters.benchmark.report import report
from adapters.benchmark.results import PipelineResult, cpu_ratio
from tests.support.benchmark_runs import measured, result_of


def pipeline(name: str, *runs: dict[str, float]) -> PipelineResult:
    return PipelineResult(
        name=name,
        is_peer=name.startswith("colmap"),
        runs=tuple(
            measured(number, failure="", **figures) for number, figures in enumerate(runs, start=1)
        ),
    )


OURS = pipeline(
    "livesfm-phone",
    {"cpu_s": 10.0, "num_right": 9, "num_referenced": 9, "num_registered": 9, "num_given": 9},
    {"cpu_s": 20.0, "num_right": 9, "num_referenced": 9, "num_registered": 9, "num_given": 9},
    {"cpu_s": 12.0, "num_right": 9, "num_referenced": 9, "num_registered": 9, "num_given": 9},
)
CHEAP = pipeline("colmap-cheap", *[{"cpu_s": 20.0, "num_right": 7, "num_registered": 9}] * 3)
RIGHT = pipeline(
    "colmap-right",
    {"cpu_s": 40.0, "num_right": 8, "num_registered": 8},
    {"cpu_s": 80.0, "num_right": 8, "num_registered": 8},
    {"cpu_s": 60.0, "num_right": 8, "num_registered": 8},
)
DEAR = pipeline("colmap-dear", *[{"cpu_s": 90.0, "num_right": 8, "num_registered": 8}] * 3)


def test_figures_of_several_runs_are_medians_with_their_ends() -> None:
    spread = OURS.spreads()["cpu_s"]
    assert (spread.median, spread.smallest, spread.largest) == (12.0, 10.0, 20.0)
    assert OURS.median("ate") is None


def test_runs_that_failed_are_in_no_figure() -> None:
    failed = replace(OURS, runs=(*OURS.runs, measured(4, failure="killed", cpu_s=1000.0)))
    assert failed.spreads()["cpu_s"].largest == 20.0


def test_the_reference_pipeline_is_the_cheapest_peer_of_those_with_most_right_cameras() -> None:
    (dataset,) = result_of(OURS, DEAR, RIGHT, CHEAP).datasets
    reference_pipeline = dataset.reference_pipeline()
    assert reference_pipeline is not None
    assert reference_pipeline.name == "colmap-right"


def test_without_a_reference_registered_cameras_count() -> None:
    (dataset,) = result_of(OURS, RIGHT, CHEAP, reference="").datasets
    reference_pipeline = dataset.reference_pipeline()
    assert reference_pipeline is not None
    assert reference_pipeline.name == "colmap-cheap"


def test_a_peer_without_a_map_is_no_reference_pipeline() -> None:
    nothing = pipeline("colmap-nothing", {"cpu_s": 1.0, "num_registered": 0, "num_right": 0})
    (dataset,) = result_of(OURS, nothing).datasets
    assert dataset.reference_pipeline() is None
    assert "ratio" not in report(result_of(OURS, nothing)).partition("CPU is user")[0]


def test_a_ratio_is_the_median_over_rounds_and_not_bent_by_load() -> None:
    assert cpu_ratio(OURS, RIGHT) == pytest.approx(0.25)
    assert cpu_ratio(RIGHT, RIGHT) == 1.0
    late = replace(RIGHT, runs=RIGHT.runs[1:])
    assert cpu_ratio(OURS, late) == pytest.approx((20 / 80 + 12 / 60) / 2), "of common rounds"
    assert cpu_ratio(OURS, replace(RIGHT, runs=())) is None


def test_the_page_has_a_row_for_each_pipeline_with_its_ratio() -> None:
    lines = report(result_of(OURS, RIGHT, CHEAP)).splitlines()
    assert any(
        line.startswith("| livesfm-phone | 12.0 (10.0 to 20.0) | 1/4.00 |") for line in lines
    )
    assert any(line.startswith("| **colmap-right** | 60.0") for line in lines)
    (ours,) = [line for line in lines if line.startswith("| livesfm-phone")]
    assert "| 9 of 9 | 9 of 9 |" in ours
    head = lines[lines.index(ours) - 2]
    assert ours.count("|") == head.count("|")


def test_several_datasets_begin_with_an_overview() -> None:
    result = result_of(OURS, RIGHT, CHEAP)
    (dataset,) = result.datasets
    bare = replace(dataset, name="bare", pipelines=(OURS,))
    lines = report(replace(result, datasets=(dataset, bare))).splitlines()
    ours = "12.0 (10.0 to 20.0) | 9 of 9 | -"
    peer = "colmap-right | 60.0 (40.0 to 80.0) | 8 | -"
    first = lines.index(f"| set | livesfm-phone | {ours} | {peer} | 1/4.00 |")
    assert lines[first + 1] == f"| bare | livesfm-phone | {ours} | - | - | - | - | - |"
    assert {line.count("|") for line in lines[first - 2 : first + 2]} == {11}
    assert "| dataset |" not in report(result)


def test_the_page_says_where_and_how_it_was_measured() -> None:
    page = report(result_of(OURS))
    for words in (
        "livesfm benchmark data/set",
        "a processor",
        "8 GB",
        "load average",
        "livesfm 1.0",
        "OMP_NUM_THREADS=1",
        "truth.txt",
        "all frames, 9, cameras SINGLE",
    ):
        assert words in page


def test_what_failed_is_named_and_an_interrupted_benchmark_says_so() -> None:
    failed = replace(RIGHT, runs=(measured(1, failure="exit code 1: no space"),))
    result = replace(result_of(OURS, failed), is_complete=False)
    page = report(result)
    assert "- colmap-right, round 1: **exit code 1: no space**" in page
    assert "**Interrupted" in page
    assert "Interrupted" not in report(result_of(OURS))


def test_latencies_are_in_a_table_of_their_own() -> None:
    live = pipeline(
        "livesfm-phone",
        {
            "first_map_s": 1.5,
            "latency_p50_ms": 11,
            "latency_p95_ms": 43,
            "latency_p99_ms": 125,
            "latency_max_ms": 200,
        },
    )
    page = report(result_of(live))
    assert "| livesfm-phone | 1.50 | 11 / 43 / 125 / 200 | - | - |" in page
    assert "first map" not in report(result_of(OURS))


def test_a_doubted_map_is_named_as_such() -> None:
    doubted = replace(OURS, runs=tuple(replace(run, verdict="doubtful") for run in OURS.runs))
    assert "| livesfm-phone (doubtful) |" in report(result_of(doubted))


def test_the_record_is_json_and_has_every_run_medians_and_ratios() -> None:
    record = json.loads(json.dumps(result_of(OURS, RIGHT).as_record()))
    dataset = record["datasets"][0]
    assert dataset["reference_pipeline"] == "colmap-right"
    ours = dataset["pipelines"][0]
    assert [run["figures"]["cpu_s"] for run in ours["runs"]] == [10.0, 20.0, 12.0]
    assert ours["figures"]["cpu_s"] == {"median": 12.0, "smallest": 10.0, "largest": 20.0}
    assert ours["cpu_ratio"] == pytest.approx(0.25)
    assert record["machine"]["versions"] == {"livesfm": "1.0"}
