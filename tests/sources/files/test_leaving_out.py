"""Files as sources of a run that goes on: what was taken before does not come again."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable
from contextlib import aclosing
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
import pytest

from adapters.sources.files import video_file, video_frames
from adapters.sources.files.image_folder import ImageFolder
from adapters.sources.files.photo_list import PhotoList
from adapters.sources.files.video_file import VideoFile
from adapters.sources.files.watched_folder import WatchedFolder
from adapters.town.source import SyntheticTown, parse_town_spec
from engine.config import LiveSourcesConfig, SourcesConfig
from engine.ports import ResumableSource
from engine.types import Frame, FrameId, RejectedFrame, TakenFrames
from tests.support.received import items_of
from tests.support.small_videos import write_video

Listed = Frame | RejectedFrame


def ids() -> Any:
    counter = itertools.count(1)
    return lambda: FrameId(next(counter))


def folder_of(path: Path | PhotoList, **limits: Any) -> ImageFolder:
    return ImageFolder(
        path,
        config=SourcesConfig(**limits),
        next_frame_id=ids(),
        single_camera_per_size=True,
    )


def watched_of(path: Path) -> WatchedFolder:
    return WatchedFolder(
        path,
        sources=SourcesConfig(),
        live_sources=LiveSourcesConfig(settle_s=0.1),
        next_frame_id=ids(),
        single_camera_per_size=True,
    )


def video_of(path: Path, **limits: Any) -> VideoFile:
    return VideoFile(path, config=SourcesConfig(**limits), next_frame_id=ids())


def write_image(path: Path, shade: int) -> None:
    path.parent.mkdir(exist_ok=True)
    image = np.full((80, 96, 3), shade, np.uint8)
    path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())


def listed(source: Any, *, at_most: int = 10_000) -> list[Listed]:
    async def collect() -> list[Listed]:
        items: list[Listed] = []
        async with aclosing(items_of(source)) as arriving:
            async for item in arriving:
                if isinstance(item, Frame | RejectedFrame):
                    items.append(item)
                if len(items) == at_most:
                    break
        return items

    return asyncio.run(collect())


def taken(items: Iterable[Listed], fingerprint: str = "") -> TakenFrames:
    kept = list(items)
    return TakenFrames(
        names={item.index: item.name for item in kept},
        captured_at_s={item.index: item.captured_at_s for item in kept},
        fingerprint=fingerprint,
    )


def names(items: Iterable[Listed]) -> list[str]:
    return [item.name for item in items]


# -- folders ---------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(1, 7):
        write_image(tmp_path / "photos" / f"{number}.jpg", 20 * number)
    return tmp_path / "photos"


def test_photos_that_were_taken_do_not_come_again_and_the_others_keep_their_places(
    photos: Path,
) -> None:
    whole = listed(folder_of(photos))
    source = folder_of(photos)
    assert isinstance(source, ResumableSource)
    assert source.leave_out(taken(whole[:3])) == []
    assert source.info.num_frames == 3
    rest = listed(source)
    assert [(one.index, one.name) for one in rest] == [(one.index, one.name) for one in whole[3:]]


def test_photos_that_an_older_run_called_otherwise_do_not_come_again(tmp_path: Path) -> None:
    for number, name in enumerate(["1.png", "2.jpg", "2.png", "3.png"]):
        write_image(tmp_path / name, 20 * number)
    before = TakenFrames(
        names={0: "1.jpg", 1: "2.jpg", 2: "2.png.jpg"},
        captured_at_s={0: 0.0, 1: 1.0, 2: 2.0},
    )
    folder, watched = folder_of(tmp_path), watched_of(tmp_path)
    for source in (folder, watched):
        assert source.leave_out(before) == []
        assert names(listed(source, at_most=1)) == ["3.png.jpg"]


def test_photos_that_came_into_the_folder_follow_those_that_were_taken(photos: Path) -> None:
    before = taken(listed(folder_of(photos)))
    write_image(photos / "0.jpg", 5)
    write_image(photos / "7.jpg", 250)
    source = folder_of(photos)
    assert source.leave_out(before) == []
    assert [(one.index, one.name) for one in listed(source)] == [(6, "0.jpg"), (7, "7.jpg")]


def test_photos_that_are_not_named_this_time_are_not_said_to_be_gone(photos: Path) -> None:
    before = taken(listed(folder_of(photos))[:4])
    files = (PurePosixPath("4.jpg"), PurePosixPath("6.jpg"))
    source = folder_of(PhotoList(folder=photos, files=files))
    assert source.leave_out(before) == []
    assert names(listed(source)) == ["6.jpg"]


def test_photos_that_are_gone_or_others_now_are_named(photos: Path) -> None:
    first = folder_of(photos)
    before = taken(listed(first)[:4], fingerprint=first.fingerprint)
    (photos / "1.jpg").unlink()
    (photos / "2.jpg").write_bytes((photos / "6.jpg").read_bytes() + b"more")
    source = folder_of(photos)
    gone, changed = source.leave_out(before)
    assert "1.jpg: gone" in gone
    assert "2.jpg: another file" in changed
    assert names(listed(source)) == ["5.jpg", "6.jpg"]


def test_a_photo_in_the_place_of_one_that_is_gone_follows_those_that_were_taken(
    photos: Path,
) -> None:
    before = taken(listed(folder_of(photos)))
    (photos / "6.jpg").unlink()
    write_image(photos / "7.jpg", 250)
    source = folder_of(photos)
    source.leave_out(before)
    assert [(one.index, one.name) for one in listed(source)] == [(6, "7.jpg")]


def test_a_photo_that_could_not_be_read_does_not_come_again(photos: Path) -> None:
    (photos / "3.jpg").write_bytes(b"no image")
    before = taken(listed(folder_of(photos))[:4])
    source = folder_of(photos)
    source.leave_out(before)
    assert names(listed(source)) == ["5.jpg", "6.jpg"]


def test_every_second_photo_stays_every_second_one(photos: Path) -> None:
    before = taken(listed(folder_of(photos, every_nth_frame=2))[:1])
    source = folder_of(photos, every_nth_frame=2)
    source.leave_out(before)
    assert names(listed(source)) == ["3.jpg", "5.jpg"]


def test_a_watched_folder_gives_what_is_new_in_it(photos: Path) -> None:
    before = taken(listed(folder_of(photos)))
    write_image(photos / "7.png", 250)
    source = watched_of(photos)
    source.leave_out(before)
    (new,) = listed(source, at_most=1)
    assert (new.index, new.name) == (6, "7.png.jpg")


# -- videos ----------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every frame that FFmpeg decodes from here on."""
    decoded: list[Any] = []
    decode = video_frames.decode_packet

    def counting(packet: Any) -> Any:
        for frame in decode(packet):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(video_file, "decode_packet", counting)
    return decoded


