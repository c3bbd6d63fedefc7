"""A video file as a source, decoded by FFmpeg through PyAV."""

from __future__ import annotations

import functools
import itertools
import math
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.images.decoding import refused_by_size
from adapters.images.intrinsics import IntrinsicsReader, is_spherical_prior
from adapters.live.blocking import iterate_in_thread
from adapters.sources.files.mp4_boxes import lacks_index
from adapters.sources.files.photo_search import VIDEO_SUFFIXES
from adapters.sources.files.video_frames import (
    decode_packet,
    num_bytes_of,
    open_container,
    packets_of,
    picture_stream,
    quarter_turns,
    upright_rgb,
)
from adapters.sources.files.video_gps import ReadingFeed, positions_of_video
from engine.config import SourcesConfig, TelemetryConfig
from engine.errors import SourceError
from engine.ports import FrameIds
from engine.regular_files import regular_file_size
from engine.types import (
    Arrival,
    DropReason,
    Frame,
    Received,
    RejectedFrame,
    SourceInfo,
    SourceNotice,
    SourceState,
    TakenFrames,
)

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

_DEFAULT_RATE_HZ = 25.0  # FFmpeg's own, for streams without one
_MISSING_END_S = 0.5  # a file is cut when more is missing; sound may outlast the pictures a little
_WORTH_A_JUMP_S = 4.0  # of video that is decoded for nothing
_SAME_TIME_S = 1e-4  # capture times of one frame differ by rounding only
_MAX_DETAIL_CHARS = 120
# Of QuickTime and Matroska, and where GoPro (handler), DJI and Insta360 (encoder) put their names.
_CAMERA_TAGS = ("make", "model", "handler_name", "encoder", "artist", "product")


