"""Folders of photos as a source."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pillow_heif
import pytest
from PIL import Image

from adapters.images import decoding
from adapters.sources.files.image_folder import ImageFolder
from engine.config import SourcesConfig
from engine.errors import SourceError
from engine.types import Arrival, DropReason, Frame, FrameId, RejectedFrame, SourceNotice
from tests.support.paths import REAL_SETS
from tests.support.raw_files import write_dng
from tests.support.received import Decoded, items_of

DATA = REAL_SETS
THREAD_NAME_START = "images "


def write_image(path: Path, shade: int = 100, *, size: tuple[int, int] = (96, 80)) -> Path:
    """An image of one shade; ``size`` is width, height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _, buffer = cv2.imencode(path.suffix, np.full((size[1], size[0], 3), shade, np.uint8))
    path.write_bytes(buffer.tobytes())
    return path


def write_photo(
    path: Path,
    *,
    model: str = "One",
    focal_mm: float = 4.3,
    size: tuple[int, int] = (96, 80),
    tags: Mapping[int, int | float | str] | None = None,
) -> None:
    exif = Image.Exif()
    exif[0x110] = model
    exif.get_ifd(0x8769).update({0x920A: focal_mm, **(tags or {})})
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 20 * len(path.name), 7)).save(path, exif=exif.tobytes())


def open_folder(path: Path, *, single_camera_per_size: bool = True, **limits: Any) -> ImageFolder:
    ids = itertools.count(1)
    return ImageFolder(
        path,
        config=SourcesConfig(**limits),
        next_frame_id=lambda: FrameId(next(ids)),
        single_camera_per_size=single_camera_per_size,
    )


def read_items(folder: ImageFolder) -> list[Decoded]:
    async def collect() -> list[Decoded]:
        return [item async for item in items_of(folder)]

    return asyncio.run(collect())


def read(folder: ImageFolder) -> list[Frame | RejectedFrame]:
    return [item for item in read_items(folder) if isinstance(item, Frame | RejectedFrame)]


def read_frames(folder: ImageFolder) -> list[Frame]:
    items = read(folder)
    assert all(isinstance(item, Frame) for item in items)
    return [item for item in items if isinstance(item, Frame)]


def read_rejected(folder: ImageFolder) -> list[RejectedFrame]:
    return [item for item in read(folder) if isinstance(item, RejectedFrame)]


def test_images_come_in_natural_order_with_ids_and_times(tmp_path: Path) -> None:
    for number, name in enumerate(["img10.jpg", "img2.JPG", "IMG1.Jpeg", "img02b.png"]):
        write_image(tmp_path / name.lower(), number * 20).rename(tmp_path / name)
    folder = open_folder(tmp_path)
    assert (folder.info.label, folder.info.num_frames) == (str(tmp_path), 4)
    assert (folder.info.is_live, folder.info.is_sequence) == (False, False)
    frames = read_frames(folder)
    assert [frame.name for frame in frames] == [
        "IMG1.Jpeg",
        "img2.JPG",
        "img02b.png.jpg",
        "img10.jpg",
    ]
    assert [frame.frame_id for frame in frames] == [1, 2, 3, 4]
    assert [frame.index for frame in frames] == [0, 1, 2, 3]
    assert [frame.captured_at_s for frame in frames] == [0.0, 1.0, 2.0, 3.0]
    received = [frame.received_at_s for frame in frames]
    assert received == sorted(received)
    assert {frame.source for frame in frames} == {str(tmp_path)}


def test_jpeg_bytes_are_handed_on_untouched(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.jpg")
    write_image(tmp_path / "b.png")
    jpeg, png = read_frames(open_folder(tmp_path))
    assert jpeg.jpeg == path.read_bytes()
    assert png.jpeg is None


def test_hidden_files_other_files_and_folders_are_no_candidates_and_reported_first(
    tmp_path: Path,
) -> None:
    write_image(tmp_path / "a.jpg")
    write_image(tmp_path / ".b.jpg")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "folder.jpg").mkdir()
    folder = open_folder(tmp_path)
    assert folder.info.num_frames == 1
    notice, *frames = read_items(folder)
    assert isinstance(notice, SourceNotice)
    assert [(one.kind, one.num_files) for one in notice.left_out] == [(".jpg", 1), (".txt", 1)]
    assert notice.detail == "3 files: 1 taken; left out: 1 .jpg (hidden); 1 .txt (no photo)"
    assert [frame.name for frame in frames if isinstance(frame, Frame)] == ["a.jpg"]


