"""The command line, and what its commands print.

Exit codes; of a run they say what is on disk:

    0    something useful was made and saved whole, and nothing says that it is wrong
    1    nothing was made, or something of it is not saved or not in the folder asked for, or the
         run broke off, as on a disk that is nearly full; the last line says which
    2    the request is refused, and nothing was changed
    3    a map was made and saved whole, and its verdict is not good, or it could not be laid onto
         the ground control that was given, or onto what it was laid onto before it went on
    130  a third signal ended the run; what was on disk by then is there

A run that is killed has the code of its signal (137 for SIGKILL). Its folder keeps ``.lock``, which
no process holds any more.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.core

from adapters.exhaustion import exhaustion_in_words
from adapters.native_log import native_log_captured
from adapters.open_source import photos_together, refuse_unknown_sources
from adapters.screen import has_screen
from adapters.sources.files.photo_list import photo_list_of
from adapters.views.view_mode import ViewMode
from engine.errors import (
    AdapterUnavailableError,
    ConfigError,
    EngineError,
    SourceError,
)

if TYPE_CHECKING:
    from rich.table import Table

    from adapters.doctor import Weights
    from adapters.evaluate import Evaluation
    from adapters.georeference import Control
    from adapters.launch import LaunchOptions
    from engine.config import Config
    from engine.run.engine import RunOutcome

NOTHING_MADE = 1
REFUSED = 2
INTERRUPTED = 130  # before anything was written
DOUBTED = 3  # a map was made and saved, and its verdict is not good

_WHY_NO_MAP = ": images must overlap, show texture, and be taken from different places"
_TURNS = (
    ": the camera turns without moving, and turns show no depth; film again while walking around"
    " or past what is to be seen"
)
_DEMO_SOURCE = "synthetic:town"
_MAX_NAME_CHARS = 100  # of a run folder that is named here; file systems take about 255 bytes
_MAX_SUMMARY_BYTES = 2**26
_MADE_BY_RESUME = ("budget", "end_of_run")  # reasons of a keyframe without depth


class _OneScaleBar(typer.core.TyperCommand):
    """A command that refuses a second ``--scale-bar``, whose values would replace the first's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Splits arguments as typer does.

        Raises:
            UsageError: the option is given twice.
        """
        if sum(arg.partition("=")[0] == "--scale-bar" for arg in args) > 1:
            ctx.fail("--scale-bar: only one can be given.")
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="livesfm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[
    list[str] | None,
    typer.Option(
        "--config", "-c", help="Preset such as phone or drone, or a YAML file; later ones win."
    ),
]
SettingOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting, section.key=value; wins over files."),
]
MaskOption = Annotated[
    list[str] | None,
    typer.Option(
        "--mask",
        metavar="[PATTERN=]FILE",
        help="Mask of a whole camera, by a pattern of its key; black is left out. Of single "
        "photos: a folder masks beside images.",
    ),
]
CalibrationOption = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        metavar="[PATTERN=]FILE[#ID]",
        help="COLMAP cameras.txt, OpenCV, ROS or Kalibr YAML; for cameras that match PATTERN.",
    ),
]
PositionsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--positions",
        metavar="FILE",
        help="Positions of photos by their names, CSV or geo.txt; of a video, .SRT.",
    ),
]
GcpOption = Annotated[
    Path | None,
    typer.Option(
        "--gcp",
        metavar="FILE",
        help="Ground control points marked in images (gcp_list.txt); the map is laid onto them.",
    ),
]
CheckOption = Annotated[
    list[str] | None,
    typer.Option(
        "--check", metavar="NAME", help="Point of --gcp that is compared only, as CHK... are."
    ),
]
ScaleBarOption = Annotated[
    tuple[str, str, float] | None,
    typer.Option(
        "--scale-bar",
        metavar="A B METRES",
        help="Distance of two points of --gcp, or of their marks in two or more images.",
    ),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="Run folder; default runs/NAME of the source.")
]
ViewOption = Annotated[
    ViewMode,
    typer.Option(
        "--view", metavar="VIEW", help="record a file, spawn the viewer, serve browsers, or none."
    ),
]
# Two flags, for a pair of them takes a column of the help for itself.
StaysOption = Annotated[
    bool,
    typer.Option(
        "--view-stays", help="The page of --view serve stays after the run; else while watched."
    ),
]
EndsOption = Annotated[bool, typer.Option("--no-view-stays", help="It ends with the run.")]
StrictOption = Annotated[
    bool,
    typer.Option("--strict", help="The first part that breaks ends the run."),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace a former run in the folder.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on the terminal.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Figures as JSON instead of a table.")]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from adapters.install_advice import installed_version

        typer.echo(f"livesfm {installed_version()}")
        raise typer.Exit


@app.callback()
def livesfm(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Live cameras, videos and photos into a growing, bundle-adjusted COLMAP model."""


