"""Puts a run together from its parts and runs it."""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import logging
import os
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.calibrations.by_camera import CalibrationsByCamera
from adapters.exhaustion import provide_descriptors
from adapters.install_advice import missing_package
from adapters.native_log import handlers_writing_to, native_log_captured
from adapters.profiling import Profile, profiled
from adapters.sources.files.photo_list import photo_list_of
from adapters.start_signals import StartSignals, start_signals
from adapters.views.view_mode import ViewMode
from engine.config import Config, dump_config
from engine.errors import ConfigError, SourceError
from engine.ports import (
    CameraCalibrations,
    CameraMasks,
    FrameIds,
    InvitesSenders,
    KnowsGroundTruth,
    KnowsImageSizes,
    OffersFeedbackView,
    PairMatcher,
    PlaceIndex,
    RunControl,
    SecondMatcher,
    Source,
    View,
    WindowSolver,
    WorksAhead,
)
from engine.types import Float64Array, FrameId, Received, SourceInfo

if TYPE_CHECKING:
    from adapters.recordings.input_recording import FolderRecording
    from adapters.resume import GoingOn
    from adapters.sources.streams.push_listener import EarlyListening
    from adapters.views.staying import StayingViews
    from engine.mapping.model.bundle_adjustment import GlobalAdjuster
    from engine.output.run_folder import RunFolder
    from engine.run.engine import Engine, RunOutcome
    from engine.run.event_loop import RunRequests
    from engine.run.ingestion import SourceRole

logger = logging.getLogger(__name__)

_SHOW_CURSOR = "\x1b[?25h"
_FREEZE_EVERY_S = 30.0  # what is long-lived is left out of garbage collections


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """What the command line says about a run besides its configuration."""

    sources: tuple[str, ...]
    path: Path  # of the run folder
    overwrite: bool  # a former run there may be replaced
    view_mode: ViewMode
    show_progress: bool
    going_on: GoingOn | None = None  # what the run goes on from, in the folder; None: nothing
    record_input: Path | None = None  # where what the run receives is kept; None: nowhere
    profile: bool = False  # where its threads spend their time is written into the folder
    staying: StayingViews | None = None  # takes live views, which end after the run; None: with it
    early: EarlyListening | None = None  # what listens already for sources that wait for a push
    lays_onto: tuple[str, ...] = ()  # arguments of livesfm georeference, for the map when it ends


def launch(config: Config, options: LaunchOptions) -> RunOutcome:
    """Runs to the end of the sources or a signal.

    A source that cannot be opened is reported in the log and in the run folder, which is valid even
    if nothing else is in it.

    Raises:
        ConfigError: the folder cannot be used, the view cannot be opened, a mask or a calibration
            cannot be used, or not one of the sources can be opened.
        AdapterUnavailableError: a package that is asked for is missing.
        JournalError: the folder cannot be written.
        KeyboardInterrupt: a signal came while nothing was written or replaced yet.
    """
    try:
        with start_signals() as signals:
            if not options.profile:
                return _launch(config, options, signals)
            with profiled() as profile:
                outcome = _launch(config, options, signals)
            _write_profile(profile, outcome.path)
            return outcome
    except BaseException:
        if options.going_on is not None:
            options.going_on.give_up()
        raise


def write_report(run: Path) -> Path:
    """Writes the report of a run into its folder, in one step.

    Raises:
        ConfigError: the folder is not that of a run.
        OSError: the report cannot be written; a former one stays.
    """
    from adapters.report.report import report_page
    from engine.output.files import write_atomically
    from engine.output.run_folder import REPORT_NAME

    path = run / REPORT_NAME
    write_atomically(path, report_page(run))
    return path


def report_at_end(config: Config, run: Path) -> None:
    """Writes the report of a run that has ended, if it is wanted; without it the run stands."""
    if not config.report.enabled:
        return
    try:
        write_report(run)
    except OSError as error:
        logger.warning("%s: the report cannot be written: %s", run, error.strerror or error)
    except Exception:  # a task boundary: the run is saved, whatever its report trips over
        logger.exception("%s: no report could be made", run)


