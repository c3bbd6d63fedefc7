"""Positions in subtitles, as several kinds of drones write them, and as none should."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from adapters.sources.files.telemetry_text import (
    AltitudeKind,
    Telemetry,
    TextBlock,
    blocks_of_srt,
    read_telemetry,
    text_of_packet,
)

Position = tuple[float, float, float, float | None]  # time, latitude, longitude, altitude

PER_FRAME = """1
00:00:00,000 --> 00:00:00,033
<font size="28">FrameCnt: 1, DiffTime: 33ms
2024-03-20 12:59:17.819
[iso: 400] [shutter: 1/320.0] [fnum: 1.7] [ev: 0] [ct: 5310] [color_md: default] [focal_len: 24.00]
[latitude: 47.335120] [longitude: -8.655480] [rel_alt: 6.500 abs_alt: 432.309]
[latitude_str: 47.335120N] [longitude_str: 8.655480W]</font>

2
00:00:00,033 --> 00:00:00,066
<font size="28">FrameCnt: 2, DiffTime: 33ms
2024-03-20 12:59:17.852
[iso: 400] [latitude: 47.335130] [longitude: -8.655490] [rel_alt: 6.600 abs_alt: 432.409]</font>
"""

# The forms of other models, each with the position that it tells at a time of 1.5 s.
FORMS: list[tuple[str, tuple[float, float, float], AltitudeKind]] = [
    (
        "[iso : 110] [shutter : 1/200.0] [fnum : 280] [ct : 5064] [color_md : default]"
        " [focal_len : 240] [latitude: 0.608553] [longtitude: -1.963763] [altitude: 1429.697998]",
        (34.867518, -112.515332, 1429.697998),  # radians
        AltitudeKind.UNNAMED,
    ),
    (
        "[latitude : 47.1] [longitude : 8.2] [altitude: 430.5] [rel_alt: 3.0 abs_alt: 433.0]",
        (47.1, 8.2, 433.0),
        AltitudeKind.ABSOLUTE,
    ),
    (
        "[latitude: -47.1] [longitude: 8.2] [rel_alt: -3.25]",
        (-47.1, 8.2, -3.25),
        AltitudeKind.RELATIVE,
    ),
    (
        "HOME(149.0251,-20.2532) 2017.08.05 14:11:51\nGPS(149.0251,-20.2533,16) BAROMETER:1.9\n"
        "ISO:100 Shutter:60 EV: Fnum:2.2",
        (-20.2533, 149.0251, 1.9),
        AltitudeKind.RELATIVE,
    ),
    (
        "GPS(-0.3829,39.4796,19.7M) BAROMETER:64.3M",
        (39.4796, -0.3829, 19.7),
        AltitudeKind.UNNAMED,
    ),
    (
        "F/2.8, SS 206.14, ISO 100, EV 0, GPS (-122.3699, 47.5929, 15), D 2.09m, H 1.50m,"
        " H.S 0.00m/s, V.S 0.10m/s",
        (47.5929, -122.3699, 1.5),
        AltitudeKind.RELATIVE,
    ),
    (
        "GPS(149.0251,-20.2533,16) Hb: 12.5m / Hs: 3.0m",
        (-20.2533, 149.0251, 12.5),
        AltitudeKind.RELATIVE,
    ),
    (
        "HOME(W: 97.616776, N: 30.219286) 2020-11-01 15:29:24\nGPS(W: 97.621475, N: 30.214199,"
        " 161.25m)\nISO:105 SHUTTER:500 EV:0.0 F-NUM:2.8",
        (30.214199, -97.621475, 161.25),
        AltitudeKind.UNNAMED,
    ),
    (
        "GPS(E: 8.5, N: 47.1, 400.00m) RTK(E: 8.541700, S: 47.376900, 430.20m)",
        (-47.3769, 8.5417, 430.2),
        AltitudeKind.UNNAMED,
    ),
    ("LATITUDE=47.1 LONGITUDE=8.2 ABS_ALT=433", (47.1, 8.2, 433.0), AltitudeKind.ABSOLUTE),
]

UNUSABLE = [
    ("[latitude: 0.000000] [longitude: 0.000000] [rel_alt: 0.0 abs_alt: 0.0]", "no fix"),
    ("[latitude: 97.1] [longitude: 8.2] [abs_alt: 433.0]", "out of range"),
    ("[latitude: 47.1] [longitude: 188.2] [abs_alt: 433.0]", "out of range"),
    ("[latitude: 47.1] [abs_alt: 433.0]", "cannot be read|can be read"),
    ("[latitude: nan] [longitude: 8.2] [abs_alt: 433.0]", "can be read"),
    ("[latitude: 47,3769] [longitude: 8,5417] [abs_alt: 433,0]", "can be read"),
    ("[latitude: 47.1.2] [longitude: 8.2] [abs_alt: 433.0]", "can be read"),
    ("GPS(8.5, n/a, 12) BAROMETER:3.0", "can be read"),
    ("GPS(8.5) BAROMETER:3.0", "can be read"),
    ("GPS(98.5, 97.3, 12) BAROMETER:3.0", "out of range"),
    ("GPS(8.5, 247.3, 12) BAROMETER:3.0", "out of range"),
]


def block(text: str, *, time_s: float = 1.5) -> TextBlock:
    return TextBlock(time_s=time_s, text=text)


def place(time_s: float, latitude_deg: float, *, altitude: str = "abs_alt: 433.0") -> TextBlock:
    return block(f"[latitude: {latitude_deg}] [longitude: 8.2] [{altitude}]", time_s=time_s)


def positions_of(telemetry: Telemetry) -> list[Position]:
    return [
        (one.time_s, one.fix.latitude_deg, one.fix.longitude_deg, one.fix.altitude_m)
        for one in telemetry.fixes
    ]


def test_every_frame_of_a_side_file_gives_its_time_and_position() -> None:
    telemetry = read_telemetry(blocks_of_srt(PER_FRAME))
    assert positions_of(telemetry) == [
        pytest.approx((0.0, 47.33512, -8.65548, 432.309)),
        pytest.approx((0.033, 47.33513, -8.65549, 432.409)),
    ]
    assert telemetry.altitude is AltitudeKind.ABSOLUTE
    assert (telemetry.num_blocks, telemetry.num_unusable, telemetry.problem) == (2, 0, "")


@pytest.mark.parametrize(("text", "expected", "kind"), FORMS)
def test_each_known_form_is_read(
    text: str, expected: tuple[float, float, float], kind: AltitudeKind
) -> None:
    telemetry = read_telemetry([block(text)])
    assert positions_of(telemetry) == [pytest.approx((1.5, *expected))]
    assert telemetry.altitude is kind


@pytest.mark.parametrize(("text", "problem"), UNUSABLE)
def test_what_is_no_position_is_counted_with_the_reason(text: str, problem: str) -> None:
    telemetry = read_telemetry([block(text), place(2.0, 47.0)])
    assert [one.time_s for one in telemetry.fixes] == [2.0]
    assert (telemetry.num_blocks, telemetry.num_unusable) == (2, 1)
    assert any(words in telemetry.problem for words in problem.split("|"))


def test_a_film_has_no_places() -> None:
    film = "1\n00:00:01,000 --> 00:00:03,000\nWhere are we? In the attitude: 40, I fear.\n"
    telemetry = read_telemetry(blocks_of_srt(film))
    assert not telemetry.is_any
    assert (telemetry.fixes, telemetry.num_unusable) == ((), 0)
    assert not read_telemetry([]).is_any


def test_all_positions_have_the_same_kind_of_altitude() -> None:
    both, relative = "rel_alt: 5.0 abs_alt: 433.0", "rel_alt: 6.0"
    telemetry = read_telemetry(
        [place(0.0, 1.0, altitude=both), place(1.0, 2.0, altitude=relative), place(2.0, 3.0)]
    )
    assert [one.fix.altitude_m for one in telemetry.fixes] == [433.0, None, 433.0]
    assert telemetry.altitude is AltitudeKind.ABSOLUTE
    assert telemetry.num_unusable == 0
    mostly_relative = read_telemetry(
        [place(float(i), float(i), altitude=relative) for i in range(1, 4)]
        + [place(9.0, 9.0, altitude=both)]
    )
    assert [one.fix.altitude_m for one in mostly_relative.fixes] == [6.0, 6.0, 6.0, 5.0]
    assert mostly_relative.altitude is AltitudeKind.RELATIVE
    assert mostly_relative.num_unusable == 0


@pytest.mark.parametrize(
    "text",
    [
        "[latitude: 47.1] [longitude: 8.2]",
        "[latitude: 47.1] [longitude: 8.2] [abs_alt: 999999.0]",
        "GPS(8.2, 47.1, 12)",
    ],
)
def test_positions_without_altitude_are_positions(text: str) -> None:
    telemetry = read_telemetry([block(text)])
    assert positions_of(telemetry) == [(1.5, 47.1, 8.2, None)]
    assert telemetry.altitude is AltitudeKind.NONE
    assert telemetry.num_unusable == 0


# -- which number is the latitude -----------------------------------------------------------------

M300 = ("GPS(36.6146,-6.1120,0.0M) BAROMETER:0.3M", "GPS(36.6147,-6.1121,0.0M) BAROMETER:0.5M")


def m300(**options: Any) -> Telemetry:
    return read_telemetry(
        [block(text, time_s=float(number)) for number, text in enumerate(M300)], **options
    )


def test_an_order_that_nothing_tells_is_marked_as_unsure() -> None:
    telemetry = m300()
    assert [one.fix.is_order_unsure for one in telemetry.fixes] == [True, True]
    assert telemetry.fixes[0].fix.longitude_deg == 36.6146  # as most drones have it
    assert telemetry.order == ""


@pytest.mark.parametrize(
    ("options", "latitude_deg"),
    [
        ({"order": "latitude_first"}, 36.6146),
        ({"order": "longitude_first"}, -6.112),
        ({"near_deg": (36.7, -6.0)}, 36.6146),
        ({"near_deg": (-6.3, 36.5)}, -6.112),
    ],
)
def test_the_order_is_told_by_the_setting_or_by_a_place_near_by(
    options: dict[str, Any], latitude_deg: float
) -> None:
    telemetry = m300(**options)
    assert telemetry.fixes[0].fix.latitude_deg == latitude_deg
    assert not telemetry.fixes[0].fix.is_order_unsure
    assert "first" in telemetry.order


@pytest.mark.parametrize("near_deg", [(10.0, 10.0), (47.0, 8.0)])
def test_a_place_far_from_both_tells_no_order(near_deg: tuple[float, float]) -> None:
    assert m300(near_deg=near_deg).fixes[0].fix.is_order_unsure


@pytest.mark.parametrize(
    "text", ["GPS(39.9,116.4,69.8)", "GPS(116.4,39.9,69.8)", "GPS(-116.4,39.9,12)"]
)
def test_a_number_that_no_latitude_has_tells_the_order(text: str) -> None:
    telemetry = read_telemetry([block(text)])
    fix = telemetry.fixes[0].fix
    assert (fix.latitude_deg, abs(fix.longitude_deg)) == (39.9, 116.4)
    assert not fix.is_order_unsure
    assert "range" in telemetry.order


def test_an_altitude_that_is_always_zero_is_none_where_there_is_another() -> None:
    telemetry = read_telemetry([block("GPS(8.5,47.3,0.0M) BAROMETER:64.3M")])
    assert telemetry.altitude is AltitudeKind.RELATIVE
    assert telemetry.fixes[0].fix.altitude_m == 64.3
    grounded = read_telemetry([place(0.0, 47.0, altitude="rel_alt: 0.000")])
    assert grounded.altitude is AltitudeKind.RELATIVE
    assert grounded.fixes[0].fix.altitude_m == 0.0


def test_blocks_out_of_order_are_sorted_and_of_equal_times_the_last_counts() -> None:
    telemetry = read_telemetry([place(2.0, 3.0), place(0.0, 1.0), place(2.0, 4.0), place(1.0, 2.0)])
    assert [(one.time_s, one.fix.latitude_deg) for one in telemetry.fixes] == [
        (0.0, 1.0),
        (1.0, 2.0),
        (2.0, 4.0),
    ]


def test_of_repeated_positions_the_first_counts_so_that_the_camera_moves_evenly() -> None:
    """A receiver that speaks once a second, told thirty times a second."""
    telemetry = read_telemetry(place(number / 30, 40.0 + number // 30) for number in range(90))
    assert [(one.time_s, one.fix.latitude_deg) for one in telemetry.fixes] == [
        (0.0, 40.0),
        (1.0, 41.0),
        (2.0, 42.0),
    ]


def test_a_camera_that_stands_is_told_again_and_again() -> None:
    blocks = [place(number / 10, 40.0) for number in range(101)]
    times_s = [one.time_s for one in read_telemetry(blocks).fixes]
    assert (times_s[0], times_s[-1]) == (0.0, 10.0)
    assert 0.5 < np.diff(times_s).min() <= np.diff(times_s).max() < 1.2


@pytest.mark.parametrize(
    ("timing", "expected_s"),
    [
        ("00:00:01,500 --> 00:00:02,000", 1.5),
        ("01:02:03.250 --> 01:02:04.000", 3723.25),
        ("  0:00:09 -->  0:00:10 X1:40 X2:600", 9.0),
        ("00:00:00,5 --> 00:00:01,0", 0.5),
        ("100:00:00,000-->100:00:00,040", 360_000.0),
    ],
)
def test_times_are_read_in_all_their_spellings(timing: str, expected_s: float) -> None:
    (only,) = blocks_of_srt(f"7\r\n{timing}\r\nHello\r\n")
    assert only.time_s == pytest.approx(expected_s)
    assert "Hello" in only.text


@pytest.mark.parametrize("num_digits", [400, 5000])
def test_an_hour_of_many_digits_is_no_time(num_digits: int) -> None:
    assert list(blocks_of_srt(f"{'9' * num_digits}:00:01,000 --> 00:00:02,000\nA\n")) == []


def test_blocks_need_no_numbers_and_no_lines_between() -> None:
    text = "00:00:01,000 --> 00:00:02,000\nA\n00:00:02,000 --> 00:00:03,000\nB\n\n\nC"
    assert [(one.time_s, one.text.split()) for one in blocks_of_srt(text)] == [
        (1.0, ["A"]),
        (2.0, ["B", "C"]),
    ]
    assert list(blocks_of_srt("no times\nat all")) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_file_gives_what_is_whole_and_never_fails(seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole = "\n".join(
        f"{number}\n00:00:{number:02d},000 --> 00:00:{number + 1:02d},000\n"
        f"[latitude: {40 + number * 1e-5:.6f}] [longitude: 8.2] [rel_alt: 1.0 abs_alt: 433.0]\n"
        for number in range(50)
    )
    data = bytearray(whole.encode())
    for start in rng.integers(0, len(data), 5):
        data[start : start + 40] = rng.bytes(40)
    damaged = data[: len(data) * 9 // 10].decode("utf-8", errors="replace")
    telemetry = read_telemetry(blocks_of_srt(damaged))
    assert 25 <= len(telemetry.fixes) <= 50
    times_s = [one.time_s for one in telemetry.fixes]
    assert times_s == sorted(set(times_s))
    for one in telemetry.fixes:
        assert -90.0 <= one.fix.latitude_deg <= 90.0


@pytest.mark.parametrize(
    "text",
    [
        "latitude" * 100_000,
        "[latitude: " + "1" * 500_000,
        "GPS(" * 100_000,
        "latitude" + " " * 500_000 + ": 1",
        "a_" * 200_000 + ": 1 latitude",
    ],
)
def test_hostile_text_takes_no_time(text: str) -> None:
    started_s = time.process_time()
    assert read_telemetry([block(text)]).fixes == ()
    assert time.process_time() - started_s < 0.5


def test_packets_of_mov_text_have_their_length_before_and_styles_behind_the_text() -> None:
    text = "GPS(8.5,47.3,433.0M) – Zürich".encode()
    packet = len(text).to_bytes(2, "big") + text + b"\0\0\0\x0cstyl????"
    assert text_of_packet(packet, is_mov_text=True) == text.decode()
    assert text_of_packet(text, is_mov_text=False) == text.decode()
    assert text_of_packet(b"", is_mov_text=True) == ""
    assert text_of_packet(b"\xff\xff\xfe\xfd", is_mov_text=True) == "\ufffd\ufffd"