@app.command(cls=_OneScaleBar)
def run(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Image folder, video, ROS bag or synthetic:town; live: rtsp://, rtmp://, srt://, "
            "udp://, http(s):// (MJPEG, snapshots, HLS, video), camera:0, watch:FOLDER, "
            "mqtt(s)://, phone://; several mix.",
        ),
    ],
    config: ConfigOption = None,
    settings: SettingOption = None,
    mask: MaskOption = None,
    calibration: CalibrationOption = None,
    positions: PositionsOption = None,
    gcp: GcpOption = None,
    check: CheckOption = None,
    scale_bar: ScaleBarOption = None,
    out: OutOption = None,
    view: ViewOption = ViewMode.RECORD,
    view_stays: StaysOption = False,
    view_ends: EndsOption = False,
    overwrite: OverwriteOption = False,
    onto: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Begin with the map and the settings of another run, which stays as it is.",
        ),
    ] = None,
    record_input: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep what arrives and when the run acted on it; replay:DIR repeats the run.",
        ),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Write where the CPU time goes, by thread and function."),
    ] = False,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Reconstructs SOURCE while its frames arrive; writes a run folder."""
    from adapters.sources.streams.push_listener import listening_early

    with _errors_reported(), listening_early(source) as early:
        refuse_unknown_sources(source)
        source = photos_together(source)
        control = _control(gcp, check, scale_bar)
        if control is not None:
            control.read()  # before the run, to see that it can be read
        options = _options(
            source,
            out=out or _default_out(source[0]),
            view=view,
            overwrite=overwrite,
            quiet=quiet,
            view_stays=_stays(view_stays, view_ends),
        )
        options = replace(
            options,
            record_input=record_input,
            profile=profile,
            early=early or None,
            lays_onto=() if control is None else tuple(control.arguments),
        )
        config = [*_recorded_overlays(source), *(config or [])]
        if record_input is not None and onto is not None:
            raise ConfigError("--record-input: keeps whole runs only, not those begun with --onto")
        all_settings = [*(settings or []), *_mask_settings(mask), *_strict_settings(strict)]
        if onto is None:
            loaded = _load(config, all_settings)
        else:
            options, loaded = _begun_from(onto, options, overlays=config, settings=all_settings)
        loaded = _with_positions(_with_calibrations(loaded, calibration or []), positions or [])
        outcome = _launch(loaded, options)
    if profile:
        _say(
            f"where each thread's CPU time went: python -m pstats {outcome.path}/profile/NAME.prof"
        )
    _discard_if_empty(outcome)
    _finish(outcome, options, control=control)


@app.command()
def resume(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    source: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SOURCE]",
            help="What to add; without any, the run's own sources go on where they stopped.",
        ),
    ] = None,
    config: ConfigOption = None,
    settings: SettingOption = None,
    mask: MaskOption = None,
    calibration: CalibrationOption = None,
    view: ViewOption = ViewMode.RECORD,
    view_stays: StaysOption = False,
    view_ends: EndsOption = False,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Goes on with a run that was killed, stopped or finished, in its folder."""
    with _errors_reported():
        from adapters.resume import go_on, refuse_replays

        if source:
            refuse_unknown_sources(source)
            source = photos_together(source)
            refuse_replays(source)
        _limit_library_threads()
        all_settings = [*(settings or []), *_mask_settings(mask), *_strict_settings(strict)]
        going_on = go_on(run_folder, overlays=config or [], settings=all_settings)
        options = _options(
            source or [],
            out=run_folder,
            view=view,
            overwrite=False,
            quiet=quiet,
            view_stays=_stays(view_stays, view_ends),
        )
        options = replace(options, going_on=going_on)
        outcome = _launch(_with_calibrations(going_on.config, calibration or []), options)
    _finish(outcome, options)


@app.command()
def demo(
    config: ConfigOption = None,
    settings: SettingOption = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder.")] = Path("runs/demo"),
    view: ViewOption = ViewMode.RECORD,
    view_stays: StaysOption = False,
    view_ends: EndsOption = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a former run in the folder.")] = True,
    quiet: QuietOption = False,
) -> None:
    """Streams a synthetic drone flight, reconstructs it and prints the accuracy."""
    with _errors_reported():
        options = _options(
            [_DEMO_SOURCE],
            out=out,
            view=view,
            overwrite=overwrite,
            quiet=quiet,
            view_stays=_stays(view_stays, view_ends),
        )
        outcome = _launch(_load(config, settings), options)
        if outcome.num_registered:
            _print_evaluation(outcome.path, outcome.path / "groundtruth.txt")
    _finish(outcome, options)


