"""Descriptors of keyframes: the latest used in memory, the others where the journal has them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from engine.errors import InferenceError
from engine.types import Features, FrameId, Uint8Array

_MAX_UNREADABLE = 8  # that are tried for one keyframe that comes

ReadDescriptors = Callable[[FrameId], Uint8Array | None]


class DescriptorStore:
    """Keeps descriptors up to a limit, and reads those beyond it back when they are asked for.

    Those that cannot be read back, because they are not written yet or the disk fails, stay. One
    thread at a time.

    Args:
        max_bytes: of descriptors in memory; more only where they cannot be read back.
        read: the descriptors (N, D) of a keyframe as they were written; None: they are not.
    """

    def __init__(self, *, max_bytes: int, read: ReadDescriptors) -> None:
        self._max_bytes = max_bytes
        self._read = read
        self._kept: OrderedDict[FrameId, Uint8Array] = OrderedDict()  # the latest used last
        self._num_bytes = 0
        self._left: set[FrameId] = set()

    @property
    def num_bytes(self) -> int:
        """What is in memory."""
        return self._num_bytes

    def add(self, features: Features) -> None:
        """Takes a keyframe's descriptors."""
        self._keep(features.frame_id, features.descriptors)

    def with_descriptors(self, features: Features) -> Features:
        """A keyframe's table with its descriptors.

        Raises:
            InferenceError: they cannot be read back.
        """
        frame_id = features.frame_id
        if frame_id in self._kept:
            self._kept.move_to_end(frame_id)
            return features if features.descriptors.size else self._joined(features)
        if frame_id not in self._left:
            return features
        descriptors = self._read(frame_id)
        if descriptors is None or len(descriptors) != len(features):
            raise InferenceError(f"the descriptors of keyframe {frame_id} cannot be read back")
        self._left.discard(frame_id)
        self._keep(frame_id, descriptors)
        return self._joined(features)

    def make_room(self) -> list[FrameId]:
        """Lets go of descriptors beyond the limit; returns whose."""
        let_go: list[FrameId] = []
        num_left = _MAX_UNREADABLE
        for frame_id in list(self._kept):
            if self._num_bytes <= self._max_bytes or not num_left:
                break
            written = self._read(frame_id)
            if written is None or not np.array_equal(written, self._kept[frame_id]):
                self._kept.move_to_end(frame_id)  # others have their turn before it is tried again
                num_left -= 1
                continue
            self._num_bytes -= self._kept.pop(frame_id).nbytes
            self._left.add(frame_id)
            let_go.append(frame_id)
        return let_go

    def _keep(self, frame_id: FrameId, descriptors: Uint8Array) -> None:
        if descriptors.size:
            self._kept[frame_id] = descriptors
            self._num_bytes += descriptors.nbytes

    def _joined(self, features: Features) -> Features:
        return replace(features, descriptors=self._kept[features.frame_id])
