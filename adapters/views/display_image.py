"""Display image: the current image as a JPEG small enough to send many times a second."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import ViewsConfig
from engine.types import Frame

MAX_PASSED_BYTES = 1_000_000  # a larger JPEG would fill the recording and the viewer's memory
MAX_PASSED_EDGE_PX = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class DisplayImage:
    """A JPEG and its size."""

    jpeg: bytes
    width: int
    height: int


def display_image(frame: Frame, *, config: ViewsConfig) -> DisplayImage:
    """The frame's own JPEG, byte for byte, unless it is huge or missing; else a small new one."""
    is_small = max(frame.width, frame.height) <= MAX_PASSED_EDGE_PX
    if frame.jpeg is not None and is_small and len(frame.jpeg) <= MAX_PASSED_BYTES:
        return DisplayImage(jpeg=frame.jpeg, width=frame.width, height=frame.height)
    return _encode(frame, config)


def _encode(frame: Frame, config: ViewsConfig) -> DisplayImage:
    import cv2

    ratio = min(1.0, config.image_edge_px / max(frame.width, frame.height))
    width = max(1, round(ratio * frame.width))
    height = max(1, round(ratio * frame.height))
    small = cv2.resize(frame.pixels, (width, height), interpolation=cv2.INTER_AREA)
    bgr = cv2.cvtColor(small, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, config.jpeg_quality])
    return DisplayImage(jpeg=encoded.tobytes(), width=width, height=height)
