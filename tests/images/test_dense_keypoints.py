"""The table a dense matcher starts with: corners where they are, and a grid over everything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adapters.images.dense_keypoints import dense_features
from engine.config import DenseMatchingConfig
from engine.geometry import usable_at
from engine.matching.keypoint_tables import KeypointTables
from engine.types import Features, Float64Array, Uint8Array
from tests.support.textured_images import frame_of, random_texture, similarity_about

WIDTH, HEIGHT = 320, 240
TEXTURE = random_texture()


def textured(width: int = WIDTH, height: int = HEIGHT, *, scale: float = 1.0) -> Uint8Array:
    motion = similarity_about((0.0, 0.0), scale=scale)
    return TEXTURE.image(width, height, image_from_texture=motion)


def flat(width: int = WIDTH, height: int = HEIGHT) -> Uint8Array:
    return np.full((height, width, 3), 90, np.uint8)


def table(pixels: Uint8Array, **settings: Any) -> Features:
    return dense_features(frame_of(pixels, frame_id=7), DenseMatchingConfig(**settings))


def corners_of(features: Features) -> Float64Array:
    return features.keypoints_xy[features.fixed_rows]


def grid_of(features: Features) -> Float64Array:
    return features.keypoints_xy[features.is_free]


def dot(center_xy: tuple[float, float], *, size: tuple[int, int]) -> Uint8Array:
    """A soft dot at a place in COLMAP's pixels: its middle changes most in all directions."""
    sigma_px = 1.2 * max(1.0, max(size) / 1024)
    x = np.exp(-0.5 * ((np.arange(size[0]) + 0.5 - center_xy[0]) / sigma_px) ** 2)
    y = np.exp(-0.5 * ((np.arange(size[1]) + 0.5 - center_xy[1]) / sigma_px) ** 2)
    grey = np.rint(50.0 + 200.0 * np.outer(y, x)).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


# -- corners --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("corner", "size"),
    [
        ((100.5, 80.5), (WIDTH, HEIGHT)),  # the centre of a pixel
        ((41.5, 200.5), (WIDTH, HEIGHT)),
        ((1200.0, 800.0), (2048, 1536)),  # found on an image of half the size
        ((900.0, 1500.0), (1536, 2048)),
    ],
)
def test_a_corner_is_found_at_its_place_in_colmaps_pixels(
    corner: tuple[float, float], size: tuple[int, int]
) -> None:
    found = corners_of(table(dot(corner, size=size)))
    offset_xy = np.abs(found[0] - corner)
    assert offset_xy.max() <= 0.5 * max(1.0, max(size) / 1024) + 1e-9


def test_corners_are_right_on_average() -> None:
    """Half a pixel of shift would show: a corner is found at one side as often as at the other."""
    rng = np.random.default_rng(0)
    offsets = []
    for corner in rng.uniform((100.0, 60.0), (220.0, 180.0), (100, 2)):
        found = corners_of(table(dot(tuple(corner), size=(WIDTH, HEIGHT))))
        offsets.append(found[0] - corner)
    assert np.abs(np.mean(offsets, axis=0)).max() < 0.1
    assert np.abs(offsets).max() < 0.8


def test_the_strongest_corners_come_first_and_are_some_pixels_apart() -> None:
    many = corners_of(table(textured(), max_corners=2000))
    few = corners_of(table(textured(), max_corners=50))
    assert len(many) > 200
    assert len(few) == 50
    assert np.array_equal(few, many[:50])
    distances_px = np.linalg.norm(many[:, None] - many[None], axis=2)
    assert distances_px[np.triu_indices(len(many), 1)].min() >= 8.0


def test_corners_of_a_large_image_keep_their_distance_on_the_smaller_one() -> None:
    found = corners_of(table(textured(2048, 1536, scale=6.0), max_corners=500))
    distances_px = np.linalg.norm(found[:, None] - found[None], axis=2)
    assert len(found) > 100
    assert distances_px[np.triu_indices(len(found), 1)].min() >= 16.0 - 1e-9


