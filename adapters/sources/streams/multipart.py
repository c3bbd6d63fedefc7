"""Parts of a ``multipart/x-mixed-replace`` stream (RFC 2046, section 5.1), in bounded memory.

The boundary is taken from the first line that begins with two hyphens, since cameras do not always
keep to the one that they announce. Some leave out the first; then a part's header comes first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

_MAX_BETWEEN_BYTES = 64_000  # before the first part, and between two
_MAX_HEADER_BYTES = 16_000
_MAX_BOUNDARY_BYTES = 200
_CONTENT_LENGTH = re.compile(rb"^content-length[ \t]*:[ \t]*([0-9]{1,18})[ \t]*$", re.I | re.M)
_HEADER_LINE = re.compile(rb"content-(type|length)[ \t]*:", re.I)
_END_OF_HEADER = re.compile(rb"\r?\n\r?\n")


class MultipartError(Exception):
    """What comes is no stream of parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OversizedPart:
    """A part that was not kept."""

    num_bytes: int


class _State(Enum):
    BETWEEN = auto()
    HEADER = auto()
    COUNTED = auto()  # in a part that said its length
    SEARCHED = auto()  # in a part that ends at the next boundary


class MultipartReader:
    """Takes bytes as they come and gives whole parts; holds one part at most."""

    def __init__(self, *, max_part_bytes: int, announced: bytes = b"") -> None:
        """Begins before the first boundary, or before the first header where that is left out.

        Args:
            max_part_bytes: what is larger is passed over.
            announced: the boundary as the server announces it, for a first part without one.
        """
        self._max_part_bytes = max_part_bytes
        self._state = _State.BETWEEN
        self._data = bytearray()  # not used yet
        # Some announce it with the two hyphens that stand before it.
        self._boundary = b"\n--" + (b"" if announced.startswith(b"-") else announced)
        self._has_begun = False
        self._num_left = 0  # bytes of a counted part
        self._num_passed = 0  # bytes since the last part, or of one that is not kept
        self._is_kept = True
        self._num_searched = 0  # bytes in which no boundary begins

    def feed(self, data: bytes) -> Iterator[bytes | OversizedPart]:
        """The parts that end in these bytes.

        Raises:
            MultipartError: no part begins, or its header does not end.
        """
        self._data += data
        steps = {
            _State.BETWEEN: self._find_boundary,
            _State.HEADER: self._read_header,
            _State.COUNTED: self._read_counted,
            _State.SEARCHED: self._search,
        }
        before = None
        while (self._state, len(self._data)) != before:
            before = self._state, len(self._data)
            part = steps[self._state]()
            if part is not None:
                yield part

    def _find_boundary(self) -> None:
        """Passes over one line."""
        end = self._data.find(b"\n")
        if end < 0:
            if self._num_passed + len(self._data) > _MAX_BETWEEN_BYTES:
                raise MultipartError("no picture begins in what comes")
            return
        line = bytes(self._data[:end]).strip()
        if not self._has_begun and _HEADER_LINE.match(line):
            self._state, self._num_passed, self._has_begun = _State.HEADER, 0, True
            return
        del self._data[: end + 1]
        self._num_passed += end + 1
        if self._num_passed > _MAX_BETWEEN_BYTES:
            raise MultipartError("no picture begins in what comes")
        if line.startswith(b"--") and len(line) <= _MAX_BOUNDARY_BYTES:
            self._boundary = b"\n" + line.removesuffix(b"--") if len(line) > 2 else b"\n--"
            self._state, self._num_passed, self._has_begun = _State.HEADER, 0, True

    def _read_header(self) -> bytes | OversizedPart | None:
        # An empty header ends at once.
        is_empty = self._data.startswith((b"\r\n", b"\n"))
        end = re.match(rb"\r?\n", self._data) if is_empty else _END_OF_HEADER.search(self._data)
        if end is None or end.start() > _MAX_HEADER_BYTES:
            if len(self._data) > _MAX_HEADER_BYTES:
                raise MultipartError("the header of a picture does not end")
            return None
        header = bytes(self._data[: end.start()]).replace(b"\r\n", b"\n")
        del self._data[: end.end()]
        length = _CONTENT_LENGTH.search(header)
        self._num_searched, self._is_kept = 0, True
        if length is None:
            self._state = _State.SEARCHED
            return None
        self._state, self._num_left = _State.COUNTED, int(length[1])
        self._is_kept = self._num_left <= self._max_part_bytes
        return None if self._is_kept else OversizedPart(num_bytes=self._num_left)

    def _read_counted(self) -> bytes | None:
        if not self._is_kept:
            num_passed = min(self._num_left, len(self._data))
            del self._data[:num_passed]
            self._num_left -= num_passed
            if not self._num_left:
                self._state = _State.BETWEEN
            return None
        if len(self._data) < self._num_left:
            return None
        part = bytes(self._data[: self._num_left])
        del self._data[: self._num_left]
        self._state = _State.BETWEEN
        return part

    def _search(self) -> bytes | OversizedPart | None:
        end = self._data.find(self._boundary, self._num_searched)
        if end < 0:
            self._num_searched = max(len(self._data) - len(self._boundary), 0)
            if self._num_searched > self._max_part_bytes:
                self._is_kept = False
            if not self._is_kept:
                self._num_passed += self._num_searched
                del self._data[: self._num_searched]
                self._num_searched = 0
            return None
        part = bytes(self._data[:end]).removesuffix(b"\r")
        del self._data[: end + 1]  # the boundary's line follows
        num_bytes = self._num_passed + len(part)
        self._state, self._num_passed = _State.BETWEEN, 0
        if self._is_kept and num_bytes <= self._max_part_bytes:
            return part
        return OversizedPart(num_bytes=num_bytes)
