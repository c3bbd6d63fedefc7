"""Where a video was taken: by a subtitle file beside it, or a subtitle track in it."""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.sources.files.position_files import is_subtitles
from adapters.sources.files.telemetry_text import (
    Telemetry,
    TextBlock,
    TimedFix,
    blocks_of_srt,
    read_telemetry,
    text_of_file,
    text_of_packet,
)
from adapters.sources.files.video_frames import open_container, packets_of, picture_stream
from engine.config import TelemetryConfig
from engine.events import ALSO_AN_EVENT
from engine.regular_files import read_regular_file
from engine.types import GpsReading

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.subtitles.stream import SubtitleStream

logger = logging.getLogger(__name__)

ReadsTelemetry = Callable[[Iterable[TextBlock]], Telemetry]

_MAX_SIDE_FILE_BYTES = 256 * 2**20  # two hours at 60 Hz
_MAX_PACKETS = 1_000_000
_ISO_6709 = re.compile(r"([-+]\d{1,2}(?:\.\d{1,12})?)([-+]\d{1,3}(?:\.\d{1,12})?)")
_LOCATION_KEYS = ("location", "com.apple.quicktime.location.iso6709")


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoPositions:
    """The positions of a video by the time since its first frame."""

    fixes: tuple[TimedFix, ...]
    words: str  # where they are from, and what could not be used


class ReadingFeed:
    """Positions on their way to the engine, each before the first frame that needs it."""

    def __init__(self, fixes: Sequence[TimedFix], *, source: str) -> None:
        self._fixes = fixes
        self._source = source
        self._num_given = 0

    def until(self, captured_at_s: float) -> Iterator[GpsReading]:
        """What was not given yet, up to the first position after this time."""
        while self._num_given < len(self._fixes) and (
            self._num_given == 0 or self._fixes[self._num_given - 1].time_s <= captured_at_s
        ):
            timed = self._fixes[self._num_given]
            self._num_given += 1
            yield GpsReading(
                source=self._source,
                camera_key=None,
                captured_at_s=timed.time_s,
                fix=timed.fix,
            )


def positions_of_video(
    path: Path, *, stop: threading.Event, config: TelemetryConfig | None = None
) -> VideoPositions | None:
    """Looks for positions; a damaged track costs its positions only, and that is logged.

    The side file has the name of the video and the ending .SRT or .srt; its times count from the
    first frame. A file that speaks of no places is a film's dialogue. The one position that
    containers hold for the whole video, where the drone took off, does not move, so it cannot place
    a moving camera; it shows which of two numbers is the latitude.

    Args:
        path: a readable video.
        stop: when set, an unfinished search ends with what it has.
        config: the order of numbers that do not say it, and subtitle files elsewhere: that of the
            video's name, or the only one; None: as by default.

    Returns:
        None where nothing speaks of places.
    """
    config = config or TelemetryConfig()
    location = _location_of(path)
    read = functools.partial(read_telemetry, order=config.order, near_deg=location)
    for side_file in (*_given_files(path, config.positions), *_side_files(path)):
        telemetry = _of_side_file(side_file, read)
        if telemetry is not None:
            return _positions(telemetry, origin=side_file.name, label=str(path))
    telemetry = _of_tracks(path, read, stop=stop)
    if telemetry is not None:
        return _positions(telemetry, origin="its subtitle track", label=str(path))
    if location is not None:
        words = "holds one position for the whole video; it places no moving camera"
        logger.info("%s: %s: %g, %g", path, words, *location)
    return None


def _positions(telemetry: Telemetry, *, origin: str, label: str) -> VideoPositions:
    words = f"no positions from {origin}"
    if telemetry.fixes:
        num_fixes, altitude = len(telemetry.fixes), telemetry.altitude.value
        words = f"{num_fixes} positions from {origin}, {altitude} altitude"
        if telemetry.order:
            words += f"; {telemetry.order}"
        elif any(timed.fix.is_order_unsure for timed in telemetry.fixes):
            words += "; whether latitude or longitude comes first is left to the map"
    if telemetry.num_unusable:
        words += (
            f"; {telemetry.num_unusable} of {telemetry.num_blocks} blocks cannot be used:"
            f" {telemetry.problem}"
        )
        logger.warning("%s: %s", label, words, extra=ALSO_AN_EVENT)
    return VideoPositions(fixes=telemetry.fixes, words=words)