# -- the grid -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(320, 240), (240, 320), (1000, 100), (64, 64), (640, 479)])
def test_free_rows_are_centres_of_a_regular_grid_over_the_image(size: tuple[int, int]) -> None:
    features = table(flat(*size))
    xy = grid_of(features)
    x, y = np.unique(xy[:, 0]), np.unique(xy[:, 1])
    assert len(x) * len(y) == len(xy)
    for centers, edge_px in ((x, size[0]), (y, size[1])):
        cell_px = edge_px / len(centers)
        assert np.allclose(centers, cell_px * (np.arange(len(centers)) + 0.5))
    cells_px = size[0] / len(x), size[1] / len(y)
    assert 0.7 < cells_px[0] / cells_px[1] < 1.4, "about square"
    # What uses the table agrees.
    KeypointTables(DenseMatchingConfig()).add(features, size=size)


def test_corners_and_grid_share_the_room_there_is() -> None:
    for num in (100, 1000, 4096):
        features = table(textured(), max_keypoints=num, max_corners=300)
        num_corners = len(features.fixed_rows)
        assert num_corners == min(num, 300)
        assert 0.9 * (num - num_corners) <= len(grid_of(features)) <= num - num_corners
        assert features.is_free.tolist() == [False] * num_corners + [True] * (
            len(features) - num_corners
        )


def test_without_corners_there_is_only_the_grid() -> None:
    for features in (table(flat()), table(textured(), max_corners=0)):
        assert len(features.fixed_rows) == 0
        assert 0.9 * 4096 < len(features) <= 4096


def test_a_table_full_of_corners_has_no_grid() -> None:
    features = table(textured(), max_keypoints=20, max_corners=500)
    assert (len(features), len(features.fixed_rows)) == (20, 20)
    KeypointTables(DenseMatchingConfig()).add(features, size=(WIDTH, HEIGHT))


# -- the rest of the table ------------------------------------------------------------------------


def test_keypoints_carry_the_colour_of_their_pixel_and_nothing_else() -> None:
    pixels = textured()
    pixels[:, :160] //= np.array([1, 2, 4], np.uint8)
    features = table(pixels)
    columns, lines = features.keypoints_xy.astype(int).T
    assert np.array_equal(features.colors, pixels[lines, columns])
    assert len(np.unique(features.colors, axis=0)) > 50
    assert features.descriptors.shape == (len(features), 0)
    assert features.frame_id == 7


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 3), (9, 16), (64, 64), (1, 3000)])
def test_tiny_images_have_keypoints_inside(shape: tuple[int, int]) -> None:
    height, width = shape
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    features = table(pixels)
    assert len(features) >= 1
    assert (features.keypoints_xy > 0).all()
    assert (features.keypoints_xy < (width, height)).all()
    KeypointTables(DenseMatchingConfig()).add(features, size=(width, height))


def test_the_same_image_gives_the_same_bits() -> None:
    one, other = table(textured()), table(textured())
    assert np.array_equal(one.keypoints_xy, other.keypoints_xy)
    assert np.array_equal(one.colors, other.colors)


def test_no_corner_lies_under_a_mask_and_the_grid_stays_whole() -> None:
    rng = np.random.default_rng(5)
    mask = rng.random((1, WIDTH)).repeat(HEIGHT, axis=0) < 0.5
    frame = replace(frame_of(textured()), mask=mask)
    config = DenseMatchingConfig(max_corners=200, max_keypoints=1000)
    whole, masked = dense_features(replace(frame, mask=None), config), dense_features(frame, config)
    assert not usable_at(mask, corners_of(whole)).all()
    assert usable_at(mask, corners_of(masked)).all()
    assert len(corners_of(masked)) > 40
    KeypointTables(config).add(masked, size=(WIDTH, HEIGHT))  # which refuses a grid with holes
