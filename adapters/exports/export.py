"""Export: a map of a run's latest snapshot, written to a folder in the formats of other tools.

All formats of one export share the folder:

    images/  sparse/0/*.bin     undistort: PINHOLE images and model, as splatting trainers read
                                them; of a fisheye the middle of the view, of a sphere six views
    transforms.json             nerfstudio: of the undistorted images, or of copies of the originals
    masks/                      where the run has masks: one for each image, white where it had none
    points.ply                  ply, nerfstudio
    dense.ply                   dense: the run's products/dense.ply in the world of the latest
                                snapshot; with undistort it is sparse/0/points3D.ply, which
                                trainers begin with, instead
    trajectory.txt              tum: frames in the map; trajectory_keyframes.txt: its keyframes
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from adapters.exports.dense import DENSE_PLY, RunDensePoints, open_dense, write_dense
from adapters.exports.images import check_images, copy_images
from adapters.exports.job import ExportJob, Progress, never_cancelled, no_progress
from adapters.exports.masks import write_masks
from adapters.exports.nerfstudio import write_nerfstudio
from adapters.exports.ply import write_points
from adapters.exports.tum import write_tum
from adapters.exports.undistorted import write_undistorted
from adapters.run_files import read_model
from engine.errors import ConfigError, SnapshotError


class ExportFormat(StrEnum):
    """A format of an export."""

    UNDISTORT = "undistort"
    PLY = "ply"
    NERFSTUDIO = "nerfstudio"
    TUM = "tum"
    DENSE = "dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Figures of a written export."""

    path: Path
    num_images: int
    num_points3D: int
    left_out: Mapping[int, int]  # keyframes of the snapshot's other maps, by their N of sparse/N


def export(
    run: Path,
    to: Path,
    *,
    formats: Collection[ExportFormat],
    map_number: int = 0,
    progress: Callable[[Progress], None] = no_progress,
    is_cancelled: Callable[[], bool] = never_cancelled,
) -> Export:
    """Writes a map of a run's latest snapshot to a new folder.

    The folder appears whole or not at all.

    Args:
        run: a run folder.
        to: a folder that does not exist, or is empty.
        formats: at least one.
        map_number: N of the snapshot's sparse/N; 0 is the fullest map.
        progress: called on this thread as files are written.
        is_cancelled: asked between files.

    Raises:
        ConfigError: the run has no snapshot, or no such map, the target holds something, a camera
            model does not fit the format, or dense points are of another map.
        SnapshotError: the files cannot be written, or images of the map are missing.
        ExportCancelled: it was cancelled.
    """
    to = to.resolve()
    models = _models(run)
    if not formats:
        raise ConfigError("an export needs at least one format")
    if 0 not in models:
        raise ConfigError(f"{run}: has no snapshot to export")
    if map_number not in models:
        raise ConfigError(f"{run}: has no map {map_number}, only 0 to {max(models)}")
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise ConfigError(f"{to}: exists and is not an empty folder")
    temporary = to.with_name(f".tmp-{to.name}-{os.getpid()}")
    job = ExportJob(
        run=run,
        reconstruction=read_model(models.pop(map_number)),
        to=temporary,
        map_number=map_number,
        progress=progress,
        is_cancelled=is_cancelled,
    )
    try:
        temporary.mkdir(parents=True)
        written = _write(job, set(formats))
        job.check()
        temporary.replace(to)
    except OSError as error:
        raise SnapshotError(f"{to}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Export(
        path=to,
        num_images=written.reconstruction.num_reg_images(),
        num_points3D=written.reconstruction.num_points3D(),
        left_out={number: read_model(other).num_reg_images() for number, other in models.items()},
    )


def _models(run: Path) -> dict[int, Path]:
    """The folders of the latest snapshot's maps, by number."""
    folders = (run / "latest" / "sparse").glob("[0-9]*")
    return {int(folder.name): folder for folder in sorted(folders) if folder.name.isdecimal()}


def _write(job: ExportJob, formats: set[ExportFormat]) -> ExportJob:
    """Writes all formats; returns the job with the map of the images that were written."""
    dense: RunDensePoints | None = None
    if ExportFormat.DENSE in formats:
        dense = open_dense(job.run, job.reconstruction, map_number=job.map_number)
    if formats & {ExportFormat.UNDISTORT, ExportFormat.NERFSTUDIO}:
        check_images(job)
    if ExportFormat.TUM in formats:
        write_tum(job)
    if ExportFormat.UNDISTORT in formats:
        job = replace(job, reconstruction=write_undistorted(job))
    if dense is not None:
        is_model = ExportFormat.UNDISTORT in formats
        write_dense(job, dense, job.to / ("sparse/0/points3D.ply" if is_model else DENSE_PLY.name))
    if formats & {ExportFormat.PLY, ExportFormat.NERFSTUDIO}:
        write_points(job)
    if ExportFormat.NERFSTUDIO in formats:
        if ExportFormat.UNDISTORT not in formats:
            copy_images(job)
            write_masks(job)
        write_nerfstudio(job)
    return job
