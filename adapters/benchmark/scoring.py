"""What a pipeline left on disk, against a reference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters.benchmark.datasets import Dataset
from adapters.benchmark.measuring import Sample
from adapters.benchmark.references import Reference, ReferencePoses
from adapters.evaluate import has_pose, score_poses, trajectory_of_frames
from adapters.run_files import FrameRow, read_frame_rows, read_model, read_text
from engine.errors import ConfigError
from engine.geometry import camera_center
from engine.types import Float64Array

if TYPE_CHECKING:
    import pycolmap

RIGHT_RATIO = 0.02  # of the reference's extent: how far a camera in its right place may be off

_PERCENTILES = {"p50": 50, "p95": 95, "p99": 99, "max": 100}


@dataclass(frozen=True, slots=True, kw_only=True)
class CostPoint:
    """What a run had cost when it had so many keyframes."""

    num_keyframes: int
    cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunScore:
    """What a run of LiveSfM left."""

    figures: dict[str, float]  # by their names in `Figures`
    verdict: str  # "": the run did not end
    stages_cpu_s: dict[str, float]  # the dearest first; empty: it does not say
    costs: tuple[CostPoint, ...]


def score_run(run: Path, *, dataset: Dataset, samples: Sequence[Sample]) -> RunScore:
    """Figures of a run folder.

    Args:
        run: of LiveSfM.
        dataset: that it got; without a reference, what depends on one is left out.
        samples: of the run's process, with the size of its events.

    Raises:
        ConfigError: the folder is not that of a run.
    """
    frames = read_frame_rows(run)
    events = _events(run / "events.jsonl")
    figures = _live_figures([event for event, _ in events])
    num_keyframes = sum(frame.status == "keyframe" for frame in frames)
    figures |= {"num_given": num_keyframes}
    figures |= model_figures(read_models(run / "latest" / "sparse"))
    if dataset.reference is not None and frames:
        true = dataset.reference.of(dataset.named(frames))
        figures |= _final_figures(_trajectory(run / "trajectory.txt", frames), true)
        causal = score_poses(_trajectory(run / "trajectory_live.txt", frames), true.cam_from_world)
        if causal.absolute is not None:
            figures["ate_causal"] = causal.absolute.rmse
            figures["ate_causal_percent"] = causal.absolute.rmse_percent_of_extent
    summary = _summary(run)
    stages: dict[str, float] = summary.get("cpu_by_stage_s", {})
    return RunScore(
        figures=figures,
        verdict=summary.get("verdict", {}).get("level", ""),
        stages_cpu_s=dict(sorted(stages.items(), key=lambda item: -item[1])),
        costs=_costs(events, samples),
    )


def score_model(
    work: Path, *, frames: Sequence[FrameRow], reference: Reference | None
) -> dict[str, float]:
    """Figures, by their names in `Figures`, of the models in ``work/sparse``.

    Args:
        work: of a peer.
        frames: that the peer got.
        reference: None: what depends on one is left out.
    """
    models = read_models(work / "sparse")
    figures = {"num_given": float(len(frames))} | model_figures(models)
    if reference is not None:
        figures |= _final_figures(_poses_of(models, frames), reference.of(frames))
    return figures


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Models:
    """The models that a pipeline made."""

    largest: pycolmap.Reconstruction
    num: int


def read_models(sparse: Path) -> Models | None:
    """The models in a folder's folders; None where there is none.

    Raises:
        SnapshotError: one is not whole.
    """
    folders = sorted(sparse.iterdir()) if sparse.is_dir() else []
    models = [read_model(folder) for folder in folders if folder.is_dir()]
    if not models:
        return None
    largest = max(models, key=lambda each: int(each.num_reg_images()))
    return Models(largest=largest, num=len(models))


def model_figures(models: Models | None) -> dict[str, float]:
    """What a model says of itself."""
    if models is None:
        return {"num_registered": 0.0, "num_maps": 0.0}
    model = models.largest
    return {
        "num_registered": model.num_reg_images(),
        "num_maps": models.num,
        "num_points3D": model.num_points3D(),
        "mean_track_length": model.compute_mean_track_length(),
        "mean_reprojection_error_px": model.compute_mean_reprojection_error(),
    }


def count_right(estimate: Float64Array, reference: ReferencePoses) -> int:
    """How many cameras are where the reference has them, within `RIGHT_RATIO` of its extent.

    The similarity between both is the one that most cameras agree on (LO-RANSAC), so that wrong
    ones do not bend it. Fewer than three cameras are nowhere.

    Args:
        estimate: (F, 3, 4) cam_from_world, NaN where there is no pose.
        reference: of the same frames.
    """
    import pycolmap

    both = has_pose(estimate) & has_pose(reference.cam_from_world)
    bound = RIGHT_RATIO * reference.extent
    if np.count_nonzero(both) < 3 or bound == 0.0:
        return 0
    centers = camera_center(estimate[both])
    true = camera_center(reference.cam_from_world[both])
    options = pycolmap.RANSACOptions(max_error=bound, random_seed=0)
    # Its stub names the type of an entry of the dictionary that it returns.
    found: Any = pycolmap.estimate_sim3d_robust(centers, true, options)
    if found is None:
        return 0
    onto = np.asarray(found["tgt_from_src"].matrix())
    distances = np.linalg.norm(centers @ onto[:, :3].T + onto[:, 3] - true, axis=1)
    return int(np.count_nonzero(distances <= bound))


def _final_figures(estimate: Float64Array, true: ReferencePoses) -> dict[str, float]:
    score = score_poses(estimate, true.cam_from_world)
    figures: dict[str, float] = {
        "num_referenced": true.num_frames,
        "num_right": count_right(estimate, true),
    }
    if score.absolute is not None:
        figures["ate"] = score.absolute.rmse
        figures["ate_percent"] = score.absolute.rmse_percent_of_extent
    if true.has_rotations:
        figures["auc_5_deg"] = score.auc_5_deg
        figures["auc_10_deg"] = score.auc_10_deg
        figures["auc_30_deg"] = score.auc_30_deg
    return figures


def _trajectory(path: Path, frames: Sequence[FrameRow]) -> Float64Array:
    """The poses of a trajectory file; none where there is no such file."""
    if not path.is_file():
        return np.full((len(frames), 3, 4), np.nan)
    return trajectory_of_frames(path, frames)


def _poses_of(models: Models | None, frames: Sequence[FrameRow]) -> Float64Array:
    """The poses (F, 3, 4) of frames by their names, NaN where there is none."""
    poses = np.full((len(frames), 3, 4), np.nan)
    if models is not None:
        rows = {frame.name: row for row, frame in enumerate(frames)}
        for image in models.largest.images.values():
            if image.has_pose and image.name in rows:
                poses[rows[image.name]] = image.cam_from_world().matrix()
    return poses


def _events(path: Path) -> list[tuple[dict[str, Any], int]]:
    """The events of a run, each with how long the file is behind it."""
    try:
        lines = read_text(path).splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    events, num_bytes = [], 0
    for line in lines:
        num_bytes += len(line.encode())
        if line.endswith("\n"):
            events.append((json.loads(line), num_bytes))
    return events


def _live_figures(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    first_map_s = next((e["at_s"] for e in events if e["event"] == "MapInitialized"), None)
    if first_map_s is None:
        return {}
    posed = [event for event in events if event["event"] == "FramePosed"]
    latencies = {
        "latency": [e["latency_s"] for e in posed if e["is_first"]],
        "mapped_latency": [
            e["latency_s"]
            for e in posed
            if e["is_first"] and e["at_s"] - e["latency_s"] >= first_map_s
        ],
        "keyframe_latency": [e["latency_s"] for e in posed if e["is_keyframe"]],
    }
    figures = {
        f"{name}_{label}_ms": 1000.0 * float(np.percentile(values, percentile))
        for name, values in latencies.items()
        if values
        for label, percentile in _PERCENTILES.items()
    }
    return {"first_map_s": first_map_s, **figures}


def _costs(
    events: Sequence[tuple[dict[str, Any], int]], samples: Sequence[Sample]
) -> tuple[CostPoint, ...]:
    """What the run had cost whenever it had more keyframes than at the sample before."""
    ends = [num_bytes for event, num_bytes in events if event["event"] == "KeyframeAdded"]
    counts = np.searchsorted(ends, [sample.num_bytes for sample in samples], side="right")
    points = [CostPoint(num_keyframes=0, cpu_s=0.0)]
    for sample, count in zip(samples, counts, strict=True):
        if count > points[-1].num_keyframes:
            points.append(CostPoint(num_keyframes=int(count), cpu_s=sample.cpu_s))
    return tuple(points[1:])


def _summary(run: Path) -> dict[str, Any]:
    """The summary of a run; empty where it did not come to its end."""
    try:
        summary: dict[str, Any] = json.loads(read_text(run / "summary.json"))
    except (OSError, ValueError):
        return {}
    return summary
