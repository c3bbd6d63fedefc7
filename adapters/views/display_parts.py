"""Display parts: drawings in parts, of which only changed ones are drawn again; numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engine.types import Float32Array, Int64Array, Uint8Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """A piece of a drawing."""

    positions: Float32Array  # (N, 3) points, (N, 2, 3) segments or (N, M, 3) strokes
    colors: Uint8Array | None = None  # (N, 3) RGB; None: all of the drawing's one colour

    @property
    def num_bytes(self) -> int:
        """The size of its arrays."""
        return self.positions.nbytes + (0 if self.colors is None else self.colors.nbytes)

    def is_close_to(self, other: Part, *, tolerance_map: float) -> bool:
        """Whether both have the same shape and colours, and positions within the tolerance."""
        return (
            self.positions.shape == other.positions.shape
            and _same_colors(self.colors, other.colors)
            and float(np.abs(self.positions - other.positions).max(initial=0.0)) <= tolerance_map
        )


def _same_colors(one: Uint8Array | None, other: Uint8Array | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)


def split_parts(
    numbers: Int64Array, positions: Float32Array, colors: Uint8Array | None = None
) -> dict[int, Part]:
    """Splits rows by their part number (N,), keeping the order within each part."""
    order = np.argsort(numbers, kind="stable")
    unique, starts = np.unique(numbers[order], return_index=True)
    groups = np.split(order, starts[1:]) if len(unique) else []
    return {
        int(number): Part(
            positions=positions[rows], colors=None if colors is None else colors[rows]
        )
        for number, rows in zip(unique, groups, strict=True)
    }


class PartTracker:
    """Keeps the parts that were drawn last, to find those that changed."""

    def __init__(self) -> None:
        self._drawn: dict[int, Part] = {}
        self._is_forgotten = False

    def invalidate(self) -> None:
        """Counts every part as changed at the next update."""
        self._is_forgotten = True

    def update(
        self, parts: Mapping[int, Part], *, tolerance_map: float
    ) -> tuple[dict[int, Part], list[int]]:
        """Sets the wanted parts; returns those to draw and the keys of those to clear.

        Each is compared with what was drawn, not with what was last wanted, so small moves add up.
        """
        vanished = [key for key in self._drawn if key not in parts]
        changed = {
            key: part
            for key, part in parts.items()
            if self._is_forgotten
            or key not in self._drawn
            or not part.is_close_to(self._drawn[key], tolerance_map=tolerance_map)
        }
        for key in vanished:
            del self._drawn[key]
        self._drawn.update(changed)
        self._is_forgotten = False
        return changed, vanished


class ChunkNumbers:
    """Numbers keyframes into chunks, in order of first sight; a number never changes."""

    def __init__(self, *, size: int) -> None:
        self._size = size
        self._chunk_of: dict[int, int] = {}

    def of(self, keyframe_ids: Int64Array) -> Int64Array:
        """The chunk (N,) of each id (N,); ids not seen before are numbered, smallest first."""
        unique, inverse = np.unique(keyframe_ids, return_inverse=True)
        for keyframe_id in unique.tolist():
            self._chunk_of.setdefault(keyframe_id, len(self._chunk_of) // self._size)
        chunks = np.array([self._chunk_of[keyframe_id] for keyframe_id in unique.tolist()])
        numbers: Int64Array = chunks.astype(np.int64)[inverse.reshape(-1)]
        return numbers
