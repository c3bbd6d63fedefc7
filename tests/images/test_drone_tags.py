"""Positions and their accuracy in the XMP of drones."""

from __future__ import annotations

import pytest

from adapters.images.drone_tags import DroneTags, read_drone_tags, with_drone_tags
from adapters.images.exif import Exif
from engine.types import GpsFix
from tests.support.town_survey import xmp_packet

DJI = (
    'drone-dji:AbsoluteAltitude="+198.23"',
    'drone-dji:RelativeAltitude="+60.10"',
    'drone-dji:GpsLatitude="39.987654"',
    'drone-dji:GpsLongtitude="-104.123456"',
)
RTK = ('drone-dji:RtkStdLon="0.011"', 'drone-dji:RtkStdLat="0.014"', 'drone-dji:RtkStdHgt="0.03"')


def tags_of(*attributes: str) -> DroneTags:
    return read_drone_tags(xmp_packet(*attributes).encode())


def test_positions_and_both_altitudes_of_dji_are_read() -> None:
    assert tags_of(*DJI) == DroneTags(
        latitude_deg=39.987654,
        longitude_deg=-104.123456,
        absolute_altitude_m=198.23,
        relative_altitude_m=60.1,
    )


@pytest.mark.parametrize(
    ("flag", "expected"),
    [("50", (0.014, 0.03)), ("34", (0.014, 0.03)), ("16", (None, None)), ("0", (None, None))],
)
def test_standard_deviations_of_rtk_count_where_it_had_a_solution(
    flag: str, expected: tuple[float | None, float | None]
) -> None:
    tags = tags_of(*DJI, f'drone-dji:RtkFlag="{flag}"', *RTK)
    assert (tags.accuracy_m, tags.vertical_accuracy_m) == expected


def test_elements_and_the_names_of_other_makers_are_read_too() -> None:
    elements = b"""<x:xmpmeta><rdf:Description>
        <Camera:GPSXYAccuracy>0.02</Camera:GPSXYAccuracy>
        <Camera:GPSZAccuracy>0.05</Camera:GPSZAccuracy>
        <drone:AbsoluteAltitude>412.5</drone:AbsoluteAltitude>
        <exif:GPSLatitude>47,22.614N</exif:GPSLatitude>
        <exif:GPSLongitude>8,32,30.12W</exif:GPSLongitude></rdf:Description></x:xmpmeta>"""
    tags = read_drone_tags(elements)
    assert (tags.accuracy_m, tags.vertical_accuracy_m) == (0.02, 0.05)
    assert tags.absolute_altitude_m == 412.5
    assert tags.latitude_deg == pytest.approx(47.3769)
    assert tags.longitude_deg == pytest.approx(-8.5417)
    ratio = tags_of('exif:GPSAltitude="198230/1000"')
    assert ratio.absolute_altitude_m == pytest.approx(198.23)


@pytest.mark.parametrize(
    "text", [b"", b"<x:xmpmeta", b'd:GpsLatitude="north"', b'd:GpsLatitude="1e400"', b"\xff" * 99]
)
def test_what_is_damaged_is_absent(text: bytes) -> None:
    assert read_drone_tags(text) == DroneTags()


def test_exif_goes_first_but_for_an_altitude_it_lacks() -> None:
    packet = xmp_packet(*DJI).encode()
    fix = GpsFix(latitude_deg=1.0, longitude_deg=2.0, altitude_m=150.0)
    assert with_drone_tags(Exif(gps=fix), packet).gps == fix
    for missing in (0.0, None):
        bare = GpsFix(latitude_deg=1.0, longitude_deg=2.0, altitude_m=missing)
        found = with_drone_tags(Exif(gps=bare), packet).gps
        assert found is not None
        assert (found.latitude_deg, found.altitude_m) == (1.0, 198.23)


def test_xmp_gives_the_position_that_exif_lacks_with_the_altitude_of_exif() -> None:
    packet = xmp_packet(*DJI[2:]).encode()
    found = with_drone_tags(Exif(altitude_m=77.0, position_problem="none"), packet)
    assert found.gps == GpsFix(latitude_deg=39.987654, longitude_deg=-104.123456, altitude_m=77.0)
    assert found.position_problem == ""
    zeros = xmp_packet('drone-dji:GpsLatitude="0.0"', 'drone-dji:GpsLongitude="0.0"').encode()
    assert with_drone_tags(Exif(), zeros).gps is None
