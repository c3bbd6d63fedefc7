"""From what the user named as SOURCE to a frame source."""

from __future__ import annotations

import re
from pathlib import Path

from adapters.sources.files.image_folder import ImageFolder
from adapters.sources.files.photo_files import IMAGE_SUFFIXES
from adapters.sources.files.watched_folder import WatchedFolder
from adapters.sources.streams.stream_address import STREAM_SCHEMES
from engine.config import Config
from engine.errors import SourceError
from engine.ports import FrameIds, FrameSource

_KINDS = (
    "a folder of images, an image file, a video file, or synthetic:town; live: rtsp:// rtmp://"
    " http:// (MJPEG) camera:N watch:FOLDER mqtt://BROKER/TOPIC phone://HOST:PORT"
)


def open_source(spec: str, *, config: Config, next_frame_id: FrameIds) -> FrameSource:
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
    scheme, colon, name = spec.partition(":")
    if not (colon and re.fullmatch("[A-Za-z][A-Za-z0-9+.-]*", scheme)):
        raise SourceError(f"{spec}: no such file or folder")
    source = _open_scheme(scheme.lower(), name, spec, config=config, next_frame_id=next_frame_id)
    if source is None:
        # The rest of the spec stays out of the message: it may hold a password.
        raise SourceError(f"{scheme}: is no kind of source, nor is there such a file; use {_KINDS}")
    return source


def _open_scheme(
    scheme: str, name: str, spec: str, *, config: Config, next_frame_id: FrameIds
) -> FrameSource | None:
    """The source of a scheme that is known; ``name`` stands behind it."""
    if scheme in STREAM_SCHEMES:
        from adapters.sources.streams.live_stream import LiveStream

        return LiveStream(
            spec,
            sources=config.sources,
            live_sources=config.live_sources,
            next_frame_id=next_frame_id,
        )
    if scheme == "watch":
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
    if scheme == "synthetic" and re.match(r"town(\?|$)", name):
        from adapters.town.source import SyntheticTown, parse_town_spec

        return SyntheticTown(
            parse_town_spec(spec), next_frame_id=next_frame_id, config=config.sources
        )
    return None


def _open_path(path: Path, *, config: Config, next_frame_id: FrameIds) -> FrameSource:
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        return ImageFolder(
            path,
            config=config.sources,
            next_frame_id=next_frame_id,
            single_camera_per_size=config.cameras.single_camera_per_size,
        )
    from adapters.sources.files.video_file import VideoFile

    return VideoFile(path, config=config.sources, next_frame_id=next_frame_id)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error
