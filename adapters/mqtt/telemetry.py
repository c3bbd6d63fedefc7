"""Positions and times as cameras, phones, drones and autopilots write them, in JSON or properties.

A position may lie some objects deep: DJI's Cloud API has it under ``data`` (topic
``thing/product/{sn}/osd``), MAVLink bridges under ``message``, GeoJSON (RFC 7946) as a point.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from engine.types import GpsFix

Record = Mapping[str, object]

# Names as `_folded` leaves them.
_LATITUDE = ("lat", "latitude", "latitudedeg", "gpslatitude")
_LONGITUDE = ("lon", "lng", "long", "longitude", "longitudedeg", "gpslongitude")
_ALTITUDE = (  # above the ellipsoid or the sea; an elevation only where nothing else is known,
    # because DJI's is that above the take-off
    *(
        "alt",
        "altitude",
        "altmsl",
        "altitudemsl",
        "msl",
        "amsl",
        "altm",
        "altitudem",
        "gpsaltitude",
    ),
    *("absolutealtitude", "absolutealtitudem", "absalt", "height", "heightm"),
    *("elevation", "elevationm", "ele"),
)
_ACCURACY = ("accuracy", "accuracym", "horizontalaccuracy", "horizontalaccuracym", "acc")
_VERTICAL_ACCURACY = ("verticalaccuracy", "verticalaccuracym", "vac")
_TIME = ("capturedats", "tcapture", "timestamp", "time", "tst")

# MAVLink's common messages, https://mavlink.io/en/messages/common.html
_OWN_POSITIONS = {"GLOBAL_POSITION_INT", "GLOBAL_POSITION_INT_COV", "GPS_RAW_INT", "GPS2_RAW"}
_MESSAGE_NAME = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*")
_MESSAGE_KEYS = ("mavpackettype", "type", "msgtype", "messagename")
_DEGREES_PER_UNIT, _METRES_PER_UNIT = 1e-7, 1e-3  # of its integers
_LARGEST_DEGREES = 1e5  # a larger number is one of its integers, whatever the message: 0.01 degrees
_FIX_2D = {"2", "GPS_FIX_TYPE_2D_FIX"}
_FIX_NONE = {"0", "1", "GPS_FIX_TYPE_NO_GPS", "GPS_FIX_TYPE_NO_FIX"}

_ELSEWHERE = re.compile(  # objects that hold the positions of something else, by their names
    r"home|takeoff|target|dest|dock|landing|alternate|waypoint|pilot|operator|station|gcs|base|goal"
)
MAX_TELEMETRY_BYTES = 65_536  # of a message of telemetry

MAX_KEYS = 300  # of an object, that are looked at
_MAX_DEPTH = 4  # of objects in objects
_MAX_OBJECTS = 200  # that are looked at
_LOWEST_M, _HIGHEST_M = -1_000.0, 100_000.0
_MILLISECONDS_FROM, _MICROSECONDS_FROM, _NANOSECONDS_FROM = 1e11, 1e14, 1e17  # Unix times
_TYPE_NAMES = {bool: "true or false", int: "number", float: "number", str: "text"}
_MAX_SHAPE_CHARS, _MAX_KEY_CHARS = 300, 40


class Unreadable(StrEnum):
    """Why a message gives no position."""

    TOO_LONG = "is too long"
    NO_JSON = "is no JSON object"
    NO_POSITION = "holds no position in a form that is known"
    IMPOSSIBLE = "holds a position that cannot be"
    SEVERAL = "holds several positions"
    OTHER_MESSAGE = "is a MAVLink message of something else"
    NO_FIX = "has no fix yet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A place on WGS84, perhaps without its altitude."""

    latitude_deg: float
    longitude_deg: float
    altitude_m: float | None
    accuracy_m: float | None = None
    vertical_accuracy_m: float | None = None

    @property
    def fix(self) -> GpsFix:
        """The position as frames carry it."""
        return GpsFix(
            latitude_deg=self.latitude_deg,
            longitude_deg=self.longitude_deg,
            altitude_m=self.altitude_m,
            accuracy_m=self.accuracy_m,
            vertical_accuracy_m=self.vertical_accuracy_m,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """A position and when the camera was there."""

    sender_time_s: float | None  # on the sender's clock
    position: Position


def read_telemetry(payload: bytes) -> Telemetry | Unreadable:
    """A position from a JSON object, or why there is none."""
    record = read_json(payload)
    if record is None:
        return Unreadable.NO_JSON
    objects = list(_objects(record))
    position = _find_position(objects)
    if isinstance(position, Unreadable):
        return position
    times_s = (_time_of(folded) for _, folded in objects)
    return Telemetry(
        sender_time_s=next((time_s for time_s in times_s if time_s is not None), None),
        position=position,
    )


def read_json(text: bytes) -> dict[str, object] | None:
    """A JSON object, or None when the text is none."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_position(record: Record) -> Position | None:
    """The position in a record; None without one, or where receivers say that they have none."""
    position = _find_position(_objects(record))
    return None if isinstance(position, Unreadable) else position


def read_time(record: Record) -> float | None:
    """When it was, in s on the sender's clock: from s, ms, us, ns or an ISO 8601 date and time."""
    return _time_of(_folded(record))


def _time_of(folded: Record) -> float | None:
    for name in _TIME:
        time_s = _number(folded.get(name))
        if time_s is not None:
            return _in_seconds(time_s)
        text = folded.get(name)
        if isinstance(text, str):
            return _from_iso(text)
    return None


def read_number(record: Record, *names: str) -> float | None:
    """The first of some values that is a finite number, or the text of one.

    Names count without their case and what is no letter or digit in them.
    """
    folded = _folded(record)
    numbers = (_number(folded.get(_fold(name))) for name in names)
    return next((number for number in numbers if number is not None), None)


def shape_of(payload: bytes) -> str:
    """What a payload looks like without what it says: names and types of its values, cut short."""
    record = read_json(payload) if len(payload) <= MAX_TELEMETRY_BYTES else None
    if record is None:
        return f"{len(payload)} bytes"
    text = _shape(record, depth=0)
    return text if len(text) <= _MAX_SHAPE_CHARS else f"{text[:_MAX_SHAPE_CHARS]}..."


def _shape(value: object, *, depth: int) -> str:
    match value:
        case dict() if depth < _MAX_DEPTH:
            parts = (f"{_key(key)}: {_shape(own, depth=depth + 1)}" for key, own in value.items())
            return f"{{{', '.join(parts)}}}"
        case list() if value and depth < _MAX_DEPTH:
            return f"[{_shape(value[0], depth=depth + 1)} x {len(value)}]"
        case dict() | list():
            return "{...}" if isinstance(value, dict) else "[...]"
    return _TYPE_NAMES.get(type(value), "null")


def _key(key: str) -> str:
    return "".join(char if char.isprintable() else "_" for char in key[:_MAX_KEY_CHARS])


def _find_position(objects: Iterable[tuple[int, Record]]) -> Position | Unreadable:
    """The position that lies least deep; of several objects at that depth it must be one."""
    found: list[Position] = []
    why = Unreadable.NO_POSITION
    found_depth = _MAX_DEPTH
    for depth, folded in objects:
        if depth > found_depth:
            break
        position = _position_of(folded)
        if isinstance(position, Position):
            found.append(position)
            found_depth = depth
        elif why is Unreadable.NO_POSITION:
            why = position
    if len({(one.latitude_deg, one.longitude_deg) for one in found}) > 1:
        return Unreadable.SEVERAL
    return found[0] if found else why


def _objects(record: Record) -> Iterator[tuple[int, Record]]:
    """The objects in an object, folded, least deep first, but those about something else."""
    level: list[Record] = [record]
    num_left = _MAX_OBJECTS
    for depth in range(_MAX_DEPTH + 1):
        yield from ((depth, _folded(each)) for each in level)
        num_left -= len(level)
        inside = (
            value
            for each in level
            for key, value in itertools.islice(each.items(), MAX_KEYS)
            if isinstance(value, dict) and not _ELSEWHERE.search(key.lower())
        )
        level = list(itertools.islice(inside, num_left))


def _position_of(folded: Record) -> Position | Unreadable:
    """The position of one object, not of those in it.

    Latitude and longitude of exactly zero is what many receivers report before their first fix.
    """
    if (point := _geojson_point(folded)) is not None:
        folded = point
    latitude, longitude = _first(folded, _LATITUDE), _first(folded, _LONGITUDE)
    if latitude is None or longitude is None:
        return Unreadable.NO_POSITION
    message = next((name for key in _MESSAGE_KEYS if (name := _message_name(folded.get(key)))), "")
    if message and message not in _OWN_POSITIONS:
        return Unreadable.OTHER_MESSAGE
    fix_type = _fix_type(folded.get("fixtype"))
    if latitude == longitude == 0.0 or fix_type in _FIX_NONE:
        return Unreadable.NO_FIX
    altitude_m = None if fix_type in _FIX_2D else _first(folded, _ALTITUDE)
    is_scaled = latitude.is_integer() and longitude.is_integer()
    is_scaled &= bool(message) or max(abs(latitude), abs(longitude)) > _LARGEST_DEGREES
    if is_scaled:
        latitude, longitude = latitude * _DEGREES_PER_UNIT, longitude * _DEGREES_PER_UNIT
        if altitude_m is not None and altitude_m.is_integer():
            altitude_m *= _METRES_PER_UNIT
    if abs(latitude) > 90.0 or not -180.0 <= longitude <= 360.0:
        return Unreadable.IMPOSSIBLE
    is_altitude = altitude_m is not None and _LOWEST_M <= altitude_m <= _HIGHEST_M
    return Position(
        latitude_deg=latitude,
        longitude_deg=longitude if longitude <= 180.0 else longitude - 360.0,
        altitude_m=altitude_m if is_altitude else None,
        accuracy_m=_accuracy_m(folded, _ACCURACY, "hacc", is_scaled=is_scaled),
        vertical_accuracy_m=_accuracy_m(folded, _VERTICAL_ACCURACY, "vacc", is_scaled=is_scaled),
    )


def _geojson_point(folded: Record) -> Record | None:
    """A point of GeoJSON by names; None where the object is none."""
    place = folded.get("coordinates")
    if folded.get("type") != "Point" or not isinstance(place, list) or len(place) not in {2, 3}:
        return None
    return dict(zip(("longitude", "latitude", "altitude"), place, strict=False))


def _accuracy_m(
    folded: Record, names: tuple[str, ...], mavlink_name: str, *, is_scaled: bool
) -> float | None:
    """A standard deviation that is reported; MAVLink's is in mm."""
    accuracy_m = _first(folded, names)
    if accuracy_m is None and (value := _number(folded.get(mavlink_name))) is not None:
        accuracy_m = value * _METRES_PER_UNIT if is_scaled else value
    return accuracy_m if accuracy_m is not None and accuracy_m > 0.0 else None


def _message_name(value: object) -> str:
    """MAVLink's name of a message, "" where a value is none."""
    is_one = isinstance(value, str) and "_" in value and _MESSAGE_NAME.fullmatch(value)
    return str(value) if is_one else ""


def _fix_type(value: object) -> str:
    """MAVLink's kind of a fix as a text: its number or its name."""
    if isinstance(value, dict):  # as mavlink2rest has enumerations
        value = value.get("type")
    return str(value)


def _first(folded: Record, names: tuple[str, ...]) -> float | None:
    numbers = (_number(folded.get(name)) for name in names)
    return next((number for number in numbers if number is not None), None)


def _folded(record: Record) -> Record:
    """A record by names of lower-case letters and digits; of equal ones the first counts.

    Of a very long one only the beginning is read.
    """
    folded: dict[str, object] = {}
    for key, value in itertools.islice(record.items(), MAX_KEYS):
        folded.setdefault(_fold(key), value)
    return folded


def _fold(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _number(value: object) -> float | None:
    """A finite number, or the text of one with a decimal point or comma; None: neither."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and "." not in value:
        value = value.replace(",", ".", 1)
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


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
