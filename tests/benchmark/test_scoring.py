from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.benchmark.datasets import Dataset
from adapters.benchmark.measuring import Sample
from adapters.benchmark.references import Reference, ReferenceKind, ReferencePoses
from adapters.benchmark.scoring import RIGHT_RATIO, count_right, score_model, score_run
from engine.errors import ConfigError
from engine.geometry import camera_center, rotation_from_vector
from engine.types import Float64Array
from tests.support.benchmark_runs import ring, rows, write_model, write_run, write_tum

NUM = 20


def displaced(poses: Float64Array, offsets: dict[int, Float64Array]) -> Float64Array:
    """Poses with some centres moved."""
    moved = poses.copy()
    for row, offset in offsets.items():
        rotation = poses[row, :, :3]
        moved[row, :, 3] = -rotation @ (camera_center(poses[row]) + offset)
    return moved


def in_other_world(poses: Float64Array) -> Float64Array:
    """The same flight turned, shifted and scaled."""
    turn, shift = rotation_from_vector(np.array([0.3, -0.9, 0.4])), np.array([4.0, -1.0, 7.0])
    rotations = poses[:, :, :3] @ turn.T
    centers = 2.5 * camera_center(poses) @ turn.T + shift
    return np.concatenate([rotations, -(rotations @ centers[:, :, None])], axis=2)


def dataset(tmp_path: Path, true: Float64Array) -> Dataset:
    path = write_tum(tmp_path / "groundtruth.txt", dict(enumerate(true)))
    return Dataset(
        name="set",
        source=tmp_path,
        names=tuple(f"{number:03d}.png" for number in range(len(true))),
        reference=Reference(path=path, kind=ReferenceKind.POSES),
    )


def reference(poses: Float64Array) -> ReferencePoses:
    return ReferencePoses(cam_from_world=poses, has_rotations=True)


# -- cameras in their right place -----------------------------------------------------------------


def test_all_cameras_of_a_true_map_are_right_in_any_world() -> None:
    assert count_right(in_other_world(ring(NUM)), reference(ring(NUM))) == NUM


def test_cameras_elsewhere_are_wrong_and_bend_nothing() -> None:
    true = ring(NUM)
    offset = np.array([3.0, -2.0, 1.0]) * reference(true).extent
    wrong = displaced(true, {number: offset for number in range(6)})
    assert count_right(in_other_world(wrong), reference(true)) == NUM - 6


@pytest.mark.parametrize(("factor", "num_wrong"), [(0.5, 0), (2.0, 1)])
def test_the_bound_is_a_share_of_the_extent(factor: float, num_wrong: int) -> None:
    true = ring(NUM)
    offset = np.array([0.0, factor * RIGHT_RATIO * reference(true).extent, 0.0])
    assert count_right(displaced(true, {10: offset}), reference(true)) == NUM - num_wrong


def test_a_map_that_is_nowhere_right_counts_few() -> None:
    true = ring(NUM)
    rng = np.random.default_rng(0)
    offsets = {number: rng.normal(size=3) for number in range(NUM)}
    assert count_right(displaced(true, offsets), reference(true)) < NUM / 3


def test_missing_cameras_are_not_right() -> None:
    true = ring(NUM)
    estimate = true.copy()
    estimate[5:] = np.nan
    assert count_right(estimate, reference(true)) == 5
    estimate[2:] = np.nan
    assert count_right(estimate, reference(true)) == 0, "two cameras say nothing"


# -- runs of LiveSfM ------------------------------------------------------------------------------


def test_a_run_is_scored_by_its_final_and_by_its_first_poses(tmp_path: Path) -> None:
    true = ring(NUM)
    extent = reference(true).extent
    noise = np.random.default_rng(1).normal(scale=0.005 * extent / 3**0.5, size=(NUM, 3))
    live = displaced(true, dict(enumerate(noise)))
    run = write_run(tmp_path / "run", in_other_world(true), live=live)
    score = score_run(run, dataset=dataset(tmp_path, true), samples=())
    figures = score.figures
    assert figures["num_given"] == figures["num_registered"] == NUM
    assert figures["num_right"] == figures["num_referenced"] == NUM
    assert figures["ate_percent"] < 1e-6
    assert 0.25 < figures["ate_causal_percent"] < 0.75
    assert figures["auc_5_deg"] > 0.999
    assert score.verdict == "good"
    assert score.stages_cpu_s == {"match": 2.0, "map": 1.0}, "the dearest first"


def test_names_that_a_run_gives_its_images_are_those_of_their_files(tmp_path: Path) -> None:
    true = ring(NUM)
    names = [f"{number:03d}.png" for number in range(NUM)]
    model = write_model(tmp_path / "reference", dict(zip(names, true, strict=True)))
    with_model = Dataset(
        name="set",
        source=tmp_path,
        names=tuple(names),
        reference=Reference(path=model, kind=ReferenceKind.MODEL),
    )
    run = write_run(tmp_path / "run", true, suffix=".jpg")
    assert score_run(run, dataset=with_model, samples=()).figures["num_right"] == NUM


def test_without_a_reference_a_run_is_scored_by_its_map_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ring(NUM))
    bare = Dataset(name="set", source=tmp_path, names=("1.jpg",), reference=None)
    figures = score_run(run, dataset=bare, samples=()).figures
    assert figures["num_registered"] == NUM
    assert figures["num_maps"] == 1
    assert "num_right" not in figures
    assert "ate" not in figures


