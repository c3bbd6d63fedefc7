"""Small videos whose frames can be distinguished, shared by tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from engine.types import Uint8Array

WIDTH, HEIGHT = 160, 120


def picture(number: int, *, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Uint8Array:
    """Texture that moves with the frame number, the number as brightness of the left quarter."""
    coarse = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    wide = cv2.resize(coarse, (size[0] + 300, size[1]), interpolation=cv2.INTER_CUBIC)
    image: Uint8Array = np.ascontiguousarray(wide[:, number : number + size[0]])
    image[:, : size[0] // 4] = number
    return image


def write_video(
    path: Path,
    num_frames: int = 30,
    *,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    pts_ms: Sequence[int] | None = None,
    rotation_deg: int = 0,
    pix_fmt: str = "yuv420p",
    handler_name: str = "",
    draw: Callable[[int], Uint8Array] | None = None,
) -> Path:
    """H.264 with a key frame every ten frames, its index in front where the format has one.

    ``handler_name`` is the tag in which cameras name themselves; ``draw`` makes the frames, of
    ``size``, by their numbers.
    """
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=30, options={"g": "10", "crf": "12"})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        if handler_name:
            stream.metadata["handler_name"] = handler_name
        time_base = Fraction(1, 30) if pts_ms is None else Fraction(1, 1000)
        stream.codec_context.time_base = time_base
        if rotation_deg:
            stream.set_display_rotation(rotation_deg)
        for number in range(num_frames):
            drawn = draw(number) if draw is not None else picture(number, size=size)
            frame = av.VideoFrame.from_ndarray(drawn, format="rgb24")
            frame.time_base = time_base
            frame.pts = number if pts_ms is None else pts_ms[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
