"""Masks of an export's images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adapters.exports.job import ExportJob
from engine.errors import SnapshotError
from engine.types import Int64Array, Uint8Array

if TYPE_CHECKING:
    import pycolmap

MASKS = "masks"  # folder in a run and in an export; a mask has its image's name with .png added
_WHITE = 255  # of a pixel that may be used


def write_masks(job: ExportJob, *, undistorted: pycolmap.Reconstruction | None = None) -> None:
    """Writes the masks of the map's images, where the run has any: all or none, as trainers want.

    Args:
        job: of the export.
        undistorted: the model of undistorted images, when the masks are to be undistorted like
            them; what lies outside the original image is left out, too.

    Raises:
        SnapshotError: a mask cannot be read or written.
    """
    images, folder = job.images(), job.run / MASKS
    if not any((folder / f"{image.name}.png").is_file() for image in images):
        return
    places: dict[int, Int64Array] = {}  # of the last camera alone: it takes a number for each pixel
    for image in job.each("masks", sorted(images, key=lambda image: image.camera_id)):
        camera = job.reconstruction.camera(image.camera_id)
        mask = read_mask(folder / f"{image.name}.png", camera)
        if undistorted is not None:
            if camera.camera_id not in places:
                target = undistorted.camera(undistorted.image(image.image_id).camera_id)
                places = {camera.camera_id: original_places(target, original=camera)}
            mask = at_places(mask, places[camera.camera_id])
        write_mask(mask, job.to / MASKS / f"{image.name}.png")


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


def write_mask(mask: Uint8Array, path: Path) -> None:
    """Writes a mask (H, W) into a folder that need not be there.

    Raises:
        SnapshotError: it cannot be written.
    """
    import pycolmap

    path.parent.mkdir(parents=True, exist_ok=True)
    if not pycolmap.Bitmap.from_array(mask).write(path):
        raise SnapshotError(f"mask {path.name} cannot be written")


def original_places(undistorted: pycolmap.Camera, *, original: pycolmap.Camera) -> Int64Array:
    """Which pixel of the original image each pixel (H, W) of the undistorted one shows.

    Counted line by line; the number of pixels stands for none.
    """
    size = np.array([original.width, original.height])
    places = np.full((undistorted.height, undistorted.width), size.prod())
    x = np.arange(undistorted.width) + 0.5
    for line in range(undistorted.height):  # all at once takes ten times the memory of an image
        rays = undistorted.cam_from_img(np.column_stack([x, np.full(len(x), line + 0.5)]))
        points_xy = original.img_from_cam(np.column_stack([rays, np.ones(len(rays))]))
        inside = ((points_xy >= 0) & (points_xy < size)).all(axis=1)
        columns, lines = points_xy[inside].astype(np.int64).T
        places[line, inside] = lines * original.width + columns
    return places


def at_places(mask: Uint8Array, places: Int64Array) -> Uint8Array:
    """A mask with its pixels at other places (H, W); black where a place is none."""
    return np.append(mask.ravel(), np.uint8(0))[places]
