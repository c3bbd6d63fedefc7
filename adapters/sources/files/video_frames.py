"""Packets and pictures of FFmpeg, as video files and live streams share them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from engine.types import Uint8Array

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

_COLUMN_STEP = 4  # of those columns that fields are compared in
_COMBED_RATIO = 1.1  # noise alone gives 1
_LEAST_ROWS = 2  # of an image, between which fields are compared
_TEXT_ART_CODECS = frozenset({"ansi", "bintext", "idf", "xbin"})  # how FFmpeg "plays" a text file


class ReadsBytes(Protocol):
    """A file as PyAV reads it."""

    @property
    def name(self) -> str:
        """Its path or URL."""

    def read(self, num_bytes: int, /) -> bytes:
        """At most so many bytes; b"": there are no more."""


def open_container(file: str | ReadsBytes, **options: Any) -> InputContainer:
    """Opens a path, a URL or a file as ``av.open`` does; tags need not be valid UTF-8.

    Raises:
        av.error.FFmpegError: it cannot be opened.
        OSError: PyAV failed on what FFmpeg read of it.
    """
    import av

    with _failing_as_ffmpeg():
        container: InputContainer = av.open(file, metadata_errors="replace", **options)
    return container


def packets_of(container: InputContainer, *streams: Any) -> Iterator[Packet[Any]]:
    """The packets of a container, of some of its streams or of all.

    Raises:
        av.error.FFmpegError: it cannot be read further.
        OSError: PyAV failed on what FFmpeg read.
    """
    packets = container.demux(*streams)
    while True:
        with _failing_as_ffmpeg():
            packet = next(packets, None)
        if packet is None:
            return
        yield packet


def picture_stream(container: InputContainer) -> VideoStream | None:
    """The first stream of moving pictures: no cover picture, no text file shown as pictures."""
    from av.stream import Disposition

    for stream in container.streams.video:
        codec = stream.codec_context
        if codec is None or codec.name in _TEXT_ART_CODECS:
            continue
        if not stream.disposition & Disposition.attached_pic:
            # Frame threads lose healthy frames around a damaged one, slice threads do not mark
            # frames decoded with errors, and the cores have other work.
            stream.thread_type = "NONE"
            return stream
    return None


def decode_packet(packet: Packet[VideoStream]) -> Iterator[VideoFrame | str]:
    """Decoded frames, and in the place of a damaged one the words that say so."""
    import av

    if packet.is_corrupt:
        yield "damaged here"
        return
    try:
        with _failing_as_ffmpeg():
            frames = packet.decode()
    except (av.error.FFmpegError, OSError) as error:
        yield f"cannot be decoded: {error.strerror}"
        return
    for frame in frames:
        yield "decoded with errors" if frame.is_corrupt else frame


def num_bytes_of(decoded: VideoFrame) -> int:
    """The memory of a decoded frame before it becomes RGB."""
    return sum(plane.buffer_size for plane in decoded.planes)


def quarter_turns(decoded: VideoFrame) -> int:
    """How many times ``upright_rgb`` turns the pixels by 90 degrees clockwise, 0 to 3."""
    return -round(decoded.rotation / 90) % 4


def upright_rgb(decoded: VideoFrame) -> Uint8Array | str:
    """The pixels (H, W, 3) RGB, turned as the container says: counter-clockwise degrees.

    Or why there are none, in words. Of an interlaced frame whose two fields clearly show different
    moments only the upper field is taken, with the rows between interpolated; FFmpeg mixes their
    colours, not their luminance, where those are stored by halves.
    """
    import av

    try:
        with _failing_as_ffmpeg():
            pixels = np.asarray(decoded.to_ndarray(format="rgb24"), np.uint8)
    except (av.error.FFmpegError, OSError) as error:
        return f"pixels of type {decoded.format.name} do not become RGB: {error.strerror}"
    if decoded.interlaced_frame and _is_combed(pixels):
        pixels = _upper_field(pixels)
    return np.rot90(pixels, -quarter_turns(decoded))


def _is_combed(pixels: Uint8Array) -> bool:
    """Whether rows (H, W, 3) differ more from their neighbours than from those one farther on.

    So they do where things moved from one field to the other; cameras also call frames interlaced
    of which both fields are of one moment.
    """
    green = pixels[:, ::_COLUMN_STEP, 1].astype(np.int16)
    if len(green) <= _LEAST_ROWS:
        return False
    to_next = np.abs(green[1:-1] - green[:-2]).mean()
    to_second = np.abs(green[2:] - green[:-2]).mean()
    return bool(to_next > _COMBED_RATIO * to_second)


def _upper_field(pixels: Uint8Array) -> Uint8Array:
    """The rows 0, 2, ... of an image (H, W, 3), and means of them between."""
    field = np.array(pixels)
    above, below = pixels[0:-1:2].astype(np.uint16), pixels[2::2].astype(np.uint16)
    field[1 : 1 + 2 * len(below) : 2] = (above[: len(below)] + below + 1) // 2
    field[1 + 2 * len(below) :: 2] = pixels[2 * len(below) : 2 * len(below) + 1]  # the last row
    return field


@contextmanager
def _failing_as_ffmpeg() -> Iterator[None]:
    """Raises what PyAV stumbles over in damaged data as an OSError, beside FFmpeg's own errors."""
    import av

    try:
        yield
    except av.error.FFmpegError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise OSError(errno.EINVAL, f"damaged: {type(error).__name__}: {error}") from error
    except MemoryError as error:
        raise OSError(errno.ENOMEM, "does not fit in memory") from error
