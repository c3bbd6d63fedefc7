"""What a phone sends, from bytes to checked values.

A frame is one binary message: the length of a JSON header as a 32-bit big-endian number, the
header, and the JPEG. Everything else is a JSON object in a text message. Keys that are not known
are refused: page and engine are of one version.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.types import DropReason, GpsFix

MAX_TEXT_BYTES = 4096  # of a header or a text message
_MAX_EDGE_PX = 16_384
_MAX_NUMBER = 2**53  # beyond it the page's numbers are not exact
_JPEG_START = b"\xff\xd8\xff"
_ANGLES_DEG = (0, 90, 180, 270)

Direction = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhoneFrame:
    """A picture, still encoded."""

    sequence: int  # grows with every picture of one page load
    captured_at_s: float  # Unix time by the phone's clock
    width: int  # px
    height: int
    up_in_camera: Direction | None  # unit vector away from the ground, where the phone reports it
    jpeg: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PhonePosition:
    """Where the phone is."""

    captured_at_s: float  # Unix time by the phone's clock
    fix: GpsFix


@dataclass(frozen=True, slots=True, kw_only=True)
class PhoneHello:
    """The page was loaded and begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedMessage:
    """Why a message is not used."""

    reason: DropReason
    detail: str


class _Unfit(Exception):
    """A value is missing or out of range; the message says which."""


def parse_frame(data: bytes) -> PhoneFrame | RefusedMessage:
    """Takes a binary message apart; the JPEG is not looked into beyond its first bytes."""
    if not data:
        return _unreadable("empty message")
    header_length = int.from_bytes(data[:4], "big")
    if not 2 <= header_length <= min(MAX_TEXT_BYTES, len(data) - 4):
        return _unreadable(f"{len(data)} bytes with a header of {header_length}")
    jpeg = data[4 + header_length :]
    try:
        header = _json_object(data[4 : 4 + header_length])
        frame = _frame(header, jpeg)
    except _Unfit as error:
        return _unreadable(str(error))
    if not jpeg.startswith(_JPEG_START):
        return _unreadable("no JPEG behind the header" if jpeg else "no picture behind the header")
    return frame


def parse_text(text: str) -> PhonePosition | PhoneHello | RefusedMessage:
    """Reads a text message."""
    if len(text) > MAX_TEXT_BYTES:
        return _unreadable(f"a text message of {len(text)} characters")
    try:
        message = _json_object(text)
        match message.get("type"):
            case "hello":
                _expect_keys(message, {"type"})
                return PhoneHello()
            case "position":
                return _position(message)
    except _Unfit as error:
        return _unreadable(str(error))
    return _unreadable("a text message of unknown type")


def up_in_camera(*, beta_deg: float, gamma_deg: float, screen_angle_deg: float) -> Direction:
    """The direction away from the ground in the rear camera's axes (x right, y down, z forward).

    W3C Device Orientation: the device's axes are x to the right of its screen, y to its top and z
    out of it; the rotation onto the earth is Rz(alpha) Rx(beta) Ry(gamma), whose last row is the
    direction up. The picture stands as the content of the screen does, which is turned against the
    device by ``screen_angle_deg``.
    """
    beta, gamma, angle = map(math.radians, (beta_deg, gamma_deg, screen_angle_deg))
    x = -math.cos(beta) * math.sin(gamma)
    y = math.sin(beta)
    z = math.cos(beta) * math.cos(gamma)
    right = x * math.cos(angle) - y * math.sin(angle)
    up = x * math.sin(angle) + y * math.cos(angle)
    return right, -up, -z


def _unreadable(detail: str) -> RefusedMessage:
    return RefusedMessage(reason=DropReason.UNREADABLE, detail=detail)


def _json_object(text: str | bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _Unfit("no JSON") from error
    if not isinstance(value, dict):
        raise _Unfit("JSON that is no object")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _frame(header: Mapping[str, Any], jpeg: bytes) -> PhoneFrame:
    _expect_keys(
        header, {"seq", "captured_at_ms", "width", "height", "angle"}, optional={"beta", "gamma"}
    )
    angle_deg = _integer(header, "angle", 0, 270)
    if angle_deg not in _ANGLES_DEG:
        raise _Unfit(f"angle: expected one of {_ANGLES_DEG}")
    up: Direction | None = None
    if {"beta", "gamma"} <= header.keys():
        up = up_in_camera(
            beta_deg=_number(header, "beta", -180.0, 180.0),
            gamma_deg=_number(header, "gamma", -90.0, 90.0),
            screen_angle_deg=angle_deg,
        )
    return PhoneFrame(
        sequence=_integer(header, "seq", 0, _MAX_NUMBER),
        captured_at_s=_number(header, "captured_at_ms", -_MAX_NUMBER, _MAX_NUMBER) / 1000.0,
        width=_integer(header, "width", 1, _MAX_EDGE_PX),
        height=_integer(header, "height", 1, _MAX_EDGE_PX),
        up_in_camera=up,
        jpeg=jpeg,
    )


def _position(message: Mapping[str, Any]) -> PhonePosition:
    _expect_keys(
        message,
        {"type", "captured_at_ms", "latitude", "longitude", "accuracy"},
        optional={"altitude"},
    )
    latitude_deg = _number(message, "latitude", -90.0, 90.0)
    longitude_deg = _number(message, "longitude", -180.0, 180.0)
    accuracy_m = _number(message, "accuracy", 0.0, 1e9)
    altitude_m: float | None = None
    if "altitude" in message:
        altitude_m = _number(message, "altitude", -12_000.0, 100_000.0)
    fix = GpsFix(
        latitude_deg=latitude_deg,
        longitude_deg=longitude_deg,
        altitude_m=altitude_m,
        # Phones report the radius of 68 % (Android) or 95 % (W3C); neither is less than one
        # standard deviation.
        accuracy_m=accuracy_m,
    )
    captured_at_s = _number(message, "captured_at_ms", -_MAX_NUMBER, _MAX_NUMBER) / 1000.0
    return PhonePosition(captured_at_s=captured_at_s, fix=fix)


def _expect_keys(
    message: Mapping[str, Any], required: set[str], *, optional: set[str] | None = None
) -> None:
    missing = required - message.keys()
    unknown = message.keys() - required - (optional or set())
    if missing:
        raise _Unfit(f"missing: {', '.join(sorted(missing))}")
    if unknown:
        # Not by name: the names are the sender's words.
        raise _Unfit(f"{len(unknown)} unknown keys")


def _number(message: Mapping[str, Any], key: str, low: float, high: float) -> float:
    value = message[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Unfit(f"{key}: no number")
    if not low <= value <= high:  # NaN fails it, too
        raise _Unfit(f"{key}: not within {low:g} to {high:g}")
    return float(value)


def _integer(message: Mapping[str, Any], key: str, low: int, high: int) -> int:
    value = _number(message, key, low, high)
    if not value.is_integer():
        raise _Unfit(f"{key}: no whole number")
    return int(value)
