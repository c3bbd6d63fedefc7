"""Masks of an export's images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adapters.exports.job import ExportJob
from engine.errors import JournalError, SnapshotError
from engine.types import BoolArray

if TYPE_CHECKING:
    import pycolmap

MASKS = "masks"  # folder in a run and in an export; a mask has its image's name with .png added


def has_masks(job: ExportJob) -> bool:
    """Whether an image of the map has a mask; all or none get one, as trainers want."""
    return any((job.run / MASKS / f"{image.name}.png").is_file() for image in job.images())


def write_masks(job: ExportJob) -> None:
    """Writes the masks of the map's images, where the run has any.

    Raises:
        SnapshotError: a mask cannot be read or written.
        ExportCancelledError: the export was cancelled.
    """
    if not has_masks(job):
        return
    for image in job.each("masks", job.images()):
        camera = job.reconstruction.camera(image.camera_id)
        mask = read_mask(job.run / MASKS / f"{image.name}.png", camera)
        write_mask(mask, job.to / MASKS / f"{image.name}.png")


def read_mask(path: Path, camera: pycolmap.Camera) -> BoolArray:
    """The mask (H, W) in a file; all of the camera's image where there is none.

    Raises:
        SnapshotError: it cannot be read, or is not of the camera's size.
    """
    from engine.output import undistortion

    if not path.is_file():
        return np.ones((camera.height, camera.width), np.bool_)
    return undistortion.read_mask(path, camera)


def write_mask(mask: BoolArray, path: Path) -> None:
    """Writes a mask (H, W) into a folder that need not be there.

    Raises:
        SnapshotError: it cannot be encoded.
        OSError: it cannot be written.
    """
    from engine.output.journal import encode_mask

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_bytes(encode_mask(mask))
    except JournalError as error:
        raise SnapshotError(str(error)) from error