@app.command()
def evaluate(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    reference: Annotated[
        Path | None,
        typer.Option(help="TUM trajectory; default groundtruth.txt of the run."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compares a run's poses, final and as first reported, with a reference."""
    with _errors_reported():
        from engine.output.run_format import check_readable

        check_readable(run_folder)
        evaluation = _print_evaluation(
            run_folder, reference or run_folder / "groundtruth.txt", as_json=as_json
        )
    _say_if_unfinished(run_folder)
    if not evaluation.has_map:
        typer.echo(f"livesfm: {run_folder}: has no map, so there is nothing to compare", err=True)
        raise typer.Exit(NOTHING_MADE)


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    to: Annotated[Path, typer.Option(help="Folder to make.")],
    undistort: Annotated[
        bool, typer.Option("--undistort", help="PINHOLE images and model for splat trainers.")
    ] = False,
    ply: Annotated[bool, typer.Option("--ply", help="points.ply")] = False,
    nerfstudio: Annotated[bool, typer.Option("--nerfstudio", help="transforms.json")] = False,
    tum: Annotated[bool, typer.Option("--tum", help="Trajectories in TUM format.")] = False,
    dense: Annotated[
        bool, typer.Option("--dense", help="dense.ply; with --undistort, what trainers begin with.")
    ] = False,
    las: Annotated[bool, typer.Option("--las", help="Points, dense ones too, in a CRS.")] = False,
    laz: Annotated[bool, typer.Option("--laz", help="The same, compressed.")] = False,
    geojson: Annotated[
        bool, typer.Option("--geojson", help="Cameras, their footprints and way, for GIS.")
    ] = False,
    kml: Annotated[bool, typer.Option("--kml", help="The same, for globes.")] = False,
    odm: Annotated[bool, typer.Option("--odm", help="Project of OpenDroneMap.")] = False,
    bundler: Annotated[bool, typer.Option("--bundler", help="bundle.out, list.txt")] = False,
    metashape: Annotated[
        bool, typer.Option("--metashape", help="Positions and angles of cameras, calibrations.")
    ] = False,
    crs: Annotated[
        str | None,
        typer.Option(metavar="CRS", help="EPSG:32615 and the like: of points and --metashape."),
    ] = None,
    frames: Annotated[
        str,
        typer.Option(
            metavar="WHICH", help="Images: keyframes, all (with a good pose), or sharpest:N."
        ),
    ] = "keyframes",
    source: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="For --frames: the run's source where it lies now, or a --record-input folder.",
        ),
    ] = None,
    z_up: Annotated[
        bool, typer.Option("--z-up", help="The map turned so that +z is up, if that is known.")
    ] = False,
    without_doubted: Annotated[
        bool,
        typer.Option(
            "--without-doubted", help="Without keyframes whose places the verdict doubts."
        ),
    ] = False,
    map_number: Annotated[
        int, typer.Option("--map", metavar="N", min=0, help="Which map: N of sparse/N.")
    ] = 0,
) -> None:
    """Writes a map of the newest snapshot in the formats of other tools."""
    with _errors_reported():
        from adapters.exports.export import ExportFormat
        from adapters.exports.export import export as export_run
        from adapters.exports.job import ExportCancelledError
        from adapters.exports.terminal import cancelled_by_signals, progress_shown
        from engine.output.run_format import check_readable

        check_readable(run_folder)
        asked = {
            ExportFormat.UNDISTORT: undistort,
            ExportFormat.PLY: ply,
            ExportFormat.NERFSTUDIO: nerfstudio,
            ExportFormat.TUM: tum,
            ExportFormat.DENSE: dense,
            ExportFormat.LAS: las,
            ExportFormat.LAZ: laz,
            ExportFormat.GEOJSON: geojson,
            ExportFormat.KML: kml,
            ExportFormat.ODM: odm,
            ExportFormat.BUNDLER: bundler,
            ExportFormat.METASHAPE: metashape,
        }
        formats = {kind for kind, is_asked in asked.items() if is_asked}
        if not formats:
            options = ", ".join(f"--{kind}" for kind in ExportFormat)
            raise ConfigError(
                f"say what to export: {options}; for trainers of splats: --undistort --nerfstudio"
            )
        try:
            with (
                native_log_captured(),
                cancelled_by_signals() as is_cancelled,
                progress_shown() as progress,
            ):
                written = export_run(
                    run_folder,
                    to,
                    formats=formats,
                    map_number=map_number,
                    crs=crs,
                    frames=frames,
                    source=source,
                    is_z_up=z_up,
                    is_without_doubted=without_doubted,
                    progress=progress,
                    is_cancelled=is_cancelled,
                )
        except ExportCancelledError as cancelled:
            typer.echo(f"livesfm: {cancelled}", err=True)
            raise typer.Exit(INTERRUPTED) from cancelled
    num_dense = written.num_dense_points
    dense_words = "" if num_dense is None else f", {num_dense} dense points"
    typer.echo(
        f"{written.path}: {written.num_images} images, {written.num_points3D} points{dense_words}"
    )
    if map_number == 0 and not without_doubted:
        _say_if_doubted(run_folder)
    if num_dense is not None:
        _say_if_depth_is_left_out(run_folder)
    for note in written.notes:
        typer.echo(note)
    for number, num_keyframes in sorted(written.left_out.items()):
        typer.echo(f"not in it: sparse/{number} with {num_keyframes} keyframes (--map {number})")
    _say_if_unfinished(run_folder)


