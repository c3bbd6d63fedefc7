"""Heads of each view: points by a DPT, descriptors by an MLP on tokens.

DPT is the convolutional decoder of Ranftl et al. (ICCV 2021), as DUSt3R uses it; the descriptor
head is section 3.2 of MASt3R. Networks may run in half precision, but exponentials and norms are
taken in float32: the last step from a logarithm to a length must not be rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.matchers.mast3r.architecture import Grid, NetworkShape, ValueRange
from adapters.matchers.mast3r.blocks import Mlp

_LOCAL_MLP_RATIO = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ViewOutput:
    """The network's output for every pixel of one view of a pair, all float32."""

    descriptors: Tensor  # (B, H, W, D), unit length
    descriptor_confidence: Tensor  # (B, H, W)
    points3D: Tensor | None  # (B, H, W, 3), in the camera frame of view 1; None if not asked for
    confidence: Tensor | None  # (B, H, W), of the points; None if not asked for


class ViewHead(nn.Module):
    """Both heads of one view."""

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        self.shape = shape
        dim = shape.encoder_dim + shape.decoder_dim
        num_channels = shape.descriptor_dim + int(shape.two_confs)
        self.dpt = DenseHead(shape)
        self.head_local_features = Mlp(
            dim,
            hidden_dim=_LOCAL_MLP_RATIO * dim,
            out_dim=num_channels * shape.patch_size**2,
        )

    def forward(self, layers: Mapping[int, Tensor], *, grid: Grid, with_points: bool) -> ViewOutput:
        """Reads the decoder's layers, (B, N, channels) by number, for a grid of N tokens.

        The DPT is not run unless points are asked for, or descriptors have no confidence of their
        own and take that of the points.
        """
        shape = self.shape
        local = self.local_features(layers)
        patches = local.view(len(local), *grid, -1, shape.patch_size, shape.patch_size)
        descriptors = unit_descriptors(patches[:, :, :, : shape.descriptor_dim])
        own = self._own_confidence(patches) if shape.two_confs else None
        if own is not None and not with_points:
            return ViewOutput(
                descriptors=descriptors,
                descriptor_confidence=own,
                points3D=None,
                confidence=None,
            )
        raw = self.dpt([layers[hook] for hook in shape.hooks], grid)
        confidence = exponential(raw[:, 3], shape.confidence_range)
        return ViewOutput(
            descriptors=descriptors,
            descriptor_confidence=confidence if own is None else own,
            points3D=points_of(raw[:, :3]) if with_points else None,
            confidence=confidence if with_points else None,
        )

    def _own_confidence(self, patches: Tensor) -> Tensor:
        """The last channel of patches (B, h, w, channels, 16, 16) to (B, 16 h, 16 w)."""
        by_pixel = patches[:, :, :, -1].transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return exponential(by_pixel, self.shape.descriptor_confidence_range)

    def local_features(self, layers: Mapping[int, Tensor]) -> Tensor:
        """First and last layer to the raw channels of each patch, (B, N, channels * 16 * 16)."""
        ends = torch.cat([layers[0], layers[self.shape.decoder_depth]], dim=-1)
        local: Tensor = self.head_local_features(ends)
        return local


