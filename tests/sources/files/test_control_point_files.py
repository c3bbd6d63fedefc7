"""Ground control points from ODM's gcp_list.txt, and the ends of scale bars."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from adapters.sources.files.control_point_files import read_control_points, read_scale_bar
from engine.errors import AdapterUnavailableError, ConfigError
from engine.types import ControlPoint, ImageMark, ScaleBar


def read(path: Path, text: str, *checks: str) -> tuple[ControlPoint, ...]:
    path.write_text(text, encoding="utf-8")
    return read_control_points(path, checks=checks)


def test_lines_of_one_name_are_marks_of_one_point(tmp_path: Path) -> None:
    points = read(
        tmp_path / "gcp_list.txt",
        "EPSG:4326\n"
        "8.25 47.5 430.5 10.5 20 a.jpg P1\n"
        "\n"
        "# measured twice\n"
        "8.26\t47.6\tNaN\t1\t2\tfolder name/b c.jpg\tCHK 2\textra\n"
        "8.25 47.5 430.5 30 40.25 sub\\b.jpg P1\n",
    )
    first, second = points
    assert first.name == "P1"
    assert first.marks == (
        ImageMark(image_name="a.jpg", xy=(10.5, 20.0)),
        ImageMark(image_name="sub/b.jpg", xy=(30.0, 40.25)),
    )
    assert first.fix is not None
    assert (first.fix.longitude_deg, first.fix.latitude_deg) == (8.25, 47.5)
    assert first.fix.altitude_m == 430.5
    assert not first.is_check
    assert second.name == "CHK 2"
    assert second.is_check
    assert second.marks[0].image_name == "folder name/b c.jpg"
    assert second.fix is not None
    assert second.fix.altitude_m is None


def test_lines_without_names_are_marks_of_the_point_at_their_place(tmp_path: Path) -> None:
    text = "EPSG:4326\n8 47 1 5 5 a.jpg\n8 47 1 6 6 b.jpg\n8.1 47 1 5 5 a.jpg\n"
    points = read(tmp_path / "g.txt", text)
    assert [(one.name, len(one.marks)) for one in points] == [("point 1", 2), ("point 2", 1)]


@pytest.mark.parametrize(
    ("header", "place", "longitude", "latitude"),
    [
        ("EPSG:4326", "8.25 47.5", 8.25, 47.5),
        ("+proj=longlat +ellps=WGS84 +datum=WGS84 +no_defs", "8.25 47.5", 8.25, 47.5),
        ("WGS84 UTM 32N", "500_000.0 0.0", 9.0, 0.0),
        ("wgs84 utm 32 n", "500_000.0 0.0", 9.0, 0.0),
        ("WGS84 UTM 56S", "500_000.0 10_000_000.0", 153.0, 0.0),
        ("EPSG:32632", "500_000.0 0.0", 9.0, 0.0),
        ("+proj=utm +zone=32 +datum=WGS84 +units=m +no_defs", "500_000.0 0.0", 9.0, 0.0),
        # The old observatory of Bern, by the Swiss Federal Office of Topography.
        ("EPSG:2056", "2_600_000.0 1_200_000.0", 7.438637, 46.951083),
    ],
)
def test_coordinates_are_read_in_the_system_of_the_first_line(
    tmp_path: Path, header: str, place: str, longitude: float, latitude: float
) -> None:
    pytest.importorskip("pyproj")
    (point,) = read(tmp_path / "g.txt", f"{header}\n{place} 430 5 5 a.jpg P1\n")
    assert point.fix is not None
    assert point.fix.longitude_deg == pytest.approx(longitude, abs=2e-5)
    assert point.fix.latitude_deg == pytest.approx(latitude, abs=2e-5)
    assert point.fix.altitude_m == 430.0


@pytest.mark.parametrize(
    ("header", "place", "metres_per_height"),
    [
        ("EPSG:2263", "984_250 197_000", 1200.0 / 3937.0),  # New York, US survey feet
        ("EPSG:2263+6360", "984_250 197_000", 1200.0 / 3937.0),  # and NAVD88 in such feet
        ("EPSG:2263+5703", "984_250 197_000", 1.0),  # and NAVD88 in metres
        ("EPSG:6318+6360", "-74 40.7", 1200.0 / 3937.0),
        ("EPSG:4269", "-74 40.7", 1.0),
        ("EPSG:32618+5715", "584_000 4_506_000", -1.0),  # a depth
        ("+proj=utm +zone=18 +datum=WGS84 +units=m +vunits=ft", "584_000 4_506_000", 0.3048),
    ],
)
def test_heights_are_read_in_the_unit_of_the_system(
    tmp_path: Path, header: str, place: str, metres_per_height: float
) -> None:
    pytest.importorskip("pyproj")
    (point,) = read(tmp_path / "g.txt", f"{header}\n{place} 100 5 5 a.jpg P1\n")
    assert point.fix is not None
    assert point.fix.altitude_m == pytest.approx(100.0 * metres_per_height, rel=1e-6)
    assert point.fix.latitude_deg == pytest.approx(40.7, abs=0.1)
    assert point.fix.longitude_deg == pytest.approx(-74.0, abs=0.1)


def test_heights_in_feet_by_east_and_north_are_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("pyproj")
    read(tmp_path / "g.txt", "EPSG:2263\n984250 197000 NaN 5 5 a.jpg P1\n")
    read(tmp_path / "g.txt", "EPSG:2263+6360\n984250 197000 100 5 5 a.jpg P1\n")
    assert not caplog.messages
    read(tmp_path / "g.txt", "EPSG:2263\n984250 197000 100 5 5 a.jpg P1\n")
    assert len(caplog.messages) == 1
    assert "the unit of east and north, US survey foot" in caplog.messages[0]


def test_other_systems_than_wgs84_need_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyproj", None)
    (point,) = read(tmp_path / "g.txt", "EPSG:4326\n8 47 1 5 5 a.jpg P1\n")
    assert point.fix is not None
    with pytest.raises(AdapterUnavailableError, match="survey"):
        read(tmp_path / "g.txt", "EPSG:32632\n443538 5261080 1 5 5 a.jpg P1\n")


def test_lines_that_repeat_others_count_once_and_are_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = "8 47 1 5 5 a.jpg P\n"
    (point,) = read(tmp_path / "g.txt", f"EPSG:4326\n{row}8 47 1 6 5 b.jpg P\n{row}{row}")
    assert [mark.image_name for mark in point.marks] == ["a.jpg", "b.jpg"]
    (said,) = caplog.messages
    assert said.endswith("g.txt: lines that repeat others count once: 4, 5 (P)")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no list of ground control points"),
        ("EPSG:4326\n", "is no list of ground control points"),
        ("EPSG:4326\n8 47 1 5 a.jpg\n", "line 2 is not geo_x"),
        ("EPSG:4326\n8 47 1 5 5\n", "line 2 is not geo_x"),
        ("EPSG:4326\n8 47 1 5 inf a.jpg\n", "line 2 holds a number"),
        ("EPSG:4326\n8 NaN 1 5 5 a.jpg\n", "line 2 lacks a coordinate"),
        ("EPSG:4326\n47 98 1 5 5 a.jpg\n", "is no place in EPSG:4326"),
        ("EPSG:4326\n8 47 1e9 5 5 a.jpg\n", "is no place in EPSG:4326"),
        ("EPSG:4326\n8 47 1 5 5 a.jpg P\n8 46 1 5 5 b.jpg P\n", "P has several places"),
        (
            "EPSG:4326\n8 47 1 5 5 a.jpg P\n\n8 47 1 6 5 A.jpg P\n",
            "P is marked twice in A.jpg, in lines 2 and 4",
        ),
        ("EPSG:4326\n8 47 1 5 5 a.jpg \x1b[2J\n", "cannot be printed"),
        ("8 47 1 5 5 a.jpg P1\n8 47 1 5 5 b.jpg P1\n", "its first line is no coordinate system"),
        ("EPSG:999999\n8 47 1 5 5 a.jpg P1\n", "is no coordinate system"),
        ("WGS84 UTM 61N\n500000 5000000 1 5 5 a.jpg P1\n", "UTM has zones 1 to 60"),
        ("WGS84 UTM 0S\n500000 5000000 1 5 5 a.jpg P1\n", "UTM has zones 1 to 60"),
        ("EPSG:4978\n4e6 6e5 4.8e6 5 5 a.jpg P1\n", "is a Geocentric CRS"),
        ("+proj=geocent +datum=WGS84\n4e6 6e5 4.8e6 5 5 a.jpg P1\n", "is a Geocentric CRS"),
        ("EPSG:5773\n8 47 1 5 5 a.jpg P1\n", "is a Vertical CRS"),
        ("+proj=nonsense\n8 47 1 5 5 a.jpg P1\n", "is no coordinate system"),
    ],
)
def test_what_is_no_list_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    pytest.importorskip("pyproj")
    with pytest.raises(ConfigError, match=words):
        read(tmp_path / "g.txt", text)


def test_check_points_are_named_on_the_command_line_too(tmp_path: Path) -> None:
    text = "EPSG:4326\n8 47 1 5 5 a.jpg P1\n8.1 47 1 5 5 a.jpg P2\n"
    assert [one.is_check for one in read(tmp_path / "g.txt", text, "P2")] == [False, True]
    with pytest.raises(ConfigError, match="has no point P3; it has P1, P2"):
        read(tmp_path / "g.txt", text, "P3")


def test_a_scale_bar_ends_at_points_of_the_file_or_at_marks(tmp_path: Path) -> None:
    points = read(tmp_path / "g.txt", "EPSG:4326\nNaN NaN NaN 5 5 a.jpg P1\n")
    assert points[0].fix is None
    marks = "x:y.jpg:10,20.5+b.jpg:1,2"
    bar, ends = read_scale_bar(("P1", marks), 1.5, points=points)
    assert bar == ScaleBar(first="P1", second=marks, length_m=1.5)
    (end,) = ends
    assert end.fix is None
    assert end.marks == (
        ImageMark(image_name="x:y.jpg", xy=(10.0, 20.5)),
        ImageMark(image_name="b.jpg", xy=(1.0, 2.0)),
    )


@pytest.mark.parametrize(
    ("ends", "length_m", "words"),
    [
        (("a.jpg:1,2+b.jpg:3,4", "P9"), 1.0, "P9 is no point of the file"),
        (("a.jpg:1,2", "b.jpg:1,2+c.jpg:1,2"), 1.0, "marked in one image"),
        (("a.jpg:1,2+a.jpg:3,4", "b.jpg:1,2+c.jpg:1,2"), 1.0, "marked in one image"),
        (("a.jpg:1.2.3,2+b.jpg:3,4", "b.jpg:1,2+c.jpg:1,2"), 1.0, "no point of the file"),
        (("a.jpg:1,2+b.jpg:1,2", "a.jpg:1,2+b.jpg:1,2"), 1.0, "the same point"),
        (("a.jpg:1,2+b.jpg:1,2", "a.jpg:9,2+b.jpg:9,2"), 0.0, "above 0"),
        (("a.jpg:1,2+b.jpg:1,2", "a.jpg:9,2+b.jpg:9,2"), float("nan"), "above 0"),
    ],
)
def test_what_is_no_scale_bar_is_refused(
    ends: tuple[str, str], length_m: float, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        read_scale_bar(ends, length_m, points=())
