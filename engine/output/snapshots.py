"""Snapshots: COLMAP models on disk during a run; each appears whole, the newest is `latest`.

snapshots/000001/sparse/0/{cameras,images,points3D,rigs,frames}.bin
                 images -> ../../images
                 masks -> ../../masks     where there are any
                 snapshot.json
latest -> snapshots/000001
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pycolmap

from engine.config import SnapshotsConfig
from engine.errors import SnapshotError
from engine.mapping.steps import MapCopy
from engine.mapping.stored_state import StoredModel
from engine.model_files import ModelFileError, check_model_files
from engine.output.files import (
    TEMPORARY_PREFIX,
    flush_to_disk,
    link_atomically,
    temporary_sibling,
    write_atomically,
)
from engine.output.model_writing import MODEL_FILES, write_model
from engine.output.run_folder import MASKS_FOLDER
from engine.regular_files import read_regular_file

logger = logging.getLogger(__name__)

_MAX_RECORD_BYTES = 2**28
_SHORTEST_TRACK = 2  # COLMAP deletes points with fewer observations

JsonValue = object  # what json can write: scalars, and lists and mappings of them


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFigures:
    """Figures of one COLMAP model."""

    is_georeferenced: bool  # in metres east, north, up of the snapshot's origin
    num_registered: int
    num_points3D: int
    num_observations: int
    mean_track_length: float
    mean_reprojection_error_px: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenSnapshot:
    """A snapshot on disk; ``models`` in the order of the folders ``sparse/0``, ``sparse/1``, ..."""

    sequence: int
    path: Path
    models: tuple[ModelFigures, ...]
    image_names: tuple[str, ...]  # of the images in the models
    elapsed_s: float

    @property
    def first(self) -> ModelFigures:
        """Figures of ``sparse/0``."""
        return self.models[0]


def read_models(snapshot: Path) -> tuple[StoredModel, ...]:
    """Reads the models of a snapshot: its folders ``sparse/0``, ``sparse/1``, ... in their order.

    Raises:
        SnapshotError: there is none, or one of them cannot be read.
    """
    sparse = snapshot / "sparse"
    try:
        found = [one for one in sparse.iterdir() if one.name.isdecimal() and one.is_dir()]
    except OSError as error:
        raise SnapshotError(f"{sparse}: cannot be read: {error.strerror}") from error
    if not found:
        raise SnapshotError(f"{sparse}: holds no model")
    models = []
    for path in sorted(found, key=lambda one: int(one.name)):
        try:
            check_model_files(path)  # COLMAP's reader trusts the counts in them
            reconstruction = pycolmap.Reconstruction(path)
        except (ModelFileError, OSError, RuntimeError, ValueError, MemoryError) as error:
            raise SnapshotError(f"{path}: cannot be read: {error}") from error
        record = _map_record(path.parents[1] / "snapshot.json", int(path.name))
        models.append(StoredModel(reconstruction=reconstruction, record=record))
    return tuple(models)


def snapshots_of(run_folder: Path) -> tuple[Path, ...]:
    """The snapshots of a run: the latest one, then the others from new to old."""
    latest = run_folder / "latest"
    found = sorted(_snapshot_paths(run_folder), key=lambda one: int(one.name), reverse=True)
    if not latest.exists():
        return tuple(found)
    return (latest, *(one for one in found if not latest.samefile(one)))


def words_of_lost_latest(run_folder: Path) -> str:
    """What helps a run whose newest snapshot is lost; "" where it never had one."""
    if not ((run_folder / "latest").is_symlink() or snapshots_of(run_folder)):
        return ""
    return f"; its newest snapshot is lost: livesfm resume {run_folder} writes it again"


def _map_record(path: Path, number: int) -> Mapping[str, Any]:
    """What a snapshot says of one of its maps besides COLMAP's files; empty: nothing.

    Raises:
        SnapshotError: it cannot be read.
    """
    try:
        entries = json.loads(read_regular_file(path, max_bytes=_MAX_RECORD_BYTES))
        records = entries.get("maps", [])
        record = records[number] if number < len(records) else {}
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise SnapshotError(f"{path}: cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise SnapshotError(f"{path}: cannot be read: a map's record is no object")
    return record


def next_sequence(run_folder: Path) -> int:
    """The number of the next snapshot: one more than the largest there is, else 1."""
    return max((int(path.name) for path in _snapshot_paths(run_folder)), default=0) + 1


def write_snapshot(
    run_folder: Path,
    copies: Sequence[MapCopy],
    *,
    sequence: int,
    entries: Mapping[str, JsonValue],
    config: SnapshotsConfig,
    before_latest: Callable[[], None] | None = None,
) -> WrittenSnapshot:
    """Writes models as one snapshot and makes it `latest`.

    Args:
        run_folder: the run.
        copies: one per map, in the order of their folders; short tracks are deleted from them.
        sequence: the snapshot's number, see `next_sequence`.
        entries: of ``snapshot.json`` besides the figures of the models.
        config: how long tracks must be, and how many snapshots are kept.
        before_latest: writes what else belongs to the snapshot once its folder is in place; an
            OSError of it is one of the snapshot.

    Raises:
        SnapshotError: there is nothing to write, the number is taken, or the files cannot be
            written. Nothing unfinished is left, and `latest` points where it did.
    """
    started_at_s = time.monotonic()
    if not copies:
        raise SnapshotError("a snapshot needs at least one model")
    path = run_folder / "snapshots" / f"{sequence:06d}"
    if path.exists():
        raise SnapshotError(f"{path}: the snapshot exists")
    try:
        models = _write_folder(path, copies, sequence=sequence, entries=entries, config=config)
        if before_latest is not None:
            _run_or_delete(before_latest, path)
            flush_to_disk(run_folder)
        link_atomically(run_folder / "latest", f"snapshots/{path.name}")
        flush_to_disk(run_folder)
    except OSError as error:
        raise SnapshotError(f"{path}: cannot be written: {error.strerror or error}") from error
    _delete_old(run_folder, keep=config.keep)
    return WrittenSnapshot(
        sequence=sequence,
        path=path,
        models=models,
        image_names=tuple(_image_names(copies)),
        elapsed_s=time.monotonic() - started_at_s,
    )


def _run_or_delete(write: Callable[[], None], path: Path) -> None:
    """Writes what belongs to a snapshot; where that fails, the snapshot's folder goes."""
    try:
        write()
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
        raise


