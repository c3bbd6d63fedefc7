"""Georeferencing afterwards: positions and ground control from files, and the finished run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from adapters.run_files import FrameRow, read_frame_rows
from adapters.sources.files.control_point_files import read_control_points, read_scale_bar
from adapters.sources.files.photo_search import VIDEO_SUFFIXES
from adapters.sources.files.position_files import names_of_photos, read_position_files
from adapters.sources.files.track_files import TRACK_SUFFIXES, read_track
from engine.config import load_config
from engine.errors import ConfigError
from engine.output.run_lock import refuse_running
from engine.types import ControlPoint, ImageMark, ScaleBar

if TYPE_CHECKING:
    from engine.output.control_survey import Surveyed
    from engine.output.georeferencing_later import LaidOut

logger = logging.getLogger(__name__)

_NUM_VALUES = {  # of the options in what a run keeps of the command
    "--positions": 1,
    "--clock-offset": 1,
    "--gcp": 1,
    "--check": 1,
    "--scale-bar": 3,
    "--set": 1,
}
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

    _refuse_other_than_finished(run)
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
    read = read_position_files(files)
    named = read.among(photos)
    for words in filter(None, (read.words, named.words)):
        logger.warning("%s: %s", run, words)
    return georeference_run(
        run,
        times_s={row.name: row.captured_at_s for row in rows},
        fix_of=lambda name: named.by_photo.get(PurePosixPath(name)),
        config=config,
        arguments=arguments,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """Ground control as the command line names it."""

    file: Path | None = None  # ODM's gcp_list.txt
    checks: tuple[str, ...] = ()  # names of points that are compared only
    bar: tuple[str, str, float] | None = None  # two points or their marks, and metres

    def read(self) -> tuple[tuple[ControlPoint, ...], tuple[ScaleBar, ...]]:
        """The points of the file and of the scale bar's ends, and the bar.

        Raises:
            ConfigError: they cannot be read, in words.
            AdapterUnavailableError: the file's coordinate system needs a package.
        """
        if self.file is None and self.checks:
            raise ConfigError("--check: names points of the file of --gcp")
        points = read_control_points(self.file, checks=self.checks) if self.file else ()
        if self.bar is None:
            return points, ()
        bar, ends = read_scale_bar(self.bar[:2], self.bar[2], points=points)
        return (*points, *ends), (bar,)

    @property
    def arguments(self) -> list[str]:
        """What the command says, with whole paths."""
        arguments = ["--gcp", os.path.realpath(self.file)] if self.file is not None else []
        arguments += [part for name in self.checks for part in ("--check", name)]
        if self.bar is not None:
            arguments += ["--scale-bar", *self.bar[:2], repr(self.bar[2])]
        return arguments


def survey(run: Path, control: Control, *, settings: Sequence[str] = ()) -> Surveyed:
    """Lays the map of a finished run onto ground control points, or scales it by a scale bar.

    Args:
        run: a run folder that no run writes to.
        control: the points; their images are those of keyframes by the ends of their names.
        settings: ``section.key=value``; they win over those of the run.

    Raises:
        ConfigError: there is no finished run, the files cannot be read, or the points do not fit,
            in words.
        AdapterUnavailableError: the file's coordinate system needs a package.
        SnapshotError: the snapshot cannot be read or written.
    """
    from engine.output.control_survey import survey_run

    points, bars = control.read()
    _refuse_other_than_finished(run)
    config = load_config(former=run / "config.yaml", settings=settings)
    frames = [row.name for row in read_frame_rows(run) if not row.is_dropped]
    return survey_run(
        run,
        _with_frames(points, frames),
        bars=bars,
        config=config,
        arguments=control.arguments + _setting_arguments(settings),
    )


def lay_again(run: Path) -> Sequence[str]:
    """Lays the map of a run that went on onto what it was laid onto after a former end.

    Returns:
        Lines for people.

    Raises:
        ConfigError: it was not laid, the files cannot be read any more, or they do not fit.
        AdapterUnavailableError: a file's coordinate system needs a package.
        SnapshotError: the snapshot cannot be read or written.
    """
    from engine.output.laid_onto import LAID_ONTO, arguments_to_lay_again

    arguments = arguments_to_lay_again(run)
    if arguments is None:
        raise ConfigError(f"{run}: was not laid onto anything after its end")
    try:
        given = _values(arguments)
        offsets_s = [float(one) for (one,) in given.get("--clock-offset", ())]
        bars = [(a, b, float(metres)) for a, b, metres in given.get("--scale-bar", ())]
    except ValueError as error:
        raise ConfigError(f"{run / LAID_ONTO}: is damaged") from error
    files, checks, settings, gcps = (
        [one for (one,) in given.get(name, ())]
        for name in ("--positions", "--check", "--set", "--gcp")
    )
    if files:
        offset_s = offsets_s[-1] if offsets_s else None
        return (georeference(run, files, clock_offset_s=offset_s, settings=settings).words,)
    control = Control(
        file=Path(gcps[-1]) if gcps else None,
        checks=tuple(checks),
        bar=bars[-1] if bars else None,
    )
    return survey(run, control, settings=settings).lines


def _values(arguments: Sequence[str]) -> dict[str, list[list[str]]]:
    """What stands behind each option, every time that it is there.

    Raises:
        ValueError: one is not known, or its values are missing.
    """
    given: dict[str, list[list[str]]] = {}
    rest = list(arguments)
    while rest:
        name = rest.pop(0)
        num = _NUM_VALUES.get(name, 0)
        if not 0 < num <= len(rest):
            raise ValueError(name)
        given.setdefault(name, []).append(rest[:num])
        del rest[:num]
    return given


def _with_frames(points: Sequence[ControlPoint], frames: Iterable[str]) -> list[ControlPoint]:
    """Points whose marks name images as the run does; those of no frame stay as they are.

    Raises:
        ConfigError: a name is that of several frames, or none is that of one.
    """
    images = sorted({mark.image_name for point in points for mark in point.marks})
    photos = [PurePosixPath(frame) for frame in frames]
    frame_of = _frames_by_name({_as_compared(image): image for image in images}, photos)
    if images and photos and not frame_of:
        raise ConfigError(
            f"none of the {len(images)} images that are marked is one of the run: marks name"
            f" {images[0]}, the run has {photos[0]}"
        )

    def named(mark: ImageMark) -> ImageMark:
        return replace(
            mark, image_name=str(frame_of.get(_as_compared(mark.image_name), mark.image_name))
        )

    return [replace(point, marks=tuple(named(one) for one in point.marks)) for point in points]


def _as_compared(image_name: str) -> str:
    return str(PurePosixPath(image_name.replace("\\", "/").lower()))


def _frames_by_name(
    names: Mapping[str, str], photos: Sequence[PurePosixPath]
) -> dict[str, PurePosixPath]:
    """The frame of each name that has one.

    A name is the end of a frame's path, with folders as the run has them. Where no name with
    folders is, they may be of another computer: then the end of a name is a frame's whole path, or,
    if that is so for none, as many of its last parts as can be.

    Args:
        names: as marks have them, by what they are in lower case and with slashes.
        photos: the frames' paths.

    Raises:
        ConfigError: a name is that of several frames, or several are that of one.
    """
    direct = _one_each(names, names_of_photos(photos, names).items())
    if any("/" in name for name in direct):
        return direct
    ends = _ends_with_names(set(names) - set(direct))
    by_end = names_of_photos(photos, ends)
    whole = {photo: end for photo, end in by_end.items() if _num_parts(end) == len(photo.parts)}
    longest: dict[str, int] = {}
    for end in (whole or by_end).values():
        for name in ends[end]:
            longest[name] = max(longest.get(name, 0), _num_parts(end))
    found = [
        (photo, name)
        for photo, end in (whole or by_end).items()
        for name in ends[end]
        if longest[name] == _num_parts(end)
    ]
    return _one_each(names, [*((photo, name) for name, photo in direct.items()), *found])


def _ends_with_names(names: Iterable[str]) -> dict[str, list[str]]:
    """What names with folders are without the first of these; the names, by each."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        parts = PurePosixPath(name).parts
        for first in range(1, len(parts)):
            found.setdefault(str(PurePosixPath(*parts[first:])), []).append(name)
    return found


