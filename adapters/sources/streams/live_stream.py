"""A network stream or a camera of this computer as a source."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from adapters.images.decoding import RefusedImage, decode_image, refused_by_size
from adapters.images.intrinsics import IntrinsicsReader
from adapters.live.deadline import GiveUpDeadline
from adapters.live.listening import cannot_listen, reachable_host, refuse_taken_datagrams
from adapters.sources.files.video_frames import quarter_turns, upright_rgb
from adapters.sources.streams.frame_intake import UndecodedFrame, frame_name, rejected_frame
from adapters.sources.streams.push_listener import EarlyListening, PushListener
from adapters.sources.streams.srt_program import choose_srt
from adapters.sources.streams.stream_address import (
    StreamAddress,
    Way,
    is_multicast,
    parse_stream_address,
)
from adapters.sources.streams.stream_reader import StreamReader
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
        early: EarlyListening | None = None,
    ) -> None:
        """Reads the address; nothing is connected before frames are asked for.

        Where others are to push to, it listens from here on: whoever is early waits.

        Args:
            spec: ``rtsp://``, ``rtsps://``, ``rtmp://``, ``rtmps://``, ``http://``, ``https://``,
                ``srt://``, ``udp://`` or ``camera:N``, see ``parse_stream_address``.
            sources: limits on what is taken.
            live_sources: time-outs, and how to try again.
            next_frame_id: gives out frame ids; called on the thread that decodes.
            early: what listens already; the source takes what is its own.

        Raises:
            SourceError: the address is none, nothing can listen there, or FFmpeg lacks what it
                needs.
        """
        address = parse_stream_address(spec, config=live_sources)
        self._listener = _listening(address, live_sources, early={} if early is None else early)
        if self._listener is not None:  # a run that never begins must not keep the port
            self._forget = weakref.finalize(self, self._listener.close)
        self._address = choose_srt(address) if address.way is Way.SRT else address
        self.info = SourceInfo(
            label=self._address.label, is_live=True, is_sequence=True, num_frames=None
        )
        self._sources = sources
        self._live_sources = live_sources
        self._next_frame_id = next_frame_id
        self._intrinsics = IntrinsicsReader()
        _check_format(self._address.format, label=self.info.label)

    def invitation(self) -> str:
        """Where others may push to, in a line for the terminal; "" when nobody is to."""
        if not self._address.is_listening:
            return ""
        address = self._address
        host = address.host if is_multicast(address.host) else reachable_host(address.host)
        path = urlsplit(address.url).path
        return f"waiting for a push to {address.scheme}://{host}:{address.port}{path}"

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
            listener=self._listener,
        )
        if self._listener is not None:  # the reader closes it
            self._forget.detach()
            self._listener = None
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


def _listening(
    address: StreamAddress, config: LiveSourcesConfig, *, early: EarlyListening
) -> PushListener | None:
    """Listens where others are to push by RTMP; makes sure that FFmpeg can listen elsewhere.

    Raises:
        SourceError: nothing can listen there.
    """
    if not address.is_listening:
        return None
    if address.way is Way.RTMP_PUSH:
        try:
            return PushListener.at(address, config=config, early=early)
        except (OSError, UnicodeError) as error:
            raise cannot_listen(address.label, error) from error
    if not is_multicast(address.host):
        refuse_taken_datagrams(address.host, address.port, label=address.label)
    return None


def _check_format(name: str | None, *, label: str) -> None:
    import av

    try:
        if name is not None:
            av.ContainerFormat(name, "r")
    except ValueError as error:
        raise SourceError(f"{label}: this FFmpeg cannot read {name}") from error
