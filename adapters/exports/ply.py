"""Points as a binary PLY file.

Coordinates are floats about an origin close by, so that they keep a tenth of a millimetre of a
kilometre; comments say where the origin is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from adapters.exports.job import ExportJob
from adapters.exports.place import PlacedCrs
from adapters.exports.points import points_of

POINTS_NAME = "points.ply"
_VERTEX: DTypeLike = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)])
_AT_ONCE = 100_000  # points


def write_points(job: ExportJob, crs: PlacedCrs | None = None) -> None:
    """Writes the map's points.

    Args:
        job: of the export.
        crs: what to write coordinates in, less an offset; None: the map's world.

    Raises:
        OSError: the file cannot be written.
        ExportCancelledError: the export was cancelled.
    """
    xyz, colors = points_of(job.reconstruction)
    offset = np.zeros(3)
    if crs is not None:
        offset = np.round(crs.coordinates(np.zeros((1, 3)))[0], 3)
        xyz = crs.coordinates(xyz) - offset
    is_known = np.isfinite(xyz).all(axis=1)
    xyz, colors = xyz[is_known], colors[is_known]
    lines = [
        "ply",
        "format binary_little_endian 1.0",
        *(f"comment {one}" for one in _comments(job, crs, offset.tolist())),
        f"element vertex {len(xyz)}",
        *(f"property float {name}" for name in "xyz"),
        *(f"property uchar {name}" for name in ("red", "green", "blue")),
        "end_header",
    ]
    with (job.to / POINTS_NAME).open("wb") as file:
        file.write("".join(f"{line}\n" for line in lines).encode("ascii", "replace"))
        for part in job.each_slice("points", len(xyz), size=_AT_ONCE):
            vertices = np.zeros(len(xyz[part]), _VERTEX)
            vertices["xyz"], vertices["rgb"] = xyz[part], colors[part]
            file.write(vertices.tobytes())
    if not is_known.all():
        job.notes.append(f"{(~is_known).sum()} points outside of the CRS are not in {POINTS_NAME}")


def _comments(job: ExportJob, crs: PlacedCrs | None, offset: list[float]) -> list[str]:
    """What the coordinates are, in lines that programs can read, too."""
    if job.place is None:
        return ["frame: units of the map, as its cameras"]
    if crs is None:
        return ["frame: metres east, north, up of the origin", f"origin: {job.place.words}"]
    numbers = " ".join(f"{value:.3f}" for value in offset)
    return [
        f"crs: {crs.name}",
        f"offset: {numbers}",
        "frame: coordinates of the CRS less the offset",
        f"heights: {crs.height_words}",
        f"origin: {job.place.words}",
    ]