def _write_profile(profile: Profile, run_folder: Path) -> None:
    """Writes the profile into the run folder; the run is saved, also where that fails."""
    from engine.output.run_folder import PROFILE_FOLDER

    try:
        profile.write(run_folder / PROFILE_FOLDER)
    except OSError as error:
        logger.warning("%s: the profile cannot be written: %s", run_folder, error.strerror)


def _launch(config: Config, options: LaunchOptions, signals: StartSignals) -> RunOutcome:
    provide_descriptors()
    limit_library_threads()
    refuse_own_input(options)
    given = config.cameras.calibrations
    calibrations = CalibrationsByCamera.read(given) if given else None
    specs = options.sources
    former = None if options.going_on is None else options.going_on.former
    if former is not None and not specs:
        from adapters.resume import addresses_of

        specs = tuple(addresses_of(former))
    first_id = 1 if former is None else former.next_frame_id
    sources = _open_sources(
        specs,
        config,
        first_id=first_id,
        may_all_fail=former is not None and not options.sources,
        early=options.early,
    )
    _load_ahead()  # after the sources, because drones wait for those that listen
    if len(specs) == 1:  # a replay has all sources of its run
        specs = specs * len(sources)
    from adapters.resume import ended_programs, roles_of

    if former is not None and not options.sources:
        ended = ended_programs(former)
        specs, sources = (*specs, *("" for _ in ended)), [*sources, *ended]
    roles = roles_of(specs, sources, former)
    if options.record_input is not None:
        roles = [role.with_recording(os.path.realpath(options.record_input)) for role in roles]
    if calibrations is not None:
        _refuse_misfits(calibrations, sources)
    with native_log_captured():
        engine = open_engine(
            config,
            options,
            sources,
            roles=roles,
            calibrations=calibrations,
            before_folder=signals.hold,
        )
        former = None  # the engine keeps it only until the map is restored
        if options.going_on is not None:
            options.going_on.former = None
        signals.hand_to(engine.interrupt)
        runner = asyncio.Runner()
        outcome = runner.run(_run(engine))
        if not outcome.num_hangs:  # else it would wait for what hangs
            runner.close()
        report_at_end(config, outcome.path)
        return outcome


async def _run(engine: Engine) -> RunOutcome:
    """Runs it, with what has become long-lived left out of garbage collections.

    A full collection holds the interpreter lock while it looks at every object there is: 0.06 s at
    40 keyframes, and more the larger the map. What maps hold goes by its reference counts.
    """
    freezing = asyncio.create_task(_freeze_again_and_again())
    try:
        return await engine.run()
    finally:
        freezing.cancel()
        gc.unfreeze()


async def _freeze_again_and_again() -> None:
    while True:
        gc.collect(1)  # the younger two generations: what is garbage already is not kept
        gc.freeze()
        await asyncio.sleep(_FREEZE_EVERY_S)


def refuse_own_input(options: LaunchOptions) -> None:
    """Refuses to replace a run folder that its own source lies in; before it is replaced.

    Raises:
        ConfigError: one does.
    """
    if not options.overwrite:
        return
    target = options.path.resolve()
    for spec in options.sources:
        for path in _paths_of(spec):
            if path.exists() and path.resolve().is_relative_to(target):
                raise ConfigError(f"{path}: lies in the run folder that would be replaced")


def _paths_of(spec: str) -> list[Path]:
    """What a source is read from, where it is files."""
    if (photos := photo_list_of(spec)) is not None:
        return photos.paths
    return [Path(spec if os.path.exists(spec) else spec.removeprefix("watch:"))]


def count_frame_ids(first: int = 1) -> FrameIds:
    """A counter of frame ids."""
    counter = itertools.count(first)
    return lambda: FrameId(next(counter))