@app.command(cls=_OneScaleBar)
def georeference(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    positions: Annotated[
        list[str] | None,
        typer.Option(
            "--positions",
            metavar="FILE",
            help="A track (.srt, .gpx, .nmea), or a CSV or geo.txt by the keyframes' names.",
        ),
    ] = None,
    gcp: GcpOption = None,
    check: CheckOption = None,
    scale_bar: ScaleBarOption = None,
    clock_offset_s: Annotated[
        float | None,
        typer.Option(
            "--clock-offset",
            metavar="S",
            help="Seconds to add to the frames' times; default: found by the path's shape.",
        ),
    ] = None,
    settings: SettingOption = None,
) -> None:
    """Lays a finished run onto positions, or ground control, that came later."""
    with _errors_reported():
        from adapters.georeference import georeference as georeference_run
        from adapters.georeference import survey
        from engine.output.run_format import check_readable

        control = _control(gcp, check, scale_bar)
        if bool(positions) == (control is not None):
            raise ConfigError("either --positions, or --gcp or --scale-bar")
        if control is not None and clock_offset_s is not None:
            raise ConfigError("--clock-offset: goes with --positions; marks name their images")
        check_readable(run_folder)
        with native_log_captured():
            if control is None:
                laid_out = georeference_run(
                    run_folder,
                    positions or [],
                    clock_offset_s=clock_offset_s,
                    settings=settings or [],
                )
                lines: Sequence[str] = (laid_out.words,)
                doubts = laid_out.doubts
            else:
                surveyed = survey(run_folder, control, settings=settings or [])
                lines, doubts = (*surveyed.lines, *surveyed.remarks), surveyed.doubts
            _renew_report(run_folder)
    for line in lines:
        typer.echo(line)
    if doubts:
        _say_if_doubted(run_folder)
        raise typer.Exit(DOUBTED)


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    is_opened: Annotated[bool, typer.Option("--open", help="Show it in a browser.")] = False,
) -> None:
    """Writes report.html: how good the map of a run is, and where it is not."""
    with _errors_reported():
        from adapters.launch import write_report

        _limit_library_threads()
        with native_log_captured():
            path = write_report(run_folder)
    typer.echo(str(path))
    if is_opened:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
    _say_if_unfinished(run_folder)


@app.command()
def benchmark(
    dataset: Annotated[
        list[str],
        typer.Argument(
            metavar="DATASET",
            help="Folder of images, or video; beside it groundtruth.txt (TUM), gps.csv or a COLMAP "
            "model to compare with.",
        ),
    ],
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config",
            "-c",
            metavar="[DATASET=]CONFIG",
            help="Preset or YAML file; each is a pipeline of its own.",
        ),
    ] = None,
    settings: SettingOption = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(
            "--peers",
            metavar="[DATASET=]PEER",
            help="colmap-PAIRS-MAPPER[-FEATURES], or none. PAIRS: sequential or exhaustive; "
            "MAPPER: incremental or global; FEATURES: a number or ours. Default: both mappers, "
            "with COLMAP's features and with ours.",
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="PROGRAM", help="livesfm of another version, to run beside."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Only pipelines of such names, as livesfm-*."),
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[DATASET=]PATH", help="Poses to compare with; default: what lies beside."
        ),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each pipeline, by turns.")] = 3,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Processors that each pipeline gets; default all."),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            min=1, help="Peers get every so many frames of a video; default about 3 a second."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the report, new or empty.")
    ] = Path("runs/benchmark"),
    overwrite: OverwriteOption = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep run folders and models.")] = False,
    limit_s: Annotated[
        float, typer.Option("--limit", help="Seconds after which a run is killed.")
    ] = 7200.0,
) -> None:
    """Measures LiveSfM beside COLMAP's own pipelines on the same frames."""
    with _errors_reported():
        from adapters.benchmark.benchmark import plan_of, run_benchmark

        plan = plan_of(
            [Path(each) for each in dataset],
            configs=config or [],
            settings=settings or [],
            peers=peers or [],
            baseline=baseline,
            only=only or [],
            references=reference or [],
            num_runs=runs,
            num_threads=threads,
            peer_step=every,
            out=out,
            overwrite=overwrite,
            keep=keep,
            limit_s=limit_s,
        )
        former = signal.signal(signal.SIGTERM, signal.default_int_handler)
        logging.getLogger("adapters.benchmark").setLevel(logging.INFO)  # which run goes on
        try:
            report = run_benchmark(plan)
        except KeyboardInterrupt as interrupt:
            typer.echo(f"livesfm: stopped; what was measured is in {out}", err=True)
            raise typer.Exit(INTERRUPTED) from interrupt
        finally:
            signal.signal(signal.SIGTERM, former)
    typer.echo(str(report))


@app.command()
def batch(
    dataset: Annotated[
        list[str], typer.Argument(metavar="DIR", help="Folder of images, or video; a run each.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs.")] = Path("runs"),
    positions: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Take the file NAME of each DIR for its positions."),
    ] = None,
    gcp: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Likewise, for its ground control: gcp_list.txt."),
    ] = None,
    config: ConfigOption = None,
    settings: SettingOption = None,
) -> None:
    """Makes a run of each DIR, by tasks of a Ray cluster with --set remote.address; resumable."""
    from rich.table import Table

    from adapters.batch import COLUMNS, plan_batch, run_batch

    with _errors_reported():
        address = _load(config, settings).remote.address
        names = (os.path.abspath(one) if os.path.isfile(one) else one for one in config or [])
        given = [f"--config={one}" for one in names]
        given += [f"--set={one}" for one in [*(settings or []), 'remote.address=""']]
        files = {"--positions": positions, "--gcp": gcp}
        runs = plan_batch(
            dataset,
            out=out,
            arguments=given,
            files={option: name for option, name in files.items() if name is not None},
        )
        results = []
        former = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            for result in run_batch(runs, address=address):
                _say("  ".join(result.row))
                results.append(result)
        except KeyboardInterrupt as interrupt:
            typer.echo("livesfm: stopped; the same command goes on with what is left", err=True)
            raise typer.Exit(INTERRUPTED) from interrupt
        finally:
            signal.signal(signal.SIGTERM, former)
        table = Table(*COLUMNS, title=str(out))
        for result in sorted(results, key=lambda one: one.name):
            table.add_row(*result.row)
        _print_table(table)
    if not all(one.has_map and one.exit_code in (None, 0, DOUBTED) for one in results):
        raise typer.Exit(NOTHING_MADE)
    if not all(one.is_good for one in results):
        raise typer.Exit(DOUBTED)


