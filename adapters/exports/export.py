"""Export: a map of a run's latest snapshot, written to a folder in the formats of other tools.

All formats of one export share the folder:

    images/  sparse/0/*.bin     undistort: PINHOLE images and model, as splatting trainers read
                                them; of a fisheye the middle of the view, of a sphere six views
    transforms.json             nerfstudio: of the undistorted images, or of copies of the originals
    masks/                      where the run has masks: one for each image, white where it had none
    points.ply                  ply, nerfstudio
    points.las  dense.las       las, laz: points, and dense points where the run has any, in a CRS,
                                or in the map's world where it has no place on the globe
    dense.ply                   dense: the run's products/dense.ply in the world of the latest
                                snapshot; with undistort it is sparse/0/points3D.ply, which
                                trainers begin with, instead
    trajectory.txt              tum: frames in the map; trajectory_keyframes.txt: its keyframes
    cameras.geojson  .kml       geojson, kml: cameras, what they see of the ground, and their way
    odm/                        odm: a project of OpenDroneMap with images, geo.txt and the map
    bundler/                    bundler: bundle.out, list.txt and images
    metashape/                  metashape: images, cameras.csv and calibrations
    origin.json                 of a map with a place on the globe: the origin, and the CRS
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import numpy as np

from adapters.exports.bundler import check_bundler, write_bundler
from adapters.exports.dense import DENSE_PLY, RunDensePoints, open_dense, write_dense
from adapters.exports.doubted import without_doubted
from adapters.exports.frame_choice import FrameChoice, FrameKind
from adapters.exports.frames import STAGED, FrameFigures, stage_frames
from adapters.exports.geojson import write_geojson
from adapters.exports.images import check_images, copy_images
from adapters.exports.job import ExportJob, Progress, never_cancelled, no_progress
from adapters.exports.kml import write_kml
from adapters.exports.las import check_las, write_las
from adapters.exports.masks import write_masks
from adapters.exports.metashape import check_metashape, write_metashape
from adapters.exports.nerfstudio import write_nerfstudio
from adapters.exports.odm import check_odm, write_odm
from adapters.exports.place import PlacedCrs, open_crs, read_num_keyframes, read_place, write_origin
from adapters.exports.ply import POINTS_NAME, write_points
from adapters.exports.tum import write_tum
from adapters.exports.undistorted import write_undistorted
from adapters.exports.upright import Upright, upright_of
from adapters.run_files import read_model
from engine.errors import ConfigError, SnapshotError
from engine.output.nerfstudio import check_cameras


class ExportFormat(StrEnum):
    """A format of an export."""

    UNDISTORT = "undistort"
    PLY = "ply"
    NERFSTUDIO = "nerfstudio"
    TUM = "tum"
    DENSE = "dense"
    LAS = "las"
    LAZ = "laz"
    GEOJSON = "geojson"
    KML = "kml"
    ODM = "odm"
    BUNDLER = "bundler"
    METASHAPE = "metashape"


_WITH_IMAGES = {
    ExportFormat.UNDISTORT,
    ExportFormat.NERFSTUDIO,
    ExportFormat.ODM,
    ExportFormat.BUNDLER,
    ExportFormat.METASHAPE,
}
_ON_GLOBE = (  # formats that need a map with a place
    ExportFormat.GEOJSON,
    ExportFormat.KML,
    ExportFormat.ODM,
    ExportFormat.METASHAPE,
)
_ALWAYS_IN_CRS = {ExportFormat.LAS, ExportFormat.LAZ, ExportFormat.METASHAPE}  # if it has a place
_IN_CRS = {*_ALWAYS_IN_CRS, ExportFormat.PLY}
_OF_FRAMES = {ExportFormat.UNDISTORT, ExportFormat.NERFSTUDIO}  # and not of keyframes alone
_WITH_DENSE = {ExportFormat.LAS, ExportFormat.LAZ, ExportFormat.UNDISTORT}  # where the run has them
_INITIAL_POINTS = "sparse/0/points3D.ply"  # that trainers of splats begin with


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Figures of a written export."""

    path: Path
    num_images: int
    num_points3D: int
    left_out: Mapping[int, int]  # keyframes of the snapshot's other maps, by their N of sparse/N
    notes: tuple[str, ...] = ()  # sentences on what is in it, and how to use it
    num_dense_points: int | None = None  # of those in it; None: there are none


