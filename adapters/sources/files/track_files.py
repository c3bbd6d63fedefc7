"""Tracks of positions by time: GPX, NMEA, and the subtitles of drones."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, time
from pathlib import Path
from xml.etree import ElementTree

from adapters.sources.files.telemetry_text import (
    TimedFix,
    blocks_of_srt,
    read_telemetry,
    text_of_file,
)
from engine.config import TelemetryOrder
from engine.errors import ConfigError
from engine.regular_files import read_regular_file
from engine.types import GpsFix

TRACK_SUFFIXES = frozenset({".gpx", ".nmea", ".nma", ".srt"})

_MAX_BYTES = 256 * 2**20
_SENTENCE = re.compile(r"^\$G[A-Z](GGA|RMC),([^*\r\n]*)", re.MULTILINE)


def read_track(path: Path, *, order: TelemetryOrder = "auto") -> list[TimedFix]:
    """The positions of a track in order of time, each time once.

    Times are Unix times for GPX and NMEA, and those of the video for subtitles.

    Raises:
        ConfigError: the file cannot be read, or holds no positions with times.
    """
    try:
        text = text_of_file(read_regular_file(path, max_bytes=_MAX_BYTES))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    suffix = path.suffix.lower()
    if suffix == ".srt":
        found = list(read_telemetry(blocks_of_srt(text), order=order).fixes)
    elif suffix == ".gpx":
        found = list(_of_gpx(text, path))
    else:
        found = list(_of_nmea(text))
    if not found:
        raise ConfigError(f"{path}: holds no positions with times")
    in_order = {timed.time_s: timed for timed in sorted(found, key=lambda timed: timed.time_s)}
    return list(in_order.values())


def _of_gpx(text: str, path: Path) -> Iterator[TimedFix]:
    """Points of GPX 1.0 and 1.1 that have a time: of tracks, and without these of others."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ConfigError(f"{path}: GPX with entities is not read")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ConfigError(f"{path}: is not GPX: {error}") from error
    on_track = list(_points(root, {"trkpt"}))
    yield from on_track or _points(root, {"wpt", "rtept"})


def _points(root: ElementTree.Element, kinds: set[str]) -> Iterator[TimedFix]:
    for point in root.iter():
        if point.tag.rpartition("}")[2] not in kinds:
            continue
        inside = {child.tag.rpartition("}")[2]: child.text or "" for child in point}
        try:
            moment = datetime.fromisoformat(inside["time"].strip())
            latitude_deg, longitude_deg = float(point.get("lat", "")), float(point.get("lon", ""))
            altitude_m = float(inside["ele"]) if inside.get("ele", "").strip() else None
        except (KeyError, ValueError):
            continue
        zoned = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        yield from _checked(zoned.timestamp(), latitude_deg, longitude_deg, altitude_m)


def _of_nmea(text: str) -> Iterator[TimedFix]:
    """Positions of GGA, with the date of the RMC before (NMEA 0183).

    Where there are dates at all, positions before the first one are left out.
    """
    sentences = [(kind, inside.split(",")) for kind, inside in _SENTENCE.findall(text)]
    has_dates = any(kind == "RMC" and _day(cells) is not None for kind, cells in sentences)
    day = None if has_dates else date(1970, 1, 1)
    previous_s = 0.0
    for kind, cells in sentences:
        if kind == "RMC":
            day = _day(cells) or day
            continue
        if day is None:
            continue
        try:
            clock = cells[0]
            of_day = time(int(clock[:2]), int(clock[2:4]), tzinfo=UTC)
            time_s = datetime.combine(day, of_day).timestamp() + float(clock[4:])
            latitude_deg = _degrees(cells[1], cells[2])
            longitude_deg = _degrees(cells[3], cells[4])
            has_fix = cells[5] not in {"", "0"}
            altitude_m = float(cells[8]) if cells[8] else None
        except (IndexError, ValueError):
            continue
        if time_s < previous_s - 43_200.0:  # midnight, without an RMC
            time_s += 86_400.0
        previous_s = time_s
        if has_fix:
            yield from _checked(time_s, latitude_deg, longitude_deg, altitude_m)


def _day(cells: list[str]) -> date | None:
    """The date of an RMC; None: it has none."""
    try:
        return datetime.strptime(cells[8], "%d%m%y").replace(tzinfo=UTC).date()
    except (IndexError, ValueError):
        return None


def _degrees(text: str, hemisphere: str) -> float:
    """Degrees and minutes in one number, as 4723.614.

    Raises:
        ValueError: it is none.
    """
    whole, point, fraction = text.partition(".")
    degrees = float(whole[:-2]) + float(f"{whole[-2:]}{point}{fraction}") / 60.0
    return -degrees if hemisphere in {"S", "W"} else degrees


def _checked(
    time_s: float, latitude_deg: float, longitude_deg: float, altitude_m: float | None
) -> Iterator[TimedFix]:
    """The fix, if it is one, without an altitude that is no number."""
    if latitude_deg == longitude_deg == 0.0 or not math.isfinite(time_s):
        return
    if altitude_m is not None and not math.isfinite(altitude_m):
        altitude_m = None
    if abs(latitude_deg) <= 90.0 and abs(longitude_deg) <= 180.0:
        fix = GpsFix(latitude_deg=latitude_deg, longitude_deg=longitude_deg)
        yield TimedFix(time_s=time_s, fix=replace(fix, altitude_m=altitude_m))
