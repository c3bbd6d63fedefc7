"""ASMK signatures: images described for place recognition, from the encoder's tokens.

They are those of the binarised aggregated selective match kernel, ASMK* (Tolias, Avrithis
and Jegou, "To aggregate or not to aggregate: selective match kernels for image search", ICCV 2013),
over local features weighted by their norm (Tolias, Jenicek and Chum, "Learning and aggregating deep
local descriptors for instance-level recognition", ECCV 2020); here those are encoder tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.types import Int64Array

Uint64Array = NDArray[np.uint64]

_ASSIGNED_ADDING = 1  # words a local feature is assigned to when its keyframe is added
_ASSIGNED_QUERYING = 5  # and when its keyframe is the query
_BLOCK_WORDS = 8192  # bounds the distances in memory to 8192 words, 10 MB for 300 features
_SPARE_CANDIDATES = 4  # words compared exactly beyond those wanted


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AsmkSignature:
    """An image as one string of bits for each visual word that occurs in it."""

    words: Int64Array  # (W,) ascending
    bits: Uint64Array  # (W, B) signs of the summed residuals, the last bits 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AsmkModel:
    """Whitening and visual words of a retrieval checkpoint."""

    mean: Tensor  # (1, E) float64
    projection: Tensor  # (E, D) float64
    centroids: Tensor  # (K, D) float32
    num_features: float  # local features kept of an image; in [-1, 0) minus their share of tokens

    @property
    def num_bits(self) -> int:
        """Length D of local features, and of the strings of bits."""
        return int(self.centroids.shape[1])

    @torch.inference_mode()
    def signatures(self, tokens: Tensor) -> tuple[AsmkSignature, AsmkSignature]:
        """Two signatures of an image from its (N, E) tokens: one for the index, one for queries."""
        features = self.local_features(tokens)
        words = self.nearest_words(features, num=_ASSIGNED_QUERYING)
        return (
            self._aggregated(features, words[:, :_ASSIGNED_ADDING]),
            self._aggregated(features, words),
        )

    def local_features(self, tokens: Tensor) -> Tensor:
        """Whitens (N, E) tokens and keeps those of largest norm, (n, D) float32, largest first."""
        whitened = (tokens.to(self.mean.device).double() - self.mean) @ self.projection
        wanted = self.num_features
        num = int(-wanted * len(tokens)) if wanted < 0 else int(wanted)
        strongest = whitened.norm(dim=1).topk(min(max(num, 1), len(tokens))).indices
        return whitened[strongest].float()

    def nearest_words(self, features: Tensor, *, num: int) -> Tensor:
        """The nearest words of (n, D) features, (n, at most num) int64, nearest first.

        Blocks of words are searched with matrix products; the best few of all blocks are compared
        by their distance proper, as products may have been rounded (TF32).
        """
        num_candidates = num + _SPARE_CANDIDATES
        values = features.new_empty((len(features), 0))
        words = torch.empty((len(features), 0), dtype=torch.int64, device=features.device)
        for start in range(0, len(self.centroids), _BLOCK_WORDS):
            block = self.centroids[start : start + _BLOCK_WORDS]
            affinity = features @ block.T - 0.5 * block.square().sum(dim=1)
            best = affinity.topk(min(num_candidates, len(block)), dim=1)
            values = torch.cat([values, best.values], dim=1)
            words = torch.cat([words, best.indices + start], dim=1)
            kept = values.topk(min(num_candidates, words.shape[1]), dim=1)
            values, words = kept.values, words.gather(1, kept.indices)
        distances = (features[:, None] - self.centroids[words]).square().sum(dim=2)
        return words.gather(1, distances.argsort(dim=1, stable=True)[:, :num])

    def _aggregated(self, features: Tensor, word_idx: Tensor) -> AsmkSignature:
        """Signs of the summed residuals of (n, D) features by the (n, m) words they belong to."""
        words, positions = torch.unique(word_idx, return_inverse=True)
        # A product of matrices rather than a scattered sum: it adds in the same order on every run.
        membership = features.new_zeros((len(words), len(features)), dtype=torch.float64)
        membership[positions.T, torch.arange(len(features), device=features.device)] = 1.0
        sums = membership @ features.double()
        sums -= membership.sum(dim=1, keepdim=True) * self.centroids[words].double()
        return AsmkSignature(words=words.cpu().numpy(), bits=_packed((sums > 0).cpu().numpy()))


def _packed(signs: NDArray[np.bool_]) -> Uint64Array:
    """(W, D) signs as (W, B) words of 64 bits, filled up with zeros."""
    in_bytes = np.packbits(signs, axis=1)
    padded = np.zeros((len(signs), -(-in_bytes.shape[1] // 8) * 8), np.uint8)
    padded[:, : in_bytes.shape[1]] = in_bytes
    return padded.view(np.uint64)