@app.command()
def doctor(config: ConfigOption = None, settings: SettingOption = None) -> None:
    """Shows what is installed and what can run here, and how to get weights."""
    from adapters.doctor import examine, findings_table, is_core_ready

    with _errors_reported():
        weights = _mast3r_weights(_load(config, settings))
    findings = examine([weights])
    _print_table(findings_table(findings))
    typer.echo(weights.note())
    if not is_core_ready(findings):
        raise typer.Exit(NOTHING_MADE)


def main() -> None:
    """Entry point of the console script."""
    logging.basicConfig(level=logging.WARNING, format="livesfm: %(message)s")
    app()


def _mast3r_weights(config: Config) -> Weights:
    from adapters.doctor import Weights
    from adapters.matchers.mast3r.weights import WEIGHTS_LICENCE, download_command

    checkpoint = config.mast3r.checkpoint
    return Weights(
        matcher="mast3r",
        setting="mast3r.checkpoint",
        path=Path(checkpoint).expanduser() if checkpoint else None,
        licence=WEIGHTS_LICENCE,
        how_to_get=download_command(),
    )


def _load(config: list[str] | None, settings: list[str] | None) -> Config:
    from engine.config import load_config

    return load_config(config or [], settings or [])


def _mask_settings(masks: list[str] | None) -> list[str]:
    """What ``--mask`` says, as a setting."""
    if not masks:
        return []
    files = dict(_pattern_and_file(mask) for mask in masks)
    return [f"cameras.masks={json.dumps(files, ensure_ascii=False)}"]


def _strict_settings(is_strict: bool) -> list[str]:
    return ["faults.strict=true"] if is_strict else []


def _pattern_and_file(mask: str) -> tuple[str, str]:
    pattern, equals, file = mask.partition("=")
    return (pattern, file) if equals and not os.path.exists(mask) else ("*", mask)


def _with_calibrations(config: Config, specs: list[str]) -> Config:
    """The configuration with more calibration files, which win over those it has."""
    calibrations = (*config.cameras.calibrations, *specs)
    cameras = config.cameras.model_copy(update={"calibrations": calibrations})
    return config.model_copy(update={"cameras": cameras})


def _with_positions(config: Config, files: list[str]) -> Config:
    """The configuration with more files of positions, which win over those it has."""
    positions = (*config.telemetry.positions, *(os.path.abspath(file) for file in files))
    telemetry = config.telemetry.model_copy(update={"positions": positions})
    return config.model_copy(update={"telemetry": telemetry})


def _recorded_overlays(sources: list[str]) -> list[str]:
    """The configuration of the run that a replay repeats; others go over it."""
    from adapters.recordings.replay import recorded_config, replayed_folder

    folder = replayed_folder(sources[0])
    try:
        return [] if folder is None else [str(recorded_config(folder))]
    except SourceError as error:
        raise ConfigError(str(error)) from error


def _stays(is_wanted: bool, is_unwanted: bool) -> bool | None:
    """What --view-stays and --no-view-stays say."""
    if is_wanted and is_unwanted:
        raise ConfigError("--view-stays, --no-view-stays: one of them")
    return is_wanted if is_wanted or is_unwanted else None


def _options(
    sources: list[str],
    *,
    out: Path,
    view: ViewMode,
    overwrite: bool,
    quiet: bool,
    view_stays: bool | None,
) -> LaunchOptions:
    from adapters.launch import LaunchOptions
    from adapters.views.staying import StayingViews

    if view_stays is not None and view is not ViewMode.SERVE:
        raise ConfigError("--view-stays: goes with --view serve only")
    staying = StayingViews(view_stays, is_on_terminal=sys.stdout.isatty())

    return LaunchOptions(
        sources=tuple(sources),
        path=out,
        overwrite=overwrite,
        view_mode=view,
        show_progress=not quiet,
        staying=staying if view is ViewMode.SERVE else None,
    )


def _limit_library_threads() -> None:
    from adapters.launch import limit_library_threads

    limit_library_threads()


def _launch(config: Config, options: LaunchOptions) -> RunOutcome:
    from adapters.launch import launch

    return launch(config, options)


