"""Images of a run: checked before anybody decodes them, and copied."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from adapters.exports.job import ExportJob
from adapters.images.decoding import read_image_header
from engine.errors import ConfigError, SnapshotError
from engine.output.flat_names import FlatNames
from engine.regular_files import read_regular_file

if TYPE_CHECKING:
    import pycolmap

IMAGES = "images"  # folder in a run and in an export
_SUFFIXES = (".jpg", ".jpeg", ".png")
_MAX_IMAGE_BYTES = 2**30


def check_images(job: ExportJob) -> None:
    """Checks that every image of the map is a whole file of the run, of its camera's size.

    Whoever decodes them asks for the memory that they say.

    Raises:
        SnapshotError: one is not.
    """
    images, folder = job.images(), job.run / IMAGES
    missing = sorted(image.name for image in images if not (folder / image.name).is_file())
    if missing:
        raise SnapshotError(
            f"{len(missing)} of {len(images)} images cannot be read, first {missing[0]}"
        )
    for image in job.each("images checked", images):
        _check_size(folder, image.name, job.reconstruction.camera(image.camera_id))


def flat_names(job: ExportJob, *, option: str) -> dict[str, str]:
    """What the map's images are called in one folder, by their names.

    Raises:
        ConfigError: one is of a kind that runs do not have.
    """
    names = FlatNames()
    for image in job.images():
        if PurePosixPath(image.name).suffix.lower() not in _SUFFIXES:
            raise ConfigError(f"{option}: takes JPEG and PNG images, not {image.name}")
        names.of(image.name)
    return dict(names.given)


def copy_images(job: ExportJob) -> None:
    """Copies the map's images.

    Raises:
        OSError: one cannot be read or written.
    """
    for image in job.each("images", job.images()):
        copy_image(job.run / IMAGES / image.name, job.to / IMAGES / image.name)


def copy_image(path: Path, to: Path) -> None:
    """Copies an image into a folder that need not be there.

    Raises:
        OSError: it cannot be read or written.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, to)


def _check_size(folder: Path, name: str, camera: pycolmap.Camera) -> None:
    try:
        data = read_regular_file(folder / name, max_bytes=_MAX_IMAGE_BYTES)
    except OSError as error:
        raise SnapshotError(
            f"the image {name} cannot be read: {error.strerror or error}"
        ) from error
    header = read_image_header(data)
    if header is not None and not header.is_complete:
        raise SnapshotError(f"the image {name} is cut short: it has no end marker")
    if header is None or (header.width, header.height) != (camera.width, camera.height):
        raise SnapshotError(
            f"the image {name} cannot be read, or is not of its camera's size, "
            f"{camera.width} x {camera.height} px"
        )