def _num_parts(path: str) -> int:
    return len(PurePosixPath(path).parts)


def _one_each(
    names: Mapping[str, str], found: Iterable[tuple[PurePosixPath, str]]
) -> dict[str, PurePosixPath]:
    """The one frame of each name.

    Raises:
        ConfigError: a name has several frames, or a frame several names.
    """
    frame_of: dict[str, PurePosixPath] = {}
    name_of: dict[PurePosixPath, str] = {}
    for photo, name in found:
        if name in frame_of:
            raise ConfigError(
                f"{names[name]} is the name of several images of the run, {frame_of[name]} and"
                f" {photo}: marks are to name their folders as the run does"
            )
        if photo in name_of:
            raise ConfigError(
                f"{names[name_of[photo]]} and {names[name]} may both be {photo} of the run: marks"
                " are to name their folders as the run does"
            )
        frame_of[name], name_of[photo] = photo, name
    return frame_of


def _refuse_other_than_finished(run: Path) -> None:
    if not run.is_dir():
        raise ConfigError(f"{run}: no such run folder")
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: there is no run here")
    refuse_running(run)


def _arguments(
    files: Sequence[str], *, clock_offset_s: float | None, settings: Sequence[str]
) -> list[str]:
    """What the command says after the run's folder, with whole paths."""
    arguments = [part for file in files for part in ("--positions", os.path.realpath(file))]
    if clock_offset_s is not None:
        arguments += ["--clock-offset", repr(float(clock_offset_s))]
    return arguments + _setting_arguments(settings)


def _setting_arguments(settings: Sequence[str]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


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
