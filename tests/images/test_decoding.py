"""Encoded images to upright RGB pixels."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageOps

from adapters.images import decoding
from adapters.images.decoding import (
    DecodedImage,
    RefusedImage,
    decode_image,
    read_image_header,
)
from engine.config import SourcesConfig
from engine.types import DropReason, Uint8Array

WIDTH, HEIGHT = 160, 120


def scene(width: int = WIDTH, height: int = HEIGHT) -> Uint8Array:
    """A smooth coloured picture (H, W, 3) RGB that JPEG keeps well; no symmetry."""
    coarse = np.random.default_rng(3).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(picture, np.uint8)


def encoded(image: Image.Image | np.ndarray[Any, Any], kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes, **limits: Any) -> DecodedImage:
    image = decode_image(data, config=SourcesConfig(**limits))
    assert isinstance(image, DecodedImage)
    return image


def refused(data: bytes, **limits: Any) -> RefusedImage:
    image = decode_image(data, config=SourcesConfig(**limits))
    assert isinstance(image, RefusedImage)
    return image


def mean_difference(first: Uint8Array, second: Uint8Array) -> float:
    assert first.shape == second.shape
    return float(np.abs(first.astype(int) - second.astype(int)).mean())


def with_orientation(orientation: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x112] = orientation
    return {"exif": exif.tobytes()}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True, "subsampling": 0}),
        ("PNG", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"quality": 95}),
        ("WEBP", {"quality": 95, **with_orientation(1)}),
    ],
)
def test_every_format_gives_its_size_before_and_its_pixels_after_decoding(
    kind: str, options: dict[str, Any]
) -> None:
    data = encoded(scene(), kind, **options)
    header = read_image_header(data)
    assert header is not None
    assert (header.width, header.height, header.is_complete) == (WIDTH, HEIGHT, True)
    image = decoded(data)
    is_lossless = kind in {"PNG", "TIFF", "BMP"} or "lossless" in options
    assert mean_difference(image.pixels, scene()) <= (0.0 if is_lossless else 4.0)
    assert image.jpeg == (data if kind == "JPEG" else None)


def test_a_jpeg_is_passed_through_when_its_bytes_decode_to_the_pixels() -> None:
    data = encoded(scene(), "JPEG", quality=90, **with_orientation(1))
    image = decoded(data)
    assert image.jpeg == data
    np.testing.assert_array_equal(image.pixels, np.asarray(Image.open(io.BytesIO(data))))


def test_a_grey_jpeg_is_passed_through_and_becomes_rgb() -> None:
    data = encoded(Image.fromarray(scene()).convert("L"), "JPEG", quality=95)
    image = decoded(data)
    assert image.jpeg == data
    assert image.pixels.shape == (HEIGHT, WIDTH, 3)
    assert np.ptp(image.pixels, axis=2).max() == 0


def test_a_cmyk_jpeg_becomes_rgb_and_is_not_passed_through() -> None:
    image = decoded(encoded(Image.fromarray(scene()).convert("CMYK"), "JPEG", quality=95))
    assert image.jpeg is None
    assert mean_difference(image.pixels, scene()) < 5.0


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_turned_image_comes_upright_without_its_bytes(kind: str, orientation: int) -> None:
    data = encoded(scene(), kind, lossless=True, quality=95, **with_orientation(orientation))
    image = decoded(data)
    tagged = Image.fromarray(scene())
    tagged.getexif()[0x112] = orientation
    difference = mean_difference(image.pixels, np.asarray(ImageOps.exif_transpose(tagged)))
    assert difference <= (4.0 if kind == "JPEG" else 0.0)
    assert image.exif.orientation == orientation
    assert image.jpeg is None


def test_sixteen_bits_become_eight_by_the_ratio_of_the_ranges() -> None:
    grey = np.linspace(0, 65535, 256 * 128).reshape(128, 256).astype(np.uint16)
    image = decoded(encoded(grey, "PNG"))
    exact = grey / 257.0
    assert image.pixels.dtype == np.uint8
    assert np.abs(image.pixels - exact[..., None]).max() <= 0.5
    assert image.pixels.max() == 255


def test_sixteen_bit_colours_keep_their_order() -> None:
    colour = scene().astype(np.uint16) * 257
    _, buffer = cv2.imencode(".tif", colour[..., ::-1])
    np.testing.assert_array_equal(decoded(buffer.tobytes()).pixels, scene())


def test_alpha_is_left_out() -> None:
    opaque = scene()
    faded = np.dstack([opaque, np.full(opaque.shape[:2], 40, np.uint8)])
    np.testing.assert_array_equal(decoded(encoded(faded, "PNG")).pixels, opaque)


def test_a_palette_becomes_rgb() -> None:
    picture = Image.fromarray(scene()).quantize(64)
    expected = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(decoded(encoded(picture, "PNG")).pixels, expected)


@pytest.mark.parametrize(
    ("kind", "factor"),
    [
        (np.float32, 1.0),
        (np.float32, 1.0 / 255.0),
        (np.float64, 1.0 / 255.0),
        (np.float32, 257.0),
        (np.uint16, 257),
    ],
)
def test_deep_tiffs_become_eight_bits_by_their_full_range(kind: type, factor: float) -> None:
    deep: np.ndarray[Any, Any] = (scene() * np.float64(factor)).astype(kind)
    image = decoded(cv2.imencode(".tif", deep[..., ::-1])[1].tobytes())
    assert mean_difference(image.pixels, scene()) <= 1.0


@pytest.mark.parametrize("bits", [10, 12])
def test_fewer_bits_in_sixteen_are_stretched_until_they_are_seen(bits: int) -> None:
    deep = (scene().astype(np.uint16) << 8) >> (16 - bits)
    image = decoded(cv2.imencode(".png", deep[..., ::-1])[1].tobytes())
    assert np.percentile(image.pixels, 99.9) > 200
    likeness = np.corrcoef(image.pixels.ravel().astype(float), scene().ravel().astype(float))
    assert likeness[0, 1] > 0.99


def test_a_narrow_range_as_of_thermal_cameras_is_stretched() -> None:
    deep = (7000 + scene()[:, :, 0].astype(np.uint16) * 4).astype(np.uint16)
    image = decoded(cv2.imencode(".tif", deep)[1].tobytes())
    assert np.percentile(image.pixels, 1) < 60
    assert np.percentile(image.pixels, 99) > 200


def test_values_that_are_no_numbers_are_black_and_spoil_nothing() -> None:
    deep = scene().astype(np.float32) / 255.0
    deep[:4], deep[4:6] = np.nan, np.inf
    image = decoded(cv2.imencode(".tif", deep[..., ::-1])[1].tobytes())
    assert image.pixels[:4].max() == 0
    assert mean_difference(image.pixels[6:], scene()[6:]) <= 1.0


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_heif_comes_upright_with_its_tags(orientation: int) -> None:
    stored = Image.fromarray(scene())
    stored.getexif()[0x112] = orientation
    exif = Image.Exif()
    exif[0x110], exif[0x112] = "Phone", orientation
    buffer = io.BytesIO()
    heif = pillow_heif.from_pillow(Image.fromarray(scene()))
    heif.save(buffer, quality=95, exif=exif.tobytes())
    header = read_image_header(buffer.getvalue())
    image = decoded(buffer.getvalue())
    expected = np.asarray(ImageOps.exif_transpose(stored))
    assert header is not None
    assert (header.height, header.width) == expected.shape[:2]
    assert mean_difference(image.pixels, expected) <= 6.0
    assert (image.exif.model, image.exif.orientation) == ("Phone", orientation)
    assert image.jpeg is None


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_avif_comes_upright_with_its_tags(orientation: int) -> None:
    data = encoded(scene(), "AVIF", quality=90, **with_orientation(orientation))
    image = decoded(data)
    tagged = Image.fromarray(scene())
    tagged.getexif()[0x112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(tagged))
    assert mean_difference(image.pixels, expected) <= 6.0
    assert image.exif.orientation == orientation


def test_damaged_heif_and_heif_without_its_package_are_refused_with_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(scene())).save(buffer, quality=90)
    data = buffer.getvalue()
    assert "damaged" in refused(data[: len(data) // 2]).detail
    monkeypatch.setattr(decoding, "is_heif_available", lambda: False)
    assert "needs pillow-heif: " in refused(data).detail


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_is_refused_before_decoding(kept: float, progressive: bool) -> None:
    data = encoded(scene(), "JPEG", quality=95, progressive=progressive, exif=thumbnail_exif())
    image = refused(data[: int(len(data) * kept)])
    assert image.reason is DropReason.UNREADABLE
    assert image.detail.startswith(("truncated", "no image"))


def thumbnail_exif() -> bytes:
    """An EXIF block that holds a whole small JPEG, end marker included."""
    return b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + encoded(scene(32, 24), "JPEG")


def test_a_jpeg_filled_up_with_zeros_is_truncated() -> None:
    data = encoded(scene(), "JPEG", quality=95)
    filled = data[: len(data) // 2] + bytes(len(data) // 2)
    assert refused(filled).detail.startswith("truncated")


def test_garbage_behind_the_end_of_a_jpeg_does_no_harm() -> None:
    data = encoded(scene(), "JPEG", quality=95) + b"\0\xff\xd8garbage" * 50
    assert mean_difference(decoded(data).pixels, scene()) < 4.0


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP"])
def test_other_truncated_formats_are_refused_by_the_decoder(kind: str) -> None:
    data = encoded(scene(), kind)
    assert refused(data[: len(data) // 2]).reason is DropReason.UNREADABLE


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8", b"\xff\xd8\xff\xe0", b"BM", b"II*\0"])
def test_what_is_no_image_is_unreadable(data: bytes) -> None:
    assert refused(data).reason is DropReason.UNREADABLE


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP"])
def test_headers_cut_or_changed_anywhere_do_not_raise(kind: str) -> None:
    data = encoded(scene(32, 24), kind, **(with_orientation(1) if kind != "BMP" else {}))
    assert read_image_header(data) is not None
    for length in range(min(len(data), 400)):
        read_image_header(data[:length])
    rng = np.random.default_rng(7)
    for _ in range(500):
        changed = bytearray(data)
        for place in rng.integers(2, min(len(data), 300), 4):
            changed[place] = rng.integers(0, 256)
        read_image_header(bytes(changed))


def test_of_many_segments_of_xmp_the_first_are_read() -> None:
    data = encoded(scene(), "JPEG")
    packet = b"http://ns.adobe.com/xap/1.0/\0" + bytes(60_000)
    segment = b"\xff\xe1" + (len(packet) + 2).to_bytes(2, "big") + packet
    header = read_image_header(data[:2] + 100 * segment + data[2:])
    assert header is not None
    assert (header.width, len(header.xmp)) == (WIDTH, 5 * 60_000)


def test_images_below_the_smallest_edge_are_refused() -> None:
    data = encoded(scene(64, 48), "PNG")
    assert decoded(data, min_image_edge_px=48).pixels.shape == (48, 64, 3)
    assert refused(data, min_image_edge_px=49).reason is DropReason.TOO_SMALL
    assert refused(encoded(scene(1, 1), "JPEG")).reason is DropReason.TOO_SMALL


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP"])
def test_images_above_the_largest_size_are_refused(kind: str) -> None:
    data = encoded(scene(200, 100), kind)
    assert decoded(data, max_image_megapixels=0.02).pixels.shape == (100, 200, 3)
    image = refused(data, max_image_megapixels=0.0199)
    assert (image.reason, image.detail) == (DropReason.TOO_LARGE, "200 x 100 px")


def test_a_header_that_claims_gigapixels_never_reaches_the_decoder() -> None:
    data = bytearray(encoded(scene(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    assert refused(bytes(data)).reason is DropReason.TOO_LARGE


@pytest.mark.slow
def test_a_hundred_megapixels_are_decoded() -> None:
    _, buffer = cv2.imencode(".jpg", np.full((10_000, 10_000), 90, np.uint8))
    image = decoded(buffer.tobytes())
    assert image.pixels.shape == (10_000, 10_000, 3)
    assert abs(int(image.pixels[5_000, 5_000, 1]) - 90) <= 1
