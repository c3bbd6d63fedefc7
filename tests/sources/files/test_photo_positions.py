"""Photos whose positions have faults as cameras and programs make them, laid onto them."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.sources.files import hemispheres
from adapters.sources.files.image_folder import ImageFolder
from adapters.sources.files.position_files import read_position_files
from engine.config import GeoreferenceConfig, SourcesConfig
from engine.geo.georeference import Georeference, estimate_georeference
from engine.geometry import camera_center, transform_points
from engine.regular_files import read_regular_head
from engine.types import Frame, FrameId, GpsFix
from tests.support.received import items_of
from tests.support.town_survey import (
    ORIGIN,
    UNIT_M,
    Survey,
    gps_tags,
    town_survey,
    write_photo,
    xmp_packet,
)

Tags = dict[int, Any]
Fault = Callable[[Tags], Tags]


@pytest.fixture(scope="module")
def survey() -> Survey:
    return town_survey()


def frames_of(folder: Path, **settings: Any) -> list[Frame]:
    ids = itertools.count(1)
    source = ImageFolder(
        folder,
        config=SourcesConfig(**settings),
        next_frame_id=lambda: FrameId(next(ids)),
        single_camera_per_size=True,
    )

    async def collect() -> list[Frame]:
        return [item async for item in items_of(source) if isinstance(item, Frame)]

    return asyncio.run(collect())


def write_survey(folder: Path, survey: Survey, fault: Fault, *, xmp: bool = False) -> None:
    for number, fix in enumerate(survey.fixes):
        packet = xmp_packet(
            f'drone-dji:GpsLatitude="{fix.latitude_deg:+.8f}"',
            f'drone-dji:GpsLongitude="{fix.longitude_deg:+.8f}"',
            f'drone-dji:AbsoluteAltitude="{fix.altitude_m:+.2f}"',
            'drone-dji:RelativeAltitude="+60.00"',
        )
        tags = fault(gps_tags(fix))
        path = folder / f"{number:03d}.jpg"
        write_photo(path, gps=tags, xmp=packet if xmp else "", shade=number)


def placed(survey: Survey, fixes: list[GpsFix | None]) -> Georeference:
    known = [i for i, fix in enumerate(fixes) if fix is not None]
    found = estimate_georeference(
        survey.cam_from_map[known],
        [fix for fix in fixes if fix is not None],
        config=GeoreferenceConfig(),
        origin=ORIGIN,
    )
    assert isinstance(found, Georeference), found
    return found


def errors_m(survey: Survey, found: Georeference) -> tuple[float, float]:
    """The largest horizontal error of a camera, and the largest vertical one."""
    centers_m = transform_points(found.enu_from_map, camera_center(survey.cam_from_map))
    apart_m = np.abs(centers_m - survey.positions_m)
    return float(np.linalg.norm(apart_m[:, :2], axis=1).max()), float(apart_m[:, 2].max())


def without(*tags: int) -> Fault:
    return lambda gps: {tag: value for tag, value in gps.items() if tag not in tags}


def with_tags(**values: Any) -> Fault:
    return lambda gps: {**gps, **{int(tag[1:]): value for tag, value in values.items()}}


@pytest.mark.parametrize(
    ("fault", "xmp", "has_heights"),
    [
        (without(), False, True),
        (without(1, 3), True, True),  # no letters, but XMP
        (without(5, 6), False, False),  # no altitude
        (without(5, 6), True, True),
        (without(1, 2, 3, 4, 5, 6), True, True),  # XMP alone
        (with_tags(_6=0.0), True, True),  # an altitude of 0 beside the true one
    ],
)
def test_photos_are_placed_where_the_truth_is_in_their_files(
    fault: Fault, xmp: bool, has_heights: bool, survey: Survey, tmp_path: Path
) -> None:
    write_survey(tmp_path, survey, fault, xmp=xmp)
    frames = frames_of(tmp_path)
    found = placed(survey, [frame.gps for frame in frames])
    assert [frame.gps_problem for frame in frames] == [""] * len(frames)
    assert found.has_heights == has_heights
    assert found.metres_per_map_unit == pytest.approx(UNIT_M, rel=0.01)
    horizontal_m, vertical_m = errors_m(survey, found)
    assert horizontal_m < 0.6
    assert not has_heights or vertical_m < 0.6


def test_positions_below_the_sea_are_below_the_sea(tmp_path: Path) -> None:
    polder = town_survey(origin=GpsFix(latitude_deg=52.0, longitude_deg=4.6, altitude_m=-120.0))
    write_survey(tmp_path, polder, without())
    altitudes_m = [frame.gps.altitude_m for frame in frames_of(tmp_path) if frame.gps]
    assert altitudes_m == pytest.approx([fix.altitude_m for fix in polder.fixes], abs=1e-3)
    assert max(m for m in altitudes_m if m is not None) < 0.0


def test_letters_of_other_photos_count_also_of_later_ones_and_that_is_said(
    survey: Survey, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = itertools.count()
    write_survey(tmp_path, survey, lambda gps: without(1, 3)(gps) if next(numbers) < 20 else gps)
    with caplog.at_level(logging.WARNING):
        frames = frames_of(tmp_path)
    assert errors_m(survey, placed(survey, [frame.gps for frame in frames]))[0] < 0.6
    (record,) = caplog.records
    assert "taken for N and W, as that of 020.jpg is" in record.getMessage()


def test_without_any_letter_the_problem_is_named_with_the_setting_that_solves_it(
    survey: Survey, tmp_path: Path
) -> None:
    write_survey(tmp_path, survey, without(1, 3))
    frames = frames_of(tmp_path)
    assert {frame.gps for frame in frames} == {None}
    (problem,) = {frame.gps_problem for frame in frames}
    assert problem.startswith("it has no letters N or S and E or W")
    assert "sources.hemispheres" in problem
    configured = frames_of(tmp_path, hemispheres="NW")
    assert errors_m(survey, placed(survey, [frame.gps for frame in configured]))[0] < 0.6


def test_other_photos_are_looked_at_by_their_heads_before_a_photo_is_decoded(
    survey: Survey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photo(tmp_path / "0.jpg", gps=without(1, 3)(gps_tags(survey.fixes[0])))
    write_photo(tmp_path / "1.jpg", gps=gps_tags(survey.fixes[1]), shade=1)
    with (tmp_path / "1.jpg").open("ab") as file:
        file.truncate(10 * 2**20)

    def read_whole(path: Path, *, max_bytes: int) -> bytes:
        raise AssertionError(f"{path} is read whole")

    def read_head(path: Path, *, num_bytes: int) -> bytes:
        read.append(path.name)
        return read_regular_head(path, num_bytes=num_bytes)

    read: list[str] = []
    monkeypatch.setattr(hemispheres, "read_regular_file", read_whole)
    monkeypatch.setattr(hemispheres, "read_regular_head", read_head)
    source = ImageFolder(
        tmp_path,
        config=SourcesConfig(),
        next_frame_id=lambda: FrameId(1),
        single_camera_per_size=True,
    )

    async def collect() -> list[Any]:
        return [item async for item in source.frames()]

    notice, first, second = asyncio.run(collect())
    assert notice.detail == "positions without letters are taken for N and W, as that of 1.jpg is"
    assert read == ["0.jpg", "1.jpg"]
    monkeypatch.setattr(hemispheres, "read_regular_head", read_whole)  # nor is any of them later
    signs = [
        (frame.gps.latitude_deg > 0.0, frame.gps.longitude_deg > 0.0)
        for frame in (second.decode(), first.decode())
    ]
    assert signs == [(True, False), (True, False)]


def test_a_letter_that_is_there_wins_over_those_of_other_photos(tmp_path: Path) -> None:
    chile = gps_tags(GpsFix(latitude_deg=-33.45, longitude_deg=-70.67, altitude_m=570.0))
    write_photo(tmp_path / "0.jpg", gps=without(3)(chile))
    write_photo(tmp_path / "1.jpg", gps={**chile, 1: "N"}, shade=1)
    write_photo(tmp_path / "2.jpg", gps=without(1)(chile), shade=2)
    fixes = [frame.gps for frame in frames_of(tmp_path)]
    signs = [(fix.latitude_deg > 0.0, fix.longitude_deg > 0.0) for fix in fixes if fix]
    assert signs == [(False, False), (True, False), (True, False)]


def test_a_position_of_zeros_is_named_and_a_wrong_sign_is_left_out_by_the_map(
    survey: Survey, tmp_path: Path
) -> None:
    write_survey(tmp_path, survey, without())
    zero = gps_tags(GpsFix(latitude_deg=0.0, longitude_deg=0.0, altitude_m=30.0))
    write_photo(tmp_path / "003.jpg", gps=zero)
    write_photo(tmp_path / "009.jpg", gps={**gps_tags(survey.fixes[9]), 3: "E"})
    frames = frames_of(tmp_path)
    assert frames[3].gps is None
    assert frames[3].gps_problem == "latitude and longitude are 0"
    found = placed(survey, [frame.gps for frame in frames])
    assert np.flatnonzero(~found.is_inlier).tolist() == [8]  # without the one of zeros
    assert errors_m(survey, found)[0] < 0.6


def test_positions_of_a_file_win_over_exif_and_are_counted(survey: Survey, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_survey(photos, survey, with_tags(_2=(1.0, 0.0, 0.0)))
    rows = [f"{i:03d}.jpg -6.0 36.0 100" for i in range(10)]
    (tmp_path / "geo.txt").write_text("\n".join(["EPSG:4326", *rows]))
    source = ImageFolder(
        photos,
        config=SourcesConfig(),
        next_frame_id=lambda: FrameId(1),
        single_camera_per_size=True,
        positions=read_position_files([str(tmp_path / "geo.txt")]),
    )

    async def collect() -> list[Any]:
        return [item async for item in items_of(source)]

    notice, *frames = asyncio.run(collect())
    assert notice.detail == "10 of 24 photos are named in the files of positions"
    assert frames[0].gps == GpsFix(latitude_deg=36.0, longitude_deg=-6.0, altitude_m=100.0)
    assert frames[10].gps.latitude_deg == 1.0