def _given_files(path: Path, positions: Sequence[str]) -> list[Path]:
    """Subtitle files that were named for a video."""
    subtitles = [Path(one) for one in positions if is_subtitles(one)]
    if len(subtitles) == 1:
        return subtitles
    named = [one for one in subtitles if one.stem.lower() == path.stem.lower()]
    if positions and not named:
        logger.warning("%s: no file of positions is for this video", path)
    return named


def _side_files(path: Path) -> list[Path]:
    return [
        side_file
        for side_file in (path.with_suffix(suffix) for suffix in (".SRT", ".srt", ".Srt"))
        if side_file.is_file()
    ]


def _of_side_file(side_file: Path, read: ReadsTelemetry) -> Telemetry | None:
    try:
        data = read_regular_file(side_file, max_bytes=_MAX_SIDE_FILE_BYTES)
    except OSError as error:
        logger.warning("%s: cannot be read: %s", side_file, error.strerror or error)
        return None
    telemetry = read(blocks_of_srt(text_of_file(data)))
    if not telemetry.is_any:
        logger.info("%s: speaks of no places", side_file)
    return telemetry if telemetry.is_any else None


def _of_tracks(path: Path, read: ReadsTelemetry, *, stop: threading.Event) -> Telemetry | None:
    import av

    try:
        with open_container(str(path.absolute())) as container:
            pictures = picture_stream(container)
            start_s = 0.0
            if pictures is not None and pictures.start_time and pictures.time_base:
                start_s = float(pictures.start_time * pictures.time_base)
            for stream in container.streams.subtitles:
                blocks = _blocks_of_track(container, stream, stop=stop)
                telemetry = read(replace(block, time_s=block.time_s - start_s) for block in blocks)
                if telemetry.is_any:
                    return telemetry
                container.seek(0)
    except (av.error.FFmpegError, OSError) as error:
        logger.warning("%s: subtitle tracks cannot be read: %s", path, error.strerror or error)
    return None


def _blocks_of_track(
    container: InputContainer, stream: SubtitleStream, *, stop: threading.Event
) -> Iterator[TextBlock]:
    """The blocks up to where the file is damaged, with the times of the container."""
    import av
    from av.stream import Discard

    for other in container.streams:
        other.discard = Discard.default if other is stream else Discard.all
    is_mov_text = stream.codec_context is not None and stream.codec_context.name == "mov_text"
    try:
        for number, packet in enumerate(packets_of(container, stream)):
            if stop.is_set() or number >= _MAX_PACKETS:
                return
            if packet.pts is not None and packet.time_base is not None and packet.size > 2:
                yield TextBlock(
                    time_s=float(packet.pts * packet.time_base),
                    text=text_of_packet(bytes(packet), is_mov_text=is_mov_text),
                )
    except (av.error.FFmpegError, OSError) as error:
        logger.warning("a subtitle track is damaged: %s", error.strerror or error)


def _location_of(path: Path) -> tuple[float, float] | None:
    """Latitude and longitude that a container holds for the whole video (ISO 6709)."""
    import av

    try:
        with open_container(str(path.absolute())) as container:
            tags = {key.lower(): value for key, value in container.metadata.items()}
    except (av.error.FFmpegError, OSError):
        return None
    text = next((tags[key] for key in _LOCATION_KEYS if tags.get(key)), "")
    found = _ISO_6709.match(text.strip())
    if found is None:
        return None
    latitude_deg, longitude_deg = float(found[1]), float(found[2])
    is_place = abs(latitude_deg) <= 90.0 and abs(longitude_deg) <= 180.0
    return (latitude_deg, longitude_deg) if is_place and (latitude_deg or longitude_deg) else None
