"""Evaluation: how close the poses of a run are to reference poses.

Measures: absolute trajectory error (ATE) of the camera centres after least-squares alignment
(Umeyama, 1991; Sturm et al., 2012), and the area under the recall curve of relative poses as image
matchers and feed-forward reconstruction report it. A frame without a pose counts as a failure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adapters.run_files import FrameRow, read_frame_rows, read_model, read_text, unit_of_map
from engine.errors import ConfigError, SnapshotError
from engine.geometry import camera_center, invert_pose, rotation_from_quat_xyzw
from engine.types import METRES, Float64Array, Int64Array, PoseKind

if TYPE_CHECKING:
    from rich.table import Table

MAX_FRAMES_IN_PAIRS = 200  # relative poses are taken between at most so many frames
FAILURE_DEG = 180.0  # the error of a pair with a pose missing

_SAME_UNIT = 1.1  # scales up to this factor: the map and the reference are both in metres
_REFERENCE_TOLERANCE_S = 0.01  # sensors that record a reference have clocks of their own
_MAX_NUMBER = 1e15  # of a pose: in units, squared and summed up it still has digits
_POSE_TOLERANCE_S = 1e-5  # the run's own files agree but for rounding


class ReferenceClock(StrEnum):
    """The clock that the timestamps of a reference are read on."""

    CAPTURE_TIME = "captured_at_s"
    INDEX = "index"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TimedPoses:
    """A trajectory file, sorted by time."""

    timestamps_s: Float64Array  # (N,)
    cam_from_world: Float64Array  # (N, 3, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class AbsoluteError:
    """Distances between estimated and reference camera centres, in units of the reference."""

    rmse: float  # after the best similarity
    rmse_percent_of_extent: float  # of the diagonal of the reference centres' bounding box
    max: float  # after the best similarity
    rmse_rigid: float  # after the best rotation and translation; of use where the map is metric
    scale: float  # reference units per unit of the map


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryScore:
    """Figures of one trajectory file."""

    num_poses: int  # frames with a pose
    posed_ratio: float  # of the frames received
    num_compared: int  # frames with a pose and a reference
    absolute: AbsoluteError | None  # None: fewer than three frames, or no motion
    auc_5_deg: float
    auc_10_deg: float
    auc_30_deg: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A run against a reference."""

    run: str
    reference: str
    clock: ReferenceClock  # the one by which more frames have a reference
    num_frames: int  # received, dropped ones too
    num_poses: dict[str, int]  # frames by how they got their pose; empty: the run did not say
    num_in_other_maps: int  # of them, in maps apart from the one that is compared
    num_referenced_frames: int  # of them with a reference pose
    num_keyframes: int
    num_registered_keyframes: int  # in the map, sparse/0 of the latest snapshot
    registered_ratio: float
    unit: str  # of the map
    final: TrajectoryScore | None  # trajectory.txt
    live: TrajectoryScore | None  # trajectory_live.txt, each pose as first reported

    @property
    def has_map(self) -> bool:
        """Whether the run made a map at all."""
        has_poses = self.final is not None and self.final.num_poses > 0
        return self.num_registered_keyframes > 0 or has_poses

    def as_record(self) -> dict[str, Any]:
        """The figures as a JSON-able mapping."""
        return asdict(self)


def evaluate(run: Path, reference: Path) -> Evaluation:
    """Compares a run with reference poses.

    Args:
        run: a run folder.
        reference: TUM format (timestamp tx ty tz qx qy qz qw, world_from_cam); the timestamps are
            capture times or, for runs of one source, positions of the frames in it.

    Raises:
        ConfigError: a file is missing or is not what it should be, or the reference and the run
            have no frame in common.
    """
    frames = read_frame_rows(run)
    clock, reference_poses = reference_of_frames(frames, reference)
    keyframes = {frame.name for frame in frames if frame.status == "keyframe"}
    registered = keyframes & _registered_names(run / "latest" / "sparse" / "0")
    return Evaluation(
        run=str(run),
        reference=str(reference),
        clock=clock,
        num_frames=len(frames),
        num_poses=dict(Counter(frame.pose for frame in frames if frame.pose)),
        num_in_other_maps=sum(frame.map_number not in ("", "0") for frame in frames),
        num_referenced_frames=int(has_pose(reference_poses).sum()),
        num_keyframes=len(keyframes),
        num_registered_keyframes=len(registered),
        registered_ratio=len(registered) / max(len(keyframes), 1),
        unit=unit_of_map(run),
        final=_score(run / "trajectory.txt", frames=frames, reference=reference_poses),
        live=_score(run / "trajectory_live.txt", frames=frames, reference=reference_poses),
    )


