"""Numbers in words, names without secrets, round ticks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from adapters.report import svg
from adapters.report.words import (
    fixed,
    listed,
    milliseconds,
    number,
    printable,
    seconds,
    short,
    shown_path,
    without_secrets,
)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        *((0.0, "0"), (1234.5, "1,230"), (0.04567, "0.0457"), (99.96, "100"), (-2.0, "-2.00")),
        *((None, "–"), (math.nan, "–"), (math.inf, "–"), (1e12, "1.00e+12"), (1e-9, "1.00e-09")),
    ],
)
def test_numbers_have_three_digits(value: float | None, words: str) -> None:
    assert number(value) == words


def test_no_zero_is_negative() -> None:
    assert fixed(-0.001) == "0.00"
    assert [words for _, words in svg.ticks(-1.0, 1.0, at_most=3)] == ["-1", "0", "1"]


@pytest.mark.parametrize(
    ("value", "words"),
    [(1.5, "1.50 s"), (90.0, "90.0 s"), (150.0, "2 min 30 s"), (7320.0, "2 h 2 min")],
)
def test_long_times_are_in_minutes_and_hours(value: float, words: str) -> None:
    assert seconds(value) == words


def test_latencies_of_seconds_are_no_milliseconds() -> None:
    assert (milliseconds(347.4), milliseconds(32_535.0)) == ("347 ms", "32.5 s")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("rtsp://user:pass@10.0.0.1:554/live?key=1", "rtsp://10.0.0.1:554/live"),
        ("http://host/a/token=abc/b#x", "http://host/a/token=…/b"),
        ("mqtts://me@broker/+/frame", "mqtts://broker/+/frame"),
        ("http://[::1", "http://…"),
        ("synthetic:town?frames=3", "synthetic:town?frames=3"),
        ("photos/", "photos/"),
        ("../photos", "../photos"),
        ("/home/me/photos", "…/photos"),
        ("~/photos", "…/photos"),
        ("*=/home/me/mask.png", "*=…/mask.png"),
    ],
)
def test_sources_lose_credentials_and_folders_of_the_user(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("rtsp://u:p@h:554/live: timed out", "rtsp://h:554/live: timed out"),
        ("no answer (mqtts://me:a@b@broker).", "no answer (mqtts://broker)."),
        ("at http://u:se/cr@et@h/x, twice", "at http://h/x, twice"),
        ("http://h/a?key=1&b=2, again", "http://h/a?…, again"),
        ("http://h/token=abc/b", "http://h/token=…/b"),
        ("http://h:8080/a@2x.jpg is there", "http://h:8080/a@2x.jpg is there"),
        ("a/b.jpg: 3 @ 4", "a/b.jpg: 3 @ 4"),
        ("https://[::1]:80/a", "https://[::1]:80/a"),
    ],
)
def test_addresses_within_a_text_lose_credentials_and_queries(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


def test_no_part_of_a_password_is_left_of_a_text_that_is_cut() -> None:
    shown = short(f"{'-' * 50} rtsp://user:{'p' * 60}@host/live", at_most=80)
    assert "p" not in shown.replace("rtsp", "")


def test_long_names_keep_both_ends() -> None:
    shown = short(f"begin{'-' * 500}end.jpg", at_most=40)
    assert shown.startswith("begin")
    assert shown.endswith("end.jpg")
    assert len(shown) <= 41


def test_lists_say_how_many_more_there_are() -> None:
    assert listed(["a", "b", "c"], at_most=2) == "a, b, 1 more"
    assert listed([]) == ""


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.0, 0.53, ["0.0", "0.2", "0.4"]),
        (1.0, 40.0, ["10", "20", "30", "40"]),
        (-0.3, 0.3, ["-0.2", "0.0", "0.2"]),
        (0.0, 7000.0, ["0", "2,000", "4,000", "6,000"]),
        (5.0, 5.0, ["5"]),
    ],
)
def test_ticks_are_round_and_written_as_exactly_as_their_step(
    low: float, high: float, words: list[str]
) -> None:
    assert [one for _, one in svg.ticks(low, high, at_most=5)] == words


def test_elements_escape_what_is_in_them() -> None:
    drawn = svg.element("text", "a<b>&\u202e", data_name='"x"', class_="s")
    assert drawn == '<text data-name="&#34;x&#34;" class="s">a&lt;b&gt;&amp;?</text>'
    assert svg.element("g", drawn) == f"<g>{drawn}</g>"


def test_a_path_is_shown_from_the_working_directory_on_and_nothing_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown_path(Path("runs/seneca")) == "runs/seneca"
    assert shown_path(tmp_path / "runs" / "seneca") == "runs/seneca"
    assert shown_path(tmp_path.parent / "elsewhere" / "seneca") == "seneca"
    assert shown_path(tmp_path) == tmp_path.name
    monkeypatch.chdir(tmp_path.anchor)
    assert shown_path(tmp_path / "seneca") == "seneca"
