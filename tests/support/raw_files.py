"""Small raw photos (DNG) for tests: a Bayer pattern and, where wanted, a JPEG preview."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from engine.types import Uint8Array

_BYTE, _ASCII, _SHORT, _LONG, _SRATIONAL = 1, 2, 3, 4, 10
_SIZES = {_BYTE: 1, _ASCII: 1, _SHORT: 2, _LONG: 4, _SRATIONAL: 8}

Entry = tuple[int, int, Sequence[int]]  # tag, type, values


def write_dng(
    pixels: Uint8Array,
    *,
    preview: bytes = b"",
    preview_size: tuple[int, int] = (0, 0),
    model: str = "Raw One",
    orientation: int = 1,
) -> bytes:
    """A DNG of RGB pixels (H, W, 3), mosaicked as RGGB with 16 bits, with a preview or without.

    Adobe's DNG 1.4: the preview in the first directory, the raw image in a sub-directory.
    """
    height, width = pixels.shape[:2]
    mosaic = pixels[:, :, 1].astype("<u2")
    mosaic[::2, ::2], mosaic[1::2, 1::2] = pixels[::2, ::2, 0], pixels[1::2, 1::2, 2]
    raw = (mosaic * 257).astype("<u2").tobytes()
    start = 8
    raw_at, preview_at = start, start + len(raw)
    sub_at = preview_at + len(preview) + len(preview) % 2
    sub = _directory(
        [
            (254, _LONG, [0]),
            (256, _LONG, [width]),
            (257, _LONG, [height]),
            (258, _SHORT, [16]),
            (259, _SHORT, [1]),
            (262, _SHORT, [32803]),  # a colour filter array
            (273, _LONG, [raw_at]),
            (277, _SHORT, [1]),
            (278, _LONG, [height]),
            (279, _LONG, [len(raw)]),
            (33421, _SHORT, [2, 2]),
            (33422, _BYTE, [0, 1, 1, 2]),
            (50717, _LONG, [65535]),
        ],
        at=sub_at,
    )
    main_at = sub_at + len(sub)
    shown = [
        (254, _LONG, [1]),
        (256, _LONG, [preview_size[0]]),
        (257, _LONG, [preview_size[1]]),
        (258, _SHORT, [8, 8, 8]),
        (259, _SHORT, [7]),
        (262, _SHORT, [6]),
        (273, _LONG, [preview_at]),
        (277, _SHORT, [3]),
        (278, _LONG, [preview_size[1]]),
        (279, _LONG, [len(preview)]),
    ]
    identity = [10000, 10000, 0, 10000, 0, 10000]
    matrix = [*identity, 0, 10000, 10000, 10000, 0, 10000, 0, 10000, 0, 10000, 10000, 10000]
    main = _directory(
        sorted(
            [
                *(shown if preview else []),
                (271, _ASCII, [*b"Maker\0"]),
                (272, _ASCII, [*model.encode(), 0]),
                (274, _SHORT, [orientation]),
                (330, _LONG, [sub_at]),
                (50706, _BYTE, [1, 4, 0, 0]),
                (50708, _ASCII, [*model.encode(), 0]),
                (50721, _SRATIONAL, matrix),
            ]
        ),
        at=main_at,
    )
    padding = b"\0" * (len(preview) % 2)
    return b"II*\0" + struct.pack("<I", main_at) + raw + preview + padding + sub + main


def _directory(entries: Sequence[Entry], *, at: int) -> bytes:
    """A TIFF directory at an offset, with the values that do not fit into it behind."""
    table = struct.pack("<H", len(entries))
    values_at, values = at + 2 + 12 * len(entries) + 4, b""
    for tag, kind, numbers in entries:
        packed = _packed(kind, numbers)
        table += struct.pack("<HHI", tag, kind, len(packed) // _SIZES[kind])
        if len(packed) <= 4:
            table += packed.ljust(4, b"\0")
        else:
            table += struct.pack("<I", values_at + len(values))
            values += packed + b"\0" * (len(packed) % 2)
    return table + b"\0\0\0\0" + values


def _packed(kind: int, numbers: Sequence[int]) -> bytes:
    formats = {_BYTE: "B", _ASCII: "B", _SHORT: "H", _LONG: "I", _SRATIONAL: "i"}
    return struct.pack(f"<{len(numbers)}{formats[kind]}", *numbers)