def assert_same(rest: list[Listed], whole: list[Listed]) -> None:
    """The same frames to the bit."""
    assert [(one.index, one.name, one.captured_at_s) for one in rest] == [
        (one.index, one.name, one.captured_at_s) for one in whole
    ]
    for one, other in zip(rest, whole, strict=True):
        assert isinstance(one, Frame)
        assert isinstance(other, Frame)
        assert np.array_equal(one.pixels, other.pixels)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_video_goes_on_where_it_stopped_without_decoding_what_came_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = write_video(tmp_path / f"a{suffix}", 240)
    whole = listed(video_of(path))
    source = video_of(path)
    assert source.leave_out(taken(whole[:200])) == []
    decoded = counted(monkeypatch)
    assert_same(listed(source), whole[200:])
    assert len(decoded) < 40 + 80


def test_frames_that_were_on_their_way_come_again(tmp_path: Path) -> None:
    whole = listed(video_of(write_video(tmp_path / "a.mp4", 240)))
    source = video_of(tmp_path / "a.mp4")
    source.leave_out(taken([*whole[:180], *whole[183:190]]))
    assert_same(listed(source), [*whole[180:183], *whole[190:]])


def test_a_video_of_which_every_third_frame_is_taken_goes_on_in_step(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 240)
    whole = listed(video_of(path, every_nth_frame=3))
    source = video_of(path, every_nth_frame=3)
    source.leave_out(taken(whole[:70]))
    assert_same(listed(source), whole[70:])


def test_a_short_start_is_read_again_and_left_out(tmp_path: Path) -> None:
    whole = listed(video_of(write_video(tmp_path / "a.mp4")))
    source = video_of(tmp_path / "a.mp4")
    source.leave_out(taken(whole[:10]))
    assert_same(listed(source), whole[10:])


def test_a_video_with_other_times_than_before_is_read_from_its_start(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 240)
    before = taken(listed(video_of(path))[:200])
    write_video(path, 240, pts_ms=[57 * number + number % 3 for number in range(240)])
    source = video_of(path)
    source.leave_out(before)
    assert [one.index for one in listed(source)] == list(range(200, 240))


def test_another_video_of_the_same_name_is_said(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    first = video_of(path)
    before = taken(listed(first)[:10], fingerprint=first.fingerprint)
    write_video(path, 40)
    (oddity,) = video_of(path).leave_out(before)
    assert "another file than before" in oddity


# -- the town --------------------------------------------------------------------------------------


def test_the_town_draws_only_what_is_left() -> None:
    town = SyntheticTown(
        parse_town_spec("synthetic:town?frames=9&width=64&height=64&blank=9"), next_frame_id=ids()
    )
    before = TakenFrames(names={i: f"{i:06d}.jpg" for i in range(7)}, captured_at_s={})
    assert town.leave_out(before) == []
    assert town.info.num_frames == 2
    assert [one.index for one in listed(town)] == [7, 8]
