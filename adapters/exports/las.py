"""Points as LAS 1.4 or LAZ files (ASPRS LAS specification 1.4-R15), in a CRS.

Coordinates are whole thousandths of a metre (or of the CRS's unit) from an offset beside the map;
colours fill 16 bits, as the specification asks. The CRS is in the file as WKT.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters.exports.dense import RunDensePoints
from adapters.exports.job import ExportJob
from adapters.exports.place import PlacedCrs
from adapters.exports.points import points_of
from adapters.install_advice import missing_package
from engine.errors import SnapshotError
from engine.types import Float64Array, Uint8Array

if TYPE_CHECKING:
    import laspy

_POINT_FORMAT = 7  # with colours
_VERSION = "1.4"
_FULL = 257  # 255 of 8 bits becomes 65535 of 16
_MOST_STEPS = 2**31 - 1  # of the scale, from the offset
_AT_ONCE = 100_000  # points
_SPARSE, _DENSE = "points", "dense"


def check_las(*, is_laz: bool) -> None:
    """Raises AdapterUnavailableError unless the packages for LAS, or LAZ, are installed."""
    asked_by = "--laz" if is_laz else "--las"
    try:
        import laspy
    except ImportError as error:
        raise missing_package(asked_by, package="laspy", extra="survey") from error
    if is_laz and not laspy.LazBackend.detect_available():
        raise missing_package(asked_by, package="lazrs", extra="survey")


def write_las(
    job: ExportJob, crs: PlacedCrs, dense: RunDensePoints | None, *, is_laz: bool
) -> None:
    """Writes the map's points, and the dense points of the run where there are any.

    Points that are farther off than a file of that precision can say are left out.

    Args:
        job: of the export, of a map in metres.
        crs: what to write coordinates in.
        dense: of the same map; None: none.
        is_laz: compressed.

    Raises:
        SnapshotError: a file cannot be written.
        OSError: likewise.
        ExportCancelledError: the export was cancelled.
    """
    suffix = ".laz" if is_laz else ".las"
    num_left_out = _write(job.to / f"{_SPARSE}{suffix}", _sparse_batches(job), crs)
    if dense is not None:
        num_left_out += _write(job.to / f"{_DENSE}{suffix}", _dense_batches(job, dense), crs)
    if num_left_out:
        job.notes.append(f"{num_left_out} points too far off are not in {suffix} files")


def _sparse_batches(job: ExportJob) -> Iterator[tuple[Float64Array, Uint8Array]]:
    xyz, colors = points_of(job.reconstruction)
    for rows in job.each_slice("points", len(xyz), size=_AT_ONCE):
        yield xyz[rows], colors[rows]


def _dense_batches(
    job: ExportJob, dense: RunDensePoints
) -> Iterator[tuple[Float64Array, Uint8Array]]:
    for vertices in dense.batches(job):
        yield vertices["xyz"].astype(np.float64), vertices["rgb"]


def _write(path: Path, batches: Iterator[tuple[Float64Array, Uint8Array]], crs: PlacedCrs) -> int:
    import laspy

    header = _header(crs)
    num_left_out = 0
    try:
        with laspy.open(path, mode="w", header=header) as file:
            for xyz, colors in batches:
                coordinates = crs.coordinates(xyz)
                with np.errstate(invalid="ignore"):
                    steps = np.abs(coordinates - header.offsets) / header.scales
                fits = (steps < _MOST_STEPS).all(axis=1)
                num_left_out += int((~fits).sum())
                file.write_points(_records(coordinates[fits], colors[fits], header))
    except _compression_errors() as error:
        raise SnapshotError(f"{path.name}: cannot be written: {error}") from error
    return num_left_out


def _header(crs: PlacedCrs) -> laspy.LasHeader:
    import laspy
    from laspy.vlrs.known import WktCoordinateSystemVlr

    header = laspy.LasHeader(point_format=_POINT_FORMAT, version=_VERSION)
    header.generating_software = "LiveSfM"
    header.offsets = np.floor(crs.coordinates(np.zeros((1, 3)))[0])
    header.scales = np.array([crs.millimetre, crs.millimetre, 0.001])
    # The specification names WKT 1; only CRS that are newer than it have none.
    header.vlrs.append(WktCoordinateSystemVlr(_wkt_1(crs) or crs.crs.to_wkt()))
    header.global_encoding.wkt = True
    return header


def _wkt_1(crs: PlacedCrs) -> str | None:
    from pyproj.exceptions import CRSError

    try:
        return str(crs.crs.to_wkt("WKT1_GDAL"))
    except CRSError:
        return None


def _records(
    coordinates: Float64Array, colors: Uint8Array, header: laspy.LasHeader
) -> laspy.ScaleAwarePointRecord:
    import laspy

    records = laspy.ScaleAwarePointRecord.zeros(len(coordinates), header=header)
    records.x, records.y, records.z = coordinates.T
    records.red, records.green, records.blue = (colors.astype(np.uint16) * _FULL).T
    records.return_number[:] = records.number_of_returns[:] = 1
    return records


def _compression_errors() -> tuple[type[Exception], ...]:
    """What LAZ's backend raises for what it cannot write."""
    errors: list[Any] = []
    try:
        from lazrs import LazrsError
    except ImportError:
        pass
    else:
        errors.append(LazrsError)
    return tuple(errors)
