"""Files of HTTP servers as FFmpeg reads them: with seeking, and playlists with their pieces.

FFmpeg opens nothing itself. What a playlist leads to is asked for by the same client, so nothing
but HTTP is reached, and no more is read between two frames than a frame may hold.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from typing import Any

from adapters.sources.streams.http_client import HttpAnswer, HttpClient
from adapters.sources.streams.patience import OutOfPatienceError, StreamError

_MAX_HEADER_BYTES = 64_000_000  # before the first frame: an index of ten hours of video
_MAX_PLAYLIST_BYTES = 4_000_000
_MAX_VARIANTS = 200  # of a master playlist, each of which FFmpeg opens
_READ_BYTES = 1 << 16
_PASSED_OVER_BYTES = 1 << 20  # rather than asked for again
_MAX_RESTARTS = 8  # of a file that the server gives whole only
_MAX_MISSED_PIECES = 3  # in a row: a server deletes old ones
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MAX_LINE_BYTES = 8192  # of a playlist; FFmpeg keeps 4095
_TARGET_DURATION = re.compile(rb"#EXT-X-TARGETDURATION:[ \t]*([0-9]{1,18})")
_MAX_PIECE_S = 30.0  # that is believed: it decides how long silence is taken for waiting
_VARIANTS = (b"#EXT-X-STREAM-INF:", b"#EXT-X-MEDIA:")
_KEYS = (b"#EXT-X-KEY:", b"#EXT-X-SESSION-KEY:")
_ENCRYPTED = re.compile(rb"METHOD=(?!NONE)")


class HttpFiles:
    """The files of one stream; FFmpeg reads them on one thread."""

    def __init__(self, client: HttpClient, *, max_frame_bytes: int) -> None:
        """Begins before the first frame.

        Args:
            client: asks for them.
            max_frame_bytes: read between two frames at most.
        """
        self.client = client
        self.piece_s = 0.0  # how long a playlist's pieces last at most, as far as it is believed
        self.num_variants = 0  # of all playlists
        self._max_frame_bytes = max_frame_bytes
        self._num_left = _MAX_HEADER_BYTES
        self._num_missed = 0
        self._has_piece = False
        self._has_begun = False
        self.has_failed = False  # PyAV keeps one exception for FFmpeg's caller, and prints others

    def frame_came(self) -> None:
        """A frame was read: as much may be read for the next."""
        self._has_begun = True
        self._num_left = self._max_frame_bytes

    def open_piece(self, url: str, _flags: int, options: Mapping[str, Any]) -> Any:
        """Opens what a playlist leads to, for PyAV's ``io_open``.

        Raises:
            StreamError: it is the first and cannot be had, or the third in a row, or late.
        """
        begin = int(options.get("offset", 0))
        end = int(options["end_offset"]) if int(options.get("end_offset", 0)) > 0 else None
        try:
            if self.has_failed:
                return io.BytesIO()
            answer = self.client.open(url, begin=begin, end=end)
        except OutOfPatienceError as error:
            raise self.failed(error.loss.detail) from error
        except StreamError as error:
            self._num_missed += 1
            if self._has_piece and self._num_missed < _MAX_MISSED_PIECES:
                return io.BytesIO()
            raise self.failed(f"its playlist leads on, {_and_then(error)}") from error
        self._num_missed = 0
        self._has_piece = True
        return HttpFile(answer, files=self, begin=begin)

    def failed(self, detail: str) -> StreamError:
        """The error that ends the reading, which is to be raised."""
        self.has_failed = True
        return StreamError(detail)

    def open(self, url: str, *, begin: int) -> HttpAnswer:
        """A file from a place on, or from its beginning.

        Raises:
            StreamError: it cannot be had.
        """
        try:
            return self.client.open(url, begin=begin)
        except StreamError as error:
            raise self.failed(error.loss.detail) from error

    def is_playlist(self, answer: HttpAnswer) -> bool:
        """Whether an answer that was not read yet is a playlist.

        Raises:
            StreamError: its first bytes do not come.
        """
        try:
            return answer.begin().lstrip(_BYTE_ORDER_MARK).startswith(b"#EXTM3U")
        except StreamError as error:
            raise self.failed(error.loss.detail) from error

    def read(self, answer: HttpAnswer, num_bytes: int, *, is_kept: bool = True) -> bytes:
        """Bytes of a file, as many as have come.

        Raises:
            StreamError: they do not come, or are too many to be kept.
        """
        try:
            data = answer.read(min(num_bytes, _READ_BYTES))
        except StreamError as error:
            raise self.failed(error.loss.detail) from error
        if not is_kept:
            return data
        self._num_left -= len(data)
        if self._num_left < 0:
            what = (
                "a frame is" if self._has_begun else "no video begins, or its index is at its end"
            )
            limit = self._max_frame_bytes if self._has_begun else _MAX_HEADER_BYTES
            raise self.failed(f"{what} more than {limit // 10**6} MB away")
        return data


class HttpFile:
    """A file as PyAV reads it."""

    def __init__(self, answer: HttpAnswer, *, files: HttpFiles, begin: int = 0) -> None:
        """Takes an answer and where in the whole file it begins."""
        self.name = answer.url  # against which FFmpeg resolves what a playlist names
        self._files = files
        self._answer: HttpAnswer | None = answer
        self._zero = begin
        self._at = begin  # of the next byte that is read
        self._answer_at = answer.begins_at  # of the next byte of the answer
        self._num_bytes = answer.num_bytes
        self._num_restarts = 0
        self._is_playlist: bool | None = None  # not known before it is read
        self._line = b""  # of a playlist, whose end did not come yet

    def seekable(self) -> bool:
        """Whether another place can be read from."""
        return self._num_bytes is not None

    def tell(self) -> int:
        """Where the next byte is."""
        return self._at - self._zero

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Goes to another place, which is asked for when it is read."""
        starts = {os.SEEK_SET: self._zero, os.SEEK_CUR: self._at, os.SEEK_END: self._num_bytes or 0}
        self._at = max(starts[whence] + offset, self._zero)
        return self.tell()

    def read(self, num_bytes: int) -> bytes:
        """What has come, at most so many bytes.

        Raises:
            StreamError: nothing more comes.
        """
        is_behind = self._num_bytes is not None and self._at >= self._num_bytes
        if is_behind or self._files.has_failed:
            return b""
        answer = self._answer_at_place()
        if self._is_playlist is None:
            self._is_playlist = self._files.is_playlist(answer)
        data = self._files.read(answer, num_bytes)
        self._at += len(data)
        self._answer_at = self._at
        if self._is_playlist:
            self._look_at_playlist(data)
        return data

    def close(self) -> None:
        """Ends the connection."""
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def _answer_at_place(self) -> HttpAnswer:
        """An answer that goes on where is read next.

        Raises:
            StreamError: it cannot be had.
        """
        ahead = self._at - self._answer_at
        if self._answer is None or not 0 <= ahead <= _PASSED_OVER_BYTES:
            self.close()
            self._answer = self._files.open(self.name, begin=self._at)
            self._answer_at = self._answer.begins_at
            if self._answer_at > self._at:
                raise self._files.failed("connected, but the server sends another part of the file")
            if not self._answer_at and self._at:
                self._num_restarts += 1
                if self._num_restarts > _MAX_RESTARTS:
                    raise self._files.failed(
                        "connected, but this video is read in pieces, and the server gives it whole"
                    )
        while self._answer_at < self._at:
            ahead = self._at - self._answer_at
            passed_over = self._files.read(self._answer, ahead, is_kept=False)
            if not passed_over:
                break
            self._answer_at += len(passed_over)
        return self._answer

    def _look_at_playlist(self, data: bytes) -> None:
        """Looks at the lines that end in these bytes.

        Raises:
            StreamError: they are not to be read further.
        """
        *lines, self._line = (self._line + data).replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            if line.startswith(b"#EXT"):
                self._look_at_tag(line)
        is_endless = self._at - self._zero > _MAX_PLAYLIST_BYTES
        is_endless |= max(map(len, [*lines, self._line])) > _MAX_LINE_BYTES
        if is_endless or self._files.num_variants > _MAX_VARIANTS:
            raise self._files.failed("connected, but its playlist is too long")

    def _look_at_tag(self, line: bytes) -> None:
        if line.startswith(_VARIANTS):
            self._files.num_variants += 1
        elif line.startswith(_KEYS) and _ENCRYPTED.search(line):
            raise self._files.failed("connected, but the pieces of its playlist are encrypted")
        elif duration := _TARGET_DURATION.match(line):
            piece_s = min(float(duration[1]), _MAX_PIECE_S)
            self._files.piece_s = max(self._files.piece_s, piece_s)


def _and_then(error: StreamError) -> str:
    return error.loss.detail.removeprefix("connected, ")