def evaluation_table(evaluation: Evaluation) -> Table:
    """The figures as a table for a terminal."""
    from rich.table import Table

    unit = METRES if evaluation.unit == METRES else "units of its own"
    table = Table(
        title=(
            f"{evaluation.run} against {evaluation.reference}, "
            f"matched by {evaluation.clock.replace('_', ' ')}"
        ),
        caption=(
            f"{evaluation.num_registered_keyframes} of {evaluation.num_keyframes} keyframes "
            f"registered; {evaluation.num_referenced_frames} of {evaluation.num_frames} frames "
            f"have a reference{_poses_in_words(evaluation)}; the map is in {unit}"
        ),
    )
    table.add_column("figure")
    table.add_column("final", justify="right")
    table.add_column("live", justify="right")
    scores = (evaluation.final, evaluation.live)
    is_metric = evaluation.unit == METRES and _is_in_metres(evaluation.final)
    columns = [_table_column(score, is_metric=is_metric) for score in scores]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _poses_in_words(evaluation: Evaluation) -> str:
    """How many frames have a pose, and how they got it."""
    numbers = Counter(evaluation.num_poses)
    if not numbers:
        return ""
    num_none = numbers.pop(PoseKind.NONE, 0)
    kinds = ", ".join(f"{numbers[kind]} {kind}" for kind in PoseKind if numbers[kind])
    apart = evaluation.num_in_other_maps
    return (
        f"; {numbers.total()} have a pose"
        + (f" ({kinds})" if kinds else "")
        + (f", {apart} of them in other maps" if apart else "")
        + f", {num_none} have none"
    )


