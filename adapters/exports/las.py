"""Points as LAS 1.4 or LAZ files (ASPRS LAS specification 1.4-R15).

In a CRS coordinates are whole thousandths of a metre (or of the CRS's unit) from an offset beside
the map, and the CRS is in the file as WKT. A map without a place on the globe has coordinates along
its own axes, in steps of a millionth of its extent or less, and no CRS is in the file. Colours fill
16 bits, as the specification asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters.exports.dense import RunDensePoints
from adapters.exports.job import ExportJob
from adapters.exports.place import PlacedCrs
from adapters.exports.points import points_of
from adapters.exports.unsure_points import unsure_points
from adapters.install_advice import missing_package
from adapters.run_files import unit_of_map
from engine.errors import SnapshotError
from engine.types import MAP_UNITS, BoolArray, Float64Array, Uint8Array

if TYPE_CHECKING:
    import laspy

_POINT_FORMAT = 7  # with colours
_VERSION = "1.4"
_FULL = 257  # 255 of 8 bits becomes 65535 of 16
_MOST_STEPS = 2**31 - 1  # of the scale, from the offset
_AT_ONCE = 100_000  # points
_MOST_EXTENT_RATIO = 1e-6  # of a step to the extent of a map without a CRS
_COARSEST = 0.001  # likewise, a millimetre where the unit is the metre
_OFFSET_STEPS = 1000  # offsets are whole multiples of so many steps
_SPARSE, _DENSE = "points", "dense"
_NEVER_CLASSIFIED, _NOISE = 0, 7  # classes of table 17
_MOST_OFF_RATIO = 1.0  # of noise, from the box around the other points, to its longest side

_Batch = tuple[Float64Array, Uint8Array, Uint8Array]  # places, colours, classes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Grid:
    """What the whole numbers of a file stand for."""

    crs: PlacedCrs | None  # None: the map's own axes and unit
    offsets: Float64Array  # (3,)
    scales: Float64Array  # (3,) a step

    def coordinates(self, places_in_world: Float64Array) -> Float64Array:
        """Those (P, 3) of places (P, 3) of the map, not finite where there are none."""
        return places_in_world if self.crs is None else self.crs.coordinates(places_in_world)


def _grid(job: ExportJob, crs: PlacedCrs | None) -> _Grid:
    if crs is not None:
        return _Grid(
            crs=crs,
            offsets=np.floor(crs.coordinates(np.zeros((1, 3)))[0]),
            scales=np.array([crs.millimetre, crs.millimetre, 0.001]),
        )
    centers = np.array([image.projection_center() for image in job.images()]).reshape(-1, 3)
    places = np.vstack([centers, points_of(job.reconstruction)[0]])
    places = places[np.isfinite(places).all(axis=1)]
    low, middle, high = (
        np.percentile(places, (5, 50, 95), axis=0) if len(places) else np.zeros((3, 3))
    )
    extent = float(np.max(high - low)) or 1.0
    step = min(10.0 ** math.floor(math.log10(_MOST_EXTENT_RATIO * extent)), _COARSEST)
    coarse = _OFFSET_STEPS * step
    return _Grid(crs=None, offsets=coarse * np.round(middle / coarse), scales=np.full(3, step))


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
    job: ExportJob, crs: PlacedCrs | None, dense: RunDensePoints | None, *, is_laz: bool
) -> None:
    """Writes the map's points, and the dense points of the run where there are any.

    Points of the map whose places are known far worse than those of the others are classified as
    noise, and left out far from these: viewers show the box around all points. So are points that
    are farther off than a file of that precision can say.

    Args:
        job: of the export.
        crs: what to write coordinates in; None: along the axes of the map, in its unit.
        dense: of the same map; None: none.
        is_laz: compressed.

    Raises:
        SnapshotError: a file cannot be written.
        OSError: likewise.
        ExportCancelledError: the export was cancelled.
    """
    suffix = ".laz" if is_laz else ".las"
    grid = _grid(job, crs)
    if crs is None:
        job.notes.append(_words_without_crs(job, suffix))
    xyz, colors = points_of(job.reconstruction)
    is_unsure = unsure_points(job.reconstruction)
    is_kept = ~_is_far_noise(xyz, is_unsure)
    is_noise = is_unsure[is_kept]
    sparse = job.to / f"{_SPARSE}{suffix}"
    batches = _sparse_batches(job, xyz[is_kept], colors[is_kept], is_noise)
    num_left_out = int((~is_kept).sum()) + _write(sparse, batches, grid)
    if is_noise.any():
        job.notes.append(
            f"{is_noise.sum()} of {len(is_noise)} points in {sparse.name} are classified as noise"
            f" ({_NOISE}): their places are known far worse than those of the others"
        )
    if dense is not None:
        num_left_out += _write(job.to / f"{_DENSE}{suffix}", _dense_batches(job, dense), grid)
    if num_left_out:
        are = "point too far off is" if num_left_out == 1 else "points too far off are"
        job.notes.append(f"{num_left_out} {are} not in {suffix} files")


def _words_without_crs(job: ExportJob, suffix: str) -> str:
    unit = unit_of_map(job.run) if job.map_number == 0 else MAP_UNITS
    up = "" if job.upright_from_map is not None else "; --z-up turns it so that z is up"
    return (
        f"coordinates in {suffix} files are in {unit} along the map's own axes, without a CRS: the"
        f" map has no place on the globe{up}"
    )


def _is_far_noise(xyz: Float64Array, is_noise: BoolArray) -> BoolArray:
    """Which points (P,) are noise that lies far from all others."""
    if is_noise.all():
        return np.zeros(len(xyz), np.bool_)
    low, high = xyz[~is_noise].min(axis=0), xyz[~is_noise].max(axis=0)
    limit = _MOST_OFF_RATIO * float((high - low).max())
    is_near = ((xyz >= low - limit) & (xyz <= high + limit)).all(axis=1)
    return np.asarray(is_noise & ~is_near)


def _sparse_batches(
    job: ExportJob, xyz: Float64Array, colors: Uint8Array, is_noise: BoolArray
) -> Iterator[_Batch]:
    classes = np.where(is_noise, _NOISE, _NEVER_CLASSIFIED).astype(np.uint8)
    for rows in job.each_slice("points", len(xyz), size=_AT_ONCE):
        yield xyz[rows], colors[rows], classes[rows]


def _dense_batches(job: ExportJob, dense: RunDensePoints) -> Iterator[_Batch]:
    for vertices in dense.batches(job):
        classes = np.full(len(vertices), _NEVER_CLASSIFIED, np.uint8)
        yield vertices["xyz"].astype(np.float64), vertices["rgb"], classes


def _write(path: Path, batches: Iterator[_Batch], grid: _Grid) -> int:
    import laspy

    header = _header(grid)
    num_left_out = 0
    try:
        # A file of ours: laspy does not close its own where the disk is full.
        with (
            path.open("w+b") as opened,
            laspy.open(opened, mode="w", header=header, closefd=False) as file,
        ):
            for xyz, colors, classes in batches:
                coordinates = grid.coordinates(xyz)
                with np.errstate(invalid="ignore"):
                    steps = np.abs(coordinates - header.offsets) / header.scales
                fits = (steps < _MOST_STEPS).all(axis=1)
                num_left_out += int((~fits).sum())
                records = _records(coordinates[fits], colors[fits], classes[fits], header)
                file.write_points(records)
    except _compression_errors() as error:
        raise SnapshotError(f"{path.name}: cannot be written: {error}") from error
    return num_left_out


def _header(grid: _Grid) -> laspy.LasHeader:
    import laspy
    from laspy.vlrs.known import WktCoordinateSystemVlr

    header = laspy.LasHeader(point_format=_POINT_FORMAT, version=_VERSION)
    header.generating_software = "LiveSfM"
    header.offsets, header.scales = grid.offsets, grid.scales
    if grid.crs is not None:
        # The specification names WKT 1; only CRS that are newer than it have none.
        wkt = _wkt_1(grid.crs) or grid.crs.crs.to_wkt()
        header.vlrs.append(WktCoordinateSystemVlr(wkt))
    header.global_encoding.wkt = True  # of all files of this point format
    return header


def _wkt_1(crs: PlacedCrs) -> str | None:
    from pyproj.exceptions import CRSError

    try:
        return str(crs.crs.to_wkt("WKT1_GDAL"))
    except CRSError:
        return None


def _records(
    coordinates: Float64Array, colors: Uint8Array, classes: Uint8Array, header: laspy.LasHeader
) -> laspy.ScaleAwarePointRecord:
    import laspy

    records = laspy.ScaleAwarePointRecord.zeros(len(coordinates), header=header)
    records.x, records.y, records.z = coordinates.T
    records.red, records.green, records.blue = (colors.astype(np.uint16) * _FULL).T
    records.classification[:] = classes
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
