"""The thread that stays connected to a live stream and reads it."""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from adapters.live.backoff import Backoff
from adapters.sources.files.video_frames import open_container
from adapters.sources.streams.connections import why_not_connected
from adapters.sources.streams.container_reading import (
    ContainerReader,
    ffmpeg_words,
    is_vague,
    reading_failed,
)
from adapters.sources.streams.datagrams import await_transport_stream
from adapters.sources.streams.ffmpeg_interrupt import interrupt_when
from adapters.sources.streams.frame_intake import DecodeFrame, FrameIntake
from adapters.sources.streams.http_reading import HttpReader
from adapters.sources.streams.patience import Loss, StreamError
from adapters.sources.streams.push_listener import Publisher, PushListener, Relay
from adapters.sources.streams.srt_program import SrtProgram
from adapters.sources.streams.stream_address import StreamAddress, Way
from engine.config import LiveSourcesConfig
from engine.cpu_time import Stage, charge_thread_to
from engine.ports import ArrivalSink
from engine.types import SourceState

if TYPE_CHECKING:
    from av.container import InputContainer

logger = logging.getLogger(__name__)

_JOIN_S = 0.5
_UNABLE_TO_LISTEN = {errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE}
_SILENCE_RATIO = 1.5  # of the time-out in which FFmpeg notices itself what it can


class StreamReader:
    """Reads a stream on a thread of its own, as fast as it comes, and connects again for ever.

    Where neither FFmpeg nor the system can be interrupted, in the look-up of a host's name or a
    camera's driver, the thread outlives ``close`` until that returns. It is a daemon.
    """

    def __init__(
        self,
        address: StreamAddress,
        *,
        config: LiveSourcesConfig,
        every_nth_frame: int,
        decode: DecodeFrame,
        sink: ArrivalSink,
        listener: PushListener | None = None,
    ) -> None:
        """Prepares the thread.

        Args:
            address: the stream.
            config: time-outs, and how to try again.
            every_nth_frame: of the frames received, one of n goes on.
            decode: makes RGB of a received frame; called on whichever thread decodes arrivals.
            sink: takes arrivals, frames that cannot be decoded, and notices.
            listener: listens already where others are to push to; closed at the end.
        """
        self._address = address
        self._config = config
        self._intake = FrameIntake(
            address.label, every_nth_frame=every_nth_frame, decode=decode, sink=sink
        )
        self._backoff = Backoff(first_s=config.retry_first_s, max_s=config.retry_max_s)
        self._stop = threading.Event()
        self._listener = listener
        self._http = HttpReader(address.url, config=config, intake=self._intake, stop=self._stop)
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
        charge_thread_to(Stage.DECODE)
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
        intake = self._intake
        while not self._stop.is_set():
            num_before = intake.num_received
            loss = self._read_once()
            if loss.is_refused or loss.is_end:
                state = SourceState.REFUSED if loss.is_refused else SourceState.ENDED
                intake.over(state, loss.detail)
                return
            if loss.is_nobody or self._stop.is_set():
                continue
            intake.lost(loss.detail)
            # Whoever pushes must not stand before a closed door for long.
            if intake.num_received > num_before or self._address.is_listening:
                self._backoff.reset()
            self._stop.wait(self._backoff.next_wait_s())

    def _read_once(self) -> Loss:
        """Connects and reads until that is over, for whatever reason."""
        if self._address.way is Way.HTTP:
            return self._http.read_once()
        import av

        is_open = False
        try:
            with ExitStack() as opened:
                container = self._opened(opened)
                reader = ContainerReader(
                    container,
                    intake=self._intake,
                    config=self._config,
                    stop=self._stop,
                    silence_s=self._config.read_timeout_s,
                )
                is_open = True
                self._intake.connected(reader.description)
                if self._listener is not None:
                    self._listener.turn_away()
                return Loss(detail=reader.read())
        except StreamError as error:
            return error.loss
        except (av.error.FFmpegError, OSError) as error:
            if is_open:
                silence_s = self._config.read_timeout_s
                return Loss(detail=reading_failed(error, silence_s=silence_s))
            return self._opening_failed(error)

    def _opened(self, opened: ExitStack) -> InputContainer:
        """What FFmpeg makes of the stream; closed by ``opened``, with all that it needs.

        Raises:
            StreamError: there is none.
            av.error.FFmpegError: it cannot be opened.
            OSError: nothing can listen there, or PyAV failed on what FFmpeg read.
        """
        address = self._address
        if address.way is Way.SRT:
            program = opened.enter_context(
                SrtProgram(address, config=self._config, stop=self._stop)
            )
            container = opened.enter_context(_open(program, address, self._config))
            program.stream_begins()
            return container
        if address.way is Way.UDP:
            await_transport_stream(address, stop=self._stop)
        if address.way is Way.RTMP_PUSH:
            publisher = self._next_publisher()
            if publisher is None:
                raise StreamError("nobody came", is_nobody=True)
            relay = Relay(publisher, silence_s=_SILENCE_RATIO * self._config.read_timeout_s)
            address = address.listening_at(opened.enter_context(relay).address)
        return opened.enter_context(_open(address.url, address, self._config))

    def _next_publisher(self) -> Publisher | None:
        """Whoever is the next to push; None where nobody comes for a while."""
        if not self._intake.has_news:
            logger.info("%s: waits for a stream to be pushed", self._address.label)
        if self._listener is None:
            self._listener = PushListener.at(self._address, config=self._config, early={})
        return self._listener.wait(self._address.max_wait_s, stop=self._stop)

    def _opening_failed(self, error: Exception) -> Loss:
        import av

        refusals = (av.error.HTTPUnauthorizedError, av.error.HTTPForbiddenError)
        if isinstance(error, refusals):
            return Loss(
                detail=f"connected, but not allowed in: {ffmpeg_words(error)}", is_refused=True
            )
        if self._address.is_listening:
            return self._listening_failed(error)
        if isinstance(error, av.error.HTTPClientError | av.error.HTTPServerError):
            return Loss(detail=f"connected, but {ffmpeg_words(error)}")
        if isinstance(error, av.error.InvalidDataError):
            return Loss(detail=f"connected, but what comes is no {self._address.scheme.upper()}")
        if not is_vague(error) and not isinstance(error, av.error.ExitError):
            return Loss(detail=f"no connection: {ffmpeg_words(error)}")
        return Loss(detail=why_not_connected(self._address, config=self._config, stop=self._stop))

    def _listening_failed(self, error: Exception) -> Loss:
        import av

        if isinstance(error, av.error.TimeoutError):
            return Loss(detail="nobody came", is_nobody=True)
        if isinstance(error, OSError) and error.errno in _UNABLE_TO_LISTEN:
            return Loss(detail=f"cannot listen there: {ffmpeg_words(error)}")
        if self._address.way is Way.RTMP_PUSH:
            return Loss(detail="whoever connected pushed no stream")
        if isinstance(error, av.error.ExitError):
            detail = f"connected, but no video within {self._config.open_timeout_s:g} s"
            return Loss(detail=detail, is_nobody=self._address.way is not Way.UDP)
        return Loss(detail=f"cannot be received: {ffmpeg_words(error)}")


@contextmanager
def _open(
    file: str | SrtProgram, address: StreamAddress, config: LiveSourcesConfig
) -> Iterator[InputContainer]:
    container = open_container(
        file,
        format=address.format,
        options=dict(address.options),
        timeout=(address.max_wait_s + config.open_timeout_s, config.read_timeout_s),
    )
    with container:
        yield container