def is_latest(run_folder: Path, sequence: int) -> bool:
    """Whether `latest` is the snapshot of a number, with all files of its first model."""
    latest = run_folder / "latest"
    try:
        record = json.loads((latest / "snapshot.json").read_bytes())
        sizes = [(latest / "sparse" / "0" / name).stat().st_size for name in MODEL_FILES]
    except (OSError, ValueError):
        return False
    return bool(record["sequence"] == sequence and all(sizes))


def _write_folder(
    path: Path,
    copies: Sequence[MapCopy],
    *,
    sequence: int,
    entries: Mapping[str, JsonValue],
    config: SnapshotsConfig,
) -> tuple[ModelFigures, ...]:
    """Prepares the snapshot beside its place and renames it there."""
    path.parent.mkdir(exist_ok=True)
    for leftover in path.parent.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = temporary_sibling(path)
    try:
        models = []
        for number, copy in enumerate(copies):
            _prepare_model(copy.reconstruction, min_track_length=config.min_track_length)
            write_model(copy.reconstruction, temporary / "sparse" / str(number))
            models.append(_model_figures(copy))
        (temporary / "images").symlink_to("../../images")
        if (path.parent.parent / MASKS_FOLDER).is_dir():
            (temporary / MASKS_FOLDER).symlink_to(f"../../{MASKS_FOLDER}")
        record = {
            **entries,
            "sequence": sequence,
            "models": [asdict(model) for model in models],
            "maps": [copy.record for copy in copies],  # what a run that goes on needs to know
        }
        write_atomically(temporary / "snapshot.json", f"{json.dumps(record, indent=2)}\n".encode())
        flush_to_disk(temporary / "sparse")
        flush_to_disk(temporary)
        temporary.rename(path)
        flush_to_disk(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return tuple(models)


def _image_names(copies: Sequence[MapCopy]) -> Iterator[str]:
    for copy in copies:
        for image_id in copy.reconstruction.reg_image_ids():
            yield copy.reconstruction.image(image_id).name


def _prepare_model(reconstruction: pycolmap.Reconstruction, *, min_track_length: int) -> None:
    if min_track_length > _SHORTEST_TRACK:
        short = [
            point3D_id
            for point3D_id, point3D in reconstruction.points3D.items()
            if point3D.track.length() < min_track_length
        ]
        for point3D_id in short:
            reconstruction.delete_point3D(point3D_id)
    reconstruction.update_point_3d_errors()  # readers take the error from the file


def _model_figures(copy: MapCopy) -> ModelFigures:
    reconstruction = copy.reconstruction
    return ModelFigures(
        is_georeferenced=copy.is_in_metres,
        num_registered=reconstruction.num_reg_images(),
        num_points3D=reconstruction.num_points3D(),
        num_observations=reconstruction.compute_num_observations(),
        mean_track_length=reconstruction.compute_mean_track_length(),
        mean_reprojection_error_px=reconstruction.compute_mean_reprojection_error(),
    )


def _snapshot_paths(run_folder: Path) -> list[Path]:
    """All snapshots, oldest first."""
    folder = run_folder / "snapshots"
    if not folder.is_dir():
        return []
    paths = (path for path in folder.iterdir() if path.name.isdecimal())
    return sorted(paths, key=lambda path: int(path.name))


def _delete_old(run_folder: Path, *, keep: int) -> None:
    """Deletes all but the newest ``keep`` snapshots; 0 keeps all, and the latest always stays."""
    latest = (run_folder / "latest").resolve()
    for path in _snapshot_paths(run_folder)[:-keep] if keep else []:
        if path.resolve() == latest:
            continue
        doomed = temporary_sibling(path)
        try:
            path.rename(doomed)  # at no time does a number stand for half a snapshot
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning("%s: an old snapshot cannot be deleted: %s", path, error.strerror)
