"""A network for tests and measurements that really matches, without weights.

The tokens are the pixels themselves. Descriptors are classical: how brightness and colour change
around a pixel, as the derivatives up to the fourth order of smoothed images, which suits images
that neighbour each other in a video. Points are those of a camera and a surface that are known, so
that focal lengths and depths can be checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from adapters.matchers.mast3r.architecture import Grid
from adapters.matchers.mast3r.heads import ViewOutput
from adapters.matchers.mast3r.images import PATCH_PX

FOCAL_RATIO = 1.1  # focal length of every camera, of the longer edge of its network image
LEFT_DEPTH, RIGHT_DEPTH = 2.0, 4.0  # along the optical axis, at an image's left and right edge

_BRIGHTNESS_SIGMA_PX, _BRIGHTNESS_ORDERS = 3.0, (1, 2, 3, 4)  # 14 derivatives
_COLOR_SIGMA_PX, _COLOR_ORDERS = 6.0, (1, 2)  # 5 derivatives of each of two differences
_REACH = 4  # sigmas that a kernel reaches to each side
_LEAST_CONTRAST = 0.01  # derivatives this short are rounding errors
_FULL_CONTRAST = 0.05  # above the least one: as sure as it takes for a confidence of one half


class PatchNetwork:
    """``PairNetwork``; what it says of an image does not depend on the other one of the pair."""

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), RGB from -1 to 1, to their patches (B, N, 768)."""
        return functional.unfold(images, PATCH_PX, stride=PATCH_PX).transpose(1, 2)

    def decode(
        self, tokens1: Tensor, tokens2: Tensor, *, grid1: Grid, grid2: Grid, with_points: bool
    ) -> tuple[ViewOutput, ViewOutput]:
        """Patches of two views to what is matched; points of each view in its own camera."""
        return (
            _view(_images(tokens1, grid1), with_points=with_points),
            _view(_images(tokens2, grid2), with_points=with_points),
        )


def true_points3D(height: int, width: int) -> Tensor:
    """Points (H, W, 3) of the camera and the surface that all images are said to show."""
    x = (torch.arange(width) + 0.5).expand(height, width)
    y = (torch.arange(height) + 0.5)[:, None].expand(height, width)
    focal_px = FOCAL_RATIO * max(height, width)
    rays = torch.stack(
        [(x - width / 2) / focal_px, (y - height / 2) / focal_px, torch.ones_like(x)], dim=2
    )
    depths = LEFT_DEPTH + (RIGHT_DEPTH - LEFT_DEPTH) * x / width
    return rays * depths[:, :, None]


def _images(tokens: Tensor, grid: Grid) -> Tensor:
    """Patches (B, N, 768) to images (B, 3, H, W)."""
    size = (grid[0] * PATCH_PX, grid[1] * PATCH_PX)
    return functional.fold(
        tokens.float().transpose(1, 2), size, kernel_size=PATCH_PX, stride=PATCH_PX
    )


def _view(images: Tensor, *, with_points: bool) -> ViewOutput:
    raw = _derivatives_of_colors(images)
    length = torch.linalg.vector_norm(raw, dim=3)
    batch, height, width = length.shape
    nothing = functional.one_hot(torch.tensor(0), raw.shape[3]).float()
    has_texture = length > _LEAST_CONTRAST
    points = true_points3D(height, width).expand(batch, -1, -1, -1) if with_points else None
    return ViewOutput(
        descriptors=torch.where(
            has_texture[..., None], functional.normalize(raw, dim=3), nothing
        ).contiguous(),
        descriptor_confidence=(length - _LEAST_CONTRAST).clamp(min=0.0) / _FULL_CONTRAST,
        points3D=points,
        confidence=torch.ones_like(length) if with_points else None,
    )


def _derivatives_of_colors(images: Tensor) -> Tensor:
    """24 components of each pixel (B, H, W, 24) that distinguish it; longer: more texture."""
    red, green, blue = images.unbind(1)
    brightness = (red + green + blue) / 3.0
    colors = torch.stack([red - green, blue - (red + green) / 2.0], dim=1)
    planes = [
        _derivatives(brightness[:, None], sigma_px=_BRIGHTNESS_SIGMA_PX, orders=_BRIGHTNESS_ORDERS),
        _derivatives(colors, sigma_px=_COLOR_SIGMA_PX, orders=_COLOR_ORDERS),
    ]
    return torch.cat(planes, dim=1).permute(0, 2, 3, 1)


def _derivatives(planes: Tensor, *, sigma_px: float, orders: Sequence[int]) -> Tensor:
    """Derivatives of smoothed planes (B, C, H, W), all of each order, (B, C * num, H, W).

    Natural images have less of the higher orders; the factor evens that out.
    """
    kernels = _hermite_kernels(sigma_px, max(orders))
    reach = kernels.shape[1] // 2
    single = planes.flatten(0, 1)[:, None]
    padded = functional.pad(single, (reach, reach, reach, reach), mode="replicate")
    along_x = functional.conv2d(padded, kernels[:, None, None, :])
    derivatives = [
        functional.conv2d(
            along_x[:, order - order_y, None],
            math.sqrt(order) * kernels[None, order_y, None, :, None],
        )
        for order in orders
        for order_y in range(order + 1)
    ]
    batch, _, height, width = planes.shape
    return torch.cat(derivatives, dim=1).reshape(batch, -1, height, width)


def _hermite_kernels(sigma_px: float, max_order: int) -> Tensor:
    """Derivatives of a Gaussian up to an order, of equal size, (max_order + 1, K)."""
    reach = math.ceil(_REACH * sigma_px)
    x = torch.arange(-reach, reach + 1) / sigma_px
    gaussian = torch.exp(-x.square() / 2.0)
    gaussian /= gaussian.sum()
    polynomials = [torch.ones_like(x), x]
    for order in range(1, max_order):
        polynomials.append(x * polynomials[order] - order * polynomials[order - 1])
    kernels = torch.stack(
        [
            gaussian * polynomial / math.sqrt(math.factorial(order))
            for order, polynomial in enumerate(polynomials)
        ]
    )
    # Sampling leaves even orders a little brightness.
    kernels[1:] -= kernels[1:].sum(dim=1, keepdim=True) * gaussian
    return kernels