class VideoFile:
    """The frames of a video in order of presentation.

    ``index`` counts every frame of the file, also those that ``every_nth_frame`` leaves out and
    those that cannot be decoded, so that it stays the frame's number in the file.

    Positions of a subtitle file beside the video, or of a subtitle track in it, come as readings,
    each before the frames that it concerns, with a notice before all of them.
    """

    def __init__(
        self,
        path: Path,
        *,
        config: SourcesConfig,
        next_frame_id: FrameIds,
        telemetry: TelemetryConfig | None = None,
    ) -> None:
        """Opens the file once, to see that it is a video.

        Args:
            path: the video.
            config: limits on what is taken.
            next_frame_id: gives out frame ids; called on the thread that makes RGB of frames.
            telemetry: how its positions are read, and from which files; None: as by default.

        Raises:
            SourceError: the file is missing, is no video, or holds no pictures.
        """
        self._path = path
        self._config = config
        self._next_frame_id = next_frame_id
        self._telemetry = telemetry or TelemetryConfig()
        self._intrinsics = IntrinsicsReader()
        with _open(path) as (container, stream):
            num_frames_in_file = int(stream.frames)  # 0: the container does not say
            self._size = int(stream.width), int(stream.height)
            self._camera_name = _camera_name(container, stream)
        num_taken = len(range(0, num_frames_in_file, config.every_nth_frame))
        self.info = SourceInfo(
            label=str(path),
            is_live=False,
            is_sequence=True,
            num_frames=min(num_taken, config.max_frames or num_taken) if num_taken > 0 else None,
        )
        self._taken = TakenFrames(names={}, captured_at_s={})

    @property
    def fingerprint(self) -> str:
        """Size and time of the file."""
        try:
            status = self._path.stat()
        except OSError:
            return ""
        return f"{status.st_size} {status.st_mtime_ns}"

    def leave_out(self, taken: TakenFrames) -> list[str]:
        """Leaves out frames by their indices; the file is read from shortly before the others."""
        self._taken = taken
        if self.info.num_frames is not None:
            num_left = max(self.info.num_frames - len(taken.names), 0)
            self.info = replace(self.info, num_frames=num_left)
        if taken.fingerprint and taken.fingerprint != self.fingerprint:
            return [f"{self._path}: another file than before; it is read where that one stopped"]
        return []

    def frames(self) -> AsyncGenerator[Received, None]:
        """Yields the frames; FFmpeg decodes them on a thread of its own, as they are asked for.

        RGB is made of them where they are used.
        """
        return iterate_in_thread(self._read, name=f"video {self._path.name}")

    def image_sizes(self) -> Iterator[tuple[int, int]]:
        """The size that the container says, as stored."""
        yield self._size

    def _read(self, stop: threading.Event) -> Generator[Received, None, None]:
        positions = positions_of_video(self._path, stop=stop, config=self._telemetry)
        if positions is not None:
            yield SourceNotice(
                source=self.info.label, state=SourceState.CONNECTED, detail=positions.words
            )
        readings = ReadingFeed(positions.fixes if positions else (), source=self.info.label)
        with _open(self._path) as (container, stream):
            clock = CaptureClock(step_s=1.0 / float(stream.average_rate or _DEFAULT_RATE_HZ))
            decoding = _Decoding(container, stream)
            first_index = decoding.go_to(self._taken, clock) if self._taken.names else 0
            for index, decoded in enumerate(decoding.frames(), start=first_index):
                if stop.is_set():
                    return
                captured_at_s = clock.expected_s
                if not isinstance(decoded, str):
                    captured_at_s = clock.tick(decoded.time)
                    if index % self._config.every_nth_frame:
                        continue
                if index in self._taken.names:
                    continue
                if isinstance(decoded, str):
                    yield self._rejected(index, decoded, captured_at_s=captured_at_s)
                    continue
                yield from readings.until(captured_at_s)
                yield self._arrival(index, decoded, captured_at_s=captured_at_s)

    def _arrival(
        self, index: int, decoded: VideoFrame, *, captured_at_s: float
    ) -> Arrival | RejectedFrame:
        refused = refused_by_size(decoded.width, decoded.height, config=self._config)
        if refused is not None:
            return self._rejected(
                index, refused.detail, captured_at_s=captured_at_s, reason=refused.reason
            )
        return Arrival(
            source=self.info.label,
            index=index,
            name=_frame_name(index),
            captured_at_s=captured_at_s,
            num_bytes=num_bytes_of(decoded),
            decode=functools.partial(
                self._frame,
                index,
                decoded,
                captured_at_s=captured_at_s,
                received_at_s=time.monotonic(),
            ),
        )

    def _frame(
        self, index: int, decoded: VideoFrame, *, captured_at_s: float, received_at_s: float
    ) -> Frame | RejectedFrame:
        pixels = upright_rgb(decoded)
        if isinstance(pixels, str):
            return self._rejected(index, pixels, captured_at_s=captured_at_s)
        height, width = pixels.shape[:2]
        prior = self._intrinsics.of_pixels(pixels, name=self._camera_name)
        kind = "|spherical" if is_spherical_prior(prior) else ""
        return Frame(
            frame_id=self._next_frame_id(),
            camera_key=f"video|{width}x{height}{kind}",
            source=self.info.label,
            index=index,
            name=_frame_name(index),
            captured_at_s=captured_at_s,
            received_at_s=received_at_s,
            pixels=pixels,
            quarter_turns=quarter_turns(decoded),
            intrinsics_prior=prior,
        )

    def _rejected(
        self,
        index: int,
        detail: str,
        *,
        captured_at_s: float,
        reason: DropReason = DropReason.UNREADABLE,
    ) -> RejectedFrame:
        return RejectedFrame(
            source=self.info.label,
            index=index,
            name=_frame_name(index),
            captured_at_s=captured_at_s,
            reason=reason,
            detail=detail[:_MAX_DETAIL_CHARS],
        )


def _camera_name(container: InputContainer, stream: VideoStream) -> str:
    """What the tags of a video that name a camera hold, where there are any."""
    tags = [
        (key.lower(), value) for part in (container, stream) for key, value in part.metadata.items()
    ]
    return " ".join(value for key, value in tags if key.endswith(_CAMERA_TAGS))[:_MAX_DETAIL_CHARS]


def _frame_name(index: int) -> str:
    return f"{index:06d}.jpg"


class CaptureClock:
    """Capture times in s from the first frame on, strictly increasing.

    Follows the presentation times of the stream; where one is missing or does not grow, the frame
    comes one step of the average rate after the one before.
    """

    def __init__(self, *, step_s: float) -> None:
        self._step_s = step_s
        self._origin_s: float | None = None
        self._last_s = -step_s

    def reset(self) -> None:
        """Starts anew with the first frame."""
        self._origin_s = None
        self._last_s = -self._step_s

    @property
    def expected_s(self) -> float:
        """When the next frame is due."""
        return self._last_s + self._step_s

    def tick(self, presented_at_s: float | None) -> float:
        """The capture time of the next frame, whose presentation time is given."""
        captured_at_s = self.expected_s
        if presented_at_s is not None:
            if self._origin_s is None:
                self._origin_s = presented_at_s - captured_at_s
            if presented_at_s - self._origin_s > self._last_s:
                captured_at_s = presented_at_s - self._origin_s
        self._last_s = captured_at_s
        return captured_at_s


