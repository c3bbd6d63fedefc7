"""Georeferencing afterwards: positions from files, and the finished run that they are for."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from adapters.run_files import FrameRow, read_frame_rows
from adapters.sources.files.photo_search import VIDEO_SUFFIXES
from adapters.sources.files.position_files import read_position_files
from adapters.sources.files.track_files import TRACK_SUFFIXES, read_track
from engine.config import load_config
from engine.errors import ConfigError
from engine.output.run_lock import refuse_running

if TYPE_CHECKING:
    from engine.output.georeferencing_later import LaidOut

logger = logging.getLogger(__name__)

_UNIX_TIME_S = 1e9  # times from here on are of one clock, whatever the source


def georeference(
    run: Path,
    files: Sequence[str],
    *,
    clock_offset_s: float | None = None,
    settings: Sequence[str] = (),
) -> LaidOut:
    """Lays the map of a finished run onto the positions of files.

    Those of named photos go by the names of keyframes, tracks by time: onto the frames of the one
    source that they are for.

    Args:
        run: a run folder that no run writes to.
        files: CSV or geo.txt with names, or one track: GPX, NMEA or SRT.
        clock_offset_s: what to add to the frames' times; None: it is estimated.
        settings: ``section.key=value``; they win over those of the run.

    Raises:
        ConfigError: there is no finished run, the files cannot be read, or they do not fit, in
            words.
        SnapshotError: the snapshot cannot be read or written.
    """
    from engine.output.georeferencing_later import georeference_run

    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: there is no run here")
    refuse_running(run)
    config = load_config(former=run / "config.yaml", settings=settings)
    rows = read_frame_rows(run)
    arguments = _arguments(files, clock_offset_s=clock_offset_s, settings=settings)
    tracks = [file for file in files if Path(file).suffix.lower() in TRACK_SUFFIXES]
    if tracks and len(files) > 1:
        raise ConfigError("--positions: one track, or files with names of photos")
    if tracks:
        track = read_track(Path(tracks[0]), order=config.telemetry.order)
        return georeference_run(
            run,
            times_s={row.name: row.captured_at_s for row in _rows_for(Path(tracks[0]), rows)},
            track=[(timed.time_s, timed.fix) for timed in track],
            clock_offset_s=clock_offset_s,
            config=config,
            arguments=arguments,
        )
    photos = {PurePosixPath(row.name) for row in rows}
    named = read_position_files(files).among(photos)
    if named.words:
        logger.warning("%s: %s", run, named.words)
    return georeference_run(
        run,
        times_s={row.name: row.captured_at_s for row in rows},
        fix_of=lambda name: named.by_photo.get(PurePosixPath(name)),
        config=config,
        arguments=arguments,
    )


def _arguments(
    files: Sequence[str], *, clock_offset_s: float | None, settings: Sequence[str]
) -> list[str]:
    """What the command says after the run's folder, with whole paths."""
    arguments = [part for file in files for part in ("--positions", os.path.realpath(file))]
    if clock_offset_s is not None:
        arguments += ["--clock-offset", repr(float(clock_offset_s))]
    return arguments + [part for setting in settings for part in ("--set", setting)]


def _rows_for(track: Path, rows: Sequence[FrameRow]) -> list[FrameRow]:
    """The frames that a track is for: those of one source, as every video begins at 0 s.

    Raises:
        ConfigError: they have no times, or it may be for any of several sources.
    """
    by_source: dict[str, list[FrameRow]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row)
    timed = {source: own for source, own in by_source.items() if not _are_counted(source, own)}
    if not timed:
        raise ConfigError(
            f"{track}: is a track, and the photos of this run have no times; positions for them"
            " are a CSV or a geo.txt with their names"
        )
    if len(timed) == 1:
        return next(iter(timed.values()))
    is_srt = track.suffix.lower() == ".srt"
    if not is_srt and all(
        row.captured_at_s > _UNIX_TIME_S for own in timed.values() for row in own
    ):
        return [row for own in timed.values() for row in own]
    fitting = [source for source in timed if Path(source).stem.lower() == track.stem.lower()]
    if len(fitting) != 1:
        raise ConfigError(
            f"{track}: which of the run's {len(timed)} sources is it for? A track has the name of"
            f" its video: {', '.join(Path(source).stem + track.suffix for source in timed)}"
        )
    return timed[fitting[0]]


def _are_counted(source: str, rows: Sequence[FrameRow]) -> bool:
    """Whether the times of a source's frames are their numbers, as those of photos are."""
    if Path(source).suffix.lower() in VIDEO_SUFFIXES:
        return False
    return all(row.captured_at_s == row.index for row in rows)