def read_tum(path: Path) -> TimedPoses:
    """Reads a trajectory in TUM format; lines that start with # are comments.

    Raises:
        ConfigError: it cannot be read, or a line is not a pose (names the line).
    """
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not a text file") from error
    rows = [
        _parse_tum_line(line, where=f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    values = np.array(rows, dtype=np.float64).reshape(-1, 8)
    values = values[np.argsort(values[:, 0], kind="stable")]
    rotations = np.array([rotation_from_quat_xyzw(row[4:]) for row in values]).reshape(-1, 3, 3)
    world_from_cam = np.concatenate([rotations, values[:, 1:4, None]], axis=2)
    return TimedPoses(timestamps_s=values[:, 0], cam_from_world=invert_pose(world_from_cam))


def absolute_error(centers: Float64Array, reference_centers: Float64Array) -> AbsoluteError | None:
    """ATE of camera centres (N, 3) against those of the reference (N, 3), row by row.

    None for fewer than three, or where either side does not move.
    """
    extent = extent_of(reference_centers)
    if len(centers) < 3 or extent == 0 or extent_of(centers) == 0:
        return None
    scale, after_similarity = _distances(centers, reference_centers, with_scale=True)
    _, after_rigid = _distances(centers, reference_centers, with_scale=False)
    rmse = float(np.sqrt(np.mean(after_similarity**2)))
    return AbsoluteError(
        rmse=rmse,
        rmse_percent_of_extent=100 * rmse / extent,
        max=float(after_similarity.max()),
        rmse_rigid=float(np.sqrt(np.mean(after_rigid**2))),
        scale=scale,
    )


def relative_pose_errors_deg(estimate: Float64Array, reference: Float64Array) -> Float64Array:
    """Errors of all pairs of frames: the larger of rotation and translation direction.

    Args:
        estimate: (N, 3, 4) cam_from_world, NaN where there is no pose.
        reference: (N, 3, 4) cam_from_world.

    Returns:
        (N * (N - 1) / 2,) degrees; `FAILURE_DEG` where a pose is missing or the estimate does not
        move although the reference does. Where the reference does not move, its direction means
        nothing and the rotation stands alone.
    """
    first, second = np.triu_indices(len(reference), k=1)
    estimated, true = (_relative_poses(poses, first, second) for poses in (estimate, reference))
    delta = estimated[:, :, :3] @ np.swapaxes(true[:, :, :3], 1, 2)
    cosine = (np.trace(delta, axis1=1, axis2=2) - 1) / 2
    rotation_deg = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    direction_deg = _angles_deg(estimated[:, :, 3], true[:, :, 3])
    direction_deg[~_moves(estimated, among=estimate)] = np.nan
    direction_deg[~_moves(true, among=reference)] = 0.0
    errors: Float64Array = np.maximum(rotation_deg, direction_deg)
    return np.nan_to_num(errors, nan=FAILURE_DEG)


def recall_auc(errors_deg: Float64Array, *, threshold_deg: float) -> float:
    """Area under the recall curve up to a threshold, as a share of the best possible.

    The exact area: recall is a step function of the threshold. Of no errors it is 0.
    """
    if not len(errors_deg):
        return 0.0
    return float(np.mean(np.clip(1 - errors_deg / threshold_deg, 0, 1)))


def _parse_tum_line(line: str, *, where: str) -> list[float]:
    words = line.split()
    if len(words) != 8:
        raise ConfigError(
            f"{where}: expected 8 numbers, found {len(words)}: a line of TUM's format is"
            " `time x y z qx qy qz qw`; how far cameras are from GPS positions is in the run's"
            " report"
        )
    try:
        values = [float(word) for word in words]
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    if not np.isfinite(values).all() or not np.any(values[4:]):
        raise ConfigError(f"{where}: is not a pose")
    if max(map(abs, values)) > _MAX_NUMBER:
        raise ConfigError(f"{where}: is not a pose: its numbers are absurdly large")
    return values


def reference_of_frames(
    frames: Sequence[FrameRow], reference: Path
) -> tuple[ReferenceClock, Float64Array]:
    """The clock of a reference in TUM format, and its poses (F, 3, 4), NaN where a frame has none.

    Raises:
        ConfigError: it is no such file, or has no frame in common with these.
    """
    if len({frame.captured_at_s for frame in frames}) < len(frames):
        raise ConfigError("frames share capture times, so a trajectory cannot distinguish them")
    poses = read_tum(reference)
    times = {ReferenceClock.CAPTURE_TIME: [frame.captured_at_s for frame in frames]}
    if len({frame.source for frame in frames}) == 1:
        times[ReferenceClock.INDEX] = [float(frame.index) for frame in frames]
    matched = {
        clock: _poses_at(poses, np.array(values), tolerance_s=_REFERENCE_TOLERANCE_S)
        for clock, values in times.items()
    }
    clock = max(matched, key=lambda key: int(has_pose(matched[key]).sum()))
    if not has_pose(matched[clock]).any():
        raise ConfigError(
            f"{reference}: none of its {len(poses.timestamps_s)} timestamps is the capture time or "
            f"the index of one of the run's {len(frames)} frames"
        )
    return clock, matched[clock]


def _poses_at(poses: TimedPoses, times_s: Float64Array, *, tolerance_s: float) -> Float64Array:
    """The poses (F, 3, 4) nearest to some times (F,), NaN where none is near enough."""
    found = np.full((len(times_s), 3, 4), np.nan)
    if not len(poses.timestamps_s):
        return found
    after = np.minimum(np.searchsorted(poses.timestamps_s, times_s), len(poses.timestamps_s) - 1)
    before = np.maximum(after - 1, 0)
    gaps_s = np.abs(poses.timestamps_s[np.stack([before, after])] - times_s)
    nearest = np.where(gaps_s[0] <= gaps_s[1], before, after)
    near = gaps_s.min(axis=0) <= tolerance_s
    found[near] = poses.cam_from_world[nearest[near]]
    return found


def trajectory_of_frames(path: Path, frames: Sequence[FrameRow]) -> Float64Array:
    """The poses (F, 3, 4) cam_from_world that a trajectory file of a run has for its frames.

    NaN where a frame has none, or was dropped.

    Raises:
        ConfigError: the file cannot be read, or is not in TUM format.
    """
    times_s = np.array([frame.captured_at_s for frame in frames])
    poses = _poses_at(read_tum(path), times_s, tolerance_s=_POSE_TOLERANCE_S)
    poses[[frame.is_dropped for frame in frames]] = np.nan
    return poses


def score_poses(estimate: Float64Array, reference: Float64Array) -> TrajectoryScore:
    """Scores poses (F, 3, 4) against those of a reference, both NaN where there is none."""
    posed, has_reference = has_pose(estimate), has_pose(reference)
    both = posed & has_reference
    sample = _evenly(np.flatnonzero(has_reference), at_most=MAX_FRAMES_IN_PAIRS)
    errors_deg = relative_pose_errors_deg(estimate[sample], reference[sample])
    return TrajectoryScore(
        num_poses=int(posed.sum()),
        posed_ratio=float(posed.mean()),
        num_compared=int(both.sum()),
        absolute=absolute_error(camera_center(estimate[both]), camera_center(reference[both])),
        auc_5_deg=recall_auc(errors_deg, threshold_deg=5),
        auc_10_deg=recall_auc(errors_deg, threshold_deg=10),
        auc_30_deg=recall_auc(errors_deg, threshold_deg=30),
    )


def _score(
    path: Path, *, frames: Sequence[FrameRow], reference: Float64Array
) -> TrajectoryScore | None:
    """Scores one trajectory; None if the run did not write it."""
    if not path.is_file():
        return None
    return score_poses(trajectory_of_frames(path, frames), reference)


def has_pose(poses: Float64Array) -> NDArray[np.bool_]:
    """Which of the poses (F, 3, 4) are there, (F,)."""
    return np.isfinite(poses[:, 0, 0])


def _evenly(rows: Int64Array, *, at_most: int) -> Int64Array:
    """At most so many of ``rows``, evenly spread, the first and the last among them."""
    if len(rows) <= at_most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, at_most).round().astype(np.int64)]


