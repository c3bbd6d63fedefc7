"""Masks of whole cameras, put on their frames, and what is to be said of masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from engine.ports import CameraMasks
from engine.types import BoolArray, Frame

_LITTLE_RATIO = 0.05  # a mask that leaves less of its image is doubted


class Masking:
    """Puts masks on frames; one thread at a time.

    A mask that leaves next to nothing is likely the wrong way round: that is said at once, and at
    the end how many there were.

    Args:
        masks: of whole cameras; None: there are none.
        warn: emits that something is degraded.
    """

    def __init__(self, masks: CameraMasks | None, *, warn: Callable[[str], None]) -> None:
        self._masks = masks
        self._warn = warn
        self._last: tuple[BoolArray, float] | None = None  # and the ratio of it that may be used
        self._num_frames = 0
        self._num_masked = 0
        self._num_covered = 0
        self._num_black = 0

    def masked(self, frame: Frame) -> Frame:
        """A frame with the mask of its camera on top of its own.

        Raises:
            SourceError: the camera's mask does not fit the frame.
        """
        self._num_frames += 1
        of_camera = None if self._masks is None else self._masks.mask_of(frame)
        if of_camera is not None:
            mask = of_camera if frame.mask is None else frame.mask & of_camera
            frame = replace(frame, mask=mask)
        if frame.mask is not None:
            self._examine(frame.name, frame.mask)
        return frame

    def report(self) -> None:
        """Warns of what concerns the run as a whole; called when the last frame has come."""
        if self._num_covered > 1:
            self._warn(
                f"{self._num_covered} of {self._num_masked} masks leave less than "
                f"{_LITTLE_RATIO:.0%} of their image, {self._num_black} of them nothing"
            )
        if self._masks is None or not self._num_frames:
            return
        for words in self._masks.unused():
            self._warn(words)

    def _examine(self, name: str, mask: BoolArray) -> None:
        ratio = self._usable_ratio(mask)
        self._num_masked += 1
        self._num_black += ratio == 0.0
        if ratio >= _LITTLE_RATIO:
            return
        self._num_covered += 1
        if self._num_covered == 1:
            self._warn(
                f"the mask of {name} leaves {ratio:.1%} of the image: black is left out, "
                f"anything else is used; is it the wrong way round?"
            )

    def _usable_ratio(self, mask: BoolArray) -> float:
        """How much of an image may be used; frames of a camera share their mask."""
        if self._last is None or self._last[0] is not mask:
            self._last = mask, float(np.count_nonzero(mask)) / mask.size
        return self._last[1]
