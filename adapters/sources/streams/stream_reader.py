"""The thread that stays connected to a live stream and reads it."""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from adapters.images.decoding import read_image_header
from adapters.live.backoff import Backoff
from adapters.live.capture_clock import CaptureClock
from adapters.sources.files.video_frames import (
    decode_packet,
    num_bytes_of,
    open_container,
    packets_of,
    picture_stream,
)
from adapters.sources.streams.ffmpeg_interrupt import interrupt_when
from adapters.sources.streams.multipart import MultipartError, MultipartReader, OversizedPart
from adapters.sources.streams.push_listener import Publisher, PushListener, Relay
from adapters.sources.streams.stream_address import StreamAddress
from engine.config import LiveSourcesConfig
from engine.ports import ArrivalSink
from engine.types import (
    Arrival,
    DropReason,
    Frame,
    RejectedFrame,
    SourceNotice,
    SourceState,
)

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

logger = logging.getLogger(__name__)

_JOIN_S = 0.5
_MIN_STEP_S = 1e-3  # of capture times across two connections
_MB = 1e6
_UNABLE_TO_LISTEN = {errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE}
_SILENCE_RATIO = 1.5  # of the time-out in which FFmpeg notices itself what it can
_MAX_DETAIL_CHARS = 120


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UndecodedFrame:
    """A received frame before it becomes pixels."""

    index: int  # of all that the source received
    captured_at_s: float
    received_at_s: float  # monotonic
    content: VideoFrame | bytes  # bytes: a JPEG file


DecodeFrame = Callable[[UndecodedFrame], Frame | RejectedFrame]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loss:
    """Why a connection is no more, or never was; without credentials."""

    detail: str
    is_refused: bool = False  # trying again is useless
    is_nobody: bool = False  # whom we listened for did not come yet


