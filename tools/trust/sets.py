"""Image sets as they are, with a logo painted over, and with masks."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from engine.types import Uint8Array
from trust.inputs import Input, Kit, Maker, read_rgb, write_jpeg, write_reference

LADY_LOGO_PX = (681.0, 15.0, 811.0, 69.0)  # x, y from, x, y to
RECORDED_FOCAL_PX = {"kitchen": 824.0, "fox": 687.5}  # as full sets calibrate
RECORDED_EDGE_PX = {"kitchen": 800, "fox": 960}
_INPAINT_RADIUS_PX = 5


def set_as_it_is(name: str, *, config: str | None = None, truth: str | None = None) -> Maker:
    """A maker that points to a set's images; ``truth`` is a file of the set."""
    return partial(_make_set, name=name, config=config, truth=truth)


def _make_set(kit: Kit, folder: Path, *, name: str, config: str | None, truth: str | None) -> Input:
    root = kit.data / name
    video = root / "video.mp4"
    return Input(
        source=str(video if video.is_file() else root / "images"),
        arguments=("--config", config) if config else (),
        truth=str(root / truth) if truth else None,
    )


def every_nth(name: str, nth: int, *, offset: int, config: str | None, truth: str) -> Maker:
    """A maker of every ``nth`` image of a set from ``offset`` on."""
    return partial(_make_nth, name=name, nth=nth, offset=offset, config=config, truth=truth)


def _make_nth(
    kit: Kit, folder: Path, *, name: str, nth: int, offset: int, config: str | None, truth: str
) -> Input:
    paths = kit.images(name)
    rows = list(range((offset + kit.variation.nth_offset) % nth, len(paths), nth))
    return _chosen(kit, folder, name=name, rows=rows, config=config, truth=truth)


def reordered(name: str, *, is_reversed: bool, config: str | None, truth: str) -> Maker:
    """A maker of a set's images in reverse, or shuffled."""
    return partial(_make_reordered, name=name, is_reversed=is_reversed, config=config, truth=truth)


def _make_reordered(
    kit: Kit, folder: Path, *, name: str, is_reversed: bool, config: str | None, truth: str
) -> Input:
    rows = list(range(len(kit.images(name))))[::-1]
    if not is_reversed:
        rng = np.random.default_rng(kit.variation.order_seed)
        rows = [int(row) for row in rng.permutation(len(rows))]
    return _chosen(kit, folder, name=name, rows=rows, config=config, truth=truth)


def _chosen(
    kit: Kit, folder: Path, *, name: str, rows: Sequence[int], config: str | None, truth: str
) -> Input:
    """Images of a set in a given order, by new names."""
    paths = kit.images(name)
    (folder / "images").mkdir()
    for number, row in enumerate(rows):
        shutil.copyfile(paths[row], folder / "images" / f"{number:06d}.jpg")
    write_reference(folder / "truth.txt", kit.data / name / truth, rows)
    return Input(
        source="images", arguments=("--config", config) if config else (), truth="truth.txt"
    )


def recorded(name: str, file: str, *, truth: str) -> Maker:
    """A maker of the images of a set whose matches by a learned matcher were recorded.

    Args:
        name: of the set.
        file: of the matches, in ``learned_matches`` beside the sets.
        truth: file of the set.
    """
    return partial(_make_recorded, name=name, file=file, truth=truth)


def _make_recorded(kit: Kit, folder: Path, *, name: str, file: str, truth: str) -> Input:
    matches = kit.data / "learned_matches" / file
    with np.load(matches) as archive:
        names = [str(each) for each in archive["names"]]
    paths = {path.name: (row, path) for row, path in enumerate(kit.images(name))}
    (folder / "images").mkdir()
    for each in names:
        shutil.copyfile(paths[each][1], folder / "images" / each)
    rows = [paths[each][0] for each in names]
    write_reference(folder / "truth.txt", kit.data / name / truth, rows)
    return Input(source="images", truth="truth.txt", matcher=f"recorded:{matches}")


def lady(kit: Kit, folder: Path) -> Input:
    """A pan with a station's logo burned in."""
    return Input(
        source=str(kit.data / "lady" / "images"),
        arguments=("--config", "phone"),
        overlay_box_px=LADY_LOGO_PX,
    )


def lady_painted_over(kit: Kit, folder: Path) -> Input:
    """The same pan without the logo."""
    for path in kit.images("lady"):
        write_jpeg(folder / "images" / path.name, painted_over(read_rgb(path), LADY_LOGO_PX))
    return Input(source="images", arguments=("--config", "phone"), overlay_box_px=LADY_LOGO_PX)


def painted_over(pixels: Uint8Array, box_px: tuple[float, float, float, float]) -> Uint8Array:
    """An image (H, W, 3) whose box is filled smoothly (Telea, 2004)."""
    import cv2

    left, top, right, bottom = (round(edge) for edge in box_px)
    box = np.zeros(pixels.shape[:2], np.uint8)
    box[top : bottom + 1, left : right + 1] = 255
    filled = cv2.inpaint(np.ascontiguousarray(pixels), box, _INPAINT_RADIUS_PX, cv2.INPAINT_TELEA)
    return np.asarray(filled, dtype=np.uint8)


def fox_half_masked(kit: Kit, folder: Path) -> Input:
    """Fox with ``masks/`` beside ``images/``, black over half of every image."""
    from PIL import Image

    for path in kit.images("fox"):
        (folder / "images").mkdir(exist_ok=True)
        (folder / "masks").mkdir(exist_ok=True)
        shutil.copyfile(path, folder / "images" / path.name)
        height, width = read_rgb(path).shape[:2]
        mask = half_mask((width, height), kit.variation.masked_side)
        Image.fromarray(mask).save(folder / "masks" / f"{path.name}.png")
    return Input(
        source="images",
        arguments=("--config", "phone"),
        truth=str(kit.data / "fox" / "groundtruth.txt"),
        masks="masks",
    )


def half_mask(size: tuple[int, int], side: str) -> Uint8Array:
    """A mask (H, W) of an image of (width, height), black where the image is ignored."""
    width, height = size
    mask = np.zeros((height, width), np.uint8)
    rows, columns = np.mgrid[:height, :width]
    is_kept = {
        "right": columns < width // 2,
        "left": columns >= width // 2,
        "bottom": rows < height // 2,
        "top": rows >= height // 2,
    }[side]
    mask[is_kept] = 255
    return mask