def test_subfolders_are_cameras(tmp_path: Path) -> None:
    for shade, name in enumerate(["right/0.jpg", "left/10.jpg", "left/9.jpg", "left/deep/0.jpg"]):
        write_image(tmp_path / name, shade)
    write_image(tmp_path / ".cache" / "0.jpg")
    write_image(tmp_path / "own.jpg", 90)
    found = {frame.name: frame.camera_key for frame in read_frames(open_folder(tmp_path))}
    assert found == {
        "left/9.jpg": "left|96x80",
        "left/10.jpg": "left|96x80",
        "left/deep/0.jpg": "left/deep|96x80",
        "own.jpg": "96x80",
        "right/0.jpg": "right|96x80",
    }


def test_numbered_folders_of_a_card_are_one_camera(tmp_path: Path) -> None:
    for shade, name in enumerate(["DCIM/100MEDIA/1.jpg", "DCIM/101MEDIA/2.jpg"]):
        write_image(tmp_path / name, shade)
    frames = read_frames(open_folder(tmp_path))
    assert {frame.camera_key for frame in frames} == {"DCIM|96x80"}


def test_raw_and_heif_photos_are_frames_under_jpeg_names(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (96, 120, 3), np.uint8)
    (tmp_path / "0.DNG").write_bytes(write_dng(pixels))
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(tmp_path / "1.HEIC")
    Image.fromarray(pixels).save(tmp_path / "2.avif")
    frames = read_frames(open_folder(tmp_path))
    assert [frame.name for frame in frames] == ["0.DNG.jpg", "1.HEIC.jpg", "2.avif.jpg"]
    assert {frame.pixels.shape for frame in frames} == {(96, 120, 3)}
    assert {frame.jpeg for frame in frames} == {None}


