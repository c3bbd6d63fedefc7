"""Network images: scaling and cropping to the network's input size, and back to original pixels.

The sizes are those the public checkpoints were trained and used with (DUSt3R, Wang et al., 2024,
section 4): the long side is scaled, then both sides are cut to whole 16 px tokens about the centre.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from engine.types import Float64Array, Uint8Array, freeze_field

PATCH_PX = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PixelMapping:
    """From px of a network image to px of its original and back, both in COLMAP's convention.

    ``original_xy = network_xy * scale_xy + offset_xy``; with pixel centres at one half, neither
    scaling nor cropping needs a half-pixel correction.
    """

    scale_xy: Float64Array  # (2,) original px per network px
    offset_xy: Float64Array  # (2,) original px: where the network image's corner lies

    def __post_init__(self) -> None:
        for name in ("scale_xy", "offset_xy"):
            freeze_field(self, name, (2,), np.float64)

    def to_original(self, points_xy: ArrayLike) -> Float64Array:
        """Points (N, 2) in px of the original image from points in network px."""
        scaled_xy: Float64Array = np.asarray(points_xy, np.float64) * self.scale_xy
        return scaled_xy + self.offset_xy

    def to_network(self, points_xy: ArrayLike) -> Float64Array:
        """Points (N, 2) in network px from points in px of the original image.

        Points in the margin that the crop cuts away come out beyond the network image.
        """
        moved_xy: Float64Array = np.asarray(points_xy, np.float64) - self.offset_xy
        return moved_xy / self.scale_xy


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NetworkImage:
    """An image at network size, and where it lies in its original."""

    pixels: Uint8Array  # (H, W, 3) RGB, H and W multiples of 16
    mapping: PixelMapping

    def __post_init__(self) -> None:
        freeze_field(self, "pixels", (None, None, 3), np.uint8)

    @property
    def width(self) -> int:
        """Width in network pixels."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """Height in network pixels."""
        return int(self.pixels.shape[0])

    def to_original(self, points_xy: ArrayLike) -> Float64Array:
        """As ``PixelMapping.to_original``."""
        return self.mapping.to_original(points_xy)

    def to_network(self, points_xy: ArrayLike) -> Float64Array:
        """As ``PixelMapping.to_network``."""
        return self.mapping.to_network(points_xy)


def prepare_image(
    pixels: Uint8Array, *, edge_px: int = 512, crop_square: bool = False
) -> NetworkImage:
    """Scales the long side to ``edge_px`` and cuts both sides to multiples of 16 px.

    Small images are enlarged. The short side never falls below one token: a very long panorama is
    stretched across instead.

    Args:
        pixels: (H, W, 3) RGB.
        edge_px: long side of the network image; rounded down to a multiple of 16 by the crop.
        crop_square: cut exactly square images to 4:3, as upstream does by default: the public
            checkpoints saw no square image at this size in training.

    Raises:
        ValueError: ``edge_px`` is less than one token.
    """
    height, width = pixels.shape[:2]
    plan = plan_image((width, height), edge_px=edge_px, crop_square=crop_square)
    scaled = _resized(pixels, width=plan.scaled_size[0], height=plan.scaled_size[1])
    (left, top), (width, height) = plan.corner, plan.size
    return NetworkImage(
        pixels=np.ascontiguousarray(scaled[top : top + height, left : left + width]),
        mapping=plan.mapping,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImagePlan:
    """How an image becomes one of the network; sizes are width and height in px."""

    scaled_size: tuple[int, int]
    corner: tuple[int, int]  # of what is cut out of the scaled image
    size: tuple[int, int]  # of that
    mapping: PixelMapping


def plan_image(
    image_size: tuple[int, int], *, edge_px: int, crop_square: bool = False
) -> ImagePlan:
    """As `prepare_image` treats an image of that width and height in px.

    Raises:
        ValueError: ``edge_px`` is less than one token.
    """
    if edge_px < PATCH_PX:
        raise ValueError(f"edge_px: {edge_px}, expected at least {PATCH_PX}")
    original_size = np.array(image_size)
    scaled_size = np.array([_scaled_side(int(s), original_size, edge_px) for s in original_size])
    half_size = (scaled_size // 2 * 2) // PATCH_PX * (PATCH_PX // 2)
    if crop_square and scaled_size[0] == scaled_size[1]:
        half_size[1] = max(PATCH_PX // 2, 3 * half_size[0] // 4)
    corner = scaled_size // 2 - half_size
    scale_xy = original_size / scaled_size
    return ImagePlan(
        scaled_size=(int(scaled_size[0]), int(scaled_size[1])),
        corner=(int(corner[0]), int(corner[1])),
        size=(int(2 * half_size[0]), int(2 * half_size[1])),
        mapping=PixelMapping(scale_xy=scale_xy, offset_xy=corner * scale_xy),
    )


def normalise(images: torch.Tensor) -> torch.Tensor:
    """The network's input: (B, 3, H, W) float32 in [-1, 1] from (B, H, W, 3) uint8, same device."""
    return images.permute(0, 3, 1, 2).float().div_(255.0).sub_(0.5).div_(0.5)


def _scaled_side(side: int, original_size: Float64Array, edge_px: int) -> int:
    return max(PATCH_PX, round(side * edge_px / int(original_size.max())))


def _resized(pixels: Uint8Array, *, width: int, height: int) -> Uint8Array:
    """The image at another size, antialiased.

    The checkpoints were trained on Pillow's LANCZOS when shrinking and BICUBIC when enlarging.
    PyTorch's antialiased bicubic equals Pillow's BICUBIC to one grey level, and when shrinking is
    twice as close to LANCZOS as OpenCV's INTER_AREA; OpenCV's INTER_CUBIC and INTER_LANCZOS4 do
    not antialias.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    # torch.tensor copies: a frame's pixels are read-only, which tensors cannot be.
    planes = torch.tensor(pixels).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(
        planes, size=(height, width), mode="bicubic", antialias=True
    )
    resized: Uint8Array = scaled[0].permute(1, 2, 0).contiguous().numpy()
    return resized
