"""Small videos whose frames can be distinguished, shared by tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.stream import Disposition

from engine.types import Uint8Array

WIDTH, HEIGHT = 160, 120
_PQ = "colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc:hdr10=1"


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


def write_odd_video(path: Path, num_frames: int, *, kind: str) -> Path:
    """Frames as `write_video` draws them, in a file as other programs make them.

    Args:
        path: of the file; its suffix names the container.
        num_frames: of the video.
        kind: raw (H.264 without times), hdr (HEVC of ten bits, PQ), alpha (VP9), gif, interlaced
            (both fields of one moment), fields (the lower one as eight frames later), sound first
            or cover first.
    """
    kinds: dict[str, tuple[str, str, dict[str, str]]] = {
        "hdr": ("libx265", "yuv420p10le", {"x265-params": f"log-level=error:crf=12:{_PQ}"}),
        "alpha": ("libvpx-vp9", "yuva420p", {"crf": "12", "b": "0", "deadline": "realtime"}),
        "gif": ("gif", "bgr8", {}),
        "interlaced": ("libx264", "yuv420p", {"crf": "12", "flags": "+ilme+ildct"}),
        "fields": ("libx264", "yuv420p", {"crf": "12", "flags": "+ilme+ildct"}),
    }
    codec, pix_fmt, options = kinds.get(kind, ("libx264", "yuv420p", {"crf": "12"}))
    container = av.open(str(path), "w", format="h264" if kind == "raw" else None)
    with container:
        sound = container.add_stream("aac", rate=8000) if kind == "sound first" else None
        cover = container.add_stream("mjpeg", rate=1) if kind == "cover first" else None
        if cover is not None:
            cover.width, cover.height, cover.pix_fmt = 96, 80, "yuvj420p"
            cover.disposition = Disposition.attached_pic
        video: Any = container.add_stream(codec, rate=30, options=options)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, pix_fmt
        if cover is not None:
            black = np.zeros((cover.height, cover.width, 3), np.uint8)
            container.mux(cover.encode(av.VideoFrame.from_ndarray(black, format="rgb24")))
            container.mux(cover.encode(None))
        if sound is not None:
            silence = np.zeros((1, 8000), np.float32)
            heard = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            heard.sample_rate = 8000
            container.mux(sound.encode(heard))
            container.mux(sound.encode(None))
        for number in range(num_frames):
            pixels = picture(number)
            if kind == "fields":
                pixels[1::2] = picture(number + 8)[1::2]
            drawn = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(video.encode(drawn))
        container.mux(video.encode(None))
    return path