def limit_library_threads() -> None:
    """Gives each library call one thread: the engine's own threads keep the cores busy."""
    # OpenMP's limit belongs to a thread, unless the environment sets it before the library loads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Networks on a CPU use more. Threads that spin at each barrier starve those they wait for as
    # soon as anything else runs: small products then take tens of times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import cv2
    import numpy as np  # noqa: F401 - only libraries that are loaded can be limited
    import threadpoolctl

    threadpoolctl.threadpool_limits(1, user_api="blas")
    cv2.setNumThreads(1)


def _load_ahead() -> None:
    """Loads what a run uses sooner or later: in the midst of one nothing may be left to load with.

    A file that has gone, or the last descriptor in use, would end it there.
    """
    import encodings.cp437  # noqa: F401 - names in archives of arrays

    import numpy.ma
    import numpy.random  # noqa: F401
    import onnxruntime  # noqa: F401

    from adapters.live import verdict_words  # noqa: F401


def _load_torch(adapter: str, *, extra: str) -> None:
    """Loads PyTorch, which only some adapters need, with one thread a call.

    Args:
        adapter: what needs it.
        extra: what brings it.

    Raises:
        AdapterUnavailableError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise missing_package(adapter, package="torch", extra=extra) from error
    torch.set_num_threads(1)


def open_engine(
    config: Config,
    options: LaunchOptions,
    sources: Sequence[Source],
    *,
    roles: Sequence[SourceRole] | None = None,
    calibrations: CameraCalibrations | None = None,
    views: Sequence[View] = (),
    requests: RunRequests | None = None,
    before_folder: Callable[[], None] = lambda: None,
) -> Engine:
    """Opens what a run needs, and last its folder.

    Args:
        config: the resolved configuration.
        options: what else there is to say about the run.
        sources: where its frames come from.
        roles: what each source is called; by default as in a new run.
        calibrations: those that the user gave.
        views: beside those that the options ask for.
        requests: what people who watch ask of the run.
        before_folder: is called before a former run may be replaced.

    Raises:
        ConfigError: the folder cannot be used, a view cannot be opened, or a mask cannot be used.
        AdapterUnavailableError: a package that is asked for is missing.
        JournalError: the folder cannot be written.
    """
    from engine.run.engine import Engine
    from engine.run.event_loop import RunRequests

    going_on = options.going_on
    # Before a former run is replaced: a view or a matcher that cannot open must not cost it.
    _check_live_view(config, options)
    matcher, places = _matching(config, sources)
    requests = requests or RunRequests()
    opened = [*views]
    folder: RunFolder | None = None
    recording: FolderRecording | None = None
    try:
        second = _second_matcher(config)
        solve_window = _window_solver(config, options, matcher)
        adjust = _map_adjuster(config, matcher)
        masks = _camera_masks(config)
        opened += _open_remote_views(config, options, sources, requests)
        recording = _input_recording(config, options, sources)
        before_folder()  # a former run may be replaced now, so this one has to begin
        folder = _run_folder(config, options)
        opened += _open_views(config, options, sources)
        return Engine(
            config,
            folder=folder,
            sources=sources,
            matcher=matcher,
            places=places,
            views=opened,
            groundtruth=_groundtruth(sources),
            leave=functools.partial(_leave_at_once, options.path),
            requests=requests,
            solve_window=solve_window,
            masks=masks,
            calibrations=calibrations,
            roles=roles,
            former=None if going_on is None else going_on.former,
            onto="" if going_on is None else going_on.onto,
            recording=recording,
            second=second,
            adjust=adjust,
        )
    except BaseException:  # whatever it is, a later run needs the folder and the views
        if isinstance(matcher, WorksAhead):
            matcher.close()
        if recording is not None:
            recording.discard()
        for view in opened:
            view.close()
        if folder is not None and options.going_on is None:
            folder.close()
        raise


def _run_folder(config: Config, options: LaunchOptions) -> RunFolder:
    from engine.output.disk import refuse_full_disk
    from engine.output.run_folder import RunFolder

    text, going_on = dump_config(config), options.going_on
    if not options.overwrite:  # which makes room
        refuse_full_disk(options.path, config.runtime)
    if going_on is None or going_on.former is None:
        folder = RunFolder.create(options.path, config_text=text, overwrite=options.overwrite)
    else:
        frames = going_on.former.frames
        folder = RunFolder.reopen(options.path, frames, config_text=text, lock=going_on.lock)
    if options.lays_onto:  # a resume lays the map of a run that is killed before its end
        folder.keep_what_it_is_laid_onto(options.lays_onto)
    return folder


def _input_recording(
    config: Config, options: LaunchOptions, sources: Sequence[Source]
) -> FolderRecording | None:
    """Where what the run receives is kept, if that is wanted.

    Raises:
        ConfigError: the folder cannot be used.
    """
    if options.record_input is None:
        return None
    from adapters.recordings.input_recording import FolderRecording

    infos = [source.info for source in sources]
    return FolderRecording.create(options.record_input, config=config, sources=infos)


def _leave_at_once(path: Path) -> None:
    from engine.run.engine import leave_at_once

    if sys.stderr.isatty():
        sys.stderr.write(_SHOW_CURSOR)  # the panel hid it and has no time to close
        sys.stderr.flush()
    logger.error("go on with it: livesfm resume %s", path)
    leave_at_once()


def _matching(config: Config, sources: Sequence[Source]) -> tuple[PairMatcher, PlaceIndex | None]:
    """The configured matcher, and how it finds places; None: by its descriptors.

    Raises:
        AdapterUnavailableError: PyTorch is missing.
        ConfigError: the matcher does not fit the sources, or its weights cannot be used.
    """
    match config.matching.matcher:
        case "sift":
            return _sift(config, sources), None
        case "oracle":
            return _oracle(config, sources)
        case "mast3r" if config.remote.address:
            from adapters.remote.open_remote import open_remote_mast3r

            return open_remote_mast3r(config)
        case "mast3r":
            _load_torch("matching.matcher=mast3r", extra="mast3r")
            from adapters.matchers.mast3r.open_matcher import open_mast3r

            return open_mast3r(config.mast3r, dense=config.dense_matching)


def _second_matcher(config: Config) -> SecondMatcher | None:
    """The configured second matcher, if there is one.

    Raises:
        AdapterUnavailableError: PyTorch is missing.
        ConfigError: its weights cannot be used.
    """
    if config.matching.second == "off":
        return None
    _load_torch("matching.second=mast3r", extra="mast3r")
    from adapters.matchers.mast3r.open_matcher import open_mast3r_second

    return open_mast3r_second(config.mast3r, second=config.second, dense=config.dense_matching)


def _sift(config: Config, sources: Sequence[Source]) -> PairMatcher:
    """SIFT; leaner when there are only videos."""
    from adapters.matchers.sift import SiftMatcher

    sift = config.sift
    if all(source.info.is_sequence for source in sources):
        update = {"max_features": sift.max_features_in_video, "upscaling": 2.0}
        sift = sift.model_copy(update=update)
    if config.remote.address:
        from adapters.remote.open_remote import open_remote_sift

        return open_remote_sift(config, sift)
    return SiftMatcher(sift)


def _oracle(config: Config, sources: Sequence[Source]) -> tuple[PairMatcher, PlaceIndex]:
    from adapters.town.oracle import OraclePlaces, open_oracle
    from adapters.town.source import SyntheticTown

    town = sources[0]
    if len(sources) != 1 or not isinstance(town, SyntheticTown):
        raise ConfigError("matching.matcher=oracle knows the truth of one synthetic:town only")
    oracle = open_oracle(config, town)
    if config.remote.address:
        from adapters.remote.open_remote import open_remote_oracle

        return open_remote_oracle(config, oracle), OraclePlaces(oracle)
    return oracle, OraclePlaces(oracle)


def _map_adjuster(config: Config, matcher: PairMatcher) -> GlobalAdjuster | None:
    """What adjusts copies of the map elsewhere; None: the engine does it here."""
    if not (config.remote.adjusts_maps and config.remote.address):
        return None
    from adapters.remote.open_remote import open_remote_adjuster

    return open_remote_adjuster(matcher)


def _window_solver(
    config: Config, options: LaunchOptions, matcher: PairMatcher
) -> WindowSolver | None:
    """The configured solver of windows; None: the engine's own.

    Raises:
        AdapterUnavailableError: PyTorch is missing.
        ConfigError: upstream's package or something it needs is missing, or its weights cannot be
            used.
    """
    if not config.window.enabled:
        return None
    if config.window.solver == "native":
        if not (config.remote.solves_windows and config.remote.address):
            return None
        from adapters.remote.open_remote import open_remote_solver

        return open_remote_solver(matcher)
    _load_torch("window.solver=vggsfm", extra="vggsfm")
    from adapters.windows.vggsfm import open_vggsfm
    from adapters.windows.vggsfm_predictor import FolderImages
    from engine.windows.model import WindowSolverConfig
    from engine.windows.solver import solve_window

    return open_vggsfm(
        config.window,
        first_solver=functools.partial(solve_window, config=WindowSolverConfig()),
        read_image=FolderImages(options.path / "images"),
    )


def _camera_masks(config: Config) -> CameraMasks | None:
    """The configured masks of whole cameras.

    Raises:
        ConfigError: one cannot be read.
    """
    if not config.cameras.masks:
        return None
    from adapters.images.camera_masks import MaskedCameras

    return MaskedCameras(config.cameras.masks, config=config.sources)


@dataclass(frozen=True, slots=True, kw_only=True)
class _RefusedSource:
    """A source that cannot be opened: the run reports it and goes on with the others."""

    info: SourceInfo
    error: SourceError

    async def frames(self) -> AsyncGenerator[Received, None]:
        raise self.error
        yield  # makes it a generator


def _open_sources(
    specs: Sequence[str],
    config: Config,
    *,
    first_id: int = 1,
    may_all_fail: bool = False,
    early: EarlyListening | None = None,
) -> list[Source]:
    """Opens what can be opened.

    Args:
        specs: as the user named them.
        config: the resolved configuration.
        first_id: the first id that a frame gets.
        may_all_fail: the run may go on without a source.
        early: what listens already for sources that wait for a push.

    Raises:
        ConfigError: none of them can be opened.
    """
    from adapters.open_source import open_source, report_unused_positions
    from adapters.recordings.replay import open_replay, replayed_folder

    if len(specs) == 1 and (folder := replayed_folder(specs[0])) is not None:
        try:
            return list(open_replay(folder, config=config.sources))
        except SourceError as error:
            raise ConfigError(str(error)) from error
    next_frame_id = count_frame_ids(first_id)
    sources: list[Source] = []
    refused: list[SourceError] = []
    report_unused_positions(specs, config=config.telemetry)
    for place, spec in enumerate(specs):
        beside = [*specs[:place], *specs[place + 1 :]]
        try:
            sources.append(
                open_source(
                    spec, config=config, next_frame_id=next_frame_id, beside=beside, early=early
                )
            )
        except SourceError as error:
            label = _label_of(spec)
            info = SourceInfo(label=label, is_live=False, is_sequence=True, num_frames=0)
            sources.append(_RefusedSource(info=info, error=error))
            refused.append(error)
    if may_all_fail:
        return sources
    if refused and len(refused) == len(specs):
        raise ConfigError("; ".join(map(str, refused))) from refused[0]
    return sources


def _label_of(spec: str) -> str:
    """What a source that is not opened is called: what is no path may hold a password."""
    return spec if os.path.exists(spec) else spec.partition(":")[0]


def _refuse_misfits(calibrations: CalibrationsByCamera, sources: Sequence[Source]) -> None:
    """Refuses calibrations that no image can be of, where all sources know their images' sizes.

    Raises:
        ConfigError: with the sizes.
    """
    sizes: set[tuple[int, int]] = set()
    for source in sources:
        if not isinstance(source, KnowsImageSizes):
            return
        for size in source.image_sizes():
            sizes.add(size)
            if not calibrations.misfits(sizes):
                return
    if misfits := calibrations.misfits(sizes):
        raise ConfigError(misfits[0])


def _check_live_view(config: Config, options: LaunchOptions) -> None:
    """Refuses a live view whose ports are taken or that has no screen."""
    if options.view_mode in (ViewMode.SPAWN, ViewMode.SERVE):
        from adapters.views.rerun_service import LiveServer

        LiveServer(config.views, with_page=options.view_mode is ViewMode.SERVE).stop()


def _open_remote_views(
    config: Config,
    options: LaunchOptions,
    sources: Sequence[Source],
    control: RunControl,
) -> list[View]:
    """Views for people and programs elsewhere: MQTT, and phones that are a source.

    Raises:
        ConfigError: MQTT is not set up as it has to be.
    """
    views: list[View] = []
    if config.mqtt.publish:
        from adapters.mqtt.view import MqttView

        views.append(MqttView.open(config, run_path=options.path, control=control))
    for source in sources:
        if isinstance(source, OffersFeedbackView):
            views.append(source.feedback_view())
        if isinstance(source, InvitesSenders) and (invitation := source.invitation()):
            sys.stderr.write(f"{invitation}\n")
    return views


def _open_views(config: Config, options: LaunchOptions, sources: Sequence[Source]) -> list[View]:
    views: list[View] = []
    is_live = options.view_mode in (ViewMode.SPAWN, ViewMode.SERVE)
    if is_live:
        views.append(_open_live_view(config, options))
    if config.views.recording and options.view_mode is not ViewMode.NONE:
        from adapters.views.rerun_view import RerunView

        recording = RerunView.open(
            options.path.name,
            mode=ViewMode.RECORD,
            recording_path=_next_recording(options.path),
            config=config.views,
        )
        views.append(recording)
    if options.show_progress:
        # Last, because from here on the terminal belongs to the panel.
        from adapters.views.console import ConsoleView

        counts = [source.info.num_frames for source in sources]
        known = [count for count in counts if count is not None]
        handlers = handlers_writing_to(sys.stderr)
        console = ConsoleView(sum(known) if len(known) == len(counts) else None)
        views.append(console)
        for handler in handlers:
            handler.setStream(sys.stderr)  # now it leads to the lines above the panel
            handler.addFilter(lambda record: not console.shows_as_event(record))
    return views


def _next_recording(path: Path) -> Path:
    """The file of this part of the run: a recording that was closed cannot be appended to."""
    names = itertools.chain(("recording.rrd",), (f"recording_{n}.rrd" for n in itertools.count(2)))
    return next(path / name for name in names if not (path / name).exists())


def _open_live_view(config: Config, options: LaunchOptions) -> View:
    from adapters.views.rerun_view import RerunView

    live = RerunView.open(
        options.path.name,
        mode=options.view_mode,
        recording_path=None,
        config=config.views,
        stays=options.staying is not None,
    )
    if options.staying is not None:
        options.staying.add(live)
    if live.url is not None:
        # On lines of their own, so that they are copied whole.
        logger.warning("watch the run at\n%s\nor in a window:\n%s", live.url, live.viewer_command)
    return live


def _groundtruth(sources: Sequence[Source]) -> list[tuple[float, Float64Array]]:
    """True poses, when the only source knows them."""
    if len(sources) == 1 and isinstance(sources[0], KnowsGroundTruth):
        return sources[0].ground_truth()
    return []
