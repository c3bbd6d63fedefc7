"""Ground control points from ODM's ``gcp_list.txt``.

The first line names the coordinate system: ``EPSG:n``, ``WGS84 UTM zN`` or a string of PROJ. Each
other line is a mark, ``geo_x geo_y geo_z im_x im_y image_name [gcp_name]``, with x east, or the
longitude (https://docs.opendronemap.org/gcp). Heights are in the unit of the system's vertical
axis. Where it has none they are in that of east and north, which is how surveys in feet come, or in
metres beside degrees.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.sources.files.coordinate_systems import is_wgs84, to_wgs84
from adapters.sources.files.telemetry_text import text_of_file
from engine.errors import ConfigError
from engine.regular_files import read_regular_file
from engine.types import ControlPoint, GpsFix, ImageMark, ScaleBar

logger = logging.getLogger(__name__)

_MAX_BYTES = 16 * 2**20
_MAX_NAMED = 3  # lines in a notice
_MAX_COORDINATE_PX = 1e6
_MAX_HEIGHT_M = 1e5
_CHECK_PREFIX = "chk"  # of the names of points that are check points without --check
_MARK = re.compile(r"(.+):(-?[\d.]+),(-?[\d.]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A line of the file."""

    geo: tuple[float, float, float]  # NaN: not surveyed
    mark: ImageMark
    name: str  # "": none is given
    line: int  # its number, from 1


def read_control_points(path: Path, *, checks: Sequence[str] = ()) -> tuple[ControlPoint, ...]:
    """The points of a file, in the order in which it first names them.

    Lines of one name are marks of one point, and without names those of one place. A line that is
    there again counts once; a line in the log says so. A point without
    coordinates (NaN) can end a scale bar; without a height it counts horizontally.

    Args:
        path: the file.
        checks: names of points to be compared only. Those that begin with CHK are such, too.

    Raises:
        ConfigError: it cannot be read, in words with the line, or a check point is not in it.
        AdapterUnavailableError: its coordinate system needs a package.
    """
    header, rows = _rows_of(path)
    by_name: dict[str, list[_Row]] = {}
    unnamed: dict[tuple[float, float, float], str] = {}
    for row in rows:
        name = row.name or unnamed.setdefault(row.geo, f"point {len(unnamed) + 1}")
        by_name.setdefault(name, []).append(row)
    unknown = sorted(set(checks) - set(by_name))
    if unknown:
        raise ConfigError(f"--check: {path} has no point {unknown[0]}; it has {', '.join(by_name)}")
    for name, own in by_name.items():
        if len({str(row.geo) for row in own}) > 1:
            raise ConfigError(f"{path}: {name} has several places")
        by_name[name] = _once_each(path, name, own)
    fixes = _fixes(path, header, [own[0].geo for own in by_name.values()])
    return tuple(
        ControlPoint(
            name=name,
            fix=fix,
            marks=tuple(row.mark for row in own),
            is_check=name in checks or name.lower().startswith(_CHECK_PREFIX),
        )
        for (name, own), fix in zip(by_name.items(), fixes, strict=True)
    )


def _once_each(path: Path, name: str, rows: Sequence[_Row]) -> list[_Row]:
    """The rows of a point without those that are there again.

    Raises:
        ConfigError: one image has it in two places.
    """
    by_image: dict[str, _Row] = {}
    repeated = []
    for row in rows:
        first = by_image.setdefault(row.mark.image_name.lower(), row)
        if first is row:
            continue
        if first.mark.xy != row.mark.xy:
            raise ConfigError(
                f"{path}: {name} is marked twice in {row.mark.image_name}, in lines {first.line}"
                f" and {row.line}"
            )
        repeated.append(row)
    if repeated:
        lines = ", ".join(str(row.line) for row in repeated[:_MAX_NAMED])
        more = f" and {len(repeated) - _MAX_NAMED} more" if len(repeated) > _MAX_NAMED else ""
        logger.warning(
            "%s: lines that repeat others count once: %s%s (%s)", path, lines, more, name
        )
    return list(by_image.values())