def export(
    run: Path,
    to: Path,
    *,
    formats: Collection[ExportFormat],
    map_number: int = 0,
    crs: str | None = None,
    frames: str = FrameKind.KEYFRAMES.value,
    source: str | None = None,
    is_z_up: bool = False,
    is_without_doubted: bool = False,
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
        crs: of LAS, LAZ, PLY and Metashape's cameras, as PROJ reads it, such as EPSG:32615; None:
            the map's own axes for PLY and for maps without a place, and UTM for the others.
        frames: which frames have images: keyframes, all, or sharpest:N, see `FrameChoice`.
        source: where frames between keyframes are read again; None: where the run had them.
        is_z_up: the map is turned so that +z points away from the ground.
        is_without_doubted: keyframes whose places the run's verdict doubts are left out, and what
            hangs on them.
        progress: called on this thread as files are written.
        is_cancelled: asked between files.

    Raises:
        ConfigError: the run has no snapshot, or no such map, the target holds something, a format
            cannot hold the map's cameras or needs a place on the globe, or dense points are of
            another map; keyframes are to be left out, and there is no verdict, or little is left.
        AdapterUnavailableError: a package that a format needs is not installed.
        SourceError: frames between keyframes cannot be read again.
        SnapshotError: the files cannot be written, or images of the map are missing.
        ExportCancelledError: it was cancelled.
    """
    to = to.resolve()
    snapshot, models = _checked(run, to, formats=formats, map_number=map_number)
    job = ExportJob(
        run=run,
        reconstruction=read_model(models.pop(map_number)),
        to=to.with_name(f".tmp-{to.name}-{os.getpid()}"),
        map_number=map_number,
        place=read_place(snapshot, map_number),
        progress=progress,
        is_cancelled=is_cancelled,
    )
    left_out = _left_out(job, snapshot, models)
    if is_without_doubted:
        job = without_doubted(job)
    upright = upright_of(job.reconstruction, is_on_globe=job.place is not None) if is_z_up else None
    if upright is not None:
        job = _turned(job, upright)
    plan = _Plan.of(
        job, set(formats), crs=crs, choice=FrameChoice.parse(frames), has_source=source is not None
    )
    with _written_whole(job, to):
        written, figures = plan.write(job, source=source)
    return Export(
        path=to,
        num_images=written.reconstruction.num_reg_images(),
        num_points3D=written.reconstruction.num_points3D(),
        left_out=left_out,
        notes=(
            *plan.notes,
            *job.notes,
            *([] if upright is None else [upright.words]),
            *([] if figures is None else _words_of(figures)),
        ),
        num_dense_points=None if plan.dense is None else plan.dense.header.num_points,
    )


def _checked(
    run: Path, to: Path, *, formats: Collection[ExportFormat], map_number: int
) -> tuple[Path, dict[int, Path]]:
    """The latest snapshot and its maps, by number.

    Raises:
        ConfigError: there is no such map, nothing is to be written, or the target holds something.
    """
    if not formats:
        raise ConfigError("an export needs at least one format")
    snapshot = _latest_of(run)
    models = _models(snapshot)
    if 0 not in models:
        raise _no_snapshot(run)
    if map_number not in models:
        raise ConfigError(f"{run}: has no map {map_number}, only 0 to {max(models)}")
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise ConfigError(f"{to}: exists and is not an empty folder")
    return snapshot, models


@contextmanager
def _written_whole(job: ExportJob, to: Path) -> Iterator[None]:
    """Makes the job's folder, which becomes the export at the end of the block.

    After an exception in the block neither it nor the folders above that were made are left.

    Raises:
        SnapshotError: a file cannot be read or written.
        ExportCancelledError: the export was cancelled.
    """
    made_parents = [one for one in to.parents if not one.exists()]
    is_written = False
    try:
        job.to.mkdir(parents=True)
        yield
        job.check()
        shutil.rmtree(job.to / STAGED, ignore_errors=True)
        job.to.replace(to)
        is_written = True
    except OSError as error:
        raise _failed(error, job=job, to=to) from error
    finally:
        shutil.rmtree(job.to, ignore_errors=True)
        for parent in [] if is_written else made_parents:
            with suppress(OSError):  # it is not empty
                parent.rmdir()


def _turned(job: ExportJob, upright: Upright) -> ExportJob:
    """The job of a map that is turned; one on the globe stays as it is."""
    import pycolmap

    if job.place is not None:
        return job
    turn = pycolmap.Sim3d(1.0, pycolmap.Rotation3d(upright.upright_from_map), np.zeros(3))
    job.reconstruction.transform(turn)
    return replace(job, upright_from_map=upright.upright_from_map)


def _words_of(figures: FrameFigures) -> list[str]:
    """Which frames an export has besides keyframes, for people."""
    words = []
    if figures.num_tracked:
        words.append(
            f"{figures.num_keyframes} keyframes and {figures.num_tracked} frames between them;"
            f" reprojection error {figures.error_px:.2f} px in these, the map's"
            f" {figures.keyframe_error_px:.2f} px"
        )
    if figures.left_out:
        reasons = ", ".join(f"{number} {why}" for why, number in sorted(figures.left_out.items()))
        words.append(f"frames left out: {reasons}")
    return words


def _failed(error: OSError, *, job: ExportJob, to: Path) -> SnapshotError:
    """What is known of an error of the system: a file of the run that it names was to be read."""
    words = error.strerror or str(error)
    is_of_run = isinstance(error.filename, str | Path) and error.filename2 is None
    path = Path(error.filename) if is_of_run else to
    if is_of_run and path.resolve().is_relative_to(job.run.resolve()):
        return SnapshotError(f"{path}: cannot be read: {words}")
    return SnapshotError(f"{to}: cannot be written: {words}")


def _latest_of(run: Path) -> Path:
    """The folder of a run's latest snapshot; a run that goes on has another one soon.

    Raises:
        ConfigError: there is none.
    """
    try:
        return (run / "latest").resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself
        if not run.is_dir():
            raise ConfigError(f"{run}: no such run folder") from error
        raise _no_snapshot(run) from error


def _no_snapshot(run: Path) -> ConfigError:
    from engine.output.snapshots import words_of_lost_latest

    return ConfigError(f"{run}: has no snapshot to export{words_of_lost_latest(run)}")


def _left_out(job: ExportJob, snapshot: Path, others: Mapping[int, Path]) -> dict[int, int]:
    """How many keyframes each other map has; one that cannot be read is noted."""
    left_out = {}
    for number, folder in others.items():
        num_keyframes = read_num_keyframes(snapshot, number)
        try:
            left_out[number] = (
                read_model(folder).num_reg_images() if num_keyframes is None else num_keyframes
            )
        except SnapshotError as error:
            job.notes.append(f"another map is left out: {error}")
    return left_out


def _models(snapshot: Path) -> dict[int, Path]:
    """The folders of a snapshot's maps, by number."""
    folders = (snapshot / "sparse").glob("[0-9]*")
    return {int(folder.name): folder for folder in sorted(folders) if folder.name.isdecimal()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Plan:
    """What an export writes; made before anything is written."""

    formats: set[ExportFormat]
    dense: RunDensePoints | None
    crs: PlacedCrs | None  # of what is always in one, and of what else was asked for
    ply_crs: PlacedCrs | None
    choice: FrameChoice
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        job: ExportJob,
        formats: set[ExportFormat],
        *,
        crs: str | None,
        choice: FrameChoice,
        has_source: bool,
    ) -> _Plan:
        """Opens what the formats need.

        Raises:
            ConfigError: they cannot be written, as in `export`.
            AdapterUnavailableError: a package is missing.
        """
        if choice.kind is not FrameKind.KEYFRAMES and not formats & _OF_FRAMES:
            raise ConfigError("--frames is for --undistort and --nerfstudio")
        if choice.kind is FrameKind.KEYFRAMES and has_source:
            raise ConfigError(
                "--source says where frames between keyframes are: it is for --frames all and"
                " --frames sharpest:N"
            )
        for kind in _ON_GLOBE:
            if kind in formats:
                job.needed_place(f"--{kind}")
        for kind in sorted(formats & {ExportFormat.LAS, ExportFormat.LAZ}):
            check_las(is_laz=kind is ExportFormat.LAZ)
        in_crs = formats & _ALWAYS_IN_CRS if job.place is not None else set()
        opened = None
        if crs is not None or in_crs:
            _check_crs(formats, is_asked=crs is not None)
            asked_by = "--crs" if crs is not None else f"--{min(in_crs)}"
            opened = open_crs(crs, job.needed_place(asked_by), asked_by=asked_by)
            if opened.outside:
                job.notes.append(opened.outside)
            if opened.accuracy_m:
                job.notes.append(
                    f"coordinates in {opened.name}: PROJ knows the change from WGS 84 to"
                    f" {opened.accuracy_m:g} m"
                )
        dense, note = _dense_for(job, formats)
        notes = [note] if note else []
        if ExportFormat.NERFSTUDIO in formats and ExportFormat.UNDISTORT not in formats:
            check_cameras(job.reconstruction)
        if ExportFormat.ODM in formats:
            notes.append(check_odm(job))
        if ExportFormat.BUNDLER in formats:
            check_bundler(job, is_undistorted=ExportFormat.UNDISTORT in formats)
        if ExportFormat.METASHAPE in formats:
            check_metashape(job)
        return cls(
            formats=formats,
            dense=dense,
            crs=opened,
            ply_crs=opened if crs is not None else None,
            choice=choice,
            notes=tuple(notes),
        )

    def write(self, job: ExportJob, *, source: str | None) -> tuple[ExportJob, FrameFigures | None]:
        """Writes all formats.

        Returns:
            The job with the map of the images that were written, and which frames they are of;
            None: all keyframes.
        """
        formats, figures = self.formats, None
        if formats & _WITH_IMAGES:
            check_images(job)
        self._write_las(job)
        self._write_on_globe(job)
        if ExportFormat.TUM in formats:
            write_tum(job)
        if formats & _OF_FRAMES:
            job, figures = stage_frames(job, self.choice, instead=source)
        if ExportFormat.UNDISTORT in formats:
            job = replace(job, reconstruction=write_undistorted(job))
            if self.dense is None:
                from engine.output.sparse_ply import write_sparse_ply

                write_sparse_ply(job.reconstruction, job.to / _INITIAL_POINTS)
            else:
                write_dense(job, self.dense, job.to / _INITIAL_POINTS)
        elif self.dense is not None and ExportFormat.DENSE in formats:
            write_dense(job, self.dense, job.to / DENSE_PLY.name)
        if formats & {ExportFormat.PLY, ExportFormat.NERFSTUDIO}:
            write_points(job, self.ply_crs if ExportFormat.PLY in formats else None)
        if ExportFormat.NERFSTUDIO in formats:
            if ExportFormat.UNDISTORT not in formats:
                copy_images(job)
                write_masks(job)
            is_model = ExportFormat.UNDISTORT in formats
            write_nerfstudio(job, points_name=_INITIAL_POINTS if is_model else POINTS_NAME)
        if ExportFormat.BUNDLER in formats:
            is_undistorted = ExportFormat.UNDISTORT in formats
            write_bundler(job, images=job.to if is_undistorted else job.run)
        return job, figures

    def _write_las(self, job: ExportJob) -> None:
        for kind in (ExportFormat.LAS, ExportFormat.LAZ):
            if kind in self.formats:
                write_las(job, self.crs, self.dense, is_laz=kind is ExportFormat.LAZ)

    def _write_on_globe(self, job: ExportJob) -> None:
        """Writes what says where the map lies on the globe."""
        if job.place is None:
            return
        write_origin(job.to, job.place, self.crs)
        if ExportFormat.GEOJSON in self.formats:
            write_geojson(job, job.place)
        if ExportFormat.KML in self.formats:
            write_kml(job, job.place)
        if ExportFormat.ODM in self.formats:
            write_odm(job, job.place)
        if ExportFormat.METASHAPE in self.formats and self.crs is not None:
            write_metashape(job, self.crs)


def _check_crs(formats: set[ExportFormat], *, is_asked: bool) -> None:
    """Raises ConfigError where a CRS was asked for and no format is in it, or one must not be."""
    if not is_asked:
        return
    if not formats & _IN_CRS:
        raise ConfigError("--crs is for --las, --laz, --ply and --metashape")
    if {ExportFormat.PLY, ExportFormat.NERFSTUDIO} <= formats:
        raise ConfigError(
            "--crs: points.ply of --nerfstudio lies in the world of its cameras; export --ply to a"
            " folder of its own"
        )


def _dense_for(job: ExportJob, formats: set[ExportFormat]) -> tuple[RunDensePoints | None, str]:
    """The dense points that formats write, and why others do without.

    Raises:
        ConfigError: they are asked for, and there are none of the map.
    """
    if job.doubted and ExportFormat.DENSE in formats:
        raise ConfigError("--dense: dense points are of all keyframes, also of doubted ones")
    if ExportFormat.DENSE in formats:
        return open_dense(job.run, job.reconstruction, map_number=job.map_number), ""
    has_dense = (job.run / DENSE_PLY).is_file() and job.map_number == 0
    if not (has_dense and formats & _WITH_DENSE):
        return None, ""
    if job.doubted:
        return None, "dense points are left out: they are of all keyframes, also of doubted ones"
    try:
        return open_dense(job.run, job.reconstruction, map_number=job.map_number), ""
    except ConfigError as error:
        return None, f"dense points are left out: {error}"
