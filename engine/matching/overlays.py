"""Overlays: what is in a camera's pictures and not in the world, found by what never moves.

Logos, clocks, displays of flight data, dirt on the lens, the drone's own legs: their matches stay
in the image while all others move, and contradict that motion. Each camera has a grid over its
image that counts where this was seen. A cell that several keyframes agree on is covered by an
overlay: nothing there is matched any more.

A cell is uncovered again when matches under it move with the world: what was fixed to the camera
for a while, such as somebody walking ahead, is not for ever.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np

from engine.estimators.stationary_matches import (
    MotionEvidence,
    find_fixed_matches,
    judge_by_motion,
    others_move,
    stayed,
)
from engine.estimators.two_view_geometry import PairVerifier, VerifiedMatches
from engine.geometry import image_scale
from engine.types import (
    BoolArray,
    Float64Array,
    FrameId,
    ImagePair,
    Int64Array,
    Keyframe,
    PairMatches,
)

_CELL_PX = 8.0  # at an image edge of 1000 px
_SURE_KEYFRAMES, _SURE_PAIRS, _SURE_SHARE = 4, 4, 0.25  # that a cell needs to be covered
_LIKELY_KEYFRAMES, _LIKELY_SHARE = 2, 0.1  # near a sure one
_SUSPECT_KEYFRAMES, _SUSPECT_SHARE = 2, 0.1  # of a cell whose matches alone prove nothing
_NEAR_CELLS = 3  # a likely cell is so near to a sure one
_GAP_CELLS = 5  # between covered ones that are covered as well: other digits, other glyphs
_MARGIN_CELLS = 1
_MAX_SHARE = 0.4  # of the image: more than that is the scene, seen by a camera that stands still
_GROWTH_RATIO = 1.1  # times the keyframes at the last change of a camera's cover
_MAX_BOXES = 20

CameraSize = tuple[str, int, int]  # camera key, width, height


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """The parts of a camera's image that overlays cover."""

    camera_key: str
    share: float  # of the image
    boxes: tuple[tuple[int, int, int, int], ...]  # left, top, right, bottom in px; largest first
    num_keyframes: int  # that agree, at most over the cells


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OverlayMask:
    """What a camera's overlays leave of its images, and which images these are."""

    mask: BoolArray  # (H, W), True where a pixel may be used
    image_names: tuple[str, ...]


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
        self._keyframes: dict[tuple[int, int], set[FrameId]] = {}  # of cells, the first few each
        self._is_covered = np.zeros(shape, np.bool_)
        self._is_suspect = np.zeros(shape, np.bool_)

    @property
    def share(self) -> float:
        """Share of the image that is covered."""
        return float(self._is_covered.mean())

    @property
    def num_keyframes(self) -> int:
        """Keyframes that agree on the cell that most agree on, counted up to what makes it sure."""
        return int(self._num_keyframes[self._is_covered].max(initial=0))

    def add(self, pair: ImagePair, matches: PairMatches, judged: MotionEvidence) -> None:
        """Counts where matches of a pair stayed, and where they moved."""
        for row, column in np.unique(self._cells(_ends(matches, judged.is_fixed)), axis=0).tolist():
            self._num_stayed[row, column] += 1
            seen_in = self._keyframes.setdefault((row, column), set())
            if len(seen_in) < 2 * _SURE_KEYFRAMES:
                seen_in.update((pair.first, pair.second))
                self._num_keyframes[row, column] = len(seen_in)
        moving = self._cells(_ends(matches, judged.is_moving))
        is_moving = np.zeros_like(self._is_covered)
        is_moving[moving[:, 0], moving[:, 1]] = True
        self._num_moved += is_moving

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
        if self._keyframes:
            is_seen = self._num_keyframes >= _SUSPECT_KEYFRAMES
            self._is_suspect = is_seen & (self._share >= _SUSPECT_SHARE)

    def update_cover(self) -> bool:
        """Covers the cells that are sure by now; whether there are new ones."""
        if not self._keyframes:
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


