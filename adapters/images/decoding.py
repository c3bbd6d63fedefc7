"""Image decoding: JPEG, PNG, TIFF, WebP, HEIF, AVIF and BMP from bytes to upright RGB pixels.

Size and completeness are read from the bytes before anything is decoded, so that neither a
decompression bomb nor a half-written file reaches a decoder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.images.drone_tags import with_drone_tags
from adapters.images.exif import Exif, read_exif, tiff_image_size, upright
from adapters.images.heif import PACKAGE, OpenedHeif, is_heif, is_heif_available, open_heif
from adapters.install_advice import how_to_install_packages
from engine.config import SourcesConfig
from engine.jpeg_segments import SCAN_MARKER, has_end_of_image, jpeg_segments
from engine.types import DropReason, Uint8Array

# Start-of-frame markers of JPEG (ITU-T T.81, table B.1); C4, C8 and CC are no frames.
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PLAIN_FRAME_MARKERS = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive Huffman coding
_APP1_MARKER = 0xE1
_MAX_XMP_BYTES = 256 * 1024  # of a JPEG; a writer makes one segment, of 64 kB at most
_XMP_MARKER = b"http://ns.adobe.com/xap/1.0/\0"
# Google's photo sphere metadata, as an attribute or an element.
_SPHERICAL_XMP = re.compile(
    rb"GPano:ProjectionType\s*(=\s*[\"']|>)\s*equirectangular", re.IGNORECASE
)
_XMP_START, _XMP_END = b"<x:xmpmeta", b"</x:xmpmeta>"

# Of images deeper than 8 bits: one whose brightest pixels are darker than this share of the full
# range was recorded with fewer bits, or in a narrow range, and is stretched.
_DARK_RATIO = 0.25
_BRIGHTEST_PERCENT, _DARKEST_PERCENT = 99.9, 0.1
_MAX_SAMPLED = 100_000  # pixels that show the range of an image


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageHeader:
    """Size and other properties of an encoded image, read before decoding."""

    width: int  # px, as stored: before the EXIF orientation
    height: int
    exif_block: bytes = b""
    is_complete: bool = True  # False: a JPEG that ends before its end marker
    is_plain_jpeg: bool = False  # a JPEG of one or three 8-bit channels that any reader takes
    decodes_upright: bool = False  # the decoder turns the pixels, as OpenCV does those of TIFF
    xmp: bytes = b""
    heif: OpenedHeif | None = None  # of HEIF and AVIF

    @property
    def is_spherical(self) -> bool:
        """Whether its metadata says that it is equirectangular."""
        return _SPHERICAL_XMP.search(self.xmp) is not None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodedImage:
    """A readable image."""

    pixels: Uint8Array  # (H, W, 3) RGB, upright
    jpeg: bytes | None  # the bytes as given, when any JPEG reader gets `pixels` from them
    exif: Exif
    is_spherical: bool = False  # its metadata says that it is equirectangular


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedImage:
    """Why bytes could not be decoded to an image."""

    reason: DropReason
    detail: str


def decode_image(data: bytes, *, config: SourcesConfig) -> DecodedImage | RefusedImage:
    """Decodes an image to 8-bit RGB, upright by its EXIF orientation.

    Grey and palette images become RGB, alpha is left out. Deeper values are divided by their full
    range (257 for 16 bits), or stretched where they take up little of it. A JPEG must reach its end
    marker: decoders fill what is missing with grey and say nothing.
    """
    if is_heif(data) and not is_heif_available():
        return _unreadable(f"HEIF needs {PACKAGE}: {how_to_install_packages(PACKAGE)}")
    header = read_image_header(data)
    if header is None:
        return _unreadable("no image, or a damaged one" if data else "empty")
    refused = refused_by_size(header.width, header.height, config=config)
    if refused is not None:
        return refused
    if not header.is_complete:
        return _unreadable("truncated: the JPEG has no end marker")
    try:
        return _decoded_as(header, data)
    except MemoryError:
        size = f"{header.width} x {header.height} px"
        return RefusedImage(reason=DropReason.TOO_LARGE, detail=f"{size} do not fit in memory")


def _decoded_as(header: ImageHeader, data: bytes) -> DecodedImage | RefusedImage:
    stored = _decode(data) if header.heif is None else _decode_heif(header.heif)
    if isinstance(stored, RefusedImage):
        return stored
    exif = with_drone_tags(read_exif(header.exif_block), header.xmp)
    return DecodedImage(
        pixels=stored if header.decodes_upright else upright(stored, exif.orientation),
        jpeg=data if header.is_plain_jpeg and exif.orientation == 1 else None,
        exif=exif,
        is_spherical=header.is_spherical,
    )


def refused_by_size(width: int, height: int, *, config: SourcesConfig) -> RefusedImage | None:
    """Why an image of this size in px is refused; None when it is not."""
    size = f"{width} x {height} px"
    if min(width, height) < config.min_image_edge_px:
        return RefusedImage(reason=DropReason.TOO_SMALL, detail=size)
    if width * height > config.max_image_megapixels * 1e6:
        return RefusedImage(reason=DropReason.TOO_LARGE, detail=size)
    return None


def read_image_header(data: bytes) -> ImageHeader | None:
    """Size, EXIF block and completeness of an encoded image; None for an unknown format."""
    if is_heif(data):
        return _heif_header(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp_header(data)
    readers = {
        b"\xff\xd8": _jpeg_header,
        b"\x89PNG\r\n\x1a\n": _png_header,
        b"II*\0": _tiff_header,
        b"MM\0*": _tiff_header,
        b"BM": _bmp_header,
    }
    read = next((read for start, read in readers.items() if data.startswith(start)), None)
    return None if read is None else read(data)


def _unreadable(detail: str) -> RefusedImage:
    return RefusedImage(reason=DropReason.UNREADABLE, detail=detail)


def _decode(data: bytes) -> Uint8Array | RefusedImage:
    """The pixels (H, W, 3) RGB as the decoder gives them."""
    import cv2

    # Not IMREAD_COLOR_RGB: OpenCV 5.0.0 returns garbage with it for 16-bit TIFF.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        return _unreadable(f"cannot be decoded: {error.err}")
    if image is None:
        return _unreadable("damaged: cannot be decoded")
    if image.dtype != np.uint8:
        image = as_8_bit(image)
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)


def _decode_heif(image: OpenedHeif) -> Uint8Array | RefusedImage:
    try:
        return image.decode()
    except (ValueError, SyntaxError, OSError, RuntimeError, EOFError) as error:
        return _unreadable(f"damaged: cannot be decoded: {error}")


def as_8_bit(image: NDArray[Any]) -> Uint8Array:
    """An image (H, W) or (H, W, 3) of deeper integers or floats as one of 8 bits.

    What is no number is 0. A range that takes up little of the full one is stretched. The full
    range of floats is 1 where no pixel is brighter, else that of 8 or 16 bits.
    """
    step = max(1, int((image.shape[0] * image.shape[1] / _MAX_SAMPLED) ** 0.5))
    sampled = image[::step, ::step].astype(np.float64)
    sampled = sampled[np.isfinite(sampled)]
    if not sampled.size:
        return np.zeros(image.shape, np.uint8)
    low, high = np.percentile(sampled, (_DARKEST_PERCENT, _BRIGHTEST_PERCENT))
    full = _full_range(image.dtype, float(sampled.max()))
    if low >= 0.0 and high >= _DARK_RATIO * full:
        low, high = 0.0, full
    scaled = (image.astype(np.float32) - low) * (255.0 / max(high - low, 1e-12))
    rounded = np.rint(np.clip(np.nan_to_num(scaled, posinf=255.0), 0.0, 255.0))
    return np.asarray(rounded, np.uint8)


def _full_range(kind: np.dtype[Any], brightest: float) -> float:
    """The value of white."""
    if np.issubdtype(kind, np.integer):
        return float(np.iinfo(kind).max)
    return next((full for full in (1.0, 255.0, 65535.0) if brightest <= full), brightest)


def _jpeg_header(data: bytes) -> ImageHeader | None:
    frame, exif_block, xmp, is_plain = b"", b"", b"", False
    for marker, start, segment in jpeg_segments(data):
        if marker in _FRAME_MARKERS:
            frame, is_plain = segment, marker in _PLAIN_FRAME_MARKERS
        elif marker == _APP1_MARKER and segment.startswith(b"Exif\0\0") and not exif_block:
            exif_block = segment
        elif (
            marker == _APP1_MARKER and segment.startswith(_XMP_MARKER) and len(xmp) < _MAX_XMP_BYTES
        ):
            xmp += segment.removeprefix(_XMP_MARKER)
        elif marker == SCAN_MARKER and len(frame) >= 6:
            return ImageHeader(
                width=int.from_bytes(frame[3:5], "big"),
                height=int.from_bytes(frame[1:3], "big"),
                exif_block=exif_block,
                is_complete=has_end_of_image(data, start),
                is_plain_jpeg=is_plain and frame[0] == 8 and frame[5] in {1, 3},
                xmp=xmp,
            )
    return None


def _png_header(data: bytes) -> ImageHeader | None:
    """Chunks of length, type, payload and checksum (PNG, third edition, section 5.3)."""
    if data[12:16] != b"IHDR" or len(data) < 33:
        return None
    exif_block = b""
    place = 8
    while not exif_block and place + 8 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] == b"eXIf":
            exif_block = data[place + 8 : place + 8 + length]
        place += length + 12
    return ImageHeader(
        width=int.from_bytes(data[16:20], "big"),
        height=int.from_bytes(data[20:24], "big"),
        exif_block=exif_block,
        xmp=xmp_in(data),
    )


def _webp_header(data: bytes) -> ImageHeader | None:
    """Chunks of type, length and padded payload (RFC 9649, section 2)."""
    size: tuple[int, int] | None = None
    exif_block = b""
    place = 12
    while place + 8 <= len(data):
        kind = data[place : place + 4]
        length = int.from_bytes(data[place + 4 : place + 8], "little")
        payload = data[place + 8 : place + 8 + length]
        if size is None and len(payload) >= 10:
            size = _webp_size(kind, payload)
        if kind == b"EXIF":
            exif_block = payload
        place += 8 + length + length % 2
    if size is None:
        return None
    return ImageHeader(width=size[0], height=size[1], exif_block=exif_block, xmp=xmp_in(data))


def _webp_size(kind: bytes, payload: bytes) -> tuple[int, int] | None:
    if kind == b"VP8X":  # the canvas of an extended file
        width, height = (int.from_bytes(payload[i : i + 3], "little") + 1 for i in (4, 7))
        return width, height
    if kind == b"VP8 " and payload[3:6] == b"\x9d\x01\x2a":  # a key frame's start code
        width, height = (int.from_bytes(payload[i : i + 2], "little") & 0x3FFF for i in (6, 8))
        return width, height
    if kind == b"VP8L" and payload[0] == 0x2F:  # the lossless signature
        bits = int.from_bytes(payload[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None


def _tiff_header(data: bytes) -> ImageHeader | None:
    size = tiff_image_size(data)
    if size is None:
        return None
    return ImageHeader(
        width=size[0],
        height=size[1],
        exif_block=data,
        decodes_upright=True,
        xmp=xmp_in(data),
    )


def _heif_header(data: bytes) -> ImageHeader | None:
    if not is_heif_available():
        return None
    image = open_heif(data)
    if image is None:
        return None
    return ImageHeader(
        width=image.width,
        height=image.height,
        exif_block=image.exif_block,
        decodes_upright=image.is_upright,
        xmp=image.xmp,
        heif=image,
    )


def xmp_in(data: bytes) -> bytes:
    """The first XMP packet in a file that may hold one anywhere; empty where there is none."""
    start = data.find(_XMP_START)
    end = data.find(_XMP_END, start)
    return data[start : end + len(_XMP_END)] if 0 <= start < end else b""


def _bmp_header(data: bytes) -> ImageHeader | None:
    if len(data) < 26:
        return None
    if int.from_bytes(data[14:18], "little") == 12:  # the header of OS/2
        width, height = (int.from_bytes(data[i : i + 2], "little") for i in (18, 20))
    else:
        width, height = (int.from_bytes(data[i : i + 4], "little", signed=True) for i in (18, 22))
    return ImageHeader(width=abs(width), height=abs(height))  # a negative height: stored top down
