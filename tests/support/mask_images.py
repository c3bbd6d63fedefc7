"""Mask images in the forms that people have, shared by tests."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.types import BoolArray


def some_mask(width: int, height: int) -> BoolArray:
    """A mask (H, W) that no turn or flip leaves as it is: the left third and a corner are out."""
    mask = np.ones((height, width), np.bool_)
    mask[:, : width // 3] = False
    mask[: height // 4, -width // 4 :] = False
    return mask


def grey_image(mask: BoolArray, *, white: int = 255) -> Image.Image:
    """Black where the mask is False, ``white`` elsewhere."""
    return Image.fromarray(np.where(mask, white, 0).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image as a file of a kind."""
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def write_mask(path: Path, mask: BoolArray, **options: Any) -> Path:
    """Writes a mask as a grey image of the kind that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".jpg": "JPEG", ".png": "PNG"}[path.suffix.lower()]
    path.write_bytes(encoded(grey_image(mask), kind, **options))
    return path
