"""What an HTTP server sends, by its first bytes, or by its Content-Type where they say nothing."""

from __future__ import annotations

import re
from enum import StrEnum

from adapters.sources.streams.patience import StreamError


class HttpKind(StrEnum):
    """How what is sent becomes frames."""

    PARTS = "a stream of pictures"  # multipart, MJPEG
    PICTURE = "a picture"  # asked for again and again
    PLAYLIST = "a playlist of pieces of video"  # HLS, RFC 8216
    VIDEO = "a video"  # FFmpeg finds out which


_PICTURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|....ftyp(hei|mif1|avif)",
    re.DOTALL,
)
_PART = re.compile(rb"--|content-(type|length)[ \t]*:", re.IGNORECASE)
_PAGE = re.compile(rb"(<!--.*?-->\s*)?<(!doctype\s+html|html|head|body|title)", re.I | re.S)
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e\x80-\xff]+")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SHOWN_BYTES = 8


def kind_of(begin: bytes, content_type: str) -> HttpKind:
    """How what begins so becomes frames.

    Args:
        begin: the first bytes, 12 at least where there are as many.
        content_type: as the server says, in lower case without parameters; "": it does not.

    Raises:
        StreamError: it does not; with what it is instead, in words.
    """
    text = begin.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if not begin:
        raise StreamError("connected, but the answer is empty")
    if text.startswith(b"#EXTM3U"):
        return HttpKind.PLAYLIST
    if _PICTURE.match(begin):
        return HttpKind.PICTURE
    if _PART.match(text) or content_type.startswith("multipart/"):
        return HttpKind.PARTS
    if content_type.startswith("text/html") or _PAGE.match(text):
        raise StreamError(
            "connected, but what came is a web page, no video: the address of the stream itself is"
            " needed, without the page around it"
        )
    if _TEXT.fullmatch(begin):
        raise StreamError(f"connected, but what came is text{_of_type(content_type)}, no video")
    return HttpKind.VIDEO


def unknown_format(begin: bytes, content_type: str) -> str:
    """The words for what no demuxer knows."""
    shown = begin[:_SHOWN_BYTES].hex(" ")
    return f"connected, but its format{_of_type(content_type)} is unknown; it begins with {shown}"


def _of_type(content_type: str) -> str:
    return f" ({content_type})" if content_type else ""
