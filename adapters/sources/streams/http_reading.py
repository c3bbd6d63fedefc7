"""One connection to an HTTP server: what it sends decides how it is read."""

from __future__ import annotations

import math
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING

from adapters.images.decoding import read_image_header
from adapters.sources.files.video_frames import open_container
from adapters.sources.streams.container_reading import ContainerReader, ffmpeg_words, reading_failed
from adapters.sources.streams.frame_intake import FrameIntake
from adapters.sources.streams.http_client import HttpAnswer, HttpClient
from adapters.sources.streams.http_files import HttpFile, HttpFiles
from adapters.sources.streams.http_kinds import HttpKind, kind_of, unknown_format
from adapters.sources.streams.multipart import MultipartError, MultipartReader, OversizedPart
from adapters.sources.streams.pacing import Pace
from adapters.sources.streams.patience import Loss, Patience, StreamError
from adapters.sources.streams.stream_address import SHORT_LOOK
from engine.config import LiveSourcesConfig
from engine.types import DropReason

if TYPE_CHECKING:
    from av.container import InputContainer

_MB = 1e6
_BUFFER_BYTES = 1 << 16
# Demuxers that read what they are given and open nothing else, but for HLS, see http_files.py.
_DEMUXERS = (
    "hls,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpegts,flv,live_flv,avi,mpeg,mpegvideo,h264,hevc,av1"
    ",obu,ivf,ogg,asf,gif,mjpeg,aac,mp3,ac3,eac3,webvtt"
)
_NEVER_S = 1e8


