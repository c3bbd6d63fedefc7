"""``train``: the latest snapshot for a splat trainer that reads while the run goes on.

    train -> training/000007      replaced in one step
    training/000007/sparse/0/     PINHOLE model of a snapshot: *.bin, points3D.ply
                    transforms.json, image_names.csv
                    images/, masks/     hard links
    training/images/, masks/      undistorted; an image is written once and never again
    training/state.json           which files belong to which image and calibration

A version is a whole training set without links to elsewhere, and never changes: a reader that
resolves ``train`` once sees one state of the map. One that opens file after file by ``train``
itself may open files of two versions. Versions stay, since each takes little more than its model,
until all of them take more disk space than they may: then the oldest go, down to eight. Images that
no version has any more go with them.

Images are undistorted by the calibration of the time. Later the map has another: as long as the
images are still those of some PINHOLE camera, to a pixel and to half a thousandth of their edge,
only the parameters of that camera follow. Else the lens has changed too much, and the camera begins
a new generation: its images are written anew, under new names, before a version names them.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import ConfigError, JournalError, SnapshotError
from engine.model_files import ModelFileError, check_model_files
from engine.output.files import (
    TEMPORARY_PREFIX,
    flush_to_disk,
    link_atomically,
    link_or_copy,
    temporary_sibling,
    write_atomically,
)
from engine.output.flat_names import IMAGE_NAMES, FlatNames, table_of
from engine.output.journal import encode_mask, mask_name
from engine.output.model_writing import write_model
from engine.output.nerfstudio import TRANSFORMS_NAME, transforms_record
from engine.output.run_folder import MASKS_FOLDER, TRAIN_LINK, TRAINING_FOLDER
from engine.output.sparse_ply import write_sparse_ply
from engine.output.undistortion import (
    PinholeFit,
    PinholeWarp,
    fit_pinhole,
    pinhole_of,
    read_mask,
    undistort_model,
    undistorted_file,
)
from engine.regular_files import read_regular_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pycolmap

logger = logging.getLogger(__name__)

_STATE = "state.json"
_IMAGES = "images"
_POINTS = "sparse/0/points3D.ply"
_MAX_STATE_BYTES = 2**28
_MAX_SIZE_RATIO = 4  # of undistorted images to their originals; COLMAP makes them twice as large
_MAX_SHIFT_RATIO = 1 / 2000  # of the longer edge, that pixels may be off their PINHOLE camera's
_MAX_SHIFT_PX = 1.0  # of larger images
_UNREADABLE = (  # what a damaged state raises
    *(OSError, ValueError, LookupError, TypeError, AttributeError),
    *(OverflowError, RecursionError, MemoryError),
)
_MIN_KEPT = 8  # versions, however large: who reads one has so many updates time
_MIN_IMAGES = 2  # of a version
_NAMES_HEADER = ("image", "frame", "camera_id", "generation")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFigures:
    """What a version of the training folder has."""

    version: int
    num_images: int
    num_written: int  # images that were written for it
    num_missing: int  # keyframes of the map whose images are not in the run, or not yet
    num_generations: int  # of the camera with most of them


@dataclass(slots=True, kw_only=True)
class _Generation:
    """Images of one camera that were undistorted alike."""

    number: int
    original: pycolmap.Camera  # with the calibration that they were undistorted by
    pinhole: pycolmap.Camera  # that they became images of


class TrainingFolder:
    """Keeps ``train`` of a run up to date with snapshots. One thread at a time.

    Args:
        run_path: the run folder.
        jpeg_quality: of images, 1 to 100.
        keep_bytes: disk space of former versions and their images; the newest eight stay anyhow.

    Raises:
        JournalError: what a crash left cannot be deleted.
    """

    def __init__(self, run_path: Path, *, jpeg_quality: int, keep_bytes: int) -> None:
        self._run_path = run_path
        self._path = run_path / TRAINING_FOLDER
        self._jpeg_quality = jpeg_quality
        self._keep_bytes = keep_bytes
        self._sizes: dict[Path, int] = {}  # of versions, bytes
        self._generations: dict[int, _Generation] = {}  # by camera
        self._mask_stamps: dict[str, str] = {}  # of the masks in the run, by flat name
        self._names = FlatNames()
        self._version = 0
        self._load()

    @property
    def run_path(self) -> Path:
        """The run folder."""
        return self._run_path

    def update(self, snapshot: Path, *, between: Callable[[], None]) -> TrainingFigures | None:
        """Writes a version of the first map of a snapshot and makes it ``train``.

        Args:
            snapshot: its folder, which must not be replaced meanwhile.
            between: is called before each file and at each other step; what it raises ends the
                update, and ``train`` stays.

        Returns:
            Figures; None where too few images are in the run to train with.

        Raises:
            ConfigError: a camera's images cannot become PINHOLE ones.
            SnapshotError: the snapshot cannot be read.
            JournalError: something cannot be written; ``train`` stays.
        """
        model = _read_model(snapshot)
        _refuse_spherical(model)
        with _writing(self._path):
            (self._path / _IMAGES).mkdir(parents=True, exist_ok=True)
            num_missing = self._leave_out_missing(model)
            if model.num_reg_images() < _MIN_IMAGES:
                return None
            frames = {i: model.image(i).name for i in model.reg_image_ids()}
            pinholes = self._pinholes(model)
            files = {i: self._file_of(model.image(i).camera_id, frames[i]) for i in frames}
            has_masks = self._has_masks(frames)
            num_written = 0
            for camera_id in sorted({model.image(i).camera_id for i in frames}):
                own = {
                    i: file for i, file in files.items() if model.image(i).camera_id == camera_id
                }
                num_written += self._write_images(
                    self._generations[camera_id], frames, own, has_masks=has_masks, between=between
                )
            undistort_model(model, pinholes, between=between)
            for image_id, file in files.items():
                model.image(image_id).name = file
            between()
            self._write_state()
            self._version += 1
            version = self._write_version(model, frames, has_masks=has_masks, between=between)
            between()
            link_atomically(self._run_path / TRAIN_LINK, f"{TRAINING_FOLDER}/{version.name}")
            flush_to_disk(self._run_path)
        self._delete_old(set(files.values()))
        return TrainingFigures(
            version=self._version,
            num_images=len(frames),
            num_written=num_written,
            num_missing=num_missing,
            num_generations=max(one.number for one in self._generations.values()),
        )

    # -- images ---------------------------------------------------------------------------------

    def _pinholes(self, model: pycolmap.Reconstruction) -> dict[int, pycolmap.Camera]:
        """The PINHOLE camera of each camera's images, by the model's calibration."""
        used = {model.image(i).camera_id for i in model.reg_image_ids()}
        pinholes = {}
        for camera_id in sorted(used):
            camera = model.camera(camera_id)
            known = self._generations.get(camera_id)
            fit = _fit(known, camera) if known and _is_same_size(known, camera) else None
            if fit is None or fit.max_error_px > _max_shift_px(camera):
                number = 1 if known is None else known.number + 1
                pinholes[camera_id] = pinhole_of(camera)
                self._generations[camera_id] = _Generation(
                    number=number,
                    original=_copy_of(camera),  # the model changes its own
                    pinhole=_copy_of(pinholes[camera_id]),
                )
            else:
                pinholes[camera_id] = fit.camera
        for camera_id in set(model.cameras) - used:  # of images that are left out
            pinholes[camera_id] = pinhole_of(model.camera(camera_id))
        return pinholes

    def _file_of(self, camera_id: int, frame_name: str) -> str:
        generation = self._generations[camera_id].number
        return self._names.of(frame_name, key=f"{camera_id}\n{generation}\n{frame_name}")

    def _leave_out_missing(self, model: pycolmap.Reconstruction) -> int:
        """Takes images out of a model that the run does not have; returns how many."""
        missing = [
            image_id
            for image_id in model.reg_image_ids()
            if not (self._run_path / _IMAGES / model.image(image_id).name).is_file()
        ]
        for image_id in missing:
            model.deregister_frame(model.image(image_id).frame_id)
        return len(missing)

    def _has_masks(self, frames: Mapping[int, str]) -> bool:
        """Whether an image has a mask: all have one then, or none, as trainers want."""
        return any(
            (self._run_path / MASKS_FOLDER / mask_name(one)).is_file() for one in frames.values()
        )

    def _write_images(
        self,
        generation: _Generation,
        frames: Mapping[int, str],
        files: Mapping[int, str],
        *,
        has_masks: bool,
        between: Callable[[], None],
    ) -> int:
        """Writes the images of a camera that are new, and masks that are new or changed.

        Returns:
            How many images were written.
        """
        # Where pixels come from takes the memory of some images: it is there only while needed.
        warp = functools.cache(lambda: PinholeWarp(generation.original, generation.pinhole))
        num_written = 0
        for image_id, file in files.items():
            path = self._path / _IMAGES / file
            if not path.exists():
                between()
                source = self._run_path / _IMAGES / frames[image_id]
                data = undistorted_file(
                    source, warp(), suffix=path.suffix, jpeg_quality=self._jpeg_quality
                )
                between()
                write_atomically(path, data)
                num_written += 1
            if has_masks:
                self._write_mask(file, frames[image_id], warp, between=between)
        return num_written

    def _write_mask(
        self,
        file: str,
        frame_name: str,
        warp: Callable[[], PinholeWarp],
        *,
        between: Callable[[], None],
    ) -> None:
        source = self._run_path / MASKS_FOLDER / mask_name(frame_name)
        path = self._path / MASKS_FOLDER / mask_name(file)
        stamp = _stamp(source)
        if self._mask_stamps.get(file) == stamp and path.exists():
            return
        between()
        mask = read_mask(source, warp().original) if stamp else None
        size = (warp().pinhole.height, warp().pinhole.width)
        undistorted = np.ones(size, np.bool_) if mask is None else warp().mask(mask)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, encode_mask(undistorted))
        self._mask_stamps[file] = stamp

    # -- versions -------------------------------------------------------------------------------

    def _write_version(
        self,
        model: pycolmap.Reconstruction,
        frames: Mapping[int, str],
        *,
        has_masks: bool,
        between: Callable[[], None],
    ) -> Path:
        path = self._path / f"{self._version:06d}"
        temporary = temporary_sibling(path)
        masks_folder = MASKS_FOLDER if has_masks else ""
        try:
            _write_trainer_model(temporary, model, masks_folder=masks_folder, between=between)
            rows = [
                (model.image(i).name, name, camera_id, self._generations[camera_id].number)
                for i, name in frames.items()
                for camera_id in [model.image(i).camera_id]
            ]
            write_atomically(temporary / IMAGE_NAMES, table_of(_NAMES_HEADER, rows))
            files = [model.image(i).name for i in frames]
            _link_all(self._path / _IMAGES, files, to=temporary / _IMAGES, between=between)
            if has_masks:
                masks = [mask_name(file) for file in files]
                _link_all(
                    self._path / MASKS_FOLDER, masks, to=temporary / MASKS_FOLDER, between=between
                )
            flush_to_disk(temporary)
            between()
            temporary.rename(path)
            flush_to_disk(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return path

    def _versions(self) -> list[Path]:
        """All versions, oldest first."""
        if not self._path.is_dir():
            return []
        found = (one for one in self._path.iterdir() if one.name.isdecimal())
        return sorted(found, key=lambda one: int(one.name))

    def _delete_old(self, files: Set[str]) -> None:
        """Deletes the oldest versions that are too many, and images that no version has.

        Args:
            files: the images of the newest version.
        """
        try:
            versions = self._versions()
            self._sizes = {
                one: self._sizes[one] if one in self._sizes else _size_of(one)
                for one in versions[:-1]
            }
            num_bytes = sum(self._sizes.values()) + self._delete_unused(files)
            for old in versions[:-_MIN_KEPT]:
                if num_bytes <= self._keep_bytes:
                    break
                doomed = temporary_sibling(old)
                old.rename(doomed)
                shutil.rmtree(doomed)
                del self._sizes[old]
                num_bytes = sum(self._sizes.values()) + self._delete_unused(files)
        except OSError as error:
            logger.warning(
                "%s: what is old cannot be deleted: %s", self._path, error.strerror or error
            )

    def _delete_unused(self, files: Set[str]) -> int:
        """Deletes images and masks that no version has; returns the bytes of those that are old.

        A version has a link to each of its own, or a copy where there are no links.
        """
        num_bytes = 0
        in_use = {_IMAGES: files, MASKS_FOLDER: {mask_name(file) for file in files}}
        for folder, names in in_use.items():
            if not (self._path / folder).is_dir():
                continue
            for entry in os.scandir(self._path / folder):
                if entry.name in names:
                    continue
                status = entry.stat(follow_symlinks=False)
                if status.st_nlink > 1:
                    num_bytes += status.st_size
                else:
                    os.unlink(entry.path)
        return num_bytes

    # -- state ----------------------------------------------------------------------------------

    def _write_state(self) -> None:
        record = {
            "names": dict(self._names.given),
            "cameras": {
                str(camera_id): {
                    "generation": one.number,
                    "original": _camera_record(one.original),
                    "pinhole": _camera_record(one.pinhole),
                }
                for camera_id, one in self._generations.items()
            },
            "masks": self._mask_stamps,
        }
        write_atomically(self._path / _STATE, f"{json.dumps(record)}\n".encode())

    def _load(self) -> None:
        """Goes on with what a run before has written; what no state names is left as it is."""
        with _writing(self._path):
            for folder in (
                self._path,
                *(self._path / one for one in (_IMAGES, MASKS_FOLDER)),
            ):
                for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                    leftover.unlink(missing_ok=True)
        self._version = max((int(one.name) for one in self._versions()), default=0)
        there = {one.stem for one in (self._path / _IMAGES).glob("*")}
        try:
            data = read_regular_file(self._path / _STATE, max_bytes=_MAX_STATE_BYTES)
            record = json.loads(data)
            names = {str(key): str(name) for key, name in record["names"].items()}
            self._generations = {
                int(camera_id): _generation(one) for camera_id, one in record["cameras"].items()
            }
            self._mask_stamps = {str(k): str(stamp) for k, stamp in record["masks"].items()}
        except _UNREADABLE:
            self._generations, self._mask_stamps, names = {}, {}, {}
        self._names = FlatNames(_without_paths(names), taken=there)


def _write_trainer_model(
    folder: Path,
    model: pycolmap.Reconstruction,
    *,
    masks_folder: str,
    between: Callable[[], None],
) -> None:
    """Writes ``sparse/0`` with ``points3D.ply``, and ``transforms.json``, of PINHOLE images."""
    sparse = folder / "sparse" / "0"
    between()
    write_model(model, sparse)
    between()
    write_sparse_ply(model, folder / _POINTS)
    between()
    record = transforms_record(model, points_name=_POINTS, masks_folder=masks_folder)
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / TRANSFORMS_NAME, text.encode())
    flush_to_disk(sparse)


def _read_model(snapshot: Path) -> pycolmap.Reconstruction:
    import pycolmap

    path = snapshot / "sparse" / "0"
    try:
        check_model_files(path)
        return pycolmap.Reconstruction(path)
    except (ModelFileError, OSError, RuntimeError, ValueError, MemoryError) as error:
        raise SnapshotError(f"{path}: cannot be read: {error}") from error


def _refuse_spherical(model: pycolmap.Reconstruction) -> None:
    if any(camera.is_spherical() for camera in model.cameras.values()):
        raise ConfigError(
            f"{TRAIN_LINK}: has no images of cameras that see all around: livesfm export"
            " --undistort makes views of them once the run has ended"
        )


def _is_same_size(known: _Generation, camera: pycolmap.Camera) -> bool:
    return (known.original.width, known.original.height) == (camera.width, camera.height)


def _max_shift_px(camera: pycolmap.Camera) -> float:
    return min(_MAX_SHIFT_RATIO * max(camera.width, camera.height), _MAX_SHIFT_PX)


def _fit(known: _Generation, camera: pycolmap.Camera) -> PinholeFit:
    return fit_pinhole(known.original, known.pinhole, camera)


def _copy_of(camera: pycolmap.Camera) -> pycolmap.Camera:
    import pycolmap

    return pycolmap.Camera(camera.todict())


def _link_all(folder: Path, names: Iterable[str], *, to: Path, between: Callable[[], None]) -> None:
    """Gives files another place; copies where the file system has no hard links."""
    to.mkdir()
    for name in names:
        between()
        link_or_copy(folder / name, to / name)
    flush_to_disk(to)


def _size_of(version: Path) -> int:
    """Bytes of a version, but for images and masks that are links."""
    num_bytes = 0
    for folder, _, names in os.walk(version):
        for name in names:
            status = Path(folder, name).stat()
            if status.st_nlink > 1:
                break  # all of a folder are
            num_bytes += status.st_size
    return num_bytes


def _stamp(path: Path) -> str:
    """What changes with a file; "" where there is none."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def _camera_record(camera: pycolmap.Camera) -> dict[str, Any]:
    return {
        "model": camera.model_name,
        "width": camera.width,
        "height": camera.height,
        "params": [float(value) for value in camera.params],
    }


def _generation(record: Mapping[str, Any]) -> _Generation:
    """One that was stored.

    Raises:
        ValueError, KeyError, TypeError, OverflowError: it is none.
    """
    original, pinhole = _camera(record["original"]), _camera(record["pinhole"])
    for size, original_px in ((pinhole.width, original.width), (pinhole.height, original.height)):
        if not 0 < size <= _MAX_SIZE_RATIO * original_px:
            raise ValueError("the sizes of the images cannot be")
    return _Generation(number=int(record["generation"]), original=original, pinhole=pinhole)


def _camera(record: Mapping[str, Any]) -> pycolmap.Camera:
    import pycolmap

    camera = pycolmap.Camera.create_from_model_name(
        1, str(record["model"]), 1.0, int(record["width"]), int(record["height"])
    )
    camera.params = [float(value) for value in record["params"]]
    if not camera.verify_params():
        raise ValueError(f"{record['model']} has other parameters")
    return camera


def _without_paths(names: Mapping[str, str]) -> dict[str, str]:
    """Names that are no paths: what a file says is not trusted."""
    return {key: name for key, name in names.items() if name == Path(name).name and name}


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise JournalError(f"{path}: cannot be written: {error.strerror or error}") from error
