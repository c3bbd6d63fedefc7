"""Masks from image files: which pixels may be used, and of which image they are."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from adapters.images.exif import upright
from adapters.images.masks import MaskImage, decode_mask, fit_mask
from engine.config import SourcesConfig
from engine.types import BoolArray
from tests.support.mask_images import encoded, grey_image, some_mask

WIDTH, HEIGHT = 96, 72
MASK = some_mask(WIDTH, HEIGHT)
QUARTER_TURNS = (5, 6, 7, 8)
OTHER_TURNS = (2, 3, 4)


def decoded(data: bytes) -> BoolArray:
    image = decode_mask(data, config=SourcesConfig())
    assert isinstance(image, MaskImage)
    return image.mask


def palette_image(*, transparent: bool = False) -> bytes:
    image = Image.fromarray(MASK.astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 10, 200, 10])
    return encoded(image, transparency=0) if transparent else encoded(image)


def with_alpha(color: Image.Image, mask: BoolArray) -> bytes:
    return encoded(Image.merge("RGBA", (*color.convert("RGB").split(), grey_image(mask))))


def deep_image() -> bytes:
    return encoded(Image.fromarray(np.where(MASK, 3, 0).astype(np.uint16)))


@pytest.mark.parametrize(
    "data",
    [
        encoded(grey_image(MASK)),
        encoded(grey_image(MASK, white=1)),  # labels
        encoded(grey_image(MASK).convert("1")),
        encoded(grey_image(MASK).convert("RGB")),
        encoded(Image.merge("RGB", (Image.new("L", (WIDTH, HEIGHT)),) * 2 + (grey_image(MASK),))),
        palette_image(),
        palette_image(transparent=True),
        deep_image(),
        with_alpha(grey_image(MASK), np.ones_like(MASK)),  # opaque
        with_alpha(Image.new("RGB", (WIDTH, HEIGHT)), MASK),  # black and cut out
        with_alpha(Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255)), MASK),
        encoded(grey_image(MASK), "TIFF"),
        encoded(grey_image(MASK).convert("RGB"), "BMP"),
    ],
    ids=[
        "grey",
        "labels",
        "1-bit",
        "rgb",
        "one channel of three",
        "palette",
        "palette with transparency",
        "16-bit",
        "opaque rgba",
        "black rgba",
        "white rgba",
        "tiff",
        "bmp",
    ],
)
def test_black_is_left_out_in_every_kind_of_image(data: bytes) -> None:
    assert np.array_equal(decoded(data), MASK)


def test_what_is_cut_out_of_a_photo_is_left_out() -> None:
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(1, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    assert np.array_equal(decoded(with_alpha(photo, MASK)), MASK)


@pytest.mark.parametrize(("kind", "white"), [("JPEG", 255), ("JPEG", 90), ("WEBP", 255)])
def test_lossy_files_mask_what_was_black_before(kind: str, white: int) -> None:
    data = encoded(grey_image(MASK, white=white), kind, quality=60)
    shades = np.unique(np.asarray(Image.open(io.BytesIO(data)).convert("L")))
    assert len(shades) > 2  # so black is not all 0 any more
    assert (decoded(data) != MASK).mean() < 0.02


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("is_used", [False, True])
def test_one_shade_is_all_or_nothing(kind: str, *, is_used: bool) -> None:
    mask = np.full((HEIGHT, WIDTH), is_used)
    assert np.array_equal(decoded(encoded(grey_image(mask), kind)), mask)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"nothing of the kind", "is no image"),
        (encoded(grey_image(MASK), "JPEG")[:-20], "is truncated"),
        (encoded(grey_image(MASK))[:60], "is damaged"),
    ],
)
def test_what_is_no_mask_is_said_in_words(data: bytes, words: str) -> None:
    assert decode_mask(data, config=SourcesConfig()) == words


def test_a_bomb_is_not_decoded() -> None:
    config = SourcesConfig(max_image_megapixels=0.001)
    assert decode_mask(encoded(grey_image(MASK)), config=config) == "is too large, 96 x 72 px"


# -- of which image -------------------------------------------------------------------------------


def fitted(mask: BoolArray, *, size: tuple[int, int], orientation: int = 1) -> BoolArray:
    made = fit_mask(MaskImage(mask=mask), size=size, orientation=orientation)
    assert isinstance(made, np.ndarray)
    assert made.shape == size[::-1] and not made.flags.writeable
    return made


@pytest.mark.parametrize("orientation", QUARTER_TURNS)
def test_a_mask_of_the_stored_image_turns_with_it(orientation: int) -> None:
    made = fitted(MASK, size=(HEIGHT, WIDTH), orientation=orientation)
    assert np.array_equal(made, upright(MASK, orientation))


@pytest.mark.parametrize("orientation", QUARTER_TURNS)
def test_a_mask_of_the_image_as_shown_stays(orientation: int) -> None:
    assert np.array_equal(fitted(MASK, size=(WIDTH, HEIGHT), orientation=orientation), MASK)


@pytest.mark.parametrize("orientation", OTHER_TURNS)
def test_a_mask_that_could_be_of_either_is_of_the_stored_image(orientation: int) -> None:
    made = fitted(MASK, size=(WIDTH, HEIGHT), orientation=orientation)
    assert np.array_equal(made, upright(MASK, orientation))


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_mask_with_an_orientation_of_its_own_is_of_the_image_as_shown(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    seen = upright(MASK, orientation)
    size = (seen.shape[1], seen.shape[0])
    image = decode_mask(encoded(grey_image(MASK), exif=exif.tobytes()), config=SourcesConfig())
    assert isinstance(image, MaskImage)
    made = fit_mask(image, size=size, orientation=orientation)
    assert np.array_equal(made, seen)


@pytest.mark.parametrize("times", [2, 3])
def test_a_smaller_mask_is_scaled_to_the_nearest_pixel(times: int) -> None:
    made = fitted(MASK, size=(times * WIDTH, times * HEIGHT))
    assert np.array_equal(made, MASK.repeat(times, axis=0).repeat(times, axis=1))


def test_a_size_that_was_rounded_still_fits() -> None:
    assert fitted(some_mask(67, 50), size=(1000, 750)).any()  # 66.67 px
    assert fitted(some_mask(2000, 1499), size=(1000, 750)).any()


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (WIDTH, HEIGHT + 4), (100, 100)])
def test_a_mask_of_another_shape_is_refused_with_both_sizes(size: tuple[int, int]) -> None:
    words = fit_mask(MaskImage(mask=MASK), size=size)
    assert words == f"has 96 x 72 px, the image {size[0]} x {size[1]} px"
