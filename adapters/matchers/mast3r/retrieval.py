"""Retrieval: place recognition from the encoder's tokens.

Tokens are put when a keyframe is described, on the describing thread; a keyframe can be found once
it was added, on the mapping thread.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Collection
from itertools import chain
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from adapters.matchers.mast3r.asmk import AsmkModel, AsmkSignature
from engine.types import Features, Float32Array, Float64Array, FrameId

_SELECTIVITY = 3.0  # exponent of the match kernel, the ASMK paper's alpha
_KEPT_QUERIES = 256  # queries are mostly recent keyframes; 192 kB each at most

FromTokens = TypeVar("FromTokens")


class PooledPlaceIndex:
    """One vector for each keyframe, compared by the cosine; needs no file.

    The vector is the mean of the tokens at unit length: the tokens are signed, which rules out a
    generalised mean, and a few of them are very long, which must not drown the others. All tokens
    share a strong common component, so plain means of any two images are nearly parallel. What
    distinguishes images is how they differ from the mean over all keyframes added so far; it is
    subtracted at each query, on both sides, so no vector is ever out of date.

    Memory: 4 bytes per value and keyframe, 4 kB for ViT-L.
    """

    def __init__(self) -> None:
        self._pending: _Pending[Float32Array] = _Pending()
        self._keyframes = _Keyframes()
        self._vectors = _GrowingArray(np.float32)  # (K, E)
        self._sum: Float64Array = np.zeros(0)  # (E,) over all keyframes

    def put_tokens(self, frame_id: FrameId, tokens: Tensor) -> None:
        """Keeps a keyframe's (N, E) tokens, N >= 1, until it is added."""
        normalised = torch.nn.functional.normalize(tokens.detach().float(), dim=1)
        vector = normalised.mean(dim=0).cpu().numpy()
        self._pending.put(frame_id, vector)

    def add(self, features: Features) -> None:
        """Adds a keyframe whose tokens were put.

        Raises:
            KeyError: its tokens were not put.
            ValueError: it was added before.
        """
        self._keyframes.refuse_added(features.frame_id)
        vector = self._pending.take(features.frame_id)
        self._keyframes.add(features.frame_id)
        self._vectors.append(vector[None])
        self._sum = vector.astype(np.float64) if not self._sum.size else self._sum + vector

    def query(
        self, frame_id: FrameId, *, exclude: Collection[FrameId], limit: int
    ) -> list[tuple[FrameId, float]]:
        """The keyframes most like an added one, best first, of equal ones the one added first.

        A score is the cosine of the two vectors without the mean of all, in (0, 1]: above 0 two
        keyframes are more alike than any two. Others are left out.

        Raises:
            KeyError: the keyframe was never added.
        """
        row = self._keyframes.row(frame_id)
        vectors = self._vectors.values
        centred = vectors - (self._sum / len(vectors)).astype(np.float32)
        norms = np.sqrt(np.einsum("ke,ke->k", centred, centred))
        # Not a product of BLAS, which rounds a row by its place: equal vectors have equal scores.
        products = np.einsum("ke,e->k", centred, centred[row])
        cosines = products / np.maximum(norms * norms[row], np.finfo(np.float32).tiny)
        return self._keyframes.best(cosines, row=row, exclude=exclude, limit=limit)


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
        self._pending: _Pending[tuple[AsmkSignature, AsmkSignature]] = _Pending()
        self._keyframes = _Keyframes()
        self._queries: OrderedDict[FrameId, AsmkSignature] = OrderedDict()
        # A posting is one word of one keyframe; those of a keyframe follow each other.
        self._postings: defaultdict[int, list[int]] = defaultdict(list)  # by word
        self._words = _GrowingArray(np.int64)  # (P,)
        self._bits = _GrowingArray(np.uint64)  # (P, B)
        self._owners = _GrowingArray(np.int64)  # (P,) row of the keyframe
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


class _Pending(Generic[FromTokens]):
    """What was made from the tokens of keyframes that are not added yet; for several threads."""

    def __init__(self) -> None:
        self._pending: dict[FrameId, FromTokens] = {}
        self._lock = threading.Lock()

    def put(self, frame_id: FrameId, from_tokens: FromTokens) -> None:
        with self._lock:
            self._pending[frame_id] = from_tokens

    def take(self, frame_id: FrameId) -> FromTokens:
        with self._lock:
            return self._pending.pop(frame_id)


class _Keyframes:
    """Added keyframes in order."""

    def __init__(self) -> None:
        self._frame_ids: list[FrameId] = []
        self._rows: dict[FrameId, int] = {}

    def refuse_added(self, frame_id: FrameId) -> None:
        if frame_id in self._rows:
            raise ValueError(f"keyframe {frame_id} was added before")

    def add(self, frame_id: FrameId) -> int:
        self._rows[frame_id] = len(self._frame_ids)
        self._frame_ids.append(frame_id)
        return self._rows[frame_id]

    def row(self, frame_id: FrameId) -> int:
        return self._rows[frame_id]

    def best(
        self, scores: Float32Array, *, row: int, exclude: Collection[FrameId], limit: int
    ) -> list[tuple[FrameId, float]]:
        """The keyframes of the largest (K,) scores above 0, that of ``row`` never among them."""
        scores[row] = 0.0
        scores[[self._rows[other] for other in exclude if other in self._rows]] = 0.0
        best = np.argsort(-scores, kind="stable")[:limit]
        return [
            (self._frame_ids[idx], min(float(scores[idx]), 1.0))
            for idx in best
            if scores[idx] > 0.0
        ]


class _GrowingArray:
    """Rows that are appended; their room doubles as needed."""

    def __init__(self, dtype: DTypeLike) -> None:
        self._room: NDArray[Any] = np.empty(0, dtype)
        self._num_rows = 0

    def append(self, rows: NDArray[Any]) -> None:
        num_rows = self._num_rows + len(rows)
        if num_rows > len(self._room):
            num_larger = max(num_rows, 2 * len(self._room))
            larger = np.empty((num_larger, *rows.shape[1:]), self._room.dtype)
            if self._num_rows:
                larger[: self._num_rows] = self.values
            self._room = larger
        self._room[self._num_rows : num_rows] = rows
        self._num_rows = num_rows

    @property
    def values(self) -> NDArray[Any]:
        """All rows, a view that the next append may leave behind."""
        return self._room[: self._num_rows]
