"""HEIF and AVIF images: what phones write, decoded by libheif and libavif.

Both are read by Pillow's packages, which are imported when the first such image comes.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.types import Uint8Array

if TYPE_CHECKING:
    from PIL import Image

HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif", ".avif"})
PACKAGE = "pillow-heif"

_BRANDS = frozenset(  # ISO/IEC 23008-12, section 10, and the AV1 image file format, section 6
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"mif2"}
)
_AVIF_BRANDS = frozenset({b"avif", b"avis"})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenedHeif:
    """An image whose size is known and whose pixels are not decoded yet."""

    width: int  # px, as `decode` gives it
    height: int
    exif_block: bytes
    xmp: bytes
    is_upright: bool  # whether `decode` has turned it already
    decode: Callable[[], Uint8Array]  # (H, W, 3) RGB; ValueError, SyntaxError, OSError: damaged


def is_heif(data: bytes) -> bool:
    """Whether the bytes begin as those of a HEIF or AVIF file (ISO base media) do."""
    return data[4:8] == b"ftyp" and data[8:12] in _BRANDS | _AVIF_BRANDS


def is_heif_available() -> bool:
    """Whether what reads such images is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


def open_heif(data: bytes) -> OpenedHeif | None:
    """Reads the size and the metadata of an image; None for one that is damaged."""
    try:
        is_avif = data[8:12] in _AVIF_BRANDS
        return _open_avif(data) if is_avif else _open_heif(data)
    except (ValueError, SyntaxError, OSError, RuntimeError):
        return None


def _open_heif(data: bytes) -> OpenedHeif:
    import pillow_heif

    image = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=True)
    return OpenedHeif(
        width=image.size[0],
        height=image.size[1],
        exif_block=image.info.get("exif") or b"",
        xmp=image.info.get("xmp") or b"",
        is_upright=True,  # libheif turns it as its boxes say, which go before EXIF
        decode=lambda: _rgb(image.to_pillow()),
    )


def _open_avif(data: bytes) -> OpenedHeif:
    from PIL import AvifImagePlugin

    image = AvifImagePlugin.AvifImageFile(io.BytesIO(data))
    return OpenedHeif(
        width=image.size[0],
        height=image.size[1],
        exif_block=image.info.get("exif") or b"",  # with the turn that the file's boxes say
        xmp=image.info.get("xmp") or b"",
        is_upright=False,
        decode=lambda: _rgb(image),
    )


def _rgb(image: Image.Image) -> Uint8Array:
    return np.array(image.convert("RGB"), np.uint8)
