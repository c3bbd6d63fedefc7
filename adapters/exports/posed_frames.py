"""The frames of a run that have a pose in one of its maps, as its files say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from adapters.exports.doubted import near_doubted
from adapters.exports.job import ExportJob
from adapters.run_files import FrameRow, read_frame_rows, read_text
from engine.errors import ConfigError
from engine.geometry import invert_pose, rotation_from_quat_xyzw
from engine.types import Float64Array, PoseKind

if TYPE_CHECKING:
    import pycolmap

_COLUMNS = 8  # of a TUM file: time, position, quaternion
_SAME_TIME_S = 1e-6
_SAME_PLACE_RATIO = 1e-6  # of the map's extent


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PosedFrame:
    """A frame of a map."""

    name: str  # unique in the run
    source: str
    index: int  # gives the order of a source's frames
    captured_at_s: float
    kind: PoseKind
    cam_from_world: Float64Array  # (3, 4)

    @property
    def is_keyframe(self) -> bool:
        """Whether it is one."""
        return self.kind is PoseKind.KEYFRAME


def camera_of(frame: PosedFrame) -> tuple[str, str]:
    """What frames of one camera have in common: their source and the folder in their names."""
    return frame.source, str(PurePosixPath(frame.name).parent)


def read_posed_frames(job: ExportJob) -> list[PosedFrame]:
    """The frames of a map, in order of arrival, without those that hang on keyframes taken out.

    The job notes how many these are.

    Raises:
        ConfigError: the run has no poses of them, or such that are of another map.
    """
    run, map_number = job.run, job.map_number
    rows = [
        row
        for row in read_frame_rows(run)
        if row.map_number == str(map_number) and row.pose in set(PoseKind) - {PoseKind.NONE}
    ]
    name = f"trajectory_{map_number}.txt" if map_number else "trajectory.txt"
    table = _read_trajectory(run, name)
    if len(table) != len(rows) or not rows:
        raise ConfigError(
            f"{run}: {name} and frames.csv have the poses of {len(table)} and {len(rows)} frames:"
            f" the run did not end; go on with it: livesfm resume {run}"
        )
    if any(
        abs(row.captured_at_s - time_s) > _SAME_TIME_S
        for row, time_s in zip(rows, table[:, 0].tolist(), strict=True)
    ):
        raise ConfigError(f"{run}: {name} and frames.csv are not of one run: their times differ")
    turn = np.eye(3) if job.upright_from_map is None else job.upright_from_map
    frames = [_frame(row, line, turn) for row, line in zip(rows, table, strict=True)]
    kept = without_doubted_frames(frames, job.doubted)
    num_hanging = sum(not one.is_keyframe for one in frames) - sum(
        not one.is_keyframe for one in kept
    )
    note = f"{num_hanging} frames between them and the next keyframes are not in it either"
    if num_hanging and note not in job.notes:  # several formats may ask
        job.notes.append(note)
    _refuse_other_world(run, kept, job.reconstruction)
    return kept


def without_doubted_frames(frames: list[PosedFrame], doubted: frozenset[str]) -> list[PosedFrame]:
    """Frames without those of a camera that hang on doubted keyframes, see `near_doubted`."""
    if not doubted:
        return frames
    by_camera: dict[tuple[str, str], list[PosedFrame]] = {}
    for frame in sorted(frames, key=lambda one: one.index):
        by_camera.setdefault(camera_of(frame), []).append(frame)
    gone: set[str] = set()
    for some in by_camera.values():
        is_near = near_doubted(doubted, [one.name if one.is_keyframe else None for one in some])
        gone.update(one.name for one, is_gone in zip(some, is_near, strict=True) if is_gone)
    return [one for one in frames if one.name not in gone]


def _read_trajectory(run: Path, name: str) -> Float64Array:
    """A TUM file as (N, 8); no lines where it is missing."""
    path = run / name
    try:
        lines = [line for line in read_text(path).splitlines() if not line.startswith("#")]
        table = np.array([[float(word) for word in line.split()] for line in lines])
        table = table.reshape(-1, _COLUMNS)
    except FileNotFoundError:
        return np.empty((0, _COLUMNS))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is no trajectory") from error
    lengths = np.linalg.norm(table[:, 4:], axis=1)
    if not np.isfinite(table).all() or (abs(lengths - 1.0) > 1e-3).any():
        raise ConfigError(f"{path}: is no trajectory: its numbers are no poses")
    return table


def _frame(row: FrameRow, line: Float64Array, turn: Float64Array) -> PosedFrame:
    rotation = rotation_from_quat_xyzw(line[4:])
    world_from_cam = turn @ np.column_stack([rotation, line[1:4]])
    return PosedFrame(
        name=row.name,
        source=row.source,
        index=row.index,
        captured_at_s=row.captured_at_s,
        kind=PoseKind(row.pose),
        cam_from_world=invert_pose(world_from_cam),
    )


def _refuse_other_world(
    run: Path, frames: list[PosedFrame], model: pycolmap.Reconstruction
) -> None:
    """Raises ConfigError unless keyframes have the places that the map has them at."""
    in_model = {image.name: image for image in model.images.values()}
    pairs = [
        (invert_pose(frame.cam_from_world)[:, 3], in_model[frame.name].projection_center())
        for frame in frames
        if frame.name in in_model
    ]
    centers = np.array(pairs, np.float64).reshape(-1, 2, 3)
    extent = float(np.ptp(centers[:, 1], axis=0).max()) if len(centers) else 0.0
    if np.abs(centers[:, 0] - centers[:, 1]).max(initial=0.0) > _SAME_PLACE_RATIO * (1.0 + extent):
        raise ConfigError(
            f"{run}: the trajectory is not of the latest snapshot, so frames between keyframes have"
            f" no place in it; go on with the run: livesfm resume {run}"
        )
