"""Overlay grid: where in a camera's image things are that are not in the world.

Logos, clocks, displays of flight data, dirt on the lens, the drone's own legs: their matches stay
in the image while all others move, and contradict that motion. A grid over the image counts where
this was seen. A cell that several keyframes agree on is covered by an overlay.

A cell is uncovered again when matches there move with the world: what was fixed to the camera for a
while, such as somebody walking ahead, is not for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import cv2
import numpy as np

from engine.estimators.stationary_matches import MotionEvidence, others_move, stayed
from engine.geometry import image_scale
from engine.types import (
    BoolArray,
    Float64Array,
    FrameId,
    ImagePair,
    Int32Array,
    Int64Array,
    PairMatches,
)

_CELL_PX = 8.0  # at an image edge of 1000 px
_SURE_KEYFRAMES, _SURE_PAIRS, _SURE_SHARE = 4, 4, 0.25  # that a cell needs to be covered
_LIKELY_KEYFRAMES, _LIKELY_SHARE = 2, 0.1  # near a sure one
_SUSPECT_KEYFRAMES, _SUSPECT_SHARE = 3, 0.1  # of a cell whose matches alone prove nothing
_NEAR_CELLS = 3  # a likely cell is so near to a sure one
_GAP_CELLS = 5  # between covered ones that are covered as well: other digits, other glyphs
_MARGIN_CELLS = 1
_AROUND_CELLS = 2
_FORGOTTEN_PAIRS = 40  # that moved so near to a cell, while nothing stayed there
_MAX_SHARE = 0.4  # of the image: more than that is the scene, seen by a camera that stands still
_MAX_BOXES = 20


class OverlayGrid:
    """Where the matches of one camera stay while others move.

    Args:
        size: width and height of the camera's images.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size
        self._cell_px = _CELL_PX * image_scale(*size)
        shape = tuple(int(np.ceil(edge / self._cell_px)) for edge in reversed(size))
        self._num_stayed = np.zeros(shape, np.int64)  # pairs
        self._num_moved = np.zeros(shape, np.int64)  # pairs
        self._num_keyframes = np.zeros(shape, np.int64)  # whose matches stayed
        self._num_moved_since = np.zeros(shape, np.int64)  # near by, since matches stayed near by
        self._keyframes: dict[tuple[int, int], set[FrameId]] = {}  # of cells, the first few each
        self._has_evidence = False
        self._is_covered = np.zeros(shape, np.bool_)
        self._is_suspect = np.zeros(shape, np.bool_)

    def state(self) -> tuple[Int32Array, list[list[int]]]:
        """What was found out by now, for a run that goes on.

        Returns:
            Counts of each cell and whether it is covered, (4, rows, columns), and the keyframes
            whose matches stayed in a cell, with its row and column before them.
        """
        counts = [self._num_stayed, self._num_moved, self._num_moved_since, self._is_covered]
        seen_in = [[*cell, *sorted(ids)] for cell, ids in self._keyframes.items()]
        return np.stack(counts).astype(np.int32), seen_in

    def restore(self, counts: Int32Array, seen_in: Iterable[Sequence[int]]) -> None:
        """Goes on with what `state` gave.

        Raises:
            ValueError: it is of images of another size.
        """
        if counts.shape != (4, *self._is_covered.shape):
            raise ValueError(f"an overlay grid of shape {counts.shape}")
        self._num_stayed, self._num_moved, self._num_moved_since = counts[:3].astype(np.int64)
        self._is_covered = counts[3].astype(np.bool_)
        for row, column, *ids in seen_in:
            self._keyframes[row, column] = {FrameId(i) for i in ids}
            self._num_keyframes[row, column] = len(ids)
        self._has_evidence = bool((self._num_keyframes >= _SUSPECT_KEYFRAMES).any())
        self.update_suspects()

    @property
    def is_empty(self) -> bool:
        """Whether no match ever stayed while others moved."""
        return not (self._keyframes or self._is_covered.any())

    @property
    def share(self) -> float:
        """Share of the image that is covered."""
        return float(self._is_covered.mean())

    @property
    def has_evidence(self) -> bool:
        """Whether matches stayed in one place of several keyframes.

        Before that, it does not matter where others moved.
        """
        return self._has_evidence

    def add(self, pair: ImagePair, matches: PairMatches, judged: MotionEvidence) -> None:
        """Counts where matches of a pair stayed, and where they moved."""
        for row, column in np.unique(self._cells(_ends(matches, judged.is_fixed)), axis=0).tolist():
            self._num_stayed[row, column] += 1
            seen_in = self._keyframes.setdefault((row, column), set())
            if len(seen_in) < 2 * _SURE_KEYFRAMES:
                seen_in.update((pair.first, pair.second))
                self._num_keyframes[row, column] = len(seen_in)
                self._has_evidence |= len(seen_in) >= _SUSPECT_KEYFRAMES
        if self._has_evidence:
            moving = self._cells(_ends(matches, judged.is_moving))
            is_moving = np.zeros_like(self._is_covered)
            is_moving[moving[:, 0], moving[:, 1]] = True
            self._num_moved += is_moving
            self._age(is_moving, self._cells(_ends(matches, judged.is_fixed)))

    def _age(self, is_moving: BoolArray, staying: Int64Array) -> None:
        """Forgets cells around which the world was seen to move often since something stayed."""
        is_staying = np.zeros_like(is_moving)
        is_staying[staying[:, 0], staying[:, 1]] = True
        around = _square(2 * _AROUND_CELLS + 1)
        near_moving, near_staying = (
            cv2.dilate(cells.astype(np.uint8), around).astype(np.bool_)
            for cells in (is_moving, is_staying)
        )
        self._num_moved_since += near_moving
        self._num_moved_since[near_staying] = 0
        is_past = (self._num_moved_since >= _FORGOTTEN_PAIRS) & (self._num_stayed > 0)
        for row, column in np.argwhere(is_past).tolist():
            del self._keyframes[row, column]
            self._num_keyframes[row, column] = self._num_stayed[row, column] = 0

    def covers(self, points_xy: Float64Array) -> BoolArray:
        """Which points (N, 2) are under the cover."""
        cells = self._cells(points_xy)
        return np.asarray(self._is_covered[cells[:, 0], cells[:, 1]])

    def without_suspects(self, matches: PairMatches, *, image_size: tuple[int, int]) -> PairMatches:
        """The matches without those that stay where some did before, when the others move."""
        if not (self._is_suspect.any() and others_move(matches, image_size=image_size)):
            return matches
        cells = self._cells(matches.points2_xy)
        is_suspect = self._is_suspect[cells[:, 0], cells[:, 1]]
        return matches.take(~(is_suspect & stayed(matches, image_size=image_size)))

    def update_suspects(self) -> None:
        """Suspects the cells where matches stayed up to now."""
        if self._keyframes or self._is_suspect.any():
            is_seen = self._num_keyframes >= _SUSPECT_KEYFRAMES
            self._is_suspect = is_seen & (self._share >= _SUSPECT_SHARE)

    def update_cover(self) -> bool:
        """Covers the cells that are sure by now; whether there are new ones."""
        if not self._keyframes and not self._is_covered.any():
            return False
        before, self._is_covered = self._is_covered, self._cover()
        return bool((self._is_covered & ~before).any())

    def mask(self) -> BoolArray:
        """The image (H, W) without what is covered: True where a pixel may be used."""
        lines, columns = (
            np.minimum((np.arange(edge) + 0.5) / self._cell_px, num - 1).astype(np.int64)
            for edge, num in zip(reversed(self._size), self._is_covered.shape, strict=True)
        )
        return np.asarray(~self._is_covered[lines[:, None], columns])

    def boxes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Boxes around the covered parts in px: left, top, right, bottom; the largest first."""
        _, _, found, _ = cv2.connectedComponentsWithStats(self._is_covered.astype(np.uint8))
        parts = sorted(found[1:].tolist(), key=lambda part: (-part[4], part[:2]))
        limits = (*self._size, *self._size)
        return tuple(
            _box([left, top, left + width, top + height], self._cell_px, limits)
            for left, top, width, height, _ in parts[:_MAX_BOXES]
        )

    @property
    def _share(self) -> Float64Array:
        """Share of a cell's pairs whose matches stayed, (rows, columns)."""
        return np.asarray(self._num_stayed / np.maximum(self._num_stayed + self._num_moved, 1))

    def _cover(self) -> BoolArray:
        share = self._share
        is_sure = (
            (self._num_keyframes >= _SURE_KEYFRAMES)
            & (self._num_stayed >= _SURE_PAIRS)
            & (share >= _SURE_SHARE)
        ).astype(np.uint8)
        if not is_sure.any():
            return np.zeros_like(self._is_covered)
        is_likely = (self._num_keyframes >= _LIKELY_KEYFRAMES) & (share >= _LIKELY_SHARE)
        near = cv2.dilate(is_sure, _square(2 * _NEAR_CELLS + 1))
        found = is_sure | (near & is_likely.astype(np.uint8))
        closed = cv2.morphologyEx(found, cv2.MORPH_CLOSE, _square(_GAP_CELLS))
        covered = cv2.dilate(closed, _square(2 * _MARGIN_CELLS + 1)).astype(np.bool_)
        return covered if covered.mean() <= _MAX_SHARE else np.zeros_like(covered)

    def _cells(self, points_xy: Float64Array) -> Int64Array:
        """Row and column (N, 2) of the cells that points (N, 2) fall into."""
        cells = (points_xy[:, ::-1] / self._cell_px).astype(np.int64)
        return np.asarray(np.clip(cells, 0, np.array(self._is_covered.shape) - 1))


def _ends(matches: PairMatches, which: BoolArray) -> Float64Array:
    """Both ends (2 M, 2) of some matches."""
    return np.concatenate([matches.points1_xy[which], matches.points2_xy[which]])


def _box(
    cells: list[int], cell_px: float, limits: tuple[int, int, int, int]
) -> tuple[int, int, int, int]:
    left, top, right, bottom = (
        min(round(edge * cell_px), limit) for edge, limit in zip(cells, limits, strict=True)
    )
    return left, top, right, bottom


def _square(edge: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.ones((edge, edge), np.uint8)
