"""What publishers put into messages: images in many wrappings, positions in many words."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest

from adapters.mqtt import payloads
from adapters.mqtt import telemetry as telemetry_module
from adapters.mqtt.payloads import Metadata, PayloadKind, Unwrapped, kind_of, unwrap
from adapters.mqtt.telemetry import (
    Telemetry,
    Unreadable,
    read_json,
    read_position,
    read_telemetry,
    read_time,
    shape_of,
)
from adapters.mqtt.topics import TopicFilter, telemetry_filter
from engine.errors import ConfigError
from engine.types import GpsFix
from tests.support.mqtt_broker import jpeg, png

JPEG, PNG = jpeg(), png()
JPEG_TEXT = base64.b64encode(JPEG)


def unwrapped(payload: bytes, **properties: str) -> Unwrapped:
    result = unwrap(payload, properties)
    assert isinstance(result, Unwrapped), result
    return result


def envelope(**values: Any) -> bytes:
    return json.dumps({"image": JPEG_TEXT.decode(), **values}).encode()


# -- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "kind", "image"),
    [
        (JPEG, PayloadKind.IMAGE, JPEG),
        (PNG, PayloadKind.IMAGE, PNG),
        (JPEG_TEXT, PayloadKind.BASE64, JPEG),
        (b" \r\n" + base64.encodebytes(JPEG), PayloadKind.BASE64, JPEG),  # lines, as in mail
        (JPEG_TEXT.rstrip(b"="), PayloadKind.BASE64, JPEG),
        (base64.b64encode(PNG), PayloadKind.BASE64, PNG),
        (b"data:image/jpeg;base64," + JPEG_TEXT, PayloadKind.DATA_URI, JPEG),
        (b"Data:Image/PNG;name=a;BASE64," + base64.b64encode(PNG), PayloadKind.DATA_URI, PNG),
        (envelope(), PayloadKind.JSON, JPEG),
        (b'\n {"imagebase64": "' + JPEG_TEXT + b'"}', PayloadKind.JSON, JPEG),
        (b'{"data": "data:image/jpeg;base64,' + JPEG_TEXT + b'"}', PayloadKind.JSON, JPEG),
        (b'{"id": "7", "frame": "' + JPEG_TEXT + b'"}', PayloadKind.JSON, JPEG),  # by its start
    ],
)
def test_an_image_is_found_in_its_wrapping(payload: bytes, kind: PayloadKind, image: bytes) -> None:
    assert kind_of(payload) is kind
    assert unwrapped(payload) == Unwrapped(image=image, metadata=Metadata())


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"hello",
        b"/etc/passwd",
        b"/9j/!!!! no base64 at all",
        b"/9j/" + "ä".encode() * 20,
        b"data:image/jpeg," + JPEG,
        b"data:image/jpeg;base64",
        b"data:text/plain;base64," + JPEG_TEXT,
        b"{",
        b"{}",
        b"[1]",
        b"{" * 100_000,
        b'{"image":' * 50_000,
        b'{"image": 7, "data": null}',
        b'{"image": "/etc/passwd"}',
        b'{"image": "file:///etc/passwd"}',
        b'{"image": "http://127.0.0.1/image.jpg"}',
        b'{"image": "\\ud800"}',
        b'{"image": "\xff\xfe"}',
        '{"image": "\x00"}'.encode("utf-16"),
        b'{"image": ' + b"9" * 10_000 + b"}",
    ],
)
def test_what_holds_no_image_is_refused_in_words(payload: bytes) -> None:
    assert isinstance(unwrap(payload, {}), str)


def test_text_in_place_of_an_image_is_never_opened(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(JPEG)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file was opened")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("io.open", refuse)
    assert isinstance(unwrap(json.dumps({"image": str(path)}).encode(), {}), str)


# -- what comes beside the image -----------------------------------------------------------------


def test_an_envelope_may_hold_time_position_and_focal_length() -> None:
    metadata = unwrapped(
        envelope(t_capture=1_790_000_000_500, lat=47.5, lon=8.25, alt=410, accuracy=3, focal_px=90)
    ).metadata
    assert metadata.sender_time_s == 1_790_000_000.5
    assert metadata.focal_px == 90.0
    assert metadata.position is not None
    assert metadata.position.fix == GpsFix(
        latitude_deg=47.5, longitude_deg=8.25, altitude_m=410.0, accuracy_m=3.0
    )


def test_user_properties_hold_the_same_of_a_bare_image_and_an_envelope_wins() -> None:
    properties = {"t_capture": "12.5", "lat": "1", "lon": "2", "alt": "3", "focal_px": "80"}
    metadata = unwrapped(JPEG, **properties).metadata
    assert (metadata.sender_time_s, metadata.focal_px) == (12.5, 80.0)
    assert metadata.position is not None
    assert metadata.position.altitude_m == 3.0
    metadata = unwrapped(envelope(t_capture=13.0, alt=9.0), **properties).metadata
    assert metadata.sender_time_s == 13.0
    assert metadata.position is not None
    assert metadata.position.altitude_m == 9.0


@pytest.mark.parametrize(
    "values",
    [
        {"t_capture": "yesterday"},
        {"t_capture": "nan"},
        {"t_capture": "1e999"},
        {"t_capture": ""},
        {"focal_px": "-3"},
        {"focal_px": "inf"},
        {"lat": "95", "lon": "8", "alt": "1"},
        {"lat": "0", "lon": "0", "alt": "1"},
        {"lat": "", "lon": "8"},
        {"lat": "47"},
    ],
)
def test_values_that_cannot_be_are_as_if_they_were_not_there(values: dict[str, str]) -> None:
    assert unwrapped(JPEG, **values).metadata == Metadata()
    assert unwrapped(envelope(**values)).metadata == Metadata()


@pytest.mark.parametrize(
    ("sent", "time_s"),
    [
        (1_790_000_000, 1.79e9),
        (1_790_000_000.25, 1_790_000_000.25),
        ("1790000000.25", 1_790_000_000.25),
        (1_790_000_000_250, 1_790_000_000.25),
        (1_790_000_000_250_000, 1_790_000_000.25),
        (1_790_000_000_250_000_000, 1_790_000_000.25),
        ("2026-09-21T14:13:20Z", 1.79e9),
        ("2026-09-21T16:13:20.250+02:00", 1_790_000_000.25),
        ("2026-09-21 14:13:20", 1.79e9),
        (17.5, 17.5),  # since the camera was switched on
        (True, None),
        ([], None),
        ("2026-13-45", None),
    ],
)
def test_times_are_read_in_any_unit(sent: object, time_s: float | None) -> None:
    assert read_time({"timestamp": sent}) == pytest.approx(time_s)


# -- telemetry ------------------------------------------------------------------------------------


def telemetry_of(record: object) -> Telemetry:
    telemetry = read_telemetry(json.dumps(record).encode())
    assert isinstance(telemetry, Telemetry), telemetry
    return telemetry


@pytest.mark.parametrize(
    "record",
    [
        {"lat": 47.0, "lon": 8.0, "alt": 400.0},
        {"latitude": 47, "longitude": 8, "altitude": 400},
        {"lat": 47, "lon": 8, "height": 400},
        {"lat": 47, "lon": 8, "alt_m": 400},
        {"lat": 47, "lon": 8, "elevation": 400},
        {"Latitude": 47, "Longitude": 8, "GPSAltitude": 400},
        {"latitude_deg": 47.0, "longitude_deg": 8.0, "absolute_altitude_m": 400.0},  # MAVSDK
        {"lat": "47,0", "lon": "8,0", "alt": "400,0"},
        {"position": {"lat": 47.0, "lon": 8.0, "alt": 400.0}},
        {"drone": {"gps": {"lat": 47.0, "lon": 8.0, "alt": 400.0}}, "home": {"lat": 1, "lon": 2}},
        {"lat": "47", "lng": "8", "alt_msl": "400"},
        {"lat": 47.0, "lng": 8.0, "longitude": 9.0, "alt": "?", "altitude": 400.0},
    ],
)
def test_positions_are_read_by_their_usual_names(record: dict[str, object]) -> None:
    telemetry = telemetry_of({**record, "time": 5.0})
    assert telemetry.sender_time_s == 5.0
    assert telemetry.position.fix == GpsFix(latitude_deg=47.0, longitude_deg=8.0, altitude_m=400.0)


def test_longitudes_count_east_or_from_0_to_360() -> None:
    position = read_position({"lat": 47.0, "lon": 352.0})
    assert position is not None
    assert position.longitude_deg == -8.0


def test_a_position_without_a_plausible_altitude_is_a_fix_without_one() -> None:
    for altitude in (None, "high", 1e9, float("nan")):
        position = read_position({"lat": 47.0, "lon": 8.0, "alt": altitude})
        assert position is not None
        assert position.fix == GpsFix(latitude_deg=47.0, longitude_deg=8.0)


def test_dji_cloud_api_has_the_position_in_its_data_and_its_elevation_is_no_altitude() -> None:
    telemetry = telemetry_of(
        {
            "bid": "42a19f36",
            "tid": "6a7bfe89",
            "timestamp": 1_790_000_000_250,
            "gateway": "4TADKAQ",
            "data": {
                "39-0-7": {"gimbal_pitch": -90.0, "gimbal_roll": 0, "gimbal_yaw": 12.0},
                "attitude_head": 12.3,
                "elevation": 60.0,
                "height": 458.5,
                "home_distance": 3.0,
                "latitude": 47.0,
                "longitude": 8.0,
                "position_state": {"gps_number": 20, "is_fixed": 2, "quality": 5},
            },
        }
    )
    assert telemetry.sender_time_s == 1_790_000_000.25
    fix = telemetry.position.fix
    assert fix == GpsFix(latitude_deg=47.0, longitude_deg=8.0, altitude_m=458.5)


MAVLINK_FIELDS = {"lat": 468_426_000, "lon": -63_000_001, "alt": 458_500}
GLOBAL_POSITION = {**MAVLINK_FIELDS, "time_boot_ms": 5_000, "relative_alt": 60_000, "hdg": 9_000}


@pytest.mark.parametrize(
    "record",
    [
        MAVLINK_FIELDS,
        GLOBAL_POSITION,
        {"mavpackettype": "GLOBAL_POSITION_INT", **GLOBAL_POSITION},  # pymavlink
        {  # mavlink2rest
            "header": {"system_id": 1, "component_id": 1, "sequence": 7},
            "message": {"type": "GLOBAL_POSITION_INT", **GLOBAL_POSITION},
        },
        {"GLOBAL_POSITION_INT": GLOBAL_POSITION},
        {"lat": 468_426_000, "lon": -63_000_001, "alt": 458.5, "timeBootMs": 5_000},
        {"type": "GPS_RAW_INT", "fix_type": 3, **MAVLINK_FIELDS},
    ],
)
def test_mavlink_counts_in_ten_millionths_of_degrees_and_millimetres(record: object) -> None:
    position = telemetry_of(record).position
    assert position.latitude_deg == pytest.approx(46.8426, abs=1e-9)
    assert position.longitude_deg == pytest.approx(-6.3000001, abs=1e-9)
    assert position.altitude_m == pytest.approx(458.5)


def test_mavlink_near_zero_is_scaled_where_its_name_says_what_it_is() -> None:
    message = {"mavpackettype": "GLOBAL_POSITION_INT", **GLOBAL_POSITION}
    position = telemetry_of({**message, "lat": 50, "lon": 90}).position
    assert position.latitude_deg == pytest.approx(5e-6)
    assert position.longitude_deg == pytest.approx(9e-6)


@pytest.mark.parametrize("field", ["fix_type", "relative_alt"])
def test_whole_degrees_without_a_name_of_mavlink_are_degrees(field: str) -> None:
    position = telemetry_of({"lat": 47, "lon": 8, "alt": 500, field: 3}).position
    assert position.fix == GpsFix(latitude_deg=47.0, longitude_deg=8.0, altitude_m=500.0)


def test_a_raw_fix_of_mavlink_has_its_accuracies_and_in_two_dimensions_no_altitude() -> None:
    raw = {"mavpackettype": "GPS_RAW_INT", **MAVLINK_FIELDS, "h_acc": 1_500, "v_acc": 2_500}
    fix = telemetry_of({**raw, "fix_type": {"type": "GPS_FIX_TYPE_RTK_FIXED"}}).position.fix
    assert (fix.accuracy_m, fix.vertical_accuracy_m) == (1.5, 2.5)
    for kind in (2, {"type": "GPS_FIX_TYPE_2D_FIX"}):
        assert telemetry_of({**raw, "fix_type": kind}).position.altitude_m is None


@pytest.mark.parametrize(
    "record",
    [
        {"type": "Point", "coordinates": [8.0, 47.0, 400.0]},
        {
            "type": "Feature",
            "geometry": {"type": "Point", "coordinates": [8, 47, 400]},
            "properties": {"timestamp": 5.0},
        },
    ],
)
def test_geojson_has_the_longitude_first(record: dict[str, object]) -> None:
    telemetry = telemetry_of(record)
    assert telemetry.position.fix == GpsFix(latitude_deg=47.0, longitude_deg=8.0, altitude_m=400.0)
    assert telemetry.sender_time_s == (5.0 if "properties" in record else None)


def test_owntracks_has_its_own_names_for_time_and_accuracy() -> None:
    record = {"_type": "location", "lat": 47, "lon": 8, "alt": 400, "acc": 5, "vac": 3, "tst": 7}
    telemetry = telemetry_of(record)
    assert telemetry.sender_time_s == 7.0
    fix = telemetry.position.fix
    assert (fix.altitude_m, fix.accuracy_m, fix.vertical_accuracy_m) == (400.0, 5.0, 3.0)


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"", Unreadable.NO_JSON),
        (b"47,8,400", Unreadable.NO_JSON),
        (b"[47, 8, 400]", Unreadable.NO_JSON),
        (b"\xff", Unreadable.NO_JSON),
        (b'{"lat": 47}', Unreadable.NO_POSITION),
        (b'{"lat": true, "lon": false}', Unreadable.NO_POSITION),
        (b'{"position": [47, 8]}', Unreadable.NO_POSITION),
        (b'{"home": {"lat": 47, "lon": 8}}', Unreadable.NO_POSITION),
        (b'{"a":{"b":{"c":{"d":{"e":{"lat": 47, "lon": 8}}}}}}', Unreadable.NO_POSITION),
        (b'{"type": "Point", "coordinates": [8]}', Unreadable.NO_POSITION),
        (b'{"lat": 95, "lon": 8}', Unreadable.IMPOSSIBLE),
        (b'{"lat": 91.5, "lon": 8.5}', Unreadable.IMPOSSIBLE),
        (b'{"lat": 2147483647, "lon": 0}', Unreadable.IMPOSSIBLE),
        (b'{"a": {"lat": 47, "lon": 8}, "b": {"lat": 46, "lon": 8}}', Unreadable.SEVERAL),
        (b'{"mavpackettype": "HOME_POSITION", "lat": 7, "lon": 8}', Unreadable.OTHER_MESSAGE),
        (b'{"lat": 0, "lon": 0.0}', Unreadable.NO_FIX),
        (b'{"lat": 468426000, "lon": 1, "fix_type": 1}', Unreadable.NO_FIX),
    ],
)
def test_what_holds_no_position_is_no_telemetry_and_says_why(
    payload: bytes, why: Unreadable
) -> None:
    assert read_telemetry(payload) is why


def test_a_shape_has_names_and_types_and_nothing_of_what_is_said() -> None:
    record = {"sn": "1ZNBJ", "at": 5, "ok": True, "p": {"q": [1.5, 2]}, "none": None}
    shape = shape_of(json.dumps(record).encode())
    assert shape == "{sn: text, at: number, ok: true or false, p: {q: [number x 2]}, none: null}"
    assert shape_of(b"secret") == "6 bytes"
    assert shape_of(json.dumps({"a\x1b[2J": 1}).encode()) == "{a_[2J: number}"
    assert len(shape_of(json.dumps({f"k{i}" * 50: i for i in range(99)}).encode())) < 400
    assert shape_of(b" " * 70_000 + b'{"a": 1}') == "70008 bytes"


@pytest.mark.parametrize(
    "record",
    [
        {f"k{i}": {} for i in range(20_000)},
        {"a": {f"k{i}": {"lat": {}} for i in range(20_000)}},
        {f"k{i}": "text" for i in range(20_000)},
    ],
)
def test_a_flood_of_objects_and_names_is_not_looked_through(
    record: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[None] = []
    monkeypatch.setattr(telemetry_module, "_fold", _counting(telemetry_module._fold, looked_at))
    monkeypatch.setattr(payloads, "kind_of", _counting(payloads.kind_of, looked_at))
    payload = json.dumps(record).encode()
    assert isinstance(unwrap(payload, {}), str)
    assert read_telemetry(payload) is Unreadable.NO_POSITION
    assert len(looked_at) < 5_000


def _counting(function: Callable[[Any], Any], calls: list[None]) -> Callable[[Any], Any]:
    def counted(value: Any) -> Any:
        calls.append(None)
        return function(value)

    return counted


def test_deep_and_long_json_is_refused() -> None:
    assert read_json(b'{"a":' * 100_000) is None
    assert read_json(b'{"a": ' + b"1" * 5_000 + b"}") is None


# -- topics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "topic", "levels"),
    [
        ("a/b", "a/b", ()),
        ("a/b", "a/c", None),
        ("a/b", "a/b/c", None),
        ("a/b/c", "a/b", None),
        ("a/+/c", "a/b/c", ("b",)),
        ("a/+/c", "a//c", ("",)),
        ("+/+/c", "a/b/c", ("a", "b")),
        ("a/#", "a/b/c", ("b/c",)),
        ("a/+/#", "a/b/c/d", ("b", "c/d")),
        ("#", "a/b", ("a/b",)),
    ],
)
def test_wildcards_name_cameras(pattern: str, topic: str, levels: tuple[str, ...] | None) -> None:
    assert TopicFilter(pattern).match(topic) == levels


@pytest.mark.parametrize(
    ("frames", "configured", "telemetry"),
    [
        ("sfm/+/frame", "", "sfm/+/telemetry"),
        ("camera", "", "telemetry"),
        ("sfm/#", "", "sfm/telemetry"),
        ("sfm/+/frame", "fleet/+/gps", "fleet/+/gps"),
    ],
)
def test_telemetry_comes_beside_the_frames_or_as_configured(
    frames: str, configured: str, telemetry: str
) -> None:
    assert telemetry_filter(TopicFilter(frames), configured).text == telemetry


def test_a_telemetry_topic_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mqtt\.telemetry_topic"):
        telemetry_filter(TopicFilter("a"), "a/#/b")
