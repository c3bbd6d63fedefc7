"""Nearest descriptors by inner product, in blocks that bound the memory; CPU and CUDA alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Scores that exist at a time. On a CPU 4 MB of them stay near the caches; a GPU wants large
# products and few launches.
CPU_BLOCK_SCORES = 2**20
CUDA_BLOCK_SCORES = 2**26

_CHUNK = 128  # targets whose best score is kept; the winning chunk is scored again
# Targets per block. Past this a block's queries get too few on a CPU; on a GPU fewer of them make
# products too small to fill it.
_CPU_MAX_TARGETS = 4096
_CUDA_MAX_TARGETS = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreBlock:
    """How many pairs, queries and targets are scored against each other at once."""

    num_pairs: int
    num_queries: int
    num_targets: int  # a multiple of the chunk, unless all targets are fewer


def choose_block(
    *,
    num_pairs: int,
    num_queries: int,
    num_targets: int,
    num_components: int,
    max_block_scores: int,
    max_block_targets: int = _CPU_MAX_TARGETS,
) -> ScoreBlock:
    """Splits a batch of searches into blocks of at most ``max_block_scores`` scores.

    Whole chunks of targets come first, then queries, then pairs. The descriptors of the winning
    chunks, which are gathered to be scored again, also number at most ``max_block_scores`` floats
    (unless one query's chunk alone is more).

    Raises:
        ValueError: ``max_block_scores`` is less than one chunk of scores.
    """
    if max_block_scores < _CHUNK:
        raise ValueError(f"max_block_scores: {max_block_scores}, expected at least {_CHUNK}")
    block_targets = min(num_targets, max_block_scores // _CHUNK * _CHUNK, max_block_targets)
    floats_per_query = max(block_targets, _CHUNK * num_components)
    rows = min(num_queries, max(1, max_block_scores // floats_per_query))
    return ScoreBlock(
        num_pairs=min(num_pairs, max(1, max_block_scores // (rows * floats_per_query))),
        num_queries=rows,
        num_targets=block_targets,
    )


@torch.no_grad()
def nearest_rows(
    queries: torch.Tensor, targets: torch.Tensor, *, max_block_scores: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each query the target with the largest inner product; the first one among equals.

    Keeping only the best score of every 128 targets makes the reduction as cheap as reading the
    scores (with indices it costs as much as the product); the index comes from scoring the winning
    128 again.

    Args:
        queries: (Q, D) or (B, Q, D), floating.
        targets: (N, D) or (B, N, D), N > 0; pair b of a batch searches only its own targets.
        max_block_scores: the most scores that exist at a time; None: a default for the device.

    Returns:
        the position in the targets (Q,) or (B, Q) int64, and the score (Q,) or (B, Q).

    Raises:
        ValueError: there is no target, or the block is too small to be of use.
    """
    if queries.ndim == 2:
        idx, score = nearest_rows(queries[None], targets[None], max_block_scores=max_block_scores)
        return idx[0], score[0]
    num_pairs, num_queries, _ = queries.shape
    if targets.shape[1] == 0:
        raise ValueError("targets: there are none to search")
    idx = torch.empty((num_pairs, num_queries), dtype=torch.int64, device=queries.device)
    score = queries.new_empty((num_pairs, num_queries))
    if idx.numel() == 0:
        return idx, score
    if max_block_scores is None:
        max_block_scores = CUDA_BLOCK_SCORES if queries.is_cuda else CPU_BLOCK_SCORES
    block = choose_block(
        num_pairs=num_pairs,
        num_queries=num_queries,
        num_targets=targets.shape[1],
        num_components=targets.shape[2],
        max_block_scores=max_block_scores,
        max_block_targets=_CUDA_MAX_TARGETS if queries.is_cuda else _CPU_MAX_TARGETS,
    )
    for pair in range(0, num_pairs, block.num_pairs):
        pairs = slice(pair, pair + block.num_pairs)
        for row in range(0, num_queries, block.num_queries):
            rows = slice(row, row + block.num_queries)
            found = _search(queries[pairs, rows], targets[pairs], num_at_once=block.num_targets)
            idx[pairs, rows], score[pairs, rows] = found
    return idx, score


def _search(
    queries: torch.Tensor, targets: torch.Tensor, *, num_at_once: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and score (B, Q) of the best target, over blocks of ``num_at_once`` targets."""
    # One buffer for all blocks: on a CPU fresh pages cost more than the scores they hold.
    buffer = queries.new_empty(queries.shape[0] * queries.shape[1] * num_at_once)
    by_component = queries.transpose(1, 2).contiguous()
    best_of_chunks = torch.cat(
        [
            _chunk_maxima(_scores(by_component, targets[:, start : start + num_at_once], buffer))
            for start in range(0, targets.shape[1], num_at_once)
        ],
        dim=1,
    )
    chunk = best_of_chunks.argmax(dim=1)
    return _best_within(chunk, queries, targets)


def _scores(
    by_component: torch.Tensor, targets: torch.Tensor, buffer: torch.Tensor
) -> torch.Tensor:
    """All inner products (B, n, Q) of one block, written to the front of ``buffer``.

    Queries, given as (B, D, Q), come last: neighbouring threads of a GPU then take the maxima of
    neighbouring queries, half again as fast as along the last axis.
    """
    shape = (targets.shape[0], targets.shape[1], by_component.shape[2])
    scores = buffer[: math.prod(shape)].view(shape)
    return torch.bmm(targets, by_component, out=scores)


def _chunk_maxima(scores: torch.Tensor) -> torch.Tensor:
    """The best score of each chunk (B, ceil(n / chunk), Q); the last chunk may be short."""
    num_pairs, num_targets, num_queries = scores.shape
    num_whole = num_targets // _CHUNK * _CHUNK
    whole = scores[:, :num_whole].reshape(num_pairs, -1, _CHUNK, num_queries).amax(dim=2)
    if num_whole == num_targets:
        return whole
    return torch.cat([whole, scores[:, num_whole:].amax(dim=1, keepdim=True)], dim=1)


def _best_within(
    chunk: torch.Tensor, queries: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and score (B, Q) of the best target within each query's chunk (B, Q)."""
    num_targets = targets.shape[1]
    pair = torch.arange(len(targets), device=targets.device)[:, None, None]
    within = torch.arange(_CHUNK, device=targets.device)
    candidates = (chunk[:, :, None] * _CHUNK + within).clamp_(max=num_targets - 1)
    scores = torch.matmul(targets[pair, candidates], queries[..., None])[..., 0]
    score, best = scores.max(dim=2)
    idx = candidates.gather(2, best[..., None])[..., 0]
    return idx, score
