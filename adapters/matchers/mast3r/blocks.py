"""Transformer blocks of MASt3R: attention with rotary positions, MLPs and layer norms.

Pre-norm blocks as in CroCo v2 (Weinzaepfel et al., ICCV 2023), on which DUSt3R and MASt3R are
built. Parameters have the names they have in the public checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.matchers.mast3r.architecture import Grid

_NORM_EPSILON = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RotaryTable:
    """Cosines and sines of the angles by which tokens are turned (Su et al., RoFormer, 2021).

    Of the channels of a head, the first half encodes y, the second x; each half is made of
    the first and second coordinates of the plane vectors that are turned.
    """

    cosine: Tensor  # (N, 1, d)
    signed_sine: Tensor  # (N, 1, d), negative where it multiplies the second coordinate

    def rotate(self, heads: Tensor) -> Tensor:
        """Turns queries or keys (B, N, h, d) by the positions of their tokens."""
        swapped = heads.view(*heads.shape[:-1], 2, 2, -1).flip(-2).flatten(-3)
        return torch.addcmul(heads * self.cosine, swapped, self.signed_sine)


def rotary_table(
    positions_yx: Tensor, *, head_dim: int, base: float, dtype: torch.dtype
) -> RotaryTable:
    """The table for tokens at ``positions_yx`` (N, 2), whole numbers of tokens.

    Angles are float32 whatever ``dtype`` is: rounded to 8 bits, far tokens would be elsewhere.
    """
    num_frequencies = head_dim // 4
    exponents = torch.arange(num_frequencies, device=positions_yx.device) / num_frequencies
    angles = positions_yx.float()[:, :, None] * base**-exponents  # (N, 2, Q)
    cosine, sine = angles.cos(), angles.sin()
    return RotaryTable(
        cosine=torch.stack([cosine, cosine], 2).flatten(1)[:, None].to(dtype),
        signed_sine=torch.stack([-sine, sine], 2).flatten(1)[:, None].to(dtype),
    )


def grid_rotary_table(
    grid: Grid, *, head_dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> RotaryTable:
    """The table for a grid of tokens, row by row."""
    rows, columns = (torch.arange(size, device=device) for size in grid)
    positions_yx = torch.cartesian_prod(rows, columns)
    return rotary_table(positions_yx, head_dim=head_dim, base=base, dtype=dtype)


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of (B, N, h, d) to (B, M, h, d), heads joined again: (B, N, h * d)."""
    attended = functional.scaled_dot_product_attention(
        queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    )
    return attended.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Tokens of one view attend to each other."""

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, table: RotaryTable) -> Tensor:
        """(B, N, dim) to (B, N, dim)."""
        heads = self.qkv(tokens).view(*tokens.shape[:-1], 3 * self.num_heads, -1)
        turned = table.rotate(heads[:, :, : 2 * self.num_heads])
        queries, keys = turned.chunk(2, dim=2)
        attended = _attend(queries, keys, heads[:, :, 2 * self.num_heads :])
        return _tensor(self.proj(attended))


class CrossAttention(nn.Module):
    """Tokens of one view attend to the tokens of the other, which may be another number."""

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.projq = nn.Linear(dim, dim)
        self.projk = nn.Linear(dim, dim)
        self.projv = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, tokens: Tensor, memory: Tensor, table: RotaryTable, memory_table: RotaryTable
    ) -> Tensor:
        """(B, N, dim) attends to (B, M, dim): (B, N, dim)."""
        queries, keys, values = (
            projected.view(*projected.shape[:-1], self.num_heads, -1)
            for projected in (self.projq(tokens), self.projk(memory), self.projv(memory))
        )
        attended = _attend(table.rotate(queries), memory_table.rotate(keys), values)
        return _tensor(self.proj(attended))


class Mlp(nn.Module):
    """Two layers with an exact GELU between them."""

    def __init__(self, dim: int, *, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., dim) to (..., out_dim)."""
        return _tensor(self.fc2(functional.gelu(self.fc1(tokens))))


class EncoderBlock(nn.Module):
    """Self-attention and MLP, each added to what it read."""

    def __init__(self, dim: int, *, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.attn = SelfAttention(dim, num_heads=num_heads)
        self.norm2 = layer_norm(dim)
        self.mlp = Mlp(dim, hidden_dim=mlp_ratio * dim, out_dim=dim)

    def forward(self, tokens: Tensor, table: RotaryTable) -> Tensor:
        """(B, N, dim) to (B, N, dim)."""
        tokens = tokens + self.attn(self.norm1(tokens), table)
        return _tensor(tokens + self.mlp(self.norm2(tokens)))


class DecoderBlock(nn.Module):
    """Self-attention, attention to the other view, and MLP (DUSt3R, section 3.1)."""

    def __init__(self, dim: int, *, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.attn = SelfAttention(dim, num_heads=num_heads)
        self.norm2 = layer_norm(dim)
        self.norm_y = layer_norm(dim)
        self.cross_attn = CrossAttention(dim, num_heads=num_heads)
        self.norm3 = layer_norm(dim)
        self.mlp = Mlp(dim, hidden_dim=mlp_ratio * dim, out_dim=dim)

    def forward(
        self, tokens: Tensor, memory: Tensor, table: RotaryTable, memory_table: RotaryTable
    ) -> Tensor:
        """(B, N, dim), with the other view's tokens (B, M, dim) in sight, to (B, N, dim)."""
        tokens = tokens + self.attn(self.norm1(tokens), table)
        seen = self.norm_y(memory)
        tokens = tokens + self.cross_attn(self.norm2(tokens), seen, table, memory_table)
        return _tensor(tokens + self.mlp(self.norm3(tokens)))


def layer_norm(dim: int) -> nn.LayerNorm:
    """The layer norm all parts of the network use."""
    return nn.LayerNorm(dim, eps=_NORM_EPSILON)


def _tensor(value: Tensor) -> Tensor:
    """Calls of modules are untyped; this gives their result its type back."""
    return value
