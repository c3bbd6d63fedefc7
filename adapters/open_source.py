"""From what the user named as SOURCE to a frame source.

What a kind of source needs is imported when one is opened: a wrong name is refused at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.sources.streams.stream_address import STREAM_SCHEMES
from engine.errors import ConfigError, SourceError

if TYPE_CHECKING:
    from engine.config import Config
    from engine.ports import FrameIds, Source

_OTHER_SCHEMES = frozenset({"watch", "mqtt", "mqtts", "phone", "replay"})
_KINDS = (
    "a folder of images, an image file, a video file, a ROS recording, or synthetic:town; live:"
    " rtsp:// rtmp:// http:// (MJPEG) camera:N watch:FOLDER mqtt://BROKER/TOPIC phone://HOST:PORT"
)


def refuse_unknown_sources(specs: Sequence[str]) -> None:
    """Refuses a request in which nothing names a source: no path that exists, no known scheme.

    Raises:
        ConfigError: with what is wrong with the first of them.
    """
    unknown: list[SourceError] = []
    for spec in specs:
        try:
            if _exists(Path(spec)) or _known_scheme(spec):
                return
        except SourceError as error:
            unknown.append(error)
    if unknown:
        raise ConfigError(str(unknown[0])) from unknown[0]


def open_source(spec: str, *, config: Config, next_frame_id: FrameIds) -> Source:
    """Opens the source that ``spec`` names.

    Args:
        spec: a path; ``synthetic:town`` with options as in ``synthetic:town?seed=1``;
            ``watch:FOLDER``; ``camera:N``; or the address of a stream, broker or phone page. A path
            that exists wins over a scheme of the same name.
        config: the resolved configuration.
        next_frame_id: the run's counter of frame ids.

    Raises:
        AdapterUnavailableError: an optional package is missing.
        ConfigError: the configuration does not go with this source.
        SourceError: there is no such source, or it cannot be read.
    """
    path = Path(spec)
    if _exists(path):
        return _open_path(path, config=config, next_frame_id=next_frame_id)
    scheme = _known_scheme(spec)
    return _open_scheme(scheme, spec, config=config, next_frame_id=next_frame_id)


def _known_scheme(spec: str) -> str:
    """The scheme of a source that is no path, in lower case.

    Raises:
        SourceError: it has none, or one of no kind of source.
    """
    scheme, colon, name = spec.partition(":")
    if not (colon and re.fullmatch("[A-Za-z][A-Za-z0-9+.-]*", scheme)):
        raise SourceError(f"{spec}: no such file or folder")
    known = scheme.lower()
    is_town = known == "synthetic" and re.match(r"town(\?|$)", name)
    if not (is_town or known in STREAM_SCHEMES or known in _OTHER_SCHEMES):
        # The rest of the spec stays out of the message: it may hold a password.
        raise SourceError(f"{scheme}: is no kind of source, nor is there such a file; use {_KINDS}")
    return known


def _open_scheme(scheme: str, spec: str, *, config: Config, next_frame_id: FrameIds) -> Source:
    """The source of a scheme that is known."""
    if scheme in STREAM_SCHEMES:
        from adapters.sources.streams.live_stream import LiveStream

        return LiveStream(
            spec,
            sources=config.sources,
            live_sources=config.live_sources,
            next_frame_id=next_frame_id,
        )
    if scheme == "replay":
        raise ConfigError("replay: repeats one run, so it is the only source of its run")
    if scheme == "watch":
        from adapters.sources.files.watched_folder import WatchedFolder

        _, _, name = spec.partition(":")
        if not name:
            raise SourceError("watch: which folder? watch:FOLDER")
        return WatchedFolder(
            Path(name),
            sources=config.sources,
            live_sources=config.live_sources,
            next_frame_id=next_frame_id,
            single_camera_per_size=config.cameras.single_camera_per_size,
        )
    if scheme in {"mqtt", "mqtts"}:
        from adapters.mqtt.source import open_mqtt_source

        return open_mqtt_source(spec, config=config, next_frame_id=next_frame_id)
    if scheme == "phone":
        from adapters.phone.source import open_phone_source

        return open_phone_source(spec, config=config, next_frame_id=next_frame_id)
    from adapters.town.source import SyntheticTown, parse_town_spec

    return SyntheticTown(parse_town_spec(spec), next_frame_id=next_frame_id, config=config.sources)


def _open_path(path: Path, *, config: Config, next_frame_id: FrameIds) -> Source:
    from adapters.images.raw_photos import RAW_SUFFIXES
    from adapters.sources.files.photo_files import IMAGE_SUFFIXES
    from adapters.sources.files.ros_bag import RosBag, is_ros_bag

    if is_ros_bag(path):
        return RosBag(path, config=config.sources, next_frame_id=next_frame_id)
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES | RAW_SUFFIXES:
        from adapters.sources.files.image_folder import ImageFolder
        from adapters.sources.files.position_files import is_subtitles, read_position_files

        files = [one for one in config.telemetry.positions if not is_subtitles(one)]
        return ImageFolder(
            path,
            config=config.sources,
            next_frame_id=next_frame_id,
            single_camera_per_size=config.cameras.single_camera_per_size,
            positions=read_position_files(files) if files else None,
        )
    from adapters.sources.files.video_file import VideoFile

    return VideoFile(
        path,
        config=config.sources,
        next_frame_id=next_frame_id,
        telemetry=config.telemetry,
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error
