"""Masks from image files: black leaves a pixel out, anything else lets it be used.

That is COLMAP's convention. Grey, colour, palette and 1-bit images are all the same; see
``decode_mask`` for transparency and lossy files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.images.decoding import ImageHeader, read_image_header
from adapters.images.exif import read_exif, upright
from engine.config import SourcesConfig
from engine.types import BoolArray

MASK_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")  # likeliest first

_LOSSY_STARTS = (b"\xff\xd8", b"RIFF")  # JPEG and WebP: black is not quite black any more
_TRANSPOSING_ORIENTATIONS = range(5, 9)  # of EXIF


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MaskImage:
    """A readable mask, not yet of the size of any image."""

    mask: BoolArray  # (H, W), True where a pixel may be used
    is_upright: bool = False  # a tag of its own said how it is seen, and it was turned so

    @property
    def size_in_words(self) -> str:
        """Width and height."""
        height, width = self.mask.shape
        return f"{width} x {height} px"


def decode_mask(data: bytes, *, config: SourcesConfig) -> MaskImage | str:
    """Decodes a mask; the reason in words where it cannot be.

    A pixel may be used where any channel is not 0; of lossy files, where one has at least half of
    the brightest value. Transparency that varies counts as another channel: where it is 0 the pixel
    is left out, too; and it alone counts when all pixels have one colour.
    """
    header = read_image_header(data)
    if header is None:
        return "is no image" if data else "is empty"
    if header.width * header.height > config.max_image_megapixels * 1e6:
        return f"is too large, {header.width} x {header.height} px"
    if not header.is_complete:
        return "is truncated"
    try:
        values = _decode(data)
        if values is None:
            return "is damaged"
        return _turned(_usable(values, is_lossy=data.startswith(_LOSSY_STARTS)), header)
    except MemoryError:
        return f"does not fit in memory, {header.width} x {header.height} px"


def fit_mask(image: MaskImage, *, size: tuple[int, int], orientation: int = 1) -> BoolArray | str:
    """A mask as that of an upright image; what does not fit in words.

    A mask of another size is scaled when its aspect ratio is the image's, to a pixel. Masks may be
    made for an image as its file stores it, which is what COLMAP takes them for, or as it is shown.
    The size tells which, where EXIF turns the image by a quarter; where it does not, they are taken
    as COLMAP does.

    Args:
        image: the mask.
        size: width and height of the image, upright.
        orientation: of the image as stored, as EXIF counts it.

    Returns:
        (H, W), True where a pixel may be used, read-only.
    """
    stored_size = size[::-1] if orientation in _TRANSPOSING_ORIENTATIONS else size
    if not image.is_upright and _has_aspect(image.mask, stored_size):
        mask = upright(_scaled(image.mask, stored_size), orientation)
    elif _has_aspect(image.mask, size):
        mask = _scaled(image.mask, size)
    else:
        return f"has {image.size_in_words}, the image {size[0]} x {size[1]} px"
    mask = np.ascontiguousarray(mask, np.bool_)
    mask.flags.writeable = False
    return mask


def _decode(data: bytes) -> NDArray[Any] | None:
    """The values (H, W, C) of all channels, as stored; None for what cannot be decoded."""
    import cv2

    try:
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if values is None:
        return None
    return values[:, :, None] if values.ndim == 2 else np.asarray(values)


def _usable(values: NDArray[Any], *, is_lossy: bool) -> BoolArray:
    colors, alpha = (values[..., :3], values[..., 3]) if values.shape[2] == 4 else (values, None)
    brightest = colors.max(axis=2)
    threshold = max(int(brightest.max()) - 1, 0) // 2 if is_lossy else 0
    has_color = brightest > threshold
    if alpha is None or (alpha == alpha[0, 0]).all():
        return np.asarray(has_color)
    is_plain = bool((colors == colors[0, 0]).all())
    return np.asarray(alpha > 0) if is_plain else has_color & (alpha > 0)


def _turned(mask: BoolArray, header: ImageHeader) -> MaskImage:
    """The mask as its own orientation tag says, where it has one."""
    orientation = read_exif(header.exif_block).orientation
    if orientation == 1:
        return MaskImage(mask=mask)
    seen = mask if header.decodes_upright else upright(mask, orientation)
    return MaskImage(mask=np.ascontiguousarray(seen), is_upright=True)


def _has_aspect(mask: BoolArray, size: tuple[int, int]) -> bool:
    """Whether a mask has the aspect ratio of ``size``, up to a pixel of its own."""
    height, width = mask.shape
    return bool(abs(width * size[1] - height * size[0]) <= max(size))


def _scaled(mask: BoolArray, size: tuple[int, int]) -> BoolArray:
    """The nearest pixels of a mask at another size (width, height)."""
    if mask.shape == size[::-1]:
        return mask
    import cv2

    scaled = cv2.resize(mask.view(np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(scaled).view(np.bool_)
