"""Masks of an export's images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adapters.exports.job import ExportJob
from engine.errors import JournalError, SnapshotError
from engine.types import BoolArray, Uint8Array

if TYPE_CHECKING:
    import pycolmap

MASKS = "masks"  # folder in a run and in an export; a mask has its image's name with .png added
_WHITE = 255  # of a pixel that may be used


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
        write_mask(mask > 0, job.to / MASKS / f"{image.name}.png")


def read_mask(path: Path, camera: pycolmap.Camera) -> Uint8Array:
    """The grey mask (H, W) in a file; white of the camera's size where there is none.

    Raises:
        SnapshotError: it cannot be read, or is not of the camera's size.
    """
    import pycolmap

    if not path.is_file():
        return np.full((camera.height, camera.width), _WHITE, np.uint8)
    mask = pycolmap.Bitmap.read(path, as_rgb=False)
    if mask is None or (mask.width, mask.height) != (camera.width, camera.height):
        raise SnapshotError(f"mask {path.name} cannot be read, or is not of its image's size")
    return np.asarray(mask.to_array(), np.uint8)


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