def _default_out(source: str) -> Path:
    """runs/NAME; NAME is the last part of the source that says anything, without credentials."""
    from engine.output.run_folder import unique_run_path

    photos = photo_list_of(source)
    if photos is not None:
        source = str(photos.folder)
    if not os.path.exists(source):
        name = _name_of_address(source)
    else:
        path = Path(os.path.abspath(source))
        name = path.name if path.is_dir() else path.stem
        if name in {"images", "frames", "video"}:
            name = path.parent.name
    return unique_run_path(Path("runs"), name[:_MAX_NAME_CHARS])


def _name_of_address(source: str) -> str:
    scheme = source.partition(":")[0].lower()
    address = source.partition("?")[0].rpartition("@")[2]
    parts = re.split(r"[/:]+", address.rstrip("/:"))
    if scheme == "phone":
        return scheme
    if scheme == "camera":
        return f"{scheme}-{parts[-1]}"
    if scheme in {"mqtt", "mqtts"}:  # the levels of a topic that name a place
        parts = [part for part in parts[2:] if part not in {"+", "#", "frame", "frames"}]
        return "-".join(parts) or "mqtt"
    return parts[-1]


def _begun_from(
    onto: Path, options: LaunchOptions, *, overlays: Sequence[str], settings: Sequence[str]
) -> tuple[LaunchOptions, Config]:
    """Options and settings of a run that begins with the map of another one."""
    from adapters.launch import refuse_own_input
    from adapters.resume import begin_from, refuse_replays

    refuse_replays(options.sources)
    refuse_own_input(options)  # the folder is replaced before the run is launched
    _limit_library_threads()
    going_on = begin_from(
        onto, options.path, overwrite=options.overwrite, overlays=overlays, settings=settings
    )
    return replace(options, going_on=going_on), going_on.config


def _control(
    gcp: Path | None, checks: list[str] | None, scale_bar: tuple[str, str, float] | None
) -> Control | None:
    """Ground control as it was asked for; None without any."""
    if not (gcp or checks or scale_bar):
        return None
    from adapters.georeference import Control

    return Control(file=gcp, checks=tuple(checks or ()), bar=scale_bar)


def _laid_out(outcome: RunOutcome, control: Control | None) -> tuple[RunOutcome, list[str]]:
    """The outcome of a run that was laid onto what it is for, and lines on why it could not be.

    Without ground control it is laid onto what it was laid onto after a former end, if it was.
    """
    from adapters.georeference import lay_again, survey
    from engine.output.laid_onto import command_to_lay_again
    from engine.types import Verdict

    command = command_to_lay_again(outcome.path)
    if control is None and not command:
        return outcome, []
    try:
        with native_log_captured():
            lines = (
                lay_again(outcome.path) if control is None else survey(outcome.path, control).lines
            )
    except EngineError as error:
        if control is not None:
            return outcome, [f"not laid onto ground control: {error}"]
        return outcome, [
            f"NOT laid onto what the map is to be laid onto: {error}",
            f"once that is mended: {command}",
        ]
    for line in lines:
        _say(line)
    _renew_report(outcome.path)
    summary = json.loads((outcome.path / "summary.json").read_text(encoding="utf-8"))
    verdict = Verdict.from_record(summary.get("verdict") or {})  # with doubts about the place
    return replace(outcome, summary=summary, verdict=verdict), []


def _finish(
    outcome: RunOutcome, options: LaunchOptions, *, control: Control | None = None
) -> NoReturn:
    """Prints what was made and how far to trust it, and ends with the exit code that fits.

    The last line is that of the maps.
    """
    from engine.types import VerdictLevel

    is_made, complaints = outcome.num_registered >= 2, _complaints(outcome)
    not_laid: list[str] = []
    if is_made:
        outcome, not_laid = _laid_out(outcome, control)
    recordings = sorted(outcome.path.glob("recording*.rrd"), key=lambda one: one.stat().st_mtime)
    if is_made and recordings:
        viewer = Path(sys.executable).with_name("rerun")
        files = " ".join(map(str, recordings))
        command = os.path.relpath(viewer)
        in_browser = "" if has_screen() else f", or in a browser: {command} --web-viewer {files}"
        _say(f"look at it again: {command} {files}{in_browser}")
    if outcome.stopped_by != "end_of_sources":
        _say(f"go on with it: livesfm resume {outcome.path}")
    lines = [
        *_report_lines(outcome),
        *_dense_lines(outcome),
        *_place_lines(outcome),
        *_unused_lines(outcome),
        *_fault_lines(outcome),
    ]
    for line in [*lines, *_verdict_lines(outcome, is_made=is_made), *not_laid]:
        _say(line)
    _say(
        f"{outcome.path}: {outcome.num_registered} of {outcome.num_keyframes} keyframes registered"
        + (_other_maps(outcome) if is_made else f"; no map could be made{_why_no_map(outcome)}")
        + "".join(f"; {words}" for words in complaints)
    )
    if options.staying is not None:
        options.staying.stay(was_stopped=outcome.stopped_by == "signal")
    if not is_made or complaints:
        _leave(outcome, NOTHING_MADE)
    is_good = outcome.verdict.level is VerdictLevel.GOOD and not not_laid
    _leave(outcome, 0 if is_good else DOUBTED)