class DenseHead(nn.Module):
    """DPT: four layers of tokens, from coarse to fine, to four raw channels a pixel."""

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        encoder_dim, decoder_dim = shape.encoder_dim, shape.decoder_dim
        fine, half, whole, coarse = shape.dpt_layer_dims
        feature, last = shape.dpt_feature_dim, shape.dpt_last_dim
        self.act_postprocess = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(encoder_dim, fine, 1), nn.ConvTranspose2d(fine, fine, 4, stride=4)
                ),
                nn.Sequential(
                    nn.Conv2d(decoder_dim, half, 1), nn.ConvTranspose2d(half, half, 2, stride=2)
                ),
                nn.Sequential(nn.Conv2d(decoder_dim, whole, 1)),
                nn.Sequential(
                    nn.Conv2d(decoder_dim, coarse, 1),
                    nn.Conv2d(coarse, coarse, 3, stride=2, padding=1),
                ),
            ]
        )
        self.scratch = FusionStages(shape.dpt_layer_dims, feature_dim=feature)
        self.head = nn.Sequential(
            nn.Conv2d(feature, last, 3, padding=1),
            nn.UpsamplingBilinear2d(scale_factor=2),
            nn.Conv2d(last, last, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(last, 4, 1),
        )

    def forward(self, hooked: list[Tensor], grid: Grid) -> Tensor:
        """Tokens of the hooked layers, (B, N, channels) each, to x, y, z, confidence (B, 4, H, W).

        All channels are logarithmic.
        """
        maps = [
            # A view: tokens lie as an image whose channels come last.
            process(tokens.transpose(1, 2).view(len(tokens), -1, *grid))
            for process, tokens in zip(self.act_postprocess, hooked, strict=True)
        ]
        raw: Tensor = self.head(self.scratch(maps, grid))
        return raw


class FusionStages(nn.Module):
    """Fuses maps of 4, 2, 1 and 1/2 pixels per token, the coarsest first."""

    def __init__(self, layer_dims: tuple[int, int, int, int], *, feature_dim: int) -> None:
        super().__init__()
        # Checkpoints name these four convolutions twice.
        self.layer_rn = nn.ModuleList(
            nn.Conv2d(dim, feature_dim, 3, padding=1, bias=False) for dim in layer_dims
        )
        self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn = self.layer_rn
        self.refinenet1 = FusionBlock(feature_dim)
        self.refinenet2 = FusionBlock(feature_dim)
        self.refinenet3 = FusionBlock(feature_dim)
        self.refinenet4 = FusionBlock(feature_dim)

    def forward(self, maps: list[Tensor], grid: Grid) -> Tensor:
        """Four maps (B, channels, rows, columns) to one of 8 pixels per token."""
        fine, half, whole, coarse = (
            convolve(each) for convolve, each in zip(self.layer_rn, maps, strict=True)
        )
        rows, columns = grid
        fused = self.refinenet4(coarse)
        # An odd number of tokens was rounded up when it was halved.
        fused = self.refinenet3(fused[:, :, :rows, :columns], whole)
        fused = self.refinenet2(fused, half)
        fused = self.refinenet1(fused, fine)
        result: Tensor = fused
        return result


class FusionBlock(nn.Module):
    """Adds a finer map to what came before, refines the sum and doubles its size."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.resConfUnit1 = ResidualUnit(dim)
        self.resConfUnit2 = ResidualUnit(dim)
        self.out_conv = nn.Conv2d(dim, dim, 1)

    def forward(self, fused: Tensor, finer: Tensor | None = None) -> Tensor:
        """(B, dim, rows, columns) to (B, dim, 2 * rows, 2 * columns)."""
        if finer is not None:
            fused = fused + self.resConfUnit1(finer)
        # DPT enlarges first. A convolution of single pixels commutes with interpolation, whose
        # weights add up to one, and costs a quarter on the smaller map.
        refined = self.out_conv(self.resConfUnit2(fused))
        return functional.interpolate(refined, scale_factor=2, mode="bilinear", align_corners=True)


class ResidualUnit(nn.Module):
    """Two convolutions, added to what they read."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, dim, rows, columns) to the same."""
        inner = self.conv1(functional.relu(features))
        refined: Tensor = self.conv2(functional.relu_(inner))
        return refined.add_(features)


def points_of(logarithmic: Tensor) -> Tensor:
    """Raw x, y, z (B, 3, H, W) to points (B, H, W, 3), float32.

    A point keeps its direction; its distance is exp(r) - 1 of the raw distance r (DUSt3R, depth
    mode "exp").
    """
    raw = logarithmic.permute(0, 2, 3, 1).float().contiguous()
    distance = torch.linalg.vector_norm(raw, dim=-1, keepdim=True)
    points: Tensor = raw * (distance.expm1() / distance.clamp_min(1e-8))
    return points


def exponential(logarithmic: Tensor, value_range: ValueRange) -> Tensor:
    """Raw confidence to confidence of the same shape, float32, within its range."""
    least, largest = value_range
    return logarithmic.float().exp().clamp_max_(largest - least).add_(least)


def unit_descriptors(patches: Tensor) -> Tensor:
    """Raw channels of patches (B, h, w, D, 16, 16) to descriptors (B, 16 h, 16 w, D), float32.

    The one copy made is the result: the network's half precision, the order of pixels and the
    length are all changed while writing it.
    """
    batch, rows, columns, dim, edge, _ = patches.shape
    length = torch.linalg.vector_norm(patches, dim=3, keepdim=True, dtype=torch.float32)
    scale = length.clamp_min_(torch.finfo(torch.float32).tiny).reciprocal_()
    by_pixel = (0, 1, 4, 2, 5, 3)
    descriptors = torch.empty(
        (batch, rows, edge, columns, edge, dim), dtype=torch.float32, device=patches.device
    )
    torch.mul(patches.permute(by_pixel), scale.permute(by_pixel), out=descriptors)
    return descriptors.view(batch, rows * edge, columns * edge, dim)
