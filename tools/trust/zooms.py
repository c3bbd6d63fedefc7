"""Fox photos and clips whose focal length, centre or size changes on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from engine.types import Uint8Array
from trust.inputs import (
    ExifTags,
    Input,
    Kit,
    read_rgb,
    write_jpeg,
    write_reference,
    write_video,
)

SET = "fox"
NUM_PHOTOS = 14
NUM_CLIP_FRAMES = 30
CLIP_RATE_HZ = 5
_MAKE, _MODEL = "Apple", "iPhone 15 Pro"
_WIDE_MM, _WIDE_35MM = 6.86, 26


def zoomed(pixels: Uint8Array, ratio: float) -> Uint8Array:
    """The middle of an image at the size of the whole; its focal length is ``ratio`` times."""
    import cv2

    height, width = pixels.shape[:2]
    center_xy = np.array([width, height]) / 2 - 0.5  # OpenCV's pixel centres are integers
    linear = np.eye(2) / ratio
    warp = np.column_stack([linear, center_xy - linear @ center_xy])
    return np.asarray(
        cv2.warpAffine(
            pixels,
            warp,
            (width, height),
            flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        ),
        dtype=np.uint8,
    )


def cropped(pixels: Uint8Array, side: str, ratio: float) -> Uint8Array:
    """The image without a share of it at one side."""
    height, width = pixels.shape[:2]
    columns, rows = int(width * ratio), int(height * ratio)
    return {
        "right": pixels[:, : width - columns],
        "left": pixels[:, columns:],
        "bottom": pixels[: height - rows],
        "top": pixels[rows:],
    }[side]


def photos_zoomed_with_exif(kit: Kit, folder: Path) -> Input:
    """Every other photo zoomed digitally: the same FocalLength, the 35 mm equivalent follows."""
    zoom = kit.variation.photo_zoom
    tags = [
        ExifTags(
            make=_MAKE,
            model=_MODEL,
            focal_length_mm=_WIDE_MM,
            focal_length_35mm=round(_WIDE_35MM * ratio),
            digital_zoom_ratio=ratio,
        )
        for ratio in (1.0, zoom)
    ]
    return _alternating_photos(kit, folder, lambda pixels: zoomed(pixels, zoom), tags=tags)


def photos_zoomed(kit: Kit, folder: Path) -> Input:
    """Every other photo zoomed digitally, no EXIF."""
    return _alternating_photos(
        kit, folder, lambda pixels: zoomed(pixels, kit.variation.photo_zoom), tags=[None, None]
    )


def photos_of_two_lenses(kit: Kit, folder: Path) -> Input:
    """Every other photo by the tele lens of the same phone: FocalLength alone differs."""
    zoom = kit.variation.photo_zoom
    tags = [
        ExifTags(make=_MAKE, model=_MODEL, focal_length_mm=round(_WIDE_MM * ratio, 2))
        for ratio in (1.0, zoom)
    ]
    return _alternating_photos(kit, folder, lambda pixels: zoomed(pixels, zoom), tags=tags)


def photos_cropped(kit: Kit, folder: Path) -> Input:
    """Every other photo cropped at one side, so that its centre is elsewhere; no EXIF."""
    side, ratio = kit.variation.crop_side, kit.variation.crop_ratio
    return _alternating_photos(
        kit, folder, lambda pixels: cropped(pixels, side, ratio), tags=[None, None]
    )


def photos_as_they_are(kit: Kit, folder: Path) -> Input:
    """The same photos unchanged: what the others are compared with."""
    return _alternating_photos(kit, folder, lambda pixels: pixels, tags=[None, None])


def clip_zoomed_half_way(kit: Kit, folder: Path) -> Input:
    """A clip whose second half is zoomed digitally."""
    frames = _clip_frames(kit)
    half = NUM_CLIP_FRAMES // 2
    frames[half:] = [zoomed(pixels, kit.variation.video_zoom) for pixels in frames[half:]]
    write_video(folder / "clip.mp4", frames, rate_hz=CLIP_RATE_HZ)
    return _clip_input(kit, folder, "clip.mp4")


def clip_of_two_sizes(kit: Kit, folder: Path) -> Input:
    """A raw H.264 stream whose second half has another size."""
    import cv2

    frames = _clip_frames(kit)
    half = NUM_CLIP_FRAMES // 2
    height, width = frames[0].shape[:2]
    ratio = kit.variation.size_ratio
    size = round(width * ratio / 2) * 2, round(height * ratio / 2) * 2
    small = [
        np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        for pixels in frames[half:]
    ]
    parts = [folder / "first.h264", folder / "second.h264"]
    for part, sequence in zip(parts, (frames[:half], small), strict=True):
        write_video(part, sequence, rate_hz=CLIP_RATE_HZ)
    (folder / "clip.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()
    return _clip_input(kit, folder, "clip.h264")


def _alternating_photos(
    kit: Kit,
    folder: Path,
    change: Callable[[Uint8Array], Uint8Array],
    *,
    tags: Sequence[ExifTags | None],
) -> Input:
    """Photos of which every other one is changed; ``tags`` of the two kinds."""
    first = kit.variation.first_photo
    paths = kit.images(SET)[first : first + NUM_PHOTOS]
    for number, path in enumerate(paths):
        kind = number % 2
        pixels = read_rgb(path)
        write_jpeg(
            folder / "images" / path.name, change(pixels) if kind else pixels, exif=tags[kind]
        )
    rows = range(first, first + len(paths))
    write_reference(folder / "truth.txt", kit.data / SET / "groundtruth.txt", rows)
    return Input(source="images", truth="truth.txt")


def _clip_frames(kit: Kit) -> list[Uint8Array]:
    first = min(kit.variation.first_photo, len(kit.images(SET)) - NUM_CLIP_FRAMES)
    return [read_rgb(path) for path in kit.images(SET)[first : first + NUM_CLIP_FRAMES]]


def _clip_input(kit: Kit, folder: Path, name: str) -> Input:
    first = min(kit.variation.first_photo, len(kit.images(SET)) - NUM_CLIP_FRAMES)
    rows = range(first, first + NUM_CLIP_FRAMES)
    write_reference(folder / "truth.txt", kit.data / SET / "groundtruth.txt", rows)
    return Input(source=name, truth="truth.txt")
