"""Raw photos of cameras and phones: their full-size preview, or else developed by LibRaw."""

from __future__ import annotations

import importlib.util
import io
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from adapters.images.decoding import (
    DecodedImage,
    RefusedImage,
    decode_image,
    refused_by_size,
    xmp_in,
)
from adapters.images.drone_tags import with_drone_tags
from adapters.images.exif import read_exif
from engine.config import SourcesConfig
from engine.types import DropReason

if TYPE_CHECKING:
    from rawpy import RawPy

RAW_SUFFIXES = frozenset(
    {".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".raf", ".rw2", ".orf", ".pef", ".srw"}
)
PACKAGE = "rawpy"
EXTRA = "raw"

_FULL_SIZE_RATIO = 0.9  # of the raw image's edges; previews leave out its margins


def is_raw_available() -> bool:
    """Whether what reads raw photos is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def decode_raw(data: bytes, *, config: SourcesConfig) -> DecodedImage | RefusedImage:
    """Decodes a raw photo to 8-bit RGB, upright.

    Cameras put the image that they would have saved as a JPEG into the raw file. Where that has
    the size of the raw image it is taken; else the raw image is developed with the camera's white
    balance. Position and focal length are those of the raw file's EXIF block.
    """
    import rawpy

    try:
        with rawpy.imread(io.BytesIO(data)) as raw:
            sizes = raw.sizes
            refused = refused_by_size(sizes.width, sizes.height, config=config)
            if refused is not None:
                return refused
            image = _preview(raw, config=config) or _developed(raw)
    except (rawpy.LibRawError, OSError, ValueError) as error:
        detail = f"LibRaw cannot read it: {_words(error)}"
        return RefusedImage(reason=DropReason.UNREADABLE, detail=detail)
    block = data if data[:4] in {b"II*\0", b"MM\0*"} else b""
    exif = with_drone_tags(read_exif(block), xmp_in(data))
    if not (exif.make or exif.model or exif.gps):
        return image
    # The preview's own turn is the one of its pixels.
    return replace(image, exif=replace(exif, orientation=image.exif.orientation))


def _preview(raw: RawPy, *, config: SourcesConfig) -> DecodedImage | None:
    """The preview of full size, turned as the raw image is; None where there is none."""
    import rawpy

    try:
        preview = raw.extract_thumb()
    except (rawpy.LibRawNoThumbnailError, rawpy.LibRawUnsupportedThumbnailError):
        return None
    if preview.format is not rawpy.ThumbFormat.JPEG or not isinstance(preview.data, bytes):
        return None
    image = decode_image(preview.data, config=config)
    if not isinstance(image, DecodedImage):
        return None
    longest_px = max(raw.sizes.width, raw.sizes.height)
    if max(image.pixels.shape[:2]) < _FULL_SIZE_RATIO * longest_px:
        return None
    turns = {3: 2, 5: 1, 6: -1}.get(raw.sizes.flip, 0)  # LibRaw: 5 is counter-clockwise
    if image.exif.orientation != 1 or not turns:
        return image
    orientation = {2: 3, 1: 8, -1: 6}[turns]
    turned = np.ascontiguousarray(np.rot90(image.pixels, turns))
    exif = replace(image.exif, orientation=orientation)
    return replace(image, pixels=turned, jpeg=None, exif=exif)


def _developed(raw: RawPy) -> DecodedImage:
    pixels = raw.postprocess(use_camera_wb=True, output_bps=8)
    orientation = {3: 3, 5: 8, 6: 6}.get(raw.sizes.flip, 1)
    exif = replace(read_exif(b""), orientation=orientation)
    return DecodedImage(pixels=np.ascontiguousarray(pixels), jpeg=None, exif=exif)


def _words(error: Exception) -> str:
    said = error.args[0] if error.args else error
    return said.decode(errors="replace") if isinstance(said, bytes) else str(said)
