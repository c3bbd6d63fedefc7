"""Masks of whole cameras, by patterns of their keys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adapters.images.camera_masks import MaskedCameras
from adapters.images.exif import upright
from engine.config import SourcesConfig
from engine.errors import ConfigError, SourceError
from engine.types import BoolArray, Frame
from tests.support.mask_images import some_mask, write_mask
from tests.support.textured_images import frame_of

SIZE = (96, 72)
LEGS, LOGO = some_mask(*SIZE), ~some_mask(*SIZE)


def masks_of(tmp_path: Path, *patterns: str) -> MaskedCameras:
    files: dict[str, str] = {}
    for pattern, mask in zip(patterns, (LEGS, LOGO), strict=False):
        files[pattern] = str(write_mask(tmp_path / f"{len(files)}.png", mask))
    return MaskedCameras(files, config=SourcesConfig())


def frame_like(
    camera_key: str, *, size: tuple[int, int] = SIZE, source: str = "synthetic", turns: int = 0
) -> Frame:
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    frame = frame_of(pixels, camera_key=camera_key)
    return replace(frame, source=source, quarter_turns=turns)


def is_mask(found: BoolArray | None, expected: BoolArray) -> bool:
    return found is not None and np.array_equal(found, expected)


def test_a_mask_holds_for_the_cameras_whose_names_match_its_pattern(tmp_path: Path) -> None:
    masks = masks_of(tmp_path, "left", "*walk.mp4")
    assert is_mask(masks.mask_of(frame_like("left|Canon|96x72")), LEGS)
    assert is_mask(masks.mask_of(frame_like("video|96x72", source="/data/Walk.MP4")), LOGO)
    assert masks.mask_of(frame_like("right|96x72")) is None


def test_of_several_patterns_the_last_one_counts(tmp_path: Path) -> None:
    masks = masks_of(tmp_path, "*", "left*")
    assert is_mask(masks.mask_of(frame_like("left")), LOGO)
    assert is_mask(masks.mask_of(frame_like("right")), LEGS)


def test_frames_of_one_size_share_a_mask_and_other_sizes_get_their_own(tmp_path: Path) -> None:
    masks = masks_of(tmp_path, "*")
    assert masks.mask_of(frame_like("a")) is masks.mask_of(frame_like("b"))
    large = masks.mask_of(frame_like("a", size=(2 * SIZE[0], 2 * SIZE[1])))
    assert large is not None
    assert np.array_equal(large[::2, ::2], LEGS)


@pytest.mark.parametrize(("turns", "orientation"), [(1, 6), (3, 8)])
def test_the_mask_of_a_camera_turns_with_its_frames(
    tmp_path: Path, turns: int, orientation: int
) -> None:
    masks = masks_of(tmp_path, "*")
    turned = masks.mask_of(frame_like("a", size=SIZE[::-1], turns=turns))
    assert is_mask(turned, upright(LEGS, orientation))
    assert is_mask(masks.mask_of(frame_like("a")), LEGS)


def test_a_mask_of_another_shape_is_an_error_that_names_file_camera_and_sizes(
    tmp_path: Path,
) -> None:
    masks = masks_of(tmp_path, "*")
    words = r"mask .*0\.png of camera front has 96 x 72 px, the image 72 x 96 px"
    with pytest.raises(SourceError, match=words):
        masks.mask_of(frame_like("front", size=SIZE[::-1]))


def test_masks_of_no_camera_are_known(tmp_path: Path) -> None:
    masks = masks_of(tmp_path, "left*", "rigth*")
    assert len(masks.unused()) == 2
    masks.mask_of(frame_like("left"))
    (words,) = masks.unused()
    assert words.endswith("1.png is for no camera of the run: none is called rigth*")


@pytest.mark.parametrize(
    ("data", "words"), [(None, "cannot be read: No such file"), (b"text", "is no image")]
)
def test_a_file_that_is_no_mask_is_refused(tmp_path: Path, data: bytes | None, words: str) -> None:
    path = tmp_path / "mask.png"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError, match=words):
        MaskedCameras({"*": str(path)}, config=SourcesConfig())
