"""Georeferencing afterwards: positions from files, and the finished run that they are for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from adapters.run_files import read_frame_rows
from adapters.sources.files.position_files import read_position_files
from adapters.sources.files.track_files import TRACK_SUFFIXES, read_track
from engine.config import load_config
from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.output.georeferencing_later import LaidOut


def georeference(
    run: Path, files: Sequence[str], *, clock_offset_s: float | None = None
) -> LaidOut:
    """Lays the map of a finished run onto the positions of files.

    Those of named photos go by the names of keyframes, tracks by time.

    Args:
        run: a run folder that no run writes to.
        files: CSV or geo.txt with names, or one track: GPX, NMEA or SRT.
        clock_offset_s: what to add to the frames' times; None: it is estimated.

    Raises:
        ConfigError: the files or the run cannot be read, or they do not fit, in words.
        SnapshotError: the snapshot cannot be read or written.
    """
    from engine.output.georeferencing_later import georeference_run

    config = load_config(former=run / "config.yaml")
    times_s = {row.name: row.captured_at_s for row in read_frame_rows(run)}
    tracks = [file for file in files if Path(file).suffix.lower() in TRACK_SUFFIXES]
    if tracks and len(files) > 1:
        raise ConfigError("--positions: one track, or files with names of photos")
    if tracks:
        track = read_track(Path(tracks[0]), order=config.telemetry.order)
        return georeference_run(
            run,
            times_s=times_s,
            track=[(timed.time_s, timed.fix) for timed in track],
            clock_offset_s=clock_offset_s,
            config=config,
        )
    named = read_position_files(files)
    return georeference_run(
        run,
        times_s=times_s,
        fix_of=lambda name: named.position_of(PurePosixPath(name)),
        config=config,
    )