class HttpReader:
    """Reads what an HTTP address gives, once for each connection. It belongs to one thread."""

    def __init__(
        self, url: str, *, config: LiveSourcesConfig, intake: FrameIntake, stop: threading.Event
    ) -> None:
        """Takes the address; nothing is connected yet.

        Args:
            url: with credentials.
            config: time-outs, limits and trusted certificates.
            intake: takes the frames.
            stop: nobody wants more.
        """
        self._url = url
        self._config = config
        self._intake = intake
        self._stop = stop
        self._max_bytes = int(config.max_payload_mb * _MB)
        self._taken_until_s = -math.inf  # of a stored video that broke off

    def read_once(self) -> Loss:
        """Connects and reads until that is over, for whatever reason."""
        try:
            patience = Patience(self._stop, silence_s=self._config.read_timeout_s)
            client = HttpClient(self._url, config=self._config, patience=patience)
            self._limit_opening(patience)
            with closing(client.open()) as answer:
                match kind_of(answer.begin(), answer.content_type):
                    case HttpKind.PARTS:
                        return Loss(detail=self._read_parts(answer, patience))
                    case HttpKind.PICTURE:
                        last = self._take_picture(answer, None)
                    case HttpKind.PLAYLIST | HttpKind.VIDEO as kind:
                        is_playlist = kind is HttpKind.PLAYLIST
                        return self._read_video(answer, client, patience, is_playlist=is_playlist)
            return self._poll(client, patience, last)
        except StreamError as error:
            return error.loss

    def _limit_opening(self, patience: Patience) -> None:
        timeout_s = self._config.open_timeout_s
        patience.limit(timeout_s, too_late=f"no answer, or none to its end, within {timeout_s:g} s")

    # -- pictures ---------------------------------------------------------------------------------

    def _read_parts(self, answer: HttpAnswer, patience: Patience) -> str:
        """Takes the parts of a multipart stream; returns why nothing more comes."""
        parts = MultipartReader(max_part_bytes=self._max_bytes, announced=answer.boundary.encode())
        silence_s = self._config.read_timeout_s
        is_connected = False
        part_came_s = time.monotonic()
        try:
            while True:
                patience.limit(silence_s, too_late=f"nothing came for {silence_s:g} s")
                if not (data := answer.read()):
                    break
                for part in parts.feed(data):
                    if not is_connected:
                        self._report_picture(part)
                    is_connected = True
                    part_came_s = time.monotonic()
                    self._take_part(part)
                # Bytes without an end keep the time-out from running out.
                if time.monotonic() - part_came_s > silence_s:
                    return f"connected, but no picture for {silence_s:g} s"
        except MultipartError as error:
            return f"connected, but {error}"
        return "the stream ended" if is_connected else "connected, but no pictures in this stream"

    def _poll(self, client: HttpClient, patience: Patience, last: bytes) -> Loss:
        """Asks for a picture again and again, after the first one.

        Raises:
            StreamError: with why no more come.
        """
        wait_s = 1.0 / self._config.snapshot_rate_hz
        while True:
            patience.sleep(wait_s)
            asked_s = time.monotonic()
            self._limit_opening(patience)
            with closing(client.open()) as answer:
                if kind_of(answer.begin(), answer.content_type) is not HttpKind.PICTURE:
                    return Loss(detail="what came was pictures, and is something else now")
                last = self._take_picture(answer, last)
            wait_s = max(1.0 / self._config.snapshot_rate_hz - (time.monotonic() - asked_s), 0.0)

    def _take_picture(self, answer: HttpAnswer, last: bytes | None) -> bytes:
        """Takes a picture unless it is the last one again; returns it, b"" if it is too large.

        Without a last one it is the first of the connection.
        """
        picture = self._picture_of(answer)
        if last is None:
            self._report_picture(picture)
        if picture != last:
            self._take_part(picture)
        return picture if isinstance(picture, bytes) else b""

    def _picture_of(self, answer: HttpAnswer) -> bytes | OversizedPart:
        """The whole picture, kept if it is not too large."""
        picture = bytearray()
        while data := answer.read():
            picture += data
            if len(picture) > self._max_bytes:
                return OversizedPart(num_bytes=answer.num_bytes or len(picture))
        return bytes(picture)

    def _take_part(self, part: bytes | OversizedPart) -> None:
        if isinstance(part, OversizedPart):
            self._intake.reject(DropReason.TOO_LARGE, f"{part.num_bytes / _MB:.0f} MB")
        else:
            self._intake.put(part, num_bytes=len(part), stream_s=None)

    def _report_picture(self, part: bytes | OversizedPart) -> None:
        header = read_image_header(part) if isinstance(part, bytes) else None
        size = "" if header is None else f", {header.width} x {header.height} px"
        self._intake.connected(f"mjpeg{size}")

    # -- video ------------------------------------------------------------------------------------

    def _read_video(
        self, answer: HttpAnswer, client: HttpClient, patience: Patience, *, is_playlist: bool
    ) -> Loss:
        """Takes the frames of a video or of a playlist's pieces of video."""
        import av

        files = HttpFiles(client, max_frame_bytes=self._max_bytes)
        begin = answer.begin()
        try:
            with (
                closing(HttpFile(answer, files=files)) as file,
                self._opened(file, files, is_playlist=is_playlist) as container,
            ):
                return self._read_container(container, files, patience, is_playlist=is_playlist)
        except av.error.ExitError:
            return Loss(detail=f"connected, but no video within {self._config.open_timeout_s:g} s")
        except (av.error.InvalidDataError, av.error.ArgumentError):  # the latter: not in our list
            if is_playlist:
                return Loss(detail="connected, but its playlist leads to no video that is known")
            return Loss(detail=unknown_format(begin, answer.content_type))
        except (av.error.FFmpegError, OSError) as error:
            return Loss(detail=f"connected, but not readable as video: {ffmpeg_words(error)}")

    def _opened(self, file: HttpFile, files: HttpFiles, *, is_playlist: bool) -> InputContainer:
        """What FFmpeg makes of a file.

        Raises:
            StreamError: it cannot be had to where a video begins.
            av.error.FFmpegError: it is none.
            OSError: PyAV failed on what FFmpeg read.
        """
        pieces = {"allowed_extensions": "ALL", "extension_picky": "0", "http_persistent": "0"}
        return open_container(
            file,
            format="hls" if is_playlist else None,
            options={
                "format_whitelist": _DEMUXERS,
                **SHORT_LOOK,
                **(pieces if is_playlist else {}),
            },
            buffer_size=_BUFFER_BYTES,
            timeout=(self._config.open_timeout_s, _NEVER_S),  # so that it can be interrupted
            io_open=files.open_piece,
        )

    def _read_container(
        self, container: InputContainer, files: HttpFiles, patience: Patience, *, is_playlist: bool
    ) -> Loss:
        import av

        silence_s = self._config.read_timeout_s + 2.0 * files.piece_s
        reader = ContainerReader(
            container,
            intake=self._intake,
            config=self._config,
            stop=self._stop,
            silence_s=silence_s,
        )
        reader.leave_out_others()
        is_stored = bool(container.duration and container.duration > 0)

        def frame_came() -> None:
            files.frame_came()
            patience.limit(silence_s, too_late=f"nothing came for {silence_s:g} s")

        self._intake.connected(reader.description)
        frame_came()
        try:
            detail = reader.read(
                pace=Pace() if is_stored or is_playlist else None,
                after_s=self._taken_until_s if is_stored else -math.inf,
                frame_came=frame_came,
            )
        except StreamError as error:
            detail = error.loss.detail
        except (av.error.FFmpegError, OSError) as error:
            detail = reading_failed(error, silence_s=silence_s)
        self._taken_until_s = max(self._taken_until_s, reader.last_s)
        is_end = is_stored and reader.has_ended and not self._stop.is_set()
        return Loss(detail="the video is over" if is_end else detail, is_end=is_end)
