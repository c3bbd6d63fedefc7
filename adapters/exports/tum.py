"""Trajectories in the form of the TUM RGB-D benchmark."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from adapters.exports.job import ExportJob
from adapters.run_files import read_frame_rows
from engine.geometry import invert_pose, quat_xyzw_from_rotation

if TYPE_CHECKING:
    import pycolmap

_TRAJECTORY_NAME = "trajectory.txt"


def write_tum(job: ExportJob) -> None:
    """Writes the poses of all frames of the map, where the run came so far, and of its keyframes.

    Raises:
        ConfigError: the table of the run's frames cannot be read.
        OSError: a file cannot be read or written.
    """
    source = job.run / (f"trajectory_{job.map_number}.txt" if job.map_number else _TRAJECTORY_NAME)
    if source.is_file():
        shutil.copyfile(source, job.to / _TRAJECTORY_NAME)
    times_s = {row.name: row.captured_at_s for row in read_frame_rows(job.run)}
    lines = [
        (times_s[image.name], _tum_pose(image)) for image in job.images() if image.name in times_s
    ]
    lines.sort()
    text = "".join(f"{_timestamp(time_s)} {pose}\n" for time_s, pose in lines)
    header = "# timestamp tx ty tz qx qy qz qw (world_from_cam)\n"
    (job.to / "trajectory_keyframes.txt").write_text(header + text, encoding="utf-8")


def _timestamp(captured_at_s: float) -> str:
    """As in the other files of a run: to the nanosecond, no trailing zeros."""
    return f"{captured_at_s:.9f}".rstrip("0").rstrip(".")


def _tum_pose(image: pycolmap.Image) -> str:
    world_from_cam = invert_pose(image.cam_from_world().matrix())
    quat_xyzw = quat_xyzw_from_rotation(world_from_cam[:, :3])
    return " ".join(f"{value:.12g}" for value in (*world_from_cam[:, 3], *quat_xyzw))
