"""Positions beside the frames: between two readings, near one, and out of order."""

from __future__ import annotations

import math
import threading

import pytest

from engine.geo import gps_tracks
from engine.geo.gps_tracks import GpsTracks
from engine.types import GpsFix, GpsReading


def fix(
    latitude_deg: float, *, longitude_deg: float = 8.0, accuracy_m: float | None = None
) -> GpsFix:
    return GpsFix(
        latitude_deg=latitude_deg,
        longitude_deg=longitude_deg,
        altitude_m=100.0 * latitude_deg,
        accuracy_m=accuracy_m,
    )


def reading(time_s: float, at: GpsFix, *, camera_key: str | None = None) -> GpsReading:
    return GpsReading(source="fake", camera_key=camera_key, captured_at_s=time_s, fix=at)


def tracks_of(*readings: GpsReading, max_gap_s: float = 2.0) -> GpsTracks:
    tracks = GpsTracks(max_gap_s=max_gap_s)
    for one in readings:
        tracks.add(one)
    return tracks


def latitude_at(tracks: GpsTracks, time_s: float, *, camera_key: str = "camera") -> float | None:
    found = tracks.fix_at(camera_key, time_s)
    return None if found is None else found.latitude_deg


def test_between_two_readings_a_camera_moves_evenly() -> None:
    tracks = tracks_of(reading(10.0, fix(1.0)), reading(12.0, fix(3.0)))
    between = tracks.fix_at("camera", 10.5)
    assert between is not None
    assert between.latitude_deg == pytest.approx(1.5)
    assert between.altitude_m == pytest.approx(150.0)
    assert latitude_at(tracks, 10.0) == 1.0
    assert latitude_at(tracks, 12.0) == pytest.approx(3.0)


def test_a_reading_that_is_nowhere_on_earth_is_not_in_between_and_an_absurd_altitude_unknown() -> (
    None
):
    absurd = GpsFix(latitude_deg=2.0, longitude_deg=8.0, altitude_m=1e300)
    tracks = tracks_of(
        reading(10.0, fix(1.0)),
        reading(11.0, fix(1e160)),
        reading(11.5, absurd),
        reading(12.0, fix(3.0)),
    )
    assert latitude_at(tracks, 11.0) == pytest.approx(1.0 + 1.0 / 1.5)
    found = tracks.fix_at("camera", 11.5)
    assert found == GpsFix(latitude_deg=2.0, longitude_deg=8.0)


def test_before_the_first_and_after_the_last_the_nearest_counts_when_it_is_near() -> None:
    tracks = tracks_of(reading(10.0, fix(1.0)), reading(11.0, fix(2.0)))
    times_s = (7.9, 8.0, 9.9, 11.1, 13.0, 13.1)
    assert [latitude_at(tracks, time_s) for time_s in times_s] == [None, 1.0, 1.0, 2.0, 2.0, None]


def test_between_readings_too_far_apart_the_nearest_counts_when_it_is_near() -> None:
    tracks = tracks_of(reading(0.0, fix(1.0)), reading(10.0, fix(2.0)))
    times_s = (0.0, 1.9, 2.1, 7.9, 8.1, 10.0)
    assert [latitude_at(tracks, time_s) for time_s in times_s] == [1.0, 1.0, None, None, 2.0, 2.0]


def test_readings_that_come_late_find_their_place() -> None:
    tracks = tracks_of(
        reading(2.0, fix(2.0)),
        reading(0.0, fix(0.0)),
        reading(1.0, fix(5.0)),
        reading(1.0, fix(1.0)),
    )
    assert [latitude_at(tracks, time_s) for time_s in (0.5, 1.0, 1.5)] == pytest.approx(
        [0.5, 1.0, 1.5]
    )


def test_own_positions_of_a_camera_win_over_those_of_all_where_they_are_near() -> None:
    tracks = tracks_of(
        reading(0.0, fix(1.0)),
        reading(10.0, fix(1.0)),
        reading(0.0, fix(2.0), camera_key="a"),
    )
    assert latitude_at(tracks, 1.0, camera_key="a") == 2.0
    assert latitude_at(tracks, 1.0, camera_key="b") == 1.0
    assert latitude_at(tracks, 9.0, camera_key="a") == 1.0
    assert latitude_at(tracks_of(), 0.0) is None


def test_the_way_across_the_date_line_is_the_short_one() -> None:
    tracks = tracks_of(
        reading(0.0, fix(1.0, longitude_deg=179.0)), reading(1.0, fix(1.0, longitude_deg=-178.0))
    )
    between = [tracks.fix_at("camera", time_s) for time_s in (0.2, 0.6)]
    longitudes = [one.longitude_deg for one in between if one is not None]
    assert longitudes == pytest.approx([179.6, -179.2])


@pytest.mark.parametrize(
    ("accuracies", "expected"), [((1.0, 3.0), 3.0), ((None, 2.0), 2.0), ((None, None), None)]
)
def test_between_two_readings_the_worse_accuracy_holds(
    accuracies: tuple[float | None, float | None], expected: float | None
) -> None:
    first, second = (fix(1.0, accuracy_m=accuracy) for accuracy in accuracies)
    between = tracks_of(reading(0.0, first), reading(1.0, second)).fix_at("camera", 0.5)
    assert between is not None
    assert between.accuracy_m == expected


def test_a_reading_of_no_time_is_left_out() -> None:
    tracks = tracks_of(
        reading(math.nan, fix(9.0)), reading(0.0, fix(1.0)), reading(math.inf, fix(9.0))
    )
    assert latitude_at(tracks, 1.0) == 1.0
    assert latitude_at(tracks, 100.0) is None


def test_a_long_track_forgets_its_oldest_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gps_tracks, "MAX_READINGS", 10)
    tracks = tracks_of(*(reading(float(second), fix(float(second % 60))) for second in range(100)))
    assert latitude_at(tracks, 90.0) == 30.0
    assert latitude_at(tracks, 85.0) is None


def test_threads_may_add_and_read_at_once() -> None:
    tracks = tracks_of(reading(-1.0, fix(1.0)), reading(1001.0, fix(1.0)), max_gap_s=1e6)
    answers: list[float | None] = []

    def add() -> None:
        for number in range(1000):
            tracks.add(reading(float(number * 7 % 1000), fix(1.0)))

    def ask() -> None:
        answers.extend(latitude_at(tracks, float(number)) for number in range(1000))

    threads = [threading.Thread(target=work) for work in (add, add, ask, ask)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == pytest.approx([1.0] * 2000)
