"""Place recognition by vectors that the cluster makes of keyframes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection

from adapters.matchers.place_vectors import VectorPlaceIndex
from engine.errors import InferenceError
from engine.types import Features, Float32Array, FrameId

_MAX_PENDING = 1000  # keyframes whose vector is asked for again; the oldest are dropped
_MAX_TRIES = 4  # for each of them
_RETRIED_AT_ONCE = 4  # with each keyframe that has its vector


class RemotePlaces:
    """A `PlaceIndex`; a keyframe without a vector is added later, once its vector can be made.

    The keyframes that follow a vector that came bring the missing ones, a few at a time. So those
    of an absence of the cluster are recognized afterwards, by vectors of the same kind.

    Args:
        vector_of: waits for the vector (E,) of a keyframe; None: it cannot be made now.
    """

    def __init__(self, vector_of: Callable[[FrameId], Float32Array | None]) -> None:
        self._vector_of = vector_of
        self._index = VectorPlaceIndex()
        self._pending: OrderedDict[FrameId, int] = OrderedDict()  # times that each was tried

    def add(self, features: Features) -> None:
        """Adds a keyframe.

        Raises:
            InferenceError: its vector cannot be made now.
            ValueError: it was added before.
        """
        if not self._add(features.frame_id):
            self._put_off(features.frame_id, num_tried=1)
            raise InferenceError("what recognizes the place is not known yet")
        for frame_id in list(self._pending)[:_RETRIED_AT_ONCE]:
            num_tried = self._pending.pop(frame_id) + 1
            if not self._add(frame_id):
                if num_tried < _MAX_TRIES:
                    self._put_off(frame_id, num_tried=num_tried)
                return

    def _add(self, frame_id: FrameId) -> bool:
        vector = self._vector_of(frame_id)
        if vector is None:
            return False
        self._index.add_vector(frame_id, vector)
        return True

    def _put_off(self, frame_id: FrameId, *, num_tried: int) -> None:
        self._pending[frame_id] = num_tried
        if len(self._pending) > _MAX_PENDING:
            self._pending.popitem(last=False)

    def query(
        self, frame_id: FrameId, *, exclude: Collection[FrameId], limit: int
    ) -> list[tuple[FrameId, float]]:
        """The keyframes most like an added one; none for one that could not be added yet."""
        try:
            return self._index.query(frame_id, exclude=exclude, limit=limit)
        except KeyError:
            return []