def test_one_image_file_is_a_source_of_one_frame(tmp_path: Path) -> None:
    path = write_image(tmp_path / "only.png")
    write_image(tmp_path / "other.png")
    folder = open_folder(path)
    assert (folder.info.label, folder.info.num_frames) == (str(path), 1)
    assert [frame.name for frame in read_frames(folder)] == ["only.png.jpg"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "no such file or folder"),
        ("empty", "no image in this folder"),
        ("recording", "name walk_0.mcap itself, or make one: ros2 bag reindex"),
        ("notes.txt", "neither a folder nor an image"),
        ("x" * 400, "cannot be read"),
    ],
)
def test_a_path_without_images_is_refused_with_the_reason(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "recording").mkdir()
    (tmp_path / "recording" / "walk_0.mcap").touch()
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(SourceError, match=message) as caught:
        open_folder(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_paths_and_names_beyond_ascii_work(tmp_path: Path) -> None:
    folder = tmp_path / "Größe 城 ß"
    for shade, name in enumerate(["Ünï 1.jpg", "写真2.png"]):
        write_image(folder / name, shade)
    assert [frame.name for frame in read_frames(open_folder(folder))] == [
        "Ünï 1.jpg",
        "写真2.png.jpg",
    ]


def test_names_that_no_text_file_can_carry_are_made_printable_and_stay_unique(
    tmp_path: Path,
) -> None:
    plain = write_image(tmp_path / "plain.jpg")
    for shade, name in enumerate([b"a\n.jpg", b"a\t.jpg", b"a\\.jpg", b"a\xff.jpg"]):
        write_image(plain, 50 + shade)
        shutil.copyfile(plain, os.path.join(os.fsencode(tmp_path), name))
    plain.unlink()
    names = [frame.name for frame in read_frames(open_folder(tmp_path))]
    assert sorted(names) == ["a_.jpg", "a_.jpg.2.jpg", "a_.jpg.3.jpg", "a_.jpg.jpg"]
    assert all(name.encode().decode() == name and name.isprintable() for name in names)


def test_frame_names_are_unique_jpeg_names(tmp_path: Path) -> None:
    for shade, name in enumerate(["a.png", "a.jpg", "a.tif", "b.png", "b.webp", "c.bmp"]):
        write_image(tmp_path / name, 30 * shade)
    frames = read_frames(open_folder(tmp_path))
    assert {frame.name: frame.pixels[0, 0, 0] for frame in frames} == {
        "a.png.jpg": pytest.approx(0, abs=2),
        "a.jpg": pytest.approx(30, abs=2),
        "a.tif.jpg": pytest.approx(60, abs=2),
        "b.png.jpg": pytest.approx(90, abs=2),
        "b.webp.jpg": pytest.approx(120, abs=2),
        "c.bmp.jpg": pytest.approx(150, abs=2),
    }


def test_frame_names_differ_by_more_than_the_case_of_letters(tmp_path: Path) -> None:
    for shade, name in enumerate(["IMG_9.tif", "IMG_9.JPG", "img_9.jpg", "IMG_9.TIF.JPG"]):
        write_image(tmp_path / name, 30 * shade)
    names = [frame.name for frame in read_frames(open_folder(tmp_path))]
    assert {"IMG_9.JPG", "img_9.jpg.jpg", "IMG_9.TIF.JPG", "IMG_9.tif.2.jpg"} == set(names)
    assert len({name.casefold() for name in names}) == len(names)


def test_bad_files_are_counted_drops_and_the_rest_still_comes(tmp_path: Path) -> None:
    good = write_image(tmp_path / "0.jpg", 10)
    (tmp_path / "1.jpg").write_bytes(good.read_bytes()[:-40])
    (tmp_path / "2.jpg").write_text("I am a text file")
    (tmp_path / "3.jpg").write_bytes(b"")
    write_image(tmp_path / "4.jpg", size=(1, 1))
    write_image(tmp_path / "5.jpg", size=(400, 300))
    shutil.copyfile(good, tmp_path / "6.jpg")
    (tmp_path / "7.jpg").symlink_to(tmp_path / "nowhere.jpg")
    write_image(tmp_path / "8.jpg", 200)
    items = read(open_folder(tmp_path, max_image_megapixels=0.1))
    assert [item.index for item in items] == list(range(9))
    assert [item.captured_at_s for item in items] == [float(index) for index in range(9)]
    assert [item.name for item in items] == [f"{index}.jpg" for index in range(9)]
    assert [item.frame_id for item in items if isinstance(item, Frame)] == [1, 2]
    assert {item.index: item.reason for item in items if isinstance(item, RejectedFrame)} == {
        1: DropReason.UNREADABLE,
        2: DropReason.UNREADABLE,
        3: DropReason.UNREADABLE,
        4: DropReason.TOO_SMALL,
        5: DropReason.TOO_LARGE,
        6: DropReason.DUPLICATE,
        7: DropReason.UNREADABLE,
    }
    details = [item.detail for item in items if isinstance(item, RejectedFrame)]
    assert all(details)
    assert "No such file" in details[-1]


def test_a_rejected_file_keeps_the_name_it_has_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbut no more")
    (rejected,) = read_rejected(open_folder(tmp_path))
    assert rejected.name == "broken.png"


def test_only_images_with_the_same_bytes_one_after_the_other_are_duplicates(tmp_path: Path) -> None:
    for name, shade in [("0.jpg", 1), ("1.jpg", 1), ("2.jpg", 2), ("3.jpg", 1), ("4.jpg", 1)]:
        write_image(tmp_path / name, shade)
    rejected = read_rejected(open_folder(tmp_path))
    assert [(item.index, item.reason) for item in rejected] == [
        (1, DropReason.DUPLICATE),
        (4, DropReason.DUPLICATE),
    ]


def test_a_file_that_vanished_since_the_folder_was_listed_is_unreadable(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg")
    folder = open_folder(tmp_path)
    (tmp_path / "a.jpg").unlink()
    (rejected,) = read_rejected(folder)
    assert rejected.reason is DropReason.UNREADABLE


def test_every_nth_file_is_taken_and_the_number_of_frames_is_limited(tmp_path: Path) -> None:
    for number in range(10):
        write_image(tmp_path / f"{number}.jpg", number * 20)
    (tmp_path / "3.jpg").write_bytes(b"broken")
    folder = open_folder(tmp_path, every_nth_frame=3)
    assert folder.info.num_frames == 4
    assert [(item.index, isinstance(item, Frame)) for item in read(folder)] == [
        (0, True),
        (3, False),
        (6, True),
        (9, True),
    ]
    assert open_folder(tmp_path, every_nth_frame=3, max_frames=2).info.num_frames == 2


def test_images_share_a_camera_by_model_focal_length_and_size(tmp_path: Path) -> None:
    write_photo(tmp_path / "0.jpg", model="One", focal_mm=4.3, size=(96, 80))
    write_photo(tmp_path / "01.jpg", model="One", focal_mm=4.3, size=(96, 80))
    write_photo(tmp_path / "002.jpg", model="One", focal_mm=8.6, size=(96, 80))
    write_photo(tmp_path / "0003.jpg", model="Two", focal_mm=4.3, size=(96, 80))
    write_photo(tmp_path / "00004.jpg", model="One", focal_mm=4.3, size=(80, 96))
    shared = [frame.camera_key for frame in read_frames(open_folder(tmp_path))]
    assert shared[0] == shared[1]
    assert len(set(shared)) == 4
    own = read_frames(open_folder(tmp_path, single_camera_per_size=False))
    assert len({frame.camera_key for frame in own}) == 5


def test_a_zoom_that_exif_tells_makes_a_camera_of_its_own(tmp_path: Path) -> None:
    equivalent, digital_zoom, serial, lens = 0xA405, 0xA404, 0xA431, 0xA434
    tags: list[dict[int, int | float | str]] = [
        {equivalent: 26, digital_zoom: 1.0},
        {equivalent: 26},  # the same: a ratio of 1 is none
        {equivalent: 39, digital_zoom: 1.5},
        {digital_zoom: 1.5},
        {equivalent: 26, serial: "123"},
        {equivalent: 26, lens: "a lens"},
    ]
    for number, of_photo in enumerate(tags):
        write_photo(tmp_path / f"{number}.jpg", tags=of_photo)
    keys = [frame.camera_key for frame in read_frames(open_folder(tmp_path))]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 5


def test_focal_lengths_of_a_zoom_lens_that_are_close_make_one_camera(tmp_path: Path) -> None:
    for number, focal_mm in enumerate((24.0, 24.1, 23.9, 35.0, 24.05)):
        write_photo(tmp_path / f"{number}.jpg", focal_mm=focal_mm)
    keys = [frame.camera_key for frame in read_frames(open_folder(tmp_path))]
    assert keys[0] == keys[1] == keys[2] == keys[4] == "One|24mm|96x80"
    assert keys[3] == "One|35mm|96x80"


def test_a_turned_photo_has_the_size_and_camera_of_its_upright_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (96, 80), (200, 10, 10)).save(tmp_path / "a.jpg", exif=exif.tobytes())
    (frame,) = read_frames(open_folder(tmp_path))
    assert (frame.width, frame.height, frame.camera_key) == (80, 96, "80x96")
    assert frame.jpeg is None


def test_leaving_early_ends_the_thread(tmp_path: Path) -> None:
    for number in range(5):
        write_image(tmp_path / f"{number}.jpg", number * 20)

    async def leave() -> None:
        frames = open_folder(tmp_path).frames()
        first = await anext(frames)
        assert isinstance(first, Arrival) and first.index == 0
        await frames.aclose()
        for thread in threading.enumerate():
            if thread.name.startswith(THREAD_NAME_START):
                await asyncio.to_thread(thread.join, 5.0)

    asyncio.run(leave())
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(THREAD_NAME_START)]


