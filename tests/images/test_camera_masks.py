"""Masks of whole cameras, by patterns of their keys."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adapters.images.camera_masks import MaskedCameras
from engine.config import SourcesConfig
from engine.errors import ConfigError, SourceError
from engine.types import BoolArray
from tests.support.mask_images import some_mask, write_mask

SIZE = (96, 72)
LEGS, LOGO = some_mask(*SIZE), ~some_mask(*SIZE)


def masks_of(tmp_path: Path, *patterns: str) -> MaskedCameras:
    files: dict[str, str] = {}
    for pattern, mask in zip(patterns, (LEGS, LOGO), strict=False):
        files[pattern] = str(write_mask(tmp_path / f"{len(files)}.png", mask))
    return MaskedCameras(files, config=SourcesConfig())


def is_mask(found: BoolArray | None, expected: BoolArray) -> bool:
    return found is not None and np.array_equal(found, expected)


def test_a_mask_holds_for_the_cameras_whose_keys_fit_its_pattern(tmp_path: Path) -> None:
    masks = masks_of(tmp_path, "left*", "source2|*")
    assert is_mask(masks.mask_of("left|96x72", size=SIZE), LEGS)
    assert is_mask(masks.mask_of("source2|video|96x72", size=SIZE), LOGO)
    assert masks.mask_of("right|96x72", size=SIZE) is None


def test_of_several_patterns_the_last_one_counts(tmp_path: Path) -> None:
    masks = masks_of(tmp_path, "*", "left*")
    assert is_mask(masks.mask_of("left", size=SIZE), LOGO)
    assert is_mask(masks.mask_of("right", size=SIZE), LEGS)


def test_frames_of_one_size_share_a_mask_and_other_sizes_get_their_own(tmp_path: Path) -> None:
    masks = masks_of(tmp_path, "*")
    assert masks.mask_of("a", size=SIZE) is masks.mask_of("b", size=SIZE)
    large = masks.mask_of("a", size=(2 * SIZE[0], 2 * SIZE[1]))
    assert large is not None
    assert np.array_equal(large[::2, ::2], LEGS)


def test_a_mask_of_another_shape_is_an_error_that_names_file_camera_and_sizes(
    tmp_path: Path,
) -> None:
    masks = masks_of(tmp_path, "*")
    words = r"mask .*0\.png of camera front has 96 x 72 px, the image 72 x 96 px"
    with pytest.raises(SourceError, match=words):
        masks.mask_of("front", size=(72, 96))


def test_patterns_that_no_camera_fitted_are_known(tmp_path: Path) -> None:
    masks = masks_of(tmp_path, "left*", "rigth*")
    assert masks.unused() == ["left*", "rigth*"]
    masks.mask_of("left", size=SIZE)
    assert masks.unused() == ["rigth*"]


@pytest.mark.parametrize(
    ("data", "words"), [(None, "cannot be read: No such file"), (b"text", "is no image")]
)
def test_a_file_that_is_no_mask_is_refused(tmp_path: Path, data: bytes | None, words: str) -> None:
    path = tmp_path / "mask.png"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError, match=words):
        MaskedCameras({"*": str(path)}, config=SourcesConfig())
