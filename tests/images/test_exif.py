"""EXIF: orientation, focal length and position, from whole and from broken blocks."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import IFDRational

from adapters.images.decoding import read_image_header
from adapters.images.exif import (
    Exif,
    intrinsics_prior,
    read_exif,
    tiff_image_size,
    upright,
)
from engine.types import CalibrationOrigin, GpsFix
from tests.support.paths import REAL_SETS

DATA = REAL_SETS

MAKE, MODEL, ORIENTATION, EXIF_DIRECTORY, GPS_DIRECTORY = 0x10F, 0x110, 0x112, 0x8769, 0x8825
FOCAL_LENGTH, FOCAL_LENGTH_35MM = 0x920A, 0xA405
FOCAL_PLANE_X_RESOLUTION, FOCAL_PLANE_UNIT = 0xA20E, 0xA210
EXIF_WIDTH, EXIF_HEIGHT = 0xA002, 0xA003
SYDNEY = {1: "S", 2: (33.0, 51.0, 24.5), 3: "E", 4: (151.0, 12.0, 54.25), 5: b"\0", 6: 58.5}


def block(
    main: dict[int, Any] | None = None,
    *,
    exif: dict[int, Any] | None = None,
    gps: dict[int, Any] | None = None,
) -> bytes:
    """An EXIF block as Pillow writes it."""
    tags = Image.Exif()
    tags.update(main or {})
    if exif:
        tags.get_ifd(EXIF_DIRECTORY).update(exif)
    if gps:
        tags.get_ifd(GPS_DIRECTORY).update(gps)
    return tags.tobytes()


def position(gps: GpsFix | None) -> tuple[float, float, float]:
    assert gps is not None
    assert gps.altitude_m is not None
    return gps.latitude_deg, gps.longitude_deg, gps.altitude_m


def focal_px(exif: Exif, width: int = 4000, height: int = 3000) -> float:
    prior = intrinsics_prior(exif, width=width, height=height)
    assert prior is not None
    assert prior.camera_model is None
    assert prior.params is None
    return prior.focal_px


def test_the_tags_of_a_whole_block_are_read() -> None:
    written = block(
        {MAKE: "DJI", MODEL: "FC6310", ORIENTATION: 6},
        exif={FOCAL_LENGTH: 8.8, FOCAL_LENGTH_35MM: 24, EXIF_WIDTH: 5472, EXIF_HEIGHT: 3648},
        gps=SYDNEY,
    )
    exif = read_exif(written)
    assert (exif.make, exif.model, exif.orientation) == ("DJI", "FC6310", 6)
    assert exif.focal_length_mm == pytest.approx(8.8)
    assert exif.focal_length_35mm == 24.0
    assert exif.recorded_edge_px == 5472.0
    expected = (-(33 + 51 / 60 + 24.5 / 3600), 151 + 12 / 60 + 54.25 / 3600, 58.5)
    assert position(exif.gps) == pytest.approx(expected)
    assert read_exif(written.removeprefix(b"Exif\0\0")) == exif


def test_big_endian_blocks_are_read() -> None:
    entries = struct.pack(">HHIHH", ORIENTATION, 3, 1, 8, 0) + struct.pack(">HHII", MAKE, 2, 5, 38)
    written = b"MM\0*" + struct.pack(">IH", 8, 2) + entries + struct.pack(">I", 0) + b"Acme\0"
    assert read_exif(written) == Exif(make="Acme", orientation=8)


@pytest.mark.parametrize(
    ("gps", "what"),
    [
        ({}, "no position"),
        ({tag: SYDNEY[tag] for tag in (2, 3, 4, 5, 6)}, "no hemisphere"),
        ({**SYDNEY, 1: "E"}, "a hemisphere of the other axis"),
        ({**SYDNEY, 2: (IFDRational(0, 0), 0.0, 0.0)}, "a latitude of 0/0"),
        ({**SYDNEY, 2: (133.0, 51.0, 24.5)}, "a latitude beyond the pole"),
        ({**SYDNEY, 2: (0.0, 0.0, 0.0), 4: (0.0, 0.0, 0.0)}, "the zeros of a camera without fix"),
    ],
)
def test_a_position_that_cannot_be_trusted_is_no_position(gps: dict[int, Any], what: str) -> None:
    exif = read_exif(block({MAKE: "Acme"}, gps=gps))
    assert exif.make == "Acme"
    assert exif.gps is None, what


@pytest.mark.parametrize(
    "gps", [{**SYDNEY, 6: IFDRational(0, 0)}, {tag: SYDNEY[tag] for tag in (1, 2, 3, 4)}]
)
def test_a_position_without_altitude_is_one_all_the_same(gps: dict[int, Any]) -> None:
    fix = read_exif(block(gps=gps)).gps
    assert fix is not None
    assert fix.latitude_deg == pytest.approx(-33.856806)
    assert fix.altitude_m is None


def test_a_position_without_letters_is_kept_beside_those_that_count() -> None:
    exif = read_exif(block(gps={tag: SYDNEY[tag] for tag in (2, 4, 6)}))
    assert exif.gps is None
    assert position(exif.unsigned_gps) == pytest.approx((33.856806, 151.215069, 58.5))
    assert "letters" in exif.position_problem


@pytest.mark.parametrize("missing", [1, 3])
def test_the_letter_of_one_axis_does_not_say_the_sign_of_the_other(missing: int) -> None:
    chile = {1: "S", 2: (33.0, 27.0, 0.0), 3: "W", 4: (70.0, 40.0, 0.0), 6: 570.0}
    letter = chile[4 - missing]
    exif = read_exif(block(gps={tag: chile[tag] for tag in chile if tag != missing}))
    assert exif.gps is None
    assert exif.hemispheres == letter
    assert "letters" in exif.position_problem


def test_signs_count_where_there_are_no_letters() -> None:
    written = bytearray(block(gps={tag: SYDNEY[tag] for tag in (2, 4, 6)}))
    order = "<" if written[6:8] == b"II" else ">"
    entry = written.find(struct.pack(f"{order}HHI", 2, 5, 3))  # the latitude, as rationals
    struct.pack_into(f"{order}H", written, entry + 2, 10)  # signed ones
    (at,) = struct.unpack_from(f"{order}I", written, entry + 8)
    (degrees,) = struct.unpack_from(f"{order}i", written, 6 + at)
    struct.pack_into(f"{order}i", written, 6 + at, -degrees)
    exif = read_exif(bytes(written))
    assert position(exif.gps) == pytest.approx((-33.856806, 151.215069, 58.5))


def test_altitudes_below_the_sea_are_negative_and_missing_minutes_are_zero() -> None:
    gps = {1: "N", 2: (31.5,), 3: "W", 4: (35.0, 30.0), 5: b"\x01", 6: 430.0}
    assert position(read_exif(block(gps=gps)).gps) == pytest.approx((31.5, -35.5, -430.0))
    below_ellipsoid = read_exif(block(gps={**gps, 5: b"\x03"})).gps
    assert position(below_ellipsoid) == pytest.approx((31.5, -35.5, -430.0))


@pytest.mark.parametrize(("error_m", "expected"), [(3.5, 3.5), (0.0, None), (None, None)])
def test_the_accuracy_of_a_position_is_read_where_the_camera_wrote_it(
    error_m: float | None, expected: float | None
) -> None:
    gps = read_exif(block(gps=SYDNEY if error_m is None else {**SYDNEY, 31: error_m})).gps
    assert gps is not None
    assert gps.accuracy_m == expected


@pytest.mark.parametrize("value", [0, 9, 77])
def test_an_impossible_orientation_is_upright(value: int) -> None:
    assert read_exif(block({ORIENTATION: value})).orientation == 1


def test_blocks_cut_anywhere_or_changed_anywhere_neither_raise_nor_warn() -> None:
    written = block(
        {MAKE: "Acme", MODEL: "One", ORIENTATION: 3},
        exif={FOCAL_LENGTH: 4.3, FOCAL_LENGTH_35MM: 28},
        gps=SYDNEY,
    )
    whole = read_exif(written)
    for length in range(len(written)):
        assert isinstance(read_exif(written[:length]), Exif)
    rng = np.random.default_rng(5)
    num_different = 0
    for _ in range(3000):
        changed = bytearray(written)
        for place in rng.integers(0, len(written), 3):
            changed[place] = rng.integers(0, 256)
        num_different += read_exif(bytes(changed)) != whole
    assert 500 < num_different < 3000


@pytest.mark.parametrize("garbage", [b"", b"Exif\0\0", b"II*\0", b"not tiff at all", b"\xff" * 99])
def test_garbage_is_an_empty_block(garbage: bytes) -> None:
    assert read_exif(garbage) == Exif()
    assert tiff_image_size(garbage) is None


def test_directories_that_point_at_each_other_end() -> None:
    entry = struct.pack("<HHII", EXIF_DIRECTORY, 4, 1, 8)
    assert read_exif(b"II*\0" + struct.pack("<IH", 8, 1) + entry) == Exif()


def test_the_size_of_a_tiff_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    cv2.imwrite(str(path), np.zeros((70, 90, 3), np.uint8))
    assert tiff_image_size(path.read_bytes()) == (90, 70)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation: int) -> None:
    stored = np.random.default_rng(orientation).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(stored)
    image.getexif()[ORIENTATION] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(upright(stored, orientation), expected)


def test_the_35_mm_equivalent_counts_along_the_diagonal() -> None:
    exif = Exif(focal_length_mm=5.0, focal_length_35mm=43.27)
    assert focal_px(exif) == pytest.approx(5000.0)
    assert focal_px(exif, 3000, 4000) == pytest.approx(5000.0)
    assert focal_px(exif, 400, 300) == pytest.approx(500.0)


def test_a_known_sensor_is_trusted_more_than_the_35_mm_equivalent() -> None:
    exif = Exif(model="FC300S", focal_length_mm=3.61, focal_length_35mm=20.0)
    assert focal_px(exif, 4000, 2250) == pytest.approx(3.61 / 6.17 * 4000)
    unknown = Exif(model="FC300S", focal_length_35mm=20.0)
    assert focal_px(unknown) == pytest.approx(20.0 / 43.27 * 5000)


@pytest.mark.parametrize(("unit", "unit_mm"), [(None, 25.4), (2, 25.4), (3, 10.0), (4, 1.0)])
def test_the_focal_plane_resolution_gives_the_sensor(unit: int | None, unit_mm: float) -> None:
    tags = {FOCAL_LENGTH: 50.0, EXIF_WIDTH: 6000, EXIF_HEIGHT: 4000}
    tags[FOCAL_PLANE_X_RESOLUTION] = 6000 / 36.0 * unit_mm
    if unit is not None:
        tags[FOCAL_PLANE_UNIT] = unit
    exif = read_exif(block(exif=tags))
    assert focal_px(exif, 6000, 4000) == pytest.approx(50.0 / 36.0 * 6000, rel=1e-5)
    assert focal_px(exif, 1000, 1500) == pytest.approx(50.0 / 36.0 * 1500, rel=1e-5)


def test_a_resolution_left_over_from_before_shrinking_is_not_used() -> None:
    exif = Exif(focal_length_mm=4.3, focal_plane_px_per_mm=4000 / 6.17, recorded_edge_px=768.0)
    assert intrinsics_prior(exif, width=768, height=576) is None


@pytest.mark.parametrize(
    "exif",
    [
        Exif(),
        Exif(focal_length_mm=4.3),
        Exif(model="FC300S"),
    ],
)
def test_too_few_tags_give_no_prior(exif: Exif) -> None:
    assert intrinsics_prior(exif, width=4000, height=3000) is None


@pytest.mark.parametrize(
    "exif",
    [
        Exif(focal_length_35mm=1.0),
        Exif(focal_length_35mm=60000.0),
        Exif(model="FC300S", focal_length_mm=1e9),
        Exif(model="FC300S", focal_length_mm=1e9, focal_length_35mm=1e-6),
    ],
)
def test_focal_lengths_that_no_lens_has_are_ignored_and_doubted(exif: Exif) -> None:
    prior = intrinsics_prior(exif, width=4000, height=3000)
    assert prior is not None
    assert prior.focal_px == 0.0
    assert "ignored" in prior.doubt


def test_an_impossible_tag_leaves_the_others_their_say() -> None:
    exif = Exif(model="FC300S", focal_length_mm=1e9, focal_length_35mm=26)
    prior = intrinsics_prior(exif, width=4000, height=3000)
    assert prior is not None
    assert prior.origin is CalibrationOrigin.EXIF_35MM
    assert prior.focal_px == pytest.approx(26 / 43.27 * 5000)
    assert "as no lens has" in prior.doubt


def test_how_sure_a_focal_length_is_depends_on_the_tags() -> None:
    def sigma_ratio(exif: Exif) -> float:
        prior = intrinsics_prior(exif, width=4000, height=3000)
        assert prior is not None
        assert not prior.doubt
        return prior.focal_sigma_ratio

    sensor = sigma_ratio(Exif(model="FC300S", focal_length_mm=3.61))
    long, short = (sigma_ratio(Exif(focal_length_35mm=mm)) for mm in (120, 13))
    zoomed = sigma_ratio(Exif(model="FC300S", focal_length_mm=3.61, digital_zoom_ratio=1.5))
    assert 0.0 < sensor < long < short < zoomed < 0.3


def test_tags_that_contradict_each_other_make_the_focal_length_unsure() -> None:
    agreeing = Exif(model="FC300S", focal_length_mm=3.61, focal_length_35mm=20)
    contrary = Exif(model="FC300S", focal_length_mm=3.61, focal_length_35mm=40)
    sure, unsure = (intrinsics_prior(one, width=4000, height=3000) for one in (agreeing, contrary))
    assert sure is not None
    assert unsure is not None
    assert sure.focal_px == unsure.focal_px
    assert sure.focal_sigma_ratio < 0.1
    assert unsure.focal_sigma_ratio > 0.5
    assert not sure.doubt
    assert "say focal lengths of" in unsure.doubt


def test_digital_zoom_lengthens_the_focal_length() -> None:
    once, zoomed = (
        intrinsics_prior(
            Exif(model="FC300S", focal_length_mm=3.61, digital_zoom_ratio=ratio),
            width=4000,
            height=3000,
        )
        for ratio in (None, 2.0)
    )
    assert once is not None
    assert zoomed is not None
    assert zoomed.focal_px == pytest.approx(2.0 * once.focal_px)


@pytest.mark.parametrize(
    ("name", "expected_px"), [("seneca", 535.2), ("brighton", 449.3), ("sceaux", 1035.8)]
)
def test_focal_lengths_of_real_sets(name: str, expected_px: float) -> None:
    path = DATA / name / "images" / "000000.jpg"
    if not path.exists():
        pytest.skip(f"the set {name} is not here")
    header = read_image_header(path.read_bytes())
    assert header is not None
    exif = read_exif(header.exif_block)
    assert focal_px(exif, header.width, header.height) == pytest.approx(expected_px, abs=0.1)


@pytest.mark.parametrize("name", ["seneca", "brighton"])
def test_positions_of_real_sets(name: str) -> None:
    table = DATA / name / "gps.csv"
    if not table.exists():
        pytest.skip(f"the set {name} is not here")
    for row in table.read_text().splitlines()[1:]:
        image, *numbers = row.split(",")
        latitude, longitude, altitude = (float(number) for number in numbers)
        header = read_image_header((table.parent / "images" / image).read_bytes())
        assert header is not None
        measured = position(read_exif(header.exif_block).gps)
        assert measured[:2] == pytest.approx((latitude, longitude), abs=1e-8)
        assert measured[2] == pytest.approx(altitude, abs=1e-3)