def test_positions_without_rotations_have_no_auc(tmp_path: Path) -> None:
    true = ring(NUM)
    enu = camera_center(true) * 100.0
    lines = [
        f"{number:03d}.png,{45.0 + north / 111_132.0:.9f},{8.0 + east / 78_847.0:.9f},{up}"
        for number, (east, north, up) in enumerate(enu)
    ]
    path = tmp_path / "gps.csv"
    path.write_text("\n".join(["name,lat,lon,alt", *lines]) + "\n")
    with_gps = Dataset(
        name="set",
        source=tmp_path,
        names=tuple(f"{number:03d}.png" for number in range(NUM)),
        reference=Reference(path=path, kind=ReferenceKind.GPS),
    )
    run = write_run(tmp_path / "run", true)
    figures = score_run(run, dataset=with_gps, samples=()).figures
    assert figures["num_right"] == NUM
    assert figures["ate_percent"] < 0.5
    assert "auc_5_deg" not in figures


def test_latencies_are_those_of_first_poses_and_of_keyframes(tmp_path: Path) -> None:
    def posed(
        at_s: float, latency_s: float, *, is_first: bool, is_keyframe: bool
    ) -> dict[str, Any]:
        return {
            "event": "FramePosed",
            "at_s": at_s,
            "latency_s": latency_s,
            "is_first": is_first,
            "is_keyframe": is_keyframe,
        }

    events: list[dict[str, Any]] = [
        {"event": "MapInitialized", "at_s": 2.0},
        posed(2.0, 2.0, is_first=True, is_keyframe=True),  # it waited for the map
        *(posed(3.0 + n, 0.010 * (n + 1), is_first=True, is_keyframe=False) for n in range(99)),
        posed(102.5, 0.4, is_first=False, is_keyframe=True),
        {"event": "MapInitialized", "at_s": 50.0},
    ]
    run = write_run(tmp_path / "run", ring(NUM), events=events)
    figures = score_run(run, dataset=dataset(tmp_path, ring(NUM)), samples=()).figures
    assert figures["first_map_s"] == 2.0
    assert figures["latency_max_ms"] == pytest.approx(2000)
    assert figures["latency_p50_ms"] == pytest.approx(505)
    assert figures["mapped_latency_p50_ms"] == pytest.approx(500)
    assert figures["mapped_latency_max_ms"] == pytest.approx(990)
    assert figures["keyframe_latency_max_ms"] == pytest.approx(2000)
    assert figures["keyframe_latency_p50_ms"] == pytest.approx(1200)


def test_cost_is_the_cpu_when_the_events_had_so_many_keyframes(tmp_path: Path) -> None:
    added: dict[str, Any] = {"event": "KeyframeAdded", "at_s": 1.0}
    events = [added, {"event": "FrameReceived"}, added, added]
    run = write_run(tmp_path / "run", ring(NUM), events=events)
    sizes = np.cumsum([len(json.dumps(event)) + 1 for event in events])
    samples = [
        Sample(wall_s=0.2, cpu_s=0.1, num_bytes=0),
        Sample(wall_s=0.4, cpu_s=0.3, num_bytes=int(sizes[0])),
        Sample(wall_s=0.6, cpu_s=0.5, num_bytes=int(sizes[1]) + 3),
        Sample(wall_s=0.8, cpu_s=0.7, num_bytes=int(sizes[3])),
        Sample(wall_s=1.0, cpu_s=0.9, num_bytes=int(sizes[3])),
    ]
    score = score_run(run, dataset=dataset(tmp_path, ring(NUM)), samples=samples)
    assert [(each.num_keyframes, each.cpu_s) for each in score.costs] == [(1, 0.3), (3, 0.7)]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the folder of a run"):
        score_run(tmp_path, dataset=dataset(tmp_path, ring(NUM)), samples=())


# -- peers ----------------------------------------------------------------------------------------


def test_the_largest_model_of_a_peer_is_scored(tmp_path: Path) -> None:
    true = ring(NUM)
    names = [f"{number:03d}.png" for number in range(NUM)]
    named = dict(zip(names, in_other_world(true), strict=True))
    few = {name: named[name] for name in names[:4]}
    most = {name: named[name] for name in names[3:]}
    write_model(tmp_path / "sparse" / "0", few)
    write_model(tmp_path / "sparse" / "1", most)
    known = dataset(tmp_path, true)
    figures = score_model(tmp_path, frames=rows(names), reference=known.reference)
    assert figures["num_given"] == NUM
    assert figures["num_registered"] == figures["num_right"] == NUM - 3
    assert figures["num_referenced"] == NUM
    assert figures["num_maps"] == 2
    assert figures["ate_percent"] < 1e-6
    pairs = (NUM - 3) * (NUM - 4) / (NUM * (NUM - 1))
    assert figures["auc_30_deg"] == pytest.approx(pairs, abs=1e-6), "missing poses count"


def test_a_peer_without_a_model_registers_nothing(tmp_path: Path) -> None:
    true = ring(NUM)
    (tmp_path / "sparse").mkdir()
    known = dataset(tmp_path, true)
    names = list(known.names)
    figures = score_model(tmp_path, frames=rows(names), reference=known.reference)
    assert figures["num_registered"] == figures["num_right"] == 0
    assert figures["auc_30_deg"] == 0.0
    assert "ate" not in figures