@contextmanager
def _open(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    import av

    if not path.exists():
        raise SourceError(f"{path}: no such file")
    try:
        regular_file_size(path)
        # Absolute, because FFmpeg takes what stands before a colon for a protocol.
        container = open_container(str(path.absolute()))
    except (av.error.FFmpegError, OSError) as error:
        if lacks_index(path):
            raise SourceError(
                f"{path}: the video has no index (moov): its recording was not finished, or not all"
                " of it was copied; copy it again, or let a tool repair it by another video of the"
                " same camera"
            ) from error
        kind = "" if path.suffix.lower() in VIDEO_SUFFIXES else "no photo by its name, and "
        words = f"{path}: {kind}not a readable video: {error.strerror or error}"
        raise SourceError(words) from error
    with container:
        stream = picture_stream(container)
        if stream is None:
            raise SourceError(f"{path}: holds no video that can be decoded")
        yield container, stream


class _Decoding:
    """The frames of a video, from its start or from where a former part of the run stopped."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._container = container
        self._stream = stream
        self._extent = _Extent()

    def frames(self) -> Iterator[VideoFrame | str]:
        """Decoded frames, and in the place of a damaged one the words that say so."""
        import av

        try:
            for packet in packets_of(self._container, self._stream):
                self._extent.add(packet)
                yield from decode_packet(packet)
        except (av.error.FFmpegError, OSError) as error:
            yield f"cannot be read further: {error.strerror}"
            return
        promised_s = _promised_duration_s(self._container, self._stream)
        if self._extent.duration_s < promised_s - _MISSING_END_S:
            yield f"the file ends at {self._extent.duration_s:.2f} s of {promised_s:.2f} s"

    def go_to(self, taken: TakenFrames, clock: CaptureClock) -> int:
        """Moves on to shortly before the first frame that was not taken.

        Where a frame is in the file shows only by its time, which is that of a frame that was
        taken: its index is known. A file whose frames have no such times is read from its start.

        Args:
            taken: the frames that were taken.
            clock: gives capture times; it goes on with them.

        Returns:
            The index of the next frame.
        """
        last = _last_before_gap(taken)
        if last is None or taken.captured_at_s[last] < _WORTH_A_JUMP_S:
            return 0
        first = next(self.frames(), None)
        if not isinstance(first, str) and first is not None and first.time is not None:
            clock.tick(first.time)
            if self._jump(first.time + taken.captured_at_s[last] - _WORTH_A_JUMP_S / 2):
                indices = {round(taken.captured_at_s[i] / _SAME_TIME_S): i for i in taken.names}
                for decoded in self.frames():
                    if isinstance(decoded, str) or decoded.time is None:
                        continue
                    passed_s = decoded.time - first.time
                    if passed_s > taken.captured_at_s[last]:
                        break
                    index = indices.get(round(passed_s / _SAME_TIME_S))
                    if index is not None and index <= last:
                        clock.tick(decoded.time)
                        return index + 1
        clock.reset()
        self._jump(0.0)
        return 0

    def _jump(self, time_s: float) -> bool:
        """Whether the file goes on at the last whole picture before a time of its own."""
        import av

        try:
            if time_s <= 0.0 or not self._stream.time_base:
                self._container.seek(0)
            else:
                position = int(time_s / self._stream.time_base)
                self._container.seek(position, stream=self._stream)
        except av.error.FFmpegError:
            return False
        return True


def _last_before_gap(taken: TakenFrames) -> int | None:
    """The last of the frames that were taken before the first that was not, as far as it shows.

    Frames that are left out on purpose lie between those that are taken at a constant step.
    """
    indices = sorted(taken.names)
    steps = [later - earlier for earlier, later in itertools.pairwise(indices)]
    step = min(steps, default=1)
    if not indices or indices[0] >= step:
        return None
    gap = next((place for place, one in enumerate(steps) if one > step), len(steps))
    return indices[gap]


class _Extent:
    """The stretch of time that the packets read so far cover."""

    def __init__(self) -> None:
        self._first_s = math.inf
        self._last_s = -math.inf

    def add(self, packet: Packet[VideoStream]) -> None:
        if packet.pts is not None and packet.time_base is not None:
            self._first_s = min(self._first_s, float(packet.pts * packet.time_base))
            end = packet.pts + (packet.duration or 0)
            self._last_s = max(self._last_s, float(end * packet.time_base))

    @property
    def duration_s(self) -> float:
        """Infinite when no packet has a time."""
        return self._last_s - self._first_s if self._first_s < math.inf else math.inf


def _promised_duration_s(container: InputContainer, stream: VideoStream) -> float:
    """What the header says, 0 where it says nothing."""
    import av

    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return float(container.duration or 0) / float(av.time_base)
