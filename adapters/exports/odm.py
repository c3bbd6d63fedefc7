"""A project of OpenDroneMap: images, their positions, and the map that it can go on from.

    odm/images/               images in one folder; NAME_mask.png where the run has masks
    odm/geo.txt               positions of the cameras ("Image Geolocation Files" of its manual)
    odm/opensfm/              the map as OpenSfM keeps it

OpenDroneMap lays its reference under the mean of the positions, on whole metres of UTM and at
altitude 0; the map is written about that place. Empty folders of features and matches say that
these stages are done.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np

from adapters.exports.images import IMAGES, copy_image, flat_names
from adapters.exports.job import ExportJob
from adapters.exports.masks import MASKS
from adapters.exports.opensfm import opensfm_camera, write_opensfm
from adapters.exports.place import MapPlace, PlacedCrs, open_crs
from adapters.run_files import read_frame_rows
from engine.errors import ConfigError
from engine.output.flat_names import FlatNames
from engine.types import Float64Array

_FOLDER = "odm"
_MASK = "_mask"  # what an image must not end in


def check_odm(job: ExportJob) -> str:
    """Checks that OpenDroneMap can read the map.

    Returns:
        A sentence on how to use it.

    Raises:
        ConfigError: it cannot.
        AdapterUnavailableError: a package is missing.
    """
    for camera in job.reconstruction.cameras.values():
        try:
            opensfm_camera(camera)
        except ConfigError as error:
            raise ConfigError(f"--odm: {error}") from error
    flat_names(job, option="--odm")
    open_crs(None, job.needed_place("--odm"), asked_by="--odm")
    return (
        f"{_FOLDER}/ is a project of OpenDroneMap: with --skip-report it goes on from the map in"
        f" {_FOLDER}/opensfm; without that folder it makes its own from images and geo.txt"
    )


def write_odm(job: ExportJob, place: MapPlace) -> None:
    """Writes the project.

    Raises:
        ConfigError: OpenDroneMap cannot read the map, or the run's table of frames is damaged.
        OSError: a file cannot be read or written.
        ExportCancelledError: the export was cancelled.
    """
    import pycolmap

    names = _names(job)
    folder = job.to / _FOLDER
    masks = job.run / MASKS
    for image in job.each("images for OpenDroneMap", job.images()):
        copied = folder / IMAGES / names[image.name]
        copy_image(job.run / IMAGES / image.name, copied)
        mask = masks / f"{image.name}.png"
        if mask.is_file():
            copy_image(mask, copied.with_name(f"{copied.stem}{_MASK}.png"))
    rows = _geo_rows(job, place)
    lines = [f"{names[image.name]} {row}" for image, row in zip(job.images(), rows, strict=True)]
    (folder / "geo.txt").write_text("\n".join(["EPSG:4326", *lines, ""]), encoding="utf-8")
    utm = open_crs(None, place, asked_by="--odm")
    reference = _reference(rows, utm)
    moved = pycolmap.Reconstruction(job.reconstruction)
    moved.transform(pycolmap.Sim3d(reference.pose_of(place)))
    for done in ("features", "matches"):
        (folder / "opensfm" / done).mkdir(parents=True)
    write_opensfm(
        replace(job, reconstruction=moved),
        folder / "opensfm",
        place=reference,
        names=names,
        times_s={row.name: row.captured_at_s for row in read_frame_rows(job.run)},
    )


def _names(job: ExportJob) -> dict[str, str]:
    """What images are called in the project: none as if it were a mask."""
    names = flat_names(job, option="--odm")
    for name, flat in names.items():
        path = PurePosixPath(flat)
        if path.stem.lower().endswith(_MASK):
            others = FlatNames(taken=[PurePosixPath(other).stem for other in names.values()])
            names[name] = others.of(f"{path.stem}-image{path.suffix}")
    return names


def _geo_rows(job: ExportJob, place: MapPlace) -> list[str]:
    """Longitude, latitude and, where it is known, altitude of each camera, as they are written."""
    centers = np.array([image.projection_center() for image in job.images()]).reshape(-1, 3)
    rows = []
    for latitude, longitude, altitude in place.on_globe(centers).tolist():
        height = "" if place.altitude_m is None else f" {altitude:.4f}"
        rows.append(f"{longitude:.10f} {latitude:.10f}{height}")
    return rows


def _reference(rows: list[str], utm: PlacedCrs) -> MapPlace:
    """The place that OpenDroneMap lays its own reference to."""
    positions: Float64Array = np.array([row.split()[:2] for row in rows], np.float64)
    east, north = utm.to_crs.transform(positions[:, 0], positions[:, 1], np.zeros(len(rows)))[:2]
    middle = (math.floor(float(np.mean(east))), math.floor(float(np.mean(north))))
    longitude, latitude, _ = utm.to_crs.transform(*middle, 0.0, direction="INVERSE")
    return MapPlace(latitude_deg=latitude, longitude_deg=longitude, altitude_m=0.0)
