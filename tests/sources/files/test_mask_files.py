"""Masks in a folder beside photos: whose they are, and what becomes of bad ones."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import pytest
from PIL import Image

from adapters.images import masks
from adapters.images.exif import upright
from engine.types import BoolArray, DropReason, Frame, RejectedFrame, SourceNotice
from tests.sources.files.test_image_folder import (
    open_folder,
    read,
    read_frames,
    read_items,
    write_image,
)
from tests.support.mask_images import encoded, grey_image, some_mask, write_mask

SIZE = (96, 80)
MASK = some_mask(*SIZE)


def has_mask(frame: Frame, expected: BoolArray) -> bool:
    return frame.mask is not None and np.array_equal(frame.mask, expected)


def notices(path: Path) -> list[str]:
    items = read_items(open_folder(path))
    return [item.detail for item in items if isinstance(item, SourceNotice)]


@pytest.mark.parametrize(
    "mask_name", ["a.jpg.png", "a.png", "a.jpg", "a.PNG", "a.jpg.jpg", "a_mask.png", "a.mask.png"]
)
@pytest.mark.parametrize("given", [".", "images"])
def test_a_photo_has_the_mask_of_its_name(tmp_path: Path, mask_name: str, given: str) -> None:
    write_image(tmp_path / "images" / "a.jpg", 50)
    write_image(tmp_path / "images" / "b.jpg", 90)
    write_mask(tmp_path / "masks" / mask_name, MASK)
    masked, whole = read_frames(open_folder(tmp_path / given))
    assert [masked.name, whole.name] == ["a.jpg", "b.jpg"]
    assert masked.camera_key == whole.camera_key == "96x80"
    assert masked.mask is not None
    assert (masked.mask != MASK).mean() < 0.02  # a JPEG blurs the edge
    assert whole.mask is None


@pytest.mark.parametrize("mask_name", ["a.tif.png", "a.png", "a_mask.png"])
def test_a_photo_that_is_encoded_anew_has_the_mask_of_its_own_name(
    tmp_path: Path, mask_name: str
) -> None:
    write_image(tmp_path / "a.tif", 50)
    write_mask(tmp_path / "masks" / mask_name, MASK)
    (frame,) = read_frames(open_folder(tmp_path))
    assert frame.name == "a.tif.jpg"
    assert has_mask(frame, MASK)


def test_colmaps_name_goes_before_the_others(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "a.jpg")
    write_mask(tmp_path / "masks" / "a.jpg.png", MASK)
    write_mask(tmp_path / "masks" / "a.png", ~MASK)
    (frame,) = read_frames(open_folder(tmp_path))
    assert has_mask(frame, MASK)


@pytest.mark.parametrize("photos", ["images", "any name"])
def test_masks_may_lie_inside_the_folder_and_have_its_subfolders(
    tmp_path: Path, photos: str
) -> None:
    folder = tmp_path / photos
    for side, mask in (("left", MASK), ("right", ~MASK)):
        write_image(folder / side / "0.jpg", 10 * len(side))
        write_mask(folder / "masks" / side / "0.png", mask)
    left, right = read_frames(open_folder(folder))
    assert [left.camera_key, right.camera_key] == ["left|96x80", "right|96x80"]
    assert has_mask(left, MASK)
    assert has_mask(right, ~MASK)


def test_masks_beside_subfolders_of_images_are_found(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "left" / "0.jpg")
    write_mask(tmp_path / "masks" / "left" / "0.jpg.png", MASK)
    (frame,) = read_frames(open_folder(tmp_path))
    assert (frame.name, frame.camera_key) == ("left/0.jpg", "left|96x80")
    assert has_mask(frame, MASK)


def test_a_folder_called_masks_can_hold_photos_of_its_own(tmp_path: Path) -> None:
    write_image(tmp_path / "masks" / "a.jpg")
    (frame,) = read_frames(open_folder(tmp_path / "masks"))
    assert frame.mask is None


def test_reduced_copies_of_the_images_are_left_out_and_named(tmp_path: Path) -> None:
    for number, name in enumerate(["images", "images_2", "images_4"]):
        write_image(tmp_path / name / "a.jpg", 20 * number)
    folder = open_folder(tmp_path)
    assert folder.info.num_frames == 1
    assert [frame.name for frame in read_frames(folder)] == ["a.jpg"]
    (words,) = notices(tmp_path)
    assert words == (
        "3 files: 1 taken; left out: 1 .jpg (copies or masks in images_2/);"
        " 1 .jpg (copies or masks in images_4/)"
    )


def test_folders_without_masks_or_reduced_copies_are_cameras_as_before(tmp_path: Path) -> None:
    for number, folder in enumerate(["images", "infrared"]):
        write_image(tmp_path / folder / "a.jpg", 20 * number)
    names = [frame.name for frame in read_frames(open_folder(tmp_path))]
    assert names == ["images/a.jpg", "infrared/a.jpg"]
    assert notices(tmp_path) == []


def test_what_has_no_mask_and_what_masks_nothing_is_counted_once(tmp_path: Path) -> None:
    for number in range(3):
        write_image(tmp_path / "images" / f"{number}.jpg", 20 * number)
    for name in ("1.jpg.png", "7.jpg.png", "8.jpg.png"):
        write_mask(tmp_path / "masks" / name, MASK)
    (words,) = notices(tmp_path)
    assert words == (
        f"1 of 3 photos have a mask in {tmp_path / 'masks'}; the others are used whole; "
        "2 masks belong to no photo, the first 7.jpg.png"
    )


def test_masks_of_which_none_belongs_to_a_photo_are_said_too(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "a.jpg")
    write_mask(tmp_path / "masks" / "mask_1.png", MASK)
    write_mask(tmp_path / "masks" / "mask_0.png", MASK)
    (words,) = notices(tmp_path / "images")
    assert words == (
        f"0 of 1 photos have a mask in {tmp_path / 'masks'}; the others are used whole; "
        "2 masks belong to no photo, the first mask_0.png"
    )


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"text", "its mask a.png is no image"),
        (
            encoded(grey_image(some_mask(80, 96))),
            "its mask a.png has 80 x 96 px, the image 96 x 80 px",
        ),
    ],
)
def test_a_photo_whose_mask_is_bad_is_not_used_and_says_why(
    tmp_path: Path, data: bytes, detail: str
) -> None:
    write_image(tmp_path / "images" / "a.jpg", 50)
    write_image(tmp_path / "images" / "b.jpg", 90)
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").write_bytes(data)
    rejected, frame = read(open_folder(tmp_path))
    assert isinstance(rejected, RejectedFrame) and isinstance(frame, Frame)
    assert (frame.name, frame.mask) == ("b.jpg", None)
    assert (rejected.name, rejected.reason) == ("a.jpg", DropReason.BAD_MASK)
    assert rejected.detail == detail


@pytest.mark.parametrize("made_for", ["stored", "shown"])
def test_the_mask_of_a_photo_that_exif_turns_lies_on_what_it_was_made_for(
    tmp_path: Path, made_for: str
) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    (tmp_path / "images").mkdir()
    stored = np.where(MASK, 200, 20).astype(np.uint8)  # bright where it may be used
    Image.fromarray(stored).save(tmp_path / "images" / "a.jpg", exif=exif.tobytes(), quality=95)
    mask = MASK if made_for == "stored" else upright(MASK, 6)
    write_mask(tmp_path / "masks" / "a.jpg.png", mask)
    (frame,) = read_frames(open_folder(tmp_path))
    assert frame.mask is not None
    bright = cv2.cvtColor(frame.pixels, cv2.COLOR_RGB2GRAY) > 110
    assert (bright != frame.mask).mean() < 0.01


def test_names_may_be_anything(tmp_path: Path) -> None:
    name = PurePosixPath("été [1] (2).jpg")
    write_image(tmp_path / "images" / str(name))
    write_mask(tmp_path / "masks" / f"{name}.png", MASK)
    (frame,) = read_frames(open_folder(tmp_path))
    assert has_mask(frame, MASK)


def test_a_mask_that_is_no_file_or_far_too_large_is_bad_and_never_waited_for(
    tmp_path: Path,
) -> None:
    for number in range(1, 4):
        write_image(tmp_path / "images" / f"{number}.jpg", 50 * number)
    folder = tmp_path / "masks"
    folder.mkdir()
    os.mkfifo(folder / "1.png")
    (folder / "2.png").symlink_to("/dev/zero")
    with (folder / "3.png").open("wb") as file:
        file.truncate(100 * 2**30)
    details = []
    for item in read(open_folder(tmp_path)):
        assert isinstance(item, RejectedFrame)
        assert item.reason is DropReason.BAD_MASK
        details.append(item.detail)
    for detail, words in zip(details, ("a FIFO", "a device", "too large"), strict=True):
        assert words in detail


def test_a_mask_that_does_not_fit_in_memory_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(_: bytes) -> None:
        raise MemoryError

    write_image(tmp_path / "images" / "1.jpg", 50)
    write_mask(tmp_path / "masks" / "1.png", MASK)
    monkeypatch.setattr(masks, "_decode", decode)
    (rejected,) = read(open_folder(tmp_path))
    assert isinstance(rejected, RejectedFrame)
    assert rejected.detail == "its mask 1.png does not fit in memory, 96 x 80 px"
