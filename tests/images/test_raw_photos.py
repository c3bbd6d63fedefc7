"""Raw photos: their preview, or what LibRaw makes of them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from adapters.images.decoding import DecodedImage, RefusedImage
from adapters.images.raw_photos import decode_raw
from engine.config import SourcesConfig
from engine.types import DropReason, Uint8Array
from tests.support.raw_files import write_dng

SIZE = (160, 120)


def blocks() -> Uint8Array:
    """Four areas of one colour each, a red one at the top left."""
    image = np.full((SIZE[1], SIZE[0], 3), 40, np.uint8)
    image[:60, :80] = (200, 30, 30)
    image[60:, :80] = (30, 200, 30)
    image[60:, 80:] = (30, 30, 200)
    return image


def jpeg(pixels: Uint8Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def decoded(data: bytes) -> DecodedImage:
    image = decode_raw(data, config=SourcesConfig())
    assert isinstance(image, DecodedImage), image
    return image


def brightest_channel(pixels: Uint8Array) -> int:
    """Of the area at the top left."""
    return int(pixels[10:40, 10:40].mean(axis=(0, 1)).argmax())


def test_a_preview_of_full_size_is_the_photo_with_the_tags_of_the_raw_file() -> None:
    preview = jpeg(np.ascontiguousarray(255 - blocks()))  # not what the raw image shows
    image = decoded(write_dng(blocks(), preview=preview, preview_size=SIZE, model="Drone"))
    assert image.jpeg is not None
    assert (image.exif.make, image.exif.model) == ("Maker", "Drone")
    assert np.abs(image.pixels.astype(int) - (255 - blocks().astype(int))).mean() < 4.0


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 1), (8, 3)])
def test_a_turned_raw_photo_comes_upright(orientation: int, turns: int) -> None:
    preview = jpeg(blocks())
    shown = write_dng(blocks(), preview=preview, preview_size=SIZE, orientation=orientation)
    for image in (decoded(shown), decoded(write_dng(blocks(), orientation=orientation))):
        assert image.exif.quarter_turns == turns
        expected = np.ascontiguousarray(np.rot90(blocks(), -turns))
        assert image.pixels.shape == expected.shape
        assert brightest_channel(image.pixels) == brightest_channel(expected)


def test_a_raw_photo_whose_preview_is_small_or_missing_is_developed() -> None:
    small = np.ascontiguousarray(blocks()[::4, ::4])
    for data in (
        write_dng(blocks()),
        write_dng(blocks(), preview=jpeg(small), preview_size=(40, 30)),
    ):
        image = decoded(data)
        assert image.pixels.shape == (SIZE[1], SIZE[0], 3)
        assert image.jpeg is None
        assert brightest_channel(image.pixels) == 0


def test_what_is_no_raw_photo_is_refused_and_one_too_large_before_it_is_developed() -> None:
    refused = decode_raw(b"II*\0 no raw photo", config=SourcesConfig())
    assert isinstance(refused, RefusedImage)
    assert refused.reason is DropReason.UNREADABLE
    assert "LibRaw" in refused.detail
    large = decode_raw(write_dng(blocks()), config=SourcesConfig(max_image_megapixels=0.01))
    assert isinstance(large, RefusedImage)
    assert large.reason is DropReason.TOO_LARGE