class StreamReader:
    """Reads a stream on a thread of its own, as fast as it comes, and connects again for ever.

    Where FFmpeg cannot be interrupted, in the look-up of a host's name or a camera's driver, the
    thread outlives ``close`` until that returns. It is a daemon.
    """

    def __init__(
        self,
        address: StreamAddress,
        *,
        config: LiveSourcesConfig,
        every_nth_frame: int,
        decode: DecodeFrame,
        sink: ArrivalSink,
    ) -> None:
        """Prepares the thread.

        Args:
            address: the stream.
            config: time-outs, and how to try again.
            every_nth_frame: of the frames received, one of n goes on.
            decode: makes RGB of a received frame; called on whichever thread decodes arrivals.
            sink: takes arrivals, frames that cannot be decoded, and notices.
        """
        self._address = address
        self._config = config
        self._every_nth_frame = every_nth_frame
        self._decode = decode
        self._sink = sink
        self._backoff = Backoff(first_s=config.retry_first_s, max_s=config.retry_max_s)
        self._clock = CaptureClock()
        self._last_captured_at_s = 0.0
        self._num_received = 0
        self._last_loss = ""
        self._stop = threading.Event()
        self._listener: PushListener | None = None
        self._error: BaseException | None = None
        self._ended: Future[None] = Future()
        # A running future refuses to be cancelled: whoever stops waiting does not stop the thread.
        self._ended.set_running_or_notify_cancel()

    def start(self) -> None:
        """Starts the thread."""
        name = f"stream {self._address.label}"
        threading.Thread(target=self._run, name=name, daemon=True).start()

    async def ended(self) -> None:
        """Waits until the thread has ended.

        Raises:
            Whatever broke the thread.
        """
        await asyncio.wrap_future(self._ended)
        if self._error is not None:
            raise self._error

    async def close(self) -> None:
        """Has the thread end, and waits for it for a moment."""
        self._stop.set()
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(self._ended), _JOIN_S)

    def _run(self) -> None:
        try:
            interrupt_when(self._stop)
            self._stay_connected()
        except BaseException as error:  # handed over, not handled: it belongs to who waits
            self._error = error
        finally:
            if self._listener is not None:
                self._listener.close()
            self._ended.set_result(None)

    def _stay_connected(self) -> None:
        while not self._stop.is_set():
            num_before = self._num_received
            loss = self._read_once()
            if loss.is_refused:
                self._report(SourceState.REFUSED, loss.detail)
                return
            if loss.is_nobody or self._stop.is_set():
                continue
            if loss.detail != self._last_loss:  # the same is not reported at every try
                self._report(SourceState.LOST, loss.detail)
                self._last_loss = loss.detail
            # Whoever pushes must not stand before a closed door for long.
            if self._num_received > num_before or self._address.is_listening:
                self._backoff.reset()
            self._stop.wait(self._backoff.next_wait_s())

    def _read_once(self) -> _Loss:
        """Connects and reads until that is over, for whatever reason."""
        import av

        is_open = False
        try:
            with ExitStack() as opened:
                address = self._address
                if address.is_listening:
                    publisher = self._next_publisher()
                    if publisher is None:
                        return _Loss(detail="nobody came", is_nobody=True)
                    relay = Relay(publisher, silence_s=_SILENCE_RATIO * self._config.read_timeout_s)
                    address = address.listening_at(opened.enter_context(relay).address)
                container, stream = opened.enter_context(_open(address, self._config))
                is_open = True
                if self._address.carries_jpegs:
                    return _Loss(detail=self._read_parts(container))
                if stream is None:
                    return _Loss(detail="no pictures in this stream")
                self._clock = CaptureClock()
                self._report_connected(stream)
                if self._listener is not None:
                    self._listener.turn_away()
                return _Loss(detail=self._read(container, stream))
        except (av.error.FFmpegError, OSError) as error:
            return self._reading_failed(error) if is_open else self._opening_failed(error)

    def _next_publisher(self) -> Publisher | None:
        """Whoever is the next to push; None where nobody comes for a while."""
        if not self._last_loss and not self._num_received:
            logger.info("%s: waits for a stream to be pushed", self._address.label)
        if self._listener is None:
            parts = urlsplit(self._address.url)
            self._listener = PushListener(
                parts.hostname or "",
                parts.port or 0,
                label=self._address.label,
                patience_s=self._config.read_timeout_s,
            )
        return self._listener.wait(self._address.max_wait_s, stop=self._stop)

    def _read(self, container: InputContainer, stream: VideoStream) -> str:
        """Takes what comes; returns why nothing more does."""
        packet_came_s = frame_came_s = time.monotonic()
        # All streams, because FFmpeg's time-out begins anew with every packet of sound.
        for packet in packets_of(container):
            if self._stop.is_set():
                return "stopped"
            now_s = time.monotonic()
            if packet.stream_index == stream.index:
                packet_came_s = now_s
                if self._take(packet):
                    frame_came_s = now_s
            if now_s - packet_came_s > self._config.read_timeout_s:
                return f"no picture for {self._config.read_timeout_s:g} s"
            # A decoder that joins in the middle waits for the next key frame.
            if now_s - frame_came_s > self._config.open_timeout_s + self._config.read_timeout_s:
                return "nothing that comes can be decoded"
        return "the stream ended"

    def _take(self, packet: Packet[Any]) -> bool:
        """Puts the frames of a packet into the sink; False when there is none."""
        has_frame = False
        for decoded in decode_packet(packet):
            if isinstance(decoded, str):
                self._reject(DropReason.UNREADABLE, decoded)
            else:
                self._put(decoded, num_bytes=num_bytes_of(decoded), stream_s=decoded.time)
                has_frame = True
        return has_frame

    def _read_parts(self, container: InputContainer) -> str:
        """Takes the parts of a multipart stream; returns why nothing more comes."""
        parts = MultipartReader(max_part_bytes=int(self._config.max_payload_mb * _MB))
        self._clock = CaptureClock()
        is_connected = False
        part_came_s = time.monotonic()
        try:
            for packet in packets_of(container):
                if self._stop.is_set():
                    return "stopped"
                for part in parts.feed(bytes(packet)):
                    if not is_connected:
                        self._report_picture(part)
                    is_connected = True
                    part_came_s = time.monotonic()
                    self._take_part(part)
                # Bytes without an end keep FFmpeg's time-out from running out.
                if time.monotonic() - part_came_s > self._config.read_timeout_s:
                    return f"no picture for {self._config.read_timeout_s:g} s"
        except MultipartError as error:
            return str(error)
        return "the stream ended" if is_connected else "no pictures in this stream"

    def _take_part(self, part: bytes | OversizedPart) -> None:
        if isinstance(part, OversizedPart):
            self._reject(DropReason.TOO_LARGE, f"{part.num_bytes / _MB:.0f} MB")
        else:
            self._put(part, num_bytes=len(part), stream_s=None)

    def _report_picture(self, part: bytes | OversizedPart) -> None:
        header = read_image_header(part) if isinstance(part, bytes) else None
        size = "" if header is None else f", {header.width} x {header.height} px"
        self._last_loss = ""
        self._report(SourceState.CONNECTED, f"mjpeg{size}")

    def _put(self, content: VideoFrame | bytes, *, num_bytes: int, stream_s: float | None) -> None:
        captured_at_s = self._clock.tick(stream_s, arrived_at_s=time.time())
        captured_at_s = max(captured_at_s, self._last_captured_at_s + _MIN_STEP_S)
        self._last_captured_at_s = captured_at_s
        index = self._next_index()
        if index % self._every_nth_frame:
            return
        undecoded = UndecodedFrame(
            index=index,
            captured_at_s=captured_at_s,
            received_at_s=time.monotonic(),
            content=content,
        )
        self._sink(
            Arrival(
                source=self._address.label,
                index=index,
                name=frame_name(index),
                captured_at_s=captured_at_s,
                num_bytes=num_bytes,
                decode=functools.partial(self._decode, undecoded),
            )
        )

    def _reject(self, reason: DropReason, detail: str) -> None:
        self._sink(
            rejected_frame(
                self._address.label,
                index=self._next_index(),
                captured_at_s=self._last_captured_at_s or time.time(),
                reason=reason,
                detail=detail,
            )
        )

    def _next_index(self) -> int:
        self._num_received += 1
        return self._num_received - 1

    def _report_connected(self, stream: VideoStream) -> None:
        self._last_loss = ""
        codec = stream.codec_context
        size = f", {codec.width} x {codec.height} px" if codec.width else ""
        self._report(SourceState.CONNECTED, f"{codec.name}{size}")

    def _report(self, state: SourceState, detail: str) -> None:
        self._sink(SourceNotice(source=self._address.label, state=state, detail=detail))

    def _opening_failed(self, error: Exception) -> _Loss:
        import av

        refusals = (av.error.HTTPUnauthorizedError, av.error.HTTPForbiddenError)
        if isinstance(error, refusals):
            return _Loss(detail=_words(error), is_refused=True)
        if self._address.is_listening:
            return _listening_failed(error)
        if isinstance(error, av.error.ExitError):
            return _Loss(detail=f"no stream within {self._config.open_timeout_s:g} s")
        if not _is_vague(error):
            return _Loss(detail=f"no connection: {_words(error)}")
        doubt = ", or its certificate is not trusted" if self._address.is_secure else ""
        return _Loss(detail=f"no connection: the host is unknown or broke it off{doubt}")

    def _reading_failed(self, error: Exception) -> _Loss:
        import av

        if isinstance(error, av.error.ExitError):
            return _Loss(detail=f"nothing came for {self._config.read_timeout_s:g} s")
        words = "the other side ended it" if _is_vague(error) else _words(error)
        return _Loss(detail=f"the connection broke: {words}")


