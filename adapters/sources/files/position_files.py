"""Positions of photos from a file of their own: CSV with a header, and ODM's ``geo.txt``.

A row names a photo by its file name, with folders or without, with its ending or without. What is
given here wins over EXIF. A ``geo.txt`` names its coordinate system in the first line; its x is
east, or the longitude (https://docs.opendronemap.org/geo).
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from adapters.sources.files.coordinate_systems import (
    is_wgs84,
    may_be_coordinate_system,
    names_coordinate_system,
    to_wgs84,
)
from adapters.sources.files.photo_files import without_image_endings
from adapters.sources.files.telemetry_text import text_of_file
from engine.errors import ConfigError
from engine.regular_files import read_regular_file
from engine.types import GpsFix

_MAX_BYTES = 256 * 2**20
_MAX_NAMED = 3  # rows in a line
_NAMES = ("name", "image", "file", "filename", "imagename", "photo", "label", "path")
_LATITUDES = ("latitude", "lat", "latitudedeg", "gpslatitude")
_LONGITUDES = ("longitude", "lon", "lng", "long", "longitudedeg", "gpslongitude")
_ALTITUDES = ("altitude", "alt", "elevation", "ele", "height", "altitudem", "gpsaltitude", "z")
_ACCURACIES = ("accuracy", "accuracym", "horizontalaccuracy", "hacc", "sigmaxy", "xyaccuracy")
_VERTICAL = ("verticalaccuracy", "vacc", "verticalaccuracym", "sigmaz", "zaccuracy")
_ENDING = re.compile(r"\.[a-z][a-z0-9]{1,4}")  # of an image, in lower case
# Of ODM; angles between. Columns named x and y elsewhere may be metres of any kind.
_GEO_COLUMNS = ("name", "longitude", "latitude", "altitude", "", "", "", "hacc", "vacc")


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedPositions:
    """Positions by the names of photos."""

    by_name: Mapping[str, GpsFix]  # whole paths as given, in lower case
    num_rows: int
    unusable: tuple[str, ...]  # the names of those of these that hold no position

    @property
    def num_unusable(self) -> int:
        """How many of the rows hold no position."""
        return len(self.unusable)

    @property
    def words(self) -> str:
        """What could not be used; empty where all could."""
        if not self.num_unusable:
            return ""
        more = self.num_unusable - _MAX_NAMED
        named = ", ".join(self.unusable[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
        return f"{self.num_unusable} of the {self.num_rows} rows of positions hold none: {named}"

    def among(self, photos: Iterable[PurePosixPath]) -> PhotoPositions:
        """The positions of photos by their paths; the longest name that fits a photo wins.

        Where no name fits, one with another ending does (IMG_1.HEIC for IMG_1.jpg), if only one
        row has it. A name that is that of several photos, of different folders, is used for none.
        """
        names = names_of_photos(photos, self.by_name)
        folders: dict[str, set[PurePosixPath]] = {}
        for photo, name in names.items():
            folders.setdefault(name, set()).add(without_image_endings(photo))
        return PhotoPositions(
            by_photo={
                photo: self.by_name[name]
                for photo, name in names.items()
                if len(folders[name]) == 1
            },
            num_ambiguous=sum(len(own) > 1 for own in folders.values()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PhotoPositions:
    """The positions of some photos."""

    by_photo: Mapping[PurePosixPath, GpsFix]
    num_ambiguous: int  # names that fit several of the photos, and are used for none

    @property
    def words(self) -> str:
        """What could not be used, and what is missing; empty where nothing is."""
        said = []
        if self.num_ambiguous:
            names = "1 name fits" if self.num_ambiguous == 1 else f"{self.num_ambiguous} names fit"
            said.append(f"{names} photos of several folders, and counts for none of them")
        fixes = self.by_photo.values()
        if fixes and all(fix.altitude_m is None for fix in fixes):
            said.append("none of them has an altitude, so that heights are above an unknown level")
        return "; ".join(said)


def names_of_photos(
    photos: Iterable[PurePosixPath], names: Collection[str]
) -> dict[PurePosixPath, str]:
    """Which of the names (in lower case) is each photo's, by their ends; a name may be of several.

    Photos are files, or keyframe images of a run, which have the names of their files as
    ``possible_frame_names`` makes them.

    Where no name fits a photo, one with another ending does, if only one has it.
    """
    photos = list(photos)
    found = {photo: name for photo in photos if (name := _name_of(photo, names))}
    stems = _stems(set(names) - set(found.values()))
    for photo in photos:
        if photo not in found and (stem := _name_of(photo, stems)) is not None:
            found[photo] = stems[stem]
    return found


def _name_of(photo: PurePosixPath, names: Container[str]) -> str | None:
    """The longest of the names that fits a photo."""
    whole = PurePosixPath(str(photo).lower())
    for first in range(len(whole.parts)):
        path = PurePosixPath(*whole.parts[first:])
        for name in (str(path), str(path.with_suffix("")), str(without_image_endings(path))):
            if name in names:
                return name
    return None


def _stems(names: Iterable[str]) -> dict[str, str]:
    """Names by what they are without the ending of an image, where only one has it."""
    found: dict[str, str] = {}
    repeated = set()
    for name in names:
        path = PurePosixPath(name)
        if _ENDING.fullmatch(path.suffix):
            stem = str(path.with_suffix(""))
            if found.setdefault(stem, name) != name:
                repeated.add(stem)
    return {stem: name for stem, name in found.items() if stem not in repeated}


def is_subtitles(path: str) -> bool:
    """Whether a file of positions is one of subtitles, which is for videos."""
    return path.lower().endswith(".srt")


def read_position_files(paths: Sequence[str]) -> NamedPositions:
    """The positions of several files; a later one wins.

    Raises:
        ConfigError: one cannot be read, or holds no positions of named photos.
    """
    by_name: dict[str, GpsFix] = {}
    num_rows = 0
    unusable: list[str] = []
    for path in paths:
        rows = list(_rows_of(Path(path)))
        found = {name: fix for name, fix in rows if isinstance(fix, GpsFix)}
        if not found:
            problems = (f"{name}: {why}" for name, why in rows if isinstance(why, str))
            raise _no_positions(Path(path), next(problems, "it has no row with a name"))
        by_name |= found
        num_rows += len(rows)
        unusable += [name for name, fix in rows if isinstance(fix, str)]
    return NamedPositions(by_name=by_name, num_rows=num_rows, unusable=tuple(unusable))


def _no_positions(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path}: holds no position of a named photo: {why}; a CSV with a header (name, latitude,"
        " longitude, altitude; degrees) or a geo.txt (EPSG:n, WGS84 UTM zN) is read"
    )


def _rows_of(path: Path) -> Iterator[tuple[str, GpsFix | str]]:
    """Names in lower case and their positions, or why a row gives none.

    Raises:
        ConfigError: the file cannot be read, or has no columns of names and positions.
    """
    try:
        data = read_regular_file(path, max_bytes=_MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    if path.suffix.lower() in {".gpx", ".nmea", ".nma", ".srt"}:
        raise ConfigError(
            f"{path}: is a track, which names no photos: photos need a CSV with their names or a"
            " geo.txt; a finished run of a video is laid onto a track by livesfm georeference RUN"
            " --positions"
        )
    lines = [line for line in text_of_file(data).splitlines() if line.strip()]
    if not lines:
        return
    if names_coordinate_system(header := lines[0].strip()):
        cells = (_cells_of(line) for line in lines[1:] if not line.lstrip().startswith("#"))
        rows = [row for row in cells if row[0]]
        if is_wgs84(header):
            yield from _fixes(_GEO_COLUMNS, rows)
        else:
            yield from _fixes_in_system(path, header, rows)
        return
    delimiter = max(";\t,", key=lines[0].count)
    reader = csv.reader(io.StringIO("\n".join(lines)), delimiter=delimiter, strict=True)
    try:
        table = list(reader)
    except csv.Error as error:
        raise ConfigError(f"{path}: is no CSV: line {reader.line_num}: {error}") from error
    columns = [re.sub(r"[^a-z]", "", cell.lower().split("(")[0].split("[")[0]) for cell in table[0]]
    if delimiter not in lines[0] and may_be_coordinate_system(header):
        raise ConfigError(
            f"{path}: its first line is no coordinate system that is read: EPSG:n, WGS84 UTM zN or"
            f" +proj=..., not {header[:60]!r}"
        )
    missing = [
        names[0] for names in (_NAMES, _LATITUDES, _LONGITUDES) if not set(names) & set(columns)
    ]
    if missing:
        header = ", ".join(cell.strip() for cell in table[0])
        raise _no_positions(
            path, f"its first line names no column {' and none '.join(missing)} ({header:.80})"
        )
    yield from _fixes(columns, table[1:])


def _cells_of(line: str) -> list[str]:
    """The cells of a row of a geo.txt; names may have spaces where tabs part them."""
    cells = line.split("\t") if "\t" in line else line.split()
    return [cell.strip().strip('"') for cell in cells]


def _fixes_in_system(
    path: Path, header: str, rows: Sequence[list[str]]
) -> Iterator[tuple[str, GpsFix | str]]:
    """As `_fixes`, of the rows of a geo.txt in a coordinate system that is not WGS84.

    Raises:
        AdapterUnavailableError: pyproj is missing.
        ConfigError: see `to_wgs84`.
    """
    placed: list[list[str]] = []
    places: list[tuple[float, float, float]] = []
    for row in rows:
        x, y, z = ([_number(cell) for cell in row[1:4]] + [None] * 3)[:3]
        if x is None or y is None:
            yield _name_in(row[0]), "its x or y is no number, or missing"
        elif x == y == 0.0:
            yield _name_in(row[0]), "its x and y are 0"
        else:
            placed.append(row)
            places.append((x, y, math.nan if z is None else z))
    on_wgs84 = to_wgs84(path, header, places)
    found: list[list[str]] = []
    for row, (longitude_deg, latitude_deg, height_m) in zip(placed, on_wgs84, strict=True):
        if math.isinf(longitude_deg) or math.isinf(latitude_deg):
            yield _name_in(row[0]), f"{row[1]} {row[2]} is no place in {header[:40]}"
        else:
            altitude = "" if math.isnan(height_m) else repr(height_m)
            found.append([row[0], repr(longitude_deg), repr(latitude_deg), altitude, *row[4:]])
    yield from _fixes(_GEO_COLUMNS, found)


def _name_in(cell: str) -> str:
    return str(PurePosixPath(cell.replace("\\", "/").lower()))


def _fixes(
    columns: Sequence[str], rows: Iterator[list[str]] | Sequence[list[str]]
) -> Iterator[tuple[str, GpsFix | str]]:
    wanted = {
        key: next((columns.index(name) for name in names if name in columns), None)
        for key, names in (
            ("name", _NAMES),
            ("latitude", _LATITUDES),
            ("longitude", _LONGITUDES),
            ("altitude", _ALTITUDES),
            ("accuracy", _ACCURACIES),
            ("vertical", _VERTICAL),
        )
    }
    for row in rows:
        cells = {
            key: row[place].strip() if place is not None and place < len(row) else ""
            for key, place in wanted.items()
        }
        if cells["name"]:
            yield _name_in(cells["name"]), _fix_of(cells)


def _fix_of(cells: Mapping[str, str]) -> GpsFix | str:
    latitude_deg, longitude_deg = _number(cells["latitude"]), _number(cells["longitude"])
    if latitude_deg is None or longitude_deg is None:
        key = "latitude" if latitude_deg is None else "longitude"
        return f"its {key} is no number" if cells[key] else f"it has no {key}"
    if latitude_deg == longitude_deg == 0.0:
        return "latitude and longitude are 0"
    if abs(latitude_deg) > 90.0 or abs(longitude_deg) > 180.0:
        return _out_of_range(latitude_deg, longitude_deg)
    accuracy_m, vertical_m = _number(cells["accuracy"]), _number(cells["vertical"])
    return GpsFix(
        latitude_deg=latitude_deg,
        longitude_deg=longitude_deg,
        altitude_m=_number(cells["altitude"]),
        accuracy_m=accuracy_m if accuracy_m and accuracy_m > 0.0 else None,
        vertical_accuracy_m=vertical_m if vertical_m and vertical_m > 0.0 else None,
    )


def _out_of_range(latitude_deg: float, longitude_deg: float) -> str:
    if abs(latitude_deg) <= 180.0 and abs(longitude_deg) <= 90.0:
        return (
            f"latitude {latitude_deg:g} is out of range: are the columns of latitude and longitude"
            " swapped?"
        )
    is_latitude = abs(latitude_deg) > 90.0
    key, value = ("latitude", latitude_deg) if is_latitude else ("longitude", longitude_deg)
    return f"{key} {value:g} is out of range: are these metres of a projection, and not degrees?"


def _number(text: str) -> float | None:
    """A finite number, with a decimal point or comma."""
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
