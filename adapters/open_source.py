"""From what the user named as SOURCE to a frame source.

What a kind of source needs is imported when one is opened: a wrong name is refused at once.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from adapters.sources.files.photo_list import PhotoList, photo_list_of
from adapters.sources.streams.stream_address import STREAM_SCHEMES
from engine.errors import ConfigError, SourceError

if TYPE_CHECKING:
    from adapters.sources.streams.push_listener import EarlyListening
    from engine.config import Config, TelemetryConfig
    from engine.ports import FrameIds, Source

logger = logging.getLogger(__name__)

_OTHER_SCHEMES = frozenset({"watch", "mqtt", "mqtts", "phone", "replay"})
_KINDS = (
    "a folder of images, image files, a video file, a ROS recording, or synthetic:town; live:"
    " rtsp:// rtmp:// http:// (MJPEG, snapshots, HLS, video) srt:// udp:// camera:N watch:FOLDER"
    " mqtt://BROKER/TOPIC phone://HOST:PORT"
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


def photos_together(specs: Sequence[str]) -> list[str]:
    """Sources in which all photos that are named one by one are one source.

    It has the place of the first of them. What cameras write beside photos goes with them, to be
    left out and counted there. One photo alone stays as it is.
    """
    from adapters.sources.files.photo_search import is_beside_photos, is_photo_name

    files = [spec for spec in specs if os.path.isfile(spec)]
    if len([file for file in files if is_photo_name(file)]) < 2:
        return list(specs)
    named = [file for file in files if is_photo_name(file) or is_beside_photos(file)]
    first = specs.index(named[0])
    others = set(specs) - set(named)
    return [
        *(spec for spec in specs[:first] if spec in others),
        _list_of(named).address,
        *(spec for spec in specs[first:] if spec in others),
    ]


def _list_of(paths: Sequence[str]) -> PhotoList:
    absolute = [os.path.abspath(path) for path in paths]
    folder = os.path.commonpath([os.path.dirname(path) for path in absolute])
    files = dict.fromkeys(PurePosixPath(os.path.relpath(path, folder)) for path in absolute)
    is_relative = not any(map(os.path.isabs, paths))
    return PhotoList(
        folder=Path(os.path.relpath(folder) if is_relative else folder),
        files=tuple(files),
        num_repeated=len(paths) - len(files),
    )


def open_source(
    spec: str,
    *,
    config: Config,
    next_frame_id: FrameIds,
    beside: Sequence[str] = (),
    early: EarlyListening | None = None,
) -> Source:
    """Opens the source that ``spec`` names.

    Args:
        spec: a path; the address of a ``PhotoList``; ``synthetic:town`` with options as in
            ``synthetic:town?seed=1``; ``watch:FOLDER``; ``camera:N``; or the address of a stream,
            broker or phone page. A path that exists wins over a scheme of the same name.
        config: the resolved configuration.
        next_frame_id: the run's counter of frame ids.
        beside: the other sources of the run, for which files of positions may be too.
        early: what listens already for sources that wait for a push.

    Raises:
        AdapterUnavailableError: an optional package is missing.
        ConfigError: the configuration does not go with this source.
        SourceError: there is no such source, or it cannot be read.
    """
    if (photos := photo_list_of(spec)) is not None:
        return _open_photos(photos, config=config, next_frame_id=next_frame_id, beside=beside)
    path = Path(spec)
    if _exists(path):
        return _open_path(path, config=config, next_frame_id=next_frame_id, beside=beside)
    scheme = _known_scheme(spec)
    return _open_scheme(scheme, spec, config=config, next_frame_id=next_frame_id, early=early)


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


def _open_scheme(
    scheme: str,
    spec: str,
    *,
    config: Config,
    next_frame_id: FrameIds,
    early: EarlyListening | None,
) -> Source:
    """The source of a scheme that is known."""
    if scheme in STREAM_SCHEMES:
        from adapters.sources.streams.live_stream import LiveStream

        return LiveStream(
            spec,
            sources=config.sources,
            live_sources=config.live_sources,
            next_frame_id=next_frame_id,
            early=early,
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


def _open_path(
    path: Path, *, config: Config, next_frame_id: FrameIds, beside: Sequence[str]
) -> Source:
    kind = _kind_of(path)
    if kind is _Kind.RECORDING:
        from adapters.sources.files.ros_bag import RosBag

        return RosBag(path, config=config.sources, next_frame_id=next_frame_id)
    if kind is _Kind.PHOTOS:
        return _open_photos(path, config=config, next_frame_id=next_frame_id, beside=beside)
    from adapters.sources.files.video_file import VideoFile

    return VideoFile(
        path,
        config=config.sources,
        next_frame_id=next_frame_id,
        telemetry=_telemetry_of(path, config.telemetry, beside=beside),
    )


def _open_photos(
    photos: Path | PhotoList, *, config: Config, next_frame_id: FrameIds, beside: Sequence[str]
) -> Source:
    from adapters.sources.files.image_folder import ImageFolder
    from adapters.sources.files.position_files import is_subtitles, read_position_files

    files = [one for one in config.telemetry.positions if not is_subtitles(one)]
    return ImageFolder(
        photos,
        config=config.sources,
        next_frame_id=next_frame_id,
        single_camera_per_size=config.cameras.single_camera_per_size,
        positions=read_position_files(files) if files else None,
        photos_beside=_photos_of(beside) if files else (),
    )


class _Kind(StrEnum):
    """What a path is opened as."""

    RECORDING = "a ROS recording"
    PHOTOS = "photos"
    VIDEO = "a video"


def _kind_of(path: Path) -> _Kind:
    from adapters.images.raw_photos import RAW_SUFFIXES
    from adapters.sources.files.photo_files import IMAGE_SUFFIXES
    from adapters.sources.files.ros_bag import is_ros_bag

    if is_ros_bag(path):
        return _Kind.RECORDING
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES | RAW_SUFFIXES:
        return _Kind.PHOTOS
    return _Kind.VIDEO


def _paths_of(kind: _Kind, specs: Sequence[str]) -> list[Path]:
    """The sources of a kind that are there."""
    paths = []
    for spec in specs:
        with suppress(SourceError):
            if _exists(Path(spec)) and _kind_of(Path(spec)) is kind:
                paths.append(Path(spec))
    return paths


def _photos_of(specs: Sequence[str]) -> Iterator[Path]:
    """The photos of those sources that are photos."""
    from adapters.sources.files.photo_search import find_images

    for photos in _photo_lists(specs):
        yield from photos.paths
    for path in _paths_of(_Kind.PHOTOS, specs):
        with suppress(SourceError):  # it is reported when the source is opened
            found = find_images(path)
            yield from (found.root / file for file in found.files)


def _photo_lists(specs: Sequence[str]) -> Iterator[PhotoList]:
    """The sources that are photos named one by one."""
    for spec in specs:
        with suppress(SourceError):  # it is reported when the source is opened
            if (photos := photo_list_of(spec)) is not None:
                yield photos


def _telemetry_of(path: Path, config: TelemetryConfig, *, beside: Sequence[str]) -> TelemetryConfig:
    """The configuration of a video with those files of positions that may be for it.

    Where the run has one video alone they all may, else those of its name; where several videos
    have that name, those in its folder.
    """
    videos = _paths_of(_Kind.VIDEO, beside)
    if not videos:
        return config
    stem = path.stem.lower()
    of_its_name = [file for file in map(Path, config.positions) if file.stem.lower() == stem]
    if any(video.stem.lower() == stem for video in videos):
        folder = path.absolute().parent
        of_its_name = [file for file in of_its_name if file.absolute().parent == folder]
    return config.model_copy(update={"positions": tuple(map(str, of_its_name))})


def report_unused_positions(specs: Sequence[str], *, config: TelemetryConfig) -> None:
    """Logs a warning for each file of positions that no source of a run takes.

    Args:
        specs: all sources of the run.
        config: the files.
    """
    from adapters.sources.files.position_files import is_subtitles

    if not config.positions:
        return
    has_photos = bool(_paths_of(_Kind.PHOTOS, specs)) or any(_photo_lists(specs))
    videos = _paths_of(_Kind.VIDEO, specs)
    for file in config.positions:
        if not is_subtitles(file):
            if not has_photos:
                logger.warning(
                    "%s: is not used: by names positions are for photos of a folder, and this run"
                    " has none; afterwards livesfm georeference RUN --positions takes it",
                    file,
                )
        elif not videos:
            logger.warning("%s: is not used: it is for a video, and this run has none", file)
        elif len(videos) > 1 and Path(file).stem.lower() not in {v.stem.lower() for v in videos}:
            logger.warning("%s: is not used: no video of this run has its name", file)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error
