"""Segments of JPEG files (ITU-T T.81), and whether a file is whole.

Decoders fill what is missing of a file with grey and say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

SCAN_MARKER = 0xDA

_START_OF_IMAGE, _END_OF_IMAGE = b"\xff\xd8", b"\xff\xd9"
_BARE_MARKERS = frozenset(range(0xD0, 0xD9)) | {0x01}  # carry no length


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Marker, where its payload starts, and the payload, up to the first scan."""
    place = data.find(b"\xff", 2)
    while 0 <= place < len(data) - 3:
        marker = data[place + 1]
        if marker in _BARE_MARKERS or marker in {0x00, 0xFF}:  # stuffing and fill bytes
            place = data.find(b"\xff", place + (1 if marker == 0xFF else 2))
            continue
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        yield marker, place + 4, data[place + 4 : end]
        if marker == SCAN_MARKER:
            return
        place = data.find(b"\xff", end)


def has_end_of_image(data: bytes, scan_start: int) -> bool:
    """Whether a JPEG reaches its end marker.

    In the entropy-coded data after the first scan header a byte FF is never followed by D9, so the
    first such pair ends the image; a thumbnail's end marker lies before, what lies after is
    ignored.

    Args:
        data: the file.
        scan_start: where the payload of its first scan header starts.
    """
    return data.find(_END_OF_IMAGE, scan_start) >= 0


def is_cut_short(data: bytes) -> bool:
    """Whether a file is a JPEG that does not reach its end marker."""
    if not data.startswith(_START_OF_IMAGE):
        return False
    scans = (start for marker, start, _ in jpeg_segments(data) if marker == SCAN_MARKER)
    scan_start = next(scans, None)
    return scan_start is None or not has_end_of_image(data, scan_start)
