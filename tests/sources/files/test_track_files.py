"""Tracks of positions by time: GPX, NMEA and subtitles."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from adapters.sources.files.track_files import read_track
from engine.errors import ConfigError
from engine.types import GpsFix

NOON_S = datetime(2026, 5, 1, 12, tzinfo=UTC).timestamp()
PLACE = GpsFix(latitude_deg=47.5, longitude_deg=-8.25, altitude_m=430.0)

GPX = """<?xml version="1.0"?><gpx xmlns="http://www.topografix.com/GPX/1/1" version="1.1"><trk>
<trkseg><trkpt lat="47.6" lon="-8.25"><time>2026-05-01T12:00:01.5Z</time></trkpt>
<trkpt lat="47.5" lon="-8.25"><ele>430.0</ele><time>2026-05-01T14:00:00+02:00</time></trkpt>
<trkpt lat="97.5" lon="-8.25"><time>2026-05-01T12:00:03Z</time></trkpt>
<trkpt lat="47.5" lon="-8.25"><ele>430.0</ele></trkpt></trkseg></trk></gpx>"""
NMEA = """$GPRMC,120000.00,A,4730.000,N,00815.000,W,0.0,0.0,010526,,,A*00
$GPGGA,120000.00,4730.000,N,00815.000,W,1,08,1.0,430.0,M,47.0,M,,*00
$GNGGA,120001.50,4736.000,N,00815.000,W,4,08,1.0,,M,47.0,M,,*00
$GNGGA,120002.00,,,,,0,00,,,M,,M,,*00
noise $GPGGA,broken
"""
SRT = """1
00:00:02,000 --> 00:00:03,000
[latitude: 47.5] [longitude: -8.25] [abs_alt: 430.0]
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(("name", "text"), [("a.gpx", GPX), ("a.NMEA", NMEA)])
def test_positions_come_in_order_of_time_with_the_altitudes_they_have(
    name: str, text: str, tmp_path: Path
) -> None:
    first, second = read_track(write(tmp_path / name, text))
    assert (first.time_s, first.fix) == (NOON_S, PLACE)
    assert second.time_s == NOON_S + 1.5
    assert second.fix == GpsFix(latitude_deg=47.6, longitude_deg=-8.25)


def test_subtitles_are_a_track_by_the_time_of_their_video(tmp_path: Path) -> None:
    (only,) = read_track(write(tmp_path / "a.SRT", SRT))
    assert (only.time_s, only.fix) == (2.0, PLACE)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.gpx", "<gpx", "is not GPX"),
        ("a.gpx", '<!DOCTYPE x [<!ENTITY a "b">]><gpx/>', "entities"),
        ("a.gpx", "<gpx/>", "holds no positions"),
        ("a.nmea", "hello", "holds no positions"),
        ("a.srt", "hello", "holds no positions"),
    ],
)
def test_what_is_no_track_is_refused(name: str, text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        read_track(write(tmp_path / name, text))


def test_nmea_positions_before_the_first_date_are_left_out(tmp_path: Path) -> None:
    rmc, gga, *rest = NMEA.splitlines(keepends=True)
    first, second = read_track(write(tmp_path / "a.nmea", "".join((gga, rmc, gga, *rest))))
    assert (first.time_s, second.time_s) == (NOON_S, NOON_S + 1.5)
    (undated,) = read_track(write(tmp_path / "b.nmea", gga))
    assert undated.time_s == 12 * 3600.0


def test_altitudes_that_are_no_numbers_are_none(tmp_path: Path) -> None:
    gpx = GPX.replace("<ele>430.0", "<ele>nan", 1)
    nmea = NMEA.replace("1.0,430.0,M", "1.0,inf,M")
    for name, text in (("a.gpx", gpx), ("a.nmea", nmea)):
        first, _ = read_track(write(tmp_path / name, text))
        assert first.fix == replace(PLACE, altitude_m=None)


def test_way_points_are_a_track_only_without_one(tmp_path: Path) -> None:
    way_point = '<wpt lat="10" lon="10"><time>2026-05-01T12:00:01Z</time></wpt>'
    both = read_track(write(tmp_path / "a.gpx", GPX.replace("<trk>", f"{way_point}<trk>")))
    assert len(both) == 2
    (only,) = read_track(write(tmp_path / "b.gpx", f"<gpx>{way_point}</gpx>"))
    assert only.fix.latitude_deg == 10.0


def test_wide_subtitles_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.srt").write_bytes(SRT.encode("utf-16"))
    (only,) = read_track(tmp_path / "a.srt")
    assert only.fix == PLACE


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_track(tmp_path / "none.gpx")
