"""How sharp a picture is and how far it moved since the one before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.types import Uint8Array

_SHARPNESS_WIDTH_PX = 320
_MOTION_WIDTH_PX = 128
# Response of the correlation peak, 0..1, below which the two pictures have too little in common.
_MIN_RESPONSE = 0.12


@dataclass(frozen=True, slots=True, kw_only=True)
class MotionBlur:
    """The sharpness of a picture, and its motion."""

    sharpness: float  # variance of the Laplacian; compares pictures of one camera
    shift_ratio: float | None  # of the picture's width, since the one before; None: unknown


class MotionBlurMeter:
    """Measures the pictures of one phone, in order. One thread at a time; a few milliseconds."""

    def __init__(self) -> None:
        self._previous: Any = None
        self._window: Any = None

    def measure(self, pixels: Uint8Array, *, is_next: bool = True) -> MotionBlur:
        """Sharpness and motion of a picture (H, W, 3) RGB.

        The shift is that of the whole picture, by phase correlation (Kuglin and Hines, 1975).

        Args:
            pixels: the picture.
            is_next: the one before it was measured, too; else its shift is unknown.
        """
        import cv2
        import numpy as np

        grey = cv2.cvtColor(_shrunk(pixels, width=_SHARPNESS_WIDTH_PX), cv2.COLOR_RGB2GRAY)
        sharpness = float(cv2.Laplacian(grey, cv2.CV_32F).var())
        small = _shrunk(grey, width=_MOTION_WIDTH_PX).astype(np.float32)
        previous, self._previous = self._previous, small
        if previous is None or previous.shape != small.shape:
            size = (small.shape[1], small.shape[0])
            self._window = cv2.createHanningWindow(size, cv2.CV_32F)
            return MotionBlur(sharpness=sharpness, shift_ratio=None)
        if not is_next:
            return MotionBlur(sharpness=sharpness, shift_ratio=None)
        shift_xy, response = cv2.phaseCorrelate(previous, small, self._window)
        if response < _MIN_RESPONSE:
            return MotionBlur(sharpness=sharpness, shift_ratio=None)
        shift_px = float(np.hypot(shift_xy[0], shift_xy[1]))
        return MotionBlur(sharpness=sharpness, shift_ratio=shift_px / small.shape[1])


def _shrunk(image: Any, *, width: int) -> Any:
    import cv2

    height = max(16, round(image.shape[0] * width / image.shape[1]))
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
