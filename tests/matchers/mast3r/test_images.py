"""Network images: which size an image gets, what its pixels are, and the way back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from adapters.matchers.mast3r.images import NetworkImage, normalise, prepare_image
from engine.types import Float64Array, Uint8Array
from tests.support.paths import GOLDEN

SIZES: list[dict[str, Any]] = json.loads((GOLDEN / "mast3r" / "load_images_sizes.json").read_text())


def blank(width: int, height: int) -> Uint8Array:
    return np.zeros((height, width, 3), np.uint8)


def soft_noise(width: int, height: int, *, seed: int = 0) -> Uint8Array:
    """An image with detail of a few pixels and more, (height, width, 3)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.rfftfreq(width), np.fft.fftfreq(height)[:, None])
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency
    values = np.fft.irfft2(spectrum, s=(height, width)).transpose(1, 2, 0)
    values = 128.0 + 45.0 * (values - values.mean()) / values.std()
    pixels: Uint8Array = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return pixels


def blob(width: int, height: int, *, center_xy: Float64Array, sigma_px: float) -> Uint8Array:
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    squares = (x - center_xy[0]) ** 2 + (y - center_xy[1]) ** 2
    grey = 250.0 * np.exp(-squares / (2.0 * sigma_px**2))
    return np.repeat(np.rint(grey).astype(np.uint8)[:, :, None], 3, axis=2)


def centroid_xy(image: NDArray[Any]) -> Float64Array:
    weights = image[:, :, 0].astype(np.float64)
    x, y = np.arange(image.shape[1]) + 0.5, np.arange(image.shape[0])[:, None] + 0.5
    moments_xy = np.array([(weights * x).sum(), (weights * y).sum()])
    return np.asarray(moments_xy / weights.sum())


def size_of(image: NetworkImage) -> list[int]:
    return [image.width, image.height]


# -- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SIZES, ids=lambda case: f"{case['w']}x{case['h']}")
def test_every_image_gets_the_size_that_the_checkpoints_were_made_for(case: dict[str, Any]) -> None:
    pixels = blank(case["w"], case["h"])
    assert size_of(prepare_image(pixels)) == case["512_square_ok"]
    assert size_of(prepare_image(pixels, crop_square=True)) == case["512"]


@pytest.mark.parametrize(
    ("size", "edge_px", "expected"),
    [
        ((4000, 1000), 512, [512, 128]),  # 1:4 panoramas, both ways
        ((1000, 4000), 512, [128, 512]),
        ((4000, 1000), 64, [64, 16]),
        ((8000, 1000), 64, [64, 16]),  # the short side would be 8 px
        ((20000, 10), 512, [512, 16]),
        ((3, 1), 512, [512, 160]),
        ((1, 1), 64, [64, 64]),
        ((64, 64), 64, [64, 64]),
        ((640, 480), 500, [496, 368]),  # an edge that is not whole tokens is rounded down
        ((17, 16), 16, [16, 16]),
    ],
)
def test_any_image_gives_at_least_one_token_a_side(
    size: tuple[int, int], edge_px: int, expected: list[int]
) -> None:
    image = prepare_image(blank(*size), edge_px=edge_px)
    assert size_of(image) == expected
    np.testing.assert_allclose(  # the middle stays the middle, to half a network pixel
        image.to_original([[image.width / 2, image.height / 2]])[0],
        np.array(size) / 2,
        atol=0.51 * image.mapping.scale_xy.max(),
    )


def test_a_square_crop_leaves_a_token_however_small_the_edge() -> None:
    assert size_of(prepare_image(blank(100, 100), edge_px=16, crop_square=True)) == [16, 16]


def test_an_edge_below_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="edge_px: 15, expected at least 16"):
        prepare_image(blank(64, 48), edge_px=15)


# -- the way back ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "edge_px"),
    [
        ((640, 480), 512),
        ((1241, 376), 512),
        ((375, 1242), 512),
        ((300, 211), 512),
        ((500, 500), 64),
    ],
)
@pytest.mark.parametrize("at", [(0.3, 0.4), (0.71, 0.62)])
def test_a_blob_seen_at_network_size_lies_where_it_was_drawn(
    size: tuple[int, int], edge_px: int, at: tuple[float, float]
) -> None:
    center_xy = np.array(at) * size + 0.25
    sigma_px = 2.0 * max(1.0, max(size) / edge_px)
    image = prepare_image(blob(*size, center_xy=center_xy, sigma_px=sigma_px), edge_px=edge_px)
    found_xy = image.to_original([centroid_xy(image.pixels)])[0]
    assert np.abs(found_xy - center_xy).max() < 0.1


def test_points_go_to_network_pixels_and_back_unchanged() -> None:
    image = prepare_image(blank(1241, 376))
    points_xy = np.random.default_rng(0).uniform(-50.0, 1300.0, (100, 2))
    back_xy = image.to_original(image.to_network(points_xy))
    np.testing.assert_allclose(back_xy, points_xy, rtol=0, atol=1e-10)
    assert image.to_original(np.empty((0, 2))).shape == (0, 2)


def test_the_cropped_margin_lies_beyond_the_network_image() -> None:
    image = prepare_image(blank(1241, 376))  # 512 x 155, of which 5 rows above and 6 below are cut
    np.testing.assert_allclose(image.to_network([[0.0, 0.0]])[0], [0.0, -5.0])
    np.testing.assert_allclose(image.to_network([[1241.0, 376.0]])[0], [512.0, 150.0])


# -- pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "method", "rms"),
    [
        ((300, 200), Image.Resampling.BICUBIC, 0.5),
        ((640, 480), Image.Resampling.LANCZOS, 3.0),
        ((1920, 1080), Image.Resampling.LANCZOS, 3.0),
    ],
)
def test_pixels_are_close_to_those_that_the_network_was_trained_on(
    size: tuple[int, int], method: Image.Resampling, rms: float
) -> None:
    pixels = soft_noise(*size)
    width, height = 512, round(size[1] * 512 / size[0])
    expected = np.asarray(Image.fromarray(pixels).resize((width, height), method), np.float64)
    image = prepare_image(pixels)
    top = height // 2 - image.height // 2
    difference = image.pixels - expected[top : top + image.height]
    assert 0.0 < np.sqrt((difference**2).mean()) < rms


def test_an_image_that_fits_is_not_resampled() -> None:
    pixels = soft_noise(512, 390)
    image = prepare_image(pixels)
    np.testing.assert_array_equal(image.pixels, pixels[3:387])
    np.testing.assert_array_equal(image.mapping.offset_xy, [0.0, 3.0])


def test_read_only_pixels_are_left_alone() -> None:
    pixels = soft_noise(160, 120)
    pixels.flags.writeable = False
    before = pixels.copy()
    image = prepare_image(pixels, edge_px=64)
    np.testing.assert_array_equal(pixels, before)
    assert not image.pixels.flags.writeable


def test_normalised_pixels_run_from_minus_one_to_one() -> None:
    images = torch.tensor([[[[0, 51, 255], [255, 0, 102]]]], dtype=torch.uint8)  # (1, 1, 2, 3)
    expected = torch.tensor([[[[-1.0, 1.0]], [[-0.6, -1.0]], [[1.0, -0.2]]]])  # (1, 3, 1, 2)
    torch.testing.assert_close(normalise(images), expected, rtol=0, atol=1e-6)
    assert images.max() == 255
