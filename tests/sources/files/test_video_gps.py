"""Where a video was taken: side files, subtitle tracks, and how positions reach the engine."""

from __future__ import annotations

import logging
import threading
from fractions import Fraction
from pathlib import Path

import av
import pytest
from av.subtitles.stream import SubtitleStream

from adapters.sources.files import video_gps
from adapters.sources.files.telemetry_text import TimedFix
from adapters.sources.files.video_gps import ReadingFeed, VideoPositions, positions_of_video
from engine.config import TelemetryConfig
from engine.types import GpsFix
from tests.support.small_videos import HEIGHT, WIDTH, picture, write_video

SCRIPT_HEADER = (
    b"[Script Info]\nScriptType: v4.00+\n\n[V4+ Styles]\n"
    b"Format: Name, Fontname, Fontsize, PrimaryColour\n"
    b"Style: Default,Arial,16,&Hffffff\n\n[Events]\n"
    b"Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
)


def telemetry_text(number: int) -> str:
    return (
        f"[iso: 100] [latitude: {47.0 + number * 1e-5:.6f}] [longitude: 8.500000]"
        f" [rel_alt: 30.0 abs_alt: {430.0 + number:.3f}]"
    )


def srt_of(texts: list[str], *, step_ms: int = 100) -> str:
    """A side file with a block every tenth of a second."""

    def spelled(time_ms: int) -> str:
        return f"00:00:{time_ms // 1000:02d},{time_ms % 1000:03d}"

    return "\n".join(
        f"{number + 1}\n{spelled(number * step_ms)} --> {spelled((number + 1) * step_ms)}\n{text}\n"
        for number, text in enumerate(texts)
    )


def write_video_with_track(
    path: Path, texts: list[str], *, step_ms: int = 100, start_ms: int = 0, codec: str = "mov_text"
) -> Path:
    """A video of one second whose subtitle track has a text every tenth of a second."""
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("libx264", rate=30, options={"g": "10"})
        pictures.width, pictures.height, pictures.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        pictures.codec_context.time_base = Fraction(1, 1000)
        track = container.add_stream(codec)
        assert isinstance(track, SubtitleStream)
        track.codec_context.subtitle_header = SCRIPT_HEADER  # encoders do not open without one
        track.time_base = Fraction(1, 1000)
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = start_ms + number * 33, Fraction(1, 1000)
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode(None))
        for number, text in enumerate(texts):
            encoded = text.encode()
            if codec == "mov_text":
                encoded = len(encoded).to_bytes(2, "big") + encoded
            packet = av.Packet(encoded)
            packet.stream, packet.time_base = track, Fraction(1, 1000)
            packet.pts = packet.dts = start_ms + number * step_ms
            packet.duration = step_ms
            container.mux(packet)
    return path


def look(path: Path) -> VideoPositions | None:
    return positions_of_video(path, stop=threading.Event())


def found(path: Path) -> VideoPositions:
    positions = look(path)
    assert positions is not None
    return positions


def times_of(positions: VideoPositions) -> list[float]:
    return [timed.time_s for timed in positions.fixes]


TEXTS = [telemetry_text(number) for number in range(10)]
TIMES_S = [number / 10 for number in range(10)]


@pytest.mark.parametrize("suffix", [".SRT", ".srt"])
def test_a_side_file_of_the_same_name_tells_the_positions(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / "a.b.mp4", 3)
    (tmp_path / f"a.b{suffix}").write_text(srt_of(TEXTS))
    positions = found(path)
    assert times_of(positions) == pytest.approx(TIMES_S)
    assert positions.fixes[3].fix.latitude_deg == pytest.approx(47.00003)
    assert positions.fixes[3].fix.altitude_m == 433.0
    assert positions.words == f"10 positions from a.b{suffix}, absolute altitude"


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "mov_text"), (".mkv", "srt")])
@pytest.mark.parametrize("start_ms", [0, 4000])
def test_a_subtitle_track_tells_the_positions_by_the_time_since_the_first_frame(
    tmp_path: Path, suffix: str, codec: str, start_ms: int
) -> None:
    path = write_video_with_track(tmp_path / f"a{suffix}", TEXTS, start_ms=start_ms, codec=codec)
    positions = found(path)
    assert times_of(positions) == pytest.approx(TIMES_S, abs=0.002)
    assert positions.fixes[9].fix.altitude_m == 439.0
    assert "10 positions from its subtitle track" in positions.words


