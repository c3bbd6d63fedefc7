"""Takes the frames of what FFmpeg has opened."""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from adapters.sources.files.video_frames import (
    decode_packet,
    num_bytes_of,
    packets_of,
    picture_stream,
)
from adapters.sources.streams.frame_intake import FrameIntake
from adapters.sources.streams.pacing import Pace
from adapters.sources.streams.patience import StreamError
from engine.types import DropReason

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

    from engine.config import LiveSourcesConfig


class ContainerReader:
    """Reads the packets of a container as they come, and puts the frames in them into an intake."""

    def __init__(
        self,
        container: InputContainer,
        *,
        intake: FrameIntake,
        config: LiveSourcesConfig,
        stop: threading.Event,
        silence_s: float,
    ) -> None:
        """Finds the pictures in it.

        Args:
            container: is read from where it is.
            intake: takes the frames.
            config: time-outs.
            stop: nobody wants more.
            silence_s: how long pictures may be missing.

        Raises:
            StreamError: there are no pictures in it that can be decoded.
        """
        stream = picture_stream(container)
        if stream is None:
            raise StreamError(_no_pictures(container))
        self._container = container
        self._stream: VideoStream = stream
        self._intake = intake
        self._silence_s = silence_s
        self._open_timeout_s = config.open_timeout_s
        self._stop = stop
        self.last_s = -math.inf  # time in the video of the last frame taken
        self.has_ended = False  # all there is was read

    def leave_out_others(self) -> None:
        """Has FFmpeg read the pictures alone: no sound, and no other variant of a playlist."""
        from av.stream import Discard

        for stream in self._container.streams:
            if stream.index != self._stream.index:
                stream.discard = Discard.all

    @property
    def description(self) -> str:
        """The codec, and the size of its pictures."""
        codec = self._stream.codec_context
        size = f", {codec.width} x {codec.height} px" if codec.width else ""
        return f"{codec.name}{size}"

    def read(
        self,
        *,
        pace: Pace | None = None,
        after_s: float = -math.inf,
        frame_came: Callable[[], None] = lambda: None,
    ) -> str:
        """Takes what comes; returns why nothing more does.

        Args:
            pace: frames are waited for until they are due; None: they come when they do.
            after_s: time in the video up to which its frames were taken before.
            frame_came: is called for each packet of pictures.

        Raises:
            av.error.FFmpegError: it cannot be read further.
            OSError: PyAV failed on what FFmpeg read.
        """
        packet_came_s = frame_came_s = time.monotonic()
        # All streams, because FFmpeg's time-out begins anew with every packet of sound.
        for packet in packets_of(self._container):
            if self._stop.is_set():
                return "stopped"
            now_s = time.monotonic()
            if packet.stream_index == self._stream.index:
                packet_came_s = now_s
                if self._take(packet, pace=pace, after_s=after_s):
                    now_s = packet_came_s = frame_came_s = time.monotonic()
                frame_came()
            if now_s - packet_came_s > self._silence_s:
                return f"connected, but no picture for {self._silence_s:g} s"
            # A decoder that joins in the middle waits for the next key frame.
            if now_s - frame_came_s > self._open_timeout_s + self._silence_s:
                return "connected, but nothing that comes can be decoded"
        self.has_ended = True
        return "the stream ended"

    def _take(self, packet: Packet[Any], *, pace: Pace | None, after_s: float) -> bool:
        """Puts the frames of a packet into the intake; False when there is none."""
        has_frame = False
        for decoded in decode_packet(packet):
            if isinstance(decoded, str):
                self._intake.reject(DropReason.UNREADABLE, decoded)
                continue
            has_frame = True
            if decoded.time is not None and decoded.time <= after_s:
                continue
            if pace is not None and self._stop.wait(pace.left_s(decoded.time)):
                return True
            self._put(decoded)
        return has_frame

    def _put(self, decoded: VideoFrame) -> None:
        self._intake.put(decoded, num_bytes=num_bytes_of(decoded), stream_s=decoded.time)
        if decoded.time is not None:
            self.last_s = decoded.time


def ffmpeg_words(error: Exception) -> str:
    """What FFmpeg or the system says of the kind of error; its full text repeats the URL."""
    return getattr(error, "strerror", None) or type(error).__name__


def is_vague(error: Exception) -> bool:
    """Whether FFmpeg only says that something about the connection went wrong."""
    return isinstance(error, OSError) and error.errno == errno.EIO


def reading_failed(error: Exception, *, silence_s: float) -> str:
    """Why a container that was open cannot be read further."""
    import av

    if isinstance(error, av.error.ExitError):
        return f"nothing came for {silence_s:g} s"
    return f"the connection broke: {_or_ended(error)}"


def _or_ended(error: Exception) -> str:
    return "the other side ended it" if is_vague(error) else ffmpeg_words(error)


def _no_pictures(container: InputContainer) -> str:
    """Why a container has no stream of pictures, in words."""
    if any(stream.codec_context is None for stream in container.streams.video):
        return "connected, but its video has a codec that FFmpeg cannot decode here"
    if container.streams.audio:
        return "connected, but no pictures in this stream: sound alone"
    return "connected, but no pictures in this stream"