def extent_of(points: Float64Array) -> float:
    """The diagonal of the bounding box of points (N, 3)."""
    return float(np.linalg.norm(np.ptp(points, axis=0))) if len(points) else 0.0


def _distances(
    source: Float64Array, target: Float64Array, *, with_scale: bool
) -> tuple[float, Float64Array]:
    """The scale, and the distances (N,) left, of the best alignment of points (N, 3).

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns",
    1991. Points on one line leave the rotation about it open and the distances well defined.
    """
    centered_source, centered_target = source - source.mean(axis=0), target - target.mean(axis=0)
    left, singular, right = np.linalg.svd(centered_target.T @ centered_source)
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(left @ right))])
    rotation = (left * signs) @ right
    scale = float(singular @ signs / np.sum(centered_source**2)) if with_scale else 1.0
    return scale, np.linalg.norm(scale * centered_source @ rotation.T - centered_target, axis=1)


def _relative_poses(poses: Float64Array, first: Int64Array, second: Int64Array) -> Float64Array:
    """Second camera from first camera, (P, 3, 4)."""
    rotation = poses[second, :, :3] @ np.swapaxes(poses[first, :, :3], 1, 2)
    translation = poses[second, :, 3] - np.einsum("nij,nj->ni", rotation, poses[first, :, 3])
    return np.concatenate([rotation, translation[:, :, None]], axis=2)


def _angles_deg(one: Float64Array, other: Float64Array) -> Float64Array:
    """Angles (P,) between vectors (P, 3)."""
    cross = np.linalg.norm(np.cross(one, other), axis=1)
    return np.asarray(np.degrees(np.arctan2(cross, np.sum(one * other, axis=1))))


def _moves(relative_poses: Float64Array, *, among: Float64Array) -> NDArray[np.bool_]:
    """Which of (P, 3, 4) have a translation that is more than rounding, in a flight (N, 3, 4)."""
    centers = camera_center(among[has_pose(among)])
    rounding = 1e-6 * extent_of(centers) + 1e-9 * np.abs(centers).max(initial=0.0)
    return np.asarray(np.linalg.norm(relative_poses[:, :, 3], axis=1) > rounding)


def _registered_names(model: Path) -> set[str]:
    if not model.is_dir():
        return set()
    try:
        reconstruction = read_model(model)
    except SnapshotError as error:
        raise ConfigError(str(error)) from error
    return {image.name for image in reconstruction.images.values()}


def _is_in_metres(score: TrajectoryScore | None) -> bool:
    """Whether the reference of a trajectory in metres seems to be in metres, too."""
    error = score.absolute if score else None
    return error is not None and 1 / _SAME_UNIT < error.scale < _SAME_UNIT


def _table_column(score: TrajectoryScore | None, *, is_metric: bool) -> dict[str, str]:
    """Figures in units of the reference; without scaling only where that says something."""
    error = score.absolute if score else None
    unscaled = {"ATE without scaling": f"{error.rmse_rigid:.4g}" if error else "-"}
    return {
        "frames with a pose": f"{score.num_poses} ({score.posed_ratio:.1%})" if score else "-",
        "frames compared": str(score.num_compared) if score else "-",
        "ATE after Sim(3)": f"{error.rmse:.4g}" if error else "-",
        "  % of the extent": f"{error.rmse_percent_of_extent:.3f}" if error else "-",
        "  largest": f"{error.max:.4g}" if error else "-",
        **(unscaled if is_metric else {}),
        "scale, map to reference": f"{error.scale:.5g}" if error else "-",
        "AUC@5 deg": f"{score.auc_5_deg:.3f}" if score else "-",
        "AUC@10 deg": f"{score.auc_10_deg:.3f}" if score else "-",
        "AUC@30 deg": f"{score.auc_30_deg:.3f}" if score else "-",
    }