def _discard_if_empty(outcome: RunOutcome) -> None:
    """Deletes the folder of a new run to which nothing came, and ends: the next run has its name.

    One that hangs may still write, and stays.
    """
    is_empty = outcome.summary.get("frames_received") == 0 and not outcome.num_keyframes
    if not is_empty or outcome.num_hangs or outcome.not_saved:
        return
    from engine.output.run_folder import discard_run

    with suppress(OSError):
        discard_run(outcome.path)
    _say(f"no frame came, see above; {outcome.path} is not kept")
    _leave(outcome, NOTHING_MADE)


def _say(line: str) -> None:
    """Prints a line, unless the terminal is gone."""
    try:
        typer.echo(line)
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end


def _leave(outcome: RunOutcome, code: int) -> NoReturn:
    """Ends with an exit code; at once where a thread hangs in a library that would not let go."""
    if outcome.num_hangs:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    raise typer.Exit(code)


def _report_lines(outcome: RunOutcome) -> list[str]:
    """Where the report is."""
    path = outcome.path / "report.html"
    return [f"report: {path}"] if path.exists() else []


def _renew_report(run_folder: Path) -> None:
    """Writes the report of a run anew, if it has one."""
    from adapters.launch import write_report

    if (run_folder / "report.html").exists():
        write_report(run_folder)


def _dense_lines(outcome: RunOutcome) -> list[str]:
    """What the dense map came to, and how to get the depth that was left out."""
    dense: dict[str, Any] = outcome.summary.get("dense", {})
    products = sorted(path.name for path in (outcome.path / "products").glob("*"))
    if not (dense.get("keyframes_with_depth") and products):
        return []
    num_left = sum(dense["keyframes_without"].get(why, 0) for why in _MADE_BY_RESUME)
    more = (
        f"; {num_left} more: livesfm resume {outcome.path} --set dense.max_cpu_share=0.9"
        if num_left
        else ""
    )
    folder = outcome.path / "products"
    return [
        f"dense map: depth of {dense['keyframes_with_depth']} keyframes in {folder}"
        f" ({', '.join(products)}){_crs_words(outcome, products)}{more}"
    ]


def _crs_words(outcome: RunOutcome, products: Sequence[str]) -> str:
    """The CRS of the products, or how to get GeoTIFFs of a map with a place."""
    from adapters.install_advice import how_to_install
    from engine.output.products_again import FORMER_FRAME

    dense: dict[str, Any] = outcome.summary["dense"]
    epsg = (dense.get("written") or {}).get("epsg")
    if epsg is not None:
        return f", GeoTIFFs in EPSG:{epsg}"
    is_placed = outcome.summary.get("georeference") and not dense.get(FORMER_FRAME)
    if not (is_placed and "orthophoto.png" in products):
        return ""
    return f"; for GeoTIFFs in UTM: {how_to_install('survey')}, then livesfm resume {outcome.path}"


def _place_lines(outcome: RunOutcome) -> list[str]:
    """Why the map has no place on the globe although there are positions."""
    why = outcome.summary.get("not_georeferenced")
    return [f"not georeferenced: {why}"] if why else []


def _unused_lines(outcome: RunOutcome) -> list[str]:
    """How much of what came was not used, but for files that nobody expects to be."""
    from adapters.report.words import count

    num_dropped = sum(outcome.summary.get("frames_dropped", {}).values())
    nums_left_out: Counter[str] = Counter()
    for one in outcome.summary.get("left_out", []):
        if one["is_missed"]:
            noun = "telemetry message" if one["kind"] == "telemetry" else "file"
            nums_left_out[noun] += one["num_files"]
    counted = [f"{count(num_dropped, 'frame')} dropped"] if num_dropped else []
    counted += [f"{count(num, noun)} left out" for noun, num in nums_left_out.items()]
    has_report = (outcome.path / "report.html").exists()
    where = "the report" if has_report else outcome.path / "summary.json"
    return [f"{', '.join(counted)}: see {where}"] if counted else []


def _fault_lines(outcome: RunOutcome) -> list[str]:
    """What broke while the run went on."""
    faults: dict[str, int] = outcome.summary.get("faults", {})
    if not faults:
        return []
    parts = ", ".join(
        f"{what.replace(': ', ' ')} {f'{count} times' if count > 1 else 'once'}"
        for what, count in faults.items()
    )
    return [f"what broke: {parts}; see FaultOccurred in {outcome.path / 'events.jsonl'}"]


def _complaints(outcome: RunOutcome) -> list[str]:
    """What keeps a run from being whole: where it is not, what is not saved, why it ended early."""
    complaints = []
    if outcome.asked_path is not None:
        complaints.append(f"it is not in {outcome.asked_path}, see above")
    if outcome.not_saved:
        complaints.append(f"NOT SAVED: {', '.join(outcome.not_saved)}")
    if outcome.unopened:
        complaints.append(f"not opened, see above: {', '.join(outcome.unopened)}")
    if outcome.stopped_by == "full_disk":
        complaints.append("the run ended early because the disk is nearly full")
    if outcome.stopped_by == "failure":
        complaints.append("the run broke off, see the errors above")
    return complaints


