"""Keyframe images read back from a run folder, with their masks."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from engine.dense_types import DenseView
from engine.errors import InferenceError
from engine.output.keyframe_images import KeyframeImages
from engine.types import FrameId, Intrinsics

WIDTH, HEIGHT = 320, 240
ID = FrameId(7)
NAME = "left/000007.png"


def view() -> DenseView:
    nothing = np.zeros((0, 3))
    return DenseView(
        frame_id=ID,
        intrinsics=Intrinsics(
            model="PINHOLE", width=WIDTH, height=HEIGHT, params=(300.0, 300.0, 160.0, 120.0)
        ),
        cam_from_world=np.eye(4)[:3],
        points3D_ids=np.zeros(0, np.int64),
        keypoints_xy=nothing[:, :2],
        points3D_in_world=nothing,
    )


def picture() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Red on the left, blue on the right, RGB."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, : WIDTH // 2, 0] = pixels[:, WIDTH // 2 :, 2] = 255
    return pixels


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with one image, whose upper half may be used."""
    for folder in ("images/left", "masks/left"):
        (tmp_path / folder).mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "images" / NAME), picture()[:, :, ::-1])
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[: HEIGHT // 2] = 255
    cv2.imwrite(str(tmp_path / "masks" / f"{NAME}.png"), mask)
    return tmp_path


def images_of(run: Path, *, edge_px: int = WIDTH) -> KeyframeImages:
    return KeyframeImages(lambda: run, edge_px=edge_px)


def test_an_image_is_rgb_and_has_its_mask(run: Path) -> None:
    images = images_of(run).of({ID: NAME}, {ID: view()})
    assert list(images) == [ID]
    assert np.array_equal(images[ID].pixels, picture())
    mask = images[ID].mask
    assert mask is not None
    assert mask[: HEIGHT // 2].all()
    assert not mask[HEIGHT // 2 :].any()


def test_a_large_image_is_read_smaller_with_its_mask(run: Path) -> None:
    image = images_of(run, edge_px=100).of({ID: NAME}, {ID: view()})[ID]
    assert image.pixels.shape == (HEIGHT // 2, WIDTH // 2, 3)  # not below the edge
    assert image.mask is not None
    assert image.mask.shape == (HEIGHT // 2, WIDTH // 2)
    assert image.mask.mean() == pytest.approx(0.5, abs=0.01)


def test_an_image_without_a_mask_may_be_used_everywhere(run: Path) -> None:
    (run / "masks" / f"{NAME}.png").unlink()
    assert images_of(run).of({ID: NAME}, {ID: view()})[ID].mask is None


def test_images_that_are_not_there_are_missing(run: Path) -> None:
    names = {ID: NAME, FrameId(8): "left/000008.png"}
    images = images_of(run).of(names, {ID: view(), FrameId(8): view()})
    assert ID in images
    assert FrameId(8) not in images
    assert len(images) == 1


def test_an_image_that_is_broken_is_an_expected_failure(run: Path) -> None:
    (run / "images" / NAME).write_bytes(b"no image")
    images = images_of(run).of({ID: NAME}, {ID: view()})
    with pytest.raises(InferenceError, match="cannot be read"):
        images[ID]


def test_an_image_whose_mask_is_broken_is_not_used_as_if_it_had_none(run: Path) -> None:
    (run / "masks" / f"{NAME}.png").write_bytes(b"no image")
    images = images_of(run).of({ID: NAME}, {ID: view()})
    with pytest.raises(InferenceError, match="mask"):
        images[ID]


def test_the_images_that_were_read_last_are_kept(run: Path) -> None:
    images = images_of(run)
    first = images.of({ID: NAME}, {ID: view()})[ID]
    assert images.of({ID: NAME}, {ID: view()})[ID] is first
    for number in range(100, 110):
        name = f"left/{number}.png"
        (run / "images" / name).write_bytes((run / "images" / NAME).read_bytes())
        assert images.of({FrameId(number): name}, {FrameId(number): view()})[FrameId(number)]
    assert images.of({ID: NAME}, {ID: view()})[ID] is not first
