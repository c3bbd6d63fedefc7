"""Frames as plain values: images travel as JPEG where they came so, else as PNG."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from adapters.remote.messages import Array, Arrays, Fields
from adapters.remote.plain import Plain
from engine.errors import InferenceError
from engine.types import Frame, FrameId, PackedMask, Uint8Array


def frame_to_plain(frame: Frame) -> Plain:
    """What describing a frame takes: its image as JPEG where it came so, else as PNG, its mask."""
    import cv2

    if frame.jpeg is not None:
        image, turns = np.frombuffer(frame.jpeg, np.uint8), 0
    else:
        # Channels in any order: they come out as they went in.
        # OpenCV's own settings: half the time of compression 1, at the same size.
        is_whole, image = cv2.imencode(".png", frame.pixels)
        if not is_whole:
            raise InferenceError(f"{frame.name}: cannot be sent")
        turns = 1
    fields: dict[str, Any] = {
        "frame_id": int(frame.frame_id),
        "index": frame.index,
        "camera_key": frame.camera_key,
        "name": frame.name,
        "is_png": bool(turns),
        "sum": checksum(frame.pixels),
    }
    arrays: dict[str, Any] = {"image": image.reshape(-1)}
    if frame.mask is not None:
        packed = PackedMask.of(frame.mask)
        fields["mask_size"] = [packed.width, packed.height]
        arrays["mask"] = np.frombuffer(packed.data, np.uint8)
    return fields, arrays


def frame_from_plain(fields: Fields, arrays: Arrays) -> Frame:
    """A frame from what `frame_to_plain` made of one.

    Raises:
        InferenceError: this machine decodes its image to other pixels.
    """
    import cv2

    image = cv2.imdecode(
        np.asarray(arrays["image"]), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    )
    pixels: Uint8Array | None = None
    if image is not None:
        as_sent = image if fields["is_png"] else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        pixels = np.asarray(as_sent, np.uint8)
    if pixels is None or checksum(pixels) != fields["sum"]:
        raise InferenceError(f"{fields['name']}: this machine decodes it to other pixels")
    mask = None
    if "mask" in arrays:
        width, height = fields["mask_size"]
        packed = PackedMask(width=width, height=height, data=arrays["mask"].tobytes())
        mask = packed.unpacked()
    return Frame(
        frame_id=FrameId(int(fields["frame_id"])),
        camera_key=str(fields["camera_key"]),
        source="",
        index=int(fields["index"]),
        name=str(fields["name"]),
        captured_at_s=0.0,
        received_at_s=0.0,
        pixels=pixels,
        mask=mask,
    )


def checksum(pixels: Array) -> int:
    """Of pixels: decoders of two machines may differ."""
    return zlib.crc32(np.ascontiguousarray(pixels).data)