class Overlays:
    """The overlays of all cameras. One thread at a time."""

    def __init__(self) -> None:
        self._grids: dict[CameraSize, OverlayGrid] = {}
        self._num_keyframes: dict[CameraSize, int] = {}
        self._next_change: dict[CameraSize, float] = {}  # keyframes of the camera by then

    def add_keyframe(self, keyframe: Keyframe) -> None:
        """Counts a keyframe of its camera."""
        camera = _camera(keyframe)
        self._num_keyframes[camera] = self._num_keyframes.get(camera, 0) + 1

    def covers(self, keyframe: Keyframe, points_xy: Float64Array) -> BoolArray:
        """Which points (N, 2) of a keyframe lie under an overlay of its camera."""
        found = self._grids.get(_camera(keyframe))
        if found is None or not found.share:
            return np.zeros(len(points_xy), np.bool_)
        return found.covers(points_xy)

    def masks(self, keyframes: Iterable[Keyframe]) -> list[OverlayMask]:
        """What overlays leave of the images of keyframes; nothing of cameras without any."""
        names: dict[CameraSize, list[str]] = {}
        for keyframe in keyframes:
            names.setdefault(_camera(keyframe), []).append(keyframe.name)
        return [
            OverlayMask(mask=self._grids[camera].mask(), image_names=tuple(named))
            for camera, named in names.items()
            if camera in self._grids and self._grids[camera].share
        ]

    def verify(
        self, matches: PairMatches, first: Keyframe, second: Keyframe, *, verifier: PairVerifier
    ) -> tuple[PairMatches, VerifiedMatches | None]:
        """Verifies a pair's matches without those of overlays, and learns from what it finds.

        Args:
            matches: tentative matches.
            first: the first keyframe of the pair.
            second: the second.
            verifier: of the pair.

        Returns:
            The matches that may show the world, and those of them that agree on one geometry.
        """
        is_covered = self.covers(first, matches.points1_xy)
        is_covered |= self.covers(second, matches.points2_xy)
        visible = matches.take(~is_covered) if is_covered.any() else matches
        if _camera(first) != _camera(second):
            return visible, verifier.verify(visible)
        grid = self._grid(first)
        found = find_fixed_matches(visible, verifier=verifier)
        if found is not None:
            grid.add(matches.pair, visible, found)
            visible = visible.take(~found.is_fixed)
        visible = grid.without_suspects(visible, image_size=verifier.image_size)
        verified = verifier.verify(visible)
        if verified is not None:
            rest = [matches.take(is_covered)] if is_covered.any() else []
            for group in [*rest, verified.inliers] if found is None else rest:
                judged = judge_by_motion(group, verified, verifier=verifier)
                if judged is not None:
                    grid.add(matches.pair, group, judged)
        return visible, verified

    def update(self) -> tuple[Overlay, ...]:
        """The overlays of the cameras whose cover grew.

        A cover does not change again before its camera has a tenth more keyframes.
        """
        for grid in self._grids.values():
            grid.update_suspects()
        grown = [camera for camera in self._due() if self._grids[camera].update_cover()]
        for camera in grown:
            self._next_change[camera] = self._num_keyframes[camera] * _GROWTH_RATIO
        return tuple(
            Overlay(
                camera_key=camera[0],
                share=self._grids[camera].share,
                boxes=self._grids[camera].boxes(),
                num_keyframes=self._grids[camera].num_keyframes,
            )
            for camera in grown
        )

    def _due(self) -> list[CameraSize]:
        return [
            camera
            for camera in self._grids
            if self._num_keyframes.get(camera, 0) >= self._next_change.get(camera, 0.0)
        ]

    def _grid(self, keyframe: Keyframe) -> OverlayGrid:
        camera = _camera(keyframe)
        if camera not in self._grids:
            self._grids[camera] = OverlayGrid((keyframe.width, keyframe.height))
        return self._grids[camera]


def _ends(matches: PairMatches, which: BoolArray) -> Float64Array:
    """Both ends (2 M, 2) of some matches."""
    return np.concatenate([matches.points1_xy[which], matches.points2_xy[which]])


def _camera(keyframe: Keyframe) -> CameraSize:
    return keyframe.camera_key, keyframe.width, keyframe.height


def _box(
    cells: list[int], cell_px: float, limits: tuple[int, int, int, int]
) -> tuple[int, int, int, int]:
    left, top, right, bottom = (
        min(round(edge * cell_px), limit) for edge, limit in zip(cells, limits, strict=True)
    )
    return left, top, right, bottom


def _square(edge: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.ones((edge, edge), np.uint8)
