"""Where frames of a dataset were taken from: poses in TUM format, a COLMAP model, GPS positions."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath

import numpy as np

from adapters.evaluate import extent_of, has_pose, reference_of_frames
from adapters.run_files import FrameRow, read_model, read_text
from engine.errors import ConfigError, SnapshotError
from engine.geometry import camera_center
from engine.types import Float64Array

# As they are looked for. Measured references come first: a model of COLMAP is no independent one.
_FILES = ("groundtruth.txt", "gps.csv", "sparse/0", "sparse", "reference", "reference_colmap.txt")
_GPS_COLUMNS = ("name", "lat", "lon", "alt")


class ReferenceKind(StrEnum):
    """What a reference is, in words of a report."""

    POSES = "poses"
    MODEL = "COLMAP model"
    GPS = "GPS positions"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReferencePoses:
    """Reference poses of frames."""

    cam_from_world: Float64Array  # (F, 3, 4), NaN where a frame has none
    has_rotations: bool  # False: only the centres mean something

    @property
    def num_frames(self) -> int:
        """How many frames have one."""
        return int(has_pose(self.cam_from_world).sum())

    @property
    def extent(self) -> float:
        """The diagonal of the bounding box of the centres."""
        return extent_of(camera_center(self.cam_from_world[has_pose(self.cam_from_world)]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A reference on disk."""

    path: Path
    kind: ReferenceKind

    def of(self, frames: Sequence[FrameRow]) -> ReferencePoses:
        """The poses of some frames.

        Names are compared as paths, or by their last part where that is unique. Timestamps of TUM
        format are capture times or positions in the source.

        Raises:
            ConfigError: it cannot be read, or has none of the frames.
        """
        match self.kind:
            case ReferenceKind.POSES:
                _, poses = reference_of_frames(frames, self.path)
                return ReferencePoses(cam_from_world=poses, has_rotations=True)
            case ReferenceKind.MODEL:
                named = _poses_of_model(self.path)
            case ReferenceKind.GPS:
                named = _poses_of_gps(self.path)
        poses = _by_name(named, [frame.name for frame in frames])
        if not has_pose(poses).any():
            raise ConfigError(f"{self.path}: names none of the {len(frames)} frames")
        return ReferencePoses(
            cam_from_world=poses, has_rotations=self.kind is not ReferenceKind.GPS
        )


def find_reference(folders: Sequence[Path], *, asked: Path | None) -> Reference | None:
    """The reference that was asked for, or the first one in some folders; None: there is none.

    Raises:
        ConfigError: ``asked`` is no reference.
    """
    if asked is not None:
        kind = _kind_of(asked)
        if kind is None:
            raise ConfigError(f"{asked}: no file in TUM format, gps.csv or folder of a model")
        return Reference(path=asked, kind=kind)
    paths = (folder / file for folder in folders for file in _FILES)
    found = ((path, _kind_of(path)) for path in paths)
    return next((Reference(path=path, kind=kind) for path, kind in found if kind), None)


def _kind_of(path: Path) -> ReferenceKind | None:
    if path.is_dir():
        has_images = any((path / f"images.{suffix}").is_file() for suffix in ("bin", "txt"))
        return ReferenceKind.MODEL if has_images else None
    if not path.is_file():
        return None
    return ReferenceKind.GPS if path.suffix == ".csv" else ReferenceKind.POSES


def _poses_of_model(folder: Path) -> dict[str, Float64Array]:
    import pycolmap

    is_checkable = (folder / "rigs.bin").is_file()  # neither text nor of COLMAP before rigs
    try:
        model = read_model(folder) if is_checkable else pycolmap.Reconstruction(folder)
    except SnapshotError as error:
        raise ConfigError(str(error)) from error
    except (LookupError, RuntimeError, ValueError) as error:
        words = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{folder}: is not a whole COLMAP model: {words}") from error
    return {
        image.name: np.asarray(image.cam_from_world().matrix())
        for image in model.images.values()
        if image.has_pose
    }


def _poses_of_gps(path: Path) -> dict[str, Float64Array]:
    """Poses without rotation at positions in metres east, north and up of their mean."""
    import pycolmap

    try:
        table = csv.DictReader(io.StringIO(read_text(path)))
        if missing := set(_GPS_COLUMNS) - set(table.fieldnames or ()):
            raise ConfigError(f"{path}: has no column {min(missing)}")
        rows = {row["name"]: [float(row[key]) for key in _GPS_COLUMNS[1:]] for row in table}
    except (OSError, TypeError, ValueError, csv.Error) as error:
        raise ConfigError(f"{path}: is no table of GPS positions: {error}") from error
    if not rows:
        return {}
    positions = np.array(list(rows.values()))
    enu_m = pycolmap.GPSTransform().ellipsoid_to_enu(positions, *positions.mean(axis=0))
    return {
        name: np.column_stack([np.eye(3), -place]) for name, place in zip(rows, enu_m, strict=True)
    }


def _by_name(named: Mapping[str, Float64Array], names: Sequence[str]) -> Float64Array:
    """Poses (F, 3, 4) by names of frames, NaN where there is none."""
    last_parts: dict[str, list[Float64Array]] = {}
    for name, pose in named.items():
        last_parts.setdefault(PurePosixPath(name).name, []).append(pose)
    found = np.full((len(names), 3, 4), np.nan)
    for row, name in enumerate(names):
        same = last_parts.get(PurePosixPath(name).name, [])
        if name in named:
            found[row] = named[name]
        elif len(same) == 1:
            found[row] = same[0]
    return found
