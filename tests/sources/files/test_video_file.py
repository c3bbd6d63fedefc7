"""Video files as a source."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import threading
import types
import wave
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
from av.stream import Disposition

from adapters.sources.files import video_file
from adapters.sources.files.video_file import CaptureClock, VideoFile
from adapters.sources.files.video_frames import upright_rgb
from engine.config import SourcesConfig
from engine.errors import SourceError
from engine.geo.gps_tracks import GpsTracks
from engine.types import (
    Arrival,
    DropReason,
    Frame,
    FrameId,
    GpsReading,
    IntrinsicsPrior,
    RejectedFrame,
    SourceNotice,
    SourceState,
    Uint8Array,
)
from tests.support.paths import REAL_SETS
from tests.support.received import Decoded, items_of
from tests.support.small_videos import picture, write_odd_video, write_video
from tests.support.spheres import sphere
from tests.support.waiting import HANG_S

DATA = REAL_SETS


def number_in(frame: Frame) -> int:
    return round(float(frame.pixels[10:-10, 4 : frame.width // 4 - 8].mean()))


def open_video(path: Path, **limits: Any) -> VideoFile:
    ids = itertools.count(1)
    config = SourcesConfig(**limits)
    return VideoFile(path, config=config, next_frame_id=lambda: FrameId(next(ids)))


def read_all(video: VideoFile, *, at_most: int = 10_000) -> list[Decoded]:
    async def collect() -> list[Decoded]:
        items: list[Decoded] = []
        async with aclosing(items_of(video)) as arriving:
            async for item in arriving:
                items.append(item)
                if len(items) == at_most:
                    break
        return items

    return asyncio.run(collect())


def read(video: VideoFile, *, at_most: int = 10_000) -> list[Frame | RejectedFrame]:
    items = read_all(video, at_most=at_most)
    frames = [item for item in items if isinstance(item, Frame | RejectedFrame)]
    assert len(frames) == len(items)  # a video without positions gives nothing else
    return frames


def frames_of(items: Sequence[Frame | RejectedFrame]) -> list[Frame]:
    return [item for item in items if isinstance(item, Frame)]


def rejected_of(items: Sequence[Frame | RejectedFrame]) -> list[RejectedFrame]:
    return [item for item in items if isinstance(item, RejectedFrame)]


def times_of(items: Sequence[Frame | RejectedFrame]) -> list[float]:
    return [item.captured_at_s for item in frames_of(items)]


def assert_strictly_increasing(values: Sequence[float]) -> None:
    assert all(before < after for before, after in itertools.pairwise(values))


def test_frames_come_in_order_with_their_times_names_and_pixels(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    video = open_video(path)
    assert (video.info.label, video.info.num_frames) == (str(path), 30)
    assert (video.info.is_live, video.info.is_sequence) == (False, True)
    items = read(video)
    frames = frames_of(items)
    assert len(frames) == len(items) == 30
    assert [frame.index for frame in frames] == list(range(30))
    assert [frame.frame_id for frame in frames] == list(range(1, 31))
    assert [frame.name for frame in frames][::29] == ["000000.jpg", "000029.jpg"]
    assert times_of(items) == pytest.approx([index / 30 for index in range(30)], abs=1e-3)
    assert {frame.camera_key for frame in frames} == {"video|160x120"}
    assert [number_in(frame) for frame in frames] == pytest.approx(list(range(30)), abs=1.5)
    for frame in frames[::10]:
        assert np.abs(frame.pixels.astype(int) - picture(frame.index)).mean() < 12.0
        assert (frame.jpeg, frame.gps, frame.intrinsics_prior) == (None, None, None)


@pytest.mark.parametrize("suffix", [".mkv", ".ts", ".mov", ".avi"])
def test_other_containers_give_the_same_frames(tmp_path: Path, suffix: str) -> None:
    video = open_video(write_video(tmp_path / f"a{suffix}"))
    items = read(video)
    assert [number_in(frame) for frame in frames_of(items)] == pytest.approx(range(30), abs=1.5)
    assert len(items) == 30
    assert video.info.num_frames in {None, 30}
    assert_strictly_increasing(times_of(items))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.h264", "raw"),
        ("a.mov", "hdr"),
        ("a.webm", "alpha"),
        ("a.gif", "gif"),
        ("a.mp4", "interlaced"),
        ("a.MOV", "sound first"),
        ("a.mp4", "cover first"),
    ],
)
def test_videos_as_other_programs_make_them_give_their_frames(
    tmp_path: Path, name: str, kind: str
) -> None:
    items = read(open_video(write_odd_video(tmp_path / name, 20, kind=kind)))
    frames = frames_of(items)
    assert len(frames) == len(items) == 20
    assert {(frame.width, frame.height) for frame in frames} == {(160, 120)}
    assert_strictly_increasing(times_of(items))
    for frame in frames:
        tolerance = 40.0 if kind == "gif" else 4.0  # of its palette of four blues
        assert number_in(frame) == pytest.approx(frame.index, abs=tolerance)
        shown = frame.pixels[:, 40:].mean(axis=2)  # colours are stored by halves
        drawn = picture(frame.index)[:, 40:].mean(axis=2)
        assert np.corrcoef(shown.ravel(), drawn.ravel())[0, 1] > 0.92


@pytest.mark.parametrize(("kind", "is_halved"), [("fields", True), ("interlaced", False)])
def test_of_interlaced_frames_one_moment_is_shown(
    tmp_path: Path, kind: str, is_halved: bool
) -> None:
    frames = frames_of(read(open_video(write_odd_video(tmp_path / "a.mp4", 20, kind=kind))))
    assert len(frames) == 20
    for frame in frames:
        grey, drawn = (one[:, 40:].mean(axis=2) for one in (frame.pixels, picture(frame.index)))
        for rows in (slice(0, None, 2), slice(1, None, 2)):  # eight frames later: below 0.2
            assert np.corrcoef(grey[rows].ravel(), drawn[rows].ravel())[0, 1] > 0.85
        shown = frame.pixels.astype(int)
        between = (shown[0:-2:2] + shown[2::2] + 1) // 2
        assert np.array_equal(shown[1:-1:2], between) is is_halved


def test_frames_left_out_still_count_for_index_and_time(tmp_path: Path) -> None:
    video = open_video(write_video(tmp_path / "a.mp4"), every_nth_frame=7)
    assert video.info.num_frames == 5
    items = read(video)
    assert [item.index for item in items] == [0, 7, 14, 21, 28]
    assert [item.name for item in items][:3] == ["000000.jpg", "000007.jpg", "000014.jpg"]
    assert times_of(items)[:3] == pytest.approx([0.0, 7 / 30, 14 / 30], abs=1e-3)
    limited = open_video(tmp_path / "a.mp4", every_nth_frame=7, max_frames=3)
    assert limited.info.num_frames == 3


def test_uneven_times_are_kept_and_start_at_zero(tmp_path: Path) -> None:
    pts_ms = [5000, 5040, 5120, 5121, 5900, 5950]
    items = read(open_video(write_video(tmp_path / "a.mkv", 6, pts_ms=pts_ms)))
    assert times_of(items) == pytest.approx([0.0, 0.04, 0.12, 0.121, 0.9, 0.95], abs=1e-3)


def test_a_missing_time_is_one_step_after_the_frame_before() -> None:
    clock = CaptureClock(step_s=0.5)
    times = [clock.tick(presented_at_s) for presented_at_s in (None, 8.0, None, 9.1, 9.2)]
    assert times == pytest.approx([0.0, 0.5, 1.0, 1.6, 1.7])
    assert clock.expected_s == pytest.approx(2.2)


def test_a_time_that_goes_back_or_stands_still_becomes_one_step() -> None:
    clock = CaptureClock(step_s=0.5)
    times = [clock.tick(presented_at_s) for presented_at_s in (3.0, 3.4, 3.4, 1.0, 5.5)]
    assert times == pytest.approx([0.0, 0.4, 0.9, 1.4, 2.5])


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (270, 3), (-90, 3)])
def test_a_turned_video_comes_upright(tmp_path: Path, degrees: int, turns: int) -> None:
    upright = read(open_video(write_video(tmp_path / "a.mp4", 3)))
    turned = read(open_video(write_video(tmp_path / "b.mp4", 3, rotation_deg=degrees)))
    for expected, frame in zip(frames_of(upright), frames_of(turned), strict=True):
        np.testing.assert_array_equal(frame.pixels, np.rot90(expected.pixels, turns))
        assert (expected.quarter_turns, frame.quarter_turns) == (0, 4 - turns)
        assert frame.camera_key == f"video|{frame.width}x{frame.height}"


def test_ten_bit_video_becomes_eight_bit_rgb(tmp_path: Path) -> None:
    (frame,) = read(open_video(write_video(tmp_path / "a.mkv", 1, pix_fmt="yuv420p10le")))
    assert isinstance(frame, Frame)
    assert np.abs(frame.pixels.astype(int) - picture(0)).mean() < 12.0


def test_a_camera_that_names_itself_in_the_video_gives_a_hint_at_its_lens(tmp_path: Path) -> None:
    named = write_video(tmp_path / "named.mp4", 2, handler_name="GoPro AVC")
    (first, _) = read(open_video(named))
    assert isinstance(first, Frame)
    assert first.intrinsics_prior == IntrinsicsPrior(focal_px=0.0, is_fisheye=True)
    (first, _) = read(open_video(write_video(tmp_path / "nameless.mp4", 2)))
    assert isinstance(first, Frame)
    assert first.intrinsics_prior is None


def test_a_spherical_video_is_a_camera_of_its_own_after_a_dark_frame(tmp_path: Path) -> None:
    whole = np.ascontiguousarray(sphere(height=160))
    frames = [np.zeros_like(whole), whole, np.zeros_like(whole)]
    path = write_video(
        tmp_path / "all_around.mp4", 3, size=(320, 160), draw=lambda number: frames[number]
    )
    read_frames = [frame for frame in read(open_video(path)) if isinstance(frame, Frame)]
    models = [
        frame.intrinsics_prior and frame.intrinsics_prior.camera_model for frame in read_frames
    ]
    assert models == [None, "EQUIRECTANGULAR", "EQUIRECTANGULAR"]
    keys = [frame.camera_key for frame in read_frames]
    assert keys[0] != keys[1] == keys[2]


def test_a_change_of_size_is_a_change_of_camera_and_time_goes_on(tmp_path: Path) -> None:
    first = write_video(tmp_path / "a.ts", 12)
    second = write_video(tmp_path / "b.ts", 8, size=(200, 144))
    joined = tmp_path / "joined.ts"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    items = read(open_video(joined))
    keys = [frame.camera_key for frame in frames_of(items)]
    (before, num_before), (after, num_after) = (
        (key, len(list(group))) for key, group in itertools.groupby(keys)
    )
    assert (before, after) == ("video|160x120", "video|200x144")
    assert 10 <= num_before <= 12  # FFmpeg lets go of frames it holds back when the size changes
    assert num_after == 8
    assert_strictly_increasing(times_of(items))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi"])
def test_damage_in_the_middle_is_counted_and_decoding_goes_on(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"a{suffix}", 60)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = bytes(3000)
    path.write_bytes(data)
    items = read(open_video(path))
    rejected = rejected_of(items)
    assert 1 <= len(rejected) <= 15
    assert {item.reason for item in rejected} == {DropReason.UNREADABLE}
    assert all(0 < len(item.detail) <= 120 for item in rejected)
    assert [item.index for item in items] == list(range(len(items)))
    assert_strictly_increasing(times_of(items))
    frames = frames_of(items)
    assert 45 <= len(frames) < 60
    assert number_in(frames[-1]) == pytest.approx(59, abs=1.5)


@pytest.mark.parametrize(("suffix", "num_at_least"), [(".mp4", 29), (".mkv", 29), (".ts", 29)])
def test_a_truncated_file_ends_cleanly_with_a_rejected_frame(
    tmp_path: Path, suffix: str, num_at_least: int
) -> None:
    path = write_video(tmp_path / f"a{suffix}", 60)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 55 // 100])
    items = read(open_video(path))
    assert num_at_least <= len(frames_of(items)) <= 40
    rejected = rejected_of(items)
    assert 1 <= len(rejected) <= 3
    assert {item.reason for item in rejected} == {DropReason.UNREADABLE}


def test_a_truncated_file_whose_header_tells_its_length_says_how_much_is_missing(
    tmp_path: Path,
) -> None:
    path = write_video(tmp_path / "a.mkv", 60)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])
    last = read(open_video(path))[-1]
    assert isinstance(last, RejectedFrame)
    assert "the file ends at" in last.detail
    assert last.detail.endswith("of 2.00 s")


def test_a_disk_that_fails_ends_the_video_with_a_rejected_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FailingContainer:
        def __init__(self, container: Any) -> None:
            self.container = container

        def demux(self, stream: Any) -> Iterator[Any]:
            yield from itertools.islice(self.container.demux(stream), 10)
            raise av.error.InvalidDataError(5, "Input/output error")

    def decode_failing(container: Any, stream: Any) -> Any:
        failing: Any = FailingContainer(container)
        return decoding(failing, stream)

    decoding = video_file._Decoding
    monkeypatch.setattr(video_file, "_Decoding", decode_failing)
    items = read(open_video(write_video(tmp_path / "a.mp4")))
    assert 5 <= len(frames_of(items)) <= 10
    assert isinstance(items[-1], RejectedFrame)
    assert items[-1].detail == "cannot be read further: Input/output error"


def write_sound(path: Path) -> None:
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(8000))


def write_song(path: Path) -> None:
    """Sound with a cover picture."""
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=8000)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height = 96, 80
        cover.pix_fmt = "yuvj420p"
        cover.disposition = Disposition.attached_pic
        image = av.VideoFrame.from_ndarray(picture(0, size=(96, 80)), format="rgb24")
        container.mux(cover.encode(image))
        container.mux(cover.encode(None))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        silence.sample_rate = 8000
        container.mux(sound.encode(silence))
        container.mux(sound.encode(None))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.mp4", "no such file"),
        ("folder.mp4", "is a folder"),
        ("empty.mp4", "not a readable video"),
        ("noise.mp4", "not a readable video"),
        ("words.mp4", "not a readable video"),
        ("words.txt", "holds no video"),
        ("sound.wav", "holds no video"),
        ("song.m4a", "holds no video"),
    ],
)
def test_what_is_no_video_is_refused_with_the_reason(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "words.mp4").write_text("This is no video.\n" * 50)
    (tmp_path / "words.txt").write_text("This is no video.\n" * 50)
    write_sound(tmp_path / "sound.wav")
    write_song(tmp_path / "song.m4a")
    with pytest.raises(SourceError, match=message) as caught:
        open_video(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_frames_outside_the_size_limits_are_counted_drops(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 3, size=(96, 48))
    small = read(open_video(path))
    assert [item.reason for item in rejected_of(small)] == [DropReason.TOO_SMALL] * 3
    large = read(open_video(path, min_image_edge_px=48, max_image_megapixels=0.004))
    assert [item.reason for item in rejected_of(large)] == [DropReason.TOO_LARGE] * 3
    assert len(frames_of(read(open_video(path, min_image_edge_px=48)))) == 3


def test_paths_beyond_ascii_and_with_colons_work(tmp_path: Path, monkeypatch: Any) -> None:
    write_video(tmp_path / "plain.mp4", 2).rename(tmp_path / "12:30 Größe 写真.mp4")
    monkeypatch.chdir(tmp_path)
    video = open_video(Path("12:30 Größe 写真.mp4"))
    assert video.info.label == "12:30 Größe 写真.mp4"
    assert len(frames_of(read(video))) == 2


def test_cancelling_ends_the_thread_even_between_frames_that_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "endless.mp4", 3)
    frames = video_file._Decoding.frames
    is_turning = threading.Event()

    def endless(decoding: video_file._Decoding) -> Iterator[Any]:
        first = next(frames(decoding))
        for number in itertools.count():
            if number > 100:
                is_turning.set()
            yield first

    monkeypatch.setattr(video_file._Decoding, "frames", endless)
    video = open_video(path, every_nth_frame=10**9)

    async def cancel() -> None:
        items = video.frames()
        first = await anext(items)
        assert isinstance(first, Arrival)
        assert first.index == 0
        waiting = asyncio.ensure_future(anext(items))
        assert await asyncio.to_thread(is_turning.wait, 5.0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(waiting, HANG_S)
        for thread in threading.enumerate():
            if thread.name == "video endless.mp4":
                await asyncio.to_thread(thread.join, 5.0)

    asyncio.run(cancel())
    assert "video endless.mp4" not in [thread.name for thread in threading.enumerate()]


def write_side_file(path: Path, *, num_blocks: int, step_ms: int) -> None:
    """One block each step, from the first frame on, a hundred-thousandth of a degree apart."""
    blocks = (
        f"{number + 1}\n00:00:{start_ms // 1000:02d},{start_ms % 1000:03d} --> 00:00:59,000\n"
        f"[latitude: {47.0 + number * 1e-5:.6f}] [longitude: 8.5] [rel_alt: 30 abs_alt: 430]\n"
        for number, start_ms in enumerate(range(0, num_blocks * step_ms, step_ms))
    )
    path.write_text("\n".join(blocks))


def test_positions_of_a_side_file_come_before_the_frames_that_need_them(tmp_path: Path) -> None:
    video = open_video(write_video(tmp_path / "a.mp4"), every_nth_frame=3)
    write_side_file(tmp_path / "a.SRT", num_blocks=6, step_ms=200)
    notice, *items = read_all(video)
    assert isinstance(notice, SourceNotice)
    assert (notice.source, notice.state) == (video.info.label, SourceState.CONNECTED)
    assert notice.detail == "6 positions from a.SRT, absolute altitude"
    assert len([item for item in items if isinstance(item, Frame)]) == 10
    known_s: list[float] = []
    for item in items:
        if isinstance(item, GpsReading):
            assert (item.source, item.camera_key) == (video.info.label, None)
            known_s.append(item.captured_at_s)
        else:
            assert isinstance(item, Frame)
            assert known_s[-1] > item.captured_at_s
    assert known_s == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_the_engine_gives_each_frame_of_such_a_video_its_place(tmp_path: Path) -> None:
    video = open_video(write_video(tmp_path / "a.mkv", pts_ms=[5000 + 33 * n for n in range(30)]))
    write_side_file(tmp_path / "a.srt", num_blocks=6, step_ms=200)
    tracks, latitudes, times_s = GpsTracks(max_gap_s=2.0), [], []
    for item in read_all(video):
        if isinstance(item, GpsReading):
            tracks.add(item)
        elif isinstance(item, Frame):
            fix = tracks.fix_at(item.camera_key, item.captured_at_s)
            assert fix is not None
            latitudes.append(fix.latitude_deg)
            times_s.append(item.captured_at_s)
    expected = 47.0 + np.array(times_s) / 0.2 * 1e-5
    np.testing.assert_allclose(latitudes, expected, atol=1e-9)


def test_a_broken_side_file_costs_its_positions_only(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    (tmp_path / "a.srt").write_bytes(b"1\n00:00:00,000 --> 00:00:01,000\nlatitude\xff: \0 7\n")
    notice, *items = read_all(open_video(path))
    assert isinstance(notice, SourceNotice)
    assert notice.detail.startswith("no positions from a.srt")
    assert "1 of 1 blocks cannot be used" in notice.detail
    assert [type(item) for item in items] == [Frame] * 30


def test_a_real_video_is_read_at_its_frame_rate() -> None:
    path = DATA / "redkitchen" / "video.mp4"
    if not path.exists():
        pytest.skip("the set redkitchen is not here")
    video = open_video(path, max_frames=5, every_nth_frame=10)
    assert video.info.num_frames == 5
    assert open_video(path).info.num_frames == 1000
    frames = frames_of(read(video, at_most=5))
    assert [frame.index for frame in frames] == [0, 10, 20, 30, 40]
    assert {(frame.width, frame.height) for frame in frames} == {(640, 480)}
    for frame in frames:
        assert math.isclose(frame.captured_at_s, frame.index / 30, abs_tol=1e-6)


class Unconvertible:
    """A decoded picture of a type that FFmpeg's scaler refuses."""

    format = types.SimpleNamespace(name="bayer")
    rotation = 0

    def to_ndarray(self, *, format: str) -> None:
        raise av.error.ArgumentError(22, f"not to {format}")


