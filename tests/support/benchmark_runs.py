"""What pipelines leave on disk, and what was measured of them, shared by tests of the benchmark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap

from adapters.benchmark.figures import Figures
from adapters.benchmark.machine import Machine
from adapters.benchmark.results import (
    BenchmarkResult,
    DatasetResult,
    MeasuredRun,
    PipelineResult,
)
from adapters.run_files import FrameRow
from engine.geometry import invert_pose, quat_xyzw_from_rotation
from engine.types import Float64Array

MACHINE = Machine(
    processor="a processor",
    num_processors=2,
    memory_gb=8.0,
    system="a system",
    python="3.11.0",
    versions={"livesfm": "1.0"},
    environment={"OMP_NUM_THREADS": "1"},
)


def ring(num: int) -> Float64Array:
    """Poses (num, 3, 4) cam_from_world on a circle that climbs, each looking at its axis."""
    angles = np.linspace(0.0, 2.0, num)
    poses = []
    for angle in angles:
        center = np.array([np.cos(angle), 0.2 * angle, np.sin(angle)])
        forward = np.array([-np.cos(angle), 0.0, -np.sin(angle)])
        down = np.array([0.0, 1.0, 0.0])
        rotation = np.array([np.cross(down, forward), down, forward])
        poses.append(np.column_stack([rotation, -rotation @ center]))
    return np.array(poses)


def rows(names: Sequence[str]) -> list[FrameRow]:
    """Frames of one source, in its order."""
    return [
        FrameRow(
            source="source",
            index=index,
            name=name,
            captured_at_s=float(index),
            status="keyframe",
            pose="",
            map_number="",
        )
        for index, name in enumerate(names)
    ]


def write_tum(path: Path, poses: Mapping[float, Float64Array]) -> Path:
    """Poses cam_from_world by timestamp."""
    lines = ["# timestamp tx ty tz qx qy qz qw"]
    for timestamp_s, cam_from_world in poses.items():
        world_from_cam = invert_pose(cam_from_world)
        values = (*world_from_cam[:, 3], *quat_xyzw_from_rotation(world_from_cam[:, :3]))
        lines.append(f"{timestamp_s} " + " ".join(f"{value:.12g}" for value in values))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_model(folder: Path, poses: Mapping[str, Float64Array]) -> Path:
    """A COLMAP model of posed images without points."""
    folder.mkdir(parents=True)
    model = pycolmap.Reconstruction()
    camera = pycolmap.Camera.create_from_model_name(1, "SIMPLE_PINHOLE", 500.0, 640, 480)
    model.add_camera_with_trivial_rig(camera)
    for image_id, (name, pose) in enumerate(poses.items(), start=1):
        image = pycolmap.Image(name=name, camera_id=1, image_id=image_id)
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pose))
    model.write(folder)
    return folder


def write_run(
    run: Path,
    poses: Float64Array,
    *,
    live: Float64Array | None = None,
    events: Sequence[Mapping[str, Any]] = (),
    suffix: str = ".jpg",
) -> Path:
    """The folder of a run that ended, whose frames are keyframes in its map."""
    run.mkdir(parents=True)
    names = [f"{index:03d}{suffix}" for index in range(len(poses))]
    lines = [
        f"{index + 1},source,{index},{name},{index},keyframe,keyframe,0"
        for index, name in enumerate(names)
    ]
    head = "frame_id,source,index,name,captured_at_s,status,pose,map"
    (run / "frames.csv").write_text("\n".join([head, *lines]) + "\n")
    write_tum(run / "trajectory.txt", dict(enumerate(poses)))
    write_tum(run / "trajectory_live.txt", dict(enumerate(poses if live is None else live)))
    write_model(run / "latest" / "sparse" / "0", dict(zip(names, poses, strict=True)))
    (run / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    summary = {"verdict": {"level": "good"}, "cpu_by_stage_s": {"map": 1.0, "match": 2.0}}
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def measured(round_number: int = 1, *, failure: str = "", **figures: float) -> MeasuredRun:
    """A run with some figures."""
    return MeasuredRun(
        round_number=round_number,
        command="program --option",
        began_at="2026-01-01T00:00:00+00:00",
        load_average=0.5,
        exit_code=1 if failure else 0,
        failure=failure,
        figures=Figures(**{"cpu_s": 1.0, "wall_s": 1.0, "peak_rss_mb": 1.0, **figures}),
    )


def result_of(*pipelines: PipelineResult, reference: str = "truth.txt") -> BenchmarkResult:
    """A benchmark of one dataset."""
    dataset = DatasetResult(
        name="set",
        source="data/set",
        reference=reference,
        reference_kind="poses" if reference else "",
        peer_images="all frames, 9, cameras SINGLE",
        pipelines=pipelines,
    )
    return BenchmarkResult(
        command="livesfm benchmark data/set",
        began_at="2026-01-01T00:00:00+00:00",
        machine=MACHINE,
        num_runs=3,
        num_threads=2,
        datasets=(dataset,),
        is_complete=True,
    )