def test_the_side_file_wins_unless_it_speaks_of_no_places(tmp_path: Path) -> None:
    path = write_video_with_track(tmp_path / "a.mp4", TEXTS)
    (tmp_path / "a.srt").write_text(srt_of(TEXTS[:4]))
    assert len(found(path).fixes) == 4
    (tmp_path / "a.srt").write_text(srt_of(["Where are we?"]))
    assert len(found(path).fixes) == 10


@pytest.mark.parametrize(
    "texts", [["Hello", "there"], []], ids=["a film's dialogue", "no side file"]
)
def test_a_video_without_positions_has_none(tmp_path: Path, texts: list[str]) -> None:
    path = write_video(tmp_path / "a.mp4", 3)
    if texts:
        (tmp_path / "a.srt").write_text(srt_of(texts))
    assert look(path) is None


def test_blocks_that_cannot_be_used_are_counted_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_video(tmp_path / "a.mp4", 3)
    no_fix = "[latitude: 0.000000] [longitude: 0.000000] [rel_alt: 0.0 abs_alt: 0.0]"
    (tmp_path / "a.srt").write_text(srt_of([no_fix, no_fix, *TEXTS]))
    positions = found(path)
    assert len(positions.fixes) == 10
    assert "2 of 12 blocks cannot be used: the receiver had no fix" in positions.words
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_and_bytes_of_no_text_do_no_harm(tmp_path: Path, encoding: str) -> None:
    path = write_video(tmp_path / "a.mp4", 3)
    data = srt_of(TEXTS).encode(encoding)
    (tmp_path / "a.srt").write_bytes(data)
    assert len(found(path).fixes) == 10
    (tmp_path / "a.srt").write_bytes(b"\xff\x00\x81" * 1001)
    assert look(path) is None


def test_a_huge_side_file_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(video_gps, "_MAX_SIDE_FILE_BYTES", 100)
    path = write_video(tmp_path / "a.mp4", 3)
    (tmp_path / "a.srt").write_text(srt_of(TEXTS))
    assert look(path) is None
    assert "too large" in caplog.text


def test_a_folder_in_the_place_of_a_side_file_is_none(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 3)
    (tmp_path / "a.srt").mkdir()
    assert look(path) is None


def test_a_truncated_track_gives_what_is_there(tmp_path: Path) -> None:
    path = write_video_with_track(tmp_path / "a.mkv", TEXTS, codec="srt")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 8 // 10])
    positions = look(path)
    assert positions is None or 0 < len(positions.fixes) <= 10


def test_a_search_that_is_no_longer_wanted_ends(tmp_path: Path) -> None:
    path = write_video_with_track(tmp_path / "a.mp4", TEXTS)
    stop = threading.Event()
    stop.set()
    assert positions_of_video(path, stop=stop) is None


def test_the_one_position_of_a_whole_video_is_named_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "a.mov"
    options = {"movflags": "use_metadata_tags"}
    with av.open(str(path), "w", options=options) as container:
        container.metadata["location"] = "+47.3769+008.5417+408.000/"
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        frame = av.VideoFrame.from_ndarray(picture(0), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert look(path) is None
    assert (
        "one position for the whole video; it places no moving camera: 47.3769, 8.5417"
        in caplog.text
    )


def test_each_reading_comes_before_the_first_frame_that_needs_it() -> None:
    fix = GpsFix(latitude_deg=47.0, longitude_deg=8.0, altitude_m=400.0)
    feed = ReadingFeed([TimedFix(time_s=float(s), fix=fix) for s in range(5)], source="video")
    given = [[one.captured_at_s for one in feed.until(time_s)] for time_s in (0.0, 0.5, 2.5, 9.0)]
    assert given == [[0.0, 1.0], [], [2.0, 3.0], [4.0]]
    assert list(feed.until(99.0)) == []
    assert list(ReadingFeed([], source="video").until(1.0)) == []
    late = ReadingFeed([TimedFix(time_s=7.0, fix=fix)], source="video")
    assert [one.camera_key for one in late.until(0.0)] == [None]


def test_subtitles_that_lie_elsewhere_are_named_for_a_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 3)
    (tmp_path / "cards").mkdir()
    files = [tmp_path / "cards" / name for name in ("A.SRT", "b.srt")]
    for number, file in enumerate(files):
        block = f"[latitude: {40 + number}.5] [longitude: 8.2] [abs_alt: 433.0]"
        file.write_text(f"1\n00:00:00,000 --> 00:00:01,000\n{block}\n")
    for given, expected in ((files, 40.5), (files[1:], 41.5)):
        config = TelemetryConfig(positions=tuple(str(file) for file in given))
        found = positions_of_video(path, stop=threading.Event(), config=config)
        assert found is not None
        assert [one.fix.latitude_deg for one in found.fixes] == [expected]
