"""Place recognition by one vector for each keyframe, and what place indexes share."""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engine.types import Features, Float32Array, Float64Array, FrameId

FromTokens = TypeVar("FromTokens")


class VectorPlaceIndex:
    """One vector for each keyframe, compared by the cosine.

    The vector is the mean of the tokens at unit length: the tokens are signed, which rules out a
    generalised mean, and a few of them are very long, which must not drown the others. All tokens
    share a strong common component, so plain means of any two images are nearly parallel. What
    distinguishes images is how they differ from the mean over all keyframes added so far; it is
    subtracted at each query, on both sides, so no vector is ever out of date.

    Memory: 4 bytes per value and keyframe, 4 kB for ViT-L.
    """

    def __init__(self) -> None:
        self._pending: Pending[Float32Array] = Pending()
        self._keyframes = Keyframes()
        self._vectors = GrowingArray(np.float32)  # (K, E)
        self._sum: Float64Array = np.zeros(0)  # (E,) over all keyframes

    def put_vector(self, frame_id: FrameId, vector: Float32Array) -> None:
        """Keeps a keyframe's vector (E,) until it is added."""
        self._pending.put(frame_id, vector)

    def add(self, features: Features) -> None:
        """Adds a keyframe whose vector was put.

        Raises:
            KeyError: its vector was not put.
            ValueError: it was added before.
        """
        self._keyframes.refuse_added(features.frame_id)
        self.add_vector(features.frame_id, self._pending.take(features.frame_id))

    def add_vector(self, frame_id: FrameId, vector: Float32Array) -> None:
        """Adds a keyframe by its vector (E,).

        Raises:
            ValueError: it was added before.
        """
        self._keyframes.refuse_added(frame_id)
        self._keyframes.add(frame_id)
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


class Pending(Generic[FromTokens]):
    """What was made from the tokens of keyframes that are not added yet; for several threads."""

    def __init__(self) -> None:
        self._pending: dict[FrameId, FromTokens] = {}
        self._lock = threading.Lock()

    def put(self, frame_id: FrameId, from_tokens: FromTokens) -> None:
        """Keeps it until it is taken."""
        with self._lock:
            self._pending[frame_id] = from_tokens

    def take(self, frame_id: FrameId) -> FromTokens:
        """Takes what was put; KeyError when nothing was."""
        with self._lock:
            return self._pending.pop(frame_id)


class Keyframes:
    """Added keyframes in order."""

    def __init__(self) -> None:
        self._frame_ids: list[FrameId] = []
        self._rows: dict[FrameId, int] = {}

    def refuse_added(self, frame_id: FrameId) -> None:
        """Raises ValueError for one that was added."""
        if frame_id in self._rows:
            raise ValueError(f"keyframe {frame_id} was added before")

    def add(self, frame_id: FrameId) -> int:
        """Adds one; returns its row."""
        self._rows[frame_id] = len(self._frame_ids)
        self._frame_ids.append(frame_id)
        return self._rows[frame_id]

    def row(self, frame_id: FrameId) -> int:
        """Its row; KeyError when it was never added."""
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


class GrowingArray:
    """Rows that are appended; their room doubles as needed."""

    def __init__(self, dtype: DTypeLike) -> None:
        self._room: NDArray[Any] = np.empty(0, dtype)
        self._num_rows = 0

    def append(self, rows: NDArray[Any]) -> None:
        """Adds rows after the others."""
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
