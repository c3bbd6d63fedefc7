"""Whether an MP4 or MOV file has its index, without which none of its frames can be found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from engine.regular_files import regular_file_size

_HEADER_BYTES = 8  # of a box: 4 of its size, 4 of its type (ISO 14496-12, section 4.2)
_LARGE_BYTES = 8  # of a size that takes more than 4, behind the type
_MAX_BOXES = 10_000
_BEGINNINGS = frozenset({b"ftyp", b"wide", b"mdat", b"free", b"skip"})  # before the pictures
_PICTURES, _INDICES = b"mdat", frozenset({b"moov", b"moof"})


def lacks_index(path: Path) -> bool:
    """Whether a file is an MP4 or MOV with room for pictures and no index of them.

    Cameras write the index when the recording is finished. A file that cannot be read has no index
    that anybody could miss.
    """
    try:
        regular_file_size(path)  # a pipe would be waited for
        with path.open("rb") as file:
            kinds = list(_kinds_of_boxes(file))
    except OSError:
        return False
    return (
        bool(kinds)
        and kinds[0] in _BEGINNINGS
        and _PICTURES in kinds
        and not _INDICES.intersection(kinds)
    )


def _kinds_of_boxes(file: BinaryIO) -> Iterator[bytes]:
    """The types of the boxes on the first level, up to the first one that is not whole."""
    num_bytes = file.seek(0, os.SEEK_END)
    place = 0
    for _ in range(_MAX_BOXES):
        file.seek(place)
        header = file.read(_HEADER_BYTES + _LARGE_BYTES)
        if len(header) < _HEADER_BYTES:
            return
        size, kind = int.from_bytes(header[:4]), header[4:_HEADER_BYTES]
        least = _HEADER_BYTES
        if size == 1:
            size, least = int.from_bytes(header[_HEADER_BYTES:]), _HEADER_BYTES + _LARGE_BYTES
        yield kind
        if size < least or place + size > num_bytes:  # 0: to the end of the file
            return
        place += size
