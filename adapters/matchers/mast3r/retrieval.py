"""Retrieval: place recognition from the encoder's tokens.

Tokens are put when a keyframe is described, on the describing thread; a keyframe can be found once
it was added, on the mapping thread.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Collection
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from adapters.matchers.mast3r.asmk import AsmkModel, AsmkSignature
from adapters.matchers.place_vectors import (
    GrowingArray,
    Keyframes,
    Pending,
    VectorPlaceIndex,
)
from engine.types import Features, Float32Array, Float64Array, FrameId

_SELECTIVITY = 3.0  # exponent of the match kernel, the ASMK paper's alpha
_KEPT_QUERIES = 256  # queries are mostly recent keyframes; 192 kB each at most


class PooledPlaceIndex(VectorPlaceIndex):
    """One vector for each keyframe, compared by the cosine; needs no file."""

    def put_tokens(self, frame_id: FrameId, tokens: Tensor) -> None:
        """Keeps a keyframe's (N, E) tokens, N >= 1, until it is added."""
        self.put_vector(frame_id, pooled_vector(tokens))


def pooled_vector(tokens: Tensor) -> Float32Array:
    """The mean (E,) of tokens (N, E) at unit length."""
    normalised = torch.nn.functional.normalize(tokens.detach().float(), dim=1)
    vector: Float32Array = normalised.mean(dim=0).cpu().numpy()
    return vector


class AsmkPlaceIndex:
    """Keyframes by their visual words, with the public retrieval checkpoint.

    Two keyframes are compared word by word with a selective function of the Hamming distance
    (ASMK*, see `asmk`); an inverted file finds the keyframes that share a word.

    Memory: up to 38 kB of bits per keyframe with the public files (300 features of 1024 values) and
    8 kB around them. The query signatures of the latest 256 keyframes are kept besides, 192 kB each
    at most; an older one is queried with its signature in the index, one word for each feature.
    """

    def __init__(self, model: AsmkModel) -> None:
        self._model = model
        self._pending: Pending[tuple[AsmkSignature, AsmkSignature]] = Pending()
        self._keyframes = Keyframes()
        self._queries: OrderedDict[FrameId, AsmkSignature] = OrderedDict()
        # A posting is one word of one keyframe; those of a keyframe follow each other.
        self._postings: defaultdict[int, list[int]] = defaultdict(list)  # by word
        self._words = GrowingArray(np.int64)  # (P,)
        self._bits = GrowingArray(np.uint64)  # (P, B)
        self._owners = GrowingArray(np.int64)  # (P,) row of the keyframe
        self._ends = [0]  # postings up to and with each keyframe, after a leading 0
        num_bits = model.num_bits
        cosines = 1.0 - 2.0 * np.arange(num_bits + 1) / num_bits
        self._kernel = np.maximum(cosines, 0.0) ** _SELECTIVITY  # (D + 1,) by Hamming distance

    def put_tokens(self, frame_id: FrameId, tokens: Tensor) -> None:
        """Keeps a keyframe's (N, E) tokens, N >= 1, until it is added."""
        self._pending.put(frame_id, self._model.signatures(tokens.detach()))

    def add(self, features: Features) -> None:
        """Adds a keyframe whose tokens were put.

        Raises:
            KeyError: its tokens were not put.
            ValueError: it was added before.
        """
        frame_id = features.frame_id
        self._keyframes.refuse_added(frame_id)
        indexed, query = self._pending.take(frame_id)
        row = self._keyframes.add(frame_id)
        for posting, word in enumerate(indexed.words.tolist(), start=self._ends[-1]):
            self._postings[word].append(posting)
        self._words.append(indexed.words)
        self._bits.append(indexed.bits)
        self._owners.append(np.full(len(indexed.words), row))
        self._ends.append(len(self._words.values))
        self._queries[frame_id] = query
        if len(self._queries) > _KEPT_QUERIES:
            self._queries.popitem(last=False)

    def query(
        self, frame_id: FrameId, *, exclude: Collection[FrameId], limit: int
    ) -> list[tuple[FrameId, float]]:
        """The keyframes most like an added one, best first, of equal ones the one added first.

        A score, in (0, 1], is the cube root of the ASMK similarity: the cosine that all words would
        have to share to make the pair as similar. Keyframes without a similar word are left out.

        Raises:
            KeyError: the keyframe was never added.
        """
        row = self._keyframes.row(frame_id)
        similarities = self._similarities(self._queries.get(frame_id) or self._indexed(row))
        scores = (similarities ** (1.0 / _SELECTIVITY)).astype(np.float32)
        return self._keyframes.best(scores, row=row, exclude=exclude, limit=limit)

    def _similarities(self, query: AsmkSignature) -> Float64Array:
        """ASMK similarity to every keyframe, (K,) in 0..1."""
        lists = [self._postings.get(word, ()) for word in query.words.tolist()]
        counts = [len(postings) for postings in lists]
        postings = np.fromiter(chain.from_iterable(lists), np.int64, sum(counts))
        query_bits = np.repeat(query.bits, counts, axis=0)
        differences = np.bitwise_count(self._bits.values[postings] ^ query_bits)
        weights = self._kernel[differences.sum(axis=1, dtype=np.int64)]
        num_words = np.diff(self._ends)
        totals = np.bincount(self._owners.values[postings], weights, minlength=len(num_words))
        similarities: Float64Array = totals / np.sqrt(num_words * len(query.words))
        return similarities

    def _indexed(self, row: int) -> AsmkSignature:
        postings = slice(self._ends[row], self._ends[row + 1])
        return AsmkSignature(words=self._words.values[postings], bits=self._bits.values[postings])
