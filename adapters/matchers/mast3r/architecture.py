"""Architecture: widths and depths of a MASt3R network and the ranges of what it predicts.

MASt3R (Leroy, Cabon and Revaud, "Grounding Image Matching in 3D with MASt3R", ECCV 2024) is
DUSt3R (Wang et al., CVPR 2024) with a descriptor per pixel: a ViT encoder, two decoders that
attend to each other, and for each view a head for points and a head for descriptors.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Final

from engine.errors import ConfigError, InferenceError

Grid = tuple[int, int]  # rows and columns of tokens
ValueRange = tuple[float, float]  # the least and the largest value


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkShape:
    """The parameters of a MASt3R network's architecture.

    Raises:
        ConfigError: no network of this kind has such a shape.
    """

    encoder_dim: int
    encoder_depth: int
    encoder_heads: int
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int
    descriptor_dim: int
    image_edge_px: int = 512  # the long edge of the images it was trained on
    patch_size: int = 16  # px per token and axis
    mlp_ratio: int = 4
    dpt_layer_dims: tuple[int, int, int, int] = (96, 192, 384, 768)
    dpt_feature_dim: int = 256
    dpt_last_dim: int = 128
    two_confs: bool = True  # descriptors have a confidence of their own
    confidence_range: ValueRange = (1.0, inf)
    descriptor_confidence_range: ValueRange = (0.0, inf)
    rope_base: float = 100.0

    def __post_init__(self) -> None:
        for part, dim, heads in (
            ("encoder", self.encoder_dim, self.encoder_heads),
            ("decoder", self.decoder_dim, self.decoder_heads),
        ):
            # Rotary positions need a sine and a cosine for each of two axes.
            if heads < 1 or dim < 4 or dim % (4 * heads):
                raise ConfigError(
                    f"the {part} of a MASt3R network has heads of a multiple of 4 channels,"
                    f" not {dim} channels in {heads} heads"
                )
        if self.patch_size != 16:
            raise ConfigError(f"MASt3R has patches of 16 px, not {self.patch_size} px")
        if self.encoder_depth < 1 or self.decoder_depth < 2:
            raise ConfigError(
                "a MASt3R network has at least one encoder block and two decoder blocks,"
                f" not {self.encoder_depth} and {self.decoder_depth}"
            )
        if self.descriptor_dim < 1:
            raise ConfigError("a MASt3R network has descriptors, this one has none")

    def grid_of(self, *, height: int, width: int) -> Grid:
        """Rows and columns of tokens of an image, px.

        Raises:
            InferenceError: an edge is not made of whole patches.
        """
        if height % self.patch_size or width % self.patch_size or not height * width:
            raise InferenceError(
                f"MASt3R reads images of whole {self.patch_size} px patches,"
                f" not {width} x {height} px"
            )
        return height // self.patch_size, width // self.patch_size

    @property
    def hooks(self) -> tuple[int, int, int, int]:
        """The decoder's layers that the DPT head reads; layer 0 is the encoder's output."""
        depth = self.decoder_depth
        return (0, depth * 2 // 4, depth * 3 // 4, depth)


# The only configuration that was published: ViT-Large encoder, ViT-Base decoders.
VIT_LARGE: Final = NetworkShape(
    encoder_dim=1024,
    encoder_depth=24,
    encoder_heads=16,
    decoder_dim=768,
    decoder_depth=12,
    decoder_heads=12,
    descriptor_dim=24,
)
