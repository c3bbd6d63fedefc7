"""What phones send, well formed and otherwise."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from adapters.phone.messages import (
    MAX_TEXT_BYTES,
    PhoneFrame,
    PhoneHello,
    PhonePosition,
    RefusedMessage,
    parse_frame,
    parse_text,
    up_in_camera,
)
from engine.types import DropReason, GpsFix

JPEG = b"\xff\xd8\xff\xe0 and so on"
HEADER = {"seq": 7, "captured_at_ms": 1764000000500.25, "width": 640, "height": 480, "angle": 0}
POSITION = {
    "type": "position",
    "captured_at_ms": 1764000000000,
    "latitude": 47.37,
    "longitude": 8.54,
    "accuracy": 4.5,
}


def packed(header: bytes, jpeg: bytes = JPEG) -> bytes:
    return len(header).to_bytes(4, "big") + header + jpeg


def message(jpeg: bytes = JPEG, **changes: Any) -> bytes:
    return packed(json.dumps(HEADER | changes).encode(), jpeg)


def without(known: dict[str, Any], *keys: str) -> bytes:
    return json.dumps({key: value for key, value in known.items() if key not in keys}).encode()


def test_a_frame_is_read() -> None:
    assert parse_frame(message()) == PhoneFrame(
        sequence=7,
        captured_at_s=1764000000.50025,
        width=640,
        height=480,
        up_in_camera=None,
        jpeg=JPEG,
    )


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"", "empty message"),
        (b"\0\0\0", "3 bytes with a header of 0"),
        (b"\xff\xff\xff\xff" + b"x" * 20, "24 bytes with a header of 4294967295"),
        (packed(b"x" * (MAX_TEXT_BYTES + 1)), f"header of {MAX_TEXT_BYTES + 1}"),
        (packed(b"\xff\xfe"), "no JSON"),
        (packed(b"[1, 2]"), "JSON that is no object"),
        (packed(b"[" * 4000), "no JSON"),
        (packed(without(HEADER, "seq", "width")), "missing: seq, width"),
        (message(path="../../etc/passwd"), "1 unknown keys"),
        (message(width=0), "width: not within 1 to 16384"),
        (message(height=1e9), "height: not within"),
        (message(width=640.5), "width: no whole number"),
        (message(width=True), "width: no number"),
        (message(seq="7"), "seq: no number"),
        (message(seq=-1), "seq: not within"),
        (message(captured_at_ms=1e300), "captured_at_ms: not within"),
        (packed(json.dumps(HEADER | {"captured_at_ms": float("nan")}).encode()), "no JSON"),
        (message(angle=45), "angle: expected one of"),
        (message(beta=181, gamma=0), "beta: not within"),
        (message(jpeg=b""), "no picture behind the header"),
        (message(jpeg=b"GIF89a"), "no JPEG behind the header"),
    ],
)
def test_a_malformed_frame_is_refused_with_what_is_wrong(data: bytes, detail: str) -> None:
    refused = parse_frame(data)
    assert isinstance(refused, RefusedMessage)
    assert refused.reason is DropReason.UNREADABLE
    assert detail in refused.detail
    assert "passwd" not in refused.detail


def test_a_time_years_ahead_is_read_as_it_stands() -> None:
    frame = parse_frame(message(captured_at_ms=4e12))
    assert isinstance(frame, PhoneFrame)
    assert frame.captured_at_s == 4e9


def test_a_position_with_altitude_is_a_fix() -> None:
    told = parse_text(json.dumps(POSITION | {"altitude": 408.2}))
    fix = GpsFix(latitude_deg=47.37, longitude_deg=8.54, altitude_m=408.2, accuracy_m=4.5)
    assert told == PhonePosition(captured_at_s=1764000000.0, fix=fix)


def test_a_position_without_altitude_is_a_fix_without_one() -> None:
    fix = GpsFix(latitude_deg=47.37, longitude_deg=8.54, accuracy_m=4.5)
    assert parse_text(json.dumps(POSITION)) == PhonePosition(captured_at_s=1764000000.0, fix=fix)


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("", "no JSON"),
        ("nonsense", "no JSON"),
        ("{}", "unknown type"),
        ('{"type": "stop"}', "unknown type"),
        ('{"type": ["hello"]}', "unknown type"),
        ('{"type": "hello", "path": "/etc"}', "unknown keys"),
        (json.dumps(POSITION | {"latitude": 91}), "latitude: not within"),
        (json.dumps(POSITION | {"accuracy": -1}), "accuracy: not within"),
        (json.dumps(POSITION | {"altitude": None}), "altitude: no number"),
        ("x" * (MAX_TEXT_BYTES + 1), "characters"),
    ],
)
def test_a_malformed_text_is_refused_with_what_is_wrong(text: str, detail: str) -> None:
    refused = parse_text(text)
    assert isinstance(refused, RefusedMessage)
    assert detail in refused.detail


def test_a_hello_is_read() -> None:
    assert parse_text('{"type": "hello"}') == PhoneHello()


@pytest.mark.parametrize(
    ("beta", "gamma", "angle", "expected"),
    [
        (90, 0, 0, (0, -1, 0)),  # upright: up is up in the picture
        (0, 0, 0, (0, 0, -1)),  # on a table, the rear camera looks down
        (180, 0, 0, (0, 0, 1)),  # held overhead, it looks up
        (45, 0, 0, (0, -np.sqrt(0.5), -np.sqrt(0.5))),
        (0, -90, 90, (0, -1, 0)),  # on its left side, the content of the screen turned with it
        (0, 90, 270, (0, -1, 0)),  # on its right side
        (-90, 0, 180, (0, -1, 0)),  # upside down
        (0, -90, 0, (1, 0, 0)),  # on its left side with the rotation locked: right is up
    ],
)
def test_the_direction_up_is_where_the_phone_is_held(
    beta: float, gamma: float, angle: float, expected: tuple[float, float, float]
) -> None:
    up = up_in_camera(beta_deg=beta, gamma_deg=gamma, screen_angle_deg=angle)
    assert up == pytest.approx(expected, abs=1e-12)


def test_tilt_in_a_frame_gives_its_direction_up() -> None:
    frame = parse_frame(message(beta=90, gamma=0))
    assert isinstance(frame, PhoneFrame)
    assert frame.up_in_camera == pytest.approx((0, -1, 0), abs=1e-12)
    lone = parse_frame(message(beta=90))
    assert isinstance(lone, PhoneFrame)
    assert lone.up_in_camera is None
