"""Overlay drawing: boxes in the current image around what shows nothing of the world."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from adapters.views.display_image import DisplayImage
from engine.events import OverlayFound
from engine.types import Frame

if TYPE_CHECKING:
    from rerun import RecordingStream

ENTITY = "world/live/image/overlays"
COLOR = (232, 96, 84, 255)

Box = tuple[int, int, int, int]


class OverlayDrawing:
    """Draws the masked parts of the camera whose image is shown.

    Args:
        recording: where to draw.
    """

    def __init__(self, recording: RecordingStream) -> None:
        self._recording = recording
        self._boxes: dict[str, tuple[Box, ...]] = {}
        self._drawn: tuple[object, ...] = ()

    def found(self, event: OverlayFound) -> None:
        """Keeps where a camera's overlays are."""
        self._boxes[event.camera_key] = event.boxes

    def draw(self, frame: Frame, *, image: DisplayImage) -> None:
        """Draws the boxes of a frame's camera on its image, where they changed."""
        import rerun as rr

        boxes = self._boxes.get(frame.camera_key, ())
        wanted = (boxes, image.width, image.height) if boxes else ()
        if wanted == self._drawn:
            return
        self._drawn = wanted
        if not boxes:
            self._recording.log(ENTITY, rr.Clear(recursive=False))
            return
        scale = np.array([image.width / frame.width, image.height / frame.height])
        corners = np.array(boxes, np.float64).reshape(-1, 2, 2) * scale
        self._recording.log(
            ENTITY,
            rr.Boxes2D(mins=corners[:, 0], sizes=corners[:, 1] - corners[:, 0], colors=COLOR),
        )