def test_pixels_that_do_not_become_rgb_say_why() -> None:
    why = upright_rgb(cast("av.VideoFrame", Unconvertible()))
    assert why == "pixels of type bayer do not become RGB: not to rgb24"


def test_a_frame_whose_pixels_do_not_become_rgb_is_rejected_and_the_others_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[object] = []

    def convert(decoded: av.VideoFrame) -> Uint8Array | str:
        converted.append(decoded)
        return "no RGB" if len(converted) == 2 else upright_rgb(decoded)

    monkeypatch.setattr(video_file, "upright_rgb", convert)
    items = read(open_video(write_video(tmp_path / "clip.mp4")))
    (rejected,) = rejected_of(items)
    assert (rejected.index, rejected.detail) == (1, "no RGB")
    assert [frame.index for frame in frames_of(items)][:3] == [0, 2, 3]


def test_the_size_of_the_pictures_is_known_before_they_come(tmp_path: Path) -> None:
    video = open_video(write_video(tmp_path / "a.mp4", 1, size=(200, 144)))
    assert list(video.image_sizes()) == [(200, 144)]


# -- damaged and hostile files --------------------------------------------------------------------


def latin1_video(path: Path) -> Path:
    """A video whose tags are not UTF-8, as old recorders write them."""
    data = write_video(path, 5, handler_name="cafeteria").read_bytes()
    assert b"cafeteria" in data
    path.write_bytes(data.replace(b"cafeteria", b"caf\xe9t\xe9ria"))
    return path


