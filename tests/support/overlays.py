"""Things burned into pictures: text, a clock that runs, a logo; and the pixels they take."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from engine.types import BoolArray, Uint8Array

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
