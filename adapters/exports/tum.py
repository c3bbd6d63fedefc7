"""Trajectories in the form of the TUM RGB-D benchmark."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from adapters.exports.job import ExportJob
from adapters.exports.posed_frames import read_posed_frames
from adapters.run_files import read_frame_rows
from engine.geometry import invert_pose, quat_xyzw_from_rotation
from engine.types import Float64Array

_TRAJECTORY_NAME = "trajectory.txt"


def write_tum(job: ExportJob) -> None:
    """Writes the poses of all frames of the map, where the run came so far, and of its keyframes.

    Raises:
        ConfigError: the table of the run's frames cannot be read.
        OSError: a file cannot be read or written.
    """
    source = job.run / (f"trajectory_{job.map_number}.txt" if job.map_number else _TRAJECTORY_NAME)
    if source.is_file() and job.upright_from_map is None and not job.doubted:
        shutil.copyfile(source, job.to / _TRAJECTORY_NAME)
    elif source.is_file():
        frames = ((one.captured_at_s, one.cam_from_world) for one in read_posed_frames(job))
        _write(job.to / _TRAJECTORY_NAME, frames)
    times_s = {row.name: row.captured_at_s for row in read_frame_rows(job.run)}
    keyframes = [
        (times_s[image.name], np.asarray(image.cam_from_world().matrix()))
        for image in job.images()
        if image.name in times_s
    ]
    _write(job.to / "trajectory_keyframes.txt", sorted(keyframes, key=lambda one: one[0]))


def _write(path: Path, poses: Iterable[tuple[float, Float64Array]]) -> None:
    text = "".join(f"{_timestamp(time_s)} {_tum_pose(pose)}\n" for time_s, pose in poses)
    header = "# timestamp tx ty tz qx qy qz qw (world_from_cam)\n"
    path.write_text(header + text, encoding="utf-8")


def _timestamp(captured_at_s: float) -> str:
    """As in the other files of a run: to the nanosecond, no trailing zeros."""
    return f"{captured_at_s:.9f}".rstrip("0").rstrip(".")


def _tum_pose(cam_from_world: Float64Array) -> str:
    world_from_cam = invert_pose(cam_from_world)
    quat_xyzw = quat_xyzw_from_rotation(world_from_cam[:, :3])
    return " ".join(f"{value:.12g}" for value in (*world_from_cam[:, 3], *quat_xyzw))