def rejected_frame(
    source: str, *, index: int, captured_at_s: float, reason: DropReason, detail: str
) -> RejectedFrame:
    """A frame of a stream that does not go on, under the name it would have had."""
    return RejectedFrame(
        source=source,
        index=index,
        name=frame_name(index),
        captured_at_s=captured_at_s,
        reason=reason,
        detail=detail[:_MAX_DETAIL_CHARS],
    )


def frame_name(index: int) -> str:
    """The name of a frame of a stream."""
    return f"{index:06d}.jpg"


def _words(error: Exception) -> str:
    """What FFmpeg or the system says of the kind of error; its full text repeats the URL."""
    return getattr(error, "strerror", None) or type(error).__name__


def _listening_failed(error: Exception) -> _Loss:
    import av

    if isinstance(error, av.error.TimeoutError):
        return _Loss(detail="nobody came", is_nobody=True)
    if isinstance(error, OSError) and error.errno in _UNABLE_TO_LISTEN:
        return _Loss(detail=f"cannot listen there: {_words(error)}")
    return _Loss(detail="whoever connected pushed no stream")


def _is_vague(error: Exception) -> bool:
    """Whether FFmpeg only says that something about the connection went wrong."""
    return isinstance(error, OSError) and error.errno == errno.EIO


@contextmanager
def _open(
    address: StreamAddress, config: LiveSourcesConfig
) -> Iterator[tuple[InputContainer, VideoStream | None]]:
    container = open_container(
        address.url,
        format=address.format,
        options=dict(address.options),
        timeout=(address.max_wait_s + config.open_timeout_s, config.read_timeout_s),
    )
    with container:
        yield container, picture_stream(container)
