"""Positions of photos from CSV files and ODM's geo.txt."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from adapters.sources.files.position_files import read_position_files
from engine.errors import ConfigError
from engine.types import GpsFix

PLACE = GpsFix(latitude_deg=47.5, longitude_deg=-8.25, altitude_m=430.0)


def read(path: Path, text: str, photo: str = "a.jpg") -> GpsFix | None:
    (fix,) = read_all(path, text, photo)
    return fix


def read_all(path: Path, text: str, *photos: str) -> list[GpsFix | None]:
    path.write_text(text, encoding="utf-8")
    paths = [PurePosixPath(photo) for photo in photos]
    found = read_position_files([str(path)]).among(paths).by_photo
    return [found.get(one) for one in paths]


@pytest.mark.parametrize(
    "text",
    [
        "name,latitude,longitude,altitude\na.jpg,47.5,-8.25,430\n",
        "\ufefffilename;Lat;Lon;Alt (m)\nA.JPG;47,5;-8,25;430,0\n",
        "Label\tLongitude\tLatitude\tElevation\nA\t-8.25\t47.5\t430\n",
        "image,time,lng,lat,ele\nx/b.jpg,1,0,0,0\na.jpg,2,-8.25,47.5,430\n",
        "EPSG:4326\na.jpg -8.25 47.5 430\n",
        "+proj=longlat +datum=WGS84\nA.JPG -8.25 47.5 430\n",
    ],
)
def test_positions_are_read_by_the_names_of_columns(text: str, tmp_path: Path) -> None:
    assert read(tmp_path / "positions.txt", text) == PLACE


@pytest.mark.parametrize(
    ("header", "place"),
    [
        ("WGS84 UTM 32N", "500000.0 0.0 430"),
        ("EPSG:32632", "500000.0 0.0 430 0 0 0 0.02 0.05"),
        ("+proj=utm +zone=32 +datum=WGS84 +units=m +no_defs", "500000.0 0.0 430"),
        ("EPSG:2056", "2600000.0 1200000.0 430"),  # the old observatory of Bern
    ],
)
def test_a_geo_txt_is_read_in_the_system_of_its_first_line(
    header: str, place: str, tmp_path: Path
) -> None:
    pytest.importorskip("pyproj")
    text = f"{header}\na.jpg {place}\nb.jpg 0 0 0\nc.jpg {' '.join(place.split()[:2])}\n"
    whole, nothing, without_height = read_all(tmp_path / "geo.txt", text, "a.jpg", "b.jpg", "c.jpg")
    latitude, longitude = (46.951083, 7.438637) if "2056" in header else (0.0, 9.0)
    assert whole is not None and without_height is not None
    assert nothing is None
    assert whole.latitude_deg == pytest.approx(latitude, abs=2e-5)
    assert whole.longitude_deg == pytest.approx(longitude, abs=2e-5)
    assert (whole.altitude_m, without_height.altitude_m) == (430.0, None)
    accuracies = (0.02, 0.05) if place.endswith("0.05") else (None, None)
    assert (whole.accuracy_m, whole.vertical_accuracy_m) == accuracies
    assert without_height.latitude_deg == whole.latitude_deg


@pytest.mark.parametrize("name", ["IMG_1.HEIC", "IMG_1.jpg", "IMG_1", "IMG_1.HEIC.jpg"])
@pytest.mark.parametrize("photo", ["IMG_1.HEIC", "card/IMG_1.HEIC.jpg"])
def test_a_photo_and_its_keyframe_image_are_found_by_the_names_that_either_has(
    name: str, photo: str, tmp_path: Path
) -> None:
    text = f"name,lat,lon,alt\n{name},47.5,-8.25,430\n"
    assert read(tmp_path / "places.csv", text, photo) == PLACE


def test_a_photo_and_its_twin_in_another_format_have_positions_of_their_own(
    tmp_path: Path,
) -> None:
    text = "name,lat,lon,alt\nIMG_1.HEIC,47.5,-8.25,430\nIMG_1.JPG,1,1,1\n"
    for photos in (("IMG_1.HEIC", "IMG_1.JPG"), ("IMG_1.HEIC.jpg", "IMG_1.JPG")):
        first, second = read_all(tmp_path / "places.csv", text, *photos)
        assert first == PLACE
        assert second is not None
        assert second.latitude_deg == 1.0
        alone = "name,lat,lon,alt\nIMG_1,47.5,-8.25,430\n"
        assert read_all(tmp_path / "places.csv", alone, *photos) == [PLACE, PLACE]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_file_in_utf_16_with_a_byte_order_mark_is_read(encoding: str, tmp_path: Path) -> None:
    mark = "" if encoding == "utf-16" else "\ufeff"
    text = "Name\tLatitude\tLongitude\tAltitude\r\nä.jpg\t47.5\t-8.25\t430\r\n"
    (tmp_path / "places.csv").write_bytes((mark + text).encode(encoding))
    found = read_position_files([str(tmp_path / "places.csv")])
    assert found.by_name == {"ä.jpg": PLACE}


def test_accuracies_and_missing_altitudes_are_taken_as_they_are(tmp_path: Path) -> None:
    text = "EPSG:4326\na.jpg -8.25 47.5 430 0 0 0 0.02 0.05\nb.jpg -8.25 47.5\n"
    found = read(tmp_path / "geo.txt", text)
    assert found is not None
    assert (found.accuracy_m, found.vertical_accuracy_m) == (0.02, 0.05)
    assert read(tmp_path / "geo.txt", text, "b.jpg") == GpsFix(
        latitude_deg=47.5, longitude_deg=-8.25
    )


def test_names_with_folders_count_before_those_without(tmp_path: Path) -> None:
    text = "name,lat,lon\nleft/a.jpg,1,1\na.jpg,2,2\n"
    photos = ("left/a.jpg", "cards/left/a.jpg", "right/a.jpg", "b.jpg")
    found = [read(tmp_path / "p.csv", text, photo) for photo in photos]
    assert [fix and fix.latitude_deg for fix in found] == [1.0, 1.0, 2.0, None]


def test_rows_without_a_position_are_counted_and_a_later_file_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "1.csv", tmp_path / "2.csv"
    first.write_text("name,lat,lon\na.jpg,1,1\nb.jpg,0,0\nc.jpg,north,1\nd.jpg,99,1\n")
    second.write_text("name,lat,lon\na.jpg,3,3\n")
    found = read_position_files([str(first), str(second)])
    assert (found.num_rows, found.num_unusable) == (5, 3)
    assert found.words == "3 of the 5 rows of positions hold none: b.jpg, c.jpg, d.jpg"
    photo = PurePosixPath("a.jpg")
    assert found.among([photo]).by_photo[photo].latitude_deg == 3.0


@pytest.mark.parametrize(
    ("altitudes", "is_said"), [(("", ""), True), (("150", ""), False), (("150", "151"), False)]
)
def test_positions_without_any_altitude_are_said_to_leave_heights_open(
    tmp_path: Path, altitudes: tuple[str, str], is_said: bool
) -> None:
    path, photos = tmp_path / "p.csv", [PurePosixPath("a.jpg"), PurePosixPath("b.jpg")]
    rows = [f"{photo},1,2,{one}" for photo, one in zip(photos, altitudes, strict=True)]
    path.write_text("\n".join(["name,lat,lon,altitude", *rows]))
    words = read_position_files([str(path)]).among(photos).words
    said = "none of them has an altitude, so that heights are above an unknown level"
    assert words == (said if is_said else "")


def test_a_name_of_several_photos_is_used_for_none_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("name,lat,lon,alt\nIMG_1.JPG,1,1,9\n100/IMG_2.JPG,2,2,9\nIMG_2.JPG,3,3,9\n")
    names = ("100/IMG_1.JPG", "101/IMG_1.JPG", "100/IMG_2.JPG", "101/IMG_2.JPG")
    found = read_position_files([str(path)]).among(PurePosixPath(name) for name in names)
    latitudes_deg = {str(photo): fix.latitude_deg for photo, fix in found.by_photo.items()}
    assert latitudes_deg == {"100/IMG_2.JPG": 2.0, "101/IMG_2.JPG": 3.0}
    assert found.words == "1 name fits photos of several folders, and counts for none of them"


def test_a_name_with_another_ending_fits_where_nothing_else_does(tmp_path: Path) -> None:
    text = "name,lat,lon\nIMG_1.HEIC,1,1\nIMG_2.DNG,2,2\nIMG_2.HEIC,3,3\nIMG_3.JPG,4,4\n"
    photos = ("IMG_1.jpg", "IMG_2.jpg", "IMG_3.jpg", "IMG_3.png", "source1/IMG_1.jpg")
    found = read_all(tmp_path / "p.csv", text, *photos[:4])
    assert [fix and fix.latitude_deg for fix in found] == [1.0, None, 4.0, None]
    found = read_all(tmp_path / "p.csv", text, photos[4])
    assert [fix and fix.latitude_deg for fix in found] == [1.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no position of a named photo: it has no row with a name"),
        ("a,b,c\n1,2,3\n", "no column name and none latitude and none longitude"),
        ("name,lat,lon\na.jpg,0,0\n", "a.jpg: latitude and longitude are 0"),
        ("name,lat,lon\na.jpg,north,0\n", "a.jpg: its latitude is no number"),
        ("name,lat,lon\na.jpg,47\n", "a.jpg: it has no longitude"),
        ("name,lat,lon\na.jpg,-91.99,45.01\n", "latitude -91.99 is out of range: .* swapped"),
        ("name,lat,lon\na.jpg,5e6,6e5\n", "latitude 5e[+]06 is out of range: .* metres"),
        ("name,lat,lon\na.jpg,45,6e5\n", "longitude 600000 is out of range: .* metres"),
        ("name,x,y,z\na.jpg,12.5,47.5,3\n", r"no column latitude .* \(name, x, y, z\)"),
        ('name,lat,lon\n"a.jpg,1,1\nb.jpg,2,2\n', "is no CSV: line 3: unexpected end of data"),
        (f'name,lat,lon\n"a.jpg,1,1\n{"b.jpg,2,2" * 20_000}\n', "is no CSV: line 3: field larger"),
        ("EPSG:999999\na.jpg 512345.0 5412345.0 400\n", "EPSG:999999 is no coordinate system"),
        ("EPSG:5703\na.jpg 512345.0 5412345.0 400\n", "a projected system, with east and north"),
        ("WGS84 UTM 61N\na.jpg 512345.0 5412345.0 400\n", "UTM has zones 1 to 60"),
        ("EPSG:32632\na.jpg 0 0 0\n", "a.jpg: its x and y are 0"),
        ("EPSG:32632\na.jpg,512345.0,5412345.0,400\n", "its x or y is no number, or missing"),
        ("EPSG:32632\na.jpg 1e12 5412345.0 400\n", "1e12 5412345.0 is no place in EPSG:32632"),
        ("EPSG:32632\na.jpg 8.25 47.5 400\n", "its places are degrees, it seems, and not east"),
        ("UTM 32N\na.jpg 512345.0 5412345.0 400\n", "no coordinate system that is read: .* 'UTM"),
        ("EPSG 32632\na.jpg 512345.0 5412345.0 400\n", "no coordinate system that is read"),
    ],
)
def test_a_file_without_positions_is_refused_with_what_is_read(
    text: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        read(tmp_path / "p.csv", text)


def test_a_track_is_refused_with_what_photos_take(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="photos need a CSV with their names or a"):
        read(tmp_path / "a.gpx", "<gpx/>")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_position_files([str(tmp_path / "none.csv")])


def test_what_differs_from_wgs84_in_a_string_of_proj_is_heeded(tmp_path: Path) -> None:
    pytest.importorskip("pyproj")
    shifted = "+proj=longlat +ellps=bessel +towgs84=598.1,73.7,418.2,0.202,0.045,-2.455,6.7"
    found = [
        read(tmp_path / "geo.txt", f"{header}\na.jpg 13.4 52.5 30\n")
        for header in (f"{shifted} +no_defs", "+proj=longlat +datum=WGS84 +vunits=us-ft")
    ]
    assert found[0] is not None and found[1] is not None
    assert found[0].latitude_deg == pytest.approx(52.498595, abs=2e-5)
    assert found[0].longitude_deg == pytest.approx(13.398258, abs=2e-5)
    assert found[1].altitude_m == pytest.approx(30.0 * 1200.0 / 3937.0)


def test_names_with_spaces_comments_and_quotes_are_read_from_a_geo_txt(tmp_path: Path) -> None:
    text = (
        'EPSG:4326\n# surveyed\n\t-8\t47\t1\nmy a.jpg\t-8.25\t47.5\t430\n"b.jpg" -8.25 47.5 430\n'
    )
    assert read_all(tmp_path / "geo.txt", text, "my a.jpg", "b.jpg") == [PLACE, PLACE]


def test_places_outside_of_where_a_system_is_for_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("pyproj")
    assert read(tmp_path / "geo.txt", "EPSG:32615\na.jpg 5001000.0 4400000.0 1\n") is not None
    assert "1 of 1 places lie outside of where EPSG:32615 is for" in caplog.text
