"""The MASt3R network: an image to tokens, and the tokens of two images to points and descriptors.

Encoding is separate from decoding, so that an image is encoded once however many pairs it is in.
Parameters have the names and shapes of the public checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable

import torch
from torch import Tensor, nn

from adapters.matchers.mast3r.architecture import Grid, NetworkShape
from adapters.matchers.mast3r.blocks import (
    DecoderBlock,
    EncoderBlock,
    RotaryTable,
    grid_rotary_table,
    layer_norm,
)
from adapters.matchers.mast3r.heads import ViewHead, ViewOutput
from engine.errors import InferenceError

__all__ = ["Mast3rNetwork", "ViewOutput"]


class PatchEmbedding(nn.Module):
    """Square patches of pixels to tokens."""

    def __init__(self, dim: int, *, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, N, dim), row by row."""
        embedded: Tensor = self.proj(images)
        return embedded.flatten(2).transpose(1, 2).contiguous()


class Mast3rNetwork(nn.Module):
    """ViT encoder, two decoders that attend to each other, two heads each (MASt3R, figure 2).

    The two views of a pair have different roles: points of both are in the camera frame of view 1.
    It runs in the type of its weights (float32, bfloat16 or float16), and gives float32.
    """

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        self.shape = shape
        dim, mlp_ratio = shape.decoder_dim, shape.mlp_ratio
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))  # of the pre-training; not used
        self.patch_embed = PatchEmbedding(shape.encoder_dim, patch_size=shape.patch_size)
        self.enc_blocks = nn.ModuleList(
            EncoderBlock(shape.encoder_dim, num_heads=shape.encoder_heads, mlp_ratio=mlp_ratio)
            for _ in range(shape.encoder_depth)
        )
        self.enc_norm = layer_norm(shape.encoder_dim)
        self.decoder_embed = nn.Linear(shape.encoder_dim, dim)
        self.dec_blocks, self.dec_blocks2 = (
            nn.ModuleList(
                DecoderBlock(dim, num_heads=shape.decoder_heads, mlp_ratio=mlp_ratio)
                for _ in range(shape.decoder_depth)
            )
            for _ in range(2)
        )
        self.dec_norm = layer_norm(dim)
        self.downstream_head1 = ViewHead(shape)
        self.downstream_head2 = ViewHead(shape)
        # Few, as images come in few sizes, and never dropped: CUDA graphs hold their addresses.
        self._tables: dict[Hashable, RotaryTable] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, in which the network runs."""
        return self.enc_norm.weight.dtype

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), RGB from -1 to 1, to tokens (B, N, encoder_dim).

        Raises:
            InferenceError: an edge of the images is not made of whole patches.
        """
        height, width = images.shape[-2:]
        grid = self.shape.grid_of(height=height, width=width)
        tokens = self.patch_embed(images.to(self.dtype))
        head_dim = self.shape.encoder_dim // self.shape.encoder_heads
        table = self._table(tokens, grid, head_dim=head_dim)
        for block in self.enc_blocks:
            tokens = block(tokens, table)
        normed: Tensor = self.enc_norm(tokens)
        return normed

    @torch.no_grad()
    def decode(
        self, tokens1: Tensor, tokens2: Tensor, *, grid1: Grid, grid2: Grid, with_points: bool
    ) -> tuple[ViewOutput, ViewOutput]:
        """Tokens of two encoded views, (B, N1, encoder_dim) and (B, N2, encoder_dim), to outputs.

        Grids are rows and columns of tokens, and may differ. Without points the DPT heads, more
        than a third of the work, are not run.

        Raises:
            InferenceError: the tokens do not fill their grid, or views are not as many.
        """
        depth = self.shape.decoder_depth
        wanted = self.shape.hooks if with_points or not self.shape.two_confs else (0, depth)
        layers1, layers2 = self.decoder_features(
            tokens1, tokens2, grid1=grid1, grid2=grid2, wanted=wanted
        )
        first: ViewOutput = self.downstream_head1(layers1, grid=grid1, with_points=with_points)
        second: ViewOutput = self.downstream_head2(layers2, grid=grid2, with_points=with_points)
        return first, second

    @torch.no_grad()
    def decoder_features(
        self,
        tokens1: Tensor,
        tokens2: Tensor,
        *,
        grid1: Grid,
        grid2: Grid,
        wanted: Collection[int],
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """The layers of both decoders whose numbers are wanted, (B, N, channels) each.

        Layer 0 is the encoder's output, layer k that of block k; the last one is normed.
        """
        _check_tokens(tokens1, tokens2, grid1=grid1, grid2=grid2)
        tokens1, tokens2 = tokens1.to(self.dtype), tokens2.to(self.dtype)
        head_dim = self.shape.decoder_dim // self.shape.decoder_heads
        table1 = self._table(tokens1, grid1, head_dim=head_dim)
        table2 = self._table(tokens2, grid2, head_dim=head_dim)
        layers1, layers2 = {0: tokens1}, {0: tokens2}
        view1, view2 = self.decoder_embed(tokens1), self.decoder_embed(tokens2)
        for k, (block1, block2) in enumerate(
            zip(self.dec_blocks, self.dec_blocks2, strict=True), start=1
        ):
            # Both sides see the other one as it was before this block.
            view1, view2 = (
                block1(view1, view2, table1, table2),
                block2(view2, view1, table2, table1),
            )
            if k in wanted and k < self.shape.decoder_depth:
                layers1[k], layers2[k] = view1, view2
        layers1[self.shape.decoder_depth] = self.dec_norm(view1)
        layers2[self.shape.decoder_depth] = self.dec_norm(view2)
        return layers1, layers2

    def _table(self, tokens: Tensor, grid: Grid, *, head_dim: int) -> RotaryTable:
        key = grid, head_dim, tokens.dtype, tokens.device
        table = self._tables.get(key)
        if table is None:
            table = grid_rotary_table(
                grid,
                head_dim=head_dim,
                base=self.shape.rope_base,
                dtype=tokens.dtype,
                device=tokens.device,
            )
            table = self._tables.setdefault(key, table)
        return table


def _check_tokens(tokens1: Tensor, tokens2: Tensor, *, grid1: Grid, grid2: Grid) -> None:
    if len(tokens1) != len(tokens2):
        raise InferenceError(f"{len(tokens1)} first views cannot be paired with {len(tokens2)}")
    for tokens, (rows, columns) in ((tokens1, grid1), (tokens2, grid2)):
        if tokens.shape[1] != rows * columns:
            raise InferenceError(
                f"{tokens.shape[1]} tokens do not fill a grid of {rows} x {columns}"
            )
