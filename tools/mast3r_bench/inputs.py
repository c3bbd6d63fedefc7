"""Networks and images to measure with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapters.matchers.mast3r.architecture import NetworkShape
from adapters.matchers.mast3r.images import normalise
from adapters.matchers.mast3r.matcher import Device
from adapters.matchers.mast3r.network import Mast3rNetwork
from engine.errors import ConfigError
from engine.types import Frame, FrameId, Uint8Array

TINY = NetworkShape(
    encoder_dim=64,
    encoder_depth=2,
    encoder_heads=4,
    decoder_dim=48,
    decoder_depth=10,
    decoder_heads=4,
    descriptor_dim=24,
)
_SEED = 0
_FRAMES_BETWEEN = 4  # of the town's 300: neighbouring images share most of what they show


def random_network(shape: NetworkShape, *, device: str, dtype: torch.dtype) -> Mast3rNetwork:
    """A network whose layers neither grow nor shrink what they read, made where it runs.

    The weights are the same in every type, up to its rounding.
    """
    with torch.device("meta"):
        network = Mast3rNetwork(shape)
    network.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    network.mask_token.zero_()
    generator = torch.Generator(device).manual_seed(_SEED)
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
        elif isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            weight = module.weight
            is_transposed = isinstance(module, nn.ConvTranspose2d)
            fan = weight.shape[0] if is_transposed else weight[0].numel()
            uniform = torch.empty(weight.shape, device=device)
            weight.copy_(uniform.uniform_(-1.0, 1.0, generator=generator) * (3.0 / fan) ** 0.5)
            if module.bias is not None:
                module.bias.zero_()
    for head in (network.downstream_head1, network.downstream_head2):
        last: Any = head.dpt.head[-1]
        last.weight.mul_(0.125)  # what it gives is exponentiated
        # As for a checkpoint that is loaded.
        nn.utils.convert_conv2d_weight_memory_format(head.dpt, torch.channels_last)
    return network


def make_frames(num: int, *, size: tuple[int, int], folder: Path | None) -> list[Frame]:
    """Frames of the network's size: photos, or a flight over the synthetic town.

    Raises:
        ConfigError: there are not enough photos.
    """
    pixels = town_images(num, size=size) if folder is None else photos(num, folder, size=size)
    return [
        Frame(
            frame_id=FrameId(index + 1),
            camera_key="bench",
            source="bench",
            index=index,
            name=f"{index:06d}.jpg",
            captured_at_s=float(index),
            received_at_s=float(index),
            pixels=image,
        )
        for index, image in enumerate(pixels)
    ]


def town_images(num: int, *, size: tuple[int, int]) -> list[Uint8Array]:
    """Images of a flight, not far from each other."""
    from adapters.town.source import SyntheticTown, TownOptions

    options = TownOptions(width=size[0], height=size[1])
    ids = itertools.count(1)
    town = SyntheticTown(options, next_frame_id=lambda: FrameId(next(ids)))
    return [
        town.render(index * _FRAMES_BETWEEN % options.num_frames).pixels for index in range(num)
    ]


def photos(num: int, folder: Path, *, size: tuple[int, int]) -> list[Uint8Array]:
    """The first images of a folder, scaled and cut to the size."""
    import cv2

    if not folder.is_dir():
        raise ConfigError(f"--images {folder}: there is no such folder")
    images: list[Uint8Array] = []
    for path in sorted(folder.iterdir()):
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if image is None:
            continue
        ratio = max(size[0] / image.shape[1], size[1] / image.shape[0])
        scaled = [max(s, round(ratio * e)) for s, e in zip(size, image.shape[1::-1], strict=True)]
        image = cv2.resize(image, scaled, interpolation=cv2.INTER_AREA)
        left, top = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
        cut = image[top : top + size[1], left : left + size[0], ::-1]
        images.append(np.ascontiguousarray(cut))
        if len(images) == num:
            return images
    raise ConfigError(f"--images {folder}: has {len(images)} images, {num} are needed")


def closest_pairs(num: int) -> list[tuple[int, int]]:
    """That many pairs of as few images as there can be, neighbours first."""
    num_images = next(images for images in itertools.count(2) if images * (images - 1) // 2 >= num)
    pairs = itertools.combinations(range(num_images), 2)
    return sorted(pairs, key=lambda pair: (pair[1] - pair[0], pair))[:num]


def network_images(frames: Sequence[Frame], device: Device) -> Tensor:
    """The frames as the network reads them, (F, 3, H, W)."""
    pixels = torch.from_numpy(np.stack([frame.pixels for frame in frames]))
    return normalise(pixels.to(device.name))
