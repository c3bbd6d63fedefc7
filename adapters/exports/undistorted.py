"""PINHOLE images and their model, as trainers of splats read them.

Of a fisheye the middle of the view, of a sphere six views.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.exports.images import IMAGES
from adapters.exports.job import ExportJob
from adapters.exports.masks import MASKS, has_masks, read_mask, write_mask
from adapters.exports.perspective_views import has_spherical_images, split_spherical_images
from adapters.run_files import read_model
from engine.output.files import write_atomically
from engine.output.flat_names import IMAGE_NAMES, table_of

if TYPE_CHECKING:
    import pycolmap

    from engine.output.undistortion import PinholeWarp

_VIEWS = "views"  # folder that stands in an export while it is written
_AT_ONCE = 2  # images; each takes the memory of two, and its camera's places that of two more
_JPEG_QUALITY = 95


def write_undistorted(job: ExportJob) -> pycolmap.Reconstruction:
    """Writes undistorted images, their masks and their model.

    Returns:
        The model.

    Raises:
        SnapshotError: an image or mask cannot be read or written.
        OSError: likewise.
        ExportCancelledError: the export was cancelled.
    """
    import pycolmap

    from engine.output.undistortion import pinhole_of, undistort_model

    views = job.to / _VIEWS
    if has_spherical_images(job.reconstruction):
        split, names_of_views = split_spherical_images(job, views)
        _name_views(job.to / IMAGE_NAMES, names_of_views)
        job = replace(job, reconstruction=split, run=views)
    pinholes = {i: pinhole_of(camera) for i, camera in job.reconstruction.cameras.items()}
    _write_images(job, pinholes)
    undistorted = pycolmap.Reconstruction(job.reconstruction)
    undistort_model(undistorted, pinholes)
    model = job.to / "sparse" / "0"
    model.mkdir(parents=True)
    undistorted.write_binary(model)
    undistorted = read_model(model)  # pycolmap does not notice a full disk
    shutil.rmtree(views, ignore_errors=True)
    return undistorted


def _name_views(path: Path, names: Mapping[str, Sequence[str]]) -> None:
    """Names views in the place of the image that they are of, in the table of images."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    named = [[name, *rest] for image, *rest in rows for name in names.get(image, [image])]
    write_atomically(path, table_of(header, named))


def _write_images(job: ExportJob, pinholes: dict[int, pycolmap.Camera]) -> None:
    """Writes the images and their masks, some at once, camera by camera."""
    from engine.output.undistortion import PinholeWarp

    is_masked = has_masks(job)
    images = sorted(job.images(), key=lambda image: image.camera_id)
    warps: dict[int, PinholeWarp] = {}

    def write(image: pycolmap.Image) -> None:
        _write_image(job, image.name, warps[image.camera_id], is_masked=is_masked)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for rows in job.each_slice("images", len(images), size=_AT_ONCE):
            needed = {image.camera_id for image in images[rows]}
            warps = {
                i: warps.get(i) or PinholeWarp(job.reconstruction.camera(i), pinholes[i])
                for i in needed
            }
            list(pool.map(write, images[rows]))


def _write_image(job: ExportJob, name: str, warp: PinholeWarp, *, is_masked: bool) -> None:
    from engine.output.undistortion import undistorted_file

    path = job.to / IMAGES / name
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = ".png" if path.suffix.lower() == ".png" else ".jpg"
    data = undistorted_file(
        job.run / IMAGES / name, warp, suffix=suffix, jpeg_quality=_JPEG_QUALITY
    )
    path.write_bytes(data)
    if is_masked:
        mask_name = f"{name}.png"
        mask = read_mask(job.run / MASKS / mask_name, warp.original)
        write_mask(warp.mask(mask), job.to / MASKS / mask_name)
