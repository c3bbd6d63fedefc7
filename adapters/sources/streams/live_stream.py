"""A network stream or a camera of this computer as a source."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from adapters.images.decoding import RefusedImage, decode_image, refused_by_size
from adapters.images.intrinsics import IntrinsicsReader
from adapters.live.deadline import GiveUpDeadline
from adapters.live.listening import reachable_host, refuse_taken_address
from adapters.sources.files.video_frames import quarter_turns, upright_rgb
from adapters.sources.streams.stream_address import parse_stream_address
from adapters.sources.streams.stream_reader import (
    StreamReader,
    UndecodedFrame,
    frame_name,
    rejected_frame,
)
from engine.config import LiveSourcesConfig, SourcesConfig
from engine.errors import SourceError
from engine.ports import ArrivalSink, FrameIds
from engine.types import (
    Arrival,
    DropReason,
    Frame,
    GpsFix,
    IntrinsicsPrior,
    Received,
    RejectedFrame,
    SourceInfo,
    SourceNotice,
    SourceState,
    Uint8Array,
)

if TYPE_CHECKING:
    from av import VideoFrame


class LiveStream:
    """The frames of a stream as they come; after a break it is connected again.

    FFmpeg decodes all frames, which video needs, but only those that the engine takes become RGB.
    ``index`` counts the received frames of all connections together. Frames of another size are
    another camera's.
    """

    def __init__(
        self,
        spec: str,
        *,
        sources: SourcesConfig,
        live_sources: LiveSourcesConfig,
        next_frame_id: FrameIds,
    ) -> None:
        """Reads the address; nothing is connected before frames are asked for.

        Args:
            spec: ``rtsp://``, ``rtsps://``, ``rtmp://``, ``rtmps://``, ``http://``, ``https://`` or
                ``camera:N``, see ``parse_stream_address``.
            sources: limits on what is taken.
            live_sources: time-outs, and how to try again.
            next_frame_id: gives out frame ids; called on the thread that decodes.

        Raises:
            SourceError: the address is none, nothing can listen there, or FFmpeg lacks what it
                needs.
        """
        self._address = parse_stream_address(spec, config=live_sources)
        self.info = SourceInfo(
            label=self._address.label, is_live=True, is_sequence=True, num_frames=None
        )
        self._sources = sources
        self._live_sources = live_sources
        self._next_frame_id = next_frame_id
        self._intrinsics = IntrinsicsReader()
        _check_format(self._address.format, label=self.info.label)
        if self._address.is_listening:
            parts = urlsplit(self._address.url)
            refuse_taken_address(parts.hostname or "", parts.port or 0, label=self.info.label)

    def invitation(self) -> str:
        """Where others may push to, in a line for the terminal; "" when nobody is to."""
        if not self._address.is_listening:
            return ""
        parts = urlsplit(self._address.url)
        host = reachable_host(parts.hostname or "")
        return f"waiting for a push to {parts.scheme}://{host}:{parts.port}{parts.path}"

    async def receive(self, sink: ArrivalSink) -> None:
        """Receives frames and news of the connection.

        Ends when the server refuses us, and when no frame came for ``give_up_after_s``.
        """
        deadline = GiveUpDeadline(self._live_sources.give_up_after_s)

        def put(item: Received) -> None:
            if isinstance(item, Arrival):
                deadline.restart()
            sink(item)

        reader = StreamReader(
            self._address,
            config=self._live_sources,
            every_nth_frame=self._sources.every_nth_frame,
            decode=self._decode,
            sink=put,
        )
        reader.start()
        try:
            if not await deadline.outlasts(reader.ended()):
                detail = f"no frame for {self._live_sources.give_up_after_s:g} s"
                sink(SourceNotice(source=self.info.label, state=SourceState.ENDED, detail=detail))
        finally:
            await reader.close()

    def _decode(self, undecoded: UndecodedFrame) -> Frame | RejectedFrame:
        if isinstance(undecoded.content, bytes):
            return self._from_jpeg(undecoded, undecoded.content)
        return self._from_video(undecoded, undecoded.content)

    def _from_jpeg(self, undecoded: UndecodedFrame, jpeg: bytes) -> Frame | RejectedFrame:
        image = decode_image(jpeg, config=self._sources)
        if isinstance(image, RefusedImage):
            return self._rejected(undecoded, image.reason, image.detail)
        prior = self._intrinsics.of_image(image)
        return self._frame(
            undecoded,
            image.pixels,
            jpeg=image.jpeg,
            gps=image.exif.gps,
            prior=prior,
            turns=image.exif.quarter_turns,
        )

    def _from_video(self, undecoded: UndecodedFrame, decoded: VideoFrame) -> Frame | RejectedFrame:

        refused = refused_by_size(decoded.width, decoded.height, config=self._sources)
        if refused is not None:
            return self._rejected(undecoded, refused.reason, refused.detail)
        pixels = upright_rgb(decoded)
        if isinstance(pixels, str):
            return self._rejected(undecoded, DropReason.UNREADABLE, pixels)
        return self._frame(
            undecoded,
            pixels,
            prior=self._intrinsics.of_pixels(pixels),
            turns=quarter_turns(decoded),
        )

    def _frame(
        self,
        undecoded: UndecodedFrame,
        pixels: Uint8Array,
        *,
        jpeg: bytes | None = None,
        gps: GpsFix | None = None,
        prior: IntrinsicsPrior | None = None,
        turns: int,
    ) -> Frame:
        height, width = pixels.shape[:2]
        return Frame(
            frame_id=self._next_frame_id(),
            camera_key=f"stream|{width}x{height}",
            source=self.info.label,
            index=undecoded.index,
            name=frame_name(undecoded.index),
            captured_at_s=undecoded.captured_at_s,
            received_at_s=undecoded.received_at_s,
            pixels=pixels,
            jpeg=jpeg,
            gps=gps,
            intrinsics_prior=prior,
            quarter_turns=turns,
        )

    def _rejected(
        self, undecoded: UndecodedFrame, reason: DropReason, detail: str
    ) -> RejectedFrame:
        return rejected_frame(
            self.info.label,
            index=undecoded.index,
            captured_at_s=undecoded.captured_at_s,
            reason=reason,
            detail=detail,
        )


def _check_format(name: str | None, *, label: str) -> None:
    import av

    try:
        if name is not None:
            av.ContainerFormat(name, "r")
    except ValueError as error:
        raise SourceError(f"{label}: this FFmpeg cannot read {name}") from error