def _verdict_lines(outcome: RunOutcome, *, is_made: bool) -> list[str]:
    """The verdict and its reasons; wrapped for people, a line each for programs."""
    from adapters.live.verdict_words import verdict_lines

    summary = str(outcome.path / "summary.json")
    lines = verdict_lines(outcome.verdict, width=_terminal_width(), more_in=summary)
    if is_made:
        return lines
    # The last line has the first reason why there is no map.
    return ["no map:", *lines[1:]] if len(outcome.verdict.reasons) > 1 else []


def _terminal_width() -> int | None:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _why_no_map(outcome: RunOutcome) -> str:
    if not outcome.num_keyframes:
        return ": no frame came, see above"
    reasons = outcome.verdict.reasons
    if reasons:
        return f": {reasons[0].sentence.removeprefix('no map: ')}"
    return _TURNS if outcome.summary.get("turning") else _WHY_NO_MAP


def _other_maps(outcome: RunOutcome) -> str:
    """How many keyframes each map apart from the map holds."""
    from adapters.live.verdict_words import in_words

    sizes = outcome.num_in_other_maps
    if not sizes:
        return ""
    if len(sizes) == 1:
        return f"; another map holds {sizes[0]} (sparse/1)"
    return f"; other maps hold {in_words(sizes)} (sparse/1 to sparse/{len(sizes)})"


def _print_evaluation(run_folder: Path, reference: Path, *, as_json: bool = False) -> Evaluation:
    from adapters.evaluate import evaluate as evaluate_run
    from adapters.evaluate import evaluation_table

    evaluation = evaluate_run(run_folder, reference)
    if as_json:
        typer.echo(json.dumps(evaluation.as_record()))
    else:
        _print_table(evaluation_table(evaluation))
    return evaluation


def _say_if_unfinished(run_folder: Path) -> None:
    """Says that what was read of a run is not its end."""
    from engine.output.run_lock import RunState, run_state

    match run_state(run_folder)[0]:
        case RunState.INTERRUPTED:
            typer.echo(
                f"{run_folder}: the run was interrupted and is unfinished; go on with it:"
                f" livesfm resume {run_folder}",
                err=True,
            )
        case RunState.RUNNING:
            typer.echo(f"{run_folder}: the run still goes on", err=True)
        case _:
            pass


def _say_if_doubted(run_folder: Path) -> None:
    """Says the verdict on a run's map where it is known and not good, with the gravest reason."""
    from adapters.report.summary import read_summary
    from engine.regular_files import read_regular_file
    from engine.types import VerdictLevel

    path = run_folder / "summary.json"
    try:
        verdict = read_summary(read_regular_file(path, max_bytes=_MAX_SUMMARY_BYTES)).verdict
    except (OSError, ValueError):
        return  # the run goes on, or broke off
    if verdict is None or verdict.level is VerdictLevel.GOOD:
        return
    why = f": {verdict.reasons[0].sentence}" if verdict.reasons else ""
    typer.echo(f"the map is {verdict.level}{why}")


def _say_if_depth_is_left_out(run_folder: Path) -> None:
    """Says how the dense map of a run is finished where keyframes had no turn for depth."""
    from adapters.report.summary import read_summary
    from adapters.report.words import count
    from engine.regular_files import read_regular_file

    path = run_folder / "summary.json"
    try:
        summary = read_summary(read_regular_file(path, max_bytes=_MAX_SUMMARY_BYTES))
    except (OSError, ValueError):
        return  # the run goes on, or broke off
    num_left = sum(summary.dense.keyframes_without.get(why, 0) for why in _MADE_BY_RESUME)
    if num_left:
        typer.echo(
            f"the dense map is unfinished, without the depth of {count(num_left, 'keyframe')};"
            f" before an export of all: livesfm resume {run_folder} --set dense.max_cpu_share=0.9"
        )


def _print_table(table: Table) -> None:
    from rich.console import Console

    Console().print(table)


@contextmanager
def _errors_reported() -> Iterator[None]:
    """Turns the engine's errors into one line and an exit code."""
    try:
        yield
    except typer.Exit:  # a RuntimeError, which has been explained
        raise
    except (ConfigError, AdapterUnavailableError) as error:
        typer.echo(f"livesfm: {error}", err=True)
        raise typer.Exit(REFUSED) from error
    except EngineError as error:
        typer.echo(f"livesfm: {error}", err=True)
        raise typer.Exit(NOTHING_MADE) from error
    except KeyboardInterrupt as interrupt:
        _leave_interrupted(interrupt)
    except (AttributeError, ImportError, MemoryError, OSError, RuntimeError) as error:
        if _comes_from_interrupt(error):
            _leave_interrupted(error)
        words = exhaustion_in_words(error)
        if not words:
            raise
        typer.echo(f"livesfm: {words}", err=True)
        raise typer.Exit(NOTHING_MADE) from error


def _leave_interrupted(error: BaseException) -> NoReturn:
    typer.echo("livesfm: stopped before anything was written", err=True)
    raise typer.Exit(INTERRUPTED) from error


def _comes_from_interrupt(error: BaseException | None) -> bool:
    """Whether a signal is behind an error: native modules whose loading it stops raise another."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


if __name__ == "__main__":
    main()