def read_scale_bar(
    ends: tuple[str, str], length_m: float, *, points: Sequence[ControlPoint]
) -> tuple[ScaleBar, tuple[ControlPoint, ...]]:
    """A scale bar, and the points at its ends that are not among those of a file.

    Args:
        ends: each the name of a point, or its marks ``IMAGE:X,Y+IMAGE:X,Y``, two at least.
        length_m: the distance between them.
        points: of the file.

    Raises:
        ConfigError: an end is neither, both are one, or the length is none.
    """
    if not (math.isfinite(length_m) and length_m > 0.0):
        raise ConfigError("--scale-bar: its length is a number of metres above 0")
    if ends[0] == ends[1]:
        raise ConfigError("--scale-bar: both ends are the same point")
    known = {point.name for point in points}
    marked = [
        ControlPoint(name=end, fix=None, marks=_marks_of(end)) for end in ends if end not in known
    ]
    return ScaleBar(first=ends[0], second=ends[1], length_m=length_m), tuple(marked)


def _marks_of(text: str) -> tuple[ImageMark, ...]:
    found = [_MARK.fullmatch(part) for part in text.split("+")]
    marks = [
        ImageMark(image_name=match[1], xy=(float(match[2]), float(match[3])))
        for match in found
        if match is not None and _is_number(match[2]) and _is_number(match[3])
    ]
    if len(marks) < len(found):
        raise ConfigError(
            f"--scale-bar: {text} is no point of the file of --gcp, and no marks of one,"
            " IMAGE:X,Y+IMAGE:X,Y in two or more images"
        )
    if len({mark.image_name for mark in marks}) < 2:
        raise ConfigError(f"--scale-bar: {text} is marked in one image; two or more are needed")
    return tuple(marks)


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) <= _MAX_COORDINATE_PX
    except ValueError:
        return False


def _rows_of(path: Path) -> tuple[str, list[_Row]]:
    try:
        text = text_of_file(read_regular_file(path, max_bytes=_MAX_BYTES))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    lines = [
        (number, line.strip())
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and (number == 1 or not line.lstrip().startswith("#"))
    ]
    if len(lines) < 2:
        raise ConfigError(
            f"{path}: is no list of ground control points: a first line with the coordinate system"
            " (EPSG:n, WGS84 UTM zN, +proj=...), then geo_x geo_y geo_z im_x im_y image_name [name]"
        )
    return lines[0][1], [_row_of(path, number, line) for number, line in lines[1:]]


def _row_of(path: Path, number: int, line: str) -> _Row:
    cells = [cell.strip() for cell in (line.split("\t") if "\t" in line else line.split())]
    try:
        x, y, z, im_x, im_y = (float(cell) for cell in cells[:5])
        image_name = cells[5].replace("\\", "/")
    except (ValueError, IndexError):
        raise ConfigError(
            f"{path}: line {number} is not geo_x geo_y geo_z im_x im_y image_name [name]"
        ) from None
    if not max(abs(im_x), abs(im_y)) <= _MAX_COORDINATE_PX or math.isinf(x + y + z):
        raise ConfigError(f"{path}: line {number} holds a number that cannot be")
    if math.isnan(x) != math.isnan(y) or not image_name:
        raise ConfigError(f"{path}: line {number} lacks a coordinate or the image's name")
    name = cells[6] if len(cells) > 6 else ""
    if not name.isprintable():
        raise ConfigError(f"{path}: line {number} has a name that cannot be printed")
    mark = ImageMark(image_name=image_name, xy=(im_x, im_y))
    return _Row(geo=(x, y, z), mark=mark, name=name, line=number)


def _fixes(
    path: Path, header: str, places: Sequence[tuple[float, float, float]]
) -> list[GpsFix | None]:
    """The places on WGS84, with heights in metres. None: not surveyed."""
    surveyed = [place for place in places if not math.isnan(place[0])]
    on_wgs84 = surveyed
    if surveyed and not is_wgs84(header):
        on_wgs84 = to_wgs84(path, header, surveyed)
    fixes = [
        GpsFix(
            latitude_deg=latitude,
            longitude_deg=longitude,
            altitude_m=None if math.isnan(height_m) else height_m,
        )
        for longitude, latitude, height_m in on_wgs84
    ]
    for fix, place in zip(fixes, surveyed, strict=True):
        is_height = fix.altitude_m is None or abs(fix.altitude_m) <= _MAX_HEIGHT_M
        is_place = abs(fix.latitude_deg) <= 90.0 and abs(fix.longitude_deg) <= 180.0
        if not (is_place and is_height):
            raise ConfigError(
                f"{path}: {place[0]} {place[1]} {place[2]} is no place in {header[:60]}"
            )
    rest = iter(fixes)
    return [None if math.isnan(place[0]) else next(rest) for place in places]
