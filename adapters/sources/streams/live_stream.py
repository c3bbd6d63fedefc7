"""A network stream or a camera of this computer as a source."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from adapters.images.decoding import RefusedImage, decode_image, refused_by_size
from adapters.images.exif import intrinsics_prior
from adapters.live.listening import reachable_host, refuse_taken_address
from adapters.live.newest_slot import NewestSlot, Picture
from adapters.sources.files.video_frames import upright_rgb
from adapters.sources.streams.stream_address import parse_stream_address
from adapters.sources.streams.stream_reader import StreamReader, frame_name, rejected_frame
from engine.config import LiveSourcesConfig, SourcesConfig
from engine.errors import SourceError
from engine.ports import FrameIds
from engine.types import (
    DropReason,
    Frame,
    GpsFix,
    IntrinsicsPrior,
    RejectedFrame,
    SourceInfo,
    SourceNotice,
    SourceState,
    Uint8Array,
)

if TYPE_CHECKING:
    from av import VideoFrame

Item = Frame | RejectedFrame | SourceNotice


class LiveStream:
    """The frames of a stream as they come; after a break it is connected again.

    All frames are decoded, which video needs, but only those that somebody waits for become pixels:
    a frame that a newer one overtakes is told as dropped. ``index`` counts the received frames of
    all connections together. Frames of another size are another camera's.
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
            next_frame_id: gives out frame ids.

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

    async def frames(self) -> AsyncGenerator[Item, None]:
        """Yields the frames and news of the connection.

        Ends when the server refuses us, when ``max_frames`` were taken, and when no frame came for
        ``give_up_after_s``.
        """
        slot = NewestSlot(replaced=self._overtaken)
        reader = StreamReader(
            self._address,
            config=self._live_sources,
            every_nth_frame=self._sources.every_nth_frame,
            slot=slot,
        )
        reader.start()
        num_readable = 0
        deadline_s = self._deadline_s()
        try:
            while (item := await self._next(slot, deadline_s=deadline_s)) is not None:
                yield item
                if isinstance(item, Frame):
                    deadline_s = self._deadline_s()
                    num_readable += 1
                    if num_readable == self._sources.max_frames:
                        yield self._ended(f"{num_readable} frames were taken, as configured")
                        return
                elif isinstance(item, SourceNotice) and item.state is SourceState.ENDED:
                    return
        finally:
            await reader.close()

    async def _next(self, slot: NewestSlot, *, deadline_s: float | None) -> Item | None:
        """What comes next, a picture as a frame; None after the last."""
        try:
            async with asyncio.timeout_at(deadline_s):
                arrival = await slot.next()
        except TimeoutError:
            return self._ended(f"no frame for {self._live_sources.give_up_after_s:g} s")
        if isinstance(arrival, Picture):
            return await asyncio.to_thread(self._convert, arrival)
        return arrival

    def _deadline_s(self) -> float | None:
        """When to give up, on the event loop's clock, if a frame came now."""
        give_up_after_s = self._live_sources.give_up_after_s
        return asyncio.get_running_loop().time() + give_up_after_s if give_up_after_s else None

    def _ended(self, detail: str) -> SourceNotice:
        return SourceNotice(source=self.info.label, state=SourceState.ENDED, detail=detail)

    def _convert(self, picture: Picture) -> Frame | RejectedFrame:
        if isinstance(picture.content, bytes):
            return self._from_jpeg(picture, picture.content)
        return self._from_video(picture, picture.content)

    def _from_jpeg(self, picture: Picture, jpeg: bytes) -> Frame | RejectedFrame:
        image = decode_image(jpeg, config=self._sources)
        if isinstance(image, RefusedImage):
            return self._rejected(picture, image.reason, image.detail)
        height, width = image.pixels.shape[:2]
        prior = intrinsics_prior(image.exif, width=width, height=height)
        return self._frame(picture, image.pixels, jpeg=image.jpeg, gps=image.exif.gps, prior=prior)

    def _from_video(self, picture: Picture, decoded: VideoFrame) -> Frame | RejectedFrame:
        import av

        refused = refused_by_size(decoded.width, decoded.height, config=self._sources)
        if refused is not None:
            return self._rejected(picture, refused.reason, refused.detail)
        try:
            pixels = upright_rgb(decoded)
        except av.error.FFmpegError as error:
            detail = f"pixels of type {decoded.format.name} do not become RGB: {error.strerror}"
            return self._rejected(picture, DropReason.UNREADABLE, detail)
        return self._frame(picture, pixels)

    def _frame(
        self,
        picture: Picture,
        pixels: Uint8Array,
        *,
        jpeg: bytes | None = None,
        gps: GpsFix | None = None,
        prior: IntrinsicsPrior | None = None,
    ) -> Frame:
        height, width = pixels.shape[:2]
        return Frame(
            frame_id=self._next_frame_id(),
            camera_key=f"stream|{width}x{height}",
            source=self.info.label,
            index=picture.index,
            name=frame_name(picture.index),
            captured_at_s=picture.captured_at_s,
            received_at_s=picture.received_at_s,
            pixels=pixels,
            jpeg=jpeg,
            gps=gps,
            intrinsics_prior=prior,
        )

    def _rejected(self, picture: Picture, reason: DropReason, detail: str) -> RejectedFrame:
        return rejected_frame(
            self.info.label,
            index=picture.index,
            captured_at_s=picture.captured_at_s,
            reason=reason,
            detail=detail,
        )

    def _overtaken(self, picture: Picture) -> RejectedFrame:
        detail = "a newer frame came before it was taken"
        return self._rejected(picture, DropReason.OVERLOAD, detail)


def _check_format(name: str | None, *, label: str) -> None:
    import av

    try:
        if name is not None:
            av.ContainerFormat(name, "r")
    except ValueError as error:
        raise SourceError(f"{label}: this FFmpeg cannot read {name}") from error
