"""Things burned into pictures (text, a running clock, a logo), and the pixels they take."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from engine.types import BoolArray, Float64Array, Uint8Array
from tests.support.synthetic import SyntheticWorld, View, ground

_FONT = cv2.FONT_HERSHEY_PLAIN
_LINES = ("ALT 120.4 M  SPD 7.2 M/S", "LAT 47.36812 LON 8.54920", "ISO 100  F2.8  1/500  REC")
_WHITE = (255, 255, 255)


@dataclass(frozen=True, slots=True, kw_only=True)
class BurnIn:
    """What is burned into every picture of a camera."""

    has_text: bool = True  # three lines of text, strokes of one pixel
    has_clock: bool = True  # at the lower right, other digits in each picture
    has_logo: bool = True  # at the upper right

    def draw(self, pixels: Uint8Array, index: int) -> Uint8Array:
        """The picture (H, W, 3) with everything on it; ``index`` sets the clock."""
        drawn = np.ascontiguousarray(pixels).copy()
        height, width = drawn.shape[:2]
        size = max(width, height) / 640.0
        if self.has_text:
            for number, line in enumerate(_LINES):
                at = (round(12 * size), round((24 + 18 * number) * size))
                cv2.putText(drawn, line, at, _FONT, size, _WHITE, 1, cv2.LINE_AA)
        if self.has_clock:
            text = f"12:{index // 60 % 60:02d}:{index % 60:02d}.{37 * index % 100:02d}"
            at = (width - round(130 * size), height - round(14 * size))
            cv2.putText(drawn, text, at, _FONT, 1.2 * size, _WHITE, 1, cv2.LINE_AA)
        if self.has_logo:
            self._draw_logo(drawn, size)
        return drawn

    def pixels_of(self, shape: tuple[int, int]) -> BoolArray:
        """Which pixels (H, W) it takes in some picture."""
        black = np.zeros((*shape, 3), np.uint8)
        taken = np.zeros(shape, np.bool_)
        for index in range(0, 60, 7):
            taken |= (self.draw(black, index) > 0).any(axis=2)
        return taken

    def _draw_logo(self, drawn: Uint8Array, size: float) -> None:
        width = drawn.shape[1]
        left, top, right, bottom = (
            width - round(104 * size),
            round(12 * size),
            width - round(12 * size),
            round(48 * size),
        )
        cv2.rectangle(drawn, (left, top), (right, bottom), (30, 60, 200), -1)
        center = (left + round(18 * size), (top + bottom) // 2)
        cv2.circle(drawn, center, round(12 * size), (250, 210, 40), -1)
        at = (left + round(36 * size), bottom - round(10 * size))
        cv2.putText(drawn, "TV8", at, _FONT, 1.6 * size, _WHITE, 2, cv2.LINE_AA)


class OverlaidWorld(SyntheticWorld):
    """A world seen through a pane with marks on it: keypoints that stay where they are.

    Args:
        poses: (F, 3, 4) cam_from_world of each frame.
        fixed_xy: (K, 2) px of the marks.
        points: (P, 3) of the world; by default the ground around the path.
        seen_in: the frames in which the marks are seen; by default in all.
        noise_px: standard deviation of keypoints; of marks at most 0.3 px.
        options: further ones of the world.
    """

    def __init__(
        self,
        poses: Float64Array,
        *,
        fixed_xy: Float64Array,
        points: Float64Array | None = None,
        seen_in: Collection[int] | None = None,
        noise_px: float = 0.0,
        **options: Any,
    ) -> None:
        world = ground(poses, seed=options.get("seed", 0)) if points is None else points
        # Stand-ins for the looks of the marks, out of sight.
        out_of_sight = np.full((len(fixed_xy), 3), 1e6)
        super().__init__(
            poses, points=np.vstack([world, out_of_sight]), noise_px=noise_px, **options
        )
        self.fixed_xy = fixed_xy
        self.fixed_ids = np.arange(len(world), len(self.points))
        self._seen_in = seen_in

    def view(self, frame_id: int) -> View:
        """What a frame sees; the marks come last."""
        seen = super().view(frame_id)
        if self._seen_in is not None and frame_id not in self._seen_in:
            return seen
        rng = np.random.default_rng((self._seed, 7, frame_id))
        noise_px = rng.normal(scale=min(self._noise_px, 0.3), size=self.fixed_xy.shape)
        return View(
            point_ids=np.concatenate([seen.point_ids, self.fixed_ids]),
            points_xy=np.concatenate([seen.points_xy, self.fixed_xy + noise_px]),
        )


def marks(box: tuple[float, float, float, float], *, num: int = 40, seed: int = 0) -> Float64Array:
    """Places (num, 2) in a box: left, top, right, bottom in px."""
    left, top, right, bottom = box
    return np.random.default_rng((seed, 8)).uniform((left, top), (right, bottom), (num, 2))