def test_a_real_drone_set_has_focal_length_and_position_on_every_image() -> None:
    path = DATA / "seneca" / "images"
    if not path.exists():
        pytest.skip("the set seneca is not here")
    frames = read_frames(open_folder(path, every_nth_frame=30))
    assert frames
    assert len({frame.camera_key for frame in frames}) == 1
    for frame in frames:
        assert frame.intrinsics_prior is not None
        assert frame.intrinsics_prior.focal_px == pytest.approx(535.2, abs=0.1)
        assert frame.gps is not None
        assert frame.jpeg == (path / frame.name).read_bytes()


# -- sizes and turns ------------------------------------------------------------------------------


def test_sizes_are_known_before_the_photos_come_and_what_is_no_image_has_none(
    tmp_path: Path,
) -> None:
    write_image(tmp_path / "1.jpg", size=(96, 80))
    (tmp_path / "2.jpg").write_text("no image")
    (tmp_path / "3.jpg").symlink_to(tmp_path / "missing.jpg")
    write_image(tmp_path / "4.png", size=(120, 90))
    assert list(open_folder(tmp_path).image_sizes()) == [(96, 80), (120, 90)]


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 1), (8, 3), (0, 0)])
def test_photos_say_how_they_were_turned(orientation: int, turns: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = Image.new("RGB", (120, 90), "red")
    stored.paste("blue", (0, 0, 60, 45))  # at the top left
    stored.save(tmp_path / "a.png", exif=exif)
    (frame,) = read(open_folder(tmp_path))
    assert isinstance(frame, Frame)
    assert frame.quarter_turns == turns
    np.testing.assert_array_equal(frame.pixels, np.rot90(np.asarray(stored), -turns))


# -- what is no file ------------------------------------------------------------------------------


def write_oddities(folder: Path) -> dict[str, str]:
    """Names of photos that stand for something else, and the reason each is dropped for."""
    os.mkfifo(folder / "fifo")
    for name, target in (("1.jpg", "/dev/zero"), ("2.jpg", folder / "fifo"), ("3.jpg", folder)):
        (folder / name).symlink_to(target)
    with (folder / "4.jpg").open("wb") as file:
        file.truncate(100 * 2**30)
    return {
        "1.jpg": "device",
        "2.jpg": "FIFO",
        "3.jpg": "folder",
        "4.jpg": "too large, 1.07e+05 MB",
    }


def test_devices_fifos_folders_and_giants_are_dropped_unread_and_the_others_taken(
    tmp_path: Path,
) -> None:
    words = write_oddities(tmp_path)
    write_image(tmp_path / "5.jpg", 50)
    folder = open_folder(tmp_path)
    assert list(folder.image_sizes()) == [(96, 80)]
    *rejected, frame = read(folder)
    assert isinstance(frame, Frame)
    for item, (name, said) in zip(rejected, words.items(), strict=True):
        assert isinstance(item, RejectedFrame)
        assert item.name == name
        assert said in item.detail
        is_large = name == "4.jpg"
        assert item.reason is (DropReason.TOO_LARGE if is_large else DropReason.UNREADABLE)


@pytest.mark.parametrize("name", ["fifo.jpg", "device.jpg", "to_fifo.png"])
def test_one_photo_that_is_no_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "to_fifo.png").symlink_to(tmp_path / "fifo.jpg")
    with pytest.raises(SourceError, match=f"{name}: cannot be read: is a "):
        open_folder(tmp_path / name)


def test_a_photo_that_does_not_fit_in_memory_is_a_counted_drop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(_: bytes) -> None:
        raise MemoryError

    write_image(tmp_path / "1.jpg", 50)
    monkeypatch.setattr(decoding, "_decode", decode)
    (rejected,) = read_rejected(open_folder(tmp_path))
    assert rejected.reason is DropReason.TOO_LARGE
    assert rejected.detail == "96 x 80 px do not fit in memory"