def test_tags_need_not_be_utf_8(tmp_path: Path) -> None:
    video = open_video(latin1_video(tmp_path / "a.mp4"))
    assert len(frames_of(read(video))) == 5


@pytest.mark.parametrize("error", [ValueError, OverflowError, KeyError, TypeError, MemoryError])
def test_what_pyav_stumbles_over_in_a_file_refuses_it_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def stumble(*_: Any, **__: Any) -> None:
        raise error("bad tag")

    path = write_video(tmp_path / "a.mp4", 5)
    monkeypatch.setattr(av, "open", stumble)
    with pytest.raises(SourceError, match="not a readable video"):
        open_video(path)


def test_what_pyav_stumbles_over_in_the_midst_ends_the_video_with_a_rejected_frame() -> None:
    class Stumbling:
        def demux(self, stream: Any) -> Iterator[Any]:
            yield from ()
            raise OverflowError("timestamp too large")

    stumbling: Any = Stumbling()
    (words,) = video_file._Decoding(stumbling, cast("Any", None)).frames()
    assert isinstance(words, str)
    assert words == "cannot be read further: damaged: OverflowError: timestamp too large"


@pytest.mark.parametrize("name", ["fifo.mp4", "device.mp4"])
def test_a_video_that_is_no_file_is_refused_and_never_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "device.mp4").symlink_to("/dev/zero")
    with pytest.raises(SourceError, match="not a readable video: is a "):
        open_video(tmp_path / name)


def test_bytes_flipped_anywhere_in_the_header_give_frames_or_a_line(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 2, handler_name="drone")
    whole = path.read_bytes()
    length = whole.index(b"mdat")
    random = np.random.default_rng(1)
    num_refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for place in random.integers(4, length, 4):
            data[place] = random.integers(256)
        path.write_bytes(data)
        try:
            read(open_video(path))
        except SourceError:
            num_refused += 1
    assert 0 < num_refused < 60
