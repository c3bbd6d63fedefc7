"""Place recognition by vectors that the cluster makes of keyframes."""

from __future__ import annotations

from collections.abc import Callable, Collection

from adapters.matchers.place_vectors import VectorPlaceIndex
from engine.errors import InferenceError
from engine.types import Features, Float32Array, FrameId


class RemotePlaces:
    """A `PlaceIndex`; a keyframe whose vector does not come is not recognized.

    Args:
        vector_of: waits for the vector (E,) of a keyframe; None: it does not come.
    """

    def __init__(self, vector_of: Callable[[FrameId], Float32Array | None]) -> None:
        self._vector_of = vector_of
        self._index = VectorPlaceIndex()

    def add(self, features: Features) -> None:
        """Adds a keyframe.

        Raises:
            InferenceError: its vector did not come.
            ValueError: it was added before.
        """
        vector = self._vector_of(features.frame_id)
        if vector is None:
            raise InferenceError("the cluster does not say what recognizes the place")
        self._index.put_vector(features.frame_id, vector)
        self._index.add(features)

    def query(
        self, frame_id: FrameId, *, exclude: Collection[FrameId], limit: int
    ) -> list[tuple[FrameId, float]]:
        """The keyframes most like an added one; none for one that could not be added."""
        try:
            return self._index.query(frame_id, exclude=exclude, limit=limit)
        except KeyError:
            return []
