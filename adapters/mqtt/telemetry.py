"""Positions and times as cameras, phones and autopilots write them, from JSON or properties."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from engine.types import GpsFix

Record = Mapping[str, object]

_LATITUDE = ("lat", "latitude")
_LONGITUDE = ("lon", "lng", "longitude")
_ALTITUDE = ("alt", "altitude", "alt_msl")
_ACCURACY = ("accuracy", "accuracy_m")
_TIME = ("captured_at_s", "t_capture", "timestamp", "time")

_LOWEST_M, _HIGHEST_M = -1_000.0, 100_000.0
_MILLISECONDS_FROM, _MICROSECONDS_FROM, _NANOSECONDS_FROM = 1e11, 1e14, 1e17  # Unix times


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A place on WGS84, perhaps without its altitude."""

    latitude_deg: float
    longitude_deg: float
    altitude_m: float | None
    accuracy_m: float | None

    @property
    def fix(self) -> GpsFix:
        """The position as frames carry it."""
        return GpsFix(
            latitude_deg=self.latitude_deg,
            longitude_deg=self.longitude_deg,
            altitude_m=self.altitude_m,
            accuracy_m=self.accuracy_m,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """A position and when the camera was there."""

    sender_time_s: float | None  # on the sender's clock
    position: Position


def read_telemetry(payload: bytes) -> Telemetry | None:
    """A position from a JSON object; None when there is none in it."""
    record = read_json(payload)
    position = read_position(record) if record is not None else None
    if record is None or position is None:
        return None
    return Telemetry(sender_time_s=read_time(record), position=position)


def read_json(text: bytes) -> dict[str, object] | None:
    """A JSON object, or None when the text is none."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_position(record: Record) -> Position | None:
    """The position in a record; None without one, or where receivers say that they have none.

    Latitude and longitude of exactly zero is what many receivers report before their first fix.
    """
    latitude_deg, longitude_deg = read_number(record, *_LATITUDE), read_number(record, *_LONGITUDE)
    if latitude_deg is None or longitude_deg is None or latitude_deg == longitude_deg == 0.0:
        return None
    if abs(latitude_deg) > 90.0 or not -180.0 <= longitude_deg <= 360.0:
        return None
    altitude_m, accuracy_m = read_number(record, *_ALTITUDE), read_number(record, *_ACCURACY)
    is_altitude = altitude_m is not None and _LOWEST_M <= altitude_m <= _HIGHEST_M
    return Position(
        latitude_deg=latitude_deg,
        longitude_deg=longitude_deg if longitude_deg <= 180.0 else longitude_deg - 360.0,
        altitude_m=altitude_m if is_altitude else None,
        accuracy_m=accuracy_m if accuracy_m is not None and accuracy_m > 0.0 else None,
    )


def read_time(record: Record) -> float | None:
    """When it was, in s on the sender's clock: from s, ms, us, ns or an ISO 8601 date and time."""
    for name in _TIME:
        time_s = read_number(record, name)
        if time_s is not None:
            return _in_seconds(time_s)
        text = record.get(name)
        if isinstance(text, str):
            return _from_iso(text)
    return None


def read_number(record: Record, *names: str) -> float | None:
    """The first of some values that is a finite number, or the text of one."""
    for name in names:
        value = record.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            continue
        try:
            number = float(value)
        except (ValueError, OverflowError):
            continue
        if math.isfinite(number):
            return number
    return None


def _in_seconds(time: float) -> float:
    for limit, per_second in (
        (_NANOSECONDS_FROM, 1e9),
        (_MICROSECONDS_FROM, 1e6),
        (_MILLISECONDS_FROM, 1e3),
    ):
        if abs(time) >= limit:
            return time / per_second
    return time


def _from_iso(text: str) -> float | None:
    try:
        moment = datetime.fromisoformat(text)
        zoned = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        return zoned.timestamp()
    except (ValueError, OverflowError):
        return None
